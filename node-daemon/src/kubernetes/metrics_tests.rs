use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream as Client;
use std::sync::mpsc::Sender;
use std::time::Instant;

use ftvm_crds::metrics::{Kind, Label, Values};
use ftvm_crds::networks::{NetworkRole, NodeNetworks, NodePath, PathState};
use ftvm_engine::control::{FailingDisk, Role, StorageKind};
use ftvm_engine::driver::FIGURES;
use ftvm_engine::outbox::HELD_BOUNDS_US;
use ftvm_engine::seat_io::Reason;
use ftvm_protocol::core::ReadOutcome;
use ftvm_protocol::identity::VmId;
use serde_json::json;
use tokio::runtime::Runtime;
use tokio::sync::watch;

use super::*;
use crate::arbiter::{Arbiter, Server};
use crate::disks::Step;
use crate::kubernetes::node::tests::{add_running, add_waiting, node};
use crate::seat::testing::Rig;
use crate::seat_socket::{DiskProgress, role_name};
use crate::testing::Folder;

/// The endpoint at an address of its own.
struct Endpoint {
    address: SocketAddr,
    sources: Sources,
    /// Ends the first KVM self-test, which goes well.
    pass: Sender<()>,
    /// Tells of the node's networks.
    networks: watch::Sender<Option<NodeNetworks>>,
    runtime: Runtime,
    _folder: Folder,
}

