use super::*;
use crate::control::StoragePart;
use crate::replication::journal::JOURNAL_MIN_BYTES;
use crate::replication::noted::Noted;
use crate::replication::testing::{MemStorage, Seeded, apply_change, random_change};
use crate::replication::watched::Watched;

pub(super) const SECTORS: u64 = 64;

pub(super) struct Bench {
    pub journal: Arc<MemStorage>,
    pub volumes: [Arc<MemStorage>; 2],
}

impl Bench {
    pub fn new() -> Self {
        let volume = || MemStorage::new(vec![0xAA; SECTORS as usize * 512]);
        Self {
            journal: MemStorage::new(vec![0; JOURNAL_MIN_BYTES as usize]),
            volumes: [volume(), volume()],
        }
    }

    pub fn open(&self) -> Result<StandbyDisks, StandbyDisksError> {
        let volumes = self
            .volumes
            .iter()
            .map(|volume| volume.clone() as Arc<dyn Storage>)
            .collect();
        StandbyDisks::open(self.journal.clone(), volumes, &None)
    }

    pub fn bytes(&self) -> [Vec<u8>; 2] {
        [self.volumes[0].bytes(), self.volumes[1].bytes()]
    }
}

pub(super) fn changes(seeded: &mut Seeded) -> Vec<DiskChange> {
    (0..seeded.below(6))
        .map(|_| {
            let disk = seeded.below(2) as u16;
            random_change(seeded, disk, SECTORS)
        })
        .collect()
}

pub(super) fn apply_all(disks: &mut [Vec<u8>; 2], changes: &[DiskChange]) {
    changes
        .iter()
        .for_each(|change| apply_change(&mut disks[usize::from(change.disk)], change));
}

#[test]
fn volumes_have_what_was_committed_and_nothing_else() {
    let bench = Bench::new();
    let mut disks = bench.open().expect("opens");
    let mut seeded = Seeded::new(1);
    let mut expected = bench.bytes();
    let mut staged = VecDeque::new();
    for epoch in 1..=500 {
        let changes = changes(&mut seeded);
        disks.stage(epoch, &changes, seeded.below(3) == 0).expect("staged");
        staged.push_back((epoch, changes));
        // Up to two epochs are staged and not committed, as when acknowledgments are on their way.
        while staged.len() > 2 || (!staged.is_empty() && seeded.below(2) == 0) {
            let (epoch, changes) = staged.pop_front().expect("not empty");
            disks.commit(epoch).expect("committed");
            apply_all(&mut expected, &changes);
        }
    }
    disks.settle().expect("settled");
    assert!(bench.bytes() == expected);
    drop(disks);
    assert_eq!(bench.open().expect("opens").recovered(), Recovered::default());
    assert!(bench.bytes() == expected);
}

#[test]
fn after_a_power_cut_every_durable_epoch_is_on_the_volumes() {
    for seed in 0..100 {
        let bench = Bench::new();
        let mut disks = bench.open().expect("opens");
        let mut seeded = Seeded::new(seed);
        let mut state = bench.bytes();
        let (mut states, mut durable) = (vec![state.clone()], 0);
        let epochs = 1 + seeded.below(60);
        for epoch in 1..=epochs {
            let changes = changes(&mut seeded);
            let flush = seeded.below(3) == 0;
            disks.stage(epoch, &changes, flush).expect("staged");
            disks.commit(epoch).expect("committed");
            for change in &changes {
                apply_all(&mut state, std::slice::from_ref(change));
                states.push(state.clone());
            }
            if flush {
                durable = states.len() - 1;
            }
        }
        let cut = |storage: &Arc<MemStorage>, seeded: &mut Seeded| MemStorage::new(storage.after_power_cut(seeded));
        let left = Bench {
            journal: cut(&bench.journal, &mut seeded),
            volumes: [cut(&bench.volumes[0], &mut seeded), cut(&bench.volumes[1], &mut seeded)],
        };
        left.open().unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        for (disk, bytes) in left.bytes().iter().enumerate() {
            for sector in 0..SECTORS as usize {
                let range = sector * 512..(sector + 1) * 512;
                let known = states[durable..]
                    .iter()
                    .any(|state| state[disk][range.clone()] == bytes[range.clone()]);
                assert!(
                    known,
                    "seed {seed}: sector {sector} of disk {disk} is older than the last flush"
                );
            }
        }
    }
}

