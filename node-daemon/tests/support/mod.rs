//! A daemon with a folder of its own, one seat, and an engine without a guest.

#![allow(dead_code)]

pub mod pod;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use ftvm_engine::control::{Command as EngineCommand, Reply};
use ftvm_node_daemon::api::{DaemonStatus, Request, Response, SeatStatus};
use ftvm_node_daemon::client;
use ftvm_node_daemon::config::Config;
use ftvm_node_daemon::identity::SeatIdentity;
use ftvm_node_daemon::random;
use ftvm_protocol::identity::{SeatId, VmId};

/// Long enough for a busy machine; nothing is judged by it.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The folder of a test with everything that a configuration names.
pub struct Node {
    pub folder: PathBuf,
    pub config: Config,
    pub daemon: Option<Child>,
    /// User of the daemon, for tests without root.
    pub user: Option<u32>,
}

/// The engine without a guest; built here, because cargo builds examples only when it runs all tests.
pub fn test_engine() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        // Build scripts look at these: they would be built anew for each caller.
        for (name, _) in std::env::vars_os() {
            if ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_"]
                .iter()
                .any(|word| name.to_string_lossy().starts_with(word))
            {
                cargo.env_remove(name);
            }
        }
        cargo.args([
            "build",
            "--quiet",
            "--package",
            "ftvm-node-daemon",
            "--example",
            "test-engine",
            "--example",
            "pod-daemon",
        ]);
        let status = cargo
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .stdin(Stdio::null())
            .status();
        assert!(
            status.expect("cargo starts").success(),
            "the test engine does not build"
        );
        let mut path = std::env::current_exe().unwrap();
        path.pop();
        path.pop();
        path.join("examples/test-engine")
    })
}

impl Node {
    /// One seat `vm/a` with a peer `b`; `change` edits the configuration before it is written.
    pub fn new(change: impl FnOnce(&mut Config)) -> Node {
        let folder = std::env::temp_dir().join(format!("ftvm-node-{:x}", random::nonzero_u64()));
        std::fs::create_dir_all(folder.join("arbiter")).unwrap();
        std::fs::write(folder.join("kernel"), b"\x7fELF and so on").unwrap();
        std::fs::File::create(folder.join("disk"))
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        let seats = [("a", SeatId(random::u128())), ("b", SeatId(random::u128()))];
        let vm_id = VmId(random::u128());
        for (name, seat_id) in seats {
            let seats = seats.iter().map(|(name, id)| ((*name).to_owned(), *id)).collect();
            let who = SeatIdentity {
                vm: "vm".into(),
                vm_id,
                seat: name.into(),
                seat_id,
                seats,
            };
            write_identity(&folder.join(name), &who);
        }
        let text = format!(
            "node: test\nstate_folder: {0}/state\ncontrol_socket: {0}/daemon.sock\nengine: {1}\n\
             arbiter: {{folder: {0}/arbiter}}\nseats:\n- vm: vm\n  seat: a\n  identity: {0}/a\n  original_disk: true\n\
             \x20 machine: {{memory_mib: 64, vcpus: 1}}\n  boot: {{kernel: {0}/kernel}}\n\
             \x20 disks: [{{name: root, path: {0}/disk}}]\n\
             \x20 link: {{listen: \"127.0.0.1:{2}\", peers: [{{seat: b, address: \"127.0.0.1:1\"}}]}}\n",
            folder.display(),
            test_engine().display(),
            free_port(),
        );
        let mut config = Config::parse(&text, Path::new("test")).unwrap();
        change(&mut config);
        let node = Node {
            folder,
            config,
            daemon: None,
            user: None,
        };
        node.write_config();
        node
    }

    pub fn config_path(&self) -> PathBuf {
        self.folder.join("config.yaml")
    }

    pub fn write_config(&self) {
        std::fs::write(self.config_path(), self.config.to_yaml()).unwrap();
    }

    pub fn command(&self, subcommand: &str) -> Command {
        let program = env!("CARGO_BIN_EXE_ftvm-node-daemon");
        let mut command = match self.user {
            None => Command::new(program),
            Some(user) => {
                // As that user, on a machine where everybody may use KVM: a mount namespace with another device node.
                let kvm = self.folder.join("kvm-device");
                let script = "mknod -m 666 $1 c 10 232 && mount --bind $1 /dev/kvm && shift && user=$1 && shift && \
                              exec setpriv --reuid $user --regid $user --clear-groups \"$@\"";
                let mut command = Command::new("unshare");
                command
                    .args(["--mount", "sh", "-c", script, "sh"])
                    .arg(kvm)
                    .arg(user.to_string())
                    .arg(program);
                command
            }
        };
        command.arg(subcommand).arg("--config").arg(self.config_path());
        command
    }

