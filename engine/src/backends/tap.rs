//! A tap interface of the host: Ethernet frames through `/dev/net/tun` (Documentation/networking/tuntap.rst).

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use thiserror::Error;

use super::NetBackend;

const TUN: &str = "/dev/net/tun";
/// Longest name of an interface.
const NAME_BYTES: usize = libc::IFNAMSIZ - 1;

// linux/if_tun.h
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const IFF_TAP: i16 = 0x0002;
const IFF_NO_PI: i16 = 0x1000;
const IFF_VNET_HDR: i16 = 0x4000;
const IFF_TUN_EXCL: u16 = 0x8000;

/// Why there is no tap.
#[derive(Debug, Error)]
pub enum TapError {
    /// The name can't be an interface's.
    #[error("tap name {name:?} is empty, longer than {NAME_BYTES} bytes or has a space or slash in it: choose another")]
    Name {
        /// The name.
        name: String,
    },
    /// The kernel has no tun driver, or this process can't see it.
    #[error("tap {name}: {TUN} can't be opened: load the kernel module tun and see that the device node exists")]
    NoDriver {
        /// The tap.
        name: String,
        /// The cause.
        source: io::Error,
    },
    /// Not permitted.
    #[error(
        "tap {name}: not permitted: run with CAP_NET_ADMIN in this network namespace, or have the tap made for this user \
         (`ip tuntap add {name} mode tap user USER`)"
    )]
    NotPermitted {
        /// The tap.
        name: String,
        /// The cause.
        source: io::Error,
    },
    /// An interface of this name exists, but a new one was asked for.
    #[error(
        "tap {name} exists already: choose another name, or remove it with `ip link del {name}` if nothing needs it"
    )]
    Exists {
        /// The tap.
        name: String,
    },
    /// No interface of this name exists.
    #[error("tap {name} does not exist in this network namespace: make it with `ip tuntap add {name} mode tap`")]
    Missing {
        /// The tap.
        name: String,
    },
    /// Another process has the tap open.
    #[error("tap {name} is in use by another process: stop that one first, or choose another name")]
    Busy {
        /// The tap.
        name: String,
    },
    /// An interface of this name exists and is something else.
    #[error("interface {name} is not a tap without packet information and without virtio headers: choose another name")]
    NotATap {
        /// The interface.
        name: String,
    },
    /// Something else went wrong.
    #[error("tap {name}: {what} failed")]
    Io {
        /// The tap.
        name: String,
        /// What was tried.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
}

/// An open tap.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
}

#[repr(C)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: i16,
    rest: [u8; 22],
}

impl InterfaceRequest {
    fn new(name: &str, flags: i16) -> Self {
        let mut request = Self {
            name: [0; libc::IFNAMSIZ],
            flags,
            rest: [0; 22],
        };
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        request
    }
}

impl Tap {
    /// Makes a new tap, which lives as long as it is open.
    pub fn create(name: &str) -> Result<Self, TapError> {
        Self::set_up(name, IFF_TAP | IFF_NO_PI | IFF_TUN_EXCL as i16)
    }

    /// Opens a tap that exists.
    pub fn attach(name: &str) -> Result<Self, TapError> {
        check_name(name)?;
        if !exists(name) {
            return Err(TapError::Missing { name: name.to_owned() });
        }
        Self::set_up(name, IFF_TAP | IFF_NO_PI)
    }

    /// Takes over an open tap, for example one that a jailed process was given.
    pub fn from_fd(name: &str, fd: OwnedFd) -> Result<Self, TapError> {
        let tap = Self {
            file: File::from(fd),
            name: name.to_owned(),
        };
        let mut request = InterfaceRequest::new("", 0);
        // SAFETY: TUNGETIFF fills an ifreq, which `request` is.
        let result = unsafe { libc::ioctl(tap.file.as_raw_fd(), TUNGETIFF as _, &raw mut request) };
        let right = request.flags & (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR) == IFF_TAP | IFF_NO_PI;
        if result != 0 || !right {
            return Err(TapError::NotATap { name: tap.name });
        }
        tap.finish()
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn set_up(name: &str, flags: i16) -> Result<Self, TapError> {
        check_name(name)?;
        let existed = exists(name);
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
        let file = options.open(TUN).map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => TapError::NotPermitted {
                name: name.to_owned(),
                source,
            },
            _ => TapError::NoDriver {
                name: name.to_owned(),
                source,
            },
        })?;
        let mut request = InterfaceRequest::new(name, flags);
        // SAFETY: TUNSETIFF reads and writes an ifreq, which `request` is.
        if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF as _, &raw mut request) } != 0 {
            let exclusive = flags & IFF_TUN_EXCL as i16 != 0;
            return Err(refusal(name, io::Error::last_os_error(), existed && exclusive));
        }
        let name = name.to_owned();
        Self { file, name }.finish()
    }

    /// Nonblocking, no offloads: every frame that is read is complete.
    fn finish(self) -> Result<Self, TapError> {
        let io = |what| {
            move |source, name: &str| TapError::Io {
                name: name.to_owned(),
                what,
                source,
            }
        };
        let flags = rustix::fs::fcntl_getfl(&self.file).map_err(|errno| io("fcntl")(errno.into(), &self.name))?;
        rustix::fs::fcntl_setfl(&self.file, flags | rustix::fs::OFlags::NONBLOCK)
            .map_err(|errno| io("fcntl")(errno.into(), &self.name))?;
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        if unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETOFFLOAD as _, 0) } != 0 {
            return Err(io("TUNSETOFFLOAD")(io::Error::last_os_error(), &self.name));
        }
        Ok(self)
    }
}

fn check_name(name: &str) -> Result<(), TapError> {
    let bad = |byte: u8| byte == b'/' || byte == b'%' || byte == 0 || byte.is_ascii_whitespace();
    if name.is_empty() || name.len() > NAME_BYTES || name.bytes().any(bad) || name == "." || name == ".." {
        return Err(TapError::Name { name: name.to_owned() });
    }
    Ok(())
}

fn exists(name: &str) -> bool {
    let Ok(name) = std::ffi::CString::new(name) else {
        return false;
    };
    // SAFETY: `name` is a terminated string.
    unsafe { libc::if_nametoindex(name.as_ptr()) != 0 }
}

/// What an error of TUNSETIFF means.
fn refusal(name: &str, source: io::Error, must_be_new: bool) -> TapError {
    let name = name.to_owned();
    match source.raw_os_error() {
        Some(libc::EBUSY) if must_be_new => TapError::Exists { name },
        Some(libc::EBUSY) => TapError::Busy { name },
        Some(libc::EPERM | libc::EACCES) => TapError::NotPermitted { name, source },
        Some(libc::EINVAL) => TapError::NotATap { name },
        _ => TapError::Io {
            name,
            what: "TUNSETIFF",
            source,
        },
    }
}

impl NetBackend for Tap {
    fn transmit(&mut self, frame: &[u8]) {
        // A full queue or an interface that is down loses the frame, as a wire does.
        let _ = self.file.write(frame);
    }

    fn receive(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match self.file.read(buf) {
                Ok(len) => return Ok(Some(len)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn wake_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

#[cfg(test)]
#[path = "tap_tests.rs"]
mod tests;
