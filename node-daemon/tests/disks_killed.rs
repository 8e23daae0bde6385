//! An import that is killed again and again, anywhere, and downloads that are cut.

mod imports;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ftvm_node_daemon::disks::mark::{Mark, MarkFile};
use ftvm_node_daemon::import;
use imports::{Bench, MIB, contents, sha256};

/// Size of the disk: several moves of the mark.
const DISK_MIB: u64 = 160;
/// Size of the image.
const IMAGE_MIB: u64 = 128;

/// Runs an import and kills it after this many system calls that change a file or make it durable.
fn killed_at(bench: &Bench, call: u32, words: &[&str]) -> bool {
    let import = bench.command("disk.img", DISK_MIB, words);
    let mut command = std::process::Command::new("strace");
    let calls = "pwrite64,fallocate,ftruncate,fsync,fdatasync,rename,unlink,openat,flock";
    command.args(["-qq", "-o", "/dev/null"]);
    command.args([
        "-e",
        &format!("trace={calls}"),
        "-e",
        &format!("inject={calls}:signal=KILL:when={call}"),
    ]);
    command.arg(import.get_program()).args(import.get_args());
    let status = command.stdin(Stdio::null()).stderr(Stdio::null()).status().unwrap();
    !status.success()
}

/// Runs an import and kills it after this time.
fn killed_after(bench: &Bench, time: Duration, words: &[&str]) {
    let mut import = bench.command("disk.img", DISK_MIB, words);
    let mut child = import.stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(time);
    child.kill().unwrap();
    child.wait().unwrap();
}

fn expected() -> Vec<u8> {
    let mut expected = contents(IMAGE_MIB);
    expected.resize(DISK_MIB as usize * MIB, 0);
    expected
}

#[test]
fn wherever_it_is_killed_a_disk_that_counts_is_whole() {
    let bench = Bench::new();
    let raw = bench.write("root.raw", &contents(IMAGE_MIB));
    drop(raw);
    let file = bench.convert("root.raw", "root.qcow2", &[]).display().to_string();
    let (lives, went_on) = killed_anywhere(&bench, &["--file", &file], 3);
    assert!(lives > 35 && went_on > 5, "{lives} lives, {went_on} went on");
}

#[test]
fn wherever_it_is_killed_a_disk_of_a_chain_is_whole() {
    let bench = Bench::new();
    // The first half is the base's, the second that of the image over it.
    let image = contents(IMAGE_MIB);
    let (first, second) = image.split_at(image.len() / 2);
    let base = bench.write("base.raw", first).display().to_string();
    let second = bench.write("second", second).display().to_string();
    let size = format!("{IMAGE_MIB}M");
    let words = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        &base,
        "-F",
        "raw",
        "top.qcow2",
        &size,
    ];
    let top = bench.run("qemu-img", &words, "top.qcow2").display().to_string();
    let half = IMAGE_MIB / 2;
    let write = format!("write -s {second} {half}M {half}M");
    bench.run("qemu-io", &["-f", "qcow2", "-c", &write, &top], "");
    let (lives, went_on) = killed_anywhere(&bench, &["--file", &top, "--backing", &base], 1);
    assert!(lives > 30 && went_on > 1, "{lives} lives, {went_on} went on");
}

/// Imports until the disk was complete so many times; each time it must be [`expected`]. Gives the number of lives, and of those that had a
/// beginning.
fn killed_anywhere(bench: &Bench, words: &[&str], times: u32) -> (u32, u32) {
    let expected = expected();
    // Each life begins where the one before was killed, and dies at another system call.
    let (mut lives, mut went_on, mut complete) = (0u32, 0u32, 0u32);
    let mut call = 1;
    let mut dice = 1u32;
    while complete < times {
        let before = bench.done_bytes("disk.img");
        let died = killed_at(bench, call, words);
        lives += 1;
        went_on += u32::from(before > 0);
        let after = bench.done_bytes("disk.img");
        if bench.complete("disk.img") {
            bench
                .judge("disk.img", &expected)
                .unwrap_or_else(|why| panic!("killed at call {call}: {why}"));
            complete += 1;
            bench.remove("disk.img");
        } else {
            assert!(died, "it ended by itself and is not complete");
            assert!(after >= before, "what was done is not done again: {before} to {after}");
        }
        // The first calls one by one, then anywhere.
        dice = dice.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        call = if lives < 30 { lives + 1 } else { 1 + (dice >> 8) % 900 };
        assert!(lives < 300, "it never becomes complete");
    }
    (lives, went_on)
}

