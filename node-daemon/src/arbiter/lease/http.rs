//! Requests to the API server, each sent at most once.
//!
//! A client of its own, because the outcome of a swap depends on a question that general clients do not answer: has anything
//! of the request left? Here it has exactly if hyper took it for its connection. There are no retries, no redirects and no
//! caches; a connection is used again only if it stood well after the last answer.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue, USER_AGENT};
use hyper::{Method, Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// Longest answer; a Lease has a few hundred bytes.
const ANSWER_BYTES_MAX: usize = 1 << 20;
/// Connections that are kept for the next request.
const IDLE_MAX: usize = 4;
/// A connection that was idle for longer is not used again: the server may be closing it just now.
const IDLE_TIME_MAX: Duration = Duration::from_secs(20);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// Nothing of the request left this process, and nothing of it will.
    #[error("the API server at {server} was not asked: {why}")]
    NotSent {
        /// The server.
        server: String,
        /// Why.
        why: String,
    },
    /// It was sent, whole or in part, and nothing is known.
    #[error("the API server at {server} did not answer: {why}")]
    Unanswered {
        /// The server.
        server: String,
        /// Why.
        why: String,
    },
}

/// An answer that was read whole, before the deadline.
#[derive(Debug)]
pub struct HttpAnswer {
    /// Its status.
    pub status: StatusCode,
    /// Its body.
    pub body: Bytes,
}

/// Who asks.
enum Credentials {
    /// The certificate of the connection, or nobody.
    Connection,
    /// A token that stays.
    Token(HeaderValue),
    /// A token that its file's owner replaces before it runs out.
    File(PathBuf),
}

/// The API server.
pub struct Server {
    address: String,
    host: HeaderValue,
    /// None: without TLS.
    tls: Option<(TlsConnector, ServerName<'static>)>,
    credentials: Credentials,
    idle: Mutex<Vec<(Instant, SendRequest<Full<Bytes>>)>>,
}

/// Why a configuration can't be used.
#[derive(Debug, thiserror::Error)]
#[error("the API server {server} can't be used: {why}")]
pub struct ServerError {
    server: String,
    why: String,
}

impl Server {
    /// The server and the rights of a client configuration (in the cluster: of the pod's service account).
    ///
    /// # Errors
    /// If its address or certificates are unusable, or it wants a way to authenticate that needs other programs.
    pub fn new(config: &kube::Config) -> Result<Server, ServerError> {
        use kube::client::ConfigExt;
        let url: &Uri = &config.cluster_url;
        let refuse = |why: String| ServerError {
            server: url.to_string(),
            why,
        };
        let host = url.host().ok_or_else(|| refuse("its URL has no host".to_owned()))?;
        let encrypted = url.scheme_str() != Some("http");
        let port = url.port_u16().unwrap_or(if encrypted { 443 } else { 80 });
        let bare = host.trim_matches(['[', ']']);
        let tls = if encrypted {
            let name = config.tls_server_name.clone().unwrap_or_else(|| bare.to_owned());
            let name = ServerName::try_from(name).map_err(|error| refuse(error.to_string()))?;
            let mut client = config
                .rustls_client_config()
                .map_err(|error| refuse(error.to_string()))?;
            client.alpn_protocols = vec![b"http/1.1".to_vec()];
            Some((TlsConnector::from(Arc::new(client)), name))
        } else {
            None
        };
        let auth = &config.auth_info;
        let credentials = if let Some(token) = &auth.token {
            let header =
                bearer(secrecy::ExposeSecret::expose_secret(token)).map_err(|error| refuse(error.to_string()))?;
            Credentials::Token(header)
        } else if let Some(path) = &auth.token_file {
            Credentials::File(path.into())
        } else if auth.exec.is_some() || auth.auth_provider.is_some() || auth.username.is_some() {
            return Err(refuse("only tokens and client certificates are supported".to_owned()));
        } else {
            Credentials::Connection
        };
        Ok(Server {
            address: format!("{host}:{port}"),
            host: HeaderValue::from_str(&format!("{host}:{port}")).map_err(|error| refuse(error.to_string()))?,
            tls,
            credentials,
            idle: Mutex::default(),
        })
    }

    fn not_sent(&self, why: impl ToString) -> RequestError {
        RequestError::NotSent {
            server: self.address.clone(),
            why: why.to_string(),
        }
    }

