//! What every vCPU does beside the service: dirtying pages, checking them, CPU-bound work. All of it in small pieces, so
//! that a vCPU looks up often.
//!
//! The churn's pages are divided among the vCPUs. Each goes over its share again and again; so from the number of the
//! round and the place in it follows what every page must hold, and a stale, torn or foreign page is found.

use crate::apic;
use crate::cpu::{self, MAX_VCPUS};
use crate::memory::{PAGE_WORDS, Region};
use crate::time::{self, Nanoseconds};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// A piece of work lasts about as long as this.
const PIECE_NS: u64 = 25_000;
/// Pages between two looks at the clock.
const BATCH_PAGES: u64 = 4;
/// A vCPU with a limited rate sleeps at least as long as this between pieces.
const RATE_PERIOD_NS: u64 = 2_000_000;
/// Dependent multiplications in one unit of work.
const WORK_ROUNDS: u64 = 1024;

/// Orders to all vCPUs. The churn's numbers are stored before its generation.
static CHURN_GENERATION: AtomicU64 = AtomicU64::new(0);
static CHURN_PAGES: AtomicU64 = AtomicU64::new(0);
static CHURN_RATE: AtomicU64 = AtomicU64::new(0);
static CHURN_WORDS: AtomicBool = AtomicBool::new(false);
static CHECK_RATE: AtomicU64 = AtomicU64::new(0);
static VERIFY: AtomicU64 = AtomicU64::new(0);
static WORK: AtomicBool = AtomicBool::new(false);

/// One vCPU's reports.
#[repr(align(128))]
struct Report {
    /// The last order for which it stopped touching its old share.
    stopped: AtomicU64,
    /// The last order for which it filled its new share.
    churn_generation: AtomicU64,
    verified: AtomicU64,
    churned: AtomicU64,
    work: AtomicU64,
    memory_errors: AtomicU32,
}

static REPORTS: [Report; MAX_VCPUS] = [const {
    Report {
        stopped: AtomicU64::new(0),
        churn_generation: AtomicU64::new(0),
        verified: AtomicU64::new(0),
        churned: AtomicU64::new(0),
        work: AtomicU64::new(0),
        memory_errors: AtomicU32::new(0),
    }
}; MAX_VCPUS];

/// The churn's numbers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Churn {
    /// Pages, all vCPUs together.
    pub pages: u64,
    /// Pages a second and vCPU; 0 for no limit.
    pub rate: u64,
    /// One word of each page instead of the whole.
    pub words: bool,
}

/// Orders new churn; its ticket for [`churn_ready`]. The caller has seen the last order ready, and wakes the other vCPUs.
pub fn order_churn(churn: Churn) -> u64 {
    CHURN_PAGES.store(churn.pages, Ordering::Relaxed);
    CHURN_RATE.store(churn.rate, Ordering::Relaxed);
    CHURN_WORDS.store(churn.words, Ordering::Relaxed);
    CHURN_GENERATION.fetch_add(1, Ordering::Release) + 1
}

/// The ticket of the last order.
pub fn last_churn() -> u64 {
    CHURN_GENERATION.load(Ordering::Acquire)
}

/// The pages of the last order.
pub fn churn_pages() -> u64 {
    CHURN_PAGES.load(Ordering::Relaxed)
}

/// Whether the first `vcpus` have filled their pages for this order.
pub fn churn_ready(ticket: u64, vcpus: usize) -> bool {
    REPORTS[..vcpus]
        .iter()
        .all(|report| report.churn_generation.load(Ordering::Acquire) >= ticket)
}

/// Orders a check of every page; its ticket for [`verified`]. The caller wakes the other vCPUs.
pub fn order_verify() -> u64 {
    VERIFY.fetch_add(1, Ordering::Release) + 1
}

/// Whether the first `vcpus` have checked their pages for this order.
pub fn verified(ticket: u64, vcpus: usize) -> bool {
    REPORTS[..vcpus]
        .iter()
        .all(|report| report.verified.load(Ordering::Acquire) >= ticket)
}

/// Starts or stops CPU-bound work. The caller wakes the other vCPUs.
pub fn order_work(on: bool) {
    WORK.store(on, Ordering::Release);
}

