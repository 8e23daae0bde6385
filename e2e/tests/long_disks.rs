//! A machine with two disks whose seats lie on datastores of two classes, through what becomes of datastores: the standby's is full, the
//! active's hangs, another one fails, and a claim is taken away. One client's one TCP connection lives through all of it, and after each act
//! the machine is protected with claims of the classes that were asked for.
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use ftvm_e2e::cluster::{Cluster, datastores, wait_for};
use ftvm_e2e::demo::cluster::acts::Acts;
use ftvm_e2e::demo::cluster::looks::{self, Seats, wait_event};
use ftvm_e2e::demo::cluster::{DISKS, NAMESPACE, Setting, VM, on_stage};
use ftvm_e2e::demo::rounds::Pair;
use ftvm_e2e::demo::system::Role;
use ftvm_e2e::demo::{Fault, Options, place};
use ftvm_e2e::hosts::disk::{Volume, take_blocks};
use ftvm_e2e::hosts::thaw;
use ftvm_e2e::lab::binaries::Profile;
use ftvm_e2e::report::Progress;
use serde_json::{Value, json};

const TEST: &str = "a_machine_survives_its_datastores";
/// Long enough for a busy machine; nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(180);
/// A request of a disk that is under way for longer hangs.
const HANGS_AFTER: Duration = Duration::from_secs(30);
/// Longer than a seat in trouble is borne.
const BORNE: Duration = Duration::from_secs(15);
/// So many failures in a row count as those of every join.
const FAILURES: u64 = 2;
/// Beside the first disk, as the seat's program has it.
const JOURNAL: &str = "ftvm-journal";

#[test]
fn a_machine_survives_its_datastores() -> anyhow::Result<()> {
    // First of all: the guard is this program, too.
    let guard = thaw::guard(TEST)?;
    let options = Options {
        fault: Fault::None,
        // Each replaced seat leaves a volume of each disk behind.
        rounds: 6,
        // A machine that is busy for a while must not count as dead: it is judged who takes over when.
        peer_lost_ms: Some(1_500),
        ..Options::default()
    };
    let setting = Setting {
        datastores: true,
        ..Setting::new(Profile::Dev)
    };
    let progress = Progress::new();
    let folder = place::new_folder("cluster-disks")?;
    let played = on_stage(&options, setting, &folder, &progress, |stage, cluster| {
        let mut acts = Acts::new(stage, cluster, &progress);
        acts.act("two classes serve", two_classes)?;
        acts.act("the standby's datastore is full", |acts, before| {
            standby_is_full(acts, before, &guard)
        })?;
        acts.act("the active's datastore hangs", |acts, before| {
            active_hangs(acts, before, &guard)
        })?;
        acts.act("the active's datastore fails", |acts, before| {
            active_fails(acts, before, &guard)
        })?;
        acts.act("a claim of the standby is taken away", claim_is_taken)?;
        let Acts { stage, .. } = acts;
        let (report, _) = stage.end();
        ensure!(report.passed(), "{:?}", report.complaints);
        Ok(())
    });
    let gone = wait_for("nothing is left of the datastores", PATIENCE, || {
        let left = datastores::in_use()?;
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    });
    played?;
    gone
}

#[test]
fn other_claims_and_other_words_are_found() -> anyhow::Result<()> {
    let claim = json!({"spec": {"storageClassName": "xfs"}, "status": {"phase": "Bound"}});
    let volume =
        |node: &str| json!({"metadata": {"name": format!("{node}-xfs-3")}, "spec": {"storageClassName": "xfs"}});
    judge_claim((&claim, &volume("n1")), "xfs", "n1", "xfs\n")?;
    let judged = [
        judge_claim((&claim, &volume("n1")), "ext4", "n1", "ext2/ext3\n"),
        judge_claim((&claim, &volume("n2")), "xfs", "n1", "xfs\n"),
        judge_claim((&claim, &volume("n1")), "xfs", "n1", "ext2/ext3\n"),
    ];
    ensure!(judged.iter().all(Result::is_err), "{judged:?}");
    let vm = |status: &str| {
        let told = json!({"type": "StorageHealthy", "status": status, "reason": "DiskFull", "message": "seat a: full"});
        json!({"status": {"conditions": [{"type": "Ready", "status": "True"}, told]}})
    };
    judge_storage(&vm("False"), "DiskFull", &["seat a", "full"])?;
    let judged = [
        judge_storage(&vm("True"), "DiskFull", &[]),
        judge_storage(&vm("False"), "DiskFailed", &[]),
        judge_storage(&vm("False"), "DiskFull", &["seat a", "hangs"]),
        judge_storage(&json!({"status": {}}), "DiskFull", &[]),
    ];
    ensure!(judged.iter().all(Result::is_err), "{judged:?}");
    let told = ["seat a: disk root hangs", "seat b went"].map(str::to_owned);
    judge_told(&told, &["seat a", "hangs"])?;
    ensure!(
        judge_told(&told, &["seat b", "hangs"]).is_err(),
        "no event has both words"
    );
    Ok(())
}

