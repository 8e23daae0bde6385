//! How often somebody is told how far something is.

use std::time::{Duration, Instant};

/// No oftener than this, and only what is new.
const PAUSE: Duration = Duration::from_secs(2);

/// What was told last, and when.
#[derive(Debug, Default)]
pub struct Pace(Option<(String, Instant)>);

impl Pace {
    /// Is this to be told now? If so it counts as told.
    pub fn is_news(&mut self, text: &str, now: Instant) -> bool {
        let news = self
            .0
            .as_ref()
            .is_none_or(|(told, at)| told != text && now.saturating_duration_since(*at) >= PAUSE);
        if news {
            self.0 = Some((text.to_owned(), now));
        }
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn news_are_told_and_not_too_often() {
        let (mut pace, begin) = (Pace::default(), Instant::now());
        let mut at = |ms: u64, text: &str| pace.is_news(text, begin + Duration::from_millis(ms));
        assert!(at(0, "10 %"));
        assert!(!at(1_900, "20 %"));
        assert!(at(2_000, "30 %"));
        assert!(!at(9_000, "30 %"));
        assert!(at(9_001, "40 %"));
    }
}
