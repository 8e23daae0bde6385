use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Instant;

use ftvm_protocol::identity::{SeatId, VmId, identity_name};
use ftvm_protocol::wire::{VERSION_MAX, VERSION_MIN, encode_header};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use super::*;
use crate::replication::testing::Seeded;

const VM: VmId = VmId(77);
const A: SeatId = SeatId(1);
const B: SeatId = SeatId(2);
/// Longer than anything here takes on a busy machine; only failures wait for it.
const PATIENCE: Duration = Duration::from_secs(60);

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::new(vec![]).expect("params");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).expect("signed").pem();
        Self {
            issuer: Issuer::new(params, key),
            pem,
        }
    }

    fn certificate(&self, name: &str, years: std::ops::Range<i32>) -> (String, String) {
        let key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("params");
        params.not_before = rcgen::date_time_ymd(years.start, 1, 1);
        params.not_after = rcgen::date_time_ymd(years.end, 1, 1);
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        (certificate.pem(), key.serialize_pem())
    }

    fn try_identity(&self, seat: SeatId, name: &str, years: std::ops::Range<i32>) -> Result<TlsIdentity, TlsError> {
        let (certificate, key) = self.certificate(name, years);
        TlsIdentity::from_pem(VM, seat, &certificate, &key, &self.pem)
    }

    fn identity(&self, seat: SeatId) -> TlsIdentity {
        self.try_identity(seat, &identity_name(VM, seat), 2000..2100)
            .expect("valid")
    }
}

/// Starts of engines in this test process, so that every incarnation is another one.
static STARTS: AtomicU64 = AtomicU64::new(1);

fn config(authority: &Authority, seat: SeatId) -> LinkConfig {
    let start = STARTS.fetch_add(1, Ordering::Relaxed);
    let hello = Hello::new(VM, Incarnation { seat, start });
    let mut config = LinkConfig::new(hello, authority.identity(seat));
    // Dialling again comes quickly; giving up comes late, for the machine may be busy.
    config.handshake_deadline = Duration::from_secs(20);
    config.stall_deadline = Duration::from_secs(20);
    config.retry_max = Duration::from_millis(100);
    config
}

struct Node {
    hub: LinkHub,
    events: Receiver<LinkEvent>,
    address: SocketAddr,
}

impl Node {
    fn start(config: LinkConfig) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("address");
        let (sender, events) = channel();
        let hub = LinkHub::start(config, Some(listener), move |event| drop(sender.send(event))).expect("started");
        Self { hub, events, address }
    }

    /// The first event that `pick` takes; others are dropped.
    fn wait<T>(&self, mut pick: impl FnMut(LinkEvent) -> Option<T>) -> T {
        let until = Instant::now() + PATIENCE;
        loop {
            match self
                .events
                .recv_timeout(until.saturating_duration_since(Instant::now()))
            {
                Ok(event) => {
                    if let Some(found) = pick(event) {
                        return found;
                    }
                }
                Err(RecvTimeoutError::Timeout) => panic!("nothing of that kind happened"),
                Err(RecvTimeoutError::Disconnected) => panic!("the hub is gone"),
            }
        }
    }

    fn up(&self) -> (Incarnation, LinkSender) {
        self.wait(|event| match event {
            LinkEvent::Up {
                peer, sender, version, ..
            } => {
                assert_eq!(version, VERSION_MAX);
                Some((peer, sender))
            }
            _ => None,
        })
    }

    fn frame(&self) -> Frame {
        self.wait(|event| match event {
            LinkEvent::Frame { frame, .. } => Some(frame),
            LinkEvent::Down { reason, .. } => panic!("down instead of a frame: {reason}"),
            _ => None,
        })
    }

    fn down(&self, of: LinkId) -> DownReason {
        self.wait(|event| match event {
            LinkEvent::Down { link, reason } if link == of => Some(reason),
            _ => None,
        })
    }

    fn refused(&self) -> DownReason {
        self.wait(|event| match event {
            LinkEvent::Refused { reason, .. } => Some(reason),
            LinkEvent::Up { peer, .. } => panic!("up with {peer}"),
            _ => None,
        })
    }
}

