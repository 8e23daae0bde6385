//! The addresses at which the API server is asked, in which order, and how a connection to one of them comes about.
//!
//! A machine that dies says nothing: connections to its API server stay open, and new ones never stand. It may be the machine whose
//! guest has to be taken over, so nothing here waits long for one server alone.
//!
//! ```text
//!   first ◄── answered within TURN
//!      own addresses of the API servers, mixed          (servers.rs)
//!      the configured one, which is usually their service's, and leads to whichever of them
//!   last  ◄── an error, nothing for TURN (its idle connections are dropped), an old answer, 401, 403, 429 and 5xx
//!      those to which no connection comes about
//! ```
//!
//! A swap begins with the server that answered the read before it, wherever requests of other machines have put that one since, unless it
//! was put back: it was seen alive, and has what the swap is over.
//!
//! Connecting is a race (as in RFC 8305): an idle connection of the first one; else a new one to it, and every [`TURN`], or as soon as one
//! fails, to the next as well. Whichever stands first wins. A connection carries no request before it has won, so those that
//! lose are dropped, and nothing is ever sent twice.
//!
//! Every address is held to the name of the configured URL by TLS: a certificate of the cluster's authority with that name is the
//! API servers' alone. At a wrong address there is at most somebody who learns that we tried, and the race goes on without it.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use http_body_util::Full;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// How long one server is waited for alone. It is what RFC 8305 recommends between two attempts to connect: far longer than an
/// API server takes that is well, and an eighth of the time that an engine gives to a request by default.
pub(super) const TURN: Duration = Duration::from_millis(250);
/// Own addresses of API servers that are used; clusters have three or five.
pub(super) const OWN_MAX: usize = 8;
/// Connections of one address that are kept for the next request.
const IDLE_MAX: usize = 4;
/// A connection that was idle for longer is not used again: the server may be closing it just now.
const IDLE_TIME_MAX: Duration = Duration::from_secs(20);
/// So often at most it is told of a server that it lags behind. After a restored backup all do, with each machine's record, until that is newer
/// again.
const LAG_TOLD_EVERY: Duration = Duration::from_secs(600);

/// A connection that stands and carries no request.
pub(super) type Sender = SendRequest<Full<Bytes>>;

/// Who said something, and when.
#[derive(Debug, Clone)]
pub(super) struct Teller {
    address: String,
    at: Instant,
}

/// One address.
pub(super) struct Endpoint {
    /// Host and port.
    pub(super) address: String,
    idle: Mutex<Vec<(Instant, Sender)>>,
    /// Its failure was told; not again before it has answered.
    told: AtomicBool,
    /// The last attempt to connect came to nothing: whoever is only slow is asked before it.
    unreached: AtomicBool,
    /// When it was put back last.
    put_back: Mutex<Option<Instant>>,
    /// When it was told last that it lags behind.
    lag_told: Mutex<Option<Instant>>,
}

impl Endpoint {
    fn new(address: String) -> Arc<Endpoint> {
        Arc::new(Endpoint {
            address,
            idle: Mutex::default(),
            told: AtomicBool::new(false),
            unreached: AtomicBool::new(false),
            put_back: Mutex::default(),
            lag_told: Mutex::default(),
        })
    }

    /// Of what it has said just now.
    pub(super) fn teller(&self) -> Teller {
        Teller {
            address: self.address.clone(),
            at: Instant::now(),
        }
    }

    fn put_back(&self) -> MutexGuard<'_, Option<Instant>> {
        self.put_back.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It is this one, and was not put back since.
    fn is(&self, teller: &Teller) -> bool {
        self.address == teller.address && self.put_back().is_none_or(|at| at < teller.at)
    }

    /// It was not told for a long time that it lags behind; now it is.
    pub(super) fn lag_is_news(&self) -> bool {
        let mut told = self.lag_told.lock().unwrap_or_else(PoisonError::into_inner);
        let is_news = told.is_none_or(|at| at.elapsed() >= LAG_TOLD_EVERY);
        if is_news {
            *told = Some(Instant::now());
        }
        is_news
    }

    fn idle(&self) -> MutexGuard<'_, Vec<(Instant, Sender)>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many connections wait for the next request.
    #[cfg(test)]
    pub(super) fn idle_count(&self) -> usize {
        self.idle().len()
    }

    /// For the next request: it stood well after an answer.
    pub(super) fn keep(&self, sender: Sender) {
        let mut idle = self.idle();
        idle.retain(|(since, _)| since.elapsed() < IDLE_TIME_MAX);
        if idle.len() < IDLE_MAX {
            idle.push((Instant::now(), sender));
        }
    }

