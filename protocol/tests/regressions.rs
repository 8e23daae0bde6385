//! What the simulator found, each as a short script; and the paths that a driver's author wants to see once in full.

mod bench;
mod cold_start;
mod leaving;
mod storage;
mod versions;

use bench::{Arbiter, Bench};
use ftvm_protocol::core::{
    AcceptedLoss, Action, Command, EndReason, Event, Gate, GuestReport, Refusal, RoleName, Seal,
};
use ftvm_protocol::identity::{ArbiterUid, Incarnation, SeatId};
use ftvm_protocol::message::Message;
use ftvm_protocol::record::{Members, Phase, Snapshot};

// ---- whole paths

#[test]
fn a_new_vm_boots_and_becomes_protected() {
    let mut bench = Bench::new();
    bench.pass(100);
    assert_eq!(bench.gate(0), Gate::Open);
    assert!(bench.seats[0].wanted(|action| matches!(action, Action::BootFromDisk { first_epoch: 1, .. })));
    assert_eq!(bench.gate(1), Gate::Closed);
    bench.connect();
    bench.pass(500);
    assert!(bench.seats[0].core.status().protected);
    assert_eq!(bench.seats[1].core.status().role, RoleName::Standby);
    let record = bench.record.clone().expect("a record").record;
    assert_eq!(record.members, Members::pair(bench.seats[0].me, bench.seats[1].me));
    let epoch = bench.epoch(0);
    assert_eq!(bench.gate(0), Gate::Through(epoch));
}

#[test]
fn output_waits_for_the_acknowledgment_and_the_successor_sends_it_again() {
    let mut bench = Bench::pair();
    let first = bench.epoch(0);
    bench.seats[1].mute = true;
    let second = bench.epoch(0);
    assert_eq!(bench.gate(0), Gate::Through(first), "not acknowledged");
    bench.step(
        1,
        Event::PeerGone {
            peer: bench.seats[0].me,
        },
    );
    bench.pass(20);
    let taken = bench.seats[1].wanted(|action| {
        matches!(action, Action::LoadAndRun { epoch, resend_after, .. } if *epoch == second && *resend_after <= first)
    });
    assert!(taken, "{:?}", bench.seats[1].actions.last());
    assert_eq!(bench.gate(1), Gate::Open);
}

#[test]
fn a_loser_ends_and_joins_again() {
    let mut bench = Bench::pair();
    bench.seats[0].arbiter = Arbiter::Away;
    bench.cut();
    bench.pass(100);
    assert_eq!(bench.seats[1].core.status().role, RoleName::Active);
    assert_ne!(bench.gate(0), Gate::Open, "peer lost and arbiter unreachable: stalls");
    bench.seats[0].arbiter = Arbiter::Works;
    bench.pass(500);
    assert_eq!(bench.seats[0].ended, Some(EndReason::LostToSuccessor));
    bench.restart(0);
    bench.connect();
    bench.pass(1_000);
    assert!(bench.seats[1].core.status().protected);
}

#[test]
fn a_switchover_swaps_the_roles_and_stays_protected() {
    let mut bench = Bench::pair();
    bench.step(0, Event::Command(Command::Switchover));
    bench.pass(300);
    assert_eq!(bench.seats[0].core.status().role, RoleName::Standby);
    assert!(bench.seats[1].core.status().protected);
    let epoch = bench.epoch(1);
    assert_eq!(bench.gate(1), Gate::Through(epoch));
}

// ---- switchovers

/// What whoever wants to kill the active goes by: a switchover that would be refused has a reason, and epochs that nobody acknowledges
/// have an age.
#[test]
fn an_active_says_whether_its_standby_would_take_the_guest() {
    let mut bench = Bench::pair();
    let told = |bench: &Bench, at: usize| {
        let status = bench.seats[at].core.status();
        (status.switchover, status.unacknowledged_ms)
    };
    bench.epoch(0);
    assert_eq!(told(&bench, 0), (None, None));
    assert_eq!(told(&bench, 1).0, Some(Refusal::WrongRole));
    let sealed = bench.seal_event(0, Seal::Ordinary);
    bench.step(0, sealed);
    bench.pass(70);
    assert_eq!(told(&bench, 0), (None, Some(70)));
    // Its word to claim the record does not arrive.
    let under_way = claimed();
    assert_eq!(told(&under_way, 0).0, Some(Refusal::Busy));
    bench.cut();
    bench.pass(200);
    assert_eq!(told(&bench, 0), (Some(Refusal::NotProtected), None));
    let mut stopping = Bench::pair();
    stopping.seats[0].arbiter = Arbiter::Away;
    stopping.step(0, Event::Command(Command::Stop));
    assert_eq!(told(&stopping, 0).0, Some(Refusal::Busy));
}

