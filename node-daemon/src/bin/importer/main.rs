//! The importer: reads disk images that others made, and downloads them. docs/disks.md, "Who touches a hostile image".
//!
//! ```text
//!   importer read ORDER     standard input: the file;  seccomp: read it, write the pipe, ask for memory
//!                           its backing files, open
//!   importer fetch ORDER    no file;                   the network
//!                │
//!                └─► standard output: frames (ftvm_node_daemon::disks::frame)
//! ```

mod fetch;
mod formats;
mod read;
mod sandbox;

use std::io::{BufWriter, Write};
use std::process::ExitCode;

use ftvm_node_daemon::disks::frame::Frame;

/// Why it can't be done.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    /// The file is not the one that was asked for.
    other: bool,
    why: String,
}

impl Failure {
    fn new(why: impl Into<String>) -> Failure {
        Failure {
            other: false,
            why: why.into(),
        }
    }

    /// The same, said of a backing file.
    fn of_backing(mut self, name: &str) -> Failure {
        self.why = format!("its backing file {name}: {}", self.why);
        self
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Failure {
        Failure::new(error.to_string())
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [word, order] = arguments.as_slice() else {
        return usage();
    };
    let mut out = BufWriter::with_capacity(64 << 10, std::io::stdout().lock());
    let result = match word.as_str() {
        "read" => sandbox::enter().and_then(|()| read::run(order, &mut out)),
        "fetch" => sandbox::leave_root().and_then(|()| fetch::run(order, &mut out)),
        _ => return usage(),
    };
    let last = match &result {
        Ok(()) => Frame::End,
        Err(failure) => Frame::Failed {
            other: failure.other,
            why: failure.why.as_bytes(),
        },
    };
    // Nobody listens any more: then there is nobody to tell.
    let told = last.write(&mut out).and_then(|()| out.flush());
    ExitCode::from(u8::from(result.is_err() || told.is_err()))
}

fn usage() -> ExitCode {
    eprintln!("importer: usage: importer read|fetch ORDER; it is started by the programs that prepare disks");
    ExitCode::from(2)
}
