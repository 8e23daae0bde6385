//! A watch of the API server that goes on for ever, whatever it is told. What operator and node-daemon know of the cluster comes from such.

use std::fmt::Debug;
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt};
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;

mod readable;

pub use crate::readable::{Unreadable, UnreadableObjects, lasting_readable};

/// First and longest pause before a watch begins anew that just did.
const ANEW: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));

/// A watch for ever. kube-rs asks for a watch that is refused with 410 again and again from the same state, which never comes back; this one
/// begins anew with a list, as it does itself when it is told so by an event. Where that happens again and again, later and later: lists cost
/// an API server most, and each one that succeeds ends the back-off around this. It is no error of the stream: that back-off would be waited for
/// as well, and after a long absence of the API server it is a minute. (What was restored from a backup is told by such a list.)
pub fn lasting<K>(api: Api<K>, config: watcher::Config) -> impl Stream<Item = watcher::Result<Event<K>>> + Send
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let begin = move || watcher(api.clone(), config.clone()).boxed();
    let state = (begin(), begin, Anew::default());
    futures::stream::unfold(state, |(mut watch, begin, mut anew)| async move {
        loop {
            let event = watch.next().await?;
            if !is_gone(&event) {
                return Some((event, (watch, begin, anew)));
            }
            tokio::time::sleep(anew.pause(Instant::now())).await;
            watch = begin();
        }
    })
}

/// The state that a watch would go on from is gone.
fn is_gone<K>(event: &watcher::Result<Event<K>>) -> bool {
    match event {
        Err(watcher::Error::WatchStartFailed(kube::Error::Api(status)) | watcher::Error::WatchError(status)) => {
            status.code == 410
        }
        _ => false,
    }
}

/// How long is waited before a watch begins anew.
#[derive(Default)]
struct Anew {
    pause: Duration,
    last: Option<Instant>,
}

impl Anew {
    /// Nothing at first, then twice as long as the last time; nothing again once a watch went well for far longer than that.
    fn pause(&mut self, now: Instant) -> Duration {
        let calm = ANEW.1 + self.pause;
        self.pause = match self.last.replace(now) {
            Some(last) if now.saturating_duration_since(last) < calm => (2 * self.pause).clamp(ANEW.0, ANEW.1),
            _ => Duration::ZERO,
        };
        self.pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_begins_anew_again_and_again_does_so_more_and_more_rarely() {
        let (mut anew, mut now) = (Anew::default(), Instant::now());
        let mut pauses = Vec::new();
        for _ in 0..8 {
            let pause = anew.pause(now);
            pauses.push(pause.as_secs());
            now += pause + Duration::from_secs(1);
        }
        assert_eq!(pauses, [0, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(anew.pause(now + 3 * ANEW.1), Duration::ZERO);
    }
}
