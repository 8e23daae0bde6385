//! Whoever freezes a file system has to thaw it, whatever becomes of him: what waits for a frozen one can't be killed, and the namespaces
//! of a test that was killed would stay for ever.
//!
//! ```text
//!   test program ── starts ──► guard: outside of all namespaces, in a session of its own, nobody's child
//!        │                       ▲ a connection, and the file systems that may be frozen
//!        └─ namespaces: test ────┘ its end, for whatever reason ──► the guard thaws them
//! ```
use std::fs::{self, File};
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};

use super::disk::thaw;

/// Set for the guard's program: where it listens.
const MARK: &str = "FTVM_THAW_GUARD";
/// A program is there after this time.
const STARTS: Duration = Duration::from_secs(30);

/// Starts this test program's guard: the same program once more, which begins with its test `test` and comes here; so that has to call
/// this before it does anything else. Gives the socket where the guard listens. It ends after the program that started it.
///
/// # Errors
/// If the guard does not start.
pub fn guard(test: &str) -> anyhow::Result<PathBuf> {
    if let Some(socket) = std::env::var_os(MARK) {
        be_guard(Path::new(&socket));
    }
    let socket = std::env::temp_dir().join(format!("ftvm-thaw-{}", std::process::id()));
    let program = std::env::current_exe().context("finding this program's own file")?;
    // Whoever ends this program with all that it has started, or everything of its session, shall miss the guard.
    let mut command = Command::new("setsid");
    command.arg("--fork").arg(program);
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]);
    command.env(MARK, &socket).stdin(Stdio::piped());
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command
        .spawn()
        .context("starting `setsid` (Debian package util-linux)")?;
    // Open for as long as this program lives.
    std::mem::forget(child.stdin.take());
    let status = child.wait().context("waiting for `setsid`")?;
    ensure!(status.success(), "`setsid` ended with {status}");
    let deadline = Instant::now() + STARTS;
    while let Err(error) = UnixStream::connect(&socket) {
        ensure!(
            Instant::now() < deadline,
            "the guard does not listen at {}: {error}",
            socket.display()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(socket)
}

/// The life of the guard: until the program that started it is gone, and everybody who connected.
fn be_guard(socket: &Path) -> ! {
    // One that was left behind.
    fs::remove_file(socket).ok();
    let Ok(listener) = UnixListener::bind(socket) else {
        std::process::exit(1)
    };
    let attending = Arc::<RwLock<()>>::default();
    let (path, attended) = (socket.to_owned(), attending.clone());
    std::thread::spawn(move || end_after_starter(&path, &attended));
    loop {
        let Ok((connection, _)) = listener.accept() else {
            continue;
        };
        let attending = attending.clone();
        std::thread::spawn(move || {
            let _attending = attending.read().unwrap_or_else(PoisonError::into_inner);
            attend(&connection);
        });
    }
}

/// Standard input ends with the program that started the guard.
fn end_after_starter(socket: &Path, attending: &RwLock<()>) {
    // An error is an end, too.
    io::copy(&mut io::stdin(), &mut io::sink()).ok();
    // What was frozen by then is thawed first.
    let _nobody = attending.write().unwrap_or_else(PoisonError::into_inner);
    fs::remove_file(socket).ok();
    std::process::exit(0);
}

/// Takes file systems until the other side is gone, then thaws them.
fn attend(connection: &UnixStream) {
    let mut systems = Vec::new();
    while let Ok(Some(system)) = receive(connection) {
        systems.push(system);
        let mut answers = connection;
        if answers.write_all(&[1]).is_err() {
            break;
        }
    }
    for system in &systems {
        // Mostly it is not frozen any more.
        thaw(system).ok();
    }
}

/// The next file system; none at the end of the connection.
fn receive(connection: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut word = [0u8];
    let mut words = [IoSliceMut::new(&mut word)];
    rustix::net::recvmsg(connection, &mut words, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let rights = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(rights) => Some(rights),
        _ => None,
    });
    Ok(rights.flatten().next())
}

/// A connection to the guard. It ends with this process; so this process itself must not write to what is frozen, or it does not end.
#[derive(Debug)]
pub struct Guarded(UnixStream);

impl Guarded {
    /// Connects to the guard that listens there.
    ///
    /// # Errors
    /// If none does.
    pub fn connect(guard: &Path) -> io::Result<Self> {
        UnixStream::connect(guard).map(Self)
    }

    /// From now on the file system of `root` is thawed when this process ends.
    ///
    /// # Errors
    /// If the guard is gone.
    pub fn thaw_at_end(&self, root: &File) -> io::Result<()> {
        let fds = [root.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        rustix::net::sendmsg(&self.0, &[IoSlice::new(&[1])], &mut ancillary, SendFlags::NOSIGNAL)?;
        // It has it now.
        let mut answers = &self.0;
        answers.read_exact(&mut [0])
    }
}
