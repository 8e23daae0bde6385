//! What kind of bad luck a seed has. Each seed draws its own mixture, so that rare combinations are not averaged away.

use crate::rng::Rng;

/// Rates and kinds of faults of one run.
#[derive(Debug, Clone)]
pub struct Profile {
    /// Messages lost, in percent.
    pub loss_percent: u64,
    /// Messages delayed by up to 40 ms.
    pub late_percent: u64,
    /// Messages that come twice.
    pub twice_percent: u64,
    /// Late messages are overtaken instead of holding up those behind them.
    pub reorders: bool,
    /// A cut holds messages back instead of losing them.
    pub cut_delays: bool,
    /// Longest way to the arbiter or back.
    pub arbiter_delay_ms: u64,
    /// Answers of the arbiter that are lost.
    pub answer_lost_percent: u64,
    /// Writes that arrive after their deadline.
    pub put_late_percent: u64,
    /// Header writes that fail.
    pub header_fails_percent: u64,
    /// Switchovers asked for at every look of the user, in percent.
    pub switch_percent: u64,
    /// Number of injected faults.
    pub faults: u64,
    /// How long faults are injected.
    pub faulty_ms: u64,
    /// Weight of each kind of injected fault, by [`crate::faults::Injection`] index.
    pub weights: Vec<u64>,
}

impl Profile {
    /// Draws one.
    pub fn draw(rng: &mut Rng) -> Self {
        let mut rate = |of_100: u64, highest: u64| if rng.percent(of_100) { rng.range(1, highest) } else { 0 };
        let loss_percent = rate(25, 4);
        let late_percent = rate(35, 15);
        let twice_percent = rate(25, 10);
        let answer_lost_percent = rate(50, 30);
        let put_late_percent = rate(50, 40);
        let header_fails_percent = rate(15, 20);
        let switch_percent = rate(20, 60);
        let weights = crate::faults::Injection::ALL
            .iter()
            .map(|kind| {
                if rng.percent(kind.enabled_percent()) {
                    rng.range(1, 10)
                } else {
                    0
                }
            })
            .collect();
        Self {
            loss_percent,
            late_percent,
            twice_percent,
            reorders: rng.percent(50),
            cut_delays: rng.percent(50),
            arbiter_delay_ms: if rng.percent(25) { 50 } else { 6 },
            answer_lost_percent,
            put_late_percent,
            header_fails_percent,
            switch_percent,
            faults: rng.range(2, 14),
            faulty_ms: rng.range(300, 1_800),
            weights,
        }
    }

    /// No more bad luck.
    pub fn heal(&mut self) {
        self.loss_percent = 0;
        self.late_percent = 0;
        self.twice_percent = 0;
        self.arbiter_delay_ms = 6;
        self.answer_lost_percent = 0;
        self.put_late_percent = 0;
        self.header_fails_percent = 0;
        self.switch_percent = 0;
    }
}