/// Two nodes, the second dials the first.
fn pair(first: LinkConfig, second: LinkConfig) -> (Node, Node) {
    let (first_seat, second_seat) = (first.hello.from.seat, second.hello.from.seat);
    let (first, second) = (Node::start(first), Node::start(second));
    first.hub.add_peer(second_seat, None);
    second.hub.add_peer(first_seat, Some(first.address));
    (first, second)
}

#[test]
fn frames_cross_both_ways_and_the_end_is_noticed_at_once() {
    let authority = Authority::new();
    let (a, b) = pair(config(&authority, A), config(&authority, B));
    let ((peer_of_a, to_b), (peer_of_b, to_a)) = (a.up(), b.up());
    assert_eq!((peer_of_a.seat, peer_of_b.seat), (B, A));
    let mut seeded = Seeded::new(1);
    for n in 0..200u64 {
        let len = if n % 10 == 0 {
            seeded.below(900_000)
        } else {
            seeded.below(2000)
        } as usize;
        let payload = seeded.bytes(len);
        to_b.send(Kind::EpochState, n, 3, payload.clone()).expect("queued");
        let frame = b.frame();
        assert_eq!(
            (frame.kind, frame.epoch, frame.session, frame.payload),
            (Kind::EpochState, n, 3, payload.clone())
        );
        to_a.send(Kind::EpochState, n, 4, payload.clone()).expect("queued");
        assert!(a.frame().payload == payload);
    }
    let begun = Instant::now();
    drop(b);
    let reason = a.down(to_b.link());
    assert!(matches!(reason, DownReason::Closed), "{reason}");
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "noticed by the closed socket, not by a deadline"
    );
    assert_eq!(to_b.send(Kind::Control, 0, 0, vec![]), Err(SendRefused::Down));
}

#[test]
fn when_both_dial_one_link_stays_and_it_is_the_same_one() {
    let authority = Authority::new();
    for _ in 0..5 {
        let (a, b) = (Node::start(config(&authority, A)), Node::start(config(&authority, B)));
        a.hub.add_peer(B, Some(b.address));
        b.hub.add_peer(A, Some(a.address));
        // A superseded link may come up first on either side: the one that answers is the one that stays.
        let (mut to_b, mut to_a) = (a.up().1, b.up().1);
        let settle = |node: &Node, sender: &mut LinkSender, n: u64| {
            let until = Instant::now() + PATIENCE;
            while Instant::now() < until {
                let _ = sender.send(Kind::Control, n, 0, vec![1]);
                match node.events.recv_timeout(Duration::from_millis(20)) {
                    Ok(LinkEvent::Up { sender: newer, .. }) => *sender = newer,
                    Ok(LinkEvent::Frame { .. }) => return,
                    Ok(LinkEvent::Down { reason, .. } | LinkEvent::Refused { reason, .. }) => {
                        assert!(
                            matches!(
                                reason,
                                DownReason::Superseded | DownReason::Closed | DownReason::Broken(_)
                            ),
                            "{reason}"
                        );
                    }
                    Err(_) => {}
                }
            }
            panic!("no frame");
        };
        std::thread::scope(|scope| {
            let a = scope.spawn(|| {
                let a = a;
                settle(&a, &mut to_b, 1);
                a
            });
            settle(&b, &mut to_a, 2);
            drop(a.join().expect("settled"));
        });
    }
}

