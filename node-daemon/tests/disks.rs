//! Disks made of real images by `ftvm-node-daemon import`, and what comes of images that lie.

mod imports;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};

use ftvm_engine::replication::storage::{FileStorage, Storage};
use ftvm_node_daemon::disks::{DiskError, thick};
use imports::{Bench, MIB, program, sha256};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

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
    let plain = File::open(bench.write("plain.img", &expected)).unwrap();
    let error = thick::verify(&plain, 32 << 20).unwrap_err().to_string();
    assert!(error.contains("btrfs") && error.contains("storage class"), "{error}");
    // No block is anybody's own where two files share it.
    let bench = Bench::on("xfs", 400);
    bench.write("one.img", &expected);
    bench.run("cp", &["--reflink=always", "one.img", "two.img"], "two.img");
    let error = thick::verify(&File::open(bench.path("two.img")).unwrap(), 32 << 20).unwrap_err();
    assert!(error.to_string().contains("shared with another file"), "{error}");
}

const BLOCK: usize = 4096;

/// A disk as an engine has it, all of it allocated.
fn blank_disk(bench: &Bench, mib: u64) -> FileStorage {
    let output = bench.import("disk.img", mib, &["--blank"]);
    assert!(output.status.success(), "{}", imports::said(&output));
    open_disk(&bench.path("disk.img"))
}

fn open_disk(path: &Path) -> FileStorage {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    FileStorage::new(file, None).unwrap()
}

/// Every other block is written: as many extents as there can be.
fn scatter(disk: &FileStorage) -> io::Result<()> {
    for at in (0..disk.size_bytes()).step_by(2 * BLOCK) {
        disk.write_at(at, &[0xa5; BLOCK])?;
    }
    disk.sync()
}

/// Makes a file longer by all that is free, in pieces that get smaller; returns how long it is.
fn take(file: &File, mut length: u64) -> u64 {
    let longer = |length: u64, piece: u64| match fallocate(file, FallocateFlags::empty(), length, piece) {
        Err(Errno::OPNOTSUPP) => file.write_all_at(&vec![0; piece as usize], length).is_ok(),
        allocated => allocated.is_ok(),
    };
    for piece in [16 << 20, 1 << 20, 64 << 10, BLOCK as u64] {
        while longer(length, piece) {
            length += piece;
        }
    }
    length
}

/// Does `work` while another file has what is free, and takes at once what becomes free.
fn beside_a_taker<T>(bench: &Bench, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let other = File::create(bench.path("other")).unwrap();
    let (full, over) = (Barrier::new(2), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut length = take(&other, 0);
            full.wait();
            while !over.load(Ordering::Relaxed) {
                length = take(&other, length);
            }
        });
        full.wait();
        let done = work();
        over.store(true, Ordering::Relaxed);
        done
    })
}

#[test]
fn what_a_guest_discards_stays_its_own_on_a_full_volume() {
    // A btrfs that is full looks for room, with a commit, at each block that is written: a small disk, and no barriers.
    for (system, volume_mib, disk_mib) in [
        ("ext4", 96, 16),
        ("ext2", 48, 16),
        ("xfs", 400, 16),
        ("btrfs,nobarrier", 400, 1),
        ("tmpfs", 64, 16),
    ] {
        let bench = Bench::on(system, volume_mib);
        let disk = blank_disk(&bench, disk_mib);
        let size_bytes = disk.size_bytes();
        scatter(&disk).expect(system);
        let discarded = beside_a_taker(&bench, || {
            // Single blocks first: there is no room to note more extents either.
            for at in (0..size_bytes).step_by(4 * BLOCK) {
                disk.zero(at, BLOCK as u64)?;
            }
            disk.zero(0, size_bytes)?;
            disk.sync()
        });
        discarded.expect(system);
        let judge = |content: u8| {
            let expected = vec![content; size_bytes as usize];
            let judged = bench.judge("disk.img", &expected);
            judged.unwrap_or_else(|why| panic!("{system}, {content}: {why}"));
        };
        judge(0);
        // The guest needs its blocks again, and the volume still has no other ones.
        let written = disk.write_at(0, &vec![0x5a; size_bytes as usize]);
        written.and_then(|()| disk.sync()).expect(system);
        judge(0x5a);
    }
}

