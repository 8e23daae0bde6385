use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, LazyLock, Mutex};

use ftvm_protocol::wire::Kind;

use super::window::{CREDIT_EVERY_BYTES, CREDIT_EVERY_WORK_BYTES};
use super::*;
use crate::kvm::{CpuBaseline, CpuOffer, Kvm, cpu_of_host};
use crate::replication::epoch::{
    DiskChange, DiskData, EpochReceiver, EpochSender, FrameSink, SealedEpoch, StagedEpoch, StagingLimits,
};
use crate::replication::journal::JOURNAL_MIN_BYTES;
use crate::replication::memory::{HeapMemory, PAGE_SIZE, PageMemory, ZERO_PAGE};
use crate::replication::pages::{CopiedPages, EncoderConfig, PageEncoder};
use crate::replication::standby_disks::StandbyDisks;
use crate::replication::storage::Storage;
use crate::replication::testing::{MemStorage, Seeded, random_change};

#[path = "changed_tests.rs"]
mod changed_tests;

const PAGES: u32 = 5000;
/// Changes that the guest makes to its disks without their being taken; the standby's journal has room for them.
const MAX_PENDING_CHANGES: usize = 16;
const DISKS: [u64; 2] = [3 << 20, 100 * 512];

type Frame = (Kind, u64, Vec<u8>);

/// A link as a channel.
struct Wire {
    frames: SyncSender<Frame>,
    bulk: AtomicU64,
}

impl FrameSink for Wire {
    fn frame(&self, kind: Kind, epoch: u64, payload: Vec<u8>) -> Result<(), SinkClosed> {
        assert!(payload.len() <= kind.max_len() as usize);
        if matches!(
            kind,
            Kind::ResyncBegin | Kind::ResyncPlan | Kind::ResyncMemory | Kind::ResyncDisk | Kind::ResyncEnd
        ) {
            self.bulk.fetch_add(1, Ordering::Relaxed);
        }
        self.frames.send((kind, epoch, payload)).map_err(|_| SinkClosed)
    }

    fn bulk_frames(&self) -> u64 {
        self.bulk.load(Ordering::Relaxed)
    }

    fn wait_bulk_sent(&self) -> Result<(), SinkClosed> {
        Ok(())
    }
}

fn wire() -> (EpochSender, Receiver<Frame>) {
    let (frames, received) = sync_channel(4);
    let encoder = PageEncoder::new(EncoderConfig {
        workers: 2,
        cache_bytes: 1 << 20,
        ..EncoderConfig::default()
    });
    let sink = Arc::new(Wire {
        frames,
        bulk: AtomicU64::new(0),
    });
    (EpochSender::new(sink, encoder.expect("threads")), received)
}

fn limits() -> StagingLimits {
    StagingLimits {
        page_count: PAGES,
        disk_bytes: DISKS.to_vec(),
        nics: 1,
        max_epoch_bytes: 64 << 20,
    }
}

/// The guest's MTU in these tests.
const MTU: u16 = 1400;

/// What seats of this host offer. KVM is asked once.
fn offer() -> Offer {
    static HOST: LazyLock<CpuBaseline> = LazyLock::new(|| cpu_of_host(&Kvm::open().expect("KVM")).expect("baseline"));
    Offer {
        cpu: CpuOffer {
            host: HOST.clone(),
            machine: HOST.clone(),
            tsc_scaling: true,
        },
        nics: vec![("front".to_owned(), MTU)],
    }
}

struct Standby {
    memory: HeapMemory,
    journal: Arc<MemStorage>,
    volumes: Vec<Arc<MemStorage>>,
    disks: StandbyDisks,
    target: ResyncTarget,
}

impl Standby {
    fn new() -> Self {
        let mut seeded = Seeded::new(99);
        let memory = HeapMemory::new(PAGES);
        (0..PAGES).for_each(|page| memory.write_in_page(page, 0, &[0xEE]));
        let volumes: Vec<_> = DISKS
            .iter()
            .map(|&bytes| MemStorage::new(seeded.bytes(bytes as usize)))
            .collect();
        let stores = volumes
            .iter()
            .map(|volume| volume.clone() as Arc<dyn Storage>)
            .collect();
        let journal = MemStorage::new(vec![0; JOURNAL_MIN_BYTES as usize * 8]);
        let disks = StandbyDisks::open(journal.clone(), stores, &None).expect("opens");
        Self {
            memory,
            journal,
            volumes,
            disks,
            target: ResyncTarget::new(&limits(), offer(), false),
        }
    }

    fn accept(&mut self, frame: Frame) -> Result<Option<(Kind, Vec<u8>)>, ResyncError> {
        self.target.accept(frame.0, frame.2, &self.memory, &mut self.disks)
    }

