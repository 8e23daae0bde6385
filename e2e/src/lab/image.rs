//! Disk images for nodes and guests, made from Debian packages and cached by what they are made of.
//!
//! A root file system comes from mmdebstrap and the mirror that this machine's own apt uses, the image from `mke2fs -d`. Kernel and initrd are
//! the distribution's own, as its packages leave them in /boot. Programs that are built here lie beside Debian's in /usr/local/bin.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, bail, ensure};

use super::cache;

/// The Debian release that nodes and guests run.
const SUITE: &str = "bookworm";

/// What an image is made of.
struct Recipe {
    /// Name of the cache entry.
    kind: &'static str,
    /// Debian packages beside the minimal base.
    packages: &'static [&'static str],
    /// Further packages.
    more_packages: &'static [&'static str],
    /// Programs of the folder that [`Recipe::image`] gets.
    programs: &'static [&'static str],
    /// A shell script run with the root folder as its first argument.
    customize: &'static str,
    /// Size of the file system in MiB.
    size_mib: u32,
}

const NODE_PACKAGES: &[&str] = &[
    "e2fsprogs",
    "ethtool",
    "initramfs-tools",
    "iproute2",
    "iputils-ping",
    "kmod",
    "linux-image-cloud-amd64",
    "mount",
    "nftables",
    "procps",
    "zstd",
];

const NODE: Recipe = Recipe {
    kind: "node",
    packages: NODE_PACKAGES,
    more_packages: &[],
    programs: &[],
    customize: include_str!("../../nodes/node-image.sh"),
    size_mib: 1200,
};

const CLUSTER_NODE: Recipe = Recipe {
    kind: "cluster-node",
    packages: NODE_PACKAGES,
    more_packages: &["ca-certificates", "containernetworking-plugins", "iptables", "runc"],
    programs: &["containerd", "containerd-shim-runc-v2", "ctr", "kubelet", "kube-proxy"],
    customize: include_str!("../../nodes/node-image.sh"),
    size_mib: 1600,
};

const GUEST: Recipe = Recipe {
    kind: "guest",
    packages: &[
        "dropbear",
        "e2fsprogs",
        "initramfs-tools",
        "iproute2",
        "linux-image-cloud-amd64",
        "nginx-light",
        "procps",
        "redis-server",
        "sysvinit-core",
        "zstd",
    ],
    more_packages: &[],
    programs: &[],
    customize: include_str!("../../nodes/guest-image.sh"),
    size_mib: 320,
};

/// A bootable system.
#[derive(Debug, Clone)]
pub struct Image {
    /// The folder that holds the files.
    pub folder: PathBuf,
    /// Kernel, a bzImage.
    pub kernel: PathBuf,
    /// The initrd that the distribution made for it.
    pub initrd: PathBuf,
    /// The root file system: ext4 without partitions. Never written to: copies and snapshots are.
    pub disk: PathBuf,
}

impl Image {
    /// The system of an emulated machine. Built in about a minute, then cached.
    ///
    /// # Errors
    /// If mmdebstrap or mke2fs fail: both say why.
    pub fn node() -> anyhow::Result<Self> {
        NODE.image(None)
    }

    /// The system of an emulated machine that is a node of a cluster, with those of `programs` that nodes run. That folder is known by its
    /// name, so the name must change with what is in it. Built in about a minute, then cached.
    ///
    /// # Errors
    /// If mmdebstrap or mke2fs fail: both say why.
    pub fn cluster_node(programs: &Path) -> anyhow::Result<Self> {
        CLUSTER_NODE.image(Some(programs))
    }

    /// The Debian guest: Redis (append-only, fsync at every write), an HTTP server, an SSH server. Built in about a minute, then cached.
    ///
    /// # Errors
    /// If mmdebstrap or mke2fs fail: both say why.
    pub fn guest() -> anyhow::Result<Self> {
        GUEST.image(None)
    }
}

impl Recipe {
    fn image(&self, programs: Option<&Path>) -> anyhow::Result<Image> {
        let sources = apt_sources()?;
        let key = self.key(&sources, programs);
        let folder = cache::entry(self.kind, &key, |folder| self.build(folder, &sources, programs))?;
        Ok(Image {
            kernel: folder.join("vmlinuz"),
            initrd: folder.join("initrd.img"),
            disk: folder.join("root.img"),
            folder,
        })
    }

    /// Changes with everything that the image is made of.
    fn key(&self, sources: &str, programs: Option<&Path>) -> String {
        let packages = self.all_packages();
        let size = self.size_mib.to_le_bytes();
        let mut parts = vec![
            packages.as_bytes(),
            self.customize.as_bytes(),
            &size,
            SUITE.as_bytes(),
            sources.as_bytes(),
        ];
        if let Some(name) = programs.and_then(Path::file_name) {
            parts.push(name.as_encoded_bytes());
            parts.extend(self.programs.iter().map(|program| program.as_bytes()));
        }
        cache::key(&parts)
    }

    fn all_packages(&self) -> String {
        [self.packages, self.more_packages].concat().join(",")
    }

