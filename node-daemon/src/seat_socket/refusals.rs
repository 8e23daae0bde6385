//! What the log gets of programs that are refused. They call again twice a second, mostly with the same outcome until somebody mends its cause.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use ftvm_protocol::identity::SeatId;

/// What stays the same is logged again after this time.
const AGAIN: Duration = Duration::from_secs(60);
/// Lines of one pod within that time: for what a hostile program is refused, it chooses itself.
const LINES_MAX: usize = 8;
/// Letters of a reason. It may contain what the program sent: the field of a message that nobody knows, say.
const WHY_CHARS_MAX: usize = 1000;

/// What was logged of a pod.
#[derive(Default)]
struct Told {
    /// What the last line says.
    why: String,
    /// When lines were written, the last one at the end.
    lines: Vec<Instant>,
    /// Refusals since the last one.
    left_out: u64,
}

/// What was logged of each pod, and of programs that are in none. A program that calls, every 30 s at least, gets a line every 90 s: a pod without
/// one for two minutes is forgotten, so there are no more than the node had in that time.
#[derive(Default)]
pub struct Refusals(Mutex<BTreeMap<Option<SeatId>, Told>>);

impl Refusals {
    /// A program of this pod is refused: what the log gets of that, if anything.
    pub fn line(&self, pod: Option<SeatId>, why: &str, now: Instant) -> Option<String> {
        let why: String = why.chars().filter(|c| !c.is_control()).take(WHY_CHARS_MAX).collect();
        let age = |line: &Instant| now.saturating_duration_since(*line);
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, told| told.lines.last().is_some_and(|last| age(last) < 2 * AGAIN));
        let told = all.entry(pod).or_default();
        told.lines.retain(|line| age(line) < AGAIN);
        let is_news = told.lines.is_empty() || told.why != why;
        if !is_news || told.lines.len() >= LINES_MAX {
            told.left_out += 1;
            return None;
        }
        told.lines.push(now);
        told.why.clone_from(&why);
        Some(match std::mem::take(&mut told.left_out) {
            0 => why,
            left_out => format!("{why} (left out since the last line: {left_out})"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: Option<SeatId> = Some(SeatId(1));

    #[test]
    fn what_stays_the_same_is_logged_once_a_minute() {
        let (refusals, begin) = (Refusals::default(), Instant::now());
        let calls = (0..1200_u32).map(|call| begin + call * Duration::from_millis(500));
        let lines: Vec<String> = calls.filter_map(|now| refusals.line(POD, "no seat", now)).collect();
        let mut expected = vec!["no seat (left out since the last line: 119)"; 10];
        expected[0] = "no seat";
        assert_eq!(lines, expected);
    }

    #[test]
    fn another_reason_and_another_pod_are_logged_at_once() {
        let (refusals, begin) = (Refusals::default(), Instant::now());
        let at = |second| begin + Duration::from_secs(second);
        let line = |pod, why: &str, second| refusals.line(pod, why, at(second));
        assert_eq!(line(POD, "a", 0).as_deref(), Some("a"));
        assert_eq!(line(POD, "a", 1), None);
        assert_eq!(line(Some(SeatId(2)), "a", 1).as_deref(), Some("a"));
        assert_eq!(line(None, "a", 1).as_deref(), Some("a"));
        assert_eq!(
            line(POD, "b", 2).as_deref(),
            Some("b (left out since the last line: 1)")
        );
        assert_eq!(line(POD, "a", 3).as_deref(), Some("a"));
        // A minute after the last line, not after the first one.
        assert_eq!(line(POD, "a", 62), None);
        assert_eq!(
            line(POD, "a", 63).as_deref(),
            Some("a (left out since the last line: 1)")
        );
    }

    #[test]
    fn reasons_that_change_at_every_call_are_bounded() {
        let (refusals, begin) = (Refusals::default(), Instant::now());
        let lines_max = u32::try_from(LINES_MAX).unwrap();
        for minute in 0..3_u32 {
            let calls = 0..1000_u32;
            let lines = calls.filter(|call| {
                let now = begin + minute * AGAIN + Duration::from_millis((*call).into());
                refusals.line(POD, &format!("process {minute} {call}"), now).is_some()
            });
            assert_eq!(lines.count(), LINES_MAX, "minute {minute}");
        }
        // The last one is logged as soon as there is room.
        let now = begin + 3 * AGAIN;
        let left_out = 1000 - lines_max;
        let expected = format!("the last (left out since the last line: {left_out})");
        assert_eq!(refusals.line(POD, "the last", now), Some(expected));
    }

    #[test]
    fn a_program_writes_neither_long_lines_nor_lines_of_its_own() {
        let (refusals, now) = (Refusals::default(), Instant::now());
        let sent = format!("unknown field `\n\u{1b}[2J{}`", "x".repeat(100_000));
        let line = refusals.line(POD, &sent, now).unwrap();
        assert!(line.starts_with("unknown field `[2Jxxx") && line.len() == WHY_CHARS_MAX);
        let kept = |text: &Told| text.why.len();
        assert_eq!(
            refusals.0.lock().unwrap().values().map(kept).sum::<usize>(),
            WHY_CHARS_MAX
        );
        assert_eq!(refusals.line(POD, &sent, now), None, "it is known");
    }

    #[test]
    fn pods_that_call_no_more_are_forgotten() {
        let (refusals, begin) = (Refusals::default(), Instant::now());
        for pod in 0..100 {
            refusals.line(Some(SeatId(pod)), "no seat", begin);
        }
        let known = || refusals.0.lock().unwrap().len();
        assert_eq!(known(), 100);
        refusals.line(POD, "no seat", begin + AGAIN);
        assert_eq!(known(), 100);
        refusals.line(POD, "no seat", begin + 2 * AGAIN);
        assert_eq!(known(), 1);
    }
}
