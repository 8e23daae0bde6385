//! `seat install` and `seat copy`: the files of a guest image, in a container of that image that has nothing else, by the user of a seat's pod.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant, SystemTime};

use ftvm_engine::control::exit_code::GUEST_IMAGE;
use ftvm_node_daemon::random;

const MIB: usize = 1 << 20;
/// Long enough for a busy machine; nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(60);
/// What mounts the folder for the copies, in the container's namespace: `$0` is the test's folder.
const FOLDER: &str = "mount --bind $0/out $0/image/ftvm-guest";

/// The root of a guest image, the folder that its container gets the program in, and the one for the copies.
struct Image {
    folder: PathBuf,
}

impl Image {
    /// With a kernel, and the program that its own image's container has installed.
    fn new() -> Image {
        let folder = std::env::temp_dir().join(format!("ftvm-copy-{:x}", random::nonzero_u64()));
        for part in [
            "image/boot",
            "image/disk",
            "image/ftvm-tools",
            "image/ftvm-guest",
            "tools",
            "out",
        ] {
            fs::create_dir_all(folder.join(part)).unwrap();
        }
        for part in ["tools", "out"] {
            // As an emptyDir volume is.
            fs::set_permissions(folder.join(part), PermissionsExt::from_mode(0o777)).unwrap();
        }
        let image = Image { folder };
        image.write("boot/vmlinuz", b"a kernel");
        let program = image.folder.join("tools/seat");
        for _ in 0..2 {
            // Containers are started again, also over what the last one left.
            let status = Command::new(env!("CARGO_BIN_EXE_seat"))
                .arg("install")
                .arg(&program)
                .status();
            assert!(status.unwrap().success());
        }
        image
    }

    fn path(&self, inside: &str) -> PathBuf {
        self.folder.join("image").join(inside)
    }

    fn write(&self, inside: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(inside);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    }

    fn copied(&self, inside: &str) -> PathBuf {
        self.folder.join("out").join(inside)
    }

    /// The container of the guest image: its root, both volumes, the pod's user, and no capability.
    fn command(&self, volume: &str, words: &[&str]) -> Command {
        let script = format!(
            "mount --bind $0/tools $0/image/ftvm-tools && {volume} && \
             exec chroot --userspec=65532:65532 --groups= $0/image /ftvm-tools/seat copy --to /ftvm-guest \"$@\""
        );
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--pid", "--fork", "--kill-child", "sh", "-c", &script])
            .arg(&self.folder)
            .args(words)
            .stdin(Stdio::null());
        command
    }

    fn copy(&self, words: &[&str]) -> Output {
        self.command(FOLDER, words).output().unwrap()
    }

    /// It is refused with these words, and nothing is copied.
    fn refused(&self, what: &str, words: &[&str], why: &str) {
        let output = self.copy(words);
        let said = said(&output);
        assert_eq!(output.status.code(), Some(GUEST_IMAGE.into()), "{what}: {said}");
        let last = said.lines().last().unwrap_or_default();
        assert!(
            last.starts_with("seat: ") && last.contains(why),
            "{what}: no {why:?} in: {said}"
        );
        assert_eq!(fs::read_dir(self.folder.join("out")).unwrap().count(), 0, "{what}");
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// No block of these is zeros.
fn contents(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at >> 12) as u8 | 1).collect()
}

fn succeeds(output: &Output) {
    assert!(output.status.success(), "{}", said(output));
}

#[test]
fn files_are_copied_with_their_times_and_without_their_zeros() {
    let image = Image::new();
    let installed = fs::read(image.folder.join("tools/seat")).unwrap();
    assert!(installed == fs::read(env!("CARGO_BIN_EXE_seat")).unwrap());
    let kernel = contents(3 * MIB + 123);
    let path = image.write("boot/vmlinuz", &kernel);
    let then = SystemTime::UNIX_EPOCH + Duration::new(1_700_000_000, 123_456_789);
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_modified(then)
        .unwrap();
    // A disk with a hole, with zeros that were written, and with something before, between and behind them.
    let disk = image.write("disk/root.raw", b"begin");
    let file = File::options().write(true).open(&disk).unwrap();
    file.set_len(96 << 20).unwrap();
    file.write_all_at(&vec![0; 16 * MIB], 8 << 20).unwrap();
    file.write_all_at(b"between", (16 << 20) - 3).unwrap();
    file.write_all_at(b"end", (96 << 20) - 3).unwrap();
    // No initrd: that is no mistake.
    succeeds(&image.copy(&["/boot/vmlinuz", "--optional", "/boot/initrd", "/disk/root.raw"]));
    assert!(fs::read(image.copied("boot/vmlinuz")).unwrap() == kernel);
    assert_eq!(
        fs::metadata(image.copied("boot/vmlinuz")).unwrap().modified().unwrap(),
        then
    );
    assert!(!image.copied("boot/initrd").exists());
    let copy = image.copied("disk/root.raw");
    assert!(fs::read(&copy).unwrap() == fs::read(&disk).unwrap());
    let (from, to) = (fs::metadata(&disk).unwrap(), fs::metadata(&copy).unwrap());
    assert!(
        from.blocks() * 512 >= 16 << 20,
        "the image's has {} blocks",
        from.blocks()
    );
    assert!(to.blocks() * 512 < 1 << 20, "its copy has {} blocks", to.blocks());
    assert_eq!(to.mode() & 0o7777, 0o644);
    // Again, over what was copied of another version of the image; an initrd is copied if there is one.
    image.write("boot/vmlinuz", b"newer and shorter");
    image.write("boot/initrd", b"an initrd");
    succeeds(&image.copy(&["/boot/vmlinuz", "--optional", "/boot/initrd"]));
    assert_eq!(fs::read(image.copied("boot/vmlinuz")).unwrap(), b"newer and shorter");
    assert_eq!(fs::read(image.copied("boot/initrd")).unwrap(), b"an initrd");
}

