//! Requests of the operator, each executed at most once.
//!
//! What was begun is remembered before it is begun: a daemon that dies in between says of it that nobody knows, and the
//! operator asks anew under another id.
//!
//! A failure is begun only if the pod still asks for it, whatever a watch says that lags: that it is begun is written over exactly the version
//! that asks.
//!
//! ```text
//!   pod asks ─► in time by this clock ─► `begun` over that version ─┬─► landed ─► remembered ─► killed, or why not
//!                  └─ no: refused                                   ├─► somebody wrote the pod: looked at anew
//!                                                                   └─► taken back: refused
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ftvm_crds::seat::{DoneRequest, FAILOVER_WITHIN, Order, SeatRequest};
use ftvm_engine::control::{AcceptedLoss, Command, Reply, Role, Status};
use ftvm_protocol::identity::Incarnation;
use k8s_openapi::api::core::v1::Pod;
use serde::{Deserialize, Serialize};

use super::publish::unix_ms;
use crate::explain;
use crate::seat_socket::PodSeat;
use crate::state::SeatFolder;

/// In the seat's folder.
const FILE: &str = "request.json";
/// An engine begins a command within this time.
const PATIENCE: Duration = Duration::from_secs(10);
/// A start waits this long for the seat's program and for the engine.
const START_PATIENCE: Duration = Duration::from_secs(120);
/// So long it is waited for what an engine decides of a loss that was accepted: it asks the arbiter and other daemons, some seconds each.
const LOSS_PATIENCE: Duration = Duration::from_secs(30);
/// It is looked at that so often.
const LOSS_LOOK: Duration = Duration::from_millis(250);
/// That a failure may begin counts for so long from when it was asked for: the process may have stood still since.
const GRANT: Duration = Duration::from_secs(10);
/// A node's clock that is further behind the operator's proves nothing of the time in which a failure is meant.
const CLOCKS_APART: Duration = Duration::from_secs(30);
/// The answer to what nobody wants any more.
const TAKEN_BACK: &str =
    "taken back before its daemon began it: nothing was done; for another failover ask with another text";

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
    /// Why an earlier attempt at the same was refused: told for as long as this one is under way, so that it is told once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    before: Option<DoneRequest>,
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
            before: last
                .and_then(Last::done)
                .filter(|done| done.refused.is_some() && wish(&done.id) == wish(id)),
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
        let Some(Outcome { refused }) = self.outcome.clone() else {
            return self.before.clone();
        };
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

/// What is wished for, of the id of one of several attempts at it (`WISH~NUMBER-SECONDS`).
fn wish(id: &str) -> &str {
    id.split('~').next().unwrap_or(id)
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Outcome {
    refused: Option<String>,
}

/// A failure that the pod asks for, and that is not begun: whether it may be.
#[derive(Debug)]
struct Claim {
    id: String,
    /// resourceVersion of a pod that asks for it.
    version: String,
    /// Somebody changed the pod since.
    is_old: bool,
    /// When the write was sent that has landed over a version that asks for it.
    granted: Option<Instant>,
}

#[derive(Debug, Default)]
struct Books {
    last: Option<Last>,
    claim: Option<Claim>,
    /// The failure that is being brought about.
    failing: Option<String>,
}

impl Books {
    /// Does the pod still ask for this failure, past every cache? If that is not known, it is to be written over this version of it.
    fn may_begin(&mut self, id: &str, version: &str) -> bool {
        if version.is_empty() {
            // A write over it would be one over any.
            return false;
        }
        if let Some(claim) = self.claim.as_ref().filter(|claim| claim.id == id) {
            match claim.granted {
                Some(sent) if sent.elapsed() <= GRANT => return true,
                None if claim.version == version => return false,
                Some(_) | None => {}
            }
        }
        self.claim = Some(Claim {
            id: id.to_owned(),
            version: version.to_owned(),
            is_old: false,
            granted: None,
        });
        false
    }

    fn told(&self) -> Told {
        // What is to be written over a version that the pod does not have any more would come to nothing.
        let claim = self.claim.as_ref().filter(|claim| !claim.is_old);
        Told {
            begun: claim.map(|claim| claim.id.clone()).or_else(|| self.failing.clone()),
            over: claim
                .filter(|claim| claim.granted.is_none())
                .map(|claim| claim.version.clone()),
            done: self.last.as_ref().and_then(Last::done),
        }
    }
}

/// What is published of a seat's requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// The failure that is brought about, or is about to be.
    pub begun: Option<String>,
    /// That is to be written over this version of the pod and no other; none: it was.
    pub over: Option<String>,
    /// The last request that came to its end, or was refused because it was begun before.
    pub done: Option<DoneRequest>,
}

