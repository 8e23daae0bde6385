//! A whole cluster behind a proxy that delays, falsifies and cuts what node-daemons and operator ask the API server, while engines and
//! nodes die and links are cut. During that a failover may be refused or wait. What is judged is that nothing is lost and never two are
//! active; and that the machine is protected again once the proxy is calm, without anyone doing anything.
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use ftvm_e2e::cluster::install::NAMESPACE as SYSTEM;
use ftvm_e2e::cluster::{Asked, Asker, Deeds, Dice, Fault};
use ftvm_e2e::demo::cluster::acts::Acts;
use ftvm_e2e::demo::cluster::{GUEST_ADDRESS, NAMESPACE, Setting, VM, on_stage};
use ftvm_e2e::demo::rounds::Pair;
use ftvm_e2e::demo::{self, Options, place};
use ftvm_e2e::guest_protocol::DEFAULT_PORT;
use ftvm_e2e::hosts::CutDirection;
use ftvm_e2e::judge::client;
use ftvm_e2e::lab::Network;
use ftvm_e2e::lab::binaries::Profile;
use ftvm_e2e::report::Progress;

/// Long enough for a busy machine; nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(180);
/// How long the proxy misbehaves before the blow, and after it.
const BEFORE: Duration = Duration::from_secs(4);
const AFTER: Duration = Duration::from_secs(12);
/// Shortest and longest delay of what is applied late; operator and daemons wait 2 s or more for an answer.
const LATE_MS: (u64, u64) = (2_200, 6_000);
/// Of an update of the record: daemons wait 2 s, and what they write 200 ms later lands first.
const LATE_RECORD_MS: (u64, u64) = (2_010, 2_200);
/// Requests of one daemon or operator a second, on the average of an act, beyond which it is in a hot loop. Each has several conversations
/// at once (a Lease, a pod's conditions, status, events, watches), and each tries again after some fraction of a second.
const REQUESTS_PER_S_MAX: f64 = 20.0;
/// Answers of a guest that is alone, so that its standby can't know them.
const ANSWERS_ALONE: usize = 10;

/// Cards for reads of a VM's Lease.
const READS: [Fault; 10] = [
    Fault::None,
    Fault::None,
    Fault::None,
    Fault::None,
    Fault::Stale,
    Fault::Stale,
    Fault::Refused(500),
    Fault::Refused(503),
    Fault::AppliedThenCut,
    Fault::Reset,
];
/// For updates of it.
const UPDATES: [Fault; 12] = [
    Fault::None,
    Fault::None,
    LATE,
    LATE,
    Fault::AppliedThen(500),
    Fault::AppliedThen(429),
    Fault::AppliedThen(409),
    Fault::Twice,
    Fault::Refused(409),
    Fault::AppliedThenCut,
    Fault::AppliedThenReset,
    Fault::Reset,
];
/// For everything else: pods, claims, FaultTolerantVMs and their status, events, nodes.
const OTHERS: [Fault; 18] = [
    Fault::None,
    Fault::None,
    Fault::None,
    Fault::None,
    Fault::None,
    Fault::None,
    Fault::None,
    LATE,
    Fault::AppliedThen(500),
    Fault::AppliedThen(503),
    Fault::AppliedThen(409),
    Fault::Twice,
    Fault::Refused(409),
    Fault::Refused(429),
    Fault::Refused(500),
    Fault::AppliedThenCut,
    Fault::AppliedThenReset,
    Fault::Reset,
];
/// On a card; how late is drawn.
const LATE: Fault = Fault::Late(Duration::ZERO);

/// Cards that come in any order, and all of them before one comes again.
struct Deck {
    cards: &'static [Fault],
    left: Vec<Fault>,
    late_ms: (u64, u64),
}

impl Deck {
    fn new(cards: &'static [Fault], late_ms: (u64, u64)) -> Self {
        Self {
            cards,
            left: Vec::new(),
            late_ms,
        }
    }

    fn draw(&mut self, dice: &mut Dice) -> Fault {
        if self.left.is_empty() {
            self.left.extend(self.cards);
        }
        let at = dice.below(self.left.len() as u64);
        match self.left.swap_remove(at as usize) {
            LATE => {
                let (shortest, longest) = self.late_ms;
                Fault::Late(Duration::from_millis(shortest + dice.below(longest - shortest)))
            }
            fault => fault,
        }
    }
}

fn is_daemon(user: &str) -> bool {
    user == format!("system:serviceaccount:{SYSTEM}:ftvm-node-daemon")
}

fn is_operator(user: &str) -> bool {
    user == format!("system:serviceaccount:{SYSTEM}:ftvm-operator")
}

/// Whether it is about the record of who is active.
fn is_record(asked: &Asked) -> bool {
    asked.resource == "leases" && asked.namespace.as_deref() == Some(NAMESPACE)
}