/// A network that lost a packet, or a machine that stood still: what one side dialled becomes a connection when the other
/// side's link stands already, and a session uses it.
#[test]
fn a_connection_that_comes_about_late_does_not_end_the_link_that_stands() {
    let authority = Authority::new();
    let relay = TcpListener::bind("127.0.0.1:0").expect("bind");
    let (a, b) = (Node::start(config(&authority, A)), Node::start(config(&authority, B)));
    a.hub.add_peer(B, Some(relay.local_addr().expect("address")));
    let (mut dialled, _) = relay.accept().expect("the smaller seat dials at once");
    // A dialler that keeps it says no more on it.
    dialled.set_read_timeout(Some(PATIENCE)).expect("open");
    b.hub.add_peer(A, Some(a.address));
    let (to_b, to_a) = (a.up().1, b.up().1);
    // Now what was dialled first goes on.
    let mut late = TcpStream::connect(b.address).expect("listens");
    let (mut from_b, mut to_dialler) = (late.try_clone().expect("clone"), dialled.try_clone().expect("clone"));
    let answers = std::thread::spawn(move || drop(std::io::copy(&mut from_b, &mut to_dialler)));
    std::io::copy(&mut dialled, &mut late).expect("the dialler gives it up");
    late.shutdown(std::net::Shutdown::Both).expect("open");
    answers.join().expect("no panic");
    // Its refusal is the last that could have happened to the link.
    assert!(matches!(a.refused(), DownReason::Superseded));
    b.refused();
    for n in 0..3 {
        to_b.send(Kind::Control, n, 0, vec![1]).expect("the link stands");
        assert_eq!(b.frame().epoch, n);
        to_a.send(Kind::Control, n, 0, vec![1]).expect("the link stands");
        assert_eq!(a.frame().epoch, n);
    }
}

#[test]
fn a_restarted_peer_is_another_incarnation_on_a_new_link() {
    let authority = Authority::new();
    let a = Node::start(config(&authority, A));
    a.hub.add_peer(B, None);
    let mut seen = Vec::new();
    for _ in 0..3 {
        let b = Node::start(config(&authority, B));
        b.hub.add_peer(A, Some(a.address));
        let (peer, sender) = a.up();
        b.up();
        assert!(!seen.contains(&peer.start), "{peer} came twice");
        seen.push(peer.start);
        drop(b);
        a.down(sender.link());
    }
}

#[test]
fn a_link_that_was_closed_comes_back() {
    let authority = Authority::new();
    let (a, b) = pair(config(&authority, A), config(&authority, B));
    let first = a.up().1;
    first.close("a test");
    assert!(matches!(a.down(first.link()), DownReason::ClosedHere(why) if why == "a test"));
    assert_ne!(a.up().1.link(), first.link());
    a.hub.remove_peer(B);
    let refused = b.wait(|event| match event {
        LinkEvent::Refused { reason, .. } => Some(reason),
        _ => None,
    });
    assert!(
        matches!(
            refused,
            DownReason::Tls(TlsError::RefusedByPeer(_)) | DownReason::Closed | DownReason::Broken(_)
        ),
        "{refused}"
    );
}

#[test]
fn wrong_identities_are_refused_with_a_reason() {
    let authority = Authority::new();
    let foreign = Authority::new();
    // Another VM's authority: refused by whoever sees its certificate first.
    let (a, b) = pair(
        config(&authority, A),
        LinkConfig {
            identity: foreign.identity(B),
            ..config(&authority, B)
        },
    );
    let (at_a, at_b) = (a.refused(), b.refused());
    assert!(at_b.to_string().contains("not signed by this VM's authority"), "{at_b}");
    assert!(matches!(&at_a, DownReason::Tls(TlsError::RefusedByPeer(_))), "{at_a}");
    let codes = [at_a.exit_code(), at_b.exit_code()];
    assert_eq!(codes, [Some(exit_code::IDENTITY); 2]);

    // A seat of this VM that is not expected.
    let third = SeatId(3);
    let (a, b) = (
        Node::start(config(&authority, A)),
        Node::start(config(&authority, third)),
    );
    a.hub.add_peer(B, None);
    b.hub.add_peer(A, Some(a.address));
    let (at_a, at_b) = (a.refused(), b.refused());
    assert!(at_a.to_string().contains("none of the seats expected"), "{at_a}");
    assert!(matches!(&at_b, DownReason::Tls(TlsError::RefusedByPeer(_))), "{at_b}");

    // The dialled address belongs to another seat.
    let (a, c) = (
        Node::start(config(&authority, A)),
        Node::start(config(&authority, third)),
    );
    c.hub.add_peer(A, None);
    a.hub.add_peer(B, Some(c.address));
    let refused = a.refused();
    assert!(refused.to_string().contains("none of the seats expected"), "{refused}");

    // The hello of another seat than the certificate's.
    let lying = LinkConfig {
        identity: authority.identity(B),
        ..config(&authority, third)
    };
    let (a, b) = (Node::start(config(&authority, A)), Node::start(lying));
    a.hub.add_peer(B, None);
    a.hub.add_peer(third, None);
    b.hub.add_peer(A, Some(a.address));
    let refused = a.refused();
    assert!(matches!(refused, DownReason::OtherSeat(_)), "{refused}");
}

