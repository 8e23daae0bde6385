//! A small world for tests of decisions: an API server that keeps versions, a scheduler, daemons and engines that follow
//! the contract of `docs/kubernetes.md`.

use std::collections::{BTreeMap, BTreeSet};

use ftvm_cpu::CpuBaseline;
use ftvm_crds::cpu::NodeCpu;
use ftvm_crds::names::{FINALIZER, LABEL_CPU, claim_name};
use ftvm_crds::seat::{DoneRequest, Order, SeatExit, SeatPublished, SeatRole, StorageTrouble};
use ftvm_crds::{FaultTolerantVM, RunStrategy, SeatEntry, yaml};
use ftvm_protocol::identity::{ArbiterUid, Incarnation, Nonce, SeatId};
use ftvm_protocol::record::{Members, Phase, Record, Snapshot};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;

use super::rig_disks::Disk;
use super::{Acceptance, Action, Decision, decide, is_genesis, is_named};
use crate::cpu;
use crate::observe::{ClaimSeen, LeaseSeen, NodeSeen, Observed, PodPhase, PodSeen, Record as Found};
use crate::status;

pub const VM: &str = "
apiVersion: ftvm.dev/v1alpha1
kind: FaultTolerantVM
metadata: {name: web, namespace: shop, uid: 0123abcd-4567-4000-8000-0000000000ff, generation: 1}
spec:
  machine: {memory: 512Mi, vcpus: 2}
  boot: {image: {reference: 'registry.example/guest:1'}, cmdline: console=ttyS0}
  disks: [{name: root, size: 1Gi, source: {image: {}}}, {name: data, size: 2Gi}]
  networks: [{name: front, bridge: {name: br0}}]
";

pub fn vm() -> FaultTolerantVM {
    yaml::read(VM).unwrap()
}

/// A CPU that nobody makes.
pub const CPU: &str = "tsc=2400000 0:d,756e6547,6c65746e,49656e69 1:806e8,800,80982201,781fbff 7.0:1,1807ab,0,0 \
    d.0:7,0,340,0 d.1:1,0,0,0 d.2:100,240,0,0 40000000:40000001,4b4d564b,564b4d56,4d 40000001:1000009,0,0,0 \
    80000000:80000008,0,0,0 80000001:0,0,1,2c100800 80000008:3028,0,0,0";

pub fn node_cpu() -> NodeCpu {
    NodeCpu {
        baseline: CpuBaseline::from_text(CPU).unwrap(),
        tsc_scaling: true,
    }
}

/// The rig's CPU with something else in its place.
pub fn changed_cpu(from: &str, to: &str) -> NodeCpu {
    assert!(CPU.contains(from), "{from}");
    NodeCpu {
        baseline: CpuBaseline::from_text(&CPU.replace(from, to)).unwrap(),
        tsc_scaling: true,
    }
}

/// Without AVX2.
pub fn poor() -> NodeCpu {
    changed_cpu("7.0:1,1807ab", "7.0:1,18078b")
}

/// Of the other maker.
pub fn amd() -> NodeCpu {
    changed_cpu("0:d,756e6547,6c65746e,49656e69", "0:d,68747541,444d4163,69746e65")
}

/// A good node that has published this.
pub fn node(cpu: &NodeCpu) -> NodeSeen {
    NodeSeen {
        ready: true,
        schedulable: true,
        seats: 10,
        labels: [(LABEL_CPU.to_owned(), cpu.label())].into(),
        cpu: Some(cpu.annotation()),
        boot: Some("machine/first".to_owned()),
        ..NodeSeen::default()
    }
}