/// Sets the rate of the background check, in pages a second and vCPU.
pub fn set_check_rate(rate: u64) {
    CHECK_RATE.store(rate, Ordering::Relaxed);
}

/// Sums over all vCPUs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Pages dirtied.
    pub churned: u64,
    /// Units of work.
    pub work: u64,
    /// Faulty pages found.
    pub memory_errors: u32,
}

/// The sums now.
pub fn totals() -> Totals {
    REPORTS.iter().fold(Totals::default(), |sum, report| Totals {
        churned: sum.churned + report.churned.load(Ordering::Relaxed),
        work: sum.work + report.work.load(Ordering::Relaxed),
        memory_errors: sum.memory_errors + report.memory_errors.load(Ordering::Relaxed),
    })
}

/// Negative control: flips one bit of a page of the churn. False if there is no such page or word.
pub fn damage(region: &Region, page: u64, word: u64) -> bool {
    if page >= churn_pages() || word >= PAGE_WORDS as u64 {
        return false;
    }
    // SAFETY: the page is RAM of the region; its words are only ever used as atomics.
    let words = unsafe { &*region.page(page) };
    words[word as usize].fetch_xor(1 << 21, Ordering::Relaxed);
    true
}

/// What a vCPU may do after a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// There is more to do at once.
    Busy,
    /// Nothing before this time.
    At(Nanoseconds),
    /// Nothing until an order comes.
    Idle,
}

/// Something done at a rate: how much of it is due.
#[derive(Clone, Copy, Default)]
struct Pace {
    since: Nanoseconds,
    done: u64,
}

impl Pace {
    fn start(now: Nanoseconds) -> Self {
        Self { since: now, done: 0 }
    }

    /// How many are due. After a long stop only a tenth of a second's worth is made up for.
    fn due(&mut self, rate: u64, now: Nanoseconds) -> u64 {
        let elapsed = now.saturating_sub(self.since);
        let expected = (u128::from(elapsed) * u128::from(rate) / 1_000_000_000) as u64;
        let due = expected.saturating_sub(self.done);
        if due > rate / 10 + 1 {
            self.done = expected - rate / 10 - 1;
            return rate / 10 + 1;
        }
        due
    }

    /// When the next is due.
    fn next(&self, rate: u64) -> Nanoseconds {
        self.since + ((u128::from(self.done) + 1) * 1_000_000_000 / u128::from(rate)) as u64
    }
}

/// One vCPU's part.
pub struct Worker {
    region: Region,
    vcpus: usize,
    report: &'static Report,
    generation: u64,
    /// Its share of the pages: from `first`, so many.
    first: u64,
    pages: u64,
    words: bool,
    rate: u64,
    /// Pages before `place` are of round `round`, the others of the round before.
    round: u64,
    place: u64,
    filling: bool,
    pace: Pace,
    verify: u64,
    verify_place: u64,
    check_place: u64,
    check_pace: Pace,
    work_state: u64,
}

impl Worker {
    /// The part of the vCPU that calls, of `vcpus`.
    pub fn new(region: Region, vcpus: usize) -> Self {
        Self {
            region,
            vcpus,
            report: &REPORTS[cpu::index()],
            generation: 0,
            first: 0,
            pages: 0,
            words: false,
            rate: 0,
            round: 0,
            place: 0,
            filling: false,
            pace: Pace::default(),
            verify: 0,
            verify_place: 0,
            check_place: 0,
            check_pace: Pace::default(),
            work_state: 1,
        }
    }

    /// Does one piece.
    pub fn step(&mut self) -> Next {
        let now = time::now();
        let generation = CHURN_GENERATION.load(Ordering::Acquire);
        if generation != self.generation {
            self.take_order(generation, now);
        }
        if self.filling {
            // Old and new shares overlap: nobody fills before everybody stopped. That takes microseconds.
            let reports = &REPORTS[..self.vcpus];
            if reports
                .iter()
                .all(|report| report.stopped.load(Ordering::Acquire) >= generation)
            {
                self.fill(now);
            }
            return Next::Busy;
        }
        if self.verify != VERIFY.load(Ordering::Acquire) {
            self.verify_piece(now);
            return Next::Busy;
        }
        let churn = self.churn_piece(now);
        let check = self.check_piece(now);
        let work = self.work_piece(now);
        [churn, check, work].into_iter().fold(Next::Idle, sooner)
    }

