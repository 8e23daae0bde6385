//! The block load: drives the first disk with many requests at a time, in an area that the journal never uses, and checks what it
//! reads (guest_blocks.rs).
//!
//! One load at a time; its state says whose turn it is, so the connection that began it needs no number for it. Its data lies at
//! the end of the RAM, which the churn must leave to it meanwhile.

use crate::disk::{Disk, Frame, Kind, Running};
use crate::guest_blocks::{
    AREA_OFFSET, BlockLoad, BlockReport, DEPTH_MAX, Times, UNIT_BYTES, UNITS_MAX, area_bytes, fill_unit, next_random,
    unit_holds,
};
use crate::guest_journal::SECTOR_BYTES;
use crate::statics::Once;
use crate::time::{self, Nanoseconds};

// What is zero at the start takes no room in the image.
static GENERATIONS: Once<[u32; UNITS_MAX]> = Once::new([0; UNITS_MAX]);
static TIMES: Once<[Times; 2]> = Once::new([Times::NEW; 2]);
static LANES: Once<[Lane; DEPTH_MAX]> = Once::new([const { Lane::NEW }; DEPTH_MAX]);

/// What outlives a load.
struct Parts {
    lanes: &'static mut [Lane; DEPTH_MAX],
    /// Of each unit's last write since this boot; 0: none, or one that failed.
    generations: &'static mut [u32; UNITS_MAX],
    last_generation: u32,
    times: &'static mut Times,
    flush_times: &'static mut Times,
}

/// A place for one request at a time.
struct Lane {
    frame: Frame,
    running: Option<Running>,
    /// The first unit of its block.
    unit: u64,
    since: Nanoseconds,
}

impl Lane {
    const NEW: Self = Self {
        frame: Frame::NEW,
        running: None,
        unit: 0,
        since: 0,
    };

    /// Whether a block that begins with this unit is under way.
    fn moves(&self, unit: u64) -> bool {
        self.unit == unit && self.running.is_some_and(|running| running.kind != Kind::Flush)
    }
}

/// The block load.
pub struct Blocks {
    state: State,
    parts: Parts,
}

enum State {
    Idle,
    Busy(Load),
    /// Over; its client is yet to be told.
    Over(BlockReport),
}

impl Blocks {
    /// Nothing was written since this boot.
    pub fn new() -> Self {
        let [times, flush_times] = TIMES.take();
        Self {
            state: State::Idle,
            parts: Parts {
                lanes: LANES.take(),
                generations: GENERATIONS.take(),
                last_generation: 0,
                times,
                flush_times,
            },
        }
    }

    /// Whether a further load has to wait.
    pub fn busy(&self) -> bool {
        !matches!(self.state, State::Idle)
    }

    /// Begins a load whose data is at `data`, the RAM's pages from `first_page` on. False, and nothing is done, if the disk has no area or
    /// can't do what the load asks for, or if the load reads what was never written.
    pub fn start(&mut self, order: BlockLoad, first_page: u64, data: *mut u8, disk: &Disk) -> bool {
        let area = area_bytes(disk.sectors());
        let units = area / UNIT_BYTES as u64;
        let can = area > 0 && !disk.read_only() && (order.flush_every == 0 || disk.can_flush());
        let known = order.writes || !self.parts.generations[..units as usize].contains(&0);
        if self.busy() || !can || !known {
            return false;
        }
        self.parts.times.clear();
        self.parts.flush_times.clear();
        let now = time::now();
        self.state = State::Busy(Load {
            order,
            units,
            first_page,
            data,
            began: now,
            ended: now,
            given: 0,
            // Each load goes another way.
            place: if order.random { now | 1 } else { 0 },
            unflushed: 0,
            flushing: false,
            stopped: false,
            abandoned: false,
            report: BlockReport {
                area_bytes: area,
                ..BlockReport::default()
            },
        });
        true
    }

    /// The load ends as soon as the disk lets it.
    pub fn stop(&mut self) {
        if let State::Busy(load) = &mut self.state {
            load.stopped = true;
        }
    }