/// A pair whose record names the standby, which was asked to claim it; its word of that does not arrive.
fn claimed() -> Bench {
    let mut bench = Bench::pair();
    bench.seats[1].mute = true;
    bench.step(0, Event::Command(Command::Switchover));
    let record = &bench.record.as_ref().expect("a record").record;
    assert_eq!(record.holder, bench.seats[1].me);
    assert_eq!(record.members, Members::pair(bench.seats[0].me, bench.seats[1].me));
    assert_eq!(bench.seats[0].core.status().role, RoleName::Active);
    bench
}

#[test]
fn the_source_runs_until_the_record_names_the_target_and_its_header_says_so() {
    let mut bench = Bench::pair();
    bench.seats[1].arbiter = Arbiter::Away;
    bench.step(0, Event::Command(Command::Switchover));
    bench.pass(100);
    let epoch = bench.epoch(0);
    assert_eq!(
        bench.gate(0),
        Gate::Through(epoch),
        "a claim under way does not hold output back"
    );
    let freezes = |bench: &Bench| bench.seats[0].wanted(|action| *action == Action::Seal(Seal::Freeze));
    assert!(!freezes(&bench));
    bench.seats[1].arbiter = Arbiter::Works;
    bench.pass(300);
    assert!(freezes(&bench));
    assert_eq!(bench.seats[1].core.status().role, RoleName::Active);
    let term = bench.record.as_ref().expect("a record").record.term;
    assert_eq!(bench.seats[1].header.as_ref().map(|header| header.term), Some(term));
    // The record was written once, before the source stood still; nothing was asked while it did.
    let asked = |action: &Action| matches!(action, Action::SwapRecord { .. } | Action::ReadRecord { .. });
    let ran = |action: &Action| matches!(action, Action::LoadAndRun { .. });
    let last = bench.seats[1]
        .actions
        .iter()
        .rev()
        .find(|action| asked(action) || ran(action));
    assert!(last.is_some_and(ran), "{last:?}");
    // And the source was asked to follow as soon as the guest ran, not when a timer came.
    let follow = |action: &Action| {
        matches!(
            action,
            Action::Send {
                message: Message::Follow { .. },
                ..
            }
        )
    };
    let at = |wanted: &dyn Fn(&Action) -> bool| bench.seats[1].actions.iter().position(wanted);
    assert_eq!(at(&follow), at(&ran).map(|at| at + 1));
}

#[test]
fn a_switchover_without_an_arbiter_is_given_up_and_the_pair_goes_on() {
    let mut bench = Bench::pair();
    bench.seats[1].arbiter = Arbiter::Away;
    bench.step(0, Event::Command(Command::Switchover));
    for _ in 0..40 {
        bench.pass(100);
        let epoch = bench.epoch(0);
        assert_eq!(bench.gate(0), Gate::Through(epoch));
    }
    let peer = bench.seats[1].me;
    assert!(bench.seats[0].wanted(|action| *action == Action::Refused(Refusal::SwitchFailed(peer))));
    assert!(bench.seats[0].core.status().protected);
}

#[test]
fn a_claim_of_unknown_outcome_holds_nothing_back() {
    let mut bench = Bench::pair();
    bench.seats[1].arbiter = Arbiter::LosesWriteAnswers;
    bench.step(0, Event::Command(Command::Switchover));
    bench.pass(100);
    let epoch = bench.epoch(0);
    assert_eq!(bench.gate(0), Gate::Through(epoch));
    assert!(!bench.seats[1].core.status().unsettled);
    bench.seats[1].arbiter = Arbiter::Works;
    bench.pass(500);
    assert_eq!(bench.seats[1].core.status().role, RoleName::Active);
    assert!(bench.seats[1].core.status().protected);
}

