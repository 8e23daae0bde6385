//! What a seat's program handed over: checked once, held while the program lives, copied for each engine.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ftvm_engine::control::header_file::{HeaderFile, read_header};
use ftvm_engine::control::{Answer, Ask, Identity, Secret};
use ftvm_protocol::core::{ReadOutcome, StoredHeader};
use ftvm_protocol::header::SeatHeader;
use ftvm_protocol::identity::{Incarnation, SeatId, VmId};
use rustix::fs::{FileType, Mode, OFlags};

use super::message::{DiskToPrepare, descriptor_names};
use super::pod::{Hierarchies, Peer, remove_leaves};
use crate::api::Phase;
use crate::arbiter::Bounded;
use crate::config::SeatConfig;
use crate::explain;
use crate::identity::SeatIdentity;
use crate::netns::Netns;
use crate::prepare::{Materials, Place, SeatError, Source};
use crate::state::SeatFolder;

/// Longest file of an identity.
const IDENTITY_BYTES_MAX: u64 = 16 * 1024;
/// Longest header: two copies (`engine::control::header_file`).
const HEADER_BYTES_MAX: u64 = 8192;
/// An engine goes on so long without its seat's program, which may be started anew within it.
const SEAT_PATIENCE_MS: u32 = 10_000;
/// Deadline of the question whether this is the original seat.
const RECORD_PATIENCE: Duration = Duration::from_secs(3);

/// File systems whose files are no data (linux/magic.h): what is written there could act with the daemon's rights.
const NO_DATA: &[(i64, &str)] = &[
    (0x9fa0, "proc"),
    (0x6265_6572, "sysfs"),
    (0x0027_e0eb, "cgroup"),
    (0x6367_7270, "cgroup2"),
    (0x6462_6720, "debugfs"),
    (0x7472_6163, "tracefs"),
    (0x7363_6673, "securityfs"),
    (0xf97c_ff8c, "selinuxfs"),
    (0xcafe_4a11, "bpf"),
    (0x6265_6570, "configfs"),
    (0xde5e_81e4, "efivarfs"),
    (0x1373, "devfs"),
    (0x6e73_6673, "nsfs"),
    (0x5049_4446, "pidfs"),
    (0x4249_4e4d, "binfmt_misc"),
    (0x1980_0202, "mqueue"),
    (0x0765_5821, "resctrl"),
    (0x4341_5d53, "smackfs"),
    (0x5a3c_69f0, "apparmorfs"),
];

/// Who the seat must be and what it must have, as the API server says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// Name of the virtual machine in its namespace.
    pub vm: String,
    /// The virtual machine.
    pub vm_id: VmId,
    /// Name of the seat.
    pub seat: String,
    /// The seat: its pod's UID.
    pub seat_id: SeatId,
}

/// Checked descriptors and who gave them.
#[derive(Debug)]
pub struct Held {
    peer: Arc<Peer>,
    who: SeatIdentity,
    identity: Identity,
    kernel: File,
    initrd: Option<File>,
    disks: Vec<File>,
    /// The disks got the guest's first contents: the record named this seat as the first one when they were asked for.
    original: bool,
    header: File,
    journal: File,
    console: File,
}

/// Which rights a descriptor must carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    ReadWrite,
}

