//! What a person has to mend before a VM can start or be protected.

use ftvm_crds::SeatEntry;
use ftvm_crds::names::{RESOURCE_SEAT, claim_name};

use crate::cpu;
use crate::decide::{BINDING, lease_is_strange, pod, recreation, unbound_for};
use crate::observe::{LeaseSeen, Observed, PodPhase, PodSeen};

/// Something that a person has to mend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obstacle {
    /// In one word, for programs.
    pub reason: &'static str,
    /// What, where, why, what to do.
    pub message: String,
}

fn obstacle(reason: &'static str, message: impl Into<String>) -> Obstacle {
    Obstacle {
        reason,
        message: message.into(),
    }
}

/// Everything in the way, the most telling first.
pub fn obstacles(seen: &Observed) -> Vec<Obstacle> {
    let mut found = Vec::new();
    match &seen.lease {
        LeaseSeen::Unusable(error) => found.push(obstacle("LeaseUnusable", error.to_string())),
        LeaseSeen::Missing if lease_is_strange(seen) => found.push(obstacle("LeaseGone", lease_gone(seen))),
        _ if lease_is_strange(seen) => found.push(obstacle(
            "LeaseReplaced",
            "the VM's Lease is another object than the operator made: delete it: it is made anew from what the seats know",
        )),
        _ => {}
    }
    let book = seen.status().seats;
    found.extend(
        book.iter()
            .filter(|entry| !entry.leaving)
            .filter_map(|entry| of_seat(seen, entry)),
    );
    found
}

/// Why a Lease that is gone is not there again, and what to do.
pub(super) fn lease_gone(seen: &Observed) -> String {
    let why = match recreation(seen) {
        Some(Err(why)) => why.to_string(),
        _ => return "the VM's Lease was deleted; its seats agree, and it is made anew now".to_owned(),
    };
    format!(
        "the VM's Lease was deleted, and {why}: a protected pair goes on, a failover is refused, halting and starting wait. It is made anew by itself once the active seat is alone or both seats \
         are connected and agree: bring the other seat's node back, or put a copy of the Lease back (docs/kubernetes.md, \"A Lease that is gone\")"
    )
}

fn of_seat(seen: &Observed, entry: &SeatEntry) -> Option<Obstacle> {
    let seat = seen.pods.get(&entry.name)?;
    if let Some(node) = &seat.node
        && !seen.node_ready(node)
    {
        let message = format!(
            "node {node} of seat {} is not ready: the seat is replaced on another node after spec.faultTolerance.replaceAfterSeconds, unless the record names it",
            entry.name
        );
        return Some(obstacle("NodeNotReady", message));
    }
    if let Some((reason, text)) = &seat.waiting
        && is_image_trouble(reason)
    {
        return Some(obstacle(
            "ImagePullFailed",
            format!(
                "seat {}: an image can't be pulled ({reason}: {text}): correct spec.boot.image, its pullSecret, or the operator's seat image",
                entry.name
            ),
        ));
    }
    if let Some(why) = &seat.unprepared {
        return Some(obstacle(
            "GuestImageNotCopied",
            format!(
                "seat {}: the files of its guest image can't be copied into its pod ({why}, see docs/exit-codes.md): correct spec.boot and spec.disks[].source.image, or make space on its node; it is tried again",
                entry.name
            ),
        ));
    }
    if let Some(why) = &seat.failed {
        return Some(obstacle(
            "SeatFailed",
            format!("pod {} failed ({why}); it is made again", entry.name),
        ));
    }
    if let Some(found) = unbound(seen, entry, seat) {
        return Some(found);
    }
    if let Some(text) = &seat.unschedulable {
        return Some(unschedulable(seen, entry, text));
    }
    let published = pod(seen, entry)?.published.as_ref();
    match published {
        Err(error) => Some(obstacle("SeatStatusUnreadable", format!("pod {}: {error}", entry.name))),
        Ok(published) if published.code != 0 => Some(obstacle(
            "SeatNeedsHelp",
            format!(
                "seat {}: {} (code {}, see docs/exit-codes.md)",
                entry.name, published.why, published.code
            ),
        )),
        Ok(_) => None,
    }
}

fn is_image_trouble(reason: &str) -> bool {
    let troubles = [
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "ErrImageNeverPull",
        "ImageInspectError",
    ];
    troubles.contains(&reason)
}

/// A volume that does not come: the class is wrong, or nothing provisions.
fn unbound(seen: &Observed, entry: &SeatEntry, seat: &PodSeen) -> Option<Obstacle> {
    if seat.phase != PodPhase::Pending {
        return None;
    }
    seen.vm.spec.disks.iter().find_map(|disk| {
        let name = claim_name(&entry.name, &disk.name);
        let age = unbound_for(seen, seen.claims.get(&name)?)?;
        let told = seat.unschedulable.as_deref().is_some_and(|text| text.contains("PersistentVolumeClaim"));
        (told || (seat.unschedulable.is_none() && age >= BINDING)).then(|| {
            let class = disk.storage_class_name.as_deref().unwrap_or("the cluster's default");
            let pod = &entry.name;
            obstacle(
                "VolumeNotBound",
                format!(
                    "claim {name} has no volume (storage class: {class}), see `kubectl describe pvc {name}`: mend what provisions for the class; or name a class that provisions in spec.disks[].storageClassName and delete claim {name} and pod {pod}, which are then made anew"
                ),
            )
        })
    })
}

fn unschedulable(seen: &Observed, entry: &SeatEntry, text: &str) -> Obstacle {
    let cpu = cpu::unfit(seen);
    let offers = seen.nodes.values().filter(|node| node.ready && node.seats > 0).count();
    let seat = &entry.name;
    if offers == 0 {
        return obstacle(
            "NoKvmNode",
            format!(
                "seat {seat} can't be placed: no ready node offers {RESOURCE_SEAT}: nodes need /dev/kvm and a running ftvm node-daemon, see its log ({text})"
            ),
        );
    }
    if text.contains("Insufficient memory") {
        let memory = &seen.vm.spec.machine.memory;
        return obstacle(
            "InsufficientMemory",
            format!(
                "seat {seat} can't be placed: no node has {memory} and the engine's overhead free: free memory, add a node, or lower spec.machine.memory while halted ({text})"
            ),
        );
    }
    if text.contains("persistent volumes to bind") {
        return obstacle(
            "NoVolume",
            format!(
                "seat {seat} can't be placed: no node that is left has a free volume for its claims ({text}): add volumes there, or name another class in spec.disks[].storageClassName"
            ),
        );
    }
    if offers < 2 || text.contains("anti-affinity") {
        let key = &seen.vm.spec.placement.topology_key;
        return obstacle(
            "TooFewNodes",
            format!(
                "seat {seat} can't be placed: two seats need two ready nodes with KVM that differ in {key}, and one more to replace a lost one: add a node ({text}){cpu}"
            ),
        );
    }
    obstacle(
        "Unschedulable",
        format!("seat {seat} can't be placed: {text}: add a node, or relax spec.placement and spec.resources{cpu}"),
    )
}
