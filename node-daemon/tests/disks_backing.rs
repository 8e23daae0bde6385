//! Disks made of qcow2 files with backing files: what QEMU makes of them, by the names that a person gave, or nothing.

mod imports;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::process::Output;
use std::time::Duration;

use ftvm_node_daemon::disks::mark::{Mark, MarkFile};
use ftvm_node_daemon::import;
use imports::{Bench, MIB, contents, said};

/// Size of the disks, which is more than any image has.
const DISK_MIB: u64 = 4;

/// Makes a file over another one (name, format): options and KiB, and what is written there (byte, from and length in KiB). Zeros are
/// explicit ones, which hide what is behind them.
fn layer(bench: &Bench, name: &str, below: (&str, &str), (options, kib): (&str, u64), writes: &[(u8, u64, u64)]) {
    let size = format!("{kib}K");
    let (file, format) = below;
    let words = [
        "create", "-q", "-f", "qcow2", "-o", options, "-b", file, "-F", format, name, &size,
    ];
    bench.run("qemu-img", &words, name);
    for (byte, from, length) in writes {
        let how = if *byte == 0 {
            "-z".to_owned()
        } else {
            format!("-P {byte}")
        };
        let write = format!("write {how} {from}k {length}k");
        bench.run("qemu-io", &["-f", "qcow2", "-c", &write, name], name);
    }
}

/// Writes another name and format into a header, whatever there is.
fn rename(bench: &Bench, name: &str, (file, format): (&str, &str)) {
    bench.run(
        "qemu-img",
        &["rebase", "-u", "-f", "qcow2", "-b", file, "-F", format, name],
        name,
    );
}

/// Files with everything that a chain may have: holes, zeros over contents, compression, clusters and sizes of all kinds.
fn make_files(bench: &Bench) {
    // No whole number of clusters.
    bench.write("base.raw", &contents(2)[..2 * MIB - 3 * 512]);
    bench.convert("base.raw", "packed.qcow2", &["-c"]);
    // Before the base's end, across it, behind it.
    let writes = [(0x5a, 64, 128), (0, 512, 256), (0x5b, 1984, 128), (0x5c, 2560, 64)];
    layer(
        bench,
        "larger.qcow2",
        ("base.raw", "raw"),
        ("cluster_size=65536", 3072),
        &writes,
    );
    let writes = [(0x61, 0, 4), (0, 300, 100), (0x62, 1000, 22)];
    layer(
        bench,
        "smaller.qcow2",
        ("packed.qcow2", "qcow2"),
        ("cluster_size=4096", 1022),
        &writes,
    );
    // What the base has behind the end of the one before it is not seen, not even in the last cluster of that one.
    let writes = [(0x71, 1030, 30), (0x72, 1400, 1)];
    layer(
        bench,
        "third.qcow2",
        ("smaller.qcow2", "qcow2"),
        ("cluster_size=512", 2500),
        &writes,
    );
    layer(
        bench,
        "fourth.qcow2",
        ("third.qcow2", "qcow2"),
        ("cluster_size=2M", 3500),
        &[(0x81, 2048, 1)],
    );
}

/// What QEMU makes of an image, which goes by the names in headers.
fn by_qemu(bench: &Bench, name: &str) -> Vec<u8> {
    let words = ["convert", "-f", "qcow2", "-O", "raw", name, "expected.raw"];
    let mut expected = std::fs::read(bench.run("qemu-img", &words, "expected.raw")).unwrap();
    expected.resize(DISK_MIB as usize * MIB, 0);
    expected
}

/// Imports a file and those that it is over, in this order.
fn import_chain(bench: &Bench, chain: &[&str]) -> Output {
    let paths = chain.iter().map(|name| bench.path(name).display().to_string());
    let paths: Vec<String> = paths.collect();
    let mut words: Vec<&str> = Vec::new();
    for (place, path) in paths.iter().enumerate() {
        words.extend([if place == 0 { "--file" } else { "--backing" }, path]);
    }
    bench.import("disk.img", DISK_MIB, &words)
}

fn succeeds(bench: &Bench, chain: &[&str], expected: &[u8]) {
    let output = import_chain(bench, chain);
    assert!(output.status.success(), "{chain:?}: {}", said(&output));
    let judged = bench.judge("disk.img", expected);
    judged.unwrap_or_else(|why| panic!("{chain:?}: {why}"));
    bench.remove("disk.img");
}

