//! Examining a guest's disk from outside, on real file systems and real logs that somebody damages: each damage has to be found, and what a power
//! cut leaves is none. No machine is emulated; the programs are those of this tier.
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use ftvm_e2e::lab::guest;

const BLOCK_BYTES: u64 = 4096;
const DISK_BYTES: u64 = 32 << 20;
/// Where Redis keeps its logs, and the two files there.
const LOGS: &str = "/var/lib/redis/appendonlydir";
const LOG: &str = "/var/lib/redis/appendonlydir/appendonly.aof.1.incr.aof";
const MANIFEST: &str = "/var/lib/redis/appendonlydir/appendonly.aof.manifest";
/// As Redis writes them: what names the logs, and one with two commands.
const NAMED: &str = "file appendonly.aof.1.incr.aof seq 1 type i\n";
const COMMANDS: &str = "*2\r\n$6\r\nSELECT\r\n$1\r\n0\r\n*2\r\n$4\r\nINCR\r\n$1\r\na\r\n";

/// Runs a tool, and returns what it printed.
fn tool(words: &[&str]) -> String {
    let output = Command::new(words[0]).args(&words[1..]).output();
    let output = output.unwrap_or_else(|error| panic!("{words:?}: {error}"));
    assert!(output.status.success(), "{words:?}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

/// A disk, and a place to examine it.
struct Examined {
    disk: PathBuf,
    scratch: PathBuf,
}

impl Examined {
    /// With a file system that has these files.
    fn new(name: &str, files: &[(&str, &str)]) -> Self {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("examination").join(name);
        fs::remove_dir_all(&folder).ok();
        let (root, scratch) = (folder.join("root"), folder.join("scratch"));
        fs::create_dir_all(root.join("var/lib/redis")).expect("the target folder is writable");
        fs::create_dir(&scratch).expect("a new folder");
        for (path, content) in files {
            let path = root.join(path.trim_start_matches('/'));
            fs::create_dir_all(path.parent().expect("in a folder")).expect("a folder");
            fs::write(&path, content).expect("a file");
        }
        let disk = folder.join("disk.img");
        let file = File::create(&disk).expect("a file");
        file.set_len(DISK_BYTES).expect("a sparse file");
        let block_bytes = BLOCK_BYTES.to_string();
        let (root, target) = (root.to_str().expect("text"), disk.to_str().expect("text"));
        tool(&["mkfs.ext4", "-q", "-b", &block_bytes, "-d", root, target]);
        Self { disk, scratch }
    }

    /// With everything that the guest has when all is well.
    fn sound(name: &str) -> Self {
        Self::new(name, &[(MANIFEST, NAMED), (LOG, COMMANDS)])
    }

    fn path(&self) -> &str {
        self.disk.to_str().expect("text")
    }

    fn debugfs(&self, request: &str) -> String {
        tool(&["debugfs", "-w", "-R", request, self.path()])
    }

    /// The block that says which blocks of the first group are used.
    fn bitmap(&self) -> u64 {
        let stats = self.debugfs("stats");
        let said = stats.split_once("block bitmap at ").expect("a group").1;
        let digits: String = said.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().expect("a block's number")
    }

    fn wipe(&self, block: u64) {
        let file = File::options().write(true).open(&self.disk).expect("it is there");
        let zeros = [0; BLOCK_BYTES as usize];
        file.write_all_at(&zeros, block * BLOCK_BYTES).expect("writable");
    }

    /// Nothing may be left of an examination, and the disk stays as it is.
    fn examine(&self) -> Result<(), String> {
        let before = fs::read(&self.disk).expect("it is there");
        let result = guest::examine_disk(&self.disk, &self.scratch).map_err(|error| format!("{error:#}"));
        assert!(
            fs::read(&self.disk).expect("it is there") == before,
            "the disk was changed"
        );
        let left = fs::read_dir(&self.scratch).expect("it is there").count();
        assert_eq!(left, 0, "files are left");
        result
    }

    fn expect_damage(&self, words: &str) {
        let found = self.examine().expect_err("the damage is found");
        assert!(found.contains("is damaged") && found.contains(words), "{found}");
    }
}

#[test]
fn a_disk_that_lost_nothing_is_sound() {
    let disk = Examined::sound("sound");
    assert_eq!(disk.examine(), Ok(()));
    assert_eq!(disk.examine(), Ok(()), "once more");
}

#[test]
fn what_the_journal_still_has_is_not_lost() {
    let disk = Examined::sound("journal");
    let bitmap = disk.bitmap();
    let content = disk.scratch.with_file_name("bitmap");
    let whole = fs::read(&disk.disk).expect("it is there");
    let at = (bitmap * BLOCK_BYTES) as usize;
    fs::write(&content, &whole[at..at + BLOCK_BYTES as usize]).expect("writable");
    let requests = disk.scratch.with_file_name("requests");
    let write = format!("jo\njw -b {bitmap} {}\njc\n", content.display());
    fs::write(&requests, write).expect("writable");
    tool(&["debugfs", "-w", "-f", requests.to_str().expect("text"), disk.path()]);
    let features = disk.debugfs("show_super_stats -h");
    assert!(
        features.contains("needs_recovery"),
        "the journal has nothing: {features}"
    );
    disk.wipe(bitmap);
    assert_eq!(disk.examine(), Ok(()));
}

#[test]
fn a_damaged_file_system_is_found() {
    let disk = Examined::sound("bitmap");
    disk.wipe(disk.bitmap());
    disk.expect_damage("\"e2fsck\" \"-f\"");
    disk.expect_damage("\"e2fsck\" \"-f\"");
    let disk = Examined::sound("inode");
    disk.debugfs(&format!("clri {LOG}"));
    disk.expect_damage("\"e2fsck\" \"-f\"");
    let disk = Examined::sound("nothing");
    let emptied = File::create(&disk.disk).and_then(|file| file.set_len(DISK_BYTES));
    emptied.expect("writable");
    disk.expect_damage("\"e2fsck\" \"-p\"");
}

#[test]
fn what_the_guests_kernel_found_is_not_forgotten() {
    let disk = Examined::sound("state");
    // Mounted, and errors were found.
    disk.debugfs("set_super_value state 2");
    disk.expect_damage("not clean with errors");
    let disk = Examined::sound("count");
    disk.debugfs("set_super_value error_count 3");
    disk.expect_damage("with 3 errors");
    // That it was in use until the power cut is no error.
    let disk = Examined::sound("mounted");
    disk.debugfs("set_super_value state 0");
    assert_eq!(disk.examine(), Ok(()));
}

#[test]
fn a_damaged_log_is_found() {
    let disk = Examined::sound("lost-block");
    let block = disk.debugfs(&format!("bmap {LOG} 0"));
    disk.wipe(block.trim().parse().expect("a block's number"));
    disk.expect_damage("\"redis-check-aof\"");
    disk.expect_damage("\"redis-check-aof\"");
    let torn = &COMMANDS[..COMMANDS.len() - 3];
    Examined::new("torn", &[(MANIFEST, NAMED), (LOG, torn)]).expect_damage("\"redis-check-aof\"");
    Examined::new("missing", &[(MANIFEST, NAMED)]).expect_damage("\"redis-check-aof\"");
    Examined::new("none", &[]).expect_damage("no append-only log");
    let disk = Examined::sound("no-folder");
    disk.debugfs(&format!("rm {MANIFEST}"));
    assert!(
        disk.debugfs(&format!("ls {LOGS}")).contains("incr.aof"),
        "the log is still there"
    );
    disk.expect_damage("no append-only log");
}
