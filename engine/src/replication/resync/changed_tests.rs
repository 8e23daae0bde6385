//! Resyncs of disks that are known to hold something.

use super::*;
use crate::replication::changed::{ChangedBlocks, GRAIN_BYTES, Stream};
use crate::replication::epoch::wire as format;
use ftvm_protocol::identity::{Incarnation, SeatId, SessionId};

const FOLLOWER: SeatId = SeatId(2);
/// Of the session in which the standby joined first.
const HELD: Holds = Holds {
    stream: Stream {
        leader: Incarnation {
            seat: SeatId(1),
            start: 5,
        },
        session: SessionId(4),
    },
    epoch: 40,
};

/// A standby that has the active's disks as of [`HELD`], and an active that has changed them since.
struct Returning {
    active: Arc<Active>,
    changed: Arc<ChangedBlocks>,
    standby: Standby,
}

impl Returning {
    fn new() -> Self {
        let active = Active::new();
        let changed = Arc::new(ChangedBlocks::new(&DISKS));
        changed.sealed(FOLLOWER, HELD, true);
        changed.acknowledged(HELD);
        let mut standby = Standby::new();
        for (ours, theirs) in active.volumes.iter().zip(&standby.volumes) {
            theirs.write_at(0, &ours.bytes()).expect("no fault");
        }
        standby.disks.begin_stream(HELD.stream).expect("no fault");
        standby.disks.stage(HELD.epoch, &[], true).expect("no fault");
        standby.target = ResyncTarget::new(&limits(), offer(), true);
        let mut returning = Self {
            active,
            changed,
            standby,
        };
        returning.standby.reopen();
        // Two grains of the first disk, and the end of the second.
        returning.change(DiskChange::written(0, 5 * GRAIN_BYTES - 512, &[1; 1024]));
        returning.change(DiskChange::zeroed(1, 99 * 512, 512));
        returning
    }

    fn change(&mut self, change: DiskChange) {
        let volume = &self.active.volumes[usize::from(change.disk)];
        match &change.what {
            DiskData::Written(data) => volume.write_at(change.offset, data).expect("no fault"),
            DiskData::Zeroed(len) => volume.zero(change.offset, *len).expect("no fault"),
        }
        self.changed.mark(change.disk, change.offset, change.len());
    }

    fn source(&self) -> ResyncSource {
        let changed = self.changed.clone();
        self.active.source().asking(move |claim| changed.since(FOLLOWER, claim))
    }

    /// The whole resync while the guest writes.
    fn resync(&mut self) -> ResyncStats {
        let (mut sender, frames) = wire();
        let source = self.source();
        let window = source.window();
        let active = self.active.clone();
        let (staged, stats) = std::thread::scope(|scope| {
            let guest = scope.spawn(|| active.run_guest(8));
            let sending = scope.spawn(|| {
                let stats = copy_all(source, &mut sender).expect("sent");
                active.stop.store(true, Ordering::Relaxed);
                guest.join().expect("no panic");
                sender.finish(&active.join(50)).expect("sent");
                drop(sender);
                stats
            });
            let staged = self.standby.follow(&frames, &window).expect("join checkpoint");
            (staged, sending.join().expect("no panic"))
        });
        assert!(self.standby.target.is_complete());
        let disks = &mut self.standby.disks;
        disks.stage(50, &staged.disk, true).expect("staged");
        disks.commit(50).expect("committed");
        disks.settle().expect("settled");
        for (ours, theirs) in active.volumes.iter().zip(&self.standby.volumes) {
            assert!(ours.bytes() == theirs.bytes(), "both sides are equal");
        }
        stats
    }
}

impl Standby {
    /// As its next engine finds it.
    fn reopen(&mut self) {
        let stores = self.volumes.iter().map(|volume| volume.clone() as Arc<dyn Storage>);
        self.disks = StandbyDisks::open(self.journal.clone(), stores.collect(), &None).expect("opens");
    }
}

