//! The process: election, watches, controller, probes.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ftvm_crds::FaultTolerantVM;
use ftvm_watch::{Unreadable, UnreadableObjects, lasting_readable};
use futures::StreamExt;
use kube::runtime::events::EventType;
use kube::runtime::{Controller, WatchStreamExt, controller, reflector, watcher};
use kube::{Client, Config};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::api::Objects;
use crate::build::SeatImage;
use crate::caches::Caches;
use crate::election::{Election, TIMES};
use crate::events::{Events, UNREADABLE, clipped};
use crate::image_volumes::{ImageVolumes, Setting};
use crate::metrics::Metrics;
use crate::reconcile::{Context, again, count, reconcile};
use crate::{serve, trim};

/// Reconciles of different VMs at a time.
const CONCURRENCY: u16 = 8;
/// VMs are counted for the metrics so often.
const COUNT_EVERY: Duration = Duration::from_secs(5);

/// It is told of VMs that can't be read so often; longest wait while that fails.
const TELL_UNREADABLE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(600));
/// The API server has so long to take such an event.
const TELL_MAX: Duration = Duration::from_secs(10);
/// So much of what is wrong with a VM is told.
const WHY_BYTES_MAX: usize = 400;

/// What the command line says.
#[derive(Debug, Clone)]
pub struct Options {
    /// How seats' pods are made.
    pub image: SeatImage,
    /// Whether guest images come into them as volumes.
    pub image_volumes: Setting,
    /// Where probes and metrics are answered.
    pub listen: SocketAddr,
    /// Name of this replica.
    pub pod_name: String,
    /// Where the election's Lease is.
    pub pod_namespace: String,
}

