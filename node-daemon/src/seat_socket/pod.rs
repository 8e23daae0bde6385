//! Whose process is at the other end of a connection: its pod, its cgroups, its network.
//!
//! The kernel tells the process that connected; everything else is read from /proc while a pidfd proves that the number
//! still means that process.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use ftvm_engine::control::Connection;
use ftvm_protocol::identity::SeatId;
use rustix::process::{Pid, PidfdFlags};

use crate::netns::Netns;

/// `SO_PEERPIDFD` of asm-generic/socket.h (Linux 6.5).
const SO_PEERPIDFD: libc::c_int = 77;
/// The leaf of a pod's cgroup that its engine lives in.
const LEAF: &str = "ftvm-engine";
/// Pods' cgroups are not looked for deeper than this.
const DEPTH_MAX: u32 = 8;

/// Why a process is no seat's program.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// The process can't be looked at.
    #[error("the process at the other end: {what}: {source}")]
    Process {
        /// What was tried.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// It is of another pid namespace.
    #[error("the process at the other end is not to be seen from here: the daemon's pod needs hostPID: true")]
    Unseen,
    /// It has ended.
    #[error("the process at the other end has ended")]
    Ended,
    /// It is in no pod.
    #[error("process {pid} is in no pod's cgroup ({cgroups}): only programs of seat pods may connect")]
    NoPod {
        /// The process.
        pid: i32,
        /// Where it is.
        cgroups: String,
    },
    /// It is in a pod of another kubelet: of one in a container of this node.
    #[error(
        "process {pid} is in the pod's cgroup {cgroup}, and kubelet has the daemon's own pod below {own}: only programs of seat pods of this node may connect"
    )]
    OtherKubelet {
        /// The process.
        pid: i32,
        /// Where it is.
        cgroup: PathBuf,
        /// Where the pods of this node are.
        own: PathBuf,
    },
    /// Its cgroups contradict each other.
    #[error("process {pid} is in cgroups of two pods")]
    TwoPods {
        /// The process.
        pid: i32,
    },
    /// A cgroup can't be found or made.
    #[error("cgroup {path}: {source}; the node's /sys/fs/cgroup must be mounted writable in the daemon's pod")]
    Cgroup {
        /// Where.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

fn process(what: &'static str) -> impl FnOnce(io::Error) -> PodError {
    move |source| PodError::Process { what, source }
}

/// One line of /proc/PID/cgroup (cgroups(7)): `5:cpu,cpuacct:/path`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    /// Controllers, or `name=...`; empty for version 2.
    pub controllers: String,
    /// Path within the hierarchy.
    pub path: PathBuf,
}

fn parse_cgroups(text: &str) -> Vec<Cgroup> {
    let line = |line: &str| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        Some(Cgroup {
            controllers: controllers.to_owned(),
            path: path.into(),
        })
    };
    text.lines().filter_map(line).collect()
}

/// The pod of a cgroup, and the path of the pod's own cgroup: the outermost component that is called like a pod's.
///
/// The cgroupfs driver writes `kubepods/burstable/podUID`, the systemd driver
/// `kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podUID.slice` with underscores for dashes (kubelet's
/// `pkg/kubelet/cm/cgroup_manager_linux.go`), and with `--cgroup-root` the names of all slices above in front of each, such as
/// `kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-podUID.slice`. What a pod makes below its own cgroup can't be outermost.
pub fn pod_of(path: &Path) -> Option<(SeatId, PathBuf)> {
    let mut pod = PathBuf::new();
    let mut inside = false;
    for component in path.components() {
        pod.push(component);
        let name = match component {
            Component::Normal(name) => name,
            // A cgroup outside of this process's cgroup namespace: its place is not known.
            Component::ParentDir => return None,
            _ => continue,
        };
        let name = name.to_str()?;
        let slice = name.strip_suffix(".slice");
        inside |= begins_pods(name);
        let uid = match slice {
            None => name.strip_prefix("pod").map(str::to_owned),
            Some(slice) => slice.rsplit_once("-pod").and_then(|(above, uid)| {
                let quality = ["-burstable", "-besteffort"]
                    .iter()
                    .find_map(|quality| above.strip_suffix(quality));
                is_root(quality.unwrap_or(above)).then(|| uid.replace('_', "-"))
            }),
        };
        if let Some(uid) = uid.and_then(|uid| uid.parse::<SeatId>().ok())
            && inside
        {
            return Some((uid, pod));
        }
    }
    None
}