pub struct World {
    pub vm: FaultTolerantVM,
    pub version: u64,
    pub lease: Option<(Snapshot, String)>,
    pub pods: BTreeMap<String, PodSeen>,
    pub claims: BTreeMap<String, ClaimSeen>,
    pub nodes: BTreeMap<String, NodeSeen>,
    pub now: Timestamp,
    pub counter: u64,
    pub gone: bool,
    /// UID of the Lease by which a seat goes: what its header says.
    pub known: BTreeMap<String, ArbiterUid>,
    /// What a Lease said when it was deleted.
    pub ended: BTreeMap<ArbiterUid, Record>,
    /// Engines that were killed as it was asked for: ids of requests, in order.
    pub kills: Vec<String>,
    /// The last request that the daemon of a pod executed, by the pod's UID: its `request.json`.
    pub executed: BTreeMap<String, DoneRequest>,
    /// Nodes whose storage fails at every join.
    pub bad_storage: BTreeSet<String>,
    /// Joins in a row that it failed, by the pod's UID.
    pub storage_failures: BTreeMap<String, u32>,
    /// Joins that it failed in all.
    pub joins_failed: usize,
    /// What whoever is active says of its disks.
    pub guest_troubles: Vec<StorageTrouble>,
    /// What is on the volumes, by the UID of their claims.
    pub disks: BTreeMap<String, Disk>,
    /// What the leader drew at its first look, and when that was; none: it was there before the VM.
    pub first_look: Option<(String, Timestamp)>,
    /// What the operator remembers.
    pub acceptance: Acceptance<Timestamp>,
}

impl World {
    /// So many good nodes.
    pub fn new(nodes: usize) -> World {
        let node = node(&node_cpu());
        World {
            vm: vm(),
            version: 1,
            lease: None,
            pods: BTreeMap::new(),
            claims: BTreeMap::new(),
            nodes: (0..nodes)
                .map(|index| (format!("node-{index}"), node.clone()))
                .collect(),
            now: Timestamp::from_second(1_800_000_000).unwrap(),
            counter: 0,
            gone: false,
            known: BTreeMap::new(),
            ended: BTreeMap::new(),
            kills: Vec::new(),
            executed: BTreeMap::new(),
            bad_storage: BTreeSet::new(),
            storage_failures: BTreeMap::new(),
            joins_failed: 0,
            guest_troubles: Vec::new(),
            disks: BTreeMap::new(),
            first_look: None,
            acceptance: None,
        }
    }

