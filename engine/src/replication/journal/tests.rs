use super::*;
use crate::replication::testing::{MemStorage, Seeded, apply_change, random_change};

const SECTORS: u64 = 64;
const DISK_BYTES: usize = SECTORS as usize * 512;
const SIZE: usize = JOURNAL_MIN_BYTES as usize;

fn volume() -> Arc<MemStorage> {
    MemStorage::new(vec![0xAA; DISK_BYTES])
}

fn open(journal: &Arc<MemStorage>, volume: &Arc<MemStorage>) -> Result<(Journal, Recovered), JournalError> {
    Journal::recover(journal.clone(), &[volume.clone() as Arc<dyn Storage>])
}

fn fresh() -> (Arc<MemStorage>, Journal) {
    let storage = MemStorage::new(vec![0; SIZE]);
    let (journal, recovered) = open(&storage, &volume()).expect("an empty journal");
    assert_eq!(recovered, Recovered::default());
    (storage, journal)
}

/// Appends random epochs; gives the disk's contents after each, the first being the one before any.
fn append_epochs(journal: &mut Journal, seeded: &mut Seeded, epochs: std::ops::RangeInclusive<u64>) -> Vec<Vec<u8>> {
    let mut states = vec![vec![0xAA; DISK_BYTES]];
    for epoch in epochs {
        let changes: Vec<_> = (0..seeded.below(4))
            .map(|_| random_change(seeded, 0, SECTORS))
            .collect();
        journal
            .append(epoch, &changes, epoch.is_multiple_of(2), None)
            .expect("room");
        let mut disk = states.last().expect("one at least").clone();
        changes.iter().for_each(|change| apply_change(&mut disk, change));
        states.push(disk);
    }
    states
}

#[test]
fn everything_appended_is_replayed_and_replaying_again_changes_nothing() {
    let (storage, mut journal) = fresh();
    let states = append_epochs(&mut journal, &mut Seeded::new(1), 1..=10);
    let image = storage.bytes();
    let volume = volume();
    for _ in 0..2 {
        let again = MemStorage::new(image.clone());
        let (_, recovered) = open(&again, &volume).expect("recovers");
        assert_eq!((recovered.epochs, recovered.last), (10, Some(10)));
        assert_eq!(volume.bytes(), states[10]);
        let (_, empty) = open(&again, &volume).expect("recovers");
        assert_eq!(empty, Recovered::default(), "recovery empties the journal");
    }
}

/// What a damaged journal leads to: the disk after some epoch, or a refusal.
fn assert_prefix(image: Vec<u8>, states: &[Vec<u8>], what: &str) -> Option<usize> {
    let volume = volume();
    match open(&MemStorage::new(image), &volume) {
        Ok((_, recovered)) => {
            let count = recovered.epochs as usize;
            assert!(
                volume.bytes() == states[count],
                "{what}: not the disk after epoch {count}"
            );
            Some(count)
        }
        Err(error) => {
            assert!(matches!(error, JournalError::Damaged { .. }), "{what}: {error}");
            None
        }
    }
}

#[test]
fn damage_at_any_byte_leaves_whole_epochs() {
    let (storage, mut journal) = fresh();
    let states = append_epochs(&mut journal, &mut Seeded::new(2), 1..=5);
    let image = storage.bytes();
    let half = journal.current * SIZE / 2;
    let end = half + journal.halves[journal.current].end as usize;
    let mut seen = [0; 6];
    for at in half..end {
        let mut damaged = image.clone();
        damaged[at] ^= 0x40;
        let count = assert_prefix(damaged, &states, &format!("byte {at} changed")).expect("one half is never a gap");
        assert!(count < 5, "byte {at} of the journal means nothing");
        seen[count] += 1;
    }
    assert!(seen[..5].iter().all(|&count| count > 0), "{seen:?}");
}

#[test]
fn a_journal_cut_at_any_byte_leaves_whole_epochs() {
    let (storage, mut journal) = fresh();
    let states = append_epochs(&mut journal, &mut Seeded::new(3), 1..=5);
    let image = storage.bytes();
    let half = journal.current * SIZE / 2;
    let end = half + journal.halves[journal.current].end as usize;
    let mut last = 0;
    for at in half..=end {
        let mut cut = image.clone();
        cut[at..half + SIZE / 2].fill(0);
        let count = assert_prefix(cut, &states, &format!("cut at {at}")).expect("one half is never a gap");
        assert!(count >= last, "more bytes, fewer epochs");
        last = count;
    }
    assert_eq!(last, 5);
}

