//! Downloads: to a file beside, to go on after any interruption.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Duration;

use super::frame::Frame;
use super::helper::{Fetch, Helper};
use super::mark::{Download, Mark, MarkFile};
use super::source::Source;
use super::{DOWNLOAD_EXTRA_BYTES, DiskError, Job, MARK_BYTES, Progress, Step, of_source};

/// Attempts in a row that bring nothing.
const ATTEMPTS: u32 = 5;
/// Pause before the next one.
const PAUSE: Duration = Duration::from_secs(1);
/// Longest ETag that is kept.
const ETAG_BYTES_MAX: usize = 1024;

/// Downloads what is left of the source's file.
pub(super) fn complete(
    job: &Job,
    (url, authority): (&str, Option<&str>),
    mark: &mut Mark,
    marks: &MarkFile,
    progress: Progress<'_>,
) -> Result<(), DiskError> {
    let Some(source) = &job.source else { return Ok(()) };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&job.staging)
        .map_err(DiskError::io("making a file for the download"))?;
    let length = file.metadata().map_err(DiskError::io("looking at the download"))?.len();
    let download = mark.download.get_or_insert_default();
    if length < download.done_bytes {
        // The folder for downloads is a new one.
        *download = Download::default();
    }
    if download.complete {
        return Ok(());
    }
    let mut fetching = Fetching {
        job,
        source,
        file: &file,
        mark,
        marks,
        progress,
    };
    let mut attempt = 1;
    loop {
        let before = fetching.download().done_bytes;
        let error = match fetching.fetch(url, authority) {
            Ok(()) => return Ok(()),
            Err(error @ (DiskError::Source { .. } | DiskError::Importer { .. })) => error,
            Err(error) => return Err(error),
        };
        if fetching.download().done_bytes > before {
            attempt = 1;
        }
        if attempt >= ATTEMPTS {
            return Err(error);
        }
        attempt += 1;
        std::thread::sleep(PAUSE);
    }
}

struct Fetching<'a> {
    job: &'a Job,
    source: &'a Source,
    file: &'a File,
    mark: &'a mut Mark,
    marks: &'a MarkFile,
    progress: Progress<'a>,
}

impl Fetching<'_> {
    fn download(&mut self) -> &mut Download {
        self.mark.download.get_or_insert_default()
    }

    /// One attempt. What it brought is marked, whatever comes of it.
    fn fetch(&mut self, url: &str, authority: Option<&str>) -> Result<(), DiskError> {
        let limit_bytes = self.job.size_bytes + self.job.size_bytes / 16 + DOWNLOAD_EXTRA_BYTES;
        let known = self.download().clone();
        let order = Fetch {
            url: url.to_owned(),
            authority: authority.map(str::to_owned),
            from_bytes: known.done_bytes,
            etag: known.etag,
            limit_bytes,
        };
        let mut helper = Helper::start(&self.job.importer, ("fetch", &order), None, self.source)?;
        let mut at = known.done_bytes;
        let received = self.receive(&mut helper, &mut at, limit_bytes);
        match received {
            Ok(()) => self.settle(at, true),
            Err(error) => {
                self.settle(at, false)?;
                Err(error)
            }
        }
    }

    fn receive(&mut self, helper: &mut Helper, at: &mut u64, limit_bytes: u64) -> Result<(), DiskError> {
        let source = self.source;
        let outside = |why: &str| of_source(source, why.to_owned());
        loop {
            match helper.next()? {
                Frame::Begins {
                    offset,
                    total_bytes,
                    etag,
                } => {
                    if offset != 0 && offset != *at {
                        return Err(outside("the server sends another part than was asked for"));
                    }
                    let etag = String::from_utf8_lossy(&etag[..etag.len().min(ETAG_BYTES_MAX)]).into_owned();
                    *at = offset;
                    let download = self.download();
                    download.done_bytes = download.done_bytes.min(offset);
                    download.total_bytes = Some(total_bytes).filter(|total| *total > 0);
                    download.etag = Some(etag).filter(|etag| !etag.is_empty());
                }
                Frame::Data { offset, bytes } => {
                    if offset != *at || bytes.len() as u64 > limit_bytes - *at {
                        return Err(outside("the download is larger than the disk: make the disk larger"));
                    }
                    self.file
                        .write_all_at(bytes, *at)
                        .map_err(DiskError::write("writing the download"))?;
                    *at += bytes.len() as u64;
                    let download = self.download();
                    let (done, total) = (download.done_bytes, download.total_bytes.unwrap_or(*at));
                    (self.progress)(Step::Downloading, (*at).min(total), total);
                    if *at - done >= MARK_BYTES {
                        self.settle(*at, false)?;
                    }
                }
                Frame::End => {
                    let total_bytes = self.download().total_bytes;
                    if total_bytes.is_some_and(|total| total != *at) {
                        return Err(outside("the server ended the download too early"));
                    }
                    return Ok(());
                }
                Frame::Checked { .. } | Frame::Zeros { .. } | Frame::Failed { .. } => {
                    return Err(outside("the importer is of another release"));
                }
            }
        }
    }

    /// Makes what was received durable, then says so.
    fn settle(&mut self, at: u64, complete: bool) -> Result<(), DiskError> {
        if complete {
            // A version before may have been longer.
            self.file
                .set_len(at)
                .map_err(DiskError::write("cutting the download to length"))?;
        }
        self.file
            .sync_all()
            .map_err(DiskError::write("making the download durable"))?;
        let download = self.download();
        download.done_bytes = at;
        download.complete = complete;
        self.marks.write(self.mark)
    }
}