/// Is this what cgroups of pods are in?
fn begins_pods(name: &str) -> bool {
    let slice = name.strip_suffix(".slice");
    slice.map_or(name == "kubepods", is_root) || name.starts_with("kubepods-")
}

/// The folder in which kubelet has its pods, by the path of a cgroup of one: its `--cgroup-root`.
fn root_of(path: &Path) -> Option<&Path> {
    pod_of(path)?;
    let begins = |above: &&Path| above.file_name().and_then(OsStr::to_str).is_some_and(begins_pods);
    // The outermost one.
    path.ancestors().filter(begins).last()?.parent()
}

/// A cgroup of a pod that is not where kubelet has this process's own pod in the same hierarchy, and where that is. Without an own pod nothing is known.
///
/// Both are read by this process, so both are as its cgroup namespace shows them (cgroup_namespaces(7)), and all pods of a kubelet have the path down to
/// its `kubepods` in common: none of them differs, whatever its quality of service, its runtime's names and a namespace of its own.
fn elsewhere<'a>(cgroups: &'a [Cgroup], own: &'a [Cgroup]) -> Option<(&'a Path, &'a Path)> {
    cgroups.iter().find_map(|cgroup| {
        let own = own.iter().find(|own| own.controllers == cgroup.controllers)?;
        let (found, expected) = (root_of(&cgroup.path)?, root_of(&own.path)?);
        (found != expected).then_some((cgroup.path.as_path(), expected))
    })
}

/// Is it the slice of all pods?
fn is_root(slice: &str) -> bool {
    slice == "kubepods" || slice.ends_with("-kubepods")
}

