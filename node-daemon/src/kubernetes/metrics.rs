//! Metrics and probes over HTTP, for monitors.

mod list;
mod page;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::health::Health;
use super::kvm_test::Tested;
use super::node::Node;
use crate::arbiter::Leases;
use crate::networks::Seen;
pub use list::METRICS;
use page::Page;

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
    /// The node's networks.
    pub networks: Seen,
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
            let gathered = tokio::task::spawn_blocking(move || Page::new()?.tell(&sources)).await;
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

#[cfg(test)]
#[path = "metrics_tests.rs"]
mod tests;
