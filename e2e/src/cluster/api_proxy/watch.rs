//! A watch that runs: events of the API server in, events for the asker out, and a fault that is drawn anew from time to time.
//!
//! ```text
//!   API server ──► lines ──► held (in order, each with its time) ──► asker
//!                    │ a fault's turn: until it came about and SPELL is over, or another chooser is set
//! ```
//!
//! Invariant: events are told in the API server's order. Told again are only all of them, from the first on, or the last one.
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};

use super::serve::{BEFORE_CUT, failure, version_of};
use super::{Asked, Fault, Shared};

/// How long a fault has its turn after it came about.
const SPELL: Duration = Duration::from_secs(1);
/// Events that are kept to be told again.
const KEPT_MAX: usize = 64;
/// Longer than any watch.
const FOR_EVER: Duration = Duration::from_secs(86_400);

/// The asker's side of a watch whose other side is `body`. `silent` says until when nothing is told.
pub(super) fn relay(
    shared: Arc<Shared>,
    asked: Asked,
    fault: Fault,
    silent: Option<std::time::Instant>,
    body: Incoming,
) -> Told {
    let (out, told) = mpsc::channel(16);
    let mut relay = Relay {
        shared,
        asked: Asked { running: true, ..asked },
        out,
        held: VecDeque::new(),
        told: Vec::new(),
        fault: Fault::None,
        over: Instant::now(),
        silent: silent.map(Instant::from_std),
        bookmarks: true,
    };
    tokio::spawn(async move {
        if relay.turn(fault).await.is_ok() {
            // Every end is told by the asker's side.
            let _ = relay.run(Lines::new(body)).await;
        }
    });
    Told(told)
}

/// Nothing more is told.
struct Ended;

type Line = Result<Bytes, anyhow::Error>;

struct Relay {
    shared: Arc<Shared>,
    asked: Asked,
    out: mpsc::Sender<Line>,
    /// Events that are told at their time.
    held: VecDeque<(Instant, Bytes)>,
    /// Those that were, bookmarks left out.
    told: Vec<Bytes>,
    /// Whose turn it is, and until when.
    fault: Fault,
    over: Instant,
    silent: Option<Instant>,
    bookmarks: bool,
}

impl Relay {
    async fn run(&mut self, mut lines: Lines) -> Result<(), Ended> {
        let mut changed = self.shared.changed.subscribe();
        loop {
            let due = self.held.front().map(|(due, _)| *due);
            tokio::select! {
                biased;
                () = self.out.closed() => return Err(Ended),
                // Its sender lives as long as what is shared.
                _ = changed.changed() => self.draw().await?,
                () = sleep_until(self.over) => self.draw().await?,
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => self.tell_next().await?,
                line = lines.next() => match line {
                    Some(Ok(line)) => self.hear(line).await?,
                    Some(Err(error)) => {
                        self.tell_all().await?;
                        return self.cut(error).await;
                    }
                    None => return self.tell_all().await,
                },
            }
        }
    }

    async fn draw(&mut self) -> Result<(), Ended> {
        let fault = self.shared.draw(&self.asked);
        self.turn(fault).await
    }

    /// Begins a fault's turn. What needs no event is done at once.
    async fn turn(&mut self, fault: Fault) -> Result<(), Ended> {
        self.fault = fault;
        let now = Instant::now();
        self.over = now + SPELL;
        match fault {
            Fault::WatchSilent(time) => {
                self.silent = Some(now + time);
                self.over = now + time;
            }
            Fault::WatchCut => {
                self.came_about();
                return self.cut(anyhow::anyhow!("the watch is cut")).await;
            }
            Fault::WatchGone => {
                self.came_about();
                let gone = json!({"type": "ERROR", "object": failure(410, "Expired")});
                self.say(Bytes::from(format!("{gone}\n"))).await?;
                return Err(Ended);
            }
            Fault::WatchWithoutBookmarks => self.bookmarks = false,
            // They wait for an event.
            Fault::WatchLate(_) | Fault::WatchCutInEvent | Fault::WatchReplayed | Fault::WatchTwice => {
                self.over = now + FOR_EVER;
            }
            // Those of single answers are none of a watch.
            _ => {}
        }
        Ok(())
    }

    fn came_about(&mut self) {
        self.shared.told(&self.asked, self.fault);
        self.over = Instant::now() + SPELL;
    }

