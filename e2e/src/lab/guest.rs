//! The Debian guest as its clients and its doctor see it: Redis, HTTP, SSH, and its disk from outside.
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use super::Sandbox;
use super::image::Image;

/// The guest's address in the client network; it is part of its image.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 79, 0, 100);
/// A MAC address for it: locally administered, the same wherever the guest runs.
pub const MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x00, 0x79, 0x64];
/// The kernel command line that it needs.
pub const CMDLINE: &str = "root=/dev/vda ro console=ttyS0 net.ifnames=0 quiet";
/// Ends the line on its console that says that all services are up.
pub const READY: &str = "guest ready, up for";

/// Makes a disk for a seat: a copy of the image's.
///
/// # Errors
/// If it cannot be copied.
pub fn make_disk(image: &Image, to: &Path) -> anyhow::Result<()> {
    copy_sparse(&image.disk, to)
}

/// Copies what is not zero.
pub(super) fn copy_sparse(from: &Path, to: &Path) -> anyhow::Result<()> {
    tool(Command::new("cp").arg("--sparse=always").arg(from).arg(to), &[0])?;
    Ok(())
}

/// Examines a disk that no guest uses: replays the file system's journal as a boot would, then everything must be in order, Redis' log too.
/// Nor may the guest have found an error itself. Works on a copy in `scratch`; the disk stays as it is. What it finds is shown by
/// `e2e/tests/emulated_examination.rs`.
///
/// # Errors
/// What is damaged, in the words of e2fsck, dumpe2fs or redis-check-aof.
pub fn examine_disk(disk: &Path, scratch: &Path) -> anyhow::Result<()> {
    let copy = copy_disk(disk, scratch)?;
    examine_copy(&copy, scratch).with_context(|| format!("{} is damaged", disk.display()))
}

/// A copy of a disk in `scratch`, in the place of the one before.
///
/// # Errors
/// If it cannot be copied.
pub fn copy_disk(disk: &Path, scratch: &Path) -> anyhow::Result<PathBuf> {
    let copy = scratch.join("examined.img");
    copy_sparse(disk, &copy)?;
    Ok(copy)
}

/// Like [`examine_disk`], for a copy that may be changed, and is removed.
///
/// # Errors
/// Those of [`examine_disk`].
pub fn examine_copy(copy: &Path, scratch: &Path) -> anyhow::Result<()> {
    let result = examine(copy, scratch);
    std::fs::remove_file(copy)?;
    result
}

fn examine(copy: &Path, scratch: &Path) -> anyhow::Result<()> {
    examine_file_system(copy)?;
    let logs = scratch.join("examined-redis");
    std::fs::create_dir(&logs)?;
    let result = examine_logs(copy, &logs);
    std::fs::remove_dir_all(&logs)?;
    result
}

fn examine_file_system(copy: &Path) -> anyhow::Result<()> {
    // 1: the journal was replayed, as after any power cut. That must be all there was to mend: the second run says so.
    tool(
        Command::new("e2fsck").args(["-p", "-E", "journal_only"]).arg(copy),
        &[0, 1],
    )?;
    tool(Command::new("e2fsck").args(["-f", "-n"]).arg(copy), &[0])?;
    // What a kernel found while the file system was in use it writes down there; to e2fsck it is no damage by itself.
    let said = tool(Command::new("dumpe2fs").arg("-h").arg(copy), &[0])?;
    let said = String::from_utf8_lossy(&said.stdout);
    let value = |key: &str| said.lines().find_map(|line| line.strip_prefix(key)).map(str::trim);
    let state = value("Filesystem state:").context("dumpe2fs tells no state")?;
    let errors = value("FS Error count:").unwrap_or("0");
    ensure!(
        !state.contains("error") && errors == "0",
        "the guest found errors in its file system: dumpe2fs calls it {state}, with {errors} errors"
    );
    Ok(())
}

fn examine_logs(copy: &Path, logs: &Path) -> anyhow::Result<()> {
    let rdump = format!("rdump /var/lib/redis/appendonlydir {}", logs.display());
    tool(Command::new("debugfs").args(["-R", &rdump]).arg(copy), &[0])?;
    let manifest = logs.join("appendonlydir/appendonly.aof.manifest");
    ensure!(manifest.exists(), "Redis left no append-only log on it");
    tool(Command::new("redis-check-aof").arg(&manifest), &[0]).map(drop)
}

/// Runs a tool that must end with one of `codes`.
fn tool(command: &mut Command, codes: &[i32]) -> anyhow::Result<Output> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {command:?}"))?;
    if !output.status.code().is_some_and(|code| codes.contains(&code)) {
        let (out, err) = (
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        bail!(
            "{command:?} ended with {}:\n{}\n{}",
            output.status,
            out.trim(),
            err.trim()
        );
    }
    Ok(output)
}

