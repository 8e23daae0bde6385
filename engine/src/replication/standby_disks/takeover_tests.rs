//! Takeovers that don't wait for disks: what the guest reads and keeps, also when the power fails.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use super::tests::{Bench, SECTORS, apply_all, changes};
use super::*;
use crate::replication::epoch::DiskData;
use crate::replication::testing::{MemStorage, Seeded, apply_change, random_change};

/// A storage whose syncs wait while it is held.
struct Held {
    inner: Arc<MemStorage>,
    held: Mutex<bool>,
    changed: Condvar,
}

impl Held {
    fn new(inner: Arc<MemStorage>) -> Arc<Self> {
        Arc::new(Self {
            inner,
            held: Mutex::new(false),
            changed: Condvar::new(),
        })
    }

    fn hold(&self, held: bool) {
        *self.held.lock().unwrap() = held;
        self.changed.notify_all();
    }
}

impl Storage for Held {
    fn size_bytes(&self) -> u64 {
        self.inner.size_bytes()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.inner.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.inner.write_at(offset, data)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.zero(offset, len)
    }

    fn sync(&self) -> io::Result<()> {
        let mut held = self.held.lock().unwrap();
        while *held {
            held = self.changed.wait(held).unwrap();
        }
        self.inner.sync()
    }
}

fn seat_volumes(bench: &Bench) -> Vec<Arc<SeatVolume>> {
    let volume = |volume: &Arc<MemStorage>| Arc::new(SeatVolume::new(volume.clone()));
    bench.volumes.iter().map(volume).collect()
}

fn write(volume: &SeatVolume, change: &DiskChange) {
    match &change.what {
        DiskData::Zeroed(len) => volume.zero(change.offset, *len).expect("zeroed"),
        DiskData::Written(data) => volume.write_at(change.offset, data).expect("written"),
    }
}

fn read(volume: &SeatVolume) -> Vec<u8> {
    let mut bytes = vec![0; SECTORS as usize * 512];
    volume.read_at(0, &mut bytes).expect("read");
    bytes
}

/// What is left of a seat after a power cut, recovered as its next engine does.
fn recovered(bench: &Bench, seeded: &mut Seeded) -> [Vec<u8>; 2] {
    // The journal first: what is settled in between takes nothing from it.
    let journal = MemStorage::new(bench.journal.after_power_cut(seeded));
    let mut cut = |disk: usize| MemStorage::new(bench.volumes[disk].after_power_cut(seeded));
    let left = Bench {
        journal,
        volumes: [cut(0), cut(1)],
    };
    left.open().expect("recovers");
    left.bytes()
}

/// Every sector is as it was in one of these states.
fn assert_not_older(bytes: &[Vec<u8>; 2], states: &[[Vec<u8>; 2]], disk: usize, what: &str) {
    for sector in 0..SECTORS as usize {
        let range = sector * 512..(sector + 1) * 512;
        let known = states
            .iter()
            .any(|state| state[disk][range.clone()] == bytes[disk][range.clone()]);
        assert!(known, "{what}: sector {sector} of disk {disk} is older than it may be");
    }
}

/// The guest of the successor works on while the power fails: what it flushed, and what was acknowledged before, stays.
#[test]
fn a_power_cut_after_a_takeover_takes_nothing_that_was_flushed() {
    for seed in 0..150 {
        let bench = Bench::new();
        let mut seeded = Seeded::new(seed);
        let mut disks = bench.open().expect("opens");
        let mut state = bench.bytes();
        for epoch in 1..=1 + seeded.below(20) {
            let changes = changes(&mut seeded);
            disks.stage(epoch, &changes, true).expect("staged");
            disks.commit(epoch).expect("committed");
            apply_all(&mut state, &changes);
        }
        let volumes = seat_volumes(&bench);
        let settler = Settler::start(&volumes, disks, &None, |_| {}).expect("starts");
        let mut states = vec![state.clone()];
        let mut flushed = [0, 0];
        for _ in 0..seeded.below(60) {
            let disk = seeded.below(2) as usize;
            match seeded.below(6) {
                0 => {
                    volumes[disk].sync().expect("durable");
                    flushed[disk] = states.len() - 1;
                }
                1 => assert!(read(&volumes[disk]) == state[disk], "seed {seed}: disk {disk}"),
                _ => {
                    let change = random_change(&mut seeded, disk as u16, SECTORS);
                    write(&volumes[disk], &change);
                    apply_change(&mut state[disk], &change);
                    states.push(state.clone());
                }
            }
        }
        let left = recovered(&bench, &mut seeded);
        for disk in 0..2 {
            assert_not_older(&left, &states[flushed[disk]..], disk, &format!("seed {seed}"));
        }
        settler.wait().expect("settles");
        assert!(bench.bytes() == state, "seed {seed}");
        assert_eq!(bench.open().expect("opens").recovered(), Recovered::default());
    }
}

