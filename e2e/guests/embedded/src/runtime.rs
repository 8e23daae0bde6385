//! What the compiler expects of a C library, and the ends of a program that fails.

use crate::cpu;
use crate::serial::last_line;
use core::arch::asm;
use core::panic::PanicInfo;

/// Copies `size` bytes between places that do not overlap.
///
/// # Safety
/// As in C.
// SAFETY: no other symbol of the image has this name; it is what the compiler calls by it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, size: usize) -> *mut u8 {
    // SAFETY: the caller vouches for both ranges; the direction flag is clear by the ABI.
    unsafe {
        asm!(
            "rep movsq",
            "mov ecx, {rest:e}",
            "rep movsb",
            rest = in(reg) size % 8,
            inout("rcx") size / 8 => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags)
        );
    }
    to
}

/// Copies `size` bytes between places that may overlap.
///
/// # Safety
/// As in C.
// SAFETY: no other symbol of the image has this name; it is what the compiler calls by it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, size: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= size {
        // SAFETY: copied upwards, no byte is overwritten before it is read; the caller vouches for both ranges.
        unsafe { memcpy(to, from, size) };
    } else {
        // SAFETY: as above, copied downwards from the last byte; size is not 0 here. The flag is cleared again.
        unsafe {
            asm!(
                "std", "rep movsb", "cld",
                inout("rcx") size => _, inout("rdi") to.add(size - 1) => _, inout("rsi") from.add(size - 1) => _,
                options(nostack)
            );
        }
    }
    to
}

/// Fills `size` bytes.
///
/// # Safety
/// As in C.
// SAFETY: no other symbol of the image has this name; it is what the compiler calls by it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memset(to: *mut u8, value: i32, size: usize) -> *mut u8 {
    let word = u64::from(value as u8) * 0x0101_0101_0101_0101;
    // SAFETY: the caller vouches for the range; the direction flag is clear by the ABI.
    unsafe {
        asm!(
            "rep stosq",
            "mov ecx, {rest:e}",
            "rep stosb",
            rest = in(reg) size % 8,
            in("rax") word,
            inout("rcx") size / 8 => _, inout("rdi") to => _,
            options(nostack, preserves_flags)
        );
    }
    to
}

/// Compares `size` bytes.
///
/// # Safety
/// As in C.
// SAFETY: no other symbol of the image has this name; it is what the compiler calls by it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, size: usize) -> i32 {
    let mut at = 0;
    while at < size {
        // SAFETY: the caller vouches for both ranges. Volatile, lest the loop become a call of itself.
        let (a, b) = unsafe { (left.add(at).read_volatile(), right.add(at).read_volatile()) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
        at += 1;
    }
    0
}

/// Whether `size` bytes differ.
///
/// # Safety
/// As in C.
// SAFETY: no other symbol of the image has this name; it is what the compiler calls by it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, size: usize) -> i32 {
    // SAFETY: the caller's promise is the same.
    unsafe { memcmp(left, right, size) }
}

/// Named by the precompiled core library; never called, since panics abort.
// SAFETY: no other symbol of the image has this name.
#[unsafe(no_mangle)]
pub extern "C" fn rust_eh_personality() {
    cpu::stop();
}

/// Named by the precompiled core library; never called, since panics abort.
// SAFETY: no other symbol of the image has this name.
#[unsafe(no_mangle)]
pub extern "C" fn _Unwind_Resume() -> ! {
    cpu::stop();
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    last_line(format_args!("vcpu {} stops: {info}", cpu::index()));
    cpu::stop();
}

/// What boot.s keeps of an exception.
#[repr(C)]
struct ExceptionInfo {
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
    cr2: u64,
    vcpu: u64,
}

// SAFETY: boot.s defines it with this layout, and writes it before it enters `exception_main`.
unsafe extern "C" {
    static exception_info: ExceptionInfo;
}

/// Where boot.s sends a vCPU after an exception.
// SAFETY: no other symbol of the image has this name; boot.s jumps here with this ABI.
#[unsafe(no_mangle)]
extern "C" fn exception_main() -> ! {
    // SAFETY: written by this vCPU on its way here; a second vCPU failing at the same time can only garble the report.
    let info = unsafe { (&raw const exception_info).read_volatile() };
    last_line(format_args!(
        "vcpu {} stops: exception {} error {:#x} at {:#x} (ring {}), stack {:#x}, cr2 {:#x}, flags {:#x}",
        info.vcpu,
        info.vector,
        info.error,
        info.rip,
        info.cs & 3,
        info.rsp,
        info.cr2,
        info.rflags
    ));
    cpu::stop();
}
