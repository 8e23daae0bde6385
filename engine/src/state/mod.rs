//! The container that a saved machine travels in.
//!
//! A state is a header, a sequence of sections and a checksum, all little-endian:
//!
//! ```text
//!   header   magic u32 | format u16 | machine type u16 | sections u32 | body length u32
//!   section  kind u16 | version u16 | instance u32 | length u32 | bytes
//!   trailer  CRC-32 of everything before it
//! ```
//!
//! Structures of KVM are stored as their raw bytes, which are kernel ABI; devices store postcard of a serde structure.
//! [`StateReader::parse`] checks the frame of the whole state before anybody looks into a section; each owner then
//! checks its own sections completely before it changes anything.

use thiserror::Error;

/// First four bytes of a state.
const MAGIC: u32 = u32::from_le_bytes(*b"FTVS");
/// Version of the frame described above.
const FORMAT: u16 = 1;
/// The machine that this program emulates: which devices exist and where. Another number is another machine.
pub const MACHINE_TYPE: u16 = 1;
/// Upper bound of one section.
pub const MAX_SECTION_BYTES: usize = 4 << 20;
/// Upper bound of a whole state.
pub const MAX_STATE_BYTES: usize = 32 << 20;
/// Upper bound of the number of sections.
pub const MAX_SECTIONS: usize = 4096;

const HEADER_BYTES: usize = 16;
const SECTION_HEADER_BYTES: usize = 12;
const TRAILER_BYTES: usize = 4;

/// Section kinds. `instance` counts things of one kind: vCPUs, NICs, disks.
pub mod kind {
    /// What the machine consists of; must be equal on both sides.
    pub const MACHINE: u16 = 0x0001;
    /// One vCPU; the instance is its index.
    pub const VCPU: u16 = 0x0002;
    /// In-kernel interrupt controllers: instance 0 and 1 the PICs, 2 the IOAPIC.
    pub const IRQCHIP: u16 = 0x0003;
    /// In-kernel PIT.
    pub const PIT: u16 = 0x0004;
    /// The guest's clock.
    pub const CLOCK: u16 = 0x0005;
    /// First kind that belongs to `engine::devices`; everything from here on is theirs to number.
    pub const DEVICES: u16 = 0x0100;
}

/// Why a state was refused. Nothing was changed in the machine that refused it.
#[derive(Debug, Error, PartialEq, Eq)]
#[allow(missing_docs)] // the texts say it
pub enum StateError {
    #[error("machine state: {got} bytes where at least {need} were announced: it was cut short; send it again")]
    Truncated { need: usize, got: usize },
    #[error(
        "machine state: {what} is {value}, more than the {limit} that are accepted; the sender is broken or hostile"
    )]
    TooLarge {
        what: &'static str,
        value: usize,
        limit: usize,
    },
    #[error("machine state: it does not begin with the mark of a machine state (found {found:#010x})")]
    NotAState { found: u32 },
    #[error(
        "machine state: format {found}, this program reads format {FORMAT}: run the same version of ftvm-engine on both sides"
    )]
    Format { found: u16 },
    #[error(
        "machine state: machine type {found}, this program has type {MACHINE_TYPE}: run the same version of ftvm-engine on both sides"
    )]
    MachineType { found: u16 },
    #[error(
        "machine state: checksum {found:#010x} does not match the content ({computed:#010x}): it was damaged; send it again"
    )]
    Checksum { found: u32, computed: u32 },
    #[error("machine state: {extra} bytes follow the last section; the sender is broken")]
    Trailing { extra: usize },
    #[error("machine state: section {kind:#06x}/{instance} occurs twice; the sender is broken")]
    Duplicate { kind: u16, instance: u32 },
    #[error("machine state: section {kind:#06x}/{instance} is missing; the two machines are not configured alike")]
    Missing { kind: u16, instance: u32 },
    #[error(
        "machine state: section {kind:#06x}/{instance} is not known here; the two machines are not configured alike"
    )]
    Unexpected { kind: u16, instance: u32 },
    #[error(
        "machine state: section {kind:#06x}/{instance} has version {found}, this program reads {known}: run the same version of ftvm-engine on both sides"
    )]
    Version {
        kind: u16,
        instance: u32,
        found: u16,
        known: u16,
    },
    #[error("machine state: section {kind:#06x}/{instance} is not valid: {why}")]
    Content { kind: u16, instance: u32, why: String },
}

/// Collects sections. The buffer is kept between states: saving allocates nothing once it has grown.
#[derive(Debug, Default)]
pub struct StateWriter {
    bytes: Vec<u8>,
    sections: u32,
}

impl StateWriter {
    /// An empty state.
    pub fn new() -> Self {
        let mut writer = Self::default();
        writer.clear();
        writer
    }

