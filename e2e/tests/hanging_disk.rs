//! A seat's volume hangs for real: disk, journal and header are on a file system that is frozen, so that whoever writes there waits in the
//! kernel and can't be killed ([`ftvm_e2e::hosts::disk`]).
//!
//! One guest and one connection of its client through three acts: the standby's volume hangs, the active's, and that of an active which is
//! alone. The last one is the control: nobody else can do what its disk does not, so no write is answered before the disk goes on.
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use ftvm_e2e::bench::client::GuestClient;
use ftvm_e2e::demo::programs::{self, Profile, Programs};
use ftvm_e2e::demo::standalone::Standalone;
use ftvm_e2e::demo::system::{Role, System};
use ftvm_e2e::demo::{GUEST_MAC, Options};
use ftvm_e2e::guest_protocol::Op;
use ftvm_e2e::hosts::disk::{Volume, take_blocks};
use ftvm_e2e::hosts::outer::{Outer, enter, made_outside, test_inside};
use ftvm_e2e::hosts::{Host, Lab, ProcessInfo, thaw};
use ftvm_e2e::judge::client::Judge;
use ftvm_e2e::judge::sniffer::Sniffer;
use ftvm_e2e::scene::{self, PATIENCE};

const TEST: &str = "a_disk_that_hangs_costs_no_answer";
/// Room for a disk and a journal of 64 MiB each.
const VOLUME_MIB: u64 = 192;
/// A request of a disk that is under way for longer hangs. More than what a busy machine's disk takes.
const HANGS_AFTER_MS: u64 = 6_000;
const HANGS_AFTER: Duration = Duration::from_millis(HANGS_AFTER_MS);
/// Likewise for a standby that acknowledges nothing.
const ACK_STALL_MS: u64 = 6_000;
/// What a test ends with that is gone without a word.
const GONE: i32 = 77;
/// `exit_code::STORAGE`.
const STORAGE: u64 = 21;

type Scene = scene::Scene<Judge>;

/// Whoever ends this test, its volumes are thawed.
fn guard() -> PathBuf {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("hanging-disk-guard.json");
    made_outside(&file, || thaw::guard(TEST)).expect("a guard")
}

/// Built before the namespaces are entered: there is no network in them.
fn built() -> Programs {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("hanging-disk.json");
    made_outside(&file, || programs::build(Profile::Dev)).expect("the programs build")
}

/// Before the hosts are made: they see what is mounted then.
fn volume(name: &str, guard: &Path) -> Volume {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("hanging-volumes");
    Volume::mount(&folder.join(name), VOLUME_MIB, guard).expect("a volume")
}

fn start(programs: &Programs, volumes: &[Volume; 2]) -> Scene {
    let timing = serde_json::json!({
        // A host that is busy for a while must not count as dead.
        "peer_lost_ms": 3_000,
        "ack_stall_ms": ACK_STALL_MS,
        "disk_hang_ms": HANGS_AFTER_MS,
    });
    let prepare = |_: &Lab, system: Standalone| {
        let [first, second] = volumes;
        let system = system.with_timing(timing);
        system.with_volume(0, first.folder()).with_volume(1, second.folder())
    };
    Scene::new(
        (env!("CARGO_TARGET_TMPDIR"), "hanging"),
        programs,
        &Options::default(),
        prepare,
        |lab| scene::judge(lab, PATIENCE),
    )
}

/// The one engine of a host.
fn engine(scene: &Scene, host: usize) -> ProcessInfo {
    let found = scene.lab.host(host).processes_named("ftvm-engine");
    match found.expect("processes are there").as_slice() {
        [engine] => engine.clone(),
        others => panic!("not one engine: {others:?}"),
    }
}

fn expect_stuck(engine: &ProcessInfo) {
    let waiting = engine.uninterruptible();
    println!("wait in the kernel, uninterruptibly: {waiting:?}");
    assert!(engine.is_there() && !waiting.is_empty(), "the disk does not hang");
}

