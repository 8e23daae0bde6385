//! The loop: objects of the API server in, seats and their annotations out.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ftvm_crds::FaultTolerantVM;
use ftvm_crds::names::{LABEL_MANAGED_BY, MANAGED_BY};
use ftvm_watch::{lasting, lasting_readable};
use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::reflector::{self, Store, store::Writer};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, Resource};
use tokio::sync::Notify;

use super::health::Health;
use super::missing::Missing;
use super::node::{Node, NodeSeat};
use super::publish;
use super::refused::Word;
use crate::explain;

/// How often it is looked at the seats.
const LOOK: Duration = Duration::from_millis(250);
/// A write that takes longer is taken for failed.
const WRITE_MAX: Duration = Duration::from_secs(5);

/// Runs for ever.
pub async fn run(config: kube::Config, node: Arc<Node>, health: Health) {
    let client = match ftvm_watch::client(config) {
        Ok(client) => client,
        Err(error) => {
            // The arbiter's client took the same configuration.
            tracing::error!(
                "no client for the API server: {}; seats go on without it",
                explain(&error)
            );
            return std::future::pending().await;
        }
    };
    let changed = Arc::new(Notify::new());
    let pods = watcher::Config::default()
        .fields(&format!("spec.nodeName={}", node.name))
        .labels(&format!("{LABEL_MANAGED_BY}={MANAGED_BY}"));
    let pods = lasting(Api::<Pod>::all(client.clone()), pods);
    let pods = follow(pods, reflector::store(), changed.clone());
    let kept = reflector::store();
    let vms = lasting_readable(
        client.clone(),
        watcher::Config::default(),
        kept.0.clone(),
        node.unreadable.clone(),
    );
    let vms = follow::<FaultTolerantVM>(vms, kept, changed.clone());
    let (mut ready, mut missing) = (false, Missing::default());
    loop {
        // Whichever comes first; both are looked at.
        let _ = tokio::time::timeout(LOOK, changed.notified()).await;
        if !ready {
            let both = async { pods.wait_until_ready().await.is_ok() && vms.wait_until_ready().await.is_ok() };
            ready = tokio::time::timeout(Duration::from_millis(1), both)
                .await
                .unwrap_or(false);
            health.synced(ready);
        }
        let (node, pods, vms) = (node.clone(), pods.state(), vms.state());
        if ready {
            missing.look(&client, &node.missing(&pods));
        }
        let work = tokio::task::spawn_blocking(move || {
            if ready {
                node.reconcile(&pods, &vms);
            }
            let words = if ready { node.words(&pods) } else { Vec::new() };
            (due(&node.seats()), words)
        });
        // A panic there was told by its hook; the next round tries again.
        let (due, words) = work.await.unwrap_or_default();
        let writing = futures::future::join_all(due.into_iter().map(|due| write(&client, due)));
        let telling = futures::future::join_all(words.into_iter().map(|word| tell(&client, word)));
        futures::future::join(writing, telling).await;
        health.beat();
    }
}

/// Keeps a store of these objects, whatever becomes of the connection.
fn follow<K>(
    events: impl Stream<Item = watcher::Result<watcher::Event<K>>> + Send + 'static,
    (store, writer): (Store<K>, Writer<K>),
    changed: Arc<Notify>,
) -> Store<K>
where
    K: Resource<DynamicType = ()> + Clone + Send + Sync + 'static,
{
    // The back-off is the one that client-go has, with jitter.
    let events = events.default_backoff().reflect(writer);
    tokio::spawn(async move {
        let mut events = std::pin::pin!(events);
        while let Some(event) = events.next().await {
            match event {
                Ok(_) => changed.notify_one(),
                Err(error) => tracing::warn!("watching {}: {}", K::plural(&()), explain(&error)),
            }
        }
    });
    store
}

/// A write that is due.
struct Due {
    seat: Arc<NodeSeat>,
    patch: serde_json::Value,
    published: ftvm_crds::seat::SeatPublished,
}

/// All seats are asked together: an engine that does not answer must not hold up the others.
fn due(seats: &[Arc<NodeSeat>]) -> Vec<Due> {
    std::thread::scope(|scope| {
        let asking: Vec<_> = seats
            .iter()
            .map(|seat| scope.spawn(move || (seat.clone(), seat.publisher.due(seat))))
            .collect();
        let asked = asking.into_iter().filter_map(|thread| thread.join().ok());
        asked
            .filter_map(|(seat, due)| due.map(|(patch, published)| Due { seat, patch, published }))
            .collect()
    })
}

async fn write(client: &Client, due: Due) {
    let known = due.seat.known();
    let api: Api<Pod> = Api::namespaced(client.clone(), &known.namespace);
    let (parameters, patch) = (PatchParams::default(), Patch::Merge(&due.patch));
    let (begins, sent) = (begins(&due), Instant::now());
    let writing = api.patch_metadata(&known.config.seat, &parameters, &patch);
    match tokio::time::timeout(WRITE_MAX, writing).await {
        Ok(Ok(after)) => {
            let version = publish::version(after.metadata.resource_version.as_deref());
            due.seat.publisher.written(due.published, version);
            if let Some((id, _)) = begins {
                due.seat.requests.granted(&id, sent);
            }
        }
        Ok(Err(error)) => {
            if let Some((id, version)) = begins.filter(|_| is_conflict(&error)) {
                tracing::debug!(
                    seat = known.config.label(),
                    id,
                    "the pod was changed before this could begin"
                );
                return due.seat.requests.outrun(&id, &version);
            }
            tracing::warn!(seat = known.config.label(), "status not published: {}", explain(&error));
            due.seat.publisher.failed(due.published);
        }
        Err(_) => due.seat.publisher.failed(due.published),
    }
}

/// The failure that may begin once this is written, and the version of the pod that asks for it.
fn begins(due: &Due) -> Option<(String, String)> {
    let version = due.patch["metadata"]["resourceVersion"].as_str()?;
    Some((due.published.begun.clone()?, version.to_owned()))
}

fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409)
}

async fn tell(client: &Client, word: Word) {
    let api: Api<Pod> = Api::namespaced(client.clone(), &word.namespace);
    let (parameters, patch) = (PatchParams::default(), Patch::Merge(&word.patch));
    let writing = api.patch_metadata(&word.pod, &parameters, &patch);
    // What was not written is due again.
    if let Ok(Err(error)) = tokio::time::timeout(WRITE_MAX, writing).await {
        tracing::warn!(
            pod = word.pod,
            "why it is no seat is not published: {}",
            explain(&error)
        );
    }
}