#[test]
fn killed_by_the_clock_it_goes_on_too() {
    let bench = Bench::new();
    let image = contents(IMAGE_MIB);
    bench.write("root.raw", &image);
    let file = bench
        .run("gzip", &["-1k", "root.raw"], "root.raw.gz")
        .display()
        .to_string();
    let expected = expected();
    let words = ["--file", file.as_str()];
    let mut marks = Vec::new();
    for life in 0.. {
        assert!(life < 200, "it never becomes complete: {marks:?}");
        // Longer and longer, for a busy machine.
        killed_after(&bench, Duration::from_millis(40 + 25 * life), &words);
        marks.push(bench.done_bytes("disk.img"));
        if bench.complete("disk.img") {
            break;
        }
    }
    assert!(marks.is_sorted(), "{marks:?}");
    bench.judge("disk.img", &expected).unwrap();
}

#[test]
fn a_mark_that_is_written_too_early_is_caught() {
    // The judge's negative control: what a program that marks before it writes would leave.
    let bench = Bench::new();
    let file = bench.write("root.raw", &contents(IMAGE_MIB)).display().to_string();
    let words = ["--file", file.as_str()];
    assert!(killed_at(&bench, 150, &words));
    assert!(!bench.complete("disk.img"));
    let marks = MarkFile::new(import::mark_path(&bench.path("disk.img")));
    let honest = marks.read().unwrap().unwrap();
    marks
        .write(&Mark {
            complete: true,
            ..honest.clone()
        })
        .unwrap();
    let why = bench.judge("disk.img", &expected()).unwrap_err();
    assert!(why.contains("is wrong"), "{why}");
    // And one that is ahead of the contents makes a disk that the judge refuses.
    let ahead = Mark {
        done_bytes: IMAGE_MIB << 20,
        ..honest
    };
    marks.write(&ahead).unwrap();
    assert!(bench.import("disk.img", DISK_MIB, &words).status.success());
    let why = bench.judge("disk.img", &expected()).unwrap_err();
    assert!(why.contains("is wrong"), "{why}");
}

#[test]
fn contents_are_durable_before_the_mark_that_vouches_for_them() {
    // A kill leaves the page cache, a power cut does not: the order of the system calls is what counts then.
    let bench = Bench::new();
    let file = bench.write("root.raw", &contents(IMAGE_MIB)).display().to_string();
    let import = bench.command("disk.img", DISK_MIB, &["--file", &file]);
    let log = bench.path("calls");
    let mut command = std::process::Command::new("strace");
    command.args(["-qq", "-y", "-o"]).arg(&log);
    command.args(["-e", "trace=pwrite64,fallocate,fsync,fdatasync,rename"]);
    command.arg(import.get_program()).args(import.get_args());
    assert!(command.stderr(Stdio::null()).status().unwrap().success());
    let text = std::fs::read_to_string(&log).unwrap();
    let renames = judge_order(&text).unwrap();
    assert!(renames >= 5, "{renames} marks");
    // Negative controls: without the disk's own fsync, and without the folder's.
    let without = |word: &str| -> String {
        let kept = text
            .lines()
            .filter(|line| !(line.contains("sync") && line.contains(word)));
        kept.map(|line| format!("{line}\n")).collect()
    };
    assert!(judge_order(&without("disk.img>")).is_err());
    assert!(judge_order(&without("ftvm-disk.new>")).is_err());
    let folder = format!("{}>", bench.path("").display().to_string().trim_end_matches('/'));
    assert!(judge_order(&without(&folder)).is_err());
}

/// Every mark that is put in place was durable, so were the contents before it, and its folder is before anything else is written.
fn judge_order(calls: &str) -> Result<usize, String> {
    let (mut contents, mut mark, mut folder) = (false, false, false);
    let mut renames = 0;
    for call in calls.lines() {
        let sync = call.starts_with("fsync") || call.starts_with("fdatasync");
        let changes = call.starts_with("pwrite64") || call.starts_with("fallocate");
        match () {
            () if changes && call.contains("ftvm-disk.new>") => mark = true,
            () if changes && call.contains("disk.img>") => {
                if folder {
                    return Err(format!("the folder is not durable before: {call}"));
                }
                contents = true;
            }
            () if sync && call.contains("ftvm-disk.new>") => mark = false,
            () if sync && call.contains("disk.img>") => contents = false,
            () if sync => folder = false,
            () if call.starts_with("rename") => {
                // The first mark vouches for nothing.
                if mark || (contents && renames > 0) {
                    return Err(format!("put in place before it is durable: {call}"));
                }
                folder = true;
                renames += 1;
            }
            () => {}
        }
    }
    if folder {
        return Err("the last mark's folder is not durable".to_owned());
    }
    Ok(renames)
}

/// A web server for one file, which cuts connections.
struct Server {
    address: SocketAddr,
    state: Arc<State>,
}

struct State {
    body: Mutex<Vec<u8>>,
    etag: Mutex<String>,
    /// A connection is cut after so many bytes of a body.
    cut_bytes: AtomicU64,
    ranges: AtomicUsize,
    sent_bytes: AtomicU64,
    knows_ranges: bool,
}

