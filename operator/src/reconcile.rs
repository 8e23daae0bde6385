//! One look at one VM: observe → decide → status → apply.

mod identities;

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ftvm_crds::{FaultTolerantVM, FaultTolerantVMStatus, VmPhase};
use ftvm_watch::UnreadableObjects;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::runtime::controller::Action as Next;
use kube::runtime::events::EventType;
use kube::{Client, Resource, ResourceExt};

use crate::api::{ApiError, Objects};
use crate::authority::authority;
use crate::build::{self, GuestFiles, SeatImage};
use crate::caches::Caches;
use crate::cpu;
use crate::decide::{self, Acceptance, Action, Decision, Want, accepted_since, decide, want};
use crate::events::{Events, RECONCILE_FAILED};
use crate::first_look::Looked;
use crate::image_volumes::ImageVolumes;
use crate::metrics::{self, Metrics};
use crate::observe::{Observed, Refusal};
use crate::refusal::{self, Last, Refused};
use crate::status::{self, NOT_RUNNING};
use crate::waits::{self, backoff, jittered, pause, refused_wait};
use identities::{restore, unrestored};

/// What a VM has once is applied anew after this time, so that a deleted object comes back.
const SHARED_EVERY: Duration = Duration::from_secs(3600);
/// Wait after a conflict: the watch tells of the new version soon.
const CONFLICT: Duration = Duration::from_millis(500);
/// Wait while a VM can't be read: nothing is asked of anybody.
const UNREADABLE_AGAIN: Duration = Duration::from_secs(10);

/// A watch tells of an own write within this time. Later, whatever it says counts: the API server may have been restored from a backup.
const WATCH_TELLS: Duration = Duration::from_secs(10);

/// What reconciles share.
pub struct Context {
    /// The API server.
    pub client: Client,
    /// What the watches told.
    pub caches: Caches,
    /// VMs that are there and can't be read.
    pub unreadable: UnreadableObjects,
    /// How seats' pods are made.
    pub image: SeatImage,
    /// How guest images come into them.
    pub image_volumes: ImageVolumes,
    /// Where events go.
    pub events: Events,
    /// What is counted.
    pub metrics: Metrics,
    /// By UID of the VM.
    pub memory: Mutex<HashMap<String, Memory>>,
}

/// What this process remembers of a VM while it leads; nothing depends on it but how long is waited.
#[derive(Default, Clone)]
pub struct Memory {
    failures: u32,
    /// What came of the last attempt to make something.
    last: Last,
    shared: Option<(u64, Instant)>,
    identities: waits::Looks,
    /// What came of the last look for identities.
    restored: Last,
    acceptance: Acceptance<Instant>,
    looked: Option<Looked>,
    /// resourceVersion of the VM after what this process wrote last, and when that was.
    written: Option<(u64, Instant)>,
}

/// One look.
///
/// # Errors
/// What the API server refused; [`again`] says when to look again.
pub async fn reconcile(vm: Arc<FaultTolerantVM>, context: Arc<Context>) -> Result<Next, ApiError> {
    if context.unreadable.has(vm.namespace().as_deref(), &vm.name_any()) {
        // What is known of it is old; an event says so. That a list with a version that can be read has ended triggers no look.
        return Ok(Next::requeue(jittered(UNREADABLE_AGAIN)));
    }
    context.metrics.reconciles.inc();
    if context.is_old(&vm) {
        // The watch is about to tell what this process wrote itself: whatever is decided of the object before that comes to nothing.
        return Ok(Next::requeue(jittered(CONFLICT)));
    }
    let timer = context.metrics.seconds.start_timer();
    let result = look(&vm, &context).await;
    timer.observe_duration();
    match &result {
        Ok(_) => context.no_failure(&vm),
        Err(error) if !error.is_conflict() => {
            context
                .publish(&vm, EventType::Warning, RECONCILE_FAILED, &error.to_string())
                .await
        }
        Err(_) => {}
    }
    result
}

