//! The Lease arbiter against the real API server, through a proxy that does what networks and overloaded servers do.
use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use ftvm_e2e::cluster::{Cluster, Options};
use ftvm_node_daemon::arbiter::{Arbiter, LeaseArbiter, Leases, Server};
use ftvm_protocol::core::{ReadOutcome, SwapOutcome};
use ftvm_protocol::identity::{Incarnation, Nonce, SeatId, VmId};
use ftvm_protocol::record::{Members, Phase, Record, Snapshot};
use hyper::Method;
use serde_json::{Value, json};

/// How long contenders swap.
const CONTEST: Duration = Duration::from_secs(20);

/// What the proxy does with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// Passes it on, and the answer back.
    None,
    /// Passes it on after the asker gave up, and answers nobody.
    LateApply,
    /// Passes it on, and answers 500.
    AppliedThen500,
    /// Passes it on, and cuts the answer in its middle.
    AppliedThenCut,
    /// Passes it on, and resets the connection.
    AppliedThenReset,
    /// Answers 500 and passes nothing on.
    Refused500,
    /// Resets the connection at once.
    Reset,
    /// Answers a read with what it answered to the first one.
    Stale,
    /// Gives another object's uid in what it passes on.
    OtherUid,
    /// Passes it on without the version.
    WithoutVersion,
    /// Puts the newest version into it, as a client does that repeats refused writes: what the checker must notice.
    OverNewest,
}

/// Chooses a fault for a request by its method.
type Chooser = Arc<Mutex<Box<dyn FnMut(&str) -> Fault + Send>>>;
/// Status and body of an answer of the API server.
type Passed = (u16, Vec<u8>);

/// An HTTP proxy in front of the API server, which it reaches as the administrator.
struct Proxy {
    address: SocketAddr,
    vm: VmId,
    fault: Chooser,
}

impl Proxy {
    fn start(upstream: Arc<Server>, vm: VmId, lateness: Duration) -> anyhow::Result<Proxy> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let fault: Chooser = Arc::new(Mutex::new(Box::new(|_| Fault::None)));
        let (choose, first) = (fault.clone(), Arc::new(Mutex::new(None)));
        let runtime = Arc::new(
            tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()?,
        );
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (choose, first, upstream, runtime) =
                    (choose.clone(), first.clone(), upstream.clone(), runtime.clone());
                std::thread::spawn(move || {
                    let mut conversation = Conversation {
                        stream,
                        upstream,
                        runtime,
                        lateness,
                        first,
                    };
                    while let Some((method, path, body)) = read_request(&mut conversation.stream) {
                        let fault = (choose.lock().expect("no panic"))(&method);
                        if !conversation.answer(&method, &path, body, fault) {
                            break;
                        }
                    }
                });
            }
        });
        Ok(Proxy { address, vm, fault })
    }

    fn set(&self, fault: impl FnMut(&str) -> Fault + Send + 'static) {
        *self.fault.lock().expect("no panic") = Box::new(fault);
    }

    fn arbiter(&self) -> anyhow::Result<LeaseArbiter> {
        let config = kube::Config::new(format!("http://{}", self.address).parse()?);
        Ok(Leases::new(Server::new(&config)?)?.arbiter("default", "web", self.vm))
    }
}

struct Conversation {
    stream: TcpStream,
    upstream: Arc<Server>,
    runtime: Arc<tokio::runtime::Runtime>,
    lateness: Duration,
    first: Arc<Mutex<Option<Passed>>>,
}

