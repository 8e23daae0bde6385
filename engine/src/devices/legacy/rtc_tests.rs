use super::*;
use crate::devices::testing::Clock;

fn read(rtc: &mut Rtc, index: u8) -> u8 {
    rtc.write(0, &[index]);
    let mut data = [0xff];
    rtc.read(1, &mut data);
    data[0]
}

fn write(rtc: &mut Rtc, index: u8, value: u8) {
    rtc.write(0, &[index]);
    rtc.write(1, &[value]);
}

/// Century, year, month, day, hour, minute, second as the registers show them.
fn shown(rtc: &mut Rtc) -> [u8; 7] {
    [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS].map(|index| read(rtc, index))
}

const SECOND: u64 = 1_000_000_000;
/// 2026-11-22 16:57:03 UTC, a Sunday.
const NOW: u64 = 1_795_366_623 * SECOND;

#[test]
fn the_time_is_base_plus_guest_clock_in_bcd() {
    let clock = Clock::new();
    let mut rtc = Rtc::new(NOW, clock.clone());
    assert_eq!(shown(&mut rtc), [0x20, 0x26, 0x11, 0x22, 0x16, 0x57, 0x03]);
    assert_eq!(read(&mut rtc, WEEKDAY), 1);
    clock.advance(57 * SECOND);
    assert_eq!(shown(&mut rtc), [0x20, 0x26, 0x11, 0x22, 0x16, 0x58, 0x00]);
    write(&mut rtc, STATUS_B, B_BINARY | B_24_HOURS);
    assert_eq!(shown(&mut rtc), [20, 26, 11, 22, 16, 58, 0]);
    write(&mut rtc, STATUS_B, 0);
    assert_eq!(read(&mut rtc, HOURS), 0x84, "4 p.m.");
}

#[test]
fn an_update_is_announced_just_before_the_second_changes() {
    let clock = Clock::new();
    let mut rtc = Rtc::new(NOW, clock.clone());
    assert_eq!(read(&mut rtc, STATUS_A) & UPDATE_IN_PROGRESS, 0);
    clock.advance(SECOND - 100_000);
    assert_ne!(read(&mut rtc, STATUS_A) & UPDATE_IN_PROGRESS, 0);
    assert_eq!(read(&mut rtc, STATUS_D), TIME_VALID);
}

#[test]
fn the_guest_sets_the_clock_field_by_field() {
    let clock = Clock::new();
    // The 31st of January: the 31st of February is passed on the way to the 28th.
    let mut rtc = Rtc::new(1_769_817_600 * SECOND, clock.clone());
    clock.advance(5_000_000 * SECOND);
    write(&mut rtc, STATUS_B, B_SET | B_24_HOURS);
    for (index, value) in [
        (YEAR, 0x27),
        (MONTH, 0x02),
        (DAY, 0x28),
        (HOURS, 0x23),
        (MINUTES, 0x59),
        (SECONDS, 0x58),
    ] {
        write(&mut rtc, index, value);
    }
    clock.advance(10 * SECOND);
    assert_eq!(read(&mut rtc, SECONDS), 0x58, "stands while it is set");
    write(&mut rtc, STATUS_B, B_24_HOURS);
    clock.advance(3 * SECOND);
    assert_eq!(shown(&mut rtc), [0x20, 0x27, 0x03, 0x01, 0x00, 0x00, 0x01]);
    assert!(Rtc::accepts(&rtc.save()));
}

#[test]
fn nonsense_is_dropped_and_scratch_bytes_are_kept() {
    let mut rtc = Rtc::new(NOW, Clock::new());
    let before = shown(&mut rtc);
    for (index, value) in [
        (SECONDS, 0x7a),
        (MONTH, 0x13),
        (HOURS, 0x24),
        (DAY, 0),
        (STATUS_A, 0xff),
        (STATUS_D, 0),
    ] {
        write(&mut rtc, index, value);
    }
    assert_eq!(shown(&mut rtc), before);
    write(&mut rtc, 0x40 | 0x80, 0x5a);
    assert_eq!(read(&mut rtc, 0x40), 0x5a);
}

#[test]
fn a_successor_shows_the_same_time_whatever_its_host_thinks() {
    let clock = Clock::new();
    let mut rtc = Rtc::new(NOW, clock.clone());
    clock.advance(SECOND);
    write(&mut rtc, 0x50, 7);
    let state = rtc.save();
    let mut other = Rtc::new(0, clock);
    assert!(Rtc::accepts(&state));
    other.load(state.clone());
    assert_eq!(shown(&mut other), shown(&mut rtc));
    other.load(state.clone());
    assert_eq!(other.save(), state);
    let short = RtcState {
        cmos: vec![0; 4],
        ..state.clone()
    };
    let wild = RtcState {
        base_ns: i128::MAX,
        ..state
    };
    assert!(!Rtc::accepts(&short) && !Rtc::accepts(&wild));
}

#[test]
fn dates_convert_both_ways() {
    for seconds in (0..253_402_300_799i64).step_by(86_399 * 37) {
        assert_eq!(Civil::from_unix(seconds).to_unix(), Some(seconds));
    }
    let leap = Civil::from_unix(951_782_400);
    assert_eq!((leap.year, leap.month, leap.day, leap.weekday), (2000, 2, 29, 3));
}
