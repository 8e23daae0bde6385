//! `cargo xtask cluster`: a cluster that stays up. One background process, the *holder*, keeps it until it is told to take it down.
//!
//! ```text
//!   up ── starts ──► holder (own session) ── keeps ──► Cluster
//!    ◄── one JSON line per news ──┘  ▲
//!   status, down, kubectl ───────────┘ its socket: one word in, one JSON line out
//! ```
//! In the cache, `clusters/NAME` has `lock` (held by the holder as long as it lives), `socket` and `holder.log`.
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use rustix::fs::FlockOperation;
use rustix::thread::LinkNameSpaceType;
use serde::{Deserialize, Serialize};

use super::install::Images;
use super::{Cluster, Options, Say, log_end, plan, wait_for};
use crate::demo::Guest;
use crate::interrupt;
use crate::lab::binaries::Profile;
use crate::lab::{Network, cache, sweep};

/// Long enough for a busy machine; nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(300);
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// What there is to know of a cluster that is up.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// Process id of the holder: the cluster ends with it.
    pub holder_pid: u32,
    /// The network namespace of its control plane and bridges, as a file to enter it.
    pub network: PathBuf,
    /// Its folder: logs, kubeconfigs, the nodes' disks.
    pub folder: PathBuf,
    /// The administrator's kubeconfig; its server is reached inside that network.
    pub kubeconfig: PathBuf,
    /// The folder with kubectl and the other programs.
    pub programs: PathBuf,
    /// The API server.
    pub server: String,
    /// Its nodes.
    pub nodes: Vec<NodeStatus>,
}

/// A node of a [`Status`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its name.
    pub name: String,
    /// Its address.
    pub address: String,
    /// Its zone.
    pub zone: String,
    /// Whether it is switched on.
    pub running: bool,
    /// Whether the API server takes it for ready.
    pub ready: bool,
}

/// What the holder tells whoever started it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum News {
    Say(String),
    Ready(Status),
    Failed(String),
}

/// Starts a holder with `command` (this program with arguments that lead to [`hold`]) and waits until its cluster is ready. Returns its
/// status, and whether it was up already.
///
/// # Errors
/// If the cluster does not start; then nothing of it is left.
pub fn up(name: &str, mut command: Command, say: &Say) -> anyhow::Result<(Status, bool)> {
    if let Some(status) = status(name)? {
        return Ok((status, true));
    }
    let log = place(name)?.join("holder.log");
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::create(&log)?);
    // SAFETY: one system call between fork and exec. The holder is to outlive this program's session.
    unsafe {
        command.pre_exec(|| match libc::setsid() {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    // Interrupted while it starts, this program kills the holder; what that leaves behind is ours to remove.
    interrupt::at_end(|| {
        if let Err(error) = sweep() {
            eprintln!("cluster: {error:#}");
        }
    });
    let mut holder = command.spawn().context("cannot start the holder of the cluster")?;
    let news = holder.stdout.take().context("the holder has no standard output")?;
    for line in BufReader::new(news).lines() {
        match serde_json::from_str(&line?).context("the holder says what it should not")? {
            News::Say(text) => say(&text),
            News::Ready(status) => return Ok((status, false)),
            News::Failed(why) => {
                holder.wait()?;
                bail!("{why}");
            }
        }
    }
    let end = holder.wait()?;
    bail!("the holder of the cluster ended ({end}): {}", log_end(&log))
}

/// The holder's life: starts the cluster, installs the chart with programs of this profile if there is one, says so on standard output,
/// and keeps it until it is told to take it down.
///
/// # Errors
/// If another holder has this name, or the cluster does not start; both are told on standard output, too.
pub fn hold(name: &str, mut options: Options, chart: Option<Profile>) -> anyhow::Result<()> {
    options.say = Arc::new(|text| tell(&News::Say(text.to_owned())));
    let result = hold_inner(name, options, chart);
    if let Err(error) = &result {
        tell(&News::Failed(format!("{error:#}")));
    }
    result
}

fn hold_inner(name: &str, mut options: Options, chart: Option<Profile>) -> anyhow::Result<()> {
    let place = place(name)?;
    let lock = File::create(place.join("lock"))?;
    // Who asks for the status holds the lock for a moment.
    wait_for(&format!("no other cluster {name:?} is up"), LOCK_PATIENCE, || {
        Ok(rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)?)
    })?;
    let socket = place.join("socket");
    if socket.exists() {
        fs::remove_file(&socket)?;
    }
    let say = Arc::clone(&options.say);
    let archives = place.join("images");
    let images = chart.map(|profile| {
        say("building the project's image (the first time takes many minutes)");
        let guest = match options.emulated {
            0 => Guest::Embedded,
            _ => Guest::Linux,
        };
        fs::create_dir_all(&archives)?;
        Images::make(&archives, profile, guest)
    });
    let images = images.transpose()?;
    options.images = images.as_ref().map(Images::archives).unwrap_or_default();
    let cluster = Cluster::start(options)?;
    if let Some(images) = images {
        say("installing the chart");
        cluster.install(&images)?;
        fs::remove_dir_all(&archives)?;
    }
    let listener = UnixListener::bind(&socket).with_context(|| format!("cannot listen on {}", socket.display()))?;
    tell(&News::Ready(describe(name, &cluster)));
    let mut requester = serve(name, &cluster, &listener)?;
    drop(cluster);
    fs::remove_file(&socket)?;
    drop(lock);
    // Whoever asked is told when all is gone.
    requester
        .write_all(b"null\n")
        .context("nobody waits for the end any more")
}

/// Answers requests until one says `down`, and returns its connection.
fn serve(name: &str, cluster: &Cluster, listener: &UnixListener) -> anyhow::Result<UnixStream> {
    loop {
        let (mut connection, _) = listener.accept()?;
        connection.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut word = String::new();
        // Who says nothing, or goes away, is no reason to end.
        if BufReader::new(&connection).read_line(&mut word).is_err() {
            continue;
        }
        match word.trim() {
            "down" => return Ok(connection),
            "status" => {
                let _ = writeln!(connection, "{}", serde_json::to_string(&describe(name, cluster))?);
            }
            other => eprintln!("holder: {other:?} is no request"),
        }
    }
}

/// The status of a cluster; none if it is not up.
///
/// # Errors
/// If it starts or ends just now, or its holder does not answer.
pub fn status(name: &str) -> anyhow::Result<Option<Status>> {
    let place = place(name)?;
    if is_free(&place)? {
        return Ok(None);
    }
    let answer = ask(&place, "status").with_context(|| {
        format!(
            "the cluster {name:?} does not answer: it starts or ends just now, or its holder hangs (see {})",
            place.join("holder.log").display()
        )
    })?;
    Ok(Some(serde_json::from_str(&answer).context("the holder's status")?))
}

/// Takes a cluster down and returns when nothing of it is left; also removes what a killed holder left behind. Returns whether it was up.
///
/// # Errors
/// If its holder does not answer.
pub fn down(name: &str) -> anyhow::Result<bool> {
    let place = place(name)?;
    let was_up = !is_free(&place)?;
    if was_up {
        ask(&place, "down").with_context(|| {
            format!(
                "the cluster {name:?} cannot be taken down: its holder does not answer (see {})",
                place.join("holder.log").display()
            )
        })?;
    }
    sweep()?;
    fs::remove_dir_all(&place)?;
    Ok(was_up)
}

/// Runs kubectl as the administrator of a cluster that is up, with this program's input and output.
///
/// # Errors
/// If it is not up, or kubectl cannot be started.
pub fn kubectl(name: &str, arguments: &[String]) -> anyhow::Result<ExitStatus> {
    let status =
        status(name)?.with_context(|| format!("no cluster {name:?} is up: start one with `cargo xtask cluster up`"))?;
    let network = File::open(&status.network).context("cannot open the cluster's network namespace: it takes root")?;
    rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&network), Some(LinkNameSpaceType::Network))
        .map_err(io::Error::from)
        .context("cannot enter the cluster's network namespace: it takes root")?;
    super::kubectl_command(&status.programs, &status.folder, &status.kubeconfig)
        .args(arguments)
        .status()
        .context("cannot start kubectl")
}