/// When to look again after a failure: later and later, and not all at once.
pub fn again(vm: Arc<FaultTolerantVM>, error: &ApiError, context: Arc<Context>) -> Next {
    let name = format!("{}/{}", vm.namespace().unwrap_or_default(), vm.name_any());
    if error.is_conflict() {
        context.metrics.failures.with_label_values(&["conflict"]).inc();
        tracing::debug!(vm = %name, %error, "somebody was faster");
        return Next::requeue(jittered(CONFLICT));
    }
    context.metrics.failures.with_label_values(&["refused"]).inc();
    let failures = context.remember(&vm, |memory| {
        memory.failures = memory.failures.saturating_add(1);
        memory.failures
    });
    let wait = jittered(backoff(failures));
    tracing::warn!(vm = %name, %error, failures, wait_ms = wait.as_millis() as u64, "a reconcile failed");
    Next::requeue(wait)
}

async fn look(vm: &FaultTolerantVM, context: &Context) -> Result<Next, ApiError> {
    let namespace = vm.namespace().ok_or_else(|| ApiError::Unread(vm.name_any()))?;
    let objects = Objects::new(context.client.clone(), context.metrics.clone(), &namespace);
    let mut seen = context.recall(context.caches.observe(vm), Looked::told);
    let mut decision = decide(&seen);
    if decision.needs_certainty(&seen) {
        match context.caches.observe_fresh(&objects, &vm.name_any()).await? {
            Some(fresh) => seen = context.recall(fresh, Looked::read),
            None => {
                context.forget(vm);
                return Ok(Next::await_change());
            }
        }
        decision = decide(&seen);
    }
    let mut undone = Undone::default();
    if want(&seen) == Want::Run
        && seen.waits().is_none()
        && let Err(error) = shared(&seen, &objects, context).await
    {
        undone.take_shared(error)?;
    }
    let status = status::status(&seen, &decision);
    let mut vm = seen.vm.clone();
    let changed = seen.vm.status.as_ref() != Some(&status);
    if changed {
        vm = write_status(&vm, status, &objects, context).await?;
    }
    vm = act(&decision, vm, &seen, &mut undone, &objects, context).await?;
    let Undone { refused, unknown, .. } = undone;
    if let Some(error) = refused {
        let next = tell_refusal(&error, &vm, seen, decision, &objects, context).await?;
        return unknown.map_or(Ok(next), Err);
    }
    if let Some(error) = unknown {
        return Err(error);
    }
    if decision.actions.contains(&Action::RemoveFinalizer) {
        context.forget(&vm);
        return Ok(Next::await_change());
    }
    // A look that changed the book has no actions for that reason.
    if seen.waits().is_none() && (!changed || !decision.actions.is_empty()) {
        let last = context.remember(&vm, |memory| mem::replace(&mut memory.last, Last::Made));
        if last.seen(&vm, Instant::now()).is_some() {
            // The status still says what was refused.
            return Ok(Next::requeue(jittered(CONFLICT)));
        }
    }
    let (again, unrestored) = restore(&seen, &objects, context).await?;
    let ahead = status::failover_ahead(&seen, &decision.book);
    let recheck = [decision.recheck, again, ahead].into_iter().flatten().min();
    let next = pause(recheck, seen.waits()).map_or_else(Next::await_change, Next::requeue);
    if let Some(refused) = unrestored.filter(|_| seen.refused.is_none()) {
        show(refused, true, &vm, seen, decision, &objects, context).await?;
    }
    Ok(next)
}

/// What came to nothing in a look. It holds back no more than it has to.
#[derive(Debug, Default)]
struct Undone {
    /// What was refused first, which is told.
    refused: Option<ApiError>,
    /// What all seats need was refused.
    shared: bool,
    /// Seats of which something was refused.
    seats: Vec<String>,
    /// It is not known how guest images come into pods: nobody can make one.
    unknown: Option<ApiError>,
}

impl Undone {
    /// Is this action in vain, or too early?
    fn holds_back(&self, action: &Action) -> bool {
        let of_seat = action
            .makes_of()
            .is_some_and(|seat| self.seats.iter().any(|other| other == seat));
        let unknown = self.unknown.is_some() && matches!(action, Action::CreatePod { .. });
        action.waits() && (self.shared || of_seat || unknown)
    }

    /// An action failed, and what does not depend on it is done all the same: seats wait to be admitted and asked, the record for its nodes.
    ///
    /// # Errors
    /// Any other failure ends the look.
    fn take(&mut self, action: &Action, error: ApiError) -> Result<(), ApiError> {
        if matches!(error, ApiError::ImageVolumes(_)) {
            self.unknown = self.unknown.take().or(Some(error));
        } else if action.makes() && error.needs_person() {
            self.refused = self.refused.take().or(Some(error));
            self.seats.extend(action.makes_of().map(str::to_owned));
        } else {
            return Err(error);
        }
        Ok(())
    }

