//! A seat that is a pod: the daemon's seat, what its program handed over, and how far the program is.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ftvm_engine::control::{Answer, Ask, Command, Reply, Role};
use ftvm_protocol::core::ReadOutcome;
use ftvm_protocol::identity::Incarnation;

use super::handed::{Handed, Held};
use super::message::{Recipe, ToSeat};
use super::pod::Peer;
use crate::api::SeatStatus;
use crate::disks::Step;
use crate::seat::Seat;

/// Deadline of the question which seat is the original.
const RECORD_PATIENCE: Duration = Duration::from_secs(3);
/// An engine answers a status within this time.
const STATUS_PATIENCE: Duration = Duration::from_millis(500);
/// A seat that is to go hands over, or waits to be ejected, at most this long; then its engine ends all the same.
const LEAVE_MAX: Duration = Duration::from_secs(40);
/// An engine that was told to end does so within this time, or is killed.
const END_MAX: Duration = Duration::from_secs(5);

/// How far a seat's program is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// While disks are prepared.
    pub disk: Option<DiskProgress>,
    /// What the program can't do.
    pub trouble: Option<String>,
    /// Whether a program is connected.
    pub connected: bool,
}

/// How far a disk is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskProgress {
    /// Its name.
    pub disk: String,
    /// What is being done to it.
    pub step: Step,
    /// Bytes of that step that are done.
    pub done_bytes: u64,
    /// Of so many.
    pub total_bytes: u64,
}

impl DiskProgress {
    /// In percent.
    pub fn percent(&self) -> u8 {
        let percent = self.done_bytes.saturating_mul(100).checked_div(self.total_bytes);
        u8::try_from(percent.unwrap_or(100)).unwrap_or(100)
    }
}

impl std::fmt::Display for DiskProgress {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (disk, words, percent) = (&self.disk, self.step.words(), self.percent());
        let mib = self.total_bytes.div_ceil(1 << 20);
        write!(out, "disk {disk} is being {words}: {percent} % of {mib} MiB")
    }
}

/// A seat that is a pod.
pub struct PodSeat {
    /// The daemon's seat.
    pub seat: Arc<Seat>,
    /// What its program handed over.
    pub handed: Arc<Handed>,
    recipe: Mutex<Recipe>,
    progress: Mutex<Progress>,
    ending: AtomicBool,
}

impl PodSeat {
    /// A seat whose program has not come yet.
    pub fn new(seat: Arc<Seat>, handed: Arc<Handed>, recipe: Recipe) -> PodSeat {
        PodSeat {
            seat,
            handed,
            recipe: Mutex::new(recipe),
            progress: Mutex::default(),
            ending: AtomicBool::new(false),
        }
    }

    /// How far the program is.
    pub fn progress(&self) -> Progress {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_progress(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.lock());
    }

    /// What the next program is asked to prepare. Whether a disk is the original's is found out then, from the record.
    pub fn set_recipe(&self, recipe: Recipe) {
        *self.recipe.lock().unwrap_or_else(PoisonError::into_inner) = recipe;
    }

    /// What the program has to prepare. The first contents belong on the disks of the seat that the first record names: while
    /// it does, no guest ever ran.
    pub(super) fn recipe(&self) -> Result<Recipe, String> {
        let original = match self.seat.arbiter().ask(&Ask::ReadRecord, RECORD_PATIENCE) {
            (Answer::Read(ReadOutcome::Found(found)), _) => {
                found.record.holder == Incarnation::genesis(self.handed.expected().seat_id)
            }
            (_, why) => return Err(why.unwrap_or_else(|| "the virtual machine has no record yet".to_owned())),
        };
        let mut recipe = self.recipe.lock().unwrap_or_else(PoisonError::into_inner).clone();
        recipe.disks.iter_mut().for_each(|disk| disk.original = original);
        Ok(recipe)
    }

    pub(super) fn ready(&self, held: Held) {
        self.handed.put(held);
        self.set_progress(|progress| {
            progress.disk = None;
            progress.trouble = None;
        });
        self.seat.try_soon();
    }

    pub(super) fn gone(&self, peer: &Arc<Peer>) {
        self.handed.take_back(peer);
        self.set_progress(|progress| progress.connected = false);
    }

    /// Whether it was told to.
    #[cfg(test)]
    pub(crate) fn ends(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }

    /// Has the engine hand over or be ejected, whichever there is to do, and end; starts none any more. Returns at once.
    pub fn end(self: &Arc<Self>) {
        self.handed.end();
        if self.ending.swap(true, Ordering::SeqCst) {
            return;
        }
        let seat = self.seat.clone();
        let work = move || {
            if !told_to_leave(&seat) || !has_ended(&seat, LEAVE_MAX + END_MAX) {
                seat.end_engine();
                if !has_ended(&seat, END_MAX) {
                    seat.kill();
                }
            }
        };
        if let Err(error) = std::thread::Builder::new().name("end".to_owned()).spawn(work) {
            tracing::error!("no thread to hand over ({error}): the engine is ended at once");
            self.seat.end_engine();
        }
    }

    /// What the program has to know now.
    pub(super) fn outlook(&self) -> ToSeat {
        if self.ending.load(Ordering::SeqCst) && !self.seat.has_engine() {
            let why = self.seat.status(Duration::ZERO).why;
            return ToSeat::End { code: 0, why };
        }
        state_of(&self.seat.status(STATUS_PATIENCE))
    }
}

/// Tells the engine to go, again and again for a while: it may be about to connect. False: it can't be told, or does not know
/// the command, being older than this daemon; then it is ended, and its peer takes over.
fn told_to_leave(seat: &Seat) -> bool {
    let within_ms = u64::try_from(LEAVE_MAX.as_millis()).unwrap_or(u64::MAX);
    let until = Instant::now() + END_MAX;
    while seat.has_engine() && Instant::now() < until {
        if let Ok(Reply::Ok) = seat.command(Command::Leave { within_ms }, STATUS_PATIENCE) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    !seat.has_engine()
}

/// Waits until the seat has no engine.
fn has_ended(seat: &Seat, patience: Duration) -> bool {
    let until = Instant::now() + patience;
    while seat.has_engine() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(20));
    }
    !seat.has_engine()
}

fn state_of(status: &SeatStatus) -> ToSeat {
    let Some(engine) = &status.engine else {
        return ToSeat::State {
            role: "none".to_owned(),
            ready: false,
            why: status.why.clone(),
        };
    };
    ToSeat::State {
        role: role_name(engine.role).to_owned(),
        ready: matches!(engine.role, Role::Active | Role::Standby | Role::Frozen),
        why: engine.why.clone(),
    }
}

/// A role as it is published.
pub fn role_name(role: Role) -> &'static str {
    match role {
        Role::Starting => "starting",
        Role::Joining => "joining",
        Role::Standby => "standby",
        Role::Active => "active",
        Role::Frozen => "frozen",
        Role::Ended => "ended",
    }
}
