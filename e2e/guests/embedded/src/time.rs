//! The guest's clock: the time stamp counter, measured once against the interval timer (8254).

use crate::apic;
use crate::cpu::{in8, out8, time_stamp};
use core::sync::atomic::{AtomicU64, Ordering};

const PIT_HZ: u64 = 1_193_182;
const PIT_CHANNEL_2: u16 = 0x42;
const PIT_COMMAND: u16 = 0x43;
const SPEAKER_PORT: u16 = 0x61;
/// Long enough that a slow port access (tens of microseconds) is a small error, shorter than the timer's 54.9 ms period.
const MEASURE_PIT_TICKS: u64 = PIT_HZ * 40 / 1000;

/// Nanoseconds since this boot.
pub type Nanoseconds = u64;

static BASE: AtomicU64 = AtomicU64::new(0);
/// Nanoseconds per tick, times 2^32.
static SCALE: AtomicU64 = AtomicU64::new(0);

/// What was measured.
pub struct Clock {
    /// Ticks of the time stamp counter a second.
    pub tsc_hz: u64,
    /// Ticks of the local APIC's timer a second.
    pub apic_hz: u64,
}

#[derive(Clone, Copy)]
struct Sample {
    pit: u16,
    tsc: u64,
    apic: u32,
    /// How long it took, in TSC ticks: how far off the three may be.
    width: u64,
}

impl Sample {
    fn take() -> Self {
        let before = time_stamp();
        out8(PIT_COMMAND, 0x80); // latch channel 2
        let tsc = time_stamp();
        let apic = apic::timer_count();
        let width = time_stamp() - before;
        let low = in8(PIT_CHANNEL_2);
        let high = in8(PIT_CHANNEL_2);
        Self {
            pit: u16::from_le_bytes([low, high]),
            tsc,
            apic,
            width,
        }
    }

    /// The tightest of several: an interrupted one is off by as long as the interruption took.
    fn best() -> Self {
        let mut best = Self::take();
        for _ in 0..7 {
            let next = Self::take();
            if next.width < best.width {
                best = next;
            }
        }
        best
    }
}

/// Measures the two clocks and starts time at 0. Runs once, on the first vCPU.
pub fn start() -> Clock {
    out8(SPEAKER_PORT, (in8(SPEAKER_PORT) & 0xFC) | 1); // gate on, speaker off
    out8(PIT_COMMAND, 0xB4); // channel 2, both bytes, mode 2, binary
    out8(PIT_CHANNEL_2, 0);
    out8(PIT_CHANNEL_2, 0);
    apic::start_free_running();
    let first = Sample::best();
    let mut last = first;
    while u64::from(first.pit.wrapping_sub(last.pit)) < MEASURE_PIT_TICKS {
        last = Sample::take();
        assert!(
            last.tsc.wrapping_sub(first.tsc) < 1 << 36,
            "the interval timer (port {PIT_CHANNEL_2:#x}) does not count"
        );
    }
    let last = Sample::best();
    let pit_ticks = u64::from(first.pit.wrapping_sub(last.pit));
    let hz = |ticks: u64| (u128::from(ticks) * u128::from(PIT_HZ) / u128::from(pit_ticks)) as u64;
    let clock = Clock {
        tsc_hz: hz(last.tsc - first.tsc),
        apic_hz: hz(u64::from(first.apic.wrapping_sub(last.apic))),
    };
    SCALE.store(
        ((1_000_000_000u128 << 32) / u128::from(clock.tsc_hz)) as u64,
        Ordering::Relaxed,
    );
    BASE.store(last.tsc, Ordering::Relaxed);
    clock
}

/// The time now. Nothing smooths it: a counter that steps back is to be seen.
pub fn now() -> Nanoseconds {
    let ticks = time_stamp().wrapping_sub(BASE.load(Ordering::Relaxed));
    ((u128::from(ticks) * u128::from(SCALE.load(Ordering::Relaxed))) >> 32) as u64
}

/// Waits without sleeping: for set-up only.
pub fn spin_us(microseconds: u64) {
    let start = now();
    while now().wrapping_sub(start) < microseconds * 1000 {
        core::hint::spin_loop();
    }
}
