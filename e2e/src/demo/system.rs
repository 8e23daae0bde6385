//! What keeps the guest alive (or does not): the view that the demonstration has of it.
use serde::Deserialize;

/// Role of a seat as its engine reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Launched, no decision yet.
    Starting,
    /// May not boot yet.
    Waiting,
    /// Receives its first whole checkpoint.
    Joining,
    /// Follows the active.
    Standby,
    /// Asks the arbiter whether it may take over.
    TakingOver,
    /// Runs the guest.
    Active,
    /// Frozen for a switchover or a stop.
    Frozen,
    /// The machine is stopped.
    Stopped,
    /// Lost; to be rebuilt.
    Halted,
    /// A role that this program does not know.
    #[serde(other)]
    Unknown,
}

/// One seat, as far as the demonstration looks at it; the engine's status has more.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Seat {
    /// Role.
    pub role: Role,
    /// True while a standby holds a covering checkpoint and the arbiter's record names both.
    #[serde(default)]
    pub protected: bool,
    /// The guest stands still until a standby has joined.
    #[serde(default)]
    pub paused: bool,
    /// The seat is to go, and its engine ends once nobody needs it any more.
    #[serde(default)]
    pub leaving: bool,
    /// Why the role is what it is, or why the machine is not protected.
    #[serde(default)]
    pub why: String,
    /// Term in force.
    #[serde(default)]
    pub term: u64,
    /// Last epoch cut or received.
    #[serde(default)]
    pub epoch: u64,
    /// Progress of a resync.
    #[serde(default)]
    pub resync_percent: Option<u8>,
    /// Everything that counts or measures.
    #[serde(default)]
    pub counters: serde_json::Map<String, serde_json::Value>,
}

impl Seat {
    /// A counter by name.
    pub fn counter(&self, name: &str) -> Option<f64> {
        self.counters.get(name)?.as_f64()
    }

    /// What its last change of sides took, if it measured one.
    pub fn change_us(self) -> serde_json::Map<String, serde_json::Value> {
        let of_change = |name: &str| name.starts_with("takeover_") || name.starts_with("switchover_");
        self.counters.into_iter().filter(|(name, _)| of_change(name)).collect()
    }
}

/// A digest of guest memory at an epoch.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Digest {
    /// The epoch.
    pub epoch: u64,
    /// Over all of guest RAM.
    pub memory: String,
}

/// What keeps the guest alive. Machines are named by their place.
pub trait System {
    /// Whether it claims to protect the guest at all.
    fn protects(&self) -> bool;

    /// File name of the program that runs the guest, for killing it.
    fn engine_program(&self) -> &str;

    /// Starts everything on all machines; the guest begins to boot.
    fn start(&mut self) -> anyhow::Result<()>;

    /// What a machine says of its seat; none if it can't be asked (dead, frozen) or has no seat.
    fn seat(&mut self, machine: usize) -> Option<Seat>;

    /// Has the active on this machine hand over to its standby, as an administrator would. It may go on after this returns;
    /// see [`System::trouble`].
    fn hand_over(&mut self, machine: usize) -> anyhow::Result<()>;

    /// Begins to replace the seat on machine `lost` by one on machine `spare`. It takes its time; see [`System::trouble`].
    fn replace(&mut self, lost: usize, spare: usize) -> anyhow::Result<()>;

    /// What went wrong in something that was begun.
    fn trouble(&mut self) -> Option<String>;

    /// A machine that lost its seat, and may have been started again with nothing running on it, gets a new, empty seat,
    /// which waits to be used.
    fn make_spare(&mut self, machine: usize) -> anyhow::Result<()>;

    /// Compares both seats' memory at one epoch and both disks, while the guest's clients are quiet. An error says what
    /// differs.
    fn compare_sides(&mut self, active: usize, standby: usize) -> anyhow::Result<()>;

    /// What a person would like to read after a failure: paths of logs.
    fn logs(&self) -> Vec<std::path::PathBuf>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engines_status_reads_as_a_seat() {
        let text = r#"{"vm":"vm","seat":"a","incarnation":"a-1","role":"taking_over","protected":true,"why":"x","term":7,
            "holder":"a-1","members":["a-1"],"epoch":9,"acknowledged":8,"peer":null,"arbiter_reachable":true,
            "resync_percent":50,"counters":{"pause_us_p50":120.5,"link_sent_bytes":10}}"#;
        let seat: Seat = serde_json::from_str(text).unwrap();
        assert_eq!(
            (seat.role, seat.protected, seat.term, seat.epoch),
            (Role::TakingOver, true, 7, 9)
        );
        assert_eq!(
            (seat.counter("pause_us_p50"), seat.counter("absent")),
            (Some(120.5), None)
        );
        assert_eq!(
            serde_json::from_str::<Role>("\"something_new\"").unwrap(),
            Role::Unknown
        );
    }
}
