//! A guest under QEMU's emulation, and its disk.

use crate::client::Client;
use ftvm_e2e::guest_build::build_embedded_guest;
use ftvm_e2e::guest_protocol::DEFAULT_PORT;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

/// A scratch disk; removed at the end.
pub struct Disk(PathBuf);

impl Disk {
    pub fn create(name: &str, bytes: u64) -> Self {
        let path = std::env::temp_dir().join(format!("ftvm-guest-{}-{name}.img", std::process::id()));
        File::create(&path)
            .and_then(|file| file.set_len(bytes))
            .expect("a scratch disk");
        Self(path)
    }

    fn file(&self) -> File {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(&self.0)
            .expect("the scratch disk")
    }

    /// Flips one bit of the byte at `offset`.
    pub fn flip(&self, offset: u64) {
        let mut byte = [0];
        self.file().read_exact_at(&mut byte, offset).expect("inside the disk");
        self.file()
            .write_all_at(&[byte[0] ^ 4], offset)
            .expect("inside the disk");
    }

    pub fn zero(&self, offset: u64, bytes: usize) {
        self.file()
            .write_all_at(&vec![0; bytes], offset)
            .expect("inside the disk");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A running guest; killed when dropped.
pub struct Guest {
    child: Child,
    console: BufReader<ChildStdout>,
    port: u16,
}

impl Guest {
    /// Starts a guest with user networking and waits until it serves.
    pub fn start<'a>(name: &str, disks: impl IntoIterator<Item = &'a Disk>, command_line: &str) -> Self {
        let port = free_port();
        let network =
            format!("user,net=10.0.0.0/24,host=10.0.0.1,hostfwd=tcp:127.0.0.1:{port}-10.0.0.2:{DEFAULT_PORT}");
        let mut guest = Self::start_on(name, disks, command_line, &network);
        guest.port = port;
        guest
    }

    /// Starts a guest with another network.
    pub fn start_on<'a>(
        name: &str,
        disks: impl IntoIterator<Item = &'a Disk>,
        command_line: &str,
        network: &str,
    ) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let elf = build_embedded_guest(&root).expect("the guest builds");
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args([
                "-name",
                name,
                "-M",
                "q35,accel=tcg",
                "-cpu",
                "max",
                "-smp",
                "2",
                "-m",
                "64",
            ])
            .args([
                "-nodefaults",
                "-display",
                "none",
                "-serial",
                "stdio",
                "-append",
                command_line,
                "-kernel",
            ])
            .arg(elf)
            .args(["-netdev", &format!("{network},id=net"), "-device"])
            .arg("virtio-net-pci,netdev=net,disable-legacy=on,romfile=");
        for (number, disk) in disks.into_iter().enumerate() {
            let path = disk.0.to_str().expect("a plain path");
            command.args([
                "-drive",
                &format!("file={path},if=none,id=disk{number},format=raw"),
                "-device",
            ]);
            command.arg(format!("virtio-blk-pci,drive=disk{number},disable-legacy=on"));
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-system-x86_64 starts (Debian package qemu-system-x86)");
        let console = BufReader::new(child.stdout.take().expect("it is piped"));
        let mut guest = Self {
            child,
            console,
            port: 0,
        };
        guest.wait_ready();
        guest
    }

    /// Reads the console until the guest serves.
    pub fn wait_ready(&mut self) {
        let mut seen = String::new();
        while !seen.contains(" ready on ") {
            assert!(!seen.contains(" stops: "), "the guest failed:\n{seen}");
            let mut line = Vec::new();
            let bytes = self.console.read_until(b'\n', &mut line).expect("the console");
            assert!(bytes > 0, "QEMU ended before the guest served; its console:\n{seen}");
            seen.push_str(&String::from_utf8_lossy(&line));
        }
    }

    /// Waits until QEMU ends by itself.
    pub fn wait_end(&mut self) {
        let mut rest = String::new();
        let _ = self.console.read_to_string(&mut rest);
        let status = self.child.wait().expect("it was started");
        assert!(status.success(), "QEMU ended with {status}; the console's end:\n{rest}");
    }

    pub fn connect(&self) -> Client {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).expect("the forwarded port");
        Client::new(stream)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port that is free now.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a free port")
        .port()
}
