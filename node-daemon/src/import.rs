//! `ftvm-node-daemon import`: a thick disk out of an image, for seats without Kubernetes.

use std::io::{IsTerminal, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use clap::{ArgGroup, Args};
use ftvm_engine::control::exit_code;

use crate::disks::source::{Compression, Format, Place, Source};
use crate::disks::{self, FileAt, Job, Step};

/// How often progress is told.
const TELL: Duration = Duration::from_secs(1);

/// What to import, and to where.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("source").required(true).args(["file", "url", "blank"])))]
pub struct Import {
    /// The disk: a file, made if it is missing, or a block device.
    #[arg(long)]
    to: PathBuf,
    /// Its size in MiB; of a block device, what it has.
    #[arg(long)]
    size_mib: Option<u64>,
    /// Take the first contents from this file.
    #[arg(long)]
    file: Option<PathBuf>,
    /// A file that the one of --file is the difference from (qcow2); once for each file of the chain, nearest first.
    #[arg(long, conflicts_with_all = ["url", "blank"])]
    backing: Vec<PathBuf>,
    /// Take the first contents from this address (http, https).
    #[arg(long, requires = "sha256")]
    url: Option<String>,
    /// Zeros.
    #[arg(long)]
    blank: bool,
    /// What the file is written in; by the ending of its name if missing.
    #[arg(long)]
    format: Option<Format>,
    /// What it is compressed with; by the ending of its name if missing.
    #[arg(long)]
    compression: Option<Compression>,
    /// SHA-256 of the file, as sha256sum prints it.
    #[arg(long)]
    sha256: Option<String>,
    /// Certificates (PEM) that vouch for the server instead of the public authorities.
    #[arg(long)]
    authority: Option<PathBuf>,
    /// Where to keep how far it is; needed for a block device. Beside a file if missing.
    #[arg(long)]
    mark: Option<PathBuf>,
}

/// Where it is kept how far the import of this file is.
pub fn mark_path(disk: &Path) -> PathBuf {
    beside(disk, ".ftvm-disk")
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

impl Import {
    /// Does it; the exit code.
    pub fn run(&self) -> u8 {
        let job = match self.job() {
            Ok(job) => job,
            Err(why) => {
                eprintln!("ftvm-node-daemon: {why}");
                return exit_code::USAGE;
            }
        };
        let told = Mutex::new(Instant::now());
        let progress = |step: Step, done: u64, total: u64| {
            let Ok(mut last) = told.lock() else { return };
            if last.elapsed() >= TELL {
                *last = Instant::now();
                tell(step, done, total);
            }
        };
        match disks::prepare(&job, &progress) {
            Ok(()) => {
                eprintln!(
                    "ftvm-node-daemon: {} is complete: {} bytes, all allocated",
                    job.path.display(),
                    job.size_bytes
                );
                exit_code::OK
            }
            Err(error) => {
                eprintln!("ftvm-node-daemon: {}: {}", job.path.display(), crate::explain(&error));
                exit_code::DISK
            }
        }
    }

    fn job(&self) -> Result<Job, String> {
        let importer = std::env::current_exe().map_err(|error| format!("this program's folder: {error}"))?;
        let device = std::fs::metadata(&self.to).is_ok_and(|data| data.file_type().is_block_device());
        let mark = match (&self.mark, device) {
            (Some(mark), _) => mark.clone(),
            (None, false) => mark_path(&self.to),
            (None, true) => return Err("--mark: name a file that is kept until the device is complete".to_owned()),
        };
        let authority = self.authority.as_ref().map(|path| {
            std::fs::read_to_string(path).map_err(|error| format!("--authority {}: {error}", path.display()))
        });
        Ok(Job {
            path: self.to.clone(),
            size_bytes: self.size_bytes(device)?,
            staging: beside(&mark, "-download"),
            mark,
            source: self.source(authority.transpose()?),
            file: self.file.clone().map(FileAt::Path),
            backing: self.backing.iter().cloned().map(FileAt::Path).collect(),
            importer: importer.with_file_name("importer"),
            used: false,
            // Others may have written the disk since.
            original: false,
        })
    }

    fn size_bytes(&self, device: bool) -> Result<u64, String> {
        if let Some(mib) = self.size_mib {
            return mib
                .checked_mul(1 << 20)
                .ok_or_else(|| "--size-mib: too large".to_owned());
        }
        if !device {
            return Err(
                "--size-mib: say how large the disk is to be; what the image does not fill is zeros".to_owned(),
            );
        }
        let size = std::fs::File::open(&self.to).and_then(|file| disks::thick::length(&file));
        size.map_err(|error| format!("{}: {error}", self.to.display()))
    }

    fn source(&self, authority: Option<String>) -> Option<Source> {
        let place = match (&self.file, &self.url) {
            (Some(path), _) => Place::Image {
                path: path.display().to_string(),
                backing: self.backing.iter().map(|path| path.display().to_string()).collect(),
            },
            (None, Some(url)) => Place::Http {
                url: url.clone(),
                authority,
            },
            (None, None) => return None,
        };
        Some(Source {
            place,
            format: self.format,
            compression: self.compression,
            sha256: self.sha256.clone(),
        })
    }
}

fn tell(step: Step, done: u64, total: u64) {
    let percent = done.saturating_mul(100).checked_div(total).unwrap_or(100);
    let (done, total, words) = (done >> 20, total.div_ceil(1 << 20), step.words());
    let mut out = std::io::stderr().lock();
    let end = if out.is_terminal() { "\r" } else { "\n" };
    // Progress that nobody sees is no reason to stop.
    let _ = write!(out, "is being {words}: {done} of {total} MiB, {percent} %{end}");
}