/// Requests to one seat.
pub struct Requests {
    folder: SeatFolder,
    books: Arc<Mutex<Books>>,
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
            books: Arc::new(Mutex::new(Books {
                last,
                ..Books::default()
            })),
        }
    }

    /// What is to be published.
    pub fn told(&self) -> Told {
        lock(&self.books).told()
    }

    /// That this failure is begun was written over a version of the pod that asks for it, by a request that was sent then: it is, by the next look.
    pub fn granted(&self, id: &str, sent: Instant) {
        if let Some(claim) = lock(&self.books).claim.as_mut().filter(|claim| claim.id == id) {
            claim.granted = Some(sent);
        }
    }

    /// The pod has another version than this one by now: the next one that is seen says whether it still asks.
    pub fn outrun(&self, id: &str, version: &str) {
        let mut books = lock(&self.books);
        let claim = books.claim.as_mut();
        if let Some(claim) = claim.filter(|claim| claim.id == id && claim.version == version) {
            claim.is_old = true;
        }
    }

    /// Looks at the pod's annotation and begins what is new there.
    pub fn noticed(&self, pod: &Pod, seat: &Arc<PodSeat>) {
        let annotations = pod.metadata.annotations.as_ref();
        let asked = annotations.map_or(Ok(None), SeatRequest::of);
        let mut books = lock(&self.books);
        let request = match asked {
            Ok(Some(request)) => request,
            Ok(None) => {
                books.claim = None;
                return;
            }
            Err(error) => {
                books.claim = None;
                return tracing::warn!(seat = seat.seat.config().label(), "{error}");
            }
        };
        if books.claim.as_ref().is_some_and(|claim| claim.id != request.id) {
            books.claim = None;
        }
        let version = pod.metadata.resource_version.as_deref().unwrap_or_default();
        let number = version.parse().ok();
        let Some(next) = Last::next(books.last.as_ref(), &request.id, number) else {
            if let Some(last) = &mut books.last {
                last.noticed_again(&request.id, number);
            }
            return;
        };
        let refused = match request.order {
            Order::TakeBack => Some(TAKEN_BACK.to_owned()),
            Order::Failover => match timely(request.until_unix_ms, unix_ms()) {
                Ok(()) if !books.may_begin(&request.id, version) => return,
                in_time => in_time.err(),
            },
            Order::Switchover | Order::Stop | Order::Start { .. } | Order::AcceptDataLoss { .. } => None,
        };
        // Should it not be remembered, whether the pod asks for it is to be found out anew.
        books.claim = None;
        let begun = Last {
            outcome: refused.map(|why| Outcome { refused: Some(why) }),
            ..next
        };
        if let Err(error) = self.folder.write_json(FILE, &begun) {
            // Not begun; tried again when the pod is looked at next.
            return tracing::error!("{}", explain(&error));
        }
        let answered = begun.outcome.is_some();
        books.last = Some(begun.clone());
        if !answered {
            books.failing = (request.order == Order::Failover).then(|| request.id.clone());
            drop(books);
            self.begin(request, begun, seat);
        }
    }

    /// Does it in a thread of its own: an engine may take its time.
    fn begin(&self, request: SeatRequest, begun: Last, seat: &Arc<PodSeat>) {
        let (folder, shared, seat) = (self.folder.clone(), self.books.clone(), seat.clone());
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
            let mut books = lock(&shared);
            books.last = Some(ended);
            books.failing = None;
        };
        if let Err(error) = std::thread::Builder::new().name("order".to_owned()).spawn(work) {
            let refused = Some(format!("no thread for it: {error}"));
            let mut books = lock(&self.books);
            books.failing = None;
            if let Some(last) = &mut books.last {
                last.outcome = Some(Outcome { refused });
            }
        }
    }
}