/// Images that lead elsewhere: out of the image, to another file of it, to a device, to what is mounted in the container.
#[test]
fn nothing_but_regular_files_of_the_image_is_copied() {
    let image = Image::new();
    fs::write(image.folder.join("secret"), b"of the node").unwrap();
    image.write("boot/other", b"another");
    let make = |script: &str| {
        let mut shell = Command::new("sh");
        let status = shell.args(["-c", script]).arg(image.path("boot/bad")).status().unwrap();
        assert!(status.success(), "{script}");
    };
    for (script, why) in [
        ("ln -s ../../secret $0", "is a symbolic link"),
        ("ln -s /boot/other $0", "is a symbolic link"),
        ("ln -s other $0", "is a symbolic link"),
        ("ln -s none $0", "is a symbolic link"),
        ("mkdir $0", "no regular file (Directory)"),
        // To open it would wait for somebody who writes.
        ("mkfifo -m 666 $0", "no regular file (Fifo)"),
        ("mknod -m 666 $0 c 1 5", "no regular file (CharacterDevice)"),
        ("install -m 600 /dev/null $0", "chmod a+r"),
    ] {
        make(script);
        image.refused(script, &["/boot/bad"], why);
        // Nor is it left out where there need not be any.
        image.refused(script, &["--optional", "/boot/bad"], why);
        make("rm -r $0");
    }
    symlink("boot", image.path("link")).unwrap();
    for (path, why) in [
        ("/link/other", "lies behind a symbolic link"),
        ("/ftvm-tools/seat", "something is mounted there"),
        ("/boot/bad", "the guest image has no file /boot/bad"),
        ("/boot/other/bad", "the guest image has no file /boot/other/bad"),
    ] {
        image.refused(path, &[path], why);
    }
    // The same name, as it should be.
    image.write("boot/bad", b"a good file");
    succeeds(&image.copy(&["/boot/bad"]));
    assert_eq!(fs::read(image.copied("boot/bad")).unwrap(), b"a good file");
}

#[test]
fn a_full_disk_is_told_and_holes_need_no_room() {
    let image = Image::new();
    let small = "mount -t tmpfs -o size=2M,mode=777 none $0/image/ftvm-guest";
    image.write("disk/root.raw", &contents(8 * MIB));
    let output = image
        .command(small, &["/boot/vmlinuz", "/disk/root.raw"])
        .output()
        .unwrap();
    let said = said(&output);
    assert_eq!(output.status.code(), Some(GUEST_IMAGE.into()), "{said}");
    for words in [
        "/disk/root.raw of the guest image can't be copied to /ftvm-guest/disk/root.raw",
        "make space",
    ] {
        assert!(said.contains(words), "no {words:?} in: {said}");
    }
    image.write("disk/root.raw", &vec![0; 8 * MIB]);
    succeeds(
        &image
            .command(small, &["/boot/vmlinuz", "/disk/root.raw"])
            .output()
            .unwrap(),
    );
}

/// The first process of a container gets no signal that it does not ask for: a pod that is deleted would wait for the whole copy.
#[test]
fn sigterm_ends_a_copy() {
    let image = Image::new();
    image.write("a", b"a file");
    // Seconds of work.
    let many = vec!["/a"; 100_000];
    let mut container = image.command(FOLDER, &many).spawn().unwrap();
    wait("something is copied", || image.copied("a").exists().then_some(()));
    let program = wait("the container has its program", || only_child(&container));
    // SAFETY: signals the program of this test's container, whose parent was not waited for.
    unsafe { libc::kill(program, libc::SIGTERM) };
    assert_eq!(container.wait().unwrap().code(), Some(128 + libc::SIGTERM));
}

fn only_child(of: &Child) -> Option<i32> {
    let text = fs::read_to_string(format!("/proc/{0}/task/{0}/children", of.id())).ok()?;
    text.trim().parse().ok()
}

fn wait<T>(what: &str, probe: impl Fn() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_wrong_order_is_a_usage_error() {
    for words in [
        &["install"][..],
        &["copy"],
        &["copy", "--to", "/a"],
        &["copy", "/boot/vmlinuz"],
        &["copy", "--to", "/a", "b"],
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_seat")).args(words).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{words:?}");
        assert!(
            said(&output).contains("usage: seat install PATH, or seat copy"),
            "{words:?}"
        );
    }
    // Where nothing can be put.
    let output = Command::new(env!("CARGO_BIN_EXE_seat"))
        .args(["install", "/proc/none/seat"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(GUEST_IMAGE.into()));
    assert!(
        said(&output).contains("can't be put at /proc/none/seat"),
        "{}",
        said(&output)
    );
}