    fn take_order(&mut self, generation: u64, now: Nanoseconds) {
        let pages = CHURN_PAGES.load(Ordering::Relaxed);
        let (index, vcpus) = (cpu::index() as u64, self.vcpus as u64);
        self.first = pages * index / vcpus;
        self.pages = pages * (index + 1) / vcpus - self.first;
        self.words = CHURN_WORDS.load(Ordering::Relaxed);
        self.rate = CHURN_RATE.load(Ordering::Relaxed);
        self.generation = generation;
        self.round = 1;
        self.place = 0;
        self.filling = true;
        self.verify_place = 0;
        self.check_place = 0;
        self.check_pace = Pace::start(now);
        self.report.stopped.store(generation, Ordering::Release);
    }

    fn fill(&mut self, start: Nanoseconds) {
        while self.place < self.pages {
            self.write_whole(self.place, 1);
            self.place += 1;
            if self.place.is_multiple_of(BATCH_PAGES) && time::now().saturating_sub(start) > PIECE_NS {
                return;
            }
        }
        self.filling = false;
        self.round = 2;
        self.place = 0;
        self.pace = Pace::start(time::now());
        self.report.churn_generation.store(self.generation, Ordering::Release);
        tell_service();
    }

    fn verify_piece(&mut self, start: Nanoseconds) {
        let ticket = VERIFY.load(Ordering::Acquire);
        while self.verify_place < self.pages {
            self.check(self.verify_place);
            self.verify_place += 1;
            if self.verify_place.is_multiple_of(BATCH_PAGES) && time::now().saturating_sub(start) > PIECE_NS {
                return;
            }
        }
        self.verify_place = 0;
        self.verify = ticket;
        self.report.verified.store(ticket, Ordering::Release);
        tell_service();
    }

    fn churn_piece(&mut self, start: Nanoseconds) -> Next {
        if self.pages == 0 {
            return Next::Idle;
        }
        let due = if self.rate == 0 {
            u64::MAX
        } else {
            self.pace.due(self.rate, start)
        };
        let mut done = 0;
        while done < due {
            self.churn_page();
            done += 1;
            if done % BATCH_PAGES == 0 && time::now().saturating_sub(start) > PIECE_NS {
                break;
            }
        }
        self.pace.done += done;
        self.report.churned.fetch_add(done, Ordering::Relaxed);
        if done < due {
            Next::Busy
        } else {
            Next::At(self.pace.next(self.rate).max(start + RATE_PERIOD_NS))
        }
    }

    fn churn_page(&mut self) {
        if !self.header_is_sound(self.place) {
            self.report.memory_errors.fetch_add(1, Ordering::Relaxed);
        }
        if self.words {
            self.words_of(self.place)[TICK].store(tick(self.number(self.place), self.round), Ordering::Relaxed);
        } else {
            self.write_whole(self.place, self.round);
        }
        self.place += 1;
        if self.place == self.pages {
            self.place = 0;
            self.round += 1;
        }
    }

    fn check_piece(&mut self, start: Nanoseconds) -> Next {
        let rate = CHECK_RATE.load(Ordering::Relaxed);
        if rate == 0 || self.pages == 0 {
            return Next::Idle;
        }
        let due = self.check_pace.due(rate, start);
        for done in 0..due {
            self.check(self.check_place);
            self.check_place = (self.check_place + 1) % self.pages;
            self.check_pace.done += 1;
            if done % BATCH_PAGES == 0 && time::now().saturating_sub(start) > PIECE_NS {
                return Next::Busy;
            }
        }
        Next::At(self.check_pace.next(rate).max(start + RATE_PERIOD_NS))
    }

    fn work_piece(&mut self, start: Nanoseconds) -> Next {
        if !WORK.load(Ordering::Acquire) {
            return Next::Idle;
        }
        let mut units = 0;
        let mut state = self.work_state;
        while time::now().saturating_sub(start) < PIECE_NS {
            for _ in 0..WORK_ROUNDS {
                state = core::hint::black_box(state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(1));
            }
            units += 1;
        }
        self.work_state = state;
        self.report.work.fetch_add(units, Ordering::Relaxed);
        Next::Busy
    }

