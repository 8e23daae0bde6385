//! Which CPU a guest sees: what the nodes that may have its seats have in common. Pure.
//!
//! Each daemon publishes what its node can give. Nodes that may have a seat are grouped: all that can give what one of them has,
//! reduced to what they share. CPUs of two vendors, or frequencies that can't be scaled, are never in one group. The group is taken
//! that most nodes are in which could have a seat now, in two topology domains at least.
//!
//! What nodes publish is untrusted: one whose annotation is damaged has no seat, and is named.

use std::collections::{BTreeMap, BTreeSet};

use ftvm_cpu::CpuBaseline;
use ftvm_crds::cpu::NodeCpu;
use ftvm_crds::names::LABEL_HOSTNAME;
use ftvm_crds::{CHOSEN_WHY_LENGTH_MAX, ChosenCpu, CpuBaseline as Source, FaultTolerantVM, SeatEntry};
use k8s_openapi::api::core::v1::{Taint, Toleration};

use crate::observe::{NodeSeen, Observed};

/// Nodes that are named in one message.
const NAMES_MAX: usize = 5;
/// CPUs that are tried as the first of a group. More kinds than that are no cluster that anybody planned.
const KINDS_MAX: usize = 64;
/// Taints that say how a node is doing now.
const PASSING_TAINTS: &str = "node.kubernetes.io/";

/// What can be chosen now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// This, by all nodes that matter.
    Common(ChosenCpu),
    /// Nodes may be about to come, or to publish their CPU.
    Early {
        /// What is missing.
        why: String,
        /// What to take if it stays so.
        then: ChosenCpu,
    },
    /// Two nodes could have the seats, but share no CPU.
    Unlike(String),
    /// No node could have a seat now.
    Nobody,
}

/// A node that may have a seat of the VM.
struct Candidate<'a> {
    name: &'a str,
    /// What fails together with it.
    domain: &'a str,
    /// It could have the seat of the first, of the second slot.
    slots: [bool; 2],
    /// It could have one now: ready, not cordoned.
    usable: bool,
    cpu: Result<Option<NodeCpu>, String>,
}

/// All nodes with the same CPU.
struct Kind<'a> {
    cpu: &'a NodeCpu,
    nodes: Vec<&'a Candidate<'a>>,
}

impl Kind<'_> {
    fn usable(&self) -> usize {
        self.nodes.iter().filter(|node| node.usable).count()
    }
}

/// What a node has published.
pub fn published(node: &NodeSeen) -> Result<Option<NodeCpu>, String> {
    let Some(text) = &node.cpu else { return Ok(None) };
    let label = node.labels.get(ftvm_crds::names::LABEL_CPU).map(String::as_str);
    NodeCpu::read(text, label).map(Some).map_err(|error| error.to_string())
}

/// What can be chosen for this VM now.
pub fn choose(seen: &Observed) -> Choice {
    let candidates = candidates(seen);
    if !candidates.iter().any(|node| node.usable) {
        return Choice::Nobody;
    }
    let mute = mute(&candidates);
    let kinds = kinds(&candidates);
    let former = former(&seen.vm);
    let groups = kinds
        .iter()
        .take(KINDS_MAX)
        .map(|first| group(first, &kinds, former.as_ref()));
    // Of equals the first.
    let best = groups.reduce(|best, next| if next.rank > best.rank { next } else { best });
    let Some(best) = best else {
        return silent(mute);
    };
    let chosen = best.chosen();
    if best.rank.pairs && mute.is_empty() {
        return Choice::Common(chosen);
    }
    if best.rank.pairs {
        return Choice::Early {
            why: mute,
            then: chosen,
        };
    }
    let spoken: Vec<_> = kinds.iter().flat_map(|kind| kind.nodes.iter().copied()).collect();
    if can_pair(&spoken) && !best.rank.former {
        return Choice::Unlike(unlike(&best.baseline, &kinds, &mute));
    }
    if mute.is_empty() {
        let why = "no second node could have a seat now: it is waited for a moment".to_owned();
        return Choice::Early { why, then: chosen };
    }
    silent(mute)
}

/// What the daemons do not say must not keep a guest from starting.
fn silent(mute: String) -> Choice {
    let then = ChosenCpu {
        source: Source::Host,
        baseline: None,
        why: clipped(format!("that of the node where the guest starts, for {mute}")),
        former: false,
    };
    Choice::Early { why: mute, then }
}

/// Values of the label of nodes that can't give this CPU.
pub fn unfit_labels(seen: &Observed, baseline: &CpuBaseline) -> BTreeSet<String> {
    let mut labels = BTreeMap::new();
    for node in seen.nodes.values() {
        let Some(label) = node.labels.get(ftvm_crds::names::LABEL_CPU) else {
            continue;
        };
        // A label that one node has without right must not bar those that have it by right.
        let fit = labels.entry(label).or_insert(false);
        *fit = *fit || lacks(node, baseline).is_none();
    }
    let unfit = labels.into_iter().filter(|(_, fit)| !fit);
    unfit.map(|(label, _)| label.clone()).collect()
}