    /// Runs `check` to its end.
    pub fn check(&self) -> Output {
        self.command("check").output().unwrap()
    }

    /// Starts the daemon without waiting for anything.
    pub fn launch(&mut self) {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.folder.join("daemon.log"))
            .unwrap();
        self.daemon = Some(self.command("run").stderr(log).stdout(Stdio::null()).spawn().unwrap());
    }

    /// Starts the daemon and waits for its socket.
    pub fn start(&mut self) {
        self.launch();
        self.wait("the daemon answers", |node| node.try_ask(&Request::Status).map(drop));
    }

    /// Starts the daemon and its seat.
    pub fn start_seat(&mut self) -> SeatStatus {
        self.start();
        let response = self.ask(&Request::SetUp {
            vm: "vm".into(),
            seat: "a".into(),
        });
        assert!(matches!(response, Response::SetUp { .. }), "{response:?}");
        self.wait_running()
    }

    pub fn wait_running(&mut self) -> SeatStatus {
        self.wait("the engine answers", |node| {
            node.seat().filter(|seat| seat.engine.is_some())
        })
    }

    pub fn kill_daemon(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill().unwrap();
            daemon.wait().unwrap();
        }
    }

    pub fn terminate_daemon(&mut self) -> i32 {
        let mut daemon = self.daemon.take().unwrap();
        // SAFETY: signals a child that was not waited for.
        unsafe { libc::kill(daemon.id().cast_signed(), libc::SIGTERM) };
        daemon.wait().unwrap().code().unwrap()
    }

    pub fn try_ask(&self, request: &Request) -> Option<Response> {
        client::ask(&self.config.control_socket(), request, PATIENCE).ok()
    }

    pub fn ask(&self, request: &Request) -> Response {
        client::ask(&self.config.control_socket(), request, PATIENCE).unwrap()
    }

    pub fn status(&self) -> Option<DaemonStatus> {
        match self.try_ask(&Request::Status)? {
            Response::Status(status) => Some(*status),
            other => panic!("{other:?}"),
        }
    }

    /// The seat `vm/a`.
    pub fn seat(&self) -> Option<SeatStatus> {
        self.status()?.seats.into_iter().find(|seat| seat.seat == "a")
    }

    pub fn engine(&self, command: EngineCommand) -> Response {
        self.ask(&Request::Command {
            vm: "vm".into(),
            seat: "a".into(),
            command,
        })
    }

    /// Tells the test engine what to do.
    pub fn script(&self, text: &str) {
        let response = self.engine(EngineCommand::ConsoleInput { bytes: text.into() });
        // An engine that is told to end may do so before its reply is read.
        assert!(
            matches!(
                response,
                Response::Reply { reply: Reply::Ok } | Response::Refused { .. }
            ),
            "{response:?}"
        );
    }

    /// What the engine says of its last request, once it was answered.
    pub fn said(&mut self) -> String {
        self.wait("the engine says something", |node| {
            Some(node.seat()?.engine?.why).filter(|why| !why.is_empty())
        })
    }

    /// Waits until `probe` finds what it looks for.
    pub fn wait<T>(&mut self, what: &str, probe: impl Fn(&Node) -> Option<T>) -> T {
        let begun = Instant::now();
        loop {
            if let Some(found) = probe(self) {
                return found;
            }
            if begun.elapsed() > PATIENCE {
                let log = std::fs::read_to_string(self.folder.join("daemon.log")).unwrap_or_default();
                panic!("waited in vain until {what}; status {:#?}; log:\n{log}", self.seat());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Processes whose command line says that they are engines of this test's seat: those with this state folder's log.
    pub fn engine_pids(&self) -> Vec<i32> {
        let log = self.folder.join("state/seats/vm.a/engine.log");
        let is_ours = |pid: &i32| std::fs::read_link(format!("/proc/{pid}/fd/2")).is_ok_and(|link| link == log);
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        entries
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(is_ours)
            .collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill_daemon();
        for pid in self.engine_pids() {
            // SAFETY: a process that writes to this test's log, so one that this test started.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

pub fn write_identity(folder: &Path, who: &SeatIdentity) {
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("seat.json"), serde_json::to_vec(who).unwrap()).unwrap();
    for (name, kind) in [
        ("certificate", "CERTIFICATE"),
        ("authority", "CERTIFICATE"),
        ("key", "PRIVATE KEY"),
    ] {
        let text = format!("-----BEGIN {kind}-----\nAAAA\n-----END {kind}-----\n");
        std::fs::write(folder.join(format!("{name}.pem")), text).unwrap();
    }
}

pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}
