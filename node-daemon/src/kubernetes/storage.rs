//! What a seat's pod says of its storage: what its engine tells of the guest's disks, and what ended an engine, until a later one has served for long.

use ftvm_crds::seat::{StorageKind, StoragePart, StorageTrouble};
use ftvm_engine::control::{self, exit_code};

use crate::api::SeatStatus;
use crate::config::DiskConfig;

/// Longest reasons that are published, all of them together, in characters.
const WHY_CHARS_MAX: usize = 400;

/// What does not work. `before` is what was so at the last look: since when is kept as long as it stays so.
pub(super) fn troubles(
    before: &[StorageTrouble],
    status: &SeatStatus,
    disks: &[DiskConfig],
    unix_ms: u64,
) -> Vec<StorageTrouble> {
    let trouble = |part: StoragePart, kind: StorageKind, under_guest: bool, why: &str| {
        let known = before.iter().find(|known| known.part == part);
        // What failed first is news once: where it fails each time differs.
        let same = known.filter(|known| known.kind == kind);
        StorageTrouble {
            under_guest: under_guest || known.is_some_and(|known| known.under_guest),
            since_unix_ms: known.map_or(unix_ms, |known| known.since_unix_ms),
            why: same.map_or(why, |same| same.why.as_str()).to_owned(),
            part,
            kind,
        }
    };
    let disk = |disk: usize| StoragePart::Disk(disks.get(disk).map_or("?", |disk| disk.name.as_str()).to_owned());
    // An engine that does not answer may have what it had, and nothing proves yet that the next one's storage works.
    let silent = status.engine.is_none() && status.pid.is_some();
    let lasts = silent || status.storage_failures > 0;
    let mut told = if lasts { before.to_vec() } else { Vec::new() };
    // Of what an earlier daemon said, what the seat has: a pod may say anything.
    told.retain(|known| match &known.part {
        StoragePart::Disk(name) => disks.iter().any(|disk| disk.name == *name),
        StoragePart::Journal | StoragePart::Header | StoragePart::Unknown => true,
    });
    let ended = |exit: &&control::ExitReport| status.storage_failures > 0 && exit.code == exit_code::STORAGE;
    if let Some(exit) = status.last_exit.as_ref().filter(ended) {
        for failing in &exit.storage {
            let part = match failing.part {
                control::StoragePart::Disk(index) => disk(index),
                control::StoragePart::Journal => StoragePart::Journal,
                control::StoragePart::Header => StoragePart::Header,
            };
            let trouble = trouble(part, kind(failing.kind), failing.under_guest, &failing.why);
            put(&mut told, trouble);
        }
        if exit.storage.is_empty() {
            let trouble = trouble(StoragePart::Unknown, StorageKind::Failed, false, &exit.message);
            put(&mut told, trouble);
        }
    }
    for failing in status.engine.iter().flat_map(|engine| &engine.failing_disks) {
        let trouble = trouble(disk(failing.disk), kind(failing.kind), true, &failing.why);
        put(&mut told, trouble);
    }
    let most = WHY_CHARS_MAX / told.len().max(1);
    for trouble in &mut told {
        let why = trouble.why.chars().filter(|c| !c.is_control());
        trouble.why = why.take(most).collect();
        // By a clock that was set back since, or whatever the pod said.
        trouble.since_unix_ms = trouble.since_unix_ms.min(unix_ms);
    }
    told
}

/// In the place of what was said of the same part.
fn put(told: &mut Vec<StorageTrouble>, trouble: StorageTrouble) {
    match told.iter_mut().find(|known| known.part == trouble.part) {
        Some(known) => *known = trouble,
        None => told.push(trouble),
    }
}

