//! Two emulated machines for the play.
use std::time::Instant;

use anyhow::{Context, ensure};

use crate::demo::machines::Machines;
use crate::hosts::CutDirection;
use crate::judge::packet::Mac;
use crate::judge::sniffer::Sniffer;
use crate::lab::{Lab, Network, Node, Share};

/// The machines, and the folder that they share. Nodes end before the lab does.
pub struct Emulated {
    pub nodes: Vec<Node>,
    pub share: Share,
    pub lab: Lab,
}

impl Machines for Emulated {
    fn names(&self) -> Vec<String> {
        self.nodes.iter().map(|node| node.name().to_owned()).collect()
    }

    fn is_running(&self, machine: usize) -> bool {
        self.nodes[machine].is_running()
    }

    fn start(&self, machine: usize) -> anyhow::Result<()> {
        self.nodes[machine].power_on()
    }

    fn kill(&self, machine: usize) -> anyhow::Result<Instant> {
        self.nodes[machine].kill()
    }

    fn freeze(&self, machine: usize) -> anyhow::Result<Instant> {
        self.nodes[machine].pause()?;
        Ok(Instant::now())
    }

    fn thaw(&self, machine: usize) -> anyhow::Result<()> {
        self.nodes[machine].resume()
    }

    fn kill_program(&self, machine: usize, program: &str) -> anyhow::Result<(usize, Instant)> {
        let pids = self.nodes[machine].sh(&format!("pids=$(pidof {program}); kill -KILL $pids; echo $pids"))?;
        Ok((pids.split_whitespace().count(), Instant::now()))
    }

    fn cut_link(&self, first: usize, _second: usize, direction: CutDirection) -> anyhow::Result<()> {
        match direction {
            CutDirection::Both => self.nodes[first].set_link(Network::Replication, false),
            CutDirection::FirstToSecond => self.nodes[first].impair(Network::Replication, "loss 100%"),
        }
    }

    fn mend_links(&self) -> anyhow::Result<()> {
        for node in self.nodes.iter().filter(|node| node.is_running()) {
            node.set_link(Network::Replication, true)?;
            let impaired = node.sh(&format!("tc qdisc show dev {}", Network::Replication.card()))?;
            if impaired.contains("netem") {
                node.impair(Network::Replication, "")?;
            }
        }
        Ok(())
    }

    fn sniff(&self, guest: Mac) -> anyhow::Result<Sniffer> {
        let ports: Vec<String> = self.nodes.iter().map(|node| node.tap(Network::Client)).collect();
        ensure!(!ports.is_empty(), "there are no machines to listen to");
        let sniffer = self.lab.sandbox().in_network(|| Sniffer::start(guest, ports))?;
        sniffer.context("cannot listen on the client network")
    }
}
