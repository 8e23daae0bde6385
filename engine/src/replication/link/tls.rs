//! Who the peer is: certificates of one authority per VM, one DNS name per seat ([`identity_name`]).

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError, RwLock};

use ftvm_protocol::identity::{SeatId, VmId, identity_name};
use rustls::client::danger::HandshakeSignatureValid;
use rustls::client::{Resumption, WebPkiServerVerifier, verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, DistinguishedName,
    RootCertStore, ServerConfig, ServerConnection, SignatureScheme,
};

/// What is wrong with certificates or with the TLS stream.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum TlsError {
    /// Not PEM, or nothing in it.
    #[error("this seat's {what} is not usable PEM ({why}): have the VM's identities made again")]
    Pem {
        /// Which.
        what: &'static str,
        /// What the parser says.
        why: String,
    },
    /// Own certificate, key and authority don't fit together.
    #[error("this seat's certificate, key and authority don't fit together ({0}): have the VM's identities made again")]
    Identity(rustls::Error),
    /// Own certificate is another seat's.
    #[error("this seat's certificate is not for {expected} ({why}): seats must not share or exchange identities")]
    NotOurs {
        /// Name expected.
        expected: String,
        /// What it has.
        why: String,
    },
    /// The peer's certificate was refused here.
    #[error("the peer's certificate is refused: {0}; give both seats identities that were made together")]
    PeerRefused(String),
    /// The peer refused ours.
    #[error(
        "the peer refuses this seat's certificate ({0}); its log says why: give both seats identities that were made together"
    )]
    RefusedByPeer(String),
    /// The peer ended a connection that was not complete yet, as it does with the second of two.
    #[error("the peer closed the connection before it was complete")]
    Closed,
    /// Anything else in the protocol.
    #[error("TLS with the peer failed: {0}")]
    Protocol(rustls::Error),
}

/// Says what a TLS error means between seats.
pub(super) fn explain(error: rustls::Error) -> TlsError {
    use rustls::Error::{AlertReceived, InvalidCertificate, NoCertificatesPresented};
    match error {
        InvalidCertificate(error) => TlsError::PeerRefused(match &error {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                "it is not signed by this VM's authority".to_owned()
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                format!("it has expired, or this host's clock is wrong ({error})")
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                format!("it is not valid yet, or this host's clock is wrong ({error})")
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                format!("it belongs to none of the seats expected ({error})")
            }
            _ => error.to_string(),
        }),
        NoCertificatesPresented => TlsError::PeerRefused("there is none".to_owned()),
        AlertReceived(AlertDescription::CloseNotify) => TlsError::Closed,
        AlertReceived(alert) => TlsError::RefusedByPeer(format!("{alert:?}")),
        error => TlsError::Protocol(error),
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn server_name(vm: VmId, seat: SeatId) -> Result<ServerName<'static>, TlsError> {
    let name = identity_name(vm, seat);
    ServerName::try_from(name.clone()).map_err(|error| TlsError::NotOurs {
        expected: name,
        why: error.to_string(),
    })
}

/// Certificate and key of this seat, and the authority of its VM. Clones share the set of seats that may connect.
#[derive(Clone)]
pub struct TlsIdentity {
    vm: VmId,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    allowed: Arc<Allowed>,
}

impl std::fmt::Debug for TlsIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsIdentity")
            .field("vm", &self.vm)
            .finish_non_exhaustive()
    }
}

impl TlsIdentity {
    /// From PEM texts: the seat's certificate chain, its key, the authority's certificate. Refuses what doesn't fit
    /// together, so that a wrong configuration shows before a peer is asked.
    pub fn from_pem(vm: VmId, seat: SeatId, certificate: &str, key: &str, authority: &str) -> Result<Self, TlsError> {
        let certificates = certificates(certificate, "certificate")?;
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|error| TlsError::Pem {
            what: "key",
            why: error.to_string(),
        })?;
        let mut roots = RootCertStore::empty();
        for root in self::certificates(authority, "authority")? {
            roots.add(root).map_err(TlsError::Identity)?;
        }
        let roots = Arc::new(roots);
        let provider = provider();
        check_own(vm, seat, &certificates, &roots, &provider)?;