/// An engine that was to end, and could not, is gone once its disk goes on; then the next one is a standby as good as any.
fn expect_rebuilt(scene: &mut Scene, engine: &ProcessInfo, active: usize, standby: usize) {
    scene.wait_for("end of the engine whose disk hung", |_| !engine.is_there());
    scene.wait_for_protection(active);
    let answer = scene.client.ask(Op::Verify, 0, 0).expect("the guest answers");
    assert_eq!((answer.memory_errors, answer.journal_errors, answer.boots), (0, 0, 1));
    let compared = scene.system.compare_sides(active, standby);
    compared.expect("both sides are equal");
    scene.client.go_on();
    scene.wait_for_answers();
}

/// Waits until this host's seat is active and nobody protects it.
fn wait_for_loss(scene: &mut Scene, active: usize) {
    scene.wait_for("loss of protection", |scene| {
        let seat = scene.system.seat(active);
        seat.is_some_and(|seat| seat.role == Role::Active && !seat.protected)
    });
}

/// Host 1 is the standby: without its acknowledgments nothing leaves, so it is ejected, and the guest goes on without protection.
fn standby_hangs(scene: &mut Scene, volume: &Volume) {
    let (engine, began) = (engine(scene, 1), Instant::now());
    let hanging = volume.hang().expect("it is frozen");
    wait_for_loss(scene, 0);
    println!("the standby is ejected after {:?}", began.elapsed());
    scene.wait_for_answers();
    let why = scene.seat(0).why;
    assert!(why.contains("its storage hangs"), "{why}");
    // Nobody follows with a volume that hangs, however long that takes.
    expect_stuck(&engine);
    assert!(!scene.seat(0).protected);
    drop(hanging);
    expect_rebuilt(scene, &engine, 0, 1);
}

/// Host 0 is the active: the guest goes to the other side by itself, which does what was under way, and the source does not follow.
fn active_hangs(scene: &mut Scene, volume: &Volume) {
    let (engine, began) = (engine(scene, 0), Instant::now());
    let hanging = volume.hang().expect("it is frozen");
    scene.wait_for_active(1);
    let moved = began.elapsed();
    println!("the guest moved after {moved:?}");
    assert!(moved >= HANGS_AFTER, "it moved for another reason");
    scene.wait_for_answers();
    wait_for_loss(scene, 1);
    expect_stuck(&engine);
    let source = scene.system.seat(0);
    assert!(
        source.as_ref().is_none_or(|seat| seat.role != Role::Standby),
        "{source:?}"
    );
    drop(hanging);
    let mut code = None;
    scene.wait_for("report of its end", |scene| {
        code = scene.system.last_exit_code(0);
        code.is_some()
    });
    assert_eq!(code, Some(STORAGE), "it ended because of its disk");
    expect_rebuilt(scene, &engine, 1, 0);
}

/// Host 1 is alone: its guest waits for the disk, and notices nothing but that.
fn alone_it_waits(scene: &mut Scene, volume: &Volume) {
    scene.lab.host(0).kill().expect("it runs");
    wait_for_loss(scene, 1);
    scene.wait_for_answers();
    let entrance = scene.lab.client_entrance().expect("where clients stand");
    let mut other = GuestClient::connect_from(entrance, scene::guest(), PATIENCE).expect("the guest answers");
    let engine = engine(scene, 1);
    let hanging = volume.hang().expect("it is frozen");
    scene.wait_for("client that waits", |scene| scene.client.waiting() > HANGS_AFTER);
    let answers = scene.client.answers();
    scene.wait_for("word of the disk", |scene| {
        scene.system.seat(1).is_some_and(|seat| seat.why.contains("disk 0"))
    });
    // The guest runs, and answers what needs no disk.
    let [before, after] = [(), ()].map(|()| other.status().expect("an answer"));
    assert!(after.guest_time_ns > before.guest_time_ns);
    assert_eq!((after.journal_errors, after.boots), (0, 1));
    expect_stuck(&engine);
    assert_eq!(
        scene.client.answers(),
        answers,
        "a write was answered that is not on the disk"
    );
    drop(hanging);
    scene.wait_for_answers();
    scene.wait_for("disk that works again", |scene| {
        let seat = scene.system.seat(1);
        seat.is_some_and(|seat| seat.role == Role::Active && !seat.why.contains("disk 0"))
    });
    let answer = scene.client.ask(Op::Verify, 0, 0).expect("the guest answers");
    assert_eq!((answer.memory_errors, answer.journal_errors, answer.boots), (0, 0, 1));
}