impl Endpoint {
    fn new(health: impl FnOnce(&Folder) -> Health, prepare: impl FnOnce(&Node)) -> Endpoint {
        let folder = Folder::new("metrics");
        let node = Arc::new(node(&folder));
        prepare(&node);
        let (tested, pass) = Tested::held();
        let (networks, seen) = watch::channel(None);
        let config = kube::Config::new("http://127.0.0.1:9".parse().unwrap());
        let sources = Sources {
            node,
            leases: Leases::new(Server::new(&config).unwrap()).unwrap(),
            tested,
            health: health(&folder),
            networks: seen,
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap();
        // Whoever has the address is waited for, as during an update.
        runtime.spawn(serve(address, sources.clone()));
        drop(free);
        Endpoint {
            address,
            sources,
            pass,
            networks,
            runtime,
            _folder: folder,
        }
    }

    fn connect(&self) -> Client {
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            match Client::connect(self.address) {
                Ok(client) => return client,
                Err(error) => assert!(Instant::now() < until, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Status, kind and text of the answer.
    fn ask(&self, method: &str, path: &str) -> (u16, String, String) {
        let mut client = self.connect();
        write!(client, "{method} {path} HTTP/1.1\r\nHost: node\r\n\r\n").unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        let (head, text) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let kind = head.lines().find_map(|line| line.strip_prefix("content-type: "));
        (status, kind.unwrap_or_default().to_owned(), text.to_owned())
    }

    fn metrics(&self) -> String {
        let (status, kind, text) = self.ask("GET", "/metrics");
        assert_eq!((status, kind.as_str()), (200, "text/plain; version=0.0.4"), "{text}");
        text
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        let other = tokio::runtime::Builder::new_current_thread().build().unwrap();
        // It serves for ever. What it holds has runtimes of its own, which must not be dropped in a task.
        std::mem::forget(self.sources.clone());
        std::mem::replace(&mut self.runtime, other).shutdown_background();
    }
}

fn health(folder: &Folder) -> Health {
    Health::start(&folder.path().join("probe")).unwrap()
}

fn has(text: &str, line: &str) -> bool {
    text.lines().any(|found| found == line)
}

#[test]
fn the_routes_say_whether_the_daemon_is_well_and_whether_it_leads() {
    let endpoint = Endpoint::new(health, |_| {});
    let answer = |method: &str, path: &str| {
        let (status, _, text) = endpoint.ask(method, path);
        (status, text)
    };
    assert_eq!(answer("GET", "/healthz"), (200, "ok\n".to_owned()));
    // One that waits for its predecessor is well; the seats are not its own.
    assert_eq!(answer("GET", "/readyz"), (503, "no\n".to_owned()));
    endpoint.sources.health.leads();
    assert_eq!(answer("GET", "/readyz"), (200, "ok\n".to_owned()));
    for (method, path) in [
        ("POST", "/metrics"),
        ("GET", "/"),
        ("GET", "/metrics/x"),
        ("DELETE", "/healthz"),
    ] {
        assert_eq!(
            answer(method, path),
            (404, "no such page\n".to_owned()),
            "{method} {path}"
        );
    }
    let still = Endpoint::new(|_| Health::of_standstill(), |_| {});
    for path in ["/healthz", "/readyz"] {
        let (status, _, text) = still.ask("GET", path);
        assert_eq!((status, text.as_str()), (503, "no\n"), "{path}");
    }
}

/// Clients that say nothing have all places for a while; whoever comes then is told by a closed connection, and nobody else is held up.
#[test]
fn clients_that_say_nothing_are_bounded() {
    let endpoint = Endpoint::new(health, |_| {});
    let silent: Vec<Client> = (0..CLIENTS_MAX).map(|_| endpoint.connect()).collect();
    let mut one_more = endpoint.connect();
    let mut answer = String::new();
    let closed = match one_more.read_to_string(&mut answer) {
        Ok(_) => answer.is_empty(),
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    };
    assert!(closed, "{answer}");
    drop(silent);
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        let mut client = endpoint.connect();
        let mut answer = String::new();
        let asked = write!(client, "GET /healthz HTTP/1.1\r\nHost: node\r\n\r\n").is_ok();
        if asked && client.read_to_string(&mut answer).is_ok() && answer.starts_with("HTTP/1.1 200") {
            return;
        }
        assert!(Instant::now() < until, "{answer}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_seat_is_told_with_its_names_and_goes_without_a_trace() {
    let rig = Rig::new();
    rig.say(|status| {
        for (name, value) in [
            ("pause_us_total", json!(1234)),
            ("pause_us_buckets", json!([[300, 2], [634, 1]])),
            ("held_us_total", json!(7_000_000)),
            ("held_us_buckets", json!([[1, "many"]])),
            ("takeover_noticed_by", json!("its silence")),
            ("nic_mtus", json!([1500])),
            (
                "nic_refused",
                json!({"front": {"mac": 3, "made_up": 4}, "made-up": {"mac": 5}}),
            ),
        ] {
            status.counters.insert(name.to_owned(), value);
        }
    });
    let endpoint = Endpoint::new(health, |node| drop(add_running(node, &rig)));
    let labels = r#"namespace="shop",seat="web-a",vm="web""#;
    let text = endpoint.metrics();
    for line in [
        "ftvm_seats 1",
        r#"ftvm_seat_role{namespace="shop",role="active",seat="web-a",vm="web"} 1"#,
        &format!("ftvm_seat_protected{{{labels}}} 1"),
        &format!("ftvm_seat_term{{{labels}}} 3"),
        &format!("ftvm_seat_epoch{{{labels}}} 40"),
        &format!("ftvm_seat_epoch_acknowledged{{{labels}}} 39"),
        &format!("ftvm_seat_unacknowledged_seconds{{{labels}}} 0.002"),
        &format!("ftvm_seat_link_up{{{labels}}} 1"),
        r#"ftvm_seat_guest_pause_seconds_bucket{namespace="shop",vm="web",seat="web-a",le="0.0005"} 2"#,
        r#"ftvm_seat_guest_pause_seconds_bucket{namespace="shop",vm="web",seat="web-a",le="0.001"} 3"#,
        r#"ftvm_seat_guest_pause_seconds_sum{namespace="shop",vm="web",seat="web-a"} 0.001234"#,
        r#"ftvm_seat_guest_pause_seconds_count{namespace="shop",vm="web",seat="web-a"} 3"#,
        &format!("ftvm_seat_arbiter_reachable{{{labels}}} 1"),
        &format!("ftvm_seat_program_connected{{{labels}}} 0"),
        &format!("ftvm_seat_engine_starts_total{{{labels}}} 0"),
        &format!("ftvm_seat_storage_failures{{{labels}}} 0"),
        &format!(r#"ftvm_engine{{name="pause_us_total",{labels}}} 1234"#),
        r#"ftvm_guest_frames_refused_total{namespace="shop",nic="front",reason="mac",seat="web-a",vm="web"} 3"#,
        r#"ftvm_guest_frames_refused_total{namespace="shop",nic="front",reason="arp",seat="web-a",vm="web"} 0"#,
    ] {
        assert!(has(&text, line), "{line}\n{text}");
    }
    assert!(
        !text.contains("takeover_noticed_by") && !text.contains("nic_mtus"),
        "no number: {text}"
    );
    let refusals = text
        .lines()
        .filter(|line| line.starts_with("ftvm_guest_frames_refused_total{"));
    assert_eq!(refusals.count(), Reason::ALL.len(), "of what there is alone: {text}");
    assert!(!text.contains("made_up") && !text.contains("made-up"), "{text}");
    for absent in ["ftvm_seat_progress_percent", "ftvm_seat_engine_exit_code"] {
        assert!(!text.contains(absent), "nothing is under way, none has ended: {text}");
    }
    assert!(!text.contains("ftvm_seat_output_hold_seconds"), "no counts: {text}");
    rig.say(|status| {
        (status.role, status.protected, status.arbiter_reachable) = (Role::Ended, true, false);
        (status.peer, status.standby) = (None, None);
        status.counters.clear();
    });
    let text = endpoint.metrics();
    for line in [
        r#"ftvm_seat_role{namespace="shop",role="ended",seat="web-a",vm="web"} 1"#,
        &format!("ftvm_seat_protected{{{labels}}} 0"),
        &format!("ftvm_seat_arbiter_reachable{{{labels}}} 0"),
        &format!("ftvm_seat_link_up{{{labels}}} 0"),
    ] {
        assert!(has(&text, line), "{line}\n{text}");
    }
    assert_eq!(
        text.matches("ftvm_seat_role{").count(),
        1,
        "the former role is not there: {text}"
    );
    for absent in ["ftvm_engine", "_pause_seconds", "ftvm_seat_unacknowledged_seconds"] {
        assert!(!text.contains(absent), "{text}");
    }
    // Without an engine nothing is said of what only an engine knows.
    let waiting = Endpoint::new(health, add_waiting).metrics();
    assert!(
        has(
            &waiting,
            r#"ftvm_seat_role{namespace="shop",role="none",seat="web-a",vm="web"} 1"#
        ),
        "{waiting}"
    );
    assert!(
        !waiting.contains("ftvm_seat_term") && !waiting.contains("ftvm_seat_protected"),
        "{waiting}"
    );
    let none = Endpoint::new(health, |_| {}).metrics();
    assert!(has(&none, "ftvm_seats 0") && !none.contains("ftvm_seat_"), "{none}");
}

/// The engine is as hostile as its guest: it has the figures of the list, whatever it names.
#[test]
fn what_an_engine_calls_figures_is_bounded() {
    let rig = Rig::new();
    rig.say(|status| {
        for name in ["epoch", "a name", "a\n1", "Epochs", ""] {
            status.counters.insert(name.to_owned(), 1.into());
        }
        for number in 0..1000 {
            status.counters.insert(format!("z_{number}"), 1.into());
        }
    });
    let endpoint = Endpoint::new(health, |node| drop(add_running(node, &rig)));
    let figures = |text: &str| text.lines().filter(|line| line.starts_with("ftvm_engine{")).count();
    assert_eq!(figures(&endpoint.metrics()), 0);
    rig.say(|status| {
        for figure in FIGURES {
            status.counters.insert(figure.name.to_owned(), 1.into());
        }
    });
    assert_eq!(figures(&endpoint.metrics()), FIGURES.len());
}

#[test]
fn progress_and_the_end_of_an_engine_are_told() {
    let rig = Rig::new();
    rig.say(|status| status.resync_percent = Some(41));
    let mut pod = None;
    let endpoint = Endpoint::new(health, |node| pod = Some(add_running(node, &rig).pod.clone()));
    let labels = r#"namespace="shop",seat="web-a",vm="web""#;
    let text = endpoint.metrics();
    let resync = format!("ftvm_seat_progress_percent{{{labels}}} 41");
    assert!(has(&text, &resync) && !text.contains("exit_code"), "{text}");
    rig.say(|status| status.resync_percent = None);
    assert!(!endpoint.metrics().contains("ftvm_seat_progress_percent"));
    rig.seat.fail().unwrap();
    rig.wait("its end is noticed", |rig| !rig.seat.has_engine());
    let killed = format!("ftvm_seat_engine_exit_code{{{labels}}} 1");
    let text = endpoint.metrics();
    assert!(has(&text, &killed) && !text.contains("ftvm_seat_protected"), "{text}");
    // The next one's disks are prepared first.
    let pod = pod.unwrap();
    pod.set_progress(|progress| {
        progress.preparing(DiskProgress {
            disk: "root".to_owned(),
            step: Step::Writing,
            done_bytes: 3,
            total_bytes: 4,
        });
    });
    let preparing = format!("ftvm_seat_progress_percent{{{labels}}} 75");
    let text = endpoint.metrics();
    assert!(has(&text, &preparing), "{text}");
    pod.set_progress(|progress| progress.trouble = Some("no room".to_owned()));
    let text = endpoint.metrics();
    assert!(
        !text.contains("ftvm_seat_progress_percent"),
        "it does not go on: {text}"
    );
}

/// Whatever an engine names.
#[test]
fn each_disk_that_the_seat_has_is_in_one_state() {
    let rig = Rig::new();
    let endpoint = Endpoint::new(health, |node| drop(add_running(node, &rig)));
    for (kind, state) in [
        (None, "works"),
        (Some(StorageKind::Failed), "failed"),
        (Some(StorageKind::Full), "full"),
        (Some(StorageKind::Hangs), "hangs"),
    ] {
        let failing = |kind| {
            [0, 7].map(|disk| FailingDisk {
                disk,
                kind,
                why: "no".to_owned(),
            })
        };
        rig.say(|status| status.failing_disks = kind.into_iter().flat_map(failing).collect());
        let text = endpoint.metrics();
        let told = text.lines().filter(|line| line.starts_with("ftvm_seat_disk{"));
        let (now, other): (Vec<_>, Vec<_>) = told.partition(|line| line.ends_with(" 1"));
        let labels = format!(r#"disk="root",namespace="shop",seat="web-a",state="{state}",vm="web""#);
        assert_eq!(now, [format!("ftvm_seat_disk{{{labels}}} 1")]);
        assert_eq!(other.len(), 3, "{other:?}");
    }
}

#[test]
fn the_daemons_own_figures_follow_what_happens() {
    let endpoint = Endpoint::new(health, |_| {});
    let before = endpoint.metrics();
    for line in [
        "ftvm_kvm_works 0",
        "ftvm_api_server_synced 0",
        r#"ftvm_api_server_place{server="127.0.0.1:9"} 0"#,
        r#"ftvm_arbiter_requests_total{outcome="unreachable",request="read"} 0"#,
        r#"ftvm_arbiter_requests_total{outcome="won",request="swap"} 0"#,
        r#"ftvm_arbiter_request_seconds_count{request="read"} 0"#,
        r#"ftvm_arbiter_request_seconds_sum{request="swap"} 0"#,
        concat!(
            r#"ftvm_build_info{component="node-daemon",version=""#,
            env!("CARGO_PKG_VERSION"),
            r#""} 1"#
        ),
    ] {
        assert!(has(&before, line), "{line}\n{before}");
    }
    // Nobody listens at the API server's address.
    let (read, _) = endpoint.sources.leases.arbiter("shop", "web", VmId(1)).read();
    assert!(matches!(read, ReadOutcome::Unreachable), "{read:?}");
    endpoint.sources.health.synced(true);
    endpoint.pass.send(()).unwrap();
    let until = Instant::now() + Duration::from_secs(60);
    while endpoint.sources.tested.trouble().is_some() {
        assert!(Instant::now() < until, "the self-test is not over");
        std::thread::sleep(Duration::from_millis(5));
    }
    let after = endpoint.metrics();
    for line in [
        "ftvm_kvm_works 1",
        "ftvm_api_server_synced 1",
        r#"ftvm_arbiter_requests_total{outcome="unreachable",request="read"} 1"#,
        r#"ftvm_arbiter_request_seconds_count{request="read"} 1"#,
        r#"ftvm_arbiter_request_seconds_count{request="swap"} 0"#,
    ] {
        assert!(has(&after, line), "{line}\n{after}");
    }
    let no_time = r#"ftvm_arbiter_request_seconds_sum{request="read"} 0"#;
    assert!(!has(&after, no_time), "what failed took time, too: {after}");
}

/// A role that is configured is told in each state, so that it can be seen that no path works.
#[test]
fn paths_are_told_by_role_and_state_while_they_are_known() {
    let endpoint = Endpoint::new(health, |_| {});
    assert!(!endpoint.metrics().contains("ftvm_node_paths"), "nothing was seen yet");
    let path = |state| NodePath {
        network: "10.1.0.0/24".to_owned(),
        interface: None,
        address: None,
        state,
    };
    let paths = [
        (NetworkRole::Replication, vec![path(PathState::Up), path(PathState::Up)]),
        (
            NetworkRole::Migration,
            vec![path(PathState::NoAddress), path(PathState::SameInterface)],
        ),
        (NetworkRole::Client, vec![path(PathState::NoCarrier)]),
    ];
    endpoint.networks.send_replace(Some(NodeNetworks(paths.into())));
    let text = endpoint.metrics();
    let told: BTreeSet<&str> = text
        .lines()
        .filter(|line| line.starts_with("ftvm_node_paths"))
        .collect();
    let mut expected = BTreeSet::new();
    for (role, counts) in [
        ("replication", [2, 0, 0, 0]),
        ("migration", [0, 0, 1, 1]),
        ("client", [0, 1, 0, 0]),
    ] {
        for (state, count) in ["up", "down", "missing", "shared"].into_iter().zip(counts) {
            expected.insert(format!(r#"ftvm_node_paths{{role="{role}",state="{state}"}} {count}"#));
        }
    }
    assert_eq!(told, expected.iter().map(String::as_str).collect::<BTreeSet<_>>());
    endpoint.networks.send_replace(None);
    assert!(
        !endpoint.metrics().contains("ftvm_node_paths"),
        "they are not known any more"
    );
}

/// What is told has a help and a type, and labels say what the list allows.
#[test]
fn what_is_told_is_as_the_list_says() {
    let rig = Rig::new();
    rig.say(|status| {
        status.counters.insert("pause_us_p50".to_owned(), 7.into());
        status.counters.insert("nic_refused".to_owned(), json!({}));
    });
    let text = Endpoint::new(health, |node| drop(add_running(node, &rig))).metrics();
    let mut told = BTreeSet::new();
    let mut helps = BTreeSet::new();
    for line in text.lines() {
        if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            let metric = METRICS.iter().find(|metric| metric.name == name).expect(name);
            assert_eq!(kind, metric.kind.name(), "{line}");
            told.insert(name);
        } else if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) {
            assert!(help.len() > 10, "{line}");
            helps.insert(name);
        } else {
            let value = line.rsplit_once(' ').unwrap().1;
            assert!(value.parse::<f64>().is_ok(), "{line}");
        }
    }
    assert!(told == helps && told.len() > 10, "{told:?} {helps:?}");
    for metric in METRICS {
        for Label { name, values } in metric.labels {
            let Values::OneOf(allowed) = values else { continue };
            let said = said(&text, metric.name, name);
            assert!(said.iter().all(|value| allowed.contains(value)), "{name}: {said:?}");
        }
    }
}

/// Values of a label of a metric.
fn said<'a>(text: &'a str, metric: &str, label: &str) -> BTreeSet<&'a str> {
    let (begins, mark) = (format!("{metric}{{"), format!("{label}=\""));
    let samples = text.lines().filter(|line| line.starts_with(&begins));
    let values = samples.filter_map(|line| line.split_once(mark.as_str())?.1.split('"').next());
    values.collect()
}

/// An engine tells them in these buckets alone: of any other the count would be that of the next smaller one.
#[test]
fn held_output_has_the_buckets_of_the_engine() {
    let metric = METRICS
        .iter()
        .find(|metric| metric.name == "ftvm_seat_output_hold_seconds");
    let Some(Kind::Histogram(bounds)) = metric.map(|metric| metric.kind) else {
        panic!("{metric:?}");
    };
    let of_engine = HELD_BOUNDS_US.map(|bound_us| Duration::from_micros(bound_us).as_secs_f64());
    assert_eq!(bounds, of_engine);
}

/// Labels that are made of what there is in code: the list has it all, and nothing else.
#[test]
fn the_list_has_each_role_reason_and_outcome() {
    let allowed = |metric: &str, label: &str| -> BTreeSet<&str> {
        let metric = METRICS.iter().find(|found| found.name == metric).expect(metric);
        let label = metric.labels.iter().find(|found| found.name == label).expect(label);
        match label.values {
            Values::OneOf(values) => values.iter().copied().collect(),
            Values::Each(what) => panic!("one for each {what}"),
        }
    };
    let roles = [
        Role::Starting,
        Role::Joining,
        Role::Standby,
        Role::Active,
        Role::Frozen,
        Role::Ended,
    ];
    let roles = roles.map(role_name).into_iter().chain(["none"]);
    assert_eq!(allowed("ftvm_seat_role", "role"), roles.collect::<BTreeSet<_>>());
    let reasons = Reason::ALL.map(Reason::label);
    assert_eq!(
        allowed("ftvm_guest_frames_refused_total", "reason"),
        BTreeSet::from(reasons)
    );
    let of_networks = NetworkRole::ALL.map(NetworkRole::name);
    assert_eq!(allowed("ftvm_node_paths", "role"), BTreeSet::from(of_networks));
    let rig = Rig::new();
    let text = Endpoint::new(health, |node| drop(add_running(node, &rig))).metrics();
    for (metric, label) in [
        ("ftvm_arbiter_requests_total", "request"),
        ("ftvm_arbiter_requests_total", "outcome"),
        ("ftvm_seat_disk", "state"),
    ] {
        assert_eq!(allowed(metric, label), said(&text, metric, label), "{metric}");
    }
}