/// What this node lacks to have a seat of a guest with this CPU.
pub fn lacks(node: &NodeSeen, baseline: &CpuBaseline) -> Option<String> {
    match published(node) {
        Err(why) => Some(why),
        Ok(None) => Some("it has not published its CPU".to_owned()),
        Ok(Some(cpu)) => cpu.gives(baseline).err().map(|error| error.to_string()),
    }
}

/// The CPU that was chosen for the VM, if it is not just its host's.
pub fn chosen(vm: &FaultTolerantVM) -> Option<CpuBaseline> {
    let text = vm.status.as_ref()?.cpu_in_force()?.baseline.as_deref()?;
    // Written by this operator.
    CpuBaseline::from_text(text).ok()
}

/// The CPU that the guest had before the VM was halted.
fn former(vm: &FaultTolerantVM) -> Option<CpuBaseline> {
    let cpu = vm.status.as_ref()?.cpu.as_ref().filter(|cpu| cpu.former)?;
    CpuBaseline::from_text(cpu.baseline.as_deref()?).ok()
}

/// Nodes that offer seats and can't give the VM's CPU, with what they lack; empty if there is none.
pub fn unfit(seen: &Observed) -> String {
    let Some(baseline) = chosen(&seen.vm) else {
        return String::new();
    };
    let offering = seen.nodes.iter().filter(|(_, node)| node.seats > 0);
    let unfit = offering.filter_map(|(name, node)| Some(format!("{name} ({})", lacks(node, &baseline)?)));
    let unfit = listed(unfit);
    if unfit.is_empty() {
        return unfit;
    }
    format!("; these can't give the guest's CPU: {unfit}; it is chosen anew once the VM is halted and started")
}

/// Could another node have this seat now: of its slot, with the guest's CPU, apart from the VM's other seat?
pub fn has_other_place(seen: &Observed, book: &[SeatEntry], entry: &SeatEntry) -> bool {
    let key = &seen.vm.spec.placement.topology_key;
    let others = book.iter().filter(|other| other.name != entry.name && !other.leaving);
    let domains = others.filter_map(|other| {
        let name = other.node.as_deref()?;
        let label = seen.nodes.get(name).and_then(|node| node.labels.get(key));
        Some(label.map_or(name, String::as_str))
    });
    let taken: Vec<&str> = domains.collect();
    let chosen = chosen(&seen.vm);
    candidates(seen).iter().any(|node| {
        let cpu = node.cpu.as_ref().ok().and_then(Option::as_ref);
        let fits = chosen
            .as_ref()
            .is_none_or(|chosen| cpu.is_some_and(|cpu| cpu.gives(chosen).is_ok()));
        let slot = node.slots.get(usize::from(entry.slot)) == Some(&true);
        let other = entry.node.as_deref() != Some(node.name) && !taken.contains(&node.domain);
        node.usable && fits && slot && other
    })
}

fn candidates(seen: &Observed) -> Vec<Candidate<'_>> {
    let placement = &seen.vm.spec.placement;
    let selects = |slot: usize, node: &NodeSeen| {
        let wishes = placement.seats.get(slot);
        wishes.is_none_or(|wishes| node.has_labels(&wishes.node_selector))
    };
    let bears = |node: &NodeSeen| node.taints.iter().all(|taint| is_borne(taint, &placement.tolerations));
    // A daemon that is being replaced offers no seat for a moment.
    let offering = seen
        .nodes
        .iter()
        .filter(|(_, node)| node.seats.max(node.seats_in_all) > 0 && bears(node));
    let candidates = offering.filter_map(|(name, node)| {
        Some(Candidate {
            name,
            domain: domain(&placement.topology_key, name, node)?,
            slots: [selects(0, node), selects(1, node)],
            usable: node.ready && node.schedulable && node.seats > 0,
            cpu: published(node),
        })
    });
    candidates.filter(|node| node.slots.contains(&true)).collect()
}

/// What fails together with a node. One that does not say so gets no seat; but each has a name.
pub fn domain<'a>(key: &str, name: &'a str, node: &'a NodeSeen) -> Option<&'a str> {
    let told = node.labels.get(key).map(String::as_str);
    told.or((key == LABEL_HOSTNAME).then_some(name))
}

/// Whether a seat's pod bears this taint, or it says only how the node is doing now.
fn is_borne(taint: &Taint, tolerations: &[Toleration]) -> bool {
    if taint.key.starts_with(PASSING_TAINTS) || taint.effect == "PreferNoSchedule" {
        return true;
    }
    tolerations.iter().any(|toleration| {
        let exists = toleration.operator.as_deref() == Some("Exists");
        let key = match toleration.key.as_deref() {
            None | Some("") => exists,
            Some(key) => key == taint.key,
        };
        let effect = toleration.effect.as_deref().unwrap_or("");
        let value = exists || toleration.value.as_deref().unwrap_or("") == taint.value.as_deref().unwrap_or("");
        key && value && (effect.is_empty() || effect == taint.effect)
    })
}