#[test]
fn an_unusable_own_identity_is_refused_before_anybody_is_asked() {
    let authority = Authority::new();
    let name = identity_name(VM, A);
    let expired = authority.try_identity(A, &name, 2000..2001).expect_err("expired");
    assert!(expired.to_string().contains("xpired"), "{expired}");
    let other = authority
        .try_identity(A, &identity_name(VM, B), 2000..2100)
        .expect_err("another seat's");
    assert!(matches!(&other, TlsError::NotOurs { .. }), "{other}");
    let (certificate, key) = authority.certificate(&name, 2000..2100);
    let (_, other_key) = authority.certificate(&name, 2000..2100);
    let from_pem =
        |certificate: &str, key: &str, root: &str| TlsIdentity::from_pem(VM, A, certificate, key, root).err();
    assert!(matches!(
        from_pem(&certificate, &other_key, &authority.pem),
        Some(TlsError::Identity(_))
    ));
    assert!(matches!(
        from_pem(&certificate, &key, &Authority::new().pem),
        Some(TlsError::Identity(_))
    ));
    assert!(matches!(
        from_pem("nothing", &key, &authority.pem),
        Some(TlsError::Pem {
            what: "certificate",
            ..
        })
    ));
    assert!(matches!(
        from_pem(&certificate, "nothing", &authority.pem),
        Some(TlsError::Pem { what: "key", .. })
    ));
    assert!(matches!(
        from_pem(&certificate, &key, ""),
        Some(TlsError::Pem { what: "authority", .. })
    ));
    assert_eq!(from_pem(&certificate, &key, &authority.pem), None);
}

#[test]
fn an_expired_peer_is_refused() {
    let authority = Authority::new();
    let (certificate, key) = authority.certificate(&identity_name(VM, B), 2000..2001);
    let refused = TlsIdentity::from_pem(VM, B, &certificate, &key, &authority.pem);
    assert!(refused.is_err());
    // One that expires while its engine runs is refused by the peer: shown by a client that doesn't check itself.
    let a = Node::start(config(&authority, A));
    a.hub.add_peer(B, None);
    let mut client = raw_client(&authority, &certificate, &key, a.address);
    let _ = client.write_all(b"x");
    let _ = client.read(&mut [0; 100]);
    let refused = a.refused();
    assert!(refused.to_string().contains("has expired"), "{refused}");
}

#[test]
fn a_peer_of_the_former_version_is_spoken_to_in_that_one() {
    let authority = Authority::new();
    let base = config(&authority, B);
    let hello = Hello {
        version_max: VERSION_MIN,
        ..base.hello
    };
    let (a, b) = pair(config(&authority, A), LinkConfig { hello, ..base });
    let up = |node: &Node| {
        node.wait(|event| match event {
            LinkEvent::Up { sender, version, .. } => Some((sender, version)),
            _ => None,
        })
    };
    let ((to_b, at_a), (to_a, at_b)) = (up(&a), up(&b));
    assert_eq!((at_a, at_b), (VERSION_MIN, VERSION_MIN));
    to_b.send(Kind::Control, 0, 0, b"there".to_vec()).expect("queued");
    assert_eq!(b.frame().payload, b"there");
    to_a.send(Kind::Control, 0, 0, b"back".to_vec()).expect("queued");
    assert_eq!(a.frame().payload, b"back");
}

