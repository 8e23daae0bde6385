//! An API server for tests: a list of nothing, and watches that tell of one object or say nothing.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

/// What was asked, and what is to be done.
#[derive(Default)]
struct Seen {
    lines: Vec<String>,
    /// So many watches say nothing.
    silent: u32,
}

/// Runs a test's future.
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(future)
}

/// The server. Its threads end with the test's process.
pub(crate) struct Stub {
    port: u16,
    seen: Arc<Mutex<Seen>>,
}

impl Stub {
    pub(crate) fn start() -> Stub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen: Arc<Mutex<Seen>> = Arc::default();
        let serving = seen.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (seen, stream) = (serving.clone(), stream.unwrap());
                std::thread::spawn(move || serve(stream, &seen));
            }
        });
        Stub { port, seen }
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn config(&self) -> kube::Config {
        kube::Config::new(format!("http://127.0.0.1:{}", self.port).parse().unwrap())
    }

    /// The next watches say nothing, as those of a server that has died.
    pub(crate) fn silence_watches(&self, count: u32) {
        self.seen.lock().unwrap().silent = count;
    }

    /// First lines of all requests so far.
    pub(crate) fn asked(&self) -> Vec<String> {
        self.seen.lock().unwrap().lines.clone()
    }
}

fn serve(stream: TcpStream, seen: &Mutex<Seen>) {
    let mut reader = BufReader::new(stream);
    while let Some(line) = request(&mut reader) {
        let is_watch = line.contains("watch=true");
        let silent = {
            let mut seen = seen.lock().unwrap();
            seen.lines.push(line);
            let silent = is_watch && seen.silent > 0;
            seen.silent -= u32::from(silent);
            silent
        };
        let metadata = json!({"name": "new", "namespace": "shop", "resourceVersion": "8"});
        let event = json!({"type": "ADDED", "object": {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}});
        let list =
            json!({"apiVersion": "v1", "kind": "ConfigMapList", "metadata": {"resourceVersion": "7"}, "items": []});
        let written = match (is_watch, silent) {
            (true, true) => write_chunk(reader.get_mut(), true, None),
            (true, false) => write_chunk(reader.get_mut(), true, Some(&event)),
            (false, _) => write_chunk(reader.get_mut(), false, Some(&list)),
        };
        if written.is_err() {
            return;
        }
    }
}

/// The first line of a request without a body; none at the end of the connection.
fn request(reader: &mut BufReader<TcpStream>) -> Option<String> {
    let mut first = String::new();
    for line in reader.lines().map_while(Result::ok) {
        if line.is_empty() {
            return Some(first);
        }
        if first.is_empty() {
            first = line;
        }
    }
    None
}

/// An answer that goes on, with a line of it; or all of it.
fn write_chunk(stream: &mut TcpStream, goes_on: bool, line: Option<&Value>) -> std::io::Result<()> {
    write!(
        stream,
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    )?;
    if let Some(line) = line {
        let line = format!("{line}\n");
        write!(stream, "{:x}\r\n{line}\r\n", line.len())?;
    }
    if !goes_on {
        write!(stream, "0\r\n\r\n")?;
    }
    stream.flush()
}
