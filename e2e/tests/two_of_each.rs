//! A guest with two disks and two network cards through everything that happens to a pair: a standby that comes back, a planned
//! switchover, a host that dies.
//!
//! The guest keeps its journal on both disks, and each disk's says which one it is; each card has a client of its own, with one
//! connection, and books of its own in the guest. The negative control is a byte of the second disk that differs where no change is
//! known of: the comparison has to find it, and nothing else.
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use ftvm_e2e::demo::Options;
use ftvm_e2e::demo::programs::{self, Profile, Programs};
use ftvm_e2e::demo::standalone::{DISK_MIB, Standalone};
use ftvm_e2e::demo::system::System;
use ftvm_e2e::guest_journal::{Content, HEADER_SECTORS, Header, SECTOR_BYTES, capacity};
use ftvm_e2e::guest_protocol::Op;
use ftvm_e2e::hosts::Lab;
use ftvm_e2e::hosts::outer::{made_outside, test_inside};
use ftvm_e2e::judge::client::Judge;
use ftvm_e2e::scene::{self, ANSWERS, PATIENCE};

const TEST: &str = "two_disks_and_two_cards_survive_together";
const DISK_BYTES: u64 = DISK_MIB << 20;
/// The guest's journals are in front of this; nobody writes behind it.
const QUIET: u64 = 8 << 20;
/// Where somebody writes who should not.
const SPOILT: u64 = 40 << 20;

/// A client for each card.
type Scene = scene::Scene<[Judge; 2]>;

/// Built before the namespaces are entered: there is no network in them.
fn built() -> Programs {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("two-of-each.json");
    made_outside(&file, || programs::build(Profile::Dev)).expect("the programs build")
}

/// First contents of the original disks, no two the same.
fn fill(system: &Standalone) {
    for disk in 0..2 {
        let path = system.disk(0, disk);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a host's folder");
        let file = File::create(path).expect("an original disk");
        file.set_len(DISK_BYTES).expect("its size");
        file.write_all_at(&vec![0x51 + disk as u8; 1 << 20], QUIET)
            .expect("its contents");
    }
}

fn start(programs: &Programs) -> Scene {
    let options = Options {
        // Not what this is about, and a busy machine needs its time.
        peer_lost_ms: Some(3_000),
        memory_mib: 48,
        ..Options::default()
    };
    let prepare = |_: &Lab, system: Standalone| {
        let system = system.with_devices(2, 2);
        fill(&system);
        system
    };
    let clients = |lab: &Lab| [0, 1].map(|card| scene::judge_by(lab, card, PATIENCE));
    Scene::new(
        (env!("CARGO_TARGET_TMPDIR"), "two-of-each"),
        programs,
        &options,
        prepare,
        clients,
    )
}

/// Waits for answers by both cards to what is asked from now on.
fn wait_for_answers(scene: &mut Scene) {
    let goals = scene.client.each_ref().map(|client| client.answers() + ANSWERS);
    scene.wait_for("answers by both cards", |scene| {
        let mut clients = scene.client.iter().zip(goals);
        clients.all(|(client, goal)| client.answers() >= goal || client.has_ended())
    });
    for (card, client) in scene.client.iter().enumerate() {
        assert!(!client.has_ended(), "the client of card {card} gave up");
    }
}

/// Has the guest append so many records by each card, each of them durable on both disks when it answers.
fn write(scene: &Scene, records: u32) {
    for client in &scene.client {
        for _ in 0..records {
            client.ask(Op::Journal, 0, 0).expect("the guest answers");
        }
        client.go_on();
    }
}

/// The guest checks itself, with the journals on both disks; then both sides are compared while it is asked nothing.
fn compare(scene: &mut Scene, active: usize, standby: usize) -> anyhow::Result<()> {
    for client in &scene.client {
        let answer = client.ask(Op::Verify, 0, 0).expect("the guest answers");
        assert_eq!((answer.memory_errors, answer.journal_errors, answer.boots), (0, 0, 1));
    }
    let compared = scene.system.compare_sides(active, standby);
    scene.client.iter().for_each(Judge::go_on);
    compared
}

