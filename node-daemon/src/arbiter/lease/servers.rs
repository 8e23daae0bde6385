//! The API servers' own addresses, as they publish them themselves: the EndpointSlice `kubernetes` in the namespace `default`.
//!
//! They keep this one object and put it right every few seconds, each its own address; where they do not
//! (`--endpoint-reconciler-type=none`), the configured address is asked alone, as it is if they refuse to tell (RBAC).
//! What is known stays when there is no news: an address of nobody costs a turn, once, and one that works may be the only one.

use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use ftvm_watch::lasting;
use futures::StreamExt;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event};

use super::Server;
use super::endpoints::OWN_MAX;

/// Namespace and name of the object. By its name, not by its label, which others can put on objects of their own.
const SLICE: (&str, &str) = ("default", "kubernetes");
/// Name of the API servers' port in it.
const PORT: &str = "https";
/// First and longest pause before it is asked again who refused.
const REFUSED: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(600));

/// Tells the server its own addresses, for ever.
pub async fn follow_servers(config: kube::Config, server: Arc<Server>) {
    let client = match ftvm_watch::client(config) {
        Ok(client) => client,
        // The arbiter's client took the same configuration.
        Err(error) => return only_configured(&crate::explain(&error)),
    };
    let (namespace, name) = SLICE;
    let slices: Api<EndpointSlice> = Api::namespaced(client, namespace);
    let this = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let mut events = pin!(lasting(slices, this).default_backoff());
    // Of the list that is read just now.
    let mut listed = false;
    let (mut told, mut pause) = (false, REFUSED.0);
    let mut tell = |why: &str| {
        if !std::mem::replace(&mut told, true) {
            only_configured(why);
        }
    };
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Init) => listed = false,
            Ok(Event::InitApply(slice) | Event::Apply(slice)) => {
                (listed, pause) = (true, REFUSED.0);
                server.know(&addresses(&slice));
            }
            Ok(Event::InitDone) if !listed => tell(&format!("there is no EndpointSlice {namespace}/{name}")),
            Ok(Event::InitDone | Event::Delete(_)) => {}
            Err(error) if is_refused(&error) => {
                tell(&crate::explain(&error));
                tokio::time::sleep(pause).await;
                pause = (2 * pause).min(REFUSED.1);
            }
            // Other watches tell of an API server that can't be reached.
            Err(error) => tracing::debug!("watching EndpointSlices: {}", crate::explain(&error)),
        }
    }
}

fn only_configured(why: &str) {
    tracing::warn!("the API servers' own addresses are not known, the configured one is asked alone: {why}");
}

fn is_refused(error: &watcher::Error) -> bool {
    use watcher::Error::{InitialListFailed, WatchFailed, WatchStartFailed};
    match error {
        InitialListFailed(kube::Error::Api(status))
        | WatchStartFailed(kube::Error::Api(status))
        | WatchFailed(kube::Error::Api(status)) => matches!(status.code, 401 | 403),
        _ => false,
    }
}

/// What an API server can be reached at, bounded. Who is there has yet to prove that he is one (`endpoints`).
fn addresses(slice: &EndpointSlice) -> Vec<SocketAddr> {
    let ports = slice.ports.iter().flatten();
    let mut ports = ports.filter(|port| port.name.as_deref() == Some(PORT));
    let port = ports.next().and_then(|port| u16::try_from(port.port?).ok());
    let Some(port) = port.filter(|port| *port != 0) else {
        return Vec::new();
    };
    let endpoints = slice.endpoints.iter().flatten().filter(|endpoint| {
        let conditions = endpoint.conditions.as_ref();
        // Whoever says nothing is ready.
        conditions.and_then(|conditions| conditions.ready).unwrap_or(true)
    });
    // Further addresses of an endpoint mean nothing, and a name is none.
    let first = endpoints.filter_map(|endpoint| endpoint.addresses.first()?.parse::<IpAddr>().ok());
    let usable = first.filter(|address| is_usable(address.to_canonical()));
    usable
        .map(|address| SocketAddr::new(address, port))
        .take(OWN_MAX)
        .collect()
}

/// An address that means the same machine to everyone.
fn is_usable(address: IpAddr) -> bool {
    let is_local = match address {
        IpAddr::V4(address) => address.is_link_local() || address.is_broadcast(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    !(is_local || address.is_loopback() || address.is_unspecified() || address.is_multicast())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn slice(addresses: &[&str], ports: &Value) -> EndpointSlice {
        let endpoints: Vec<Value> = addresses
            .iter()
            .map(|address| json!({"addresses": [address], "conditions": {"ready": true}}))
            .collect();
        let object = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": {"name": "kubernetes"},
            "addressType": "IPv4", "endpoints": endpoints, "ports": ports,
        });
        serde_json::from_value(object).unwrap()
    }

    fn https() -> Value {
        json!([{"name": "https", "port": 6443, "protocol": "TCP"}])
    }

    fn read(addresses: &[&str]) -> Vec<String> {
        let found = super::addresses(&slice(addresses, &https()));
        found.iter().map(SocketAddr::to_string).collect()
    }

    #[test]
    fn addresses_are_those_that_everyone_can_reach() {
        assert_eq!(
            read(&["192.0.2.1", "2001:db8::1"]),
            ["192.0.2.1:6443", "[2001:db8::1]:6443"]
        );
        for bad in [
            "127.0.0.1",
            "127.8.8.8",
            "::1",
            "::ffff:127.0.0.1",
            "169.254.169.254",
            "::ffff:169.254.169.254",
            "fe80::1",
            "0.0.0.0",
            "::",
            "224.0.0.1",
            "ff02::1",
            "255.255.255.255",
            "api.example.com",
            "192.0.2.1:80",
            "192.0.2.01",
            "",
        ] {
            assert_eq!(read(&[bad, "192.0.2.7"]), ["192.0.2.7:6443"], "{bad}");
        }
    }

    #[test]
    fn there_are_no_more_of_them_than_are_of_use() {
        let many: Vec<String> = (1..=100).map(|last| format!("192.0.2.{last}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(read(&many).len(), OWN_MAX);
        assert!(addresses(&EndpointSlice::default()).is_empty());
    }

    #[test]
    fn the_port_is_the_api_servers() {
        let at = |ports: Value| addresses(&slice(&["192.0.2.1"], &ports)).first().map(SocketAddr::port);
        assert_eq!(at(https()), Some(6443));
        let others = json!([{"name": "metrics", "port": 1}, {"name": "https", "port": 443}]);
        assert_eq!(at(others), Some(443));
        for bad in [
            json!([]),
            json!([{"name": "https"}]),
            json!([{"port": 6443}]),
            json!([{"name": "https", "port": 0}]),
            json!([{"name": "https", "port": -1}]),
            json!([{"name": "https", "port": 65536}]),
        ] {
            assert_eq!(at(bad.clone()), None, "{bad}");
        }
    }

    #[test]
    fn who_is_not_ready_is_left_out() {
        let mut found = slice(&["192.0.2.1", "192.0.2.2", "192.0.2.3"], &https());
        let endpoints = found.endpoints.as_mut().unwrap();
        endpoints[0].conditions.as_mut().unwrap().ready = Some(false);
        endpoints[1].conditions = None;
        endpoints[2].addresses.clear();
        let found: Vec<String> = addresses(&found).iter().map(SocketAddr::to_string).collect();
        assert_eq!(found, ["192.0.2.2:6443"]);
    }
}
