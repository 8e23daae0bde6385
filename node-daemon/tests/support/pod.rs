//! What kubelet makes of a pod, as far as a daemon sees it: cgroups called `kubepods/.../podUID`, a network namespace, volumes.

use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ftvm_engine::control::Command as EngineCommand;
use ftvm_node_daemon::api::{Request, Response, SeatStatus};
use ftvm_node_daemon::arbiter::FileArbiter;
use ftvm_node_daemon::client;
use ftvm_node_daemon::identity::SeatIdentity;
use ftvm_node_daemon::random;
use ftvm_protocol::identity::{SeatId, VmId};
use ftvm_protocol::record::{Phase, Record};
use serde_json::json;

use super::{PATIENCE, test_engine, write_identity};

/// Size of the one disk.
pub const DISK_BYTES: u64 = 8 << 20;
/// First contents of the guest image's disk.
pub const CONTENTS: &[u8] = b"what the guest image has";

/// A pod with a daemon beside it.
pub struct Pod {
    pub folder: PathBuf,
    pub uid: SeatId,
    pub vm_id: VmId,
    /// The pod's cgroup in every hierarchy.
    pub cgroups: Vec<PathBuf>,
    pub daemon: Option<Child>,
    pub seat: Option<Child>,
    /// The guest's network cards, as the daemon's configuration has them.
    pub nics: serde_json::Value,
    /// Bridges that guests may be connected to.
    pub allowed_bridges: Vec<String>,
    /// Makes the node's network devices, in a network namespace of the daemon's own.
    pub devices: String,
    /// The file of the guest image with the first contents.
    pub image: String,
    /// Those of the files there that it is the difference from.
    pub backing: Vec<String>,
    namespace: Child,
}

impl Pod {
    pub fn new() -> Pod {
        Pod::with_image("/disk/root.raw")
    }

    /// With this file of the guest image as first contents.
    pub fn with_image(image: &str) -> Pod {
        let folder = std::env::temp_dir().join(format!("ftvm-pod-{:x}", random::nonzero_u64()));
        // A UUID as kubelet would write it.
        let uid = SeatId(random::u128());
        let namespace = make_network();
        let pod = Pod {
            cgroups: make_cgroups(uid, &folder),
            folder,
            uid,
            vm_id: VmId(random::u128()),
            daemon: None,
            seat: None,
            nics: json!([]),
            allowed_bridges: Vec::new(),
            devices: "ip link set lo up".into(),
            image: image.to_owned(),
            backing: Vec::new(),
            namespace,
        };
        pod.make_volumes();
        pod
    }

    /// The pod's sandbox dies and is made anew: programs are started in another network from now on. Those that run keep theirs.
    pub fn renew_network(&mut self) {
        let mut former = std::mem::replace(&mut self.namespace, make_network());
        former.kill().unwrap();
        former.wait().unwrap();
    }

    /// The network namespace that programs of the pod are started in.
    pub fn network(&self) -> u64 {
        network_of(self.namespace.id().cast_signed())
    }

    /// The container's root as the seat's program sees it.
    pub fn root(&self) -> PathBuf {
        self.folder.join("root")
    }

    pub fn disk(&self, file: &str) -> PathBuf {
        self.root().join("disks/root").join(file)
    }

    fn make_volumes(&self) {
        for folder in ["disks/root", "guest/boot", "guest/disk", "dev/shm", "run", "staging"] {
            std::fs::create_dir_all(self.root().join(folder)).unwrap();
        }
        std::fs::create_dir_all(self.folder.join("run")).unwrap();
        std::os::unix::fs::symlink(self.folder.join("run"), self.root().join("run/ftvm")).unwrap();
        std::fs::write(self.root().join("guest/boot/vmlinuz"), b"\x7fELF and so on").unwrap();
        std::fs::write(self.root().join("guest/boot/initrd"), b"an initrd").unwrap();
        std::fs::write(self.root().join("guest/disk/root.raw"), CONTENTS).unwrap();
        let who = SeatIdentity {
            vm: "vm".into(),
            vm_id: self.vm_id,
            seat: "vm-a".into(),
            seat_id: self.uid,
            seats: [("vm-a".to_owned(), self.uid)].into(),
        };
        write_identity(&self.root().join("identity"), &who);
    }