/// Most of many disks is zeros, and whoever copies one does not wait for hours until they are written.
#[test]
fn zeros_of_a_copy_are_not_written_and_the_disk_is_thick_afterwards() {
    let bench = Bench::on("xfs", 400);
    let disk = blank_disk(&bench, 16);
    let size_bytes = disk.size_bytes();
    let raw = File::open(bench.path("disk.img")).unwrap();
    let first_data = || {
        disk.sync().unwrap();
        seek(&raw, SeekFrom::Data(0)).ok()
    };
    // The control: what a guest zeroes is written.
    disk.zero(0, size_bytes).unwrap();
    assert_eq!(first_data(), Some(0));
    disk.zero_anew(0, size_bytes).unwrap();
    assert_eq!(first_data(), None);
    bench.judge("disk.img", &vec![0; size_bytes as usize]).unwrap();
}

/// The control: where XFS zeroes by itself it gives blocks back and takes others, and the taker is faster.
#[test]
fn on_xfs_the_kernels_way_to_zero_costs_a_disk_its_blocks() {
    const ROOM_BYTES: u64 = 64 << 10;
    const TRIES: u64 = 20;
    let bench = Bench::on("xfs", 400);
    let disk = blank_disk(&bench, 16);
    let size_bytes = disk.size_bytes();
    let mut options = OpenOptions::new();
    let raw = options.read(true).write(true).open(bench.path("disk.img")).unwrap();
    let room = File::create(bench.path("room")).unwrap();
    fallocate(&room, FallocateFlags::empty(), 0, TRIES * ROOM_BYTES).unwrap();
    scatter(&disk).unwrap();
    let lost = beside_a_taker(&bench, || {
        for left in (0..TRIES).rev() {
            // A few blocks, without which XFS does not even begin.
            room.set_len(left * ROOM_BYTES)?;
            let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
            if let Err(errno) = fallocate(&raw, flags, 0, size_bytes) {
                let found = thick::verify(&raw, size_bytes);
                if matches!(found, Err(DiskError::NotThick { .. })) {
                    return Ok(Some(errno));
                }
            }
            scatter(&disk)?;
        }
        Ok(None)
    });
    assert_eq!(lost.unwrap(), Some(Errno::NOSPC));
}

#[test]
fn a_block_device_is_zeroed_without_giving_back_a_block() {
    let bench = Bench::on("ext4", 64);
    let below = bench.write("device.img", &vec![0xee; 8 * MIB]);
    let device = bench.device("device.img");
    let disk = open_disk(&device.path);
    let blocks = || {
        disk.sync().unwrap();
        std::fs::metadata(&below).unwrap().blocks()
    };
    let before = blocks();
    // From within a block of the file system below to within another one.
    disk.zero(512, 6 << 20).unwrap();
    assert!(blocks() >= before);
    let mut expected = vec![0xee; 8 * MIB];
    expected[512..512 + 6 * MIB].fill(0);
    let mut found = vec![0; 8 * MIB];
    disk.read_at(0, &mut found).unwrap();
    assert!(found == expected, "contents");
    // The control: what a device is told to discard is given back below.
    bench.run("blkdiscard", &["--force", &device.path.display().to_string()], "");
    assert!(blocks() < before);
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
    let disk = File::create(bench.path("disk.img")).unwrap();
    rustix::fs::flock(&disk, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let output = bench.import("disk.img", 8, &["--file", &file]);
    assert!(imports::said(&output).contains("in use"), "{}", imports::said(&output));
    drop(disk);
    assert!(bench.import("disk.img", 8, &["--file", &file]).status.success());
    // A guest writes; nothing is imported over it, and blocks that it gave back are taken again.
    let disk = OpenOptions::new().write(true).open(bench.path("disk.img")).unwrap();
    disk.write_all_at(b"of the guest", 0).unwrap();
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&disk, flags, MIB as u64, MIB as u64).unwrap();
    assert!(bench.import("disk.img", 8, &["--file", &file]).status.success());
    let found = std::fs::read(bench.path("disk.img")).unwrap();
    assert!(found.starts_with(b"of the guest"));
    thick::verify(&File::open(bench.path("disk.img")).unwrap(), 8 << 20).unwrap();
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
