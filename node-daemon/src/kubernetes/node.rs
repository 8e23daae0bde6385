//! The seats of this node, as the API server's objects and the remembered ones have it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ftvm_crds::FaultTolerantVM;
use ftvm_protocol::identity::SeatId;
use ftvm_watch::UnreadableObjects;
use k8s_openapi::api::core::v1::Pod;

use super::book::{self, Refusal};
use super::publish::Publisher;
use super::refused::{RefusedPods, Word};
use super::request::Requests;
use crate::arbiter::Leases;
use crate::daemon::{Daemon, DaemonError};
use crate::explain;
use crate::seat_socket::{Handed, Hierarchies, PodSeat, Pods};

/// What a seat was when it was last known to be genuine, in its state folder.
const REMEMBERED: &str = "pod.json";

/// A seat of this node.
pub struct NodeSeat {
    /// The seat and its program.
    pub pod: Arc<PodSeat>,
    /// What the API server tells of it.
    pub publisher: Publisher,
    /// What it was asked to do.
    pub requests: Requests,
    /// The machine that this is said on.
    pub machine: Option<String>,
    known: Mutex<book::Seat>,
    /// Why its pod is no seat any more by what the API server has now.
    refusal: Mutex<Option<Refusal>>,
    /// The API server itself said that its pod is gone.
    gone: AtomicBool,
}

impl NodeSeat {
    /// The API server was asked past every cache: there is no such pod any more.
    pub fn is_gone(&self) {
        self.gone.store(true, Ordering::SeqCst);
    }

    fn refuse(&self, refusal: Option<Refusal>) {
        *self.refusal.lock().unwrap_or_else(PoisonError::into_inner) = refusal;
    }

