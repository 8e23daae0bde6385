//! An engine without a guest, for this package's tests: it speaks the real control protocol and runs threads of every kind
//! under the real filters. What it does is told to it by console input. Not part of the product.

use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use ftvm_engine::control::{
    Answer, Ask, Command, CommandId, Endpoint, ExitReport, Handle, Hello, Input, Launch, Listener, PeerStatus, Reply,
    Role, Status, VERSION, inherited_connection, receive_launch,
};
use ftvm_engine::seccomp::{Filters, ThreadKind, install_handler};
use ftvm_protocol::core::{ReadOutcome, SwapOutcome};
use ftvm_protocol::identity::Nonce;
use ftvm_protocol::record::{Members, Phase, Record, Snapshot};

struct Engine {
    launch: Launch,
    handle: Handle,
    report: std::fs::File,
    /// What the last request brought.
    said: String,
    /// A phase to swap to once the record was read.
    swap_to: Option<Phase>,
    ending: bool,
}

fn main() {
    // SAFETY: first thing in the process; nobody else owns descriptor 3.
    let connection = unsafe { inherited_connection() }.expect("control socket");
    let (launch, mut fds) = match receive_launch(&connection) {
        Ok(launched) => launched,
        Err(error) => {
            eprintln!("test-engine: {error}");
            std::process::exit(24);
        }
    };
    let files = launch.files.clone();
    let mut held = vec![
        fds.take(files.kvm, "kvm"),
        fds.take(files.header, "header"),
        fds.take(files.journal, "journal"),
    ];
    held.push(fds.take(files.console, "console"));
    held.push(fds.take(launch.boot.kernel, "kernel"));
    held.push(fds.take(launch.link.listener, "link"));
    held.extend(files.userfaultfd.map(|fd| fds.take(fd, "userfaultfd")));
    held.extend(launch.boot.initrd.map(|fd| fds.take(fd, "initrd")));
    held.extend(launch.nics.iter().map(|nic| fds.take(nic.tap, "tap")));
    held.extend(launch.disks.iter().map(|disk| fds.take(disk.file, "disk")));
    let listener = Listener::from_fd(fds.take(files.control_listener, "control listener").unwrap());
    let report = fds.take(files.exit_report, "exit report").unwrap().into();
    let held: Vec<_> = held.into_iter().map(Result::unwrap).collect();
    fds.finish().expect("every descriptor is named");

    install_handler().unwrap();
    let filters = Filters::compile().unwrap();
    let (sender, inputs) = channel();
    let threads = start_threads(&filters);
    let hello = Hello {
        version: VERSION,
        engine: "test".into(),
        vm: launch.vm.clone(),
        seat: launch.seat.clone(),
        incarnation: launch.incarnation,
    };
    let sink = Box::new(move |input| sender.send(input).unwrap_or_default());
    let control = filters.clone();
    let enter = move || control.enter(ThreadKind::Control).unwrap();
    let endpoint = Endpoint::start(connection, listener, launch.daemon_uid, hello, sink, enter).unwrap();
    filters.enter(ThreadKind::Driver).unwrap();
    let handle = endpoint.handle();
    let mut engine = Engine {
        launch,
        handle,
        report,
        said: String::new(),
        swap_to: None,
        ending: false,
    };
    engine.run(&inputs);
    drop((threads, held));
}

/// A thread of every kind, under its filter, until the senders are dropped.
fn start_threads(filters: &Filters) -> Vec<Sender<()>> {
    let kinds = [
        ThreadKind::Vcpu,
        ThreadKind::Net,
        ThreadKind::Disk,
        ThreadKind::Link,
        ThreadKind::Worker,
    ];
    let start = |kind: ThreadKind| {
        let (sender, receiver) = channel::<()>();
        let (entered, ready) = channel();
        let filters = filters.clone();
        let thread = std::thread::Builder::new().name(format!("{kind:?}").to_lowercase());
        let work = move || {
            filters.enter(kind).unwrap();
            entered.send(()).unwrap();
            let _ = receiver.recv();
        };
        thread.spawn(work).unwrap();
        ready.recv().unwrap();
        sender
    };
    kinds.into_iter().map(start).collect()
}

impl Engine {
    fn run(&mut self, inputs: &Receiver<Input>) {
        for input in inputs {
            match input {
                Input::Command { id, command } => self.command(id, command),
                Input::Answer { answer, why, .. } => self.answer(answer, why),
                Input::DaemonConnected | Input::DaemonLost => {}
            }
        }
    }

