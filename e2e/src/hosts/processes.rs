//! Processes of a pid namespace, found by the process id of its init.
use std::collections::BTreeMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::{HostsError, io as failed, namespace};

/// A process that runs on a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessInfo {
    /// Its pid as this process sees it.
    pub pid: i32,
    /// Name of its program's file, without folders.
    pub program: String,
    /// State letter of proc(5): `R`, `S`, `D`, `T`, `Z`.
    pub state: char,
    /// Pid of its parent.
    pub parent: i32,
}

impl ProcessInfo {
    /// The process of this number, if it is there.
    #[must_use]
    pub fn of(pid: i32) -> Option<Self> {
        let folder = PathBuf::from(format!("/proc/{pid}"));
        let Stat { name, state, parent } = Stat::read(&folder)?;
        // The link of a zombie can't be read; the short name remains.
        let program = fs::read_link(folder.join("exe"))
            .ok()
            .and_then(|path| Some(path.file_name()?.to_str()?.trim_end_matches(" (deleted)").to_owned()))
            .unwrap_or(name);
        Some(Self {
            pid,
            program,
            state,
            parent,
        })
    }

    /// Whether it can do nothing: it stands or has ended, or it waits in vfork(2), in the kernel, for a child that
    /// stands, and has its own SIGSTOP before it once that is over.
    #[must_use]
    pub fn stands_still(&self, all: &[Self]) -> bool {
        let child_stands = || all.iter().any(|other| other.parent == self.pid && other.state == 'T');
        matches!(self.state, 'T' | 'Z' | 'X') || (self.state == 'D' && child_stands())
    }

    /// Names of its threads that wait in the kernel for something that no signal interrupts, such as a disk. One that is killed has them until
    /// that has come.
    #[must_use]
    pub fn uninterruptible(&self) -> Vec<String> {
        let Ok(threads) = fs::read_dir(format!("/proc/{}/task", self.pid)) else {
            return Vec::new();
        };
        let waiting = threads.filter_map(|thread| {
            let stat = Stat::read(&thread.ok()?.path())?;
            (stat.state == 'D').then_some(stat.name)
        });
        waiting.collect()
    }

    /// Whether it is still there, if only because it can't end.
    #[must_use]
    pub fn is_there(&self) -> bool {
        Self::of(self.pid).is_some()
    }
}

/// The processes of an init's pid namespace, without that init and without those of namespaces below.
pub(crate) fn all(init: i32) -> Result<Vec<ProcessInfo>, HostsError> {
    let namespace = |pid: i32| fs::metadata(format!("/proc/{pid}/ns/pid")).map(|meta| meta.ino());
    let own = namespace(init).map_err(failed(format!("reading the pid namespace of process {init}")))?;
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").map_err(failed("reading /proc"))? {
        let name = entry.map_err(failed("reading /proc"))?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        // A process may end at any moment: what can't be read any more is not there.
        if pid != init && namespace(pid).is_ok_and(|other| other == own) {
            found.extend(ProcessInfo::of(pid));
        }
    }
    Ok(found)
}

/// Those whose program has this file name.
pub(crate) fn named(init: i32, program: &str) -> Result<Vec<ProcessInfo>, HostsError> {
    let mut found = all(init)?;
    found.retain(|process| process.program == program);
    Ok(found)
}

/// Those whose program has this file name, in namespaces below, too: in containers.
pub(crate) fn below(init: i32, program: &str) -> Result<Vec<ProcessInfo>, HostsError> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir("/proc").map_err(failed("reading /proc"))? {
        let name = entry.map_err(failed("reading /proc"))?.file_name();
        let pid = name.to_str().and_then(|name| name.parse::<i32>().ok());
        all.extend(pid.and_then(ProcessInfo::of).map(|found| (found.pid, found)));
    }
    let descends = |process: &ProcessInfo| {
        let parents = std::iter::successors(Some(process), |child| all.get(&child.parent));
        parents.take(all.len()).any(|ancestor| ancestor.parent == init)
    };
    let found = all
        .values()
        .filter(|process| process.program == program && descends(process));
    Ok(found.cloned().collect())
}

/// Sends SIGKILL to every process of this program; returns how many and when.
pub(crate) fn kill(init: i32, program: &str) -> Result<(usize, Instant), HostsError> {
    let mut killed = 0;
    for victim in named(init, program)? {
        // The handle is opened first and the process looked at again: a pid that was reused is left alone.
        let Ok(handle) = namespace::pidfd_open(victim.pid) else {
            continue;
        };
        if ProcessInfo::of(victim.pid).is_some_and(|now| now.program == program) {
            namespace::signal(&handle, libc::SIGKILL).map_err(failed(format!("killing {program}")))?;
            killed += 1;
        }
    }
    Ok((killed, Instant::now()))
}

/// Sends SIGSTOP to every process of this program, in namespaces below, too; returns handles on those that it reached.
pub(crate) fn stop_below(init: i32, program: &str) -> Result<Vec<OwnedFd>, HostsError> {
    let found = below(init, program)?;
    let stopped = found.into_iter().filter_map(|process| {
        // As in `kill`. One that has ended meanwhile needs no stopping.
        let handle = namespace::pidfd_open(process.pid).ok()?;
        let same = ProcessInfo::of(process.pid).is_some_and(|now| now.program == program);
        (same && namespace::signal(&handle, libc::SIGSTOP).is_ok()).then_some(handle)
    });
    Ok(stopped.collect())
}

/// What /proc/PID/stat says of a process or thread (proc(5)).
struct Stat {
    name: String,
    state: char,
    parent: i32,
}

impl Stat {
    fn read(folder: &Path) -> Option<Self> {
        let stat = fs::read_to_string(folder.join("stat")).ok()?;
        // The name may contain anything.
        let (head, tail) = stat.rsplit_once(')')?;
        let (_, name) = head.split_once('(')?;
        let mut fields = tail.split_ascii_whitespace();
        Some(Self {
            name: name.to_owned(),
            state: fields.next()?.chars().next()?,
            parent: fields.next()?.parse().ok()?,
        })
    }
}
