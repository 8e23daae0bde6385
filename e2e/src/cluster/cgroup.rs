//! Control groups of native nodes: one group for a cluster, below it one for each node, in every hierarchy that this machine has.
//!
//! A control group outlives its processes. So a cluster writes down in its folder which ones it made, and whoever removes the folder
//! removes them first.
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

/// File in a cluster's folder that names its groups, one a line.
const LIST: &str = "control-groups";
/// Killed processes have left their groups after this.
const PATIENCE: Duration = Duration::from_secs(120);
/// Controllers that kubelet needs where there is only version 2.
const CONTROLLERS_V2: &str = "+cpuset +cpu +memory +pids";

/// A mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    folder: PathBuf,
    /// Version 1: its mount options, such as `cpu,cpuacct` or `none,name=systemd`. Version 2 has none.
    options: Option<String>,
}

/// The groups of one cluster.
#[derive(Debug)]
pub(super) struct Groups {
    name: String,
    hierarchies: Vec<Hierarchy>,
}

impl Groups {
    /// Makes the group `name` and writes it down in `folder`.
    ///
    /// # Errors
    /// Without hierarchies, or without the right to make groups.
    pub(super) fn new(folder: &Path, name: &str) -> anyhow::Result<Self> {
        let hierarchies = usable(&fs::read_to_string("/proc/self/mounts")?);
        ensure!(
            !hierarchies.is_empty(),
            "this machine has no control groups mounted: kubelet needs them (mount cgroup2 on /sys/fs/cgroup)"
        );
        let groups = Self {
            name: name.to_owned(),
            hierarchies,
        };
        let list: Vec<String> = groups
            .hierarchies
            .iter()
            .map(|hierarchy| format!("{}\n", hierarchy.folder.join(name).display()))
            .collect();
        fs::write(folder.join(LIST), list.concat())?;
        groups.make(Path::new(""))?;
        Ok(groups)
    }

    /// Makes a node's group, empty and without the remains of an earlier life. Returns kubelet's name for it.
    ///
    /// # Errors
    /// If something still runs in it.
    pub(super) fn renew_node(&self, node: &str) -> anyhow::Result<String> {
        self.hierarchies
            .iter()
            .try_for_each(|hierarchy| remove(&hierarchy.folder.join(&self.name).join(node)))?;
        self.make(Path::new(node))?;
        Ok(format!("/{}/{node}", self.name))
    }

    /// A shell script that mounts the same hierarchies on a fresh /sys.
    pub(super) fn mount_script(&self) -> String {
        let mut script = String::new();
        for hierarchy in &self.hierarchies {
            match &hierarchy.options {
                None => script += "mount -t cgroup2 cgroup2 /sys/fs/cgroup\n",
                Some(options) => {
                    if script.is_empty() {
                        script += "mount -t tmpfs -o mode=755 none /sys/fs/cgroup\n";
                    }
                    let name = options.trim_start_matches("none,name=");
                    let place = format!("/sys/fs/cgroup/{name}");
                    script += &format!("mkdir {place}\nmount -t cgroup -o {options} cgroup {place}\n");
                    // Programs look for each controller by its own name.
                    if name.contains(',') {
                        for alias in name.split(',') {
                            script += &format!("ln -s {name} /sys/fs/cgroup/{alias}\n");
                        }
                    }
                }
            }
        }
        script
    }

    fn make(&self, below: &Path) -> anyhow::Result<()> {
        for hierarchy in &self.hierarchies {
            let group = hierarchy.folder.join(&self.name).join(below);
            let parent = group.parent().context("a control group has a parent")?;
            let controllers = if hierarchy.options.is_none() {
                CONTROLLERS_V2
            } else {
                ""
            };
            if !controllers.is_empty() {
                write(&parent.join("cgroup.subtree_control"), controllers)?;
            }
            fs::create_dir(&group).with_context(|| format!("cannot make the control group {}", group.display()))?;
            // Version 1 starts without CPUs and memory, and refuses processes until it has some.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if hierarchy.options.is_some() && group.join(file).exists() {
                    write(&group.join(file), fs::read_to_string(parent.join(file))?.trim())?;
                }
            }
        }
        Ok(())
    }
}

