//! The CMOS clock (MC146818) at ports 0x70 and 0x71: time of day and scratch bytes, no alarms and no interrupts.
//!
//! Its time is a base that is part of the machine's state plus the guest's own clock, never the host's: it is the same
//! on the successor and does not step when another host takes over.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::devices::bus::BusDevice;
use crate::devices::irq::GuestClock;

/// The index port; the data port follows.
pub const INDEX_PORT: u64 = 0x70;
/// Number of ports.
pub const PORTS: u64 = 2;

const CMOS_BYTES: usize = 128;
const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
/// Where ACPI's FADT says that the century is.
pub const CENTURY: u8 = 0x32;

const UPDATE_IN_PROGRESS: u8 = 0x80;
/// 32,768 Hz time base, 1,024 Hz rate.
const STATUS_A_RESET: u8 = 0x26;
const B_SET: u8 = 0x80;
const B_BINARY: u8 = 0x04;
const B_24_HOURS: u8 = 0x02;
const B_WRITABLE: u8 = 0x87;
const TIME_VALID: u8 = 0x80;

const SECOND_NS: i128 = 1_000_000_000;
/// The chip announces an update this long before it.
const UPDATE_NS: i128 = 244_000;

/// What is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    /// Time since 1970 at the guest clock's zero, in nanoseconds.
    base_ns: i128,
    /// The time that stands while the guest sets the clock, field by field.
    held: Option<Civil>,
    index: u8,
    cmos: Vec<u8>,
}

/// The clock.
pub struct Rtc {
    state: RtcState,
    clock: Arc<dyn GuestClock>,
}

impl Rtc {
    /// A clock that shows `unix_ns` (since 1970) at the guest clock's zero.
    pub fn new(unix_ns: u64, clock: Arc<dyn GuestClock>) -> Self {
        let mut cmos = vec![0; CMOS_BYTES];
        cmos[usize::from(STATUS_A)] = STATUS_A_RESET;
        cmos[usize::from(STATUS_B)] = B_24_HOURS;
        Self {
            state: RtcState {
                base_ns: i128::from(unix_ns),
                held: None,
                index: 0,
                cmos,
            },
            clock,
        }
    }

    /// What is saved.
    pub fn save(&self) -> RtcState {
        self.state.clone()
    }

    /// Whether the state can be loaded.
    pub fn accepts(state: &RtcState) -> bool {
        state.cmos.len() == CMOS_BYTES
            && usize::from(state.index) < CMOS_BYTES
            && state.cmos[usize::from(STATUS_B)] & !B_WRITABLE == 0
            && state.held.is_some() == (state.cmos[usize::from(STATUS_B)] & B_SET != 0)
            && state.held.is_none_or(|held| (0..10_000).contains(&held.year))
            && state.base_ns.unsigned_abs() <= u128::from(u64::MAX) * 16
    }

    /// Takes over a state that [`Self::accepts`] approved.
    pub fn load(&mut self, state: RtcState) {
        self.state = state;
    }

    /// A machine reset: the clock runs on, as its battery lets it.
    pub fn reset(&mut self) {
        self.state.index = 0;
    }

    fn now_ns(&self) -> i128 {
        self.state.base_ns + i128::from(self.clock.now_ns())
    }

    /// What the registers show.
    fn shown(&self) -> Civil {
        let seconds = self.now_ns().div_euclid(SECOND_NS) as i64;
        self.state.held.unwrap_or_else(|| Civil::from_unix(seconds))
    }

    fn status_b(&self) -> u8 {
        self.state.cmos[usize::from(STATUS_B)]
    }

    fn read_register(&self, index: u8) -> u8 {
        let time = self.shown();
        let value = match index {
            SECONDS => time.second,
            MINUTES => time.minute,
            HOURS => return self.encode_hour(time.hour),
            WEEKDAY => time.weekday,
            DAY => time.day,
            MONTH => time.month,
            YEAR => (time.year % 100) as u8,
            CENTURY => (time.year / 100) as u8,
            STATUS_A => {
                let updating =
                    self.state.held.is_none() && self.now_ns().rem_euclid(SECOND_NS) >= SECOND_NS - UPDATE_NS;
                return STATUS_A_RESET | if updating { UPDATE_IN_PROGRESS } else { 0 };
            }
            STATUS_C => return 0,
            STATUS_D => return TIME_VALID,
            other => return self.state.cmos[usize::from(other)],
        };
        self.encode(value)
    }

    fn write_register(&mut self, index: u8, value: u8) {
        match index {
            SECONDS | MINUTES | HOURS | DAY | MONTH | YEAR | CENTURY => self.set_field(index, value),
            WEEKDAY | STATUS_A | STATUS_C | STATUS_D => {}
            STATUS_B => self.write_status_b(value),
            other => self.state.cmos[usize::from(other)] = value,
        }
    }

    /// The SET bit stops the clock; clearing it starts the clock with what was set, if that is a time.
    fn write_status_b(&mut self, value: u8) {
        let held = self.state.held;
        if value & B_SET != 0 && held.is_none() {
            self.state.held = Some(self.shown());
        } else if value & B_SET == 0
            && let Some(time) = held
        {
            self.state.held = None;
            self.set_time(time, 0);
        }
        self.state.cmos[usize::from(STATUS_B)] = value & B_WRITABLE;
    }

