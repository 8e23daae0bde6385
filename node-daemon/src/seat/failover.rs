//! A failure that a person asked for, to see that the standby takes over: the active's engine is killed as a crash would end it.
//!
//! ```text
//!   record, uncached ─► engine's status ─► both say: active, whole, acknowledged a moment ago ─► SIGKILL
//!         ▲                   └─ not quite: looked at again for a while ─┐
//!         └────────────────────────────────────────────────────────────┘        anything else: refused
//! ```
//!
//! Nothing is prepared for it, and nothing tells the engine: what follows is what follows a crash (`attend`). Between the last look and
//! the signal the standby may die all the same; then the guest is booted from its disks, as after any double fault.

use std::time::{Duration, Instant};

use ftvm_engine::control::{Answer, Ask, Role, Status};
use ftvm_protocol::core::ReadOutcome;
use ftvm_protocol::identity::Incarnation;
use ftvm_protocol::record::{Phase, Snapshot};
use rustix::io::Errno;

use super::Seat;

/// The arbiter answers within this time.
const RECORD_PATIENCE: Duration = Duration::from_secs(3);
/// The engine answers within this time.
const STATUS_PATIENCE: Duration = Duration::from_secs(1);
/// What may be different in a moment is looked at again for so long.
const MOMENT: Duration = Duration::from_secs(3);

/// Why nothing was killed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotFailed {
    /// Nobody could take over, or another seat has the guest.
    #[error("seat {seat} is not failed: {why}")]
    Unfit {
        /// The seat.
        seat: String,
        /// What is missing, and what to do.
        why: String,
    },
    /// It stayed unsure for too long.
    #[error("seat {seat} is not failed: {why}, for {} s: see that both hosts and the link between them have room, then ask again", MOMENT.as_secs())]
    Unsure {
        /// The seat.
        seat: String,
        /// What was so last.
        why: String,
    },
    /// It has died by itself.
    #[error("seat {seat} is not failed: its engine has just ended by itself")]
    Ended {
        /// The seat.
        seat: String,
    },
}

/// What is in the way of a failure.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Unsafe {
    /// It has to be mended.
    Mend(String),
    /// It may be otherwise in a moment.
    Moment(String),
}

fn mend(why: impl Into<String>) -> Unsafe {
    Unsafe::Mend(why.into())
}

impl Seat {
    /// Kills the engine if it is active and its standby would take over, as far as that can be known; which one it was.
    ///
    /// # Errors
    /// Says why not. Nothing was done then.
    pub fn fail(&self) -> Result<Incarnation, NotFailed> {
        let config = self.config();
        let seat = config.label();
        // Between two probes and the answer to the second.
        let fresh = Duration::from_millis(u64::from(config.timing.resolve().heartbeat_ms) * 2);
        let until = Instant::now() + MOMENT;
        loop {
            let why = match self.try_fail(fresh) {
                Ok(Some(incarnation)) => {
                    tracing::warn!(seat, %incarnation, "the engine was killed, as it was asked for");
                    return Ok(incarnation);
                }
                Ok(None) => return Err(NotFailed::Ended { seat }),
                Err(Unsafe::Mend(why)) => return Err(NotFailed::Unfit { seat, why }),
                Err(Unsafe::Moment(why)) => why,
            };
            if Instant::now() >= until {
                return Err(NotFailed::Unsure { seat, why });
            }
            std::thread::sleep(fresh / 4);
        }
    }

