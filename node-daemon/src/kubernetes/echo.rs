//! Whether a seat's pod still says what was written there. A restored backup, a person or another program may have changed it since, and what is
//! published is written at its next change alone. Nothing is asked for this: the watch of this node's pods tells.
//!
//! ```text
//!   the pod says something else ─┬─ it is newer than the own write ──► somebody changed it: written again at once
//!                                └─ older, or of no known order ─► 10 s ─► no watch that lags, but a backup: written again
//! ```
//!
//! Against somebody who goes on changing it, it is written again later and later, to a bound.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use ftvm_crds::names::LABEL_ROLE;
use ftvm_crds::seat::{AnnotationError, SeatPublished};
use serde_json::{Map, Value};

/// A watch tells of an own write within this time. After it, what the watch has is what the API server has. A write that changes nothing is none for
/// the API server, should the watch lag by more.
const WATCH_LAGS: Duration = Duration::from_secs(10);
/// Pauses between two writes of what was changed: the first, and the longest. They double.
const PAUSE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(600));

/// The pod says something else than what was written.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Differs {
    what: String,
    version: Option<u64>,
    since: Instant,
}

/// What is known of one pod. Versions are resourceVersions as numbers, which grow (Kubernetes API concepts, "Resource versions").
#[derive(Debug, Default)]
pub struct Echo {
    /// The newest version of the pod that had what was written.
    own: Option<u64>,
    /// The version that was looked at last, and compared with what was written.
    seen: Option<u64>,
    differs: Option<Differs>,
    /// Pause after the last write of what was changed, and when that was.
    pause: Duration,
    last: Option<Instant>,
}

impl Echo {
    /// Is there anything to compare in this version of the pod?
    pub fn is_news(&self, version: Option<u64>) -> bool {
        version.is_none() || version != self.seen
    }

    /// The watch has the pod in this version, and it differs so from what was written; none: it says what was written.
    pub fn saw(&mut self, version: Option<u64>, what: Option<String>, now: Instant) {
        self.seen = version;
        let Some(what) = what else {
            self.own = self.own.max(version);
            self.differs = None;
            return;
        };
        let known = self.differs.as_ref().filter(|known| known.version == version);
        // A watch that lags and moves on has its time anew.
        let since = known.map_or(now, |known| known.since);
        self.differs = Some(Differs { what, version, since });
    }

    /// What differs, if it is to be written again now.
    pub fn due(&self, now: Instant) -> Option<&str> {
        let differs = self.differs.as_ref()?;
        let newer = differs
            .version
            .zip(self.own)
            .is_some_and(|(version, own)| version > own);
        let certain = newer || now.saturating_duration_since(differs.since) >= WATCH_LAGS;
        let paused = self
            .last
            .is_some_and(|last| now.saturating_duration_since(last) < self.pause);
        (certain && !paused).then_some(differs.what.as_str())
    }

    /// Something was written, which gave the pod this version.
    pub fn wrote(&mut self, version: Option<u64>, now: Instant) {
        if self.due(now).is_some() {
            let calm = PAUSE.1 + self.pause;
            let recent = self.last.is_some_and(|last| now.saturating_duration_since(last) < calm);
            self.pause = if recent {
                (2 * self.pause).clamp(PAUSE.0, PAUSE.1)
            } else {
                PAUSE.0
            };
            self.last = Some(now);
        }
        // What the API server answers to an own write is newer than all that was seen, also where it counts anew after a backup.
        self.own = version.or(self.own);
        (self.seen, self.differs) = (None, None);
    }
}

/// How a pod, with this annotation and this label, differs from what was written: names of fields; none if it does not.
pub fn difference(
    written: (&SeatPublished, Option<&str>),
    found: (&Result<SeatPublished, AnnotationError>, Option<&str>),
) -> Option<String> {
    let (published, label) = written;
    let annotation = match found.0 {
        Err(error) => Some(error.to_string()),
        Ok(there) if there == published => None,
        Ok(there) => Some(format!("{} of its status", fields(published, there))),
    };
    let label = (found.1 != label).then(|| format!("label {LABEL_ROLE}"));
    let both: Vec<_> = annotation.into_iter().chain(label).collect();
    (!both.is_empty()).then(|| both.join(", "))
}