    /// What the API server would say of this node's pods.
    fn write_pods(&self) {
        let pods = json!([{
            "uid": self.uid,
            "vm_id": self.vm_id,
            "recipe": {
                "kernel": "/boot/vmlinuz",
                "disks": [{"name": "root", "sizeBytes": DISK_BYTES, "original": false,
                    "source": {"place": {"kind": "image", "path": self.image, "backing": self.backing}}}],
            },
            "seat": {
                "vm": "vm", "seat": "vm-a", "identity": "/identity",
                "machine": {"memory_mib": 64, "vcpus": 1},
                "boot": {"kernel": "/guest/boot/vmlinuz"},
                "disks": [{"name": "root", "path": "/disks/root/disk.raw", "size_mib": DISK_BYTES >> 20}],
                "nics": self.nics,
                "link": {"listen": "127.0.0.1:7000"},
            },
        }]);
        std::fs::write(self.folder.join("pods.json"), pods.to_string()).unwrap();
    }

    /// The first record: this seat has the original disks.
    pub fn make_record(&self) {
        let arbiter = FileArbiter::new(self.folder.join("arbiter/vm"));
        arbiter.set_up(&Record::genesis(self.uid, Phase::Running)).unwrap();
    }

    pub fn start_daemon(&mut self) {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.folder.join("daemon.log"))
            .unwrap();
        self.write_pods();
        let script = format!("{} && exec \"$@\"", self.devices);
        let mut command = Command::new("unshare");
        command
            .args(["--net", "sh", "-c", &script, "sh"])
            .arg(test_engine().with_file_name("pod-daemon"))
            .arg(&self.folder)
            .arg(test_engine())
            .args(&self.allowed_bridges)
            .stderr(log)
            .stdout(Stdio::null());
        self.daemon = Some(command.spawn().unwrap());
        self.wait("the daemon answers", |pod| pod.status().map(drop));
    }

    /// What `ip` says of these devices of the node.
    pub fn links(&self, of: &[&str]) -> Vec<serde_json::Value> {
        let pid = self.daemon.as_ref().expect("a daemon").id().to_string();
        let mut command = Command::new("nsenter");
        command
            .args(["--net", "--target", &pid, "ip", "--json", "link", "show"])
            .args(of);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        // Nothing at all if there are none and a type is asked for.
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    /// Taps on this bridge of the node, with their MTUs.
    pub fn taps_on(&self, bridge: &str) -> Vec<(String, u64)> {
        let links = self.links(&["master", bridge, "type", "tun"]);
        let of = |link: &serde_json::Value| Some((link["ifname"].as_str()?.to_owned(), link["mtu"].as_u64()?));
        links.iter().filter_map(of).collect()
    }

    pub fn kill_daemon(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill().unwrap();
            daemon.wait().unwrap();
        }
    }

    /// A program in the pod's container: in its cgroups and network namespace.
    pub fn command(&self, program: &Path) -> Command {
        let procs: Vec<PathBuf> = self
            .cgroups
            .iter()
            .map(|pod| pod.join("container/cgroup.procs"))
            .collect();
        let network = std::fs::File::open(format!("/proc/{}/ns/net", self.namespace.id())).unwrap();
        let mut command = Command::new(program);
        let enter = move || {
            use std::os::fd::AsRawFd;
            for path in &procs {
                std::fs::write(path, "0")?;
            }
            // SAFETY: a system call on a descriptor that this closure owns.
            match unsafe { libc::setns(network.as_raw_fd(), libc::CLONE_NEWNET) } {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        };
        // SAFETY: the tests' own child; it allocates between fork and exec, which glibc allows.
        unsafe { command.pre_exec(enter) };
        command
    }

    pub fn start_seat(&mut self) {
        let log = |name: &str| {
            let path = self.folder.join(name);
            std::fs::OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .unwrap()
        };
        let mut command = self.command(Path::new(env!("CARGO_BIN_EXE_seat")));
        command.arg("--root").arg(self.root());
        self.seat = Some(command.stdout(log("seat.out")).stderr(log("seat.err")).spawn().unwrap());
    }

    pub fn seat_ready(&self) -> (bool, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_seat"));
        let output = command.arg("--root").arg(self.root()).arg("ready").output().unwrap();
        (
            output.status.success(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
        )
    }

    pub fn kill_seat(&mut self) {
        if let Some(mut seat) = self.seat.take() {
            seat.kill().unwrap();
            seat.wait().unwrap();
        }
    }

    /// What the daemon logged so far.
    pub fn daemon_log(&self) -> String {
        std::fs::read_to_string(self.folder.join("daemon.log")).unwrap_or_default()
    }

    /// Tells the test engine what to do.
    pub fn script(&self, text: &str) {
        let command = EngineCommand::ConsoleInput { bytes: text.into() };
        let (vm, seat) = ("vm".to_owned(), "vm-a".to_owned());
        let answer = self.ask(&Request::Command { vm, seat, command });
        // An engine that is told to end may do so before its reply is read.
        assert!(
            matches!(answer, Some(Response::Reply { .. } | Response::Refused { .. })),
            "{answer:?}"
        );
    }

    /// Everything up to a running engine.
    pub fn start(&mut self) -> SeatStatus {
        self.make_record();
        self.start_daemon();
        self.start_seat();
        self.wait_running()
    }

    pub fn wait_running(&mut self) -> SeatStatus {
        self.wait("the engine answers", |pod| {
            pod.status().filter(|seat| seat.engine.is_some())
        })
    }

    pub fn ask(&self, request: &Request) -> Option<Response> {
        client::ask(&self.folder.join("daemon.sock"), request, PATIENCE).ok()
    }

    pub fn status(&self) -> Option<SeatStatus> {
        match self.ask(&Request::Status)? {
            Response::Status(status) => status.seats.into_iter().next(),
            other => panic!("{other:?}"),
        }
    }

    pub fn wait<T>(&mut self, what: &str, probe: impl Fn(&Pod) -> Option<T>) -> T {
        let begun = Instant::now();
        loop {
            if let Some(found) = probe(self) {
                return found;
            }
            if begun.elapsed() > PATIENCE {
                let log = |name| std::fs::read_to_string(self.folder.join(name)).unwrap_or_default();
                let (daemon, seat) = (log("daemon.log"), log("seat.err"));
                panic!(
                    "waited in vain until {what}; {:#?}\ndaemon:\n{daemon}\nseat:\n{seat}",
                    self.status()
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Processes in the pod's cgroups, by the leaf that they are in; one set of them a hierarchy.
    pub fn processes(&self, leaf: &str) -> Vec<Vec<i32>> {
        let read = |pod: &PathBuf| {
            let text = std::fs::read_to_string(pod.join(leaf).join("cgroup.procs")).unwrap_or_default();
            text.lines().filter_map(|line| line.parse().ok()).collect()
        };
        self.cgroups.iter().map(read).collect()
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.kill_daemon();
        self.kill_seat();
        self.namespace.kill().unwrap();
        self.namespace.wait().unwrap();
        for leaf in ["ftvm-engine", "container"] {
            for pid in self.processes(leaf).into_iter().flatten() {
                // SAFETY: a process in a cgroup that this test made.
                unsafe { libc::kill(pid, libc::SIGKILL) };
            }
        }
        for pod in &self.cgroups {
            remove_cgroups(pod);
        }
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// The network namespace of a process.
pub fn network_of(pid: i32) -> u64 {
    std::fs::metadata(format!("/proc/{pid}/ns/net")).unwrap().ino()
}

/// A process that keeps a network namespace, once it has it.
fn make_network() -> Child {
    let keeper = Command::new("unshare")
        .args(["--net", "sh", "-c", "ip link set lo up && exec sleep 1000000"])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    let own = network_of(std::process::id().cast_signed());
    while network_of(keeper.id().cast_signed()) == own {
        assert!(begun.elapsed() < PATIENCE, "no network namespace");
        std::thread::sleep(Duration::from_millis(1));
    }
    keeper
}

/// `/NAME/kubepods/burstable/podUID/container` in every hierarchy, as the cgroupfs driver makes it.
fn make_cgroups(uid: SeatId, folder: &Path) -> Vec<PathBuf> {
    let name = folder.file_name().unwrap();
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let points = text.lines().filter(|line| line.contains(" - cgroup"));
    let points = points.map(|line| PathBuf::from(line.split(' ').nth(4).unwrap()));
    points
        .map(|point| {
            let mut path = point;
            for part in [
                name.to_str().unwrap(),
                "kubepods",
                "burstable",
                &format!("pod{uid}"),
                "container",
            ] {
                let parent = path.clone();
                path.push(part);
                std::fs::create_dir(&path).unwrap();
                for file in ["cpuset.cpus", "cpuset.mems"] {
                    if path.join(file).exists() && path.join("cgroup.clone_children").exists() {
                        std::fs::write(path.join(file), std::fs::read(parent.join(file)).unwrap()).unwrap();
                    }
                }
            }
            path.pop();
            path
        })
        .collect()
}

fn remove_cgroups(pod: &Path) {
    let begun = Instant::now();
    for leaf in ["ftvm-engine", "container"] {
        // Killed processes leave their cgroup a moment later.
        while std::fs::remove_dir(pod.join(leaf)).is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
            && begun.elapsed() < PATIENCE
        {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    for folder in pod.ancestors().take(4) {
        let _ = std::fs::remove_dir(folder);
    }
}
