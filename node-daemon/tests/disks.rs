//! Disks made of real images by `ftvm-node-daemon import`, and what comes of images that lie.

mod imports;

use std::os::unix::fs::{FileExt, MetadataExt};

use ftvm_node_daemon::disks::thick;
use imports::{Bench, MIB, program, sha256};

/// Contents that tell every place apart, with a stretch of zeros in the middle.
fn contents(mib: u64) -> Vec<u8> {
    imports::contents(mib)
}

#[test]
fn every_source_becomes_a_thick_disk_with_its_contents() {
    let bench = Bench::new();
    let raw = bench.write("root.raw", &contents(24));
    let sources = [
        ("blank", None),
        ("raw", Some(raw.clone())),
        (
            "sparse raw",
            Some(bench.run("cp", &["--sparse=always", "root.raw", "sparse.img"], "sparse.img")),
        ),
        ("qcow2", Some(bench.convert("root.raw", "root.qcow2", &[]))),
        (
            "qcow2, compressed",
            Some(bench.convert("root.raw", "packed.qcow2", &["-c"])),
        ),
        (
            "qcow2, small clusters",
            Some(bench.convert("root.raw", "small.qcow2", &["-o", "cluster_size=4096"])),
        ),
        (
            "qcow2, version 2",
            Some(bench.convert("root.raw", "old.qcow2", &["-o", "compat=0.10"])),
        ),
        ("gzip", Some(bench.run("gzip", &["-k", "root.raw"], "root.raw.gz"))),
        ("xz", Some(bench.run("xz", &["-k", "-0", "root.raw"], "root.raw.xz"))),
        ("zstd", Some(bench.run("zstd", &["-q", "root.raw"], "root.raw.zst"))),
    ];
    for (name, source) in sources {
        let mut expected = if source.is_some() { contents(24) } else { Vec::new() };
        expected.resize(40 * MIB, 0);
        let source = source.map(|path| path.display().to_string());
        let from: Vec<&str> = source.as_deref().map_or(vec!["--blank"], |path| vec!["--file", path]);
        let output = bench.import("disk.img", 40, &from);
        assert!(output.status.success(), "{name}: {}", imports::said(&output));
        bench
            .judge("disk.img", &expected)
            .unwrap_or_else(|why| panic!("{name}: {why}"));
        bench.remove("disk.img");
    }
}

#[test]
fn a_hostile_qcow2_reaches_no_other_file() {
    let bench = Bench::new();
    bench.write("secret.raw", &vec![b's'; MIB]);
    let secret = bench.path("secret.raw").display().to_string();
    let make = |name: &str, words: &[&str]| {
        let path = bench.path(name).display().to_string();
        let all = [&["create", "-q", "-f", "qcow2"], words, &[&path, "1M"]].concat();
        bench.run("qemu-img", &all, name)
    };
    let absolute = make("absolute.qcow2", &["-b", &secret, "-F", "raw"]);
    // The same by a name that is relative to the image, and without saying what the other file is.
    let relative = make("relative.qcow2", &["-b", &secret, "-F", "raw"]);
    bench.run(
        "qemu-img",
        &["rebase", "-u", "-b", "secret.raw", "-F", "raw", "relative.qcow2"],
        "relative.qcow2",
    );
    let json = make("json.qcow2", &["-b", &secret, "-F", "raw"]);
    let name = format!("json:{{\"driver\":\"raw\",\"file\":{{\"driver\":\"file\",\"filename\":\"{secret}\"}}}}");
    bench.run(
        "qemu-img",
        &["rebase", "-u", "-b", &name, "-F", "raw", "json.qcow2"],
        "json.qcow2",
    );
    let chain = make("chain.qcow2", &["-b", &absolute.display().to_string(), "-F", "qcow2"]);
    let data = bench.path("data.raw").display().to_string();
    let external = make("external.qcow2", &["-o", &format!("data_file={data}")]);
    std::fs::write(bench.path("data.raw"), vec![b's'; MIB]).unwrap();
    let external_raw = make(
        "external-raw.qcow2",
        &["-o", &format!("data_file={data},data_file_raw=on")],
    );
    std::fs::write(bench.path("data.raw"), vec![b's'; MIB]).unwrap();
    for path in [&absolute, &relative, &json, &chain, &external_raw] {
        // They are what they seem: a program that trusts them reads the other file.
        bench.run(
            "qemu-img",
            &["convert", "-O", "raw", &path.display().to_string(), "read.raw"],
            "read.raw",
        );
        let read = std::fs::read(bench.path("read.raw")).unwrap();
        assert!(read.contains(&b's'), "{} is hostile", path.display());
    }
    for path in [&absolute, &relative, &json, &chain, &external, &external_raw] {
        let output = bench.import("disk.img", 2, &["--file", &path.display().to_string()]);
        let said = imports::said(&output);
        assert_eq!(output.status.code(), Some(16), "{}: {said}", path.display());
        assert!(
            said.contains("another file") && said.contains("qemu-img convert"),
            "{said}"
        );
        assert!(!bench.complete("disk.img"));
        let disk = std::fs::read(bench.path("disk.img")).unwrap();
        assert!(disk.iter().all(|byte| *byte == 0), "{}", path.display());
        bench.remove("disk.img");
    }
}

