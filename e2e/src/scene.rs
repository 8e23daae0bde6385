//! What tests of a pair begin with, wait for and judge: three hosts, seats on the first two, a client.
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::demo::programs::Programs;
use crate::demo::standalone::Standalone;
use crate::demo::system::{Role, Seat, System};
use crate::demo::{Options, card_address, place};
use crate::guest_protocol::{DEFAULT_PORT, Op};
use crate::hosts::{Lab, LabPlan};
use crate::judge::client::{self, Judge, JudgePlan, Outcome};

/// Long enough for a busy machine; nothing is judged by it.
pub const PATIENCE: Duration = Duration::from_secs(90);
/// Answers of a guest that runs.
pub const ANSWERS: u64 = 100;

/// One scene at a time: each keeps both cores of a small machine busy.
pub fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the guest answers.
#[must_use]
pub fn guest() -> SocketAddr {
    guest_by(0)
}

/// Where the guest answers by this network card.
#[must_use]
pub fn guest_by(card: usize) -> SocketAddr {
    SocketAddr::from((card_address(card), DEFAULT_PORT))
}

/// A connection to the guest, once it takes one; from within the client's network.
///
/// # Panics
/// If it never does.
#[must_use]
pub fn connect() -> TcpStream {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match TcpStream::connect_timeout(&guest(), Duration::from_secs(1)) {
            Ok(stream) => return stream,
            Err(error) => assert!(Instant::now() < deadline, "no connection: {error}"),
        }
    }
}

/// A client that asks and asks. `patience`: without an answer for this long it gives up.
///
/// # Panics
/// If the client's network is not there.
pub fn judge(lab: &Lab, patience: Duration) -> Judge {
    judge_by(lab, 0, patience)
}

/// Likewise by this network card of the guest's.
///
/// # Panics
/// If the client's network is not there.
pub fn judge_by(lab: &Lab, card: usize, patience: Duration) -> Judge {
    let plan = JudgePlan {
        connect_within: PATIENCE,
        stalled_after: patience,
        ..JudgePlan::new(guest_by(card))
    };
    Judge::start(plan, lab.client_entrance().expect("the client's namespace")).expect("a client")
}

/// A client's end, and what the guest says on another connection by the same network card.
///
/// # Panics
/// If the guest does not answer there.
pub fn judgement(lab: &Lab, client: Judge, card: usize) -> Outcome {
    let entrance = lab.client_entrance().expect("the client's namespace");
    let mut outcome = client.finish();
    let asked = std::thread::spawn(move || {
        entrance().expect("the client's namespace");
        client::inspect(guest_by(card), PATIENCE).expect("the guest answers")
    });
    outcome.ledger.inspect(&asked.join().expect("no panic"));
    outcome
}

/// The client goes first when a scene ends, then the pair, then the hosts.
pub struct Scene<C> {
    /// Who looks at the guest from outside.
    pub client: C,
    /// The pair.
    pub system: Standalone,
    /// The hosts.
    pub lab: Rc<Lab>,
    /// Files of all of it, by a short path.
    pub folder: PathBuf,
}

impl<C> Scene<C> {
    /// With files in the folder `test` of `target`, Cargo's `CARGO_TARGET_TMPDIR`. `prepare` changes hosts and pair before anything starts;
    /// `client` is called when the pair was started, and need not be protected yet.
    ///
    /// # Panics
    /// If something can't be started.
    pub fn new(
        test: (&str, &str),
        programs: &Programs,
        options: &Options,
        prepare: impl FnOnce(&Lab, Standalone) -> Standalone,
        client: impl FnOnce(&Lab) -> C,
    ) -> Self {
        let (target, test) = test;
        let folder = PathBuf::from(target).join(test);
        std::fs::remove_dir_all(&folder).ok();
        std::fs::create_dir_all(&folder).expect("the target folder is writable");
        let folder = place::show_at_short_path(&folder).expect("a short path");
        let lab = Rc::new(Lab::new(&LabPlan::three_hosts(&folder)).expect("hosts"));
        let mut system = prepare(&lab, Standalone::new(Rc::clone(&lab), programs, &folder, options));
        system.start().expect("the pair starts");
        let client = client(&lab);
        Self {
            client,
            system,
            lab,
            folder,
        }
    }

    /// The seat of a host whose engine runs. One that has no time for an answer is asked again.
    ///
    /// # Panics
    /// If it never answers.
    pub fn seat(&mut self, host: usize) -> Seat {
        let mut seat = None;
        self.wait_for(&format!("answer of the engine of host {host}"), |scene| {
            seat = scene.system.seat(host);
            seat.is_some()
        });
        seat.expect("it was waited for")
    }

    /// Waits until it is so.
    ///
    /// # Panics
    /// If it never is, with what the seats say.
    pub fn wait_for(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            if Instant::now() > deadline {
                let seats: Vec<Option<Seat>> = (0..3).map(|host| self.system.seat(host)).collect();
                panic!("no {what} within {PATIENCE:?}: {seats:?}");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until this host's seat is active.
    pub fn wait_for_active(&mut self, host: usize) {
        self.wait_for("successor", |scene| {
            scene.system.seat(host).is_some_and(|seat| seat.role == Role::Active)
        });
    }

    /// Waits until this host's seat is active and another one would take over.
    pub fn wait_for_protection(&mut self, active: usize) {
        self.wait_for("protection", |scene| {
            let protected = scene.system.seat(active);
            let protected = protected.is_some_and(|seat| seat.role == Role::Active && seat.protected);
            let mut others = (0..3).filter(|host| *host != active);
            protected && others.any(|host| scene.system.seat(host).is_some_and(|seat| seat.role == Role::Standby))
        });
    }
}

impl Scene<Judge> {
    /// Waits until the guest answers, and lets it write no more memory than it needs: with little of it to copy a slow machine has short epochs, too.
    ///
    /// # Panics
    /// If the guest does not answer.
    pub fn calm(&mut self) {
        self.client.ask(Op::SetChurn, 0, 0).expect("the guest answers");
        self.client.go_on();
        self.wait_for_answers();
    }

    /// Waits for answers to what is asked from now on.
    ///
    /// # Panics
    /// If the client gave up.
    pub fn wait_for_answers(&mut self) {
        let goal = self.client.answers() + ANSWERS;
        self.wait_for("answers", |scene| {
            scene.client.answers() >= goal || scene.client.has_ended()
        });
        assert!(self.client.answers() >= goal, "the client gave up");
    }

    /// The client's end, and what the guest says on another connection.
    ///
    /// # Panics
    /// If the guest does not answer there.
    pub fn judgement(self) -> Outcome {
        judgement(&self.lab, self.client, 0)
    }

    /// Nothing may be lost or contradicted.
    ///
    /// # Panics
    /// If anything is.
    pub fn expect_clean(self) {
        let outcome = self.judgement();
        assert!(outcome.is_clean(), "{:?}: {:?}", outcome.end, outcome.complaints());
    }
}
