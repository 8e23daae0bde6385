//! Listens on the hosts' ports of the client network for frames with the guest's MAC address.
//!
//! A packet socket in the outer network namespace sees each frame as it comes out of a host, before any bridge has had a
//! say, and each frame for the guest with the host that the bridge sends it to. A filter in the kernel lets the guest's
//! frames through only, so replication traffic costs nothing.
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::emission::Emissions;
use super::packet::{self, Mac};
use super::timeline::{Direction, Timeline};

/// Frames that wait for us, in bytes; the kernel doubles it. Without privileges it stays at the system's bound.
const RECEIVE_BUFFER_BYTES: libc::c_int = 16 << 20;
/// How often the thread looks whether it should end.
const LOOK_UP_MS: libc::c_int = 50;

/// A running sniffer. Dropping it ends it.
#[derive(Debug)]
pub struct Sniffer {
    seen: Arc<Seen>,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<io::Result<u64>>>,
}

#[derive(Debug, Default)]
struct Seen {
    emissions: Mutex<Emissions>,
    timeline: Mutex<Timeline>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sniffer {
    /// Starts listening in this thread's network namespace for frames from `guest` that arrive at one of `ports`; a
    /// host is known by the place of its port there. Ports may come and go.
    pub fn start(guest: Mac, ports: Vec<String>) -> io::Result<Self> {
        let socket = open(guest)?;
        let (seen, end) = (Arc::<Seen>::default(), Arc::<AtomicBool>::default());
        let (for_thread, end_for_thread) = (Arc::clone(&seen), Arc::clone(&end));
        let thread = std::thread::Builder::new()
            .name("sniffer".to_owned())
            .spawn(move || listen(&socket, guest, &ports, &for_thread, &end_for_thread))?;
        Ok(Self {
            seen,
            end,
            thread: Some(thread),
        })
    }

    /// What was seen so far, and a way to tell of rebuilt hosts.
    pub fn emissions(&self) -> MutexGuard<'_, Emissions> {
        lock(&self.seen.emissions)
    }

    /// The last frames from and to the guest.
    pub fn timeline(&self) -> MutexGuard<'_, Timeline> {
        lock(&self.seen.timeline)
    }

    /// Ends it; returns how many frames were missed because this machine was too busy.
    pub fn finish(mut self) -> io::Result<u64> {
        self.end.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            _ => Err(io::Error::other("the sniffer's thread panicked")),
        }
    }
}

impl Drop for Sniffer {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

fn open(guest: Mac) -> io::Result<OwnedFd> {
    // SAFETY: a new socket that nobody else owns. The protocol is 0, so nothing arrives before the filter is attached.
    let socket = unsafe {
        let fd = libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            0,
        );
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    let mut program = filter(guest);
    let fprog = libc::sock_fprog {
        len: program.len() as libc::c_ushort,
        filter: program.as_mut_ptr(),
    };
    set_option(&socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &fprog)?;
    if set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &RECEIVE_BUFFER_BYTES).is_err() {
        set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUF, &RECEIVE_BUFFER_BYTES)?;
    }
    // SAFETY: sockaddr_ll is plain data; bind gets its address and size. Interface 0 means all.
    unsafe {
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as libc::c_ushort;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        let size = size_of_val(&address) as libc::socklen_t;
        if libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(socket)
}

/// Lets through what has the guest's address as its source and was not sent by this kernel (packet(7), type 4), and what
/// this kernel sends to that address.
fn filter(guest: Mac) -> [libc::sock_filter; 12] {
    let statement = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let (load_byte, load_half, load_word) = (
        libc::BPF_LD | libc::BPF_B | libc::BPF_ABS,
        libc::BPF_LD | libc::BPF_H | libc::BPF_ABS,
        libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
    );
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let packet_type = (libc::SKF_AD_OFF + libc::SKF_AD_PKTTYPE) as u32;
    let [a, b, c, d, e, f] = guest;
    let (upper, lower) = (u32::from_be_bytes([a, b, c, d]), u32::from(u16::from_be_bytes([e, f])));
    [
        statement(load_byte, 0, 0, packet_type),
        statement(equal, 4, 0, u32::from(libc::PACKET_OUTGOING)),
        statement(load_word, 0, 0, 6),
        statement(equal, 0, 7, upper),
        statement(load_half, 0, 0, 10),
        statement(equal, 4, 5, lower),
        statement(load_word, 0, 0, 0),
        statement(equal, 0, 3, upper),
        statement(load_half, 0, 0, 4),
        statement(equal, 0, 1, lower),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
    ]
}