    /// What the VM has once could not be made.
    ///
    /// # Errors
    /// Whatever is no refusal ends the look.
    fn take_shared(&mut self, error: ApiError) -> Result<(), ApiError> {
        if error.refusal().is_none() {
            return Err(error);
        }
        self.shared = true;
        self.refused = Some(error);
        Ok(())
    }
}

/// Does what was decided, as far as it can be done; returns the VM as it is then.
async fn act(
    decision: &Decision,
    mut vm: FaultTolerantVM,
    seen: &Observed,
    undone: &mut Undone,
    objects: &Objects,
    context: &Context,
) -> Result<FaultTolerantVM, ApiError> {
    for action in &decision.actions {
        if undone.holds_back(action) {
            continue;
        }
        match apply(action, vm.clone(), seen, objects, context).await {
            Ok(after) => vm = after,
            Err(error) => undone.take(action, error)?,
        }
        context.wrote(&vm);
    }
    Ok(vm)
}

/// Writes a status and tells what changed; returns the VM as it is then.
async fn write_status(
    vm: &FaultTolerantVM,
    status: FaultTolerantVMStatus,
    objects: &Objects,
    context: &Context,
) -> Result<FaultTolerantVM, ApiError> {
    let after = objects.write_status(vm, status).await?;
    context.wrote(&after);
    tell(&vm.status.clone().unwrap_or_default(), &after, context).await;
    Ok(after)
}

/// Something can't be made until a person does something, mostly because the API server refuses it: says so, and plans the next attempt.
async fn tell_refusal(
    error: &ApiError,
    vm: &FaultTolerantVM,
    seen: Observed,
    decision: Decision,
    objects: &Objects,
    context: &Context,
) -> Result<Next, ApiError> {
    context.metrics.failures.with_label_values(&["refused"]).inc();
    let namespace = vm.namespace().unwrap_or_default();
    let message = refusal::message(error, &namespace).unwrap_or_else(|| error.to_string());
    let (refused, first) = context.was_refused(vm, refusal::reason(error), message);
    let (times, refused) = (refused.times, refused.seen(vm, Instant::now()));
    let wait = refused.wait;
    let name = format!("{namespace}/{}", vm.name_any());
    tracing::warn!(vm = %name, %error, times, wait_ms = wait.as_millis() as u64, "something is refused");
    let recheck = decision.recheck;
    show(refused, first, vm, seen, decision, objects, context).await?;
    Ok(Next::requeue(pause(recheck, Some(wait)).unwrap_or(wait)))
}

/// Says what is refused, for the `first` time or not.
async fn show(
    refused: Refusal,
    first: bool,
    vm: &FaultTolerantVM,
    seen: Observed,
    decision: Decision,
    objects: &Objects,
    context: &Context,
) -> Result<(), ApiError> {
    let status = with_refusal(vm, refused.clone(), seen, decision);
    let shown = status.conditions.iter().any(|told| told.reason == refused.reason);
    if vm.status.as_ref() != Some(&status) {
        write_status(vm, status, objects, context).await?;
    }
    if first && !shown {
        // The VM is protected, or halted: no condition has a reason to fail.
        context
            .publish(vm, EventType::Warning, refused.reason, &refused.message)
            .await;
    }
    Ok(())
}

/// The status of a VM for which something was refused. Of `vm`, as it is after all that was done in this look: its book has pods that were
/// admitted meanwhile, which the one that was decided does not.
fn with_refusal(vm: &FaultTolerantVM, refused: Refusal, seen: Observed, decision: Decision) -> FaultTolerantVMStatus {
    let seen = Observed {
        vm: vm.clone(),
        refused: Some(refused),
        ..seen
    };
    let book = seen.status().seats;
    status::status(&seen, &Decision { book, ..decision })
}