impl Conversation {
    /// False: the connection is over.
    fn answer(&mut self, method: &str, path: &str, mut body: Vec<u8>, fault: Fault) -> bool {
        match fault {
            Fault::Refused500 => return self.write(500, b"{}"),
            Fault::Reset => return self.reset(),
            Fault::LateApply => std::thread::sleep(self.lateness),
            Fault::Stale if method == "GET" => {
                let first = self.first.lock().expect("no panic").clone();
                if let Some((status, body)) = first {
                    return self.write(status, &body);
                }
            }
            Fault::OtherUid | Fault::WithoutVersion if method == "PUT" => {
                let mut lease: Value = serde_json::from_slice(&body).expect("a Lease");
                match fault {
                    Fault::OtherUid => lease["metadata"]["uid"] = json!("00000000-0000-4000-8000-0000000000ff"),
                    _ => drop(
                        lease["metadata"]
                            .as_object_mut()
                            .and_then(|meta| meta.remove("resourceVersion")),
                    ),
                }
                body = lease.to_string().into_bytes();
            }
            Fault::OverNewest if method == "PUT" => {
                let newest = self.pass("GET", path, Vec::new()).expect("the API server answers");
                let newest: Value = serde_json::from_slice(&newest.1).expect("a Lease");
                let mut lease: Value = serde_json::from_slice(&body).expect("a Lease");
                lease["metadata"]["resourceVersion"] = newest["metadata"]["resourceVersion"].clone();
                body = lease.to_string().into_bytes();
            }
            _ => {}
        }
        let Some((status, answer)) = self.pass(method, path, body) else {
            return self.reset();
        };
        if method == "GET" {
            self.first
                .lock()
                .expect("no panic")
                .get_or_insert_with(|| (status, answer.clone()));
        }
        match fault {
            Fault::LateApply => false,
            Fault::AppliedThen500 => self.write(500, b"{}"),
            Fault::AppliedThenReset => self.reset(),
            Fault::AppliedThenCut => {
                let head = head(status, answer.len());
                let _ = self
                    .stream
                    .write_all(&[head.as_bytes(), &answer[..answer.len() / 2]].concat());
                false
            }
            _ => self.write(status, &answer),
        }
    }

    fn pass(&self, method: &str, path: &str, body: Vec<u8>) -> Option<Passed> {
        let method = Method::from_bytes(method.as_bytes()).ok()?;
        let body = (method == Method::PUT).then_some(body);
        let deadline = Instant::now() + Duration::from_secs(60);
        let answer = self
            .runtime
            .block_on(self.upstream.ask(method, path, body, deadline))
            .ok()?;
        Some((answer.status.as_u16(), answer.body.to_vec()))
    }

    fn write(&mut self, status: u16, body: &[u8]) -> bool {
        let head = head(status, body.len());
        self.stream.write_all(&[head.as_bytes(), body].concat()).is_ok()
    }

    /// RST instead of FIN: the other side can't know what became of its request.
    fn reset(&mut self) -> bool {
        let linger = libc::linger {
            l_onoff: 1,
            l_linger: 0,
        };
        use std::os::fd::AsRawFd;
        // SAFETY: a structure and a length that fit each other.
        unsafe {
            libc::setsockopt(
                self.stream.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_LINGER,
                (&raw const linger).cast(),
                size_of::<libc::linger>() as libc::socklen_t,
            )
        };
        false
    }
}

fn head(status: u16, length: usize) -> String {
    format!("HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n")
}

fn read_request(stream: &mut TcpStream) -> Option<(String, String, Vec<u8>)> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).ok()?;
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.map_or(Some(0), |length| length.parse().ok())?];
    stream.read_exact(&mut body).ok()?;
    let mut first = head.lines().next()?.split(' ');
    Some((first.next()?.to_owned(), first.next()?.to_owned(), body))
}

/// The Lease of a VM that never ran, as the operator makes it.
fn make_lease(cluster: &Cluster, vm: VmId) -> anyhow::Result<()> {
    let first = serde_json::to_string(&Record::genesis(SeatId(1), Phase::Running))?;
    let lease = json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {
            "name": "web", "namespace": "default",
            "labels": {"app.kubernetes.io/managed-by": "ftvm-operator", "ftvm.dev/vm": "web"},
            "annotations": {"ftvm.dev/record": first, "ftvm.dev/nodes": "n1"},
            // An object that exists: the garbage collector looks.
            "ownerReferences": [{"apiVersion": "v1", "kind": "Namespace", "name": "default", "uid": vm.to_string()}],
        },
        "spec": {"holderIdentity": "genesis", "leaseTransitions": 1},
    });
    cluster.apply(&lease.to_string()).map(drop)
}

fn read(arbiter: &LeaseArbiter) -> anyhow::Result<Snapshot> {
    match arbiter.read() {
        (ReadOutcome::Found(found), _) => Ok(found),
        (outcome, why) => bail!("{outcome:?}: {why:?}"),
    }
}

fn next(of: &Snapshot, seat: u128, nonce: u128) -> Record {
    let holder = Incarnation {
        seat: SeatId(seat),
        start: 1,
    };
    Record {
        holder,
        members: Members::one(holder),
        term: of.record.term + 1,
        nonce: Nonce(nonce),
        ..of.record.clone()
    }
}

