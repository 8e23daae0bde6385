//! What one vCPU offers to ring 3: ports, time stamp, the ring 0 gate, its own area.

use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;
use core::mem::offset_of;
use core::sync::atomic::{AtomicU8, Ordering};

global_asm!(include_str!("boot.s"));

/// More vCPUs than these are not started.
pub const MAX_VCPUS: usize = 16;

const KERNEL_STACK_BYTES: usize = 4096;
const USER_STACK_BYTES: usize = 64 << 10;

#[repr(C, align(4096))]
struct KernelStack(UnsafeCell<[u8; KERNEL_STACK_BYTES]>);

#[repr(C, align(4096))]
struct UserStack(UnsafeCell<[u8; USER_STACK_BYTES]>);

// SAFETY: each stack is used by one vCPU only, through its stack pointer.
unsafe impl Sync for KernelStack {}
// SAFETY: as above.
unsafe impl Sync for UserStack {}

static KERNEL_STACKS: [KernelStack; MAX_VCPUS] =
    [const { KernelStack(UnsafeCell::new([0; KERNEL_STACK_BYTES])) }; MAX_VCPUS];
static USER_STACKS: [UserStack; MAX_VCPUS] = [const { UserStack(UnsafeCell::new([0; USER_STACK_BYTES])) }; MAX_VCPUS];

/// The 64-bit task state segment (104 bytes), filled in by boot.s.
#[repr(C, align(64))]
struct TaskState(UnsafeCell<[u8; 112]>);

/// One vCPU's area, at its GS base. boot.s knows the offsets of the first fields.
#[repr(C, align(256))]
pub struct PerCpu {
    wake: AtomicU8,
    index: usize,
    kernel_stack_top: *const u8,
    user_stack_top: *const u8,
    /// Set by the vCPU itself once it runs in ring 3.
    pub online: AtomicU8,
    task_state: TaskState,
}

const _: () = {
    assert!(offset_of!(PerCpu, wake) == 0);
    assert!(offset_of!(PerCpu, index) == 8);
    assert!(offset_of!(PerCpu, kernel_stack_top) == 16);
    assert!(offset_of!(PerCpu, user_stack_top) == 24);
    assert!(offset_of!(PerCpu, task_state) == 64);
};

// SAFETY: other vCPUs only touch the atomics; the stack pointers are constants, the task state belongs to the hardware.
unsafe impl Sync for PerCpu {}

const fn per_cpu(index: usize) -> PerCpu {
    PerCpu {
        wake: AtomicU8::new(0),
        index,
        kernel_stack_top: (&raw const KERNEL_STACKS[index])
            .cast::<u8>()
            .wrapping_add(KERNEL_STACK_BYTES),
        // A function is entered with the stack pointer 8 below a multiple of 16, as after a call.
        user_stack_top: (&raw const USER_STACKS[index])
            .cast::<u8>()
            .wrapping_add(USER_STACK_BYTES - 8),
        online: AtomicU8::new(0),
        task_state: TaskState(UnsafeCell::new([0; 112])),
    }
}

/// The vCPUs' areas, and the I/O bitmap that their task state segments share: it must lie within 64 KiB of them.
#[repr(C)]
pub struct Areas {
    cpus: [PerCpu; MAX_VCPUS],
    io_bitmap: IoBitmap,
}

/// Bit clear: ring 3 may use the port. The hardware wants a byte of ones behind it.
#[repr(C)]
struct IoBitmap {
    ports: [u8; 8192],
    end: u8,
}

const _: () = assert!(offset_of!(Areas, io_bitmap) == 256 * MAX_VCPUS);

/// Every vCPU's area, by index, and the I/O bitmap.
// SAFETY: no other symbol of the image has this name; boot.s uses it with this layout.
#[unsafe(no_mangle)]
pub static PERCPU: Areas = {
    let mut cpus = [const { per_cpu(0) }; MAX_VCPUS];
    let mut index = 0;
    while index < MAX_VCPUS {
        cpus[index] = per_cpu(index);
        index += 1;
    }
    Areas {
        cpus,
        io_bitmap: IoBitmap {
            ports: [0; 8192],
            end: 0xFF,
        },
    }
};

