//! Metrics and probes over HTTP, for monitors.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use ftvm_engine::control::{FailingDisk, Role, StorageKind};
use ftvm_engine::seat_io::Reason;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::{Encoder, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};
use serde_json::Value;
use std::sync::Arc;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::health::Health;
use super::kvm_test::Tested;
use super::node::Node;
use crate::arbiter::Leases;
use crate::config::{DiskConfig, NicConfig};
use crate::seat_socket::role_name;

/// An engine answers a status within this time.
const STATUS_PATIENCE: Duration = Duration::from_millis(300);
/// A client says what it wants within this time.
const PATIENCE: Duration = Duration::from_secs(5);
/// Clients at a time.
const CLIENTS_MAX: usize = 16;
/// Pause before the address is tried again.
const AGAIN: Duration = Duration::from_millis(500);

/// What is measured.
#[derive(Clone)]
pub struct Sources {
    /// Seats.
    pub node: Arc<Node>,
    /// Arbiter requests.
    pub leases: Leases,
    /// KVM.
    pub tested: Tested,
    /// The daemon itself.
    pub health: Health,
}

/// Serves this address for ever; a predecessor may still have it.
pub async fn serve(address: SocketAddr, sources: Sources) {
    let mut said = false;
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(error) => {
                if !said {
                    tracing::error!("no metrics on {address} ({error}); it is tried again");
                    said = true;
                }
                tokio::time::sleep(AGAIN).await;
            }
        }
    };
    let places = Arc::new(Semaphore::new(CLIENTS_MAX));
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(AGAIN).await;
            continue;
        };
        // Too many: closed without an answer.
        let Ok(place) = places.clone().try_acquire_owned() else {
            continue;
        };
        let sources = sources.clone();
        tokio::spawn(async move {
            converse(stream, sources).await;
            drop(place);
        });
    }
}

