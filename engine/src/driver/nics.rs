//! The network cards of a seat: their taps, and what stands between them and the machine.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::Queue;
use super::seat::{SeatError, system};
use crate::backends::NetBackend;
use crate::control::{Launch, LaunchFds};
use crate::devices::DeviceError;
use crate::mac::parse_mac;
use crate::outbox::Outbox;
use crate::pause::PauseGate;
use crate::seat_io::{Claims, Guard, HostSink, Inbox, NicPlace, Refused, SeatNic};

/// A card as launched.
pub struct Nic {
    name: String,
    pub mac: [u8; 6],
    claims: Claims,
    pub refused: Arc<Refused>,
    pub mtu: u16,
    tap: File,
}

/// The cards of the launch message with their taps.
pub fn open_nics(launch: &Launch, fds: &mut LaunchFds) -> Result<Vec<Nic>, SeatError> {
    let mut nics = Vec::new();
    for nic in &launch.nics {
        let mac = parse_mac(&nic.mac).ok_or_else(|| SeatError::Mac {
            nic: nic.name.clone(),
            mac: nic.mac.clone(),
        })?;
        let tap: OwnedFd = fds.take(nic.tap, &nic.name)?;
        nics.push(Nic {
            name: nic.name.clone(),
            mac,
            claims: Claims::new(mac, &nic.addresses),
            refused: Arc::default(),
            mtu: nic.mtu,
            tap: tap.into(),
        });
    }
    Ok(nics)
}

/// A second descriptor of each tap.
pub fn duplicate_taps(nics: &[Nic]) -> Result<Vec<File>, SeatError> {
    let taps = nics.iter().map(|nic| nic.tap.try_clone()).collect::<Result<_, _>>();
    taps.map_err(system("duplicating a tap's descriptor"))
}

/// What the outbox writes to.
pub fn host_sink(nics: &[Nic], console: File, dropped: &Arc<AtomicU64>) -> Result<HostSink, SeatError> {
    Ok(HostSink {
        taps: duplicate_taps(nics)?,
        console,
        dropped: dropped.clone(),
    })
}

/// Between the machine's cards and their taps.
pub fn net_backends(
    nics: Vec<Nic>,
    queue: &Queue,
    gate: &Arc<PauseGate>,
    outbox: &Arc<Outbox>,
    inbox: &Arc<Inbox>,
) -> Result<Vec<Box<dyn NetBackend>>, DeviceError> {
    let mut backends: Vec<Box<dyn NetBackend>> = Vec::new();
    for (index, nic) in nics.into_iter().enumerate() {
        let (gate, outbox, inbox) = (gate.clone(), outbox.clone(), inbox.clone());
        let place = NicPlace {
            nic: index as u8,
            mac: nic.mac,
        };
        let warns = queue.clone();
        let tell = move |text: String| warns.warn(format!("network card {}: {text}", nic.name));
        let guard = Guard::new(nic.claims, nic.refused, tell);
        let backend = SeatNic::new(place, nic.tap, guard, gate, outbox, inbox).map_err(|source| DeviceError::Wake {
            device: format!("network interface {index}"),
            source,
        });
        backends.push(Box::new(backend?));
    }
    Ok(backends)
}