#[test]
fn damaged_and_oversized_images_are_refused_and_leave_nothing_that_counts() {
    let bench = Bench::new();
    bench.write("root.raw", &contents(8));
    let good = std::fs::read(bench.convert("root.raw", "root.qcow2", &[])).unwrap();
    bench.run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "huge.qcow2", "1T"],
        "huge.qcow2",
    );
    // Bombs: many zeros in few bytes.
    bench.run(
        "sh",
        &["-c", "head -c 256M /dev/zero | gzip -1 > bomb.raw.gz"],
        "bomb.raw.gz",
    );
    bench.run(
        "sh",
        &["-c", "head -c 256M /dev/zero | zstd -q -1 > bomb.raw.zst"],
        "bomb.raw.zst",
    );
    bench.run(
        "sh",
        &["-c", "head -c 256M /dev/zero | xz -0 > bomb.raw.xz"],
        "bomb.raw.xz",
    );
    bench.convert("root.raw", "packed.qcow2", &["-c", "-o", "compression_type=zstd"]);
    bench.convert("root.raw", "l2.qcow2", &["-o", "extended_l2=on,cluster_size=128k"]);
    bench.run("gzip", &["-k", "root.raw"], "root.raw.gz");
    let packed = std::fs::read(bench.path("root.raw.gz")).unwrap();
    let patched = |at: usize, bytes: &[u8]| {
        let mut image = good.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        image
    };
    let cases: Vec<(&str, Option<Vec<u8>>, &str)> = vec![
        ("huge.qcow2", None, "more than the disk's"),
        ("bomb.raw.gz", None, "more than the disk's"),
        ("bomb.raw.zst", None, "more than the disk's"),
        ("bomb.raw.xz", None, "more than the disk's"),
        ("long.raw", Some(contents(17)), "more than the disk's"),
        (
            "cut.raw.gz",
            Some(packed[..packed.len() / 2].to_vec()),
            "can't be unpacked",
        ),
        ("magic.qcow2", Some(patched(0, b"XXXX")), "as qcow2"),
        // Clusters of 2 to the 63, an L1 table of 4 billion entries, at the end of the address space.
        ("clusters.qcow2", Some(patched(20, &63u32.to_be_bytes())), "as qcow2"),
        ("l1.qcow2", Some(patched(36, &u32::MAX.to_be_bytes())), ""),
        (
            "l1-offset.qcow2",
            Some(patched(40, &(u64::MAX - 511).to_be_bytes())),
            "",
        ),
        ("crypt.qcow2", Some(patched(32, &2u32.to_be_bytes())), "encrypted"),
        ("packed.qcow2", None, "compressed with Zstandard"),
        ("l2.qcow2", None, "extended L2"),
        (
            "corrupt.qcow2",
            Some(patched(72, &2u64.to_be_bytes())),
            "marked as damaged",
        ),
        (
            "feature.qcow2",
            Some(patched(72, &(1u64 << 40).to_be_bytes())),
            "as qcow2",
        ),
        ("short.qcow2", Some(good[..70_000].to_vec()), "cut short"),
        ("half.qcow2", Some(good[..good.len() / 2].to_vec()), "cut short"),
        (
            "shorter.qcow2",
            Some(good[..good.len() - (2 << 16)].to_vec()),
            "cut short",
        ),
        ("really-qcow2.img", Some(good.clone()), "say source.format Qcow2"),
        ("really-gzip.img", Some(packed.clone()), "say source.compression Gzip"),
        ("other.vmdk", Some(good.clone()), "convert it"),
        ("twice.qcow2.gz", Some(packed.clone()), "compress itself"),
        ("empty.qcow2", Some(Vec::new()), ""),
    ];
    for (name, image, word) in cases {
        if let Some(image) = image {
            bench.write(name, &image);
        }
        let file = bench.path(name).display().to_string();
        let output = bench.import("disk.img", 16, &["--file", &file]);
        let said = imports::said(&output);
        assert_eq!(output.status.code(), Some(16), "{name}: {said}");
        assert!(said.contains(word) && !said.contains("panicked"), "{name}: {said}");
        assert!(!bench.complete("disk.img"), "{name}");
        bench.remove("disk.img");
    }
}

