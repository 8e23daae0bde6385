//! Several API servers, some of which have died. Connections and TLS are real; behind the servers is one store that compares and swaps, as
//! theirs is.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Condvar, MutexGuard};

use ftvm_protocol::identity::Nonce;
use ftvm_protocol::record::Snapshot;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::PrivateKeyDer;
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};

use super::endpoints::{Endpoint, Endpoints, OWN_MAX, Sender, TURN};
use super::tests::{PATIENCE, UID, VM, far, first, keep, lease, read_request, status, text};
use super::*;

#[path = "order_tests.rs"]
mod order_of_servers;

/// The name that every API server proves to have.
const NAME: &str = "kubernetes.default.svc";

/// The authority of a cluster.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: Vec<u8>,
}

impl Authority {
    fn new() -> Authority {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap().der().to_vec();
        Authority {
            issuer: Issuer::new(params, key),
            certificate,
        }
    }

    fn server(&self, name: &str) -> Arc<ServerConfig> {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        let config = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key);
        Arc::new(config.unwrap())
    }
}

/// What is behind all API servers of a cluster.
struct Store {
    lease: Mutex<Lease>,
    published: Mutex<Published>,
    changed: Condvar,
}

/// The servers' own addresses.
#[derive(Default)]
struct Published {
    version: u64,
    addresses: Option<Vec<&'static str>>,
    /// Nobody is told.
    refused: bool,
    /// The version from which on changes were asked for last.
    watched: u64,
}

impl Published {
    fn slice(&self) -> Value {
        let endpoints = self.addresses.iter().flatten();
        let endpoints: Vec<Value> = endpoints.map(|address| json!({"addresses": [address]})).collect();
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"namespace": "default", "name": "kubernetes", "resourceVersion": self.version.to_string()},
            "endpoints": endpoints, "ports": [{"name": "https", "port": 6443, "protocol": "TCP"}],
        })
    }
}

fn identity(lease: &Lease) -> (Option<&str>, Option<&str>) {
    let of = &lease.metadata;
    (of.uid.as_deref(), of.resource_version.as_deref())
}

impl Store {
    fn get(&self) -> (u16, String) {
        (200, text(&self.lease.lock().unwrap()))
    }

    fn put(&self, body: &str) -> (u16, String) {
        let mut put: Lease = serde_json::from_str(body).unwrap();
        let mut lease = self.lease.lock().unwrap();
        if identity(&put) != identity(&lease) {
            return (409, status(409, "Conflict"));
        }
        put.metadata.resource_version = Some((version(&lease) + 1).to_string());
        *lease = put;
        (200, text(&lease))
    }

    fn publish(&self, addresses: Option<&[&'static str]>) -> u64 {
        let mut published = self.published.lock().unwrap();
        published.refused = false;
        published.version += 1;
        published.addresses = addresses.map(<[_]>::to_vec);
        self.changed.notify_all();
        published.version
    }

    /// A list of what is published, or the next change of it.
    fn slices(&self, line: &str) -> (u16, String) {
        assert!(line.contains("/namespaces/default/endpointslices?"), "{line}");
        assert!(line.contains("fieldSelector=metadata.name%3Dkubernetes"), "{line}");
        let mut published = self.published.lock().unwrap();
        if published.refused {
            return (403, status(403, "Forbidden"));
        }
        if !line.contains("watch=true") {
            let items: Vec<Value> = published.addresses.iter().map(|_| published.slice()).collect();
            let list = json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSliceList",
                "metadata": {"resourceVersion": published.version.to_string()}, "items": items,
            });
            return (200, list.to_string());
        }
        let from = line
            .split(['?', '&', ' '])
            .find_map(|part| part.strip_prefix("resourceVersion="));
        let from: u64 = from.unwrap().parse().unwrap();
        published.watched = from;
        self.changed.notify_all();
        let waited = self
            .changed
            .wait_timeout_while(published, PATIENCE, |published| published.version <= from);
        let published = waited.unwrap().0;
        let kind = match published.addresses {
            Some(_) => "MODIFIED",
            None => "DELETED",
        };
        let event = json!({"type": kind, "object": published.slice()});
        (200, format!("{event}\n"))
    }

    /// Until everything up to this version was told.
    fn wait_for_watch(&self, from: u64) {
        let published = self.published.lock().unwrap();
        let waited = self
            .changed
            .wait_timeout_while(published, PATIENCE, |published| published.watched < from);
        assert!(!waited.unwrap().1.timed_out(), "nobody watches from version {from} on");
    }
}

