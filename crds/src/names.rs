//! Names that operator, node-daemon, seat program and chart share. `docs/kubernetes.md` lists the objects.

use std::collections::BTreeSet;

/// API group.
pub const GROUP: &str = "ftvm.dev";
/// API version.
pub const VERSION: &str = "v1alpha1";
/// Label: who made an object. Value [`MANAGED_BY`].
pub const LABEL_MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// Value of [`LABEL_MANAGED_BY`].
pub const MANAGED_BY: &str = "ftvm-operator";
/// Label: name of the virtual machine that an object belongs to.
pub const LABEL_VM: &str = "ftvm.dev/vm";
/// Label: name of the seat that an object belongs to.
pub const LABEL_SEAT: &str = "ftvm.dev/seat";
/// Label on pods, set by the node-daemon: `active` or `standby`, absent otherwise.
pub const LABEL_ROLE: &str = "ftvm.dev/role";
/// Value of [`LABEL_ROLE`].
pub const ROLE_ACTIVE: &str = "active";
/// Value of [`LABEL_ROLE`].
pub const ROLE_STANDBY: &str = "standby";
/// Annotation on the Lease: the arbiter's record as JSON.
pub const ANNOTATION_RECORD: &str = "ftvm.dev/record";
/// Annotation on the Lease: nodes that have a seat ([`nodes_text`]).
pub const ANNOTATION_NODES: &str = "ftvm.dev/nodes";
/// Annotation on a seat's pod: [`crate::seat::SeatPublished`].
pub const ANNOTATION_SEAT_STATUS: &str = "ftvm.dev/seat-status";
/// Annotation on a seat's pod: [`crate::seat::SeatRequest`].
pub const ANNOTATION_REQUEST: &str = "ftvm.dev/request";
/// Annotation on a seat's pod: what the operator drew at its first look at the virtual machine, or before it takes away another seat
/// ([`crate::seat::look`]).
pub const ANNOTATION_LOOK: &str = "ftvm.dev/look";
/// Annotation on a node: the CPU that it can give to guests ([`crate::cpu::NodeCpu`]).
pub const ANNOTATION_CPU: &str = "ftvm.dev/cpu";
/// Label on a node: alike on those that can give the same.
pub const LABEL_CPU: &str = "ftvm.dev/cpu";
/// Annotation on a node: its networks by role ([`crate::networks::NodeNetworks`]).
pub const ANNOTATION_NETWORKS: &str = "ftvm.dev/networks";
/// Label that tells nodes apart, put on each by its kubelet (Kubernetes, "Well-Known Labels").
pub const LABEL_HOSTNAME: &str = "kubernetes.io/hostname";
/// Annotation on a VM, for people: each new value (a time, a word) asks for one switchover.
pub const ANNOTATION_SWITCHOVER: &str = "ftvm.dev/switchover";
/// Annotation on a VM, for people: each new value asks for one failure of the active, if the standby would take over.
pub const ANNOTATION_FAILOVER: &str = "ftvm.dev/failover";
/// Annotation on a VM, for people: the holder (`SEAT-UUID/16 hex digits`) that is dead and shall be overridden.
pub const ANNOTATION_ACCEPT_DATA_LOSS: &str = "ftvm.dev/accept-data-loss";
/// Finalizer of a VM: removed once both engines are proven to have stopped.
pub const FINALIZER: &str = "ftvm.dev/engines";
/// Extended resource of nodes whose KVM works: one a seat.
pub const RESOURCE_SEAT: &str = "ftvm.dev/seat";

/// Name of the one container of a seat's pod that stays.
pub const CONTAINER: &str = "seat";
/// Name of the init container that puts the seat program into [`PATH_TOOLS`], where the guest image is copied.
pub const INIT_TOOLS: &str = "tools";
/// Name of the init container of the guest image, in which the seat program copies its files.
pub const INIT_GUEST: &str = "guest";
/// Port of the engine's replication link, on the pod's IP.
pub const PORT_LINK: u16 = 7000;
/// Port of daemon to daemon questions, on the node's IP.
pub const PORT_DAEMON: u16 = 7400;
/// Port of the daemon's metrics, on the node's IP.
pub const PORT_DAEMON_METRICS: u16 = 7401;
/// Port of the operator's metrics and probes.
pub const PORT_OPERATOR: u16 = 8080;

