//! What machine a run was made on: figures without it mean nothing.
use std::fs;
use std::process::{Command, Stdio};

use serde::Serialize;

use super::qemu::EMULATOR;

/// The machine, and how busy it was.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Facts {
    /// When the run began, in seconds since 1970.
    pub began_unix_s: u64,
    /// CPUs that programs may use.
    pub cpus: usize,
    /// The CPU as it calls itself.
    pub cpu_model: String,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// The kernel's version.
    pub kernel: String,
    /// KVM's module, as the system names it.
    pub kvm: String,
    /// The emulator's version.
    pub qemu: String,
    /// Runnable processes when the run began, averaged over a minute: near 0 on a quiet machine.
    pub load_before: f64,
    /// Processor time that others than this run took meanwhile, as a share of the machine's: near 0 on a quiet machine.
    pub others_share: Option<f64>,
}

impl Facts {
    /// Of this machine, now. What can't be read stays empty.
    pub fn read() -> Self {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let value_of = |text: &str, key: &str| {
            let line = text.lines().find(|line| line.starts_with(key));
            let value = line
                .and_then(|line| line.split_once(':'))
                .map(|(_, value)| value.trim().to_owned());
            value.unwrap_or_default()
        };
        let memory_kib = value_of(&text("/proc/meminfo"), "MemTotal");
        let memory_kib = memory_kib.trim_end_matches("kB").trim().parse::<u64>().unwrap_or(0);
        let load = text("/proc/loadavg");
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            began_unix_s: now.map_or(0, |now| now.as_secs()),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            cpu_model: value_of(&text("/proc/cpuinfo"), "model name"),
            memory_mib: memory_kib >> 10,
            kernel: text("/proc/sys/kernel/osrelease").trim().to_owned(),
            kvm: kvm(),
            qemu: qemu(),
            load_before: load
                .split_whitespace()
                .next()
                .and_then(|word| word.parse().ok())
                .unwrap_or(0.0),
            others_share: None,
        }
    }
}

/// The KVM modules that are loaded or built in, other than the common one.
fn kvm() -> String {
    let mut names: Vec<String> = fs::read_dir("/sys/module")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("kvm_"))
        .collect();
    names.sort();
    names.join(" ")
}

fn qemu() -> String {
    let output = Command::new(EMULATOR).arg("--version").stdin(Stdio::null()).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    text.unwrap_or_default().lines().next().unwrap_or_default().to_owned()
}

/// Processor time of the machine, to tell how much of it others took.
#[derive(Clone, Copy, Debug)]
pub struct BusyTime {
    /// Everything that the machine did, in clock ticks.
    machine: u64,
    /// What the machine could have done, in clock ticks.
    possible: u64,
}

impl BusyTime {
    /// From /proc/stat: its first line sums user, nice, system, idle, iowait, irq, softirq, steal over all CPUs.
    pub fn read() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/stat").ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        let line = text.lines().next()?.strip_prefix("cpu ")?;
        let ticks: Vec<u64> = line
            .split_whitespace()
            .map_while(|word| word.parse().ok())
            .take(8)
            .collect();
        let idle = ticks.get(3)? + ticks.get(4)?;
        let possible: u64 = ticks.iter().sum();
        Some(Self {
            machine: possible - idle,
            possible,
        })
    }

    /// Since an earlier reading: the share that was not `own` clock ticks.
    pub fn others_since(self, before: Self, own: u64) -> Option<f64> {
        let possible = self
            .possible
            .checked_sub(before.possible)
            .filter(|possible| *possible > 0)?;
        let busy = self.machine.saturating_sub(before.machine);
        Some(busy.saturating_sub(own) as f64 / possible as f64)
    }
}

/// Processor time of this process and of all its children that were waited for, in clock ticks (times(2)).
pub fn own_ticks() -> u64 {
    // SAFETY: a structure of plain numbers, which the kernel fills.
    let times = unsafe {
        let mut times: libc::tms = std::mem::zeroed();
        libc::times(&raw mut times);
        times
    };
    [times.tms_utime, times.tms_stime, times.tms_cutime, times.tms_cstime]
        .into_iter()
        .filter_map(|ticks| u64::try_from(ticks).ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_facts() {
        let facts = Facts::read();
        assert!(
            facts.cpus > 0 && facts.memory_mib > 0 && !facts.kernel.is_empty(),
            "{facts:?}"
        );
    }

    #[test]
    fn others_are_what_is_not_ours() {
        let before = BusyTime::parse("cpu  100 0 50 850 0 0 0 0 0 0\ncpu0 1\n").unwrap();
        let after = BusyTime::parse("cpu  180 0 70 950 0 0 0 0 0 0\n").unwrap();
        assert_eq!(after.others_since(before, 60), Some(0.2));
        assert_eq!(before.others_since(before, 0), None);
        assert!(BusyTime::parse("nothing").is_none());
    }
}
