//! Requests of the operator, each executed at most once.
//!
//! What was begun is remembered before it is begun: a daemon that dies in between says of it that nobody knows, and the
//! operator asks anew under another id.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ftvm_crds::seat::{DoneRequest, Order, SeatRequest};
use ftvm_engine::control::{Command, Reply};
use k8s_openapi::api::core::v1::Pod;
use serde::{Deserialize, Serialize};

use crate::explain;
use crate::seat_socket::PodSeat;
use crate::state::SeatFolder;

/// In the seat's folder.
const FILE: &str = "request.json";
/// An engine begins a command within this time.
const PATIENCE: Duration = Duration::from_secs(10);
/// A start waits this long for the seat's program and for the engine.
const START_PATIENCE: Duration = Duration::from_secs(120);

/// Ids of earlier requests that are remembered. A pod gets one at each stop, start and switchover.
const FORMER_MAX: usize = 256;

/// The last request.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Last {
    id: String,
    /// None while it is under way.
    outcome: Option<Outcome>,
    /// Those before it, oldest first: a watch may tell of an old state of the pod once more, which asks for what was done long ago.
    #[serde(default)]
    former: Vec<String>,
    /// resourceVersion of the pod that asked for it, as a number, which grows (Kubernetes API concepts, "Resource versions").
    #[serde(default, skip_serializing_if = "Option::is_none")]
    version: Option<u64>,
    /// A former one that the pod asks for once more, after the last one: it is refused. Found again by the next daemon.
    #[serde(skip)]
    again: Option<String>,
}

impl Last {
    /// The request that begins now, if none is under way and it was not begun before.
    fn next(last: Option<&Last>, id: &str, version: Option<u64>) -> Option<Last> {
        let mut former = Vec::new();
        if let Some(last) = last {
            if last.outcome.is_none() || last.id == id || last.former.iter().any(|former| former == id) {
                return None;
            }
            former.clone_from(&last.former);
            former.push(last.id.clone());
            former.drain(..former.len().saturating_sub(FORMER_MAX));
        }
        Some(Last {
            id: id.to_owned(),
            outcome: None,
            former,
            version,
            again: None,
        })
    }

    /// What the pod asks for was begun before. Whoever asks for it anew is to be told so; an old state of the pod is not answered, because
    /// the operator waits for the answer to what it asked for since.
    fn noticed_again(&mut self, id: &str, version: Option<u64>) {
        if self.outcome.is_none() || version.zip(self.version).is_some_and(|(now, known)| now < known) {
            return;
        }
        if self.id == id {
            self.again = None;
        } else if self.former.iter().any(|former| former == id) {
            self.again = Some(id.to_owned());
        } else {
            return;
        }
        self.version = version.or(self.version);
    }

    /// What is published.
    fn done(&self) -> Option<DoneRequest> {
        let refused = self.outcome.clone()?.refused;
        Some(match &self.again {
            Some(id) => DoneRequest {
                id: id.clone(),
                refused: Some("asked for before under this id: use another text".to_owned()),
            },
            None => DoneRequest {
                id: self.id.clone(),
                refused,
            },
        })
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Outcome {
    refused: Option<String>,
}

/// Requests to one seat.
pub struct Requests {
    folder: SeatFolder,
    last: Arc<Mutex<Option<Last>>>,
}

impl Requests {
    /// With the last one of an earlier daemon.
    pub fn new(folder: SeatFolder) -> Requests {
        let mut last = folder.read_json::<Last>(FILE).unwrap_or_else(|error| {
            tracing::error!("{}", explain(&error));
            None
        });
        if let Some(last) = &mut last {
            let unknown = "the daemon ended while it was under way: whether it was done is not known; see the seats' status, then ask again".to_owned();
            last.outcome.get_or_insert(Outcome { refused: Some(unknown) });
        }
        Requests {
            folder,
            last: Arc::new(Mutex::new(last)),
        }
    }

    /// The last one that came to its end, or was refused because it was begun before.
    pub fn done(&self) -> Option<DoneRequest> {
        lock(&self.last).as_ref()?.done()
    }

    /// Looks at the pod's annotation and begins what is new there.
    pub fn noticed(&self, pod: &Pod, seat: &Arc<PodSeat>) {
        let Some(annotations) = &pod.metadata.annotations else {
            return;
        };
        let request = match SeatRequest::of(annotations) {
            Ok(Some(request)) => request,
            Ok(None) => return,
            Err(error) => return tracing::warn!(seat = seat.seat.config().label(), "{error}"),
        };
        let mut last = lock(&self.last);
        let version = pod.metadata.resource_version.as_deref();
        let version = version.and_then(|version| version.parse().ok());
        let Some(begun) = Last::next(last.as_ref(), &request.id, version) else {
            if let Some(last) = &mut *last {
                last.noticed_again(&request.id, version);
            }
            return;
        };
        if let Err(error) = self.folder.write_json(FILE, &begun) {
            // Not begun; tried again when the pod is looked at next.
            return tracing::error!("{}", explain(&error));
        }
        *last = Some(begun.clone());
        drop(last);
        let (folder, shared, seat) = (self.folder.clone(), self.last.clone(), seat.clone());
        let work = move || {
            tracing::info!(
                seat = seat.seat.config().label(),
                id = request.id,
                "request: {:?}",
                request.order
            );
            let refused = execute(&seat, &request.order).err();
            let ended = Last {
                outcome: Some(Outcome { refused }),
                ..begun
            };
            if let Err(error) = folder.write_json(FILE, &ended) {
                // The next daemon says that it does not know.
                tracing::error!("{}", explain(&error));
            }
            *lock(&shared) = Some(ended);
        };
        if let Err(error) = std::thread::Builder::new().name("order".to_owned()).spawn(work) {
            let refused = Some(format!("no thread for it: {error}"));
            if let Some(last) = &mut *lock(&self.last) {
                last.outcome = Some(Outcome { refused });
            }
        }
    }
}

fn lock(last: &Mutex<Option<Last>>) -> MutexGuard<'_, Option<Last>> {
    last.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Done, or begun; or why not.
fn execute(seat: &PodSeat, order: &Order) -> Result<(), String> {
    let command = match order {
        Order::Switchover => Command::Switchover,
        Order::Stop => Command::Stop,
        Order::AcceptDataLoss {
            holder,
            term,
            over_stopped_term,
        } => {
            over_stopped_term.map_or(Ok(()), |term| start(seat, term))?;
            Command::AcceptDataLoss {
                holder: *holder,
                term: *term,
            }
        }
        Order::Start { over_stopped_term } => return start(seat, *over_stopped_term),
        Order::Failover => return seat.seat.fail().map(drop).map_err(|error| explain(&error)),
    };
    tell(seat, command)
}

fn tell(seat: &PodSeat, command: Command) -> Result<(), String> {
    match seat.seat.command(command, PATIENCE) {
        Ok(Reply::Refused { why }) => Err(why),
        Ok(_) => Ok(()),
        Err(error) => Err(explain(&error)),
    }
}

/// Over a record that says Stopped at this term (rule 7): also when the seat's pod has only just been made.
fn start(seat: &PodSeat, over_stopped_term: u64) -> Result<(), String> {
    let until = Instant::now() + START_PATIENCE;
    seat.seat.start_now();
    loop {
        match seat.seat.command(Command::Start { over_stopped_term }, PATIENCE) {
            Ok(Reply::Refused { why }) => return Err(why),
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() >= until => return Err(explain(&error)),
            // Its program is not there yet, or its engine only just starts.
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