/// The negative control of what is left at the end is here: each node has loop devices.
fn two_classes(acts: &mut Acts<'_>, before: Pair) -> anyhow::Result<()> {
    let devices = datastores::in_use()?;
    let expected = acts.cluster.nodes().len() * datastores::CLASSES.len();
    ensure!(devices.len() == expected, "{expected} datastores are on {devices:?}");
    all_is_well(acts)?;
    acts.nothing_changed(before)
}

/// Somebody takes the blocks of the standby's journal, and all that is free beside it. The disks have theirs: it is the journal that fails, and
/// fails again whenever an engine joins. The seat is kept while no other node could have it, and then made anew there.
fn standby_is_full(acts: &mut Acts<'_>, before: Pair, guard: &Path) -> anyhow::Result<()> {
    let cluster = Rc::clone(&acts.cluster);
    let seats = looks::shows(acts, before)?;
    let (node, other) = (acts.node(before.standby), third(before));
    cordon(&cluster, &acts.node(other))?;
    let (datastore, folder) = datastore_of(acts, before.standby, &seats.standby, guard)?;
    let full = datastore.fill()?;
    take_blocks(&folder.join(JOURNAL))?;
    full.take_more()?;
    let at = format!("seat {} on node {node}: the journal is full since ", seats.standby);
    let words = [
        at.as_str(),
        "its storage fails at every join",
        "no other ready node could have it, so the seat is kept",
    ];
    wait_for("what fails is told, and that the seat is kept", PATIENCE, || {
        // What becomes free meanwhile is taken, too.
        full.take_more()?;
        judge_storage(&acts.vm()?, "DiskFull", &words)?;
        let failures = looks::storage_failures(&cluster, before.standby, &seats.standby)?;
        ensure!(failures >= FAILURES, "ftvm_seat_storage_failures is {failures}");
        Ok(())
    })?;
    wait_event(&cluster, VM, "DiskFull", &at)?;
    acts.stage.answers_go_on()?;
    let lost = format!("seat {} on {node} is given up and replaced", seats.standby);
    let early = looks::events(&cluster, VM, "SeatLost")?;
    ensure!(
        judge_told(&early, &[lost.as_str()]).is_err(),
        "it was not kept: {early:?}"
    );
    cluster.kubectl(&["uncordon", &acts.node(other)])?;
    wait_for("it is given up", PATIENCE, || {
        full.take_more()?;
        judge_told(&looks::events(&cluster, VM, "SeatLost")?, &[lost.as_str()])
    })?;
    is_now(acts, (before.active, other))?;
    drop(full);
    all_is_well(acts)
}

/// Whoever writes there waits in the kernel: the guest goes to the standby by itself, which does what was under way.
fn active_hangs(acts: &mut Acts<'_>, before: Pair, guard: &Path) -> anyhow::Result<()> {
    let seats = looks::shows(acts, before)?;
    let (datastore, _) = datastore_of(acts, before.active, &seats.active, guard)?;
    let began = Instant::now();
    let hanging = datastore.hang()?;
    acts.standby_takes_over(before)?;
    let moved = began.elapsed();
    ensure!(moved >= HANGS_AFTER, "it moved after {moved:?}, for another reason");
    // Were its disk to go on before the new active has called it, it would follow as if nothing had been, and there would be nothing to tell.
    wait_for("the former active has ended", PATIENCE, || {
        let former = acts.stage.system().seat(before.active);
        let stays = former.filter(|seat| matches!(seat.role, Role::Active | Role::Frozen));
        ensure!(stays.is_none(), "{stays:?}");
        Ok(())
    })?;
    drop(hanging);
    wait_switched(acts, before, &seats, "hangs")?;
    all_is_well(acts)
}