/// Runs a standby with power cuts: what was durable is there afterwards, and nothing half.
fn power_cuts(seed: u64) {
    let mut seeded = Seeded::new(seed);
    let storage = MemStorage::new(vec![0; SIZE]);
    let disk = volume();
    let (mut journal, _) = open(&storage, &disk).expect("empty");
    let mut state = disk.bytes();
    let (mut states, mut durable) = (vec![state.clone()], 0);
    let (mut waiting, mut synced) = (Vec::new(), None);
    let epochs = 1 + seeded.below(120);
    for epoch in 1..=epochs {
        let changes: Vec<_> = (0..seeded.below(5))
            .map(|_| random_change(&mut seeded, 0, SECTORS))
            .collect();
        let flush = seeded.below(3) == 0;
        if let Err(error) = journal.append(epoch, &changes, flush, synced) {
            assert!(matches!(error, JournalError::Full), "{error}");
            sync_volume(&mut waiting, &disk);
            synced = Some(epoch - 1);
            journal
                .append(epoch, &changes, flush, synced)
                .expect("the volume has everything before");
        }
        for change in &changes {
            apply_change(&mut state, change);
            states.push(state.clone());
        }
        waiting.extend(changes);
        if flush {
            durable = states.len() - 1;
        }
        if seeded.below(10) == 0 {
            sync_volume(&mut waiting, &disk);
            synced = Some(epoch);
            // As after a takeover or a resync.
            if seeded.below(3) == 0 {
                journal.reset().expect("no fault");
                durable = states.len() - 1;
            }
        }
    }
    // Some of what waits was written to the volume, not synced.
    for change in &waiting[..seeded.below(waiting.len() as u64 + 1) as usize] {
        write(&disk, change);
    }
    let journal_left = MemStorage::new(storage.after_power_cut(&mut seeded));
    let disk_left = MemStorage::new(disk.after_power_cut(&mut seeded));
    // A second power cut, during the recovery, changes nothing.
    disk_left.fail_after(seeded.below(12), io::ErrorKind::Other);
    let _ = open(&journal_left, &disk_left);
    let disk_left = MemStorage::new(disk_left.after_power_cut(&mut seeded));
    let journal_left = MemStorage::new(journal_left.after_power_cut(&mut seeded));
    open(&journal_left, &disk_left).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    let left = disk_left.bytes();
    let sectors_ok = (0..SECTORS as usize).all(|sector| {
        let range = sector * 512..(sector + 1) * 512;
        states[durable..]
            .iter()
            .any(|state| state[range.clone()] == left[range.clone()])
    });
    assert!(
        sectors_ok,
        "seed {seed}: a sector is older than the last flush, change {durable} of {}",
        states.len() - 1
    );
}

fn write(disk: &Arc<MemStorage>, change: &DiskChange) {
    match &change.what {
        DiskData::Zeroed(len) => disk.zero(change.offset, *len).expect("no fault"),
        DiskData::Written(data) => disk.write_at(change.offset, data).expect("no fault"),
    }
}

fn sync_volume(waiting: &mut Vec<DiskChange>, disk: &Arc<MemStorage>) {
    waiting.drain(..).for_each(|change| write(disk, &change));
    disk.sync().expect("no fault");
}

#[test]
fn power_cuts_lose_nothing_that_was_flushed() {
    (0..400).for_each(power_cuts);
}

#[test]
fn a_half_is_not_written_again_before_the_volumes_have_it() {
    let (storage, mut journal) = fresh();
    let mut seeded = Seeded::new(4);
    let mut epoch = 0;
    let (refused, changes) = loop {
        epoch += 1;
        let changes = [random_change(&mut seeded, 0, SECTORS)];
        if let Err(error) = journal.append(epoch, &changes, false, None) {
            break (error, changes);
        }
    };
    assert!(matches!(refused, JournalError::Full), "{refused}");
    let older = journal.halves[1 - journal.current].last.expect("filled");
    assert_eq!(journal.wants_sync(None), Some(older));
    journal
        .append(epoch, &changes, true, Some(older))
        .expect("the older half is free");
    let volume = volume();
    let (_, recovered) = open(&MemStorage::new(storage.bytes()), &volume).expect("recovers");
    assert_eq!((recovered.epochs, recovered.last), (epoch - older, Some(epoch)));
}

#[test]
fn a_gap_between_the_halves_is_damage() {
    let (storage, mut journal) = fresh();
    let mut seeded = Seeded::new(5);
    let mut epoch = 0;
    while journal.halves.iter().any(|half| half.last.is_none()) {
        epoch += 1;
        journal
            .append(epoch, &[random_change(&mut seeded, 0, SECTORS)], true, None)
            .expect("room");
    }
    let older = 1 - journal.current;
    let mut image = storage.bytes();
    image[older * SIZE / 2 + 20_000] ^= 1;
    let refused = open(&MemStorage::new(image), &volume()).err().expect("refused");
    assert!(
        matches!(refused, JournalError::Damaged { newer, .. } if newer == epoch - 1),
        "{refused}"
    );
}