impl Held {
    /// Checks what came with `Ready`. `disks` are those that were asked for. The error names the descriptor and why.
    pub fn check(
        expected: &Expected,
        disks: &[DiskToPrepare],
        initrd: bool,
        fds: Vec<OwnedFd>,
        peer: Arc<Peer>,
    ) -> Result<Held, String> {
        let names: Vec<String> = disks.iter().map(|disk| disk.name.clone()).collect();
        let names = descriptor_names(&names, initrd);
        if names.len() != fds.len() {
            return Err(format!("{} descriptors came, {} were expected", fds.len(), names.len()));
        }
        let mut fds = names.into_iter().zip(fds);
        let mut next = || fds.next().ok_or_else(|| "a descriptor is missing".to_owned());
        let who = read_small(next()?)?;
        let who: SeatIdentity = serde_json::from_str(&who).map_err(|error| format!("seat.json: {error}"))?;
        check_identity(&who, expected)?;
        let identity = Identity {
            certificate_pem: read_pem(next()?, "CERTIFICATE")?,
            key_pem: Secret(read_pem(next()?, "PRIVATE KEY")?),
            authority_pem: read_pem(next()?, "CERTIFICATE")?,
        };
        let kernel = regular(next()?, Access::Read)?;
        let initrd = if initrd {
            Some(regular(next()?, Access::Read)?)
        } else {
            None
        };
        let mut files = Vec::new();
        for disk in disks {
            let file = regular(next()?, Access::ReadWrite)?;
            let found = length(&file)?;
            if found != disk.size_bytes {
                return Err(format!("disk {} has {found} bytes, not {}", disk.name, disk.size_bytes));
            }
            files.push(file);
        }
        let header = regular(next()?, Access::ReadWrite)?;
        if length(&header)? > HEADER_BYTES_MAX {
            return Err(format!("header: more than {HEADER_BYTES_MAX} bytes"));
        }
        let journal = regular(next()?, Access::ReadWrite)?;
        let console = console(next()?)?;
        distinct(files.iter().chain([&header, &journal]))?;
        Ok(Held {
            peer,
            who,
            identity,
            kernel,
            initrd,
            disks: files,
            original: disks.iter().all(|disk| disk.original),
            header,
            journal,
            console,
        })
    }
}

type Named = (String, OwnedFd);

fn length(file: &File) -> Result<u64, String> {
    file.metadata()
        .map(|data| data.len())
        .map_err(|error| error.to_string())
}

/// A regular file of a real file system, opened with these rights.
fn regular((name, fd): Named, access: Access) -> Result<File, String> {
    let refuse = |why: &str| Err(format!("{name}: {why}"));
    let flags = rustix::fs::fcntl_getfl(&fd).map_err(|errno| format!("{name}: {errno}"))?;
    if flags.contains(OFlags::PATH) {
        return refuse("opened for its path only (O_PATH)");
    }
    let stat = rustix::fs::fstat(&fd).map_err(|errno| format!("{name}: {errno}"))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return refuse("no regular file");
    }
    let system = rustix::fs::fstatfs(&fd).map_err(|errno| format!("{name}: {errno}"))?;
    if let Some((_, system)) = NO_DATA.iter().find(|(magic, _)| *magic == system.f_type) {
        return refuse(&format!("a file of {system}"));
    }
    let rights = flags & OFlags::RWMODE;
    let enough = rights == OFlags::RDWR || (access == Access::Read && rights == OFlags::RDONLY);
    if !enough {
        return refuse("not opened for what it is needed for");
    }
    if flags.contains(OFlags::APPEND) {
        return refuse("opened for appending");
    }
    Ok(fd.into())
}

/// The writing end of a FIFO, on an open file description of the daemon's own: the program can't make it blocking.
fn console((name, fd): Named) -> Result<File, String> {
    let flags = rustix::fs::fcntl_getfl(&fd).map_err(|errno| format!("{name}: {errno}"))?;
    let stat = rustix::fs::fstat(&fd).map_err(|errno| format!("{name}: {errno}"))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Fifo || flags.contains(OFlags::PATH) {
        return Err(format!("{name}: no FIFO"));
    }
    if flags & OFlags::RWMODE != OFlags::WRONLY {
        return Err(format!("{name}: not its writing end alone"));
    }
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let own = rustix::fs::open(path, OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty());
    own.map(Into::into)
        .map_err(|errno| format!("{name}: can't be opened ({errno}); does anybody read it?"))
}

/// Nothing of a seat may be the same file.
fn distinct<'a>(files: impl Iterator<Item = &'a File>) -> Result<(), String> {
    let mut seen = Vec::new();
    for file in files {
        let data = file.metadata().map_err(|error| error.to_string())?;
        let key = (data.dev(), data.ino());
        if seen.contains(&key) {
            return Err("one file was handed over as two (disks, header, journal)".to_owned());
        }
        seen.push(key);
    }
    Ok(())
}