/// Where each hierarchy of cgroups is mounted.
#[derive(Debug, Clone)]
pub struct Hierarchies(Vec<Mount>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Mount {
    /// Options of a version 1 hierarchy, which name its controllers; none for version 2.
    controllers: Option<Vec<String>>,
    root: PathBuf,
    point: PathBuf,
}

impl Hierarchies {
    /// As this process sees them (proc_pid_mountinfo(5)).
    pub fn read() -> io::Result<Hierarchies> {
        Ok(Self::parse(&std::fs::read_to_string("/proc/self/mountinfo")?))
    }

    fn parse(text: &str) -> Hierarchies {
        let line = |line: &str| {
            let (front, back) = line.split_once(" - ")?;
            let mut front = front.split(' ').skip(3);
            let (root, point) = (front.next()?, front.next()?);
            let mut back = back.split(' ');
            let (kind, _, options) = (back.next()?, back.next()?, back.next()?);
            let controllers = match kind {
                "cgroup2" => None,
                "cgroup" => Some(options.split(',').map(str::to_owned).collect()),
                _ => return None,
            };
            Some(Mount {
                controllers,
                root: root.into(),
                point: point.into(),
            })
        };
        Hierarchies(text.lines().filter_map(line).collect())
    }

    /// Whether a process is where engines of this pod live, in any hierarchy, or may be: what can't be looked at may have one. The pod's program
    /// need not be there, nor where kubelet has pods now: it may have been started with another root, or another driver, since the engine was.
    pub fn has_engine(&self, pod: SeatId) -> bool {
        let mut mounts = self.0.iter();
        mounts.any(|mount| may_have_engine(&mount.point, &mount.root, pod, DEPTH_MAX))
    }

    /// The folder of a cgroup.
    fn folder(&self, cgroup: &Cgroup) -> Option<PathBuf> {
        let has_all = |options: &[String]| {
            cgroup
                .controllers
                .split(',')
                .all(|name| options.iter().any(|option| option == name))
        };
        // A cgroup outside of this process's cgroup namespace.
        if cgroup.path.components().any(|part| part == Component::ParentDir) {
            return None;
        }
        let fits = |mount: &&Mount| match &mount.controllers {
            None => cgroup.controllers.is_empty(),
            Some(options) => !cgroup.controllers.is_empty() && has_all(options),
        };
        let mut mounts = self.0.iter().filter(fits);
        // A mount of a part of the hierarchy shows only what is below its root.
        mounts.find_map(|mount| Some(mount.point.join(cgroup.path.strip_prefix(&mount.root).ok()?)))
    }
}

/// Whether an engine of the pod may be below this folder, which is the cgroup `path`: in whichever cgroup is called like the pod's own.
fn may_have_engine(folder: &Path, path: &Path, pod: SeatId, depth: u32) -> bool {
    let mut below = match std::fs::read_dir(folder) {
        Ok(below) => below,
        Err(error) => return !is_gone(&error),
    };
    below.any(|entry| {
        let kind = entry.and_then(|entry| Ok((entry.file_type()?, entry)));
        let entry = match kind {
            Ok((kind, _)) if !kind.is_dir() => return false,
            Ok((_, entry)) => entry,
            Err(error) => return !is_gone(&error),
        };
        let path = path.join(entry.file_name());
        match pod_of(&path) {
            Some((found, _)) => found == pod && has_processes(&entry.path().join(LEAF)),
            None => depth > 0 && may_have_engine(&entry.path(), &path, pod, depth - 1),
        }
    })
}

/// Whether a cgroup has processes, or may have.
fn has_processes(cgroup: &Path) -> bool {
    match std::fs::read_to_string(cgroup.join("cgroup.procs")) {
        Ok(text) => !text.trim().is_empty(),
        Err(error) => !is_gone(&error),
    }
}

/// A cgroup that is not there, or goes while it is looked at, has nobody; of one that can't be looked at nothing is known.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// A process at the other end of a connection, and the pod that it belongs to.
#[derive(Debug)]
pub struct Peer {
    /// The pod.
    pub pod: SeatId,
    /// The process.
    pub pid: i32,
    /// Readable once it has ended.
    pub pidfd: OwnedFd,
    /// Its network namespace: the pod's.
    pub network: Arc<OwnedFd>,
    /// Which one that is.
    pub netns: Netns,
    cgroups: Vec<Cgroup>,
}

impl Peer {
    /// Looks at the process that connected.
    pub fn of(connection: &Connection) -> Result<Peer, PodError> {
        let (pid, pidfd) = peer_process(connection)?;
        let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).map_err(process("reading its cgroups"))?;
        let network = File::open(format!("/proc/{pid}/ns/net")).map_err(process("opening its network namespace"))?;
        let netns = Netns::of_descriptor(&network).map_err(process("looking at its network namespace"))?;
        // Only now is it sure that all of this was the process's that connected.
        if super::server::has_ended(&pidfd) {
            return Err(PodError::Ended);
        }
        let cgroups = parse_cgroups(&text);
        let own = std::fs::read_to_string("/proc/self/cgroup").map_err(process("reading the daemon's own cgroups"))?;
        if let Some((cgroup, own)) = elsewhere(&cgroups, &parse_cgroups(&own)) {
            let (cgroup, own) = (cgroup.to_owned(), own.to_owned());
            return Err(PodError::OtherKubelet { pid, cgroup, own });
        }
        let mut pods = cgroups
            .iter()
            .filter_map(|cgroup| pod_of(&cgroup.path))
            .map(|(pod, _)| pod);
        let pod = pods.next().ok_or_else(|| PodError::NoPod {
            pid,
            cgroups: text.lines().take(20).collect::<Vec<_>>().join(" "),
        })?;
        if pods.any(|other| other != pod) {
            return Err(PodError::TwoPods { pid });
        }
        Ok(Peer {
            pod,
            pid,
            pidfd,
            network: Arc::new(network.into()),
            netns,
            cgroups,
        })
    }

    /// Makes the engine's leaf beside the pod's containers in every hierarchy that has the pod. In others the engine joins
    /// where the seat's program is: nowhere may it stay in the daemon's own cgroup, with which it would be killed.
    pub fn make_leaves(&self, hierarchies: &Hierarchies) -> Result<Vec<PathBuf>, PodError> {
        let mut folders = Vec::new();
        for cgroup in &self.cgroups {
            let pod = pod_of(&cgroup.path).map(|(_, pod)| pod);
            let place = Cgroup {
                controllers: cgroup.controllers.clone(),
                path: pod.clone().unwrap_or_else(|| cgroup.path.clone()),
            };
            let Some(folder) = hierarchies.folder(&place) else {
                // Not mounted here: the kernel's own version 2 root beside version 1, mostly.
                if pod.is_some() {
                    let source = io::Error::other("its hierarchy is not mounted here");
                    return Err(PodError::Cgroup {
                        path: place.path,
                        source,
                    });
                }
                continue;
            };
            folders.push(match pod {
                Some(_) => make_leaf(&folder)?,
                None => folder,
            });
        }
        Ok(folders)
    }
}