/// From now on the datastore gives errors, and its disks can't be opened any more. The new seat goes to the third node, although nobody has
/// said that this one is of no use.
fn active_fails(acts: &mut Acts<'_>, before: Pair, guard: &Path) -> anyhow::Result<()> {
    let seats = looks::shows(acts, before)?;
    let (datastore, _) = datastore_of(acts, before.active, &seats.active, guard)?;
    datastore.fail()?;
    acts.standby_takes_over(before)?;
    wait_switched(acts, before, &seats, "fails")?;
    is_now(acts, (before.standby, third(before)))?;
    all_is_well(acts)
}

/// Its pod holds the claim, and nothing changes before a person does what the condition says. The node whose datastore has failed gets no seat
/// meanwhile: a person has seen to that, too.
fn claim_is_taken(acts: &mut Acts<'_>, before: Pair) -> anyhow::Result<()> {
    let cluster = Rc::clone(&acts.cluster);
    let seats = looks::shows(acts, before)?;
    let seat = &seats.standby;
    cordon(&cluster, &acts.node(third(before)))?;
    let claim = format!("{seat}-{}", DISKS[1]);
    let delete =
        |kind: &str, name: &str, wait: &str| cluster.kubectl(&["delete", kind, name, "--namespace", NAMESPACE, wait]);
    delete("pvc", &claim, "--wait=false")?;
    let what = format!("claim {claim} of seat {seat} is being deleted");
    let advice = format!("while the guest runs on the other seat delete pod {seat}");
    wait_for("it is told what a person does", PATIENCE, || {
        judge_storage(&acts.vm()?, "ClaimBeingDeleted", &[what.as_str(), advice.as_str()])
    })?;
    wait_event(&cluster, VM, "ClaimBeingDeleted", &what)?;
    acts.holds_for(before, BORNE)?;
    delete("pod", seat, "--timeout=120s")?;
    wait_for("another seat takes its place", PATIENCE, || {
        let vm = acts.vm()?;
        let mut book = vm["status"]["seats"].as_array().context("no book")?.iter();
        ensure!(book.all(|entry| entry["name"] != seat.as_str()), "{}", vm["status"]);
        Ok(())
    })?;
    // No other node can have it: one's datastore has failed, and the other one has the guest.
    is_now(acts, (before.active, before.standby))?;
    all_is_well(acts)
}

/// Waits until these hosts are the active's and the standby's.
fn is_now(acts: &mut Acts<'_>, (active, standby): (usize, usize)) -> anyhow::Result<()> {
    let now = acts.stage.pair()?;
    ensure!(
        now.active == active && now.standby == standby,
        "the active is to be on host {active}, the standby on host {standby}: {now:?}"
    );
    Ok(())
}

/// The machine is protected, no storage is said to fail, and each claim is of the class that was asked for.
fn all_is_well(acts: &mut Acts<'_>) -> anyhow::Result<()> {
    acts.stage.pair()?;
    acts.wait_condition("StorageHealthy", "True", "NoFailures")?;
    let vm = acts.vm()?;
    let book = vm["status"]["seats"].as_array().context("no book")?;
    ensure!(book.len() == 2, "{} seats: {book:?}", book.len());
    for entry in book {
        let text = |key: &str| entry[key].as_str().with_context(|| format!("no {key}: {entry}"));
        let (seat, node) = (text("name")?, text("node")?);
        let class = match entry["slot"].as_u64() {
            Some(0) => datastores::CLASSES[0],
            Some(1) => datastores::CLASSES[1],
            _ => bail!("no slot: {entry}"),
        };
        for disk in DISKS {
            let (claim, volume) = claim_and_volume(&acts.cluster, seat, disk)?;
            let path = path_of(&volume)?;
            let system = acts.cluster.node(node)?;
            let system = system.exec(&["stat", "--file-system", "--format=%T", path])?;
            let judged = judge_claim((&claim, &volume), class, node, &String::from_utf8_lossy(&system));
            judged.with_context(|| format!("disk {disk} of seat {seat}"))?;
        }
    }
    Ok(())
}

