//! Ctrl-C ends everything: what a program started, what that started, and then the program.
//!
//! Without this, a signal that reaches the program alone (as from a supervisor or a script) would leave its children behind.
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Signals by which people and supervisors end programs.
const SIGNALS: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];
/// Killed processes are gone after this, unless the kernel is in trouble.
const DEATH: Duration = Duration::from_secs(10);

/// Where the handler writes the signal's number.
static WRITER: AtomicI32 = AtomicI32::new(-1);
static ENDING: AtomicBool = AtomicBool::new(false);
/// What is to be done once everything that was started is dead.
static LAST_WORK: Mutex<Vec<Box<dyn FnOnce() + Send>>> = Mutex::new(Vec::new());

/// From now on a signal kills every process below this one, and then ends this one with 128 and the signal's number.
///
/// # Errors
/// If the system refuses a pipe, a thread or a handler.
pub fn end_everything_on_signals() -> io::Result<()> {
    let mut pipe = [0; 2];
    // SAFETY: an array for the two descriptors.
    if unsafe { libc::pipe2(pipe.as_mut_ptr(), libc::O_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let [reader, writer] = pipe;
    WRITER.store(writer, Ordering::SeqCst);
    std::thread::Builder::new()
        .name("interrupt".to_owned())
        .spawn(move || end_everything(wait_for_signal(reader)))?;
    SIGNALS
        .into_iter()
        .try_for_each(|signal| set_handler(signal, report).map(drop))
}

/// If a signal ends everything, `work` is done last: for what the kernel does not take back.
pub fn at_end(work: impl FnOnce() + Send + 'static) {
    LAST_WORK
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(Box::new(work));
}

/// Stays here for good once everything ends: what would be started now would outlive that.
pub fn hold_if_ending() {
    while ENDING.load(Ordering::SeqCst) {
        std::thread::park();
    }
}

/// A signal handler; it may only do what is async-signal-safe.
pub(crate) type Handler = extern "C" fn(libc::c_int);

/// Installs a handler and returns what was installed before. System calls that it interrupts go on.
///
/// # Errors
/// If there is no such signal.
pub(crate) fn set_handler(signal: libc::c_int, handler: Handler) -> io::Result<libc::sigaction> {
    // SAFETY: sigaction is plain data, zeroes are valid.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as *const () as libc::sighandler_t;
    action.sa_flags = libc::SA_RESTART;
    replace_action(signal, &action)
}

/// Installs a whole action and returns the former one.
pub(crate) fn replace_action(signal: libc::c_int, action: &libc::sigaction) -> io::Result<libc::sigaction> {
    // SAFETY: sigaction is plain data, zeroes are valid.
    let mut former: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: both structures are complete; the action's handler does only what is async-signal-safe.
    match unsafe { libc::sigaction(signal, action, &mut former) } {
        0 => Ok(former),
        _ => Err(io::Error::last_os_error()),
    }
}

extern "C" fn report(signal: libc::c_int) {
    let byte = signal as u8;
    // SAFETY: write is async-signal-safe; one byte of the stack. If the pipe is full, enough was said.
    unsafe { libc::write(WRITER.load(Ordering::SeqCst), (&raw const byte).cast(), 1) };
}

fn wait_for_signal(reader: libc::c_int) -> i32 {
    let mut byte = 0u8;
    loop {
        // SAFETY: an open descriptor and a buffer of one byte.
        match unsafe { libc::read(reader, (&raw mut byte).cast(), 1) } {
            1 => return i32::from(byte),
            // The writing end is never closed: only an interruption comes here.
            _ => continue,
        }
    }
}

fn end_everything(signal: i32) -> ! {
    ENDING.store(true, Ordering::SeqCst);
    // What loses its parent while the family dies becomes a child of this process, and is found again.
    // SAFETY: a system call on numbers.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
    let deadline = Instant::now() + DEATH;
    loop {
        let family = living_descendants(std::process::id());
        if family.is_empty() || Instant::now() > deadline {
            break;
        }
        for pid in family {
            // SAFETY: a descendant of this process, which nobody else waits for while its parent is being killed.
            unsafe { libc::kill(pid as libc::pid_t, libc::SIGKILL) };
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    for work in std::mem::take(&mut *LAST_WORK.lock().unwrap_or_else(PoisonError::into_inner)) {
        work();
    }
    eprintln!("\nended by signal {signal}, with everything that was started");
    std::process::exit(128 + signal)
}

/// Every process below `root` that has not ended, children before grandchildren.
pub fn living_descendants(root: u32) -> Vec<u32> {
    let processes = processes();
    let mut family = vec![root];
    let mut next = 0;
    while let Some(&parent) = family.get(next) {
        let children = processes.iter().filter(|(_, (of, _))| *of == parent);
        family.extend(children.map(|(pid, _)| *pid));
        next += 1;
    }
    family.retain(|pid| *pid != root && processes.get(pid).is_some_and(|(_, state)| !matches!(state, 'Z' | 'X')));
    family
}

/// Parent and state of every process.
fn processes() -> BTreeMap<u32, (u32, char)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    entries
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            // The name may contain anything; what follows its closing bracket does not.
            let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
            let state = fields.next()?.chars().next()?;
            Some((pid, (fields.next()?.parse().ok()?, state)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn descendants_are_found_while_they_live() {
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 600 & wait"]).stdin(Stdio::null());
        let mut child = command.spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        let grandchild = loop {
            if let [grandchild] = living_descendants(child.id())[..] {
                break grandchild;
            }
            assert!(Instant::now() < deadline, "the grandchild is not found");
            std::thread::sleep(Duration::from_millis(5));
        };
        assert!(living_descendants(std::process::id()).contains(&grandchild));
        child.kill().unwrap();
        // SAFETY: this test's grandchild.
        unsafe { libc::kill(grandchild as libc::pid_t, libc::SIGKILL) };
        child.wait().unwrap();
        assert!(!living_descendants(std::process::id()).contains(&child.id()));
    }
}
