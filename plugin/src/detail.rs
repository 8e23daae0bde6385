//! One VM in full.

use ftvm_crds::seat::{SeatPublished, SeatRole};
use ftvm_crds::{
    AskedFor, Attachment, Contents, CpuBaseline, Disk, FaultTolerantVM, FaultTolerantVMStatus, Mode, Network, Outcome,
    RunStrategy, SeatEntry, mac,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;

use crate::cluster::Said;
use crate::fleet;
use crate::health::{NOT_LOOKED_AT, PROTECTED, Protection, protection, troubles};
use crate::text::{Cell, Last, Paper, Tone, age, paragraph, table};

/// All that a person may want to know, and what to do. `said` is what the seats' pods say.
pub fn render(vm: &FaultTolerantVM, said: &Said, now: Timestamp, paper: Paper) -> String {
    let missing = FaultTolerantVMStatus::default();
    let status = vm.status.as_ref().unwrap_or(&missing);
    let title = format!("{} in namespace {}", vm.name_any(), vm.namespace().unwrap_or_default());
    let mut text = table(&[vec![Cell::toned(title, Tone::Head)]], 0, Last::Cut, paper);
    text.push_str(&table(&facts(vm, status, now), 2, Last::Wrap, paper));
    text.push_str(&section(
        "Seats",
        &["NAME", "NODE", "ROLE", "TERM", "NOTE"],
        seats(status, said, now),
        paper,
    ));
    if let Err(why) = said {
        text.push_str(&paragraph(
            "!",
            &format!("what they say themselves is missing: {why}"),
            paper,
        ));
    }
    let disks = vm.spec.disks.iter().map(disk).collect();
    text.push_str(&section(
        "Disks",
        &["NAME", "SIZE", "CLASS", "FIRST CONTENTS"],
        disks,
        paper,
    ));
    for line in preparing(status, said) {
        text.push_str(&paragraph("-", &line, paper));
    }
    let cards = vm.spec.networks.iter().enumerate();
    let cards = cards.map(|(card, network)| network_row(vm, card, network)).collect();
    text.push_str(&section(
        "Networks",
        &["NAME", "ATTACHED TO", "MAC", "ADDRESSES"],
        cards,
        paper,
    ));
    let names = ["CONDITION", "STATUS", "REASON", "SINCE"];
    text.push_str(&section("Conditions", &names, conditions(status, now), paper));
    text.push('\n');
    text.push_str(&what_to_do(vm, paper));
    text
}

/// A heading and a table, or nothing if there are no rows.
fn section(title: &str, names: &[&str], rows: Vec<Vec<Cell>>, paper: Paper) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let title = table(&[vec![Cell::toned(title, Tone::Head)]], 0, Last::Cut, paper);
    let head = names.iter().map(Cell::new).collect();
    let rows: Vec<Vec<Cell>> = std::iter::once(head).chain(rows).collect();
    format!("\n{title}{}", table(&rows, 2, Last::Wrap, paper))
}

fn facts(vm: &FaultTolerantVM, status: &FaultTolerantVMStatus, now: Timestamp) -> Vec<Vec<Cell>> {
    let mut facts = Vec::new();
    let mut fact = |name: &str, value: Cell| facts.push(vec![Cell::new(name), value]);
    fact("Phase", status.phase.map_or_else(|| Cell::new("?"), fleet::phase));
    let (asked, seen) = (vm.metadata.generation, status.observed_generation);
    if let (Some(asked), Some(seen)) = (asked, seen)
        && seen < asked
    {
        let text = "the operator has not looked at the last change of the spec yet";
        fact("", Cell::toned(text, Tone::Busy));
    }
    if vm.spec.run_strategy == RunStrategy::Halted {
        fact("Wanted", Cell::new("Halted (spec.runStrategy)"));
    }
    fact("Protected", protected(status));
    fact("Active", Cell::new(place(status, status.active.as_deref())));
    fact("Standby", Cell::new(place(status, status.standby.as_deref())));
    if let Some(term) = status.term {
        fact("Term", Cell::new(term.to_string()));
    }
    fact("Mode", Cell::new(mode(vm, status)));
    if let Some(cpu) = &status.cpu {
        let source = match cpu.source {
            CpuBaseline::Common => "Common",
            CpuBaseline::Host => "Host",
        };
        let former = if cpu.former { ", until it was halted" } else { "" };
        fact("CPU", Cell::new(format!("{source}{former}: {}", cpu.why)));
    }
    if let Some(percent) = status.resync_percent {
        fact("Resync", Cell::toned(format!("{percent} %"), Tone::Busy));
    }
    if status.replacements > 0 {
        let text = format!("{} seats since the VM was last protected", status.replacements);
        fact("Replaced", Cell::new(text));
    }
    if let Some(failover) = &status.last_failover {
        let node = failover.node.as_deref().unwrap_or("an unknown node");
        let gap_ms = failover.gap_microseconds as f64 / 1000.0;
        let text = format!(
            "{}: seat {} took over on {node} ({}), nobody ran the guest for {gap_ms:.1} ms",
            since(&failover.time, now),
            failover.seat,
            failover.reason
        );
        fact("Last failover", Cell::new(text));
    }
    for (name, asked) in [("Switchover", &status.switchover), ("Failover", &status.failover)] {
        if let Some(asked) = asked {
            fact(name, outcome(asked));
        }
    }
    facts
}