    /// Empties it and keeps the buffer.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.bytes.resize(HEADER_BYTES, 0);
        self.sections = 0;
    }

    /// Adds a section whose bytes are `content`.
    pub fn put(&mut self, kind: u16, version: u16, instance: u32, content: &[u8]) {
        self.put_with(kind, version, instance, |out| out.extend_from_slice(content));
    }

    /// Adds a section whose bytes `fill` appends to the buffer (it must only append).
    pub fn put_with(&mut self, kind: u16, version: u16, instance: u32, fill: impl FnOnce(&mut Vec<u8>)) {
        self.bytes.extend_from_slice(&kind.to_le_bytes());
        self.bytes.extend_from_slice(&version.to_le_bytes());
        self.bytes.extend_from_slice(&instance.to_le_bytes());
        let length_at = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        fill(&mut self.bytes);
        let length = self.bytes.len() - length_at - 4;
        assert!(
            length <= MAX_SECTION_BYTES,
            "section {kind:#06x} has {length} bytes, more than a reader accepts"
        );
        self.bytes[length_at..length_at + 4].copy_from_slice(&(length as u32).to_le_bytes());
        self.sections += 1;
    }

    /// Completes the state and returns its bytes; valid until [`StateWriter::clear`].
    pub fn finish(&mut self) -> &[u8] {
        let length = (self.bytes.len() - HEADER_BYTES) as u32;
        self.bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        self.bytes[4..6].copy_from_slice(&FORMAT.to_le_bytes());
        self.bytes[6..8].copy_from_slice(&MACHINE_TYPE.to_le_bytes());
        self.bytes[8..12].copy_from_slice(&self.sections.to_le_bytes());
        self.bytes[12..16].copy_from_slice(&length.to_le_bytes());
        let checksum = crc32fast::hash(&self.bytes);
        self.bytes.extend_from_slice(&checksum.to_le_bytes());
        &self.bytes
    }
}

/// One section of a checked state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Section<'a> {
    /// See [`kind`].
    pub kind: u16,
    /// Version of the content, numbered by its owner.
    pub version: u16,
    /// Which one of its kind.
    pub instance: u32,
    /// The content.
    pub bytes: &'a [u8],
}

impl Section<'_> {
    /// A [`StateError::Content`] about this section.
    pub fn invalid(&self, why: impl Into<String>) -> StateError {
        StateError::Content {
            kind: self.kind,
            instance: self.instance,
            why: why.into(),
        }
    }
}

/// A state whose frame is sound: complete, undamaged, known format, no section twice.
#[derive(Debug)]
pub struct StateReader<'a> {
    sections: Vec<Section<'a>>,
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

impl<'a> StateReader<'a> {
    /// Checks the frame of `bytes`, which may come from a hostile peer.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, StateError> {
        if bytes.len() > MAX_STATE_BYTES {
            return Err(StateError::TooLarge {
                what: "its length",
                value: bytes.len(),
                limit: MAX_STATE_BYTES,
            });
        }
        let announced = check_header(bytes)?;
        let body_end = bytes.len() - TRAILER_BYTES;
        let (found, computed) = (u32_at(bytes, body_end), crc32fast::hash(&bytes[..body_end]));
        if found != computed {
            return Err(StateError::Checksum { found, computed });
        }
        let mut sections = Vec::with_capacity(announced);
        let mut rest = &bytes[HEADER_BYTES..body_end];
        for _ in 0..announced {
            let section = take_section(&mut rest)?;
            sections.push(section);
        }
        if !rest.is_empty() {
            return Err(StateError::Trailing { extra: rest.len() });
        }
        check_unique(&sections)?;
        Ok(Self { sections })
    }

    /// The section, which must exist and have exactly version `known`.
    pub fn require(&self, kind: u16, known: u16, instance: u32) -> Result<Section<'a>, StateError> {
        let section = self
            .find(kind, instance)
            .ok_or(StateError::Missing { kind, instance })?;
        if section.version != known {
            return Err(StateError::Version {
                kind,
                instance,
                found: section.version,
                known,
            });
        }
        Ok(section)
    }

    /// The section, if it exists.
    pub fn find(&self, kind: u16, instance: u32) -> Option<Section<'a>> {
        self.sections
            .iter()
            .copied()
            .find(|section| section.kind == kind && section.instance == instance)
    }

    /// All sections in the order in which they were written.
    pub fn sections(&self) -> impl Iterator<Item = Section<'a>> + '_ {
        self.sections.iter().copied()
    }
}

/// Checks everything that the header says; returns the number of sections.
fn check_header(bytes: &[u8]) -> Result<usize, StateError> {
    let least = HEADER_BYTES + TRAILER_BYTES;
    if bytes.len() < least {
        return Err(StateError::Truncated {
            need: least,
            got: bytes.len(),
        });
    }
    let magic = u32_at(bytes, 0);
    if magic != MAGIC {
        return Err(StateError::NotAState { found: magic });
    }
    let format = u16_at(bytes, 4);
    if format != FORMAT {
        return Err(StateError::Format { found: format });
    }
    let machine_type = u16_at(bytes, 6);
    if machine_type != MACHINE_TYPE {
        return Err(StateError::MachineType { found: machine_type });
    }
    let sections = u32_at(bytes, 8) as usize;
    if sections > MAX_SECTIONS {
        return Err(StateError::TooLarge {
            what: "its number of sections",
            value: sections,
            limit: MAX_SECTIONS,
        });
    }
    let need = least + u32_at(bytes, 12) as usize;
    if bytes.len() < need {
        return Err(StateError::Truncated { need, got: bytes.len() });
    }
    if bytes.len() > need {
        return Err(StateError::Trailing {
            extra: bytes.len() - need,
        });
    }
    Ok(sections)
}