#[test]
fn any_single_changed_byte_of_the_metadata_is_survived() {
    // Whatever a byte of header, tables and refcounts becomes: the importer ends in order, within its memory.
    let bench = Bench::new();
    bench.write("root.raw", &contents(2));
    let good = std::fs::read(bench.convert("root.raw", "root.qcow2", &[])).unwrap();
    let places = (0..112).chain((0x10000..0x40000).step_by(0x10000).flat_map(|table| table..table + 8));
    let (mut refused, mut taken) = (0, 0);
    for at in places.step_by(3) {
        let mut image = good.clone();
        image[at] ^= 0xff;
        bench.write("bad.qcow2", &image);
        let file = bench.path("bad.qcow2").display().to_string();
        let output = bench.import("disk.img", 16, &["--file", &file]);
        let said = imports::said(&output);
        assert!(!said.contains("panicked"), "byte {at}: {said}");
        match output.status.code() {
            Some(0) => taken += 1,
            Some(16) => refused += 1,
            other => panic!("byte {at}: {other:?}: {said}"),
        }
        bench.remove("disk.img");
    }
    assert!(refused > 10 && taken > 1, "{refused} refused, {taken} taken");
}

#[test]
fn the_digest_decides_before_anything_else() {
    let bench = Bench::new();
    let image = contents(4);
    let file = bench.write("root.raw", &image).display().to_string();
    let right = sha256(&image);
    let wrong = sha256(b"another");
    let output = bench.import("disk.img", 8, &["--file", &file, "--sha256", &wrong]);
    let said = imports::said(&output);
    assert_eq!(output.status.code(), Some(16), "{said}");
    assert!(
        said.contains(&right) && said.contains(&wrong) && said.contains("correct"),
        "{said}"
    );
    assert!(!bench.complete("disk.img"));
    let disk = std::fs::read(bench.path("disk.img")).unwrap();
    assert!(disk.iter().all(|byte| *byte == 0), "nothing of it was written");
    let output = bench.import("disk.img", 8, &["--file", &file, "--sha256", &right]);
    assert!(output.status.success(), "{}", imports::said(&output));
    let mut expected = image;
    expected.resize(8 * MIB, 0);
    bench.judge("disk.img", &expected).unwrap();
}

#[test]
fn a_full_volume_is_told_and_what_is_half_done_does_not_count() {
    let bench = Bench::on_a_volume_of(80);
    let image = contents(24);
    let file = bench.write("root.raw", &image).display().to_string();
    let output = bench.import("disk.img", 100, &["--file", &file]);
    let said = imports::said(&output);
    assert_eq!(output.status.code(), Some(16), "{said}");
    assert!(
        said.contains("bytes free") && said.contains("are missing") && said.contains("larger"),
        "{said}"
    );
    assert!(!bench.complete("disk.img"));
    // It gave back what it had taken, and a disk that fits is made.
    assert_eq!(std::fs::metadata(bench.path("disk.img")).unwrap().blocks(), 0);
    let output = bench.import("disk.img", 28, &["--file", &file]);
    assert!(output.status.success(), "{}", imports::said(&output));
    let mut expected = image;
    expected.resize(28 * MIB, 0);
    bench.judge("disk.img", &expected).unwrap();
}