/// A claim is bound to a volume of its class on its seat's node, where `stat` says of the file system what that class is.
fn judge_claim((claim, volume): (&Value, &Value), class: &str, node: &str, system: &str) -> anyhow::Result<()> {
    let bound = claim["status"]["phase"] == "Bound" && claim["spec"]["storageClassName"] == class;
    ensure!(bound, "class {class} was asked for: {claim}");
    let name = volume["metadata"]["name"].as_str().context("a volume without a name")?;
    ensure!(
        name.starts_with(&format!("{node}-{class}-")) && volume["spec"]["storageClassName"] == class,
        "a volume of class {class} on {node} is due: {volume}"
    );
    let known = if class == "ext4" { "ext2/ext3" } else { class };
    ensure!(system.trim() == known, "a volume of class {class} is on {system}");
    Ok(())
}

/// The condition says that storage fails, for this reason and with all these words.
fn judge_storage(vm: &Value, reason: &str, words: &[&str]) -> anyhow::Result<()> {
    let mut conditions = vm["status"]["conditions"].as_array().into_iter().flatten();
    let told = conditions.find(|condition| condition["type"] == "StorageHealthy");
    let told = told.context("no condition StorageHealthy")?;
    ensure!(told["status"] == "False" && told["reason"] == reason, "{told}");
    let message = told["message"].as_str().unwrap_or_default().to_owned();
    judge_told(&[message], words)
}

/// One of these texts has all these words.
fn judge_told(told: &[String], words: &[&str]) -> anyhow::Result<()> {
    let has_all = |told: &String| words.iter().all(|word| told.contains(*word));
    ensure!(told.iter().any(has_all), "none has all of {words:?}: {told:?}");
    Ok(())
}

/// Waits until an event tells that the guest went to the other seat, because of what, and where it is.
fn wait_switched(acts: &Acts<'_>, before: Pair, seats: &Seats, how: &str) -> anyhow::Result<()> {
    let (from, to) = (acts.node(before.active), acts.node(before.standby));
    let from = format!("seat {} on node {from}: ", seats.active);
    let how = format!(" {how} since ");
    let to = format!("the guest went to seat {} on node {to} for that", seats.standby);
    wait_for("an event tells of the switchover", PATIENCE, || {
        let told = looks::events(&acts.cluster, VM, "SwitchedForDisk")?;
        judge_told(&told, &[from.as_str(), "disk ", how.as_str(), to.as_str()])
    })
}

/// The host of neither seat.
fn third(pair: Pair) -> usize {
    3 - pair.active - pair.standby
}

fn cordon(cluster: &Cluster, node: &str) -> anyhow::Result<()> {
    cluster.kubectl(&["cordon", node]).map(drop)
}

/// A seat's claim of a disk, and the volume that it is bound to.
fn claim_and_volume(cluster: &Cluster, seat: &str, disk: &str) -> anyhow::Result<(Value, Value)> {
    let claim = cluster.get(&["pvc", "--namespace", NAMESPACE, &format!("{seat}-{disk}")])?;
    let volume = claim["spec"]["volumeName"].as_str();
    let volume = cluster.get(&["pv", volume.with_context(|| format!("no volume: {claim}"))?])?;
    Ok((claim, volume))
}

fn path_of(volume: &Value) -> anyhow::Result<&str> {
    let path = volume["spec"]["local"]["path"].as_str();
    path.with_context(|| format!("a volume without a path: {volume}"))
}

/// The datastore that a seat's disks are on, and the folder there of the first one, beside which the journal is.
fn datastore_of(acts: &Acts<'_>, host: usize, seat: &str, guard: &Path) -> anyhow::Result<(Volume, PathBuf)> {
    let (claim, volume) = claim_and_volume(&acts.cluster, seat, DISKS[0])?;
    let class = claim["spec"]["storageClassName"].as_str();
    let class = class.with_context(|| format!("a claim without a class: {claim}"))?;
    let datastore = acts.cluster.nodes()[host].native()?.datastore(class, guard)?;
    let folder = Path::new(path_of(&volume)?).file_name();
    let folder = datastore.folder().join(folder.context("a volume without a folder")?);
    Ok((datastore, folder))
}
