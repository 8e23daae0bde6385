//! A standby that joins a guest which writes memory as fast as it can: what it holds of the guest stays near the guest's memory.
use std::path::{Path, PathBuf};

use ftvm_e2e::bench::pair::Pair;
use ftvm_e2e::bench::{Load, Options, join};
use ftvm_e2e::demo::programs::{Profile, Programs, build};
use ftvm_e2e::hosts::outer::{made_outside, test_inside};
use ftvm_e2e::report::Progress;

/// The least for which a tenth is what the design promises, and as much as the benchmark's guest has. Pages may take three quarters of an epoch: of
/// two epochs of 51 MiB, and with some 24 MiB of the process itself, that is 98 % of a tenth. An epoch of a guest with 512 MiB may be 48 MiB as
/// well, so that a standby may have 1.2 times its memory, and had 1.10003 times on a slow machine (`engine/src/driver/limits.rs`).
const MEMORY_MIB: u32 = 1024;
/// All but the guest's own image, and the stacks beside it.
const WRITTEN_PAGES: u32 = (MEMORY_MIB - 24) << 8;

/// Built before the namespaces are entered: there is no network in them.
fn built() -> Programs {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bounded-join.json");
    made_outside(&file, || build(Profile::Dev)).expect("the programs build")
}

#[test]
fn a_joining_standby_holds_little_more_than_the_guests_memory() {
    let programs = built();
    test_inside("a_joining_standby_holds_little_more_than_the_guests_memory", || {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("join");
        std::fs::remove_dir_all(&folder).ok();
        std::fs::create_dir_all(&folder).expect("the target folder is writable");
        let options = Options {
            memory_mib: MEMORY_MIB,
            epoch_ms: 20,
            ..Options::short()
        };
        let progress = Progress::new();
        let mut pair = Pair::start(&options, &programs, &folder, &progress).expect("a protected pair");
        pair.fill(WRITTEN_PAGES.into()).expect("the guest fills its memory");
        pair.be_alone().expect("the standby dies");
        // More than any guest can write: every page, anew, every 20 ms.
        pair.load(Load::whole(WRITTEN_PAGES)).expect("the guest writes");
        let (standby, took) = pair.replace().expect("a standby joins although the guest writes");
        let memory = pair.engine_memory(standby).expect("it runs");
        let seat = pair.active_seat().expect("it runs");
        println!("protected after {took:?}: {memory:?}");
        let said = join::judge(&seat, &memory, u64::from(MEMORY_MIB) << 20).expect("a bounded join");
        println!("{said}");
        pair.load(Load::idle(0)).expect("the guest rests");
        pair.compare(standby).expect("both sides are equal");
    });
}