    /// Sets one field of the time; a value that no clock shows is dropped.
    fn set_field(&mut self, index: u8, value: u8) {
        let mut time = self.shown();
        let decoded = if index == HOURS {
            self.decode_hour(value)
        } else {
            self.decode(value)
        };
        let Some(value) = decoded else { return };
        match index {
            SECONDS => time.second = value,
            MINUTES => time.minute = value,
            HOURS => time.hour = value,
            DAY => time.day = value,
            MONTH => time.month = value,
            YEAR => time.year = time.year.rem_euclid(10_000) / 100 * 100 + i64::from(value),
            _ => time.year = i64::from(value) * 100 + time.year.rem_euclid(100),
        }
        match &mut self.state.held {
            Some(held) => *held = time,
            None => self.set_time(time, self.now_ns().rem_euclid(SECOND_NS)),
        }
    }

    fn set_time(&mut self, time: Civil, fraction_ns: i128) {
        if let Some(seconds) = time.to_unix().filter(|seconds| in_range(*seconds)) {
            let shown_ns = i128::from(seconds) * SECOND_NS + fraction_ns;
            self.state.base_ns = shown_ns - i128::from(self.clock.now_ns());
        }
    }

    fn encode(&self, value: u8) -> u8 {
        if self.status_b() & B_BINARY != 0 {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    fn decode(&self, value: u8) -> Option<u8> {
        if self.status_b() & B_BINARY != 0 {
            (value < 100).then_some(value)
        } else {
            (value & 0x0f < 10 && value >> 4 < 10).then_some((value >> 4) * 10 + (value & 0x0f))
        }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.status_b() & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let half = if hour >= 12 { 0x80 } else { 0 };
        half | self.encode(if hour.is_multiple_of(12) { 12 } else { hour % 12 })
    }

    fn decode_hour(&self, value: u8) -> Option<u8> {
        if self.status_b() & B_24_HOURS != 0 {
            return self.decode(value);
        }
        let hour = self.decode(value & 0x7f).filter(|hour| (1..=12).contains(hour))? % 12;
        Some(if value & 0x80 != 0 { hour + 12 } else { hour })
    }
}

impl BusDevice for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let (1, [byte]) = (offset, &mut *data) {
            *byte = self.read_register(self.state.index);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            // Bit 7 masks NMIs on a PC; there are none.
            (0, [byte]) => self.state.index = byte & 0x7f,
            (1, [byte]) => self.write_register(self.state.index, *byte),
            _ => {}
        }
    }
}

/// From 1970 up to the year 9999, which is what two digits of century and of year can show.
fn in_range(seconds: i64) -> bool {
    (0..=253_402_300_799).contains(&seconds)
}

/// A date and time of the Gregorian calendar, UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Civil {
    year: i64,
    month: u8,
    day: u8,
    /// 1 is Sunday.
    weekday: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

const DAY_SECONDS: i64 = 86_400;
/// Days from 0000-03-01 to 1970-01-01.
const EPOCH_DAYS: i64 = 719_468;
const DAYS_OF_400_YEARS: i64 = 146_097;

impl Civil {
    /// After "days from civil" by Howard Hinnant: years begin in March, so that leap days are last.
    fn from_unix(seconds: i64) -> Self {
        let (days, time) = (seconds.div_euclid(DAY_SECONDS), seconds.rem_euclid(DAY_SECONDS));
        let shifted = days + EPOCH_DAYS;
        let (era, day) = (
            shifted.div_euclid(DAYS_OF_400_YEARS),
            shifted.rem_euclid(DAYS_OF_400_YEARS),
        );
        let year_of_era = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
        let day_of_year = day - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let month = if march_month < 10 {
            march_month + 3
        } else {
            march_month - 9
        };
        Self {
            year: year_of_era + era * 400 + i64::from(month <= 2),
            month: month as u8,
            day: (day_of_year - (153 * march_month + 2) / 5 + 1) as u8,
            weekday: ((days + 4).rem_euclid(7) + 1) as u8,
            hour: (time / 3_600) as u8,
            minute: (time / 60 % 60) as u8,
            second: (time % 60) as u8,
        }
    }

    /// `None` if a field is out of range. A day beyond its month's end runs into the next month.
    fn to_unix(self) -> Option<i64> {
        let ok = (1..=12).contains(&self.month) && (1..=31).contains(&self.day) && self.hour < 24;
        if !ok || self.minute > 59 || self.second > 59 {
            return None;
        }
        let year = self.year - i64::from(self.month <= 2);
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let march_month = (i64::from(self.month) + 9) % 12;
        let day_of_year = (153 * march_month + 2) / 5 + i64::from(self.day) - 1;
        let day = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * DAYS_OF_400_YEARS + day - EPOCH_DAYS;
        Some(days * DAY_SECONDS + i64::from(self.hour) * 3_600 + i64::from(self.minute) * 60 + i64::from(self.second))
    }
}

#[cfg(test)]
#[path = "rtc_tests.rs"]
mod tests;
