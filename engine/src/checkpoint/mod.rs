//! When an epoch ends, and what is copied before the guest pauses for it.
//!
//! ```text
//!            interval over, output waits,
//!            or much is recorded                  few dirty pages, or rounds used up
//!   Running ──────────────────────► harvest ──────────────────────────────────────► seal (pause)
//!                                     ▲   │ many dirty pages
//!                           round sent│   ▼
//!                                  PreCopy: pages are encoded and sent while the guest runs
//! ```
//!
//! The pause must not grow with the dirty set: whatever is dirty is harvested (write-protected again) and sent while
//! the guest runs, round after round, until a residue is left that fits the pause. What the guest writes meanwhile is
//! found by the next harvest and sent again; the later copy wins.
//!
//! A guest that dirties pages faster than rounds can send them never gets to a small residue. It is then slowed down by
//! [`Decision::Throttle`]: it stands still for a part of each round, which shows in its metrics.
//!
//! With a target for the latency, output that waits ends an epoch only as late as the target allows: it is released in time if the
//! rest takes as long as it did lately. Longer epochs are fewer pauses, and a page that is written again and again is sent less often.
//!
//! This module decides and measures; it touches neither guest nor link.

mod histogram;
mod smoothed;

use smoothed::Smoothed;

pub use histogram::Histogram;

use std::time::{Duration, Instant};

/// Bounds of the pacer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PacerConfig {
    /// Shortest epoch.
    pub interval_min: Duration,
    /// Longest epoch.
    pub interval_max: Duration,
    /// How long output may wait for its release; none: as short as the other bounds allow.
    pub target_latency: Option<Duration>,
    /// Pages that may be copied inside the pause.
    pub residue_pages: usize,
    /// Rounds of pre-copy without throttling.
    pub free_rounds: u32,
    /// Rounds after which the epoch is sealed whatever is left.
    pub rounds_max: u32,
    /// Epochs that may be sent and not acknowledged when the next one is sealed.
    pub in_flight_max: usize,
    /// Share of time that pauses may take: an epoch lasts at least the usual pause divided by this.
    pub pause_share: f64,
    /// Recorded output and disk changes above which the epoch ends at once, in bytes.
    pub recorded_bytes_max: usize,
    /// Pages that an epoch may hold, pages that were sent twice counted twice.
    pub pages_max: usize,
}

impl Default for PacerConfig {
    fn default() -> Self {
        Self {
            interval_min: Duration::from_millis(1),
            interval_max: Duration::from_millis(50),
            target_latency: None,
            residue_pages: 96,
            free_rounds: 4,
            rounds_max: 24,
            in_flight_max: 2,
            pause_share: 0.25,
            recorded_bytes_max: 8 << 20,
            pages_max: 8192,
        }
    }
}

impl PacerConfig {
    /// Pages that the guest may write in an epoch before the first harvest: so many that they can be sent while it runs.
    pub fn first_room(&self) -> usize {
        self.pages_max / 4 * 3
    }
}

/// What the pacer has to know when it is asked.
#[derive(Debug, Clone, Copy)]
pub struct Observation {
    /// Now.
    pub now: Instant,
    /// Since when output of the running epoch waits to be released, if any does.
    pub output_since: Option<Instant>,
    /// Bytes of output held and disk changes recorded.
    pub recorded_bytes: usize,
    /// Pages harvested and not sent.
    pub dirty_pages: usize,
    /// Epochs sent and not acknowledged.
    pub in_flight: usize,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Nothing before this moment, unless something happens.
    WaitUntil(Instant),
    /// Nothing until an acknowledgment or a report of the sender comes.
    WaitForReport,
    /// The standby lags and much waits already: the guest stands still for a moment, then ask again.
    HoldBack,
    /// Harvest dirty pages and tell [`Pacer::harvested`].
    Harvest,
    /// Send the harvested pages while the guest runs; tell [`Pacer::round_sent`] when they are encoded.
    SendRound,
    /// The same, but let the guest stand still meanwhile for this share of the time, in percent.
    Throttle(u8),
    /// Pause the guest and end the epoch.
    Seal,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Running,
    Harvesting,
    Sending,
}

