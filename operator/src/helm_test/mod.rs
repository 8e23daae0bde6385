//! `ftvm-operator helm-test`, the chart's `helm test`: makes a VM, has its active killed, hands it over as planned, and judges it by its
//! status.
//!
//! ```text
//!   create ─► Protected ─► annotation ftvm.dev/failover ─► done, taken over elsewhere, Protected
//!      │          │                                                  └─► annotation ftvm.dev/switchover ─► done, active elsewhere, Protected ─► deleted
//!      └──────────┴─────────────── refused, too late, SIGTERM ──────────────────────────────┴─────────────────────────────────────────────────► deleted, exit code 1
//! ```
//! The pod has rights to this one VM (`docs/kubernetes.md`). What another test left behind is deleted first; what nobody's test made is not touched.

mod error;
mod judge;
mod vm;

use std::io::Write as _;
use std::time::Duration;

use ftvm_crds::names::{ANNOTATION_FAILOVER, ANNOTATION_SWITCHOVER};
use ftvm_crds::{FaultTolerantVM, FaultTolerantVMStatus, PullPolicy};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::core::Status;
use kube::{Config, ResourceExt};
use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, sleep, timeout};

use crate::random;
use error::refused;
pub use error::{HelmTestError, Step};
use judge::{Asked, Look, failed_over, protected, story, switched_over};

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

/// Makes the VM, fails it over, deletes it. Progress is on standard output.
///
/// # Errors
/// [`HelmTestError`] says what did not hold, and why.
pub async fn run(options: Options) -> Result<(), HelmTestError> {
    let end = signal(SignalKind::terminate()).map_err(HelmTestError::Signals)?;
    let interrupt = signal(SignalKind::interrupt()).map_err(HelmTestError::Signals)?;
    let client = ftvm_watch::client(Config::infer().await?)?;
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
    /// Tells this run's VM from other runs', and what it asks for, too.
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
        let request = self.run.clone();
        let asked = |what, before| Asked {
            what,
            request: &request,
            before,
        };
        self.ask(Step::Failover, ANNOTATION_FAILOVER).await?;
        let failover = asked("failover", &before);
        let (after, gap_us) = self
            .reach(Step::Failover, |status| failed_over(status, &failover))
            .await?;
        self.say(&format!(
            "failed over and protected again: {after}; no seat ran the guest for {:.1} ms",
            gap_us as f64 / 1000.0
        ));
        self.ask(Step::Switchover, ANNOTATION_SWITCHOVER).await?;
        let switchover = asked("switchover", &after);
        let back = self
            .reach(Step::Switchover, |status| switched_over(status, &switchover))
            .await?;
        self.say(&format!("switched over and protected again: {back}"));
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
                    let object = vm::vm(&self.options, &self.run);
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

    /// Asks for a failover or a switchover.
    async fn ask(&mut self, step: Step, annotation: &str) -> Result<(), HelmTestError> {
        self.say(&format!("asks for it: {annotation}={}", self.run));
        loop {
            // With the UID it is this object or none.
            let metadata = json!({ "uid": self.uid, "annotations": { annotation: self.run } });
            let patch = Patch::Merge(json!({ "metadata": metadata }));
            let params = PatchParams {
                field_manager: Some(MANAGER.to_owned()),
                ..PatchParams::default()
            };
            match answered(self.vms.patch(NAME, &params, &patch)).await {
                Ok(_) => return Ok(()),
                Err(Unanswered::Refused(status)) => return Err(refused(step, &status)),
                Err(Unanswered::Later(why)) => self.wait(step, why).await?,
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
