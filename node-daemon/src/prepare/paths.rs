//! A seat whose files are paths of the daemon's own machine: standalone.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ftvm_engine::control::Identity;
use ftvm_engine::control::header_file::read_header;
use ftvm_protocol::core::StoredHeader;

use super::{Materials, Place, SeatError, Source};
use crate::api::Phase;
use crate::arbiter::Bounded;
use crate::config::{DiskConfig, JailConfig, SeatConfig};
use crate::disks::mark::MarkFile;
use crate::identity::{self, SeatIdentity};
use crate::import;
use crate::state::SeatFolder;

/// A console log is renamed at the start of an engine once it is larger.
const CONSOLE_LOG_BYTES_MAX: u64 = 16 << 20;

/// Where the header of a seat is.
pub fn header_path(config: &SeatConfig, folder: &SeatFolder) -> PathBuf {
    config.header.clone().unwrap_or_else(|| folder.file("header"))
}

/// Where the journal of a seat is.
pub fn journal_path(config: &SeatConfig, folder: &SeatFolder) -> PathBuf {
    config.journal.clone().unwrap_or_else(|| folder.file("journal"))
}

/// Opens what the configuration names.
#[derive(Debug)]
pub struct Paths {
    folder: SeatFolder,
    network_namespace: Option<PathBuf>,
    cgroups: Vec<PathBuf>,
}

impl Paths {
    /// For the seat of this folder, whose engines live where the jail's settings say.
    pub fn new(folder: SeatFolder, jail: &JailConfig) -> Paths {
        Paths {
            folder,
            network_namespace: jail.network_namespace.clone(),
            cgroups: jail.cgroups.clone(),
        }
    }
}

impl Source for Paths {
    fn identity(&self, config: &SeatConfig) -> Result<(SeatIdentity, Identity), SeatError> {
        Ok(identity::load(&config.identity, &config.vm, &config.seat)?)
    }

    fn header(&self, config: &SeatConfig) -> Result<StoredHeader, String> {
        let path = header_path(config, &self.folder);
        match File::open(&path) {
            Ok(file) => read_header(&file).map_err(|error| error.to_string()),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(StoredHeader::Absent),
            Err(error) => Err(format!("{}: {error}", path.display())),
        }
    }

    fn missing(&self, config: &SeatConfig) -> Option<(Phase, String)> {
        let set_up = !config.original_disk || matches!(self.header(config), Ok(StoredHeader::Found(_)));
        (!set_up).then(|| {
            let label = config.label();
            let why = format!("seat {label} has the original disks and no header: run `ftvm standalone up`");
            (Phase::NotSetUp, why)
        })
    }

    fn settle(&self, _: &SeatConfig, _: &Bounded) -> Result<(), SeatError> {
        Ok(())
    }

    fn open(&self, config: &SeatConfig, folder: &SeatFolder) -> Result<Materials, SeatError> {
        let (who, identity) = self.identity(config)?;
        let initrd = config.boot.initrd.as_ref();
        Ok(Materials {
            who,
            identity,
            kernel: open_boot("kernel", &config.boot.kernel)?,
            initrd: initrd.map(|path| open_boot("initrd", path)).transpose()?,
            disks: config.disks.iter().map(open_disk).collect::<Result<_, _>>()?,
            header: open_own("header", &header_path(config, folder))?,
            journal: open_own("journal", &journal_path(config, folder))?,
            console: folder.open_log("console.log", CONSOLE_LOG_BYTES_MAX)?,
            allocate: true,
            seat_patience_ms: None,
        })
    }

    fn place(&self) -> Result<Place, SeatError> {
        let network = self.network_namespace.as_ref().map(|path| {
            let opened = File::open(path).map_err(|source| SeatError::NetworkNamespace {
                path: path.clone(),
                source,
            });
            opened.map(|file| Arc::new(file.into()))
        });
        Ok(Place {
            cgroups: self.cgroups.clone(),
            network: network.transpose()?,
            taps_inside: true,
        })
    }
}

fn open_boot(what: &'static str, path: &Path) -> Result<File, SeatError> {
    File::open(path).map_err(|error| SeatError::Boot {
        what,
        path: path.to_owned(),
        why: format!("{error}; check boot.{what}"),
    })
}

fn open_disk(disk: &DiskConfig) -> Result<File, SeatError> {
    let refuse = |why: String| SeatError::Disk {
        what: format!("disk {}", disk.name),
        path: disk.path.clone(),
        why,
    };
    let is_device = std::fs::metadata(&disk.path).is_ok_and(|data| data.file_type().is_block_device());
    let mut options = OpenOptions::new();
    options.read(true).write(!disk.read_only);
    if is_device {
        // For a device this means: not mounted and not claimed by anybody.
        options.custom_flags(libc::O_EXCL);
    }
    let file = options.open(&disk.path).map_err(|error| refuse(open_advice(&error)))?;
    let kind = file.metadata().map_err(|error| refuse(error.to_string()))?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(refuse("neither a file nor a block device".to_owned()));
    }
    let mark = MarkFile::new(import::mark_path(&disk.path));
    match mark.read() {
        Ok(Some(mark)) if !mark.complete => {
            let why = "its import was interrupted: run `ftvm-node-daemon import` again, which goes on where it was"
                .to_owned();
            Err(refuse(why))
        }
        Ok(_) => Ok(file),
        Err(error) => Err(refuse(crate::explain(&error))),
    }
}

fn open_advice(error: &io::Error) -> String {
    match (error.kind(), error.raw_os_error()) {
        (ErrorKind::NotFound, _) => "does not exist: make it (fallocate -l SIZE), or mount its file system".to_owned(),
        (ErrorKind::PermissionDenied, _) => "permission denied: the daemon's user must read and write it".to_owned(),
        (_, Some(libc::EROFS)) => "its file system is read-only: remount it, or say read_only: true".to_owned(),
        (_, Some(libc::EBUSY)) => "in use: the device is mounted or claimed by another program".to_owned(),
        _ => format!("can't be opened: {error}"),
    }
}

/// Opens the header or the journal, making it if it is missing.
fn open_own(what: &str, path: &Path) -> Result<File, SeatError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    let opened = match options.open(path) {
        // Not at once: who may have to make a file waits for its file system, also where it is there and the file system hangs.
        Err(error) if error.kind() == ErrorKind::NotFound => {
            options.create(true).truncate(false).mode(0o600).open(path)
        }
        opened => opened,
    };
    opened.map_err(|error| SeatError::Disk {
        what: what.to_owned(),
        path: path.to_owned(),
        why: open_advice(&error),
    })
}