    /// The load's client has gone: it ends, too, and nobody is told.
    pub fn abandon(&mut self) {
        match &mut self.state {
            State::Busy(load) => {
                load.stopped = true;
                load.abandoned = true;
            }
            State::Over(_) => self.state = State::Idle,
            State::Idle => {}
        }
    }

    /// What is to be told of a load that is over; once.
    pub fn report(&mut self) -> Option<BlockReport> {
        let State::Over(report) = self.state else { return None };
        self.state = State::Idle;
        Some(report)
    }

    /// The first page of those that a load needs now.
    pub fn first_page(&self) -> Option<u64> {
        match &self.state {
            State::Busy(load) => Some(load.first_page),
            State::Idle | State::Over(_) => None,
        }
    }

    /// Goes on as far as possible without waiting. True if something changed.
    pub fn poll(&mut self, disk: &mut Disk) -> bool {
        let State::Busy(load) = &mut self.state else {
            return false;
        };
        let parts = &mut self.parts;
        let mut moved = false;
        // Others have their turn after as many as there may be at a time: a fast disk would have done the next ones by then.
        for _ in 0..DEPTH_MAX {
            let taken = load.take(parts, disk);
            let mut given = false;
            while load.give(parts, disk) {
                given = true;
            }
            if given {
                disk.kick();
            }
            moved |= taken || given;
            if !taken {
                break;
            }
        }
        if !load.is_over() || parts.lanes.iter().any(|lane| lane.running.is_some()) {
            return moved;
        }
        let report = BlockReport {
            elapsed_ns: load.ended.saturating_sub(load.began),
            latency: parts.times.sum_up(),
            flush_latency: parts.flush_times.sum_up(),
            ..load.report
        };
        self.state = if load.abandoned {
            State::Idle
        } else {
            State::Over(report)
        };
        true
    }
}

/// A load that was begun.
struct Load {
    order: BlockLoad,
    /// The area's size.
    units: u64,
    /// The lanes' data, one lane's behind the other's: the number of its first page, and where it is.
    first_page: u64,
    data: *mut u8,
    began: Nanoseconds,
    /// When the last request was done.
    ended: Nanoseconds,
    /// Reads or writes that the device was given.
    given: u64,
    /// The next block where one comes behind the other; else what the next one follows from.
    place: u64,
    /// Writes that were done since the last flush was given.
    unflushed: u32,
    flushing: bool,
    stopped: bool,
    /// Nobody waits for its report any more.
    abandoned: bool,
    report: BlockReport,
}

impl Load {
    /// Whether no more reads or writes are to be given. There is at least one.
    fn is_over(&self) -> bool {
        let BlockLoad {
            limit_ms,
            limit_requests,
            ..
        } = self.order;
        let lasts_ns = time::now().saturating_sub(self.began);
        self.stopped
            || limit_ms > 0 && self.given > 0 && lasts_ns >= u64::from(limit_ms) * 1_000_000
            || limit_requests > 0 && self.given >= u64::from(limit_requests)
    }