#[test]
fn a_source_whose_target_dies_after_its_claim_goes_on_alone() {
    let mut bench = claimed();
    let peer = bench.seats[1].me;
    bench.step(0, Event::PeerGone { peer });
    bench.pass(100);
    assert_eq!(bench.gate(0), Gate::Open);
    let record = &bench.record.as_ref().expect("a record").record;
    assert_eq!(record.members, Members::one(bench.seats[0].me));
}

#[test]
fn a_target_whose_source_dies_after_its_claim_takes_over() {
    let mut bench = claimed();
    let released = bench.epoch(0);
    let peer = bench.seats[0].me;
    bench.step(1, Event::PeerGone { peer });
    bench.pass(100);
    assert_eq!(bench.gate(1), Gate::Open);
    assert!(bench.seats[1].wanted(|action| matches!(action, Action::LoadAndRun { epoch, .. } if *epoch >= released)));
    bench.pass(500);
    assert_eq!(bench.seats[0].ended, Some(EndReason::LostToSuccessor));
}

#[test]
fn a_claim_that_came_to_nothing_is_taken_back_and_a_later_switchover_works() {
    let mut bench = claimed();
    bench.seats[1].mute = false;
    // A refusal that is on its way: the source gives up, though the record names the target.
    let session = bench.seats[0].core.status().session.expect("a session");
    bench.say(1, Message::SwitchRefused { session });
    bench.pass(300);
    assert_eq!(bench.seats[0].core.status().role, RoleName::Active);
    assert!(bench.seats[0].core.status().protected);
    let record = bench.record.as_ref().expect("a record").record.clone();
    assert_eq!(record.holder, bench.seats[0].me);
    // What the target says of the claim that was written over counts no more.
    bench.step(0, Event::Command(Command::Switchover));
    bench.pass(300);
    assert_eq!(bench.seats[1].core.status().role, RoleName::Active);
    assert!(bench.record.as_ref().expect("a record").record.term > record.term);
}

/// What a target says of its claim is no record: a source that no record backs goes on all the same.
#[test]
fn a_source_frozen_for_a_claim_that_no_record_knows_goes_on() {
    for lie in [1, u64::MAX] {
        let mut bench = Bench::pair();
        bench.seats[1].arbiter = Arbiter::Away;
        bench.step(0, Event::Command(Command::Switchover));
        let session = bench.seats[0].core.status().session.expect("a session");
        let term = bench.record.as_ref().expect("a record").record.term;
        let term = term.saturating_add(lie);
        bench.say(1, Message::Claimed { session, term });
        assert_eq!(bench.seats[0].core.status().role, RoleName::Frozen);
        bench.pass(6_000);
        assert_eq!(bench.seats[0].core.status().role, RoleName::Active);
        let peer = bench.seats[1].me;
        bench.step(0, Event::PeerGone { peer });
        bench.pass(500);
        assert_eq!(bench.gate(0), Gate::Open);
    }
}

/// A standby claims a re-created record only once it has seen that its leader goes by the same (rule 10).
#[test]
fn a_new_record_is_claimed_once_both_go_by_it() {
    let mut bench = Bench::pair();
    let old = bench.record.clone().expect("a record");
    let mut record = old.record;
    record.term += 1;
    record.predecessor = Some(old.uid);
    bench.record = Some(Snapshot {
        record,
        uid: ArbiterUid(2),
        version: 1,
    });
    bench.seats[0].arbiter = Arbiter::Away;
    bench.step(0, Event::Command(Command::Switchover));
    bench.pass(500);
    let holder = |bench: &Bench| bench.record.as_ref().expect("a record").record.holder;
    assert_eq!(holder(&bench), bench.seats[0].me);
    bench.seats[0].arbiter = Arbiter::Works;
    bench.pass(20_000);
    bench.step(0, Event::Command(Command::Switchover));
    bench.pass(1_000);
    assert_eq!(holder(&bench), bench.seats[1].me);
    assert_eq!(bench.seats[1].core.status().role, RoleName::Active);
}

