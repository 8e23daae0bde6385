//! A bare-metal guest that serves numbered requests over TCP, journals them on a disk and checks its own memory.
//!
//! It is entered through its PVH note (boot.s) and does all its work in ring 3 with IOPL 3: a hypervisor that
//! interprets ring 0 still runs it at full speed.
#![no_std]
#![no_main]

mod cpu;
#[macro_use]
mod serial;
mod runtime;

#[unsafe(no_mangle)]
extern "C" fn guest_main() -> ! {
    serial::init();
    log!("hello {:#x}", cpu::read_msr(0x1b));
    cpu::this().clear_wake(); cpu::wait();
    cpu::stop();
}

#[unsafe(no_mangle)]
extern "C" fn application_main() -> ! {
    cpu::stop();
}