#[test]
fn file_systems_of_every_kind() {
    let image = contents(24);
    let mut expected = image.clone();
    expected.resize(32 * MIB, 0);
    for system in ["ext4", "xfs", "btrfs", "ext2", "tmpfs"] {
        let bench = Bench::on(system, 400);
        let file = bench.write("root.raw", &image).display().to_string();
        let output = bench.import("disk.img", 32, &["--file", &file]);
        assert!(output.status.success(), "{system}: {}", imports::said(&output));
        bench
            .judge("disk.img", &expected)
            .unwrap_or_else(|why| panic!("{system}: {why}"));
    }
    // btrfs writes changes elsewhere and compresses, unless the file is marked before it has contents.
    let bench = Bench::on("btrfs,compress-force=zlib", 400);
    let file = bench.write("root.raw", &image).display().to_string();
    let output = bench.import("disk.img", 32, &["--file", &file]);
    assert!(output.status.success(), "{}", imports::said(&output));
    bench.judge("disk.img", &expected).unwrap();
    let plain = std::fs::File::open(bench.write("plain.img", &expected)).unwrap();
    let error = thick::verify(&plain, 32 << 20).unwrap_err().to_string();
    assert!(error.contains("btrfs") && error.contains("storage class"), "{error}");
    // No block is anybody's own where two files share it.
    let bench = Bench::on("xfs", 400);
    bench.write("one.img", &expected);
    bench.run("cp", &["--reflink=always", "one.img", "two.img"], "two.img");
    let error = thick::verify(&std::fs::File::open(bench.path("two.img")).unwrap(), 32 << 20).unwrap_err();
    assert!(error.to_string().contains("shared with another file"), "{error}");
}

#[test]
fn a_block_device_is_written_whole() {
    let bench = Bench::new();
    let image = contents(8);
    let file = bench.write("root.raw", &image).display().to_string();
    // What an earlier owner left.
    bench.write("device.img", &vec![0xee; 24 * MIB]);
    let device = bench.device("device.img");
    let mark = bench.path("device.mark").display().to_string();
    let path = device.path.clone();
    let output = bench.import_to(&path, &["--file", &file, "--mark", &mark]);
    assert!(output.status.success(), "{}", imports::said(&output));
    let mut expected = image;
    expected.resize(24 * MIB, 0);
    assert!(
        std::fs::read(&path).unwrap() == expected,
        "contents, and zeros behind them"
    );
    // Another size than the device's is refused.
    let other = bench.path("other.mark").display().to_string();
    let output = bench.import_to(&path, &["--size-mib", "23", "--file", &file, "--mark", &other]);
    assert_eq!(output.status.code(), Some(16));
    assert!(imports::said(&output).contains("should have"));
}

#[test]
fn a_disk_in_use_and_one_that_is_complete_are_left_alone() {
    let bench = Bench::new();
    let file = bench.write("root.raw", &contents(4)).display().to_string();
    let disk = std::fs::File::create(bench.path("disk.img")).unwrap();
    rustix::fs::flock(&disk, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let output = bench.import("disk.img", 8, &["--file", &file]);
    assert!(imports::said(&output).contains("in use"), "{}", imports::said(&output));
    drop(disk);
    assert!(bench.import("disk.img", 8, &["--file", &file]).status.success());
    // A guest writes; nothing is imported over it, and blocks that it gave back are taken again.
    let disk = std::fs::OpenOptions::new()
        .write(true)
        .open(bench.path("disk.img"))
        .unwrap();
    disk.write_all_at(b"of the guest", 0).unwrap();
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&disk, flags, MIB as u64, MIB as u64).unwrap();
    assert!(bench.import("disk.img", 8, &["--file", &file]).status.success());
    let found = std::fs::read(bench.path("disk.img")).unwrap();
    assert!(found.starts_with(b"of the guest"));
    thick::verify(&std::fs::File::open(bench.path("disk.img")).unwrap(), 8 << 20).unwrap();
    let output = bench.import("disk.img", 9, &["--file", &file]);
    assert!(imports::said(&output).contains("size of a disk can't be changed"));
}

#[test]
fn the_privileged_programs_know_no_image_format() {
    // Decoders are linked into the importer alone.
    let has = |path: &str| {
        let bytes = std::fs::read(path).unwrap();
        let word = b"imago";
        bytes.windows(word.len()).any(|window| window == word)
    };
    assert!(has(program("importer")));
    assert!(!has(program("ftvm-node-daemon")));
    assert!(!has(program("seat")));
}
