//! The control group of an engine on a node with version 2: it must be the pod's, and the guest's memory must count against the pod.
use std::fmt;

use anyhow::{Context, bail, ensure};

use crate::cluster::Node;

/// Prints the engine's control group, then of the pod's: `memory.max`, `memory.current`, controllers for its children; then `memory.current` of the engine's.
const SCRIPT: &str = "pid=$(pidof ftvm-engine)
leaf=$(sed -n 's/^0:://p' /proc/$pid/cgroup)
group=/sys/fs/cgroup$leaf
echo \"$leaf\"
cat \"${group%/*}/memory.max\" \"${group%/*}/memory.current\" \"${group%/*}/cgroup.subtree_control\" \"$group/memory.current\"";

/// What a node's kernel says of its one engine.
#[derive(Debug, PartialEq, Eq)]
pub struct EngineGroup {
    /// Below /sys/fs/cgroup.
    path: String,
    controllers: String,
    pod_max_bytes: u64,
    pod_bytes: u64,
    engine_bytes: u64,
}

impl EngineGroup {
    /// Asks a node on which one engine runs.
    ///
    /// # Errors
    /// If there is none, or its group has no memory controller.
    pub fn read(node: &Node) -> anyhow::Result<Self> {
        let output = node.exec(&["sh", "-euc", SCRIPT])?;
        let text = String::from_utf8_lossy(&output).into_owned();
        Self::parse(&text).with_context(|| format!("the engine's control group on {}: {text:?}", node.name()))
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let lines: Vec<&str> = text.lines().collect();
        let [path, pod_max, pod, controllers, engine] = lines.as_slice() else {
            bail!("{} lines instead of 5", lines.len());
        };
        let bytes = |text: &str| text.parse().with_context(|| format!("{text:?} is no number of bytes"));
        Ok(Self {
            path: (*path).to_owned(),
            controllers: (*controllers).to_owned(),
            pod_max_bytes: bytes(pod_max)?,
            pod_bytes: bytes(pod)?,
            engine_bytes: bytes(engine)?,
        })
    }

    /// It must be a leaf of the pod's group, limited as the pod, and charged with the guest's whole memory.
    ///
    /// # Errors
    /// What is not so.
    pub fn judge(&self, pod_uid: &str, pod_max_bytes: u64, guest_bytes: u64) -> anyhow::Result<()> {
        let end = format!("/pod{pod_uid}/ftvm-engine");
        ensure!(
            self.path.starts_with("/kubepods/") && self.path.ends_with(&end),
            "the engine is in the control group {}, not in its pod's, which ends with {end}",
            self.path
        );
        ensure!(
            self.controllers.split_whitespace().any(|name| name == "memory"),
            "the pod's control group {} has no memory controller for what is in it: {}",
            self.path,
            self.controllers
        );
        ensure!(
            self.pod_max_bytes == pod_max_bytes,
            "memory.max of the pod is {} instead of {pod_max_bytes}",
            self.pod_max_bytes
        );
        ensure!(
            self.engine_bytes >= guest_bytes && self.pod_bytes >= self.engine_bytes,
            "the guest has {guest_bytes} bytes of memory, but its engine is charged with {}, its pod with {}",
            self.engine_bytes,
            self.pod_bytes
        );
        Ok(())
    }
}

impl fmt::Display for EngineGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes >> 20;
        write!(
            f,
            "control group {} with {} MiB; its pod has {} of at most {} MiB, and controllers {}",
            self.path,
            mib(self.engine_bytes),
            mib(self.pod_bytes),
            mib(self.pod_max_bytes),
            self.controllers
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0123abcd-0000-4000-8000-0000000000ff";

    fn seen(change: impl FnOnce(&mut EngineGroup)) -> EngineGroup {
        let text = format!("/kubepods/burstable/pod{UID}/ftvm-engine\n600\n500\ncpuset cpu io memory pids\n400\n");
        let mut seen = EngineGroup::parse(&text).unwrap();
        change(&mut seen);
        seen
    }

    fn fault(change: impl FnOnce(&mut EngineGroup)) -> String {
        seen(change).judge(UID, 600, 256).unwrap_err().to_string()
    }

    #[test]
    fn an_engine_in_its_pod_passes() {
        seen(|_| {}).judge(UID, 600, 256).unwrap();
    }

    #[test]
    fn an_engine_elsewhere_or_without_a_charge_does_not() {
        assert!(fault(|seen| seen.path = "/kubepods/burstable/podx/daemon".to_owned()).contains("not in its pod's"));
        assert!(fault(|seen| seen.path = "/ftvm-engine".to_owned()).contains("not in its pod's"));
        assert!(fault(|seen| seen.controllers = "cpu pids".to_owned()).contains("no memory controller"));
        assert!(fault(|seen| seen.pod_max_bytes = 700).contains("memory.max"));
        assert!(fault(|seen| seen.engine_bytes = 255).contains("charged with 255"));
        assert!(fault(|seen| seen.pod_bytes = 300).contains("its pod with 300"));
        assert!(EngineGroup::parse("/a\nmax\n1\ncpu\n1\n").is_err());
    }
}
