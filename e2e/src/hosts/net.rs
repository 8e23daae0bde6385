//! Links, addresses and packet filters.
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Command, Stdio};

use super::{HostsError, io as failed};

/// Gives `input` to `command` and waits; an exit code other than 0 is an error with everything that it printed.
pub fn feed(mut command: Command, input: &str) -> Result<(), HostsError> {
    let line = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed(format!("starting {line}")))?;
    // A program that ends early closes the pipe; its exit code says why.
    let written = child
        .stdin
        .take()
        .map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes()));
    let output = child
        .wait_with_output()
        .map_err(failed(format!("waiting for {line}")))?;
    if !output.status.success() {
        let text = [output.stdout, output.stderr].concat();
        let output_text = format!("{}input was:\n{input}", String::from_utf8_lossy(&text));
        return Err(HostsError::Command {
            command: line,
            status: output.status,
            output: output_text,
        });
    }
    written.map_err(failed(format!("writing to {line}")))
}

/// Runs `ip -batch` on lines of `ip` commands in this process's network namespace.
pub fn ip(lines: &str) -> Result<(), HostsError> {
    let mut command = Command::new("ip");
    command.args(["-batch", "-"]);
    feed(command, lines)
}

/// Loads an nftables script in this process's network namespace.
pub fn nft(script: &str) -> Result<(), HostsError> {
    let mut command = Command::new("nft");
    command.args(["-f", "-"]);
    feed(command, script)
}

/// Sets a link of this process's network namespace up or down, by one ioctl: microseconds, no program started.
pub fn set_link(name: &str, up: bool) -> Result<(), HostsError> {
    let what = format!("setting link {name} {}", if up { "up" } else { "down" });
    let mut request = link_request(name)?;
    // SAFETY: a new socket that nobody else owns; both ioctls get a complete ifreq that outlives them.
    unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        if socket < 0 {
            return Err(failed(what)(io::Error::last_os_error()));
        }
        let socket = OwnedFd::from_raw_fd(socket);
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &mut request) < 0 {
            return Err(failed(what)(io::Error::last_os_error()));
        }
        let flag = libc::IFF_UP as libc::c_short;
        let flags = request.ifr_ifru.ifru_flags;
        request.ifr_ifru.ifru_flags = if up { flags | flag } else { flags & !flag };
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &mut request) < 0 {
            return Err(failed(what)(io::Error::last_os_error()));
        }
    }
    Ok(())
}

/// Sends a whole Ethernet frame out of a link of the calling thread's network namespace.
pub fn send_frame(link: &str, frame: &[u8]) -> Result<(), HostsError> {
    let what = format!("sending a frame out of link {link}");
    let index = link_index(link)?;
    // SAFETY: a new socket that nobody else owns; sendto gets the frame and the address, which is plain data, with their sizes.
    unsafe {
        let socket = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
        if socket < 0 {
            return Err(failed(what)(io::Error::last_os_error()));
        }
        let socket = OwnedFd::from_raw_fd(socket);
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as libc::c_ushort;
        address.sll_ifindex = index as libc::c_int;
        let size = size_of_val(&address) as libc::socklen_t;
        let (bytes, length) = (frame.as_ptr().cast(), frame.len());
        if libc::sendto(socket.as_raw_fd(), bytes, length, 0, (&raw const address).cast(), size) < 0 {
            return Err(failed(what)(io::Error::last_os_error()));
        }
    }
    Ok(())
}

/// The index of a link of this process's network namespace.
pub fn link_index(name: &str) -> Result<u32, HostsError> {
    let name_c = std::ffi::CString::new(name).map_err(|_| bad_name(name))?;
    // SAFETY: a NUL-terminated string.
    match unsafe { libc::if_nametoindex(name_c.as_ptr()) } {
        0 => Err(failed(format!("looking up link {name}"))(io::Error::last_os_error())),
        index => Ok(index),
    }
}

fn link_request(name: &str) -> Result<libc::ifreq, HostsError> {
    // SAFETY: ifreq is plain data, zeroes are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() || name.bytes().any(|byte| byte == 0) {
        return Err(bad_name(name));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn bad_name(name: &str) -> HostsError {
    failed(format!("using link name {name:?}"))(io::Error::from(io::ErrorKind::InvalidInput))
}
