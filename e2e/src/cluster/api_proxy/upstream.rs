//! TLS on both sides, and one request to the API server.
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http1::handshake;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::super::control_plane::SERVING;
use super::super::pki::{Authority, Clients};

/// The only version that is spoken.
const ALPN: &[u8] = b"http/1.1";

/// The API server, and everyone in whose name it can be asked.
pub(super) struct Upstream {
    address: SocketAddr,
    roots: Arc<RootCertStore>,
    clients: Clients,
}

/// A client of the proxy, as the API server is to see it.
#[derive(Clone)]
pub(super) struct Caller {
    /// Whose certificate it presented.
    pub(super) user: Option<String>,
    address: SocketAddr,
    tls: TlsConnector,
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn roots(authority: &Authority) -> anyhow::Result<Arc<RootCertStore>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(authority.file("ca.crt"))?)?;
    Ok(Arc::new(roots))
}

/// What clients meet: the API server's own certificate, and the question for theirs.
pub(super) fn acceptor(folder: &Path, authority: &Authority) -> anyhow::Result<TlsAcceptor> {
    let serving = folder.join(SERVING);
    let certificate = CertificateDer::from_pem_file(serving.with_extension("crt"))?;
    let key = PrivateKeyDer::from_pem_file(serving.with_extension("key"))?;
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(authority)?, provider())
        .allow_unauthenticated()
        .build()?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![certificate], key)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

impl Upstream {
    pub(super) fn new(address: SocketAddr, authority: &Authority) -> anyhow::Result<Self> {
        Ok(Self {
            address,
            roots: roots(authority)?,
            clients: authority.clients(),
        })
    }

    /// Who presented this certificate, or none.
    pub(super) fn caller(&self, certificate: Option<&CertificateDer<'_>>) -> anyhow::Result<Caller> {
        let config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_root_certificates(Arc::clone(&self.roots));
        let client = match certificate {
            Some(certificate) => {
                let found = self.clients.find(certificate);
                let found = found.context("a client certificate of the authority that it does not know")?;
                Some((found, certificate.clone().into_owned()))
            }
            None => None,
        };
        let user = client.as_ref().map(|(client, _)| client.user.clone());
        let mut config = match client {
            Some((client, certificate)) => config.with_client_auth_cert(vec![certificate], client.key)?,
            None => config.with_no_client_auth(),
        };
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Caller {
            user,
            address: self.address,
            tls: TlsConnector::from(Arc::new(config)),
        })
    }
}

impl Caller {
    /// Sends one request on a connection of its own, once: what the API server did is what it was asked to.
    pub(super) async fn ask(&self, request: Request<Full<Bytes>>) -> anyhow::Result<Response<Incoming>> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        let name = ServerName::IpAddress(self.address.ip().into());
        let stream = self.tls.connect(name, stream).await?;
        let (mut sender, connection) = handshake(TokioIo::new(stream)).await?;
        // Ends when the answer's body is read, or dropped.
        tokio::spawn(async move {
            if let Err(error) = connection.await
                && !error.is_canceled()
            {
                eprintln!("api-proxy: connection to the API server: {error}");
            }
        });
        Ok(sender.send_request(request).await?)
    }
}
