//! Counts tests from what test programs print, and keeps why one failed: its output may be longer than anybody keeps.
use std::fmt::Write as _;
use std::ops::AddAssign;

use super::runner::Ending;

/// Lines of an error that are kept: those that begin it say what, the last ones why.
const FIRST_LINES: usize = 3;
const LAST_LINES: usize = 12;
/// Characters of each.
const LINE_CHARACTERS: usize = 300;

/// Tests that passed, and the names of those that did not.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub passed: usize,
    pub failures: Vec<String>,
    /// Failed tests in summaries whose names were not seen.
    unnamed: usize,
    /// The outputs of failed tests, as the test program repeats them in the end.
    outputs: Vec<Output>,
    /// The last of them is being told.
    in_output: bool,
}

/// What a failed test printed: its error.
#[derive(Debug, PartialEq, Eq)]
struct Output {
    test: String,
    error: Vec<String>,
}

impl Output {
    fn line(&mut self, line: &str) {
        let begins = line.starts_with("Error: ") || line.contains(" panicked at ");
        if begins || !self.error.is_empty() {
            self.error.push(line.chars().take(LINE_CHARACTERS).collect());
        }
    }

    /// The test's name, and its error below it.
    fn excerpt(&self) -> String {
        let mut text = self.test.clone();
        let mut error: Vec<&str> = self.error.iter().map(|line| line.trim_end()).collect();
        error.retain(|line| !line.is_empty());
        let left_out = FIRST_LINES..error.len().saturating_sub(LAST_LINES).max(FIRST_LINES);
        for (number, line) in error.iter().enumerate() {
            if !left_out.contains(&number) {
                let _ = write!(text, "\n      {line}");
            } else if number == left_out.start {
                let _ = write!(text, "\n      ({} lines are left out)", left_out.len());
            }
        }
        text
    }
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
            self.in_output = false;
            self.passed += counts[0];
            self.unnamed += counts[1] + counts[2];
        } else if let Some(test) = line
            .strip_prefix("---- ")
            .and_then(|rest| rest.strip_suffix(" stdout ----"))
        {
            self.in_output = true;
            let (test, error) = (test.to_owned(), Vec::new());
            self.outputs.push(Output { test, error });
        } else if line == "failures:" {
            self.in_output = false;
        } else if let Some(output) = self.outputs.last_mut().filter(|_| self.in_output) {
            output.line(line);
        }
    }

    /// Adds a failure that is not a test's own.
    pub fn fail(&mut self, what: String) {
        self.failures.push(what);
    }

    /// Settles the account when the command has ended.
    pub fn close(&mut self, command: &str, ending: Ending) {
        for output in std::mem::take(&mut self.outputs) {
            // A name and its result may stand on different lines, with what the test printed between them.
            match self.failures.iter_mut().find(|name| **name == output.test) {
                Some(failure) => *failure = output.excerpt(),
                None => self.failures.push(output.excerpt()),
            }
        }
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
        self.outputs.extend(other.outputs);
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
    fn a_failed_test_is_told_with_the_ends_of_its_error() {
        let long: Vec<String> = (0..40).map(|number| format!("table {number}")).collect();
        let mut lines = vec![
            "test one ... [ 1.0 s] at work",
            "FAILED",
            "test two ... FAILED",
            "failures:",
            "---- one stdout ----",
            "printed before",
            "Error: NAME STATUS",
        ];
        lines.extend(long.iter().map(String::as_str));
        lines.extend([
            "Caused by:",
            "    0: why",
            "",
            "---- two stdout ----",
            "thread 'two' (7) panicked at a.rs:1:2:",
            "words",
            "",
            "failures:",
            "    one",
            "    two",
            "test result: FAILED. 0 passed; 2 failed; 0 ignored; 0 measured",
        ]);
        let failures = tally(&lines, Ending::Code(101)).failures;
        assert_eq!(
            failures[0],
            "two\n      thread 'two' (7) panicked at a.rs:1:2:\n      words"
        );
        let lines: Vec<&str> = failures[1].lines().map(str::trim_start).collect();
        assert_eq!(
            lines[..5],
            [
                "one",
                "Error: NAME STATUS",
                "table 0",
                "table 1",
                "(28 lines are left out)"
            ]
        );
        assert_eq!(
            (lines[5], lines.last(), failures.len()),
            ("table 30", Some(&"0: why"), 2)
        );
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
