//! Entering the outer namespaces: this program starts itself again as pid 1 of a new pid namespace.
use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::Context;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{HostsError, io as failed, net};
use crate::interrupt;

/// Set for the inner program; the value is of no meaning.
const MARK: &str = "FTVM_OUTER_NAMESPACES";

/// Where the caller is after [`enter`].
#[derive(Debug)]
pub enum Outer {
    /// Inside: go on.
    Inside,
    /// The inner program has run and ended like this; nothing of it is left.
    Ended(ExitStatus),
}

impl Outer {
    /// What the outer program ends with: as the inner one did.
    pub fn exit_code(&self) -> ExitCode {
        let code = match self {
            Outer::Ended(status) => status.code(),
            Outer::Inside => None,
        };
        let code = code.and_then(|code| u8::try_from(code).ok());
        code.map_or(ExitCode::FAILURE, ExitCode::from)
    }
}

/// True in the inner program.
pub fn inside() -> bool {
    std::env::var_os(MARK).is_some() && std::process::id() == 1
}

/// What has to be made before the outer namespaces are entered, because there is no network in them: made outside, by the first of
/// a process's tests that asks, and written to `file`; read from there inside.
///
/// # Errors
/// Those of `make`; if the file can't be written, or was not.
pub fn made_outside<T: Serialize + DeserializeOwned>(
    file: &Path,
    make: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    static MADE: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
    if !inside() {
        let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
        if !made.contains(file) {
            let text = serde_json::to_string(&make()?)?;
            fs::write(file, text).with_context(|| format!("writing {}", file.display()))?;
            made.insert(file.to_owned());
        }
    }
    let text = fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    serde_json::from_str(&text).with_context(|| format!("in {}", file.display()))
}

/// Inside already: says so. Otherwise runs this executable with `arguments` inside new outer namespaces until it ends.
///
/// The inner program dies with the calling thread, whatever happens to that.
pub fn enter<S: AsRef<OsStr>>(arguments: &[S]) -> Result<Outer, HostsError> {
    enter_with(arguments, &[])
}

/// Like [`enter`], with words for the inner program's environment.
pub fn enter_with<S: AsRef<OsStr>>(arguments: &[S], environment: &[(&str, String)]) -> Result<Outer, HostsError> {
    if inside() {
        end_on_signals()?;
        net::ip("link set lo up\n")?;
        return Ok(Outer::Inside);
    }
    let program = std::env::current_exe().map_err(failed("finding this program's own file"))?;
    let mut command = Command::new("unshare");
    command
        .args(unshare_options())
        .arg("--")
        .arg(program)
        .args(arguments)
        .env(MARK, "1")
        .envs(environment.iter().map(|(name, value)| (name, value)));
    // SAFETY: one system call between fork and exec; the setting survives exec.
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        });
    }
    let starting = "starting `unshare` (Debian package util-linux)";
    let mut child = command.spawn().map_err(failed(starting))?;
    let _guard = InterruptsEndTheInner::new(child.id())?;
    child
        .wait()
        .map(Outer::Ended)
        .map_err(failed("waiting for the inner program"))
}

/// Runs a test's `body` in outer namespaces of its own: the test binary starts itself again with this one test.
///
/// # Panics
/// If the namespaces can't be made or the inner run of the test failed.
pub fn test_inside(test: &str, body: impl FnOnce()) {
    let arguments = ["--exact", test, "--nocapture", "--test-threads=1"];
    match enter(&arguments).unwrap_or_else(|error| panic!("{test}: {error}: {:?}", std::error::Error::source(&error))) {
        Outer::Inside => body(),
        // Whoever interrupts a test does not want the next one.
        Outer::Ended(_) if INTERRUPTED.load(Ordering::SeqCst) => std::process::exit(128 + libc::SIGINT),
        Outer::Ended(status) => assert!(
            status.success(),
            "{test} failed inside its namespaces ({status}), see above"
        ),
    }
}

fn unshare_options() -> Vec<OsString> {
    let mut options = vec![
        "--net",
        "--mount",
        "--pid",
        "--ipc",
        "--uts",
        "--fork",
        "--mount-proc",
        "--kill-child=SIGKILL",
    ];
    // SAFETY: geteuid has no preconditions.
    let uid = unsafe { libc::geteuid() };
    if uid != 0 {
        options.extend(["--user", "--map-root-user"]);
        if has_subordinate_ids(uid) {
            options.push("--map-auto");
        }
    }
    options.into_iter().map(OsString::from).collect()
}

/// Whether more than one uid can be mapped, so that an engine can get a uid of its own.
fn has_subordinate_ids(uid: u32) -> bool {
    let user = fs::read_to_string("/etc/passwd").ok().and_then(|text| {
        text.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            (fields.nth(1)? == uid.to_string()).then(|| name.to_owned())
        })
    });
    let named = |file: &str| {
        fs::read_to_string(file).is_ok_and(|text| {
            text.lines().any(|line| {
                let owner = line.split(':').next();
                owner == user.as_deref() || owner == Some(uid.to_string().as_str())
            })
        })
    };
    let tool = |name: &str| {
        std::env::var_os("PATH")
            .is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join(name).exists()))
    };
    named("/etc/subuid") && named("/etc/subgid") && tool("newuidmap") && tool("newgidmap")
}

/// Pid 1 is not killed by signals without a handler: end on those by which people end programs. The kernel kills the rest.
fn end_on_signals() -> Result<(), HostsError> {
    extern "C" fn end(signal: libc::c_int) {
        // SAFETY: _exit is async-signal-safe.
        unsafe { libc::_exit(128 + signal) }
    }
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT] {
        interrupt::set_handler(signal, end).map_err(failed("installing a signal handler"))?;
    }
    Ok(())
}

/// The `unshare` above the inner program, and whether it was interrupted.
static INNER: AtomicI32 = AtomicI32::new(0);
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// While the inner program runs, ctrl-C ends it, and this program goes on to tidy up and report.
struct InterruptsEndTheInner {
    former: libc::sigaction,
}

impl InterruptsEndTheInner {
    fn new(unshare: u32) -> Result<Self, HostsError> {
        extern "C" fn end(signal: libc::c_int) {
            INTERRUPTED.store(true, Ordering::SeqCst);
            // SAFETY: both calls are async-signal-safe. Our own child; the kernel kills the inner program with it. Several inner
            // programs at a time are those of tests: the others die with this process.
            unsafe {
                match INNER.load(Ordering::SeqCst) {
                    0 => libc::_exit(128 + signal),
                    inner => libc::kill(inner, libc::SIGKILL),
                };
            }
        }
        INNER.store(unshare as i32, Ordering::SeqCst);
        let former = interrupt::set_handler(libc::SIGINT, end).map_err(failed("installing a signal handler"))?;
        Ok(Self { former })
    }
}

impl Drop for InterruptsEndTheInner {
    fn drop(&mut self) {
        interrupt::replace_action(libc::SIGINT, &self.former).ok();
        INNER.store(0, Ordering::SeqCst);
    }
}
