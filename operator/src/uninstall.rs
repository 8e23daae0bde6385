//! `ftvm-operator uninstall-check`, the chart's hook before `helm uninstall`: ends with an error while there are FaultTolerantVMs, so that Helm
//! deletes nothing.
//!
//! Only metadata is asked for, so that a VM that this release can't read counts, too. Without the definition there are no VMs; that it is
//! missing is asked, since a version that is not served is not found either. Whatever is not known is no permission.

use std::fmt;
use std::io::Write as _;
use std::time::Duration;

use ftvm_crds::FaultTolerantVM;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, ListParams};
use kube::core::response::reason;
use kube::core::{ObjectMeta, Status};
use kube::{Client, Config, CustomResourceExt, ResourceExt};
use tokio::time::{Instant, sleep, timeout};

/// Exit code: there are VMs (`docs/exit-codes.md`).
const REFUSED: u8 = 26;
/// Exit code: nobody knows whether there are any (`docs/exit-codes.md`).
const API_SERVER: u8 = 31;
/// VMs that one answer may have.
const PAGE: u32 = 500;
/// VMs that are named.
const NAMED_MAX: usize = 10;
/// An API server that does not answer for so long is asked again.
const ANSWER: Duration = Duration::from_secs(10);

/// How long is asked.
#[derive(Debug, Clone, Copy)]
struct Waits {
    /// No question is asked after this time. The rights of the hook were given a moment ago, and an API server may not know of them yet.
    patience: Duration,
    /// Between two questions.
    pause: Duration,
}

const WAITS: Waits = Waits {
    patience: Duration::from_secs(30),
    pause: Duration::from_secs(1),
};

/// The release of the chart, for what people are told to do.
#[derive(Debug, Clone)]
pub struct Release {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its revision when the hook was rendered.
    pub revision: u64,
}

impl Release {
    /// Helm has entered the release as `uninstalling` before it runs the hook, and upgrades none of these.
    fn kept(&self) -> String {
        let Release {
            name,
            namespace,
            revision,
        } = self;
        format!(
            "Helm calls the release uninstalling now, and upgrades it only after `helm rollback {name} {revision} --namespace {namespace}`"
        )
    }

    fn past_the_hook(&self) -> String {
        let Release { name, namespace, .. } = self;
        format!("`helm uninstall {name} --namespace {namespace} --no-hooks`")
    }
}

/// VMs that are there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    count: usize,
    /// The first ones.
    names: Vec<String>,
}

