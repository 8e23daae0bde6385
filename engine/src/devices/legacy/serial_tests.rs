use super::*;
use crate::devices::testing::{Console, Line};

struct Rig {
    serial: Serial,
    line: Arc<Line>,
    console: Console,
}

fn rig() -> Rig {
    let (line, console) = (Line::new(), Console::default());
    let serial = Serial::new(line.clone(), Box::new(console.clone()));
    Rig { serial, line, console }
}

impl Rig {
    fn read(&mut self, register: u64) -> u8 {
        let mut data = [0];
        self.serial.read(register, &mut data);
        data[0]
    }

    fn write(&mut self, register: u64, byte: u8) {
        self.serial.write(register, &[byte]);
    }
}

#[test]
fn output_goes_to_the_console_and_the_transmitter_is_always_idle() {
    let mut rig = rig();
    for byte in b"hello" {
        assert_eq!(rig.read(LINE_STATUS) & LSR_TRANSMITTER_IDLE, LSR_TRANSMITTER_IDLE);
        rig.write(DATA, *byte);
    }
    assert_eq!(rig.console.take(), b"hello");
}

#[test]
fn the_divisor_hides_data_and_interrupt_enable() {
    let mut rig = rig();
    rig.write(INTERRUPT_ENABLE, IER_RECEIVED);
    rig.write(LINE_CONTROL, LCR_DIVISOR | 3);
    rig.write(DATA, 1);
    rig.write(INTERRUPT_ENABLE, 2);
    assert_eq!((rig.read(DATA), rig.read(INTERRUPT_ENABLE)), (1, 2));
    rig.write(LINE_CONTROL, 3);
    assert_eq!(rig.read(INTERRUPT_ENABLE), IER_RECEIVED);
    assert_eq!(rig.console.take(), b"");
}

#[test]
fn input_interrupts_until_it_is_read() {
    let mut rig = rig();
    assert_eq!(rig.serial.input(b"ab"), 2);
    assert!(!rig.line.asserted(), "not enabled");
    rig.write(INTERRUPT_ENABLE, IER_RECEIVED);
    assert!(rig.line.asserted());
    assert_eq!(rig.read(INTERRUPT_ID), IIR_RECEIVED);
    assert_eq!(rig.read(LINE_STATUS) & LSR_DATA, LSR_DATA);
    assert_eq!((rig.read(DATA), rig.read(DATA)), (b'a', b'b'));
    assert!(!rig.line.asserted());
    assert_eq!(rig.read(INTERRUPT_ID), IIR_NONE);
    assert_eq!(rig.read(LINE_STATUS) & LSR_DATA, 0);
}

#[test]
fn an_empty_transmitter_interrupts_once_per_write() {
    let mut rig = rig();
    rig.write(INTERRUPT_ENABLE, IER_TRANSMIT_EMPTY);
    assert!(rig.line.asserted(), "Linux tests that enabling raises it");
    assert_eq!(rig.read(INTERRUPT_ID), IIR_TRANSMIT_EMPTY);
    assert!(!rig.line.asserted());
    rig.write(INTERRUPT_ENABLE, IER_TRANSMIT_EMPTY);
    assert!(!rig.line.asserted());
    rig.write(DATA, b'x');
    assert!(rig.line.asserted());
    assert_eq!(rig.read(INTERRUPT_ID), IIR_TRANSMIT_EMPTY);
    assert_eq!(rig.read(INTERRUPT_ID), IIR_NONE);
}

#[test]
fn it_looks_like_a_16550a_to_a_prober() {
    let mut rig = rig();
    rig.write(SCRATCH, 0x5a);
    assert_eq!(rig.read(SCRATCH), 0x5a);
    rig.write(INTERRUPT_ID, FCR_ENABLE);
    assert_eq!(rig.read(INTERRUPT_ID) & IIR_FIFO, IIR_FIFO);
    rig.write(INTERRUPT_ENABLE, 0xff);
    assert_eq!(rig.read(INTERRUPT_ENABLE), IER_BITS);
    // Linux: loopback with RTS and OUT2 must read as CTS and DCD.
    rig.write(MODEM_CONTROL, MCR_LOOPBACK | 0x0a);
    assert_eq!(rig.read(MODEM_STATUS) & 0xf0, 0x90);
    rig.write(DATA, b'l');
    assert_eq!(rig.read(DATA), b'l');
    assert_eq!(rig.console.take(), b"", "loopback stays inside");
}

#[test]
fn input_is_bounded() {
    let mut rig = rig();
    assert_eq!(rig.serial.input(&[b'x'; INPUT_BYTES - 1]), INPUT_BYTES - 1);
    assert_eq!(rig.serial.input(b"yz"), 1);
    assert_eq!(rig.serial.input(b"z"), 0);
    rig.write(MODEM_CONTROL, MCR_LOOPBACK);
    rig.write(DATA, b'l');
    assert_eq!(rig.serial.save().input.len(), INPUT_BYTES);
    rig.write(INTERRUPT_ID, FCR_CLEAR_RECEIVE);
    assert_eq!(rig.read(LINE_STATUS) & LSR_DATA, 0);
}

#[test]
fn a_state_with_waiting_input_comes_back_and_interrupts() {
    let mut first = rig();
    first.write(INTERRUPT_ENABLE, IER_RECEIVED);
    first.serial.input(b"q");
    let state = first.serial.save();
    let mut second = rig();
    assert!(Serial::accepts(&state));
    second.serial.load(state.clone());
    assert!(second.line.asserted());
    assert_eq!(second.serial.save(), state);
    assert_eq!(second.read(DATA), b'q');
    second.serial.reset();
    assert_eq!(second.serial.save(), rig().serial.save());
    let flood = SerialState {
        input: vec![0; INPUT_BYTES + 1].into(),
        ..state
    };
    assert!(!Serial::accepts(&flood));
}
