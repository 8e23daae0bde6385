//! Datastores of native nodes that can hang, fail or be full apart from everything else of their node: a file system of its own for each
//! class on each node, on a loop device, with some volumes in it.
//!
//! ```text
//!   NODE/datastores/CLASS-PID.image  ◄── loop device ◄── mounted in the node alone ── /var/lib/volumes/CLASS/volume-N
//! ```
//!
//! What is done to one is [`crate::hosts::disk`]'s. Mount and loop device go when the node is killed: nobody unmounts. The image stays in
//! the node's folder, and goes with that.
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use super::plan::VOLUMES_FOLDER;

/// Names of the StorageClasses, which are those of the file systems, too.
pub const CLASSES: [&str; 2] = ["ext4", "xfs"];
/// Room of each. Nothing of it is taken on this machine before it is written.
const MIB: u64 = 2048;

/// Where a node has its datastore of a class.
#[must_use]
pub fn mount_point(class: &str) -> PathBuf {
    Path::new(VOLUMES_FOLDER).join(class)
}

/// Makes a node's images, in its folder.
pub(super) fn make_images(node: &Path) -> anyhow::Result<()> {
    let folder = node.join("datastores");
    fs::create_dir_all(&folder)?;
    for class in CLASSES {
        let image = folder.join(class.to_owned() + &mark());
        File::create(&image)?.set_len(MIB << 20)?;
        let quiet = if class == "ext4" { "-qF" } else { "-q" };
        let made = Command::new(format!("mkfs.{class}")).arg(quiet).arg(&image).output();
        let made =
            made.with_context(|| format!("cannot start mkfs.{class} (Debian packages e2fsprogs and xfsprogs)"))?;
        let text = String::from_utf8_lossy(&made.stderr);
        ensure!(made.status.success(), "mkfs.{class}: {}: {text}", made.status);
    }
    Ok(())
}

/// The manifest of a class: a claim waits for its pod's node.
pub(super) fn storage_class(name: &str) -> Value {
    json!({
        "apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": name},
        "provisioner": "kubernetes.io/no-provisioner", "volumeBindingMode": "WaitForFirstConsumer",
    })
}

/// Loop devices that have an image of a node of this process, with what the kernel says of it.
///
/// # Errors
/// If the kernel's devices can't be listed.
pub fn in_use() -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for device in fs::read_dir("/sys/block").context("reading /sys/block")? {
        let device = device?;
        // Mostly it is no loop device, or one without a file.
        let Ok(image) = fs::read_to_string(device.path().join("loop/backing_file")) else {
            continue;
        };
        if is_own(&image) {
            found.push(format!("{}: {}", device.file_name().display(), image.trim()));
        }
    }
    Ok(found)
}

/// How the images of this process's nodes end.
fn mark() -> String {
    format!("-{}.image", std::process::id())
}

/// The kernel says of a file without a name that it is deleted.
fn is_own(image: &str) -> bool {
    let name = image.trim().trim_end_matches(" (deleted)");
    name.ends_with(&mark())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_of_others_are_not_ours() {
        let own = format!("/run/node/datastores/xfs{}\n", mark());
        assert!(is_own(&own) && is_own(&own.replace('\n', " (deleted)\n")));
        let other = format!("/run/node/datastores/xfs-1{}.image\n", std::process::id());
        assert!(!is_own(&other) && !is_own("/var/lib/something.image\n") && !is_own(""));
    }
}
