//! The client: one connection, never renewed, watched answer by answer.
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::latency::Histogram;
use super::ledger::{Findings, Ledger};
use crate::guest_protocol::{ANSWER_BYTES, Answer, Op, Request, fill_bulk};

/// How the client behaves.
#[derive(Clone, Debug)]
pub struct JudgePlan {
    /// Where the guest listens.
    pub guest: SocketAddr,
    /// How long to try for the first connection, while the guest boots. Once it stands it is never renewed.
    pub connect_within: Duration,
    /// Requests that are sent ahead in pipelined stretches; stretches of one at a time alternate with them.
    pub pipeline: usize,
    /// Without any answer for this long the connection counts as dead.
    pub stalled_after: Duration,
    /// Size of the payloads that go along now and then, in bytes.
    pub payload_bytes: u64,
    /// Whether journal requests are sent: the guest needs a disk for them.
    pub journal: bool,
}

impl JudgePlan {
    /// The usual behaviour towards the guest at `guest`.
    pub fn new(guest: SocketAddr) -> Self {
        Self {
            guest,
            connect_within: Duration::from_secs(60),
            pipeline: 8,
            stalled_after: Duration::from_secs(30),
            payload_bytes: 8 << 10,
            journal: true,
        }
    }
}

/// Why the client ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "how", rename_all = "snake_case")]
pub enum End {
    /// It was told to.
    Told,
    /// No first connection came about.
    NoConnection {
        /// The last error.
        why: String,
    },
    /// The connection ended: an error, or the guest's side closed it.
    Broken {
        /// What happened.
        why: String,
    },
    /// No answer for [`JudgePlan::stalled_after`].
    Stalled,
}

/// What the client says at its end.
#[derive(Debug)]
pub struct Outcome {
    /// Why it ended.
    pub end: End,
    /// The books, also for [`Ledger::inspect`].
    pub ledger: Ledger,
    /// Answers received.
    pub answers: u64,
    /// Requests that were sent and never answered.
    pub unanswered: u64,
    /// Time from request to answer, of every request.
    pub latency: Histogram,
}

impl Outcome {
    /// What was found.
    pub fn findings(&self) -> &Findings {
        self.ledger.findings()
    }

    /// True if the connection stood to the end, every request was answered and every answer was true.
    pub fn is_clean(&self) -> bool {
        self.end == End::Told && self.unanswered == 0 && self.answers > 0 && self.findings().is_clean()
    }

    /// What is wrong, one line each.
    pub fn complaints(&self) -> Vec<String> {
        let mut lines: Vec<String> = self
            .findings()
            .complaints()
            .into_iter()
            .map(|(what, count)| format!("{count} {what}"))
            .collect();
        match &self.end {
            End::Told => {}
            End::NoConnection { why } => lines.push(format!("the guest could not be reached: {why}")),
            End::Broken { why } => lines.push(format!("the connection broke: {why}")),
            End::Stalled => lines.push("the guest stopped answering".to_owned()),
        }
        if self.unanswered > 0 {
            lines.push(format!("{} requests without an answer", self.unanswered));
        }
        lines
    }
}

/// What happened from one call of [`Judge::phase`] to the next.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct PhaseReport {
    /// How long it lasted, in milliseconds.
    pub length_ms: f64,
    /// Answers received.
    pub answers: u64,
    /// Longest time without an answer while requests were open, in milliseconds. A wait counts where it ends; one that
    /// has not ended counts as far as it got.
    pub gap_ms: f64,
}

/// What the owner of the judge may see while it runs: what was found, and the clock of gaps.
#[derive(Debug)]
struct Watch {
    findings: Findings,
    phase_since: Instant,
    answers: u64,
    longest: Duration,
    /// Since when an answer is waited for; none while nothing is asked.
    waiting_since: Option<Instant>,
}

impl Watch {
    fn new(now: Instant) -> Self {
        Self {
            findings: Findings::default(),
            phase_since: now,
            answers: 0,
            longest: Duration::ZERO,
            waiting_since: None,
        }
    }

    fn asked(&mut self, now: Instant) {
        self.waiting_since.get_or_insert(now);
    }

    fn answered(&mut self, now: Instant, more_open: bool) {
        self.answers += 1;
        if let Some(since) = self.waiting_since {
            self.longest = self.longest.max(now.saturating_duration_since(since));
        }
        self.waiting_since = more_open.then_some(now);
    }