fn kind(kind: control::StorageKind) -> StorageKind {
    match kind {
        control::StorageKind::Failed => StorageKind::Failed,
        control::StorageKind::Full => StorageKind::Full,
        control::StorageKind::Hangs => StorageKind::Hangs,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ftvm_engine::control::{ExitReport, FailingDisk, FailingStorage, Role};

    use super::*;
    use crate::seat::testing::Rig;

    /// A seat whose engine answers and has no trouble, and its disks.
    fn healthy() -> (SeatStatus, Vec<DiskConfig>) {
        let rig = Rig::new();
        let status = rig.seat.status(Duration::from_secs(60));
        assert!(status.engine.is_some());
        (status, rig.seat.config().disks)
    }

    fn fails(status: &mut SeatStatus, kind: control::StorageKind) {
        let why = "writing 512 bytes at 0: no".to_owned();
        let disks = &mut status.engine.as_mut().unwrap().failing_disks;
        *disks = vec![FailingDisk { disk: 0, kind, why }];
    }

    /// Its engine ended like that, and so did others in a row.
    fn ended(status: &mut SeatStatus, storage: Vec<FailingStorage>) {
        (status.engine, status.pid) = (None, None);
        status.storage_failures += 1;
        status.last_exit = Some(ExitReport {
            vm: "demo".to_owned(),
            seat: "a".to_owned(),
            incarnation: crate::seat::testing::PEER,
            code: exit_code::STORAGE,
            role: Role::Ended,
            term: 3,
            message: "this seat's storage failed".to_owned(),
            storage,
        });
    }

    fn parts(told: &[StorageTrouble]) -> Vec<(String, StorageKind, u64)> {
        let told = told.iter();
        told.map(|told| (told.part.to_string(), told.kind, told.since_unix_ms))
            .collect()
    }

    #[test]
    fn a_disk_is_told_since_it_began_to_fail_and_until_it_works() {
        let (mut status, disks) = healthy();
        let name = format!("disk {}", disks[0].name);
        let mut now = 0;
        let mut before = Vec::new();
        let mut look = |status: &SeatStatus| {
            now += 1;
            before = troubles(&before, status, &disks, now);
            parts(&before)
        };
        assert!(look(&status).is_empty());
        fails(&mut status, control::StorageKind::Hangs);
        assert_eq!(look(&status), [(name.clone(), StorageKind::Hangs, 2)]);
        fails(&mut status, control::StorageKind::Full);
        assert_eq!(look(&status), [(name.clone(), StorageKind::Full, 2)]);
        let answered = status.engine.take();
        assert_eq!(
            look(&status),
            [(name.clone(), StorageKind::Full, 2)],
            "it does not answer now"
        );
        status.engine = answered;
        status.engine.as_mut().unwrap().failing_disks.clear();
        assert!(look(&status).is_empty());
        fails(&mut status, control::StorageKind::Failed);
        assert_eq!(look(&status), [(name, StorageKind::Failed, 6)]);
    }

    /// A standby's engine is gone before anybody could ask it.
    #[test]
    fn what_ended_an_engine_is_told_until_another_one_has_served() {
        let (mut status, disks) = healthy();
        let engine = status.engine.clone();
        let failed = |part, kind| FailingStorage {
            part,
            kind,
            under_guest: false,
            why: "no".to_owned(),
        };
        let (journal, header) = ("the journal".to_owned(), "the header".to_owned());
        let full = control::StorageKind::Full;
        ended(&mut status, vec![failed(control::StoragePart::Journal, full)]);
        let first = troubles(&[], &status, &disks, 1);
        assert_eq!(parts(&first), [(journal.clone(), StorageKind::Full, 1)]);
        // The next one joins, and ends as well.
        status.engine = engine;
        let joins = troubles(&first, &status, &disks, 2);
        assert_eq!(joins, first);
        let failing = failed(control::StoragePart::Header, control::StorageKind::Failed);
        ended(&mut status, vec![failing]);
        let both = [(journal, StorageKind::Full, 1), (header, StorageKind::Failed, 3)];
        let second = troubles(&joins, &status, &disks, 3);
        assert_eq!(parts(&second), both);
        // Another end tells nothing new.
        status.last_exit.as_mut().unwrap().code = exit_code::SEAT_LOST;
        assert_eq!(troubles(&second, &status, &disks, 4), second);
        status.storage_failures = 0;
        assert!(troubles(&second, &status, &disks, 5).is_empty());
    }

    /// Whatever an engine has to say, the annotation stays short.
    #[test]
    fn an_end_without_details_is_told_by_its_message_and_words_are_cut() {
        let (mut status, disks) = healthy();
        ended(&mut status, Vec::new());
        let told = troubles(&[], &status, &disks, 1);
        assert_eq!(told[0].part, StoragePart::Unknown);
        assert_eq!(told[0].why, "this seat's storage failed");
        let long = |index| FailingStorage {
            part: control::StoragePart::Disk(index),
            kind: control::StorageKind::Failed,
            under_guest: index == 0,
            why: "\u{1b}é".repeat(2 * WHY_CHARS_MAX),
        };
        ended(&mut status, vec![long(0), long(99)]);
        let told = troubles(&[], &status, &disks, 1);
        assert_eq!(told[1].part, StoragePart::Disk("?".to_owned()));
        assert!(told.iter().all(|told| told.why == "é".repeat(WHY_CHARS_MAX / 2)));
        assert!(told[0].under_guest && !told[1].under_guest);
    }

    /// Whatever somebody wrote on the pod before this daemon began.
    #[test]
    fn what_a_pod_says_of_disks_that_the_seat_lacks_is_not_gone_on_with() {
        let (mut status, disks) = healthy();
        ended(&mut status, Vec::new());
        let said = |part| StorageTrouble {
            part,
            kind: StorageKind::Failed,
            under_guest: false,
            since_unix_ms: u64::MAX,
            why: "no".to_owned(),
        };
        let strange = (0..100).map(|index| said(StoragePart::Disk(format!("strange-{index}"))));
        let before: Vec<_> = strange
            .chain([said(StoragePart::Disk(disks[0].name.clone()))])
            .collect();
        let told = parts(&troubles(&before, &status, &disks, 5));
        let own = (format!("disk {}", disks[0].name), StorageKind::Failed, 5);
        assert_eq!(told, [own, ("its storage".to_owned(), StorageKind::Failed, 5)]);
    }
}
