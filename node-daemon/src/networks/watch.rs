//! Follows the node's networks: the kernel says when something changes, then all of it is read and looked at.

use std::io;
use std::time::Duration;

use ftvm_crds::networks::NodeNetworks;
use tokio::sync::watch;

use super::netlink::{self, Changes, NetlinkError};
use super::{Roles, find};
use crate::explain;

/// Changes come in bursts: those of so long are looked at together.
const TOGETHER: Duration = Duration::from_millis(100);
/// Pause before the kernel is asked again after it did not answer.
const AGAIN: Duration = Duration::from_secs(5);

/// The networks as they are now; none while that is not known.
pub type Seen = watch::Receiver<Option<NodeNetworks>>;

/// Follows them for as long as anybody looks, in a thread of its own, which stays in the network namespace of its caller.
///
/// # Errors
/// If there is no thread.
pub fn follow(roles: Roles) -> io::Result<Seen> {
    if roles.is_empty() {
        return Ok(watch::channel(Some(NodeNetworks::default())).1);
    }
    let (sender, seen) = watch::channel(None);
    std::thread::Builder::new()
        .name("networks".to_owned())
        .spawn(move || attend(&roles, &sender))?;
    Ok(seen)
}

fn attend(roles: &Roles, sender: &watch::Sender<Option<NodeNetworks>>) {
    let mut said = String::new();
    while !sender.is_closed() {
        let Err(error) = attend_until_it_fails(roles, sender) else {
            return;
        };
        // What was seen last may be otherwise by now. What fails after it went well is told again.
        if sender.send_replace(None).is_some() {
            said.clear();
        }
        let why = explain(&error);
        if why != said {
            tracing::error!("this node's networks are not known ({why}); it is tried again");
            said = why;
        }
        std::thread::sleep(AGAIN);
    }
}

/// Ends well once nobody looks.
fn attend_until_it_fails(roles: &Roles, sender: &watch::Sender<Option<NodeNetworks>>) -> Result<(), NetlinkError> {
    // Before the first look, so that nothing is missed in between.
    let mut changes = Changes::open()?;
    while !sender.is_closed() {
        let now = Some(find(roles, &netlink::interfaces()?));
        sender.send_if_modified(|known| {
            let differs = *known != now;
            *known = now;
            differs
        });
        changes.wait()?;
        std::thread::sleep(TOGETHER);
        changes.drain()?;
    }
    Ok(())
}
