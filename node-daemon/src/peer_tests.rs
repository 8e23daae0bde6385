use std::sync::Mutex;

use ftvm_protocol::core::{GuestReport, HeaderReport, SeatReport};
use ftvm_protocol::identity::{Incarnation, VmId, identity_name};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use super::*;

const VM: VmId = VmId(77);
const A: SeatId = SeatId(1);
const B: SeatId = SeatId(2);
const STRANGER: SeatId = SeatId(3);
/// Longer than anything here takes on a busy machine; only failures wait for it.
const LONG: Duration = Duration::from_secs(60);

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        let issuer = Issuer::new(params, key);
        Self { issuer, pem }
    }

    /// The identity of a seat that lets A and B in.
    fn identity(&self, seat: SeatId) -> TlsIdentity {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![identity_name(VM, seat)]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap().pem();
        let identity = TlsIdentity::from_pem(VM, seat, &certificate, &key.serialize_pem(), &self.pem).unwrap();
        [A, B].into_iter().for_each(|seat| identity.allow(seat));
        identity
    }
}

/// A daemon that has seat B, and remembers what it was asked.
struct HasB {
    identity: TlsIdentity,
    asked: Mutex<Vec<(String, SeatId, Request)>>,
}

impl Answers for HasB {
    fn seat(&self, name: &str) -> Option<Asked> {
        (name == identity_name(VM, B)).then(|| Asked {
            identity: self.identity.clone(),
            vm: "web".to_owned(),
        })
    }

    fn answer(&self, vm: &str, asker: SeatId, request: Request) -> Response {
        self.asked.lock().unwrap().push((vm.to_owned(), asker, request));
        Response::SeatReport { report: report() }
    }
}

fn report() -> SeatReport {
    SeatReport {
        seat: B,
        header: HeaderReport::Absent,
        guest: GuestReport::None,
    }
}

struct Daemons {
    authority: Authority,
    b: Arc<HasB>,
    address: SocketAddr,
}

impl Daemons {
    fn new() -> Self {
        let authority = Authority::new();
        let b = Arc::new(HasB {
            identity: authority.identity(B),
            asked: Mutex::default(),
        });
        let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        serve(listener, b.clone()).unwrap();
        Self { authority, b, address }
    }

    fn ask(&self, own: &TlsIdentity, seat: SeatId, request: &Request) -> Result<Response, PeerError> {
        ask(own, seat, self.address, request, Instant::now() + LONG)
    }

    fn asked(&self) -> usize {
        self.b.asked.lock().unwrap().len()
    }
}

const QUESTION: Request = Request::SeatReport { seat_id: B };

#[test]
fn a_seat_of_the_same_machine_is_answered() {
    let daemons = Daemons::new();
    let a = daemons.authority.identity(A);
    let answer = daemons.ask(&a, B, &QUESTION).unwrap();
    assert_eq!(answer, Response::SeatReport { report: report() });
    let gone = Request::PeerGone {
        vm: "other".to_owned(),
        incarnation: Incarnation { seat: A, start: 5 },
    };
    daemons.ask(&a, B, &gone).unwrap();
    let asked = daemons.b.asked.lock().unwrap();
    assert_eq!(*asked, [("web".to_owned(), A, QUESTION), ("web".to_owned(), A, gone)]);
}

#[test]
fn strangers_are_not_answered() {
    let daemons = Daemons::new();
    let refused = |own: &TlsIdentity, seat| daemons.ask(own, seat, &QUESTION).unwrap_err().to_string();
    let a = daemons.authority.identity(A);
    refused(&a, STRANGER);
    refused(&daemons.authority.identity(STRANGER), B);
    refused(&Authority::new().identity(A), B);
    assert_eq!(daemons.asked(), 0);
    // The same question by the right one is answered: it was the certificates.
    daemons.ask(&a, B, &QUESTION).unwrap();
    assert_eq!(daemons.asked(), 1);
}

#[test]
fn commands_do_not_come_this_way() {
    let daemons = Daemons::new();
    let a = daemons.authority.identity(A);
    let remove = Request::RemoveSeat {
        vm: "web".to_owned(),
        seat: "b".to_owned(),
    };
    for request in [Request::Status, remove] {
        let answer = daemons.ask(&a, B, &request).unwrap();
        assert!(matches!(answer, Response::Refused { .. }), "{answer:?}");
    }
    assert_eq!(daemons.asked(), 0);
}

#[test]
fn noise_and_lying_lengths_end_the_conversation() {
    let daemons = Daemons::new();
    let mut noise = TcpStream::connect(daemons.address).unwrap();
    noise.set_read_timeout(Some(LONG)).unwrap();
    noise.write_all(&[0x55; 4096]).unwrap();
    let mut rest = Vec::new();
    // It may reset the connection instead of ending it.
    let _ = noise.read_to_end(&mut rest);
    assert!(rest.len() < 100, "{} bytes answer noise", rest.len());

    let a = daemons.authority.identity(A);
    let mut tls = a.client(B).unwrap();
    let mut stream = TcpStream::connect(daemons.address).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    let mut stream = rustls::Stream::new(&mut tls, &mut stream);
    stream.write_all(&(MESSAGE_MAX + 1).to_be_bytes()).unwrap();
    stream.flush().unwrap();
    assert!(
        stream.read_exact(&mut [0; 4]).is_err(),
        "a message without an end is answered"
    );
    assert_eq!(daemons.asked(), 0);
    daemons.ask(&a, B, &QUESTION).unwrap();
}

#[test]
fn those_who_say_nothing_do_not_keep_others_out_for_long() {
    let daemons = Daemons::new();
    let a = daemons.authority.identity(A);
    let silent: Vec<_> = (0..ASKERS_MAX)
        .map(|_| TcpStream::connect(daemons.address).unwrap())
        .collect();
    let deadline = Instant::now() + LONG;
    while daemons.ask(&a, B, &QUESTION).is_err() {
        assert!(Instant::now() < deadline, "silent askers keep others out");
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(silent);
}

#[test]
fn an_address_in_use_and_a_daemon_that_is_away_are_said() {
    let daemons = Daemons::new();
    let error = listen(daemons.address).unwrap_err().to_string();
    assert!(error.contains("check peer_listen"), "{error}");
    let free = listen("127.0.0.1:0".parse().unwrap()).unwrap().local_addr().unwrap();
    let a = daemons.authority.identity(A);
    let error = ask(&a, B, free, &QUESTION, Instant::now() + LONG).unwrap_err();
    assert!(error.to_string().contains("check daemon_address"), "{error}");
}
