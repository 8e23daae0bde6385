use std::collections::VecDeque;
use std::sync::Arc;

use super::*;
use crate::replication::epoch::DiskChange;
use crate::replication::journal::{JOURNAL_MIN_BYTES, JournalError};
use crate::replication::standby_disks::{StandbyDisks, StandbyDisksError};
use crate::replication::storage::Storage;
use crate::replication::testing::{MemStorage, Seeded, apply_change, random_change};

const GRAINS: u64 = 12;
const SECTORS: u64 = GRAINS * GRAIN_BYTES / 512;
const FOLLOWER: SeatId = SeatId(2);

fn stream(session: u64) -> Stream {
    Stream {
        leader: Incarnation {
            seat: SeatId(1),
            start: 77,
        },
        session: SessionId(session),
    }
}

fn at(session: u64, epoch: Epoch) -> Holds {
    Holds {
        stream: stream(session),
        epoch,
    }
}

fn one(extent: Range<u64>) -> Vec<Range<u64>> {
    std::iter::once(extent).collect()
}

/// What is to be copied, by disk.
fn extents(since: Result<Vec<Grains>, Unknown>) -> Result<Vec<Vec<Range<u64>>>, Unknown> {
    Ok(since?.iter().map(|grains| grains.extents().collect()).collect())
}

/// One disk whose follower has everything through epoch 10 of session 1, and then two grains were written.
fn followed() -> ChangedBlocks {
    let changed = ChangedBlocks::new(&[GRAINS * GRAIN_BYTES]);
    changed.mark(0, 0, GRAIN_BYTES);
    changed.sealed(FOLLOWER, at(1, 10), true);
    changed.acknowledged(at(1, 10));
    changed.mark(0, 3 * GRAIN_BYTES - 512, 1024);
    changed
}

#[test]
fn what_was_written_since_an_acknowledged_epoch_is_what_may_differ() {
    let changed = followed();
    let expected = vec![one(2 * GRAIN_BYTES..4 * GRAIN_BYTES)];
    assert_eq!(extents(changed.since(FOLLOWER, Some(at(1, 10)))), Ok(expected.clone()));
    changed.sealed(FOLLOWER, at(1, 11), false);
    assert_eq!(extents(changed.since(FOLLOWER, Some(at(1, 11)))), Ok(expected.clone()));
    // Sealed as durable, and never acknowledged: the follower may have it, and may not.
    changed.sealed(FOLLOWER, at(1, 12), true);
    changed.mark(0, 7 * GRAIN_BYTES, 512);
    let marked = extents(changed.since(FOLLOWER, Some(at(1, 12)))).expect("known");
    assert_eq!(
        marked[0].last(),
        Some(&(7 * GRAIN_BYTES..8 * GRAIN_BYTES)),
        "before the stream is over"
    );
    changed.over();
    changed.acknowledged(at(1, 12));
    let more = vec![vec![2 * GRAIN_BYTES..4 * GRAIN_BYTES, 7 * GRAIN_BYTES..8 * GRAIN_BYTES]];
    for epoch in 10..=12 {
        assert_eq!(
            extents(changed.since(FOLLOWER, Some(at(1, epoch)))),
            Ok(more.clone()),
            "epoch {epoch}"
        );
    }
}

#[test]
fn a_claim_that_is_not_the_records_is_refused_by_name() {
    let changed = followed();
    let claim = |by, claim| changed.since(by, claim).expect_err("refused");
    assert_eq!(claim(FOLLOWER, None), Unknown::NoClaim);
    assert_eq!(claim(SeatId(3), Some(at(1, 10))), Unknown::OtherSeat);
    assert_eq!(claim(FOLLOWER, Some(at(2, 10))), Unknown::OtherStream);
    let mut other_start = at(1, 10);
    other_start.stream.leader.start += 1;
    assert_eq!(claim(FOLLOWER, Some(other_start)), Unknown::OtherStream);
    assert_eq!(claim(FOLLOWER, Some(at(1, 9))), Unknown::Less);
    assert_eq!(claim(FOLLOWER, Some(at(1, 11))), Unknown::More);
    assert_eq!(claim(FOLLOWER, Some(at(1, u64::MAX))), Unknown::More);
    changed.failed();
    assert_eq!(claim(FOLLOWER, Some(at(1, 10))), Unknown::FailedHere);
    let changed = followed();
    changed.forget();
    assert_eq!(
        extents(changed.since(FOLLOWER, Some(at(1, 10)))),
        Err(Unknown::NoRecord)
    );
}