    /// One look, and the signal right after it. None: the process had ended.
    fn try_fail(&self, fresh: Duration) -> Result<Option<Incarnation>, Unsafe> {
        let snapshot = self.record_now()?;
        let looked = Instant::now();
        let status = self
            .engine_status(STATUS_PATIENCE)
            .ok_or_else(|| mend("no engine runs on it that answers: see its status"))?;
        expendable(&status, &snapshot, fresh)?;
        let pidfd = {
            let inner = self.inner();
            let engine = inner.engine.as_ref();
            engine
                .filter(|engine| engine.incarnation == status.incarnation)
                .map(|engine| engine.pidfd.clone())
        };
        let Some(pidfd) = pidfd else { return Ok(None) };
        // What was read is worth nothing if this process stood still since.
        if looked.elapsed() > fresh {
            return Err(Unsafe::Moment("the engine's status took too long to come".to_owned()));
        }
        match rustix::process::pidfd_send_signal(&*pidfd, rustix::process::Signal::KILL) {
            Ok(()) => Ok(Some(status.incarnation)),
            Err(Errno::SRCH) => Ok(None),
            Err(errno) => Err(mend(format!("its engine can't be killed: {errno}"))),
        }
    }

    fn record_now(&self) -> Result<Snapshot, Unsafe> {
        match self.arbiter.ask(&Ask::ReadRecord, RECORD_PATIENCE) {
            (Answer::Read(ReadOutcome::Found(snapshot)), _) => Ok(snapshot),
            (_, why) => {
                let why = why.unwrap_or_else(|| "there is no record".to_owned());
                Err(mend(format!(
                    "the arbiter can't be asked ({why}), so that nobody could take over: mend that first"
                )))
            }
        }
    }
}

/// May this active die? Only if the pair is whole by its own word and by the record's, and its standby showed a moment ago that it follows.
fn expendable(status: &Status, snapshot: &Snapshot, fresh: Duration) -> Result<(), Unsafe> {
    const FIRST: &str = "wait until the machine is protected, then ask again";
    let Status { why, .. } = status;
    if status.role != Role::Active {
        return Err(mend(format!(
            "it is not active (role {:?}): ask the active one",
            status.role
        )));
    }
    if status.paused {
        return Err(mend(format!("the guest stands still ({why}): {FIRST}")));
    }
    if status.leaving {
        return Err(mend("it is to go, and hands the guest over by itself"));
    }
    if !status.protected {
        let progress = status
            .resync_percent
            .map_or_else(String::new, |percent| format!(", resync at {percent} %"));
        return Err(mend(format!("the guest is not protected ({why}{progress}): {FIRST}")));
    }
    let Some(standby) = &status.standby else {
        return Err(mend(
            "its engine does not tell how its standby does: it is of an earlier version, hand the guest over once",
        ));
    };
    let connected = status.peer.as_ref().is_some_and(|peer| peer.connected);
    let Some(peer) = status
        .peer
        .as_ref()
        .and_then(|peer| peer.incarnation)
        .filter(|_| connected)
    else {
        return Err(mend(format!("there is no link to its standby: {FIRST}")));
    };
    if !status.arbiter_reachable {
        return Err(mend(
            "its engine can't use the arbiter, so that nobody may be able to take over: mend that first",
        ));
    }
    if let Some(why) = &standby.not_ready {
        return Err(mend(format!("{why}: {FIRST}")));
    }
    in_record(status, peer, snapshot)?;
    for (what, ms) in [
        ("gave no sign of life", standby.contact_age_ms),
        ("acknowledged nothing", standby.unacknowledged_ms),
    ] {
        if Duration::from_millis(ms) > fresh {
            return Err(Unsafe::Moment(format!("its standby {what} for {ms} ms")));
        }
    }
    Ok(())
}

/// Does the record say what the engine says? The engine may only just have written it, or be about to learn of it.
fn in_record(status: &Status, peer: Incarnation, snapshot: &Snapshot) -> Result<(), Unsafe> {
    let record = &snapshot.record;
    let pair = record.members.contains(status.incarnation) && record.members.contains(peer);
    let same = status.arbiter_uid == Some(snapshot.uid)
        && record.term == status.term
        && record.phase == Phase::Running
        && record.holder == status.incarnation
        && pair;
    if same {
        return Ok(());
    }
    Err(Unsafe::Moment(format!(
        "the arbiter's record (term {}, holder {}) is not the one that the engine goes by (term {})",
        record.term, record.holder, status.term
    )))
}

#[cfg(test)]
#[path = "failover_tests.rs"]
mod tests;