/// An order to run belongs to one claim: that of a switchover which was taken back starts nothing in the next one.
#[test]
fn an_old_order_to_run_is_not_obeyed_in_the_next_switchover() {
    let mut bench = Bench::pair();
    bench.seats[0].manual_seals = true;
    bench.step(0, Event::Command(Command::Switchover));
    let session = bench.seats[0].core.status().session.expect("a session");
    let freeze = |bench: &mut Bench| {
        let event = bench.seal_event(0, Seal::Freeze);
        let Event::EpochSealed { epoch, .. } = event else {
            unreachable!("a seal")
        };
        bench.step(0, event);
        Event::EpochStaged {
            session,
            epoch,
            leader_acked: epoch - 1,
        }
    };
    let status = bench.seats[1].core.status();
    assert!(status.claiming && !status.switching, "the source has not stopped yet");
    let staged = freeze(&mut bench);
    assert!(bench.seats[1].core.status().switching);
    // The source takes it back; its last epoch is still on its way.
    bench.say(1, Message::SwitchRefused { session });
    bench.pass(60);
    assert_eq!(bench.seats[0].core.status().role, RoleName::Active);
    bench.step(1, staged);
    bench.step(0, Event::Command(Command::Switchover));
    assert_eq!(bench.seats[1].core.status().role, RoleName::Standby);
    let staged = freeze(&mut bench);
    bench.step(1, staged);
    bench.pass(300);
    assert_eq!(bench.seats[1].core.status().role, RoleName::Active);
    assert!(bench.seats[1].core.status().protected);
}

#[test]
fn a_claim_without_an_answer_does_not_delay_a_takeover() {
    let mut bench = Bench::pair();
    bench.seats[1].arbiter = Arbiter::SwallowsWrites;
    bench.step(0, Event::Command(Command::Switchover));
    bench.seats[1].arbiter = Arbiter::Works;
    let peer = bench.seats[0].me;
    bench.step(1, Event::PeerGone { peer });
    bench.pass(500);
    assert_eq!(bench.seats[1].core.status().role, RoleName::Active);
}

/// A backup older than a claim that the active never heard of: the pair is intact and writes above both.
#[test]
fn a_record_restored_below_an_unheard_claim_is_written_over_by_the_intact_pair() {
    let mut bench = Bench::pair();
    let old = bench.record.clone().expect("a record");
    bench.seats[1].mute = true;
    bench.step(0, Event::Command(Command::Switchover));
    let version = bench.record.as_ref().expect("a record").version + 1;
    bench.record = Some(Snapshot { version, ..old });
    bench.seats[1].mute = false;
    let session = bench.seats[0].core.status().session.expect("a session");
    bench.say(1, Message::SwitchRefused { session });
    bench.pass(2_000);
    let peer = bench.seats[0].me;
    bench.step(1, Event::PeerGone { peer });
    bench.pass(500);
    assert_eq!(bench.seats[1].core.status().role, RoleName::Active);
}

#[test]
fn stop_is_reported_after_swap_and_header_and_only_a_start_over_it_leaves_it() {
    let mut bench = Bench::pair();
    bench.step(0, Event::Command(Command::Stop));
    bench.pass(300);
    let term = bench
        .record
        .as_ref()
        .map(|snapshot| snapshot.record.term)
        .expect("a record");
    assert!(bench.seats[0].wanted(|action| *action == Action::ReportStopped { term }));
    assert_eq!(bench.seats[0].header.as_ref().map(|header| header.term), Some(term));
    assert_eq!(bench.seats[0].ended, Some(EndReason::Stopped));
    assert_eq!(bench.seats[1].ended, Some(EndReason::Stopped));
    bench.restart(0);
    bench.pass(1_000);
    assert_eq!(bench.seats[0].core.status().refused, Some(Refusal::PhaseStopped));
    bench.step(
        0,
        Event::Command(Command::Start {
            over_stopped_term: term - 1,
        }),
    );
    bench.pass(1_000);
    assert_eq!(
        bench.seats[0].core.status().role,
        RoleName::Starting,
        "a start over another stop"
    );
    bench.step(
        0,
        Event::Command(Command::Start {
            over_stopped_term: term,
        }),
    );
    bench.pass(1_000);
    assert_eq!(bench.seats[0].core.status().role, RoleName::Active);
    assert_eq!(bench.record.map(|snapshot| snapshot.record.phase), Some(Phase::Running));
}