#[test]
fn every_failing_operation_is_an_error_and_nothing_durable_is_lost() {
    for fail_at in 0..40 {
        let (storage, mut journal) = fresh();
        let mut seeded = Seeded::new(6);
        let mut state = vec![0xAA; DISK_BYTES];
        let mut states = vec![state.clone()];
        storage.fail_after(
            fail_at,
            if fail_at % 2 == 0 {
                io::ErrorKind::StorageFull
            } else {
                io::ErrorKind::Other
            },
        );
        let mut durable = 0;
        for epoch in 1..=60 {
            let change = random_change(&mut seeded, 0, SECTORS);
            let result = journal.append(epoch, std::slice::from_ref(&change), true, None);
            apply_change(&mut state, &change);
            states.push(state.clone());
            if let Err(error) = result {
                assert!(matches!(error, JournalError::Io { .. }), "{error}");
                assert!(matches!(
                    journal.append(epoch + 1, &[], true, None),
                    Err(JournalError::Failed)
                ));
                break;
            }
            durable = epoch as usize;
        }
        let volume = volume();
        let left = MemStorage::new(storage.after_power_cut(&mut seeded));
        let (_, recovered) = open(&left, &volume).expect("recovers");
        let count = recovered.last.unwrap_or(0) as usize;
        assert!(
            count >= durable,
            "operation {fail_at}: {count} epochs recovered, {durable} were durable"
        );
        assert_eq!(volume.bytes(), states[count]);
    }
}

#[test]
fn sizes_and_foreign_journals_are_refused() {
    let small = Journal::recover(MemStorage::new(vec![0; 1000]), &[])
        .err()
        .expect("refused");
    assert!(matches!(small, JournalError::TooSmall(1000)));
    let (storage, mut journal) = fresh();
    let large = DiskChange::written(0, 0, &vec![1; SIZE]);
    assert!(matches!(
        journal.append(1, &[large], true, None),
        Err(JournalError::TooLarge { epoch: 1, .. })
    ));
    journal
        .append(1, &[DiskChange::zeroed(3, 0, 512)], true, None)
        .expect("room");
    let foreign = open(&storage, &volume()).err().expect("refused");
    assert!(matches!(foreign, JournalError::Foreign { disk: 3, .. }), "{foreign}");
}

/// What was zeroed long ago is on the volumes, and is not zeroed again by a replay, however little room its records take.
#[test]
fn a_half_ends_early_when_it_zeroes_much() {
    let (_, mut journal) = fresh();
    let zeroed = [DiskChange::zeroed(0, 0, ZEROED_MAX_BYTES / 4)];
    let replayed = |journal: &Journal| journal.halves.iter().map(|half| half.zeroed_bytes).sum::<u64>();
    let mut synced = None;
    for epoch in 1..=100 {
        journal.append(epoch, &zeroed, false, synced).expect("room");
        assert!(replayed(&journal) <= 2 * ZEROED_MAX_BYTES, "epoch {epoch}");
        if journal.wants_sync(synced).is_some() {
            synced = Some(epoch);
        }
    }
    // Volumes that take nothing more are no reason to refuse what there is room for.
    for epoch in 101..=120 {
        journal.append(epoch, &zeroed, false, synced).expect("room");
    }
    assert!(replayed(&journal) > 2 * ZEROED_MAX_BYTES);
}

#[test]
fn a_volume_that_fails_keeps_the_journal() {
    let (storage, mut journal) = fresh();
    let states = append_epochs(&mut journal, &mut Seeded::new(7), 1..=6);
    let failing = volume();
    failing.fail_after(2, io::ErrorKind::Other);
    let refused = open(&storage, &failing).err().expect("refused");
    assert!(matches!(refused, JournalError::Volume { disk: 0, .. }), "{refused}");
    let mended = volume();
    open(&storage, &mended).expect("recovers");
    assert_eq!(mended.bytes(), states[6]);
}

fn stream(session: u64) -> Stream {
    Stream {
        leader: ftvm_protocol::identity::Incarnation {
            seat: ftvm_protocol::identity::SeatId(u128::MAX - 5),
            start: 9,
        },
        session: ftvm_protocol::identity::SessionId(session),
    }
}