fn protected(status: &FaultTolerantVMStatus) -> Cell {
    let condition = status.condition(PROTECTED);
    let message = condition.map_or("", |condition| condition.message.as_str());
    let reason = condition.map_or("", |condition| condition.reason.as_str());
    match protection(status) {
        Protection::Yes => Cell::toned(format!("yes: {message}"), Tone::Good),
        // What to do stands below.
        Protection::No => Cell::toned(format!("no ({reason})"), Tone::Bad),
        Protection::Nothing => Cell::new("no guest runs"),
        Protection::Unknown => Cell::new("?"),
    }
}

/// A node of the status, with the seat that the book has there.
fn place(status: &FaultTolerantVMStatus, node: Option<&str>) -> String {
    let Some(node) = node else {
        return "none".to_owned();
    };
    let there = |entry: &&SeatEntry| entry.node.as_deref() == Some(node) && !entry.leaving;
    match status.seats.iter().find(there) {
        Some(entry) => format!("node {node}, seat {}", entry.name),
        None => format!("node {node}"),
    }
}

fn mode(vm: &FaultTolerantVM, status: &FaultTolerantVMStatus) -> String {
    let mut text = match status.mode.unwrap_or(vm.spec.fault_tolerance.mode) {
        Mode::Checkpoint => "Checkpoint".to_owned(),
    };
    if let Some(interval) = status.interval_ms {
        text.push_str(&format!(", epochs of {interval} ms"));
    }
    if let Some(lag) = status.lag_ms {
        text.push_str(&format!(", output waits {lag} ms for the standby"));
    }
    text
}

/// When, and how long ago that is.
fn since(time: &Time, now: Timestamp) -> String {
    format!("{} ({} ago)", time.0, age(time.0, now))
}

fn outcome(asked: &AskedFor) -> Cell {
    let (word, tone) = match asked.outcome {
        Outcome::Pending => ("pending", Tone::Busy),
        Outcome::Done => ("done", Tone::Good),
        Outcome::Refused => ("refused", Tone::Bad),
    };
    let why = asked.why.as_ref().map_or_else(String::new, |why| format!(": {why}"));
    Cell::toned(format!("{word} ({}){why}", asked.request), tone)
}

/// What the seat's pod of the book says; others of its name do not count.
pub fn published<'a>(entry: &SeatEntry, said: &'a Said) -> Option<&'a Result<SeatPublished, String>> {
    said.as_ref().ok()?.get(entry.pod_uid.as_deref()?)
}

fn seats(status: &FaultTolerantVMStatus, said: &Said, now: Timestamp) -> Vec<Vec<Cell>> {
    let row = |entry: &SeatEntry| {
        let found = published(entry, said).and_then(|said| said.as_ref().ok());
        let role = found.and_then(|found| found.role);
        let term = found.filter(|found| found.term > 0).map(|found| found.term.to_string());
        vec![
            Cell::new(&entry.name),
            Cell::new(entry.node.as_deref().unwrap_or("none")),
            role.map_or_else(|| Cell::new("-"), role_cell),
            Cell::new(term.unwrap_or_default()),
            Cell::new(seat_note(entry, said, now)),
        ]
    };
    status.seats.iter().map(row).collect()
}

fn role_cell(role: SeatRole) -> Cell {
    let (word, tone) = match role {
        SeatRole::Starting => ("starting", Tone::Busy),
        SeatRole::Joining => ("joining", Tone::Busy),
        SeatRole::Standby => ("standby", Tone::Good),
        SeatRole::Active => ("active", Tone::Good),
        SeatRole::Frozen => ("frozen", Tone::Busy),
        SeatRole::Ended => ("ended", Tone::Bad),
    };
    Cell::toned(word, tone)
}

