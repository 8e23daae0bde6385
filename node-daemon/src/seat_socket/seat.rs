//! A seat that is a pod: the daemon's seat, what its program handed over, and how far the program is.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ftvm_engine::control::{Answer, Ask, Command, Reply, Role};
use ftvm_protocol::core::ReadOutcome;
use ftvm_protocol::identity::Incarnation;

use super::handed::{Handed, Held};
use super::message::{Recipe, ToSeat};
use super::network::CutOff;
use super::pod::Peer;
use super::server;
use crate::api::SeatStatus;
use crate::disks::Step;
use crate::seat::Seat;

/// Deadline of the question which seat is the original.
const RECORD_PATIENCE: Duration = Duration::from_secs(3);
/// An engine answers a status within this time.
pub(super) const STATUS_PATIENCE: Duration = Duration::from_millis(500);
/// A seat that is to go hands over, or waits to be ejected, at most this long; then its engine ends all the same.
const LEAVE_MAX: Duration = Duration::from_secs(40);
/// An engine that was told to end does so within this time, or is killed.
pub(super) const END_MAX: Duration = Duration::from_secs(5);
/// The program of a pod that is deleted ends after what is said on the pod last; it waits at most so long for that.
const WORD_MAX: Duration = Duration::from_secs(5);
/// Whether its pod is deleted the daemon knows within this time after the program was told to end: by its watch, or because it asks.
const NEWS_MAX: Duration = Duration::from_secs(10);

/// How far a seat's program is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// While disks are prepared.
    pub disk: Option<DiskProgress>,
    /// What the program can't do.
    pub trouble: Option<String>,
    /// Whether a program is connected.
    pub connected: bool,
    /// Why the engine goes on in a network that the pod does not have any more, if it does.
    pub cut_off: Option<String>,
    /// How far each disk ever was.
    farthest: BTreeMap<String, (Step, u64)>,
}

impl Progress {
    /// A disk is so far. Whatever the program couldn't do is over only once one is further than it ever was: each attempt begins at the
    /// beginning, also one that fails where the last one did.
    pub(crate) fn preparing(&mut self, disk: DiskProgress) {
        let begun = disk.done_bytes > 0;
        let now = (disk.step, disk.done_bytes);
        if begun && self.farthest.get(&disk.disk).is_none_or(|before| now > *before) {
            self.farthest.insert(disk.disk.clone(), now);
            self.trouble = None;
        }
        // The one that is being prepared: those before it are done, those after it are not begun.
        if (begun && disk.done_bytes < disk.total_bytes) || self.disk.is_none() {
            self.disk = Some(disk);
        }
    }

    /// All is handed over.
    fn done(&mut self) {
        (self.disk, self.trouble) = (None, None);
        self.farthest.clear();
    }
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
    ending: Mutex<Ending>,
    farewell: Mutex<Farewell>,
    pub(super) cut_off: Mutex<Option<CutOff>>,
}

/// What is said on the pod last has to be there before the pod goes with its program.
#[derive(Debug, Default)]
struct Farewell {
    /// Something is said on the pod.
    due: bool,
    /// It is there.
    told: bool,
    /// Since when the program could end but for this.
    since: Option<Instant>,
}

/// Whether the seat is to go.
#[derive(Debug)]
enum Ending {
    /// It stays.
    No,
    /// This program was told to end. kubelet does that also where the pod stays: its sandbox died and is made anew, or its container is.
    /// A later program is the proof.
    WithProgram(Arc<Peer>),
    /// The pod is being deleted, or is gone.
    ForGood,
}

impl PodSeat {
    /// A seat whose program has not come yet.
    pub fn new(seat: Arc<Seat>, handed: Arc<Handed>, recipe: Recipe) -> PodSeat {
        PodSeat {
            seat,
            handed,
            recipe: Mutex::new(recipe),
            progress: Mutex::default(),
            ending: Mutex::new(Ending::No),
            farewell: Mutex::default(),
            cut_off: Mutex::default(),
        }
    }

    /// What becomes of it is said on its pod.
    pub fn is_published(&self) {
        self.farewell().due = true;
    }

    /// The pod says that this is over.
    pub fn said_over(&self) {
        self.farewell().told = true;
    }

    fn farewell(&self) -> MutexGuard<'_, Farewell> {
        self.farewell.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How far the program is.
    pub fn progress(&self) -> Progress {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_progress(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.lock());
    }

    /// What the next program is asked to prepare. Whether a disk is the original's is found out then, from the record.
    pub fn set_recipe(&self, recipe: Recipe) {
        *self.recipe.lock().unwrap_or_else(PoisonError::into_inner) = recipe;
    }

    /// What the program has to prepare. The disks of an engine that runs are complete and stay as they are, so that a program is also taken
    /// while the record can't be read.
    pub(super) fn recipe(&self) -> Result<Recipe, String> {
        let original = self.seat.incarnation().is_none() && self.is_original()?;
        let mut recipe = self.recipe.lock().unwrap_or_else(PoisonError::into_inner).clone();
        recipe.disks.iter_mut().for_each(|disk| disk.original = original);
        Ok(recipe)
    }