#[test]
fn only_what_changed_is_copied_while_the_guest_writes_on() {
    let mut returning = Returning::new();
    let stats = returning.resync();
    let all: u64 = DISKS.iter().sum();
    assert_eq!(stats.disk_bytes, 2 * GRAIN_BYTES + DISKS[1]);
    assert_eq!(stats.disk_bytes + stats.spared_bytes, all);
    assert_eq!(returning.standby.target.totals().disk_bytes, stats.disk_bytes);
    assert!(stats.disk_changes > 0, "the guest wrote meanwhile: {stats:?}");
}

#[test]
fn disks_that_are_not_the_records_are_copied_whole() {
    type Spoil = fn(&mut Returning);
    let cases: [(&str, Spoil); 4] = [
        ("the standby says nothing", |returning| {
            returning.standby.disks.begin_resync(None).expect("no fault");
            returning.standby.reopen();
        }),
        ("another session's", |returning| {
            let session = SessionId(5);
            let stream = Stream { session, ..HELD.stream };
            returning.standby.disks.begin_stream(stream).expect("no fault");
            returning.standby.disks.stage(HELD.epoch, &[], true).expect("no fault");
            returning.standby.reopen();
        }),
        ("older than what was acknowledged", |returning| {
            let epoch = HELD.epoch - 1;
            let older = Holds { epoch, ..HELD };
            returning.standby.disks.begin_resync(Some(older)).expect("no fault");
            returning.standby.reopen();
        }),
        ("the guest has been elsewhere", |returning| returning.changed.forget()),
    ];
    for (what, spoil) in cases {
        let mut returning = Returning::new();
        spoil(&mut returning);
        // Where nobody would look if the claim were believed.
        returning.standby.volumes[0]
            .write_at(20 * GRAIN_BYTES, &[0x55; 512])
            .expect("no fault");
        let stats = returning.resync();
        assert_eq!(
            (stats.disk_bytes, stats.spared_bytes),
            (DISKS.iter().sum(), 0),
            "{what}"
        );
    }
}

/// A leader may not say "only what changed" to a seat that has nothing, nor announce other disks than there are.
#[test]
fn a_plan_that_fits_not_is_refused_before_anything_is_overwritten() {
    let fits = vec![GRAIN_BYTES, 512];
    let plans = [
        (false, Some(fits.clone())),
        (true, Some(vec![GRAIN_BYTES])),
        (true, Some(vec![GRAIN_BYTES, DISKS[1] + 1])),
        (true, Some(vec![u64::MAX, u64::MAX])),
    ];
    let begin = frames_of(&Active::new()).swap_remove(0);
    for (held, changed_bytes) in plans {
        let mut returning = Returning::new();
        if !held {
            returning.standby.disks.begin_resync(None).expect("no fault");
            returning.standby.reopen();
        }
        let standby = &mut returning.standby;
        let before = standby.journal.bytes();
        let told = standby.accept(begin.clone()).expect("fits").expect("an answer");
        assert_eq!(told.0, Kind::ResyncHolds);
        let plan = Plan {
            changed_bytes: changed_bytes.clone(),
        };
        let payload = format::sequenced(1, &plan, "plan").expect("encodes");
        let refused = standby.accept((Kind::ResyncPlan, 0, payload));
        assert!(
            matches!(refused, Err(ResyncError::Plan(_))),
            "{changed_bytes:?}: {refused:?}"
        );
        assert!(standby.journal.bytes() == before, "what it holds is still known");
    }
}