impl Found {
    fn add(&mut self, vm: &ObjectMeta) {
        self.count += 1;
        if self.names.len() < NAMED_MAX {
            let of = |text: &Option<String>| text.clone().unwrap_or_default();
            let deleted = vm.deletion_timestamp.as_ref().map_or("", |_| " (being deleted)");
            let name = format!("{}/{}{deleted}", of(&vm.namespace), of(&vm.name));
            self.names.push(name);
        }
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.count == 1 { "" } else { "s" };
        write!(f, "{} FaultTolerantVM{plural}: {}", self.count, self.names.join(", "))?;
        match self.count - self.names.len() {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// Why the release must not go.
#[derive(Debug, thiserror::Error)]
pub enum UninstallError {
    /// No configuration for the API server.
    #[error("no way to the API server ({0}): run in a pod with a service account, or set KUBECONFIG")]
    Config(#[from] kube::config::InferConfigError),
    /// The client.
    #[error("API server: {0}")]
    Client(#[from] kube::Error),
    /// The API server has not said.
    #[error(
        "not uninstalled: whether there are FaultTolerantVMs is not known {seconds} s after the first question: {why}. Mend that and uninstall again; or keep the release: {}. If you know that there are none, or leave their guests to themselves: {}",
        .release.kept(),
        .release.past_the_hook()
    )]
    Unknown {
        /// Of which release.
        release: Release,
        /// Time since the first question.
        seconds: u64,
        /// What came of the last one.
        why: String,
    },
    /// Nobody would look after them.
    #[error(
        "not uninstalled because of {found}. Without this release nobody takes over when their nodes or links are lost, and they can't be deleted. Delete them (`kubectl delete faulttolerantvms --all --all-namespaces`), which stops their guests and, unless spec.volumePolicy is Retain, deletes their disks, and uninstall once they are gone; or keep the release: {}. To leave the guests to themselves: {}",
        .release.kept(),
        .release.past_the_hook()
    )]
    Vms {
        /// Of which release.
        release: Release,
        /// Which.
        found: Found,
    },
}

impl UninstallError {
    /// What the program ends with.
    pub fn exit_code(&self) -> u8 {
        match self {
            UninstallError::Vms { .. } => REFUSED,
            UninstallError::Config(_) | UninstallError::Client(_) | UninstallError::Unknown { .. } => API_SERVER,
        }
    }
}

/// Is there no VM left?
///
/// # Errors
/// [`UninstallError`] names those that there are, or says why nobody knows.
pub async fn check(release: Release) -> Result<(), UninstallError> {
    let client = client(Config::infer().await?)?;
    judged(release, ask(&client, WAITS).await)?;
    say("there is no FaultTolerantVM: the release may go");
    Ok(())
}

/// Answers that don't tell are judged here, not repeated by the client for as long as it likes.
fn client(mut config: Config) -> kube::Result<Client> {
    config.default_retry = false;
    ftvm_watch::client(config)
}

fn judged(release: Release, answer: Result<Found, Unknown>) -> Result<(), UninstallError> {
    match answer {
        Ok(found) if found.count == 0 => Ok(()),
        Ok(found) => Err(UninstallError::Vms { release, found }),
        Err(Unknown { seconds, why }) => Err(UninstallError::Unknown { release, seconds, why }),
    }
}

/// There was no answer in time.
#[derive(Debug)]
struct Unknown {
    seconds: u64,
    why: String,
}

/// Asks until there is an answer.
async fn ask(client: &Client, waits: Waits) -> Result<Found, Unknown> {
    let begin = Instant::now();
    let mut told = String::new();
    loop {
        let why = match look(client).await {
            Ok(found) => return Ok(found),
            Err(unanswered) => unanswered.why,
        };
        if begin.elapsed() >= waits.patience {
            let seconds = begin.elapsed().as_secs();
            return Err(Unknown { seconds, why });
        }
        if told != why {
            say(&format!("asks again: {why}"));
            told = why;
        }
        sleep(waits.pause).await;
    }
}

/// All VMs of all namespaces, page by page. One page that can't be had makes the look worthless: those before it may be old by then.
async fn look(client: &Client) -> Result<Found, Unanswered> {
    let vms: Api<FaultTolerantVM> = Api::all(client.clone());
    let mut found = Found::default();
    let mut params = ListParams::default().limit(PAGE);
    loop {
        let page = match answered(vms.list_metadata(&params)).await {
            Ok(page) => page,
            Err(unanswered) => return without_definition(client, unanswered).await,
        };
        for vm in &page.items {
            found.add(&vm.metadata);
        }
        match page.metadata.continue_ {
            Some(token) if !token.is_empty() => params = params.continue_token(&token),
            _ => return Ok(found),
        }
    }
}

/// What an answer that is none means: nothing is there if the kind is not, else it says nothing.
async fn without_definition(client: &Client, unanswered: Unanswered) -> Result<Found, Unanswered> {
    if unanswered.status.as_ref().is_none_or(|status| status.code != 404) {
        return Err(unanswered);
    }
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    let name = FaultTolerantVM::crd_name();
    match answered(definitions.get_metadata(name)).await {
        Ok(definition) => Err(Unanswered {
            why: format!(
                "{}, although there is the CustomResourceDefinition {}: it does not serve {}",
                unanswered.why,
                definition.name_any(),
                ftvm_crds::names::VERSION
            ),
            ..unanswered
        }),
        // A 404 of something else on the way has no such reason.
        Err(Unanswered {
            status: Some(status), ..
        }) if status.reason == reason::NOT_FOUND => Ok(Found::default()),
        Err(other) => Err(other),
    }
}

/// Why a request has no result.
#[derive(Debug)]
struct Unanswered {
    /// What the API server said, if it was that.
    status: Option<Box<Status>>,
    /// In words.
    why: String,
}

async fn answered<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, Unanswered> {
    match timeout(ANSWER, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(kube::Error::Api(status))) => Err(Unanswered {
            why: format!("API server: {} (code {})", status.message.trim(), status.code),
            status: Some(status),
        }),
        Ok(Err(error)) => Err(Unanswered {
            status: None,
            why: format!("the API server gives no answer ({})", ftvm_watch::explain(&error)),
        }),
        Err(_) => Err(Unanswered {
            status: None,
            why: format!("the API server has not answered for {} s", ANSWER.as_secs()),
        }),
    }
}

fn say(text: &str) {
    // Nobody may be listening.
    let _ = writeln!(std::io::stdout(), "{text}");
}

#[cfg(test)]
#[path = "uninstall_tests.rs"]
mod tests;