/// Why the process ends.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// No configuration for the API server.
    #[error("no way to the API server ({0}): run in a pod with a service account, or set KUBECONFIG")]
    Config(#[from] kube::config::InferConfigError),
    /// The client.
    #[error("API server: {0}")]
    Client(#[from] kube::Error),
    /// The probes' port.
    #[error("probes and metrics on {listen}: {source}: choose another address with --listen")]
    Listen {
        /// The address.
        listen: SocketAddr,
        /// The cause.
        source: std::io::Error,
    },
    /// Metrics.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// A watch.
    #[error("a watch ended: {0}")]
    Watch(#[from] kube::runtime::reflector::store::WriterDropped),
    /// Signals can't be waited for.
    #[error("signals: {0}")]
    Signals(std::io::Error),
}

/// Runs until SIGTERM.
///
/// # Errors
/// [`RunError`] says why it ended.
pub async fn run(options: Options) -> Result<(), RunError> {
    let metrics = Metrics::new()?;
    let mut config = Config::infer().await?;
    let agent = concat!("ftvm-operator/", env!("CARGO_PKG_VERSION"));
    config.headers.push((
        hyper::header::USER_AGENT,
        hyper::header::HeaderValue::from_static(agent),
    ));
    let client = ftvm_watch::client(config)?;
    let mut end = signal(SignalKind::terminate()).map_err(RunError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::Signals)?;
    let listen = options.listen;
    let probes = serve::serve(listen, metrics.clone());
    let mut election = Election::new(client.clone(), &options.pod_namespace, &options.pod_name, TIMES);
    // What leads is dropped with this.
    let ended = tokio::select! {
        ended = probes => ended.map_err(|source| RunError::Listen { listen, source }),
        ended = elected(&mut election, client, options, metrics) => ended,
        _ = end.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    };
    election.release().await;
    ended
}

/// Leads whenever it is elected. What led before is dropped, with all that it was doing, before it is waited for the next time.
async fn elected(election: &mut Election, client: Client, options: Options, metrics: Metrics) -> Result<(), RunError> {
    loop {
        tracing::info!(replica = %options.pod_name, "waits for the election");
        election.won().await;
        tracing::info!(replica = %options.pod_name, "leads");
        metrics.leader.set(1);
        tokio::select! {
            // Whoever was stopped for a while first finds out whether it leads at all.
            biased;
            () = election.lost() => tracing::warn!(replica = %options.pod_name, "leads no longer"),
            ended = lead(client.clone(), options.clone(), metrics.clone()) => return ended,
        }
        metrics.leads_no_longer();
    }
}

/// Watches and reconciles.
///
/// # Errors
/// If a watch ended for good.
pub async fn lead(client: Client, options: Options, metrics: Metrics) -> Result<(), RunError> {
    let (triggers, triggered) = mpsc::unbounded_channel();
    let (vms, kept) = reflector::store();
    let caches = Caches::watch(&client, &triggers, vms.clone());
    caches.ready().await?;
    let unreadable = UnreadableObjects::default();
    let own = Objects::new(client.clone(), metrics.clone(), &options.pod_namespace);
    let context = Arc::new(Context {
        client: client.clone(),
        caches,
        unreadable: unreadable.clone(),
        image_volumes: ImageVolumes::new(options.image_volumes, options.image.clone(), own),
        image: options.image,
        events: Events::new(client.clone(), options.pod_name),
        metrics: metrics.clone(),
        memory: Mutex::default(),
    });
    let telling = context.clone();
    let watched =
        lasting_readable::<FaultTolerantVM>(client, watcher::Config::default(), vms.clone(), unreadable.clone());
    let watched = watched.modify(trim::vm).reflect(kept).applied_objects();
    let controller = Controller::for_stream(watched, vms.clone()).with_config(
        controller::Config::default()
            .concurrency(CONCURRENCY)
            .debounce(Duration::from_millis(20)),
    );
    let triggered = futures::stream::unfold(triggered, |mut triggered| async move {
        let next = triggered.recv().await?;
        Some((next, triggered))
    });
    let mut results = controller
        .reconcile_on(triggered)
        .run(reconcile, again, context)
        .boxed();
    // Not after each look: with many VMs each look would cost as much as all of them.
    let mut counts = tokio::time::interval(COUNT_EVERY);
    let mut telling = std::pin::pin!(tell_unreadable(&unreadable, &telling));
    loop {
        tokio::select! {
            result = results.next() => match result {
                // Failures of reconciles are counted and logged where the next look is planned.
                Some(Err(error)) => tracing::debug!(%error, "controller"),
                Some(Ok(_)) => {}
                None => return Ok(()),
            },
            _ = counts.tick() => {
                count(vms.state().iter().map(|vm| &**vm), &metrics);
                metrics.unreadable.set(unreadable.all().len().try_into().unwrap_or(i64::MAX));
            }
            () = &mut telling => {}
        }
    }
}

/// Says for ever of each VM that can't be read that nothing is done for it. What was said lately is not repeated; what could not be said is
/// tried again later and later.
async fn tell_unreadable(vms: &UnreadableObjects, context: &Context) {
    let mut wait = TELL_UNREADABLE.0;
    loop {
        tokio::time::sleep(wait).await;
        let mut told = true;
        for Unreadable { object, why } in vms.all() {
            let note = format!(
                "this operator ({}) can't read the VM: {}. Nothing is done for it until it can: its seats go on as they are, failover \
                 included, but lost ones are not replaced. Correct that field, or bring the operator to the release that wrote it",
                env!("CARGO_PKG_VERSION"),
                clipped(&why, WHY_BYTES_MAX)
            );
            let telling = context.events.publish(&object, EventType::Warning, UNREADABLE, &note);
            let done = tokio::time::timeout(TELL_MAX, telling).await;
            if !matches!(done, Ok(Ok(()))) {
                told = false;
                let (vm, namespace) = (object.name.as_deref(), object.namespace.as_deref());
                tracing::warn!(vm, namespace, ?done, note, "an event could not be published");
            }
        }
        wait = if told {
            TELL_UNREADABLE.0
        } else {
            (2 * wait).min(TELL_UNREADABLE.1)
        };
    }
}
