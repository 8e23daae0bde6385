//! The seat's own disks: what fails, what hangs, and their last flush before a stop. What follows from it the core decides
//! (rule 13 in `docs/protocol.md`).

use std::time::Duration;

use ftvm_protocol::core::{Event, RoleName, Seal, Status as CoreStatus, StorageHealth};

use super::seat::{Work, flush_all};
use super::{Driver, Input};
use crate::devices::event::DeviceEvent;

/// A request that is under way for longer hangs: so long Linux waits for a SCSI disk before it gives a command up.
pub const HANGS_AFTER: Duration = Duration::from_secs(30);
/// Whoever ends, or follows, waits so long for what its disks are doing.
pub const IDLE_WITHIN: Duration = Duration::from_secs(1);

impl Driver {
    pub(super) fn device_event(&mut self, event: &DeviceEvent) {
        self.failing_disks.noticed(event);
        self.warn(event.to_string());
        if matches!(event, DeviceEvent::DiskError { .. }) {
            self.step(Event::Storage(StorageHealth::Failed));
        }
    }

    /// Looks for a request that takes too long, and whether one that did has ended.
    pub(super) fn watch_disks(&mut self) {
        let slowest = self.seat.machine.slowest_disk();
        let lasts = slowest.map_or(Duration::ZERO, |(_, lasts)| lasts);
        self.figures.slowest_request = self.figures.slowest_request.max(lasts);
        let hanging = slowest.filter(|_| lasts > HANGS_AFTER).map(|(disk, _)| disk);
        if !self.failing_disks.hangs(hanging) {
            return;
        }
        match hanging {
            Some(disk) => {
                self.warn(format!("disk {disk} hangs: {}", super::status::hanging_text()));
                self.step(Event::Storage(StorageHealth::Hangs));
            }
            None => {
                self.warn("no disk hangs any more".to_owned());
                self.step(Event::Storage(StorageHealth::Works));
            }
        }
    }

    pub(super) fn storage_failed(&mut self, why: String) {
        self.warn(why);
        self.step(Event::Storage(StorageHealth::Failed));
    }

    /// The last epoch of a pair before a stop. Once that is told, this seat's disks have everything, too. A flush may take long, and heartbeats
    /// are answered meanwhile.
    pub(super) fn flush_then_seal(&mut self) {
        self.pause_guest();
        let (volumes, queue, enter) = (self.seat.volumes(), self.queue.clone(), self.seat.enter(Work::Storage));
        let flush = move || {
            enter();
            queue.put(Input::Flushed(flush_all(&volumes)));
        };
        if let Err(error) = std::thread::Builder::new().name("flush".to_owned()).spawn(flush) {
            self.flushed(Err(format!("can't start the thread that flushes the disks: {error}")));
        }
    }

    pub(super) fn flushed(&mut self, flushed: Result<(), String>) {
        if let Err(why) = flushed {
            self.storage_failed(why);
        }
        // It may have been overtaken by the end of this seat.
        let status = self.core.status();
        if status.stopping && status.role == RoleName::Active {
            self.seal(Seal::Final);
        }
    }

    /// What is wrong with this seat's storage, and what comes of it.
    pub(super) fn why_storage(&self, status: &CoreStatus) -> Option<String> {
        if status.storage == StorageHealth::Works {
            return None;
        }
        let what = self.failing_disks.first();
        let what = what.unwrap_or_else(|| "this seat's storage has failed".to_owned());
        Some(match (status.role, status.peer) {
            (RoleName::Active, Some(_)) => format!("{what}: the guest goes to the standby as soon as that can take it"),
            (RoleName::Active, None) => {
                format!("{what}: the guest gets its errors until a standby has joined and takes over")
            }
            _ => what,
        })
    }

    /// Whether a disk is still being used after a while: by a request that hangs.
    pub fn is_hanging(&self) -> bool {
        !self.seat.machine.wait_disks_idle(IDLE_WITHIN)
    }
}
