//! What the API server's watches told: read in every reconcile without a request.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use ftvm_crds::FaultTolerantVM;
use ftvm_crds::names::{LABEL_MANAGED_BY, LABEL_VM, MANAGED_BY, claim_name};
use ftvm_watch::lasting;
use futures::StreamExt;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, PersistentVolumeClaim, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::watcher::Event;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::api::{ApiError, Objects};
use crate::decide::nodes_to_ask;
use crate::observe::{self, NodeSeen, Observed};
use crate::{random, trim};

/// VMs that should be looked at again.
pub type Triggers = mpsc::UnboundedSender<ObjectRef<FaultTolerantVM>>;

/// Everything that is watched beside the VMs.
#[derive(Clone)]
pub struct Caches {
    pods: Store<Pod>,
    claims: Store<PersistentVolumeClaim>,
    leases: Store<Lease>,
    nodes: Store<Node>,
    /// The watches end with whoever reads what they told.
    _watches: Arc<JoinSet<()>>,
}

impl Caches {
    /// Begins to watch; `triggers` gets the VMs that a change is about. `vms` tells which VMs a node is of interest to.
    pub fn watch(client: &Client, triggers: &Triggers, vms: Store<FaultTolerantVM>) -> Caches {
        let ours = watcher::Config::default().labels(&format!("{LABEL_MANAGED_BY}={MANAGED_BY}"));
        let (pods, claims, leases) = (triggers.clone(), triggers.clone(), triggers.clone());
        let listed = of_all(triggers.clone(), vms.clone());
        let all = client.clone();
        let mut watches = JoinSet::new();
        Caches {
            pods: follow(
                &mut watches,
                Api::all(all.clone()),
                ours.clone(),
                trim::pod,
                move |pod| of_label(&pods, pod),
                listed.clone(),
            ),
            claims: follow(
                &mut watches,
                Api::all(all.clone()),
                ours.clone(),
                trim::claim,
                move |claim| {
                    of_label(&claims, claim);
                },
                listed.clone(),
            ),
            leases: follow(
                &mut watches,
                Api::all(all.clone()),
                ours,
                trim::lease,
                move |lease| of_label(&leases, lease),
                listed.clone(),
            ),
            nodes: follow(
                &mut watches,
                Api::all(all),
                watcher::Config::default(),
                trim::node,
                of_node(triggers.clone(), vms),
                listed,
            ),
            _watches: Arc::new(watches),
        }
    }

    /// Waits until everything was listed once.
    ///
    /// # Errors
    /// If a watch ended.
    pub async fn ready(&self) -> Result<(), reflector::store::WriterDropped> {
        self.pods.wait_until_ready().await?;
        self.claims.wait_until_ready().await?;
        self.leases.wait_until_ready().await?;
        self.nodes.wait_until_ready().await
    }

    /// What is known of a VM.
    pub fn observe(&self, vm: &FaultTolerantVM) -> Observed {
        let namespace = vm.namespace().unwrap_or_default();
        let (pods, claims) = names(vm);
        let pods = pods
            .iter()
            .filter_map(|name| self.pods.get(&ObjectRef::new(name).within(&namespace)));
        let claims = claims
            .iter()
            .filter_map(|name| self.claims.get(&ObjectRef::new(name).within(&namespace)));
        let lease = self.leases.get(&ObjectRef::new(&vm.name_any()).within(&namespace));
        Observed {
            vm: vm.clone(),
            lease: observe::lease(vm, lease.as_deref()),
            pods: pods.filter_map(|pod| observe::pod(vm, &pod)).collect(),
            claims: claims.filter_map(|claim| observe::claim(&claim)).collect(),
            nodes: self.nodes(),
            now: Timestamp::now(),
            draws: [random::u64(), random::u64()],
            refused: None,
            first_look: None,
            accepted_for: None,
        }
    }

    fn nodes(&self) -> BTreeMap<String, NodeSeen> {
        self.nodes.state().iter().map(|node| observe::node(node)).collect()
    }

