//! Requests to the API server. What may change something is sent at most once.
//!
//! A client of its own, because the outcome of a swap depends on a question that general clients do not answer: has anything
//! of the request left? Here it has exactly if hyper took it for its connection. There are no retries, no redirects and no
//! caches; a connection is used again only if it stood well after the last answer. Which server is asked: `endpoints`.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::{BoxFuture, Either, select};
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, HeaderMap, HeaderValue, RETRY_AFTER, USER_AGENT};
use hyper::{Method, Request, StatusCode, Uri};
use rustls::pki_types::ServerName;
use tokio::time::timeout_at;
use tokio_rustls::TlsConnector;

use super::endpoints::{Endpoint, Endpoints, Sender, TURN, Teller};

/// Longest answer; a Lease has a few hundred bytes.
const ANSWER_BYTES_MAX: usize = 1 << 20;
/// A server that has too much to do is asked again after this time at the latest. It is the shortest that servers can say in seconds: who says
/// more is asked earlier than it would like, for a takeover may wait for it.
const WAIT_MAX: Duration = Duration::from_secs(1);
/// What is said of a deadline.
const LATE: &str = "nothing by the deadline";

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
    /// Who said it.
    pub(super) teller: Teller,
    /// When it may be asked again, if it has too much to do now.
    wait: Option<Duration>,
}

/// What a request came to.
pub(super) type Outcome = Result<HttpAnswer, RequestError>;

impl HttpAnswer {
    /// The server says that it can't do now, or not at all, what another one may be able to do. One that has just begun, or that can't ask
    /// who vouches for us, takes us for nobody.
    fn is_refusal_to_work(&self) -> bool {
        let of_us = [
            StatusCode::TOO_MANY_REQUESTS,
            StatusCode::UNAUTHORIZED,
            StatusCode::FORBIDDEN,
        ];
        self.status.is_server_error() || of_us.contains(&self.status)
    }
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

/// The API server: one for us, however many addresses it has.
pub struct Server {
    pub(super) endpoints: Endpoints,
    host: HeaderValue,
    /// Whoever answers has proven to be the API server.
    verifies: bool,
    credentials: Credentials,
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
        let address = format!("{host}:{port}");
        Ok(Server {
            host: HeaderValue::from_str(&address).map_err(|error| refuse(error.to_string()))?,
            verifies: encrypted && !config.accept_invalid_certs,
            endpoints: Endpoints::new(address, tls),
            credentials,
        })
    }

    /// The API servers' own addresses, beside the configured one. Nothing is taken back by an empty list: it is no news of any
    /// server. Where nobody has to prove who he is they are not used, for they are given the same token.
    pub fn know(&self, own: &[SocketAddr]) {
        if self.verifies && !own.is_empty() {
            self.endpoints.set(own);
        }
    }

    /// Where it is asked, in this order.
    pub fn addresses(&self) -> Vec<String> {
        let order = self.endpoints.in_order();
        order.iter().map(|endpoint| endpoint.address.clone()).collect()
    }

    fn not_sent(&self, why: impl ToString) -> RequestError {
        RequestError::NotSent {
            server: self.endpoints.configured().to_owned(),
            why: why.to_string(),
        }
    }

    /// Reads something; what is not there at the deadline does not count any more.
    ///
    /// # Errors
    /// [`RequestError`] says whether anything was sent.
    pub async fn read(&self, path: &str, deadline: Instant) -> Outcome {
        let request = self.request(Method::GET, path, None)?;
        self.read_among(request, self.endpoints.in_order(), deadline).await
    }

    /// Writes something over what was `read`: to one server and no other, and for as long as the caller waits. It is the one that has just
    /// been found alive by that read (rule 2), unless it was put back since; so a shorter time would save little, and leave in doubt what a
    /// slow one would have told.
    ///
    /// # Errors
    /// [`RequestError`] says whether anything was sent.
    pub(super) async fn write(&self, path: &str, body: Vec<u8>, read: &Teller, deadline: Instant) -> Outcome {
        let request = self.request(Method::PUT, path, Some(body))?;
        let order = self.endpoints.in_order_after(read);
        let (endpoint, sender) = self.connect(&order, deadline).await?;
        self.send(&endpoint, sender, request, deadline).await
    }