#[derive(Clone, Copy)]
enum Mood {
    Well,
    /// What is left of a server when its machine dies without a word: connections stand, and nobody is there.
    Dead,
    /// Says this, and does nothing.
    Says(u16),
    /// The same, where something is to be written.
    SaysToPut(u16),
    /// Writes, and is cut off before it answers.
    CutAfterPut,
    /// Answers after so long.
    Slow(Duration),
    /// Tells what was there before anything else.
    Lags,
}

struct Seen {
    mood: Mood,
    requests: Vec<String>,
    connections: usize,
}

struct ApiServer {
    address: SocketAddr,
    store: Arc<Store>,
    seen: Arc<(Mutex<Seen>, Condvar)>,
}

impl ApiServer {
    fn start(store: &Arc<Store>, tls: Arc<ServerConfig>) -> ApiServer {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let seen = Seen {
            mood: Mood::Well,
            requests: Vec::new(),
            connections: 0,
        };
        let server = ApiServer {
            address: listener.local_addr().unwrap(),
            store: store.clone(),
            seen: Arc::new((Mutex::new(seen), Condvar::new())),
        };
        let serving = Arc::new(ApiServer {
            store: server.store.clone(),
            seen: server.seen.clone(),
            ..server
        });
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (serving, tls, stream) = (serving.clone(), tls.clone(), stream.unwrap());
                std::thread::spawn(move || serving.serve(stream, tls));
            }
        });
        server
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.0.lock().unwrap()
    }

    fn is(&self, mood: Mood) {
        self.seen().mood = mood;
    }

    /// What it was asked for since the last time.
    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.seen().requests)
    }

    fn wait_until(&self, what: &str, holds: impl Fn(&Seen) -> bool) {
        let waited = self
            .seen
            .1
            .wait_timeout_while(self.seen(), PATIENCE, |seen| !holds(seen));
        assert!(!waited.unwrap().1.timed_out(), "{what}");
    }

    fn serve(&self, mut stream: TcpStream, tls: Arc<ServerConfig>) {
        if matches!(self.seen().mood, Mood::Dead) {
            // The kernel has taken the connection; until the other side gives up.
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
            return;
        }
        self.seen().connections += 1;
        let mut stream = StreamOwned::new(ServerConnection::new(tls).unwrap(), stream);
        while let Some(request) = read_request(&mut stream) {
            let Some((code, body)) = self.answer(&request) else {
                break;
            };
            if code == 0 {
                continue;
            }
            let length = body.len();
            let wait = if code == 429 { "retry-after: 1\r\n" } else { "" };
            let answer = format!(
                "HTTP/1.1 {code} X\r\n{wait}content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
            );
            if stream
                .write_all(answer.as_bytes())
                .and_then(|()| stream.flush())
                .is_err()
            {
                break;
            }
        }
        drop(stream);
        self.seen().connections -= 1;
        self.seen.1.notify_all();
    }

    /// None: it is cut off. Code zero: it says nothing.
    fn answer(&self, request: &str) -> Option<(u16, String)> {
        let (line, body) = request.split_once('\n').unwrap();
        let method = line.split(' ').next().unwrap();
        let mood = {
            let mut seen = self.seen();
            seen.requests.push(method.to_owned());
            seen.mood
        };
        self.seen.1.notify_all();
        if let Mood::Slow(time) = mood {
            std::thread::sleep(time);
        }
        let answer = match (mood, method) {
            (Mood::Dead, _) => (0, String::new()),
            (Mood::Lags, "GET") => (200, text(&lease("1", &first()))),
            (Mood::Says(code), _) | (Mood::SaysToPut(code), "PUT") => (code, status(code, "InternalError")),
            (Mood::CutAfterPut, "PUT") => {
                self.store.put(body);
                return None;
            }
            _ if line.contains("endpointslices") => self.store.slices(line),
            (_, "GET") => self.store.get(),
            (_, "PUT") => self.store.put(body),
            _ => panic!("{line}"),
        };
        Some(answer)
    }
}