        let identity =
            |error: rustls::server::VerifierBuilderError| TlsError::Identity(rustls::Error::General(error.to_string()));
        let servers = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(identity)?;
        let clients = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
            .build()
            .map_err(identity)?;
        let allowed = Arc::new(Allowed {
            vm,
            seats: RwLock::default(),
        });

        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(TlsError::Identity)?
            .with_webpki_verifier(servers)
            .with_client_auth_cert(certificates.clone(), key.clone_key())
            .map_err(TlsError::Identity)?;
        client.resumption = Resumption::disabled();
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(TlsError::Identity)?
            .with_client_cert_verifier(Arc::new(SeatVerifier {
                chain: clients,
                allowed: allowed.clone(),
            }))
            .with_single_cert(certificates, key)
            .map_err(TlsError::Identity)?;
        server.send_tls13_tickets = 0;
        Ok(Self {
            vm,
            client: Arc::new(client),
            server: Arc::new(server),
            allowed,
        })
    }

    /// Lets a seat connect.
    pub fn allow(&self, seat: SeatId) {
        self.allowed
            .seats
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(seat);
    }

    /// Lets a seat connect no more; its links stay.
    pub(super) fn disallow(&self, seat: SeatId) {
        self.allowed
            .seats
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&seat);
    }

    /// TLS towards `seat`, which we dial.
    ///
    /// # Errors
    /// If rustls refuses to begin.
    pub fn client(&self, seat: SeatId) -> Result<ClientConnection, TlsError> {
        let name = server_name(self.vm, seat)?;
        ClientConnection::new(self.client.clone(), name).map_err(TlsError::Protocol)
    }

    /// For TLS towards those who dial us: lets in the seats that are allowed.
    #[must_use]
    pub fn server_config(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// TLS towards `seat`, which we dialled.
    pub(super) fn dial(&self, seat: SeatId) -> Result<rustls::Connection, TlsError> {
        Ok(self.client(seat)?.into())
    }

    /// TLS towards whoever dialled us.
    pub(super) fn accept(&self) -> Result<rustls::Connection, TlsError> {
        Ok(ServerConnection::new(self.server.clone())
            .map_err(TlsError::Protocol)?
            .into())
    }

    /// The allowed seat whose certificates these are: those that a peer showed, after the handshake.
    ///
    /// # Errors
    /// If there are none, or they are of no seat that may connect.
    pub fn seat_of(&self, certificates: &[CertificateDer<'_>]) -> Result<SeatId, TlsError> {
        let none = || TlsError::PeerRefused("there is none".to_owned());
        let certificate = certificates.first().ok_or_else(none)?;
        self.allowed.seat_of(certificate).map_err(explain)
    }
}

fn certificates(pem: &str, what: &'static str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    match certificates {
        Ok(certificates) if certificates.is_empty() => Err(TlsError::Pem {
            what,
            why: "no certificate in it".to_owned(),
        }),
        Ok(certificates) => Ok(certificates),
        Err(error) => Err(TlsError::Pem {
            what,
            why: error.to_string(),
        }),
    }
}

/// Looks at the own certificate as a peer will.
fn check_own(
    vm: VmId,
    seat: SeatId,
    certificates: &[CertificateDer<'_>],
    roots: &Arc<RootCertStore>,
    provider: &Arc<CryptoProvider>,
) -> Result<(), TlsError> {
    let Some((own, intermediates)) = certificates.split_first() else {
        return Err(TlsError::Pem {
            what: "certificate",
            why: "no certificate in it".to_owned(),
        });
    };
    let parsed = ParsedCertificate::try_from(own).map_err(TlsError::Identity)?;
    let name = server_name(vm, seat)?;
    verify_server_name(&parsed, &name).map_err(|error| TlsError::NotOurs {
        expected: identity_name(vm, seat),
        why: error.to_string(),
    })?;
    let algorithms = provider.signature_verification_algorithms.all;
    verify_server_cert_signed_by_trust_anchor(&parsed, roots, intermediates, UnixTime::now(), algorithms)
        .map_err(TlsError::Identity)
}

/// The seats that may connect.
#[derive(Debug)]
struct Allowed {
    vm: VmId,
    seats: RwLock<BTreeSet<SeatId>>,
}

impl Allowed {
    fn seat_of(&self, certificate: &CertificateDer<'_>) -> Result<SeatId, rustls::Error> {
        let parsed = ParsedCertificate::try_from(certificate)?;
        let mut refused = rustls::Error::InvalidCertificate(CertificateError::NotValidForName);
        for &seat in self.seats.read().unwrap_or_else(PoisonError::into_inner).iter() {
            let Ok(name) = server_name(self.vm, seat) else { continue };
            match verify_server_name(&parsed, &name) {
                Ok(()) => return Ok(seat),
                Err(error) => refused = error,
            }
        }
        Err(refused)
    }
}

/// Client certificates: signed by the authority, and of a seat that may connect.
#[derive(Debug)]
struct SeatVerifier {
    chain: Arc<dyn ClientCertVerifier>,
    allowed: Arc<Allowed>,
}

impl ClientCertVerifier for SeatVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.chain.verify_client_cert(end_entity, intermediates, now)?;
        self.allowed.seat_of(end_entity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}