    fn turn(&mut self, now: Instant) -> PhaseReport {
        let open = self
            .waiting_since
            .map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        let report = PhaseReport {
            length_ms: milliseconds(now.saturating_duration_since(self.phase_since)),
            answers: self.answers,
            gap_ms: milliseconds(self.longest.max(open)),
        };
        *self = Self {
            waiting_since: self.waiting_since,
            ..Self::new(now)
        };
        report
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// What the owner of the judge can ask of it.
enum Order {
    /// Answer everything that is open, then send this one request, then be quiet.
    Ask {
        op: Op,
        arg: u64,
        arg2: u64,
        reply: SyncSender<Answer>,
    },
    /// Answer everything that is open, then be quiet.
    Quiet { reply: SyncSender<()> },
    /// Send requests again.
    GoOn,
    /// Answer everything that is open, then end.
    Finish,
}

/// A running client.
#[derive(Debug)]
pub struct Judge {
    orders: Sender<Order>,
    watch: Arc<Mutex<Watch>>,
    answers: Arc<AtomicU64>,
    ended: Arc<AtomicBool>,
    thread: JoinHandle<Outcome>,
}

impl std::fmt::Debug for Order {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Ask { .. } => "Ask",
            Self::Quiet { .. } => "Quiet",
            Self::GoOn => "GoOn",
            Self::Finish => "Finish",
        })
    }
}

impl Judge {
    /// Starts the client on a thread of its own, which first calls `entrance` (to move to where the client stands).
    pub fn start<E: std::fmt::Display>(
        plan: JudgePlan,
        entrance: impl FnOnce() -> Result<(), E> + Send + 'static,
    ) -> io::Result<Self> {
        let (orders, orders_of_client) = mpsc::channel();
        let watch = Arc::new(Mutex::new(Watch::new(Instant::now())));
        let (answers, ended) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let shared = (Arc::clone(&watch), Arc::clone(&answers), Arc::clone(&ended));
        let thread = std::thread::Builder::new().name("judge".to_owned()).spawn(move || {
            let (watch, answers, ended) = shared;
            let stream = entrance()
                .map_err(|error| error.to_string())
                .and_then(|()| connect(&plan));
            let outcome = match stream {
                Ok(stream) => Client::new(plan, stream, orders_of_client, watch, answers).run(),
                Err(why) => nothing(End::NoConnection { why }),
            };
            ended.store(true, Ordering::Release);
            outcome
        })?;
        Ok(Self {
            orders,
            watch,
            answers,
            ended,
            thread,
        })
    }

    /// Answers received so far.
    pub fn answers(&self) -> u64 {
        self.answers.load(Ordering::Relaxed)
    }

    /// True once the client has ended, for whatever reason.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Ends the current phase and reports on it.
    pub fn phase(&self) -> PhaseReport {
        lock(&self.watch).turn(Instant::now())
    }

    /// What was found so far.
    pub fn findings(&self) -> Findings {
        lock(&self.watch).findings.clone()
    }

    /// How long an answer is being waited for at the moment.
    pub fn waiting(&self) -> Duration {
        lock(&self.watch)
            .waiting_since
            .map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// Sends one request on the connection after everything else was answered, and waits for the answer; no further
    /// requests follow until [`Judge::go_on`]. None if the client ended before.
    pub fn ask(&self, op: Op, arg: u64, arg2: u64) -> Option<Answer> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.orders.send(Order::Ask { op, arg, arg2, reply }).ok()?;
        answer.recv().ok()
    }

    /// Waits until everything was answered, and sends nothing more until [`Judge::go_on`]. False if the client ended.
    pub fn quiet(&self) -> bool {
        let (reply, done) = mpsc::sync_channel(1);
        self.orders.send(Order::Quiet { reply }).is_ok() && done.recv().is_ok()
    }

    /// Sends requests again.
    pub fn go_on(&self) {
        // A client that has ended says so in its outcome.
        self.orders.send(Order::GoOn).ok();
    }

    /// Waits for the answers that are open, and ends.
    pub fn finish(self) -> Outcome {
        self.orders.send(Order::Finish).ok();
        self.thread.join().unwrap_or_else(|_| {
            nothing(End::Broken {
                why: "the judge's thread panicked".to_owned(),
            })
        })
    }
}

