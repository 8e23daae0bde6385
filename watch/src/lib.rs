//! A watch of the API server that goes on for ever, whatever it is told, and a client that waits for no server that has died. What operator
//! and node-daemon know of the cluster comes from such.

use std::error::Error;
use std::fmt::Debug;
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt};
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;

mod client;
mod readable;
#[cfg(test)]
mod stub;

pub use crate::client::client;
pub use crate::readable::{Unreadable, UnreadableObjects, lasting_readable};

/// An API server ends a watch after so many seconds, and it is begun anew where it was. kube-rs begins it anew 5 s later by itself if
/// nothing comes at all: so long may a server be dead, behind a load balancer that lives, before it is noticed (elsewhere: [`client()`]).
const WATCH_S: u32 = 95;
/// First and longest pause before a watch begins anew that just did.
const ANEW: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));

/// A watch for ever. kube-rs asks for a watch that is refused with 410 again and again from the same state, which never comes back; this one
/// begins anew with a list, as it does itself when it is told so by an event. Where that happens again and again, later and later: lists cost
/// an API server most, and each one that succeeds ends the back-off around this. It is no error of the stream: that back-off would be waited for
/// as well, and after a long absence of the API server it is a minute. (What was restored from a backup is told by such a list.)
pub fn lasting<K>(api: Api<K>, mut config: watcher::Config) -> impl Stream<Item = watcher::Result<Event<K>>> + Send
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    config.timeout.get_or_insert(WATCH_S);
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

/// An error with its causes, for people: "what: why: why". A cause that the text repeats already, as those of a client's often do, is not
/// added.
pub fn explain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let why = error.to_string();
        if !text.contains(&why) {
            text.push_str(": ");
            text.push_str(&why);
        }
        cause = error.source();
    }
    text
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
    use std::fmt;

    use k8s_openapi::api::core::v1::ConfigMap;
    use kube::ResourceExt;

    use super::*;
    use crate::stub::{Stub, block_on};

    /// What a watch tells until it tells of a change.
    fn changed(stub: &Stub, config: watcher::Config) -> String {
        block_on(async {
            let maps = Api::<ConfigMap>::all(client(stub.config()).unwrap());
            let told = lasting(maps, config).filter_map(|event| async move {
                match event {
                    Ok(Event::Apply(map)) => Some(map.name_any()),
                    _ => None,
                }
            });
            let mut told = std::pin::pin!(told);
            let found = tokio::time::timeout(Duration::from_secs(60), told.next()).await;
            found.expect("nothing is told").expect("it goes on for ever")
        })
    }

    #[test]
    fn a_watch_that_says_nothing_any_more_begins_anew() {
        let stub = Stub::start();
        stub.silence_watches(1);
        assert_eq!(changed(&stub, watcher::Config::default().timeout(1)), "new");
        let asked = stub.asked();
        let count = |word: &str| asked.iter().filter(|line| line.contains(word)).count();
        // It goes on where it was: without another list.
        assert_eq!(
            (asked.len(), count("watch=true"), count("resourceVersion=7")),
            (3, 2, 2),
            "{asked:?}"
        );
    }

    #[test]
    fn a_silent_watch_is_noticed_within_100_s() {
        let stub = Stub::start();
        assert_eq!(changed(&stub, watcher::Config::default()), "new");
        let asked = stub.asked();
        assert!(
            asked
                .iter()
                .any(|line| line.contains("watch=true") && line.contains("timeoutSeconds=95")),
            "{asked:?}"
        );
    }

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

    #[derive(Debug)]
    struct Told(&'static str, Option<Box<Told>>);

    impl fmt::Display for Told {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }
    }

    impl Error for Told {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            self.1.as_deref().map(|cause| cause as &(dyn Error + 'static))
        }
    }

    #[test]
    fn a_cause_that_is_told_already_is_not_told_again() {
        let told = |text, cause| Box::new(Told(text, cause));
        let (refused, plain) = (told("refused", None), told("connect: refused", None));
        assert_eq!(explain(&*plain), "connect: refused");
        let connect = told("connect: refused", Some(refused));
        let request = told("request", Some(connect));
        assert_eq!(explain(&*request), "request: connect: refused");
    }
}