    /// Takes frames to the end of the wire; gives the epoch that completes it.
    fn follow(&mut self, frames: &Receiver<Frame>, window: &ResyncWindow) -> Option<StagedEpoch> {
        let mut receiver = EpochReceiver::new(limits(), None);
        let mut staged = None;
        for (kind, epoch, payload) in frames {
            if matches!(
                kind,
                Kind::ResyncBegin | Kind::ResyncPlan | Kind::ResyncMemory | Kind::ResyncDisk | Kind::ResyncEnd
            ) {
                receiver.bulk_frame();
                let answer = self.accept((kind, epoch, payload)).expect("accepted");
                match answer {
                    Some((Kind::ResyncHolds, told)) => window.told(&told).expect("told once"),
                    Some((_, credit)) => window.credited(&credit).expect("credit for what was sent"),
                    None => {}
                }
            } else {
                staged = receiver.accept(kind, epoch, payload).expect("accepted").or(staged);
            }
        }
        staged
    }
}

/// An active whose guest writes memory and disks all the time.
struct Active {
    memory: Arc<HeapMemory>,
    volumes: Vec<Arc<MemStorage>>,
    completed: Mutex<Vec<DiskChange>>,
    dirty: Mutex<Vec<u32>>,
    stop: AtomicBool,
}

impl Active {
    fn new() -> Arc<Self> {
        let mut seeded = Seeded::new(1);
        let memory = Arc::new(HeapMemory::new(PAGES));
        (0..PAGES)
            .filter(|page| page % 3 == 0)
            .for_each(|page| memory.write_page(page, &seeded.page()));
        let volumes = DISKS.iter().map(|&bytes| {
            let mut contents = seeded.bytes(bytes as usize);
            contents[bytes as usize / 3..bytes as usize / 2].fill(0);
            MemStorage::new(contents)
        });
        Arc::new(Self {
            memory,
            volumes: volumes.collect(),
            completed: Mutex::default(),
            dirty: Mutex::default(),
            stop: AtomicBool::new(false),
        })
    }

    fn write_disk(&self, seeded: &mut Seeded) {
        let disk = seeded.below(2) as u16;
        let change = random_change(seeded, disk, DISKS[usize::from(disk)] / 512);
        let volume = &self.volumes[usize::from(disk)];
        match &change.what {
            DiskData::Written(data) => volume.write_at(change.offset, data).expect("no fault"),
            DiskData::Zeroed(len) => volume.zero(change.offset, *len).expect("no fault"),
        }
        // Completion comes later than the write.
        std::thread::yield_now();
        self.completed.lock().expect("no panic").push(change);
    }

    fn run_guest(&self, seed: u64) {
        let mut seeded = Seeded::new(seed);
        while !self.stop.load(Ordering::Relaxed) {
            // Like the driver, which ends an epoch before it outgrows the standby's journal.
            if self.completed.lock().expect("no panic").len() < MAX_PENDING_CHANGES {
                self.write_disk(&mut seeded);
            }
            // Odd pages stay as they were, so that it is known how many zeros there are.
            let page = 2 * seeded.below(u64::from(PAGES) / 2) as u32;
            self.memory
                .write_in_page(page, 8 * seeded.below(512) as usize, &seeded.next().to_le_bytes());
            self.dirty.lock().expect("no panic").push(page);
        }
    }

    fn source(self: &Arc<Self>) -> ResyncSource {
        let volumes = self
            .volumes
            .iter()
            .map(|volume| volume.clone() as Arc<dyn Storage>)
            .collect();
        let active = self.clone();
        let changes = move || std::mem::take(&mut *active.completed.lock().expect("no panic"));
        let source = ResyncSource::new(self.memory.clone(), offer().cpu.machine, vec![MTU], volumes, changes);
        source.with_work_confirmed(true)
    }

    /// What was written since this was asked last; what is written from here on is found by the next call.
    fn take_dirty(&self) -> Vec<u32> {
        let mut dirty = std::mem::take(&mut *self.dirty.lock().expect("no panic"));
        dirty.sort_unstable();
        dirty.dedup();
        dirty
    }

    fn join(&self, epoch: u64) -> SealedEpoch {
        let dirty = self.take_dirty();
        let mut pages = CopiedPages::default();
        dirty.into_iter().for_each(|page| pages.copy_from(&*self.memory, page));
        let disk = std::mem::take(&mut *self.completed.lock().expect("no panic"));
        SealedEpoch {
            epoch,
            pages: Arc::new(pages),
            disk,
            ..SealedEpoch::default()
        }
    }
}

