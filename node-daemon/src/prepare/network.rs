//! Taps and the link's listening socket, each in the network namespace where it belongs.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};

use super::{Place, SeatError};
use crate::bridges::AllowedBridges;
use crate::config::{NicConfig, SeatConfig};
use crate::tap::{self, Tap, TapError, TapSpec};

/// One tap a NIC of the configuration, and the listener.
pub(super) fn open(
    config: &SeatConfig,
    place: &Place,
    bridges: &AllowedBridges,
) -> Result<(Vec<Tap>, TcpListener), SeatError> {
    let open_taps = || -> Result<Vec<Tap>, SeatError> {
        let taps = config.nics.iter().map(|nic| open_tap(nic, bridges));
        Ok(taps.collect::<Result<_, TapError>>()?)
    };
    let listen = || {
        let address = config.link.listen;
        TcpListener::bind(address).map_err(|source| SeatError::Listen { address, source })
    };
    let Some(network) = &place.network else {
        return Ok((open_taps()?, listen()?));
    };
    if place.taps_inside {
        inside(network, || Ok((open_taps()?, listen()?)))
    } else {
        Ok((open_taps()?, inside(network, listen)?))
    }
}

fn open_tap(nic: &NicConfig, bridges: &AllowedBridges) -> Result<Tap, TapError> {
    let spec = TapSpec {
        name: &nic.tap,
        bridge: nic.bridge.as_deref().map(|bridge| bridges.admit(bridge)).transpose()?,
        mtu: nic.mtu,
        existing: nic.existing,
    };
    tap::open(&spec)
}

/// Runs `work` in this network namespace, on a thread of its own: the namespace is a property of the thread.
fn inside<T: Send>(network: &OwnedFd, work: impl FnOnce() -> Result<T, SeatError> + Send) -> Result<T, SeatError> {
    let fail = |source| SeatError::NetworkNamespace {
        path: "of the seat".into(),
        source,
    };
    let joined = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let kind = rustix::thread::LinkNameSpaceType::Network;
            rustix::thread::move_into_link_name_space(network.as_fd(), Some(kind))
                .map_err(|errno| fail(errno.into()))?;
            work()
        });
        thread.join()
    });
    joined.unwrap_or_else(|_| Err(fail(io::Error::other("the thread failed"))))
}