#[test]
fn other_versions_vms_and_the_own_seat_are_refused() {
    let authority = Authority::new();
    let base = config(&authority, B);
    let newer = Hello {
        version_min: VERSION_MAX + 1,
        version_max: VERSION_MAX + 2,
        ..base.hello
    };
    let other_vm = Hello {
        vm: VmId(78),
        ..base.hello
    };
    for (hello, expected, code) in [
        (newer, "upgrade the older", exit_code::WIRE_VERSION),
        (other_vm, "belongs to VM", exit_code::IDENTITY),
    ] {
        let (a, _b) = pair(config(&authority, A), LinkConfig { hello, ..base.clone() });
        let refused = a.refused();
        assert!(refused.to_string().contains(expected), "{refused}");
        assert_eq!(refused.exit_code(), Some(code));
    }
    let same = LinkConfig {
        identity: authority.identity(A),
        ..config(&authority, A)
    };
    let (a, _b) = pair(config(&authority, A), same);
    let refused = a.refused();
    assert!(refused.to_string().contains("own seat"), "{refused}");
}

type RawClient = rustls::StreamOwned<rustls::ClientConnection, TcpStream>;

/// A TLS client that checks nothing and sends what it likes.
fn raw_client(authority: &Authority, certificate: &str, key: &str, address: SocketAddr) -> RawClient {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_slice(authority.pem.as_bytes()).expect("PEM"))
        .expect("root");
    let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).expect("PEM")];
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("PEM");
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .expect("key fits");
    let name = ServerName::try_from(identity_name(VM, A)).expect("name");
    let connection = rustls::ClientConnection::new(config.into(), name).expect("client");
    let stream = TcpStream::connect(address).expect("listens");
    rustls::StreamOwned::new(connection, stream)
}

/// A client with seat B's identity that greeted seat A.
fn greeted_client(authority: &Authority, a: &Node) -> (RawClient, LinkSender) {
    a.hub.add_peer(B, None);
    let (certificate, key) = authority.certificate(&identity_name(VM, B), 2000..2100);
    let mut client = raw_client(authority, &certificate, &key, a.address);
    let start = STARTS.fetch_add(1, Ordering::Relaxed);
    let hello = Hello::new(VM, Incarnation { seat: B, start })
        .to_frame()
        .expect("frame");
    client.write_all(&hello).expect("sent");
    (client, a.up().1)
}

#[test]
fn hostile_frames_end_the_link_and_nothing_else() {
    let authority = Authority::new();
    let a = Node::start(config(&authority, A));
    let good = encode_header(VERSION_MAX, Kind::Control, 0, 0, b"hi")
        .expect("fits")
        .to_vec();
    let mut oversized = good.clone();
    oversized[24..28].copy_from_slice(&u32::MAX.to_le_bytes());
    let unknown = {
        let mut bytes = good.clone();
        bytes[6..8].copy_from_slice(&999u16.to_le_bytes());
        bytes
    };
    let second_hello = Hello::new(VM, Incarnation { seat: B, start: 1 })
        .to_frame()
        .expect("frame");
    for (what, bytes) in [
        ("wrong checksum", [&good[..], b"ha"].concat()),
        ("oversized", oversized),
        ("unknown kind", unknown),
        ("garbage", vec![0x55; 100]),
        ("a second hello", second_hello),
        (
            "another version",
            encode_header(VERSION_MAX - 1, Kind::Control, 0, 0, b"")
                .expect("fits")
                .to_vec(),
        ),
    ] {
        let (mut client, sender) = greeted_client(&authority, &a);
        client.write_all(&[&good[..], b"hi"].concat()).expect("sent");
        assert_eq!(a.frame().payload, b"hi");
        client.write_all(&bytes).expect("sent");
        let reason = a.down(sender.link());
        assert!(matches!(reason, DownReason::Wire(_)), "{what}: {reason}");
    }
}