/// Does one thing; returns the VM as it is after it.
async fn apply(
    action: &Action,
    vm: FaultTolerantVM,
    seen: &Observed,
    objects: &Objects,
    context: &Context,
) -> Result<FaultTolerantVM, ApiError> {
    tracing::info!(vm = %vm.name_any(), ?action, "apply");
    let name = vm.name_any();
    let entry = |seat: &str| {
        let seats = vm.status.iter().flat_map(|status| &status.seats);
        seats.into_iter().find(|entry| entry.name == seat).cloned()
    };
    match action {
        Action::AddFinalizer => return objects.set_finalizer(&vm, true).await,
        Action::RemoveFinalizer => {
            if let Some(change) = status::kept(seen) {
                context
                    .publish(&vm, EventType::Normal, &change.reason, &change.note)
                    .await;
            }
            return objects.set_finalizer(&vm, false).await;
        }
        Action::CreateClaims { seat, disks } => {
            let Some(entry) = entry(seat) else { return Ok(vm) };
            for name in disks {
                if let Some(index) = vm.spec.disks.iter().position(|disk| disk.name == *name) {
                    objects.create_claim(&build::claim(&vm, &entry, index)?).await?;
                }
            }
        }
        Action::CreatePod { seat } => {
            let Some(entry) = entry(seat) else { return Ok(vm) };
            let unfit = cpu::chosen(&vm).map(|baseline| cpu::unfit_labels(seen, &baseline));
            let files = match vm.spec.boot.image {
                Some(_) => context.image_volumes.files().await?,
                // Out of a claim, which every cluster can mount.
                None => GuestFiles::Mounted,
            };
            let pod = build::pod(&vm, &entry, &context.image, files, unfit.as_ref(), ran(seen))?;
            objects.create(&pod).await?;
        }
        Action::Admit { seat, uid } => {
            let authority = authority(&vm, objects, &context.caches).await?;
            objects.issue_identity(&vm, seat, uid, &authority).await?;
            return admit(vm, seat, uid, seen, objects).await;
        }
        Action::CreateLease { original, node } => objects.create_lease(&vm, *original, node).await?,
        Action::RecreateLease { record, nodes } => objects.recreate_lease(&vm, record, nodes).await?,
        Action::RewriteGenesis { original } => {
            if let Some(record) = decide::record(seen) {
                objects
                    .rewrite_genesis(&name, record.snapshot.version, *original)
                    .await?;
            }
        }
        Action::SetLeaseNodes { nodes } => {
            if let Some(record) = decide::record(seen) {
                let (uid, version) = (record.snapshot.uid.to_string(), record.snapshot.version.to_string());
                objects.set_lease_nodes(&name, &uid, &version, nodes).await?;
            }
        }
        Action::Request { seat, uid, request } => {
            if let Some(pod) = seen.pods.get(seat) {
                objects.request(seat, uid, &pod.version, request).await?;
            }
        }
        Action::AskForWord { seat, uid, drawn } => objects.ask_for_word(seat, uid, drawn).await?,
        Action::DeletePod {
            seat,
            uid,
            version,
            force,
        } => objects.delete::<Pod>(seat, uid, Some(version), *force).await?,
        Action::DeleteClaim { claim, uid } => objects.delete::<PersistentVolumeClaim>(claim, uid, None, false).await?,
    }
    Ok(vm)
}

/// The pod's identity exists: from now on the daemon of its node may run the seat's engine.
async fn admit(
    vm: FaultTolerantVM,
    seat: &str,
    uid: &str,
    seen: &Observed,
    objects: &Objects,
) -> Result<FaultTolerantVM, ApiError> {
    let mut status = vm.status.clone().unwrap_or_default();
    if let Some(entry) = status.seats.iter_mut().find(|entry| entry.name == seat) {
        let pod = seen.pods.get(seat);
        entry.pod_uid = Some(uid.to_owned());
        entry.node = pod.and_then(|pod| pod.node.clone());
        entry.machine = entry.node.as_deref().and_then(|node| decide::machine(seen, node));
        entry.pod_ip = pod.and_then(|pod| pod.pod_ip.clone());
        entry.host_ip = pod.and_then(|pod| pod.host_ip.clone());
    }
    objects.write_status(&vm, status).await
}

/// Whether a guest may have run: its disks have their first contents.
fn ran(seen: &Observed) -> bool {
    decide::record(seen).is_some_and(|record| !decide::is_genesis(&record.snapshot.record))
}

