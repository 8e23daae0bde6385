//! A daemon whose seats come from a configuration and from clients of its socket, and whose arbiter is a folder.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ftvm_engine::control::exit_code;
use ftvm_engine::control::header_file::HeaderFile;
use ftvm_protocol::core::StoredHeader;
use ftvm_protocol::header::SeatHeader;
use ftvm_protocol::identity::ArbiterUid;
use ftvm_protocol::record::{self, Record};

use super::{Daemon, DaemonError, Settings, refused};
use crate::api::{Request, Response};
use crate::arbiter::FileArbiter;
use crate::bridges::AllowedBridges;
use crate::config::{Config, SeatConfig};
use crate::explain;
use crate::identity;
use crate::prepare::{Paths, SeatError, header_path};
use crate::seat::Seat;
use crate::state::StateFolder;

/// Path of the engine program.
pub fn engine_path(configured: Option<&Path>) -> Result<PathBuf, DaemonError> {
    match configured {
        Some(path) => Ok(path.to_owned()),
        None => Ok(std::env::current_exe()
            .map_err(|source| DaemonError::NoEngine { source })?
            .with_file_name("ftvm-engine")),
    }
}

impl Daemon {
    /// Takes the state folder, adopts and starts the configured seats.
    pub fn start(config: Config) -> Result<Arc<Daemon>, DaemonError> {
        let state = StateFolder::open(&config.state_folder)?;
        let settings = Settings {
            engine: engine_path(config.engine.as_deref())?,
            control_socket: config.control_socket(),
            node: config.node,
            state_folder: config.state_folder,
            peer_listen: config.peer_listen,
            jail: config.jail,
            bridges: AllowedBridges::Any,
            arbiter_folder: Some(config.arbiter.folder.clone()),
        };
        let records = config.arbiter.folder;
        let daemon = Daemon::new(settings, state);
        let listener = daemon.listen_for_others()?;
        for seat in config.seats {
            daemon.add_configured(seat, &records)?;
        }
        daemon.answer_others(listener)?;
        Ok(daemon)
    }

    fn add_configured(self: &Arc<Daemon>, config: SeatConfig, records: &Path) -> Result<(), DaemonError> {
        let folder = self.state.seat(&config.vm, &config.seat)?;
        let source = Arc::new(Paths::new(folder.clone(), &self.settings.jail));
        let arbiter = Arc::new(FileArbiter::new(records.join(&config.vm)));
        self.add(config, folder, source, arbiter).map(drop)
    }

    /// What clients may ask for only where seats are not pods.
    pub(super) fn change_seats(self: &Arc<Daemon>, request: Request) -> Response {
        let Some(records) = &self.settings.arbiter_folder else {
            let message = "seats of this node are pods: change the FaultTolerantVM instead".to_owned();
            return refused(exit_code::REFUSED, message);
        };
        match request {
            Request::ApplySeat { seat } => self.apply(*seat, records),
            Request::RemoveSeat { vm, seat } => self.remove(vm, seat),
            Request::SetUp { vm, seat } => self.with_seat(&vm, &seat, |seat| set_up(seat, records)),
            other => refused(
                exit_code::INTERNAL,
                format!("{other:?} changes no seats: this is a defect"),
            ),
        }
    }

    fn apply(self: &Arc<Daemon>, config: SeatConfig, records: &Path) -> Response {
        if let Err(error) = config.check() {
            return refused(exit_code::CONFIG, explain(&error));
        }
        let key = (config.vm.clone(), config.seat.clone());
        for (other_key, other) in self.seats().iter() {
            if *other_key != key
                && let Err(error) = config.check_beside(&other.config())
            {
                return refused(exit_code::CONFIG, explain(&error));
            }
        }
        let existing = self.seats().get(&key).cloned();
        match existing {
            Some(seat) => seat.reconfigure(config),
            None => {
                if let Err(error) = self.add_configured(config, records) {
                    return refused(error.exit_code(), explain(&error));
                }
            }
        }
        Response::Done
    }

    fn remove(&self, vm: String, seat: String) -> Response {
        match self.seats().remove(&(vm.clone(), seat.clone())) {
            Some(found) => {
                found.remove();
                Response::Done
            }
            None => refused(
                exit_code::REFUSED,
                format!("no seat {vm}/{seat} on node {}", self.settings.node),
            ),
        }
    }
}

/// First record and first header; either may exist from an earlier attempt.
fn set_up(seat: &Arc<Seat>, records: &Path) -> Response {
    match try_set_up(&seat.config(), seat, records) {
        Ok(uid) => {
            seat.start_now();
            Response::SetUp { uid }
        }
        Err((code, message)) => refused(code, message),
    }
}

fn try_set_up(config: &SeatConfig, seat: &Seat, records: &Path) -> Result<ArbiterUid, (u8, String)> {
    if !config.original_disk {
        let message = format!(
            "seat {} does not say `original_disk: true`: set up the one that does",
            config.label()
        );
        return Err((exit_code::REFUSED, message));
    }
    let (who, _) = identity::load(&config.identity, &config.vm, &config.seat)
        .map_err(|error| (exit_code::IDENTITY, explain(&error)))?;
    let path = header_path(config, seat.folder());
    let disk_error = |why: String| {
        let error = SeatError::Disk {
            what: "header".to_owned(),
            path: path.clone(),
            why,
        };
        (error.exit_code(), explain(&error))
    };
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path);
    let file = file.map_err(|error| disk_error(format!("can't be opened: {error}")))?;
    let (mut header, stored) = HeaderFile::open(file).map_err(|error| disk_error(explain(&error)))?;
    let arbiter = FileArbiter::new(records.join(&config.vm));
    match stored {
        StoredHeader::Found(stored) => return Ok(stored.uid),
        StoredHeader::Damaged => {
            return Err(disk_error(
                "is damaged: a person decides (docs/standalone.md, Damaged header)".to_owned(),
            ));
        }
        StoredHeader::Absent => {}
    }
    let first = Record::genesis(who.seat_id, record::Phase::Running);
    let uid = arbiter
        .set_up(&first)
        .map_err(|error| (exit_code::ARBITER, explain(&error)))?;
    header
        .write(&SeatHeader::genesis(who.seat_id, uid))
        .and_then(|()| header.complete())
        .map_err(|error| disk_error(explain(&error)))?;
    Ok(uid)
}