/// What the journal proves of its volumes is the last epoch that counts, through every change of halves and every new start.
#[test]
fn the_journal_says_what_the_volumes_hold() {
    let (storage, mut journal) = fresh();
    let mut seeded = Seeded::new(4);
    append_epochs(&mut journal, &mut seeded, 1..=3);
    let disk = volume();
    let (mut journal, recovered) = open(&storage, &disk).expect("recovers");
    assert_eq!((recovered.last, recovered.holds), (Some(3), None), "of no stream");
    journal.begin(stream(7), None).expect("no fault");
    let (mut journal, recovered) = {
        drop(journal);
        open(&storage, &disk).expect("recovers")
    };
    assert_eq!(recovered.holds, None, "nothing is durable yet");
    journal.begin(stream(7), None).expect("no fault");
    let mut epoch = 10;
    let mut halves = std::collections::BTreeSet::new();
    while halves.len() < 2 || epoch < 40 {
        epoch += 1;
        let change = DiskChange::written(0, 0, &seeded.bytes(4096));
        journal.append(epoch, &[change], true, Some(epoch - 1)).expect("room");
        halves.insert(journal.current);
    }
    let holds = Some(Holds {
        stream: stream(7),
        epoch,
    });
    for _ in 0..3 {
        let (_, recovered) = open(&storage, &disk).expect("recovers");
        assert_eq!(recovered.holds, holds, "also when nothing is replayed any more");
    }
    let (mut journal, _) = open(&storage, &disk).expect("recovers");
    journal.begin(stream(8), Some(77)).expect("no fault");
    assert_eq!(
        open(&storage, &disk)
            .expect("recovers")
            .1
            .holds
            .map(|holds| holds.epoch),
        Some(77)
    );
    let other = MemStorage::called(disk.bytes(), 5);
    let (mut journal, recovered) = open(&storage, &other).expect("recovers");
    assert_eq!(recovered.holds, None, "another disk");
    journal.begin(stream(8), Some(77)).expect("no fault");
    journal.reset().expect("no fault");
    assert_eq!(
        open(&storage, &other).expect("recovers").1.holds,
        None,
        "anybody may write from here on"
    );
}

/// Damages the header of a half, recovers, and gives what is said to be held then and after a second start.
fn held_without_header(storage: &Arc<MemStorage>, half: usize) -> [Option<Holds>; 2] {
    let mut image = storage.bytes();
    image[half * SIZE / 2 + 9] ^= 1;
    let (left, disk) = (MemStorage::new(image), volume());
    std::array::from_fn(|start| {
        let (_, recovered) = open(&left, &disk).expect("recovers");
        assert!(start == 0 || recovered.epochs == 0, "it was emptied: {recovered:?}");
        recovered.holds
    })
}

/// Where a half is unreadable, epochs may be missing in front of those that are there, and a history may have ended since.
#[test]
fn a_journal_of_which_a_half_is_unreadable_proves_nothing() {
    let (storage, _) = fresh();
    let (mut journal, _) = open(&storage, &volume()).expect("recovers");
    journal.begin(stream(7), Some(2)).expect("no fault");
    let mut seeded = Seeded::new(8);
    let mut epoch = 2;
    while journal.halves.iter().any(|half| half.last.is_none()) {
        epoch += 1;
        let change = DiskChange::written(0, 0, &seeded.bytes(4096));
        journal.append(epoch, &[change], true, None).expect("room");
    }
    assert_eq!(
        open(&MemStorage::new(storage.bytes()), &volume())
            .expect("recovers")
            .1
            .holds
            .map(|holds| holds.epoch),
        Some(epoch)
    );
    for half in 0..2 {
        assert_eq!(held_without_header(&storage, half), [None; 2], "half {half}");
    }
    // What came before is in the half that is left.
    journal.begin(stream(8), Some(90)).expect("no fault");
    journal.reset().expect("no fault");
    assert_eq!(held_without_header(&storage, journal.current), [None; 2]);
}

/// A header of an engine that knows no streams has zeroes there.
#[test]
fn headers_keep_their_origin_and_old_ones_have_none() {
    let origin = |holds| Origin {
        stream: stream(3),
        volumes: u128::MAX / 3,
        holds,
    };
    for origin in [None, Some(origin(None)), Some(origin(Some(u64::MAX)))] {
        let header = HalfHeader {
            generation: 5,
            follows: Some(4),
            origin,
        };
        let bytes = header.encode();
        assert_eq!(HalfHeader::decode(&bytes), Some(header));
        assert_eq!(
            bytes[25..HALF_HEADER_BYTES - 4].iter().all(|&byte| byte == 0),
            origin.is_none()
        );
    }
}
