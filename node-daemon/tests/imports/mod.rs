//! A folder to import in, and the judge of what came of it.
#![allow(dead_code)] // each test program uses a part

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use ftvm_node_daemon::disks::mark::MarkFile;
use ftvm_node_daemon::disks::thick;
use ftvm_node_daemon::{import, random};
use ring::digest;

pub const MIB: usize = 1 << 20;

/// Programs under test.
pub fn program(name: &str) -> &'static str {
    match name {
        "importer" => env!("CARGO_BIN_EXE_importer"),
        "seat" => env!("CARGO_BIN_EXE_seat"),
        _ => env!("CARGO_BIN_EXE_ftvm-node-daemon"),
    }
}

/// Contents that tell every place apart, with a stretch of zeros in the middle.
pub fn contents(mib: u64) -> Vec<u8> {
    let bytes = mib as usize * MIB;
    let mut found = Vec::with_capacity(bytes);
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    while found.len() < bytes {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        found.extend_from_slice(&(state >> 7).to_le_bytes());
    }
    found.truncate(bytes);
    found[bytes / 3..bytes / 2].fill(0);
    found
}

pub fn sha256(bytes: &[u8]) -> String {
    let digest = digest::digest(&digest::SHA256, bytes);
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub struct Bench {
    folder: PathBuf,
    mounted: bool,
}

impl Bench {
    pub fn new() -> Bench {
        let folder = std::env::temp_dir().join(format!("ftvm-import-{:x}", random::nonzero_u64()));
        std::fs::create_dir_all(&folder).unwrap();
        Bench { folder, mounted: false }
    }

    /// On a file system of its own.
    pub fn on_a_volume_of(mib: u64) -> Bench {
        Bench::on("ext4", mib)
    }

    /// `SYSTEM` or `SYSTEM,OPTION`, as mount has them.
    pub fn on(system: &str, mib: u64) -> Bench {
        let mut bench = Bench::new();
        let (system, options) = system.split_once(',').unwrap_or((system, ""));
        let image = bench.folder.with_extension("volume");
        let folder = bench.folder.display().to_string();
        let device = image.display().to_string();
        let mut options = options.to_owned();
        if system == "tmpfs" {
            options = format!("size={mib}M");
        } else {
            std::fs::File::create(&image).unwrap().set_len(mib << 20).unwrap();
            let quiet = if system.starts_with("ext") { "-qF" } else { "-q" };
            bench.run(&format!("mkfs.{system}"), &[quiet, &device], "");
            options.push_str(if options.is_empty() { "loop" } else { ",loop" });
        }
        bench.run("mount", &["-t", system, "-o", &options, &device, &folder], "");
        bench.mounted = true;
        // Gone from the folder of temporary files; the mount holds it.
        let _ = std::fs::remove_file(&image);
        bench
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    pub fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        std::fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }

    /// Runs a program in the folder; gives the path of what it makes.
    pub fn run(&self, program: &str, words: &[&str], makes: &str) -> PathBuf {
        let output = Command::new(program)
            .args(words)
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .output()
            .unwrap_or_else(|error| panic!("{program}: {error}"));
        assert!(output.status.success(), "{program} {words:?}: {}", said(&output));
        self.path(makes)
    }

    pub fn convert(&self, from: &str, to: &str, words: &[&str]) -> PathBuf {
        let all = [&["convert", "-f", "raw", "-O", "qcow2"], words, &[from, to]].concat();
        self.run("qemu-img", &all, to)
    }

    pub fn command(&self, name: &str, mib: u64, words: &[&str]) -> Command {
        let mut command = Command::new(program("ftvm-node-daemon"));
        command.arg("import").arg("--to").arg(self.path(name));
        command.args(["--size-mib", &mib.to_string()]).args(words);
        command
    }

    pub fn import(&self, name: &str, mib: u64, words: &[&str]) -> Output {
        self.command(name, mib, words).output().unwrap()
    }

    pub fn import_to(&self, path: &Path, words: &[&str]) -> Output {
        let mut command = Command::new(program("ftvm-node-daemon"));
        command.arg("import").arg("--to").arg(path).args(words);
        command.output().unwrap()
    }

    /// Whether the disk's mark says so.
    pub fn complete(&self, name: &str) -> bool {
        let mark = MarkFile::new(import::mark_path(&self.path(name))).read().unwrap();
        mark.is_some_and(|mark| mark.complete)
    }

    /// What its mark vouches for.
    pub fn done_bytes(&self, name: &str) -> u64 {
        let mark = MarkFile::new(import::mark_path(&self.path(name))).read().unwrap();
        mark.map_or(0, |mark| mark.done_bytes)
    }

    /// A disk that counts has its contents and all its blocks.
    pub fn judge(&self, name: &str, expected: &[u8]) -> Result<(), String> {
        if !self.complete(name) {
            return Err("its mark does not say complete".to_owned());
        }
        let file = std::fs::File::open(self.path(name)).map_err(|error| error.to_string())?;
        thick::verify(&file, expected.len() as u64).map_err(|error| error.to_string())?;
        let found = std::fs::read(self.path(name)).map_err(|error| error.to_string())?;
        let wrong = found
            .iter()
            .zip(expected)
            .position(|(found, expected)| found != expected);
        match wrong {
            Some(at) => Err(format!("byte {at} is wrong")),
            None if found.len() != expected.len() => Err("it has another length".to_owned()),
            None => Ok(()),
        }
    }

    pub fn remove(&self, name: &str) {
        std::fs::remove_file(self.path(name)).unwrap();
        let _ = std::fs::remove_file(import::mark_path(&self.path(name)));
    }

    /// A block device over a file of the folder.
    pub fn device(&self, name: &str) -> Device {
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(self.path(name))
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", said(&output));
        let path = String::from_utf8(output.stdout).unwrap();
        Device {
            path: path.trim().into(),
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if self.mounted {
            let _ = Command::new("umount").arg(&self.folder).status();
        }
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

pub struct Device {
    pub path: PathBuf,
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}