fn read_small((name, fd): Named) -> Result<String, String> {
    let file = regular((name.clone(), fd), Access::Read)?;
    // From its beginning, wherever the program left the position.
    let mut bytes = vec![0; IDENTITY_BYTES_MAX as usize + 1];
    let mut filled = 0;
    while filled < bytes.len() {
        match file.read_at(&mut bytes[filled..], filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(format!("{name}: {error}")),
        }
    }
    if filled as u64 > IDENTITY_BYTES_MAX {
        return Err(format!("{name}: more than {IDENTITY_BYTES_MAX} bytes"));
    }
    bytes.truncate(filled);
    String::from_utf8(bytes).map_err(|_| format!("{name}: no text"))
}

fn read_pem(named: Named, kind: &str) -> Result<String, String> {
    let name = named.0.clone();
    let text = read_small(named)?;
    if !text.contains(&format!("-----BEGIN {kind}-----")) {
        return Err(format!("{name}: no PEM of a {kind}"));
    }
    Ok(text)
}

fn check_identity(who: &SeatIdentity, expected: &Expected) -> Result<(), String> {
    let found = Expected {
        vm: who.vm.clone(),
        vm_id: who.vm_id,
        seat: who.seat.clone(),
        seat_id: who.seat_id,
    };
    if found != *expected {
        return Err(format!(
            "seat.json is of seat {}/{} ({}), not of {}/{} ({}): the identity Secret is another seat's",
            found.vm, found.seat, found.seat_id, expected.vm, expected.seat, expected.seat_id
        ));
    }
    Ok(())
}

/// The files of a seat whose program is, or was, or will be there.
pub struct Handed {
    expected: Expected,
    hierarchies: Hierarchies,
    held: Mutex<Option<Arc<Held>>>,
    leaves: Mutex<Vec<PathBuf>>,
    wanted: AtomicBool,
    ending: AtomicBool,
}

impl Handed {
    /// Nothing was handed over yet.
    pub fn new(expected: Expected, hierarchies: Hierarchies) -> Handed {
        Handed {
            expected,
            hierarchies,
            held: Mutex::default(),
            leaves: Mutex::default(),
            wanted: AtomicBool::new(true),
            ending: AtomicBool::new(false),
        }
    }

    /// Who the seat must be.
    pub fn expected(&self) -> &Expected {
        &self.expected
    }

    fn held(&self) -> MutexGuard<'_, Option<Arc<Held>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what was handed over, in the place of anything before.
    pub fn put(&self, held: Held) {
        *self.held() = Some(Arc::new(held));
    }

    /// The program that gave it is gone; what a later one gave stays.
    pub fn take_back(&self, peer: &Arc<Peer>) {
        let mut held = self.held();
        if held.as_ref().is_some_and(|held| Arc::ptr_eq(&held.peer, peer)) {
            *held = None;
        }
    }

    /// Whether files are held that a program gave.
    pub fn is_whole(&self) -> bool {
        self.held().is_some()
    }

    /// Whether engines may be started: not while the seat is being removed, or its pod proved not to be genuine.
    /// True if that has changed.
    pub fn allow(&self, wanted: bool) -> bool {
        self.wanted.swap(wanted, Ordering::SeqCst) != wanted
    }

    /// Whether the pod ends: no engine is started then.
    pub fn set_ending(&self, ending: bool) {
        self.ending.store(ending, Ordering::SeqCst);
    }

    /// The network namespace that the next engine would be started in.
    pub fn netns(&self) -> Option<Netns> {
        self.held().as_ref().map(|held| held.peer.netns)
    }

    fn whole(&self) -> Result<Arc<Held>, SeatError> {
        let held = self.held().clone();
        held.ok_or_else(|| SeatError::NotYet {
            seat: self.expected.seat.clone(),
            why: "its program has not handed its files over".to_owned(),
        })
    }

    fn refuse(&self, what: &str, why: String) -> SeatError {
        SeatError::Handed {
            seat: self.expected.seat.clone(),
            what: what.to_owned(),
            why,
        }
    }

    fn copy(&self, what: &str, file: &File) -> Result<File, SeatError> {
        file.try_clone().map_err(|error| self.refuse(what, error.to_string()))
    }
}

impl Source for Handed {
    fn identity(&self, _: &SeatConfig) -> Result<(SeatIdentity, Identity), SeatError> {
        let held = self.whole()?;
        Ok((held.who.clone(), held.identity.clone()))
    }

