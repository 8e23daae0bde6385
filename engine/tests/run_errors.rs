//! What `ftvm-engine run` says, and exits with, when it is given something that can't be run.

use ftvm_engine::control::exit_code;
use std::path::PathBuf;
use std::process::Command;

/// Runs the program with these arguments; it must end by itself.
fn run(arguments: &[&str]) -> (i32, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_ftvm-engine"))
        .arg("run")
        .args(arguments)
        .output()
        .expect("the program can be started");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code().expect("it was not killed"), text)
}

/// A file of this test with the given content.
fn file(name: &str, content: &[u8]) -> String {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("run-{name}-{}", std::process::id()));
    std::fs::write(&path, content).expect("the target folder is writable");
    path.to_str().expect("a path of text").to_owned()
}

fn refused(arguments: &[&str], code: u8, words: &[&str]) {
    let (status, text) = run(arguments);
    assert_eq!(status, i32::from(code), "{text}");
    for word in words {
        assert!(text.contains(word), "{word:?} is missing in {text:?}");
    }
    assert!(!text.contains("panicked"), "{text}");
}

#[test]
fn bad_boot_files_are_named_with_the_reason_and_the_remedy() {
    let script = file("script", b"#!/bin/sh\n");
    let missing = ["/no/such/kernel", "check the path"];
    refused(&["--kernel", "/no/such/kernel"], exit_code::BOOT, &missing);
    let words = [script.as_str(), "neither a Linux bzImage", "/boot/vmlinuz-VERSION"];
    refused(&["--kernel", &script], exit_code::BOOT, &words);
    let arguments = ["--kernel", &script, "--initrd", "/no/such/initrd"];
    refused(
        &arguments,
        exit_code::BOOT,
        &["initrd /no/such/initrd", "check the path"],
    );
    std::fs::remove_file(script).expect("own file");
}

#[test]
fn impossible_machines_are_refused_with_the_reason_and_the_remedy() {
    let kernel = file("kernel", b"never looked at");
    let with = |option: &str, value: &str, code, words: &[&str]| {
        refused(&["--kernel", &kernel, option, value], code, words);
    };
    with(
        "--memory",
        "4096G",
        exit_code::MEMORY,
        &["this host has", "give the guest less"],
    );
    with("--memory", "4097", exit_code::MEMORY, &["multiple of 4096"]);
    with("--memory", "many", exit_code::USAGE, &["is not a size such as 512M"]);
    with("--vcpus", "17", exit_code::CONFIG, &["17 vCPUs", "choose 1 to 16"]);
    with("--disk", "/no/such/disk", exit_code::DISK, &["/no/such/disk"]);
    with("--tap", "nosuchtap0", exit_code::NETWORK, &["nosuchtap0"]);
    with(
        "--tap",
        "tap0,zz",
        exit_code::USAGE,
        &["MAC address zz", "02:00:00:00:00:01"],
    );
    std::fs::remove_file(kernel).expect("own file");
}