#[test]
fn swaps_are_what_they_say_whatever_stands_between() -> anyhow::Result<()> {
    let options = Options {
        nodes: 1,
        ..Options::default()
    };
    let cluster = Cluster::start(options)?;
    let namespace = cluster.get(&["namespace", "default"])?;
    let vm: VmId = namespace["metadata"]["uid"].as_str().context("a UID")?.parse()?;
    make_lease(&cluster, vm)?;
    cluster.sandbox().in_network(|| {
        let config = admin(&cluster)?;
        // The way without a proxy works, too: TLS with a client certificate.
        let direct = Leases::new(Server::new(&config)?)?.arbiter("default", "web", vm);
        let upstream = Arc::new(Server::new(&config)?);
        every_fault(
            &direct,
            &Proxy::start(upstream.clone(), vm, Duration::from_millis(1500))?,
        )?;
        other_answers(&cluster, &direct, vm)?;
        contest(&Proxy::start(upstream, vm, Duration::from_millis(300))?)
    })?
}

/// What is said of a swap under each fault, and what is true of it in the end.
fn every_fault(direct: &LeaseArbiter, proxy: &Proxy) -> anyhow::Result<()> {
    let arbiter = proxy.arbiter()?;
    for (number, (fault, expected, lands)) in [
        (Fault::None, "Won", true),
        (Fault::LateApply, "Unknown", true),
        (Fault::AppliedThen500, "Unknown", true),
        (Fault::AppliedThenCut, "Unknown", true),
        (Fault::AppliedThenReset, "Unknown", true),
        (Fault::Refused500, "Unknown", false),
        (Fault::Reset, "Unknown", false),
        (Fault::OtherUid, "Conflict", false),
        // The API server takes no Lease without a version, and says so in a way that proves nothing.
        (Fault::WithoutVersion, "Unknown", false),
    ]
    .into_iter()
    .enumerate()
    {
        proxy.set(|_| Fault::None);
        let before = read(&arbiter)?;
        let record = next(&before, 2, 1000 + number as u128);
        proxy.set(move |_| fault);
        let deadline = Instant::now() + Duration::from_millis(700);
        let (outcome, why) = arbiter.swap(before.uid, before.version, &record, deadline);
        ensure!(
            format!("{outcome:?}").starts_with(expected),
            "{fault:?}: {outcome:?} {why:?}"
        );
        // A write that was let go late lands late.
        std::thread::sleep(Duration::from_millis(2500));
        let after = read(direct)?;
        ensure!((after.record == record) == lands, "{fault:?}: {after:?}");
        ensure!((after.version > before.version) == lands, "{fault:?}: {after:?}");
    }
    // An old answer to a read leads to a swap that is refused, not to one over something newer.
    proxy.set(|_| Fault::Stale);
    let stale = read(&arbiter)?;
    ensure!(stale.version < read(direct)?.version, "the proxy's first answer is old");
    let far = Instant::now() + Duration::from_secs(30);
    let (outcome, why) = arbiter.swap(stale.uid, stale.version, &next(&stale, 3, 5), far);
    ensure!(outcome == SwapOutcome::Conflict, "{outcome:?} {why:?}");
    Ok(())
}

/// What the API server itself refuses.
fn other_answers(cluster: &Cluster, direct: &LeaseArbiter, vm: VmId) -> anyhow::Result<()> {
    let far = || Instant::now() + Duration::from_secs(30);
    let found = read(direct)?;
    // Nobody, by token and by certificate.
    let mut config = kube::Config::new("https://10.77.0.1:6443".parse()?);
    config.accept_invalid_certs = true;
    let nobody = Leases::new(Server::new(&config)?)?.arbiter("default", "web", vm);
    let (outcome, why) = nobody.read();
    ensure!(outcome == ReadOutcome::Unreachable, "{outcome:?} {why:?}");
    ensure!(why.is_some_and(|why| why.contains("403") || why.contains("401")));
    // A Lease that is gone, and one that came in its place.
    cluster.kubectl(&["delete", "lease", "web"])?;
    let (outcome, _) = direct.swap(found.uid, found.version, &next(&found, 2, 6), far());
    ensure!(
        matches!(outcome, SwapOutcome::NotSent | SwapOutcome::Conflict),
        "{outcome:?}"
    );
    ensure!(direct.read().0 == ReadOutcome::Gone);
    make_lease(cluster, vm)?;
    let again = read(direct)?;
    ensure!(again.uid != found.uid && again.record.term == 1, "{again:?}");
    // A swap over the old one must not touch it.
    let old = Leases::new(Server::new(&admin(cluster)?)?)?.arbiter("default", "web", vm);
    let (outcome, _) = old.swap(found.uid, found.version, &next(&found, 2, 7), far());
    ensure!(outcome == SwapOutcome::Conflict, "{outcome:?}");
    ensure!(read(direct)? == again);
    Ok(())
}

