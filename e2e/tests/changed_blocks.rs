//! A standby that was away for a while gets what changed of its disk, and not the disk; unless it is not the disk that it was.
//!
//! Nothing is judged by what the engines say alone: after each return both disks are compared, byte for byte.
use std::fs::File;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use ftvm_e2e::bench::client::GuestClient;
use ftvm_e2e::demo::programs::{Profile, Programs, build};
use ftvm_e2e::demo::standalone::{DISK, DISK_MIB, JOURNAL, Standalone};
use ftvm_e2e::demo::system::{Role, Seat, System};
use ftvm_e2e::demo::{GUEST_ADDRESS, Options};
use ftvm_e2e::guest_protocol::{DEFAULT_PORT, Op};
use ftvm_e2e::hosts::outer::{made_outside, test_inside};
use ftvm_e2e::hosts::{Lab, LabPlan};

/// Nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(120);
const DISK_BYTES: f64 = (DISK_MIB << 20) as f64;
/// The guest's journal is in front of this; nobody writes behind it.
const QUIET: u64 = 8 << 20;

/// Built before the namespaces are entered: there is no network in them.
fn built() -> Programs {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("changed-blocks.json");
    made_outside(&file, || build(Profile::Dev)).expect("the programs build")
}

/// Bytes that are nowhere the same, nor zero.
fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let words = (0..bytes as u64 / 8).map(|word| (word + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ seed);
    words.flat_map(u64::to_le_bytes).collect()
}

/// A protected guest whose standby goes and comes back.
struct Scene {
    lab: Rc<Lab>,
    system: Standalone,
    folder: PathBuf,
    client: GuestClient,
    active: usize,
    standby: usize,
    /// The term in which the standby went.
    gone_in: u64,
}

impl Scene {
    fn start(test: &str, programs: &Programs) -> Scene {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(test);
        std::fs::remove_dir_all(&folder).ok();
        std::fs::create_dir_all(&folder).expect("the target folder is writable");
        let lab = Rc::new(Lab::new(&LabPlan::three_hosts(&folder)).expect("hosts"));
        let first = folder.join(lab.host(0).name());
        std::fs::create_dir_all(&first).expect("a host's folder");
        let disk = File::create(first.join(DISK)).expect("the original disk");
        disk.set_len(DISK_MIB << 20).expect("its size");
        let contents = noise(1, (DISK_BYTES as u64 - QUIET) as usize);
        disk.write_all_at(&contents, QUIET).expect("its contents");
        // A host that is busy for a while must not count as dead.
        let timing = serde_json::json!({ "peer_lost_ms": 3000 });
        let mut system = Standalone::new(Rc::clone(&lab), programs, &folder, &Options::default()).with_timing(timing);
        system.start().expect("the pair starts");
        let guest = SocketAddr::from((GUEST_ADDRESS, DEFAULT_PORT));
        let entrance = lab.client_entrance().expect("where clients stand");
        let client = GuestClient::connect_from(entrance, guest, PATIENCE).expect("the guest answers");
        let mut scene = Scene {
            lab,
            system,
            folder,
            client,
            active: 0,
            standby: 1,
            gone_in: 0,
        };
        scene.wait(true);
        scene
    }