    /// Why no engine is started for it, if what the API server has now is none of a seat.
    pub fn refusal(&self) -> Option<Refusal> {
        self.refusal.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// As the book had it last.
    pub fn known(&self) -> book::Seat {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Why a pod has no VM.
#[derive(Debug, thiserror::Error)]
enum NoVm {
    #[error("the pod has no label ftvm.dev/vm")]
    NoLabel,
    #[error("there is no FaultTolerantVM {namespace}/{name}")]
    Missing { namespace: String, name: String },
    #[error("this release can't read the pod's FaultTolerantVM; an event of it says why")]
    Unreadable,
}

/// The seats of this node.
pub struct Node {
    /// Its name.
    pub name: String,
    /// Which machine it is, as kubelet tells it.
    machine: Option<String>,
    daemon: Arc<Daemon>,
    leases: Leases,
    hierarchies: Hierarchies,
    seats: Mutex<BTreeMap<SeatId, Arc<NodeSeat>>>,
    /// Why pods that look like seats are none.
    refused: RefusedPods,
    /// Pods of which it can't be read what they were, or whose folder could not be removed.
    unread: Mutex<BTreeSet<SeatId>>,
    /// Virtual machines that are there and can't be read.
    pub unreadable: UnreadableObjects,
}

impl Node {
    /// With the seats that an earlier daemon remembered; their engines are adopted.
    pub fn new(
        name: String,
        machine: Option<String>,
        daemon: Arc<Daemon>,
        leases: Leases,
        hierarchies: Hierarchies,
    ) -> Node {
        let node = Node {
            name,
            machine,
            daemon,
            leases,
            hierarchies,
            seats: Mutex::default(),
            refused: RefusedPods::default(),
            unread: Mutex::default(),
            unreadable: UnreadableObjects::default(),
        };
        for id in node.daemon.state().pods().unwrap_or_default() {
            let folder = node.daemon.state().pod(id);
            match folder.and_then(|folder| folder.read_json::<book::Seat>(REMEMBERED)) {
                Ok(Some(seat)) => node.add(seat, None),
                Ok(None) if node.hierarchies.has_engine(id) => {
                    tracing::error!(
                        "pod {id}: an engine runs in it, or may, and nothing is remembered of it: nothing is said of it"
                    );
                    node.unread().insert(id);
                }
                // Made and never used: nothing of this pod ever ran.
                Ok(None) => {
                    if let Err(error) = node.daemon.state().forget_pod(id) {
                        tracing::warn!("{}", explain(&error));
                    }
                }
                Err(error) => {
                    tracing::error!(
                        "pod {id}: {}; nothing is said of it, so guests that it had may wait. It is read anew while the pod is there, and forgotten once its VM has it as an earlier pod and its engine has ended. If that does not come: make sure that no ftvm-engine of it runs, then remove its folder",
                        explain(&error)
                    );
                    node.unread().insert(id);
                }
            }
        }
        node
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<SeatId, Arc<NodeSeat>>> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unread(&self) -> MutexGuard<'_, BTreeSet<SeatId>> {
        self.unread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All seats.
    pub fn seats(&self) -> Vec<Arc<NodeSeat>> {
        self.lock().values().cloned().collect()
    }

    /// What is to be said on pods that are no seats.
    pub fn words(&self, pods: &[Arc<Pod>]) -> Vec<Word> {
        let seats = self.lock();
        // What is said of seats has a publisher.
        let others = pods.iter().filter(|pod| {
            let id = book::seat_id(pod);
            id.is_none_or(|id| !seats.contains_key(&id))
        });
        self.refused.words(others)
    }

    /// Seats whose pods a watch does not have. They may be there all the same: a list, and the watch that goes on from it, may be old. So
    /// each is asked for, until the answer is that it is gone. So is one whose program was told to end, for a watch that lags does not yet say
    /// whether its pod is deleted.
    pub fn missing(&self, pods: &[Arc<Pod>]) -> Vec<Arc<NodeSeat>> {
        let seen: Vec<_> = pods.iter().filter_map(|pod| book::seat_id(pod)).collect();
        let seats = self.lock();
        let missing = seats
            .iter()
            .filter(|(id, seat)| !seen.contains(id) || seat.pod.awaits_news());
        let missing = missing.filter(|(_, seat)| !seat.gone.load(Ordering::SeqCst));
        missing.map(|(_, seat)| seat.clone()).collect()
    }

    /// Brings the seats in line with the pods of this node and the virtual machines, as the watches told them. A seat whose pod is not among
    /// them stays until [`NodeSeat::is_gone`].
    pub fn reconcile(&self, pods: &[Arc<Pod>], vms: &[Arc<FaultTolerantVM>]) {
        let mut seen = Vec::new();
        for pod in pods {
            let Some(id) = book::seat_id(pod) else { continue };
            seen.push(id);
            self.attend(id, pod, vms);
        }
        self.refused.keep(&seen);
        let gone: Vec<_> = self
            .lock()
            .iter()
            .filter(|(_, seat)| seat.gone.load(Ordering::SeqCst))
            .map(|(id, seat)| (*id, seat.clone()))
            .collect();
        for (id, seat) in gone {
            self.let_go(id, &seat);
        }
        self.forget_unread(vms);
    }

    /// Of pods that can't be read: those that are gone, and whose engines have ended, are forgotten as any others.
    fn forget_unread(&self, vms: &[Arc<FaultTolerantVM>]) {
        let unread = self.unread().clone();
        for id in unread {
            if self.lock().contains_key(&id) {
                // Its pod is there: it was entered anew.
                self.unread().remove(&id);
                continue;
            }
            if !vms.iter().any(|vm| book::has_former(vm, id)) {
                continue;
            }
            let state = self.daemon.state();
            match state.pod(id).and_then(|folder| folder.may_have_engine()) {
                Ok(true) => {}
                // Whatever is remembered of it.
                Ok(false) if self.hierarchies.has_engine(id) => {}
                Ok(false) => match state.forget_pod(id) {
                    Ok(()) => {
                        self.unread().remove(&id);
                        tracing::info!(pod = %id, "its pod and its engine are gone: what could not be read or removed is forgotten");
                    }
                    Err(error) => tracing::warn!("{}", explain(&error)),
                },
                Err(error) => tracing::debug!("pod {id}: {}", explain(&error)),
            }
        }
    }

    fn attend(&self, id: SeatId, pod: &Pod, vms: &[Arc<FaultTolerantVM>]) {
        let existing = self.lock().get(&id).cloned();
        let genuine = match self.vm_of(pod, vms) {
            Ok(vm) => book::seat(pod, vm, &self.name, self.machine.as_deref()),
            // What is remembered of the seat holds until its VM can be read.
            Err(NoVm::Unreadable) if existing.is_some() => return self.notice(&existing, pod),
            Err(refusal) => Err(Refusal::from(refusal.to_string())),
        };
        match genuine {
            Ok(seat) => match &existing {
                Some(existing) => {
                    self.refused.accept(id);
                    existing.refuse(None);
                    self.update(existing, seat);
                }
                None if pod.metadata.deletion_timestamp.is_none() => self.add(seat, Some(pod)),
                None => self.refused.accept(id),
            },
            Err(refusal) => {
                if let Some(existing) = &existing {
                    existing.pod.handed.allow(false);
                    existing.refuse(Some(refusal.clone()));
                }
                self.refused.refuse(id, refusal);
            }
        }
        let seat = self.lock().get(&id).cloned();
        self.notice(&seat, pod);
    }

    /// The VM that the pod says it belongs to.
    fn vm_of<'a>(&self, pod: &Pod, vms: &'a [Arc<FaultTolerantVM>]) -> Result<&'a FaultTolerantVM, NoVm> {
        let (namespace, name) = book::vm_of(pod).ok_or(NoVm::NoLabel)?;
        let is_it = |vm: &&Arc<FaultTolerantVM>| {
            vm.metadata.name.as_deref() == Some(&name) && vm.metadata.namespace.as_deref() == Some(&namespace)
        };
        match vms.iter().find(is_it) {
            Some(vm) => Ok(vm),
            None if self.unreadable.has(Some(&namespace), &name) => Err(NoVm::Unreadable),
            None => Err(NoVm::Missing { namespace, name }),
        }
    }

    /// What else its pod says of a seat.
    fn notice(&self, seat: &Option<Arc<NodeSeat>>, pod: &Pod) {
        let Some(seat) = seat else { return };
        if pod.metadata.deletion_timestamp.is_some() {
            // Its program is told by kubelet, too; but it may not be there.
            seat.pod.end();
        }
        seat.publisher.noticed(pod);
        seat.requests.noticed(pod, &seat.pod);
    }

    fn add(&self, seat: book::Seat, pod: Option<&Pod>) {
        let id = seat.seat_id;
        let label = seat.config.label();
        if let Some(refusal) = self.waits_for_another(&seat) {
            return self.refused.refuse(id, refusal);
        }
        match self.try_add(seat, pod) {
            Ok(()) => self.refused.accept(id),
            Err(error) => {
                let (why, code) = (explain(&error), error.exit_code());
                // It is tried again all the time.
                if self.refused.why(id).as_ref() != Some(&why) {
                    tracing::error!(seat = label, "pod {id} can't be a seat: {why}");
                }
                self.refused.refuse(id, Refusal { why, code });
            }
        }
    }

    /// A pod that was made anew under its name: the former one goes first, once it is proven to be gone. Or what is told of this one is old,
    /// and the one that runs is its successor.
    fn waits_for_another(&self, seat: &book::Seat) -> Option<Refusal> {
        let other = self.seats().into_iter().find(|other| {
            let other = other.known();
            (other.namespace, other.config.seat) == (seat.namespace.clone(), seat.config.seat.clone())
        })?;
        let status = other.pod.seat.status(Duration::ZERO);
        let (former, why) = (other.known().seat_id, &status.why);
        Some(Refusal {
            why: format!("another pod of this name, {former}, goes first: its engine may run here ({why})"),
            code: status.code,
        })
    }

    fn try_add(&self, seat: book::Seat, pod: Option<&Pod>) -> Result<(), DaemonError> {
        let folder = self.daemon.state().pod(seat.seat_id)?;
        folder.write_json(REMEMBERED, &seat)?;
        let handed = Arc::new(Handed::new(seat.expected(), self.hierarchies.clone()));
        handed.allow(seat.wanted);
        let arbiter = Arc::new(self.leases.arbiter(&seat.namespace, &seat.vm, seat.vm_id));
        let requests = Requests::new(folder.clone());
        let added = self.daemon.add(seat.config.clone(), folder, handed.clone(), arbiter)?;
        added.set_seat_id(seat.seat_id);
        added.set_former(seat.former.clone());
        let pod_seat = Arc::new(PodSeat::new(added, handed, seat.recipe.clone()));
        pod_seat.is_published();
        let node_seat = NodeSeat {
            publisher: Publisher::new(pod),
            requests,
            pod: pod_seat,
            machine: self.machine.clone(),
            known: Mutex::new(seat.clone()),
            refusal: Mutex::default(),
            gone: AtomicBool::new(false),
        };
        self.lock().insert(seat.seat_id, Arc::new(node_seat));
        tracing::info!(seat = seat.config.label(), pod = %seat.seat_id, "is a seat of this node");
        Ok(())
    }

    fn update(&self, existing: &NodeSeat, seat: book::Seat) {
        let mut known = existing.known.lock().unwrap_or_else(PoisonError::into_inner);
        if existing.pod.handed.allow(seat.wanted) {
            existing.pod.seat.try_soon();
        }
        if *known == seat {
            return;
        }
        let folder = existing.pod.seat.folder();
        if let Err(error) = folder.write_json(REMEMBERED, &seat) {
            return tracing::error!(seat = seat.config.label(), "{}", explain(&error));
        }
        if known.config != seat.config {
            existing.pod.seat.reconfigure(seat.config.clone());
        }
        existing.pod.set_recipe(seat.recipe.clone());
        existing.pod.seat.set_former(seat.former.clone());
        *known = seat;
    }

    /// A seat whose pod is gone: hand over, end, forget.
    fn let_go(&self, id: SeatId, seat: &Arc<NodeSeat>) {
        seat.pod.end();
        // Not while one is only just being launched either.
        if !seat.pod.seat.retire() {
            return;
        }
        self.daemon.forget(&seat.pod.seat);
        self.lock().remove(&id);
        if let Err(error) = self.daemon.state().forget_pod(id) {
            // As long as it has a folder nobody is told that it has ended.
            tracing::warn!("{}; it is tried again", explain(&error));
            self.unread().insert(id);
        }
        tracing::info!(pod = %id, "its pod is gone");
    }
}

impl Pods for Node {
    fn find(&self, pod: SeatId) -> Result<Arc<PodSeat>, String> {
        if let Some(seat) = self.lock().get(&pod) {
            return Ok(seat.pod.clone());
        }
        let why = self.refused.why(pod);
        Err(why.unwrap_or_else(|| format!("pod {pod} is not known as a seat of this node yet")))
    }
}

#[cfg(test)]
#[path = "node_tests.rs"]
pub(super) mod tests;
