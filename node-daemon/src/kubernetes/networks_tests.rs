use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use ftvm_crds::networks::{NetworkRole, NodePath, PathState};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::*;
use crate::networks::Roles;

/// Long enough for a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn a_cable_that_comes_and_goes_is_written_later_and_later() {
    let begun = Instant::now();
    let mut calm = Calm::default();
    assert_eq!(calm.after_change(begun), CALM_MIN);
    // Each change comes as soon as the one before was written.
    let (mut now, mut writes) = (begun, 0);
    while now < begun + Duration::from_secs(3600) {
        let pause = calm.after_change(now);
        now += pause + Duration::from_secs(1);
        writes += 1;
    }
    assert!((12..=20).contains(&writes), "{writes} writes in an hour");
    assert_eq!(calm.after_change(now), CALM_MAX);
    // Once it is calm, the next change is as the first one.
    now += CALM_MAX * CALM_PAUSES;
    assert_eq!(calm.after_change(now), CALM_MIN);
    assert_eq!(calm.after_change(now + CALM_MIN * CALM_PAUSES), CALM_MIN);
}

/// An API server that answers so many patches of Nodes with an error, and takes those that follow.
async fn server(mut failures: usize) -> (kube::Config, Arc<Mutex<Vec<Value>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let taken = Arc::new(Mutex::new(Vec::new()));
    let patches = taken.clone();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (patches, fails) = (patches.clone(), failures > 0);
            failures = failures.saturating_sub(1);
            let service = service_fn(move |request| answer(request, fails, patches.clone()));
            // One request a connection: each write has a client of its own.
            let http = hyper::server::conn::http1::Builder::new();
            let connection = http.serve_connection(TokioIo::new(stream), service);
            tokio::spawn(async move { drop(connection.await) });
        }
    });
    (kube::Config::new(url.parse().unwrap()), taken)
}

async fn answer(
    request: Request<Incoming>,
    fails: bool,
    patches: Arc<Mutex<Vec<Value>>>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    assert_eq!(
        (request.method(), request.uri().path()),
        (&Method::PATCH, "/api/v1/nodes/one")
    );
    let body = request.into_body().collect().await.unwrap().to_bytes();
    if !fails {
        patches.lock().unwrap().push(serde_json::from_slice(&body).unwrap());
    }
    let node = json!({"kind": "Node", "apiVersion": "v1", "metadata": {"name": "one"}});
    let response = Response::builder()
        .status(if fails { 500 } else { 200 })
        .header("content-type", "application/json");
    Ok(response.body(Full::new(Bytes::from(node.to_string()))).unwrap())
}

async fn wait(taken: &Mutex<Vec<Value>>, count: usize) {
    let until = Instant::now() + PATIENCE;
    while taken.lock().unwrap().len() < count {
        assert!(Instant::now() < until, "{:?}", taken.lock().unwrap());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn networks(state: PathState) -> NodeNetworks {
    let path = NodePath {
        network: "eth1".to_owned(),
        interface: Some("eth1".to_owned()),
        address: None,
        state,
    };
    NodeNetworks([(NetworkRole::Client, vec![path])].into())
}

fn annotation_of(patch: &Value) -> &Value {
    &patch["metadata"]["annotations"][ANNOTATION_NETWORKS]
}

/// The first at once; a change and its opposite before it is written are none; what could not be written is written as it is then.
#[tokio::test]
async fn what_is_seen_is_written_once_for_each_change() {
    let (config, taken) = server(1).await;
    let (sender, seen) = watch::channel(None);
    let publishing = tokio::spawn(publish(config, "one".to_owned(), seen));
    sender.send_replace(Some(networks(PathState::Up)));
    wait(&taken, 1).await;
    assert_eq!(
        *annotation_of(&taken.lock().unwrap()[0]),
        json!(networks(PathState::Up).annotation())
    );
    for state in [PathState::NoCarrier, PathState::Up, PathState::NoCarrier, PathState::Up] {
        sender.send_replace(Some(networks(state)));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // While they are not known, what was written stays.
    sender.send_replace(None);
    tokio::time::sleep(Duration::from_millis(20)).await;
    sender.send_replace(Some(networks(PathState::SetDown)));
    wait(&taken, 2).await;
    assert_eq!(
        *annotation_of(&taken.lock().unwrap()[1]),
        json!(networks(PathState::SetDown).annotation())
    );
    assert_eq!(taken.lock().unwrap().len(), 2);
    publishing.abort();
}

#[tokio::test]
async fn without_networks_what_an_earlier_daemon_wrote_is_taken_away() {
    let (config, taken) = server(0).await;
    let seen = crate::networks::follow(Roles::default()).unwrap();
    // Nothing will change: it ends.
    publish(config, "one".to_owned(), seen).await;
    let taken = taken.lock().unwrap();
    let [patch] = &taken[..] else { panic!("{taken:?}") };
    assert!(
        patch["metadata"]["annotations"]
            .as_object()
            .unwrap()
            .contains_key(ANNOTATION_NETWORKS)
    );
    assert!(annotation_of(patch).is_null());
}