    /// A lane's data. A flush has none.
    fn data_of(&self, lane: usize, kind: Kind) -> &'static mut [u8] {
        let bytes = self.order.block_bytes as usize;
        match kind {
            Kind::Flush => &mut [],
            // SAFETY: pages of the region, as many as the lanes need, which nothing else uses while the load is busy (`first_page`); a lane's
            // data is used by the device while its request runs, and by nobody but its lane.
            Kind::Read | Kind::Write => unsafe { core::slice::from_raw_parts_mut(self.data.add(lane * bytes), bytes) },
        }
    }

    /// Takes back one request that the device has done. False if the next that it has done is none of these.
    fn take(&mut self, parts: &mut Parts, disk: &mut Disk) -> bool {
        for (number, lane) in parts.lanes.iter_mut().enumerate() {
            let Some(running) = lane.running else { continue };
            let data = self.data_of(number, running.kind);
            // SAFETY: frame and data that `give` put.
            let Some(works) = (unsafe { disk.take(running, &mut lane.frame, data) }) else {
                continue;
            };
            lane.running = None;
            self.ended = time::now();
            let took = self.ended.saturating_sub(lane.since);
            self.report.failed += u64::from(!works);
            if running.kind == Kind::Flush {
                self.flushing = false;
                self.report.flushes += 1;
                parts.flush_times.add(took);
                return true;
            }
            self.report.requests += 1;
            parts.times.add(took);
            let first = lane.unit as usize;
            let generations = &mut parts.generations[first..first + self.order.block_units() as usize];
            if works {
                self.report.bytes += u64::from(self.order.block_bytes);
            }
            match running.kind {
                Kind::Write if works => self.unflushed += 1,
                // Nobody knows what is there.
                Kind::Write => generations.fill(0),
                _ if works => self.check(lane.unit, generations, data),
                _ => {}
            }
            return true;
        }
        false
    }

    /// Judges a block that was read.
    fn check(&mut self, first: u64, generations: &[u32], data: &[u8]) {
        for ((unit, generation), bytes) in (first..).zip(generations).zip(data.chunks_exact(UNIT_BYTES)) {
            if !unit_holds(unit, *generation, bytes) {
                if self.report.wrong_units == 0 {
                    self.report.first_wrong_unit = unit;
                }
                self.report.wrong_units += 1;
            }
        }
    }

    /// Gives the device one more request, of which it is yet to be told. False if it is to be given none now.
    fn give(&mut self, parts: &mut Parts, disk: &mut Disk) -> bool {
        let lanes = &parts.lanes[..self.order.depth as usize];
        let Some(number) = lanes.iter().position(|lane| lane.running.is_none()) else {
            return false;
        };
        let (over, every) = (self.is_over(), self.order.flush_every);
        let flush_due = match over {
            _ if every == 0 || self.flushing => false,
            false => self.unflushed >= every,
            // The last one, for what is left.
            true => self.unflushed > 0 && lanes.iter().all(|lane| lane.running.is_none()),
        };
        if over && !flush_due {
            return false;
        }
        let (kind, unit, sector) = if flush_due {
            (Kind::Flush, 0, 0)
        } else {
            let Some(unit) = self.next_block(lanes) else {
                return false;
            };
            let kind = if self.order.writes { Kind::Write } else { Kind::Read };
            (
                kind,
                unit,
                (AREA_OFFSET + unit * UNIT_BYTES as u64) / SECTOR_BYTES as u64,
            )
        };
        let data = self.data_of(number, kind);
        match kind {
            Kind::Flush => {
                self.unflushed = 0;
                self.flushing = true;
            }
            Kind::Read => self.given += 1,
            Kind::Write => {
                self.given += 1;
                parts.write(unit, data);
            }
        }
        let lane = &mut parts.lanes[number];
        lane.unit = unit;
        lane.since = time::now();
        // SAFETY: the frame is static, the data is RAM that the load has to itself; neither is touched before `take` has the request back.
        lane.running = Some(unsafe { disk.put(kind, sector, &mut lane.frame, data) });
        true
    }

    /// The first unit of the next block. None if there is none that may be under way as well: what two writes at a time leave, nobody
    /// could say.
    fn next_block(&mut self, lanes: &[Lane]) -> Option<u64> {
        let size = self.order.block_units();
        let blocks = self.units / size;
        if self.order.random {
            self.place = next_random(self.place);
        }
        // The lowest bits of such numbers are the least random.
        let first = if self.order.random {
            self.place >> 16
        } else {
            self.place
        };
        let free = |block: &u64| !self.order.writes || !lanes.iter().any(|lane| lane.moves(block * size));
        let block = (0..blocks).map(|step| (first + step) % blocks).find(free)?;
        if !self.order.random {
            self.place = block + 1;
        }
        Some(block * size)
    }
}

impl Parts {
    /// Makes the data of a write: each has a generation of its own.
    fn write(&mut self, first: u64, data: &mut [u8]) {
        let generation = self.last_generation.wrapping_add(1).max(1);
        self.last_generation = generation;
        for (unit, bytes) in (first..).zip(data.chunks_exact_mut(UNIT_BYTES)) {
            fill_unit(unit, generation, bytes);
            self.generations[unit as usize] = generation;
        }
    }
}