/// Until its join checkpoint is acknowledged a session changes nothing of what is known: the seat may still be as it was.
#[test]
fn a_join_that_comes_to_nothing_leaves_the_record_as_it_was() {
    let changed = followed();
    changed.over();
    changed.sealed(FOLLOWER, at(2, 20), true);
    changed.mark(0, 5 * GRAIN_BYTES, 512);
    // An acknowledgment of another session, or of less than the join checkpoint, is none.
    changed.acknowledged(at(1, 20));
    changed.acknowledged(at(2, 19));
    changed.over();
    let all = vec![vec![2 * GRAIN_BYTES..4 * GRAIN_BYTES, 5 * GRAIN_BYTES..6 * GRAIN_BYTES]];
    assert_eq!(extents(changed.since(FOLLOWER, Some(at(1, 10)))), Ok(all));
    assert_eq!(
        extents(changed.since(FOLLOWER, Some(at(2, 20)))),
        Err(Unknown::OtherStream)
    );
    changed.sealed(FOLLOWER, at(3, 30), true);
    changed.acknowledged(at(3, 30));
    assert_eq!(
        extents(changed.since(FOLLOWER, Some(at(1, 10)))),
        Err(Unknown::OtherStream)
    );
    assert_eq!(extents(changed.since(FOLLOWER, Some(at(3, 30)))), Ok(vec![vec![]]));
}

/// Ends of disks that are no whole grain, and changes that say more than there is.
#[test]
fn marks_stay_within_the_disk() {
    let size = GRAIN_BYTES + 512;
    let mut grains = Grains::of_disk(size);
    grains.mark(GRAIN_BYTES, 512);
    grains.mark(u64::MAX - 511, 512);
    grains.mark(0, 0);
    assert_eq!(grains.extents().collect::<Vec<_>>(), one(GRAIN_BYTES..size));
    assert_eq!(grains.bytes(), 512);
    grains.mark(0, u64::MAX);
    assert_eq!(grains.extents().collect::<Vec<_>>(), one(0..size));
    assert_eq!(grains.bytes(), size);
    assert_eq!(grains.count, 2);
    let changed = ChangedBlocks::new(&[]);
    changed.mark(4, 0, 512);
    assert_eq!(Grains::of_disk(0).extents().next(), None);
}

// ---- the obligation, against journals and disks that lose power

/// What became of the returning seat while nobody led it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Absence {
    /// Its engine was killed.
    Killed,
    /// Its node lost power: whatever was not durable may be lost, in any part.
    PowerCut,
    /// The disk was made anew, the journal is still there.
    NewDisk,
    /// Journal and disk were made anew.
    NewSeat,
    /// A byte of the journal has changed.
    Damaged,
    /// It ran the guest for a while, after a freeze here, and its journal still says what it said before.
    WasActive,
    /// It booted from its disk and wrote there.
    Booted,
    /// Another session's resync began and came to nothing.
    OtherSession,
}

const ABSENCES: [Absence; 8] = [
    Absence::Killed,
    Absence::PowerCut,
    Absence::NewDisk,
    Absence::NewSeat,
    Absence::Damaged,
    Absence::WasActive,
    Absence::Booted,
    Absence::OtherSession,
];