/// What a VM has once. Applied by each process once, when it changes, and from time to time.
async fn shared(seen: &Observed, objects: &Objects, context: &Context) -> Result<(), ApiError> {
    let vm = &seen.vm;
    let budget = build::budget(vm);
    let policy = build::network_policy(vm, ran(seen));
    let mut hasher = DefaultHasher::new();
    for object in [serde_json::to_string(&budget), serde_json::to_string(&policy)] {
        object.unwrap_or_default().hash(&mut hasher);
    }
    let hash = hasher.finish();
    let applied = context.remember(vm, |memory| memory.shared);
    if applied.is_some_and(|(known, when)| known == hash && when.elapsed() < SHARED_EVERY) {
        return Ok(());
    }
    objects.apply(&budget).await?;
    objects.apply(&policy).await?;
    context.remember(vm, |memory| memory.shared = Some((hash, Instant::now())));
    Ok(())
}

async fn tell(old: &FaultTolerantVMStatus, vm: &FaultTolerantVM, context: &Context) {
    let status = vm.status.clone().unwrap_or_default();
    for change in status::changes(old, &status) {
        let kind = if change.warning {
            EventType::Warning
        } else {
            EventType::Normal
        };
        context.publish(vm, kind, &change.reason, &change.note).await;
    }
}

impl Context {
    /// Events are for people: that one is lost is logged and changes nothing.
    async fn publish(&self, vm: &FaultTolerantVM, type_: EventType, reason: &str, note: &str) {
        if let Err(error) = self.events.publish(&vm.object_ref(&()), type_, reason, note).await {
            tracing::warn!(vm = %vm.name_any(), %error, reason, "an event could not be published");
        }
    }

    fn memories(&self) -> MutexGuard<'_, HashMap<String, Memory>> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remember<T>(&self, vm: &FaultTolerantVM, change: impl FnOnce(&mut Memory) -> T) -> T {
        let mut memory = self.memories();
        change(memory.entry(vm.uid().unwrap_or_default()).or_default())
    }

    /// What was observed, with what is known of an earlier refusal, of since when a loss is accepted, and of the first look at the VM. `take`: by the
    /// watches, or past the caches.
    fn recall(&self, seen: Observed, take: fn(&mut Looked, &Observed, Instant)) -> Observed {
        let now = Instant::now();
        let (refused, since, first_look) = self.remember(&seen.vm, |memory| {
            let since = accepted_since(&mut memory.acceptance, &seen, now);
            let looked = memory.looked.get_or_insert_with(|| Looked::new(&seen, now));
            take(looked, &seen, now);
            let first_look = looked.first(now);
            let last = memory.last.seen(&seen.vm, now);
            let refused = last.or_else(|| unrestored(&memory.restored, &seen, now));
            (refused, since, first_look)
        });
        Observed {
            refused,
            accepted_for: since.map(|since| now.saturating_duration_since(since)),
            first_look,
            ..seen
        }
    }

    /// Something was refused: what is gone by now, and whether it is the first refusal to the VM as it is.
    fn was_refused(&self, vm: &FaultTolerantVM, reason: &'static str, message: String) -> (Refused, bool) {
        self.remember(vm, |memory| {
            let former = memory.last.of(vm);
            let first = former.is_none();
            let refused = Refused::next(former, vm, (reason, message), Instant::now(), refused_wait);
            memory.last = Last::Refused(refused.clone());
            (refused, first)
        })
    }

    fn no_failure(&self, vm: &FaultTolerantVM) {
        let mut memory = self.memories();
        if let Some(memory) = memory.get_mut(&vm.uid().unwrap_or_default()) {
            memory.failures = 0;
        }
    }

    /// The VM as it is after a write.
    fn wrote(&self, vm: &FaultTolerantVM) {
        let Some(version) = version(vm) else { return };
        self.remember(vm, |memory| memory.written = Some((version, Instant::now())));
    }

    /// Does the cache lack what this process wrote itself?
    fn is_old(&self, vm: &FaultTolerantVM) -> bool {
        let memory = self.memories();
        let written = memory
            .get(&vm.uid().unwrap_or_default())
            .and_then(|memory| memory.written);
        let recent = written.filter(|(_, when)| when.elapsed() < WATCH_TELLS);
        precedes(version(vm), recent.map(|(version, _)| version))
    }

    fn forget(&self, vm: &FaultTolerantVM) {
        let mut memory = self.memories();
        memory.remove(&vm.uid().unwrap_or_default());
        self.events.forget(vm);
    }
}

