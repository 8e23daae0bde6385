//! The thread that writes the seat's header: an fsync may take long, and heartbeats don't wait.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use ftvm_protocol::header::SeatHeader;
use ftvm_protocol::identity::RequestId;

use super::Queue;
use crate::control::StoragePart;
use crate::control::header_file::{HeaderFile, HeaderFileError};
use crate::replication::noted::Failures;

/// Writes headers one after another; each is reported.
pub struct HeaderWriter(Sender<(RequestId, SeatHeader)>);

impl HeaderWriter {
    /// Starts the thread; `enter` runs first in it.
    pub fn start(
        mut file: HeaderFile,
        queue: Queue,
        failures: Arc<Failures>,
        enter: impl FnOnce() + Send + 'static,
    ) -> std::io::Result<Self> {
        let (jobs, todo) = channel::<(RequestId, SeatHeader)>();
        std::thread::Builder::new().name("header".to_owned()).spawn(move || {
            enter();
            while let Ok((request, header)) = todo.recv() {
                let written = file.write(&header);
                if let Err(HeaderFileError::Io { what, source }) = &written {
                    failures.note(StoragePart::Header, source, || (*what).to_owned());
                }
                queue.header(request, written.map_err(|error| crate::error_chain(&error)));
                // Nobody waits for the second copy.
                if let Err(error) = file.complete() {
                    tracing::warn!("the header's second copy: {}", crate::error_chain(&error));
                }
            }
        })?;
        Ok(Self(jobs))
    }

    /// Hands a header over.
    pub fn write(&self, request: RequestId, header: SeatHeader) {
        // The thread lives as long as the process.
        let _ = self.0.send((request, header));
    }
}