/// Alike nodes together, most common first.
fn kinds<'a>(candidates: &'a [Candidate<'a>]) -> Vec<Kind<'a>> {
    let mut kinds: BTreeMap<String, Kind<'a>> = BTreeMap::new();
    for candidate in candidates {
        let Ok(Some(cpu)) = &candidate.cpu else { continue };
        let kind = kinds
            .entry(cpu.label())
            .or_insert_with(|| Kind { cpu, nodes: Vec::new() });
        kind.nodes.push(candidate);
    }
    let mut kinds: Vec<_> = kinds.into_values().collect();
    // Stable: alike ones stay in the order of their labels.
    kinds.sort_by_key(|kind| std::cmp::Reverse((kind.usable(), kind.nodes.len())));
    kinds
}

/// How good a group is; the greatest is taken.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    /// Like the CPU that the guest had before it was halted: its volumes may be where that is.
    former: bool,
    /// Two seats could be placed now.
    pairs: bool,
    /// Nodes that could have a seat now.
    usable: usize,
    /// All its nodes.
    nodes: usize,
    /// Those with the CPU of the first.
    alike: usize,
}

struct Group<'a> {
    baseline: CpuBaseline,
    rank: Rank,
    nodes: Vec<&'a Candidate<'a>>,
}

impl Group<'_> {
    fn chosen(&self) -> ChosenCpu {
        let noun = if self.nodes.len() == 1 { "node" } else { "nodes" };
        let names = listed(self.nodes.iter().map(|node| node.name.to_owned()));
        ChosenCpu {
            source: Source::Common,
            baseline: Some(self.baseline.to_text()),
            why: clipped(format!("common to {} {noun}: {names}", self.nodes.len())),
            former: false,
        }
    }
}

/// What `first` has in common with all that are like it; at least itself.
fn group<'a>(first: &Kind<'a>, kinds: &[Kind<'a>], former: Option<&CpuBaseline>) -> Group<'a> {
    let mut baseline = first.cpu.baseline.clone();
    let mut nodes = Vec::new();
    for kind in kinds {
        let common = baseline.intersect(&kind.cpu.baseline).ok();
        if let Some(common) = common.filter(|common| kind.cpu.gives(common).is_ok()) {
            baseline = common;
            nodes.extend(kind.nodes.iter().copied());
        }
    }
    let rank = Rank {
        former: former.is_some_and(|former| former.intersect(&baseline).is_ok()),
        pairs: can_pair(&nodes),
        usable: nodes.iter().filter(|node| node.usable).count(),
        nodes: nodes.len(),
        alike: first.nodes.len(),
    };
    Group { baseline, rank, nodes }
}

/// Could both seats be placed on these nodes now, in two topology domains?
fn can_pair(nodes: &[&Candidate<'_>]) -> bool {
    let domains = |slot: usize| -> BTreeSet<&str> {
        let able = nodes.iter().filter(|node| node.usable && node.slots[slot]);
        able.map(|node| node.domain).collect()
    };
    let (first, second) = (domains(0), domains(1));
    // Two different ones, one of each: not if either has none, or both have the same single one.
    !first.is_empty() && !second.is_empty() && first.union(&second).count() > 1
}

/// Nodes that say nothing of use; empty if all speak.
fn mute(candidates: &[Candidate<'_>]) -> String {
    let silent = candidates
        .iter()
        .filter(|node| node.usable)
        .filter_map(|node| match &node.cpu {
            Ok(Some(_)) => None,
            Ok(None) => Some(format!("{} (nothing published)", node.name)),
            Err(why) => Some(format!("{} ({why})", node.name)),
        });
    let silent = listed(silent);
    if silent.is_empty() {
        return silent;
    }
    format!(
        "the CPU is not known of {silent}: see the log of the ftvm node-daemon there; it publishes the CPU when it starts, so delete its pod"
    )
}

fn unlike(baseline: &CpuBaseline, kinds: &[Kind<'_>], mute: &str) -> String {
    let kind = |kind: &Kind<'_>| {
        let names = listed(kind.nodes.iter().map(|node| node.name.to_owned()));
        let why = kind.cpu.gives(baseline).err().map(|error| format!(", {error}"));
        format!("{names} ({}{})", kind.cpu.baseline.vendor(), why.unwrap_or_default())
    };
    let kinds = listed(kinds.iter().map(kind));
    let mute = if mute.is_empty() {
        String::new()
    } else {
        format!("; {mute}")
    };
    format!(
        "no two nodes that could have the seats share a CPU: {kinds}: add a node like one of these, widen spec.placement, or halt the VM and set spec.machine.cpuBaseline to Host to run it unprotected{mute}"
    )
}

/// The API server takes no more.
fn clipped(why: String) -> String {
    why.chars().take(CHOSEN_WHY_LENGTH_MAX).collect()
}

fn listed(names: impl Iterator<Item = String>) -> String {
    let names: Vec<String> = names.collect();
    let more = names.len().saturating_sub(NAMES_MAX);
    let mut text = names[..names.len() - more].join(", ");
    if more > 0 {
        text += &format!(" and {more} more");
    }
    text
}

#[cfg(test)]
#[path = "cpu_tests.rs"]
mod tests;