/// Nothing is written, nothing counts, and all of these words are said.
fn refused(bench: &Bench, chain: &[&str], words: &[&str]) {
    let output = import_chain(bench, chain);
    let said = said(&output);
    assert_eq!(output.status.code(), Some(16), "{chain:?}: {said}");
    for word in words {
        assert!(said.contains(word), "{chain:?}: `{word}` is not in: {said}");
    }
    assert!(
        !said.contains("panicked") && !bench.complete("disk.img"),
        "{chain:?}: {said}"
    );
    let disk = std::fs::read(bench.path("disk.img")).unwrap();
    assert!(disk.iter().all(|byte| *byte == 0), "{chain:?}: something was written");
    bench.remove("disk.img");
}

#[test]
fn a_chain_becomes_what_qemu_makes_of_it() {
    let bench = Bench::new();
    make_files(&bench);
    let mut before = Vec::new();
    for chain in [
        &["packed.qcow2"][..],
        &["larger.qcow2", "base.raw"],
        &["smaller.qcow2", "packed.qcow2"],
        &["third.qcow2", "smaller.qcow2", "packed.qcow2"],
        &["fourth.qcow2", "third.qcow2", "smaller.qcow2", "packed.qcow2"],
    ] {
        let expected = by_qemu(&bench, chain[0]);
        assert!(expected != before, "{chain:?} is no other disk than the one before");
        succeeds(&bench, chain, &expected);
        before = expected;
    }
    // The longest that can be said.
    let names: Vec<String> = (0..5).map(|n| format!("link-{n}.qcow2")).collect();
    let mut below = ("fourth.qcow2", "qcow2");
    let mut chain = vec!["packed.qcow2", "smaller.qcow2", "third.qcow2", "fourth.qcow2"];
    for (n, name) in (0..).zip(&names) {
        layer(
            &bench,
            name,
            below,
            ("cluster_size=64K", 3600),
            &[(0x90 + n, 100 * u64::from(n), 70)],
        );
        below = (name.as_str(), "qcow2");
        chain.push(name);
    }
    chain.reverse();
    assert_eq!(chain.len(), 9);
    let expected = by_qemu(&bench, chain[0]);
    succeeds(&bench, &chain, &expected);
}

#[test]
fn names_in_headers_open_nothing() {
    let bench = Bench::new();
    make_files(&bench);
    let expected = by_qemu(&bench, "larger.qcow2");
    // Under the name in the header lies another file of the same length.
    std::fs::rename(bench.path("base.raw"), bench.path("moved.raw")).unwrap();
    bench.write("base.raw", &vec![b's'; 2 * MIB - 3 * 512]);
    assert!(
        by_qemu(&bench, "larger.qcow2") != expected,
        "whoever goes by the name reads it"
    );
    succeeds(&bench, &["larger.qcow2", "moved.raw"], &expected);
    let secret = bench.path("base.raw").display().to_string();
    let json = format!("json:{{\"driver\":\"raw\",\"file\":{{\"driver\":\"file\",\"filename\":\"{secret}\"}}}}");
    for name in [secret.as_str(), json.as_str(), "nothing.raw", "/dev/zero"] {
        rename(&bench, "larger.qcow2", (name, "raw"));
        succeeds(&bench, &["larger.qcow2", "moved.raw"], &expected);
    }
    // A name behind the one that was given leads nowhere either.
    layer(
        &bench,
        "hostile.qcow2",
        ("base.raw", "raw"),
        ("cluster_size=65536", 1024),
        &[],
    );
    layer(
        &bench,
        "over.qcow2",
        ("hostile.qcow2", "qcow2"),
        ("cluster_size=65536", 1024),
        &[(0x5a, 0, 64)],
    );
    assert!(
        by_qemu(&bench, "over.qcow2").contains(&b's'),
        "whoever goes by the names reads it"
    );
    let words = [
        "its backing file",
        "hostile.qcow2: it is only the difference from another file",
        "name the file in backing",
    ];
    refused(&bench, &["over.qcow2", "hostile.qcow2"], &words);
}

/// A guest can write whatever it likes into its raw disk.
#[test]
fn a_raw_file_that_begins_like_qcow2_is_raw() {
    let bench = Bench::new();
    bench.write("secret.raw", &vec![b's'; MIB]);
    layer(
        &bench,
        "hostile.qcow2",
        ("secret.raw", "raw"),
        ("cluster_size=65536", 1024),
        &[],
    );
    let hostile = std::fs::read(bench.path("hostile.qcow2")).unwrap();
    layer(
        &bench,
        "over.qcow2",
        ("hostile.qcow2", "raw"),
        ("cluster_size=65536", 1024),
        &[(0x5a, 512, 64)],
    );
    let expected = by_qemu(&bench, "over.qcow2");
    // Behind the file's end, and far from the words in its header.
    let at = 300 << 10;
    assert!(hostile.len() < at && expected.starts_with(&hostile) && expected[at] == 0);
    succeeds(&bench, &["over.qcow2", "hostile.qcow2"], &expected);
    // The control: the same file, once the header calls it what it seems.
    rename(&bench, "over.qcow2", ("hostile.qcow2", "qcow2"));
    assert_eq!(by_qemu(&bench, "over.qcow2")[at], b's');
    refused(
        &bench,
        &["over.qcow2", "hostile.qcow2"],
        &["hostile.qcow2: it is only the difference"],
    );
}