fn set_option<T>(socket: &OwnedFd, level: libc::c_int, name: libc::c_int, value: &T) -> io::Result<()> {
    // SAFETY: the option's value is a complete T that outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (value as *const T).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn listen(socket: &OwnedFd, guest: Mac, ports: &[String], seen: &Seen, end: &AtomicBool) -> io::Result<u64> {
    let mut buffer = vec![0; 1 << 16];
    // Numbers of interfaces are never used twice, so what was found out once stays true.
    let mut hosts: HashMap<i32, Option<usize>> = HashMap::new();
    let mut last_look = false;
    loop {
        while let Some((length, interface)) = receive(socket, &mut buffer)? {
            let host = *hosts
                .entry(interface)
                .or_insert_with(|| link_name(interface).and_then(|name| ports.iter().position(|port| *port == name)));
            let (Some(host), Some((source, packet))) = (host, packet::parse(&buffer[..length])) else {
                continue;
            };
            let arrived = arrival(socket);
            let direction = if source == guest {
                lock(&seen.emissions).observe(instant(arrived), host, &packet);
                Direction::FromGuest
            } else {
                Direction::ToGuest
            };
            lock(&seen.timeline).add(arrived, host, direction, &packet);
        }
        if last_look {
            return missed(socket);
        }
        // After the order to end, everything that had arrived is still looked at.
        last_look = end.load(Ordering::Relaxed);
        let mut poll = libc::pollfd {
            fd: socket.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one complete pollfd that outlives the call.
        unsafe { libc::poll(&mut poll, 1, if last_look { 0 } else { LOOK_UP_MS }) };
    }
}

/// The next frame's length and interface, if one waits.
fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<Option<(usize, i32)>> {
    loop {
        // SAFETY: sockaddr_ll is plain data; buffer and address are ours and have the sizes that are given.
        let (length, address) = unsafe {
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            let mut size = size_of_val(&address) as libc::socklen_t;
            let length = libc::recvfrom(
                socket.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                0,
                (&raw mut address).cast(),
                &mut size,
            );
            (length, address)
        };
        if length >= 0 {
            return Ok(Some((length as usize, address.sll_ifindex)));
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EAGAIN) => return Ok(None),
            // A link that goes away tells everyone who listens once.
            Some(libc::EINTR | libc::ENETDOWN) => {}
            _ => return Err(error),
        }
    }
}

/// When the kernel saw the frame that was received last, since 1970.
fn arrival(socket: &OwnedFd) -> Duration {
    const SIOCGSTAMPNS: libc::c_ulong = 0x8907;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: SIOCGSTAMPNS fills a timespec. Before the first call the kernel has no time; then it is zero.
    unsafe { libc::ioctl(socket.as_raw_fd(), SIOCGSTAMPNS, &raw mut time) };
    Duration::new(time.tv_sec.max(0) as u64, time.tv_nsec as u32)
}

/// The same on the clock that only goes forward.
fn instant(arrived: Duration) -> Instant {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let age = now.saturating_sub(arrived);
    Instant::now().checked_sub(age).unwrap_or_else(Instant::now)
}

fn link_name(index: i32) -> Option<String> {
    let mut name = [0u8; libc::IF_NAMESIZE];
    // SAFETY: the buffer has the size that if_indextoname demands.
    let found = unsafe { libc::if_indextoname(u32::try_from(index).ok()?, name.as_mut_ptr().cast()) };
    if found.is_null() {
        return None;
    }
    let length = name.iter().position(|byte| *byte == 0)?;
    String::from_utf8(name[..length].to_vec()).ok()
}

/// Frames that did not fit into the buffer (PACKET_STATISTICS).
fn missed(socket: &OwnedFd) -> io::Result<u64> {
    // SAFETY: tpacket_stats is plain data; the size given is its own.
    unsafe {
        let mut statistics: libc::tpacket_stats = std::mem::zeroed();
        let mut size = size_of_val(&statistics) as libc::socklen_t;
        let value = (&raw mut statistics).cast();
        if libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            value,
            &mut size,
        ) < 0
        {
            return Err(io::Error::last_os_error());
        }
        Ok(u64::from(statistics.tp_drops))
    }
}

#[cfg(test)]
#[path = "sniffer_tests.rs"]
mod tests;
