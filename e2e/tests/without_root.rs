//! The demonstration as an ordinary user: hosts below a user namespace, engines in the reduced jail, KVM by permission on its device.
//!
//! The test itself runs as root. It gives a user without groups a private view of `/dev` in which KVM and taps belong to that
//! user, as an administrator would by a group or an access list; the machine's own devices are left as they are.
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use ftvm_e2e::demo::programs::{self, Profile, Programs};
use ftvm_e2e::demo::{Fault, Options, command, prerequisites};
use ftvm_e2e::hosts::outer::{inside, test_inside};
use ftvm_e2e::report::{Progress, table};

const TEST: &str = "an_ordinary_user_sees_nothing_lost";
/// An ordinary user, without any group.
const USER: u32 = 65534;
/// Tells the ordinary user's run of the test where everything is.
const FOLDER: &str = "FTVM_TEST_WITHOUT_ROOT";

/// A folder of the user's, with the programs and this test in it: what root built may be closed to others.
fn folder_of_user() -> PathBuf {
    let folder = std::env::temp_dir().join(format!("ftvm-user-{}", std::process::id()));
    std::fs::create_dir_all(folder.join("play")).unwrap();
    let built = programs::build(Profile::Dev).expect("the programs build");
    let copy = |from: &Path, name: &str| {
        let to = folder.join(name);
        std::fs::copy(from, &to).unwrap();
        std::fs::set_permissions(&to, std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    for program in ["ftvm-engine", "ftvm-node-daemon", "ftvm"] {
        copy(&built.folder.join(program), program);
    }
    copy(&built.guest, "guest");
    copy(&std::env::current_exe().unwrap(), "test");
    for path in [folder.clone(), folder.join("play")] {
        chown(&path, Some(USER), Some(USER)).unwrap();
    }
    folder
}

/// Runs this test again as the user.
fn run_as_user() {
    let folder = folder_of_user();
    let script = format!(
        "set -e
        mkdir {folder}/dev; mount -t tmpfs none {folder}/dev
        mknod {folder}/dev/kvm c 10 232; mknod {folder}/dev/tun c 10 200
        chmod 600 {folder}/dev/*; chown {USER} {folder}/dev/*
        mount --bind {folder}/dev/kvm /dev/kvm; mount --bind {folder}/dev/tun /dev/net/tun
        exec setpriv --reuid {USER} --regid {USER} --clear-groups {folder}/test --exact {TEST} --nocapture",
        folder = folder.display()
    );
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-c", &script])
        .env(FOLDER, &folder)
        .env("HOME", &folder);
    let status = command.current_dir("/").stdin(Stdio::null()).status().unwrap();
    let play = folder.join("play");
    assert!(
        status.success(),
        "the ordinary user's run failed ({status}), see above; logs: {}",
        play.display()
    );
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn an_ordinary_user_sees_nothing_lost() {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else {
        return run_as_user();
    };
    if !inside() {
        let missing = prerequisites::missing_for_native(&mut |_| {});
        assert!(missing.is_empty(), "{missing:?}");
    }
    test_inside(TEST, || {
        let programs = Programs {
            guest: folder.join("guest"),
            folder: folder.clone(),
        };
        let options = Options {
            fault: Fault::KillEngine,
            rounds: 1,
            // Not what this is about, and a busy machine needs its time.
            peer_lost_ms: Some(3_000),
            ..Options::default()
        };
        let report = command::play(&options, &programs, &folder.join("play"), &Progress::new());
        println!("{}", table(&report, false));
        assert!(report.passed(), "{:#?}", report.complaints);
        let round = &report.per_round[0];
        assert!(round.examined, "{round:?}");
        assert!(report.answers > 100, "{} answers", report.answers);
    });
}
