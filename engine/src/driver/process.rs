//! The engine as a process: from the launch message on descriptor 3 to the exit report.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use ftvm_protocol::core::Core;

use super::{Driver, Ended, Queue, queue, seat};
use crate::control::{
    Connection, Endpoint, Event, ExitReport, Hello, Launch, LaunchFds, Listener, Role, VERSION, exit_code,
    receive_launch,
};
use crate::outbox::Rule;
use crate::seccomp::{Filters, ThreadKind, install_handler};
use crate::{error_chain, log, priority};

/// Runs the seat that the daemon launches over `connection`; gives the exit code of the process. `rule` says what may leave it:
/// [`outbox::admitted`](crate::outbox::admitted) in every engine that is for use.
pub fn run(connection: Connection, rule: Rule) -> u8 {
    let (launch, mut fds) = match receive_launch(&connection) {
        Ok(received) => received,
        Err(error) => {
            tracing::error!("{}", error_chain(&error));
            return exit_code::LAUNCH;
        }
    };
    let report: Option<File> = fds
        .take(launch.files.exit_report, "the exit report")
        .ok()
        .map(File::from);
    let (handle, ended) = run_launched(&launch, &mut fds, connection, rule);
    let exit = ExitReport {
        vm: launch.vm.clone(),
        seat: launch.seat.clone(),
        incarnation: launch.incarnation,
        code: ended.code,
        role: Role::Ended,
        term: ended.term,
        message: ended.message,
        storage: ended.storage,
    };
    tracing::info!("ends with code {}: {}", exit.code, exit.message);
    if let Some(handle) = handle {
        handle.event(Event::Exit(exit.clone()));
    }
    if let Some(mut file) = report {
        let text = serde_json::to_vec(&exit).unwrap_or_default();
        if let Err(error) = file.write_all(&text).and_then(|()| file.sync_all()) {
            tracing::error!("the exit report can't be written: {error}");
        }
    }
    log::end();
    exit.code
}

fn failed(code: u8, error: &dyn std::error::Error) -> Ended {
    Ended {
        code,
        message: error_chain(error),
        term: 0,
        storage: Vec::new(),
    }
}

fn run_launched(
    launch: &Launch,
    fds: &mut LaunchFds,
    connection: Connection,
    rule: Rule,
) -> (Option<crate::control::Handle>, Ended) {
    let (queue, inputs) = queue();
    let filters = match install_handler().and_then(|()| Filters::compile()) {
        Ok(filters) => Arc::new(filters),
        Err(error) => return (None, failed(exit_code::JAIL, &error)),
    };
    let own = filters.clone();
    let enter = move || {
        own.enter(ThreadKind::Worker)
            .expect("a thread enters the filter that was compiled for it");
    };
    if let Err(error) = log::begin(enter) {
        tracing::warn!("the log is written by whoever has something to say: {error}");
    }
    let endpoint = match start_control(launch, fds, connection, &queue, &filters) {
        Ok(endpoint) => endpoint,
        Err(error) => return (None, failed(exit_code::LAUNCH, &error)),
    };
    let handle = endpoint.handle();
    let ended = match start_driver(launch, fds, &handle, &queue, &filters, rule) {
        Ok(mut driver) => {
            let ended = driver.run(&inputs);
            if driver.is_hanging() {
                // Taking it apart would wait for the disk's thread. The kernel ends that with the process, once the request is done. Where
                // links have no table of descriptors of their own, their sockets would be open until then.
                driver.close_links();
                std::mem::forget(driver);
            }
            ended
        }
        Err(error) => failed(error.exit_code(), &error),
    };
    // The control thread lives until the process ends: the exit report goes through it.
    std::mem::forget(endpoint);
    (Some(handle), ended)
}

fn start_control(
    launch: &Launch,
    fds: &mut LaunchFds,
    connection: Connection,
    queue: &Queue,
    filters: &Arc<Filters>,
) -> Result<Endpoint, crate::control::EndpointError> {
    let listener = Listener::from_fd(fds.take(launch.files.control_listener, "the control listener")?);
    let hello = Hello {
        version: VERSION,
        engine: env!("CARGO_PKG_VERSION").to_owned(),
        vm: launch.vm.clone(),
        seat: launch.seat.clone(),
        incarnation: launch.incarnation,
    };
    let inputs = queue.clone();
    let sink = Box::new(move |input| inputs.control(input));
    let filters = filters.clone();
    let enter = move || {
        filters
            .enter(ThreadKind::Control)
            .expect("a thread enters the filter that was compiled for it");
    };
    Endpoint::start(connection, listener, launch.daemon_uid, hello, sink, enter)
}

fn start_driver(
    launch: &Launch,
    fds: &mut LaunchFds,
    handle: &crate::control::Handle,
    queue: &Queue,
    filters: &Arc<Filters>,
    rule: Rule,
) -> Result<Driver, seat::SeatError> {
    let system = |what| move |source| seat::SeatError::System { what, source };
    let prepared = seat::prepare(launch, fds, queue, Some(filters.clone()), rule)?;
    // vCPUs and devices have their threads; the links' inherit this one's priority, encoders do not.
    if !priority::raise() {
        tracing::info!("no raised priority for heartbeats: the daemon may not allow it");
    }
    priority::take_short_turns();
    let hub = seat::start_links(prepared.link, prepared.listener, &prepared.seat, queue.clone());
    let hub = hub.map_err(system("starting the links"))?;
    priority::keep_from_children();
    let core = Core::new(prepared.config);
    let driver = Driver::new(core, prepared.seat, handle.clone(), hub, queue.clone());
    let driver = driver.map_err(system("starting the driver"))?;
    filters
        .enter(ThreadKind::Driver)
        .map_err(|error| std::io::Error::other(error.to_string()))
        .map_err(system("entering the driver's system call filter"))?;
    Ok(driver)
}