/// Asks the guest for its state on a connection of its own: for [`Ledger::inspect`], after the judge has ended.
pub fn inspect(guest: SocketAddr, within: Duration) -> io::Result<Answer> {
    let plan = JudgePlan {
        connect_within: within,
        ..JudgePlan::new(guest)
    };
    let mut stream = connect(&plan).map_err(io::Error::other)?;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(within))?;
    stream.write_all(&Request::new(Op::Status, 0, 0, 0).encode())?;
    let mut bytes = [0; ANSWER_BYTES];
    stream.read_exact(&mut bytes)?;
    Answer::decode(&bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

fn nothing(end: End) -> Outcome {
    Outcome {
        end,
        ledger: Ledger::new(1),
        answers: 0,
        unanswered: 0,
        latency: Histogram::default(),
    }
}

fn lock(watch: &Mutex<Watch>) -> MutexGuard<'_, Watch> {
    watch.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The first connection; a guest that still boots refuses it or does not answer.
fn connect(plan: &JudgePlan) -> Result<TcpStream, String> {
    let deadline = Instant::now() + plan.connect_within;
    loop {
        let error = match TcpStream::connect_timeout(&plan.guest, Duration::from_secs(1)) {
            Ok(stream) => {
                // How this program waits is no property of the connection.
                stream.set_nonblocking(true).map_err(|error| error.to_string())?;
                return Ok(stream);
            }
            Err(error) => error,
        };
        if Instant::now() > deadline {
            return Err(format!(
                "no connection to {} within {:?}: {error}",
                plan.guest, plan.connect_within
            ));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What the client does besides answering what is open.
enum Mode {
    Load,
    Quiet,
    Finish,
}

/// A request that is open, beside what the ledger knows of it.
struct Open {
    sent_at: Instant,
    bulk_bytes: usize,
}

struct Client {
    plan: JudgePlan,
    stream: TcpStream,
    orders: Receiver<Order>,
    watch: Arc<Mutex<Watch>>,
    answers: Arc<AtomicU64>,
    ledger: Ledger,
    open: std::collections::VecDeque<Open>,
    mode: Mode,
    /// An order that waits until nothing is open.
    waiting: Option<Order>,
    /// Whoever waits for the answer to the one request that is open.
    asked: Option<SyncSender<Answer>>,
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
    last_progress: Instant,
    latency: Histogram,
}

/// Requests in a stretch of one kind (one at a time, or pipelined).
const STRETCH: u64 = 64;
/// Longest sleep in poll(2): orders are looked at this often.
const LOOK_UP_MS: libc::c_int = 10;

impl Client {
    fn new(
        plan: JudgePlan,
        stream: TcpStream,
        orders: Receiver<Order>,
        watch: Arc<Mutex<Watch>>,
        answers: Arc<AtomicU64>,
    ) -> Self {
        Self {
            plan,
            stream,
            orders,
            watch,
            answers,
            ledger: Ledger::new(1),
            open: std::collections::VecDeque::new(),
            mode: Mode::Load,
            waiting: None,
            asked: None,
            outgoing: Vec::new(),
            incoming: Vec::new(),
            last_progress: Instant::now(),
            latency: Histogram::default(),
        }
    }

    fn run(mut self) -> Outcome {
        // The first answer tells the state from which on everything is predicted.
        self.request(Op::Status, 0, 0);
        let end = loop {
            if let Some(end) = self.step() {
                break end;
            }
        };
        // Whoever still waits learns of the end by the dropped reply channel.
        Outcome {
            end,
            unanswered: self.ledger.outstanding() as u64,
            answers: self.answers.load(Ordering::Relaxed),
            ledger: self.ledger,
            latency: self.latency,
        }
    }

    /// One turn: orders, sending, waiting, receiving. Some at the end.
    fn step(&mut self) -> Option<End> {
        if self.waiting.is_none() && self.asked.is_none() {
            match self.orders.try_recv() {
                Ok(order) => self.waiting = Some(order),
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => self.mode = Mode::Finish,
            }
        }
        if self.open.is_empty() {
            if let Some(order) = self.waiting.take() {
                self.obey(order);
            }
            match self.mode {
                Mode::Finish if self.open.is_empty() => return Some(End::Told),
                Mode::Quiet if self.open.is_empty() => self.wait_for_order(),
                _ => {}
            }
        }
        self.fill();
        match self.exchange() {
            Ok(()) => {}
            Err(error) => return Some(End::Broken { why: error.to_string() }),
        }
        let stalled = !self.open.is_empty() && self.last_progress.elapsed() > self.plan.stalled_after;
        stalled.then_some(End::Stalled)
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Ask { op, arg, arg2, reply } => {
                self.mode = Mode::Quiet;
                self.asked = Some(reply);
                self.request(op, arg, arg2);
            }
            Order::Quiet { reply } => {
                self.mode = Mode::Quiet;
                reply.send(()).ok();
            }
            Order::GoOn => self.mode = Mode::Load,
            Order::Finish => self.mode = Mode::Finish,
        }
    }

    /// Nothing is open and nothing is to be sent: sleep on the orders, and keep an eye on the connection.
    fn wait_for_order(&mut self) {
        match self.orders.recv_timeout(Duration::from_millis(LOOK_UP_MS as u64)) {
            Ok(order) => self.waiting = Some(order),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => self.mode = Mode::Finish,
        }
    }

    /// Sends requests as far as the window allows.
    fn fill(&mut self) {
        if !matches!(self.mode, Mode::Load) || self.waiting.is_some() {
            return;
        }
        let pipelined = (self.ledger.next_seq() / STRETCH) % 2 == 1;
        let window = if pipelined { self.plan.pipeline.max(1) } else { 1 };
        while self.open.len() < window {
            let payload = self.plan.payload_bytes;
            match self.ledger.next_seq() % 64 {
                7 | 39 if self.plan.journal => self.request(Op::Journal, 0, 0),
                21 if payload > 0 => self.request(Op::Bulk, payload, 0),
                43 if payload > 0 => self.request(Op::Sink, payload, 0),
                3 | 19 | 35 | 51 => self.request(Op::Status, 0, 0),
                _ => self.request(Op::Increment, 0, 0),
            }
        }
    }

    fn request(&mut self, op: Op, arg: u64, arg2: u64) {
        let seq = self.ledger.send(op);
        self.outgoing.extend(Request::new(op, seq, arg, arg2).encode());
        if op == Op::Sink {
            let start = self.outgoing.len();
            self.outgoing.resize(start + arg as usize, 0);
            fill_bulk(seq, 0, &mut self.outgoing[start..]);
            self.ledger.send_payload(&self.outgoing[start..]);
        }
        let now = Instant::now();
        if self.open.is_empty() {
            self.last_progress = now;
        }
        lock(&self.watch).asked(now);
        self.open.push_back(Open {
            sent_at: now,
            bulk_bytes: if op == Op::Bulk { arg as usize } else { 0 },
        });
    }

    /// Sends and receives what is possible, after waiting for it for a moment.
    fn exchange(&mut self) -> io::Result<()> {
        let writing = if self.outgoing.is_empty() { 0 } else { libc::POLLOUT };
        let mut poll = libc::pollfd {
            fd: self.stream.as_raw_fd(),
            events: libc::POLLIN | writing,
            revents: 0,
        };
        let patience = if self.open.is_empty() { 0 } else { LOOK_UP_MS };
        // SAFETY: one complete pollfd that outlives the call.
        unsafe { libc::poll(&mut poll, 1, patience) };
        if !self.outgoing.is_empty() {
            match self.stream.write(&self.outgoing) {
                Ok(sent) => drop(self.outgoing.drain(..sent)),
                Err(error) if again(&error) => {}
                Err(error) => return Err(error),
            }
        }
        let mut buffer = [0; 1 << 16];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the guest's side closed it",
                    ));
                }
                Ok(length) => {
                    self.incoming.extend(&buffer[..length]);
                    self.take_answers()?;
                }
                Err(error) if again(&error) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    fn take_answers(&mut self) -> io::Result<()> {
        let mut at = 0;
        while let Some(head) = self.incoming[at..].first_chunk::<ANSWER_BYTES>() {
            let answer = Answer::decode(head).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            let due = self.ledger.due().is_some_and(|sent| sent.seq == answer.seq) && !answer.refused();
            let bulk_bytes = self.open.front().filter(|_| due).map_or(0, |open| open.bulk_bytes);
            let Some(bulk) = self.incoming.get(at + ANSWER_BYTES..at + ANSWER_BYTES + bulk_bytes) else {
                break;
            };
            let mut expected = vec![0; bulk_bytes];
            fill_bulk(answer.seq, 0, &mut expected);
            let intact = bulk == expected;
            at += ANSWER_BYTES + bulk_bytes;
            if !intact {
                self.ledger.corrupt_payload();
            }
            self.take(&answer);
        }
        self.incoming.drain(..at);
        Ok(())
    }

    fn take(&mut self, answer: &Answer) {
        let now = Instant::now();
        self.ledger.take(answer);
        // The ledger drops skipped requests too.
        while self.open.len() > self.ledger.outstanding() {
            if let Some(open) = self.open.pop_front() {
                self.latency
                    .add(now.saturating_duration_since(open.sent_at).as_micros() as u64);
            }
        }
        self.last_progress = now;
        self.answers.fetch_add(1, Ordering::Relaxed);
        let mut watch = lock(&self.watch);
        watch.answered(now, !self.open.is_empty());
        watch.findings.clone_from(self.ledger.findings());
        drop(watch);
        if let Some(reply) = self.asked.take_if(|_| self.open.is_empty()) {
            reply.send(*answer).ok();
        }
    }
}

fn again(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
