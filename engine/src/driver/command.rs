//! What the daemon says: commands, and answers to what the core asked.

use std::time::Duration;

use ftvm_protocol::core::{Command as CoreCommand, Event, ReadOutcome, SwapOutcome};
use ftvm_protocol::identity::{RequestId, SeatId};

use super::guest::SeatMachine;
use super::trace::Step;
use super::{Driver, Ended, Guest, hold};
use crate::clock::Moment;
use crate::control::{Answer, Command, CommandId, Peer, Protection, Reply, exit_code};

impl Driver {
    pub(super) fn command(&mut self, id: CommandId, command: Command) {
        let core = |command| Event::Command(command);
        match command {
            Command::Status => {
                let status = self.status();
                self.control.reply(id, Reply::Status(Box::new(status)));
            }
            Command::SetPeers { peers, absent } => {
                self.set_peers(peers, absent);
                self.control.reply(id, Reply::Ok);
            }
            Command::SetProtection { protection } => {
                self.set_protection(&protection);
                self.control.reply(id, Reply::Ok);
            }
            Command::PeerGone { incarnation, why } => {
                tracing::info!("hint: {incarnation} has ended ({why})");
                self.control.reply(id, Reply::Ok);
                self.step(Event::PeerGone { peer: incarnation });
            }
            Command::Switchover => self.core_command(id, core(CoreCommand::Switchover)),
            Command::Stop => self.core_command(id, core(CoreCommand::Stop)),
            Command::Start { over_stopped_term } => {
                self.core_command(id, core(CoreCommand::Start { over_stopped_term }));
            }
            Command::AcceptDataLoss { holder, term } => {
                self.core_command(id, core(CoreCommand::AcceptDataLoss { holder, term }));
            }
            Command::PowerButton => self.of_running_guest(id, SeatMachine::press_power_button),
            Command::ConsoleInput { bytes } => self.of_running_guest(id, |machine| {
                // What has no room is lost, as on a serial line without flow control.
                machine.console_input(&bytes);
            }),
            Command::Digest => self.begin_digest(id),
            Command::Leave { within_ms } => {
                self.control.reply(id, Reply::Ok);
                self.leave(Duration::from_millis(within_ms), "the daemon says that its pod goes");
            }
            Command::Quit => {
                self.control.reply(id, Reply::Ok);
                self.ended = Some(Ended {
                    code: exit_code::OK,
                    message: "ended by the daemon's command; the arbiter's record was not touched".to_owned(),
                    term: self.core.status().term,
                    storage: Vec::new(),
                });
            }
        }
    }

    fn of_running_guest(&mut self, id: CommandId, act: impl FnOnce(&SeatMachine)) {
        let why = match self.guest {
            Guest::Running => None,
            Guest::Held => Some(hold::WHY.to_owned()),
            Guest::None | Guest::Paused => {
                Some("no guest runs on this seat: give the command to the active one".to_owned())
            }
        };
        if let Some(why) = why {
            return self.control.reply(id, Reply::Refused { why });
        }
        act(&self.seat.machine);
        self.control.reply(id, Reply::Ok);
    }

    /// Dials these seats and no others, and lets no others connect. Those that can't be dialled are asked after all the same.
    fn set_peers(&mut self, peers: Vec<Peer>, absent: Vec<SeatId>) {
        for old in &self.seat.peers {
            if peers.iter().all(|peer| peer.seat_id != old.seat_id) {
                self.hub.remove_peer(old.seat_id);
            }
        }
        for peer in &peers {
            self.hub.add_peer(peer.seat_id, Some(peer.address));
        }
        let seats = peers.iter().map(|peer| peer.seat_id).chain(absent).collect();
        self.seat.peers = peers;
        // A seat that was replaced is asked for nothing any more: nobody answers for it.
        self.step(Event::OtherSeats(seats));
    }

    fn set_protection(&mut self, protection: &Protection) {
        self.seat.set_protection(protection);
        if let Some(leading) = &mut self.leading {
            leading.pacer.set_config(self.seat.pacer);
        }
        self.hold.set(protection.when_unprotected);
        // What that changes for the guest is done after every step.
        self.step(Event::Tick);
    }

    /// A command that the core decides: refused if one of its actions says so, begun otherwise.
    fn core_command(&mut self, id: CommandId, event: Event) {
        self.commanding = Some(id);
        self.step(event);
        if let Some(id) = self.commanding.take() {
            self.control.reply(id, Reply::Ok);
        }
    }

    pub(super) fn answered(&mut self, request: u64, answer: Answer, why: Option<String>, deadline: Moment) {
        let Some(request) = self.requests.remove(&request) else {
            return;
        };
        if let Some(why) = &why {
            tracing::warn!("{why}");
        }
        self.troubles.arbiter = why;
        match answer {
            Answer::Read(_) => self.takeover.reached(Step::Read),
            Answer::Swap(_) => self.takeover.reached(Step::Swapped),
            Answer::Seats(_) => {}
        }
        let late = Moment::now() > deadline;
        self.step(event_of(request, answer, late));
    }
}

/// An answer that is handled after its deadline is none: the process may have stood still in between (rule 2).
fn event_of(request: RequestId, answer: Answer, late: bool) -> Event {
    match answer {
        Answer::Read(outcome) => Event::RecordRead {
            request,
            outcome: if late { ReadOutcome::Unreachable } else { outcome },
        },
        Answer::Swap(outcome) => Event::RecordSwapped {
            request,
            outcome: if late { late_swap(outcome) } else { outcome },
        },
        Answer::Seats(reports) => Event::SeatsReported {
            request,
            reports: if late { Vec::new() } else { reports },
        },
    }
}

/// A refusal stays one however late it is read; a success that is read too late is unknown.
fn late_swap(outcome: SwapOutcome) -> SwapOutcome {
    match outcome {
        SwapOutcome::Won(_) | SwapOutcome::Unknown => SwapOutcome::Unknown,
        SwapOutcome::Conflict => SwapOutcome::Conflict,
        SwapOutcome::NotSent => SwapOutcome::NotSent,
    }
}