/// Removes the groups that a cluster's folder names; none if it is no cluster's.
///
/// # Errors
/// If something still runs in them.
pub(crate) fn remove_left(folder: &Path) -> anyhow::Result<()> {
    match fs::read_to_string(folder.join(LIST)) {
        Ok(list) => list.lines().try_for_each(|group| remove(Path::new(group))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Removes a group with all below it, once its killed processes have left.
fn remove(group: &Path) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match remove_tree(group) {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() > deadline => {
                return Err(error).with_context(|| format!("cannot remove the control group {}", group.display()));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

fn remove_tree(group: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(group) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(group) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn write(file: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(file, text).with_context(|| format!("cannot write {text:?} to {}", file.display()))
}

/// The hierarchies that containers are to live in: those of version 1 where it has the controllers, else version 2.
fn usable(mounts: &str) -> Vec<Hierarchy> {
    let lines = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ');
        let (_, folder, kind, options) = (words.next()?, words.next()?, words.next()?, words.next()?);
        Some((PathBuf::from(folder), kind, options))
    });
    let lines: Vec<_> = lines.collect();
    let first: Vec<Hierarchy> = lines
        .iter()
        .filter(|(_, kind, _)| *kind == "cgroup")
        .map(|(folder, _, options)| Hierarchy {
            folder: folder.clone(),
            options: Some(options_v1(options)),
        })
        .collect();
    let has_memory = |hierarchy: &Hierarchy| {
        let mut words = hierarchy.options.iter().flat_map(|options| options.split(','));
        words.any(|word| word == "memory")
    };
    if first.iter().any(has_memory) {
        return first;
    }
    lines
        .iter()
        .filter(|(folder, kind, _)| *kind == "cgroup2" && folder == Path::new("/sys/fs/cgroup"))
        .map(|(folder, _, _)| Hierarchy {
            folder: folder.clone(),
            options: None,
        })
        .collect()
}

/// What names a hierarchy of version 1 among its mount options.
fn options_v1(options: &str) -> String {
    let general = [
        "rw",
        "ro",
        "relatime",
        "nosuid",
        "nodev",
        "noexec",
        "xattr",
        "clone_children",
    ];
    let words: Vec<&str> = options
        .split(',')
        .filter(|word| !general.contains(word) && !word.starts_with("release_agent="))
        .collect();
    let words = words.join(",");
    if words.starts_with("name=") {
        format!("none,{words}")
    } else {
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V2: &str = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid,nsdelegate 0 0\n";

    #[test]
    fn version_1_is_used_where_it_has_the_controllers() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw,mode=755 0 0\n\
            cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,nosuid,nodev,noexec,relatime,cpu,cpuacct 0 0\n\
            cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0\n\
            cgroup /sys/fs/cgroup/systemd cgroup rw,xattr,name=systemd,release_agent=/x 0 0\n\
            cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        let hierarchies = usable(mounts);
        let options: Vec<_> = hierarchies.iter().filter_map(|one| one.options.as_deref()).collect();
        assert_eq!(options, ["cpu,cpuacct", "memory", "none,name=systemd"]);
        let groups = Groups {
            name: "x".to_owned(),
            hierarchies,
        };
        let script = groups.mount_script();
        for line in [
            "mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd\n",
            "ln -s cpu,cpuacct /sys/fs/cgroup/cpuacct\n",
        ] {
            assert!(script.contains(line), "{script}");
        }
    }

    #[test]
    fn version_2_is_used_where_it_is_alone() {
        let systemd_only = "cgroup /sys/fs/cgroup/systemd cgroup rw,name=systemd 0 0\n";
        for mounts in [V2.to_owned(), format!("{systemd_only}{V2}")] {
            assert_eq!(
                usable(&mounts),
                [Hierarchy {
                    folder: "/sys/fs/cgroup".into(),
                    options: None
                }]
            );
        }
    }
}