    /// What this one said is older than what was seen before: another one may know better.
    pub(super) fn lags(&self, teller: &Teller) {
        self.endpoints.lags(teller);
    }

    /// A read of the first of these; and of the others, if it has not answered within its turn, or says that it can't.
    ///
    /// This is where a server that died is noticed: an engine reads, then swaps, each within its deadline. A read that waited for one
    /// server alone would cost a takeover that whole deadline. Rule 2 wants a read that is made in this attempt and past every cache. Each of
    /// these is, whoever answers it, and none of them changes anything, however late it arrives.
    fn read_among(
        &self,
        request: Request<Full<Bytes>>,
        among: Vec<Arc<Endpoint>>,
        deadline: Instant,
    ) -> BoxFuture<'_, Outcome> {
        async move {
            let (endpoint, sender) = self.connect(&among, deadline).await?;
            let others = among.into_iter().filter(|other| !Arc::ptr_eq(other, &endpoint));
            let others: Vec<_> = others.collect();
            let mut first = pin!(self.send(&endpoint, sender, request.clone(), deadline));
            if others.is_empty() {
                let outcome = first.await;
                return self.again(&endpoint, outcome, request, deadline).await;
            }
            match tokio::time::timeout(TURN, &mut first).await {
                Ok(outcome) if is_of_use(&outcome) => outcome,
                Ok(outcome) => {
                    let again = pin!(self.again(&endpoint, outcome, request.clone(), deadline));
                    match select(again, self.read_among(request, others, deadline)).await {
                        Either::Left((outcome, rest)) => or(outcome, rest).await,
                        Either::Right((outcome, rest)) => or(outcome, rest).await,
                    }
                }
                Err(_) => match select(first, self.read_among(request, others, deadline)).await {
                    Either::Left((outcome, rest)) => or(outcome, rest).await,
                    Either::Right((outcome, rest)) => {
                        if is_of_use(&outcome) {
                            self.endpoints.outrun(&endpoint);
                        }
                        or(outcome, rest).await
                    }
                },
            }
        }
        .boxed()
    }

    /// This outcome of a read; or, if the server has too much to do, what it says when it may be asked again. Once: it is not to be asked
    /// more often than it likes by all machines of a node, and the caller has a deadline. Others are asked meanwhile.
    async fn again(
        &self,
        endpoint: &Arc<Endpoint>,
        outcome: Outcome,
        request: Request<Full<Bytes>>,
        deadline: Instant,
    ) -> Outcome {
        let Some(wait) = outcome.as_ref().ok().and_then(|answer| answer.wait) else {
            return outcome;
        };
        // Not all at the same time.
        let percent = u32::try_from(crate::random::u128() % 100).unwrap_or_default();
        let wait = wait.min(WAIT_MAX) + TURN * percent / 100;
        if Instant::now() + wait >= deadline {
            return outcome;
        }
        tokio::time::sleep(wait).await;
        let (endpoint, sender) = self.connect(std::slice::from_ref(endpoint), deadline).await?;
        self.send(&endpoint, sender, request, deadline).await
    }

    async fn connect(
        &self,
        among: &[Arc<Endpoint>],
        deadline: Instant,
    ) -> Result<(Arc<Endpoint>, Sender), RequestError> {
        match timeout_at(deadline.into(), self.endpoints.connect(among)).await {
            Ok(connected) => connected.map_err(|why| self.not_sent(why)),
            Err(_) => Err(self.not_sent(LATE)),
        }
    }

    /// Gives a request to this connection.
    async fn send(
        &self,
        endpoint: &Arc<Endpoint>,
        mut sender: Sender,
        request: Request<Full<Bytes>>,
        deadline: Instant,
    ) -> Outcome {
        // The process may have been stopped since; an attempt that is over must not reach the server any more.
        if Instant::now() >= deadline {
            return Err(self.not_sent(LATE));
        }
        let until = deadline.into();
        let turn = (tokio::time::Instant::now() + TURN).min(until);
        let mut late = false;
        let outcome = {
            let mut answer = pin!(exchange(endpoint, &mut sender, request));
            match timeout_at(turn, &mut answer).await {
                Ok(outcome) => outcome,
                Err(_) => {
                    // Others need not wait for it, too.
                    self.endpoints.slow(endpoint);
                    late = true;
                    let outcome = timeout_at(until, answer).await;
                    outcome.unwrap_or_else(|_| Err(unanswered(endpoint, LATE)))
                }
            }
        };
        let outcome = match outcome {
            Ok(_) if Instant::now() >= deadline => Err(unanswered(endpoint, "its answer came after the deadline")),
            outcome => outcome,
        };
        match &outcome {
            Ok(answer) => {
                match (answer.is_refusal_to_work(), late) {
                    (true, _) => self.endpoints.passed_over(endpoint),
                    (false, true) => self.endpoints.answered_late(endpoint),
                    (false, false) => self.endpoints.answered(endpoint),
                }
                endpoint.keep(sender);
            }
            Err(RequestError::NotSent { why, .. } | RequestError::Unanswered { why, .. }) => {
                self.endpoints.failed(endpoint, why);
            }
        }
        outcome
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
}

