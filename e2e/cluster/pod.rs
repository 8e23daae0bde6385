//! What runs in the lab's own containers: pause, a TCP service, its client, a file's reader. One static program, so that an image is one file.
//!
//! ```text
//!   pod pause            waits for the end, reaps children: the sandbox of every pod
//!   pod serve PORT       answers each connection with this host's name
//!   pod ask ADDRESS      prints the answer of such a service; fails after 2 s
//!   pod show FILE        prints a file
//! ```
use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

/// A service that answers does so at once; a cut link must be noticed.
const PATIENCE: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["pause"] => pause(),
        ["serve", port] => serve(port),
        ["ask", address] => ask(address),
        ["show", file] => fs::read(file).and_then(|content| io::stdout().write_all(&content)),
        _ => Err(io::Error::other("usage: pause | serve PORT | ask ADDRESS | show FILE")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {error}", words.join(" "));
            ExitCode::FAILURE
        }
    }
}

/// Reaps what lost its parent until it is told to end.
fn pause() -> io::Result<()> {
    // SAFETY: sigset_t is plain data that sigemptyset initialises; this program has one thread.
    let signals = unsafe {
        let mut signals = std::mem::zeroed();
        libc::sigemptyset(&mut signals);
        for signal in [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT] {
            libc::sigaddset(&mut signals, signal);
        }
        libc::sigprocmask(libc::SIG_BLOCK, &signals, std::ptr::null_mut());
        signals
    };
    loop {
        // SAFETY: waits for blocked signals; nobody asks for more than the number.
        match unsafe { libc::sigwaitinfo(&signals, std::ptr::null_mut()) } {
            libc::SIGTERM | libc::SIGINT => return Ok(()),
            // SAFETY: reaps whatever child has ended; its status is of no interest.
            _ => while unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) } > 0 {},
        }
    }
}

extern "C" fn end(_: libc::c_int) {
    // SAFETY: _exit is async-signal-safe.
    unsafe { libc::_exit(0) }
}

fn serve(port: &str) -> io::Result<()> {
    // Process 1 of a container is not ended by signals that it does not handle.
    for signal in [libc::SIGTERM, libc::SIGINT] {
        // SAFETY: the handler does only what is async-signal-safe.
        unsafe { libc::signal(signal, end as *const () as libc::sighandler_t) };
    }
    let port = port.parse().map_err(io::Error::other)?;
    let listener = TcpListener::bind(SocketAddr::from(([0, 0, 0, 0], port)))?;
    let name = fs::read_to_string("/proc/sys/kernel/hostname")?;
    loop {
        let (mut client, _) = listener.accept()?;
        // A client that is gone needs no answer.
        let _ = client.write_all(name.as_bytes());
    }
}

fn ask(address: &str) -> io::Result<()> {
    let address = address.parse().map_err(io::Error::other)?;
    let mut server = TcpStream::connect_timeout(&address, PATIENCE)?;
    server.set_read_timeout(Some(PATIENCE))?;
    let mut answer = String::new();
    server.read_to_string(&mut answer)?;
    print!("{answer}");
    Ok(())
}
