//! What the operator asks of the API server; nothing, once everything is made.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use ftvm_e2e::cluster::{Cluster, wait_for};

use super::PATIENCE;

/// Whoever asks for nothing for so long is at rest.
const QUIET: Duration = Duration::from_secs(20);
/// Between two looks.
const LOOK: Duration = Duration::from_secs(2);

/// Requests of the operators beside watches and the election, so far.
pub fn requests(cluster: &Cluster) -> anyhow::Result<Vec<String>> {
    let events = cluster.audit_events()?;
    let ours = events
        .into_iter()
        .filter(|event| event.user_agent.starts_with("ftvm-operator") && event.verb != "watch");
    let text = ours.filter_map(|event| {
        let object = event.object_ref?;
        let election = object.name.as_deref() == Some("ftvm-operator");
        (!election).then(|| format!("{} {} {}", event.verb, object.resource, object.name.unwrap_or_default()))
    });
    Ok(text.collect())
}

/// After everything is made nothing is asked of the API server any more.
pub fn rests(cluster: &Cluster) -> anyhow::Result<()> {
    rests_beside(cluster, || Ok(()))
}

/// The same, while something else goes on that does not concern the operator.
pub fn rests_beside(cluster: &Cluster, goes_on: impl Fn() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let known = requests(cluster)?.len();
    let mut rest = Rest {
        known,
        since: Instant::now(),
    };
    wait_for("the operator is quiet for 20 s", PATIENCE, || {
        goes_on()?;
        std::thread::sleep(LOOK);
        let looked = Instant::now();
        rest.lasts(looked, &requests(cluster)?)
    })
}

/// A time without requests.
struct Rest {
    /// What was asked for until it began.
    known: usize,
    since: Instant,
}

impl Rest {
    /// Says so if it has lasted until this look, which began at that moment, for as long as it has to. A request begins it anew.
    fn lasts(&mut self, looked: Instant, asked: &[String]) -> anyhow::Result<()> {
        let news = asked
            .get(self.known..)
            .context("requests are missing that were there")?;
        // An event's series may be told once more.
        if news.len() > 1 {
            (self.known, self.since) = (asked.len(), Instant::now());
            bail!("{news:?}");
        }
        let quiet = looked.saturating_duration_since(self.since);
        ensure!(quiet >= QUIET, "quiet for {quiet:?} so far");
        Ok(())
    }
}

#[test]
fn a_request_begins_the_rest_anew() {
    let asked = |count: usize| vec!["get pods web-a".to_owned(); count];
    let fault = |result: anyhow::Result<()>| format!("{:#}", result.unwrap_err());
    let since = Instant::now();
    let mut rest = Rest { known: 5, since };
    assert!(fault(rest.lasts(since + QUIET / 2, &asked(5))).starts_with("quiet for"));
    rest.lasts(since + QUIET, &asked(6)).unwrap();
    assert!(fault(rest.lasts(since + QUIET, &asked(7))).contains("get pods web-a"));
    assert!(fault(rest.lasts(since + QUIET / 2, &asked(8))).starts_with("quiet for"));
    rest.lasts(Instant::now() + QUIET, &asked(8)).unwrap();
    assert!(fault(rest.lasts(Instant::now() + QUIET, &asked(6))).starts_with("requests are missing"));
}
