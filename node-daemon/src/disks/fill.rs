//! Writing first contents, and zeros where there are none.

use std::fs::File;
use std::os::unix::fs::FileExt;

use ftvm_engine::zeroing::Zeroing;

use super::frame::Frame;
use super::helper::{Helper, Image, Read};
use super::mark::{Mark, MarkFile};
use super::{DiskError, Job, MARK_BYTES, Progress, Step, of_source};

/// Zeros are written so many between two looks at the progress.
const ZEROS_BYTES: u64 = 64 << 20;

/// A disk that is being written.
pub(super) struct Target<'a> {
    pub(super) file: &'a File,
    pub(super) device: bool,
    /// What was not written reads as zeros.
    pub(super) blank: bool,
    pub(super) size_bytes: u64,
    pub(super) marks: &'a MarkFile,
    pub(super) progress: Progress<'a>,
}

impl Target<'_> {
    /// Everything that the mark does not have yet.
    pub(super) fn fill(&self, job: &Job, image: Option<Image>, mark: &mut Mark) -> Result<(), DiskError> {
        let mut at = mark.done_bytes;
        if let (Some(source), Some(image)) = (&job.source, image) {
            let order = Read {
                reading: source.reading().map_err(|why| of_source(source, why))?,
                backing: image.descriptors(),
                sha256: source.sha256.clone(),
                from_bytes: at,
                limit_bytes: self.size_bytes,
            };
            let mut helper = Helper::start(&job.importer, ("read", &order), Some(image), source)?;
            loop {
                let outside = || {
                    of_source(
                        source,
                        "its contents are out of order or larger than the disk".to_owned(),
                    )
                };
                let end = match helper.next()? {
                    Frame::Checked {
                        done_bytes,
                        total_bytes,
                    } => {
                        (self.progress)(Step::Checking, done_bytes.min(total_bytes), total_bytes);
                        continue;
                    }
                    Frame::Data { offset, bytes } => {
                        let end = offset.checked_add(bytes.len() as u64);
                        let end = end
                            .filter(|end| offset >= at && *end <= self.size_bytes)
                            .ok_or_else(outside)?;
                        self.zeros(at, offset)?;
                        self.file
                            .write_all_at(bytes, offset)
                            .map_err(DiskError::write("writing its contents"))?;
                        end
                    }
                    Frame::Zeros { end } => {
                        let end = Some(end)
                            .filter(|end| (at..=self.size_bytes).contains(end))
                            .ok_or_else(outside)?;
                        self.zeros(at, end)?;
                        end
                    }
                    Frame::End => break,
                    Frame::Begins { .. } | Frame::Failed { .. } => return Err(outside()),
                };
                at = end;
                self.done(at, mark)?;
            }
        }
        while at < self.size_bytes {
            let end = self.size_bytes.min(at.saturating_add(ZEROS_BYTES));
            self.zeros(at, end)?;
            at = end;
            self.done(at, mark)?;
        }
        Ok(())
    }

    fn zeros(&self, from: u64, to: u64) -> Result<(), DiskError> {
        if self.blank || from >= to {
            return Ok(());
        }
        // A device may know a faster way than to be written.
        let zeroing = if self.device {
            Zeroing::ByKernel
        } else {
            Zeroing::Written
        };
        let zeroed = zeroing.zero(self.file, from, to - from);
        zeroed.map_err(DiskError::write("writing zeros"))
    }

    /// Everything before this is written.
    fn done(&self, at: u64, mark: &mut Mark) -> Result<(), DiskError> {
        (self.progress)(Step::Writing, at, self.size_bytes);
        if at - mark.done_bytes < MARK_BYTES {
            return Ok(());
        }
        self.file
            .sync_data()
            .map_err(DiskError::write("making its contents durable"))?;
        mark.done_bytes = at;
        self.marks.write(mark)
    }
}
