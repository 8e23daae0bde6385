//! The networks of a node by role, in a network namespace with cables that come, go and are cut.

use std::io::Write;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use ftvm_crds::networks::{NetworkRole, PathState};
use ftvm_node_daemon::networks::{Roles, Seen, follow};

/// Long enough for a busy machine; nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(60);

/// A node whose network is that of the calling thread, and of all that it starts.
struct Node {
    seen: Seen,
}

impl Node {
    /// With two networks for replication, and no cable yet.
    fn new(networks: [&str; 2]) -> Node {
        // SAFETY: unshare of this thread's network namespace has no memory effects.
        let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        let error = std::io::Error::last_os_error();
        assert_eq!(result, 0, "these tests need CAP_SYS_ADMIN: {error}");
        let named = networks
            .iter()
            .map(|network| format!("replication={network}").parse().unwrap());
        let roles = Roles::new(named.collect()).unwrap();
        Node {
            seen: follow(roles).unwrap(),
        }
    }

    /// An interface with this address; what its cable leads to is called so, too, with `-far`.
    fn cable(&self, name: &str, address: &str) {
        let far = format!("{name}-far");
        ip(&["link", "add", name, "type", "veth", "peer", "name", &far]);
        ip(&["link", "set", &far, "up"]);
        self.address(name, address);
        ip(&["link", "set", name, "up"]);
    }

    fn address(&self, name: &str, address: &str) {
        let without_check: &[&str] = if address.contains(':') { &["nodad"] } else { &[] };
        ip(&[&["address", "add", address, "dev", name], without_check].concat());
    }

    /// Waits until both paths are told so.
    fn shows(&self, expected: [PathState; 2]) {
        let begun = Instant::now();
        loop {
            let found: Option<Vec<PathState>> = self.seen.borrow().as_ref().map(|networks| {
                let paths = &networks.0[&NetworkRole::Replication];
                paths.iter().map(|path| path.state).collect()
            });
            if found.as_deref() == Some(&expected[..]) {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "{found:?}, expected {expected:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Interface and address of each path.
    fn places(&self) -> Vec<String> {
        let known = self.seen.borrow();
        let paths = &known.as_ref().unwrap().0[&NetworkRole::Replication];
        let told = paths.iter().map(|path| {
            let address = path.address.map(|address| address.to_string());
            format!(
                "{} {}",
                path.interface.as_deref().unwrap_or("-"),
                address.as_deref().unwrap_or("-")
            )
        });
        told.collect()
    }
}

fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments:?}: {told}");
}

#[test]
fn paths_come_and_go_with_cables_addresses_and_interfaces() {
    use PathState::{NoAddress, NoCarrier, SetDown, Up};

    let node = Node::new(["10.1.0.0/24", "10.2.0.0/24"]);
    node.shows([NoAddress, NoAddress]);
    node.cable("rep0", "10.1.0.7/24");
    node.shows([Up, NoAddress]);
    node.cable("rep1", "10.2.0.7/24");
    node.shows([Up, Up]);
    assert_eq!(node.places(), ["rep0 10.1.0.7", "rep1 10.2.0.7"]);
    // Its own end stays up: only the carrier tells.
    ip(&["link", "set", "rep0-far", "down"]);
    node.shows([NoCarrier, Up]);
    ip(&["link", "set", "rep1-far", "down"]);
    node.shows([NoCarrier, NoCarrier]);
    ip(&["link", "set", "rep0-far", "up"]);
    node.shows([Up, NoCarrier]);
    ip(&["link", "set", "rep0", "down"]);
    node.shows([SetDown, NoCarrier]);
    ip(&["link", "set", "rep0", "up"]);
    ip(&["link", "set", "rep1-far", "up"]);
    node.shows([Up, Up]);
    ip(&["address", "del", "10.2.0.7/24", "dev", "rep1"]);
    node.shows([Up, NoAddress]);
    ip(&["link", "del", "rep0"]);
    node.shows([NoAddress, NoAddress]);
}

#[test]
fn an_interface_that_is_named_and_a_network_of_ipv6_are_found() {
    use PathState::{AddressUnusable, NoInterface, Up};

    let node = Node::new(["rep0", "fd00:2::/64"]);
    node.shows([NoInterface, PathState::NoAddress]);
    node.cable("rep1", "fd00:2::7/64");
    node.cable("rep0", "10.1.0.7/24");
    node.shows([Up, Up]);
    assert_eq!(node.places(), ["rep0 10.1.0.7", "rep1 fd00:2::7"]);
    // The kernel asks for a long time whether another host has this address, and uses it only then.
    std::fs::write("/proc/sys/net/ipv6/conf/rep1/dad_transmits", "10000").unwrap();
    ip(&["address", "del", "fd00:2::7/64", "dev", "rep1"]);
    ip(&["address", "add", "fd00:2::9/64", "dev", "rep1"]);
    node.shows([Up, AddressUnusable]);
}

#[test]
fn two_networks_on_one_cable_are_one_path() {
    let node = Node::new(["10.1.0.0/24", "10.0.0.0/8"]);
    node.cable("rep0", "10.1.0.7/24");
    node.shows([PathState::Up, PathState::SameInterface]);
    assert_eq!(node.places(), ["rep0 10.1.0.7", "rep0 10.1.0.7"]);
    node.cable("rep1", "10.2.0.7/24");
    node.shows([PathState::Up, PathState::Up]);
    assert_eq!(node.places(), ["rep0 10.1.0.7", "rep1 10.2.0.7"]);
}

/// More changes than the kernel keeps for whoever listens: what it throws away is not missed.
#[test]
fn the_last_of_many_changes_is_seen() {
    let node = Node::new(["rep0", "rep1"]);
    node.cable("rep0", "10.1.0.7/24");
    node.cable("rep1", "10.2.0.7/24");
    node.shows([PathState::Up, PathState::Up]);
    let mut batch = Command::new("ip")
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = batch.stdin.take().unwrap();
    for number in 0..4000 {
        let address = format!("10.9.{}.{}/16", number / 200, number % 200 + 1);
        writeln!(input, "address add {address} dev rep0-far").unwrap();
        writeln!(input, "address del {address} dev rep0-far").unwrap();
    }
    writeln!(input, "link set rep1-far down").unwrap();
    drop(input);
    assert!(batch.wait().unwrap().success());
    node.shows([PathState::Up, PathState::NoCarrier]);
}

#[test]
fn networks_that_are_none_keep_a_daemon_from_starting() {
    let started = |networks: &[&str]| -> (Option<i32>, String) {
        let options = networks.iter().map(|network| format!("--network={network}"));
        let output: Output = Command::new(env!("CARGO_BIN_EXE_ftvm-node-daemon"))
            .args(["kubernetes", "--node=one", "--node-ip=127.0.0.1"])
            .args(options)
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    for (networks, words) in [
        (&["replication=10.1.0.7/24"][..], "write 10.1.0.0/24"),
        (&["replication=10.1.0.0/24", "storage=eth1"][..], "`storage` is no role"),
        (&["client=eth1", "client=eth1"][..], "client has the network eth1 twice"),
        (&["client=eth1", "client=eth2", "client=eth3"][..], "networks.client"),
    ] {
        let (code, told) = started(networks);
        assert_eq!(code, Some(2), "{networks:?}: {told}");
        assert!(told.contains(words), "{networks:?}: {told}");
    }
}
