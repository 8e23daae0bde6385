//! Counts tests from what test programs print.
use std::ops::AddAssign;

use super::runner::Ending;

/// Tests that passed, and the names of those that did not.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub passed: usize,
    pub failures: Vec<String>,
    /// Failed tests in summaries whose names were not seen.
    unnamed: usize,
}

impl Tally {
    /// Takes one line of output: `test NAME ... ok|FAILED|ignored`, or a summary `… result: ok. 3 passed; 0 failed; …`.
    pub fn line(&mut self, line: &str) {
        if let Some(rest) = line.strip_prefix("test ")
            && let Some((name, result)) = rest.rsplit_once(" ... ")
        {
            match result.split([' ', ',']).next() {
                Some("FAILED") => self.failures.push(name.to_owned()),
                // A test that is not run proves nothing, and nobody notices.
                Some("ignored") => self.failures.push(format!("{name} (skipped)")),
                _ => {}
            }
        } else if let Some(counts) = summary(line) {
            self.passed += counts[0];
            self.unnamed += counts[1] + counts[2];
        }
    }

    /// Adds a failure that is not a test's own.
    pub fn fail(&mut self, what: String) {
        self.failures.push(what);
    }

    /// Settles the account when the command has ended.
    pub fn close(&mut self, command: &str, ending: Ending) {
        for _ in self.failures.len()..self.unnamed {
            self.failures.push(format!("a test of `{command}`, see above"));
        }
        self.unnamed = 0;
        match ending {
            Ending::Code(0) => {}
            Ending::Code(_) if !self.failures.is_empty() => {}
            Ending::Code(code) => self.fail(format!("`{command}` ended with code {code}")),
            Ending::Signal => self.fail(format!("`{command}` was killed")),
            Ending::Late => self.fail(format!("`{command}` did not end in time and was killed")),
        }
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failures.extend(other.failures);
        self.unnamed += other.unnamed;
    }
}

/// The numbers of passed, failed and ignored tests.
fn summary(line: &str) -> Option<[usize; 3]> {
    let (_, counts) = line.split_once(" result: ")?;
    let (_, counts) = counts.split_once(". ")?;
    let mut numbers = counts.split("; ").map(|part| part.split_once(' '));
    let mut next = |word: &str| {
        let (number, name) = numbers.next()??;
        (name.trim_end_matches(';') == word).then(|| number.parse().ok())?
    };
    Some([next("passed")?, next("failed")?, next("ignored")?])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(lines: &[&str], ending: Ending) -> Tally {
        let mut tally = Tally::default();
        lines.iter().for_each(|line| tally.line(line));
        tally.close("c", ending);
        tally
    }

    #[test]
    fn a_good_run() {
        let lines = [
            "test a::b ... ok",
            "test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 3 filtered out",
        ];
        assert_eq!(
            tally(&lines, Ending::Code(0)),
            Tally {
                passed: 1,
                ..Tally::default()
            }
        );
    }

    #[test]
    fn failures_and_skipped_tests_count_once_with_their_names() {
        let lines = [
            "test a ... FAILED",
            "test b ... ignored",
            "test result: FAILED. 4 passed; 1 failed; 1 ignored; 0 measured",
        ];
        assert_eq!(tally(&lines, Ending::Code(101)).failures, ["a", "b (skipped)"]);
        // With --nocapture the name and its result stand on different lines.
        assert_eq!(tally(&lines[2..], Ending::Code(101)).failures.len(), 2);
    }

    #[test]
    fn a_command_that_ends_badly_is_a_failure_even_without_tests() {
        assert_eq!(tally(&[], Ending::Code(101)).failures.len(), 1);
        assert_eq!(
            tally(&["test result: ok. 1 passed; 0 failed; 0 ignored;"], Ending::Late)
                .failures
                .len(),
            1
        );
        assert_eq!(
            tally(
                &["check result: FAILED. 4 passed; 1 failed; 0 ignored;"],
                Ending::Code(1)
            )
            .failures
            .len(),
            1
        );
    }
}
