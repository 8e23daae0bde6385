//! The clock of everything that two seats or the arbiter must agree on: it runs on while the host sleeps.
//!
//! Deadlines of arbiter requests, heartbeats and the age of contact (rules 2, 3 and 11) are measured with CLOCK_BOOTTIME
//! (clock_gettime(2)): a host that slept an hour had no contact for an hour, and an answer that it reads after waking is
//! late. The monotonic clock of [`std::time::Instant`] stands still meanwhile; it is for measuring what this process does.

use std::ops::Add;
use std::time::Duration;

/// A moment of that clock, as time since the host's boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(Duration);

impl Moment {
    /// Now.
    pub fn now() -> Self {
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // By libc and not by rustix, which asks for the auxiliary vector first (prctl PR_GET_AUXV): a thread that is the first
        // to do so may be under a filter that forbids it.
        // SAFETY: the structure is valid and lives across the call, and this clock exists since Linux 2.6.39.
        unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut now) };
        // Never negative: it begins with the boot.
        Self(Duration::new(
            u64::try_from(now.tv_sec).unwrap_or(0),
            u32::try_from(now.tv_nsec).unwrap_or(0),
        ))
    }

    /// From `earlier` to this moment, zero if that is later.
    pub fn saturating_duration_since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    /// From this moment to now.
    pub fn elapsed(self) -> Duration {
        Self::now().saturating_duration_since(self)
    }
}

impl Add<Duration> for Moment {
    type Output = Self;

    fn add(self, later: Duration) -> Self {
        Self(self.0.saturating_add(later))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first number of /proc/uptime is CLOCK_BOOTTIME in hundredths of a second (proc(5)).
    fn uptime() -> Duration {
        let text = std::fs::read_to_string("/proc/uptime").expect("/proc");
        Duration::from_secs_f64(
            text.split(' ')
                .next()
                .and_then(|text| text.parse().ok())
                .expect("seconds"),
        )
    }

    #[test]
    fn it_is_the_clock_that_counts_sleep() {
        let before = uptime();
        let now = Moment::now();
        let after = uptime() + Duration::from_millis(10);
        assert!(before <= now.0 && now.0 <= after, "{before:?} {now:?} {after:?}");
        let later = now + Duration::from_secs(5);
        assert_eq!(later.saturating_duration_since(now), Duration::from_secs(5));
        assert_eq!(now.saturating_duration_since(later), Duration::ZERO);
    }
}