/// Falsehoods drawn from a seed for all that daemons and operator ask, except the operators' election among themselves: who is told that
/// he is no longer elected ends, as he should, and is started again.
fn mischief(seed: u64) -> impl FnMut(&Asked) -> Fault + Send {
    let mut dice = Dice::new(seed);
    let [mut reads, mut of_daemons, mut of_operator] =
        [&READS[..], &OTHERS, &OTHERS].map(|cards| Deck::new(cards, LATE_MS));
    let mut updates = Deck::new(&UPDATES, LATE_RECORD_MS);
    move |asked| {
        let user = &asked.asker.user;
        let election = asked.resource == "leases" && !is_record(asked);
        let deck = match (is_record(asked), asked.method.as_str()) {
            _ if election => return Fault::None,
            (true, "GET") if is_daemon(user) => &mut reads,
            (true, _) if is_daemon(user) => &mut updates,
            _ if is_daemon(user) => &mut of_daemons,
            _ if is_operator(user) => &mut of_operator,
            _ => return Fault::None,
        };
        deck.draw(&mut dice)
    }
}

/// Restarts of containers of operator and daemons, by pod, where the node did not die.
fn restarts(acts: &Acts<'_>, dead: Option<&str>) -> anyhow::Result<BTreeMap<String, u64>> {
    let pods = acts.cluster.get(&["pods", "--namespace", SYSTEM])?;
    let pods = pods["items"].as_array().context("no pods")?.iter();
    let pods = pods.filter(|pod| pod["spec"]["nodeName"].as_str() != dead);
    let count = |pod: &serde_json::Value| {
        let name = pod["metadata"]["uid"].as_str().context("a pod without UID")?.to_owned();
        let statuses = pod["status"]["containerStatuses"].as_array();
        let counts = statuses.context("a pod without containers")?.iter();
        Ok((name, counts.filter_map(|one| one["restartCount"].as_u64()).sum()))
    };
    pods.map(count).collect()
}

