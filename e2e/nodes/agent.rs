//! The agent inside an emulated node: runs commands for the lab, one TCP connection each (`ftvm_e2e::lab::wire` says how).
//!
//! `ask SOCKET` carries questions to the daemon of the node instead. As process 1 it starts itself as a server and reaps whatever is orphaned; a server that ends takes the node with it.
use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use ftvm_e2e::demo::daemon;
use ftvm_e2e::lab::wire::{self, Start};
use rustix::process::{Pid, Signal, WaitOptions};

/// How long a daemon may take to answer a question, longer than anybody waits for the relay: a digest of all memory takes its time.
const ANSWER: Duration = Duration::from_secs(300);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.as_slice() {
        [word, socket] if word == "ask" => ask(Path::new(socket)),
        _ if std::process::id() == 1 => first_process(),
        _ => serve(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("node agent: {error}");
            ExitCode::FAILURE
        }
    }
}

fn first_process() -> io::Result<()> {
    let server = Command::new("/proc/self/exe").spawn()?;
    let server = i32::try_from(server.id()).ok().and_then(Pid::from_raw);
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if Some(pid) == server => {
                return Err(io::Error::other(format!(
                    "the agent's server ended ({status:?}), and the node with it"
                )));
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Passes questions, one JSON value a line on standard input, to a daemon's socket; prints the answers, `null` where there is none.
fn ask(socket: &Path) -> io::Result<()> {
    for line in io::stdin().lines() {
        let answer = daemon::ask(socket, &serde_json::from_str(&line?)?, ANSWER).unwrap_or_default();
        println!("{answer}");
    }
    Ok(())
}

fn serve() -> io::Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", wire::PORT))?;
    println!("node agent: listening on port {}", wire::PORT);
    loop {
        let (connection, _) = listener.accept()?;
        thread::spawn(move || {
            if let Err(error) = handle(connection) {
                eprintln!("node agent: {error}");
            }
        });
    }
}

fn handle(connection: TcpStream) -> io::Result<()> {
    connection.set_nodelay(true)?;
    let mut input = BufReader::new(connection.try_clone()?);
    let output = Arc::new(Mutex::new(connection));
    let mut line = String::new();
    input.by_ref().take(wire::MAX_START).read_line(&mut line)?;
    let started = serde_json::from_str::<Start>(&line)
        .map_err(|error| format!("cannot read the command {line:?}: {error}"))
        .and_then(|start| match spawn(&start) {
            Ok(child) => Ok((start, child)),
            Err(error) => Err(format!("cannot start {:?}: {error}", start.argv)),
        });
    let (start, mut child) = match started {
        Ok(started) => started,
        Err(message) => return send(&output, wire::FAILED, message.as_bytes()),
    };
    send(&output, wire::STARTED, &child.id().to_le_bytes())?;
    if start.detach_to.is_some() {
        drop((input, output));
        return child.wait().map(|_| ());
    }
    converse(child, input, &output)
}

fn spawn(start: &Start) -> io::Result<Child> {
    let (program, arguments) = start
        .argv
        .split_first()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no program named"))?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .envs(&start.env)
        .current_dir(start.cwd.as_deref().unwrap_or("/"))
        .process_group(0);
    if let Some(path) = &start.detach_to {
        let log = OpenOptions::new().create(true).append(true).open(path)?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    } else {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
    }
    command.spawn()
}

/// Carries the command's three streams until it ends; kills it if the lab hangs up first.
fn converse(mut child: Child, input: BufReader<TcpStream>, output: &Arc<Mutex<TcpStream>>) -> io::Result<()> {
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let stdin = child.stdin.take();
    let ended = Arc::new(Mutex::new(false));
    let pumps = [
        child.stdout.take().map(|stream| pump(stream, wire::STDOUT, output)),
        child.stderr.take().map(|stream| pump(stream, wire::STDERR, output)),
    ];
    let feeder = {
        let ended = Arc::clone(&ended);
        thread::spawn(move || feed(input, stdin, group, &ended))
    };
    let status = child.wait()?;
    // The process id is free from here on: no signal may follow.
    *lock(&ended) = true;
    for pump in pumps.into_iter().flatten() {
        // A pump that panicked has sent nothing more; the exit code still says how the command ended.
        let _ = pump.join();
    }
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    let sent = send(output, wire::EXIT, &code.to_le_bytes());
    // The feeder blocks in read until the connection is shut down.
    let _ = lock(output).shutdown(std::net::Shutdown::Both);
    let _ = feeder.join();
    sent
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn send(output: &Arc<Mutex<TcpStream>>, kind: u8, payload: &[u8]) -> io::Result<()> {
    let mut output = lock(output);
    wire::write_frame(&mut *output, kind, payload)?;
    output.flush()
}

fn pump(mut stream: impl Read + Send + 'static, kind: u8, output: &Arc<Mutex<TcpStream>>) -> thread::JoinHandle<()> {
    let output = Arc::clone(output);
    thread::spawn(move || {
        let mut buffer = vec![0; wire::MAX_FRAME];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => return,
                // A lab that hung up is noticed by the feeder; the rest of the output is read and dropped, so that nothing blocks.
                Ok(length) => drop(send(&output, kind, &buffer[..length])),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    })
}

/// Takes frames from the lab until it hangs up.
fn feed(
    mut input: BufReader<TcpStream>,
    mut stdin: Option<std::process::ChildStdin>,
    group: Option<Pid>,
    ended: &Mutex<bool>,
) {
    loop {
        match wire::read_frame(&mut input) {
            Ok(Some(frame)) if frame.kind == wire::STDIN => {
                if let Some(pipe) = &mut stdin
                    && pipe.write_all(&frame.payload).is_err()
                {
                    stdin = None;
                }
            }
            Ok(Some(frame)) if frame.kind == wire::STDIN_END => stdin = None,
            Ok(Some(frame)) if frame.kind == wire::SIGNAL => {
                let signal = frame
                    .payload
                    .first()
                    .and_then(|&number| Signal::from_named_raw(i32::from(number)));
                if let Some(signal) = signal {
                    signal_group(group, signal, ended);
                }
            }
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => {
                signal_group(group, Signal::KILL, ended);
                return;
            }
        }
    }
}

fn signal_group(group: Option<Pid>, signal: Signal, ended: &Mutex<bool>) {
    let ended = lock(ended);
    if let (Some(group), false) = (group, *ended) {
        // The group may have just ended by itself: then there is nobody to tell.
        let _ = rustix::process::kill_process_group(group, signal);
    }
}