/// Sends one request over one connection and reads the answer.
async fn exchange(endpoint: &Endpoint, sender: &mut Sender, request: Request<Full<Bytes>>) -> Outcome {
    let answer = match sender.try_send_request(request).await {
        Ok(answer) => answer,
        // hyper gives the request back exactly if it did not begin to write it.
        Err(mut error) => {
            let unsent = error.take_message().is_some();
            let why = crate::explain(error.error());
            return Err(if unsent {
                RequestError::NotSent {
                    server: endpoint.address.clone(),
                    why,
                }
            } else {
                unanswered(endpoint, why)
            });
        }
    };
    let (head, body) = answer.into_parts();
    let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await;
    let body = body.map_err(|error| unanswered(endpoint, error))?.to_bytes();
    let is_busy = head.status == StatusCode::TOO_MANY_REQUESTS;
    Ok(HttpAnswer {
        status: head.status,
        body,
        teller: endpoint.teller(),
        wait: is_busy.then(|| retry_after(&head.headers)),
    })
}

/// When a server that has too much to do may be asked again. A date, or nothing, is no time.
fn retry_after(headers: &HeaderMap) -> Duration {
    let seconds = headers
        .get(RETRY_AFTER)
        .and_then(|value| value.to_str().ok()?.trim().parse().ok());
    seconds.map_or(WAIT_MAX, Duration::from_secs)
}

fn unanswered(endpoint: &Endpoint, why: impl ToString) -> RequestError {
    RequestError::Unanswered {
        server: endpoint.address.clone(),
        why: why.to_string(),
    }
}

/// Another server would not say it better.
fn is_of_use(outcome: &Outcome) -> bool {
    outcome.as_ref().is_ok_and(|answer| !answer.is_refusal_to_work())
}

/// This outcome of a read, if it is of use, or else the other one.
async fn or(outcome: Outcome, other: impl Future<Output = Outcome>) -> Outcome {
    if is_of_use(&outcome) {
        return outcome;
    }
    // An answer says more than none.
    other.await.or_else(|error| outcome.or(Err(error)))
}

fn bearer(token: &str) -> Result<HeaderValue, hyper::header::InvalidHeaderValue> {
    let mut value = HeaderValue::from_str(&format!("Bearer {token}"))?;
    value.set_sensitive(true);
    Ok(value)
}