struct Cluster {
    authority: Authority,
    store: Arc<Store>,
}

impl Cluster {
    fn new() -> Cluster {
        Cluster {
            authority: Authority::new(),
            store: Arc::new(Store {
                lease: Mutex::new(lease("10", &first())),
                published: Mutex::default(),
                changed: Condvar::new(),
            }),
        }
    }

    fn server(&self) -> ApiServer {
        ApiServer::start(&self.store, self.authority.server(NAME))
    }

    fn config(&self, configured: SocketAddr) -> kube::Config {
        let mut config = kube::Config::new(format!("https://{configured}").parse().unwrap());
        config.root_cert = Some(vec![self.authority.certificate.clone()]);
        config.tls_server_name = Some(NAME.to_owned());
        config.auth_info.token = Some("secret".to_owned().into());
        config
    }

    fn arbiter(&self, configured: SocketAddr, own: &[SocketAddr]) -> LeaseArbiter {
        let server = Server::new(&self.config(configured)).unwrap();
        server.know(own);
        Leases::new(server).unwrap().arbiter("shop", "web", VM)
    }
}

fn found(arbiter: &LeaseArbiter) -> Snapshot {
    match arbiter.read() {
        (ReadOutcome::Found(found), _) => found,
        (outcome, why) => panic!("{outcome:?} {why:?}"),
    }
}

fn next(of: &Snapshot) -> Record {
    Record {
        term: of.record.term + 1,
        nonce: Nonce(of.record.nonce.0 + 1),
        ..of.record.clone()
    }
}

fn wins(arbiter: &LeaseArbiter, over: &Snapshot) {
    let (outcome, why) = arbiter.swap(over.uid, over.version, &next(over), far());
    assert!(matches!(outcome, SwapOutcome::Won(_)), "{outcome:?} {why:?}");
}

/// A swap whose outcome is not known at its deadline. A machine that needs more time to send it gets more.
fn is_unknown(arbiter: &LeaseArbiter, over: &Snapshot) {
    let mut time = Duration::from_secs(1);
    loop {
        match arbiter.swap(over.uid, over.version, &next(over), Instant::now() + time) {
            (SwapOutcome::Unknown, _) => return,
            (SwapOutcome::NotSent, _) if time < PATIENCE => time *= 2,
            (outcome, why) => panic!("{outcome:?} {why:?}"),
        }
    }
}

/// Makes so many connections to this server wait for requests, and it the one that is asked first.
fn stand(arbiter: &LeaseArbiter, api: &ApiServer, count: usize) {
    let (endpoints, runtime) = (&arbiter.leases.server.endpoints, &arbiter.leases.runtime);
    let address = api.address.to_string();
    let order = endpoints.in_order();
    let endpoint: &Arc<Endpoint> = order.iter().find(|endpoint| endpoint.address == address).unwrap();
    let connect = |_| {
        runtime
            .block_on(endpoints.connect(std::slice::from_ref(endpoint)))
            .unwrap()
            .1
    };
    let senders: Vec<Sender> = (0..count).map(connect).collect();
    for sender in senders {
        endpoint.keep(sender);
    }
    assert_eq!(endpoint.idle_count(), count);
    endpoints.answered(endpoint);
}

/// An address at which nobody answers.
struct Nobody {
    address: SocketAddr,
    listener: TcpListener,
    queue: Vec<TcpStream>,
}

impl Nobody {
    /// Connections stand, and nothing comes of them.
    fn is_silent() -> Nobody {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        Nobody {
            address: listener.local_addr().unwrap(),
            listener,
            queue: Vec::new(),
        }
    }

    /// Connections do not even stand: the listener's queue is full, and the kernel drops what comes, as if there were no machine.
    fn is_there() -> Nobody {
        let mut nobody = Nobody::is_silent();
        rustix::net::listen(&nobody.listener, 0).unwrap();
        while let Ok(stream) = TcpStream::connect_timeout(&nobody.address, Duration::from_millis(500)) {
            nobody.queue.push(stream);
            assert!(nobody.queue.len() < 8, "a queue of no length takes more and more");
        }
        nobody
    }
}