fn admin(cluster: &Cluster) -> anyhow::Result<kube::Config> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let kubeconfig = kube::config::Kubeconfig::read_from(cluster.admin_kubeconfig())?;
    Ok(runtime.block_on(kube::Config::from_custom_kubeconfig(kubeconfig, &Default::default()))?)
}

/// What contenders saw and won.
#[derive(Debug, Default)]
struct Books {
    /// Nonce by version: a version means one record.
    seen: BTreeMap<u64, (u64, u128)>,
    /// Versions that somebody won over: one winner each.
    over: BTreeSet<u64>,
    wins: usize,
    unknowns: usize,
    conflicts: usize,
    complaints: Vec<String>,
}

impl Books {
    fn saw(&mut self, snapshot: &Snapshot) {
        let found = (snapshot.record.term, snapshot.record.nonce.0);
        let known = *self.seen.entry(snapshot.version).or_insert(found);
        if known != found {
            self.complaints
                .push(format!("version {} is {known:?} and {found:?}", snapshot.version));
        }
    }

    fn won(&mut self, before: &Snapshot, won: &Snapshot) {
        self.wins += 1;
        if !self.over.insert(before.version) {
            self.complaints.push(format!("two won over version {}", before.version));
        }
        self.saw(won);
    }

    /// Terms grow with versions, without exception.
    fn close(mut self) -> Books {
        let terms: Vec<_> = self.seen.iter().map(|(version, (term, _))| (*version, *term)).collect();
        for pair in terms.windows(2) {
            if pair[0].1 >= pair[1].1 {
                self.complaints.push(format!(
                    "term {} of version {} is followed by {} of {}",
                    pair[0].1, pair[0].0, pair[1].1, pair[1].0
                ));
            }
        }
        self
    }
}

/// Several contenders at once, with faults drawn from a seed; then the same with writes over whatever is newest, which must show.
fn contest(proxy: &Proxy) -> anyhow::Result<()> {
    let faults = [
        Fault::None,
        Fault::None,
        Fault::None,
        Fault::None,
        Fault::LateApply,
        Fault::AppliedThen500,
        Fault::AppliedThenCut,
        Fault::AppliedThenReset,
        Fault::Refused500,
        Fault::Reset,
        Fault::Stale,
    ];
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    proxy.set(move |_| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        faults[(seed % faults.len() as u64) as usize]
    });
    let books = contend(proxy, CONTEST)?;
    println!(
        "{} wins, {} conflicts, {} unknown",
        books.wins, books.conflicts, books.unknowns
    );
    ensure!(books.complaints.is_empty(), "{:#?}", books.complaints);
    ensure!(
        books.wins > 20 && books.conflicts > 0 && books.unknowns > 0,
        "{books:?}"
    );
    proxy.set(|_| Fault::OverNewest);
    let books = contend(proxy, CONTEST / 4)?;
    ensure!(
        !books.complaints.is_empty(),
        "writes over whatever is newest went unnoticed: {} wins",
        books.wins
    );
    Ok(())
}

fn contend(proxy: &Proxy, time: Duration) -> anyhow::Result<Books> {
    let books = Mutex::new(Books::default());
    let (stop, nonce) = (AtomicBool::new(false), AtomicU64::new(1));
    let arbiters = (0..6).map(|_| proxy.arbiter()).collect::<anyhow::Result<Vec<_>>>()?;
    std::thread::scope(|scope| {
        for (seat, arbiter) in arbiters.iter().enumerate() {
            let (books, stop, nonce) = (&books, &stop, &nonce);
            scope.spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    let Ok(before) = read(arbiter) else { continue };
                    let nonce = u128::from(nonce.fetch_add(1, Ordering::SeqCst)) << 64 | 1;
                    let record = next(&before, seat as u128 + 1, nonce);
                    let deadline = Instant::now() + Duration::from_millis(200);
                    let (outcome, _) = arbiter.swap(before.uid, before.version, &record, deadline);
                    let mut books = books.lock().expect("no panic");
                    books.saw(&before);
                    match outcome {
                        SwapOutcome::Won(won) => books.won(&before, &won),
                        SwapOutcome::Conflict => books.conflicts += 1,
                        SwapOutcome::Unknown => books.unknowns += 1,
                        SwapOutcome::NotSent => {}
                    }
                }
            });
        }
        std::thread::sleep(time);
        stop.store(true, Ordering::SeqCst);
    });
    Ok(books.into_inner().context("a contender panicked")?.close())
}
