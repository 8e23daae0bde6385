//! Daemons of different machines ask each other about seats: TLS 1.3 both ways, with the identities of the seats.
//!
//! The asker names the seat that it wants to reach (SNI) and shows the certificate of another seat of the same virtual
//! machine. One question a connection:
//!
//! ```text
//!   asker ──► u32 length, big endian | JSON Request        only SeatReport and PeerGone
//!         ◄── u32 length, big endian | JSON Response
//! ```

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ftvm_engine::control::exit_code;
use ftvm_engine::replication::link::{TlsError, TlsIdentity};
use ftvm_protocol::identity::SeatId;
use rustls::server::Acceptor;

use crate::api::{Request, Response};

/// Askers at a time.
const ASKERS_MAX: usize = 16;
/// An asker has this long for everything.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longest message in bytes; a seat report has well under a tenth of it.
const MESSAGE_MAX: u32 = 64 * 1024;

/// Errors between daemons.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// The address can't be had.
    #[error("address {address} can't be listened on ({source}): check peer_listen, and that no other daemon has it")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The cause.
        source: io::Error,
    },
    /// Nobody answers, or the conversation broke.
    #[error("the daemon at {address} can't be asked ({source}): check daemon_address, and that it runs")]
    Broken {
        /// The address.
        address: SocketAddr,
        /// The cause.
        source: io::Error,
    },
    /// Its certificate, or ours.
    #[error("the daemon at {address}: {source}")]
    Tls {
        /// The address.
        address: SocketAddr,
        /// The cause.
        source: TlsError,
    },
}

/// A seat of this daemon that was asked for.
pub struct Asked {
    /// Its identity, which lets in those that may ask.
    pub identity: TlsIdentity,
    /// Name of its virtual machine.
    pub vm: String,
}

/// What answers askers.
pub trait Answers: Send + Sync + 'static {
    /// The seat with this name in its certificate.
    fn seat(&self, name: &str) -> Option<Asked>;
    /// The answer to what `asker`, another seat of the virtual machine `vm`, asks.
    fn answer(&self, vm: &str, asker: SeatId, request: Request) -> Response;
}

/// Listens for other daemons.
///
/// # Errors
/// If the address can't be had.
pub fn listen(address: SocketAddr) -> Result<TcpListener, PeerError> {
    TcpListener::bind(address).map_err(|source| PeerError::Bind { address, source })
}

