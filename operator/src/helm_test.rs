//! `ftvm-operator helm-test`, the chart's `helm test`: makes a VM, lets it fail over as planned, and judges it by its status.
//!
//! ```text
//!   create ──► Protected ──► annotation ftvm.dev/switchover ──► done, active elsewhere, Protected ──► deleted
//!      └─────────────┴──────────── refused, too late, SIGTERM ─────────────────┴────────────────────► deleted, exit code 1
//! ```
//! The pod has rights to this one VM (`docs/kubernetes.md`). What another test left behind is deleted first; what nobody's test made is not touched.

use std::fmt;
use std::io::Write as _;
use std::time::Duration;

use ftvm_crds::names::{ANNOTATION_SWITCHOVER, FINALIZER};
use ftvm_crds::{
    Boot, Bridge, CpuBaseline, DEFAULT_KERNEL, Disk, DiskSource, FaultTolerance, FaultTolerantVM, FaultTolerantVMSpec,
    FaultTolerantVMStatus, GuestImage, Machine, Network, Placement, PullPolicy, RunStrategy, SeatResources,
    SwitchoverOutcome, VolumePolicy,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::core::Status;
use kube::{Client, Config, ResourceExt};
use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, sleep, timeout};

use crate::random;
use crate::status::{PROTECTED, READY};

/// Name of the VM. The chart's Role has it, too.
pub const NAME: &str = "ftvm-helm-test";
/// Label of the VM: the test run that made it.
const LABEL_RUN: &str = "ftvm.dev/helm-test";
/// Who writes its fields.
const MANAGER: &str = "ftvm-helm-test";
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(500);
/// An API server that does not answer for so long is asked again.
const ANSWER: Duration = Duration::from_secs(10);
/// For the VM's deletion, after everything else. The chart's pod has 15 s more for its end.
const REMOVAL: Duration = Duration::from_secs(60);

/// What the command line says.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the VM is made.
    pub namespace: String,
    /// OCI image with the guest's kernel.
    pub guest_image: String,
    /// When nodes pull it.
    pub pull_policy: PullPolicy,
    /// The guest's command line.
    pub cmdline: String,
    /// The guest's memory, such as 128Mi.
    pub memory: String,
    /// Storage class of the seats' volumes; none: the cluster's default.
    pub storage_class_name: Option<String>,
    /// Bridge of the guest's one network card; none: it has no card.
    pub bridge: Option<String>,
    /// For everything but the VM's deletion.
    pub timeout: Duration,
}

/// Why the test has not passed.
#[derive(Debug, thiserror::Error)]
pub enum HelmTestError {
    /// No configuration for the API server.
    #[error("no way to the API server ({0}): run in a pod with a service account, or set KUBECONFIG")]
    Config(#[from] kube::config::InferConfigError),
    /// The client.
    #[error("API server: {0}")]
    Client(#[from] kube::Error),
    /// Signals can't be waited for.
    #[error("signals: {0}")]
    Signals(std::io::Error),
    /// Somebody else's object has the name.
    #[error(
        "FaultTolerantVM {namespace}/{NAME} is there and has no label {LABEL_RUN}: no helm test made it, so it is not touched: delete it, or install the release in another namespace"
    )]
    Foreign {
        /// The release's namespace.
        namespace: String,
    },
    /// The API server refuses for good.
    #[error("{step}: the API server refuses ({answer}): {advice}")]
    Refused {
        /// What was being done.
        step: Step,
        /// The API server's answer.
        answer: String,
        /// What to do.
        advice: &'static str,
    },
    /// It went wrong.
    #[error("{step}: {why}")]
    Failed {
        /// What was being waited for.
        step: Step,
        /// Why it won't be.
        why: String,
    },
    /// It is not so in time.
    #[error(
        "{step}: not so {seconds} s after the beginning; last seen: {why}. Mend that, or raise the chart's test.timeoutSeconds"
    )]
    Late {
        /// What was being waited for.
        step: Step,
        /// Time since the beginning.
        seconds: u64,
        /// Last reason why it is not so.
        why: String,
    },
    /// A signal.
    #[error("{step}: told to end (SIGTERM or SIGINT) before that was so; last seen: {why}")]
    Ended {
        /// What was being waited for.
        step: Step,
        /// Last reason why it is not so.
        why: String,
    },
    /// The VM stays.
    #[error(
        "FaultTolerantVM {namespace}/{NAME} is left behind: not gone after {} s; last seen: {why}. The operator takes its finalizer {FINALIZER} off once both engines have ended: see the operator's log; the next helm test deletes it, too, or `kubectl --namespace {namespace} delete ftvm {NAME}`",
        REMOVAL.as_secs()
    )]
    Left {
        /// The release's namespace.
        namespace: String,
        /// What is in the way.
        why: String,
    },
}

