//! What a demonstration needs of the machine, said in a way that helps who lacks it.
use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::report::Progress;

/// Something that is missing, and how to mend it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// What.
    pub what: String,
    /// How to mend it.
    pub mend: String,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n    {}", self.what, self.mend.replace('\n', "\n    "))
    }
}

/// Programs that native hosts need, each with its Debian package.
const TOOLS: [(&str, &str); 3] = [("unshare", "util-linux"), ("ip", "iproute2"), ("nft", "nftables")];

/// `KVM_GET_API_VERSION`, `_IO(0xAE, 0)`.
const KVM_GET_API_VERSION: libc::c_ulong = 0xAE00;

/// Everything that native hosts need and this machine lacks. As root, missing packages are installed first.
pub fn missing_for_native(say: &mut dyn FnMut(String)) -> Vec<Missing> {
    let root = is_root();
    let absent = |(tool, _): &&(&str, &str)| find_program(tool).is_none();
    let packages: Vec<&str> = TOOLS.iter().filter(absent).map(|(_, package)| *package).collect();
    if root && !packages.is_empty() && find_program("apt-get").is_some() {
        say(format!("installing {}", packages.join(" ")));
        install(&packages);
    }
    let mut missing: Vec<Missing> = TOOLS
        .iter()
        .filter(absent)
        .map(|(tool, package)| missing_tool(tool, package))
        .collect();
    missing.extend(device(Path::new("/dev/kvm")).err());
    missing.extend(device(Path::new("/dev/net/tun")).err());
    if !root && missing.is_empty() {
        missing.extend(user_namespaces().err());
    }
    missing
}

/// Whether this machine has everything; what is missing is told.
pub fn native_hosts_can_be_made(progress: &Progress) -> bool {
    let missing = missing_for_native(&mut |text| progress.say(text));
    for missing in &missing {
        progress.bad(missing.to_string());
    }
    missing.is_empty()
}

/// A program beyond those, and the Debian package that has it; as root it is installed first.
pub fn missing_program(tool: &str, package: &str, say: &mut dyn FnMut(String)) -> Option<Missing> {
    if find_program(tool).is_none() && is_root() && find_program("apt-get").is_some() {
        say(format!("installing {package}"));
        install(&[package]);
    }
    find_program(tool).is_none().then(|| missing_tool(tool, package))
}

/// The path of a program, looked up like a shell does, also where only root usually looks.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(usual)
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

fn is_root() -> bool {
    // SAFETY: geteuid has no preconditions.
    unsafe { libc::geteuid() == 0 }
}

fn install(packages: &[&str]) {
    let mut command = Command::new("apt-get");
    command
        .args(["install", "--yes", "--no-install-recommends"])
        .args(packages);
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    // What it could not install is named by whoever looks again.
    if !command.status().is_ok_and(|status| status.success()) {
        let update = Command::new("apt-get")
            .arg("update")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status();
        if update.is_ok_and(|status| status.success()) {
            command.status().ok();
        }
    }
}

fn missing_tool(tool: &str, package: &str) -> Missing {
    Missing {
        what: format!("the program `{tool}` is missing"),
        mend: format!("it is in the package {package}: sudo apt-get install {package}"),
    }
}

/// Whether a device can be used; for KVM also whether it answers as expected.
fn device(path: &Path) -> Result<(), Missing> {
    let shown = path.display();
    let opened = OpenOptions::new().read(true).write(true).open(path);
    match opened {
        Ok(file) if path.ends_with("kvm") => {
            // SAFETY: an ioctl without an argument on an open descriptor.
            let version = unsafe { libc::ioctl(file.as_raw_fd(), KVM_GET_API_VERSION, 0) };
            if version == 12 {
                return Ok(());
            }
            Err(Missing {
                what: format!("{shown} is not KVM as this program knows it (API version {version} instead of 12)"),
                mend: OFFER.to_owned(),
            })
        }
        Ok(_) => Ok(()),
        Err(error) => Err(device_error(path, &error)),
    }
}