#[test]
fn a_chain_that_is_not_what_its_headers_say_is_refused_and_told() {
    let bench = Bench::new();
    make_files(&bench);
    let more = "name the file in backing";
    let less = "leave that one and those after it out of backing";
    refused(
        &bench,
        &["third.qcow2"],
        &["another file (it says `smaller.qcow2`)", more],
    );
    let own = "smaller.qcow2: it is only the difference";
    refused(&bench, &["third.qcow2", "smaller.qcow2"], &[own, more]);
    refused(
        &bench,
        &["packed.qcow2", "base.raw"],
        &["ends before", "base.raw:", less],
    );
    refused(
        &bench,
        &["larger.qcow2", "base.raw", "packed.qcow2"],
        &["packed.qcow2:", less],
    );
    refused(
        &bench,
        &["base.raw", "packed.qcow2"],
        &["only a qcow2 file has backing files"],
    );
    let nine = ["larger.qcow2"; 10];
    refused(&bench, &nine, &["9 backing files, and 8 can be read"]);
    // What is to be read as qcow2 because the header says so.
    rename(&bench, "larger.qcow2", ("base.raw", "qcow2"));
    refused(
        &bench,
        &["larger.qcow2", "base.raw"],
        &["base.raw: it can't be read as qcow2", "name the right file"],
    );
    rename(&bench, "larger.qcow2", ("base.raw", "vmdk"));
    refused(&bench, &["larger.qcow2", "base.raw"], &["written in `vmdk`", "convert"]);
    // Without a word about the format: an extension of another type, and version 2, where there is none that counts.
    let mut silent = std::fs::read(bench.path("larger.qcow2")).unwrap();
    let extension = 0xe279_2acau32.to_be_bytes();
    let at = silent.windows(4).position(|found| found == extension).unwrap();
    silent[at..at + 4].copy_from_slice(&0x1234_5678u32.to_be_bytes());
    bench.write("silent.qcow2", &silent);
    layer(&bench, "old.qcow2", ("base.raw", "raw"), ("compat=0.10", 3072), &[]);
    for name in ["silent.qcow2", "old.qcow2"] {
        let words = [
            "does not say what its backing file is written in",
            "never guessed",
            "qemu-img rebase",
        ];
        refused(&bench, &[name, "base.raw"], &words);
    }
    refused(
        &bench,
        &["smaller.qcow2", "gone.qcow2"],
        &["its backing file", "gone.qcow2 can't be read"],
    );
    std::fs::create_dir(bench.path("folder")).unwrap();
    bench.run("mkfifo", &["pipe"], "");
    // Nobody writes the pipe: who waited for that would wait for ever.
    for name in ["folder", "pipe", "/dev/zero"] {
        let words = format!("{name} is no regular file");
        refused(&bench, &["smaller.qcow2", name], &[&words]);
    }
}

/// What is said to do about version 2 helps, and looks at no other file: under the name in the header there is none.
#[test]
fn an_image_of_version_2_is_read_once_it_is_one_of_version_3() {
    let bench = Bench::new();
    bench.write("base.raw", &contents(2));
    let writes = [(0x5a, 64, 128), (0x5b, 2000, 100)];
    layer(&bench, "old.qcow2", ("base.raw", "raw"), ("compat=0.10", 3072), &writes);
    let expected = by_qemu(&bench, "old.qcow2");
    std::fs::rename(bench.path("base.raw"), bench.path("moved.raw")).unwrap();
    refused(&bench, &["old.qcow2", "moved.raw"], &["of version 2", "come first"]);
    for words in [
        &["rebase", "-u", "-f", "qcow2", "-b", "", "old.qcow2"][..],
        &["amend", "-f", "qcow2", "-o", "compat=1.1", "old.qcow2"],
    ] {
        bench.run("qemu-img", words, "");
    }
    rename(&bench, "old.qcow2", ("base.raw", "raw"));
    succeeds(&bench, &["old.qcow2", "moved.raw"], &expected);
}

#[test]
fn only_a_file_has_backing_files() {
    let bench = Bench::new();
    let base = bench.write("base.raw", &contents(1)).display().to_string();
    let output = bench.import("disk.img", DISK_MIB, &["--blank", "--backing", &base]);
    let said = said(&output);
    assert!(
        !output.status.success() && said.contains("cannot be used with"),
        "{said}"
    );
    assert!(!bench.path("disk.img").exists());
}

