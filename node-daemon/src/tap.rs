//! Taps: made, configured and handed over; the engine itself never names a network device.
//!
//! Sources: `Documentation/networking/tuntap`, netdevice(7), `linux/sockios.h`. Plain ioctls, so that there is nothing to
//! link against and nothing to parse.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::bridges::{Admitted, BridgeError};

/// A tap to make or to attach to.
#[derive(Debug, Clone)]
pub struct TapSpec<'a> {
    /// Its name, at most 15 bytes.
    pub name: &'a str,
    /// A bridge to put it into.
    pub bridge: Option<Admitted<'a>>,
    /// Largest payload of a frame.
    pub mtu: u16,
    /// Attach to a tap that exists (made for this user by somebody else) instead of making one.
    pub existing: bool,
}

/// Errors of taps.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Its bridge is not one for guests.
    #[error(transparent)]
    Bridge(#[from] BridgeError),
    /// The name is taken.
    #[error(
        "tap {name} exists already: another seat or program uses it, or somebody made it; choose another name, remove it \
         (`ip link del {name}`), or say `existing: true` to use it"
    )]
    Exists {
        /// Its name.
        name: String,
    },
    /// There is none to attach to.
    #[error(
        "tap {name} does not exist, although the configuration says `existing: true`: make it (`ip tuntap add {name} mode tap`)"
    )]
    Missing {
        /// Its name.
        name: String,
    },
    /// The system refused.
    #[error("tap {name}: {what} failed ({source}); {advice}")]
    Io {
        /// Its name.
        name: String,
        /// What was tried.
        what: String,
        /// The cause.
        source: io::Error,
        /// What to do.
        advice: &'static str,
    },
}

// linux/if_tun.h; the numbers are part of the kernel's ABI.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const IFF_TUN_EXCL: u16 = 0x8000;
// linux/sockios.h
const SIOCBRADDIF: libc::c_ulong = 0x89a2;

/// Opens a tap, non-blocking, without packet information, up, in its bridge. Called in the network namespace it is for.
pub fn open(spec: &TapSpec<'_>) -> Result<OwnedFd, TapError> {
    let fail = |what: &str, advice| {
        let (name, what) = (spec.name.to_owned(), what.to_owned());
        move |source| TapError::Io {
            name,
            what,
            source,
            advice,
        }
    };
    let index = interface_index(spec.name);
    if spec.existing && index.is_none() {
        return Err(TapError::Missing {
            name: spec.name.to_owned(),
        });
    }
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .map_err(fail(
            "opening /dev/net/tun",
            "load the module tun, or give the daemon the device",
        ))?;
    let mut flags = (libc::IFF_TAP | libc::IFF_NO_PI) as u16;
    if !spec.existing {
        flags |= IFF_TUN_EXCL;
    }
    let mut request = Request::new(spec.name);
    request.set_flags(flags);
    match request.ioctl(&device, TUNSETIFF) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            return Err(TapError::Exists {
                name: spec.name.to_owned(),
            });
        }
        Err(error) => {
            let advice = "the daemon needs CAP_NET_ADMIN in this network namespace, or a tap made for its user";
            return Err(fail("TUNSETIFF", advice)(error));
        }
    }
    if !spec.existing {
        configure(spec).map_err(|(what, source)| fail(&what, "check the bridge, the MTU and CAP_NET_ADMIN")(source))?;
    }
    Ok(device.into())
}

fn configure(spec: &TapSpec<'_>) -> Result<(), (String, io::Error)> {
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        .map_err(|errno| ("making a socket".to_owned(), errno.into()))?;
    let socket = File::from(socket);
    let mut request = Request::new(spec.name);
    request.set_number(i32::from(spec.mtu));
    request
        .ioctl(&socket, libc::SIOCSIFMTU)
        .map_err(|error| (format!("setting the MTU to {}", spec.mtu), error))?;
    if let Some(bridge) = spec.bridge.map(Admitted::name) {
        let what = || format!("adding it to bridge {bridge}");
        let index = interface_index(spec.name).ok_or_else(|| (what(), io::ErrorKind::NotFound.into()))?;
        let mut request = Request::new(bridge);
        request.set_number(index);
        request.ioctl(&socket, SIOCBRADDIF).map_err(|error| (what(), error))?;
    }
    let mut request = Request::new(spec.name);
    request
        .ioctl(&socket, libc::SIOCGIFFLAGS)
        .map_err(|error| ("reading its flags".to_owned(), error))?;
    let up = request.flags() | libc::IFF_UP as u16;
    request.set_flags(up);
    request
        .ioctl(&socket, libc::SIOCSIFFLAGS)
        .map_err(|error| ("setting it up".to_owned(), error))
}

fn interface_index(name: &str) -> Option<i32> {
    let name = std::ffi::CString::new(name).ok()?;
    // SAFETY: a string with a terminating zero.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    (index != 0).then_some(index.cast_signed())
}

/// `struct ifreq`: a name of 16 bytes and a union of 24.
#[repr(C, align(8))]
struct Request([u8; 40]);

impl Request {
    fn new(name: &str) -> Request {
        let mut request = Request([0; 40]);
        let length = name.len().min(15);
        request.0[..length].copy_from_slice(&name.as_bytes()[..length]);
        request
    }

    fn set_flags(&mut self, flags: u16) {
        self.0[16..18].copy_from_slice(&flags.to_ne_bytes());
    }

    fn flags(&self) -> u16 {
        u16::from_ne_bytes([self.0[16], self.0[17]])
    }

    fn set_number(&mut self, number: i32) {
        self.0[16..20].copy_from_slice(&number.to_ne_bytes());
    }

    fn ioctl(&mut self, file: &File, number: libc::c_ulong) -> io::Result<()> {
        // SAFETY: every request used here takes a `struct ifreq`, which this is.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), number as _, self.0.as_mut_ptr()) };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}
