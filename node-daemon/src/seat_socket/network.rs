//! A pod that has another network than its engine: its sandbox died, and kubelet made it anew, with the same UID and another network
//! namespace. The engine lives on in the former one, whose links reach nobody any more. A new network namespace is a new seat: that engine
//! ends, and the next one joins from the new namespace.
//!
//! It is given up as a lost one is (`seat/attend` tells the peer's daemon at once), and no sooner than nobody needs it any more:
//!
//! ```text
//!   the engine's namespace is not the program's ─► its status, and the record, uncached: the record names
//!      not it ─────────► has it no guest: it ends. Else it was ejected or follows another record, and finds that out by itself
//!      it and its peer ► it leads, and its link is up after all: it hands over first
//!                        the daemon of the peer says that the guest is there, too: it ends; the peer takes over, or ejects it
//!                        nothing is said: the two settle by the record who goes on
//!      it alone ───────► nobody else has the guest: it goes on, unprotected, and says what to do
//! ```
//!
//! Before it ends it is held back from the record, and all of this is looked at once more: what it was just writing could have made it the
//! only one that has the guest. After that look the peer may die all the same; then the guest is booted from its disks, as after any
//! double fault.

use std::time::{Duration, Instant};

use ftvm_engine::control::{Answer, Ask, Command, Role, Status};
use ftvm_protocol::core::ReadOutcome;
use ftvm_protocol::identity::{Incarnation, SeatId};
use ftvm_protocol::record::{Phase, Record};

use super::seat::{END_MAX, PodSeat, STATUS_PATIENCE};
use crate::netns::Netns;

/// The arbiter answers within this time.
const RECORD_PATIENCE: Duration = Duration::from_secs(2);
/// The peer's daemon answers within this time.
const REPORT_PATIENCE: Duration = Duration::from_secs(2);
/// Pauses between two looks, each of which asks the API server: the first, and the longest. They double as long as nothing changes.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// A hand-over that takes longer is none.
const HAND_OVER_MAX: Duration = Duration::from_secs(10);

/// What an engine that is alone says.
const ALONE: &str = "the pod has another network than its engine, and nobody else has the guest: it goes on without protection; halt and \
                     start the virtual machine at a time when it may be away for a moment";

/// An engine that has another network than its pod.
#[derive(Debug)]
pub struct CutOff {
    incarnation: Incarnation,
    /// Since when it is asked to hand over.
    hands_over_since: Option<Instant>,
    /// The next look.
    next: Instant,
    pause: Duration,
    /// When it was told to end.
    ended: Option<Instant>,
    said: String,
}

/// What is to be done with it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    /// It is not needed.
    End,
    /// It leads, and can be followed.
    HandOver,
    /// Nobody else has the guest.
    Alone,
    /// Not to be told yet.
    Wait(String),
}

/// By its status and by the record, read after it. `guest_is_at`: whether the daemons of these seats say that the guest is there.
fn judge(
    status: &Status,
    record: &Record,
    may_hand_over: bool,
    guest_is_at: impl FnOnce(&[SeatId]) -> bool,
) -> Verdict {
    let own = status.incarnation;
    let wait = |why: &str| Verdict::Wait(why.to_owned());
    if !record.members.contains(own) {
        return match status.role {
            Role::Starting | Role::Joining => Verdict::End,
            Role::Standby | Role::Active | Role::Frozen | Role::Ended => wait("the record does not name it"),
        };
    }
    if record.phase == Phase::Stopped {
        return wait("the virtual machine stops");
    }
    if record.members.is_only(own) {
        return Verdict::Alone;
    }
    if status.unsettled != Some(false) {
        // It may yet turn out to be the only one that the record names.
        return wait("what it wrote into the record is not known to count or not");
    }
    let connected = status.peer.as_ref().is_some_and(|peer| peer.connected);
    match status.role {
        Role::Frozen => return wait("a switchover is under way"),
        Role::Active if status.protected && connected && may_hand_over => return Verdict::HandOver,
        Role::Starting | Role::Joining | Role::Standby | Role::Active | Role::Ended => {}
    }
    let others = record.members.iter().filter(|member| *member != own);
    let others: Vec<SeatId> = others.map(|member| member.seat).collect();
    if guest_is_at(&others) {
        Verdict::End
    } else {
        wait("its peer's daemon does not say that the guest is there, too")
    }
}

impl PodSeat {
    /// Looks whether engine and pod have one network, and does what is due if not. Called again and again.
    pub(super) fn follow_network(&self) {
        // An engine that is to go with its program is told so already.
        if let Some(netns) = self.handed.netns().filter(|_| !self.ends()) {
            self.follow(netns);
        }
    }