    /// The same, read past every cache; none if the VM is gone. Nodes are as they were told, but for those that shall prove something.
    ///
    /// # Errors
    /// If the API server can't be asked.
    pub async fn observe_fresh(&self, objects: &Objects, name: &str) -> Result<Option<Observed>, ApiError> {
        let Some(vm) = objects.get::<FaultTolerantVM>(name).await? else {
            return Ok(None);
        };
        let (pod_names, claim_names) = names(&vm);
        let mut pods = BTreeMap::new();
        for name in pod_names {
            let pod = objects.get::<Pod>(&name).await?;
            pods.extend(pod.and_then(|pod| observe::pod(&vm, &pod)));
        }
        let mut claims = BTreeMap::new();
        for name in claim_names {
            let claim = objects.get::<PersistentVolumeClaim>(&name).await?;
            claims.extend(claim.and_then(|claim| observe::claim(&claim)));
        }
        let mut nodes = self.nodes();
        // A seat's pods may have been on one node, one after the other.
        let asked: BTreeSet<_> = nodes_to_ask(vm.status.as_ref().map_or(&[], |status| &status.seats)).collect();
        for name in asked {
            match objects.node(name).await? {
                Some(node) => nodes.insert(name.to_owned(), observe::node(&node).1),
                None => nodes.remove(name),
            };
        }
        // Last: nothing that was read before it can have become active without showing here.
        let lease = objects.get::<Lease>(name).await?;
        Ok(Some(Observed {
            lease: observe::lease(&vm, lease.as_ref()),
            vm,
            pods,
            claims,
            nodes,
            now: Timestamp::now(),
            draws: [random::u64(), random::u64()],
            refused: None,
            first_look: None,
            accepted_for: None,
        }))
    }
}

/// Names of the pods and claims that the book speaks of.
fn names(vm: &FaultTolerantVM) -> (BTreeSet<String>, BTreeSet<String>) {
    let seats = vm.status.iter().flat_map(|status| &status.seats);
    let pods: BTreeSet<String> = seats.map(|entry| entry.name.clone()).collect();
    let disks = || vm.spec.disks.iter();
    let claims = pods
        .iter()
        .flat_map(|pod| disks().map(|disk| claim_name(pod, &disk.name)))
        .collect();
    (pods, claims)
}

/// Keeps what `trim` leaves of each object. `listed` is called after each list: what is not in it any more is told of by no event.
fn follow<K>(
    watches: &mut JoinSet<()>,
    api: Api<K>,
    config: watcher::Config,
    trim: fn(&mut K),
    told: impl Fn(&K) + Send + 'static,
    listed: impl Fn() + Send + 'static,
) -> Store<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    let (reader, writer) = reflector::store();
    let stream = lasting(api, config).default_backoff().modify(trim);
    watches.spawn(async move {
        let mut events = stream.reflect(writer).boxed();
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Apply(object) | Event::InitApply(object) | Event::Delete(object)) => told(&object),
                Ok(Event::InitDone) => listed(),
                Ok(Event::Init) => {}
                // The stream tries again, later and later.
                Err(error) => tracing::warn!(kind = %K::kind(&()), %error, "a watch was interrupted"),
            }
        }
    });
    reader
}

fn of_label<K: Resource<DynamicType = ()>>(triggers: &Triggers, object: &K) {
    let labels = object.meta().labels.as_ref();
    let vm = labels.and_then(|labels| labels.get(LABEL_VM));
    if let (Some(vm), Some(namespace)) = (vm, &object.meta().namespace) {
        // Nobody listens any more only when the process ends.
        let _ = triggers.send(ObjectRef::new(vm).within(namespace));
    }
}

/// All of them.
fn of_all(triggers: Triggers, vms: Store<FaultTolerantVM>) -> impl Fn() + Clone + Send + 'static {
    move || {
        for vm in vms.state() {
            let _ = triggers.send(ObjectRef::from_obj(&vm));
        }
    }
}

