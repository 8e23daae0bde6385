//! What `cargo xtask demo` says where it can't run.
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output, Stdio};

/// An ordinary user, without any group.
const USER: &str = "--reuid 65534 --regid 65534 --clear-groups";

/// The demonstration under a private /dev that `devices` fills (a shell script), as root or as an ordinary user.
fn demo(test: &str, devices: &str, user: &str) -> Output {
    // The program's own folder may be closed to others.
    let folder = std::env::temp_dir().join(format!("ftvm-{test}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o755)).unwrap();
    let program = folder.join("xtask");
    std::fs::copy(env!("CARGO_BIN_EXE_xtask"), &program).unwrap();
    let script = format!(
        "set -e; mount -t tmpfs none /dev; mknod -m 666 /dev/null c 1 3; {devices}; exec setpriv {user} \"$1\" demo --fault none"
    );
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-c", &script, "sh"])
        .arg(program)
        .stdin(Stdio::null());
    let output = command.current_dir("/").output().unwrap();
    std::fs::remove_dir_all(folder).unwrap();
    output
}

fn refused(output: &Output, words: &[&str]) {
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{text}");
    for word in words {
        assert!(text.contains(word), "{word:?} is missing in:\n{text}");
    }
}

const TUN: &str = "mkdir /dev/net; mknod -m 666 /dev/net/tun c 10 200";

#[test]
fn without_kvm_it_says_so_and_offers_emulated_machines() {
    let output = demo("no-kvm", TUN, "--clear-groups");
    refused(
        &output,
        &[
            "/dev/kvm can't be used: No such file",
            "modprobe",
            "cargo xtask demo --guest linux",
        ],
    );
}

#[test]
fn who_may_not_use_kvm_is_told_how_to_get_the_right() {
    let devices = format!("{TUN}; mknod -m 600 /dev/kvm c 10 232");
    refused(
        &demo("kvm-denied", &devices, USER),
        &[
            "/dev/kvm can't be used: Permission denied",
            "usermod -aG kvm",
            "cargo xtask demo --guest linux",
        ],
    );
}