    /// The same with the pod's network namespace.
    fn follow(&self, netns: Netns) {
        // Another connection of this pod may be at it.
        let Ok(mut known) = self.cut_off.try_lock() else { return };
        if let Some(cut_off) = known.take_if(|known| self.seat.incarnation() != Some(known.incarnation)) {
            tracing::info!(engine = %cut_off.incarnation, "it has ended in the network that its pod has no more");
            self.set_progress(|progress| progress.cut_off = None);
            // It did not fail: the next one need not wait.
            self.seat.try_soon();
        }
        let Some((incarnation, of_engine)) = self.seat.engine_netns() else {
            return;
        };
        if of_engine == netns {
            if known.take().is_some() {
                self.set_progress(|progress| progress.cut_off = None);
            }
            return;
        }
        let cut_off = known.get_or_insert_with(|| CutOff::new(incarnation));
        if cut_off.incarnation == incarnation && Instant::now() >= cut_off.next {
            self.attend_cut_off(cut_off);
        }
    }

    fn attend_cut_off(&self, cut_off: &mut CutOff) {
        if let Some(ended) = cut_off.ended {
            if ended.elapsed() > END_MAX {
                self.seat.kill();
            }
            return;
        }
        let mut verdict = self.verdict(cut_off);
        if verdict == Verdict::End {
            verdict = self.verdict_at_rest(cut_off);
        }
        let said = match &verdict {
            Verdict::End => "it ends".to_owned(),
            Verdict::HandOver => "it hands over".to_owned(),
            Verdict::Alone => ALONE.to_owned(),
            Verdict::Wait(why) => format!("it goes on: {why}"),
        };
        cut_off.pause = (2 * cut_off.pause).min(PAUSE.1);
        if cut_off.said != said {
            let seat = self.seat.config().label();
            tracing::warn!(seat, engine = %cut_off.incarnation, "in a network that its pod has no more: {said}");
            (cut_off.said, cut_off.pause) = (said, PAUSE.0);
        }
        // The peer's daemon may be at the same: not in step with it.
        let jitter = cut_off.pause / 256 * u32::from(crate::random::nonzero_u64() as u8 / 2);
        cut_off.next = Instant::now() + cut_off.pause + jitter;
        cut_off.hands_over_since = match verdict {
            Verdict::HandOver => cut_off.hands_over_since.or(Some(Instant::now())),
            Verdict::End => cut_off.hands_over_since,
            Verdict::Alone | Verdict::Wait(_) => None,
        };
        let alone = verdict == Verdict::Alone;
        self.set_progress(|progress| progress.cut_off = alone.then(|| ALONE.to_owned()));
        match verdict {
            Verdict::End => {
                cut_off.ended = Some(Instant::now());
                self.seat.end_engine();
            }
            Verdict::HandOver => {
                // Refused, or late: it is asked again, for a while.
                let _ = self.seat.command(Command::Switchover, STATUS_PATIENCE);
            }
            Verdict::Alone | Verdict::Wait(_) => {}
        }
    }

    /// The verdict once the engine writes nothing; it may write again if it need not end.
    fn verdict_at_rest(&self, cut_off: &CutOff) -> Verdict {
        let until = Instant::now() + RECORD_PATIENCE;
        let verdict = loop {
            if self.seat.hold_swaps(Some(cut_off.incarnation)) {
                break self.verdict(cut_off);
            }
            if Instant::now() >= until {
                break Verdict::Wait("it is asking the arbiter".to_owned());
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        if verdict != Verdict::End {
            self.seat.hold_swaps(None);
        }
        verdict
    }

    fn verdict(&self, cut_off: &CutOff) -> Verdict {
        let status = self.seat.engine_status(STATUS_PATIENCE);
        let Some(status) = status.filter(|status| status.incarnation == cut_off.incarnation) else {
            return Verdict::Wait("it does not answer".to_owned());
        };
        let record = match self.seat.arbiter().ask(&Ask::ReadRecord, RECORD_PATIENCE) {
            (Answer::Read(ReadOutcome::Found(found)), _) => found.record,
            (_, why) => {
                let why = why.unwrap_or_else(|| "there is no record".to_owned());
                return Verdict::Wait(format!("the arbiter can't be asked ({why})"));
            }
        };
        let asked = cut_off.hands_over_since;
        let may_hand_over = asked.is_none_or(|since| since.elapsed() < HAND_OVER_MAX);
        judge(&status, &record, may_hand_over, |seats| {
            self.seat.guest_is_at(seats, REPORT_PATIENCE)
        })
    }
}

impl CutOff {
    fn new(incarnation: Incarnation) -> CutOff {
        let now = Instant::now();
        CutOff {
            incarnation,
            hands_over_since: None,
            next: now,
            pause: PAUSE.0,
            ended: None,
            said: String::new(),
        }
    }
}

#[cfg(test)]
#[path = "network_tests.rs"]
mod tests;
