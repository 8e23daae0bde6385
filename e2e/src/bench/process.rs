//! What a process takes of memory, read from proc(5).
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
    fn this_process_can_be_looked_at() {
        let memory = ProcessMemory::of(std::process::id() as i32).unwrap();
        assert!(
            memory.pss_bytes > 0 && memory.peak_bytes >= memory.pss_bytes,
            "{memory:?}"
        );
        assert_eq!(memory.guest_bytes, 0);
    }
}