/// What can be done without KVM.
const OFFER: &str = "or run `cargo xtask demo --guest linux`, which emulates its own machines and needs no KVM";

fn device_error(path: &Path, error: &io::Error) -> Missing {
    let shown = path.display();
    let is_kvm = path.ends_with("kvm");
    let mend = match (error.kind(), is_kvm) {
        (io::ErrorKind::NotFound, true) => format!(
            "switch virtualisation (VT-x, AMD-V) on in the firmware, or nested virtualisation where this machine is itself\n\
             virtual, then: sudo modprobe -a kvm kvm_intel kvm_amd\n{OFFER}"
        ),
        (io::ErrorKind::NotFound, false) => "load the driver: sudo modprobe tun".to_owned(),
        (io::ErrorKind::PermissionDenied, true) => format!(
            "join its group and log in anew: sudo usermod -aG kvm $USER (or, until the next boot: sudo setfacl -m u:$USER:rw {shown})\n{OFFER}"
        ),
        (io::ErrorKind::PermissionDenied, false) => format!("allow it as most systems do: sudo chmod 666 {shown}"),
        _ => OFFER.to_owned(),
    };
    Missing {
        what: format!("{shown} can't be used: {error}"),
        mend,
    }
}

/// Without root, hosts live below a user namespace: try one.
fn user_namespaces() -> Result<(), Missing> {
    let output = Command::new("unshare")
        .args([
            "--user",
            "--map-root-user",
            "--net",
            "--mount",
            "--pid",
            "--fork",
            "--mount-proc",
            "true",
        ])
        .stdin(Stdio::null())
        .output();
    let why = match output {
        Ok(output) if output.status.success() => return Ok(()),
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Err(error) => error.to_string(),
    };
    Err(Missing {
        what: format!("this user may not make user namespaces: {why}"),
        mend: "run it as root, or allow them, whichever of these your system has:\n\
               sudo sysctl user.max_user_namespaces=15000\n\
               sudo sysctl kernel.unprivileged_userns_clone=1\n\
               sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0"
            .to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_says_how_to_mend_it() {
        for (path, kind, expected) in [
            ("/dev/kvm", io::ErrorKind::NotFound, "--guest linux"),
            ("/dev/kvm", io::ErrorKind::PermissionDenied, "usermod -aG kvm"),
            ("/dev/net/tun", io::ErrorKind::NotFound, "modprobe tun"),
            (
                "/dev/net/tun",
                io::ErrorKind::PermissionDenied,
                "chmod 666 /dev/net/tun",
            ),
        ] {
            let missing = device_error(Path::new(path), &io::Error::from(kind));
            assert!(missing.what.contains(path), "{missing}");
            assert!(missing.mend.contains(expected), "{missing}");
        }
        assert!(
            missing_tool("nft", "nftables")
                .to_string()
                .contains("apt-get install nftables")
        );
    }

    #[test]
    fn a_device_that_is_not_there_is_missing() {
        assert!(
            device(Path::new("/nonexistent/kvm"))
                .unwrap_err()
                .what
                .contains("/nonexistent/kvm")
        );
        // /dev/null can be opened and is not KVM.
        let link = std::env::temp_dir().join(format!("ftvm-{}", std::process::id()));
        std::fs::create_dir_all(&link).unwrap();
        let fake = link.join("kvm");
        std::os::unix::fs::symlink("/dev/null", &fake).unwrap();
        let missing = device(&fake).unwrap_err();
        std::fs::remove_dir_all(link).unwrap();
        assert!(missing.what.contains("not KVM"), "{missing}");
    }

    #[test]
    fn programs_are_found_like_a_shell_does() {
        assert!(find_program("sh").is_some());
        assert!(find_program("no-such-program-at-all").is_none());
    }
}