    /// The first contents belong on the disks of the seat that the first record names: while it does, no guest ever ran.
    fn is_original(&self) -> Result<bool, String> {
        match self.seat.arbiter().ask(&Ask::ReadRecord, RECORD_PATIENCE) {
            (Answer::Read(ReadOutcome::Found(found)), _) => {
                Ok(found.record.holder == Incarnation::genesis(self.handed.expected().seat_id))
            }
            (_, why) => Err(why.unwrap_or_else(|| "the virtual machine has no record yet".to_owned())),
        }
    }

    pub(super) fn ready(&self, held: Held) {
        self.handed.put(held);
        tracing::info!(seat = self.seat.config().label(), "its program handed its files over");
        self.set_progress(Progress::done);
        self.seat.try_soon();
    }

    pub(super) fn gone(&self, peer: &Arc<Peer>) {
        self.handed.take_back(peer);
        self.set_progress(|progress| progress.connected = false);
    }

    fn ending(&self) -> MutexGuard<'_, Ending> {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it was told to go.
    pub(crate) fn ends(&self) -> bool {
        !matches!(*self.ending(), Ending::No)
    }

    /// Has the engine hand over or be ejected, whichever there is to do, and end; starts none any more. Returns at once.
    pub fn end(self: &Arc<Self>) {
        self.end_because(Ending::ForGood);
    }

    /// The same until there is another program.
    pub(crate) fn end_with(self: &Arc<Self>, program: &Arc<Peer>) {
        self.end_because(Ending::WithProgram(program.clone()));
    }

    /// A program has come. If it is a later one than that which was told to end, the pod stays, and so does the seat.
    pub(super) fn came(&self) {
        let mut ending = self.ending();
        if matches!(&*ending, Ending::WithProgram(program) if server::has_ended(&program.pidfd)) {
            tracing::info!(
                seat = self.seat.config().label(),
                "its program ended and was started anew: the pod stays"
            );
            *ending = Ending::No;
            self.handed.set_ending(false);
            drop(ending);
            self.farewell().since = None;
        }
    }

    /// Whether its program was told to end, and it is not known whether that is because its pod is deleted.
    pub fn awaits_news(&self) -> bool {
        matches!(*self.ending(), Ending::WithProgram(_))
    }

    fn is_deleted(&self) -> bool {
        matches!(*self.ending(), Ending::ForGood)
    }

    /// Whether its pod is being deleted, no engine of it runs, and none is begun any more, by this daemon or a later one. True for good.
    pub fn is_over(&self) -> bool {
        (self.is_deleted() || self.seat.is_retired()) && self.seat.is_over()
    }

    /// May the program end?
    fn may_go(&self) -> bool {
        let patience = if self.is_deleted() { WORD_MAX } else { NEWS_MAX };
        let mut farewell = self.farewell();
        if !farewell.due || farewell.told {
            return true;
        }
        farewell.since.get_or_insert_with(Instant::now).elapsed() >= patience
    }

    fn end_because(self: &Arc<Self>, why: Ending) {
        let mut ending = self.ending();
        self.handed.set_ending(true);
        let ends_already = !matches!(*ending, Ending::No);
        if !matches!(*ending, Ending::ForGood) {
            *ending = why;
        }
        drop(ending);
        if ends_already {
            return;
        }
        let pod = self.clone();
        let work = move || {
            let seat = &pod.seat;
            // One that is just being launched is to go, too.
            seat.wait_for_launch();
            let engine = seat.incarnation();
            if !pod.ends() {
                return;
            }
            // One that is started after it, for a later program, is left alone.
            let is_there = move |seat: &Seat| seat.has_engine() && seat.incarnation() == engine;
            if !told_to_leave(seat, &is_there) || !has_ended(seat, &is_there, LEAVE_MAX + END_MAX) {
                seat.end_engine();
                if !has_ended(seat, &is_there, END_MAX) {
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
        if self.ends() && !self.seat.has_engine() && self.may_go() {
            let why = self.seat.status(Duration::ZERO).why;
            return ToSeat::End { code: 0, why };
        }
        state_of(&self.seat.status(STATUS_PATIENCE))
    }
}

/// Tells the engine to go, again and again for a while: it may be about to connect. False: it can't be told, or does not know
/// the command, being older than this daemon; then it is ended, and its peer takes over.
fn told_to_leave(seat: &Seat, is_there: &impl Fn(&Seat) -> bool) -> bool {
    let within_ms = u64::try_from(LEAVE_MAX.as_millis()).unwrap_or(u64::MAX);
    let until = Instant::now() + END_MAX;
    while is_there(seat) && Instant::now() < until {
        if let Ok(Reply::Ok) = seat.command(Command::Leave { within_ms }, STATUS_PATIENCE) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    !is_there(seat)
}

/// Waits until the engine is not there any more.
fn has_ended(seat: &Seat, is_there: &impl Fn(&Seat) -> bool, patience: Duration) -> bool {
    let until = Instant::now() + patience;
    while is_there(seat) && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(20));
    }
    !is_there(seat)
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

#[cfg(test)]
#[path = "seat_tests.rs"]
mod tests;
