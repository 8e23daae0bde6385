//! A client of the API server whose requests and watches do not outlive it by long.
//!
//! A machine that dies says nothing. The kernel gives a connection up after a quarter of an hour if something was sent, and never if it only
//! listens, as a watch does; kube-rs' own client waits for an answer for ever. So here:
//!
//! ```text
//!   no connection comes about          CONNECT_MAX
//!   the other side's kernel is silent  SILENT_MAX   (keepalive probes; what is sent and not acknowledged)
//!   it answers, and the server, or what is behind a load balancer, says nothing   READ_MAX
//! ```
//!
//! Whoever asks again asks over another connection, which the API server's service may give to another server. Requests that are urgent have
//! deadlines of their own. What Leases are read and written with is not this client but the node-daemon's own (`arbiter/lease/http.rs`).

use std::time::Duration;

use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::retry::RetryPolicy;
use kube::client::{Body, ConfigExt};
use kube::{Client, Config};
use tower::retry::RetryLayer;
use tower::{BoxError, ServiceBuilder};

/// A connection comes about within this time, TLS included.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// A connection on which nothing comes for so long is probed, then every `PROBE`.
const KEEPALIVE: Duration = Duration::from_secs(15);
const PROBE: Duration = Duration::from_secs(5);
/// A connection whose other side acknowledged nothing for so long is given up.
const SILENT_MAX: Duration = Duration::from_secs(30);
/// Likewise one on which no answer goes on. Longer than a watch may say nothing (`WATCH_S`), which is no fault of it.
const READ_MAX: Duration = Duration::from_secs(120);

/// kube-rs' client with these bounds on its connections.
///
/// # Errors
/// If the configuration can't be used.
pub fn client(config: Config) -> kube::Result<Client> {
    if config.proxy_url.is_some() {
        // It says that it can't.
        return Client::try_from(config);
    }
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_keepalive(Some(KEEPALIVE));
    tcp.set_keepalive_interval(Some(PROBE));
    tcp.set_tcp_user_timeout(Some(SILENT_MAX));
    let mut connector = TimeoutConnector::new(config.rustls_https_connector_with_connector(tcp)?);
    connector.set_connect_timeout(Some(CONNECT_MAX));
    connector.set_read_timeout(Some(READ_MAX));
    connector.set_write_timeout(config.write_timeout);
    // Time for which a connection waited for its next request does not count.
    connector.set_reset_reader_on_write(true);
    let http: legacy::Client<_, Body> = legacy::Client::builder(TokioExecutor::new()).build(connector);
    let retry = config
        .default_retry
        .then(|| RetryLayer::new(RetryPolicy::server_retry()));
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(retry)
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use k8s_openapi::api::core::v1::ConfigMap;
    use kube::Api;

    use super::*;
    use crate::stub::{Stub, block_on};

    /// What the kernel waits for at the client's end of connections to this port, as proc_net_tcp(5) has it: 2 is a keepalive timer.
    fn timers(port: u16) -> Vec<String> {
        let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
        let (remote, established) = (format!("0100007F:{port:04X}"), "01");
        let lines = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let ours = lines.filter(|words| words.len() > 5 && words[2] == remote && words[3] == established);
        ours.map(|words| words[5].split(':').next().unwrap_or_default().to_owned())
            .collect()
    }

    #[test]
    fn a_connection_that_only_listens_is_probed() {
        let stub = Stub::start();
        block_on(async {
            let maps = Api::<ConfigMap>::all(client(stub.config()).unwrap());
            maps.list(&Default::default()).await.unwrap();
            let begin = Instant::now();
            while timers(stub.port()) != ["02"] {
                assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", timers(stub.port()));
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
    }
}
