//! Taps: made, configured and handed over; the engine itself never names a network device.
//!
//! Sources: `Documentation/networking/tuntap`, netdevice(7), `linux/sockios.h`. Plain ioctls, so that there is nothing to
//! link against and nothing to parse.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::RangeInclusive;
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
    /// Largest payload of a frame for the guest, in bytes; none: what its bridge, or the tap that exists, carries.
    pub mtu: Option<u16>,
    /// Attach to a tap that exists (made for this user by somebody else) instead of making one.
    pub existing: bool,
}

/// A tap that was opened.
#[derive(Debug)]
pub struct Tap {
    /// Its descriptor.
    pub device: OwnedFd,
    /// Largest payload of a frame for the guest, in bytes: all that is behind it carries as much.
    pub mtu: u16,
}

/// Largest payloads that a guest may be told, in bytes: IPv4 needs the one (RFC 791), jumbo frames have the other.
pub const MTU_BYTES: RangeInclusive<u16> = 576..=9216;
/// Of a tap that is put on no bridge.
const MTU_DEFAULT: u16 = 1500;

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
    /// What is behind it carries less than the guest shall be told.
    #[error(
        "tap {name}: {behind} carries {carried} bytes, and the card is to have an MTU of {wanted}: larger frames would be lost; \
         raise the MTU of {behind}, or lower that of the card"
    )]
    Mtu {
        /// Its name.
        name: String,
        /// The bridge, or the tap itself.
        behind: String,
        /// What that carries.
        carried: u16,
        /// What the card is to have.
        wanted: u16,
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
///
/// It gets the MTU of its bridge, whatever the guest is told: a port with a smaller one makes the bridge's own smaller, and with it everybody's.
pub fn open(spec: &TapSpec<'_>) -> Result<Tap, TapError> {
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
    let failed = |(what, source): Failed| fail(&what, "check the bridge, the MTU and CAP_NET_ADMIN")(source);
    let socket = socket().map_err(failed)?;
    let carried = carried(spec, &socket).map_err(failed)?;
    let mtu = guests(spec, carried)?;
    if !spec.existing {
        configure(spec, &socket, carried).map_err(failed)?;
    }
    Ok(Tap {
        device: device.into(),
        mtu,
    })
}

/// What was tried, and why it failed.
type Failed = (String, io::Error);

fn socket() -> Result<File, Failed> {
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
    socket
        .map(File::from)
        .map_err(|errno| ("making a socket".to_owned(), errno.into()))
}

/// What the tap and what is behind it carry.
fn carried(spec: &TapSpec<'_>, socket: &File) -> Result<u16, Failed> {
    let of = |name: &str, what: &str| -> Result<u16, Failed> {
        let mut request = Request::new(name);
        let asked = request.ioctl(socket, libc::SIOCGIFMTU);
        asked.map_err(|error| (format!("reading the MTU of {what}"), error))?;
        Ok(u16::try_from(request.number()).unwrap_or(u16::MAX))
    };
    match (spec.existing, spec.bridge) {
        (true, _) => of(spec.name, "it"),
        (false, Some(bridge)) => of(bridge.name(), &format!("bridge {}", bridge.name())),
        (false, None) => Ok(spec.mtu.unwrap_or(MTU_DEFAULT)),
    }
}

/// What the guest may be told.
fn guests(spec: &TapSpec<'_>, carried: u16) -> Result<u16, TapError> {
    let wanted = spec.mtu.unwrap_or(carried.clamp(*MTU_BYTES.start(), *MTU_BYTES.end()));
    if wanted <= carried {
        return Ok(wanted);
    }
    let behind = match spec.bridge.filter(|_| !spec.existing) {
        Some(bridge) => format!("bridge {}", bridge.name()),
        None => "that tap".to_owned(),
    };
    Err(TapError::Mtu {
        name: spec.name.to_owned(),
        behind,
        carried,
        wanted,
    })
}

fn configure(spec: &TapSpec<'_>, socket: &File, mtu: u16) -> Result<(), Failed> {
    let mut request = Request::new(spec.name);
    request.set_number(i32::from(mtu));
    request
        .ioctl(socket, libc::SIOCSIFMTU)
        .map_err(|error| (format!("setting the MTU to {mtu}"), error))?;
    if let Some(bridge) = spec.bridge.map(Admitted::name) {
        let what = || format!("adding it to bridge {bridge}");
        let index = interface_index(spec.name).ok_or_else(|| (what(), io::ErrorKind::NotFound.into()))?;
        let mut request = Request::new(bridge);
        request.set_number(index);
        request.ioctl(socket, SIOCBRADDIF).map_err(|error| (what(), error))?;
    }
    let mut request = Request::new(spec.name);
    request
        .ioctl(socket, libc::SIOCGIFFLAGS)
        .map_err(|error| ("reading its flags".to_owned(), error))?;
    let up = request.flags() | libc::IFF_UP as u16;
    request.set_flags(up);
    request
        .ioctl(socket, libc::SIOCSIFFLAGS)
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

    fn number(&self) -> i32 {
        i32::from_ne_bytes([self.0[16], self.0[17], self.0[18], self.0[19]])
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