impl Server {
    fn start(body: Vec<u8>, knows_ranges: bool) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            body: Mutex::new(body),
            etag: Mutex::new("\"one\"".to_owned()),
            cut_bytes: AtomicU64::new(u64::MAX),
            ranges: AtomicUsize::new(0),
            sent_bytes: AtomicU64::new(0),
            knows_ranges,
        });
        let shared = state.clone();
        std::thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let state = shared.clone();
                // Whoever is cut off finds out by itself.
                std::thread::spawn(move || drop(serve(connection, &state)));
            }
        });
        Server { address, state }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}/{path}", self.address)
    }
}

fn serve(mut connection: TcpStream, state: &State) -> std::io::Result<()> {
    let mut reader = BufReader::new(connection.try_clone()?);
    let (mut range, mut if_range, mut line) = (None, None, String::new());
    let mut first = String::new();
    reader.read_line(&mut first)?;
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let text = line.trim();
        if text.is_empty() {
            break;
        }
        let lower = text.to_ascii_lowercase();
        if let Some(value) = lower.strip_prefix("range: bytes=") {
            range = value.trim_end_matches('-').parse::<u64>().ok();
        }
        if lower.starts_with("if-range:") {
            if_range = Some(text["if-range:".len()..].trim().to_owned());
        }
    }
    if first.contains("/moved") {
        return write!(
            connection,
            "HTTP/1.1 302 Found\r\nlocation: /root.raw\r\ncontent-length: 0\r\n\r\n"
        );
    }
    if first.contains("/gone") {
        return write!(connection, "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n");
    }
    let (body, etag) = (state.body.lock().unwrap().clone(), state.etag.lock().unwrap().clone());
    let total = body.len() as u64;
    let same = if_range.is_none_or(|tag| tag == etag);
    let from = range.filter(|_| state.knows_ranges && same);
    if from.is_some_and(|from| from >= total) {
        return write!(
            connection,
            "HTTP/1.1 416 Range Not Satisfiable\r\ncontent-range: bytes */{total}\r\ncontent-length: 0\r\n\r\n"
        );
    }
    let start = from.unwrap_or(0);
    let head = match from {
        Some(from) => {
            state.ranges.fetch_add(1, Ordering::SeqCst);
            format!(
                "206 Partial Content\r\ncontent-range: bytes {from}-{}/{total}",
                total - 1
            )
        }
        None => "200 OK".to_owned(),
    };
    write!(
        connection,
        "HTTP/1.1 {head}\r\netag: {etag}\r\ncontent-length: {}\r\n\r\n",
        total - start
    )?;
    let end = total.min(start.saturating_add(state.cut_bytes.load(Ordering::SeqCst)));
    for piece in body[start as usize..end as usize].chunks(64 << 10) {
        connection.write_all(piece)?;
        state.sent_bytes.fetch_add(piece.len() as u64, Ordering::SeqCst);
    }
    if end == total {
        // Until the other side has it all.
        drop(connection.read_exact(&mut [0]));
    }
    Ok(())
}

#[test]
fn a_download_goes_on_after_cuts_and_kills() {
    let image = contents(IMAGE_MIB);
    let expected = expected();
    for knows_ranges in [true, false] {
        let bench = Bench::new();
        let server = Server::start(image.clone(), knows_ranges);
        let (url, digest) = (server.url("root.raw"), sha256(&image));
        let words = ["--url", url.as_str(), "--sha256", digest.as_str()];
        if knows_ranges {
            server.state.cut_bytes.store(40 << 20, Ordering::SeqCst);
        }
        for life in 0..6 {
            killed_after(&bench, Duration::from_millis(60 + 60 * life), &words);
        }
        let output = bench.import("disk.img", DISK_MIB, &words);
        assert!(output.status.success(), "{}", imports::said(&output));
        bench.judge("disk.img", &expected).unwrap();
        let left = std::fs::read_dir(bench.path("")).unwrap().flatten();
        let left: Vec<_> = left.map(|entry| entry.file_name()).collect();
        assert_eq!(left.len(), 2, "disk and mark, no download: {left:?}");
        if knows_ranges {
            let ranges = server.state.ranges.load(Ordering::SeqCst);
            assert!(ranges >= 3, "{ranges} ranges");
        }
    }
}