/// A whole resync of a guest that stands still.
fn copy_all(source: ResyncSource, sender: &mut EpochSender) -> Result<ResyncStats, ResyncError> {
    source.copy(sender)?.end(sender)
}

#[test]
fn both_sides_are_equal_after_a_resync_under_writes() {
    let active = Active::new();
    let (mut sender, frames) = wire();
    let source = active.source();
    let window = source.window();
    let mut standby = Standby::new();
    let (staged, stats) = std::thread::scope(|scope| {
        let guest = scope.spawn(|| active.run_guest(5));
        let sending = scope.spawn(|| {
            let mut resync = source.copy(&mut sender).expect("sent");
            for _ in 0..3 {
                let dirty = active.take_dirty();
                assert!(!dirty.is_empty(), "the guest writes all the time");
                resync.pass(&mut sender, dirty).expect("sent");
            }
            let stats = resync.end(&mut sender).expect("sent");
            active.stop.store(true, Ordering::Relaxed);
            guest.join().expect("no panic");
            sender.finish(&active.join(7)).expect("sent");
            drop(sender);
            stats
        });
        let staged = standby.follow(&frames, &window).expect("join checkpoint");
        (staged, sending.join().expect("no panic"))
    });
    assert!(standby.target.is_complete());
    assert_eq!(stats.disk_bytes, DISKS.iter().sum::<u64>());
    assert!(stats.disk_changes > 5, "the guest wrote meanwhile: {stats:?}");
    assert!(stats.passes == 3 && stats.again_pages > 0, "{stats:?}");
    let never_written = (1..PAGES).step_by(2).filter(|page| page % 3 != 0).count();
    assert!(
        stats.pages.zero >= never_written as u64,
        "{never_written} pages are zero: {stats:?}"
    );
    standby.disks.stage(staged.epoch, &staged.disk, true).expect("staged");
    staged.apply_pages(&standby.memory);
    standby.disks.commit(staged.epoch).expect("committed");
    standby.disks.settle().expect("settled");
    let digest = |memory: &dyn PageMemory| StillDigest::default().advance(memory, memory.page_count());
    assert_eq!(digest(&*active.memory), digest(&standby.memory));
    for (ours, theirs) in active.volumes.iter().zip(&standby.volumes) {
        assert_eq!(
            digest_storage(&**ours).expect("read"),
            digest_storage(&**theirs).expect("read")
        );
        assert!(ours.bytes() == theirs.bytes());
    }
}

/// All frames of a resync of a machine that stands still.
fn frames_of(active: &Arc<Active>) -> Vec<Frame> {
    let (mut sender, frames) = wire();
    let source = active.source();
    let window = source.window();
    std::thread::scope(|scope| {
        scope.spawn(move || copy_all(source, &mut sender).expect("sent"));
        let mut taken = 0u64;
        frames
            .iter()
            .inspect(|frame| {
                taken += frame.2.len() as u64;
                window.credited(&taken.to_le_bytes()).expect("credit for what was sent");
            })
            .collect()
    })
}

#[test]
fn a_resync_is_complete_only_with_every_frame() {
    let frames = frames_of(&Active::new());
    let mut whole = Standby::new();
    frames
        .iter()
        .for_each(|frame| drop(whole.accept(frame.clone()).expect("accepted")));
    assert!(whole.target.is_complete());
    for lost in (0..frames.len()).step_by(7) {
        let mut standby = Standby::new();
        let rest = frames
            .iter()
            .enumerate()
            .filter(|(at, _)| *at != lost)
            .map(|(_, frame)| frame.clone());
        let refused = rest.into_iter().find_map(|frame| standby.accept(frame).err());
        let last = lost == frames.len() - 1;
        assert_eq!(refused.is_none(), last, "frame {lost} of {}", frames.len());
        assert!(!standby.target.is_complete());
    }
    let again = whole.accept(frames[1].clone());
    assert!(matches!(again, Err(ResyncError::Sequence { .. })), "{again:?}");
}

#[test]
fn pages_and_blocks_that_never_came_are_missed() {
    let frames = frames_of(&Active::new());
    for kind in [Kind::ResyncMemory, Kind::ResyncDisk] {
        let mut standby = Standby::new();
        // A sender that left a frame out and numbered and summed the others as if that were right.
        let skipped = frames
            .iter()
            .rposition(|frame| frame.0 == kind)
            .expect("there are some");
        let mut checksum = crc32fast::Hasher::new();
        let mut payload_bytes = 0;
        let rest = frames
            .iter()
            .enumerate()
            .filter(|(at, _)| *at != skipped)
            .map(|(_, frame)| frame.clone());
        let refused = rest.zip(0u32..).find_map(|(mut frame, number)| {
            if frame.0 == Kind::ResyncEnd {
                let end = End {
                    payload_bytes,
                    checksum: checksum.clone().finalize(),
                };
                frame.2 = crate::replication::epoch::wire::sequenced(number, &end, "end").expect("encodes");
            }
            frame.2[..4].copy_from_slice(&number.to_le_bytes());
            checksum.update(&frame.2);
            payload_bytes += frame.2.len() as u64;
            standby.accept(frame).err()
        });
        assert!(matches!(refused, Some(ResyncError::Incomplete(_))), "{refused:?}");
    }
}

