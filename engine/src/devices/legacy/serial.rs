//! A 16550A serial port: the guest's console on COM1.
//!
//! Sending is instantaneous. What comes from outside waits in a bounded queue behind the receive FIFO. The interrupt line
//! is a level that follows the registers; the interrupt controller makes an edge of it.

use std::collections::VecDeque;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::backends::ConsoleBackend;
use crate::devices::bus::BusDevice;
use crate::devices::irq::IrqLine;

/// First port of COM1.
pub const COM1: u64 = 0x3f8;
/// Number of ports.
pub const PORTS: u64 = 8;
/// GSI of COM1: edge-triggered, as on the ISA bus.
pub const COM1_GSI: u32 = 4;
/// Most characters from outside that wait for the guest.
pub const INPUT_BYTES: usize = 4096;

const DATA: u64 = 0;
const INTERRUPT_ENABLE: u64 = 1;
const INTERRUPT_ID: u64 = 2;
const LINE_CONTROL: u64 = 3;
const MODEM_CONTROL: u64 = 4;
const LINE_STATUS: u64 = 5;
const MODEM_STATUS: u64 = 6;
const SCRATCH: u64 = 7;

const IER_RECEIVED: u8 = 1;
const IER_TRANSMIT_EMPTY: u8 = 2;
const IER_BITS: u8 = 0x0f;
const IIR_NONE: u8 = 1;
const IIR_TRANSMIT_EMPTY: u8 = 2;
const IIR_RECEIVED: u8 = 4;
const IIR_FIFO: u8 = 0xc0;
const FCR_ENABLE: u8 = 1;
const FCR_CLEAR_RECEIVE: u8 = 2;
const LCR_DIVISOR: u8 = 0x80;
const MCR_BITS: u8 = 0x1f;
const MCR_LOOPBACK: u8 = 0x10;
const LSR_DATA: u8 = 1;
const LSR_TRANSMITTER_IDLE: u8 = 0x60;
/// Carrier detect, data set ready, clear to send: somebody is connected.
const MSR_CONNECTED: u8 = 0xb0;

/// What is saved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    divisor: u16,
    interrupt_enable: u8,
    fifo: bool,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    /// The transmitter became empty and the guest was not told yet.
    transmit_empty: bool,
    input: VecDeque<u8>,
}

/// The port.
pub struct Serial {
    state: SerialState,
    line: Arc<dyn IrqLine>,
    console: Box<dyn ConsoleBackend>,
}

impl Serial {
    /// A port after power-on whose output goes to `console`.
    pub fn new(line: Arc<dyn IrqLine>, console: Box<dyn ConsoleBackend>) -> Self {
        Self {
            state: power_on(),
            line,
            console,
        }
    }

    /// Takes characters from outside; returns how many had room.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        let room = INPUT_BYTES - self.state.input.len();
        let taken = bytes.len().min(room);
        self.state.input.extend(&bytes[..taken]);
        self.drive();
        taken
    }

    /// Drives the interrupt line as the registers demand.
    pub fn drive(&self) {
        self.line.set(self.interrupt() != IIR_NONE);
    }

    /// What is saved.
    pub fn save(&self) -> SerialState {
        self.state.clone()
    }

    /// Whether the state can be loaded.
    pub fn accepts(state: &SerialState) -> bool {
        state.input.len() <= INPUT_BYTES
            && state.interrupt_enable & !IER_BITS == 0
            && state.modem_control & !MCR_BITS == 0
    }

    /// Takes over a state that [`Self::accepts`] approved.
    pub fn load(&mut self, state: SerialState) {
        self.state = state;
        self.drive();
    }

    /// Back to power-on.
    pub fn reset(&mut self) {
        self.load(power_on());
    }

    fn interrupt(&self) -> u8 {
        let enabled = |bit| self.state.interrupt_enable & bit != 0;
        if enabled(IER_RECEIVED) && !self.state.input.is_empty() {
            IIR_RECEIVED
        } else if enabled(IER_TRANSMIT_EMPTY) && self.state.transmit_empty {
            IIR_TRANSMIT_EMPTY
        } else {
            IIR_NONE
        }
    }

    fn divisor_access(&self) -> bool {
        self.state.line_control & LCR_DIVISOR != 0
    }

    fn send(&mut self, byte: u8) {
        if self.state.modem_control & MCR_LOOPBACK == 0 {
            self.console.write(&[byte]);
        } else if self.state.input.len() < INPUT_BYTES {
            self.state.input.push_back(byte);
        }
        self.state.transmit_empty = true;
    }

    fn read_register(&mut self, register: u64) -> u8 {
        let state = &mut self.state;
        match register {
            DATA if state.line_control & LCR_DIVISOR != 0 => state.divisor as u8,
            DATA => state.input.pop_front().unwrap_or(0),
            INTERRUPT_ENABLE if state.line_control & LCR_DIVISOR != 0 => (state.divisor >> 8) as u8,
            INTERRUPT_ENABLE => state.interrupt_enable,
            INTERRUPT_ID => {
                let id = self.interrupt();
                if id == IIR_TRANSMIT_EMPTY {
                    self.state.transmit_empty = false;
                }
                id | if self.state.fifo { IIR_FIFO } else { 0 }
            }
            LINE_CONTROL => state.line_control,
            MODEM_CONTROL => state.modem_control,
            LINE_STATUS => LSR_TRANSMITTER_IDLE | if state.input.is_empty() { 0 } else { LSR_DATA },
            MODEM_STATUS if state.modem_control & MCR_LOOPBACK != 0 => looped_back(state.modem_control),
            MODEM_STATUS => MSR_CONNECTED,
            SCRATCH => state.scratch,
            _ => 0xff,
        }
    }

    fn write_register(&mut self, register: u64, byte: u8) {
        match register {
            DATA if self.divisor_access() => self.state.divisor = self.state.divisor & 0xff00 | u16::from(byte),
            DATA => self.send(byte),
            INTERRUPT_ENABLE if self.divisor_access() => {
                self.state.divisor = self.state.divisor & 0x00ff | u16::from(byte) << 8;
            }
            INTERRUPT_ENABLE => {
                // Enabling it while the transmitter is empty raises it at once.
                let rises = byte & !self.state.interrupt_enable & IER_TRANSMIT_EMPTY != 0;
                self.state.transmit_empty |= rises;
                self.state.interrupt_enable = byte & IER_BITS;
            }
            INTERRUPT_ID => {
                self.state.fifo = byte & FCR_ENABLE != 0;
                if byte & FCR_CLEAR_RECEIVE != 0 {
                    self.state.input.clear();
                }
            }
            LINE_CONTROL => self.state.line_control = byte,
            MODEM_CONTROL => self.state.modem_control = byte & MCR_BITS,
            SCRATCH => self.state.scratch = byte,
            _ => {}
        }
    }
}

/// 9,600 baud, everything off.
fn power_on() -> SerialState {
    SerialState {
        divisor: 12,
        ..SerialState::default()
    }
}

/// In loopback the four outputs of the modem control register are the four inputs of the status register.
fn looped_back(control: u8) -> u8 {
    let (ready, request, out1, out2) = (control & 1, control >> 1 & 1, control >> 2 & 1, control >> 3 & 1);
    request << 4 | ready << 5 | out1 << 6 | out2 << 7
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (register, byte) in (offset..).zip(data) {
            *byte = self.read_register(register);
        }
        self.drive();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (register, byte) in (offset..).zip(data) {
            self.write_register(register, *byte);
        }
        self.drive();
    }
}

#[cfg(test)]
#[path = "serial_tests.rs"]
mod tests;