#[test]
fn replayed_and_foreign_acknowledgments_open_nothing() {
    let mut bench = Bench::pair();
    let acked = bench.epoch(0);
    bench.seats[1].mute = true;
    let open = bench.epoch(0);
    let me = bench.seats[0].me;
    let session = bench.seats[0].core.status().session.expect("a session");
    let other = Incarnation {
        start: me.start + 1,
        ..me
    };
    let forged = [
        Message::Ack {
            leader: me,
            session,
            epoch: acked,
        },
        Message::Ack {
            leader: other,
            session,
            epoch: open,
        },
        Message::Ack {
            leader: me,
            session: ftvm_protocol::identity::SessionId(session.0 + 1),
            epoch: open,
        },
        Message::Ack {
            leader: me,
            session,
            epoch: open + 1,
        },
    ];
    for message in forged {
        bench.say(1, message);
        assert_eq!(bench.gate(0), Gate::Through(acked));
    }
    bench.say(
        1,
        Message::Ack {
            leader: me,
            session,
            epoch: open,
        },
    );
    assert_eq!(bench.gate(0), Gate::Through(open), "control: the right one does");
}

#[test]
fn an_epoch_that_is_not_the_next_is_not_acknowledged() {
    let mut bench = Bench::pair();
    let epoch = bench.epoch(0);
    let session = bench.seats[0].core.status().session.expect("a session");
    for wrong in [epoch, epoch + 2] {
        bench.step(
            1,
            Event::EpochStaged {
                session,
                epoch: wrong,
                leader_acked: 0,
            },
        );
        assert_eq!(bench.seats[1].core.status().epoch, epoch);
    }
    assert!(bench.seats[1].wanted(|action| *action == Action::Refused(Refusal::EpochGap)));
}

// ---- found by the simulator

/// An active that has ejected a standby still answers its probes. That is no contact: after a restore from a backup the
/// standby would take over with an old state.
#[test]
fn answers_of_a_leader_that_leads_somebody_else_are_no_contact() {
    let mut bench = Bench::pair();
    bench.seats[1].arbiter = Arbiter::Away;
    bench.cut();
    bench.pass(100);
    assert_eq!(bench.gate(0), Gate::Open, "ejected the standby");
    bench.connect();
    let before = bench.seats[1].core.status().contact_age_ms.expect("a session");
    bench.pass(1_000);
    let after = bench.seats[1].core.status().contact_age_ms.expect("a session");
    assert!(after >= before + 900, "contact is {after} ms old, was {before}");
}

/// A takeover that landed unnoticed: reading it settles nothing, and the standby acknowledges nothing to its old leader
/// until a swap of its own has won.
#[test]
fn a_standby_whose_takeover_landed_unnoticed_does_not_acknowledge() {
    let mut bench = Bench::pair();
    let acked = bench.epoch(0);
    bench.seats[1].arbiter = Arbiter::LosesWriteAnswers;
    bench.seats[0].arbiter = Arbiter::Away;
    bench.step(
        1,
        Event::PeerGone {
            peer: bench.seats[0].me,
        },
    );
    assert_eq!(
        bench.record.as_ref().map(|snapshot| snapshot.record.holder),
        Some(bench.seats[1].me)
    );
    bench.pass(400);
    assert_eq!(bench.seats[1].core.status().role, RoleName::Standby);
    // It reads that it holds the record alone, and no further write gets through.
    bench.seats[1].arbiter = Arbiter::RefusesWrites;
    bench.pass(400);
    bench.epoch(0);
    bench.pass(100);
    assert_eq!(bench.gate(0), Gate::Through(acked));
    bench.seats[1].arbiter = Arbiter::Works;
    bench.pass(400);
    assert_eq!(bench.seats[1].core.status().role, RoleName::Active);
}

