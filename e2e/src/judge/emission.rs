//! Who spoke as the guest, and did two ever do so at once? No I/O, no clock.
//!
//! Definition. A frame with the guest's MAC address brings **new content** if it carries bytes of a TCP stream (payload,
//! SYN or FIN) beyond everything that any host sent of that stream before. Retransmissions, and frames that a successor
//! sends once more, bring none. The host that brings new content is the **speaker**; when another host does so, it takes
//! over and the former one is **deposed**. Two things are forbidden:
//!
//! 1. A deposed host brings new content (it is active in a term that is not its own), unless it was rebuilt from the
//!    winner first ([`Emissions::rebuilt`]), or holds the arbiter's record by then ([`Emissions::explain`]). It may
//!    repeat what was said before, that is an ordinary network duplicate; such frames are counted apart.
//! 2. A host sends other bytes at a position of a stream than were sent there before: two histories.
//!
//! A host that was rebuilt has to be told before it speaks. Where nobody can know in time (a standby that became a member by a write whose
//! answer never came may win the record before any status says so), whoever keeps the record's history explains it afterwards: from the
//! first news of a deposed host on, every change of the speaker counts until the record named each of them at that moment.
//!
//! Frames that the sniffer missed can hide new content, so a verdict is only as good as its count of missed frames.
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::SocketAddrV4;
use std::time::Instant;

use serde::Serialize;

use super::packet::{Packet, Segment};

/// Bytes of each stream that are kept for comparison.
const KEPT_BYTES: usize = 1 << 20;
/// Streams that are followed at once; the one that was quiet for longest is forgotten beyond that.
const STREAMS_MAX: usize = 1024;

/// What was seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct EmissionReport {
    /// Frames by host.
    pub frames: BTreeMap<usize, u64>,
    /// How often the speaker changed.
    pub handovers: u64,
    /// Frames with new content from a deposed host, and what was said after those, by whomever.
    pub dual_active: u64,
    /// Frames whose bytes differ from those that were sent at the same place of their stream before.
    pub rewritten: u64,
    /// Frames from deposed hosts that brought nothing new: allowed, and of interest.
    pub late_repeats: u64,
}

impl EmissionReport {
    /// Signs of two active hosts.
    pub fn violations(&self) -> u64 {
        self.dual_active + self.rewritten
    }
}

#[derive(Debug)]
struct Stream {
    /// Number of its SYN, if that was seen: the same one again is a retransmission.
    first: Option<u32>,
    /// Number of the byte after the last one that was ever sent.
    end: u32,
    /// The last bytes before `end`, as far as they are known without a hole.
    tail: VecDeque<u8>,
    /// For forgetting: the number of the last frame.
    used: u64,
}

/// What one frame did to its stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Effect {
    new: bool,
    rewritten: bool,
}

/// A host that began to bring new content out of turn.
#[derive(Debug)]
struct Return {
    host: usize,
    at: Instant,
    frames: u64,
}

/// Follows the guest's frames on the client network.
#[derive(Debug, Default)]
pub struct Emissions {
    streams: HashMap<(SocketAddrV4, SocketAddrV4), Stream>,
    speaker: Option<usize>,
    deposed: BTreeSet<usize>,
    /// The first news of a deposed host, and every change of who speaks since.
    returns: Vec<Return>,
    report: EmissionReport,
    observed: u64,
}

impl Emissions {
    /// Enters a frame with the guest's MAC address that came from `host` at this time.
    pub fn observe(&mut self, at: Instant, host: usize, packet: &Packet<'_>) {
        self.observed += 1;
        *self.report.frames.entry(host).or_default() += 1;
        let effect = match packet {
            Packet::Tcp(segment) => self.stream_effect(segment),
            Packet::ReverseArp | Packet::GratuitousArp | Packet::NeighbourAdvertisement | Packet::Other => {
                Effect::default()
            }
        };
        self.report.rewritten += u64::from(effect.rewritten);
        let deposed = self.deposed.contains(&host);
        if !effect.new {
            self.report.late_repeats += u64::from(deposed);
        } else if deposed || !self.returns.is_empty() {
            self.returns(at, host);
        } else {
            self.speaks(host);
        }
    }

    /// News that are out of turn, or come after such.
    fn returns(&mut self, at: Instant, host: usize) {
        self.report.dual_active += 1;
        match self.returns.last_mut().filter(|last| last.host == host) {
            Some(last) => last.frames += 1,
            None => self.returns.push(Return { host, at, frames: 1 }),
        }
    }

