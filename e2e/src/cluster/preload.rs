//! Images that emulated nodes have from the start. An emulated processor would take minutes to unpack them, so a containerd on this machine
//! does it, once, and what it leaves behind is where each node's containerd begins.
use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};

use super::log_end;
use super::wait::{Hopeless, wait_for};
use crate::lab::{Sandbox, make_ext4};

/// Long enough for a busy machine; nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(120);

/// Makes a disk of this size in `folder`, which has `lib/containerd` with the images of these OCI archives unpacked.
///
/// # Errors
/// If an archive is none.
pub(super) fn disk(
    sandbox: &Sandbox,
    programs: &Path,
    archives: &[PathBuf],
    folder: &Path,
    size_mib: u64,
) -> anyhow::Result<PathBuf> {
    let content = folder.join("preload");
    fs::create_dir_all(content.join("lib/containerd"))?;
    let log = folder.join("preload.log");
    let config = folder.join("preload.toml");
    let socket = folder.join("preload.sock");
    let text = include_str!("../../cluster/preload.toml")
        .replace("{ROOT}", &content.join("lib/containerd").display().to_string())
        .replace("{STATE}", &folder.join("preload-state").display().to_string())
        .replace("{SOCKET}", &socket.display().to_string());
    fs::write(&config, text)?;
    let output = File::create(&log)?;
    let mut command = Command::new(programs.join("containerd"));
    command.arg("--config").arg(&config);
    command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
    let mut containerd = Running(sandbox.spawn(command)?);
    wait_for("containerd answers", PATIENCE, || {
        if let Some(status) = containerd.0.try_wait()? {
            return Err(Hopeless(format!("it ended ({status}):\n{}", log_end(&log))).into());
        }
        Ok(UnixStream::connect(&socket)?)
    })?;
    for archive in archives {
        let mut ctr = Command::new(programs.join("ctr"));
        ctr.arg("--address").arg(&socket);
        ctr.args(["--namespace", "k8s.io", "images", "import"]).arg(archive);
        ctr.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = sandbox.spawn(ctr)?.wait_with_output()?;
        ensure!(
            output.status.success(),
            "containerd cannot import {}: {}",
            archive.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    drop(containerd);
    let disk = folder.join("preload.img");
    make_ext4(&content, &disk, size_mib, &[])?;
    fs::remove_dir_all(&content).with_context(|| format!("cannot remove {}", content.display()))?;
    Ok(disk)
}

/// A program that ends with this value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is gone after this. Its databases are as durable as at a power cut.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
