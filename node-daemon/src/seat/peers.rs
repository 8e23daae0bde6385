//! The peers of a seat: set by request, remembered in the state folder, handed to the engine until it has confirmed them.
//!
//! ```text
//!   configuration ─► peers in force ◄─ request (remembered first)
//!                        │
//!                        ▼  differ from what the engine is known to know, and it is connected
//!                    SetPeers ─► engine ─► Ok
//! ```
//!
//! What the engine knows is compared with what is in force whenever the seat's thread wakes, so that it does not matter
//! whether peers were set before, while or after an engine started or was adopted.
//!
//! Invariant: peers and the seats that can't be dialled ([`crate::config::LinkConfig::absent`]) change together. In between an engine would take a seat that
//! goes from one to the other for one that there is not, and could boot without its word.

use ftvm_engine::control::{Command, Connection};
use serde::{Deserialize, Serialize};

use super::Seat;
use super::informed::Informed;
use crate::config::{PeerConfig, SeatConfig};
use crate::state::{SeatFolder, StateError};
use crate::{explain, prepare};

/// File in the seat's folder.
const FILE: &str = "peers.json";

/// Peers that were set by request. They hold as long as the configuration says what it said then.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Remembered {
    configured: Vec<PeerConfig>,
    set: Vec<PeerConfig>,
}

/// The peers in force for a seat with this configuration.
pub(super) fn in_force(config: &SeatConfig, folder: &SeatFolder) -> Vec<PeerConfig> {
    let configured = &config.link.peers;
    let remembered = match folder.read_json::<Remembered>(FILE) {
        Ok(remembered) => remembered.filter(|remembered| remembered.configured == *configured),
        Err(error) => {
            tracing::error!(seat = config.label(), "{error}; the configured peers are used");
            None
        }
    };
    let Some(Remembered { set, .. }) = remembered else {
        return configured.clone();
    };
    let mut changed = config.clone();
    changed.link.peers = set;
    match changed.check() {
        Ok(()) => changed.link.peers,
        Err(error) => {
            let why = explain(&error);
            tracing::error!(seat = config.label(), "peers that were set do not fit any more: {why}");
            configured.clone()
        }
    }
}

/// Forgets peers that were set.
pub(super) fn forget(folder: &SeatFolder) {
    if let Err(error) = crate::state::remove_if_there(&folder.file(FILE)) {
        tracing::warn!("{error}");
    }
}

impl Seat {
    /// Makes these the seat's peers, from now on and after a restart of the daemon; the engine is told as soon as it can
    /// be. The caller has checked that they fit the configuration.
    pub fn set_peers(&self, peers: Vec<PeerConfig>) -> Result<(), StateError> {
        let changing = self.changing();
        let remembered = Remembered {
            configured: self.inner().configured_peers.clone(),
            set: peers,
        };
        self.folder.write_json(FILE, &remembered)?;
        let mut inner = self.inner();
        inner.config.link.peers = remembered.set;
        inner.next_start = None;
        drop((inner, changing));
        self.wake();
        Ok(())
    }

    /// Tells a connected engine its peers if it is not known to know them. False if that has to be tried again.
    pub(super) fn introduce_peers(&self, connection: &Connection) -> bool {
        let config = {
            let inner = self.inner();
            let Some(engine) = &inner.engine else { return true };
            if !engine.introduced.lacks(&inner.config.link) {
                return true;
            }
            inner.config.clone()
        };
        let who = self.source.identity(&config);
        let peers = who
            .map_err(|error| explain(&error))
            .and_then(|(who, _)| prepare::peers(&config, &who).map_err(|error| explain(&error)));
        let peers = match peers {
            Ok(peers) => peers,
            Err(why) => {
                self.inner().why = format!("the engine can't be told its peers: {why}");
                return false;
            }
        };
        let mut inner = self.inner();
        let absent = prepare::absent(&config);
        let Some(command) = inner.tell(connection, Command::SetPeers { peers, absent }) else {
            return false;
        };
        inner.why.clear();
        if let Some(engine) = &mut inner.engine {
            let what = config.link;
            engine.introduced = Informed::Told { command, what };
        }
        true
    }
}