/// What the test is about to reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The object is made.
    Creation,
    /// The VM is protected.
    Protection,
    /// The switchover is done, and the VM is protected again.
    Switchover,
    /// The object is gone.
    Deletion,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Step::Creation => "making the VM",
            Step::Protection => "waiting until the VM is protected",
            Step::Switchover => "waiting for the planned switchover",
            Step::Deletion => "deleting the VM",
        })
    }
}

/// What a status means for somebody who waits.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Look<T> {
    /// It is so.
    Found(T),
    /// It may become so.
    Yet(String),
    /// It won't.
    Never(String),
}

/// Nodes of a protected VM.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Pair {
    active: String,
    standby: String,
}

impl fmt::Display for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "active on node {}, standby on node {}", self.active, self.standby)
    }
}

/// Makes the VM, fails it over, deletes it. Progress is on standard output.
///
/// # Errors
/// [`HelmTestError`] says what did not hold, and why.
pub async fn run(options: Options) -> Result<(), HelmTestError> {
    let end = signal(SignalKind::terminate()).map_err(HelmTestError::Signals)?;
    let interrupt = signal(SignalKind::interrupt()).map_err(HelmTestError::Signals)?;
    let client = Client::try_from(Config::infer().await?)?;
    let begin = Instant::now();
    let mut test = Test {
        vms: Api::namespaced(client, &options.namespace),
        run: format!("{:016x}", random::u64()),
        deadline: begin + options.timeout,
        options,
        begin,
        end,
        interrupt,
        uid: None,
        status: FaultTolerantVMStatus::default(),
        why: String::new(),
    };
    let judged = test.play().await;
    if let Err(error) = &judged {
        test.say(&format!("FAILED: {error}"));
        for line in test.uid.iter().flat_map(|_| story(&test.status)) {
            test.say(&line);
        }
    }
    let removed = test.remove().await;
    if let (Err(_), Err(error)) = (&judged, &removed) {
        test.say(&format!("{error}"));
    }
    judged.and(removed)?;
    test.say("passed");
    Ok(())
}

struct Test {
    vms: Api<FaultTolerantVM>,
    options: Options,
    /// Tells this run's VM from other runs', and its switchover, too.
    run: String,
    begin: Instant,
    deadline: Instant,
    end: Signal,
    interrupt: Signal,
    /// Of the VM, once it is made.
    uid: Option<String>,
    /// The VM's when it was last seen.
    status: FaultTolerantVMStatus,
    /// What was waited for last.
    why: String,
}

impl Test {
    async fn play(&mut self) -> Result<(), HelmTestError> {
        self.make().await?;
        let before = self.reach(Step::Protection, protected).await?;
        self.say(&format!("protected: {before}"));
        self.ask().await?;
        let run = self.run.clone();
        let after = self
            .reach(Step::Switchover, |status| switched_over(status, &run, &before))
            .await?;
        self.say(&format!("switched over and protected again: {after}"));
        Ok(())
    }

