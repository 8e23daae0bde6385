//! Peers of an older wire version: they are told only what they know, and it is enough.

use ftvm_protocol::core::{Action, Command, EndReason, Event, Gate, Refusal, RoleName, StorageHealth};
use ftvm_protocol::message::{Message, SessionEnd};
use ftvm_protocol::wire::{VERSION_MAX, VERSION_MIN};

use crate::bench::Bench;

/// What that seat said.
fn said(bench: &Bench, at: usize) -> Vec<&Message> {
    let actions = bench.seats[at].actions.iter();
    let words = actions.filter_map(|action| match action {
        Action::Send { message, .. } => Some(message),
        _ => None,
    });
    words.collect()
}

/// The newest version that any word of both is of.
fn newest(bench: &Bench) -> Option<u16> {
    let words = [0, 1].map(|at| said(bench, at)).concat();
    words.into_iter().map(Message::since).max()
}

/// An older driver closes a link that brings a word it lacks: the session would end for that, and not for the disk.
#[test]
fn a_standby_tells_of_its_storage_in_words_that_its_leader_knows() {
    for version in [VERSION_MIN, VERSION_MAX] {
        let mut bench = Bench::pair_speaking(version);
        let peer = bench.seats[1].me;
        bench.step(1, Event::Storage(StorageHealth::Failed));
        let (word, refusal) = if version == VERSION_MIN {
            (SessionEnd::FollowerFailed, Refusal::FollowerFailed(peer))
        } else {
            (SessionEnd::FollowerStorage, Refusal::FollowerStorage(peer))
        };
        assert!(bench.seats[0].wanted(|action| *action == Action::Refused(refusal)));
        bench.pass(500);
        let reasons: Vec<_> = said(&bench, 1)
            .into_iter()
            .filter_map(|message| match message {
                Message::End { reason, .. } => Some(*reason),
                _ => None,
            })
            .filter(|reason| *reason != SessionEnd::FollowerLeft)
            .collect();
        assert!(
            !reasons.is_empty() && reasons.iter().all(|reason| *reason == word),
            "{reasons:?}"
        );
        assert_eq!(newest(&bench), Some(version));
        assert!(bench.is_connected());
        // Whatever it is called, the same follows.
        assert_eq!(bench.seats[1].ended, Some(EndReason::StorageFailed));
        assert_eq!(bench.gate(0), Gate::Open);
    }
}

#[test]
fn seats_of_two_versions_are_a_pair_like_any_other() {
    let mut bench = Bench::pair_speaking(VERSION_MIN);
    let epoch = bench.epoch(0);
    assert_eq!(bench.gate(0), Gate::Through(epoch));
    bench.step(0, Event::Command(Command::Switchover));
    bench.pass(300);
    assert_eq!(bench.seats[0].core.status().role, RoleName::Standby);
    let epoch = bench.epoch(1);
    assert_eq!(bench.gate(1), Gate::Through(epoch));
    bench.step(0, Event::Command(Command::Leave));
    bench.pass(500);
    assert_eq!(bench.seats[0].ended, Some(EndReason::Ejected));
    assert_eq!(newest(&bench), Some(VERSION_MIN));
    // As the next release.
    bench.restart(0);
    bench.version = VERSION_MAX;
    bench.connect();
    bench.pass(1_000);
    assert!(bench.seats[1].core.status().protected);
}

/// No driver agrees on such a version. The core relies on none.
#[test]
fn a_link_whose_version_has_no_words_stays_silent() {
    let mut bench = Bench::new();
    bench.version = VERSION_MIN - 1;
    bench.pass(100);
    bench.connect();
    bench.pass(500);
    assert_eq!(newest(&bench), None);
    assert_eq!(bench.gate(0), Gate::Open);
}