struct World {
    seeded: Seeded,
    changed: ChangedBlocks,
    /// The active's disk, and the changes of the running epoch.
    active: Vec<u8>,
    running: Vec<DiskChange>,
    epoch: Epoch,
    session: u64,
    journal: Arc<MemStorage>,
    volume: Arc<MemStorage>,
    /// Epochs on their way to the follower, and acknowledgments on their way back.
    sent: VecDeque<(Epoch, Vec<DiskChange>, bool)>,
    acks: VecDeque<Epoch>,
    volumes_made: u128,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut seeded = Seeded::new(seed);
        let size = (GRAINS * GRAIN_BYTES) as usize;
        let active = seeded.bytes(size);
        let volume = MemStorage::called(seeded.bytes(size), 1);
        Self {
            seeded,
            changed: ChangedBlocks::new(&[size as u64]),
            active,
            running: Vec::new(),
            epoch: 1,
            session: 0,
            journal: MemStorage::new(vec![0; JOURNAL_MIN_BYTES as usize]),
            volume,
            sent: VecDeque::new(),
            acks: VecDeque::new(),
            volumes_made: 1,
        }
    }

    fn write(&mut self) {
        let change = random_change(&mut self.seeded, 0, SECTORS);
        apply_change(&mut self.active, &change);
        self.changed.mark(0, change.offset, change.len());
        self.running.push(change);
    }

    /// The epoch ends; `None` if nobody follows.
    fn seal(&mut self, live: bool, durable: bool) {
        let changes = std::mem::take(&mut self.running);
        if live {
            self.changed.sealed(FOLLOWER, at(self.session, self.epoch), durable);
            self.sent.push_back((self.epoch, changes, durable));
        }
        self.epoch += 1;
    }

    fn open(&self) -> Result<StandbyDisks, StandbyDisksError> {
        StandbyDisks::open(self.journal.clone(), vec![self.volume.clone()], &None)
    }

    /// A session from its join checkpoint on, until it is over somewhere in the middle.
    fn follow(&mut self, disks: &mut StandbyDisks) {
        disks.begin_stream(stream(self.session)).expect("no fault");
        self.seal(true, true);
        for _ in 0..self.seeded.below(60) {
            match self.seeded.below(6) {
                0 | 1 => self.write(),
                2 => {
                    let durable = self.seeded.below(2) == 0;
                    self.seal(true, durable);
                }
                3 | 4 => {
                    let Some((epoch, changes, durable)) = self.sent.pop_front() else {
                        continue;
                    };
                    disks.stage(epoch, &changes, durable).expect("no fault");
                    if self.seeded.below(4) > 0 {
                        disks.commit(epoch).expect("staged");
                    }
                    self.acks.push_back(epoch);
                }
                _ => {
                    let Some(epoch) = self.acks.pop_front() else { continue };
                    self.changed.acknowledged(at(self.session, epoch));
                }
            }
        }
        if self.seeded.below(2) == 0 {
            disks.drain().expect("no fault");
        }
        self.sent.clear();
        self.acks.clear();
        self.changed.over();
    }

    fn power_cut(&mut self) {
        self.journal = MemStorage::new(self.journal.after_power_cut(&mut self.seeded));
        let left = self.volume.after_power_cut(&mut self.seeded);
        self.volume = MemStorage::called(left, self.volumes_made);
    }

    fn new_disk(&mut self) {
        self.volumes_made += 1;
        self.volume = MemStorage::called(vec![0; (GRAINS * GRAIN_BYTES) as usize], self.volumes_made);
    }

    fn write_behind_the_back(&mut self) {
        for _ in 0..4 {
            let change = random_change(&mut self.seeded, 0, SECTORS);
            let data = self.seeded.bytes(change.len() as usize);
            self.volume.write_at(change.offset, &data).expect("no fault");
        }
    }

    fn absent(&mut self, absence: Absence) {
        match absence {
            Absence::Killed => {}
            Absence::PowerCut => self.power_cut(),
            Absence::NewDisk => self.new_disk(),
            Absence::NewSeat => {
                self.new_disk();
                self.journal = MemStorage::new(vec![0; JOURNAL_MIN_BYTES as usize]);
            }
            Absence::Damaged => {
                let mut bytes = self.journal.bytes();
                let used: Vec<_> = (0..bytes.len()).filter(|&at| bytes[at] != 0).collect();
                let at = used[self.seeded.below(used.len() as u64) as usize];
                bytes[at] ^= 1 << self.seeded.below(8);
                self.journal = MemStorage::new(bytes);
            }
            Absence::WasActive => {
                self.changed.forget();
                self.write_behind_the_back();
            }
            Absence::Booted => {
                // A damaged journal boots nothing.
                let Ok(mut disks) = self.open() else { return };
                disks.settle().expect("no fault");
                drop(disks);
                self.write_behind_the_back();
                self.power_cut();
            }
            Absence::OtherSession => {
                let Ok(mut disks) = self.open() else { return };
                disks.begin_resync(None).expect("no fault");
                let data = self.seeded.bytes(4096);
                disks
                    .write_resync(vec![DiskChange::written(0, 0, &data)])
                    .expect("no fault");
                disks.drain().expect("no fault");
                drop(disks);
                self.power_cut();
            }
        }
    }

    /// The seat comes back, and gets what may differ. Whether that was less than the disk; `None` if it went away again.
    fn come_back(&mut self, what: &str) -> Option<(StandbyDisks, bool)> {
        let mut disks = match self.open() {
            Ok(disks) => disks,
            Err(StandbyDisksError::Journal(JournalError::Damaged { .. })) => {
                self.journal = MemStorage::new(vec![0; JOURNAL_MIN_BYTES as usize]);
                self.open().expect("an empty journal")
            }
            Err(error) => panic!("{what}: {error}"),
        };
        self.session += 1;
        let claim = disks.holds();
        let extents = extents(self.changed.since(FOLLOWER, claim));
        let spared = extents.is_ok();
        let extents = match extents {
            Ok(extents) => {
                self.check(&extents[0], &format!("{what}, claim {claim:?}"));
                disks.begin_resync(claim).expect("no fault");
                extents.into_iter().flatten().collect()
            }
            Err(_) => {
                disks.begin_resync(None).expect("no fault");
                one(0..GRAINS * GRAIN_BYTES)
            }
        };
        let given_up = self.seeded.below(4) == 0;
        for extent in extents {
            for start in extent.clone().step_by(GRAIN_BYTES as usize) {
                if given_up && self.seeded.below(3) == 0 {
                    disks.drain().expect("no fault");
                    self.changed.over();
                    drop(disks);
                    if self.seeded.below(2) == 0 {
                        self.power_cut();
                    }
                    return None;
                }
                let end = (start + GRAIN_BYTES).min(extent.end);
                let block = DiskChange::written(0, start, &self.active[start as usize..end as usize]);
                disks.write_resync(vec![block]).expect("no fault");
                // The guest writes on, and what completes comes behind the block.
                self.write();
                disks.write_resync(std::mem::take(&mut self.running)).expect("no fault");
            }
        }
        disks.drain().expect("no fault");
        assert!(
            self.volume.bytes() == self.active,
            "{what}: the disks are equal after a resync"
        );
        Some((disks, spared))
    }

    /// Nothing differs but what is to be copied.
    fn check(&self, extents: &[Range<u64>], what: &str) {
        let theirs = self.volume.bytes();
        let sectors = self
            .active
            .chunks(512)
            .zip(theirs.chunks(512))
            .zip((0u64..).step_by(512));
        for ((ours, theirs), offset) in sectors {
            let copied = extents.iter().any(|extent| extent.contains(&offset));
            assert!(
                copied || ours == theirs,
                "{what}: byte {offset} differs and is not copied"
            );
        }
    }
}