    pub fn next(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    pub fn observe(&mut self) -> Observed {
        let seen = Observed {
            vm: self.vm.clone(),
            lease: match &self.lease {
                None => LeaseSeen::Missing,
                Some((snapshot, nodes)) => LeaseSeen::Found(Box::new(Found {
                    snapshot: snapshot.clone(),
                    nodes: nodes.clone(),
                    renewed: Some(self.now - SignedDuration::from_secs(3600)),
                })),
            },
            pods: self.pods.clone(),
            claims: self.claims.clone(),
            nodes: self.nodes.clone(),
            now: self.now,
            draws: [self.next() * 7919, self.next() * 7919],
            refused: None,
            first_look: self.first_look(),
            accepted_for: None,
        };
        self.recall(seen)
    }

    pub fn book(&self) -> Vec<SeatEntry> {
        self.vm.status.clone().unwrap_or_default().seats
    }

    pub fn entry(&self, name: &str) -> Option<SeatEntry> {
        self.book().into_iter().find(|entry| entry.name == name)
    }

    pub fn record(&self) -> Option<&Record> {
        self.lease.as_ref().map(|(snapshot, _)| &snapshot.record)
    }

    pub fn pass(&mut self, seconds: i64) {
        self.now += SignedDuration::from_secs(seconds);
    }

    /// What one reconcile does, from an observation that may be old. Returns whether anything was done.
    pub fn reconcile(&mut self, cached: Observed, cached_version: u64) -> bool {
        let (mut seen, mut version) = (cached, cached_version);
        let mut decision = decide(&seen);
        if decision.needs_certainty(&seen) {
            (seen, version) = (self.observe(), self.version);
            decision = decide(&seen);
        }
        self.carry_out(&seen, version, &decision)
    }

    /// Observes and reconciles with nothing in between.
    pub fn step(&mut self) -> bool {
        let (seen, version) = (self.observe(), self.version);
        self.reconcile(seen, version)
    }

    pub fn carry_out(&mut self, seen: &Observed, mut version: u64, decision: &Decision) -> bool {
        let status = status::status(seen, decision);
        let mut done = false;
        if seen.vm.status.as_ref() != Some(&status) {
            if version != self.version {
                return false;
            }
            self.vm.status = Some(status);
            self.version += 1;
            version = self.version;
            done = true;
        }
        for action in &decision.actions {
            done = true;
            self.apply(action, version);
            version = version.max(if matches!(action, Action::Admit { .. } | Action::AddFinalizer) {
                self.version
            } else {
                0
            });
        }
        done
    }

    pub fn apply(&mut self, action: &Action, version: u64) {
        let now = self.now;
        match action {
            Action::AddFinalizer => {
                self.vm.metadata.finalizers = Some(vec![FINALIZER.to_owned()]);
                self.version += 1;
            }
            Action::RemoveFinalizer => {
                self.vm.metadata.finalizers = None;
                self.gone = self.vm.metadata.deletion_timestamp.is_some();
                self.version += 1;
            }
            Action::CreateClaims { seat, disks } => {
                for disk in disks {
                    let uid = self.uid();
                    self.claims.entry(claim_name(seat, disk)).or_insert(ClaimSeen {
                        uid,
                        seat: seat.clone(),
                        bound: false,
                        lost: false,
                        deleting: false,
                        created: Some(now),
                    });
                }
            }
            Action::CreatePod { seat } => {
                if !self.pods.contains_key(seat) {
                    let pod = self.fresh_pod();
                    self.pods.insert(seat.clone(), pod);
                }
            }
            Action::Admit { seat, uid } => {
                if version == self.version
                    && let Some(entry) = self
                        .vm
                        .status
                        .get_or_insert_default()
                        .seats
                        .iter_mut()
                        .find(|entry| entry.name == *seat)
                {
                    entry.pod_uid = Some(uid.clone());
                    self.version += 1;
                }
            }
            Action::CreateLease { original, node } => {
                if self.lease.is_none() {
                    let uid = ArbiterUid(self.next().into());
                    let version = self.next();
                    let record = Record::genesis(*original, Phase::Running);
                    self.lease = Some((Snapshot { record, uid, version }, node.clone()));
                }
            }
            Action::RecreateLease { record, nodes } => self.recreate_lease(record, nodes),
            Action::RewriteGenesis { original } => {
                let next = self.next();
                let (snapshot, _) = self.lease.as_mut().unwrap();
                assert!(
                    is_genesis(&snapshot.record),
                    "a record that an engine wrote is written over"
                );
                snapshot.record = Record::genesis(*original, Phase::Running);
                snapshot.version = next;
            }
            Action::SetLeaseNodes { nodes } => {
                if let Some((_, told)) = &mut self.lease {
                    *told = nodes.clone();
                }
            }
            Action::Request { seat, uid, request } => {
                if let Some(pod) = self.pods.get_mut(seat).filter(|pod| pod.uid == *uid) {
                    pod.request = Some(request.clone());
                }
            }
            Action::AskForWord { seat, uid, drawn } => self.ask_for_word(seat, uid, drawn),
            Action::DeletePod {
                seat,
                uid,
                version,
                force,
            } => self.delete_pod(seat, uid, version, *force),
            Action::DeleteClaim { claim, uid } => self.delete_claim(claim, uid),
        }
    }

    /// With the Lease gone an engine goes on as it was, and vouches for what it knows.
    fn vouch(&mut self, seat: &str, me: Incarnation) {
        let Some(last) = self.known.get(seat).and_then(|uid| self.ended.get(uid)).cloned() else {
            return;
        };
        let book = self.book();
        let lives = |member: Incarnation| {
            let member = member.seat.to_string();
            book.iter()
                .any(|entry| entry.pod_uid.as_ref() == Some(&member) && self.alive(&entry.name))
        };
        let sound = last.members.contains(me) && last.phase == Phase::Running && last.members.iter().all(lives);
        let role = if last.holder == me {
            SeatRole::Active
        } else {
            SeatRole::Standby
        };
        let record = Record {
            term: last.term + 1,
            nonce: Nonce(0),
            predecessor: self.known.get(seat).copied(),
            ..last
        };
        if record.members.contains(me) {
            self.publish(seat, role, me);
        }
        if let Some(Ok(published)) = self.pods.get_mut(seat).map(|pod| &mut pod.published) {
            published.vouches = sound.then_some(record);
            published.arbiter_reachable = false;
        }
    }

    /// Takes a successor for its own, or nothing that is another one.
    fn goes_by_lease(&mut self, seat: &str, named: bool) -> bool {
        let Some((snapshot, _)) = &self.lease else { return false };
        let uid = snapshot.uid;
        let known = *self.known.entry(seat.to_owned()).or_insert(uid);
        // Who joins learns it from its leader.
        let own = known == uid || !named || snapshot.record.predecessor == Some(known);
        if own {
            self.known.insert(seat.to_owned(), uid);
        }
        own
    }

    fn delete_pod(&mut self, seat: &str, uid: &str, version: &str, force: bool) {
        let Some(pod) = self
            .pods
            .get_mut(seat)
            .filter(|pod| pod.uid == uid && pod.version == version)
        else {
            return;
        };
        if force {
            self.pods.remove(seat);
        } else {
            pod.deleting = true;
        }
    }

    fn uid(&mut self) -> String {
        SeatId(0x1000_0000_0000_0000_0000_0000_0000_0000 + u128::from(self.next())).to_string()
    }

    fn fresh_pod(&mut self) -> PodSeen {
        PodSeen {
            uid: self.uid(),
            version: self.next().to_string(),
            created: Some(self.now),
            node: None,
            pod_ip: None,
            host_ip: None,
            phase: PodPhase::Pending,
            ready: false,
            no_sandbox: false,
            deleting: false,
            unschedulable: None,
            first_start: None,
            waiting: None,
            unprepared: None,
            failed: None,
            published: Ok(SeatPublished::default()),
            request: None,
            look: None,
        }
    }

    /// The scheduler: a free ready node, or the one that the claims are bound to. A pod whose claim is missing, being deleted or lost waits.
    pub fn schedule(&mut self, seat: &str) {
        let waits = |pod: &&PodSeen| pod.node.is_none() && !pod.deleting;
        if self.pods.get(seat).filter(waits).is_none() {
            return;
        }
        let usable = |claim: &Option<&ClaimSeen>| claim.is_some_and(|claim| !claim.deleting && !claim.lost);
        if !self.claims_of(seat).iter().all(usable) {
            let pod = self.pods.get_mut(seat).unwrap();
            pod.unschedulable = Some("persistentvolumeclaim not found, lost or being deleted".to_owned());
            return;
        }
        let taken: Vec<String> = self.pods.values().filter_map(|pod| pod.node.clone()).collect();
        let bound = self.claims.values().any(|claim| claim.seat == seat && claim.bound);
        let cpu = cpu::chosen(&self.vm);
        let fits = |node: &NodeSeen| cpu.as_ref().is_none_or(|cpu| cpu::lacks(node, cpu).is_none());
        let entry = self.entry(seat).unwrap_or_default();
        let before = entry.former.iter().rfind(|former| !former.ended);
        let before = before.and_then(|former| former.node.clone());
        let mut free = self
            .nodes
            .iter()
            .filter(|(name, node)| node.ready && node.schedulable && fits(node) && !taken.contains(name))
            .map(|(name, _)| name.clone());
        // As the pod prefers it.
        let preferred = free.clone().find(|name| Some(name) == before.as_ref());
        let failed_on = self.vm.status.clone().unwrap_or_default().storage_failed_on;
        let elsewhere = free.clone().find(|name| !failed_on.contains(name));
        let free = preferred.or(elsewhere).or_else(|| free.next()).filter(|_| !bound);
        let Some(pod) = self.pods.get_mut(seat) else { return };
        match free {
            Some(node) => {
                pod.unschedulable = None;
                pod.node = Some(node);
                self.claims
                    .values_mut()
                    .filter(|claim| claim.seat == seat)
                    .for_each(|claim| claim.bound = true);
            }
            None => pod.unschedulable = Some("0/3 nodes are available".to_owned()),
        }
    }

    /// The kubelet: starts pods, ends those that are to be deleted.
    pub fn kubelet(&mut self, seat: &str) {
        let Some(pod) = self.pods.get_mut(seat) else { return };
        let ready = pod.node.as_ref().is_none_or(|node| self.nodes[node].ready);
        if !ready {
            return;
        }
        let mut claims = self.claims.values();
        let mounts = !claims.any(|claim| claim.seat == seat && claim.deleting);
        if pod.deleting && pod.phase != PodPhase::Finished {
            // Its program is told, and its engine ends before it.
            pod.phase = PodPhase::Finished;
            let had_engine = pod.told().is_some_and(|published| published.role.is_some());
            let last_exit = had_engine.then(|| SeatExit {
                incarnation: Incarnation {
                    seat: pod.uid.parse().unwrap(),
                    start: 1,
                },
                code: 0,
                message: String::new(),
                unix_ms: 0,
            });
            pod.published = Ok(SeatPublished {
                last_exit,
                done_request: self.executed.get(&pod.uid).cloned(),
                over: true,
                ..SeatPublished::default()
            });
        } else if pod.deleting {
            self.pods.remove(seat);
        } else if pod.node.is_some() && pod.phase == PodPhase::Pending && mounts {
            pod.phase = PodPhase::Running;
            pod.first_start = Some(self.now);
            pod.pod_ip = Some("10.1.2.3".to_owned());
        }
    }

    pub fn alive(&self, seat: &str) -> bool {
        let Some(pod) = self.pods.get(seat) else { return false };
        pod.phase == PodPhase::Running && pod.node.as_ref().is_some_and(|node| self.nodes[node].ready) && !pod.deleting
    }

    /// Is the guest's CPU chosen, and does the seat's node have it, or did its engine find that before?
    fn can_run(&self, seat: &str) -> bool {
        let status = self.vm.status.as_ref();
        if status.is_none_or(|status| status.cpu_in_force().is_none()) {
            return false;
        }
        let pod = &self.pods[seat];
        let runs = pod.told().is_some_and(|published| published.incarnation.is_some());
        let node = pod.node.as_ref().map(|node| &self.nodes[node]);
        runs || cpu::chosen(&self.vm).is_none_or(|cpu| node.is_some_and(|node| cpu::lacks(node, &cpu).is_none()))
    }

    fn swap(&mut self, change: impl FnOnce(&mut Record)) {
        let next = self.next();
        if let Some((snapshot, _)) = &mut self.lease {
            change(&mut snapshot.record);
            snapshot.record.term += 1;
            snapshot.version = next;
        }
    }

    /// One step of a seat's daemon and engine, by the rules.
    pub fn engine(&mut self, seat: &str) {
        if !self.alive(seat) || !self.can_run(seat) {
            return;
        }
        let Some(entry) = self.entry(seat) else { return };
        if entry.pod_uid.as_deref() != self.pods.get(seat).map(|pod| pod.uid.as_str()) {
            return;
        }
        let own: SeatId = entry.pod_uid.as_deref().unwrap().parse().unwrap();
        let me = Incarnation { seat: own, start: 1 };
        let Some(record) = self.record().cloned() else {
            return self.vouch(seat, me);
        };
        if !self.goes_by_lease(seat, is_named(&entry, &record)) {
            return;
        }
        self.prepare(seat, record.holder == Incarnation::genesis(own));
        if self.execute(seat, me) {
            return;
        }
        let others: Vec<SeatEntry> = self.book().into_iter().filter(|other| other.name != seat).collect();
        let peer = others
            .iter()
            .find(|other| self.alive(&other.name) && is_named(other, &record));
        let asked = self.pods[seat].request.clone().map(|request| request.order);
        let over = record.term;
        let starts = asked
            == Some(Order::Start {
                over_stopped_term: over,
            });
        // The record says one half, the header the other.
        let member = is_named(&entry, &record);
        let named = member && (is_genesis(&record) || self.has_header(seat));
        if record.phase == Phase::Stopped {
            if starts && named && !entry.leaving && self.are_proven(&record) {
                self.boots(seat, false);
                self.swap(|record| {
                    (record.holder, record.members, record.phase) = (me, Members::one(me), Phase::Running);
                });
                self.publish(seat, SeatRole::Active, me);
            } else {
                self.publish_end(seat);
            }
        } else if record.holder == me {
            if asked == Some(Order::Stop) {
                self.swap(|record| record.phase = Phase::Stopped);
                self.publish_end(seat);
                return;
            }
            if record.members.iter().count() > 1 && peer.is_none() {
                self.swap(|record| record.members = Members::one(me));
            }
            self.publish(seat, SeatRole::Active, me);
        } else if named {
            let lives = |seat: SeatId| {
                others
                    .iter()
                    .any(|other| other.pod_uid == Some(seat.to_string()) && self.alive(&other.name))
            };
            let first = entry.had_uid(&record.holder.seat.to_string());
            let waits = self.holder_could(&others, &record);
            let takes_over = record.members.contains(me) && !lives(record.holder.seat);
            let starts_cold = !record.members.contains(me)
                && !record.members.iter().any(|member| lives(member.seat))
                && self.are_proven(&record)
                && (first || !waits);
            if (takes_over || starts_cold) && !entry.leaving {
                self.boots(seat, is_genesis(&record));
                self.swap(|record| (record.holder, record.members) = (me, Members::one(me)));
                self.publish(seat, SeatRole::Active, me);
            } else if record.members.contains(me) {
                self.publish(seat, SeatRole::Standby, me);
            }
        } else if let Some(leader) = peer
            && !entry.leaving
            && !member
            && record.members.iter().count() == 1
            && !is_genesis(&record)
            && record.holder.start == 1
            && leader.pod_uid.as_deref() == Some(&record.holder.seat.to_string())
        {
            if self.pods[seat].published.as_ref().unwrap().role != Some(SeatRole::Joining) {
                self.publish(seat, SeatRole::Joining, me);
            } else if !self.fails_to_join(seat) {
                let holder = record.holder;
                self.holds_guest(seat);
                self.swap(|record| record.members = Members::pair(holder, me));
            }
        }
    }

    /// The daemon's part of a request that it has not executed. True if the engine was killed: its peer takes over.
    fn execute(&mut self, seat: &str, me: Incarnation) -> bool {
        let pod = &self.pods[seat];
        let Some(request) = pod.request.clone() else {
            return false;
        };
        if self.executed.get(&pod.uid).is_some_and(|done| done.id == request.id) {
            return false;
        }
        let uid = pod.uid.clone();
        let refused = match request.order {
            Order::Failover => self.fail(me, &request.id).err(),
            Order::TakeBack => Some("taken back".to_owned()),
            _ => None,
        };
        let killed = request.order == Order::Failover && refused.is_none();
        let id = request.id;
        self.executed.insert(uid, DoneRequest { id, refused });
        if killed {
            self.publish(seat, SeatRole::Starting, me);
        }
        killed
    }

    fn fail(&mut self, me: Incarnation, id: &str) -> Result<(), String> {
        let record = self.record().cloned().ok_or("no record")?;
        let peer = record.members.iter().find(|member| *member != me);
        let entry = peer.and_then(|peer| {
            self.book()
                .into_iter()
                .find(|entry| entry.had_uid(&peer.seat.to_string()))
        });
        let lives = entry.is_some_and(|entry| {
            self.alive(&entry.name) && self.known.get(&entry.name) == self.lease.as_ref().map(|(lease, _)| &lease.uid)
        });
        let (Some(peer), true, true) = (peer, lives, record.holder == me && record.phase == Phase::Running) else {
            return Err("nobody would take over".to_owned());
        };
        self.kills.push(id.to_owned());
        self.swap(|record| (record.holder, record.members) = (peer, Members::one(peer)));
        Ok(())
    }

    fn publish(&mut self, seat: &str, role: SeatRole, me: Incarnation) {
        let known = self.known.get(seat).copied();
        let last = known.and_then(|uid| self.ended.get(&uid));
        let record = self.record().or(last);
        let protected = record.is_some_and(|record| record.members.iter().count() > 1);
        let term = record.map_or(0, |record| record.term);
        let next = self.next().to_string();
        let pod = self.pods.get_mut(seat).unwrap();
        if matches!(role, SeatRole::Standby | SeatRole::Active) {
            self.storage_failures.remove(&pod.uid);
        }
        let troubles = self.guest_troubles.iter().filter(|_| role == SeatRole::Active);
        let published = SeatPublished {
            incarnation: Some(me),
            role: Some(role),
            term,
            protected,
            peer_connected: protected || role == SeatRole::Joining,
            arbiter_reachable: true,
            lease_uid: known,
            storage_troubles: troubles.cloned().collect(),
            storage_failures: self.storage_failures.get(&pod.uid).copied().unwrap_or(0),
            done_request: self.executed.get(&pod.uid).cloned(),
            look: pod.look.clone(),
            ..SeatPublished::default()
        };
        if pod.published.as_ref() != Ok(&published) {
            pod.published = Ok(published);
            pod.version = next;
        }
    }

    fn publish_end(&mut self, seat: &str) {
        let pod = self.pods.get_mut(seat).unwrap();
        pod.published = Ok(SeatPublished {
            role: Some(SeatRole::Ended),
            done_request: self.executed.get(&pod.uid).cloned(),
            look: pod.look.clone(),
            ..SeatPublished::default()
        });
    }

    /// Everybody does what they can until nothing changes any more, or for so many rounds.
    pub fn settle(&mut self, rounds: usize) -> bool {
        for _ in 0..rounds {
            let changed = self.step();
            for seat in self.pods.keys().cloned().collect::<Vec<_>>() {
                self.schedule(&seat);
                self.kubelet(&seat);
                self.engine(&seat);
            }
            self.volumes();
            self.pass(2);
            if !changed && self.is_quiet() {
                return true;
            }
        }
        false
    }

    /// Would another look do nothing, now and later?
    pub fn is_quiet(&mut self) -> bool {
        let seen = self.observe();
        let decision = decide(&seen);
        decision.actions.is_empty()
            && decision.recheck.is_none()
            && Some(&status::status(&seen, &decision)) == self.vm.status.as_ref()
    }

    pub fn is_protected(&self) -> bool {
        let conditions = &self.vm.status.as_ref().unwrap().conditions;
        conditions
            .iter()
            .any(|condition| condition.type_ == status::PROTECTED && condition.status == "True")
    }

    pub fn want(&mut self, strategy: RunStrategy) {
        if self.vm.spec.run_strategy != strategy {
            self.vm.spec.run_strategy = strategy;
            self.vm.metadata.generation = Some(self.vm.metadata.generation.unwrap_or_default() + 1);
            self.version += 1;
        }
    }

    pub fn delete(&mut self) {
        if self.vm.metadata.deletion_timestamp.is_none() {
            self.vm.metadata.deletion_timestamp = Some(Time(self.now));
            self.version += 1;
        }
    }

    pub fn has_finalizer(&self) -> bool {
        !self.vm.finalizers().is_empty()
    }
}

impl World {
    /// The node of a seat dies, and is called not ready at once; which one it was.
    pub fn kill_node_of(&mut self, entry: &SeatEntry) -> String {
        let node = entry.node.clone().unwrap();
        self.nodes.get_mut(&node).unwrap().ready = false;
        node
    }

    /// The active ejects this seat, whose engine ends for good.
    pub fn swap_out(&mut self, seat: &str) {
        let own: Vec<String> = self.entry(seat).unwrap().pod_uid.into_iter().collect();
        let holder = self.record().unwrap().holder;
        assert!(!own.contains(&holder.seat.to_string()));
        self.swap(|record| record.members = Members::one(holder));
        self.publish_end(seat);
        let active = self
            .book()
            .into_iter()
            .find(|entry| entry.had_uid(&holder.seat.to_string()))
            .unwrap();
        self.publish(&active.name, SeatRole::Active, holder);
    }
}