    fn build(&self, folder: &Path, sources: &str, programs: Option<&Path>) -> anyhow::Result<()> {
        eprintln!(
            "lab: building the {} image from Debian packages (about a minute, then cached)",
            self.kind
        );
        let begin = Instant::now();
        let root = folder.join("root");
        let hook = folder.join("customize");
        fs::write(&hook, self.customize)?;
        let list = folder.join("sources.list");
        fs::write(&list, sources)?;
        let mut mmdebstrap = Command::new("mmdebstrap");
        mmdebstrap
            .args(["--quiet", "--variant=minbase", "--format=directory"])
            .arg(format!("--include={}", self.all_packages()))
            // Nobody reads these on a test machine.
            .arg("--dpkgopt=path-exclude=/usr/share/man/*")
            .arg("--dpkgopt=path-exclude=/usr/share/locale/*")
            .arg("--dpkgopt=path-exclude=/usr/share/doc/*")
            .arg(format!("--customize-hook=sh {} \"$1\"", hook.display()))
            .arg(SUITE)
            .args([&root, &list]);
        finish(mmdebstrap, &folder.join("build.log"))?;
        let boot = root.join("boot");
        for (prefix, name) in [("vmlinuz-", "vmlinuz"), ("initrd.img-", "initrd.img")] {
            let found = fs::read_dir(&boot)?
                .filter_map(Result::ok)
                .find(|entry| entry.file_name().to_str().is_some_and(|file| file.starts_with(prefix)))
                .with_context(|| format!("no {prefix}* in {}", boot.display()))?;
            // Machines are started with these; a copy on their disks would only be carried about.
            fs::copy(found.path(), folder.join(name))?;
            fs::remove_file(found.path())?;
        }
        for (programs, name) in programs
            .iter()
            .flat_map(|programs| self.programs.iter().map(move |name| (programs, name)))
        {
            let (from, to) = (programs.join(name), root.join("usr/local/bin").join(name));
            fs::copy(&from, to).with_context(|| format!("cannot copy {}", from.display()))?;
        }
        let mut mke2fs = Command::new("mke2fs");
        mke2fs
            .args(["-q", "-t", "ext4", "-L", self.kind, "-d"])
            .arg(&root)
            .arg(folder.join("root.img"));
        mke2fs.arg(format!("{}M", self.size_mib));
        finish(mke2fs, &folder.join("build.log"))?;
        fs::remove_dir_all(&root)?;
        eprintln!(
            "lab: the {} image took {:.0} s",
            self.kind,
            begin.elapsed().as_secs_f64()
        );
        Ok(())
    }
}

/// Runs a program whose output goes to a log; the end of the log is part of the error.
fn finish(mut command: Command, log: &Path) -> anyhow::Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = fs::File::options().create(true).append(true).open(log)?;
    let status = command
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .status()
        .with_context(|| format!("cannot start {name}: is its package installed? (`cargo xtask test` does it)"))?;
    if !status.success() {
        let text = fs::read_to_string(log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        bail!(
            "{name} failed ({status}); the end of {}:\n{}",
            log.display(),
            lines[lines.len().saturating_sub(15)..].join("\n")
        );
    }
    Ok(())
}

/// One line of sources for mmdebstrap, from those of this machine: the same mirror, the main component.
fn apt_sources() -> anyhow::Result<String> {
    let mut texts = Vec::new();
    let parts = fs::read_dir("/etc/apt/sources.list.d")
        .into_iter()
        .flatten()
        .filter_map(Result::ok);
    let mut paths: Vec<PathBuf> = parts.map(|entry| entry.path()).collect();
    paths.sort();
    paths.insert(0, "/etc/apt/sources.list".into());
    for path in paths {
        if let Ok(text) = fs::read_to_string(path) {
            texts.push(text);
        }
    }
    let uri = texts.iter().find_map(|text| debian_mirror(text));
    let uri = uri
        .context("the apt sources of this machine name no Debian mirror; emulated nodes are made of Debian packages")?;
    ensure!(
        Path::new("/usr/share/keyrings/debian-archive-keyring.gpg").exists(),
        "install the package debian-archive-keyring"
    );
    Ok(format!(
        "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {uri} {SUITE} main\n"
    ))
}

/// The first mirror of the Debian archive (its path ends in `/debian`) in a sources file of either format.
fn debian_mirror(text: &str) -> Option<String> {
    let words = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.starts_with('#'))
        .flat_map(|line| {
            let uses = line.starts_with("URIs:") || line.starts_with("deb ");
            line.split_whitespace().filter(move |_| uses)
        });
    words
        .filter(|word| word.contains("://") || word.starts_with("file:"))
        .map(|word| word.trim_end_matches('/'))
        .find(|word| word.ends_with("/debian"))
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clusters_node_is_known_by_its_programs() {
        let key = |folder: &str| CLUSTER_NODE.key("deb", Some(Path::new(folder)));
        assert_eq!(key("/a/kubernetes-1"), key("/b/kubernetes-1"));
        assert_ne!(key("/a/kubernetes-1"), key("/a/kubernetes-2"));
        assert_ne!(key("/a/kubernetes-1"), CLUSTER_NODE.key("deb", None));
        assert_ne!(NODE.key("deb", None), NODE.key("deb other", None));
    }

    #[test]
    fn the_mirror_is_read_from_both_formats() {
        let deb822 =
            "Types: deb\n# URIs: http://old.example/debian\nURIs: http://mirror.example/debian/\nSuites: stable\n";
        assert_eq!(debian_mirror(deb822).as_deref(), Some("http://mirror.example/debian"));
        let one_line =
            "# deb http://no.example/debian x main\ndeb [signed-by=/k.gpg] https://a.example/debian bookworm main\n";
        assert_eq!(debian_mirror(one_line).as_deref(), Some("https://a.example/debian"));
        assert_eq!(debian_mirror("deb http://a.example/debian-security x main\n"), None);
    }
}