/// Serves other daemons in threads of its own, as long as the program runs.
///
/// # Errors
/// If there is no thread.
pub fn serve(listener: TcpListener, answers: Arc<dyn Answers>) -> io::Result<()> {
    let askers = Arc::new(AtomicUsize::new(0));
    let accept = move || {
        loop {
            match listener.accept() {
                Ok((stream, from)) => welcome(stream, from, &answers, &askers),
                Err(error) => {
                    tracing::warn!("another daemon can't be heard: {error}");
                    // Out of descriptors or memory: those that are served now will end.
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    };
    std::thread::Builder::new().name("peers".to_owned()).spawn(accept)?;
    Ok(())
}

fn welcome(stream: TcpStream, from: SocketAddr, answers: &Arc<dyn Answers>, askers: &Arc<AtomicUsize>) {
    if askers.fetch_add(1, Ordering::SeqCst) >= ASKERS_MAX {
        askers.fetch_sub(1, Ordering::SeqCst);
        return tracing::warn!("{from} is not heard: {ASKERS_MAX} others are asking");
    }
    let (answers, counted) = (answers.clone(), askers.clone());
    let converse = move || {
        if let Err(error) = converse(Timed::new(stream, Instant::now() + PATIENCE), &*answers) {
            tracing::warn!("a question from {from} was not answered: {error}");
        }
        counted.fetch_sub(1, Ordering::SeqCst);
    };
    if let Err(error) = std::thread::Builder::new().name("peer".to_owned()).spawn(converse) {
        askers.fetch_sub(1, Ordering::SeqCst);
        tracing::warn!("no thread for {from}: {error}");
    }
}

fn converse(mut stream: Timed, answers: &dyn Answers) -> io::Result<()> {
    let mut acceptor = Acceptor::default();
    let accepted = loop {
        if acceptor.read_tls(&mut stream)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match acceptor.accept() {
            Ok(Some(accepted)) => break accepted,
            Ok(None) => {}
            Err((error, mut alert)) => {
                // Whoever does not speak TLS may not hear it either.
                let _ = alert.write_all(&mut stream);
                return Err(io::Error::other(error));
            }
        }
    };
    let name = accepted.client_hello().server_name().unwrap_or_default().to_owned();
    let asked = answers.seat(&name);
    let asked = asked.ok_or_else(|| io::Error::other(format!("seat {name:?} is not here")))?;
    let mut tls = match accepted.into_connection(asked.identity.server_config()) {
        Ok(connection) => connection,
        Err((error, mut alert)) => {
            let _ = alert.write_all(&mut stream);
            return Err(io::Error::other(error));
        }
    };
    let request = read_message(&mut rustls::Stream::new(&mut tls, &mut stream))?;
    let certificates = tls.peer_certificates().unwrap_or_default();
    let asker = asked.identity.seat_of(certificates).map_err(io::Error::other)?;
    let response = match request {
        request @ (Request::SeatReport { .. } | Request::PeerGone { .. }) => answers.answer(&asked.vm, asker, request),
        other => Response::Refused {
            code: exit_code::REFUSED,
            message: format!("another daemon may not ask for {other:?}"),
        },
    };
    write_message(&mut rustls::Stream::new(&mut tls, &mut stream), &response)?;
    tls.send_close_notify();
    tls.write_tls(&mut stream).map(drop)
}

/// Asks the daemon at `address`, as the seat whose identity this is, for its seat `seat`.
///
/// # Errors
/// If it can't be reached, is not that seat's, or does not answer until `until`.
pub fn ask(
    own: &TlsIdentity,
    seat: SeatId,
    address: SocketAddr,
    request: &Request,
    until: Instant,
) -> Result<Response, PeerError> {
    let broken = |source| PeerError::Broken { address, source };
    let mut tls = own.client(seat).map_err(|source| PeerError::Tls { address, source })?;
    let patience = until.saturating_duration_since(Instant::now());
    // Zero would mean no limit.
    let stream = TcpStream::connect_timeout(&address, patience.max(Duration::from_millis(1))).map_err(broken)?;
    let mut stream = Timed::new(stream, until);
    let mut stream = rustls::Stream::new(&mut tls, &mut stream);
    write_message(&mut stream, request).map_err(broken)?;
    read_message(&mut stream).map_err(broken)
}

fn write_message(stream: &mut impl Write, message: &impl serde::Serialize) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    let len = u32::try_from(text.len()).ok().filter(|len| *len <= MESSAGE_MAX);
    let len = len.ok_or_else(|| io::Error::other(format!("a message of {} bytes is too long", text.len())))?;
    stream.write_all(&len.to_be_bytes())?;
    stream.write_all(&text)?;
    stream.flush()
}

fn read_message<T: serde::de::DeserializeOwned>(stream: &mut impl Read) -> io::Result<T> {
    let mut len = [0; 4];
    stream.read_exact(&mut len)?;
    let len = u32::from_be_bytes(len);
    if len > MESSAGE_MAX {
        return Err(io::Error::other(format!("a message of {len} bytes is too long")));
    }
    let mut text = vec![0; len as usize];
    stream.read_exact(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

/// A connection that ends at a given time, however slowly the other side talks.
struct Timed {
    stream: TcpStream,
    until: Instant,
}

impl Timed {
    fn new(stream: TcpStream, until: Instant) -> Self {
        Self { stream, until }
    }

    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(Some(left))
    }
}

impl Read for Timed {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(bytes)
    }
}

impl Write for Timed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

#[cfg(test)]
#[path = "peer_tests.rs"]
mod tests;