/// resourceVersion as a number, which grows (Kubernetes API concepts, "Resource versions"); none: nothing is known of its order.
fn version(vm: &FaultTolerantVM) -> Option<u64> {
    vm.resource_version()?.parse().ok()
}

/// Is what was read older than what was written?
fn precedes(read: Option<u64>, written: Option<u64>) -> bool {
    read.zip(written).is_some_and(|(read, written)| read < written)
}

/// Does a guest run that no standby follows? Also one that goes on because its halt, or the VM's deletion, waits.
fn lacks_protection(phase: VmPhase, protected: Option<&Condition>) -> bool {
    let holds = protected.is_some_and(|told| told.status == "True");
    match phase {
        VmPhase::Running | VmPhase::Paused => !holds,
        VmPhase::Stopping | VmPhase::Deleting => protected.is_some_and(|told| !holds && told.reason != NOT_RUNNING),
        VmPhase::Starting | VmPhase::Halted => false,
    }
}

/// Counts VMs by phase.
pub fn count<'a>(vms: impl Iterator<Item = &'a FaultTolerantVM>, metrics: &Metrics) {
    let mut phases: HashMap<VmPhase, i64> = HashMap::new();
    let mut unprotected = 0;
    let mut each = Vec::new();
    for vm in vms {
        let status = vm.status.as_ref();
        let phase = status.and_then(|status| status.phase).unwrap_or(VmPhase::Starting);
        *phases.entry(phase).or_default() += 1;
        let protected = status.and_then(|status| status.condition(status::PROTECTED));
        let lacks = lacks_protection(phase, protected);
        unprotected += i64::from(lacks);
        each.push(metrics::Vm::of(vm, phase_name(phase), lacks));
    }
    for phase in VmPhase::ALL {
        let count = phases.get(&phase).copied().unwrap_or_default();
        metrics.vms.with_label_values(&[&phase_name(phase)]).set(count);
    }
    metrics.unprotected.set(unprotected);
    metrics.each.set(each);
}