/// Decides for one session at a time.
#[derive(Debug)]
pub struct Pacer {
    config: PacerConfig,
    phase: Phase,
    began: Instant,
    rounds: u32,
    /// Pages sent in the rounds of this epoch.
    sent_pages: usize,
    /// Moving average of the pause.
    pause: Duration,
    /// Somebody asked for the end of this epoch.
    hurry: bool,
    /// When it began to end.
    ends_since: Option<Instant>,
    /// From the decision to end an epoch to its seal.
    closing: Smoothed,
    /// From the seal of an epoch to its acknowledgment.
    acknowledging: Smoothed,
}

impl Pacer {
    /// A pacer whose first epoch began then.
    pub fn new(config: PacerConfig, began: Instant) -> Self {
        Self {
            config,
            phase: Phase::Running,
            began,
            rounds: 0,
            sent_pages: 0,
            pause: Duration::ZERO,
            hurry: false,
            ends_since: None,
            closing: Smoothed::default(),
            acknowledging: Smoothed::default(),
        }
    }

    /// Goes by other bounds from now on.
    pub fn set_config(&mut self, config: PacerConfig) {
        self.config = config;
    }

    /// End the running epoch as soon as its residue is small: a switchover, a stop, a digest.
    pub fn hurry(&mut self) {
        self.hurry = true;
    }

    /// What to do now.
    pub fn decide(&mut self, seen: Observation) -> Decision {
        match self.phase {
            Phase::Sending => Decision::WaitForReport,
            Phase::Harvesting => Decision::Harvest,
            Phase::Running => self.decide_running(seen),
        }
    }

    fn decide_running(&mut self, seen: Observation) -> Decision {
        if seen.in_flight >= self.config.in_flight_max {
            let much = seen.recorded_bytes >= self.config.recorded_bytes_max;
            return if much {
                Decision::HoldBack
            } else {
                Decision::WaitForReport
            };
        }
        let least = self
            .config
            .interval_min
            .max(self.pause.div_f64(self.config.pause_share));
        let much = seen.recorded_bytes >= self.config.recorded_bytes_max || seen.dirty_pages >= self.early_pages();
        let latest = self.began + self.config.interval_max.max(least);
        let due = match seen.output_since {
            _ if self.hurry || much => self.began + least,
            Some(since) => (since + self.patience()).clamp(self.began + least, latest),
            None => latest,
        };
        if seen.now < due {
            return Decision::WaitUntil(due);
        }
        self.phase = Phase::Harvesting;
        self.ends_since = Some(seen.now);
        Decision::Harvest
    }

    /// How long output may wait for its epoch to begin to end: what is left of the target after what the end and the
    /// acknowledgment usually take.
    fn patience(&self) -> Duration {
        let usual = self.closing.upper() + self.acknowledging.upper();
        let target = self.config.target_latency.unwrap_or_default();
        target.saturating_sub(usual)
    }

    /// An epoch was acknowledged so long after its seal.
    pub fn acknowledged(&mut self, elapsed: Duration) {
        self.acknowledging.add(elapsed);
    }

    /// Dirty pages with which the epoch ends early.
    fn early_pages(&self) -> usize {
        self.config.pages_max / 8 * 5
    }

    /// Pages that the guest may write until the next harvest, when `dirty_pages` are harvested and not sent. At first so
    /// many that they can be sent while it runs, then all that the epoch can still hold.
    pub fn room(&self, dirty_pages: usize) -> usize {
        let pages_max = if self.sent_pages == 0 {
            self.config.first_room()
        } else {
            self.config.pages_max
        };
        pages_max.saturating_sub(self.sent_pages + dirty_pages)
    }

    /// So many pages are dirty and not sent.
    pub fn harvested(&mut self, dirty_pages: usize) -> Decision {
        // A round has to leave some room: what is written meanwhile belongs to the epoch too.
        let fits = self.sent_pages + dirty_pages <= self.config.pages_max / 16 * 15;
        if dirty_pages <= self.config.residue_pages || self.rounds >= self.config.rounds_max || !fits {
            return Decision::Seal;
        }
        self.phase = Phase::Sending;
        self.sent_pages += dirty_pages;
        let over = (self.rounds + 1).saturating_sub(self.config.free_rounds);
        if over == 0 {
            return Decision::SendRound;
        }
        // The longer it takes to converge, the harder the brake; never a complete stop before the rounds are used up.
        Decision::Throttle(u8::try_from((over * 15).min(90)).unwrap_or(90))
    }

