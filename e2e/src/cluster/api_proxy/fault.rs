//! Falsehoods, and how one is drawn.
use std::time::Duration;

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Passes it on, and the answer back.
    None,
    /// Passes it on after this time, and answers nobody: the asker has given up, or is told nothing.
    Late(Duration),
    /// Passes it on, and answers with this status instead.
    AppliedThen(u16),
    /// Passes it on twice, as load balancers repeat what they take for idempotent, and answers with the second answer: 409 to an update.
    Twice,
    /// Passes it on, and cuts the answer in its middle.
    AppliedThenCut,
    /// Passes it on, and resets the connection.
    AppliedThenReset,
    /// Answers with this status, as the API server words it, and passes nothing on.
    Refused(u16),
    /// Resets the connection at once.
    Reset,
    /// Answers a read of one object with one of the states that it had before.
    Stale,
    /// Answers a read of one object with the state of this version, if it ever passed here.
    StaleAt(u64),
    /// Gives another object's uid in an update that it passes on.
    OtherUid,
    /// Passes an update on without the version.
    WithoutVersion,
    /// Puts the newest version into an update, as a client does that repeats refused writes: nothing is compared any more.
    OverNewest,
    /// Answers a list as it was this long ago, as a server does whose store lags behind. A watch that begins at that state stays silent for
    /// the second time: to such a server nothing happened since.
    ListOld(Duration, Duration),
    /// Tells events of a watch so much later, in their order.
    WatchLate(Duration),
    /// Leaves a watch open for this time and says nothing; then everything comes.
    WatchSilent(Duration),
    /// Cuts a watch between two events.
    WatchCut,
    /// Cuts a watch in the middle of an event.
    WatchCutInEvent,
    /// Says within a watch that its state is gone, and ends it: 410 as an event, after the answer began with 200.
    WatchGone,
    /// Tells all that a watch told so far once more, in its order, as what stands between does if it asks again as it was asked first.
    WatchReplayed,
    /// Tells an event twice, as what stands between does if it goes on one event too early.
    WatchTwice,
    /// Tells no bookmarks any more in this watch: servers need not.
    WatchWithoutBookmarks,
}

impl Fault {
    /// Its name, for counting.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Late(_) => "late",
            Self::AppliedThen(_) => "applied then refused",
            Self::Twice => "twice",
            Self::AppliedThenCut => "applied then cut",
            Self::AppliedThenReset => "applied then reset",
            // Of a watch: the state that it asks for is gone. kube-rs and client-go have a way of their own for that.
            Self::Refused(410) => "refused as gone",
            Self::Refused(_) => "refused",
            Self::Reset => "reset",
            Self::Stale | Self::StaleAt(_) => "stale",
            Self::OtherUid => "other uid",
            Self::WithoutVersion => "without version",
            Self::OverNewest => "over newest",
            Self::ListOld(..) => "list: old",
            Self::WatchLate(_) => "watch: late",
            Self::WatchSilent(_) => "watch: silent",
            Self::WatchCut => "watch: cut",
            Self::WatchCutInEvent => "watch: cut in an event",
            Self::WatchGone => "watch: gone",
            Self::WatchReplayed => "watch: replayed",
            Self::WatchTwice => "watch: twice",
            Self::WatchWithoutBookmarks => "watch: without bookmarks",
        }
    }
}

/// Seeded chance (xorshift). Who asks first varies from run to run, what the n-th request gets does not.
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    /// From a seed; zero, of which nothing follows, counts as one.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed.max(1))
    }

    /// A number below `end`, which must not be 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    /// One of these, each as often as the others; it must not be empty.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}
