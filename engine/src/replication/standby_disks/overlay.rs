//! Changes of one volume that are decided but not written yet, as ranges: what a reader has to see instead of the
//! volume.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::replication::epoch::{DiskChange, DiskData};

/// Contents of a piece.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Contents {
    Zeroes,
    /// The bytes from this offset of a write.
    Bytes(Arc<[u8]>, usize),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Piece {
    end: u64,
    /// Number of the change that the piece is part of.
    change: u64,
    contents: Contents,
}

impl Piece {
    /// The part of the piece from `start` on; the piece began at `was`.
    fn from(&self, was: u64, start: u64) -> Piece {
        let contents = match &self.contents {
            Contents::Zeroes => Contents::Zeroes,
            Contents::Bytes(bytes, offset) => Contents::Bytes(bytes.clone(), offset + (start - was) as usize),
        };
        Piece { contents, ..*self }
    }
}

/// Pieces by their first byte; they don't overlap.
#[derive(Debug, Default)]
pub(super) struct Overlay {
    pieces: BTreeMap<u64, Piece>,
}

/// Bytes to put over what was read from the volume.
#[derive(Debug, Default)]
pub(super) struct Patch(Vec<(u64, Piece)>);

impl Overlay {
    /// Puts a change on top.
    pub fn add(&mut self, number: u64, change: &DiskChange) {
        let (start, end) = (change.offset, change.end());
        self.cut(start, end, |_| true);
        let contents = match &change.what {
            DiskData::Zeroed(_) => Contents::Zeroes,
            DiskData::Written(bytes) => Contents::Bytes(bytes.clone(), 0),
        };
        if start < end {
            self.pieces.insert(
                start,
                Piece {
                    end,
                    change: number,
                    contents,
                },
            );
        }
    }

    /// The volume has this change now.
    pub fn remove(&mut self, number: u64, change: &DiskChange) {
        self.cut(change.offset, change.end(), |piece| piece.change == number);
    }

    /// Removes from `[start, end)` the pieces that `which` names.
    fn cut(&mut self, start: u64, end: u64, which: impl Fn(&Piece) -> bool) {
        let before = self.pieces.range(..start).next_back().map(|(&at, _)| at);
        let inside = self.pieces.range(start..end).map(|(&at, _)| at);
        let touched: Vec<u64> = before.into_iter().chain(inside).collect();
        for at in touched {
            let Some(piece) = self
                .pieces
                .get(&at)
                .filter(|piece| piece.end > start && which(piece))
                .cloned()
            else {
                continue;
            };
            self.pieces.remove(&at);
            if piece.end > end {
                self.pieces.insert(end, piece.from(at, end));
            }
            if at < start {
                self.pieces.insert(at, Piece { end: start, ..piece });
            }
        }
    }

    /// Whether the volume has everything.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// What covers `[start, start + len)`.
    pub fn patch(&self, start: u64, len: u64) -> Patch {
        let end = start + len;
        let before = self.pieces.range(..start).next_back();
        let inside = self.pieces.range(start..end);
        let touched = before.into_iter().chain(inside).filter(|(_, piece)| piece.end > start);
        Patch(touched.map(|(&at, piece)| (at, piece.clone())).collect())
    }
}

impl Patch {
    /// Corrects `buf`, read from the volume at `start`.
    pub fn apply(&self, start: u64, buf: &mut [u8]) {
        let end = start + buf.len() as u64;
        for (at, piece) in &self.0 {
            let from = start.max(*at);
            let to = end.min(piece.end);
            let into = &mut buf[(from - start) as usize..(to - start) as usize];
            match &piece.contents {
                Contents::Zeroes => into.fill(0),
                Contents::Bytes(bytes, offset) => {
                    let first = offset + (from - at) as usize;
                    into.copy_from_slice(&bytes[first..first + into.len()]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replication::testing::{Seeded, apply_change, random_change};

    const SIZE: usize = 64 * 512;

    #[test]
    fn reads_through_are_those_of_a_disk_that_has_everything() {
        let mut seeded = Seeded::new(1);
        let (mut whole, mut volume) = (vec![0xAA; SIZE], vec![0xAA; SIZE]);
        let mut overlay = Overlay::default();
        let mut waiting = std::collections::VecDeque::new();
        for number in 0..5000 {
            if seeded.below(5) < 3 || waiting.is_empty() {
                let change = random_change(&mut seeded, 0, 64);
                overlay.add(number, &change);
                apply_change(&mut whole, &change);
                waiting.push_back((number, change));
            } else if let Some((number, change)) = waiting.pop_front() {
                apply_change(&mut volume, &change);
                overlay.remove(number, &change);
            }
            let start = seeded.below(60) * 512;
            let len = 512 * (1 + seeded.below(4) as usize);
            let mut buf = volume[start as usize..][..len].to_vec();
            overlay.patch(start, buf.len() as u64).apply(start, &mut buf);
            assert_eq!(buf, whole[start as usize..][..buf.len()], "after change {number}");
        }
        for (number, change) in waiting {
            overlay.remove(number, &change);
        }
        assert!(overlay.is_empty());
    }
}