/// Blocks twice, in another order, fewer or more of them than announced.
#[test]
fn blocks_that_are_not_as_announced_are_refused() {
    let block = |grain: u64| DiskChange::written(0, grain * GRAIN_BYTES, &vec![3; GRAIN_BYTES as usize]);
    let cases = [vec![2, 2], vec![3, 2], vec![2], vec![1, 2, 3], vec![1, 2]];
    for blocks in cases {
        let frames = frames_of(&Active::new());
        let changed_bytes = Some(vec![2 * GRAIN_BYTES, 0]);
        let plan = format::sequenced(1, &Plan { changed_bytes }, "plan").expect("encodes");
        let mut stream = vec![(Kind::ResyncBegin, frames[0].2.clone()), (Kind::ResyncPlan, plan)];
        for grain in &blocks {
            let encoded: Result<(), ResyncError> =
                format::encode_disk(&[block(*grain)], DISK_PREFIX_BYTES, |payload| {
                    stream.push((Kind::ResyncDisk, payload));
                    Ok(())
                });
            encoded.expect("can't fail");
        }
        let memory = frames.iter().filter(|frame| frame.0 == Kind::ResyncMemory);
        stream.extend(memory.map(|frame| (Kind::ResyncMemory, frame.2.clone())));
        let standby = &mut Returning::new().standby;
        let (mut checksum, mut payload_bytes) = (crc32fast::Hasher::new(), 0);
        let number = stream.len() as u32;
        let refused = stream
            .into_iter()
            .zip(0u32..)
            .find_map(|((kind, mut payload), number)| {
                payload[..4].copy_from_slice(&number.to_le_bytes());
                checksum.update(&payload);
                payload_bytes += payload.len() as u64;
                standby.accept((kind, 0, payload)).err()
            });
        let end = End {
            payload_bytes,
            checksum: checksum.finalize(),
        };
        let end = format::sequenced(number, &end, "end").expect("encodes");
        let refused = refused.or_else(|| standby.accept((Kind::ResyncEnd, 0, end)).err());
        let right = blocks == [1, 2];
        assert_eq!(refused.is_none(), right, "{blocks:?}: {refused:?}");
        assert!(
            right || matches!(refused, Some(ResyncError::Block { .. } | ResyncError::Incomplete(_))),
            "{blocks:?}: {refused:?}"
        );
    }
}

#[test]
fn the_plan_comes_between_the_beginning_and_everything_else() {
    let frames = frames_of(&Active::new());
    let plan = |number| {
        let plan = Plan { changed_bytes: None };
        format::sequenced(number, &plan, "plan").expect("encodes")
    };
    let mut standby = Returning::new().standby;
    standby.accept(frames[0].clone()).expect("fits");
    let early = standby.accept((frames[1].0, 0, frames[1].2.clone()));
    assert!(matches!(early, Err(ResyncError::Unexpected(_))), "{early:?}");
    standby.accept((Kind::ResyncPlan, 0, plan(1))).expect("in its place");
    let twice = standby.accept((Kind::ResyncPlan, 0, plan(2)));
    assert!(matches!(twice, Err(ResyncError::Unexpected(_))), "{twice:?}");
    // Of a version that has none.
    let mut old = Standby::new();
    old.accept(frames[0].clone()).expect("fits");
    let unasked = old.accept((Kind::ResyncPlan, 0, plan(1)));
    assert!(matches!(unasked, Err(ResyncError::Unexpected(_))), "{unasked:?}");
}

#[test]
fn what_the_other_side_holds_is_told_once_and_whole() {
    let window = ResyncWindow::default();
    let told = super::super::window::told_payload(Some(HELD)).expect("encodes");
    for end in 0..told.len() {
        assert!(window.told(&told[..end]).is_err(), "cut at {end}");
    }
    let long = [&told[..], &[0]].concat();
    assert!(window.told(&long).is_err());
    window.told(&told).expect("whole");
    assert_eq!(window.wait_told().expect("told"), Some(HELD));
    assert!(window.told(&told).is_err(), "twice");
    assert!(told.len() <= Kind::ResyncHolds.max_len() as usize);
    let closed = ResyncWindow::default();
    closed.close();
    assert!(matches!(closed.wait_told(), Err(ResyncError::Closed(_))));
}
