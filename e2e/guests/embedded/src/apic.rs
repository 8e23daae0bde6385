//! The local APIC: one-shot timer, interrupts between vCPUs, start of the others. (Intel SDM volume 3, chapter 12.)

use crate::cpu::{self, MAX_VCPUS};
use crate::time::{self, Nanoseconds};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Vectors from 32 to 47 all do the same: they wake the vCPU.
pub const TIMER_VECTOR: u8 = 32;
/// One vCPU wakes another.
const WAKE_VECTOR: u8 = 33;
/// First vector for devices.
pub const DEVICE_VECTOR: u8 = 40;
/// The last one; boot.s has a gate up to here.
pub const LAST_DEVICE_VECTOR: u8 = 47;
const SPURIOUS_VECTOR: u32 = 0xFF;

const BASE: u64 = 0xFEE0_0000;
const BASE_MSR: u32 = 0x1B;
const X2APIC_ENABLED: u64 = 1 << 10;
const ID: u64 = 0x20;
const TASK_PRIORITY: u64 = 0x80;
const SPURIOUS: u64 = 0xF0;
const COMMAND_LOW: u64 = 0x300;
const COMMAND_HIGH: u64 = 0x310;
const TIMER: u64 = 0x320;
const TIMER_INITIAL: u64 = 0x380;
const TIMER_CURRENT: u64 = 0x390;
const TIMER_DIVIDE: u64 = 0x3E0;
const MASKED: u32 = 1 << 16;
const ENABLED: u32 = 1 << 8;
const DIVIDE_BY_1: u32 = 0b1011;
const INIT: u32 = 0x4500;
const START_UP: u32 = 0x4600;
const DELIVERY_PENDING: u32 = 1 << 12;

/// A host with much to do lets a vCPU wait.
const START_UP_NS: u64 = 10_000_000_000;

/// Where a vCPU that gets a start-up IPI begins; boot.s knows it too.
const TRAMPOLINE: u64 = 0x8000;

static TIMER_HZ: AtomicU64 = AtomicU64::new(0);
static IDS: [AtomicU32; MAX_VCPUS] = [const { AtomicU32::new(0) }; MAX_VCPUS];

// SAFETY: boot.s defines these with these types; the code between the first two is only read.
unsafe extern "C" {
    static trampoline_start: u8;
    static trampoline_end: u8;
    static application_percpu: AtomicU64;
}

fn read(register: u64) -> u32 {
    // SAFETY: the local APIC's page, mapped by boot.s; its registers are 32 bits wide at multiples of 16.
    unsafe { ((BASE + register) as *const u32).read_volatile() }
}

fn write(register: u64, value: u32) {
    // SAFETY: as for read; no register of the APIC makes it touch memory.
    unsafe { ((BASE + register) as *mut u32).write_volatile(value) };
}

/// Turns this vCPU's APIC on, its timer one-shot and not running.
pub fn init() {
    assert!(
        cpu::read_msr(BASE_MSR) & X2APIC_ENABLED == 0,
        "the firmware left the local APIC in x2APIC mode"
    );
    write(TASK_PRIORITY, 0);
    write(TIMER_DIVIDE, DIVIDE_BY_1);
    write(TIMER, u32::from(TIMER_VECTOR));
    write(SPURIOUS, ENABLED | SPURIOUS_VECTOR);
    IDS[cpu::index()].store(read(ID) >> 24, Ordering::Relaxed);
}

/// This vCPU's APIC identifier.
pub fn id() -> u32 {
    IDS[cpu::index()].load(Ordering::Relaxed)
}

/// Lets the timer run down from its highest value, for [`timer_count`].
pub fn start_free_running() {
    write(TIMER, MASKED | u32::from(TIMER_VECTOR));
    write(TIMER_INITIAL, u32::MAX);
}

/// The timer's count.
pub fn timer_count() -> u32 {
    read(TIMER_CURRENT)
}

/// Sets the timer's frequency, once measured, and stops it.
pub fn set_timer_hz(hz: u64) {
    TIMER_HZ.store(hz, Ordering::Relaxed);
    write(TIMER_INITIAL, 0);
    write(TIMER, u32::from(TIMER_VECTOR));
}

/// The timer's frequency as the first vCPU measured it.
pub fn timer_hz() -> u64 {
    TIMER_HZ.load(Ordering::Relaxed)
}

/// This vCPU's wake-up call.
#[derive(Default)]
pub struct Alarm {
    armed: Option<Nanoseconds>,
}

impl Alarm {
    /// Makes the timer interrupt at `deadline` or before. A timer that goes off earlier anyway is left alone: setting it
    /// is an exit, an early interrupt costs little more and comes rarely.
    pub fn set(&mut self, deadline: Nanoseconds, now: Nanoseconds) {
        if self.armed.is_some_and(|armed| armed > now && armed <= deadline) {
            return;
        }
        let delay = deadline.saturating_sub(now).min(10_000_000_000);
        let ticks = u128::from(delay) * u128::from(TIMER_HZ.load(Ordering::Relaxed)) / 1_000_000_000;
        write(TIMER_INITIAL, (ticks as u64).clamp(1, u64::from(u32::MAX)) as u32);
        self.armed = Some(now + delay);
    }
}

fn send(apic_id: u32, command: u32) {
    while read(COMMAND_LOW) & DELIVERY_PENDING != 0 {
        core::hint::spin_loop();
    }
    write(COMMAND_HIGH, apic_id << 24);
    write(COMMAND_LOW, command);
}

/// Wakes another vCPU. What it should look for must be stored before.
pub fn wake(vcpu: usize) {
    send(IDS[vcpu].load(Ordering::Relaxed), 0x4000 | u32::from(WAKE_VECTOR));
}

/// Starts vCPU number `vcpu`, which has this APIC identifier. False if it does not come up.
pub fn start_vcpu(vcpu: usize, apic_id: u32) -> bool {
    let area = cpu::area(vcpu);
    // SAFETY: both symbols bound one run of code in the image, and the page below 1 MiB is RAM on any PC; no other vCPU
    // runs from it, since they are started one after the other.
    unsafe {
        let bytes = (&raw const trampoline_end as usize) - (&raw const trampoline_start as usize);
        core::ptr::copy_nonoverlapping(&raw const trampoline_start, TRAMPOLINE as *mut u8, bytes);
        application_percpu.store(core::ptr::from_ref(area) as u64, Ordering::SeqCst);
    }
    send(apic_id, INIT);
    time::spin_us(10_000);
    for _ in 0..2 {
        send(apic_id, START_UP | (TRAMPOLINE >> 12) as u32);
        time::spin_us(200);
    }
    let start = time::now();
    while area.online.load(Ordering::Acquire) == 0 {
        if time::now().wrapping_sub(start) > START_UP_NS {
            send(apic_id, INIT); // lest it come up later, on the stack of the next one
            return false;
        }
        core::hint::spin_loop();
    }
    true
}
