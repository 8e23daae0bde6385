//! The Lease arbiter against the real API server, through a proxy that does what networks and overloaded servers do.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use ftvm_e2e::cluster::plan::{API_PORT, api_front_address};
use ftvm_e2e::cluster::{ApiProxy, Cluster, Dice, Fault, Options, wait_for};
use ftvm_node_daemon::arbiter::{Arbiter, LeaseArbiter, Leases, Server};
use ftvm_protocol::core::{ReadOutcome, SwapOutcome};
use ftvm_protocol::identity::{ArbiterUid, Incarnation, Nonce, SeatId, VmId};
use ftvm_protocol::record::{Members, Phase, Record, Snapshot};
use serde_json::json;

/// How long contenders swap at least.
const CONTEST: Duration = Duration::from_secs(20);
/// Long enough for a busy machine; nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(180);

fn far() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

/// The arbiter as daemons have it, through the proxy.
struct Way {
    config: kube::Config,
    vm: VmId,
}

impl Way {
    fn arbiter(&self) -> anyhow::Result<LeaseArbiter> {
        Ok(Leases::new(Server::new(&self.config)?)?.arbiter("default", "web", self.vm))
    }
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
        nodes: 0,
        api_proxy: true,
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
        let mut config = config;
        config.cluster_url = format!("https://{}:{API_PORT}", api_front_address()).parse()?;
        let (way, proxy) = (Way { config, vm }, cluster.api_proxy()?);
        every_fault(&direct, &way, proxy)?;
        other_answers(&cluster, &direct, vm)?;
        contest(&way, proxy)
    })?
}

/// What is said of a swap under each fault, and what is true of it in the end.
fn every_fault(direct: &LeaseArbiter, way: &Way, proxy: &ApiProxy) -> anyhow::Result<()> {
    let arbiter = way.arbiter()?;
    let late = Fault::Late(Duration::from_millis(1500));
    // What was there before the first of those in a row that must not land.
    let mut stays = None;
    for (number, expectation) in [
        (Fault::None, "Won", true),
        (late, "Unknown", true),
        (Fault::AppliedThen(500), "Unknown", true),
        (Fault::AppliedThen(429), "Unknown", true),
        (Fault::AppliedThenCut, "Unknown", true),
        (Fault::AppliedThenReset, "Unknown", true),
        (Fault::Refused(500), "Unknown", false),
        (Fault::Refused(503), "Unknown", false),
        (Fault::Reset, "Unknown", false),
        // By something that does not look.
        (Fault::Refused(409), "Unknown", false),
        // The second one is refused, because the first one landed.
        (Fault::Twice, "Unknown", true),
        (Fault::AppliedThen(409), "Unknown", true),
        // What was refused is not what was sent: over this version it could still be taken.
        (Fault::OtherUid, "Unknown", false),
        // The API server takes no Lease without a version, and says so in a way that proves nothing.
        (Fault::WithoutVersion, "Unknown", false),
    ]
    .into_iter()
    .enumerate()
    {
        let (.., lands) = expectation;
        if lands {
            nothing_lands(direct, stays.take())?;
        } else if stays.is_none() {
            stays = Some(read(direct)?);
        }
        one_fault(direct, &arbiter, proxy, 1000 * (1 + number as u128), expectation)?;
    }
    nothing_lands(direct, stays)?;
    old_answers(direct, way, proxy, &arbiter)
}

/// What was refused, or never passed on, is not under way either: after a while the Lease is still what it was before all of that.
fn nothing_lands(direct: &LeaseArbiter, stays: Option<Snapshot>) -> anyhow::Result<()> {
    let Some(before) = stays else { return Ok(()) };
    std::thread::sleep(Duration::from_millis(2500));
    let after = read(direct)?;
    ensure!(after == before, "{after:?}");
    Ok(())
}

/// One fault, what is said of a swap under it, and whether it lands.
fn one_fault(
    direct: &LeaseArbiter,
    arbiter: &LeaseArbiter,
    proxy: &ApiProxy,
    nonce: u128,
    (fault, expected, lands): (Fault, &str, bool),
) -> anyhow::Result<()> {
    proxy.calm();
    let before = read(arbiter)?;
    let record = next(&before, 2, nonce);
    proxy.falsify(move |asked| if asked.method == "PUT" { fault } else { Fault::None });
    let deadline = match fault {
        Fault::Late(time) => Instant::now() + time / 2,
        _ => far(),
    };
    let (outcome, why) = arbiter.swap(before.uid, before.version, &record, deadline);
    if let (SwapOutcome::NotSent, Fault::Late(time)) = (&outcome, fault)
        && time < PATIENCE
    {
        // A busy machine may need longer to send it. Nothing of this attempt may come in between.
        ensure!(read(direct)? == before, "it was sent: {why:?}");
        return one_fault(
            direct,
            arbiter,
            proxy,
            nonce + 1,
            (Fault::Late(2 * time), expected, lands),
        );
    }
    ensure!(
        format!("{outcome:?}").starts_with(expected),
        "{fault:?}: {outcome:?} {why:?}"
    );
    if lands {
        // A write that was let go late lands late.
        return wait_for(&format!("{fault:?}: it lands"), PATIENCE, || {
            let after = read(direct)?;
            ensure!(after.record == record && after.version > before.version, "{after:?}");
            Ok(())
        });
    }
    let after = read(direct)?;
    ensure!(after == before, "{fault:?}: {after:?}");
    Ok(())
}