async fn converse(stream: TcpStream, sources: Sources) {
    let answer = service_fn(move |request: Request<Incoming>| {
        let sources = sources.clone();
        async move { Ok::<_, Infallible>(answer(&request, sources).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), answer);
    // A client that went away is no news.
    let _ = tokio::time::timeout(2 * PATIENCE, connection).await;
}

async fn answer(request: &Request<Incoming>, sources: Sources) -> Response<Full<Bytes>> {
    let text = |status, text: &str| {
        let mut response = Response::new(Full::new(Bytes::from(text.to_owned())));
        *response.status_mut() = status;
        response
    };
    let well = |well: bool| match well {
        true => text(StatusCode::OK, "ok\n"),
        false => text(StatusCode::SERVICE_UNAVAILABLE, "no\n"),
    };
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/healthz") => well(sources.health.is_well()),
        (&Method::GET, "/readyz") => well(sources.health.is_well() && sources.health.is_leading()),
        (&Method::GET, "/metrics") => {
            let gathered = tokio::task::spawn_blocking(move || gather(&sources)).await;
            match gathered {
                Ok(Ok(metrics)) => {
                    let mut response = text(StatusCode::OK, &metrics);
                    let kind = HeaderValue::from_static("text/plain; version=0.0.4");
                    response.headers_mut().insert(CONTENT_TYPE, kind);
                    response
                }
                Ok(Err(error)) => text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
                Err(_) => text(StatusCode::INTERNAL_SERVER_ERROR, "a defect\n"),
            }
        }
        _ => text(StatusCode::NOT_FOUND, "no such page\n"),
    }
}

/// Every metric, made anew for each scrape: nothing of a seat that is gone stays behind.
fn gather(sources: &Sources) -> Result<String, prometheus::Error> {
    let registry = Registry::new();
    let gauge = |name: &str, help: &str| -> Result<IntGauge, prometheus::Error> {
        let gauge = IntGauge::new(name, help)?;
        registry.register(Box::new(gauge.clone()))?;
        Ok(gauge)
    };
    let gauges = |name: &str, help: &str, labels: &[&str]| -> Result<IntGaugeVec, prometheus::Error> {
        let gauges = IntGaugeVec::new(Opts::new(name, help), labels)?;
        registry.register(Box::new(gauges.clone()))?;
        Ok(gauges)
    };
    let seat = ["namespace", "vm", "seat"];
    let role = gauges(
        "ftvm_seat_role",
        "1 for the role that the seat has now",
        &["namespace", "vm", "seat", "role"],
    )?;
    let protected = gauges(
        "ftvm_seat_protected",
        "1 while the seat leads or follows a protected pair",
        &seat,
    )?;
    let term = gauges("ftvm_seat_term", "Term of the record as the engine knows it", &seat)?;
    let reachable = gauges(
        "ftvm_seat_arbiter_reachable",
        "0 after the engine's last arbiter request failed",
        &seat,
    )?;
    let connected = gauges(
        "ftvm_seat_program_connected",
        "1 while the pod's program is connected",
        &seat,
    )?;
    let figures = gauges(
        "ftvm_engine",
        "Counters and measures of the engine by name",
        &["namespace", "vm", "seat", "name"],
    )?;
    let refused = refused_frames(&registry)?;
    let (disks, failures) = storage(&registry)?;
    let seats = sources.node.seats();
    gauge("ftvm_seats", "Seats of this node")?.set(i64::try_from(seats.len()).unwrap_or(i64::MAX));
    for node_seat in seats {
        let known = node_seat.known();
        let labels = [known.namespace.as_str(), &known.vm, &known.config.seat];
        let status = node_seat.pod.seat.status(STATUS_PATIENCE);
        connected
            .with_label_values(&labels)
            .set(i64::from(node_seat.pod.progress().connected));
        let name = status.engine.as_ref().map_or("none", |engine| role_name(engine.role));
        role.with_label_values(&[labels[0], labels[1], labels[2], name]).set(1);
        failures.with_label_values(&labels).set(status.storage_failures.into());
        let Some(engine) = &status.engine else { continue };
        protected
            .with_label_values(&labels)
            .set(i64::from(engine.protected && engine.role != Role::Ended));
        term.with_label_values(&labels)
            .set(i64::try_from(engine.term).unwrap_or(i64::MAX));
        reachable
            .with_label_values(&labels)
            .set(i64::from(engine.arbiter_reachable));
        tell_disks(&disks, labels, &known.config.disks, &engine.failing_disks);
        tell_refused(&refused, labels, &known.config.nics, engine.counters.get("nic_refused"));
        for (name, value) in &engine.counters {
            if let Some(value) = value.as_i64() {
                figures
                    .with_label_values(&[labels[0], labels[1], labels[2], name])
                    .set(value);
            }
        }
    }
    let requests = Opts::new(
        "ftvm_arbiter_requests_total",
        "Requests to the API server for records, by outcome",
    );
    let requests = IntCounterVec::new(requests, &["request", "outcome"])?;
    registry.register(Box::new(requests.clone()))?;
    for (request, outcome, count) in sources.leases.counts() {
        requests.with_label_values(&[request, outcome]).inc_by(count);
    }
    registry.register(Box::new(places(sources)?))?;
    gauge("ftvm_kvm_works", "1 while the KVM self-test passes")?.set(i64::from(sources.tested.trouble().is_none()));
    gauge("ftvm_api_server_synced", "1 once the API server's objects are known")?
        .set(i64::from(sources.health.is_synced()));
    let mut text = Vec::new();
    TextEncoder::new().encode(&registry.gather(), &mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

fn refused_frames(registry: &Registry) -> Result<IntCounterVec, prometheus::Error> {
    let options = Opts::new(
        "ftvm_guest_frames_refused_total",
        "Frames of the guest that did not leave, by card and reason, since the engine started",
    );
    let refused = IntCounterVec::new(options, &["namespace", "vm", "seat", "nic", "reason"])?;
    registry.register(Box::new(refused.clone()))?;
    Ok(refused)
}

/// Of the cards that the seat has and the reasons that there are, whatever its engine names.
fn tell_refused(refused: &IntCounterVec, seat: [&str; 3], nics: &[NicConfig], told: Option<&Value>) {
    let Some(told) = told else { return };
    for nic in nics {
        for reason in Reason::ALL.map(Reason::label) {
            let count = told[&nic.name][reason].as_u64().unwrap_or(0);
            let labels = [seat[0], seat[1], seat[2], &nic.name, reason];
            refused.with_label_values(&labels).inc_by(count);
        }
    }
}

/// States of disks, and how often storage ended an engine.
fn storage(registry: &Registry) -> Result<(IntGaugeVec, IntGaugeVec), prometheus::Error> {
    let disks = Opts::new(
        "ftvm_seat_disk",
        "1 for the state of each of the seat's disks under its engine: works, failed, full, hangs",
    );
    let disks = IntGaugeVec::new(disks, &["namespace", "vm", "seat", "disk", "state"])?;
    let failures = Opts::new(
        "ftvm_seat_storage_failures",
        "Engines in a row that ended because of the seat's storage, none of which served for long",
    );
    let failures = IntGaugeVec::new(failures, &["namespace", "vm", "seat"])?;
    for gauges in [&disks, &failures] {
        registry.register(Box::new(gauges.clone()))?;
    }
    Ok((disks, failures))
}

/// Of the disks that the seat has, whatever its engine names.
fn tell_disks(states: &IntGaugeVec, seat: [&str; 3], disks: &[DiskConfig], failing: &[FailingDisk]) {
    let kinds = [StorageKind::Failed, StorageKind::Full, StorageKind::Hangs];
    for (index, disk) in disks.iter().enumerate() {
        let found = failing.iter().find(|failing| failing.disk == index);
        let now = found.map(|failing| failing.kind);
        for kind in kinds.map(Some).into_iter().chain([None]) {
            let state = match kind {
                None => "works",
                Some(StorageKind::Failed) => "failed",
                Some(StorageKind::Full) => "full",
                Some(StorageKind::Hangs) => "hangs",
            };
            let labels = [seat[0], seat[1], seat[2], &disk.name, state];
            states.with_label_values(&labels).set((kind == now).into());
        }
    }
}

/// The API server's addresses, of which there are a few, in their order.
fn places(sources: &Sources) -> Result<IntGaugeVec, prometheus::Error> {
    let places = Opts::new(
        "ftvm_api_server_place",
        "When an address of the API server is asked for records: the one with 0 first",
    );
    let places = IntGaugeVec::new(places, &["server"])?;
    for (place, server) in (0..).zip(sources.leases.server().addresses()) {
        places.with_label_values(&[server.as_str()]).set(place);
    }
    Ok(places)
}

#[cfg(test)]
#[path = "metrics_tests.rs"]
mod tests;