fn phase_name(phase: VmPhase) -> String {
    format!("{phase:?}").to_lowercase()
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use k8s_openapi::jiff::Timestamp;
    use kube::core::Status;

    use super::*;
    use crate::decide::rig::World;

    fn forbidden() -> ApiError {
        let status = Status {
            code: 403,
            ..Status::default()
        };
        ApiError::Request {
            verb: "create",
            kind: "Pod".to_owned(),
            name: "web-a".to_owned(),
            source: Box::new(kube::Error::Api(Box::new(status))),
        }
    }

    fn pod(seat: &str) -> Action {
        Action::CreatePod { seat: seat.to_owned() }
    }

    fn admit(seat: &str) -> Action {
        Action::Admit {
            seat: seat.to_owned(),
            uid: String::new(),
        }
    }

    #[test]
    fn what_is_refused_to_a_seat_holds_back_nothing_of_the_other_one() {
        let claims = Action::CreateClaims {
            seat: "a".to_owned(),
            disks: Vec::new(),
        };
        let mut undone = Undone::default();
        undone.take(&claims, forbidden()).unwrap();
        assert!(undone.refused.is_some());
        assert!(undone.holds_back(&pod("a")) && !undone.holds_back(&pod("b")));
        assert!(!undone.holds_back(&admit("a")));
        // What all need is needed by all.
        let mut undone = Undone::default();
        undone.take_shared(forbidden()).unwrap();
        assert!(undone.refused.is_some());
        assert!(undone.holds_back(&pod("a")) && undone.holds_back(&pod("b")));
        assert!(!undone.holds_back(&admit("a")));
        // Nor does a seat that can't have an identity.
        let gone = ApiError::AuthorityGone {
            name: "web-authority".to_owned(),
            trusts: "pod b".to_owned(),
        };
        let mut undone = Undone::default();
        undone.take(&admit("a"), gone).unwrap();
        assert!(undone.refused.is_some());
        assert!(undone.holds_back(&pod("a")) && !undone.holds_back(&pod("b")));
        assert!(!undone.holds_back(&admit("b")));
        // Whatever else fails ends the look.
        let other = || ApiError::Unread("web".to_owned());
        assert!(Undone::default().take(&pod("a"), other()).is_err());
        assert!(Undone::default().take_shared(other()).is_err());
    }

    /// A question that nobody answers must not keep seats from being admitted, nor anything from being asked of them.
    #[test]
    fn without_an_answer_about_image_volumes_only_pods_wait() {
        let nodes = Action::SetLeaseNodes {
            nodes: "a,b".to_owned(),
        };
        let mut undone = Undone::default();
        undone
            .take(&pod("a"), ApiError::ImageVolumes("late".to_owned()))
            .unwrap();
        assert!(undone.unknown.is_some() && undone.refused.is_none());
        assert!(undone.holds_back(&pod("a")) && undone.holds_back(&pod("b")));
        assert!(!undone.holds_back(&admit("b")) && !undone.holds_back(&nodes));
    }

    #[test]
    fn a_guest_that_goes_on_while_a_halt_waits_is_counted_as_any_other() {
        let told = |holds: bool, reason: &str| Condition {
            type_: status::PROTECTED.to_owned(),
            status: if holds { "True" } else { "False" }.to_owned(),
            reason: reason.to_owned(),
            message: String::new(),
            last_transition_time: Time(Timestamp::UNIX_EPOCH),
            observed_generation: None,
        };
        let lacks = |phase, holds, reason| lacks_protection(phase, Some(&told(holds, reason)));
        for phase in [VmPhase::Stopping, VmPhase::Deleting] {
            assert!(lacks(phase, false, "NoStandby"));
            assert!(!lacks(phase, false, NOT_RUNNING) && !lacks(phase, true, "StandbyFollows"));
            assert!(!lacks_protection(phase, None));
        }
        assert!(lacks(VmPhase::Running, false, "NoStandby") && !lacks(VmPhase::Running, true, "StandbyFollows"));
        assert!(!lacks(VmPhase::Halted, false, NOT_RUNNING) && !lacks(VmPhase::Starting, false, "Starting"));
    }

    #[test]
    fn a_cache_is_old_until_it_has_what_was_written() {
        assert!(precedes(Some(9), Some(10)));
        assert!(!precedes(Some(10), Some(10)) && !precedes(Some(11), Some(10)));
        // Where nothing was written, or numbers are none, every look counts.
        assert!(!precedes(Some(9), None) && !precedes(None, Some(10)));
    }

    /// The status is written a second time in a look in which pods were admitted.
    #[test]
    fn a_refusal_is_told_beside_what_was_done_before() {
        let mut world = World::new(3);
        let (seen, decision) = loop {
            let seen = world.observe();
            let decision = decide(&seen);
            let admits = |action: &Action| matches!(action, Action::Admit { .. });
            if decision.actions.iter().any(admits) {
                break (seen, decision);
            }
            assert!(world.step());
        };
        assert!(world.carry_out(&seen, world.version, &decision));
        let refused = Refusal {
            reason: status::API_SERVER_REFUSES,
            message: "no: pay first".to_owned(),
            wait: Duration::from_secs(1),
        };
        let status = with_refusal(&world.vm, refused, seen, decision);
        assert_eq!(status.seats, world.book());
        assert!(status.seats.iter().all(|seat| seat.pod_uid.is_some()), "{status:?}");
        for kind in [status::READY, status::PROTECTED] {
            let told = status.condition(kind).unwrap();
            let words = (told.reason.as_str(), told.message.as_str());
            assert_eq!(words, (status::API_SERVER_REFUSES, "no: pay first"));
        }
    }

    /// By the names that the list of metrics has.
    #[test]
    fn vms_are_counted_in_each_phase() {
        let vms = VmPhase::ALL.map(|phase| {
            let mut vm = World::new(3).vm;
            vm.status.get_or_insert_default().phase = Some(phase);
            vm
        });
        let told = Metrics::new().unwrap();
        count(vms.iter(), &told);
        let text = told.text();
        for phase in metrics::PHASES {
            let line = format!("ftvm_vms{{phase=\"{phase}\"}} 1");
            assert!(text.lines().any(|told| told == line), "{line}\n{text}");
        }
        for metric in ["\nftvm_vms{", "\nftvm_vm_phase{"] {
            assert_eq!(text.matches(metric).count(), metrics::PHASES.len(), "{text}");
        }
    }
}