    fn command(&mut self, id: CommandId, command: Command) {
        match command {
            Command::Status => return self.handle.reply(id, Reply::Status(Box::new(self.status()))),
            Command::ConsoleInput { bytes } => {
                let text = String::from_utf8_lossy(&bytes).into_owned();
                self.script(&text);
            }
            Command::Stop => {
                self.swap_to = Some(Phase::Stopped);
                self.ending = true;
                self.ask(Ask::ReadRecord);
            }
            Command::Start { .. } => {
                self.swap_to = Some(Phase::Running);
                self.ask(Ask::ReadRecord);
            }
            Command::SetPeers { peers, absent } => {
                self.launch.other_seats = peers.iter().map(|peer| peer.seat_id).chain(absent).collect();
                self.launch.link.peers = peers;
            }
            Command::SetProtection { protection } => self.launch.protection = protection,
            Command::PeerGone { incarnation, .. } => self.said = format!("gone {incarnation}"),
            Command::Leave { .. } | Command::Quit => self.exit(0),
            _ => {
                return self.handle.reply(
                    id,
                    Reply::Refused {
                        why: "a test engine has no guest".into(),
                    },
                );
            }
        }
        self.handle.reply(id, Reply::Ok);
    }

    fn script(&mut self, text: &str) {
        match text.split_once(' ').unwrap_or((text, "")) {
            ("exit", code) => self.exit(code.parse().unwrap()),
            ("vanish", code) => std::process::exit(code.parse().unwrap()),
            ("abort", _) => std::process::abort(),
            ("unlink", _) => drop(std::fs::remove_file("/x")),
            ("read", _) => self.ask(Ask::ReadRecord),
            ("swap", _) => {
                self.swap_to = Some(Phase::Running);
                self.ask(Ask::ReadRecord);
            }
            ("seats", _) => self.ask(Ask::AskSeats {
                seats: self.launch.other_seats.clone(),
            }),
            ("flood", _) => (0..100).for_each(|_| self.ask(Ask::ReadRecord)),
            (other, _) => panic!("unknown script {other}"),
        }
    }

    fn ask(&mut self, ask: Ask) {
        self.said.clear();
        self.handle.request(
            ask,
            Duration::from_millis(self.launch.timing.arbiter_deadline_ms.into()),
        );
    }

    fn answer(&mut self, answer: Answer, why: Option<String>) {
        if let Answer::Read(ReadOutcome::Found(snapshot)) = &answer
            && let Some(phase) = self.swap_to.take()
        {
            let ask = self.next(snapshot, phase);
            return self.ask(ask);
        }
        if self.ending && matches!(answer, Answer::Swap(SwapOutcome::Won(_))) {
            self.exit(0);
        }
        self.said = format!("{answer:?} {why:?}");
    }

    fn next(&self, snapshot: &Snapshot, phase: Phase) -> Ask {
        let (holder, term) = (self.launch.incarnation, snapshot.record.term + 1);
        let nonce = Nonce(u128::from(term) << 64 | u128::from(holder.start));
        let record = Record {
            holder,
            members: Members::one(holder),
            term,
            nonce,
            phase,
            ..snapshot.record.clone()
        };
        Ask::SwapRecord {
            uid: snapshot.uid,
            version: snapshot.version,
            record,
        }
    }

    fn exit(&self, code: u8) -> ! {
        let report = ExitReport {
            vm: self.launch.vm.clone(),
            seat: self.launch.seat.clone(),
            incarnation: self.launch.incarnation,
            code,
            role: Role::Ended,
            term: 0,
            message: format!("told to exit with {code}"),
            storage: Vec::new(),
        };
        self.report
            .write_all_at(&serde_json::to_vec(&report).unwrap(), 0)
            .unwrap();
        self.report.sync_all().unwrap();
        std::process::exit(code.into());
    }

    fn status(&self) -> Status {
        let launch = &self.launch;
        let peer = launch.link.peers.first().map(|peer| PeerStatus {
            seat: peer.seat.clone(),
            incarnation: None,
            address: peer.address,
            connected: false,
        });
        Status {
            vm: launch.vm.clone(),
            seat: launch.seat.clone(),
            incarnation: launch.incarnation,
            role: Role::Starting,
            holds_guest: true,
            protected: false,
            paused: false,
            leaving: false,
            unsettled: Some(false),
            standby: None,
            why: self.said.clone(),
            term: 0,
            holder: None,
            members: Vec::new(),
            epoch: 0,
            acknowledged: 0,
            peer,
            arbiter_reachable: true,
            arbiter_uid: None,
            vouches: None,
            resync_percent: None,
            failing_disks: Vec::new(),
            accepted_loss: None,
            code: 0,
            counters: [
                ("nic_mtus".to_owned(), launch.nics.iter().map(|nic| nic.mtu).collect()),
                (
                    "other_seats".to_owned(),
                    launch.other_seats.iter().map(ToString::to_string).collect(),
                ),
            ]
            .into_iter()
            .collect(),
        }
    }
}
