//! A seat that is to go: its pod is deleted, its node drained, its program gone.
//!
//! Ending at once would cost the guest's clients something: as active the guest, as standby the time until its leader, who finds
//! the connection closed, has ejected it, for until then nobody acknowledges what the guest says. So an active hands over, and a
//! standby asks to be ejected and acknowledges until then (rule 6).

use std::time::{Duration, Instant};

use ftvm_protocol::core::{Command, Event, RoleName, Status};

use super::{Driver, Ended};
use crate::control::exit_code;

/// A step that did not lead on is asked for again after this time.
const ASK_AGAIN: Duration = Duration::from_millis(500);

/// A seat on its way out.
pub(super) struct Leaving {
    /// It ends then all the same.
    until: Instant,
    /// Why it goes: what, where.
    why: String,
    /// What was asked for last, and when.
    asked: Option<(Command, Instant)>,
    /// It waited to be ejected: if it is active all the same, it took over from a lost leader, and nobody else has the guest.
    waited: bool,
}

/// What a seat that is to go does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Something is under way.
    Wait,
    /// Asks the core for this.
    Ask(Command),
    /// Nothing keeps it.
    End,
}

fn next(status: &Status, waited: bool) -> Next {
    match status.role {
        RoleName::Active if status.protected => Next::Ask(Command::Switchover),
        // A resync, or the source of a switchover that is about to follow: it can hand over when that is done. Whom it took
        // over from may come back and join.
        RoleName::Active if status.peer.is_some() || waited => Next::Wait,
        RoleName::Standby if !status.leaving => Next::Ask(Command::Leave),
        RoleName::Standby | RoleName::Frozen => Next::Wait,
        RoleName::Active | RoleName::Starting | RoleName::Joining | RoleName::Ended => Next::End,
    }
}

impl Driver {
    /// This seat is to go within this time. Asked again, the earlier end counts.
    pub(super) fn leave(&mut self, within: Duration, why: &str) {
        let until = Instant::now() + within;
        match &mut self.leaving {
            Some(leaving) => leaving.until = leaving.until.min(until),
            None => {
                tracing::info!("this seat is to go: {why}");
                self.leaving = Some(Leaving {
                    until,
                    why: why.to_owned(),
                    asked: None,
                    waited: false,
                });
            }
        }
    }

    /// What it waits for, if it is to go.
    pub(super) fn why_leaving(&self) -> Option<String> {
        let leaving = self.leaving.as_ref()?;
        Some(format!("{}: it ends once nobody needs it any more", leaving.why))
    }

    /// Does what is due of a seat that is to go.
    pub(super) fn drive_leaving(&mut self) {
        let Some(leaving) = &mut self.leaving else { return };
        let (now, status) = (Instant::now(), self.core.status());
        leaving.waited |= status.leaving;
        let next = if now >= leaving.until {
            Next::End
        } else {
            next(&status, leaving.waited)
        };
        match next {
            Next::Wait => {}
            Next::Ask(command) => {
                let recently = |asked: Instant| now.duration_since(asked) < ASK_AGAIN;
                if leaving.asked.is_some_and(|(last, at)| last == command && recently(at)) {
                    return;
                }
                leaving.asked = Some((command, now));
                self.step(Event::Command(command));
            }
            Next::End => {
                let message = format!("{}; the arbiter's record was not touched", leaving.why);
                self.ended.get_or_insert(Ended {
                    code: exit_code::OK,
                    message,
                    term: status.term,
                    storage: Vec::new(),
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use ftvm_protocol::core::{Config, Core, StoredHeader, Timing};
    use ftvm_protocol::identity::{Incarnation, SeatId};

    use super::*;

    fn status(role: RoleName, protected: bool, peer: bool, leaving: bool) -> Status {
        let incarnation = Incarnation {
            seat: SeatId(1),
            start: 1,
        };
        let core = Core::new(Config {
            incarnation,
            header: StoredHeader::Absent,
            other_seats: Vec::new(),
            timing: Timing::default(),
            now_ms: 0,
        });
        Status {
            role,
            protected,
            peer: peer.then_some(incarnation),
            leaving,
            ..core.status()
        }
    }

    #[test]
    fn a_seat_that_is_to_go_ends_only_where_nobody_needs_it() {
        let of = |role, protected, peer, leaving| next(&status(role, protected, peer, leaving), false);
        assert_eq!(of(RoleName::Active, true, true, false), Next::Ask(Command::Switchover));
        assert_eq!(of(RoleName::Active, false, true, false), Next::Wait, "a standby joins");
        assert_eq!(of(RoleName::Frozen, false, true, false), Next::Wait);
        assert_eq!(of(RoleName::Standby, false, true, false), Next::Ask(Command::Leave));
        assert_eq!(of(RoleName::Standby, false, true, true), Next::Wait);
        assert_eq!(of(RoleName::Joining, false, true, false), Next::End);
        assert_eq!(of(RoleName::Starting, false, false, false), Next::End);
        assert_eq!(
            of(RoleName::Active, false, false, false),
            Next::End,
            "alone, and asked to go"
        );
    }

    #[test]
    fn one_that_took_over_while_it_waited_keeps_the_guest_until_it_can_hand_it_over() {
        let taken_over = status(RoleName::Active, false, false, false);
        assert_eq!(next(&taken_over, true), Next::Wait);
        let protected = status(RoleName::Active, true, true, false);
        assert_eq!(next(&protected, true), Next::Ask(Command::Switchover));
    }
}