/// Takes one section off the front of `rest`.
fn take_section<'a>(rest: &mut &'a [u8]) -> Result<Section<'a>, StateError> {
    if rest.len() < SECTION_HEADER_BYTES {
        return Err(StateError::Truncated {
            need: SECTION_HEADER_BYTES,
            got: rest.len(),
        });
    }
    let (kind, version, instance) = (u16_at(rest, 0), u16_at(rest, 2), u32_at(rest, 4));
    let length = u32_at(rest, 8) as usize;
    if length > MAX_SECTION_BYTES {
        return Err(StateError::TooLarge {
            what: "the length of a section",
            value: length,
            limit: MAX_SECTION_BYTES,
        });
    }
    let end = SECTION_HEADER_BYTES + length;
    if rest.len() < end {
        return Err(StateError::Truncated {
            need: end,
            got: rest.len(),
        });
    }
    let bytes = &rest[SECTION_HEADER_BYTES..end];
    *rest = &rest[end..];
    Ok(Section {
        kind,
        version,
        instance,
        bytes,
    })
}

fn check_unique(sections: &[Section<'_>]) -> Result<(), StateError> {
    let mut names: Vec<(u16, u32)> = sections
        .iter()
        .map(|section| (section.kind, section.instance))
        .collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(StateError::Duplicate {
            kind: pair[0].0,
            instance: pair[0].1,
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let mut writer = StateWriter::new();
        writer.put(kind::MACHINE, 1, 0, b"machine");
        writer.put(kind::VCPU, 3, 0, &[1; 100]);
        writer.put(kind::VCPU, 3, 1, &[]);
        writer.finish().to_vec()
    }

    #[test]
    fn sections_come_back_in_order() {
        let bytes = sample();
        let reader = StateReader::parse(&bytes).expect("sound");
        assert_eq!(reader.sections().count(), 3);
        assert_eq!(reader.require(kind::VCPU, 3, 0).expect("there").bytes, [1; 100]);
        assert_eq!(
            reader.require(kind::VCPU, 2, 1),
            Err(StateError::Version {
                kind: kind::VCPU,
                instance: 1,
                found: 3,
                known: 2
            })
        );
        assert_eq!(
            reader.require(kind::PIT, 1, 0),
            Err(StateError::Missing {
                kind: kind::PIT,
                instance: 0
            })
        );
    }

    #[test]
    fn a_cleared_writer_writes_the_same_again() {
        let mut writer = StateWriter::new();
        writer.put(kind::PIT, 1, 0, b"abc");
        let first = writer.finish().to_vec();
        writer.clear();
        writer.put(kind::PIT, 1, 0, b"abc");
        assert_eq!(writer.finish(), first);
    }

    #[test]
    fn every_truncation_and_every_flipped_bit_is_refused() {
        let bytes = sample();
        for length in 0..bytes.len() {
            assert!(StateReader::parse(&bytes[..length]).is_err(), "cut at {length}");
        }
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(StateReader::parse(&damaged).is_err(), "bit {bit}");
        }
        let mut longer = bytes;
        longer.push(0);
        assert_eq!(
            StateReader::parse(&longer).unwrap_err(),
            StateError::Trailing { extra: 1 }
        );
    }

    /// A sender that computes checksums can still not make the reader allocate or read beyond the bytes.
    #[test]
    fn lying_lengths_are_refused() {
        let seal = |mut bytes: Vec<u8>| {
            let end = bytes.len() - TRAILER_BYTES;
            let checksum = crc32fast::hash(&bytes[..end]);
            bytes[end..].copy_from_slice(&checksum.to_le_bytes());
            bytes
        };
        let mut many = sample();
        many[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(
            StateReader::parse(&seal(many)),
            Err(StateError::TooLarge { .. })
        ));
        let mut more = sample();
        more[8..12].copy_from_slice(&4u32.to_le_bytes());
        assert!(matches!(
            StateReader::parse(&seal(more)),
            Err(StateError::Truncated { .. })
        ));
        let mut long = sample();
        long[HEADER_BYTES + 8..HEADER_BYTES + 12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(
            StateReader::parse(&seal(long)),
            Err(StateError::TooLarge { .. })
        ));
    }

    #[test]
    fn a_section_that_occurs_twice_is_refused() {
        let mut writer = StateWriter::new();
        writer.put(kind::PIT, 1, 0, b"abc");
        writer.put(kind::PIT, 1, 0, b"abd");
        assert_eq!(
            StateReader::parse(writer.finish()).unwrap_err(),
            StateError::Duplicate {
                kind: kind::PIT,
                instance: 0
            }
        );
    }
}