/// Names of the fields that differ.
fn fields(one: &SeatPublished, other: &SeatPublished) -> String {
    let [one, other] = [one, other].map(|published| match serde_json::to_value(published) {
        Ok(Value::Object(fields)) => fields,
        // Plain data with text keys always encodes.
        _ => Map::new(),
    });
    let names: BTreeSet<&str> = one.keys().chain(other.keys()).map(String::as_str).collect();
    let differing = names.into_iter().filter(|name| one.get(*name) != other.get(*name));
    differing.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use ftvm_crds::names::ROLE_ACTIVE;
    use ftvm_crds::seat::SeatRole;

    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn other() -> Option<String> {
        Some("term of its status".to_owned())
    }

    #[test]
    fn what_somebody_changed_since_is_written_again_at_once() {
        let (mut echo, now) = (Echo::default(), Instant::now());
        echo.wrote(Some(57), now);
        echo.saw(Some(57), None, now);
        assert_eq!(echo.due(now + seconds(3600)), None, "at rest nothing is written");
        // Somebody else writes the pod, and leaves that alone: kubelet does.
        echo.saw(Some(60), None, now);
        echo.saw(Some(61), other(), now);
        assert_eq!(echo.due(now), Some("term of its status"));
        echo.wrote(Some(62), now);
        assert_eq!(echo.due(now + seconds(3600)), None);
    }

    /// The same version and the same words as of a watch that lags: only that it stays so tells them apart.
    #[test]
    fn an_own_write_that_the_watch_has_not_told_yet_is_no_change() {
        let (mut echo, now) = (Echo::default(), Instant::now());
        echo.saw(Some(41), None, now);
        echo.wrote(Some(57), now);
        assert!(
            echo.is_news(Some(41)),
            "it has to be compared with what was written since"
        );
        echo.saw(Some(41), other(), now);
        assert_eq!(echo.due(now + seconds(9)), None, "a watch that lags");
        // It moves on: kubelet wrote in between.
        echo.saw(Some(50), other(), now + seconds(9));
        assert_eq!(echo.due(now + seconds(18)), None);
        echo.saw(Some(57), None, now + seconds(18));
        assert_eq!(echo.due(now + seconds(3600)), None);
        // And one that stays there is of a backup.
        echo.saw(Some(41), other(), now);
        assert!(!echo.is_news(Some(41)), "nothing to compare at each look");
        assert_eq!(echo.due(now + seconds(10)), Some("term of its status"));
    }

    #[test]
    fn a_watch_without_versions_has_its_time() {
        let (mut echo, now) = (Echo::default(), Instant::now());
        echo.wrote(None, now);
        for second in 0..10 {
            assert!(echo.is_news(None));
            echo.saw(None, other(), now + seconds(second));
            assert_eq!(echo.due(now + seconds(second)), None);
        }
        assert!(echo.due(now + seconds(10)).is_some());
    }

    #[test]
    fn against_somebody_who_keeps_writing_it_is_written_later_and_later() {
        let (mut echo, begin) = (Echo::default(), Instant::now());
        let (mut now, mut version) = (begin, 1);
        echo.wrote(Some(version), now);
        let mut pauses = Vec::new();
        let mut last = now;
        while pauses.len() < 12 {
            // Each second.
            version += 1;
            echo.saw(Some(version), other(), now);
            if echo.due(now).is_some() {
                version += 1;
                echo.wrote(Some(version), now);
                pauses.push(now.duration_since(last).as_secs());
                last = now;
            }
            now += seconds(1);
        }
        assert_eq!(pauses, [0, 5, 10, 20, 40, 80, 160, 320, 600, 600, 600, 600]);
        // Once it was left alone for long, it is written at once again, and then after the first pause.
        now = last + PAUSE.1 + PAUSE.1;
        for _ in 0..2 {
            version += 1;
            echo.saw(Some(version), other(), now);
            assert!(echo.due(now).is_some());
            version += 1;
            echo.wrote(Some(version), now);
            now += PAUSE.0;
        }
    }

    /// What is written for its own sake waits for nobody, and counts for nothing.
    #[test]
    fn other_writes_end_a_difference_too() {
        let (mut echo, now) = (Echo::default(), Instant::now());
        echo.wrote(Some(57), now);
        echo.saw(Some(41), other(), now);
        echo.wrote(Some(58), now);
        echo.saw(Some(58), None, now);
        echo.saw(Some(59), other(), now);
        assert!(echo.due(now).is_some(), "there was no pause before");
    }

    /// A store that was restored without its counter bumped.
    #[test]
    fn versions_may_begin_anew() {
        let (mut echo, now) = (Echo::default(), Instant::now());
        echo.wrote(Some(57), now);
        echo.saw(Some(11), other(), now);
        let later = now + WATCH_LAGS;
        assert!(echo.due(later).is_some());
        echo.wrote(Some(12), later);
        echo.saw(Some(12), None, later);
        echo.saw(Some(13), other(), later + PAUSE.0);
        assert!(echo.due(later + PAUSE.0).is_some());
    }

    #[test]
    fn what_differs_is_named() {
        let written = SeatPublished {
            role: Some(SeatRole::Active),
            term: 5,
            ..SeatPublished::default()
        };
        let label = Some(ROLE_ACTIVE);
        let same = Ok(written.clone());
        assert_eq!(difference((&written, label), (&same, label)), None);
        assert_eq!(
            difference((&written, label), (&same, None)).as_deref(),
            Some("label ftvm.dev/role")
        );
        let old = Ok(SeatPublished {
            term: 4,
            look: Some("x".to_owned()),
            ..written.clone()
        });
        assert_eq!(
            difference((&written, label), (&old, Some("standby"))).as_deref(),
            Some("look, term of its status, label ftvm.dev/role")
        );
        let nonsense = Err(AnnotationError::TooLong {
            annotation: "ftvm.dev/seat-status",
            length_bytes: 9000,
        });
        let told = difference((&written, label), (&nonsense, label)).unwrap();
        assert!(told.contains("9000 bytes"), "{told}");
    }
}
