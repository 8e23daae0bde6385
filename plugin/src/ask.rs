//! Commands that ask a VM for something, by the fields and annotations that `docs/kubernetes.md` has for people, and wait until it is done.

use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use ftvm_crds::names::{ANNOTATION_ACCEPT_DATA_LOSS, ANNOTATION_SWITCHOVER};
use ftvm_crds::{FaultTolerantVM, RunStrategy};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::arguments::{AcceptDataLoss, Ask};
use crate::cluster::Cluster;
use crate::failure::Failure;
use crate::loss::{self, Plan};
use crate::pace::Pace;
use crate::verdict::{Asked, Verdict};
use crate::{print_line, say};

/// Between two looks.
const PAUSE: Duration = Duration::from_secs(1);

/// Hands the guest over.
pub async fn switchover(ask: &Ask) -> Result<(), Failure> {
    let (cluster, vm) = asked(ask).await?;
    if vm.spec.run_strategy == RunStrategy::Halted {
        let why = "the VM is halted: there is no guest to hand over";
        return Err(refused("switchover", why));
    }
    let request = unique();
    let asked = Asked::Switchover {
        request: request.clone(),
        before: vm.status.as_ref().and_then(|status| status.active.clone()),
    };
    let change = annotation(ANNOTATION_SWITCHOVER, &request);
    let changed = cluster.change(&vm, change).await?;
    wait(&cluster, ask, &changed, &asked).await
}

/// Starts a VM, or stops it.
pub async fn run(ask: &Ask, strategy: RunStrategy) -> Result<(), Failure> {
    let (cluster, vm) = asked(ask).await?;
    let changed = cluster
        .change(&vm, json!({ "spec": { "runStrategy": strategy } }))
        .await?;
    // The API server gives each object one.
    let generation = changed.metadata.generation.unwrap_or_default();
    let asked = match strategy {
        RunStrategy::Always => Asked::Start { generation },
        RunStrategy::Halted => Asked::Stop { generation },
    };
    wait(&cluster, ask, &changed, &asked).await
}

/// Says what may be lost, has it confirmed, and accepts it.
pub async fn accept_data_loss(arguments: &AcceptDataLoss) -> Result<(), Failure> {
    const WHAT: &str = "accept-data-loss";
    let ask = &arguments.ask;
    let (cluster, vm) = asked(ask).await?;
    let lease = cluster.lease(&ask.name).await?;
    let said = cluster.said(&ask.name).await;
    let plan = loss::plan(&vm, lease.as_ref(), &said).map_err(|why| refused(WHAT, &why))?;
    for line in &plan.lines {
        say(line);
    }
    confirm(arguments).map_err(|error| match error {
        Unconfirmed::Not(why) => refused(WHAT, &format!("{why}: nothing was asked for")),
        Unconfirmed::Failed(failure) => failure,
    })?;
    let Plan { of, term, .. } = plan;
    let annotation_text = format!("{of} {}", unique());
    let change = annotation(ANNOTATION_ACCEPT_DATA_LOSS, &annotation_text);
    let changed = cluster.change(&vm, change).await?;
    let asked = Asked::AcceptDataLoss {
        annotation: annotation_text,
        term,
    };
    wait(&cluster, ask, &changed, &asked).await
}

async fn asked(ask: &Ask) -> Result<(Cluster, Box<FaultTolerantVM>), Failure> {
    let cluster = Cluster::connect(&ask.place).await?;
    let vm = cluster.vm(&ask.name).await?;
    if vm.metadata.deletion_timestamp.is_some() {
        return Err(refused("nothing is asked for", "the VM is being deleted"));
    }
    Ok((cluster, vm))
}

fn refused(what: &str, why: &str) -> Failure {
    Failure::Refused {
        what: what.to_owned(),
        why: why.to_owned(),
    }
}

fn annotation(name: &str, text: &str) -> Value {
    json!({ "metadata": { "annotations": { name: text } } })
}

/// A text that nobody used before, and that says who asks since when.
fn unique() -> String {
    format!("kubectl-ftvm-{}", Timestamp::now())
}

/// Why a loss was not accepted.
enum Unconfirmed {
    /// Nobody said so.
    Not(String),
    /// Nobody could be asked.
    Failed(Failure),
}

/// Has somebody type the VM's name.
fn confirm(arguments: &AcceptDataLoss) -> Result<(), Unconfirmed> {
    let name = &arguments.ask.name;
    if let Some(said) = &arguments.yes_i_lose_data {
        return judge_name(said, name, "--yes-i-lose-data");
    }
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        let why = format!("nobody can be asked, for standard input is no terminal; --yes-i-lose-data {name} says it");
        return Err(Unconfirmed::Not(why));
    }
    let failed = |source| {
        let what = "standard input".to_owned();
        Unconfirmed::Failed(Failure::Io { what, source })
    };
    let mut stderr = std::io::stderr();
    let asked = write!(stderr, "To accept that, type the name of the VM: ").and_then(|()| stderr.flush());
    asked.map_err(failed)?;
    let mut said = String::new();
    stdin.lock().read_line(&mut said).map_err(failed)?;
    judge_name(said.trim(), name, "what was typed")
}

fn judge_name(said: &str, name: &str, by: &str) -> Result<(), Unconfirmed> {
    if said == name {
        return Ok(());
    }
    Err(Unconfirmed::Not(format!("{by} is `{said}`, and the VM is `{name}`")))
}

/// Until it is done, won't be, or takes too long.
async fn wait(cluster: &Cluster, ask: &Ask, vm: &FaultTolerantVM, asked: &Asked) -> Result<(), Failure> {
    let (what, name, patience) = (asked.what(), &ask.name, &ask.patience);
    if !patience.wait {
        return print_line(&format!("{what} of {name}: asked for"));
    }
    let most = patience.timeout_seconds;
    let begin = Instant::now();
    let mut pace = Pace::default();
    tell(
        &mut pace,
        &format!("{what} of {name}: asked for; waits for it, {most} s at most"),
    );
    loop {
        let why = match cluster.look(name).await {
            Ok(Some(seen)) if seen.uid() == vm.uid() => match asked.judge(&*cluster.readable(name, seen)?) {
                Verdict::Done(text) => return print_line(&format!("{what} of {name}: {text}")),
                Verdict::Never(why) => return Err(refused(what, &why)),
                Verdict::Yet(why) => why,
            },
            Ok(_) => {
                return Err(Failure::Gone {
                    namespace: cluster.namespace.clone(),
                    name: name.clone(),
                });
            }
            Err(failure) if failure.may_pass() => failure.to_string(),
            Err(failure) => return Err(failure),
        };
        tell(&mut pace, &why);
        let seconds = begin.elapsed().as_secs();
        if seconds >= most {
            return Err(Failure::Late {
                what: what.to_owned(),
                name: name.clone(),
                namespace: cluster.namespace.clone(),
                seconds,
                why,
            });
        }
        sleep(PAUSE).await;
    }
}

fn tell(pace: &mut Pace, line: &str) {
    if pace.is_news(line, Instant::now()) {
        say(line);
    }
}