#[test]
fn addresses_where_nobody_answers_cost_a_turn_each() {
    let cluster = Cluster::new();
    let (gone, silent, api) = (Nobody::is_there(), Nobody::is_silent(), cluster.server());
    for nobody in [&gone, &silent] {
        // Alone, it is waited for until the deadline, and nothing is sent.
        let alone = cluster.arbiter(nobody.address, &[]);
        keep(&alone, lease("10", &first()));
        let soon = Instant::now() + 2 * TURN;
        let (outcome, why) = alone.swap(UID.parse().unwrap(), 10, &Record { term: 2, ..first() }, soon);
        assert_eq!(outcome, SwapOutcome::NotSent, "{why:?}");
        assert!(Instant::now() >= soon, "{why:?}");
    }
    let arbiter = cluster.arbiter(api.address, &[gone.address, silent.address]);
    let order = arbiter.leases.server.addresses();
    assert_eq!(order[2], api.address.to_string(), "{order:?}");
    let begin = Instant::now();
    let before = found(&arbiter);
    println!("two addresses of nobody: read after {:?}", begin.elapsed());
    assert!(begin.elapsed() >= 2 * TURN, "they were not tried");
    // From then on it is known where somebody is.
    assert_eq!(arbiter.leases.server.addresses()[0], api.address.to_string());
    wins(&arbiter, &before);
    assert_eq!(api.asked(), ["GET", "PUT"]);
}

#[test]
fn a_takeover_does_not_wait_for_a_server_that_has_died() {
    let cluster = Cluster::new();
    let (dead, lives) = (cluster.server(), cluster.server());
    let arbiter = cluster.arbiter(lives.address, &[dead.address]);
    stand(&arbiter, &dead, 3);
    dead.is(Mood::Dead);
    let begin = Instant::now();
    let before = found(&arbiter);
    let read = begin.elapsed();
    wins(&arbiter, &before);
    println!(
        "the first of two servers died: read after {read:?}, swapped after {:?}",
        begin.elapsed()
    );
    dead.wait_until("it was asked first", |seen| seen.requests == ["GET"]);
    assert_eq!(lives.asked(), ["GET", "PUT"]);
    // No other connection to it is believed in, and none is waited on.
    dead.wait_until("connections to it stay", |seen| seen.connections == 0);
    wins(&arbiter, &found(&arbiter));
    assert_eq!(dead.asked(), ["GET"]);
    assert_eq!(lives.asked(), ["GET", "PUT"]);
}

#[test]
fn a_swap_that_a_dying_server_took_is_unknown_and_no_other_is_given_it() {
    let cluster = Cluster::new();
    let (dead, lives) = (cluster.server(), cluster.server());
    let arbiter = cluster.arbiter(lives.address, &[dead.address]);
    let before = found(&arbiter);
    stand(&arbiter, &dead, 3);
    lives.asked();
    dead.asked();
    dead.is(Mood::Dead);
    is_unknown(&arbiter, &before);
    dead.wait_until("it was given the swap", |seen| seen.requests == ["PUT"]);
    assert!(lives.asked().is_empty(), "another one was given it, too");
    dead.wait_until("connections to it stay", |seen| seen.connections == 0);
    assert_eq!(arbiter.leases.server.addresses()[1], dead.address.to_string());
    // The next attempt is made at the other one at once: read again, then swapped over what was read.
    assert_eq!(found(&arbiter), before);
    wins(&arbiter, &before);
    assert_eq!(lives.asked(), ["GET", "PUT"]);
    assert_eq!(dead.asked(), ["PUT"], "sent twice");
}

#[test]
fn a_swap_is_given_to_one_server_whatever_comes_of_it() {
    for mood in [
        Mood::SaysToPut(500),
        Mood::SaysToPut(503),
        Mood::SaysToPut(429),
        Mood::CutAfterPut,
    ] {
        let cluster = Cluster::new();
        let (bad, good) = (cluster.server(), cluster.server());
        let arbiter = cluster.arbiter(good.address, &[bad.address]);
        let before = found(&arbiter);
        stand(&arbiter, &bad, 1);
        good.asked();
        bad.asked();
        bad.is(mood);
        let (outcome, why) = arbiter.swap(before.uid, before.version, &next(&before), far());
        assert_eq!(outcome, SwapOutcome::Unknown, "{why:?}");
        assert_eq!(bad.asked(), ["PUT"]);
        assert!(good.asked().is_empty(), "another one was given it, too");
        // Whoever repeats it has read again before, and is not kept waiting.
        bad.is(Mood::Dead);
        wins(&arbiter, &found(&arbiter));
        assert_eq!(good.asked(), ["GET", "PUT"]);
    }
}