#[test]
fn a_disk_that_hangs_costs_no_answer() {
    // First of all: the guard is this program, too.
    let guard = guard();
    let _turn = scene::turn();
    let programs = built();
    test_inside(TEST, || {
        let volumes = ["h1", "h2"].map(|host| volume(host, &guard));
        let mut scene = start(&programs, &volumes);
        scene.wait_for_protection(0);
        let ports = scene.lab.hosts().iter().map(Host::client_port).collect();
        let sniffer = Sniffer::start(GUEST_MAC, ports).expect("a sniffer");
        scene.calm();
        standby_hangs(&mut scene, &volumes[1]);
        active_hangs(&mut scene, &volumes[0]);
        alone_it_waits(&mut scene, &volumes[1]);
        let emissions = sniffer.emissions().report().clone();
        assert_eq!((emissions.violations(), emissions.handovers), (0, 1), "{emissions:?}");
        assert_eq!(sniffer.finish().expect("it listened"), 0, "frames that nobody saw");
        scene.expect_clean();
    });
}

/// What other plays strike datastores with (`long_disks.rs`).
#[test]
fn a_volume_is_full_and_fails_when_it_is_told_to() {
    let guard = guard();
    let _turn = scene::turn();
    test_inside("a_volume_is_full_and_fails_when_it_is_told_to", || {
        let volume = volume("struck", &guard);
        let path = volume.folder().join("file");
        let file = File::create(&path).expect("a file");
        let write = |byte: u8, at: u64| file.write_all_at(&[byte; 4096], at).and_then(|()| file.sync_all());
        write(1, 0).expect("there is room");
        let full = volume.fill().expect("it is filled");
        write(2, 0).expect("its block is its own");
        let kind = |error: std::io::Error| error.kind();
        assert_eq!(write(3, 1 << 20).map_err(kind), Err(ErrorKind::StorageFull));
        take_blocks(&path).expect("they are taken");
        full.take_more().expect("it is filled again");
        assert_eq!(write(4, 0).map_err(kind), Err(ErrorKind::StorageFull));
        drop(full);
        write(5, 0).expect("there is room again");
        volume.fail().expect("it takes the order");
        let failed = write(6, 0).map_err(|error| error.raw_os_error());
        assert_eq!(failed, Err(Some(libc::EIO)));
    });
}

/// Whoever froze a volume ends without a word, and somebody waits for it who can't be killed: the namespaces end all the same.
#[test]
fn a_test_that_is_gone_leaves_nothing_frozen() {
    let guard = guard();
    let _turn = scene::turn();
    let test = "a_test_that_is_gone_leaves_nothing_frozen";
    let arguments = ["--exact", test, "--nocapture", "--test-threads=1"];
    match enter(&arguments).expect("namespaces") {
        Outer::Inside => {
            let volume = volume("gone", &guard);
            std::mem::forget(volume.hang().expect("it is frozen"));
            let mut writer = Command::new("touch");
            let mut writer = writer.arg(volume.folder().join("file")).spawn().expect("it starts");
            let process = ProcessInfo::of(writer.id().cast_signed()).expect("it is there");
            std::thread::spawn(move || writer.wait());
            let deadline = Instant::now() + PATIENCE;
            // Whoever reads its program from a disk waits like that too, but not for long.
            let mut looks = 0;
            while looks < 100 {
                assert!(Instant::now() < deadline, "it does not wait");
                looks = if process.uninterruptible().is_empty() {
                    0
                } else {
                    looks + 1
                };
                std::thread::sleep(Duration::from_millis(1));
            }
            std::process::exit(GONE);
        }
        Outer::Ended(status) => assert_eq!(status.code(), Some(GONE)),
    }
}
