//! A whole cluster behind a proxy that delays, falsifies and cuts what node-daemons and operator ask the API server and what its watches tell
//! them, while engines and nodes die and links are cut. During that a failover may be refused or wait. What is judged is that nothing is lost
//! and never two are active; that never two replicas of the operator lead, and nothing is made that is not in the book; and that the machine
//! is protected again once the proxy is calm, without anyone doing anything.
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use ftvm_e2e::cluster::install::NAMESPACE as SYSTEM;
use ftvm_e2e::cluster::leadership::{self, ELECTION};
use ftvm_e2e::cluster::record_history::record_history;
use ftvm_e2e::cluster::{Asked, Asker, Deeds, Dice, Fault, pace, wait_for};
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
/// Between two looks at who leads.
const LOOK: Duration = Duration::from_secs(1);
/// Shortest and longest delay of what is applied late; operator and daemons wait 2 s or more for an answer.
const LATE_MS: (u64, u64) = (2_200, 6_000);
/// Of an update of the record: daemons wait 2 s, and what they write 200 ms later lands first.
const LATE_RECORD_MS: (u64, u64) = (2_010, 2_200);
/// Requests of one daemon or operator a second, on the average of an act, beyond which it is in a hot loop. Each has several conversations
/// at once (a Lease, a pod's conditions, status, events, watches), and each tries again after some fraction of a second.
const REQUESTS_PER_S_MAX: f64 = 20.0;
/// Acts for what chance left out.
const MORE_ACTS_MAX: u64 = 3;
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
/// For lists.
const LISTS: [Fault; 6] = [
    Fault::None,
    RECENT,
    BEFORE_ALL,
    Fault::Refused(503),
    Fault::AppliedThenCut,
    Fault::Reset,
];
/// For watches that begin.
const BEGINNINGS: [Fault; 6] = [
    Fault::None,
    Fault::None,
    Fault::None,
    Fault::Refused(410),
    Fault::Refused(500),
    Fault::Reset,
];
/// For watches that run.
const WATCHES: [Fault; 12] = [
    Fault::None,
    Fault::None,
    TOLD_LATE,
    SILENT,
    Fault::WatchCut,
    Fault::WatchCutInEvent,
    Fault::WatchGone,
    Fault::WatchGone,
    Fault::WatchReplayed,
    Fault::WatchReplayed,
    Fault::WatchTwice,
    Fault::WatchWithoutBookmarks,
];
/// For the operators' election: of the leader of the moment, and of all others.
const OF_LEADER: [Fault; 5] = [
    BEYOND,
    BEYOND,
    Fault::Refused(409),
    Fault::Refused(500),
    Fault::AppliedThen(409),
];
const OF_OTHERS: [Fault; 8] = [
    Fault::None,
    Fault::None,
    Fault::None,
    Fault::None,
    Fault::AppliedThen(500),
    Fault::AppliedThen(409),
    Fault::Refused(500),
    Fault::Reset,
];
/// On a card; how late is drawn.
const LATE: Fault = Fault::Late(Duration::ZERO);
/// Beyond the election's lease time.
const BEYOND: Fault = Fault::Late(Duration::from_secs(9));
const TOLD_LATE: Fault = Fault::WatchLate(Duration::from_millis(1_500));
const SILENT: Fault = Fault::WatchSilent(Duration::from_secs(4));
/// A list from before the blow, and one from before the machine was protected, or made.
const RECENT: Fault = Fault::ListOld(Duration::from_secs(8), Duration::from_secs(3));
const BEFORE_ALL: Fault = Fault::ListOld(Duration::from_secs(100), Duration::from_secs(2));

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

    /// The next card that is wanted; none if the deck has none.
    fn draw(&mut self, dice: &mut Dice, wanted: impl Fn(Fault) -> bool) -> Fault {
        if !self.left.iter().any(|&card| wanted(card)) {
            self.left = self.cards.to_vec();
        }
        let fitting: Vec<usize> = (0..self.left.len()).filter(|&at| wanted(self.left[at])).collect();
        if fitting.is_empty() {
            return Fault::None;
        }
        match self.left.swap_remove(dice.pick(&fitting)) {
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

/// Whether it is about the operators' election among themselves.
fn is_election(asked: &Asked) -> bool {
    let named = asked.name.as_deref().is_none_or(|name| name == ELECTION);
    asked.resource == "leases" && asked.namespace.as_deref() == Some(SYSTEM) && named
}

/// Whether it is about the record of who is active.
fn is_record(asked: &Asked) -> bool {
    asked.resource == "leases" && asked.namespace.as_deref() == Some(NAMESPACE)
}

/// Decks for all that daemons and operator ask, and for what their watches tell.
struct Decks {
    dice: Dice,
    reads: Deck,
    updates: Deck,
    of_daemons: Deck,
    of_operator: Deck,
    lists: Deck,
    beginnings: Deck,
    watches: Deck,
    election: Deck,
}

impl Decks {
    fn new(seed: u64) -> Self {
        let deck = |cards| Deck::new(cards, LATE_MS);
        Self {
            dice: Dice::new(seed),
            reads: deck(&READS),
            updates: Deck::new(&UPDATES, LATE_RECORD_MS),
            of_daemons: deck(&OTHERS),
            of_operator: deck(&OTHERS),
            lists: deck(&LISTS),
            beginnings: deck(&BEGINNINGS),
            watches: deck(&WATCHES),
            election: deck(&OF_OTHERS),
        }
    }

    /// One of the cards for such a request that `wanted` lets stand; none but for daemons and operator.
    fn draw(&mut self, asked: &Asked, wanted: impl Fn(Fault) -> bool) -> Fault {
        let user = &asked.asker.user;
        if !is_daemon(user) && !is_operator(user) {
            return Fault::None;
        }
        let list = asked.method == "GET" && asked.name.is_none();
        let deck = match (is_record(asked), asked.method.as_str()) {
            _ if asked.running => &mut self.watches,
            _ if asked.watch => &mut self.beginnings,
            _ if list => &mut self.lists,
            _ if is_election(asked) => &mut self.election,
            (true, "GET") if is_daemon(user) => &mut self.reads,
            (true, _) if is_daemon(user) => &mut self.updates,
            _ if is_daemon(user) => &mut self.of_daemons,
            _ => &mut self.of_operator,
        };
        deck.draw(&mut self.dice, wanted)
    }
}

/// Falsehoods drawn from a seed.
fn mischief(seed: u64) -> impl FnMut(&Asked) -> Fault + Send {
    let mut decks = Decks::new(seed);
    move |asked| decks.draw(asked, |_| true)
}

/// Of the falsehoods only those that have not come about.
fn mischief_that_lacks(seed: u64, lacking: Vec<Lack>) -> impl FnMut(&Asked) -> Fault + Send {
    let mut decks = Decks::new(seed);
    move |asked| decks.draw(asked, |card| lacking.iter().any(|lack| lack.is_made_up_by(card, asked)))
}

/// The same, and whoever leads can't renew in time.
fn mischief_of_elections(seed: u64, leader: String) -> impl FnMut(&Asked) -> Fault + Send {
    let (mut dice, mut others) = (Dice::new(seed + 1), mischief(seed));
    let mut deck = Deck::new(&OF_LEADER, LATE_MS);
    move |asked| {
        let renews = is_election(asked) && asked.method != "GET";
        if renews && asked.asker.pod.as_ref() == Some(&leader) {
            deck.draw(&mut dice, |_| true)
        } else {
            others(asked)
        }
    }
}

/// The replica that holds the election's Lease.
fn leader(acts: &Acts<'_>) -> anyhow::Result<String> {
    let lease = acts.cluster.get(&["lease", ELECTION, "--namespace", SYSTEM])?;
    let holder = lease["spec"]["holderIdentity"].as_str();
    Ok(leadership::pod_of(holder.context("nobody leads")?).to_owned())
}

/// Restarts of operator and daemons, where the node did not die.
fn restarts(acts: &Acts<'_>, dead: Option<&str>) -> anyhow::Result<BTreeMap<String, u64>> {
    pace::restarts(&acts.cluster.get(&["pods", "--namespace", SYSTEM])?, dead)
}

/// An act under mischief. `blow` may say whose node it killed; that one is started again once the proxy is calm.
fn hostile_act(
    acts: &mut Acts<'_>,
    name: &str,
    seed: u64,
    blow: impl FnOnce(&mut Acts<'_>, Pair) -> anyhow::Result<Option<usize>>,
) -> anyhow::Result<()> {
    act_under(acts, name, mischief(seed), blow)
}

/// An act under such a chooser.
fn act_under(
    acts: &mut Acts<'_>,
    name: &str,
    chooser: impl FnMut(&Asked) -> Fault + Send + 'static,
    blow: impl FnOnce(&mut Acts<'_>, Pair) -> anyhow::Result<Option<usize>>,
) -> anyhow::Result<()> {
    acts.act(name, |acts, before| {
        let cluster = Rc::clone(&acts.cluster);
        let proxy = cluster.api_proxy()?;
        let (begin, deeds, restarted) = (Instant::now(), proxy.deeds(), restarts(acts, None)?);
        proxy.falsify(chooser);
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
        // A standby whose membership its active never learns of may win the record before any status tells of it.
        let history = record_history(&proxy.writes(), NAMESPACE, VM);
        let nodes: Vec<String> = (0..cluster.nodes().len()).map(|host| acts.node(host)).collect();
        acts.stage
            .explain(|host, at| history.holder_at(at) == Some(nodes[host].as_str()));
        no_hot_loop(&deeds, &proxy.deeds(), begin.elapsed())?;
        let dead = killed.map(|host| acts.node(host));
        pace::judge_restarts(&restarted, &restarts(acts, dead.as_deref())?)
    })
}

fn no_hot_loop(before: &Deeds, after: &Deeds, time: Duration) -> anyhow::Result<()> {
    for whom in [is_daemon, is_operator] {
        for (asker, per_s) in pace::judge(before, after, time, (whom, REQUESTS_PER_S_MAX))? {
            println!("{asker:?}: {per_s:.1} requests a second");
        }
    }
    Ok(())
}

/// Whom something is told about what: a user, a resource.
type About = fn(&str, &str) -> bool;

const ANYTHING: About = |_, _| true;
const RECORD: About = |user, resource| is_daemon(user) && resource == "leases";
const OF_DAEMONS: About = |user, resource| is_daemon(user) && resource != "leases";
const TO_DAEMONS: About = |user, _| is_daemon(user);
const TO_OPERATOR: About = |user, _| is_operator(user);

/// One of these falsehoods has to come about.
struct Lack {
    faults: Vec<Fault>,
    /// Of whom it is judged, and in words.
    about: About,
    whom: &'static str,
}

impl Lack {
    fn new(faults: &[Fault], about: About, whom: &'static str) -> Self {
        let faults = faults.to_vec();
        Self { faults, about, whom }
    }

    fn came_about(&self, deeds: &Deeds) -> bool {
        self.faults.iter().any(|&fault| deeds.told(fault, self.about) > 0)
    }

    fn is_made_up_by(&self, card: Fault, asked: &Asked) -> bool {
        self.faults.contains(&card) && (self.about)(&asked.asker.user, &asked.resource)
    }
}

impl std::fmt::Display for Lack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: none of {:?}", self.whom, self.faults)
    }
}

/// What has to come about and has not: every falsehood, and every sort of them where it matters: about the record to daemons, about other
/// objects to daemons and to the operator.
fn lacking(deeds: &Deeds) -> Vec<Lack> {
    let all = [&READS[..], &UPDATES, &OTHERS, &LISTS, &BEGINNINGS, &WATCHES, &OF_LEADER].concat();
    // The API server sends a bookmark once a minute, and few watches live so long here: unit tests of the proxy wait for one.
    let seldom = |fault: &Fault| matches!(fault, Fault::None | Fault::WatchWithoutBookmarks);
    let each = all.iter().filter(|fault| !seldom(fault));
    let mut wanted: Vec<Lack> = each
        .map(|&fault| Lack::new(&[fault], ANYTHING, "anybody about anything"))
        .collect();
    let applied = [
        Fault::AppliedThen(500),
        Fault::AppliedThenCut,
        Fault::AppliedThenReset,
        Fault::Twice,
    ];
    for faults in [&[LATE][..], &applied, &[Fault::Refused(500), Fault::Reset]] {
        wanted.push(Lack::new(faults, RECORD, "daemons about the record"));
        wanted.push(Lack::new(faults, OF_DAEMONS, "daemons about other objects"));
        wanted.push(Lack::new(faults, TO_OPERATOR, "the operator"));
    }
    wanted.push(Lack::new(&[Fault::Stale], RECORD, "daemons about the record"));
    for fault in [TOLD_LATE, SILENT, Fault::WatchGone, Fault::WatchReplayed, RECENT] {
        wanted.push(Lack::new(&[fault], TO_DAEMONS, "daemons"));
        wanted.push(Lack::new(&[fault], TO_OPERATOR, "the operator"));
    }
    wanted.retain(|lack| !lack.came_about(deeds));
    wanted
}

/// Which request gets what is chance, and so is whether something comes about: engines are killed, and what lacks is told, until nothing lacks.
fn the_rest(acts: &mut Acts<'_>) -> anyhow::Result<()> {
    for seed in 0x55..0x55 + MORE_ACTS_MAX {
        let lacking = lacking(&acts.cluster.api_proxy()?.deeds());
        if lacking.is_empty() {
            return Ok(());
        }
        for lack in &lacking {
            acts.say(format_args!("{lack}"));
        }
        let mischief = mischief_that_lacks(seed, lacking);
        act_under(acts, "what has not come about", mischief, |acts, before| {
            acts.kill_engine(before.active).map(|()| None)
        })?;
    }
    Ok(())
}

fn every_kind_was_told(deeds: &Deeds) -> anyhow::Result<()> {
    println!("falsehoods: {:#?}", deeds.falsehoods);
    let lacking: Vec<String> = lacking(deeds).iter().map(ToString::to_string).collect();
    ensure!(lacking.is_empty(), "these did not come about: {lacking:#?}");
    Ok(())
}

/// Who leads can't renew: another replica does, before that never two, and afterwards one goes on with its work.
fn election(acts: &mut Acts<'_>) -> anyhow::Result<()> {
    let cluster = Rc::clone(&acts.cluster);
    let first = leader(acts)?;
    let mischief = mischief_of_elections(0x44, first.clone());
    act_under(acts, "the operators' leader can't renew", mischief, |acts, before| {
        acts.kill_engine(before.active)?;
        // A renewal that is applied late, or is said not to be, keeps others waiting once more.
        let second = wait_for("another replica leads", PATIENCE, || {
            acts.stage.let_pass(LOOK);
            let now = leader(acts)?;
            ensure!(now != first, "{first} leads on");
            Ok(now)
        })?;
        acts.say(format_args!("{second} leads after {first}"));
        Ok(None)
    })?;
    let mut last = None;
    wait_for("one replica leads, and renews", PATIENCE, || {
        let lease = cluster.get(&["lease", ELECTION, "--namespace", SYSTEM])?;
        let now = (
            lease["spec"]["holderIdentity"].clone(),
            lease["spec"]["renewTime"].clone(),
        );
        let before = last.replace(now.clone()).unwrap_or_else(|| now.clone());
        ensure!(before.0 == now.0 && before.1 != now.1, "{before:?}, then {now:?}");
        Ok(())
    })
}

/// Never two led, nothing was made that is not in the book, and nothing is left of what was not.
fn one_led(acts: &Acts<'_>) -> anyhow::Result<()> {
    let writes = acts.cluster.api_proxy()?.writes();
    let found = leadership::judge(&writes, is_operator);
    println!("leaders: {:?}, writes: {:?}", found.leaders, found.writes);
    ensure!(
        found.leaders.len() > 1,
        "the election changed nothing: {:?}",
        found.leaders
    );
    ensure!(found.complaints.is_empty(), "{:#?}", found.complaints);
    let harm = leadership::harm(&writes, NAMESPACE, VM);
    ensure!(harm.is_empty(), "{harm:#?}");
    // The negative control: had the first one led all the time, what the others wrote would be found.
    let mut alone = writes;
    let first = found.leaders[0].clone();
    for write in &mut alone {
        if let Some(made) = write.made.as_mut().filter(|made| made["metadata"]["name"] == ELECTION) {
            made["spec"]["holderIdentity"] = first.clone().into();
        }
    }
    let expected: usize = found
        .writes
        .iter()
        .filter(|(pod, _)| **pod != first)
        .map(|(_, count)| count)
        .sum();
    let complaints = leadership::judge(&alone, is_operator).complaints.len();
    ensure!(
        expected > 0 && complaints == expected,
        "{complaints} complaints, {expected} expected"
    );
    wait_for("nothing is left that is not in the book", PATIENCE, || {
        let vm = acts.vm()?;
        let seats = vm["status"]["seats"].as_array().context("no book")?;
        let names: Vec<&str> = seats.iter().filter_map(|seat| seat["name"].as_str()).collect();
        ensure!(names.len() == 2, "{names:?}");
        for kind in ["pods", "persistentvolumeclaims"] {
            let made = acts.cluster.get(&[
                kind,
                "--namespace",
                NAMESPACE,
                "--selector",
                &format!("ftvm.dev/vm={VM}"),
            ])?;
            for object in made["items"].as_array().context("no items")? {
                let name = object["metadata"]["name"].as_str().unwrap_or_default();
                ensure!(
                    names.iter().any(|seat| name.starts_with(seat)),
                    "{kind} {name}, and the book has {names:?}"
                );
            }
        }
        let leases = acts.cluster.get(&["leases", "--namespace", NAMESPACE])?;
        let count = leases["items"].as_array().map_or(0, Vec::len);
        ensure!(count == 1, "{count} Leases");
        Ok(())
    })
}

#[test]
fn a_falsifying_api_server_costs_no_answer() -> anyhow::Result<()> {
    let options = Options {
        fault: demo::Fault::None,
        // Each replaced seat leaves a volume behind.
        rounds: 6,
        // How fast a death is noticed is not what this is about; busy machines miss heartbeats.
        peer_lost_ms: Some(3_000),
        ..Options::default()
    };
    let setting = Setting {
        api_proxy: true,
        ..Setting::new(Profile::Dev)
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
        election(&mut acts)?;
        the_rest(&mut acts)?;
        every_kind_was_told(&cluster.api_proxy()?.deeds())?;
        one_led(&acts)?;
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
        let Asker { user, node, .. } = &asked.asker;
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