/// Whatever happens to a seat while nobody leads it, and wherever its session ends: what is not copied is equal.
#[test]
fn whatever_differs_is_copied() {
    let mut spared = ABSENCES.map(|absence| (absence, 0, 0));
    for seed in 0..120 {
        let mut world = World::new(seed);
        let mut absence = None;
        for _ in 0..6 {
            let what = format!("seed {seed} after {absence:?}");
            if let Some((mut disks, less)) = world.come_back(&what) {
                if let Some((_, lessened, whole)) = spared.iter_mut().find(|(known, ..)| Some(*known) == absence) {
                    *(if less { lessened } else { whole }) += 1;
                }
                world.follow(&mut disks);
                drop(disks);
                let next = ABSENCES[world.seeded.below(8) as usize];
                world.absent(next);
                absence = Some(next);
            }
            for _ in 0..world.seeded.below(5) {
                world.write();
            }
            world.seal(false, false);
        }
    }
    println!("{spared:?}");
    for (absence, less, whole) in spared {
        let kept = matches!(absence, Absence::Killed | Absence::PowerCut | Absence::Damaged);
        assert_eq!(
            less > 0,
            kept,
            "{absence:?}: {less} times less than the disk, {whole} times all of it"
        );
        assert!(kept || whole > 0, "{absence:?} came about");
    }
}