#[cfg(test)]
impl Hierarchies {
    /// One hierarchy, of version 2, in this folder.
    pub(crate) fn at(point: &Path) -> Hierarchies {
        Hierarchies(vec![Mount {
            controllers: None,
            root: "/".into(),
            point: point.to_owned(),
        }])
    }
}

#[cfg(test)]
impl Peer {
    /// This process, as the program of a pod.
    pub(crate) fn own(pod: SeatId) -> Peer {
        let pid = std::process::id().cast_signed();
        let network = File::open("/proc/self/ns/net").unwrap();
        Peer {
            pod,
            pid,
            pidfd: rustix::process::pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap(),
            netns: Netns::of_descriptor(&network).unwrap(),
            network: Arc::new(network.into()),
            cgroups: Vec::new(),
        }
    }
}

fn make_leaf(pod: &Path) -> Result<PathBuf, PodError> {
    let leaf = pod.join(LEAF);
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| PodError::Cgroup { path, source }
    };
    match std::fs::create_dir(&leaf) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(failed(&leaf)(error)),
    }
    // A new cpuset of version 1 is empty, and nothing can join it. Version 2 has no such need: an empty one inherits.
    if leaf.join("cgroup.clone_children").exists() {
        for name in ["cpuset.cpus", "cpuset.mems"] {
            let (from, to) = (pod.join(name), leaf.join(name));
            if to.exists() {
                let value = std::fs::read_to_string(&from).map_err(failed(&from))?;
                std::fs::write(&to, value.trim()).map_err(failed(&to))?;
            }
        }
    }
    Ok(leaf)
}

/// Removes leaves that [`Peer::make_leaves`] made and that nobody is in any more.
pub(super) fn remove_leaves(folders: &[PathBuf]) {
    for folder in folders.iter().filter(|folder| folder.ends_with(LEAF)) {
        // Still busy, or gone with its pod.
        let _ = std::fs::remove_dir(folder);
    }
}

/// Process id and pidfd of the process that connected.
fn peer_process(connection: &Connection) -> Result<(i32, OwnedFd), PodError> {
    let by_kernel = peer_pidfd(connection);
    let credentials = connection
        .peer()
        .map_err(|error| process("SO_PEERCRED")(io::Error::other(crate::explain(&error))))?;
    let pid = credentials.0.ok_or(PodError::Unseen)?;
    let number = Pid::from_raw(pid).ok_or(PodError::Unseen)?;
    match by_kernel {
        Some(pidfd) => Ok((pid, pidfd)),
        // Of a kernel before 6.5. The number could be another process's by now; then that one is looked at and refused, or it
        // is of the same pod.
        None => match rustix::process::pidfd_open(number, PidfdFlags::empty()) {
            Ok(pidfd) => Ok((pid, pidfd)),
            Err(rustix::io::Errno::SRCH) => Err(PodError::Ended),
            Err(errno) => Err(process("pidfd_open")(errno.into())),
        },
    }
}

