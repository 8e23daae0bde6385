//! Nodes are drained: seats hand over, or are ejected, and go one after the other. So they do when a person asks for it. None of it is a failover.
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use ftvm_e2e::cluster::{Plugin, wait_for};
use ftvm_e2e::demo::cluster::acts::Acts;
use ftvm_e2e::demo::cluster::looks;
use ftvm_e2e::demo::cluster::{NAMESPACE, VM};
use ftvm_e2e::demo::rounds::Pair;
use serde_json::Value;

use crate::{PATIENCE, last_failover};

/// Between two looks at what a drain does.
const LOOK: Duration = Duration::from_millis(200);

/// The standby has the guest before the active's pod is gone.
pub fn active(acts: &mut Acts<'_>, before: Pair) -> anyhow::Result<()> {
    let failover = last_failover(acts)?;
    acts.stage.system().hand_over(before.active)?;
    acts.standby_takes_over(before)?;
    acts.stage.system().make_spare(before.active)?;
    let now = acts.stage.pair()?;
    ensure!(now.active == before.standby, "{before:?} became {now:?}");
    handed_over(acts, now, &failover)
}

/// `kubectl ftvm switchover` ends when the standby has the guest, and says so.
pub fn asked(acts: &mut Acts<'_>, before: Pair) -> anyhow::Result<()> {
    let failover = last_failover(acts)?;
    let plugin = Plugin::new(&acts.cluster)?;
    let words = ["ftvm", "switchover", VM, "--namespace", NAMESPACE];
    let answer = plugin.run(&acts.cluster, &words)?;
    let expected = format!(
        "switchover of {VM}: the guest runs on node {}\n",
        acts.node(before.standby)
    );
    ensure!(answer.with(0)? == expected, "{}", answer.out);
    acts.standby_takes_over(before)?;
    let now = acts.stage.pair()?;
    ensure!(now.active == before.standby, "{before:?} became {now:?}");
    handed_over(acts, now, &failover)
}

/// The active stays what it is.
pub fn standby(acts: &mut Acts<'_>, before: Pair) -> anyhow::Result<()> {
    let (failover, change) = (last_failover(acts)?, last_change(acts, before.active)?);
    end(acts.start_drain(before.standby)?)?;
    let waited_ms = acts.stage.answers_go_on()?;
    acts.say(format_args!("the client waited {waited_ms:.1} ms"));
    uncordon(acts, before.standby)?;
    let now = acts.stage.pair()?;
    ensure!(now.active == before.active, "{before:?} became {now:?}");
    ensure!(now.term > before.term, "it never went: {now:?}");
    let changed = last_change(acts, now.active)?;
    ensure!(
        changed == change,
        "the active changed sides: {change:?}, then {changed:?}"
    );
    no_failover(acts, now, &failover)
}

/// The second seat goes once the first one's successor is ready, which is on the third node.
pub fn both(acts: &mut Acts<'_>, before: Pair) -> anyhow::Result<()> {
    let third = (0..3).find(|host| ![before.active, before.standby].contains(host));
    let (third, failover) = (third.context("no third node")?, last_failover(acts)?);
    let mut drains = [acts.start_drain(before.active)?, acts.start_drain(before.standby)?];
    let (deadline, mut fewest) = (Instant::now() + PATIENCE, usize::MAX);
    loop {
        let standing = looks::standing(&acts.cluster)?;
        ensure!(standing > 0, "no seat is left while both nodes are drained");
        fewest = fewest.min(standing);
        let ended = drains.iter_mut().map(Child::try_wait).collect::<Result<Vec<_>, _>>()?;
        if ended.iter().all(Option::is_some) {
            break;
        }
        ensure!(Instant::now() < deadline, "the drains do not end");
        acts.stage.let_pass(LOOK);
    }
    let [first, second] = drains.map(end);
    let told = first? + &second?;
    let of_vm = format!("-n \"{NAMESPACE}\"");
    let refused = |line: &str| line.contains(&of_vm) && line.contains("disruption budget");
    // Otherwise one drain was over before the other began, and nothing was proven.
    ensure!(
        fewest == 1 && told.lines().any(refused),
        "{fewest} seats at least; {told}"
    );
    let (active, waited_ms) = acts.stage.taken_over(before)?;
    acts.say(format_args!("the client waited {waited_ms:.1} ms"));
    ensure!(active == third, "host {active} has the guest");
    uncordon(acts, before.active)?;
    uncordon(acts, before.standby)?;
    let now = acts.stage.pair()?;
    ensure!(now.active == third, "{now:?}");
    handed_over(acts, now, &failover)
}

/// What kubectl said until the node was drained.
fn end(drain: Child) -> anyhow::Result<String> {
    let output = drain.wait_with_output()?;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "kubectl drain: {}: {told}", output.status);
    Ok(told)
}

fn uncordon(acts: &Acts<'_>, host: usize) -> anyhow::Result<()> {
    acts.cluster.kubectl(&["uncordon", &acts.node(host)]).map(drop)
}

/// How long the last change of sides took by which this host's engine became active: as a takeover, as a switchover.
fn last_change(acts: &mut Acts<'_>, host: usize) -> anyhow::Result<[Option<u64>; 2]> {
    let seat = wait_for("an answer of the active's engine", PATIENCE, || {
        let seat = acts.stage.system().seat(host);
        seat.context("the engine does not answer")
    })?;
    Ok(["takeover_us", "switchover_us"].map(|name| seat.counters.get(name).and_then(Value::as_u64)))
}

/// The active got the guest by a planned switchover, whose steps its engine measured.
fn handed_over(acts: &mut Acts<'_>, now: Pair, failover: &Value) -> anyhow::Result<()> {
    let steps = wait_for("the active's engine tells of a switchover", PATIENCE, || {
        let seat = acts.stage.system().seat(now.active);
        let steps = seat.context("the engine does not answer")?.change_us();
        let measured = |name: &str| steps.get(name).is_some_and(Value::is_u64);
        let failed_over = steps.keys().any(|name| name.starts_with("takeover_"));
        ensure!(
            measured("switchover_us") && measured("switchover_running_us") && !failed_over,
            "{steps:?}"
        );
        Ok(steps)
    })?;
    acts.say(Value::Object(steps));
    no_failover(acts, now, failover)
}

/// A crash would be told. An active publishes how long its epochs are in the status in which it tells how it became one, or later: what shows them is
/// as new as that.
fn no_failover(acts: &Acts<'_>, now: Pair, failover: &Value) -> anyhow::Result<()> {
    looks::shows(acts, now)?;
    let told = last_failover(acts)?;
    ensure!(told == *failover, "a drain was told as a failover: {told}");
    Ok(())
}
