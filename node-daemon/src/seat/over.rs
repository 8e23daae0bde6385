//! The end of a seat whose pod is being deleted, or is gone: no engine of it runs, and none is begun any more.
//!
//! ```text
//!   pod is deleted ─► retired: nothing is launched ─► no engine, none on its way ─► over.json ─► told on the pod ─► the pod goes
//! ```
//!
//! Invariant: what was told is true for good. A later daemon finds the file before it begins anything, and an engine that is being launched, or was not yet
//! looked for, counts as one that runs.

use std::sync::Arc;
use std::time::Duration;

use super::Seat;
use crate::explain;

/// In the seat's folder: no engine is begun for it any more.
pub(super) const FILE: &str = "over.json";
/// How often it is looked whether an engine is still being launched.
const LOOK: Duration = Duration::from_millis(20);

impl Seat {
    /// Starts an engine, unless the seat was retired or removed since it was looked whether to.
    pub(super) fn launch(self: &Arc<Seat>) {
        {
            let mut inner = self.inner();
            if inner.retired || inner.removing {
                return;
            }
            inner.launching = true;
        }
        // Whoever ends the seat after this look waits for what is launched.
        if !self.source.ends() {
            self.start();
        }
        self.inner().launching = false;
    }

    /// Waits until it is known which engine there is: none is being launched, and one of an earlier daemon was looked for.
    pub fn wait_for_launch(&self) {
        loop {
            {
                let inner = self.inner();
                if inner.removing || (inner.looked && !inner.launching) {
                    return;
                }
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Begins no engine any more. True if none runs either, or may be running: it stays so.
    pub fn retire(&self) -> bool {
        let mut inner = self.inner();
        inner.retired = true;
        !inner.has_engine()
    }

    /// Whether no engine is begun any more.
    pub fn is_retired(&self) -> bool {
        self.inner().retired
    }

    /// The same as [`Seat::retire`], and a later daemon begins none either.
    pub fn is_over(&self) -> bool {
        if !self.retire() {
            return false;
        }
        if self.inner().over {
            return true;
        }
        // Not under the lock, which never waits for a file.
        if let Err(error) = self.folder.write_json(FILE, &true) {
            tracing::warn!(seat = self.config().label(), "{}", explain(&error));
            return false;
        }
        self.inner().over = true;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::Inner;
    use super::*;
    use crate::seat::testing::Rig;
    use ftvm_engine::control::Command;

    fn without_engine() -> Rig {
        let rig = Rig::new();
        rig.seat.kill();
        rig.wait("its end is noticed", |rig| !rig.seat.has_engine());
        rig
    }

    #[test]
    fn nothing_is_over_while_there_may_be_an_engine() {
        let rig = Rig::new();
        assert!(!rig.seat.retire() && !rig.seat.is_over(), "it runs");
        let rig = without_engine();
        for change in [
            (|inner: &mut Inner, on: bool| inner.launching = on) as fn(&mut Inner, bool),
            |inner: &mut Inner, on: bool| inner.looked = !on,
            |inner: &mut Inner, on: bool| inner.doubt = on,
        ] {
            change(&mut rig.seat.inner(), true);
            assert!(rig.seat.has_engine() && !rig.seat.retire() && !rig.seat.is_over());
            change(&mut rig.seat.inner(), false);
        }
        assert!(!rig.seat.folder().has(FILE).unwrap(), "told too early");
        assert!(rig.seat.retire() && rig.seat.is_over());
        assert!(rig.seat.folder().has(FILE).unwrap());
    }

    /// Its thread had looked whether to start, and goes on after the pod was deleted.
    #[test]
    fn a_retired_seat_launches_nothing() {
        let rig = without_engine();
        let tried = || {
            let failures = rig.seat.inner().failures;
            rig.seat.launch();
            rig.seat.inner().failures > failures
        };
        assert!(tried(), "there is nothing to start from");
        assert!(rig.seat.is_over());
        assert!(!tried());
        let rig = without_engine();
        rig.seat.inner().removing = true;
        let failures = rig.seat.inner().failures;
        rig.seat.launch();
        assert_eq!(rig.seat.inner().failures, failures, "removed");
    }

    /// It is one as well, once it is there.
    #[test]
    fn an_engine_that_is_being_launched_is_told_to_leave() {
        let rig = without_engine();
        rig.seat.inner().launching = true;
        rig.pod().end();
        // Long enough for a thread that would not wait.
        std::thread::sleep(10 * LOOK);
        rig.launch(2);
        rig.seat.inner().launching = false;
        rig.wait("it is told to leave", |rig| {
            rig.commands()
                .iter()
                .any(|command| matches!(command, Command::Leave { .. }))
        });
    }

    /// Its thread had looked whether to start before the seat was told to go.
    #[test]
    fn a_seat_that_ends_launches_nothing() {
        let rig = without_engine();
        let failures = rig.seat.inner().failures;
        rig.pod().end();
        rig.seat.launch();
        assert_eq!(rig.seat.inner().failures, failures);
        assert!(!rig.seat.has_engine());
    }

    /// The daemon that comes next, without an API server.
    #[test]
    fn what_is_over_stays_so() {
        let rig = without_engine();
        let later = || {
            let (config, folder) = (rig.seat.config(), rig.seat.folder().clone());
            let (source, arbiter) = (rig.seat.source().clone(), rig.seat.arbiter().clone());
            Seat::new(config, folder, source, arbiter, rig.seat.surroundings.clone(), 0).unwrap()
        };
        assert!(!later().is_retired());
        assert!(rig.seat.is_over());
        let later = later();
        assert!(later.is_retired() && later.pause_before_start().is_none());
        // Until it has looked, and then at once.
        assert!(!later.is_over());
        later.inner().looked = true;
        assert!(later.is_over());
    }

    #[test]
    fn what_cant_be_remembered_is_not_told() {
        let rig = without_engine();
        std::fs::remove_dir_all(rig.seat.folder().path()).unwrap();
        assert!(rig.seat.retire() && !rig.seat.is_over());
    }
}