#[test]
fn what_one_server_cant_answer_another_one_is_asked_for() {
    for code in [500, 503, 504, 429, 401, 403] {
        let cluster = Cluster::new();
        let (bad, good) = (cluster.server(), cluster.server());
        let arbiter = cluster.arbiter(good.address, &[bad.address]);
        stand(&arbiter, &bad, 1);
        bad.is(Mood::Says(code));
        wins(&arbiter, &found(&arbiter));
        assert_eq!(bad.asked(), ["GET"]);
        assert_eq!(good.asked(), ["GET", "PUT"]);
        good.is(Mood::Says(code));
        let (outcome, why) = arbiter.read();
        assert_eq!(outcome, ReadOutcome::Unreachable);
        assert!(
            why.as_ref().is_some_and(|why| why.contains(&code.to_string())),
            "{why:?}"
        );
    }
}

#[test]
fn who_is_no_api_server_is_told_nothing() {
    let (cluster, strange) = (Cluster::new(), Cluster::new());
    let api = cluster.server();
    // An API server of another authority, and somebody else of this one's.
    let (stranger, kubelet) = (
        strange.server(),
        ApiServer::start(&cluster.store, cluster.authority.server("n1")),
    );
    let arbiter = cluster.arbiter(api.address, &[stranger.address, kubelet.address]);
    wins(&arbiter, &found(&arbiter));
    assert_eq!(api.asked(), ["GET", "PUT"]);
    for nobody in [&stranger, &kubelet] {
        nobody.wait_until("connections to it stay", |seen| seen.connections == 0);
        assert!(nobody.asked().is_empty());
    }
    // They do answer those who take them for one.
    found(&strange.arbiter(stranger.address, &[]));
    let mut config = cluster.config(kubelet.address);
    config.tls_server_name = Some("n1".to_owned());
    let other = Leases::new(Server::new(&config).unwrap()).unwrap();
    found(&other.arbiter("shop", "web", VM));
}

#[test]
fn where_nobody_proves_who_he_is_there_is_one_address() {
    let own: SocketAddr = "192.0.2.1:6443".parse().unwrap();
    let cluster = Cluster::new();
    let configured: SocketAddr = "192.0.2.9:6443".parse().unwrap();
    let mut config = cluster.config(configured);
    let addresses = |config: &kube::Config| {
        let server = Server::new(config).unwrap();
        server.know(&[own]);
        server.addresses().len()
    };
    assert_eq!(addresses(&config), 2);
    config.accept_invalid_certs = true;
    assert_eq!(addresses(&config), 1);
    assert_eq!(
        addresses(&kube::Config::new("http://192.0.2.9:8080".parse().unwrap())),
        1
    );
}

fn own(last: impl IntoIterator<Item = u8>) -> Vec<SocketAddr> {
    let address = |last| SocketAddr::from(([192, 0, 2, last], 6443));
    last.into_iter().map(address).collect()
}

fn order(endpoints: &Endpoints) -> Vec<String> {
    endpoints
        .in_order()
        .iter()
        .map(|endpoint| endpoint.address.clone())
        .collect()
}

#[test]
fn the_order_is_who_answered_first_and_who_failed_last() {
    let endpoints = Endpoints::new("service:443".to_owned(), None);
    endpoints.set(&own([1, 2, 3]));
    assert_eq!(order(&endpoints)[3], "service:443");
    let three = endpoints
        .in_order()
        .into_iter()
        .find(|one| one.address == "192.0.2.3:6443")
        .unwrap();
    endpoints.answered(&three);
    assert_eq!(order(&endpoints)[0], "192.0.2.3:6443");
    endpoints.failed(&three, "a test");
    assert_eq!(order(&endpoints)[2..], ["service:443", "192.0.2.3:6443"]);
    // What stays keeps its place; what is new goes before the service.
    endpoints.set(&own([3, 4]));
    assert_eq!(order(&endpoints), ["192.0.2.4:6443", "service:443", "192.0.2.3:6443"]);
    endpoints.set(&own([4]));
    // An answer that comes from who was taken out brings nobody back.
    endpoints.answered(&three);
    endpoints.passed_over(&three);
    assert_eq!(order(&endpoints), ["192.0.2.4:6443", "service:443"]);
}