/// A stop that arrives while the new active waits for its former source: the final epoch waits for the stream.
#[test]
fn a_stop_during_a_switchover_seals_when_the_follower_streams() {
    let mut bench = Bench::pair();
    bench.seats[0].manual_seals = true;
    bench.step(0, Event::Command(Command::Switchover));
    bench.seats[1].mute = true;
    let session = bench.seats[0].core.status().session.expect("a session");
    let event = bench.seal_event(0, Seal::Freeze);
    let Event::EpochSealed { epoch, .. } = event else {
        unreachable!("a seal")
    };
    bench.step(0, event);
    bench.step(
        1,
        Event::EpochStaged {
            session,
            epoch,
            leader_acked: epoch - 1,
        },
    );
    assert_eq!(
        bench.seats[1].core.status().role,
        RoleName::Active,
        "{:?}",
        bench.seats[1].core.status()
    );
    bench.step(1, Event::Command(Command::Stop));
    assert!(
        !bench.seats[1].wanted(|action| *action == Action::Seal(Seal::Final)),
        "nobody would receive it"
    );
    bench.seats[1].mute = false;
    bench.pass(600);
    assert_eq!(bench.seats[1].ended, Some(EndReason::Stopped));
    assert!(bench.seats[1].wanted(|action| *action == Action::Seal(Seal::Final)));
}

/// Accepting a loss is for what the person saw; refused once, it is over and the seat can join again.
#[test]
fn a_refused_override_does_not_keep_a_seat_from_joining() {
    let mut bench = Bench::new();
    bench.pass(100);
    let holder = bench.seats[0].me;
    bench.step(1, Event::Command(Command::AcceptDataLoss { holder, term: None }));
    bench.pass(50);
    bench.connect();
    bench.pass(1_000);
    assert!(bench.seats[0].core.status().protected);
}

/// A protected pair loses power, and only the standby comes back: it boots when a person accepts that nobody knows what the other's header says,
/// and only if that one is proven dead.
#[test]
fn a_named_seat_boots_over_a_header_that_is_lost_once_a_person_says_so() {
    for (guest, boots) in [(GuestReport::None, true), (GuestReport::Unknown, false)] {
        let mut bench = Bench::pair();
        let holder = bench.seats[0].me;
        bench.power_cut(0, guest);
        bench.pass(2_000);
        let status = bench.seats[1].core.status();
        assert_eq!(status.role, RoleName::Starting, "{status:?}");
        assert_eq!(status.refused, Some(Refusal::OtherHeaderUnreadable(holder.seat)));
        let now = bench.record.as_ref().map(|found| found.record.term);
        let other = Incarnation { start: 99, ..holder };
        for (holder, term) in [(other, None), (other, now), (holder, now.map(|term| term + 1))] {
            bench.step(1, Event::Command(Command::AcceptDataLoss { holder, term }));
            bench.pass(2_000);
            let status = bench.seats[1].core.status();
            assert_eq!(status.role, RoleName::Starting);
            // By now it waits for something else again.
            let refused = AcceptedLoss::Refused(Refusal::OverrideOtherHolder);
            assert_eq!(status.accepted_loss, Some(refused), "{status:?}");
        }
        bench.seats[1].arbiter = Arbiter::Away;
        bench.step(1, Event::Command(Command::AcceptDataLoss { holder, term: now }));
        bench.pass(2_000);
        let waits = bench.seats[1].core.status().accepted_loss;
        assert_eq!(waits, Some(AcceptedLoss::UnderWay), "nobody has decided");
        bench.seats[1].arbiter = Arbiter::Works;
        bench.pass(5_000);
        let status = bench.seats[1].core.status();
        assert_eq!(status.role == RoleName::Active, boots, "{guest:?}");
        let refused = AcceptedLoss::Refused(Refusal::OtherGuest(holder.seat));
        assert_eq!(status.accepted_loss, (!boots).then_some(refused));
    }
}