/// A Redis client on one connection; it never reconnects and never sends a command twice.
pub struct Redis {
    stream: BufReader<TcpStream>,
}

impl Redis {
    /// Connects from the lab's client network, trying again until `deadline` while the server is not up, and asks there until it has read its
    /// append-only file: the guest's console calls it started before.
    ///
    /// # Errors
    /// If it has no data to answer from until then.
    pub fn connect(sandbox: &Sandbox, deadline: Instant) -> anyhow::Result<Self> {
        let stream = connect(sandbox, 6379, deadline)?;
        let mut redis = Self {
            stream: BufReader::new(stream),
        };
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // A time-out of zero would be none.
            match redis.command(&["DBSIZE"], left.max(Duration::from_millis(1))) {
                Ok(_) => return Ok(redis),
                Err(error) if error.to_string().contains("-LOADING") && !left.is_zero() => {
                    std::thread::sleep(Duration::from_millis(100));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Increments a counter; Redis answers after the increment is on its disk.
    ///
    /// # Errors
    /// If the connection breaks, or the answer takes longer than `timeout`, or Redis refuses.
    pub fn increment(&mut self, key: &str, timeout: Duration) -> anyhow::Result<i64> {
        self.command(&["INCR", key], timeout)?
            .strip_prefix(':')
            .context("not a number")?
            .parse()
            .context("not a number")
    }

    /// Sends one command and returns the first line of the answer.
    ///
    /// # Errors
    /// If the connection breaks, or the answer takes longer than `timeout`, or Redis refuses.
    pub fn command(&mut self, words: &[&str], timeout: Duration) -> anyhow::Result<String> {
        let mut request = format!("*{}\r\n", words.len());
        for word in words {
            request += &format!("${}\r\n{word}\r\n", word.len());
        }
        self.stream.get_ref().set_read_timeout(Some(timeout))?;
        self.stream
            .get_mut()
            .write_all(request.as_bytes())
            .context("cannot send to Redis")?;
        let mut line = String::new();
        self.stream
            .read_line(&mut line)
            .with_context(|| format!("no answer from Redis to {words:?}"))?;
        ensure!(
            line.ends_with("\r\n"),
            "Redis closed the connection instead of answering {words:?}"
        );
        ensure!(!line.starts_with('-'), "Redis refuses {words:?}: {}", line.trim());
        Ok(line.trim_end().to_owned())
    }
}

/// Fetches `/count-N` from the guest's HTTP server and compares it with what `seq 1 N` says. Returns the number of bytes.
///
/// # Errors
/// If the server does not answer, or one byte differs.
pub fn download(sandbox: &Sandbox, count: u32, timeout: Duration) -> anyhow::Result<usize> {
    let mut stream = connect(sandbox, 80, Instant::now() + timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    write!(stream, "GET /count-{count} HTTP/1.0\r\nHost: guest\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).context("the HTTP answer broke off")?;
    let end = answer
        .windows(4)
        .position(|bytes| bytes == b"\r\n\r\n")
        .context("no HTTP header")?;
    let header = String::from_utf8_lossy(&answer[..end]).into_owned();
    ensure!(header.starts_with("HTTP/1.1 200"), "HTTP: {header}");
    let expected: String = (1..=count).map(|number| format!("{number}\n")).collect();
    ensure!(
        answer[end + 4..] == *expected.as_bytes(),
        "/count-{count} differs from what the guest's image holds"
    );
    Ok(expected.len())
}

/// Runs a command in the guest through its SSH server, until it ends or the connection does.
///
/// # Errors
/// If ssh cannot be started.
pub fn ssh(sandbox: &Sandbox, command: &str) -> anyhow::Result<Output> {
    let mut ssh = Command::new("ssh");
    ssh.args([
        "-F",
        "none",
        "-o",
        "StrictHostKeyChecking=no",
        "-o",
        "UserKnownHostsFile=/dev/null",
        "-o",
        "LogLevel=ERROR",
    ])
    .args([
        "-o",
        "ConnectTimeout=60",
        "-o",
        "ServerAliveInterval=10",
        "-o",
        "ServerAliveCountMax=6",
    ])
    .arg(format!("root@{ADDRESS}"))
    .arg(command)
    .stdin(Stdio::null())
    .stdout(Stdio::piped())
    .stderr(Stdio::piped());
    Ok(sandbox.spawn(ssh)?.wait_with_output()?)
}

fn connect(sandbox: &Sandbox, port: u16, deadline: Instant) -> anyhow::Result<TcpStream> {
    loop {
        match sandbox.connect(SocketAddr::from((ADDRESS, port)), Duration::from_secs(5)) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) if Instant::now() > deadline => return Err(error.context("the guest does not answer")),
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}