#[test]
fn another_machine_is_refused_before_anything_is_overwritten() {
    let active = Active::new();
    let frames = frames_of(&active);
    let mut standby = Standby::new();
    standby.target = ResyncTarget::new(
        &StagingLimits {
            page_count: PAGES + 1,
            ..limits()
        },
        offer(),
        false,
    );
    let before = standby.volumes[0].bytes();
    let refused = standby.accept(frames[0].clone());
    assert!(matches!(refused, Err(ResyncError::OtherMachine { .. })), "{refused:?}");
    let refused = standby.accept((frames[1].0, 0, frames[0].2.clone()));
    assert!(matches!(refused, Err(ResyncError::Unexpected(_))), "{refused:?}");
    assert!(standby.volumes[0].bytes() == before);
}

/// A guest with a CPU that this seat can't give is refused by its first frame, by the feature's name.
#[test]
fn a_guest_of_another_cpu_is_refused_before_anything_is_overwritten() {
    let frames = frames_of(&Active::new());
    let mut standby = Standby::new();
    let mut less = offer();
    let leaf = less.cpu.machine.leaves.iter_mut().find(|leaf| leaf.leaf == 1);
    // Every host has it.
    leaf.expect("leaf 1").registers[3] &= !(1 << 4);
    standby.target = ResyncTarget::new(&limits(), less, false);
    let before = standby.volumes[0].bytes();
    let refused = standby.accept(frames[0].clone()).expect_err("another CPU");
    assert!(
        matches!(refused, ResyncError::Cpu(CpuError::NotGiven { .. })),
        "{refused:?}"
    );
    assert!(refused.to_string().contains("tsc"), "{refused}");
    assert!(standby.volumes[0].bytes() == before);
}

/// A seat whose bridge carries less than the guest was told would lose its frames in silence: it is refused by its first frame.
#[test]
fn a_guest_of_a_larger_mtu_is_refused_before_anything_is_overwritten() {
    let frames = frames_of(&Active::new());
    for (mtu_max, taken) in [(MTU - 1, false), (576, false), (MTU, true), (9000, true)] {
        let mut standby = Standby::new();
        let nics = vec![("front".to_owned(), mtu_max)];
        standby.target = ResyncTarget::new(&limits(), Offer { nics, ..offer() }, false);
        let before = standby.volumes[0].bytes();
        let accepted = standby.accept(frames[0].clone());
        if taken {
            assert!(accepted.is_ok(), "{accepted:?}");
            continue;
        }
        let refused = accepted.expect_err("a larger MTU");
        assert_eq!(refused.exit_code(), Some(exit_code::NETWORK));
        let text = refused.to_string();
        let words = [
            "network card front",
            "an MTU of 1400 bytes",
            &format!("carries {mtu_max}:"),
            "Raise the MTU",
        ];
        assert!(words.iter().all(|words| text.contains(words)), "{text}");
        let next = standby.accept((frames[1].0, 0, frames[1].2.clone()));
        assert!(next.is_err(), "nothing follows");
        assert!(standby.volumes[0].bytes() == before);
    }
}

#[test]
fn a_machine_with_more_or_fewer_network_cards_is_refused_before_anything_is_overwritten() {
    let frames = frames_of(&Active::new());
    for cards in [0, 2] {
        let mut standby = Standby::new();
        let nics = vec![("front".to_owned(), MTU); cards];
        standby.target = ResyncTarget::new(&limits(), Offer { nics, ..offer() }, false);
        let before = standby.volumes[0].bytes();
        let refused = standby.accept(frames[0].clone()).expect_err("another machine");
        let text = refused.to_string();
        assert!(
            text.contains("1 network cards") && text.contains(&format!("{cards} network cards")),
            "{text}"
        );
        assert!(standby.volumes[0].bytes() == before);
    }
}