#[test]
fn a_cut_connection_is_down_at_once() {
    let authority = Authority::new();
    let a = Node::start(config(&authority, A));
    let (client, sender) = greeted_client(&authority, &a);
    // Closing with unread bytes sends RST: what a killed process's kernel does.
    sender.send(Kind::Control, 0, 0, vec![1; 100]).expect("queued");
    let begun = Instant::now();
    client.sock.peek(&mut [0; 10]).expect("bytes came");
    drop(client);
    let reason = a.down(sender.link());
    assert!(matches!(reason, DownReason::Broken(_) | DownReason::Closed), "{reason}");
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "noticed by the reset, not by a deadline"
    );
}

/// A killed process closes its descriptors after its memory is gone, unless only threads of links have them.
#[test]
fn sockets_of_links_are_in_a_table_of_their_own() {
    let sockets = |of: &std::path::Path| -> std::collections::BTreeSet<std::path::PathBuf> {
        // A thread of another test may have ended.
        let entries = std::fs::read_dir(of.join("fd")).into_iter().flatten();
        let targets = entries.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
        targets
            .filter(|target| target.to_string_lossy().starts_with("socket:"))
            .collect()
    };
    let authority = Authority::new();
    let (a, b) = pair(config(&authority, A), config(&authority, B));
    let ((_, to_b), (_, to_a)) = (a.up(), b.up());
    let ours = sockets(std::path::Path::new("/proc/thread-self"));
    // A hub's own thread may be about to part; those that it starts have parted.
    let is_link = |thread: &std::path::Path| {
        std::fs::read_to_string(thread.join("comm"))
            .is_ok_and(|name| name.starts_with("link-") && name.trim() != "link-hub")
    };
    let threads = std::fs::read_dir("/proc/self/task").expect("threads");
    let links: Vec<_> = threads
        .filter_map(|thread| Some(thread.ok()?.path()))
        .filter(|thread| is_link(thread))
        .map(|thread| sockets(&thread))
        .collect();
    assert!(links.iter().any(|link| link.difference(&ours).count() > 0), "{links:?}");
    // Each side's listening socket is known to both, and nothing else is.
    for link in links {
        assert!(link.intersection(&ours).count() <= 1, "{link:?} and {ours:?}");
    }
    for (to, at) in [(&to_b, &b), (&to_a, &a)] {
        to.send(Kind::Control, 1, 0, vec![1]).expect("queued");
        assert_eq!(at.frame().epoch, 1);
    }
}

#[test]
fn half_a_frame_is_never_delivered() {
    let authority = Authority::new();
    let a = Node::start(config(&authority, A));
    let (mut client, sender) = greeted_client(&authority, &a);
    let header = encode_header(VERSION_MAX, Kind::EpochState, 0, 0, &[7; 1000]).expect("fits");
    client.write_all(&[&header[..], &[7; 999]].concat()).expect("sent");
    client.conn.send_close_notify();
    client.flush().expect("sent");
    drop(client);
    a.wait(|event| match event {
        LinkEvent::Down { link, .. } if link == sender.link() => Some(()),
        LinkEvent::Frame { .. } => panic!("half a frame was delivered"),
        _ => None,
    });
}

#[test]
fn who_connects_and_says_nothing_is_cut_off_in_time() {
    let authority = Authority::new();
    let a = Node::start(LinkConfig {
        handshake_deadline: Duration::from_millis(200),
        ..config(&authority, A)
    });
    let silent = TcpStream::connect(a.address).expect("listens");
    let refused = a.refused();
    assert!(matches!(refused, DownReason::HandshakeTimeout(_)), "{refused}");
    // Who says something else is refused for that, however long it takes to say it.
    let b = Node::start(config(&authority, B));
    let mut stranger = TcpStream::connect(b.address).expect("listens");
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("sent");
    let refused = b.refused();
    assert!(matches!(refused, DownReason::Tls(_)), "{refused}");
    drop(silent);
}

#[test]
fn no_link_ends_before_its_machine_counts_as_dead() {
    let authority = Authority::new();
    let with = |peer_lost_ms: u64| {
        let hello = Hello::new(VM, Incarnation { seat: A, start: 1 });
        let config = LinkConfig::new(hello, authority.identity(A)).with_detection(Duration::from_millis(peer_lost_ms));
        (config.handshake_deadline.as_millis(), config.stall_deadline.as_millis())
    };
    assert_eq!(with(300), (2000, 5000));
    assert_eq!(with(10_000), (21_400, 14_700));
    // The least that the resource admits: what a link waits for takes as long as ever.
    assert_eq!(with(100), with(300));
}