/// An act under mischief. `blow` may say whose node it killed; that one is started again once the proxy is calm.
fn hostile_act(
    acts: &mut Acts<'_>,
    name: &str,
    seed: u64,
    blow: impl FnOnce(&Acts<'_>, Pair) -> anyhow::Result<Option<usize>>,
) -> anyhow::Result<()> {
    acts.act(name, |acts, before| {
        let cluster = Rc::clone(&acts.cluster);
        let proxy = cluster.api_proxy()?;
        let (begin, deeds, restarted) = (Instant::now(), proxy.deeds(), restarts(acts, None)?);
        proxy.falsify(mischief(seed));
        acts.stage.let_pass(BEFORE);
        // The blow is for whoever is active by now: what the API server says moves nobody whose peer lives.
        let killed = blow(acts, before)?;
        acts.stage.let_pass(AFTER);
        proxy.calm();
        let calm = Instant::now();
        cluster.mend_links()?;
        let (active, _) = acts.stage.taken_over(before)?;
        let seconds = calm.elapsed().as_secs_f64();
        acts.say(format_args!(
            "{} runs the guest {seconds:.1} s after the calm",
            acts.node(active)
        ));
        if let Some(host) = killed {
            cluster.nodes()[host].start()?;
            acts.stage.system().make_spare(host)?;
        }
        acts.stage.pair()?;
        no_hot_loop(&deeds, &proxy.deeds(), begin.elapsed())?;
        let dead = killed.map(|host| acts.node(host));
        for (pod, count) in restarts(acts, dead.as_deref())? {
            let before = restarted.get(&pod).copied().unwrap_or_default();
            ensure!(count == before, "pod {pod} restarted {} times", count - before);
        }
        Ok(())
    })
}

fn no_hot_loop(before: &Deeds, after: &Deeds, time: Duration) -> anyhow::Result<()> {
    for (asker, count) in &after.requests {
        let earlier = before.requests.get(asker).copied().unwrap_or_default();
        let rate = (count - earlier) as f64 / time.as_secs_f64();
        if is_daemon(&asker.user) || is_operator(&asker.user) {
            println!("{asker:?}: {rate:.1} requests a second");
            ensure!(rate < REQUESTS_PER_S_MAX, "{asker:?} asked {rate:.1} times a second");
        }
    }
    Ok(())
}

/// Every falsehood came about, and every sort of them where it matters: about the record to daemons, about other objects to daemons and to
/// the operator.
fn every_kind_was_told(deeds: &Deeds) -> anyhow::Result<()> {
    println!("falsehoods: {:#?}", deeds.falsehoods);
    for fault in [&READS[..], &UPDATES, &OTHERS].concat() {
        let count = deeds.told(fault, |_, _| true);
        ensure!(count > 0 || fault == Fault::None, "{fault:?} did not come about");
    }
    let record = |user: &str, resource: &str| is_daemon(user) && resource == "leases";
    let daemon = |user: &str, resource: &str| is_daemon(user) && resource != "leases";
    let operator = |user: &str, _: &str| is_operator(user);
    let applied = [
        Fault::AppliedThen(500),
        Fault::AppliedThenCut,
        Fault::AppliedThenReset,
        Fault::Twice,
    ];
    let sorts: [(&str, &[Fault]); 3] = [
        ("applied late", &[LATE]),
        ("applied and not said so", &applied),
        ("refused and not asked for", &[Fault::Refused(500), Fault::Reset]),
    ];
    for (sort, faults) in sorts {
        for (target, about) in [
            ("the record", &record as &dyn Fn(&str, &str) -> bool),
            ("other objects of daemons", &daemon),
            ("objects of the operator", &operator),
        ] {
            let count: u64 = faults.iter().map(|&fault| deeds.told(fault, about)).sum();
            ensure!(count > 0, "{target}: nothing was {sort}");
        }
    }
    ensure!(deeds.told(Fault::Stale, record) > 0, "no old record was read");
    Ok(())
}

#[test]
fn a_falsifying_api_server_costs_no_answer() -> anyhow::Result<()> {
    let options = Options {
        fault: demo::Fault::None,
        // Each replaced seat leaves a volume behind.
        rounds: 6,
        // How fast a death is noticed is not what this is about; busy machines miss heartbeats.
        peer_lost_ms: Some(1_500),
        ..Options::default()
    };
    let setting = Setting {
        profile: Profile::Dev,
        api_proxy: true,
    };
    let progress = Progress::new();
    let folder = place::new_folder("cluster-hostile-api")?;
    on_stage(&options, setting, &folder, &progress, |stage, cluster| {
        let mut acts = Acts::new(stage, cluster, &progress);
        hostile_act(&mut acts, "kill -9 of the engine", 0x11, |acts, before| {
            acts.kill_engine(before.active).map(|()| None)
        })?;
        hostile_act(&mut acts, "a node's plug is pulled", 0x22, |acts, before| {
            acts.cluster.nodes()[before.active].kill()?;
            Ok(Some(before.active))
        })?;
        hostile_act(&mut acts, "the sides' link is cut", 0x33, |acts, before| {
            cut_sides(acts, before).map(|()| None)
        })?;
        every_kind_was_told(&cluster.api_proxy()?.deeds())?;
        nothing_compared(acts)
    })
}

fn cut_sides(acts: &Acts<'_>, pair: Pair) -> anyhow::Result<()> {
    let nodes = acts.cluster.nodes();
    let (active, standby) = (&nodes[pair.active], &nodes[pair.standby]);
    acts.cluster
        .cut_link(active, standby, Network::Management, CutDirection::Both)
}

/// The negative control: what the judge says once the API server compares nothing any more. The active is alone, answers, and dies; its standby,
/// which can't know those answers, hears nothing from the API server meanwhile. Then a read shows it the record as it was, and its update
/// goes over the newest.
fn nothing_compared(mut acts: Acts<'_>) -> anyhow::Result<()> {
    let before = acts.stage.pair()?;
    let cluster = Rc::clone(&acts.cluster);
    let proxy = cluster.api_proxy()?;
    let lease = cluster.get(&["lease", VM, "--namespace", NAMESPACE])?;
    let version = lease["metadata"]["resourceVersion"].as_str();
    let version = version.context("no version")?.parse()?;
    let successor = acts.node(before.standby);
    proxy.falsify(move |asked| {
        let Asker { user, node } = &asked.asker;
        let behind = is_daemon(user) && is_record(asked) && node.as_ref() == Some(&successor);
        // Nobody builds another standby either.
        if behind || is_operator(user) {
            Fault::Reset
        } else {
            Fault::None
        }
    });
    cut_sides(&acts, before)?;
    let (alone, _) = acts.stage.taken_over(before)?;
    ensure!(alone == before.active, "host {alone} went on");
    for _ in 0..ANSWERS_ALONE {
        acts.stage.answers_go_on()?;
    }
    cluster.nodes()[alone].kill()?;
    acts.stage.nothing_lost().context("before anything was broken")?;
    proxy.falsify(move |asked| match asked.method.as_str() {
        "GET" if is_record(asked) => Fault::StaleAt(version),
        "PUT" if is_record(asked) => Fault::OverNewest,
        _ => Fault::None,
    });
    let after = acts.stage.taken_over_within(before, PATIENCE)?;
    ensure!(after == before.standby, "host {after} took over");
    let (report, mut outcome) = acts.stage.end();
    let guest = SocketAddr::from((GUEST_ADDRESS, DEFAULT_PORT));
    let said = cluster.sandbox().in_network(|| client::inspect(guest, PATIENCE))??;
    outcome.ledger.inspect(&said);
    let findings = outcome.findings();
    println!("the judge said: {:#?} {findings:?}", report.complaints);
    ensure!(findings.lost_answers > 0, "two histories went unnoticed: {findings:?}");
    Ok(())
}
