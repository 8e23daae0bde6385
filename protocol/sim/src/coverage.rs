//! Which fault met which role, over all seeds.

use std::fmt;

use ftvm_protocol::core::{RoleName, Status};

macro_rules! names {
    ($(#[$doc:meta])* $name:ident: $($(#[$item_doc:meta])* $item:ident,)*) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$item_doc])* $item,)*
        }

        impl $name {
            /// All of them.
            pub const ALL: &'static [$name] = &[$($name::$item,)*];
        }
    };
}

names! {
    /// A fault or a disturbance.
    Fault:
    /// The process does not run for a while.
    Paused,
    /// The process dies; node and page cache live.
    Crashed,
    /// The node dies; unsynced writes may be lost.
    PowerCut,
    /// The node dies with its disk; a new seat takes its place.
    DiskLost,
    /// A connection breaks.
    LinkReset,
    /// Nothing this seat sends arrives.
    CutOneWay,
    /// A message to this seat was lost.
    MessageLost,
    /// A message to this seat came twice.
    MessageTwice,
    /// A message to this seat was overtaken or late.
    MessageLate,
    /// A part of an epoch to this seat was lost.
    EpochPartial,
    /// The arbiter can't be reached by this seat.
    ArbiterUnreachable,
    /// An answer of the arbiter to this seat was lost.
    AnswerLost,
    /// A write of this seat reached the arbiter after its deadline.
    PutLate,
    /// The arbiter was restored from a backup.
    Restored,
    /// The record was deleted.
    Deleted,
    /// The user asked for a stop.
    UserStop,
    /// The guest switched itself off.
    PoweredOff,
    /// The user asked for a start.
    UserStart,
    /// A switchover was asked for.
    UserSwitchover,
    /// A seat is to go.
    AskedToLeave,
    /// A person accepted the loss of the holder's data.
    UserOverride,
    /// Longer than T without contact.
    ContactTooOld,
    /// The header could not be written.
    HeaderFailed,
    /// Staging or streaming failed.
    SessionFailed,
    /// What this seat's disk is asked for fails.
    DiskFails,
    /// What this seat's disk is asked for is not done for a while.
    DiskHangs,
    /// This seat speaks the former wire version with its peer: one of them is of the former release.
    FormerVersion,
}

names! {
    /// A role, finer than the core's names.
    RoleClass:
    /// Waits.
    Starting,
    /// Receives a resync.
    Joining,
    /// Standby.
    Standby,
    /// Active, members are it alone, no resync under way.
    Alone,
    /// Active, alone, a resync under way.
    Admitting,
    /// Active of a pair.
    Pair,
    /// Frozen in a switchover.
    Frozen,
}

impl RoleClass {
    /// Of a status; `None` for an ended core.
    pub fn of(status: &Status) -> Option<Self> {
        Some(match status.role {
            RoleName::Starting => Self::Starting,
            RoleName::Joining => Self::Joining,
            RoleName::Standby => Self::Standby,
            RoleName::Active if status.session.is_none() => Self::Alone,
            RoleName::Active if status.protected => Self::Pair,
            RoleName::Active => Self::Admitting,
            RoleName::Frozen => Self::Frozen,
            RoleName::Ended => return None,
        })
    }
}

