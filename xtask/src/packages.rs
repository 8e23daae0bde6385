//! Programs of the machine that the tests need, and the Debian packages that they come from.
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

/// (a file that the package brings, its name)
pub type Package = (&'static str, &'static str);

/// For whatever makes namespaces of this machine.
pub const NAMESPACES: &[Package] = &[("ip", "iproute2"), ("nft", "nftables"), ("unshare", "util-linux")];

/// For tests on this machine's own kernel, beside [`NAMESPACES`].
pub const NATIVE: &[Package] = &[
    ("gcc", "gcc"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("qemu-img", "qemu-utils"),
    ("qemu-io", "qemu-utils"),
    ("mkfs.xfs", "xfsprogs"),
    ("mkfs.btrfs", "btrfs-progs"),
    ("mkfs.ext4", "e2fsprogs"),
    ("strace", "strace"),
    ("xz", "xz-utils"),
    ("zstd", "zstd"),
];

/// For the chart's alerts, which Prometheus' own program plays.
pub const ALERTS: &[Package] = &[("promtool", "prometheus")];

/// For emulated nodes.
pub const EMULATED: &[Package] = &[
    ("mmdebstrap", "mmdebstrap"),
    (
        "/usr/share/keyrings/debian-archive-keyring.gpg",
        "debian-archive-keyring",
    ),
    ("mke2fs", "e2fsprogs"),
    ("debugfs", "e2fsprogs"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("ganesha.nfsd", "nfs-ganesha"),
    ("/usr/lib/x86_64-linux-gnu/ganesha/libfsalvfs.so", "nfs-ganesha-vfs"),
    ("redis-check-aof", "redis-tools"),
    ("ssh", "openssh-client"),
];

/// For clusters of native nodes.
pub const CLUSTER: &[Package] = &[
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("iptables", "iptables"),
    ("runc", "runc"),
    ("/usr/lib/cni/bridge", "containernetworking-plugins"),
    ("buildah", "buildah"),
    ("strip", "binutils"),
];

/// Installs what is missing, as root; otherwise says what to install.
///
/// # Errors
/// If something is missing and cannot be installed.
pub fn ensure(wanted: &[Package]) -> anyhow::Result<()> {
    let mut missing: Vec<&str> = wanted
        .iter()
        .filter(|(file, _)| !present(file))
        .map(|(_, name)| *name)
        .collect();
    missing.sort_unstable();
    missing.dedup();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    if !rustix::process::geteuid().is_root() || !present("apt-get") {
        bail!(
            "this machine lacks: {names}. Install these Debian packages (`sudo apt-get install --no-install-recommends {names}`) and try again"
        );
    }
    eprintln!("installing Debian packages: {names}");
    apt_get(&["-qq", "update"])?;
    apt_get(&[&["-qq", "-y", "install", "--no-install-recommends"], missing.as_slice()].concat())?;
    match wanted.iter().find(|(file, _)| !present(file)) {
        None => Ok(()),
        Some((file, name)) => bail!("the package {name} was installed, but {file} is not there"),
    }
}

fn present(file: &str) -> bool {
    if file.starts_with('/') {
        return Path::new(file).exists();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    places.into_iter().any(|folder| folder.join(file).is_file())
}

fn apt_get(arguments: &[&str]) -> anyhow::Result<()> {
    let mut command = Command::new("apt-get");
    command
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    // No service is to start on the machine that runs the tests: neither by SysV's scripts nor by systemd.
    command.env("RUNLEVEL", "1").env("SYSTEMD_OFFLINE", "1");
    let status = command.status().context("cannot start apt-get")?;
    if !status.success() {
        bail!("apt-get {} ended with {status}", arguments.join(" "));
    }
    Ok(())
}
