//! What this node publishes of its networks: an annotation of its Node, for the operator and for people.
//!
//! Everybody who watches Nodes is told of each write. So one comes a few seconds after a change, and later and later where changes go on,
//! as with a cable that comes and goes; the metrics have each at once. A daemon without networks takes away what an earlier one wrote: a
//! patch that changes nothing is no write for the API server.

use std::time::{Duration, Instant};

use ftvm_crds::names::ANNOTATION_NETWORKS;
use ftvm_crds::networks::NodeNetworks;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;
use tokio::sync::watch::error::RecvError;

use crate::networks::Seen;
use crate::{explain, random};

/// Time between a change and its write, at least and at most.
const CALM_MIN: Duration = Duration::from_secs(5);
const CALM_MAX: Duration = Duration::from_secs(300);
/// Changes that are this many pauses apart don't go on.
const CALM_PAUSES: u32 = 4;
/// First and longest pause after a failure.
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(300);
/// A write that takes longer is taken for failed.
const WRITE_MAX: Duration = Duration::from_secs(5);

/// How long changes are collected.
#[derive(Debug, Default)]
struct Calm {
    /// The last change, and for how long others were waited for then.
    last: Option<(Instant, Duration)>,
}

impl Calm {
    /// Time until what has just changed is written.
    fn after_change(&mut self, now: Instant) -> Duration {
        let pause = match self.last {
            Some((last, pause)) if now.saturating_duration_since(last) < pause * CALM_PAUSES => {
                (pause * 2).min(CALM_MAX)
            }
            _ => CALM_MIN,
        };
        self.last = Some((now, pause));
        pause
    }
}

/// Publishes what is seen, for as long as it may change.
pub async fn publish(config: kube::Config, node: String, mut seen: Seen) {
    let (mut calm, mut written) = (Calm::default(), None);
    if seen.wait_for(Option::is_some).await.is_err() {
        return;
    }
    loop {
        let now = annotation(&seen);
        if now.is_some() && now != written {
            write_until_done(&config, &node, &seen, &mut written).await;
        }
        if changed(&mut seen, &written).await.is_err() {
            return;
        }
        tokio::time::sleep(calm.after_change(Instant::now())).await;
    }
}

/// Waits until something is seen that is not written.
async fn changed(seen: &mut Seen, written: &Option<Option<String>>) -> Result<(), RecvError> {
    loop {
        seen.changed().await?;
        let now = annotation(seen);
        if now.is_some() && now != *written {
            return Ok(());
        }
    }
}

/// What the Node's annotation should be, if that is known: none where no network is configured.
fn annotation(seen: &Seen) -> Option<Option<String>> {
    let networks = seen.borrow();
    networks.as_ref().map(of)
}

fn of(networks: &NodeNetworks) -> Option<String> {
    (!networks.0.is_empty()).then(|| networks.annotation())
}

/// Always what is seen then, not what was to be written at first.
async fn write_until_done(config: &kube::Config, node: &str, seen: &Seen, written: &mut Option<Option<String>>) {
    let mut pause = PAUSE_MIN;
    loop {
        if let Some(now) = annotation(seen) {
            // Without an answer it may be written or not.
            *written = None;
            match write(config, node, now.as_deref()).await {
                Ok(()) => {
                    *written = Some(now);
                    return;
                }
                Err(why) => tracing::warn!("this node's networks are not published: {why}"),
            }
        }
        let part = (random::nonzero_u64() % 1000) as f64 / 1000.0;
        tokio::time::sleep(pause.mul_f64(0.75 + part / 2.0)).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

async fn write(config: &kube::Config, node: &str, annotation: Option<&str>) -> Result<(), String> {
    let client = ftvm_watch::client(config.clone()).map_err(|error| explain(&error))?;
    let patch = json!({"metadata": {"annotations": {ANNOTATION_NETWORKS: annotation}}});
    let (parameters, patch) = (PatchParams::default(), Patch::Merge(&patch));
    let nodes: Api<Node> = Api::all(client);
    let writing = nodes.patch(node, &parameters, &patch);
    match tokio::time::timeout(WRITE_MAX, writing).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(explain(&error)),
        Err(_) => Err(format!("the API server has not answered for {} s", WRITE_MAX.as_secs())),
    }
}

#[cfg(test)]
#[path = "networks_tests.rs"]
mod tests;
