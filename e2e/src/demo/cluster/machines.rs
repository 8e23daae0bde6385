//! The nodes of a cluster for the play.
use std::rc::Rc;
use std::time::Instant;

use crate::cluster::{Cluster, Node};
use crate::demo::machines::Machines;
use crate::hosts::CutDirection;
use crate::judge::packet::Mac;
use crate::judge::sniffer::Sniffer;
use crate::lab::Network;

/// The nodes that have seats.
pub struct Nodes(pub Rc<Cluster>);

impl Nodes {
    fn node(&self, machine: usize) -> &Node {
        &self.0.workers()[machine]
    }
}

impl Machines for Nodes {
    fn names(&self) -> Vec<String> {
        self.0.workers().iter().map(Node::name).collect()
    }

    fn is_running(&self, machine: usize) -> bool {
        self.node(machine).is_running()
    }

    fn start(&self, machine: usize) -> anyhow::Result<()> {
        self.node(machine).start()
    }

    fn kill(&self, machine: usize) -> anyhow::Result<Instant> {
        self.node(machine).kill()
    }

    fn freeze(&self, machine: usize) -> anyhow::Result<Instant> {
        self.node(machine).pause()
    }

    fn thaw(&self, machine: usize) -> anyhow::Result<()> {
        self.node(machine).resume()
    }

    fn kill_program(&self, machine: usize, program: &str) -> anyhow::Result<(usize, Instant)> {
        self.node(machine).kill_processes(program)
    }

    /// Seats reach each other by their pods' addresses, which are routed through the nodes' management network.
    fn cut_link(&self, first: usize, second: usize, direction: CutDirection) -> anyhow::Result<()> {
        let (first, second) = (self.node(first), self.node(second));
        self.0.cut_link(first, second, Network::Management, direction)
    }

    fn mend_links(&self) -> anyhow::Result<()> {
        self.0.mend_links()
    }

    fn sniff(&self, guest: Mac) -> anyhow::Result<Sniffer> {
        let ports = self.0.workers().iter().map(|node| node.plan().port(Network::Client));
        let ports = ports.collect();
        Ok(self.0.sandbox().in_network(|| Sniffer::start(guest, ports))??)
    }
}