/// Whoever reads the record, then asks whether a guest runs here, and hears no, may override: so a seat whose write may have made it the holder
/// already must not say no.
#[test]
fn a_seat_that_may_be_about_to_boot_is_no_seat_without_a_guest() {
    let mut bench = Bench::new();
    assert!(!bench.seats[0].core.status().holds_guest);
    bench.seats[0].arbiter = Arbiter::SwallowsWrites;
    bench.pass(50);
    let status = bench.seats[0].core.status();
    assert!(status.role == RoleName::Starting && status.holds_guest, "{status:?}");
    // Also once it has given up to wait for the answer.
    bench.pass(5_000);
    let status = bench.seats[0].core.status();
    assert!(status.role == RoleName::Starting && status.holds_guest, "{status:?}");
    assert!(!bench.seats[1].core.status().holds_guest);
}

/// The leader's word that a session is over can get lost: a standby that hears of another one reads the record.
#[test]
fn a_standby_that_is_led_no_more_finds_out() {
    let mut bench = Bench::pair();
    bench.seats[1].arbiter = Arbiter::Away;
    bench.cut();
    bench.pass(100);
    bench.seats[1].arbiter = Arbiter::Works;
    bench.connect();
    bench.pass(1_000);
    assert_eq!(bench.seats[1].ended, Some(EndReason::Ejected));
}

/// A record deleted while the pair's session is broken: both still agree on who is active, and a new one may be made.
#[test]
fn a_pair_with_a_broken_session_agrees_to_a_new_record() {
    let mut bench = Bench::pair();
    bench.record = None;
    bench.cut();
    bench.connect();
    bench.pass(1_000);
    let consents = [0, 1].map(|at| bench.seats[at].core.status().recreate.expect("consent"));
    assert_eq!(consents[0].members, consents[1].members);
    assert_eq!(consents[0].holder, bench.seats[0].me);
    let term = consents[0].term.max(consents[1].term);
    let record = ftvm_protocol::record::Record {
        term,
        ..consents[0].clone()
    };
    bench.record = Some(ftvm_protocol::record::Snapshot {
        record,
        uid: ArbiterUid(2),
        version: 1,
    });
    bench.pass(2_000);
    let uids = [0, 1].map(|at| bench.seats[at].core.status().uid);
    assert!(uids.contains(&Some(ArbiterUid(2))), "{uids:?}");
}

/// A record from nowhere (other UID, no predecessor) changes nothing for an intact pair and is refused otherwise.
#[test]
fn a_strange_record_neither_ends_a_pair_nor_gives_a_takeover() {
    let mut bench = Bench::pair();
    let mut strange = bench.record.clone().expect("a record");
    strange.uid = ArbiterUid(99);
    strange.record.holder = Incarnation {
        seat: SeatId(7),
        start: 7,
    };
    strange.record.members = Members::one(strange.record.holder);
    bench.record = Some(strange);
    bench.pass(30_000);
    assert_eq!(bench.seats[0].ended, None);
    let epoch = bench.epoch(0);
    assert_eq!(bench.gate(0), Gate::Through(epoch), "protected service goes on");
    bench.cut();
    bench.pass(1_000);
    assert_eq!(bench.gate(0), Gate::Through(epoch));
    assert_eq!(bench.seats[1].core.status().role, RoleName::Standby);
    assert_eq!(bench.seats[1].core.status().refused, Some(Refusal::RecordStrange));
}

/// A driver may seal while it executes the step that asked for it: nothing of that step comes after.
#[test]
fn a_seal_is_the_last_action_of_its_step() {
    let mut bench = Bench::pair();
    bench.seats[0].manual_seals = true;
    for command in [Command::Switchover, Command::Stop] {
        let mut core = bench.seats[0].core.clone();
        let mut actions = Vec::new();
        core.step(bench.now_ms + 1_000, Event::Command(command), &mut actions);
        let seal = actions.iter().position(|action| matches!(action, Action::Seal(_)));
        if let Some(seal) = seal {
            assert_eq!(seal + 1, actions.len(), "{actions:?}");
        }
    }
    let mut actions = Vec::new();
    bench.seats[0]
        .core
        .step(bench.now_ms, Event::Command(Command::Stop), &mut actions);
    assert_eq!(actions.last(), Some(&Action::Seal(Seal::Final)));
}
