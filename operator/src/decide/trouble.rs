//! What keeps a seat from joining.

use std::time::Duration;

use ftvm_crds::SeatEntry;
use ftvm_crds::seat::{SeatPublished, SeatRole, StorageKind};
use ftvm_protocol::record::Record;

use super::{claim_trouble, holder, pod, published};
use crate::observe::{Observed, PodPhase, PodSeen};

/// After so many engines in a row that its storage ended a seat is none that joins, whatever the next one copies: the first may have had the guest, or met
/// a trouble that has passed; the second one was to begin anew.
const STORAGE_FAILURES: u32 = 2;

/// What keeps a seat from joining. Another node may help with all of these but for [`Trouble::Slow`] and [`Trouble::Unplaced`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// Its node is not ready or gone.
    Node,
    /// Its pod failed and is made again.
    Failed,
    /// Its volumes are where it can't be scheduled, or one of them is gone or about to go.
    Bound,
    /// It runs, and its storage fails whenever an engine joins.
    Storage,
    /// It runs, but no engine joins.
    NoEngine,
    /// It is being started: images are pulled, volumes attached.
    Slow,
    /// No node has room for it; another seat would have no other chance.
    Unplaced,
}

/// What keeps this seat from joining, if anything. Not asked of seats that the record names.
pub fn trouble(seen: &Observed, entry: &SeatEntry) -> Option<Trouble> {
    if claim_trouble(seen, entry).is_some() {
        return Some(Trouble::Bound);
    }
    let Some(pod) = pod(seen, entry) else {
        // Made again, or about to be admitted.
        return seen
            .pods
            .get(&entry.name)
            .and_then(|pod| of_pod(seen, entry, pod))
            .or(Some(Trouble::Slow));
    };
    of_pod(seen, entry, pod)
}

fn of_pod(seen: &Observed, entry: &SeatEntry, pod: &PodSeen) -> Option<Trouble> {
    if let Some(node) = &pod.node
        && !seen.node_ready(node)
    {
        return Some(Trouble::Node);
    }
    match pod.phase {
        PodPhase::Finished => Some(Trouble::Failed),
        PodPhase::Pending if pod.node.is_none() => {
            let bound = seen
                .claims
                .values()
                .any(|claim| claim.seat == entry.name && claim.bound);
            Some(if bound && pod.unschedulable.is_some() {
                Trouble::Bound
            } else {
                Trouble::Unplaced
            })
        }
        PodPhase::Pending => Some(Trouble::Slow),
        PodPhase::Running if fails_at_every_join(pod) => Some(Trouble::Storage),
        PodPhase::Running if joins(pod) => None,
        PodPhase::Running => Some(Trouble::NoEngine),
    }
}

/// Did its storage end the last engines, and does none hold a whole checkpoint now? Between two of them nobody joins, so how far one came is no progress.
pub fn fails_at_every_join(pod: &PodSeen) -> bool {
    let fails = |published: &SeatPublished| {
        let whole = published.role == Some(SeatRole::Standby) && published.peer_connected;
        published.storage_failures >= STORAGE_FAILURES && !whole
    };
    pod.told().is_some_and(fails)
}

/// Is it its storage for which a seat in this trouble is given up? What has failed altogether lets no second engine begin: then the one that it ended counts.
pub fn is_of_storage(seen: &Observed, entry: &SeatEntry, trouble: Option<&Trouble>) -> bool {
    match trouble {
        Some(Trouble::Storage) => true,
        Some(Trouble::NoEngine) => published(seen, entry).is_some_and(|told| told.storage_failures > 0),
        _ => false,
    }
}

/// Do disks of the record's holder fail, too? What another seat has may be all that can be read then. (One that is only full can be copied.)
pub fn holder_fails(seen: &Observed, record: &Record, book: &[SeatEntry]) -> bool {
    let told = holder(book, record).and_then(|holder| published(seen, holder));
    told.is_some_and(|told| {
        let mut troubles = told.storage_troubles.iter();
        troubles.any(|trouble| trouble.kind != StorageKind::Full)
    })
}

/// Does the seat make progress: disks prepared, or an engine that receives or holds a checkpoint? What says that it is active is
/// old: the record names another one, and its node may be dead for long before anybody calls it not ready.
fn joins(pod: &PodSeen) -> bool {
    let Some(published) = pod.told() else {
        return false;
    };
    let follows = matches!(published.role, Some(SeatRole::Joining | SeatRole::Standby));
    published.resync_percent.is_some() || (follows && published.peer_connected)
}

/// How long this trouble may last before the seat is replaced; none: forever.
pub fn patience(seen: &Observed, trouble: &Trouble, times: u32) -> Option<Duration> {
    let least = u64::from(seen.vm.spec.fault_tolerance.replace_after_seconds);
    let seconds = match trouble {
        Trouble::Unplaced => return None,
        // A large image takes its time, and another node would take it, too.
        Trouble::Slow => least.max(300),
        _ => least,
    };
    // What did not help before is tried less and less often.
    Some(Duration::from_secs(seconds << times.min(6)))
}