fn describe(name: &str, cluster: &Cluster) -> Status {
    let nodes = cluster.nodes().iter().map(|node| NodeStatus {
        name: node.name(),
        address: node.plan().address(Network::Management).to_string(),
        zone: node.plan().zone(),
        running: node.is_running(),
        ready: cluster
            .node_condition(&node.name())
            .is_ok_and(|(status, _)| status == "True"),
    });
    let pid = std::process::id();
    Status {
        name: name.to_owned(),
        holder_pid: pid,
        network: format!("/proc/{pid}/fd/{}", cluster.sandbox().network().as_raw_fd()).into(),
        folder: cluster.folder().to_owned(),
        kubeconfig: cluster.admin_kubeconfig(),
        programs: cluster.programs().to_owned(),
        server: plan::api_url(plan::api_address()),
        nodes: nodes.collect(),
    }
}

fn tell(news: &News) {
    let mut out = io::stdout().lock();
    // Who started us may be gone; the cluster stays.
    if let Ok(text) = serde_json::to_string(news) {
        let _ = writeln!(out, "{text}").and_then(|()| out.flush());
    }
}

/// Whether no holder lives.
fn is_free(place: &Path) -> anyhow::Result<bool> {
    let lock = File::create(place.join("lock"))?;
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(io::Error::from(error).into()),
    }
}

/// Says a word to the holder and returns its answer.
fn ask(place: &Path, word: &str) -> anyhow::Result<String> {
    let mut connection = UnixStream::connect(place.join("socket"))?;
    connection.set_read_timeout(Some(PATIENCE))?;
    writeln!(connection, "{word}")?;
    let mut answer = String::new();
    BufReader::new(connection).read_line(&mut answer)?;
    ensure!(!answer.is_empty(), "it ended without an answer");
    Ok(answer)
}

fn place(name: &str) -> anyhow::Result<PathBuf> {
    let good = !name.is_empty()
        && name.len() < 32
        && name
            .chars()
            .all(|letter| letter.is_ascii_alphanumeric() || letter == '-');
    ensure!(
        good,
        "{name:?} is no name of a cluster: letters, digits and `-`, at most 31"
    );
    let place = cache::folder()?.join("clusters").join(name);
    fs::create_dir_all(&place).with_context(|| format!("cannot make {}", place.display()))?;
    Ok(place)
}
