//! What the block loads of the benchmark read is what they wrote, or they fail: on the real disk of a real pair.
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ftvm_e2e::bench::pair::Pair;
use ftvm_e2e::bench::{Options, block};
use ftvm_e2e::demo::programs::{Profile, Programs, build};
use ftvm_e2e::guest_blocks::{AREA_OFFSET, UNIT_BYTES};
use ftvm_e2e::hosts::outer::{made_outside, test_inside};
use ftvm_e2e::report::Progress;

/// Built before the namespaces are entered: there is no network in them.
fn built() -> Programs {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("block-load.json");
    made_outside(&file, || build(Profile::Dev)).expect("the programs build")
}

/// Writes these bytes over what is on a disk from there on; returns what was there.
fn exchange(disk: &Path, at: u64, bytes: &[u8]) -> Vec<u8> {
    let file = File::options()
        .read(true)
        .write(true)
        .open(disk)
        .expect("the seat's disk");
    let mut before = vec![0; bytes.len()];
    file.read_exact_at(&mut before, at).expect("inside the disk");
    file.write_all_at(bytes, at).expect("inside the disk");
    before
}

/// The negative control of what the block loads find: one wrong bit, and a write that never came to be, behind the guest's back.
#[test]
fn a_disk_that_brings_other_bytes_than_were_written_is_found() {
    let programs = built();
    test_inside("a_disk_that_brings_other_bytes_than_were_written_is_found", || {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("byte");
        std::fs::remove_dir_all(&folder).ok();
        std::fs::create_dir_all(&folder).expect("the target folder is writable");
        let progress = Progress::new();
        let mut pair = Pair::start(&Options::short(), &programs, &folder, &progress).expect("a protected pair");
        pair.append(3).expect("the journal works");
        block::write_all(&mut pair).expect("the area is written");
        block::read_back(&mut pair).expect("what was written is there");
        let standby = pair.standby().expect("it is protected");
        pair.compare(standby).expect("the standby's disk has it, too");

        let disk = pair.disk(pair.active());
        let place = AREA_OFFSET + 1234 * UNIT_BYTES as u64;
        let found = |pair: &mut Pair<'_>| block::read_back(pair).unwrap_err().to_string();
        let wrong = "1 pieces of 4096 bytes have other bytes than it wrote";
        let byte = exchange(&disk, place + 777, &[0]);
        exchange(&disk, place + 777, &[byte[0] ^ 0x10]);
        let said = found(&mut pair);
        assert!(
            said.contains(wrong) && said.contains(&(1234 * UNIT_BYTES).to_string()),
            "{said}"
        );
        exchange(&disk, place + 777, &byte);
        block::read_back(&mut pair).expect("mended");

        let old = exchange(&disk, place, &[0; UNIT_BYTES]);
        block::write_all(&mut pair).expect("the area is written again");
        let new = exchange(&disk, place, &old);
        let said = found(&mut pair);
        assert!(said.contains(wrong), "a write before the last: {said}");
        exchange(&disk, place, &new);
        block::read_back(&mut pair).expect("mended");
        pair.check(3).expect("neither journal nor memory suffered");
    });
}