#[test]
fn a_peer_that_takes_nothing_is_down_in_time_and_producers_are_told() {
    let authority = Authority::new();
    let a = Node::start(LinkConfig {
        stall_deadline: Duration::from_millis(500),
        ..config(&authority, A)
    });
    let (client, sender) = greeted_client(&authority, &a);
    let begun = Instant::now();
    // Blocks when every buffer on the way is full, until the link is given up.
    while sender.send(Kind::EpochState, 0, 0, vec![0; 1 << 20]).is_ok() {
        assert!(begun.elapsed() < PATIENCE);
    }
    let reason = a.down(sender.link());
    assert!(
        matches!(reason, DownReason::Stalled(_) | DownReason::Broken(_)),
        "{reason}"
    );
    drop(client);
}

#[test]
fn heartbeats_overtake_bulk() {
    const BULK: usize = 256 * 1024;
    let authority = Authority::new();
    let a = Node::start(config(&authority, A));
    a.hub.add_peer(B, None);
    // B takes nothing until it is let go, so that everything on the way is full.
    let (let_go, held) = std::sync::mpsc::sync_channel::<()>(1);
    let held = std::sync::Mutex::new(held);
    let (kinds, taken) = channel();
    let b = LinkHub::start(config(&authority, B), None, move |event| {
        if let LinkEvent::Frame { frame, .. } = event {
            if frame.kind == Kind::Input {
                let _ = held.lock().expect("no panic").recv();
            }
            let _ = kinds.send(frame.kind);
        }
    })
    .expect("started");
    b.add_peer(A, Some(a.address));
    let to_b = a.up().1;
    to_b.send(Kind::Input, 0, 0, vec![]).expect("queued");
    let bulk = {
        let to_b = to_b.clone();
        std::thread::spawn(move || (0..200u64).try_for_each(|n| to_b.send(Kind::ResyncMemory, n, 0, vec![1; BULK])))
    };
    while to_b.state().waiting_bytes[Class::Bulk as usize] < 1 << 20 {
        std::thread::sleep(Duration::from_millis(1));
    }
    to_b.send(Kind::Control, 0, 0, b"heartbeat".to_vec()).expect("queued");
    let under_way = to_b.state().taken_bytes / BULK as u64;
    let_go.send(()).expect("held");
    let bulk_before = taken
        .iter()
        .take_while(|kind| *kind != Kind::Control)
        .filter(|kind| *kind == Kind::ResyncMemory)
        .count();
    bulk.join().expect("no panic").expect("sent");
    assert!(
        bulk_before as u64 <= under_way + 1,
        "{bulk_before} bulk frames came first, {under_way} were under way"
    );
    assert!(bulk_before < 195, "the buffers are large, but not that large");
    to_b.wait_sent(Class::Bulk).expect("up");
    assert_eq!(to_b.state().waiting_bytes, [0; 4]);
    drop(b);
}

#[test]
fn a_hub_stops_whatever_its_connections_do() {
    let authority = Authority::new();
    let (a, b) = pair(config(&authority, A), config(&authority, B));
    let to_b = a.up().1;
    let silent = TcpStream::connect(a.address).expect("listens");
    let unreachable = SeatId(9);
    a.hub
        .add_peer(unreachable, Some("127.0.0.1:1".parse().expect("address")));
    a.wait(|event| {
        matches!(
            event,
            LinkEvent::Refused {
                reason: DownReason::Connect(_),
                ..
            }
        )
        .then_some(())
    });
    let Node { hub, events, .. } = a;
    let begun = Instant::now();
    drop(hub);
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "nothing is waited for but the threads"
    );
    assert!(
        events
            .iter()
            .any(|event| matches!(event, LinkEvent::Down { link, .. } if link == to_b.link()))
    );
    drop((b, silent));
}