fn peer_pidfd(connection: &Connection) -> Option<OwnedFd> {
    let mut fd: libc::c_int = -1;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: a number and a length that fit each other; on success the descriptor is new and ours.
    unsafe {
        let socket = connection.as_fd().as_raw_fd();
        let (value, length) = ((&raw mut fd).cast(), &raw mut length);
        let result = libc::getsockopt(socket, libc::SOL_SOCKET, SO_PEERPIDFD, value, length);
        (result == 0 && fd >= 0).then(|| OwnedFd::from_raw_fd(fd))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0123abcd-0000-4000-8000-0000000000ff";

    fn pod(path: &str) -> Option<(String, String)> {
        pod_of(Path::new(path)).map(|(uid, pod)| (uid.to_string(), pod.display().to_string()))
    }

    #[test]
    fn pods_are_known_by_both_cgroup_drivers() {
        let under = UID.replace('-', "_");
        for pod_path in [
            format!("/kubepods/burstable/pod{UID}"),
            format!("/kubepods/pod{UID}"),
            format!("/lab-one/kubepods/besteffort/pod{UID}"),
            format!("/kubepods.slice/kubepods-pod{under}.slice"),
            format!("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{under}.slice"),
            // With a root of their own, as in clusters that are containers.
            format!("/kubelet/kubepods/burstable/pod{UID}"),
            format!("/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{under}.slice"),
            format!(
                "/a.slice/a-b.slice/a-b-kubepods.slice/a-b-kubepods-besteffort.slice/a-b-kubepods-besteffort-pod{under}.slice"
            ),
        ] {
            let found = Some((UID.to_owned(), pod_path.clone()));
            assert_eq!(pod(&format!("{pod_path}/cri-containerd-abc.scope")), found);
            assert_eq!(pod(&pod_path), found);
        }
    }

    #[test]
    fn what_only_looks_like_a_pod_is_none() {
        let other = "11111111-0000-4000-8000-0000000000ff";
        for path in [
            "/",
            "/system.slice/ftvm.service",
            &format!("/pod{UID}"),
            &format!("/user.slice/pod{UID}"),
            &format!("/system.slice/xkubepods-pod{}.slice", UID.replace('-', "_")),
            &format!("/kubepods.slice/other-pod{}.slice", UID.replace('-', "_")),
            &format!("/../kubepods/pod{UID}"),
            "/kubepods/burstable/podx",
            &format!("/kubepods/burstable/xpod{UID}"),
            "/kubepods/burstable/pod0123abcd000040008000000000000ff",
        ] {
            assert_eq!(pod(path), None, "{path}");
        }
        // A pod that makes a cgroup with another pod's name below its own stays itself.
        let nested = format!("/kubepods/pod{UID}/container/kubepods/pod{other}");
        assert_eq!(pod(&nested).unwrap().0, UID);
    }

    /// A kubelet in a container of the node has pods, too.
    #[test]
    fn pods_of_another_kubelet_are_told_apart() {
        let under = UID.replace('-', "_");
        let pod = format!("kubepods/burstable/pod{UID}/program");
        let slice =
            format!("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{under}.slice/program.scope");
        let below = format!("kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{under}.slice/program.scope");
        let strange = |of: &str, own: &str| {
            let line = |path: &str| parse_cgroups(&format!("4:memory:/\n0::/{path}\n"));
            let (of, own) = (line(of), line(own));
            elsewhere(&of, &own).map(|(_, own)| own.display().to_string())
        };
        let own = "kubepods/besteffort/pod11111111-0000-4000-8000-0000000000ff/daemon";
        for path in [pod.as_str(), &slice, "system.slice/some.service", ""] {
            assert_eq!(strange(path, own), None, "{path}");
        }
        for path in [format!("docker/4711/{pod}"), format!("lab-one/{slice}"), below.clone()] {
            assert_eq!(strange(&path, own).as_deref(), Some("/"), "{path}");
            assert_eq!(strange(&path, "init.scope"), None, "the daemon is in no pod");
            assert_eq!(strange(&path, &path), None);
        }
        assert_eq!(strange(&pod, &below).as_deref(), Some("/kubelet.slice"));
        // From a cgroup namespace of the daemon's own it is at the root, or beside it, and others are outside: no place is known.
        for own in ["", "..", &format!("../{own}")] {
            for path in [format!("../../{pod}"), format!("../../docker/4711/{pod}")] {
                assert_eq!(strange(&path, own), None, "{path}, {own}");
            }
        }
        // Of version 1 each hierarchy has its own paths: those of a node that is a container differ.
        let places = |path: &str| {
            parse_cgroups(&format!(
                "9:name=systemd:/docker/4711/docker/4711/{path}\n5:cpu,cpuacct:/docker/4711/{path}\n2:rdma:/\n0::/\n"
            ))
        };
        assert_eq!(elsewhere(&places(&pod), &places(own)), None);
        assert!(elsewhere(&parse_cgroups(&format!("5:cpu,cpuacct:/{pod}")), &places(own)).is_some());
        // In another hierarchy there is nothing to compare with.
        let (of, own) = (
            parse_cgroups(&format!("4:memory:/lab/{pod}")),
            parse_cgroups(&format!("0::/{own}")),
        );
        assert_eq!(elsewhere(&of, &own), None);
    }

    #[test]
    fn an_engine_is_found_where_its_pod_is() {
        let pod: SeatId = UID.parse().unwrap();
        let under = UID.replace('-', "_");
        for path in [
            format!("kubepods/burstable/pod{UID}"),
            format!("lab-one/kubepods/pod{UID}"),
            format!("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{under}.slice"),
            format!(
                "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{under}.slice"
            ),
        ] {
            let root = crate::testing::Folder::new("cgroups");
            let hierarchies = Hierarchies::at(root.path());
            assert!(!hierarchies.has_engine(pod), "{path}: no pod");
            let leaf = root.path().join(&path).join(LEAF);
            std::fs::create_dir_all(&leaf).unwrap();
            std::fs::create_dir_all(root.path().join("system.slice/some.service")).unwrap();
            assert!(!hierarchies.has_engine(pod), "{path}: nothing is known of it");
            std::fs::write(leaf.join("cgroup.procs"), "").unwrap();
            assert!(!hierarchies.has_engine(pod), "{path}: empty");
            std::fs::write(leaf.join("cgroup.procs"), "4711\n").unwrap();
            assert!(hierarchies.has_engine(pod), "{path}");
            assert!(!hierarchies.has_engine(SeatId(1)), "{path}: another pod's");
        }
    }

    /// Whatever the kernel refuses, and not only what it does not have.
    #[test]
    fn what_cant_be_looked_at_may_have_an_engine() {
        let pod: SeatId = UID.parse().unwrap();
        let root = crate::testing::Folder::new("cgroups");
        let hierarchies = Hierarchies::at(root.path());
        let leaf = root.path().join(format!("kubepods/pod{UID}")).join(LEAF);
        // Reading a folder is an error that says nothing of processes.
        std::fs::create_dir_all(leaf.join("cgroup.procs")).unwrap();
        assert!(hierarchies.has_engine(pod));
        std::fs::remove_dir(leaf.join("cgroup.procs")).unwrap();
        assert!(!hierarchies.has_engine(pod));
        assert!(!is_gone(&io::Error::from_raw_os_error(libc::EMFILE)));
        assert!(is_gone(&io::Error::from_raw_os_error(libc::ENODEV)));
        // No folder at all: this can't be listed.
        let file = root.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(Hierarchies::at(&file).has_engine(pod));
    }

    #[test]
    fn folders_are_found_in_mounted_hierarchies() {
        let hierarchies = Hierarchies::parse(
            "36 35 0:31 / /sys/fs/cgroup/cpu rw,nosuid shared:1 - cgroup cgroup rw,cpu,cpuacct\n\
             37 35 0:32 /part /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
             38 35 0:33 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate\n\
             39 35 0:34 / /proc rw - proc proc rw\n",
        );
        let folder = |controllers: &str, path: &str| {
            hierarchies.folder(&Cgroup {
                controllers: controllers.into(),
                path: path.into(),
            })
        };
        assert_eq!(folder("cpu,cpuacct", "/a/b"), Some("/sys/fs/cgroup/cpu/a/b".into()));
        assert_eq!(folder("memory", "/part/a"), Some("/sys/fs/cgroup/memory/a".into()));
        assert_eq!(folder("memory", "/elsewhere"), None);
        assert_eq!(folder("", "/a"), Some("/sys/fs/cgroup/unified/a".into()));
        assert_eq!(folder("pids", "/a"), None);
    }
}
