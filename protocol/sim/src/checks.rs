//! The general invariants. They know nothing of rules or roles; they watch what leaves, who becomes active with which
//! state, and what the user was told.

use std::collections::HashMap;
use std::fmt;

use ftvm_protocol::identity::{Incarnation, Term};

use crate::history::{History, Node, ROOT};

/// What was violated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// A seat becomes active without something that was released.
    Lost,
    /// A flushed write that somebody was told of is missing: on a disk from which a seat boots, on that of the seat that protects the guest, or
    /// on the one beside the guest itself.
    FlushLost,
    /// A seat that is not active any more releases something that the active one does not have.
    News,
    /// Two incarnations create output in one term.
    TwoCreators,
    /// A guest comes back after the user was told "stopped".
    Resurrected,
    /// A seat boots while another member still has the running guest.
    BootedBesideLiving,
    /// A seat runs a state that was never whole.
    Garbage,
    /// A seat says that the VM is protected, and the peer could not take over with all that was released.
    FalselyProtected,
    /// The holder of the record gives up although nobody took it from it.
    GaveUp,
    /// A seat says what its peer's wire version lacks.
    NotUnderstood,
    /// Faults have stopped and service does not come back, in no documented way.
    Stuck,
}

/// A violation of an invariant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Which invariant.
    pub kind: Kind,
    /// Virtual time.
    pub at_ms: u64,
    /// What happened.
    pub text: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} at {} ms: {}", self.kind, self.at_ms, self.text)
    }
}

/// What was observed so far.
#[derive(Debug, Clone, Default)]
pub struct Checks {
    /// Maximal states that released output gave away.
    released: Vec<Node>,
    /// Maximal states that any disk must have at a boot.
    durable: Vec<Node>,
    /// Who became active last, and with which state.
    active: Option<(Incarnation, Node)>,
    /// The one before, while the active one has not yet begun to run: a restored arbiter may take its right back.
    before: Option<(Incarnation, Node)>,
    lapsed: Option<Incarnation>,
    /// Who created output, by (arbiter's generation, term).
    creators: HashMap<(u64, Term), Incarnation>,
    /// The user was told "stopped" and has not asked for a start since.
    pub stopped: bool,
    /// How often something was released.
    pub releases: u64,
}

fn add(history: &History, set: &mut Vec<Node>, node: Node) {
    if node == ROOT || set.iter().any(|known| history.contains(*known, node)) {
        return;
    }
    set.retain(|known| !history.contains(node, *known));
    set.push(node);
}

impl Checks {
    /// Output of this state leaves.
    pub fn release(&mut self, history: &History, node: Node, by: Incarnation) -> Result<(), (Kind, String)> {
        if let Some((active, state)) = self.active
            && active != by
            && !history.contains(state, node)
        {
            return Err((
                Kind::News,
                format!("{by:?} releases state {node}, but {active:?} became active with {state}"),
            ));
        }
        self.releases += 1;
        self.runs(by);
        add(history, &mut self.released, node);
        add(history, &mut self.durable, history.flushed(node));
        Ok(())
    }

    /// That incarnation may create new output now.
    pub fn create(&mut self, generation: u64, term: Term, by: Incarnation) -> Result<(), (Kind, String)> {
        let first = *self.creators.entry((generation, term)).or_insert(by);
        if first == by {
            return Ok(());
        }
        Err((
            Kind::TwoCreators,
            format!("{first:?} and {by:?} both create output in term {term}"),
        ))
    }

    /// That seat calls the VM protected by a peer with this state.
    pub fn covered(&self, history: &History, by: Incarnation, peer: Option<Node>) -> Result<(), (Kind, String)> {
        let missing = self
            .released
            .iter()
            .find(|released| !peer.is_some_and(|state| history.contains(state, **released)));
        match missing {
            Some(missing) if self.active() == Some(by) => Err((
                Kind::FalselyProtected,
                format!("{by:?} calls the VM protected by a peer with state {peer:?}, but {missing} was released"),
            )),
            _ => Ok(()),
        }
    }

    /// What that seat releases tells of flushes: they are on the medium of its disk.
    pub fn flushed_here(
        &self,
        history: &History,
        node: Node,
        by: Incarnation,
        disk: Option<Node>,
    ) -> Result<(), (Kind, String)> {
        let flushed = history.flushed(node);
        if flushed == ROOT || disk.is_some_and(|disk| history.contains(disk, flushed)) {
            return Ok(());
        }
        Err((
            Kind::FlushLost,
            format!("{by:?} releases state {node}, but {flushed} was flushed and its disk has {disk:?}"),
        ))
    }