    /// The API server told of something.
    async fn hear(&mut self, line: Bytes) -> Result<(), Ended> {
        let event: Value = serde_json::from_slice(&line).unwrap_or_default();
        if let Some(version) = version_of(&event["object"]) {
            self.shared.history().note(version);
        }
        let now = Instant::now();
        if event["type"] == "BOOKMARK" {
            if !self.bookmarks {
                self.shared.told(&self.asked, Fault::WatchWithoutBookmarks);
                return Ok(());
            }
            return self.hold(now, line).await;
        }
        match self.fault {
            Fault::WatchLate(time) => {
                self.came_about();
                self.hold(now + time, line).await
            }
            Fault::WatchSilent(_) => {
                self.shared.told(&self.asked, self.fault);
                self.hold(now, line).await
            }
            Fault::WatchCutInEvent => {
                self.came_about();
                self.tell_all().await?;
                self.say(line.slice(..line.len() / 2)).await?;
                self.cut(anyhow::anyhow!("the watch is cut in an event")).await
            }
            Fault::WatchTwice => {
                self.came_about();
                self.hold(now, line.clone()).await?;
                self.hold(now, line).await
            }
            // With an event before this one something old is told after something new.
            Fault::WatchReplayed if !self.told.is_empty() => {
                self.came_about();
                self.fault = Fault::None;
                self.tell_all().await?;
                self.tell(line).await?;
                for old in self.told.clone() {
                    self.say(old).await?;
                }
                Ok(())
            }
            _ => self.hold(now, line).await,
        }
    }

    /// Tells it at this time, but before nothing that came earlier.
    async fn hold(&mut self, time: Instant, line: Bytes) -> Result<(), Ended> {
        let last = self.held.back().map(|(due, _)| *due);
        let due = [last, self.silent].into_iter().flatten().fold(time, Instant::max);
        if due <= Instant::now() && self.held.is_empty() {
            return self.tell(line).await;
        }
        self.held.push_back((due, line));
        Ok(())
    }

    async fn tell_next(&mut self) -> Result<(), Ended> {
        match self.held.pop_front() {
            Some((_, line)) => self.tell(line).await,
            None => Ok(()),
        }
    }

    /// Everything that is held, each at its time.
    async fn tell_all(&mut self) -> Result<(), Ended> {
        while let Some((due, _)) = self.held.front() {
            sleep_until(*due).await;
            self.tell_next().await?;
        }
        Ok(())
    }

    async fn tell(&mut self, line: Bytes) -> Result<(), Ended> {
        // Its first events are where it would begin again; with too many of them it begins later.
        if self.told.len() == KEPT_MAX {
            self.told.remove(0);
        }
        self.told.push(line.clone());
        self.say(line).await
    }

    async fn say(&mut self, line: Bytes) -> Result<(), Ended> {
        self.out.send(Ok(line)).await.map_err(|_| Ended)
    }

    /// The connection breaks off after what was said.
    async fn cut(&mut self, why: anyhow::Error) -> Result<(), Ended> {
        sleep(BEFORE_CUT).await;
        // Who has left needs no cut.
        let _ = self.out.send(Err(why)).await;
        Err(Ended)
    }
}

/// An answer's lines, as they come.
struct Lines {
    body: Incoming,
    begun: Vec<u8>,
    whole: VecDeque<Bytes>,
}

impl Lines {
    fn new(body: Incoming) -> Self {
        Self {
            body,
            begun: Vec::new(),
            whole: VecDeque::new(),
        }
    }

    /// The next one with its end, or none if the answer ended. Nothing is lost if nobody waits for it to its end.
    async fn next(&mut self) -> Option<Line> {
        loop {
            if let Some(line) = self.whole.pop_front() {
                return Some(Ok(line));
            }
            match self.body.frame().await? {
                Ok(frame) => self.take(frame.into_data().unwrap_or_default().as_ref()),
                Err(error) => return Some(Err(error.into())),
            }
        }
    }

    fn take(&mut self, data: &[u8]) {
        for piece in data.split_inclusive(|byte| *byte == b'\n') {
            self.begun.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                self.whole.push_back(std::mem::take(&mut self.begun).into());
            }
        }
    }
}

/// The body that an asker gets.
pub(super) struct Told(mpsc::Receiver<Line>);

impl Body for Told {
    type Data = Bytes;
    type Error = anyhow::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut TaskContext<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, anyhow::Error>>> {
        self.0
            .poll_recv(context)
            .map(|line| line.map(|line| line.map(Frame::data)))
    }
}