/// A server that needs more than its turn once must not make everybody wait for addresses where nobody is.
#[test]
fn who_is_slow_is_asked_before_who_cant_be_reached() {
    let cluster = Cluster::new();
    let (gone, silent, api) = (Nobody::is_there(), Nobody::is_silent(), cluster.server());
    let arbiter = cluster.arbiter(api.address, &[gone.address, silent.address]);
    found(&arbiter);
    let endpoints = &arbiter.leases.server.endpoints;
    let first = |endpoints: &Endpoints| endpoints.in_order().remove(0);
    assert_eq!(first(endpoints).address, api.address.to_string());
    endpoints.slow(&first(endpoints));
    assert_eq!(first(endpoints).address, api.address.to_string());
    // Between servers that are all reached it is the last one.
    let other = cluster.server();
    let arbiter = cluster.arbiter(api.address, &[other.address]);
    found(&arbiter);
    let endpoints = &arbiter.leases.server.endpoints;
    let asked = first(endpoints);
    endpoints.slow(&asked);
    assert_ne!(first(endpoints).address, asked.address);
}

#[test]
fn the_only_server_keeps_its_connections_when_it_is_slow() {
    let cluster = Cluster::new();
    let api = cluster.server();
    let arbiter = cluster.arbiter(api.address, &[]);
    stand(&arbiter, &api, 2);
    let endpoints = &arbiter.leases.server.endpoints;
    let only = endpoints.in_order().remove(0);
    endpoints.slow(&only);
    assert_eq!(only.idle_count(), 2);
}

#[test]
fn addresses_are_bounded_mixed_and_there_once() {
    let endpoints = Endpoints::new("192.0.2.1:6443".to_owned(), None);
    endpoints.set(&own([1, 1, 2, 2]));
    assert_eq!(order(&endpoints), ["192.0.2.2:6443", "192.0.2.1:6443"]);
    endpoints.set(&own(1..=200));
    // One of them is the configured one.
    assert_eq!(order(&endpoints).len(), OWN_MAX);
    let firsts: BTreeSet<String> = (0..200)
        .map(|_| {
            let endpoints = Endpoints::new("service:443".to_owned(), None);
            endpoints.set(&own([1, 2, 3]));
            order(&endpoints).remove(0)
        })
        .collect();
    assert_eq!(firsts.len(), 3, "all daemons ask the same one: {firsts:?}");
}

#[test]
fn addresses_come_and_go_as_the_api_servers_publish_them() {
    let cluster = Cluster::new();
    let api = cluster.server();
    cluster.store.published.lock().unwrap().refused = true;
    let config = cluster.config(api.address);
    let server = Arc::new(Server::new(&config).unwrap());
    let wait_for = |last: &[u8]| {
        let expected: BTreeSet<String> = own(last.iter().copied())
            .iter()
            .chain([&api.address])
            .map(SocketAddr::to_string)
            .collect();
        let begin = Instant::now();
        while BTreeSet::from_iter(server.addresses()) != expected {
            assert!(begin.elapsed() < PATIENCE, "{:?}", server.addresses());
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    runtime.spawn(follow_servers(config, server.clone()));
    // Refused: there is one address, and it is asked again.
    api.wait_until("nobody asks", |seen| !seen.requests.is_empty());
    wait_for(&[]);
    cluster.store.publish(Some(&["192.0.2.1", "192.0.2.2", "127.0.0.1"]));
    wait_for(&[1, 2]);
    cluster.store.publish(Some(&["192.0.2.2", "192.0.2.3"]));
    wait_for(&[2, 3]);
    // No news of any server.
    for nothing in [Some(&[][..]), None] {
        let told = cluster.store.publish(nothing);
        cluster.store.wait_for_watch(told);
        wait_for(&[2, 3]);
    }
    cluster.store.publish(Some(&["192.0.2.4"]));
    wait_for(&[4]);
}