/// A node matters when its readiness or what it offers changes: to VMs with a seat there, and to those that look for a place.
fn of_node(triggers: Triggers, vms: Store<FaultTolerantVM>) -> impl Fn(&Node) + Send + 'static {
    let known: Mutex<BTreeMap<String, (NodeSeen, bool)>> = Mutex::default();
    move |node| {
        let (name, seen) = observe::node(node);
        let gone = node.metadata.deletion_timestamp.is_some();
        let mut known = known.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if known.get(&name) == Some(&(seen.clone(), gone)) {
            return;
        }
        known.insert(name.clone(), (seen, gone));
        drop(known);
        for vm in vms.state() {
            let status = vm.status.as_ref();
            let seats = status.map_or(&[][..], |status| &status.seats);
            // A seat that has no node, or that does not follow and may wait for another node.
            let looks =
                status.is_some_and(|status| status.standby.is_none()) || seats.iter().any(|entry| entry.node.is_none());
            if looks || nodes_to_ask(seats).any(|node| node == name) {
                let _ = triggers.send(ObjectRef::from_obj(&vm));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::ready;
    use std::time::Duration;

    use ftvm_crds::{FaultTolerantVMStatus, SeatEntry};
    use hyper::http::request::Parts;
    use serde_json::json;

    use super::*;
    use crate::testing::{Answer, refused, serve};

    /// A server whose pods are first in a state from which nobody can watch any more, whoever asks how often.
    fn answer(head: &Parts, lists: &Mutex<u64>) -> Answer {
        let query = head.uri.query().unwrap_or_default();
        if query.contains("watch=true") {
            return refused(410, "Expired");
        }
        let mut lists = lists.lock().unwrap();
        *lists += 1;
        let pods = (*lists > 1).then(|| json!({"metadata": {"name": "new", "namespace": "a"}}));
        let items: Vec<_> = pods.into_iter().collect();
        let list = json!({"kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": lists.to_string()}, "items": items});
        Some((200, list.to_string()))
    }

    /// Its client, and how often was listed.
    async fn server() -> (Client, Arc<Mutex<u64>>) {
        let lists = Arc::new(Mutex::new(0));
        let counted = lists.clone();
        let config = serve(move |head, _| ready(answer(&head, &counted)));
        (Client::try_from(config.await).unwrap(), lists)
    }

    #[tokio::test]
    async fn a_watch_whose_state_is_gone_begins_with_a_list() {
        let (client, _) = server().await;
        let watch = lasting(Api::<Pod>::all(client), watcher::Config::default()).default_backoff();
        let told = watch.map(|event| event.expect("nobody waits for a back-off because of it"));
        let found = told.filter(|event| std::future::ready(matches!(event, Event::InitApply(_))));
        let found = tokio::time::timeout(Duration::from_secs(30), std::pin::pin!(found).next()).await;
        assert!(matches!(found, Ok(Some(Event::InitApply(pod))) if pod.name_any() == "new"));
    }

    fn vm(name: &str) -> FaultTolerantVM {
        let vm = json!({
            "apiVersion": "ftvm.dev/v1alpha1", "kind": "FaultTolerantVM", "metadata": {"name": name, "namespace": "shop"},
            "spec": {"machine": {"memory": "64Mi"}, "boot": {"image": {"reference": "web:1"}}, "disks": [{"name": "root", "size": "64Mi"}]},
        });
        serde_json::from_value(vm).unwrap()
    }

    /// A seat that is kept because no other node could have it is replaced once one comes.
    #[test]
    fn of_a_node_that_comes_vms_without_a_standby_are_told() {
        let (vms, mut kept) = reflector::store();
        for (name, standby) in [("protected", Some("node-1")), ("alone", None)] {
            let seat = SeatEntry {
                name: format!("{name}-a"),
                node: Some("node-1".to_owned()),
                ..SeatEntry::default()
            };
            let status = FaultTolerantVMStatus {
                standby: standby.map(str::to_owned),
                seats: vec![seat],
                ..FaultTolerantVMStatus::default()
            };
            let vm = FaultTolerantVM {
                status: Some(status),
                ..vm(name)
            };
            kept.apply_watcher_event(&Event::Apply(vm));
        }
        let (triggers, mut triggered) = mpsc::unbounded_channel();
        let node: Node = serde_json::from_value(json!({"metadata": {"name": "node-2"}})).unwrap();
        of_node(triggers, vms)(&node);
        assert_eq!(triggered.try_recv().unwrap().name, "alone");
        assert!(triggered.try_recv().is_err());
    }

    /// What a list lacks is told of by no event: all VMs are looked at.
    #[tokio::test]
    async fn all_vms_are_looked_at_after_a_list() {
        let (client, lists) = server().await;
        let (vms, mut kept) = reflector::store();
        kept.apply_watcher_event(&Event::Apply(vm("web")));
        let (triggers, mut triggered) = mpsc::unbounded_channel();
        let mut watches = JoinSet::new();
        let listed = of_all(triggers, vms);
        let nothing = |_: &Pod| {};
        follow(
            &mut watches,
            Api::all(client),
            watcher::Config::default(),
            trim::pod,
            nothing,
            listed,
        );
        // The first list, which is empty, and the next one.
        for _ in 0..2 {
            let vm = tokio::time::timeout(Duration::from_secs(30), triggered.recv()).await;
            assert_eq!(vm.unwrap().unwrap().name, "web");
        }
        assert!(*lists.lock().unwrap() >= 2);
    }
}
