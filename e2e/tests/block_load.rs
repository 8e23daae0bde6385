//! What the block loads of the benchmark read is what they wrote, or they fail: on the real disk of a real pair.
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ftvm_e2e::bench::pair::Pair;
use ftvm_e2e::bench::{Options, block};
use ftvm_e2e::demo::programs::{Profile, Programs, build};
use ftvm_e2e::guest_blocks::{AREA_OFFSET, BLOCK_MAX_BYTES, BlockLoad, UNIT_BYTES};
use ftvm_e2e::hosts::outer::{made_outside, test_inside};
use ftvm_e2e::report::Progress;

/// Built before the namespaces are entered: there is no network in them.
fn built() -> Programs {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("block-load.json");
    made_outside(&file, || build(Profile::Dev)).expect("the programs build")
}

/// What a disk holds from there on.
fn look(disk: &File, at: u64, bytes: usize) -> Vec<u8> {
    let mut found = vec![0; bytes];
    disk.read_exact_at(&mut found, at).expect("inside the disk");
    found
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
        let path = pair.disk(pair.active());
        let disk = File::options().read(true).write(true).open(path);
        let disk = disk.expect("the seat's disk");
        let [older, flipped] = [7, 1234].map(|unit| AREA_OFFSET + unit * UNIT_BYTES as u64);
        let old = look(&disk, older, UNIT_BYTES);
        // The first block of the area once more.
        let rewrite = BlockLoad {
            writes: true,
            random: false,
            block_bytes: BLOCK_MAX_BYTES as u32,
            depth: 1,
            flush_every: 0,
            limit_ms: 0,
            limit_requests: 1,
        };
        let rewritten = pair.blocks(rewrite).expect("the load is taken");
        assert_eq!((rewritten.requests, rewritten.failed), (1, 0));
        let standby = pair.standby().expect("it is protected");
        pair.compare(standby).expect("the standby's disk has it all, too");

        let (new, byte) = (look(&disk, older, UNIT_BYTES), look(&disk, flipped + 777, 1));
        let put = |at: u64, bytes: &[u8]| disk.write_all_at(bytes, at).expect("inside the disk");
        put(older, &old);
        put(flipped + 777, &[byte[0] ^ 0x10]);
        let said = block::read_back(&mut pair).unwrap_err().to_string();
        let wrong = format!(
            "2 pieces of {UNIT_BYTES} bytes have other bytes than it wrote, the first one {} bytes",
            7 * UNIT_BYTES
        );
        assert!(said.contains(&wrong), "an older write and a flipped bit: {said}");
        put(older, &new);
        put(flipped + 777, &byte);
        block::read_back(&mut pair).expect("mended");
        pair.check(3).expect("neither journal nor memory suffered");
    });
}