    fn number(&self, place: u64) -> u64 {
        self.first + place
    }

    fn words_of(&self, place: u64) -> &'static [core::sync::atomic::AtomicU64; PAGE_WORDS] {
        // SAFETY: the page is RAM of the region, mapped, used by nothing but the churn and only as atomics.
        unsafe { &*self.region.page(self.number(place)) }
    }

    /// The round in which the page at `place` must have been written last.
    fn expected_round(&self, place: u64) -> u64 {
        if place < self.place { self.round } else { self.round - 1 }
    }

    fn write_whole(&self, place: u64, round: u64) {
        let number = self.number(place);
        let words = self.words_of(place);
        let seed = seed(number, self.generation, round);
        let mut sum = 0u64;
        for (index, word) in words.iter().enumerate().skip(BODY) {
            let value = body_word(seed, index);
            sum = sum.wrapping_add(value).rotate_left(1);
            word.store(value, Ordering::Relaxed);
        }
        words[NUMBER].store(number, Ordering::Relaxed);
        words[ROUND].store(stamp(self.generation, round), Ordering::Relaxed);
        words[CHECKSUM].store(sum ^ seed, Ordering::Relaxed);
        words[TICK].store(tick(number, round), Ordering::Relaxed);
    }

    /// Whether the page names itself and the round that it must be of.
    fn header_is_sound(&self, place: u64) -> bool {
        let number = self.number(place);
        let words = self.words_of(place);
        let round = self.expected_round(place);
        words[TICK].load(Ordering::Relaxed) == tick(number, round)
            && words[NUMBER].load(Ordering::Relaxed) == number
            && words[ROUND].load(Ordering::Relaxed) == stamp(self.generation, if self.words { 1 } else { round })
    }

    /// Checks the whole page at `place`, and counts it if it is faulty.
    fn check(&self, place: u64) {
        let words = self.words_of(place);
        let round = if self.words { 1 } else { self.expected_round(place) };
        let seed = seed(self.number(place), self.generation, round);
        let mut sum = 0u64;
        let mut sound = self.header_is_sound(place);
        for (index, word) in words.iter().enumerate().skip(BODY) {
            let value = word.load(Ordering::Relaxed);
            sound &= value == body_word(seed, index);
            sum = sum.wrapping_add(value).rotate_left(1);
        }
        if !sound || words[CHECKSUM].load(Ordering::Relaxed) != sum ^ seed {
            self.report.memory_errors.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Makes the first vCPU, which runs the service, see what was reported.
fn tell_service() {
    if cpu::index() == 0 {
        cpu::this().set_wake();
    } else {
        apic::wake(0);
    }
}

/// The earlier of two.
fn sooner(a: Next, b: Next) -> Next {
    match (a, b) {
        (Next::Busy, _) | (_, Next::Busy) => Next::Busy,
        (Next::At(a), Next::At(b)) => Next::At(a.min(b)),
        (Next::At(at), Next::Idle) | (Next::Idle, Next::At(at)) => Next::At(at),
        (Next::Idle, Next::Idle) => Next::Idle,
    }
}

/// A page's words: the last round that touched it (the only word that word-wise churn writes), its number, the round
/// that wrote it whole, the body's checksum, the body.
const TICK: usize = 0;
const NUMBER: usize = 1;
const ROUND: usize = 2;
const CHECKSUM: usize = 3;
const BODY: usize = 4;

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

fn tick(number: u64, round: u64) -> u64 {
    let mixed = (number ^ round.rotate_left(40)).wrapping_mul(GOLDEN);
    (round << 32) | (mixed >> 32)
}

fn stamp(generation: u64, round: u64) -> u64 {
    generation << 48 | round
}

fn seed(number: u64, generation: u64, round: u64) -> u64 {
    let mixed = (number ^ stamp(generation, round).rotate_left(20)).wrapping_mul(GOLDEN);
    (mixed ^ (mixed >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9)
}

fn body_word(seed: u64, index: usize) -> u64 {
    let mixed = seed.wrapping_add((index as u64).wrapping_mul(GOLDEN));
    mixed ^ (mixed >> 31)
}