    /// Makes the VM, after what an earlier run left behind is gone.
    async fn make(&mut self) -> Result<(), HelmTestError> {
        let namespace = self.options.namespace.clone();
        self.say(&format!(
            "makes FaultTolerantVM {namespace}/{NAME} with guest image {}",
            self.options.guest_image
        ));
        loop {
            let why = match self.get().await {
                Err(why) => why,
                Ok(None) => {
                    let params = PostParams {
                        field_manager: Some(MANAGER.to_owned()),
                        ..PostParams::default()
                    };
                    let object = vm(&self.options, &self.run);
                    match answered(self.vms.create(&params, &object)).await {
                        Ok(made) => {
                            self.uid = made.uid();
                            return Ok(());
                        }
                        Err(Unanswered::Refused(status)) => return Err(refused(Step::Creation, &status)),
                        Err(Unanswered::Later(why)) => why,
                    }
                }
                Ok(Some(found)) => match found.labels().get(LABEL_RUN) {
                    None => return Err(HelmTestError::Foreign { namespace }),
                    Some(run) if *run == self.run => {
                        self.uid = found.uid();
                        return Ok(());
                    }
                    Some(_) => self.delete(&found, "the VM of an earlier test is being deleted").await,
                },
            };
            self.wait(Step::Creation, why).await?;
        }
    }

    /// Asks for the switchover.
    async fn ask(&mut self) -> Result<(), HelmTestError> {
        self.say(&format!("asks for a switchover ({ANNOTATION_SWITCHOVER}={})", self.run));
        loop {
            // With the UID it is this object or none.
            let metadata = json!({ "uid": self.uid, "annotations": { ANNOTATION_SWITCHOVER: self.run } });
            let patch = Patch::Merge(json!({ "metadata": metadata }));
            let params = PatchParams {
                field_manager: Some(MANAGER.to_owned()),
                ..PatchParams::default()
            };
            match answered(self.vms.patch(NAME, &params, &patch)).await {
                Ok(_) => return Ok(()),
                Err(Unanswered::Refused(status)) => return Err(refused(Step::Switchover, &status)),
                Err(Unanswered::Later(why)) => self.wait(Step::Switchover, why).await?,
            }
        }
    }

    /// Waits until the VM's status is as `judge` wants it.
    async fn reach<T>(
        &mut self,
        step: Step,
        judge: impl Fn(&FaultTolerantVMStatus) -> Look<T>,
    ) -> Result<T, HelmTestError> {
        loop {
            let why = match self.get().await {
                Err(why) => why,
                Ok(found) => {
                    let found =
                        found.filter(|found| found.uid() == self.uid && found.metadata.deletion_timestamp.is_none());
                    let Some(found) = found else {
                        let why = "somebody else deleted the VM: run the test again, one at a time".to_owned();
                        return Err(HelmTestError::Failed { step, why });
                    };
                    self.status = found.status.unwrap_or_default();
                    match judge(&self.status) {
                        Look::Found(found) => return Ok(found),
                        Look::Never(why) => return Err(HelmTestError::Failed { step, why }),
                        Look::Yet(why) => why,
                    }
                }
            };
            self.wait(step, why).await?;
        }
    }

    /// Deletes what this run made, and returns when it is gone.
    async fn remove(&mut self) -> Result<(), HelmTestError> {
        if self.uid.is_some() {
            self.say("deletes the VM");
        }
        let deadline = Instant::now() + REMOVAL;
        loop {
            let why = match self.get().await {
                Err(why) => why,
                Ok(Some(found)) if found.labels().get(LABEL_RUN) == Some(&self.run) => {
                    self.delete(&found, "its engines are being stopped").await
                }
                Ok(_) => {
                    if self.uid.is_some() {
                        self.say("the VM is gone");
                    }
                    return Ok(());
                }
            };
            self.news(&why);
            if Instant::now() >= deadline {
                let namespace = self.options.namespace.clone();
                return Err(HelmTestError::Left { namespace, why });
            }
            sleep(PAUSE).await;
        }
    }