    /// A connection that was used before and still stands, as far as this side knows.
    async fn used(&self) -> Option<Sender> {
        loop {
            let (since, mut sender) = self.idle().pop()?;
            if since.elapsed() < IDLE_TIME_MAX && sender.ready().await.is_ok() {
                return Some(sender);
            }
        }
    }
}

/// All addresses, and what a connection to any of them has to prove.
pub(super) struct Endpoints {
    /// None: without TLS.
    tls: Option<(TlsConnector, ServerName<'static>)>,
    configured: Arc<Endpoint>,
    /// As they are asked; the configured one is always among them.
    order: Mutex<Vec<Arc<Endpoint>>>,
}

impl Endpoints {
    pub(super) fn new(configured: String, tls: Option<(TlsConnector, ServerName<'static>)>) -> Endpoints {
        let configured = Endpoint::new(configured);
        Endpoints {
            tls,
            order: Mutex::new(vec![configured.clone()]),
            configured,
        }
    }

    /// The configured address.
    pub(super) fn configured(&self) -> &str {
        &self.configured.address
    }

    /// As they are to be asked now.
    pub(super) fn in_order(&self) -> Vec<Arc<Endpoint>> {
        self.order().clone()
    }

    /// The same for a write over what was read: who told that comes first, unless it was put back since.
    pub(super) fn in_order_after(&self, read: &Teller) -> Vec<Arc<Endpoint>> {
        let mut order = self.in_order();
        if let Some(place) = order.iter().position(|endpoint| endpoint.is(read)) {
            order[..=place].rotate_right(1);
        }
        order
    }

    fn order(&self) -> MutexGuard<'_, Vec<Arc<Endpoint>>> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These are the API servers' own addresses from now on. What is known of those that stay stays.
    ///
    /// They come before the configured one: a connection to the service may lead to a server that has died, whose own address
    /// would then be tried in vain before another's. Mixed, so that not all daemons ask the same server.
    pub(super) fn set(&self, own: &[SocketAddr]) {
        let own: Vec<String> = own.iter().take(OWN_MAX).map(SocketAddr::to_string).collect();
        let mut order = self.order();
        let before: Vec<String> = order.iter().map(|endpoint| endpoint.address.clone()).collect();
        order.retain(|endpoint| Arc::ptr_eq(endpoint, &self.configured) || own.contains(&endpoint.address));
        let mut new: Vec<String> = own
            .iter()
            .filter(|address| !before.contains(address))
            .cloned()
            .collect();
        new.sort();
        new.dedup();
        if new.is_empty() && order.len() == before.len() {
            return;
        }
        new.sort_by_cached_key(|_| crate::random::u128());
        let configured = order
            .iter()
            .position(|endpoint| Arc::ptr_eq(endpoint, &self.configured));
        let place = configured.unwrap_or(order.len());
        order.splice(place..place, new.into_iter().map(Endpoint::new));
        tracing::info!("the API servers' own addresses: {}", own.join(", "));
    }

    /// This one is asked first from now on.
    pub(super) fn answered(&self, endpoint: &Arc<Endpoint>) {
        endpoint.unreached.store(false, Ordering::Relaxed);
        self.put(endpoint, |order| order.insert(0, endpoint.clone()));
        if endpoint.told.swap(false, Ordering::Relaxed) {
            tracing::info!("the API server at {} answers again", endpoint.address);
        }
    }

    /// It lives, and whoever is in a hurry asks another one first.
    pub(super) fn answered_late(&self, endpoint: &Arc<Endpoint>) {
        endpoint.unreached.store(false, Ordering::Relaxed);
        self.put_last(endpoint);
    }

    /// What it said is older than what was seen before.
    pub(super) fn lags(&self, teller: &Teller) {
        let order = self.in_order();
        if let Some(endpoint) = order.iter().find(|endpoint| endpoint.address == teller.address) {
            self.passed_over(endpoint);
            // Not as other faults, of which the next answer is the end: an old answer is an answer.
            if order.len() > 1 && endpoint.lag_is_news() {
                tracing::warn!("the API server at {} is asked last: it lags behind", endpoint.address);
            }
        }
    }

    /// This one is asked last from now on.
    pub(super) fn passed_over(&self, endpoint: &Arc<Endpoint>) {
        *endpoint.put_back() = Some(Instant::now());
        self.put_last(endpoint);
    }

    /// Last, but before those that can't even be reached, unless it is one of them.
    fn put_last(&self, endpoint: &Arc<Endpoint>) {
        let is_unreached = |endpoint: &Endpoint| endpoint.unreached.load(Ordering::Relaxed);
        self.put(endpoint, |order| {
            let reached = order.iter().rposition(|other| !is_unreached(other));
            let place = match is_unreached(endpoint) {
                true => order.len(),
                false => reached.map_or(0, |last| last + 1),
            };
            order.insert(place, endpoint.clone());
        });
    }

    /// Nothing came of it within its turn: it is asked last, and no connection to it is believed in that nobody uses just now. Where there is
    /// no other one, a slow server keeps its connections.
    pub(super) fn slow(&self, endpoint: &Arc<Endpoint>) {
        self.passed_over(endpoint);
        if self.order().len() > 1 {
            endpoint.idle().clear();
        }
    }

    /// No connection to it came about in its turn.
    fn unreached(&self, endpoint: &Arc<Endpoint>) {
        endpoint.unreached.store(true, Ordering::Relaxed);
        self.slow(endpoint);
    }

    /// An answer of it did not come.
    pub(super) fn failed(&self, endpoint: &Arc<Endpoint>, why: &str) {
        self.passed_over(endpoint);
        endpoint.idle().clear();
        self.tell(endpoint, why);
    }

    /// Another one answered while this one was still waited for.
    pub(super) fn outrun(&self, endpoint: &Arc<Endpoint>) {
        self.tell(endpoint, "another one answered while it was waited for");
    }

    fn tell(&self, endpoint: &Endpoint, why: &str) {
        if self.order().len() > 1 && !endpoint.told.swap(true, Ordering::Relaxed) {
            tracing::warn!("the API server at {} is asked last: {why}", endpoint.address);
        }
    }

    /// Puts it at another place, unless it is none of them any more.
    fn put(&self, endpoint: &Arc<Endpoint>, insert: impl FnOnce(&mut Vec<Arc<Endpoint>>)) {
        let mut order = self.order();
        let place = order.iter().position(|other| Arc::ptr_eq(other, endpoint));
        if let Some(place) = place {
            order.remove(place);
            insert(&mut order);
        }
    }

    /// A connection to the first of these, or to whichever of them stands first if that takes longer than its turn.
    ///
    /// # Errors
    /// Why there is none to any of them.
    pub(super) async fn connect(&self, among: &[Arc<Endpoint>]) -> Result<(Arc<Endpoint>, Sender), String> {
        let mut left = among.iter();
        let mut trying = FuturesUnordered::new();
        let mut errors = Vec::new();
        loop {
            let next = left.next();
            if let Some(endpoint) = next {
                trying.push(async move { (endpoint, self.connection(endpoint).await) });
            }
            let tried = if left.len() == 0 {
                trying.next().await
            } else if let Ok(tried) = tokio::time::timeout(TURN, trying.next()).await {
                tried
            } else {
                if let Some(endpoint) = next {
                    self.unreached(endpoint);
                }
                continue;
            };
            match tried {
                Some((endpoint, Ok(sender))) => return Ok((endpoint.clone(), sender)),
                Some((endpoint, Err(error))) => {
                    let error = error.to_string();
                    endpoint.unreached.store(true, Ordering::Relaxed);
                    // Not only slow: even where there is no other one, what others have put back meanwhile is not believed in.
                    self.failed(endpoint, &error);
                    errors.push((endpoint, error));
                }
                None => return Err(explain(errors)),
            }
        }
    }

    /// A connection that was used before, or a new one.
    async fn connection(&self, endpoint: &Endpoint) -> io::Result<Sender> {
        if let Some(sender) = endpoint.used().await {
            return Ok(sender);
        }
        let stream = TcpStream::connect(&endpoint.address).await?;
        stream.set_nodelay(true)?;
        match &self.tls {
            None => connected(TokioIo::new(stream)).await,
            Some((connector, name)) => {
                let stream = connector.connect(name.clone(), stream).await?;
                connected(TokioIo::new(stream)).await
            }
        }
    }
}

/// For people, who know which address is meant where there is but one.
fn explain(errors: Vec<(&Arc<Endpoint>, String)>) -> String {
    let several = errors.len() > 1;
    let errors = errors.into_iter().map(|(endpoint, error)| match several {
        true => format!("{}: {error}", endpoint.address),
        false => error,
    });
    errors.collect::<Vec<_>>().join("; ")
}

async fn connected<T>(io: T) -> io::Result<Sender>
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