fn seat_note(entry: &SeatEntry, said: &Said, now: Timestamp) -> String {
    let mut notes = Vec::new();
    if entry.leaving {
        notes.push("is being removed".to_owned());
    }
    if let Some(lost) = &entry.lost_since {
        notes.push(format!("without an engine that joins for {}", age(lost.0, now)));
    }
    match published(entry, said) {
        Some(Ok(found)) => {
            if let Some(percent) = found.resync_percent {
                notes.push(format!("{percent} %"));
            }
            let code = if found.code == 0 {
                String::new()
            } else {
                format!(" (code {})", found.code)
            };
            if !found.why.is_empty() && !prepares(found) {
                notes.push(format!("{}{code}", found.why));
            }
            let troubles = found.storage_troubles.iter();
            notes.extend(troubles.map(|trouble| format!("{} {} ({})", trouble.part, trouble.kind, trouble.why)));
        }
        Some(Err(why)) => notes.push(why.clone()),
        // Its pod is not in the book, is gone, or nobody knows.
        None => {}
    }
    notes.join("; ")
}

/// Is a program preparing the seat's disks? Its words say which one, and how far it is.
fn prepares(found: &SeatPublished) -> bool {
    found.incarnation.is_none() && found.role.is_none() && found.code == 0 && found.resync_percent.is_some()
}

/// Disks that are being allocated, downloaded, written.
fn preparing(status: &FaultTolerantVMStatus, said: &Said) -> Vec<String> {
    let line = |entry: &SeatEntry| {
        let found = published(entry, said)?.as_ref().ok()?;
        prepares(found).then(|| format!("seat {}: {}", entry.name, found.why))
    };
    status.seats.iter().filter_map(line).collect()
}

fn disk(disk: &Disk) -> Vec<Cell> {
    let contents = match disk.contents() {
        Contents::Blank => "blank".to_owned(),
        Contents::File(path, backing) => format!("{} of the guest image", chain(path, backing)),
        Contents::Claim(file) => format!("{} of claim {}", chain(file.path, file.backing), file.claim_name),
        Contents::Http(file) => file.url,
    };
    vec![
        Cell::new(&disk.name),
        Cell::new(&disk.size),
        Cell::new(classes(disk)),
        Cell::new(contents),
    ]
}

/// A file and those that it is the difference from.
fn chain(path: String, backing: Vec<String>) -> String {
    [vec![path], backing].concat().join(" over ")
}

/// The storage class of its volumes, or those of each slot's.
fn classes(disk: &Disk) -> String {
    let [first, second] = [0, 1].map(|slot| disk.storage_class(slot).unwrap_or("default"));
    if first == second {
        return first.to_owned();
    }
    format!("{first}, {second}")
}

fn network_row(vm: &FaultTolerantVM, card: usize, network: &Network) -> Vec<Cell> {
    let attached = match network.attachment() {
        Some(Attachment::Bridge(name)) => format!("bridge {name}"),
        None => "nothing".to_owned(),
    };
    let own = || {
        let vm_id = vm.uid()?.parse().ok()?;
        Some(mac::of(vm_id, u8::try_from(card).ok()?))
    };
    let mac = network.mac.clone().or_else(own).unwrap_or_default();
    let any = network.addresses.is_empty().then(|| "any".to_owned());
    let addresses = any.unwrap_or_else(|| network.addresses.join(", "));
    vec![
        Cell::new(&network.name),
        Cell::new(attached),
        Cell::new(mac),
        Cell::new(addresses),
    ]
}

fn conditions(status: &FaultTolerantVMStatus, now: Timestamp) -> Vec<Vec<Cell>> {
    let wrong: Vec<&str> = troubles(status).map(|condition| condition.type_.as_str()).collect();
    let rows = status.conditions.iter().map(|condition| {
        let is_wrong = wrong.contains(&condition.type_.as_str());
        let tone = if is_wrong { Tone::Bad } else { Tone::Plain };
        vec![
            Cell::new(&condition.type_),
            Cell::toned(&condition.status, tone),
            Cell::new(&condition.reason),
            Cell::new(age(condition.last_transition_time.0, now)),
        ]
    });
    rows.collect()
}

/// What the conditions tell people, each once.
pub fn advice(vm: &FaultTolerantVM) -> Vec<String> {
    let Some(status) = &vm.status else {
        return vec![NOT_LOOKED_AT.to_owned()];
    };
    let mut told: Vec<&str> = Vec::new();
    for condition in troubles(status) {
        let message = condition.message.as_str();
        let message = if message.is_empty() {
            condition.reason.as_str()
        } else {
            message
        };
        if !told.contains(&message) {
            told.push(message);
        }
    }
    told.into_iter().map(str::to_owned).collect()
}

fn what_to_do(vm: &FaultTolerantVM, paper: Paper) -> String {
    let title = |text: &str| table(&[vec![Cell::toned(text, Tone::Head)]], 0, Last::Cut, paper);
    let advice = advice(vm);
    if advice.is_empty() {
        return title("Nothing is to be done.");
    }
    let lines = advice.iter().map(|line| paragraph("-", line, paper));
    std::iter::once(title("What is wrong, and what to do"))
        .chain(lines)
        .collect()
}

#[cfg(test)]
#[path = "detail_tests.rs"]
mod tests;
