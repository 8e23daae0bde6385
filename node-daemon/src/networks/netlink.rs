//! Interfaces and addresses of this thread's network namespace, as the kernel tells them (rtnetlink(7), netlink(7)).
//!
//! Of each message only what is needed is taken apart, so that kinds of interfaces which this release does not know are no trouble;
//! what is needed and is not there is an error, never a path that works or is missing.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use super::{Address, Interface};

// linux/netlink.h, linux/rtnetlink.h
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_DUMP: u16 = 0x300;
const NLA_TYPE_MASK: u16 = 0x3fff;
const RTMGRP_LINK: u32 = 0x1;
const RTMGRP_IPV4_IFADDR: u32 = 0x10;
const RTMGRP_IPV6_IFADDR: u32 = 0x100;
// linux/if_link.h, linux/if.h
const IFLA_IFNAME: u16 = 3;
const IFLA_EXT_MASK: u16 = 29;
const RTEXT_FILTER_SKIP_STATS: u32 = 1 << 3;
const IFF_UP: u32 = 0x1;
const IFF_LOOPBACK: u32 = 0x8;
const IFF_RUNNING: u32 = 0x40;
const IFF_LOWER_UP: u32 = 0x1_0000;
// linux/if_addr.h
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
const IFA_F_SECONDARY: u32 = 0x01;
const IFA_F_DADFAILED: u32 = 0x08;
const IFA_F_TENTATIVE: u32 = 0x40;