    /// The pages of the round are encoded and queued.
    pub fn round_sent(&mut self) {
        self.rounds += 1;
        self.phase = Phase::Harvesting;
    }

    /// Rounds sent in this epoch so far.
    pub fn rounds(&self) -> u32 {
        self.rounds
    }

    /// The epoch was sealed; the guest stood still for `pause`. The next one runs since `now`.
    pub fn sealed(&mut self, now: Instant, pause: Duration) {
        self.pause = (self.pause * 7 + pause) / 8;
        if let Some(since) = self.ends_since.take() {
            self.closing.add(now.saturating_duration_since(since));
        }
        self.phase = Phase::Running;
        self.began = now;
        self.rounds = 0;
        self.sent_pages = 0;
        self.hurry = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(now: Instant) -> Observation {
        Observation {
            now,
            output_since: None,
            recorded_bytes: 0,
            dirty_pages: 0,
            in_flight: 0,
        }
    }

    #[test]
    fn an_idle_epoch_lasts_the_longest_interval() {
        let began = Instant::now();
        let mut pacer = Pacer::new(PacerConfig::default(), began);
        let due = began + PacerConfig::default().interval_max;
        assert_eq!(pacer.decide(seen(began)), Decision::WaitUntil(due));
        assert_eq!(pacer.decide(seen(due)), Decision::Harvest);
        assert_eq!(pacer.harvested(3), Decision::Seal);
    }

    #[test]
    fn waiting_output_ends_it_after_the_shortest() {
        let began = Instant::now();
        let mut pacer = Pacer::new(PacerConfig::default(), began);
        let early = Observation {
            output_since: Some(began),
            ..seen(began + PacerConfig::default().interval_min)
        };
        assert_eq!(pacer.decide(early), Decision::Harvest);
    }

    #[test]
    fn pauses_take_no_more_than_their_share() {
        let began = Instant::now();
        let mut pacer = Pacer::new(PacerConfig::default(), began);
        for _ in 0..64 {
            pacer.sealed(began, Duration::from_millis(8));
        }
        let early = Observation {
            output_since: Some(began),
            ..seen(began + Duration::from_millis(20))
        };
        assert!(matches!(pacer.decide(early), Decision::WaitUntil(_)));
    }

    const MS: Duration = Duration::from_millis(1);

    /// When an epoch ends whose first output came after `waited`, and epochs before were sealed and acknowledged in `usual` each.
    fn end_with_target(target: Option<Duration>, usual: Duration, waited: Duration) -> Duration {
        let began = Instant::now();
        let config = PacerConfig {
            target_latency: target,
            ..PacerConfig::default()
        };
        let mut pacer = Pacer::new(config, began);
        pacer.hurry();
        for _ in 0..256 {
            let ends = Observation {
                now: began + config.interval_max,
                ..seen(began)
            };
            assert_eq!(pacer.decide(ends), Decision::Harvest);
            assert_eq!(pacer.harvested(0), Decision::Seal);
            pacer.sealed(ends.now + usual, Duration::ZERO);
            pacer.acknowledged(usual);
            pacer.began = began;
        }
        let output = Observation {
            output_since: Some(began + waited),
            ..seen(began)
        };
        match pacer.decide(output) {
            Decision::WaitUntil(due) => due - began,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn with_a_target_output_ends_an_epoch_as_late_as_the_target_allows() {
        let (min, max) = (PacerConfig::default().interval_min, PacerConfig::default().interval_max);
        assert_eq!(end_with_target(None, 2 * MS, MS / 2), min, "as without");
        let end = end_with_target(Some(20 * MS), 2 * MS, MS);
        // Two milliseconds to the seal and two to the acknowledgment, of twenty from the output on.
        assert!(end > 16 * MS && end <= 17 * MS, "{end:?}");
        // What can't be met is as without a target; the longest interval holds whatever the target is.
        assert_eq!(end_with_target(Some(3 * MS), 2 * MS, Duration::ZERO), min);
        assert_eq!(end_with_target(Some(200 * MS), 2 * MS, MS), max);
    }

    #[test]
    fn with_a_target_what_can_not_wait_does_not() {
        let began = Instant::now();
        let config = PacerConfig {
            target_latency: Some(40 * MS),
            ..PacerConfig::default()
        };
        let mut pacer = Pacer::new(config, began);
        let output = Observation {
            output_since: Some(began),
            ..seen(began + config.interval_min)
        };
        assert_eq!(pacer.decide(output), Decision::WaitUntil(began + 40 * MS));
        let much = Observation {
            recorded_bytes: config.recorded_bytes_max,
            ..output
        };
        assert_eq!(pacer.decide(much), Decision::Harvest);
    }

    #[test]
    fn a_standby_that_lags_holds_the_next_epoch_back() {
        let began = Instant::now();
        let config = PacerConfig::default();
        let mut pacer = Pacer::new(config, began);
        let lagging = Observation {
            in_flight: config.in_flight_max,
            ..seen(began + config.interval_max)
        };
        assert_eq!(pacer.decide(lagging), Decision::WaitForReport);
    }

    #[test]
    fn a_standby_that_lags_far_behind_holds_the_guest_back() {
        let began = Instant::now();
        let config = PacerConfig::default();
        let mut pacer = Pacer::new(config, began);
        let lagging = Observation {
            in_flight: config.in_flight_max,
            recorded_bytes: config.recorded_bytes_max,
            ..seen(began)
        };
        assert_eq!(pacer.decide(lagging), Decision::HoldBack);
    }

    #[test]
    fn many_dirty_pages_end_it_early() {
        let began = Instant::now();
        let config = PacerConfig::default();
        let mut pacer = Pacer::new(config, began);
        let early = Observation {
            dirty_pages: config.pages_max / 8 * 5,
            ..seen(began + config.interval_min)
        };
        assert!(early.dirty_pages < pacer.room(0), "before the guest is stopped");
        assert_eq!(pacer.decide(early), Decision::Harvest);
    }

    /// Whatever the guest dirties, rounds and end together stay within what an epoch may hold.
    #[test]
    fn an_epoch_never_holds_more_than_it_may() {
        const PAGES_MAX: usize = 8192;
        for dirty in [97, 500, 1000, 2000, 4000, 8000, 1 << 20] {
            let began = Instant::now();
            let config = PacerConfig {
                pages_max: PAGES_MAX,
                ..PacerConfig::default()
            };
            let mut pacer = Pacer::new(config, began);
            pacer.hurry();
            assert_eq!(pacer.decide(seen(began + config.interval_min)), Decision::Harvest);
            let (mut held, mut rounds) = (0, 0);
            loop {
                // The guest writes as much as it wants and is let.
                let written = dirty.min(pacer.room(0));
                held += written;
                if pacer.harvested(written) == Decision::Seal {
                    break;
                }
                rounds += 1;
                pacer.round_sent();
            }
            assert!(held <= PAGES_MAX, "{dirty}: {held}");
            assert!(
                rounds > 0,
                "{dirty}: what can be sent while the guest runs is not copied in the pause"
            );
        }
    }

    #[test]
    fn a_guest_that_outruns_the_rounds_is_braked_and_then_sealed() {
        let began = Instant::now();
        let config = PacerConfig::default();
        let mut pacer = Pacer::new(config, began);
        let mut brakes = Vec::new();
        pacer.hurry();
        assert_eq!(pacer.decide(seen(began + config.interval_min)), Decision::Harvest);
        loop {
            match pacer.harvested(config.residue_pages + 1) {
                Decision::SendRound => brakes.push(0),
                Decision::Throttle(percent) => brakes.push(percent),
                Decision::Seal => break,
                other => panic!("{other:?}"),
            }
            assert_eq!(pacer.decide(seen(began)), Decision::WaitForReport);
            pacer.round_sent();
            assert_eq!(pacer.decide(seen(began)), Decision::Harvest);
        }
        assert_eq!(brakes.len() as u32, config.rounds_max);
        assert!(brakes.is_sorted(), "the brake only gets harder: {brakes:?}");
        assert_eq!(brakes.last(), Some(&90));
    }
}
