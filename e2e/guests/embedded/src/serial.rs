//! Log lines on COM1.

use crate::cpu::{in8, out8};
use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};

const DATA: u16 = 0x3F8;
const INTERRUPT_ENABLE: u16 = DATA + 1;
const FIFO_CONTROL: u16 = DATA + 2;
const LINE_CONTROL: u16 = DATA + 3;
const MODEM_CONTROL: u16 = DATA + 4;
const LINE_STATUS: u16 = DATA + 5;
const TRANSMITTER_EMPTY: u8 = 0x20;
/// Bytes that fit the transmitter's FIFO once it is empty.
const FIFO_BYTES: usize = 16;

static BUSY: AtomicBool = AtomicBool::new(false);

/// 115200 baud, 8N1, FIFOs on, no interrupts.
pub fn init() {
    for (port, value) in [
        (INTERRUPT_ENABLE, 0),
        (LINE_CONTROL, 0x80),
        (DATA, 1),
        (INTERRUPT_ENABLE, 0),
        (LINE_CONTROL, 0x03),
        (FIFO_CONTROL, 0x07),
        (MODEM_CONTROL, 0x03),
    ] {
        out8(port, value);
    }
}

struct Port;

impl Write for Port {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for burst in text.as_bytes().chunks(FIFO_BYTES) {
            while in8(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {
                core::hint::spin_loop();
            }
            burst.iter().for_each(|&byte| out8(DATA, byte));
        }
        Ok(())
    }
}

/// Writes one line; lines of several vCPUs do not mix. (A vCPU that dies holding the lock dies for good, see `panic`.)
pub fn line(arguments: fmt::Arguments<'_>) {
    while BUSY.swap(true, Ordering::Acquire) {
        core::hint::spin_loop();
    }
    write_line(arguments);
    BUSY.store(false, Ordering::Release);
}

/// Writes one line without waiting for anybody: for the last words of a failing vCPU.
pub fn last_line(arguments: fmt::Arguments<'_>) {
    write_line(arguments);
}

fn write_line(arguments: fmt::Arguments<'_>) {
    // Port's write_str never fails.
    let _ = Port.write_fmt(format_args!("ftvm-guest: {arguments}\r\n"));
}

/// Logs one line on the serial console.
#[macro_export]
macro_rules! log {
    ($($argument:tt)*) => { $crate::serial::line(format_args!($($argument)*)) };
}
