//! What a process takes of memory, read from proc(5).
use std::collections::BTreeMap;
use std::fs;

use anyhow::Context;
use serde::Serialize;

/// Name of the memfd that holds guest memory in an engine.
const GUEST_RAM: &str = "ftvm-guest-ram";

/// Memory of an engine's process, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ProcessMemory {
    /// Resident, guest memory left out.
    pub rss_bytes: u64,
    /// The same, with what is shared with others divided among them.
    pub pss_bytes: u64,
    /// Resident pages of guest memory.
    pub guest_bytes: u64,
    /// The most that was ever resident at a time, guest memory included.
    pub peak_bytes: u64,
}

impl ProcessMemory {
    /// Of a process that runs.
    ///
    /// # Errors
    /// If it does not, or this user may not look at it.
    pub fn of(pid: i32) -> anyhow::Result<Self> {
        let read = |file: &str| {
            let path = format!("/proc/{pid}/{file}");
            fs::read_to_string(&path).with_context(|| format!("reading {path}"))
        };
        let peak = peak_bytes(&read("status")?).context("no VmHWM in a process's status")?;
        Ok(Self {
            peak_bytes: peak,
            ..from_smaps(&read("smaps")?)
        })
    }
}

/// `VmHWM` of /proc/PID/status.
fn peak_bytes(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    kibibytes(line)
}

fn kibibytes(text: &str) -> Option<u64> {
    text.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()
        .map(|kib| kib << 10)
}

/// Sums over the mappings of /proc/PID/smaps: a line `ADDRESSES PERMISSIONS ... NAME` begins a mapping, lines
/// `Key: N kB` follow.
fn from_smaps(text: &str) -> ProcessMemory {
    let mut sum = ProcessMemory::default();
    let mut guest = false;
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':').filter(|(key, _)| !key.contains(' ')) else {
            guest = line.contains(GUEST_RAM);
            continue;
        };
        let Some(bytes) = kibibytes(value) else {
            continue;
        };
        match (key, guest) {
            ("Rss", true) => sum.guest_bytes += bytes,
            ("Rss", false) => sum.rss_bytes += bytes,
            ("Pss", false) => sum.pss_bytes += bytes,
            _ => {}
        }
    }
    sum
}

/// Processor time of a process by thread name, in nanoseconds; threads of one name are summed.
pub type ThreadTimes = BTreeMap<String, u64>;

/// Processor times of a process that runs, from /proc/PID/task/TID/schedstat, whose first word they are.
///
/// # Errors
/// If it does not run, or this user may not look at it.
pub fn thread_times(pid: i32) -> anyhow::Result<ThreadTimes> {
    let folder = format!("/proc/{pid}/task");
    let mut times = ThreadTimes::new();
    for task in fs::read_dir(&folder).with_context(|| format!("reading {folder}"))? {
        let path = task?.path();
        // A thread may end at any moment.
        let (Ok(name), Ok(stat)) = (
            fs::read_to_string(path.join("comm")),
            fs::read_to_string(path.join("schedstat")),
        ) else {
            continue;
        };
        let time = stat.split_whitespace().next().and_then(|word| word.parse::<u64>().ok());
        // Numbers at the end tell threads of one kind apart.
        let kind = name.trim().trim_end_matches(|c: char| c.is_ascii_digit() || c == '-');
        *times.entry(kind.to_owned()).or_default() += time.unwrap_or(0);
    }
    Ok(times)
}

/// What was used since an earlier look.
pub fn times_since(after: &ThreadTimes, before: &ThreadTimes) -> ThreadTimes {
    let used = |(name, time): (&String, &u64)| {
        let earlier = before.get(name).copied().unwrap_or(0);
        (name.clone(), time.saturating_sub(earlier))
    };
    after.iter().map(used).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_told_from_the_rest() {
        let text = "\
00400000-00500000 r-xp 00000000 00:1f 123 /ftvm-engine
Size:               1024 kB
Rss:                 100 kB
Pss:                  50 kB
VmFlags: rd ex mr mw me
7f00-7fff rw-s 00000000 00:01 9 /memfd:ftvm-guest-ram (deleted)
Rss:              131072 kB
Pss:              131072 kB
7fff1000-7fff2000 rw-p 00000000 00:00 0 [heap]
Rss:                  12 kB
Pss:                  12 kB
";
        let memory = from_smaps(text);
        assert_eq!(
            (memory.rss_bytes, memory.pss_bytes, memory.guest_bytes),
            (112 << 10, 62 << 10, 131_072 << 10)
        );
        assert_eq!(peak_bytes("Name:\tx\nVmHWM:\t   2048 kB\n"), Some(2 << 20));
        assert_eq!(peak_bytes("Name:\tx\n"), None);
    }

    #[test]
    fn times_are_told_by_thread() {
        let own = || thread_times(std::process::id() as i32).unwrap();
        let before = own();
        let worker = std::thread::Builder::new().name("counter-7".to_owned());
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let worker = worker.spawn(move || {
            (0..1_000_000u64)
                .fold(0, |a, b| std::hint::black_box(a ^ b))
                .min(receiver.iter().count() as u64)
        });
        let mut used = ThreadTimes::new();
        while used.get("counter").is_none_or(|time| *time == 0) {
            used = times_since(&own(), &before);
            std::thread::yield_now();
        }
        drop(sender);
        worker.unwrap().join().unwrap();
    }

    #[test]
    fn this_process_can_be_looked_at() {
        let memory = ProcessMemory::of(std::process::id() as i32).unwrap();
        assert!(
            memory.pss_bytes > 0 && memory.peak_bytes >= memory.pss_bytes,
            "{memory:?}"
        );
        assert_eq!(memory.guest_bytes, 0);
    }
}
