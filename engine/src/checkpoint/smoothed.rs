//! What a duration usually is, and how far it strays: moving averages as TCP keeps them of its round trips (RFC 6298).

use std::time::Duration;

/// A mean and a mean deviation.
#[derive(Debug, Clone, Copy, Default)]
pub struct Smoothed(Option<(Duration, Duration)>);

impl Smoothed {
    /// Takes in one.
    pub fn add(&mut self, sample: Duration) {
        self.0 = Some(match self.0 {
            None => (sample, sample / 2),
            Some((mean, deviation)) => {
                let error = mean.abs_diff(sample);
                ((mean * 7 + sample) / 8, (deviation * 3 + error) / 4)
            }
        });
    }

    /// What most do not exceed; zero as long as nothing is known.
    pub fn upper(&self) -> Duration {
        self.0.map_or(Duration::ZERO, |(mean, deviation)| mean + 2 * deviation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn most_samples_lie_below_and_one_that_strays_is_forgotten() {
        let mut smoothed = Smoothed::default();
        assert_eq!(smoothed.upper(), Duration::ZERO);
        let ms = |n: u64| Duration::from_millis(n % 4 + 2);
        for n in 0..200 {
            smoothed.add(ms(n));
        }
        let upper = smoothed.upper();
        assert!(
            upper >= Duration::from_millis(4) && upper < Duration::from_millis(8),
            "{upper:?}"
        );
        smoothed.add(Duration::from_millis(500));
        assert!(smoothed.upper() > Duration::from_millis(60));
        for n in 0..64 {
            smoothed.add(ms(n));
        }
        assert!(smoothed.upper() < Duration::from_millis(9), "{:?}", smoothed.upper());
    }
}