    fn unanswered(&self, why: impl ToString) -> RequestError {
        RequestError::Unanswered {
            server: self.address.clone(),
            why: why.to_string(),
        }
    }

    /// Sends one request and reads its answer; what is not there at the deadline does not count any more.
    ///
    /// # Errors
    /// [`RequestError`] says whether anything was sent.
    pub async fn ask(
        self: &Arc<Server>,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
        deadline: Instant,
    ) -> Result<HttpAnswer, RequestError> {
        let request = self.request(method, path, body)?;
        let until = tokio::time::Instant::from_std(deadline);
        let late = "nothing by the deadline";
        let sender = tokio::time::timeout_at(until, self.connection()).await;
        let mut sender = match sender {
            Ok(connected) => connected.map_err(|error| self.not_sent(error))?,
            Err(_) => return Err(self.not_sent(late)),
        };
        // The process may have been stopped since; an attempt that is over must not reach the server any more.
        if Instant::now() >= deadline {
            return Err(self.not_sent(late));
        }
        let answer = async {
            let answer = match sender.try_send_request(request).await {
                Ok(answer) => answer,
                // hyper gives the request back exactly if it did not begin to write it.
                Err(mut error) => {
                    let unsent = error.take_message().is_some();
                    let why = crate::explain(error.error());
                    return Err(if unsent {
                        self.not_sent(why)
                    } else {
                        self.unanswered(why)
                    });
                }
            };
            let (head, body) = answer.into_parts();
            let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await;
            let body = body.map_err(|error| self.unanswered(error))?.to_bytes();
            Ok(HttpAnswer {
                status: head.status,
                body,
            })
        };
        let answer = match tokio::time::timeout_at(until, answer).await {
            Ok(answer) => answer?,
            Err(_) => return Err(self.unanswered(late)),
        };
        if Instant::now() >= deadline {
            return Err(self.unanswered("its answer came after the deadline"));
        }
        self.keep(sender);
        Ok(answer)
    }

    fn request(&self, method: Method, path: &str, body: Option<Vec<u8>>) -> Result<Request<Full<Bytes>>, RequestError> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, self.host.clone())
            .header(USER_AGENT, concat!("ftvm-node-daemon/", env!("CARGO_PKG_VERSION")))
            .header(ACCEPT, "application/json");
        if body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        let token = match &self.credentials {
            Credentials::Connection => None,
            Credentials::Token(token) => Some(token.clone()),
            Credentials::File(path) => {
                let read =
                    std::fs::read_to_string(path).and_then(|token| bearer(token.trim()).map_err(io::Error::other));
                Some(read.map_err(|error| self.not_sent(format!("token {}: {error}", path.display())))?)
            }
        };
        if let Some(token) = token {
            request = request.header(AUTHORIZATION, token);
        }
        request
            .body(Full::new(Bytes::from(body.unwrap_or_default())))
            .map_err(|error| self.not_sent(error))
    }

    /// A connection that was used before, or a new one.
    async fn connection(&self) -> io::Result<SendRequest<Full<Bytes>>> {
        while let Some((since, mut sender)) = self.take_idle() {
            if since.elapsed() < IDLE_TIME_MAX && sender.ready().await.is_ok() {
                return Ok(sender);
            }
        }
        let stream = TcpStream::connect(&self.address).await?;
        stream.set_nodelay(true)?;
        match &self.tls {
            None => connected(TokioIo::new(stream)).await,
            Some((connector, name)) => {
                let stream = connector.connect(name.clone(), stream).await?;
                connected(TokioIo::new(stream)).await
            }
        }
    }

    fn take_idle(&self) -> Option<(Instant, SendRequest<Full<Bytes>>)> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    fn keep(&self, sender: SendRequest<Full<Bytes>>) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < IDLE_MAX {
            idle.push((Instant::now(), sender));
        }
    }
}

async fn connected<T>(io: T) -> io::Result<SendRequest<Full<Bytes>>>
where
    T: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (sender, connection) = handshake(io).await.map_err(io::Error::other)?;
    // Ends with the connection, or when the sender is dropped.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!("connection to the API server: {error}");
        }
    });
    Ok(sender)
}

fn bearer(token: &str) -> Result<HeaderValue, hyper::header::InvalidHeaderValue> {
    let mut value = HeaderValue::from_str(&format!("Bearer {token}"))?;
    value.set_sensitive(true);
    Ok(value)
}