/// Cells that need not be filled, and why.
pub const NOT_DEMANDED: &[(Fault, RoleClass, &str)] = &[
    (
        Fault::AnswerLost,
        RoleClass::Joining,
        "a joiner asks the arbiter nothing",
    ),
    (Fault::PutLate, RoleClass::Joining, "a joiner asks the arbiter nothing"),
    (
        Fault::ArbiterUnreachable,
        RoleClass::Joining,
        "a joiner asks the arbiter nothing",
    ),
    (Fault::EpochPartial, RoleClass::Starting, "has no session"),
    (Fault::EpochPartial, RoleClass::Alone, "leads; epochs go the other way"),
    (
        Fault::EpochPartial,
        RoleClass::Admitting,
        "leads; epochs go the other way",
    ),
    (Fault::EpochPartial, RoleClass::Pair, "leads; epochs go the other way"),
    (Fault::EpochPartial, RoleClass::Frozen, "leads; epochs go the other way"),
    (Fault::SessionFailed, RoleClass::Starting, "has no session"),
    (Fault::SessionFailed, RoleClass::Alone, "has no session"),
    (Fault::PoweredOff, RoleClass::Starting, "has no running guest"),
    (Fault::PoweredOff, RoleClass::Joining, "has no running guest"),
    (Fault::PoweredOff, RoleClass::Standby, "has no running guest"),
    (Fault::PoweredOff, RoleClass::Frozen, "has no running guest"),
    (
        Fault::UserOverride,
        RoleClass::Joining,
        "refused: only a starting seat boots",
    ),
    (
        Fault::UserOverride,
        RoleClass::Standby,
        "refused: only a starting seat boots",
    ),
    (
        Fault::UserOverride,
        RoleClass::Alone,
        "refused: only a starting seat boots",
    ),
    (
        Fault::UserOverride,
        RoleClass::Admitting,
        "refused: only a starting seat boots",
    ),
    (
        Fault::UserOverride,
        RoleClass::Pair,
        "refused: only a starting seat boots",
    ),
    (
        Fault::UserOverride,
        RoleClass::Frozen,
        "refused: only a starting seat boots",
    ),
    (Fault::ContactTooOld, RoleClass::Starting, "has no session"),
    (
        Fault::ContactTooOld,
        RoleClass::Joining,
        "ends as soon as its leader is silent",
    ),
    (Fault::ContactTooOld, RoleClass::Alone, "has no session"),
    (
        Fault::ContactTooOld,
        RoleClass::Pair,
        "counted as Admitting: no longer protected",
    ),
    (
        Fault::HeaderFailed,
        RoleClass::Pair,
        "counted as Admitting: not protected while its header is not durable",
    ),
    (
        Fault::HeaderFailed,
        RoleClass::Standby,
        "writes its header only to adopt a re-created record",
    ),
    (
        Fault::HeaderFailed,
        RoleClass::Frozen,
        "writes its header only to adopt a re-created record",
    ),
];

/// Counters.
#[derive(Debug, Clone)]
pub struct Coverage {
    cells: Vec<u64>,
}

impl Default for Coverage {
    fn default() -> Self {
        Self {
            cells: vec![0; Fault::ALL.len() * RoleClass::ALL.len()],
        }
    }
}

impl Coverage {
    fn at(fault: Fault, role: RoleClass) -> usize {
        fault as usize * RoleClass::ALL.len() + role as usize
    }

    /// A fault met a role.
    pub fn met(&mut self, fault: Fault, status: &Status) {
        if let Some(role) = RoleClass::of(status) {
            self.cells[Self::at(fault, role)] += 1;
        }
    }

    /// How often.
    pub fn count(&self, fault: Fault, role: RoleClass) -> u64 {
        self.cells[Self::at(fault, role)]
    }

    /// Adds another run's counters.
    pub fn add(&mut self, other: &Coverage) {
        for (cell, more) in self.cells.iter_mut().zip(&other.cells) {
            *cell += more;
        }
    }

    /// Cells that stayed empty without a documented reason.
    pub fn empty_cells(&self) -> Vec<(Fault, RoleClass)> {
        let all = Fault::ALL
            .iter()
            .flat_map(|fault| RoleClass::ALL.iter().map(move |role| (*fault, *role)));
        all.filter(|(fault, role)| {
            self.count(*fault, *role) == 0
                && !NOT_DEMANDED
                    .iter()
                    .any(|(no_fault, no_role, _)| no_fault == fault && no_role == role)
        })
        .collect()
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<20}", "")?;
        for role in RoleClass::ALL {
            write!(f, "{:>10}", format!("{role:?}"))?;
        }
        for fault in Fault::ALL {
            write!(f, "\n{:<20}", format!("{fault:?}"))?;
            for role in RoleClass::ALL {
                let count = self.count(*fault, *role);
                let excused = NOT_DEMANDED.iter().any(|(no, at, _)| no == fault && at == role);
                let cell = if count == 0 && excused {
                    "-".to_string()
                } else {
                    count.to_string()
                };
                write!(f, "{cell:>10}")?;
            }
        }
        Ok(())
    }
}