/// Folder in the seat's container with one folder a disk.
pub const PATH_DISKS: &str = "/disks";
/// Folder in the seat's container with the guest image.
pub const PATH_GUEST: &str = "/guest";
/// Folder in the guest image's container with the seat program. Its name is one that no guest image has.
pub const PATH_TOOLS: &str = "/ftvm-tools";
/// Folder in the guest image's container that becomes [`PATH_GUEST`] of the seat's.
pub const PATH_COPY: &str = "/ftvm-guest";
/// Folder in the seat's container with one folder a disk whose first contents are in a claim.
pub const PATH_SOURCES: &str = "/sources";
/// Folder in the seat's container for downloads.
pub const PATH_STAGING: &str = "/staging";
/// Folder in the seat's container with its identity.
pub const PATH_IDENTITY: &str = "/identity";
/// Folder in the seat's container with the daemon's socket.
pub const PATH_RUN: &str = "/run/ftvm";
/// Name of the daemon's socket in [`PATH_RUN`].
pub const FILE_SOCKET: &str = "seat.sock";
/// The disk's contents, in the folder of a disk.
pub const FILE_DISK: &str = "disk.raw";
/// The seat's header, in the folder of the first disk.
pub const FILE_HEADER: &str = "ftvm-header";
/// The seat's redo journal, in the folder of the first disk.
pub const FILE_JOURNAL: &str = "ftvm-journal";
/// Files of an identity ([`PATH_IDENTITY`]): who the seat is ([`ftvm_protocol::identity::SeatIdentity`] as JSON).
pub const FILE_SEAT: &str = "seat.json";
/// Files of an identity: certificate of the seat, PEM.
pub const FILE_CERTIFICATE: &str = "certificate.pem";
/// Files of an identity: its private key, PEM.
pub const FILE_KEY: &str = "key.pem";
/// Files of an identity: who signed the certificates of this VM's seats, PEM.
pub const FILE_AUTHORITY: &str = "authority.pem";

/// Letters of a seat's suffix: no vowels, so no words; nothing that reads like something else.
const SUFFIX_LETTERS: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
/// Length of a seat's suffix.
pub const SUFFIX_LENGTH: usize = 5;
/// Longest name of a VM: with a dash and a suffix it is a seat's name of at most 40 characters.
pub const VM_NAME_LENGTH_MAX: usize = 34;

/// Name of a seat (and of its pod): the VM's name and five letters out of this random number.
pub fn seat_name(vm: &str, random: u64) -> String {
    let mut rest = random;
    let letters = (0..SUFFIX_LENGTH).map(|_| {
        let letter = SUFFIX_LETTERS[(rest % SUFFIX_LETTERS.len() as u64) as usize];
        rest /= SUFFIX_LETTERS.len() as u64;
        char::from(letter)
    });
    format!("{vm}-{}", letters.collect::<String>())
}

/// Name of the volume claim of a seat's disk.
pub fn claim_name(seat: &str, disk: &str) -> String {
    format!("{seat}-{disk}")
}

/// Name of the Secret with a seat's identity.
pub fn identity_secret_name(seat: &str) -> String {
    format!("{seat}-identity")
}

/// Name of the Secret with a VM's certificate authority.
pub fn authority_secret_name(vm: &str) -> String {
    format!("{vm}-authority")
}

/// Contents of [`ANNOTATION_NODES`]: sorted, comma-separated, each once.
pub fn nodes_text<'a>(nodes: impl IntoIterator<Item = &'a str>) -> String {
    let nodes: BTreeSet<&str> = nodes.into_iter().filter(|node| !node.is_empty()).collect();
    nodes.into_iter().collect::<Vec<_>>().join(",")
}

/// The nodes that [`ANNOTATION_NODES`] names.
pub fn parse_nodes(text: &str) -> BTreeSet<String> {
    let names = text.split(',').map(str::trim).filter(|node| !node.is_empty());
    names.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_from_the_vms() {
        assert_eq!(seat_name("web", 0), "web-bbbbb");
        let seat = seat_name(&"v".repeat(VM_NAME_LENGTH_MAX), u64::MAX);
        assert_eq!(seat.len(), 40);
        assert_eq!(claim_name("web-x7k2q", "root"), "web-x7k2q-root");
        assert_ne!(seat_name("web", 1), seat_name("web", 2));
    }

    #[test]
    fn nodes_are_sorted_and_named_once() {
        assert_eq!(nodes_text(["two", "one", "", "two"]), "one,two");
        assert_eq!(parse_nodes(" one,two,,"), ["one", "two"].map(str::to_owned).into());
        assert!(parse_nodes("").is_empty());
    }
}
