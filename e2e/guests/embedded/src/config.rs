//! The command line: `key=value` words.

use crate::protocol::MAX_CARDS;
use core::str::FromStr;
use smoltcp::wire::{Ipv4Address, Ipv4Cidr};

/// What the command line may change.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// `ip=10.0.0.2/24` of the first network card, `ip1=` to `ip7=` of the further ones; one without an address is left alone.
    pub ips: [Option<Ipv4Cidr>; MAX_CARDS],
    /// `mac=02:00:00:00:00:02`: another hardware address than the first card's.
    pub mac: Option<[u8; 6]>,
    /// `gw=10.0.0.1`, `gw=none`: router to other networks, behind the first card.
    pub gateway: Option<Ipv4Address>,
    /// `port=7777`
    pub port: u16,
    /// `vcpus=N`: how many vCPUs to start, at most; all that ACPI lists if it is not given.
    pub vcpus: Option<usize>,
    /// `churn_pages=W`: pages that are dirtied from the start on, in all; 0 for none.
    pub churn_pages: u64,
    /// `churn_rate=R`: pages a second and vCPU; 0 for as fast as it can.
    pub churn_rate: u64,
    /// `churn_mode=page|word`: whole pages, or one word of each.
    pub churn_words: bool,
    /// `check_pages=N`: pages of the churn region that each vCPU checks a second, in the background; 0 for none.
    pub check_rate: u64,
}

impl Config {
    /// Reads the command line. Words it does not know, or cannot read, are reported and left out: the guest stays
    /// reachable by its defaults.
    pub fn parse(command_line: &str) -> Self {
        let mut ips = [None; MAX_CARDS];
        ips[0] = Some(Ipv4Cidr::new(Ipv4Address::new(10, 0, 0, 2), 24));
        let mut config = Self {
            ips,
            mac: None,
            gateway: Some(Ipv4Address::new(10, 0, 0, 1)),
            port: crate::protocol::DEFAULT_PORT,
            vcpus: None,
            churn_pages: 0,
            churn_rate: 0,
            churn_words: false,
            check_rate: 0,
        };
        for word in command_line.split_ascii_whitespace() {
            if config.take(word).is_none() {
                log!("command line: \"{word}\" is not understood and left out");
            }
        }
        config
    }

    fn take(&mut self, word: &str) -> Option<()> {
        let (key, value) = word.split_once('=')?;
        match key {
            "ip" => self.ips[0] = Some(unicast_ip(value)?),
            "mac" => self.mac = Some(unicast_mac(value)?),
            "gw" if value == "none" => self.gateway = None,
            "gw" => self.gateway = Some(Ipv4Address::from_str(value).ok()?),
            "port" => self.port = value.parse().ok().filter(|&port| port != 0)?,
            "vcpus" => self.vcpus = Some(value.parse().ok().filter(|&vcpus| vcpus != 0)?),
            "churn_pages" => self.churn_pages = value.parse().ok()?,
            "churn_rate" => self.churn_rate = value.parse().ok()?,
            "churn_mode" => self.churn_words = ["page", "word"].iter().position(|&mode| mode == value)? == 1,
            "check_pages" => self.check_rate = value.parse().ok()?,
            _ => {
                let card: usize = key.strip_prefix("ip")?.parse().ok()?;
                let further = self.ips.get_mut(card).filter(|_| card > 0)?;
                *further = Some(unicast_ip(value)?);
            }
        }
        Some(())
    }
}

fn unicast_ip(text: &str) -> Option<Ipv4Cidr> {
    Ipv4Cidr::from_str(text)
        .ok()
        .filter(|ip| !ip.address().is_multicast() && !ip.address().is_unspecified())
}

fn unicast_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        *byte = u8::from_str_radix(parts.next()?, 16).ok()?;
    }
    (parts.next().is_none() && mac[0] & 1 == 0).then_some(mac)
}