#[test]
fn a_download_that_is_replaced_or_wrong_does_not_count() {
    let bench = Bench::new();
    let image = contents(80);
    let server = Server::start(image.clone(), true);
    server.state.cut_bytes.store(50 << 20, Ordering::SeqCst);
    let (url, digest) = (server.url("root.raw"), sha256(&image));
    let words = ["--url", url.as_str(), "--sha256", digest.as_str()];
    for life in 0.. {
        assert!(life < 20, "it is complete before it is killed, each time");
        server.state.sent_bytes.store(0, Ordering::SeqCst);
        let mut child = bench
            .command("disk.img", 100, &words)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        while server.state.sent_bytes.load(Ordering::SeqCst) < 45 << 20 && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(5));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        if !bench.complete("disk.img") {
            break;
        }
        // It had a second connection, and all the time that it needs, before it was killed: once more.
        bench.remove("disk.img");
    }
    // Another file, under another ETag: begun anew, and found to be another one.
    let mut other = image.clone();
    other[7] ^= 1;
    *server.state.body.lock().unwrap() = other;
    *server.state.etag.lock().unwrap() = "\"two\"".to_owned();
    server.state.cut_bytes.store(u64::MAX, Ordering::SeqCst);
    let output = bench.import("disk.img", 100, &words);
    let said = imports::said(&output);
    assert_eq!(output.status.code(), Some(16), "{said}");
    assert!(said.contains("SHA-256") && !bench.complete("disk.img"), "{said}");
    // The right one again: nothing of the wrong one is left.
    *server.state.body.lock().unwrap() = image.clone();
    let output = bench.import("disk.img", 100, &words);
    assert!(output.status.success(), "{}", imports::said(&output));
    let mut expected = image;
    expected.resize(100 * MIB, 0);
    bench.judge("disk.img", &expected).unwrap();
}

#[test]
fn what_a_server_says_is_told() {
    let bench = Bench::new();
    let image = contents(2);
    let server = Server::start(image.clone(), true);
    let digest = sha256(&image);
    let import = |url: &str| bench.import("disk.img", 4, &["--url", url, "--sha256", &digest]);
    let output = import(&server.url("gone.raw"));
    assert!(imports::said(&output).contains("404"), "{}", imports::said(&output));
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let output = import(&format!("http://{nobody}/root.raw"));
    assert!(
        imports::said(&output).contains("check the address"),
        "{}",
        imports::said(&output)
    );
    *server.state.body.lock().unwrap() = contents(80);
    let output = import(&server.url("root.raw"));
    assert!(
        imports::said(&output).contains("make the disk larger"),
        "{}",
        imports::said(&output)
    );
    *server.state.body.lock().unwrap() = image;
    let output = import(&server.url("moved.raw"));
    assert!(
        output.status.success(),
        "a redirection is followed: {}",
        imports::said(&output)
    );
}

/// Serves this body over TLS, to whoever comes; gives the address and who vouches for it.
fn https(body: Vec<u8>, name: &str) -> (SocketAddr, String) {
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec![name.to_owned()])
        .unwrap()
        .self_signed(&key)
        .unwrap();
    let config = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            rustls::pki_types::PrivateKeyDer::Pkcs8(key.serialize_der().into()),
        )
        .unwrap();
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            let (config, body) = (config.clone(), body.clone());
            std::thread::spawn(move || -> std::io::Result<()> {
                let session = rustls::ServerConnection::new(config).map_err(std::io::Error::other)?;
                let mut stream = rustls::StreamOwned::new(session, connection);
                // A request of this size comes whole.
                let mut request = [0; 2048];
                let count = stream.read(&mut request)?;
                if request[..count].starts_with(b"GET /clear") {
                    write!(
                        stream,
                        "HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/a\r\ncontent-length: 0\r\n\r\n"
                    )?;
                    return stream.flush();
                }
                write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len())?;
                stream.write_all(&body)?;
                stream.flush()
            });
        }
    });
    (address, certificate.pem())
}

#[test]
fn an_https_server_is_believed_only_if_its_authority_is_known() {
    let bench = Bench::new();
    let image = contents(2);
    let digest = sha256(&image);
    let (address, pem) = https(image.clone(), "localhost");
    bench.write("authority.pem", pem.as_bytes());
    let authority = bench.path("authority.pem").display().to_string();
    let import = |url: &str, words: &[&str]| {
        let all = [&["--url", url, "--sha256", &digest], words].concat();
        let output = bench.import("disk.img", 4, &all);
        (output.status.success(), imports::said(&output))
    };
    let port = address.port();
    let url = format!("https://localhost:{port}/root.raw");
    let (taken, said) = import(&url, &[]);
    assert!(!taken && said.contains("can't be reached"), "unknown: {said}");
    let (taken, said) = import(
        &format!("https://127.0.0.1:{port}/root.raw"),
        &["--authority", &authority],
    );
    assert!(!taken, "another name: {said}");
    let (taken, said) = import(&format!("https://localhost:{port}/clear"), &["--authority", &authority]);
    assert!(!taken, "led into the clear: {said}");
    let (taken, said) = import(&url, &["--authority", &authority]);
    assert!(taken, "{said}");
    let mut expected = image;
    expected.resize(4 * MIB, 0);
    bench.judge("disk.img", &expected).unwrap();
}