/// Which would never end.
#[test]
fn a_chain_that_leads_back_to_itself_is_refused() {
    let bench = Bench::new();
    make_files(&bench);
    rename(&bench, "smaller.qcow2", ("third.qcow2", "qcow2"));
    let words = ["leads back to itself has no end", "name each file once"];
    refused(&bench, &["third.qcow2", "smaller.qcow2", "third.qcow2"], &words);
    std::fs::hard_link(bench.path("third.qcow2"), bench.path("linked.qcow2")).unwrap();
    refused(&bench, &["third.qcow2", "smaller.qcow2", "linked.qcow2"], &words);
    // Copies of its files do not end it either.
    for name in ["third", "smaller"] {
        std::fs::copy(
            bench.path(&format!("{name}.qcow2")),
            bench.path(&format!("{name}-2.qcow2")),
        )
        .unwrap();
    }
    let chain = ["third.qcow2", "smaller.qcow2", "third-2.qcow2", "smaller-2.qcow2"];
    refused(
        &bench,
        &chain,
        &["smaller-2.qcow2: it is only the difference", "name the file in backing"],
    );
}

#[test]
fn a_backing_file_that_is_damaged_or_has_its_data_elsewhere_is_refused_by_name() {
    let bench = Bench::new();
    make_files(&bench);
    let whole = std::fs::read(bench.convert("base.raw", "cut.qcow2", &[])).unwrap();
    layer(
        &bench,
        "over.qcow2",
        ("cut.qcow2", "qcow2"),
        ("cluster_size=65536", 2048),
        &[],
    );
    let expected = by_qemu(&bench, "over.qcow2");
    bench.write("cut.qcow2", &whole[..whole.len() / 2]);
    let output = import_chain(&bench, &["over.qcow2", "cut.qcow2"]);
    assert_eq!(output.status.code(), Some(16), "{}", said(&output));
    assert!(
        said(&output).contains("cut.qcow2: it is cut short"),
        "{}",
        said(&output)
    );
    assert!(!bench.complete("disk.img"));
    bench.remove("disk.img");
    // The control: the cut alone made the difference.
    bench.write("cut.qcow2", &whole);
    succeeds(&bench, &["over.qcow2", "cut.qcow2"], &expected);
    let data = format!("data_file={}", bench.path("data.raw").display());
    bench.run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-o", &data, "external.qcow2", "1M"],
        "",
    );
    rename(&bench, "over.qcow2", ("external.qcow2", "qcow2"));
    refused(
        &bench,
        &["over.qcow2", "external.qcow2"],
        &["external.qcow2: its data is in another file"],
    );
}

#[test]
fn an_import_goes_on_with_the_same_chain_alone() {
    let bench = Bench::new();
    make_files(&bench);
    let chain = ["larger.qcow2", "base.raw"];
    assert!(import_chain(&bench, &chain).status.success());
    let marks = MarkFile::new(import::mark_path(&bench.path("disk.img")));
    let half = Mark {
        complete: false,
        done_bytes: DISK_MIB << 19,
        ..marks.read().unwrap().unwrap()
    };
    // What the mark vouches for is not looked at.
    let spoil = || {
        let disk = OpenOptions::new().write(true).open(bench.path("disk.img")).unwrap();
        disk.write_all_at(&[0xee; 4096], 0).unwrap();
        marks.write(&half).unwrap();
    };
    spoil();
    assert!(import_chain(&bench, &chain).status.success());
    let disk = std::fs::read(bench.path("disk.img")).unwrap();
    assert!(disk.starts_with(&[0xee; 4096]), "the mark is of this chain");
    let begun_anew = |chain: &[&str]| {
        spoil();
        let output = import_chain(&bench, chain);
        assert!(output.status.success(), "{chain:?}: {}", said(&output));
        bench.judge("disk.img", &by_qemu(&bench, "larger.qcow2"))
    };
    let path = bench.path("base.raw");
    let time = std::fs::metadata(&path).unwrap().modified().unwrap();
    let set_time = |time| {
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_modified(time)
            .unwrap()
    };
    // Other contents of the same length, a second later.
    let mut other = std::fs::read(&path).unwrap();
    other.iter_mut().for_each(|byte| *byte ^= 0x55);
    std::fs::write(&path, &other).unwrap();
    set_time(time + Duration::from_secs(1));
    begun_anew(&chain).unwrap();
    // The same ones under another name.
    std::fs::copy(&path, bench.path("copy.raw")).unwrap();
    begun_anew(&["larger.qcow2", "copy.raw"]).unwrap();
    // The control: a chain that seems to be the one that it was is gone on with.
    set_time(time);
    assert!(begun_anew(&chain).is_err());
}
