//! The machines that take part: what the play does to them, whatever they are made of.
use std::time::Instant;

use crate::hosts::{CutDirection, Host, Lab};
use crate::judge::packet::Mac;
use crate::judge::sniffer::Sniffer;

/// Several machines on a client network and a replication network. They are named by their place.
pub trait Machines {
    /// Their names, in order.
    fn names(&self) -> Vec<String>;

    /// Whether a machine runs.
    fn is_running(&self, machine: usize) -> bool;

    /// Starts a machine that was killed; nothing runs on it yet.
    fn start(&self, machine: usize) -> anyhow::Result<()>;

    /// Links down, then everything dies. Returns when the links were down.
    fn kill(&self, machine: usize) -> anyhow::Result<Instant>;

    /// Stops everything on a machine. Returns when it stood.
    fn freeze(&self, machine: usize) -> anyhow::Result<Instant>;

    /// Lets a frozen machine go on.
    fn thaw(&self, machine: usize) -> anyhow::Result<()>;

    /// Kills every process of this program on a machine; returns how many, and when.
    fn kill_program(&self, machine: usize, program: &str) -> anyhow::Result<(usize, Instant)>;

    /// Drops packets between two machines on the replication network.
    fn cut_link(&self, first: usize, second: usize, direction: CutDirection) -> anyhow::Result<()>;

    /// Takes back every cut.
    fn mend_links(&self) -> anyhow::Result<()>;

    /// Listens on the client network for frames that say they come from the guest.
    fn sniff(&self, guest: Mac) -> anyhow::Result<Sniffer>;
}

impl Machines for Lab {
    fn names(&self) -> Vec<String> {
        self.hosts().iter().map(|host| host.name().to_owned()).collect()
    }

    fn is_running(&self, machine: usize) -> bool {
        self.host(machine).is_running()
    }

    fn start(&self, machine: usize) -> anyhow::Result<()> {
        Ok(self.host(machine).start()?)
    }

    fn kill(&self, machine: usize) -> anyhow::Result<Instant> {
        Ok(self.host(machine).kill()?)
    }

    fn freeze(&self, machine: usize) -> anyhow::Result<Instant> {
        Ok(self.host(machine).freeze()?)
    }

    fn thaw(&self, machine: usize) -> anyhow::Result<()> {
        self.host(machine).thaw()?;
        Ok(())
    }

    fn kill_program(&self, machine: usize, program: &str) -> anyhow::Result<(usize, Instant)> {
        Ok(self.host(machine).kill_program(program)?)
    }

    fn cut_link(&self, first: usize, second: usize, direction: CutDirection) -> anyhow::Result<()> {
        Ok(Lab::cut_link(self, first, second, direction)?)
    }

    fn mend_links(&self) -> anyhow::Result<()> {
        Ok(Lab::mend_links(self)?)
    }

    fn sniff(&self, guest: Mac) -> anyhow::Result<Sniffer> {
        Ok(Sniffer::start(
            guest,
            self.hosts().iter().map(Host::client_port).collect(),
        )?)
    }
}