    async fn get(&self) -> Result<Option<FaultTolerantVM>, String> {
        answered(self.vms.get_opt(NAME)).await.map_err(|error| match error {
            Unanswered::Refused(status) => format!("the API server refuses ({})", status.message),
            Unanswered::Later(why) => why,
        })
    }

    /// Deletes exactly this object, once; returns what there is to wait for.
    async fn delete(&self, found: &FaultTolerantVM, meanwhile: &str) -> String {
        if found.metadata.deletion_timestamp.is_some() {
            return meanwhile.to_owned();
        }
        let params = DeleteParams {
            preconditions: Some(Preconditions {
                uid: found.uid(),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        match answered(self.vms.delete(NAME, &params)).await {
            Ok(_) => meanwhile.to_owned(),
            Err(Unanswered::Refused(status)) => format!("the API server refuses to delete it ({})", status.message),
            Err(Unanswered::Later(why)) => why,
        }
    }

    /// Between two looks. No request is ever given up for a signal, so that what was made is known.
    async fn wait(&mut self, step: Step, why: String) -> Result<(), HelmTestError> {
        self.news(&why);
        if Instant::now() >= self.deadline {
            let seconds = self.begin.elapsed().as_secs();
            return Err(HelmTestError::Late { step, seconds, why });
        }
        tokio::select! {
            () = sleep(PAUSE) => Ok(()),
            _ = self.end.recv() => Err(HelmTestError::Ended { step, why }),
            _ = self.interrupt.recv() => Err(HelmTestError::Ended { step, why }),
        }
    }

    /// Says what is waited for, if it is something new.
    fn news(&mut self, why: &str) {
        if self.why != why {
            why.clone_into(&mut self.why);
            self.say(why);
        }
    }

    fn say(&self, text: &str) {
        // Nobody may be listening.
        let _ = writeln!(
            std::io::stdout(),
            "[{:5.1} s] {text}",
            self.begin.elapsed().as_secs_f64()
        );
    }
}

/// Why a request has no result.
enum Unanswered {
    /// The API server won't do it, now or later.
    Refused(Box<Status>),
    /// Worth another try.
    Later(String),
}

async fn answered<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, Unanswered> {
    match timeout(ANSWER, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(kube::Error::Api(status))) if [400, 403, 404, 422].contains(&status.code) => {
            Err(Unanswered::Refused(status))
        }
        Ok(Err(kube::Error::Api(status))) => {
            let Status { code, message, .. } = &*status;
            Err(Unanswered::Later(format!("API server: {message} (code {code})")))
        }
        Ok(Err(error)) => Err(Unanswered::Later(format!("API server: {error}"))),
        Err(_) => Err(Unanswered::Later(format!(
            "the API server has not answered for {} s",
            ANSWER.as_secs()
        ))),
    }
}

fn refused(step: Step, status: &Status) -> HelmTestError {
    let advice = match status.code {
        403 => {
            "see what it names: a quota, an admission policy of the cluster, or rights that this release's Role has not"
        }
        404 if step == Step::Creation => {
            "it does not know FaultTolerantVMs: install the CustomResourceDefinition (crds.install)"
        }
        404 => "somebody else deleted the VM: run the test again, one at a time",
        _ => "correct the chart's values under `test`",
    };
    HelmTestError::Refused {
        step,
        answer: status.message.clone(),
        advice,
    }
}

/// The VM of a test run.
fn vm(options: &Options, run: &str) -> FaultTolerantVM {
    let network = |name: &String| Network {
        name: "front".to_owned(),
        mac: None,
        bridge: Some(Bridge { name: name.clone() }),
    };
    let spec = FaultTolerantVMSpec {
        run_strategy: RunStrategy::Always,
        machine: Machine {
            vcpus: 1,
            memory: options.memory.clone(),
            cpu_baseline: CpuBaseline::default(),
        },
        boot: Boot {
            image: Some(GuestImage {
                reference: options.guest_image.clone(),
                pull_policy: options.pull_policy,
                // The operator gives the release's own to every seat.
                pull_secret: None,
            }),
            volume: None,
            kernel: DEFAULT_KERNEL.to_owned(),
            initrd: None,
            cmdline: options.cmdline.clone(),
        },
        disks: vec![Disk {
            name: "root".to_owned(),
            size: "64Mi".to_owned(),
            storage_class_name: options.storage_class_name.clone(),
            source: DiskSource::default(),
        }],
        networks: options.bridge.iter().map(network).collect(),
        fault_tolerance: FaultTolerance::default(),
        placement: Placement::default(),
        // It does next to nothing, and must find room on nodes that are in use.
        resources: SeatResources {
            cpu_request: Some("100m".to_owned()),
            ..SeatResources::default()
        },
        volume_policy: VolumePolicy::Delete,
    };
    let mut vm = FaultTolerantVM::new(NAME, spec);
    vm.metadata.labels = Some([(LABEL_RUN.to_owned(), run.to_owned())].into());
    vm
}

fn told(condition: &Condition) -> String {
    let Condition {
        type_,
        status,
        reason,
        message,
        ..
    } = condition;
    format!("{type_} is {status} ({reason}): {message}")
}

/// Does the guest run on one node, with a standby on another?
fn protected(status: &FaultTolerantVMStatus) -> Look<Pair> {
    for kind in [PROTECTED, READY] {
        match status.condition(kind) {
            None => {
                return Look::Yet(
                    "the operator has not looked at the VM yet; if that lasts: does it run, and has it a leader?"
                        .to_owned(),
                );
            }
            Some(condition) if condition.status != "True" => return Look::Yet(told(condition)),
            Some(_) => {}
        }
    }
    match (&status.active, &status.standby) {
        (Some(active), Some(standby)) if active == standby => Look::Never(format!(
            "both seats are on node {active}, whose death would end the VM: that is a defect of the operator"
        )),
        (Some(active), Some(standby)) => Look::Found(Pair {
            active: active.clone(),
            standby: standby.clone(),
        }),
        _ => Look::Yet("Protected is True, and the status does not name two nodes".to_owned()),
    }
}

/// Was this switchover done, and is the VM protected again with its active on another node?
fn switched_over(status: &FaultTolerantVMStatus, request: &str, before: &Pair) -> Look<Pair> {
    let known = status.switchover.as_ref().filter(|known| known.request == request);
    let Some(known) = known else {
        return Look::Yet(
            "the operator has not taken up the switchover yet; if that lasts: does it run, and has it a leader?"
                .to_owned(),
        );
    };
    let why = known.why.as_deref().unwrap_or("no reason given");
    match known.outcome {
        SwitchoverOutcome::Pending => Look::Yet(format!("the switchover is pending ({why})")),
        SwitchoverOutcome::Refused => Look::Never(format!(
            "the switchover was refused ({why}): see the logs of the node-daemon and of the seats on node {}",
            before.active
        )),
        SwitchoverOutcome::Done if status.active.as_ref() == Some(&before.active) => Look::Yet(format!(
            "the switchover is told as done, and the active is still on node {}",
            before.active
        )),
        SwitchoverOutcome::Done => protected(status),
    }
}

/// All that a status says, for somebody who has to find out why.
fn story(status: &FaultTolerantVMStatus) -> Vec<String> {
    let node = |node: &Option<String>| node.clone().unwrap_or_else(|| "none".to_owned());
    let phase = status
        .phase
        .map_or_else(|| "none".to_owned(), |phase| format!("{phase:?}"));
    let head = format!(
        "last seen: phase {phase}, active on node {}, standby on node {}",
        node(&status.active),
        node(&status.standby)
    );
    std::iter::once(head)
        .chain(
            status
                .conditions
                .iter()
                .map(|condition| format!("  {}", told(condition))),
        )
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ftvm_crds::Switchover;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use k8s_openapi::jiff::Timestamp;

    fn condition_of(kind: &str, status: &str, reason: &str) -> Condition {
        Condition {
            type_: kind.to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            message: format!("why {kind}"),
            last_transition_time: Time(Timestamp::UNIX_EPOCH),
            observed_generation: None,
        }
    }

    fn status(active: &str, standby: &str) -> FaultTolerantVMStatus {
        FaultTolerantVMStatus {
            active: Some(active.to_owned()),
            standby: Some(standby.to_owned()),
            conditions: vec![
                condition_of(READY, "True", "GuestRuns"),
                condition_of(PROTECTED, "True", "StandbyFollows"),
            ],
            ..FaultTolerantVMStatus::default()
        }
    }

    fn pair(active: &str, standby: &str) -> Pair {
        Pair {
            active: active.to_owned(),
            standby: standby.to_owned(),
        }
    }

    fn yet<T: fmt::Debug>(look: Look<T>, words: &str) {
        assert!(
            matches!(&look, Look::Yet(why) if why.contains(words)),
            "{words}: {look:?}"
        );
    }

    fn never<T: fmt::Debug>(look: Look<T>, words: &str) {
        assert!(
            matches!(&look, Look::Never(why) if why.contains(words)),
            "{words}: {look:?}"
        );
    }

    #[test]
    fn protected_is_what_the_conditions_say_with_two_nodes() {
        assert_eq!(protected(&status("a", "b")), Look::Found(pair("a", "b")));
        yet(protected(&FaultTolerantVMStatus::default()), "has not looked at the VM");
        for (place, kind) in [READY, PROTECTED].into_iter().enumerate() {
            let mut waiting = status("a", "b");
            waiting.conditions[place] = condition_of(kind, "False", "ImagePullFailed");
            yet(
                protected(&waiting),
                &format!("{kind} is False (ImagePullFailed): why {kind}"),
            );
        }
        let mut alone = status("a", "b");
        alone.standby = None;
        yet(protected(&alone), "does not name two nodes");
        never(protected(&status("a", "a")), "both seats are on node a");
    }

    #[test]
    fn a_switchover_is_done_when_this_one_is_and_the_active_moved() {
        let before = pair("a", "b");
        let asked = |active: &str, standby: &str, request: &str, outcome| FaultTolerantVMStatus {
            switchover: Some(Switchover {
                request: request.to_owned(),
                outcome,
                why: Some("because".to_owned()),
            }),
            ..status(active, standby)
        };
        let judge = |status: &FaultTolerantVMStatus| switched_over(status, "this", &before);
        let (done, pending, refused) = (
            SwitchoverOutcome::Done,
            SwitchoverOutcome::Pending,
            SwitchoverOutcome::Refused,
        );
        assert_eq!(judge(&asked("b", "a", "this", done)), Look::Found(pair("b", "a")));
        yet(judge(&status("b", "a")), "has not taken up");
        yet(judge(&asked("b", "a", "another", done)), "has not taken up");
        yet(judge(&asked("b", "a", "this", pending)), "pending (because)");
        yet(judge(&asked("a", "b", "this", done)), "still on node a");
        never(judge(&asked("b", "a", "this", refused)), "refused (because)");
        let mut alone = asked("b", "a", "this", done);
        alone.conditions[1] = condition_of(PROTECTED, "False", "Resyncing");
        yet(judge(&alone), "Protected is False (Resyncing)");
    }

    #[test]
    fn a_failure_tells_every_condition() {
        let told = story(&status("a", "b"));
        assert_eq!(told[0], "last seen: phase none, active on node a, standby on node b");
        assert_eq!(
            told[1..],
            [
                "  Ready is True (GuestRuns): why Ready",
                "  Protected is True (StandbyFollows): why Protected"
            ]
        );
    }
}
