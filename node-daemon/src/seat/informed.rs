//! What an engine is known to know of something that its daemon tells it again whenever it has changed.

use ftvm_engine::control::Reply;

/// What it was told, and whether it said that it took it.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Informed<T> {
    /// Nothing is known: an earlier daemon launched it, or the connection was lost meanwhile.
    Unknown,
    /// It was sent and not confirmed yet.
    Told { command: u64, what: T },
    /// It goes by this.
    Knows(T),
}

impl<T: PartialEq> Informed<T> {
    /// Whether it has to be told this: not while a command is under way, whose reply decides.
    pub(super) fn lacks(&self, what: &T) -> bool {
        match self {
            Informed::Unknown => true,
            Informed::Told { .. } => false,
            Informed::Knows(known) => known != what,
        }
    }

    /// Takes a reply; true if it belongs here.
    pub(super) fn replied(&mut self, id: u64, reply: &Reply) -> bool {
        match std::mem::replace(self, Informed::Unknown) {
            Informed::Told { command, what } if command == id => {
                if let Reply::Refused { why } = reply {
                    // It would refuse it again: no reason to ask without end.
                    tracing::error!("the engine refused what it was told: {why}");
                }
                *self = Informed::Knows(what);
                true
            }
            other => {
                *self = other;
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_is_told_what_it_lacks_and_no_more() {
        let mut informed = Informed::Unknown;
        assert!(informed.lacks(&1));
        informed = Informed::Told { command: 7, what: 1 };
        assert!(!informed.lacks(&2), "one at a time");
        assert!(!informed.replied(6, &Reply::Ok));
        assert!(informed.replied(7, &Reply::Ok));
        assert_eq!(informed, Informed::Knows(1));
        assert!(informed.lacks(&2) && !informed.lacks(&1));
        assert!(!informed.replied(7, &Reply::Ok));
    }
}