#[test]
fn a_takeover_may_read_and_write_before_the_volumes_have_caught_up() {
    let bench = Bench::new();
    let mut disks = bench.open().expect("opens");
    let mut seeded = Seeded::new(2);
    let mut expected = bench.bytes();
    for epoch in 1..=30 {
        let changes = changes(&mut seeded);
        disks.stage(epoch, &changes, false).expect("staged");
        disks.commit(epoch).expect("committed");
        apply_all(&mut expected, &changes);
    }
    let view = disks.volume(1).expect("there are two");
    for _ in 0..300 {
        if seeded.below(3) == 0 {
            let change = random_change(&mut seeded, 1, SECTORS);
            apply_change(&mut expected[1], &change);
            match &change.what {
                crate::replication::epoch::DiskData::Zeroed(len) => view.zero(change.offset, *len).expect("zeroed"),
                crate::replication::epoch::DiskData::Written(data) => {
                    view.write_at(change.offset, data).expect("written")
                }
            }
        }
        let start = seeded.below(60) * 512;
        let mut buf = [0; 4 * 512];
        view.read_at(start, &mut buf).expect("read");
        assert!(buf[..] == expected[1][start as usize..][..buf.len()]);
    }
    view.sync().expect("durable");
    assert!(view.is_settled());
    assert!(
        view.write_at(SECTORS * 512 - 512, &[0; 1024]).is_err(),
        "outside the volume"
    );
    disks.settle().expect("settled");
    assert!(bench.bytes() == expected);
}

#[test]
fn a_volume_that_fails_is_told_and_what_was_durable_stays_in_the_journal() {
    for error in [io::ErrorKind::StorageFull, io::ErrorKind::Other] {
        let bench = Bench::new();
        let mut disks = bench.open().expect("opens");
        let change = DiskChange::written(0, 512, &[7; 512]);
        bench.volumes[0].fail_after(0, error);
        disks.stage(1, std::slice::from_ref(&change), true).expect("journalled");
        let _ = disks.commit(1);
        let failed = disks.settle().expect_err("the volume fails");
        assert!(
            matches!(&failed, StandbyDisksError::Volume(VolumeError { disk: 0, .. })),
            "{failed}"
        );
        assert!(disks.stage(2, &[], true).is_ok() && disks.commit(2).is_err());
        drop(disks);
        let mended = Bench {
            volumes: Bench::new().volumes,
            journal: bench.journal.clone(),
        };
        mended.open().expect("recovers");
        assert_eq!(mended.volumes[0].bytes()[512..1024], [7; 512]);
    }
}

/// A volume whose zeroes take as long as a lock is held; what it zeroes may be copied, or a guest's.
#[derive(Default)]
struct Zeroing {
    held: std::sync::Mutex<()>,
    anew: std::sync::Mutex<Vec<bool>>,
}

impl Zeroing {
    fn took(&self, anew: bool) -> io::Result<()> {
        drop(self.held.lock().expect("no panic"));
        self.anew.lock().expect("no panic").push(anew);
        Ok(())
    }
}

impl Storage for Zeroing {
    fn size_bytes(&self) -> u64 {
        1 << 40
    }

    fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Ok(())
    }

    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn zero(&self, _: u64, _: u64) -> io::Result<()> {
        self.took(false)
    }

    fn zero_anew(&self, _: u64, _: u64) -> io::Result<()> {
        self.took(true)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

/// The other side zeroes in no time, and this one writes: what waits for that counts like what is written. A copy is zeroed anew,
/// and what a guest zeroes meanwhile is not, also through what a seat has around its volumes.
#[test]
fn what_is_to_be_zeroed_waits_like_what_is_to_be_written() {
    let (volume, bench) = (Arc::new(Zeroing::default()), Bench::new());
    let noted = Noted::new(volume.clone(), StoragePart::Disk(0), Arc::default());
    let watched = Arc::new(Watched::new(Arc::new(noted), Arc::default())) as Arc<dyn Storage>;
    let mut disks = StandbyDisks::open(bench.journal.clone(), vec![watched], &None).expect("opens");
    let zeroed = || vec![DiskChange::zeroed(0, 0, 64 << 20)];
    let held = volume.held.lock().expect("no panic");
    disks.stage(1, &zeroed(), false).expect("staged");
    disks.commit(1).expect("nothing else waits");
    assert!(disks.waiting_bytes() >= 64 << 20);
    drop(held);
    disks.begin_resync(None).expect("drained");
    assert_eq!(disks.waiting_bytes(), 0);
    disks.copy_resync(zeroed()).expect("queued");
    disks.write_resync(zeroed()).expect("queued");
    disks.settle().expect("settled");
    assert_eq!(*volume.anew.lock().expect("no panic"), [false, true, false]);
}

#[test]
fn epochs_commit_only_after_they_were_staged() {
    let mut disks = Bench::new().open().expect("opens");
    assert!(matches!(disks.commit(1), Err(StandbyDisksError::NotStaged(1))));
    disks.stage(2, &[], false).expect("staged");
    assert!(matches!(disks.commit(1), Err(StandbyDisksError::NotStaged(1))));
    disks.commit(2).expect("staged");
}

#[test]
fn a_resync_forgets_the_journal_and_is_durable_before_its_join_is() {
    let bench = Bench::new();
    let mut disks = bench.open().expect("opens");
    disks
        .stage(1, &[DiskChange::written(0, 0, &[1; 512])], true)
        .expect("staged");
    disks.begin_resync(None).expect("begun");
    disks
        .write_resync(vec![
            DiskChange::written(0, 0, &[2; 512]),
            DiskChange::written(1, 512, &[3; 512]),
        ])
        .expect("written");
    disks.stage(9, &[], true).expect("join");
    let mut seeded = Seeded::new(3);
    let left = MemStorage::new(bench.volumes[0].after_power_cut(&mut seeded));
    assert_eq!(left.bytes()[..512], [2; 512], "durable with the join");
    drop(disks);
    bench.open().expect("opens");
    assert_eq!(
        bench.volumes[0].bytes()[..512],
        [2; 512],
        "the journal of before the resync is not replayed"
    );
}

fn stream() -> Stream {
    use ftvm_protocol::identity::{Incarnation, SeatId, SessionId};
    Stream {
        leader: Incarnation::genesis(SeatId(1)),
        session: SessionId(3),
    }
}

/// The source of a switchover follows from its own state, and its volumes have what its guest wrote and did not flush: the first
/// epoch that has to be durable makes that durable, too.
#[test]
fn what_the_own_guest_wrote_before_is_durable_with_the_first_epoch_that_is() {
    let bench = Bench::new();
    bench.volumes[0].write_at(0, &[5; 512]).expect("the own guest's");
    let mut disks = bench.open().expect("opens");
    disks.begin_after_own_guest().expect("begun");
    disks.stage(8, &[], false).expect("staged");
    disks.commit(8).expect("committed");
    let mut seeded = Seeded::new(6);
    let lost = (0..50).any(|_| bench.volumes[0].after_power_cut(&mut seeded)[..512] != [5; 512]);
    assert!(lost, "not durable yet");
    disks.stage(9, &[], true).expect("staged");
    for _ in 0..50 {
        assert_eq!(bench.volumes[0].after_power_cut(&mut seeded)[..512], [5; 512]);
    }
}

/// What was proven stays so through a resync of what changed, and through nothing else.
#[test]
fn a_whole_resync_and_a_boot_end_what_the_volumes_are_known_to_hold() {
    let stream = stream();
    let bench = Bench::new();
    let mut disks = bench.open().expect("opens");
    assert_eq!(disks.holds(), None);
    disks.begin_resync(None).expect("begun");
    disks.begin_stream(stream).expect("begun");
    drop(disks);
    assert_eq!(bench.open().expect("opens").holds(), None, "no join checkpoint");
    let mut disks = bench.open().expect("opens");
    disks.begin_stream(stream).expect("begun");
    disks.stage(9, &[], true).expect("the join checkpoint");
    drop(disks);
    let holds = Some(Holds { stream, epoch: 9 });
    for _ in 0..2 {
        let mut disks = bench.open().expect("opens");
        assert_eq!(disks.holds(), holds);
        disks.begin_resync(holds).expect("begun");
        disks
            .write_resync(vec![DiskChange::written(0, 0, &[2; 512])])
            .expect("written");
    }
    for whole in [true, false] {
        let journal = MemStorage::new(bench.journal.bytes());
        let bench = Bench {
            journal,
            volumes: bench.volumes.clone(),
        };
        let mut disks = bench.open().expect("opens");
        assert_eq!(disks.holds(), holds);
        if whole {
            disks.begin_resync(None).expect("begun");
        } else {
            disks.settle().expect("as before a boot, and after a takeover");
        }
        drop(disks);
        assert_eq!(bench.open().expect("opens").holds(), None);
    }
}

/// Nothing of a damaged journal counts, and whoever gets everything anew does not need it. Until then it stays as it is, and a boot
/// refuses it.
#[test]
fn a_damaged_journal_is_begun_anew_by_a_whole_resync_and_by_nothing_else() {
    let bench = Bench::new();
    let mut disks = bench.open().expect("opens");
    disks.begin_stream(stream()).expect("begun");
    // Of a disk that this machine does not have.
    let foreign = DiskChange::written(7, 0, &[1; 512]);
    disks.stage(1, &[foreign], true).expect("staged");
    drop(disks);
    let before = bench.journal.bytes();
    let open_to_join = || {
        let volumes = bench.volumes.iter().map(|volume| volume.clone() as Arc<dyn Storage>);
        ClosedDisks::new(bench.journal.clone(), volumes.collect(), &None)?.open_to_join()
    };
    for _ in 0..2 {
        let refused = bench.open().err().expect("a boot refuses it");
        assert!(
            matches!(refused, StandbyDisksError::Journal(JournalError::Foreign { .. })),
            "{refused}"
        );
        let mut disks = open_to_join().expect("opens");
        assert_eq!(disks.holds(), None);
        disks.stage(2, &[], true).expect_err("no resync was begun");
    }
    assert!(bench.journal.bytes() == before, "it is kept");
    let mut disks = open_to_join().expect("opens");
    disks.begin_resync(None).expect("begun");
    disks.begin_stream(stream()).expect("begun");
    disks.stage(3, &[], true).expect("the join checkpoint");
    drop(disks);
    let holds = Holds {
        stream: stream(),
        epoch: 3,
    };
    assert_eq!(bench.open().expect("opens").holds(), Some(holds));
}
