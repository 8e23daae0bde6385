//! Why the test has not passed.

use std::fmt;

use ftvm_crds::names::FINALIZER;
use kube::core::Status;

use super::{LABEL_RUN, NAME, REMOVAL};

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
    /// The active was killed, the other one runs the guest, and the VM is protected again.
    Failover,
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
            Step::Failover => "waiting for the failover",
            Step::Switchover => "waiting for the planned switchover",
            Step::Deletion => "deleting the VM",
        })
    }
}

/// The API server won't do it.
pub(super) fn refused(step: Step, status: &Status) -> HelmTestError {
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