/// Each disk of a host has a journal of its own from the guest's one start.
fn expect_journals(scene: &Scene, host: usize) {
    for disk in 0..2 {
        let mut sector = [0; SECTOR_BYTES];
        let file = File::open(scene.system.disk(host, disk)).expect("a disk");
        // The header of boot 1.
        file.read_exact_at(&mut sector, SECTOR_BYTES as u64).expect("a sector");
        let expected = Header {
            boots: 1,
            capacity: capacity(DISK_BYTES / SECTOR_BYTES as u64),
            durable_seq: 0,
            disk: disk as u32,
        };
        assert_eq!(Header::decode(&sector), Content::Valid(expected), "disk {disk}");
        let records = HEADER_SECTORS * SECTOR_BYTES as u64;
        file.read_exact_at(&mut sector, records).expect("a sector");
        assert!(sector.iter().any(|byte| *byte != 0), "disk {disk} has no record");
    }
}

/// The standby's host is without power for a while. Changed blocks come of both disks, and no others: so a byte of the second one that
/// somebody changed meanwhile stays, which the comparison has to find.
fn standby_comes_back(scene: &mut Scene) {
    scene.lab.host(1).kill().expect("it runs");
    scene.wait_for("loss", |scene| scene.system.seat(0).is_some_and(|seat| !seat.protected));
    write(scene, 100);
    let second = scene.system.disk(1, 1);
    let second = File::options().write(true).open(second).expect("the second disk");
    second.write_all_at(&[1], SPOILT).expect("written");
    scene.lab.host(1).start().expect("it starts");
    scene.system.come_back(1, 0).expect("its daemon starts");
    scene.wait_for_protection(0);
    let seat = scene.seat(0);
    let counter = |name: &str| seat.counter(name).unwrap_or_else(|| panic!("no counter {name}"));
    let (copied, spared) = (counter("resync_disk_bytes"), counter("resync_spared_bytes"));
    println!("{copied} bytes of two disks copied, {spared} spared");
    assert_eq!(copied + spared, (2 * DISK_BYTES) as f64);
    // Both journals whole are 8 MiB.
    assert!(copied < DISK_BYTES as f64 / 4.0, "{copied} bytes");
    // Everything in front of it becomes equal once the standby has applied its journal.
    assert!(scene.client.iter().all(Judge::quiet), "a client gave up");
    let expected = format!("disk 1: the disks differ at byte {SPOILT} ");
    scene.wait_for("difference in that byte alone", |scene| {
        let compared = scene.system.compare_disks(0, 1, Duration::ZERO);
        compared.is_err_and(|error| format!("{error:#}").starts_with(&expected))
    });
    second.write_all_at(&[0], SPOILT).expect("written");
    compare(scene, 0, 1).expect("nothing else differs");
}

#[test]
fn two_disks_and_two_cards_survive_together() {
    let _turn = scene::turn();
    let programs = built();
    test_inside(TEST, || {
        let mut scene = start(&programs);
        scene.wait_for_protection(0);
        scene.client[0].ask(Op::SetChurn, 0, 0).expect("the guest answers");
        scene.client[0].go_on();
        write(&scene, 20);
        wait_for_answers(&mut scene);
        expect_journals(&scene, 0);
        compare(&mut scene, 0, 1).expect("both sides are equal after the first resync");
        standby_comes_back(&mut scene);
        // As planned.
        wait_for_answers(&mut scene);
        scene.system.hand_over(0).expect("it hands over");
        scene.wait_for_protection(1);
        wait_for_answers(&mut scene);
        compare(&mut scene, 1, 0).expect("both sides are equal after the switchover");
        // The active's host dies under load, and the spare one takes its place.
        wait_for_answers(&mut scene);
        scene.lab.host(1).kill().expect("it runs");
        scene.wait_for_active(0);
        wait_for_answers(&mut scene);
        scene.system.replace(1, 2).expect("ftvm starts");
        scene.wait_for_protection(0);
        assert_eq!(scene.system.trouble(), None);
        write(&scene, 20);
        compare(&mut scene, 0, 2).expect("both sides are equal after the failover");
        expect_journals(&scene, 2);
        for (card, client) in scene.client.into_iter().enumerate() {
            let outcome = scene::judgement(&scene.lab, client, card);
            let complaints = outcome.complaints();
            assert!(outcome.is_clean(), "card {card}: {:?}: {complaints:?}", outcome.end);
        }
    });
}