    /// Waits until the active says that it is protected, or not, in a later term than that in which the standby went.
    fn wait(&mut self, protected: bool) {
        let deadline = Instant::now() + PATIENCE;
        let gone_in = self.gone_in;
        let is_so = |seat: &Seat| seat.role == Role::Active && seat.protected == protected && seat.term > gone_in;
        while !self.system.seat(self.active).is_some_and(|seat| is_so(&seat)) {
            assert!(
                Instant::now() < deadline,
                "protected {protected} did not come about: {}",
                self.system.why(self.active)
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The guest appends so many records to its journal on the disk, each durable when it answers.
    fn write(&mut self, records: u32) {
        for _ in 0..records {
            self.client.ask(Op::Journal, 0, 0).expect("the guest answers");
        }
    }

    /// The active, which may have no time for an answer.
    fn seat(&mut self) -> Seat {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(seat) = self.system.seat(self.active) {
                return seat;
            }
            assert!(Instant::now() < deadline, "the active's engine does not answer");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn counter(&mut self, name: &str) -> f64 {
        let seat = self.seat();
        seat.counter(name).unwrap_or_else(|| panic!("no counter {name}"))
    }

    /// Bytes of disk that the last resync copied; the sides are equal after it.
    fn copied(&mut self) -> f64 {
        self.wait(true);
        let (copied, spared) = (self.counter("resync_disk_bytes"), self.counter("resync_spared_bytes"));
        assert_eq!(copied + spared, DISK_BYTES);
        self.system
            .compare_sides(self.active, self.standby)
            .expect("both sides are equal");
        copied
    }

    fn goes(&mut self) {
        self.gone_in = self.seat().term;
    }

    /// Kills the engine on a host, which its daemon starts again.
    fn kill_engine(&mut self, host: usize) {
        self.goes();
        self.lab.host(host).kill_program("ftvm-engine").expect("it runs");
    }

    /// Cuts the standby's host off the power.
    fn power_off(&mut self) {
        self.goes();
        self.lab.host(self.standby).kill().expect("it runs");
        self.wait(false);
    }

    fn power_on(&mut self) {
        self.lab.host(self.standby).start().expect("it starts");
        self.system
            .come_back(self.standby, self.active)
            .expect("its daemon starts");
    }

    fn file(&self, name: &str) -> File {
        let path = self.folder.join(self.lab.host(self.standby).name()).join(name);
        File::options()
            .read(true)
            .write(true)
            .open(path)
            .expect("the standby's file")
    }

    /// Somebody writes where the guest does not.
    fn spoil_disk(&self) {
        self.file(DISK)
            .write_all_at(&noise(7, 4096), 40 << 20)
            .expect("written");
    }
}

/// The journal's halves begin with a sector each that says whose changes they have (`engine/src/replication/journal/format.rs`).
fn rename_session(journal: &File) {
    let half = journal.metadata().expect("its size").len() / 2 / 4096 * 4096;
    let mut renamed = 0;
    for start in [0, half] {
        let mut sector = [0; 512];
        journal.read_exact_at(&mut sector, start).expect("a half");
        if &sector[..8] == b"FTVMJRN1" && sector[25] == 1 {
            sector[56] ^= 0x40;
            let checksum = crc32fast::hash(&sector[..508]);
            sector[508..].copy_from_slice(&checksum.to_le_bytes());
            journal.write_all_at(&sector, start).expect("written");
            renamed += 1;
        }
    }
    assert!(renamed > 0, "the journal names the session that the standby followed");
}

#[test]
fn a_standby_that_comes_back_gets_what_changed() {
    let programs = built();
    test_inside("a_standby_that_comes_back_gets_what_changed", || {
        let mut scene = Scene::start("changed", &programs);
        assert_eq!(scene.copied(), DISK_BYTES, "the first time it has nothing");
        scene.write(20);
        for _ in 0..2 {
            scene.kill_engine(scene.standby);
            scene.write(200);
            let copied = scene.copied();
            println!("engine killed: {copied} of {DISK_BYTES} bytes of disk copied");
            assert!(copied < DISK_BYTES / 10.0, "{copied} bytes");
        }
        scene.power_off();
        // A hundredth of the disk, while nobody is there to take it.
        scene.write(1280);
        scene.power_on();
        let copied = scene.copied();
        println!("host without power: {copied} of {DISK_BYTES} bytes of disk copied");
        assert!(copied >= DISK_BYTES / 100.0, "{copied} bytes");
        assert!(copied < DISK_BYTES / 10.0, "{copied} bytes");
        // After a planned switchover the other side leads. Its standby ran the guest, and is copied whole at its first return.
        scene.goes();
        scene.system.hand_over(scene.active).expect("it hands over");
        (scene.active, scene.standby) = (scene.standby, scene.active);
        scene.wait(true);
        scene.write(20);
        scene.kill_engine(scene.standby);
        scene.write(20);
        assert_eq!(scene.copied(), DISK_BYTES, "it ran the guest");
        scene.kill_engine(scene.standby);
        scene.write(20);
        let copied = scene.copied();
        println!("after a switchover: {copied} of {DISK_BYTES} bytes of disk copied");
        assert!(copied < DISK_BYTES / 10.0, "{copied} bytes");
    });
}

/// Each disk differs where no change is known of: only a whole copy makes the sides equal again.
#[test]
fn a_disk_that_is_not_what_it_was_is_copied_whole() {
    let programs = built();
    test_inside("a_disk_that_is_not_what_it_was_is_copied_whole", || {
        let mut scene = Scene::start("spoilt", &programs);
        scene.write(20);
        // Changed by hand, with a journal that says so.
        scene.power_off();
        scene.spoil_disk();
        rename_session(&scene.file(JOURNAL));
        scene.power_on();
        assert_eq!(scene.copied(), DISK_BYTES, "of another session");
        // Made anew under its old name, beside its old journal.
        scene.power_off();
        let disk = scene.folder.join(scene.lab.host(scene.standby).name()).join(DISK);
        std::fs::remove_file(disk).expect("it was there");
        scene.power_on();
        assert_eq!(scene.copied(), DISK_BYTES, "another disk");
        // It ran the guest, and its last writes may be known to nobody else.
        scene.kill_engine(scene.active);
        (scene.active, scene.standby) = (scene.standby, scene.active);
        assert_eq!(scene.copied(), DISK_BYTES, "a former active");
    });
}