/// The index of the vCPU that asks.
pub fn index() -> usize {
    let index: usize;
    // SAFETY: GS points to this vCPU's area since before ring 3; offset 8 is its index.
    unsafe { asm!("mov {}, gs:[8]", out(reg) index, options(nostack, preserves_flags, readonly)) };
    index
}

/// This vCPU's area.
pub fn this() -> &'static PerCpu {
    &PERCPU.cpus[index()]
}

impl PerCpu {
    /// Fails if the stack of ring 3 ever reached its end. (Pages of 2 MiB leave no room for a guard page.)
    pub fn check_stack(&self) {
        // SAFETY: the lowest bytes of this vCPU's own stack; no frame lives there as long as this holds.
        let lowest = unsafe { USER_STACKS[self.index].0.get().cast::<[u64; 4]>().read_volatile() };
        assert!(lowest == [0; 4], "the stack of {USER_STACK_BYTES} bytes is too small");
    }

    /// Forgets earlier interrupts. What they announced must be looked for after this and before [`wait`].
    pub fn clear_wake(&self) {
        self.wake.store(0, Ordering::SeqCst);
    }

    /// Makes this vCPU look at everything again, as an interrupt would.
    pub fn set_wake(&self) {
        self.wake.store(1, Ordering::SeqCst);
    }

    /// Whether an interrupt came since [`PerCpu::clear_wake`].
    pub fn woken(&self) -> bool {
        self.wake.load(Ordering::Acquire) != 0
    }
}

/// Sleeps until an interrupt; returns at once if one came since [`PerCpu::clear_wake`].
pub fn wait() {
    // SAFETY: boot.s, general_protection: function 0 changes no register.
    unsafe { asm!("hlt", in("rax") 0u64) };
}

/// Reads a model-specific register.
pub fn read_msr(register: u32) -> u64 {
    let value: u64;
    // SAFETY: boot.s, general_protection: function 1. A missing register is an exception, which is reported.
    unsafe { asm!("hlt", inout("rax") 1u64 => value, in("rcx") u64::from(register), out("rdx") _) };
    value
}

/// Stops this vCPU for good.
pub fn stop() -> ! {
    // SAFETY: boot.s, general_protection: function 2 never returns.
    unsafe { asm!("hlt", in("rax") 2u64, options(noreturn)) };
}

/// The time stamp counter.
pub fn time_stamp() -> u64 {
    // SAFETY: every x86-64 CPU has it, and CR4.TSD is clear.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Reads a byte port.
pub fn in8(port: u16) -> u8 {
    let value: u8;
    // SAFETY: ring 3 has IOPL 3; ports never touch memory of this program.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Writes a byte port.
pub fn out8(port: u16, value: u8) {
    // SAFETY: as for in8; a device set up through ports gets no memory but its own (PCI bus mastering: see pci.rs).
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
}

/// Writes a 16-bit port.
pub fn out16(port: u16, value: u16) {
    // SAFETY: as for out8.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack, preserves_flags)) };
}

/// Reads a 16-bit port.
pub fn in16(port: u16) -> u16 {
    let value: u16;
    // SAFETY: as for in8.
    unsafe { asm!("in ax, dx", in("dx") port, out("ax") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Reads a 32-bit port.
pub fn in32(port: u16) -> u32 {
    let value: u32;
    // SAFETY: as for in8.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Writes a 32-bit port.
pub fn out32(port: u16, value: u32) {
    // SAFETY: as for out8.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags)) };
}

/// The area of vCPU number `index`.
pub fn area(index: usize) -> &'static PerCpu {
    &PERCPU.cpus[index]
}
