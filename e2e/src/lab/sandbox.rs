//! Namespaces for a lab: its own network, mounts and process ids, which all end with it.
//!
//! One thread of this process, the launcher, lives in new network and mount namespaces and starts every child in a new process-id namespace.
//! The first child there waits for its standard input to end. So whatever becomes of this process (a panic, Ctrl-C, SIGKILL), the pipe closes,
//! that first child exits, and the kernel kills everything else that was started and takes bridges, taps and mounts back.
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

type Job = Box<dyn FnOnce() + Send>;

/// The namespaces of one lab; dropping it kills whatever runs in them.
pub struct Sandbox {
    jobs: Option<mpsc::Sender<Job>>,
    launcher: Option<thread::JoinHandle<Option<Child>>>,
    network: File,
}

impl Sandbox {
    /// Makes the namespaces, with the loopback device up.
    ///
    /// # Errors
    /// Without the right to make namespaces (root, or root of a user namespace).
    pub fn new() -> anyhow::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let (report, result) = mpsc::channel();
        let launcher = thread::Builder::new()
            .name("lab-launcher".into())
            .spawn(move || launch(&queue, &report))?;
        let network = result.recv().context("the launcher thread of a lab ended early")??;
        Ok(Self {
            jobs: Some(jobs),
            launcher: Some(launcher),
            network,
        })
    }

    /// Starts a program in the lab. Killing and waiting for it go through the `Child` as usual.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn(&self, mut command: Command) -> anyhow::Result<Child> {
        let name = format!("{:?}", command.get_program());
        // Its own process group: a Ctrl-C at the terminal is for the program that owns the lab.
        command.process_group(0);
        self.launch(move || command.spawn())?
            .with_context(|| format!("cannot start {name} in the lab"))
    }

    /// Runs a program in the lab to its end.
    ///
    /// # Errors
    /// If it cannot be started or fails; then its standard error is part of the message.
    pub fn run(&self, program: &str, arguments: &[&str]) -> anyhow::Result<Output> {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let output = self.spawn(command)?.wait_with_output()?;
        ensure!(
            output.status.success(),
            "{program} {}: {}: {}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(output)
    }

    /// Runs `work` on a thread of its own inside the lab's network: sockets that it makes belong there for good.
    ///
    /// # Errors
    /// If the thread cannot be made or cannot enter the network.
    pub fn in_network<T: Send>(&self, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        thread::scope(|scope| {
            let worker = thread::Builder::new()
                .name("lab-network".into())
                .spawn_scoped(scope, || {
                    rustix::thread::move_into_link_name_space(self.network.as_fd(), Some(LinkNameSpaceType::Network))?;
                    Ok::<T, io::Error>(work())
                })?;
            match worker.join() {
                Ok(result) => result.context("cannot enter the lab's network"),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// A TCP connection made from inside the lab's network.
    ///
    /// # Errors
    /// Those of connecting.
    pub fn connect(&self, to: SocketAddr, timeout: Duration) -> anyhow::Result<TcpStream> {
        self.in_network(|| TcpStream::connect_timeout(&to, timeout))?
            .with_context(|| format!("cannot reach {to}"))
    }

    /// The network namespace, to enter it by other means.
    #[must_use]
    pub fn network(&self) -> &File {
        &self.network
    }

    /// Runs `work` on the launcher thread: what it clones is below the lab's process ids.
    pub(crate) fn launch<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> anyhow::Result<T> {
        let (report, result) = mpsc::channel();
        let job: Job = Box::new(move || {
            // Nobody waits any more only if the caller panicked.
            let _ = report.send(work());
        });
        self.jobs
            .as_ref()
            .and_then(|jobs| jobs.send(job).ok())
            .context("the lab is being taken down")?;
        result.recv().context("the lab's launcher thread ended")
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(Ok(Some(mut anchor))) = self.launcher.take().map(thread::JoinHandle::join) {
            // It can be waited for only after all others were, which is up to those who hold their `Child`: so not here.
            thread::spawn(move || anchor.wait());
        }
    }
}

/// The launcher thread: makes the namespaces, reports the network's, then starts what it is asked to. Returns the killed first process.
fn launch(queue: &mpsc::Receiver<Job>, report: &mpsc::Sender<anyhow::Result<File>>) -> Option<Child> {
    let mut anchor = match make_namespaces() {
        Ok((anchor, network)) => {
            // The receiver waits for this message and for nothing else.
            let _ = report.send(Ok(network));
            anchor
        }
        Err(error) => {
            let _ = report.send(Err(error));
            return None;
        }
    };
    for job in queue {
        job();
    }
    // Process 1 of the namespace dies, and with it, by the kernel's hand, all others.
    if let Err(error) = anchor.kill() {
        eprintln!("lab: cannot end the lab's first process: {error}");
    }
    Some(anchor)
}

fn make_namespaces() -> anyhow::Result<(Child, File)> {
    let flags = UnshareFlags::FS | UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWPID;
    // SAFETY: none of these flags unshares the file-descriptor table, and no memory is affected: other threads keep their namespaces, this
    // thread works with absolute paths only.
    unsafe { rustix::thread::unshare_unsafe(flags) }
        .map_err(io::Error::from)
        .context("cannot make namespaces for a lab: run it as root, or under `unshare --user --map-root-user`")?;
    let network = File::open("/proc/thread-self/ns/net").context("cannot open the lab's network namespace")?;
    let script = "mount --make-rprivate / && mount -t proc proc /proc && ip link set lo up && echo ready && exec cat";
    let mut anchor = Command::new("sh")
        .args(["-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn()
        .context("cannot start the first process of a lab")?;
    let mut answer = String::new();
    if let Some(stdout) = anchor.stdout.take() {
        BufReader::new(stdout).read_line(&mut answer)?;
    }
    if answer.trim() != "ready" {
        anchor.kill()?;
        bail!(
            "the first process of a lab failed ({}); is iproute2 installed?",
            anchor.wait()?
        );
    }
    Ok((anchor, network))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpListener;

    #[test]
    fn a_sandbox_has_its_own_network_and_takes_its_processes_along() {
        let sandbox = Sandbox::new().unwrap();
        let listener = sandbox
            .in_network(|| TcpListener::bind("127.0.0.1:0").unwrap())
            .unwrap();
        let address = listener.local_addr().unwrap();
        assert!(
            TcpStream::connect(address).is_err(),
            "the lab's loopback must not be ours"
        );
        let mut client = sandbox.connect(address, Duration::from_secs(5)).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        client.write_all(b"x").unwrap();
        server.read_exact(&mut [0]).unwrap();

        let mut sleeper = Command::new("sh");
        sleeper
            .args(["-c", "sleep 600 & echo started; wait"])
            .stdout(Stdio::piped());
        let mut sleeper = sandbox.spawn(sleeper).unwrap();
        let mut line = String::new();
        let mut stdout = BufReader::new(sleeper.stdout.take().unwrap());
        stdout.read_line(&mut line).unwrap();
        drop(sandbox);
        // The grandchild held the pipe too: its end says that both are gone.
        line.clear();
        assert_eq!(stdout.read_line(&mut line).unwrap(), 0);
        assert!(!sleeper.wait().unwrap().success());
    }

    #[test]
    fn a_failing_program_says_why() {
        let sandbox = Sandbox::new().unwrap();
        let error = sandbox
            .run("ip", &["link", "set", "nowhere0", "up"])
            .unwrap_err()
            .to_string();
        assert!(error.contains("nowhere0"), "{error}");
    }
}