/// Before the journal is empty a replay may put old contents over new ones, so no flush returns; reads don't wait.
#[test]
fn a_flush_after_a_takeover_waits_until_the_journal_is_empty() {
    for seed in 0..30 {
        let bench = Bench::new();
        let journal = Held::new(bench.journal.clone());
        let direct = bench.volumes.iter().map(|volume| volume.clone() as Arc<dyn Storage>);
        let mut disks = StandbyDisks::open(journal.clone(), direct.collect(), &None).expect("opens");
        let old = DiskChange::written(0, 512, &[1; 512]);
        disks.stage(1, std::slice::from_ref(&old), true).expect("staged");
        disks.commit(1).expect("committed");
        journal.hold(true);
        let volumes = seat_volumes(&bench);
        let settler = Settler::start(&volumes, disks, &None, |_| {}).expect("starts");
        assert_eq!(read(&volumes[0])[512..1024], [1; 512]);
        volumes[0].write_at(512, &[2; 512]).expect("written");
        assert_eq!(read(&volumes[0])[512..1024], [2; 512]);
        let released = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let flush = scope.spawn(|| {
                volumes[0].sync().expect("durable");
                assert!(released.load(Ordering::SeqCst), "the journal still says otherwise");
            });
            let mut seeded = Seeded::new(seed);
            let left = recovered(&bench, &mut seeded);
            assert!(
                [[1; 512], [2; 512]].contains(left[0][512..1024].try_into().unwrap()),
                "acknowledged, or newer"
            );
            released.store(true, Ordering::SeqCst);
            journal.hold(false);
            flush.join().expect("flushed");
            assert_eq!(recovered(&bench, &mut seeded)[0][512..1024], [2; 512]);
        });
        settler.wait().expect("settles");
    }
}

/// A seat that gives its guest away follows with the journal that its own takeover emptied: it stages and commits while journal and
/// volumes make nothing durable. What has to be durable waits, and then contains what its guest wrote.
#[test]
fn who_gives_the_guest_away_waits_for_no_disk() {
    let bench = Bench::new();
    let journal = Held::new(bench.journal.clone());
    let held = bench.volumes.each_ref().map(|volume| Held::new(volume.clone()));
    let direct: Vec<_> = held.iter().map(|volume| volume.clone() as Arc<dyn Storage>).collect();
    let mut disks = StandbyDisks::open(journal.clone(), direct.clone(), &None).expect("opens");
    let taken_over = DiskChange::written(0, 0, &[1; 512]);
    disks.stage(7, &[taken_over], true).expect("staged");
    disks.commit(7).expect("committed");
    disks.settle().expect("settled");
    let emptied = disks.into_journal();
    bench.volumes[0].write_at(512, &[2; 512]).expect("the own guest's");
    let hold = |slow: bool| {
        journal.hold(slow);
        held.iter().for_each(|volume| volume.hold(slow));
    };
    hold(true);
    let closed = ClosedDisks::new(journal.clone(), direct, &None).expect("starts");
    let (followed, follows) = channel();
    std::thread::spawn(move || {
        let mut disks = closed.open_emptied(emptied);
        disks.begin_after_own_guest().expect("begun");
        let moved = DiskChange::written(1, 0, &[3; 512]);
        disks.stage(8, &[moved], false).expect("staged");
        disks.commit(8).expect("committed");
        followed.send(disks).expect("somebody waits");
    });
    let follows = follows.recv_timeout(Duration::from_secs(90));
    hold(false);
    let mut disks = follows.expect("no disk was waited for");
    disks.stage(9, &[], true).expect("staged");
    let mut seeded = Seeded::new(7);
    for _ in 0..50 {
        let left = recovered(&bench, &mut seeded);
        assert_eq!(left[0][..512], [1; 512]);
        assert_eq!(left[0][512..1024], [2; 512]);
        assert_eq!(left[1][..512], [3; 512]);
    }
}

/// What can't be settled fails flushes, and is still read as it was acknowledged.
#[test]
fn a_volume_that_fails_after_a_takeover_fails_flushes_and_keeps_its_journal() {
    let bench = Bench::new();
    let mut disks = bench.open().expect("opens");
    let change = DiskChange::written(0, 512, &[7; 512]);
    disks.stage(1, std::slice::from_ref(&change), true).expect("staged");
    bench.volumes[0].fail_after(0, io::ErrorKind::Other);
    // The volume may have failed before this returns, or fails later.
    let _ = disks.commit(1);
    let volumes = seat_volumes(&bench);
    let told = Arc::new(Mutex::new(None));
    let report = told.clone();
    let settler = Settler::start(&volumes, disks, &None, move |outcome| {
        *report.lock().unwrap() = Some(outcome.clone());
    });
    assert!(volumes[0].sync().is_err());
    assert_eq!(read(&volumes[0])[512..1024], [7; 512]);
    let why = settler.expect("starts").wait().err().expect("the volume fails");
    assert_eq!(*told.lock().unwrap(), Some(Err(why)));
    let mended = Bench {
        volumes: Bench::new().volumes,
        journal: bench.journal.clone(),
    };
    mended.open().expect("recovers");
    assert_eq!(mended.volumes[0].bytes()[512..1024], [7; 512]);
}