    fn header(&self, _: &SeatConfig) -> Result<StoredHeader, String> {
        let held = self.whole().map_err(|error| explain(&error))?;
        read_header(&held.header).map_err(|error| explain(&error))
    }

    fn missing(&self, _: &SeatConfig) -> Option<(Phase, String)> {
        if self.ending.load(Ordering::SeqCst) {
            return Some((Phase::Waiting, "its pod ends".to_owned()));
        }
        if !self.wanted.load(Ordering::SeqCst) {
            return Some((
                Phase::Waiting,
                "the book of its virtual machine does not want it".to_owned(),
            ));
        }
        let why = self.whole().err().map(|error| explain(&error))?;
        Some((Phase::Waiting, why))
    }

    /// The genesis header of the seat that the first record names: written once, before its first engine, and only beside disks with the
    /// guest's first contents. A seat that became the first one later has blank ones: what its program gave is not used, and it is asked anew.
    fn settle(&self, _: &SeatConfig, arbiter: &Bounded) -> Result<(), SeatError> {
        let held = self.whole()?;
        let refuse = |error: &dyn std::fmt::Display| self.refuse("header", error.to_string());
        if read_header(&held.header).map_err(|error| refuse(&error))? != StoredHeader::Absent {
            return Ok(());
        }
        let not_yet = |why| SeatError::NotYet {
            seat: self.expected.seat.clone(),
            why,
        };
        let seat_id: SeatId = self.expected.seat_id;
        match arbiter.ask(&Ask::ReadRecord, RECORD_PATIENCE) {
            (Answer::Read(ReadOutcome::Found(found)), _) if found.record.holder == Incarnation::genesis(seat_id) => {
                if !held.original {
                    self.take_back(&held.peer);
                    let why = "its disks were prepared before it became the first seat: its program is asked anew";
                    return Err(not_yet(why.to_owned()));
                }
                let file = self.copy("header", &held.header)?;
                let (mut header, _) = HeaderFile::open(file).map_err(|error| refuse(&error))?;
                header
                    .write(&SeatHeader::genesis(seat_id, found.uid))
                    .and_then(|()| header.complete())
                    .map_err(|error| refuse(&error))
            }
            (Answer::Read(ReadOutcome::Found(_)), _) => Ok(()),
            (_, why) => {
                let why = why.unwrap_or_else(|| "its virtual machine has no record yet".to_owned());
                Err(not_yet(why))
            }
        }
    }

    fn open(&self, config: &SeatConfig, _: &SeatFolder) -> Result<Materials, SeatError> {
        let held = self.whole()?;
        if held.disks.len() != config.disks.len() {
            let why = "the disks of the FaultTolerantVM have changed since".to_owned();
            return Err(self.refuse("disks", why));
        }
        let disks = held.disks.iter().map(|disk| self.copy("a disk", disk));
        Ok(Materials {
            who: held.who.clone(),
            identity: held.identity.clone(),
            kernel: self.copy("kernel", &held.kernel)?,
            initrd: held.initrd.as_ref().map(|file| self.copy("initrd", file)).transpose()?,
            disks: disks.collect::<Result<_, _>>()?,
            header: self.copy("header", &held.header)?,
            journal: self.copy("journal", &held.journal)?,
            console: self.copy("console", &held.console)?,
            allocate: false,
            seat_patience_ms: Some(SEAT_PATIENCE_MS),
        })
    }

    fn place(&self) -> Result<Place, SeatError> {
        let held = self.whole()?;
        let leaves = held.peer.make_leaves(&self.hierarchies);
        let cgroups = leaves.map_err(|error| self.refuse("cgroup", explain(&error)))?;
        self.leaves
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone_from(&cgroups);
        Ok(Place {
            cgroups,
            network: Some(held.peer.network.clone()),
            taps_inside: false,
        })
    }

    fn has_process(&self) -> bool {
        self.hierarchies.has_engine(self.expected.seat_id)
    }

    fn has_process_of(&self, pod: SeatId) -> bool {
        self.hierarchies.has_engine(pod)
    }

    fn ends(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }

    fn left(&self) {
        remove_leaves(&self.leaves.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

#[cfg(test)]
#[path = "handed_tests.rs"]
mod tests;