/// nlmsghdr, ifinfomsg, ifaddrmsg, nlattr.
const MESSAGE_HEADER_BYTES: usize = 16;
const LINK_HEADER_BYTES: usize = 16;
const ADDRESS_HEADER_BYTES: usize = 8;
const ATTRIBUTE_HEADER_BYTES: usize = 4;
/// More than the kernel puts into a datagram.
const DATAGRAM_BYTES_MAX: usize = 64 << 10;
/// Messages of one answer: a node with so many interfaces has other troubles.
const MESSAGES_MAX: usize = 16 << 10;
/// Answers that changes interrupted before one is taken as it is: the change is told, and looked at, next.
const INTERRUPTED_MAX: u32 = 3;
/// Changes that are taken at a time.
const CHANGES_MAX: u32 = 4096;
/// The kernel answers at once, unless the machine hardly runs.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why the kernel's networks are not known.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The system.
    #[error("asking the kernel for interfaces and addresses (rtnetlink): {0}")]
    System(#[from] io::Error),
    /// An answer that this release can't read.
    #[error("the kernel's answer about interfaces and addresses (rtnetlink) can't be read: {0}")]
    Malformed(&'static str),
    /// More than can be true.
    #[error("the kernel tells of more than {MESSAGES_MAX} interfaces or addresses")]
    TooMany,
}

impl From<Errno> for NetlinkError {
    fn from(error: Errno) -> Self {
        NetlinkError::System(error.into())
    }
}

/// Tells when interfaces or addresses change, carriers among them.
pub struct Changes {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl Changes {
    /// Those from now on.
    pub fn open() -> Result<Changes, NetlinkError> {
        Ok(Changes {
            socket: open(RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR)?,
            // What it is about is not looked at.
            buffer: vec![0; 16],
        })
    }

    /// Waits for one.
    pub fn wait(&mut self) -> Result<(), NetlinkError> {
        loop {
            match self.receive(RecvFlags::empty()) {
                Err(Errno::INTR) => {}
                other => return other.map_err(NetlinkError::from),
            }
        }
    }

    /// Takes those that are there, too.
    pub fn drain(&mut self) -> Result<(), NetlinkError> {
        for _ in 0..CHANGES_MAX {
            match self.receive(RecvFlags::DONTWAIT) {
                Ok(()) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        // More than this may come all the time: what they say is looked at, and then those that are left.
        Ok(())
    }

    fn receive(&mut self, flags: RecvFlags) -> rustix::io::Result<()> {
        match rustix::net::recv(&self.socket, &mut self.buffer[..], flags) {
            // There were too many to be kept: that is one.
            Ok(_) | Err(Errno::NOBUFS) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// All interfaces and their addresses.
///
/// # Errors
/// If the kernel does not tell, or not as it is documented.
pub fn interfaces() -> Result<Vec<Interface>, NetlinkError> {
    let mut interfaces = BTreeMap::new();
    // Statistics are most of an answer, and nobody reads them.
    let mut wanted = vec![0_u8; LINK_HEADER_BYTES];
    wanted.extend(attribute(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS));
    for message in dump(RTM_GETLINK, &wanted)? {
        if message.kind == RTM_NEWLINK {
            let interface = link(&message.body)?;
            interfaces.insert(interface.index, interface);
        }
    }
    for message in dump(RTM_GETADDR, &[0; ADDRESS_HEADER_BYTES])? {
        if message.kind != RTM_NEWADDR {
            continue;
        }
        // One of an interface that has come in between is told as a change.
        if let Some((index, address)) = address(&message.body)?
            && let Some(interface) = interfaces.get_mut(&index)
        {
            interface.addresses.push(address);
        }
    }
    Ok(interfaces.into_values().collect())
}

fn open(groups: u32) -> Result<OwnedFd, NetlinkError> {
    // No protocol: NETLINK_ROUTE is 0.
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    rustix::net::bind(&socket, &SocketAddrNetlink::new(0, groups))?;
    Ok(socket)
}

/// What the kernel has of a kind.
fn dump(kind: u16, body: &[u8]) -> Result<Vec<Message>, NetlinkError> {
    let mut attempt = 1;
    loop {
        // A socket of its own: nothing of an earlier answer is left in it.
        let socket = open(0)?;
        set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
        let request = message(kind, NLM_F_REQUEST | NLM_F_DUMP, attempt, body);
        rustix::net::sendto(&socket, &request, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
        let mut answer = Answer::new(attempt);
        let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
        while !answer.done {
            let length = receive(&socket, &mut buffer)?;
            answer.take(&buffer[..length])?;
        }
        if !answer.interrupted || attempt == INTERRUPTED_MAX {
            return Ok(answer.messages);
        }
        attempt += 1;
    }
}

/// A datagram from the kernel.
fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> Result<usize, NetlinkError> {
    loop {
        let (length, whole, from) = match rustix::net::recvfrom(socket, &mut *buffer, RecvFlags::TRUNC) {
            Ok(received) => received,
            Err(Errno::INTR) => continue,
            Err(Errno::AGAIN) => return Err(io::Error::from(io::ErrorKind::TimedOut).into()),
            Err(error) => return Err(error.into()),
        };
        // The kernel's port is 0; processes may send to each other.
        let from = from.map(SocketAddrNetlink::try_from);
        if !matches!(from, Some(Ok(from)) if from.pid() == 0) {
            continue;
        }
        if whole > length {
            return Err(NetlinkError::Malformed("a datagram is longer than any that is known"));
        }
        return Ok(length);
    }
}

/// A message of the kernel.
#[derive(Debug)]
struct Message {
    kind: u16,
    body: Vec<u8>,
}

/// An answer of many messages, as far as it has come.
struct Answer {
    sequence: u32,
    messages: Vec<Message>,
    /// Something changed while it was made.
    interrupted: bool,
    /// That was its last message.
    done: bool,
}

impl Answer {
    fn new(sequence: u32) -> Answer {
        Answer {
            sequence,
            messages: Vec::new(),
            interrupted: false,
            done: false,
        }
    }

    /// Takes a datagram of it.
    fn take(&mut self, mut datagram: &[u8]) -> Result<(), NetlinkError> {
        let malformed = || NetlinkError::Malformed("a message has not the length that it tells");
        while !datagram.is_empty() && !self.done {
            let length = u32_at(datagram, 0).ok_or_else(malformed)?;
            let length = usize::try_from(length).map_err(|_| malformed())?;
            let (message, rest) = split(datagram, length, MESSAGE_HEADER_BYTES).ok_or_else(malformed)?;
            datagram = rest;
            let kind = u16_at(message, 4).ok_or_else(malformed)?;
            let flags = u16_at(message, 6).ok_or_else(malformed)?;
            if u32_at(message, 8) != Some(self.sequence) {
                continue;
            }
            self.interrupted |= flags & NLM_F_DUMP_INTR != 0;
            let body = &message[MESSAGE_HEADER_BYTES..];
            match kind {
                NLMSG_DONE | NLMSG_ERROR => match u32_at(body, 0).ok_or_else(malformed)?.cast_signed() {
                    0 => self.done = true,
                    code => return Err(io::Error::from_raw_os_error(code.wrapping_neg()).into()),
                },
                _ if self.messages.len() == MESSAGES_MAX => return Err(NetlinkError::TooMany),
                _ => self.messages.push(Message {
                    kind,
                    body: body.to_vec(),
                }),
            }
        }
        Ok(())
    }
}

/// An interface without its addresses.
fn link(body: &[u8]) -> Result<Interface, NetlinkError> {
    let short = || NetlinkError::Malformed("an interface is too short");
    let index = u32_at(body, 4).ok_or_else(short)?;
    let flags = u32_at(body, 8).ok_or_else(short)?;
    let mut name = None;
    for attribute in Attributes(body.get(LINK_HEADER_BYTES..).ok_or_else(short)?) {
        let (kind, value) = attribute?;
        if kind == IFLA_IFNAME {
            name = Some(plain(value));
        }
    }
    let name = name.ok_or(NetlinkError::Malformed("an interface has no name"))?;
    let works = IFF_RUNNING | IFF_LOWER_UP;
    Ok(Interface {
        index,
        name,
        loopback: flags & IFF_LOOPBACK != 0,
        set_up: flags & IFF_UP != 0,
        carrier: flags & works == works,
        addresses: Vec::new(),
    })
}

/// Up to the zero at its end. The kernel takes names that no terminal should show.
fn plain(name: &[u8]) -> String {
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    let shown = |c: char| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c };
    String::from_utf8_lossy(name).chars().map(shown).collect()
}

/// An address, and the number of its interface; none: it is of another family.
fn address(body: &[u8]) -> Result<Option<(u32, Address)>, NetlinkError> {
    let short = || NetlinkError::Malformed("an address is too short");
    let header = body.get(..ADDRESS_HEADER_BYTES).ok_or_else(short)?;
    let mut flags = u32::from(header[2]);
    let index = u32_at(header, 4).ok_or_else(short)?;
    let (mut own, mut other) = (None, None);
    for attribute in Attributes(&body[ADDRESS_HEADER_BYTES..]) {
        match attribute? {
            (IFA_LOCAL, value) => own = ip(value),
            // The other end's, where both are told.
            (IFA_ADDRESS, value) => other = ip(value),
            (IFA_FLAGS, value) => flags = u32_at(value, 0).ok_or_else(short)?,
            _ => {}
        }
    }
    let usable = flags & (IFA_F_TENTATIVE | IFA_F_DADFAILED) == 0;
    let prefix_bits = header[1];
    Ok(own.or(other).map(|ip| {
        let single = prefix_bits == if ip.is_ipv4() { 32 } else { 128 };
        // Of IPv6 the same bit says that it is temporary.
        let main = flags & IFA_F_SECONDARY == 0 && !single;
        (index, Address { ip, usable, main })
    }))
}

fn ip(value: &[u8]) -> Option<IpAddr> {
    let of_four = <[u8; 4]>::try_from(value).map(IpAddr::from);
    let of_sixteen = || <[u8; 16]>::try_from(value).map(IpAddr::from);
    of_four.or_else(|_| of_sixteen()).ok()
}

/// Kinds and values.
struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = Result<(u16, &'a [u8]), NetlinkError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let length = u16_at(self.0, 0).map_or(0, usize::from);
        let Some((attribute, rest)) = split(self.0, length, ATTRIBUTE_HEADER_BYTES) else {
            self.0 = &[];
            let why = "an attribute has not the length that it tells";
            return Some(Err(NetlinkError::Malformed(why)));
        };
        self.0 = rest;
        let kind = u16_at(attribute, 2).unwrap_or_default() & NLA_TYPE_MASK;
        Some(Ok((kind, &attribute[ATTRIBUTE_HEADER_BYTES..])))
    }
}

/// A piece of this length, and what follows at the next multiple of four bytes. None: it is shorter than `least`, or cut off.
fn split(bytes: &[u8], length: usize, least: usize) -> Option<(&[u8], &[u8])> {
    if length < least {
        return None;
    }
    let piece = bytes.get(..length)?;
    let rest = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((piece, rest))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let field = bytes.get(at..at + 2)?;
    Some(u16::from_ne_bytes(field.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..at + 4)?;
    Some(u32::from_ne_bytes(field.try_into().ok()?))
}

fn message(kind: u16, flags: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(MESSAGE_HEADER_BYTES + body.len()).unwrap_or(u32::MAX);
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    // The kernel enters the port.
    bytes.extend([0; 4]);
    bytes.extend(body);
    bytes
}

/// With a value of four bytes.
fn attribute(kind: u16, value: u32) -> Vec<u8> {
    let mut bytes = 8_u16.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value.to_ne_bytes());
    bytes
}

#[cfg(test)]
#[path = "netlink_tests.rs"]
mod tests;