#[test]
fn damaged_frames_are_refused_without_a_panic() {
    let frames = frames_of(&Active::new());
    let mut seeded = Seeded::new(4);
    for _ in 0..40 {
        let mut standby = Standby::new();
        let damaged = seeded.below(frames.len().min(20) as u64) as usize;
        let refused = frames.iter().enumerate().take(40).find_map(|(at, frame)| {
            let mut frame = frame.clone();
            if at == damaged {
                let below = frame.2.len().min(48) as u64;
                frame.2[seeded.below(below) as usize] ^= 1 << seeded.below(8);
            }
            standby.accept(frame).err()
        });
        // What passes is found by the checksum at the end.
        assert!(refused.is_some() || !standby.target.is_complete());
    }
}

/// A resync that is given up while its successor runs: what the successor tells of its progress stays as it is.
#[test]
fn a_resync_that_was_given_up_says_nothing_of_its_successor() {
    let active = Active::new();
    let (abandoned, source) = (active.source(), active.source());
    let (mut sender, frames) = wire();
    let progress = source.progress();
    std::thread::scope(|scope| {
        let sending = scope.spawn(move || copy_all(source, &mut sender));
        // The first frames are taken, then it waits: for room on the link.
        frames.recv().expect("begin");
        while progress.percent().is_none() {
            std::thread::yield_now();
        }
        drop(abandoned);
        assert!(progress.percent().is_some(), "it still runs");
        drop(frames);
        sending.join().expect("no panic").expect_err("the link is gone");
        assert_eq!(progress.percent(), None, "it has ended");
    });
}

/// Memory that the guest never wrote is next to nothing on the link and as much as any other on the standby, which says how far it is all the same.
#[test]
fn zeroes_are_confirmed_though_they_take_no_payload() {
    let active = Active::new();
    (0..PAGES).for_each(|page| active.memory.write_page(page, &ZERO_PAGE));
    let mut standby = Standby::new();
    let (mut payload_bytes, mut credits) = (0, 0);
    for frame in frames_of(&active) {
        let (is_memory, len) = (frame.0 == Kind::ResyncMemory, frame.2.len() as u64);
        let answer = standby.accept(frame).expect("accepted");
        if is_memory {
            payload_bytes += len;
            credits += u64::from(answer.is_some_and(|(kind, _)| kind == Kind::Credit));
        }
    }
    assert!(standby.target.is_complete());
    assert!(payload_bytes < CREDIT_EVERY_BYTES / 64, "{payload_bytes} bytes");
    assert_eq!(credits, u64::from(PAGES) * PAGE_SIZE as u64 / CREDIT_EVERY_WORK_BYTES);
}

#[test]
fn without_credit_the_source_waits_and_closing_ends_it() {
    let active = Active::new();
    let (mut sender, frames) = wire();
    let source = active.source();
    let window = source.window();
    let waiting = std::thread::spawn(move || copy_all(source, &mut sender));
    // Everything that comes without credit: less than all.
    let mut came = 0u64;
    while came < 7 << 20 {
        came += frames.recv().expect("more comes").2.len() as u64;
    }
    window.close();
    let result = waiting.join().expect("no panic");
    assert!(matches!(result, Err(ResyncError::Closed(_))), "{result:?}");
    came += frames.iter().map(|frame| frame.2.len() as u64).sum::<u64>();
    assert!(came <= 8 << 20, "{came} bytes came without credit");
    assert!(
        window.credited(&u64::MAX.to_le_bytes()).is_err(),
        "credit for what was never sent"
    );
    assert!(window.credited(&[1]).is_err());
}

#[test]
fn a_disk_that_cannot_be_read_ends_the_resync() {
    struct Broken;
    impl Storage for Broken {
        fn size_bytes(&self) -> u64 {
            1 << 20
        }
        fn read_at(&self, offset: u64, _: &mut [u8]) -> std::io::Result<()> {
            if offset > 300_000 {
                Err(std::io::ErrorKind::Other.into())
            } else {
                Ok(())
            }
        }
        fn write_at(&self, _: u64, _: &[u8]) -> std::io::Result<()> {
            Ok(())
        }
        fn zero(&self, _: u64, _: u64) -> std::io::Result<()> {
            Ok(())
        }
        fn sync(&self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let (mut sender, frames) = wire();
    let source = ResyncSource::new(
        Arc::new(HeapMemory::new(1)),
        offer().cpu.machine,
        vec![MTU],
        vec![Arc::new(Broken)],
        Vec::new,
    );
    let progress = source.progress();
    let result = copy_all(source, &mut sender);
    assert!(
        matches!(
            result,
            Err(ResyncError::Read {
                disk: 0,
                offset: 524_288,
                ..
            })
        ),
        "{result:?}"
    );
    assert_eq!(progress.percent(), None, "over");
    drop(frames);
}
