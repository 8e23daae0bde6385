//! The last frames from and to the guest, for whoever has to find out what a gap consists of.
use std::collections::VecDeque;
use std::fmt::Write;
use std::time::Duration;

use super::packet::Packet;

/// Frames that are kept.
const FRAMES_MAX: usize = 4096;

/// Which way a frame went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// A host sent it with the guest's address as its source.
    FromGuest,
    /// The network's bridge sent it to a host, for the guest.
    ToGuest,
}

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A TCP segment.
    Tcp,
    /// Where the guest's MAC address is.
    Announcement,
    /// ARP about the sender's own address.
    GratuitousArp,
    /// Where an IPv6 address is.
    NeighbourAdvertisement,
    /// Anything else.
    Other,
}

impl Kind {
    fn of(packet: &Packet<'_>) -> Self {
        match packet {
            Packet::Tcp(_) => Self::Tcp,
            Packet::ReverseArp => Self::Announcement,
            Packet::GratuitousArp => Self::GratuitousArp,
            Packet::NeighbourAdvertisement => Self::NeighbourAdvertisement,
            Packet::Other => Self::Other,
        }
    }
}

#[derive(Clone, Debug)]
struct Frame {
    /// Since 1970.
    at: Duration,
    host: usize,
    direction: Direction,
    kind: Kind,
    /// Of TCP.
    payload_bytes: usize,
    text: String,
}

/// Frames in the order of their arrival.
#[derive(Clone, Debug, Default)]
pub struct Timeline(VecDeque<Frame>);

impl Timeline {
    /// Adds a frame that was seen at `at` (since 1970) at the port of `host`.
    pub fn add(&mut self, at: Duration, host: usize, direction: Direction, packet: &Packet<'_>) {
        if self.0.len() == FRAMES_MAX {
            self.0.pop_front();
        }
        let payload_bytes = match packet {
            Packet::Tcp(segment) => segment.payload.len(),
            Packet::ReverseArp | Packet::GratuitousArp | Packet::NeighbourAdvertisement | Packet::Other => 0,
        };
        let text = match packet {
            Packet::ReverseArp => "announcement".to_owned(),
            Packet::GratuitousArp => "gratuitous ARP".to_owned(),
            Packet::NeighbourAdvertisement => "neighbour advertisement".to_owned(),
            Packet::Other => "no TCP".to_owned(),
            Packet::Tcp(segment) => {
                let flags = [(segment.syn, " SYN"), (segment.fin, " FIN"), (segment.rst, " RST")];
                let flags: String = flags.iter().filter(|(set, _)| *set).map(|(_, name)| *name).collect();
                format!(
                    "{} > {} seq {} ack {} {payload_bytes} bytes{flags}",
                    segment.source, segment.destination, segment.seq, segment.ack
                )
            }
        };
        self.0.push_back(Frame {
            at,
            host,
            direction,
            kind: Kind::of(packet),
            payload_bytes,
            text,
        });
    }

    /// How many of the frames kept of this kind went this way at the port of `host`.
    pub fn count(&self, host: usize, direction: Direction, kind: Kind) -> usize {
        let counts = |frame: &&Frame| (frame.host, frame.direction, frame.kind) == (host, direction, kind);
        self.0.iter().filter(counts).count()
    }

    /// When the last of the frames kept went this way at the port of `host`, since 1970, of those of this kind.
    pub fn last_at(&self, host: usize, direction: Direction, kind: Kind) -> Option<Duration> {
        let matches = |frame: &&Frame| (frame.host, frame.direction, frame.kind) == (host, direction, kind);
        self.0.iter().rev().find(matches).map(|frame| frame.at)
    }

    /// How many of the frames kept went this way at the port of `host` with something in them for TCP's user, not acknowledgements alone.
    pub fn segments_with_payload(&self, host: usize, direction: Direction) -> usize {
        let counts = |frame: &&Frame| (frame.host, frame.direction) == (host, direction) && frame.payload_bytes > 0;
        self.0.iter().filter(counts).count()
    }

    /// Largest TCP payload of the frames kept that went this way at the port of `host`, in bytes.
    pub fn largest_payload_bytes(&self, host: usize, direction: Direction) -> usize {
        let of = self
            .0
            .iter()
            .filter(|frame| (frame.host, frame.direction) == (host, direction));
        of.map(|frame| frame.payload_bytes).max().unwrap_or(0)
    }

    /// One line a frame: UTC time of day, milliseconds since the frame before, the host's name, direction, contents.
    pub fn text(&self, names: &[String]) -> String {
        let mut text = String::new();
        let mut before = self.0.front().map_or(Duration::ZERO, |frame| frame.at);
        for frame in &self.0 {
            let second = frame.at.as_secs() % 86_400;
            let since_ms = frame.at.saturating_sub(before).as_secs_f64() * 1e3;
            before = frame.at;
            let name = names.get(frame.host).map_or("?", String::as_str);
            let arrow = match frame.direction {
                Direction::FromGuest => "->",
                Direction::ToGuest => "<-",
            };
            // Writing to a string can't fail.
            let _ = writeln!(
                text,
                "{:02}:{:02}:{:02}.{:06} +{since_ms:.3} {name} {arrow} {}",
                second / 3600,
                second / 60 % 60,
                second % 60,
                frame.at.subsec_micros(),
                frame.text
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_when_where_and_what() {
        let mut timeline = Timeline::default();
        let noon = Duration::from_secs(86_400 + 43_200);
        timeline.add(noon, 0, Direction::FromGuest, &Packet::Other);
        timeline.add(
            noon + Duration::from_micros(1500),
            1,
            Direction::ToGuest,
            &Packet::ReverseArp,
        );
        assert_eq!(timeline.count(1, Direction::ToGuest, Kind::Announcement), 1);
        assert_eq!(timeline.count(1, Direction::ToGuest, Kind::Other), 0);
        assert_eq!(timeline.last_at(0, Direction::FromGuest, Kind::Other), Some(noon));
        let text = timeline.text(&["h1".to_owned(), "h2".to_owned()]);
        assert_eq!(
            text,
            "12:00:00.000000 +0.000 h1 -> no TCP\n12:00:00.001500 +1.500 h2 <- announcement\n"
        );
    }

    #[test]
    fn only_the_last_frames_are_kept() {
        let mut timeline = Timeline::default();
        for second in 0..2 * FRAMES_MAX as u64 {
            timeline.add(Duration::from_secs(second), 0, Direction::FromGuest, &Packet::Other);
        }
        assert_eq!(timeline.0.len(), FRAMES_MAX);
        assert_eq!(timeline.0[0].at, Duration::from_secs(FRAMES_MAX as u64));
    }
}