/// What was true once is not taken for what is, and nothing newer is written over by its means.
fn old_answers(direct: &LeaseArbiter, way: &Way, proxy: &ApiProxy, arbiter: &LeaseArbiter) -> anyhow::Result<()> {
    // Who has seen something newer does not take an old answer for one.
    proxy.falsify(|_| Fault::Stale);
    let (outcome, why) = arbiter.read();
    ensure!(outcome == ReadOutcome::Unreachable, "{outcome:?}");
    ensure!(why.as_ref().is_some_and(|why| why.contains("old")), "{why:?}");
    // Who has not is refused, and writes over nothing newer.
    let arbiter = way.arbiter()?;
    let stale = read(&arbiter)?;
    ensure!(stale.version < read(direct)?.version, "the proxy's answer is not old");
    proxy.calm();
    let (outcome, why) = arbiter.swap(stale.uid, stale.version, &next(&stale, 3, 5), far());
    ensure!(outcome == SwapOutcome::Conflict, "{outcome:?} {why:?}");
    Ok(())
}

/// What the API server itself refuses.
fn other_answers(cluster: &Cluster, direct: &LeaseArbiter, vm: VmId) -> anyhow::Result<()> {
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
    /// UID, term and nonce by version: a version means one record.
    seen: BTreeMap<u64, (ArbiterUid, u64, u128)>,
    /// Versions that somebody won over: one winner each.
    over: BTreeSet<u64>,
    wins: usize,
    unknowns: usize,
    conflicts: usize,
    complaints: Vec<String>,
}

impl Books {
    fn saw(&mut self, snapshot: &Snapshot) {
        let found = (snapshot.uid, snapshot.record.term, snapshot.record.nonce.0);
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

    /// Terms of one Lease grow with versions, without exception. (What is read first may be an old answer about one that is gone.)
    fn close(mut self) -> Books {
        let mut newest: BTreeMap<ArbiterUid, (u64, u64)> = BTreeMap::new();
        for (version, (uid, term, _)) in &self.seen {
            if let Some((before, old)) = newest.insert(*uid, (*version, *term))
                && old >= *term
            {
                self.complaints.push(format!(
                    "term {old} of version {before} is followed by {term} of {version}"
                ));
            }
        }
        self
    }
}

/// Several contenders at once, with faults drawn from a seed; then the same with writes over whatever is newest, which must show.
fn contest(way: &Way, proxy: &ApiProxy) -> anyhow::Result<()> {
    let faults = [
        Fault::None,
        Fault::None,
        Fault::None,
        Fault::None,
        Fault::Late(Duration::from_millis(300)),
        Fault::AppliedThen(500),
        Fault::AppliedThenCut,
        Fault::AppliedThenReset,
        Fault::Refused(500),
        Fault::Reset,
        Fault::Stale,
    ];
    let mut dice = Dice::new(0x9e37_79b9_7f4a_7c15);
    proxy.falsify(move |_| dice.pick(&faults));
    let enough = |books: &Books| books.wins > 20 && books.conflicts > 0 && books.unknowns > 0;
    let books = contend(way, CONTEST, enough)?;
    println!(
        "{} wins, {} conflicts, {} unknown",
        books.wins, books.conflicts, books.unknowns
    );
    ensure!(books.complaints.is_empty(), "{:#?}", books.complaints);
    ensure!(enough(&books), "{books:?}");
    proxy.falsify(|_| Fault::OverNewest);
    let books = contend(way, Duration::ZERO, |books| !books.complaints.is_empty())?;
    ensure!(
        !books.complaints.is_empty(),
        "writes over whatever is newest went unnoticed: {} wins",
        books.wins
    );
    Ok(())
}

/// Until it is enough, and at least for so long.
fn contend(way: &Way, at_least: Duration, enough: impl Fn(&Books) -> bool) -> anyhow::Result<Books> {
    let books = Mutex::new(Books::default());
    let (stop, nonce) = (AtomicBool::new(false), AtomicU64::new(1));
    let arbiters = (0..6).map(|_| way.arbiter()).collect::<anyhow::Result<Vec<_>>>()?;
    std::thread::scope(|scope| {
        for (seat, arbiter) in arbiters.iter().enumerate() {
            let (books, stop, nonce) = (&books, &stop, &nonce);
            scope.spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    let Ok(before) = read(arbiter) else { continue };
                    let nonce = u128::from(nonce.fetch_add(1, Ordering::SeqCst)) << 64 | 1;
                    let record = next(&before, seat as u128 + 1, nonce);
                    // Half of them go on before a late write lands; on a busy machine those alone would not win.
                    let deadline = match seat % 2 {
                        0 => Instant::now() + Duration::from_millis(200),
                        _ => far(),
                    };
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
        let begin = Instant::now();
        // A contender that panicked is enough.
        let is_enough = || books.lock().map_or(true, |books| enough(&books));
        while begin.elapsed() < at_least || (begin.elapsed() < PATIENCE && !is_enough()) {
            std::thread::sleep(Duration::from_millis(100));
        }
        stop.store(true, Ordering::SeqCst);
    });
    Ok(books.into_inner().context("a contender panicked")?.close())
}