fn lock(books: &Mutex<Books>) -> MutexGuard<'_, Books> {
    books.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Is a failure still meant, as far as this clock tells? It only ever refuses: where it is wrong, the operator takes back what is too late.
fn timely(until_unix_ms: Option<u64>, now_unix_ms: u64) -> Result<(), String> {
    let Some(until) = until_unix_ms else { return Ok(()) };
    let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let seconds = |later: u64, earlier: u64| later.saturating_sub(earlier).div_ceil(1000);
    if now_unix_ms > until {
        return Err(format!(
            "too late: by this node's clock it was meant until {} s ago, so nothing was done; for another failover ask with another text",
            seconds(now_unix_ms, until)
        ));
    }
    let asked = until.saturating_sub(ms(FAILOVER_WITHIN));
    if asked.saturating_sub(now_unix_ms) > ms(CLOCKS_APART) {
        return Err(format!(
            "this node's clock is {} s behind that of the operator's node, so that nobody knows until when it is meant, and nothing was done: set them, then ask with another text",
            seconds(asked, now_unix_ms)
        ));
    }
    Ok(())
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
            let (holder, term) = (*holder, *term);
            return accept_loss(seat, Command::AcceptDataLoss { holder, term });
        }
        Order::Start { over_stopped_term } => return start(seat, *over_stopped_term),
        Order::Failover => return seat.seat.fail().map(drop).map_err(|error| explain(&error)),
        Order::TakeBack => return Err(TAKEN_BACK.to_owned()),
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

/// An engine that takes the command has not decided: it asks the arbiter, and the other seats' daemons for their proof.
fn accept_loss(seat: &PodSeat, command: Command) -> Result<(), String> {
    let told = seat.seat.incarnation();
    tell(seat, command)?;
    let until = Instant::now() + LOSS_PATIENCE;
    loop {
        let status = seat.seat.engine_status(PATIENCE);
        if let Some(word) = final_word(told, seat.seat.incarnation(), status.as_ref()) {
            return word;
        }
        if Instant::now() >= until {
            let why = status.map_or_else(|| "it does not answer".to_owned(), |status| status.why);
            return Err(format!(
                "its engine has not decided within {} s, and goes on ({why})",
                LOSS_PATIENCE.as_secs()
            ));
        }
        std::thread::sleep(LOSS_LOOK);
    }
}

/// What came of a loss that the engine `told` was to accept; none: it has not decided. The engine that runs now says `status`.
fn final_word(
    told: Option<Incarnation>,
    runs: Option<Incarnation>,
    status: Option<&Status>,
) -> Option<Result<(), String>> {
    let ended = || {
        Some(Err(
            "its engine ended before it had decided: see why in its log".to_owned()
        ))
    };
    if runs != told {
        return ended();
    }
    let status = status?;
    // One that is about to go boots no more: its successor is to be asked.
    if Some(status.incarnation) != told || status.role == Role::Ended {
        return ended();
    }
    if status.role != Role::Starting {
        return Some(Ok(()));
    }
    match &status.accepted_loss {
        Some(AcceptedLoss::UnderWay) => None,
        Some(AcceptedLoss::Refused { why }) => Some(Err(why.clone())),
        // An earlier version does not tell: begun, as far as anybody knows.
        None => Some(Ok(())),
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