    /// That seat calls the VM protected by `peer`: whatever was flushed and told is on the medium of the peer's disk.
    pub fn flushed_there(
        &self,
        history: &History,
        by: Incarnation,
        peer: Incarnation,
        disk: Option<Node>,
    ) -> Result<(), (Kind, String)> {
        let there = |flushed: &&Node| disk.is_some_and(|disk| history.contains(disk, **flushed));
        match self.durable.iter().find(|flushed| !there(flushed)) {
            Some(missing) if self.active() == Some(by) => Err((
                Kind::FlushLost,
                format!(
                    "{missing} was flushed and told, and {peer:?}, which protects {by:?}, has {disk:?} on its disk"
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Who became active last?
    pub fn active(&self) -> Option<Incarnation> {
        self.active.map(|(active, _)| active)
    }

    fn not_stopped(&self, by: Incarnation) -> Result<(), (Kind, String)> {
        if self.stopped {
            return Err((
                Kind::Resurrected,
                format!("{by:?} becomes active after the user was told that it is stopped"),
            ));
        }
        Ok(())
    }

    /// A seat becomes active with a running guest's state.
    pub fn take_over(&mut self, history: &History, by: Incarnation, state: Option<Node>) -> Result<(), (Kind, String)> {
        self.not_stopped(by)?;
        let Some(state) = state else {
            return Err((Kind::Garbage, format!("{by:?} becomes active without a whole state")));
        };
        if let Some(lost) = self
            .released
            .iter()
            .find(|released| !history.contains(state, **released))
        {
            return Err((
                Kind::Lost,
                format!("{by:?} becomes active with state {state}, but {lost} was released"),
            ));
        }
        self.becomes_active(by, state);
        Ok(())
    }

    fn becomes_active(&mut self, by: Incarnation, state: Node) {
        self.before = self.active;
        self.active = Some((by, state));
    }

    /// The guest runs under that incarnation.
    pub fn runs(&mut self, by: Incarnation) {
        if self.active() == Some(by) {
            self.before = None;
        }
    }

    /// The record was restored or deleted: a right that nobody has used yet is gone.
    pub fn rights_lapse(&mut self) {
        if self.before.is_some() {
            self.lapsed = self.active.map(|(lapsed, _)| lapsed);
            self.active = self.before.take();
        }
    }

    /// Did a right of that incarnation lapse? The answer that confirms it may still be on its way.
    pub fn has_lapsed(&self, of: Incarnation) -> bool {
        self.lapsed == Some(of)
    }

    /// A seat becomes active from its disk: what was not flushed may be lost, as by a power cut.
    pub fn boot(&mut self, history: &History, by: Incarnation, disk: Option<Node>) -> Result<(), (Kind, String)> {
        self.not_stopped(by)?;
        let Some(disk) = disk else {
            return Err((Kind::Garbage, format!("{by:?} boots from a disk that was never whole")));
        };
        if let Some(lost) = self.durable.iter().find(|durable| !history.contains(disk, **durable)) {
            return Err((
                Kind::FlushLost,
                format!("{by:?} boots from state {disk}, but {lost} was flushed and told"),
            ));
        }
        self.released.retain(|released| history.contains(disk, *released));
        self.becomes_active(by, disk);
        Ok(())
    }

    /// What was released is given up, whoever created it in which term: a record that was made anew from what the one that is given up vouched for long
    /// ago counts terms once more. Should that one create anything after this, it is found all the same.
    pub fn forget(&mut self) {
        self.released.clear();
        self.durable.clear();
        self.creators.clear();
    }

    /// A person accepted the loss.
    pub fn accept_loss(&mut self, by: Incarnation, disk: Option<Node>) -> Result<(), (Kind, String)> {
        self.not_stopped(by)?;
        let Some(disk) = disk else {
            return Err((Kind::Garbage, format!("{by:?} boots from a disk that was never whole")));
        };
        self.forget();
        self.becomes_active(by, disk);
        Ok(())
    }

    /// The user is told "stopped". If a running guest was stopped (not: nothing ran), everything released counts as
    /// flushed from now on.
    pub fn tell_stopped(&mut self, history: &History, ran: bool) {
        self.stopped = true;
        if !ran {
            return;
        }
        for node in self.released.clone() {
            add(history, &mut self.durable, node);
        }
    }
}
