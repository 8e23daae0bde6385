//! What QEMU traces with `-trace EVENT -msg timestamp=on -D FILE`, one line each: `PID@SECONDS.MICROS:EVENT WORDS`.

/// The events that are traced: few, so that tracing costs nothing.
pub const EVENTS: [&str; 2] = ["runstate_set", "colo_vm_state_change"];

/// What a line says of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// It is about to be stopped, for a checkpoint or the end of a migration.
    Stopping,
    /// It is about to run.
    Starting,
    /// After a checkpoint it runs again, all of it.
    ColoRuns,
}

/// One line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line {
    /// When, in microseconds since 1970.
    pub unix_us: u64,
    /// What.
    pub what: What,
}

impl Line {
    /// None if the line is of no interest.
    pub fn parse(text: &str) -> Option<Self> {
        let (_, rest) = text.split_once('@')?;
        let (time, event) = rest.split_once(':')?;
        let (seconds, micros) = time.split_once('.')?;
        let unix_us = seconds.parse::<u64>().ok()? * 1_000_000 + micros.parse::<u64>().ok()?;
        let what = match event.split_once(' ')? {
            ("runstate_set", words) => of_runstate(words)?,
            ("colo_vm_state_change", words) if words.ends_with("'run'") => What::ColoRuns,
            _ => return None,
        };
        Some(Self { unix_us, what })
    }
}

/// `current_run_state N (NAME) new_state N (NAME)`
fn of_runstate(words: &str) -> Option<What> {
    let mut names = words
        .split('(')
        .skip(1)
        .filter_map(|word| Some(word.split_once(')')?.0));
    match (names.next()?, names.next()?) {
        ("running", "colo" | "finish-migrate") => Some(What::Stopping),
        (_, "running") => Some(What::Starting),
        _ => None,
    }
}

/// Pauses of COLO's checkpoints that began in a window: from QEMU's order to stop until everything runs again.
pub fn colo_pauses(lines: &[Line], from_unix_us: u64, to_unix_us: u64) -> Vec<u64> {
    let mut stopped = None;
    let mut pauses = Vec::new();
    for line in lines {
        match line.what {
            What::Stopping => stopped = Some(line.unix_us),
            What::Starting => {}
            What::ColoRuns => {
                let began = stopped
                    .take()
                    .filter(|began| (from_unix_us..to_unix_us).contains(began));
                pauses.extend(began.map(|began| line.unix_us.saturating_sub(began)));
            }
        }
    }
    pauses
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
17229@1795377663.037120:runstate_set current_run_state 6 (prelaunch) new_state 9 (running)
18546@1795377799.000100:runstate_set current_run_state 9 (running) new_state 15 (colo)
18546@1795377799.000900:colo_vm_state_change Change 'run' => 'stop'
18546@1795377799.071280:runstate_set current_run_state 15 (colo) new_state 9 (running)
18546@1795377799.071420:colo_vm_state_change Change 'stop' => 'run'
2026-11-22T20:02:18.908864Z qemu-system-x86_64: Can't receive COLO message: Input/output error
18546@1795377799.200000:runstate_set current_run_state 9 (running) new_state 15 (colo)
";

    #[test]
    fn lines_of_interest_are_read() {
        let lines: Vec<Line> = TEXT.lines().filter_map(Line::parse).collect();
        let what: Vec<What> = lines.iter().map(|line| line.what).collect();
        use What::{ColoRuns, Starting, Stopping};
        assert_eq!(what, [Starting, Stopping, Starting, ColoRuns, Stopping]);
        assert_eq!(lines[0].unix_us, 1_795_377_663_037_120);
    }

    #[test]
    fn a_pause_is_from_the_order_to_stop_until_all_runs() {
        let lines: Vec<Line> = TEXT.lines().filter_map(Line::parse).collect();
        assert_eq!(colo_pauses(&lines, 0, u64::MAX), [71_320]);
        assert!(colo_pauses(&lines, 1_795_377_799_000_101, u64::MAX).is_empty());
    }
}