    /// If each host that spoke out of turn held the arbiter's record when it began to, none of it counts: they took over from each other.
    /// If one did not, all of it does.
    pub fn explain(&mut self, held: impl Fn(usize, Instant) -> bool) {
        if !self.returns.iter().all(|one| held(one.host, one.at)) {
            return;
        }
        for one in std::mem::take(&mut self.returns) {
            self.report.dual_active -= one.frames;
            self.deposed.remove(&one.host);
            self.speaks(one.host);
        }
    }

    /// The host now runs a new incarnation that was built from the winner's state: it may speak again.
    pub fn rebuilt(&mut self, host: usize) {
        self.deposed.remove(&host);
    }

    /// The host that brought new content last.
    pub fn speaker(&self) -> Option<usize> {
        self.speaker
    }

    /// What was seen so far.
    pub fn report(&self) -> &EmissionReport {
        &self.report
    }

    fn speaks(&mut self, host: usize) {
        if let Some(former) = self.speaker.replace(host)
            && former != host
        {
            self.deposed.insert(former);
            self.report.handovers += 1;
        }
    }

    fn stream_effect(&mut self, segment: &Segment<'_>) -> Effect {
        let key = (segment.source, segment.destination);
        if segment.syn {
            let end = segment.seq.wrapping_add(1);
            if self
                .streams
                .get(&key)
                .is_some_and(|stream| stream.first == Some(segment.seq))
            {
                return Effect::default();
            }
            self.forget_one_if_full();
            self.streams
                .insert(key, Stream::new(Some(segment.seq), end, self.observed));
            return Effect {
                new: true,
                rewritten: false,
            };
        }
        if segment.payload.is_empty() && !segment.fin {
            return Effect::default();
        }
        if !self.streams.contains_key(&key) {
            // A connection older than this observer: it begins here.
            self.forget_one_if_full();
            self.streams.insert(key, Stream::new(None, segment.seq, self.observed));
        }
        let observed = self.observed;
        let Some(stream) = self.streams.get_mut(&key) else {
            return Effect::default();
        };
        stream.used = observed;
        stream.take(segment)
    }

    fn forget_one_if_full(&mut self) {
        if self.streams.len() >= STREAMS_MAX {
            let oldest = self
                .streams
                .iter()
                .min_by_key(|(_, stream)| stream.used)
                .map(|(key, _)| *key);
            oldest.map(|key| self.streams.remove(&key));
        }
    }
}

impl Stream {
    fn new(first: Option<u32>, end: u32, used: u64) -> Self {
        Self {
            first,
            end,
            tail: VecDeque::new(),
            used,
        }
    }

    fn take(&mut self, segment: &Segment<'_>) -> Effect {
        // Where the segment begins, relative to what is known: negative is a repetition, positive leaves a hole.
        let begin = serial_distance(self.end, segment.seq);
        let length = segment.payload.len() as i64;
        let mut effect = Effect::default();
        if begin > 0 {
            self.tail.clear();
        } else {
            effect.rewritten = self.differs(i64::from(begin), segment.payload);
        }
        // A FIN takes a number of its own, like a byte.
        let end = i64::from(begin) + length + i64::from(segment.fin);
        if end > 0 {
            effect.new = true;
            self.end = self.end.wrapping_add(end as u32);
            let known = (-i64::from(begin)).clamp(0, length) as usize;
            self.tail.extend(&segment.payload[known..]);
            if segment.fin {
                self.tail.push_back(0);
            }
            let excess = self.tail.len().saturating_sub(KEPT_BYTES);
            self.tail.drain(..excess);
        }
        effect
    }

    /// Whether the part of `payload` that repeats kept bytes differs from them; `begin` is at most 0.
    fn differs(&self, begin: i64, payload: &[u8]) -> bool {
        let tail_start = -(self.tail.len() as i64);
        payload.iter().enumerate().any(|(index, byte)| {
            let at = begin + index as i64;
            (tail_start..0).contains(&at) && self.tail[(at - tail_start) as usize] != *byte
        })
    }
}

/// How far `to` lies behind `from` in serial arithmetic.
fn serial_distance(from: u32, to: u32) -> i32 {
    to.wrapping_sub(from) as i32
}

#[cfg(test)]
#[path = "emission_tests.rs"]
mod tests;
