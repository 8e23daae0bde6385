//! What a pause consists of: the time of each step, and the slowest pauses of late with their steps.

use std::time::{Duration, Instant};

use serde_json::{Map, Value};

/// A part of a pause; the order is the one in which they are done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Until every vCPU's thread has left the guest.
    Park,
    /// Until the last vCPU has saved its state, which all do at once.
    Vcpus,
    /// Until no device thread touches the guest.
    Devices,
    /// Interrupt controllers, clock and devices were saved.
    State,
    /// The pages written since the last harvest were found.
    Harvest,
    /// They, the output and the changes of disks were copied.
    Copy,
    /// The core was told, and what it ordered was done.
    Core,
    /// The guest was let run on.
    Resume,
}

const STEPS: [(Step, &str); 8] = [
    (Step::Park, "park_us"),
    (Step::Vcpus, "vcpus_us"),
    (Step::Devices, "devices_us"),
    (Step::State, "state_us"),
    (Step::Harvest, "harvest_us"),
    (Step::Copy, "copy_us"),
    (Step::Core, "core_us"),
    (Step::Resume, "resume_us"),
];

/// Measures one pause.
#[derive(Debug, Clone)]
pub struct PauseClock {
    began: Instant,
    last: Instant,
    steps: [Duration; STEPS.len()],
}

impl PauseClock {
    /// The guest is about to be told to stop.
    pub fn start() -> Self {
        let began = Instant::now();
        Self {
            began,
            last: began,
            steps: [Duration::ZERO; STEPS.len()],
        }
    }

    /// A step is done.
    pub fn done(&mut self, step: Step) {
        let now = Instant::now();
        self.steps[step as usize] += now - self.last;
        self.last = now;
    }

    /// Both steps in which the driver waits for vCPUs are done; the vCPU that took longest to save its state took `save`.
    pub fn parked(&mut self, save: Duration) {
        let now = Instant::now();
        let both = now - self.last;
        let save = save.min(both);
        self.steps[Step::Park as usize] += both - save;
        self.steps[Step::Vcpus as usize] += save;
        self.last = now;
    }

    /// The guest runs since `at`, as its vCPUs say: the last step ended then.
    pub fn runs_since(&mut self, at: Instant) {
        let resume = &mut self.steps[Step::Resume as usize];
        let before = self.last - *resume;
        *resume = at.saturating_duration_since(before);
        self.last = before + *resume;
    }

    /// From the start to the last step.
    pub fn total(&self) -> Duration {
        self.last - self.began
    }
}

/// A pause that is over.
#[derive(Debug, Clone)]
struct Pause {
    epoch: u64,
    residue_pages: usize,
    clock: PauseClock,
}

/// How many are kept, and among how many at least the slowest are sought.
const KEPT: usize = 8;
const PERIOD: usize = 1000;

/// The slowest pauses of the last one or two thousand.
#[derive(Debug, Default)]
pub struct SlowestPauses {
    current: Vec<Pause>,
    before: Vec<Pause>,
    seen: usize,
}

impl SlowestPauses {
    /// The pause at the end of `epoch` is over; so many pages were copied in it.
    pub fn add(&mut self, epoch: u64, residue_pages: usize, clock: &PauseClock) {
        if self.seen == PERIOD {
            self.before = std::mem::take(&mut self.current);
            self.seen = 0;
        }
        self.seen += 1;
        let faster = |pause: &Pause| pause.clock.total() < clock.total();
        let place = self.current.iter().position(faster).unwrap_or(self.current.len());
        if place < KEPT {
            self.current.truncate(KEPT - 1);
            let clock = clock.clone();
            self.current.insert(
                place,
                Pause {
                    epoch,
                    residue_pages,
                    clock,
                },
            );
        }
    }

    /// For the status, slowest first: microseconds in all and of each step.
    pub fn to_json(&self) -> Value {
        let mut pauses: Vec<&Pause> = self.current.iter().chain(&self.before).collect();
        pauses.sort_by_key(|pause| std::cmp::Reverse(pause.clock.total()));
        pauses.truncate(KEPT);
        pauses.into_iter().map(json_of).collect()
    }
}

fn json_of(pause: &Pause) -> Value {
    let us = |duration: Duration| Value::from(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX));
    let mut fields = Map::new();
    fields.insert("epoch".to_owned(), pause.epoch.into());
    fields.insert("us".to_owned(), us(pause.clock.total()));
    fields.insert("residue_pages".to_owned(), pause.residue_pages.into());
    for (step, name) in STEPS {
        fields.insert(name.to_owned(), us(pause.clock.steps[step as usize]));
    }
    Value::Object(fields)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pause(us: u64) -> PauseClock {
        let mut clock = PauseClock::start();
        clock.last = clock.began + Duration::from_micros(us);
        clock.steps[Step::Copy as usize] = Duration::from_micros(us);
        clock
    }

    fn times(slowest: &SlowestPauses) -> Vec<u64> {
        let json = slowest.to_json();
        let pauses = json.as_array().expect("an array");
        pauses
            .iter()
            .map(|pause| pause["us"].as_u64().expect("a number"))
            .collect()
    }

    #[test]
    fn the_slowest_are_kept_in_order_and_old_ones_go() {
        let mut slowest = SlowestPauses::default();
        slowest.add(0, 0, &pause(9_999));
        for us in 1..PERIOD as u64 {
            slowest.add(us, 1, &pause(us));
        }
        assert_eq!(times(&slowest), [9_999, 999, 998, 997, 996, 995, 994, 993]);
        (0..PERIOD as u64).for_each(|_| slowest.add(0, 0, &pause(5)));
        assert_eq!(times(&slowest)[0], 9_999, "still of the last two thousand");
        slowest.add(0, 0, &pause(6));
        assert_eq!(times(&slowest)[..2], [6, 5]);
    }

    #[test]
    fn a_pause_ends_when_the_guest_runs() {
        let mut clock = PauseClock::start();
        clock.done(Step::Core);
        let ordered = clock.last;
        clock.done(Step::Resume);
        for after in [Duration::from_millis(3), Duration::ZERO] {
            clock.runs_since(ordered + after);
            assert_eq!(clock.steps[Step::Resume as usize], after);
            assert_eq!(clock.total(), ordered + after - clock.began);
        }
    }

    #[test]
    fn steps_add_up_to_the_whole() {
        let mut clock = PauseClock::start();
        clock.parked(Duration::from_secs(60));
        clock.done(Step::Devices);
        clock.done(Step::Resume);
        assert_eq!(
            clock.steps[Step::Park as usize],
            Duration::ZERO,
            "no longer than it took"
        );
        assert_eq!(clock.steps.iter().sum::<Duration>(), clock.total());
    }
}
