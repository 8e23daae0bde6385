//! The importer as a child, and what it is asked for.

use std::fs::File;
use std::io::{self, BufReader};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use rustix::io::FdFlags;
use serde::{Deserialize, Serialize};

use super::DiskError;
use super::frame::{self, Frame};
use super::source::{Reading, Source};

/// Longest word of the importer about what went wrong.
const WHY_CHARS_MAX: usize = 400;

/// `importer read`: say what the file on standard input contains.
#[derive(Debug, Serialize, Deserialize)]
pub struct Read {
    /// What to read it as.
    pub reading: Reading,
    /// The files that it is the difference from, nearest first.
    pub backing: Vec<Backing>,
    /// Its digest, which is compared before anything else is done with it.
    pub sha256: Option<String>,
    /// What comes before is known.
    pub from_bytes: u64,
    /// Longest contents.
    pub limit_bytes: u64,
}

/// A file that the importer finds open.
#[derive(Debug, Serialize, Deserialize)]
pub struct Backing {
    /// Its name, for people.
    pub name: String,
    /// Its descriptor.
    pub descriptor: RawFd,
}

/// What the importer reads: a file, and those that it is the difference from, nearest first, by their names.
pub(super) struct Image {
    pub(super) file: File,
    pub(super) backing: Vec<(String, File)>,
}

impl Image {
    /// Where the importer finds the backing files.
    pub(super) fn descriptors(&self) -> Vec<Backing> {
        let all = self.backing.iter().map(|(name, file)| Backing {
            name: name.clone(),
            descriptor: file.as_raw_fd(),
        });
        all.collect()
    }
}

/// `importer fetch`: download.
#[derive(Debug, Serialize, Deserialize)]
pub struct Fetch {
    /// What.
    pub url: String,
    /// Certificates (PEM) that vouch for the server instead of the public authorities.
    pub authority: Option<String>,
    /// What comes before is there.
    pub from_bytes: u64,
    /// Of this version.
    pub etag: Option<String>,
    /// Longest file.
    pub limit_bytes: u64,
}

/// An importer that runs.
pub(super) struct Helper {
    program: PathBuf,
    child: Child,
    output: BufReader<ChildStdout>,
    buffer: Vec<u8>,
    name: String,
}

impl Helper {
    /// Starts it with this order and, as standard input, this file; its backing files are open under the numbers that they have here.
    pub(super) fn start<T: Serialize>(
        program: &Path,
        (word, order): (&str, &T),
        input: Option<Image>,
        source: &Source,
    ) -> Result<Helper, DiskError> {
        let order = serde_json::to_string(order).map_err(|error| failed(program, error.to_string()))?;
        let (input, backing) = match input {
            Some(Image { file, backing }) => (Stdio::from(file), backing),
            None => (Stdio::null(), Vec::new()),
        };
        let mut command = Command::new(program);
        command
            .args([word, &order])
            .env_clear()
            .stdin(input)
            .stdout(Stdio::piped());
        if !backing.is_empty() {
            leave_open(&mut command, backing);
        }
        let mut child = command.spawn().map_err(|error| {
            failed(
                program,
                format!("can't be started ({error}): it is part of the release"),
            )
        })?;
        let output = child
            .stdout
            .take()
            .ok_or_else(|| failed(program, "has no output".to_owned()))?;
        Ok(Helper {
            program: program.to_owned(),
            child,
            output: BufReader::with_capacity(64 << 10, output),
            buffer: Vec::new(),
            name: source.name().to_owned(),
        })
    }

    /// What it says next. After [`Frame::End`] there is nothing more.
    pub(super) fn next(&mut self) -> Result<Frame<'_>, DiskError> {
        // The borrow checker does not see that a frame that is returned ends this function.
        let read = frame::read(&mut self.output, &mut self.buffer);
        match read {
            Ok(Some(Frame::Failed { other, why })) => {
                let text = String::from_utf8_lossy(why);
                let why: String = text.chars().filter(|c| !c.is_control()).take(WHY_CHARS_MAX).collect();
                let name = self.name.clone();
                Err(if other {
                    DiskError::OtherDigest { name, why }
                } else {
                    DiskError::Source { name, why }
                })
            }
            Ok(Some(frame)) => Ok(frame),
            Ok(None) => {
                let ended = self.child.wait();
                let how = ended.map_or_else(|error| error.to_string(), |status| status.to_string());
                Err(failed(
                    &self.program,
                    format!(
                        "ended while it read {} ({how}): the file is damaged or hostile, or more than it may use",
                        self.name
                    ),
                ))
            }
            Err(error) => Err(failed(
                &self.program,
                format!("said nonsense about {}: {error}", self.name),
            )),
        }
    }
}

/// The program gets these descriptors, and none else that is open here: each is closed by exec unless its mark says otherwise, which is
/// taken away in the new process alone.
fn leave_open(command: &mut Command, files: Vec<(String, File)>) {
    let keep = move || {
        files
            .iter()
            .try_for_each(|(_, file)| rustix::io::fcntl_setfd(file, FdFlags::empty()).map_err(io::Error::from))
    };
    // SAFETY: between fork and exec it makes system calls alone, on descriptors that it owns.
    unsafe { command.pre_exec(keep) };
}

fn failed(program: &Path, why: String) -> DiskError {
    DiskError::Importer {
        program: program.to_owned(),
        why,
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // It has ended by itself, or is of no use any more.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;
    use crate::disks::source::Place;

    /// A shell in the place of the importer says what it has open.
    #[test]
    fn the_importer_has_its_files_open_and_no_other() {
        let folder = crate::testing::Folder::new("helper");
        let open = |name: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, name).unwrap();
            File::open(path).unwrap()
        };
        let _other = open("other");
        let image = Image {
            file: open("image"),
            backing: ["near", "far"].map(|name| (name.to_owned(), open(name))).into(),
        };
        let descriptors = image.descriptors();
        let source = Source {
            place: Place::Image {
                path: "/image".to_owned(),
                backing: Vec::new(),
            },
            format: None,
            compression: None,
            sha256: None,
        };
        // JSON has it in quotation marks, in which a shell still executes it.
        let order = "$(ls -l /proc/$$/fd > /proc/$$/fd/1)";
        let mut helper = Helper::start(Path::new("/bin/sh"), ("-c", &order), Some(image), &source).unwrap();
        let mut said = String::new();
        helper.output.read_to_string(&mut said).unwrap();
        let is_open = |descriptor: RawFd, name: &str| {
            let path = folder.path().join(name);
            said.contains(&format!(" {descriptor} -> {}\n", path.display()))
        };
        assert!(is_open(0, "image"), "{said}");
        assert_eq!(descriptors.len(), 2);
        for Backing { name, descriptor } in &descriptors {
            assert!(is_open(*descriptor, name), "{name} as {descriptor}: {said}");
        }
        let files = said.matches(&folder.path().display().to_string()).count();
        assert_eq!(files, 3, "{said}");
    }
}
