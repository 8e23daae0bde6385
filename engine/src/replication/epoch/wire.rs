//! Payloads of an epoch's frames. All numbers little endian.

use serde::{Deserialize, Serialize};

use super::{DiskChange, DiskData, PORT_DATA_MAX_BYTES, Port, PortData, SECTOR_BYTES};

/// Bytes at the start of every payload of an epoch: its number in the epoch, from 0.
pub(in crate::replication) const SEQUENCE_BYTES: usize = 4;
/// Payloads that are filled with records are closed at this size.
pub(super) const PAYLOAD_TARGET_BYTES: usize = 256 * 1024;
/// A larger write is cut into pieces.
const WRITE_PIECE_BYTES: usize = 256 * 1024;

const DISK_WRITTEN: u8 = 0;
const DISK_ZEROED: u8 = 1;
const DISK_RECORD_HEADER: usize = 1 + 2 + 8 + 8;
const PORT_NIC: u8 = 0;
const PORT_CONSOLE: u8 = 1;
const PORT_RECORD_HEADER: usize = 1 + 2 + 4;

/// What is wrong with a payload.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PayloadError {
    /// Ends in the middle of a record or header.
    #[error("{what} payload of {bytes} bytes is cut off")]
    CutOff {
        /// Of what.
        what: &'static str,
        /// Its size.
        bytes: usize,
    },
    /// Doesn't decode.
    #[error("{0} payload does not decode")]
    Malformed(&'static str),
    /// A change that doesn't fit the disk.
    #[error(
        "disk {disk}: a change of {len} bytes at {offset} is empty, not in whole sectors, or outside the disk's {size} bytes"
    )]
    DiskRange {
        /// Disk index.
        disk: u16,
        /// First byte.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// The disk's size in bytes.
        size: u64,
    },
    /// No such disk.
    #[error("a change of disk {disk}; the machine has {disks}")]
    NoDisk {
        /// Disk index.
        disk: u16,
        /// Number of disks.
        disks: usize,
    },
    /// No such port.
    #[error("data for port kind {kind}, number {number}; the machine has {nics} network interfaces and one console")]
    NoPort {
        /// Kind of port.
        kind: u8,
        /// Its number.
        number: u16,
        /// Number of network interfaces.
        nics: u16,
    },
    /// Data at a port that is empty or too long.
    #[error("{0} bytes at a port in one piece; 1 to {PORT_DATA_MAX_BYTES} are allowed")]
    PortSize(usize),
}

/// Payload of `EpochBegin` behind the sequence number (postcard).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Begin {
    /// The epoch on which this one builds; `None` for one that follows a resync.
    pub base: Option<u64>,
    /// Bulk frames that were sent on this connection before: the receiver must have had them all.
    pub fence: u64,
    /// All output up to this epoch has left the active.
    pub released_through: u64,
}

/// Payload of `EpochEnd` behind the sequence number (postcard).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct End {
    pub pages: u64,
    pub state_bytes: u64,
    pub disk_changes: u64,
    pub outputs: u64,
    pub contains_flush: bool,
    pub payload_bytes: u64,
    /// CRC-32 of all payloads before this one.
    pub checksum: u32,
}

pub(in crate::replication) fn sequenced<T: Serialize>(
    sequence: u32,
    value: &T,
    what: &'static str,
) -> Result<Vec<u8>, PayloadError> {
    postcard::to_extend(value, sequence.to_le_bytes().to_vec()).map_err(|_| PayloadError::Malformed(what))
}

pub(in crate::replication) fn sequence_of(payload: &[u8], what: &'static str) -> Result<u32, PayloadError> {
    let cut = PayloadError::CutOff {
        what,
        bytes: payload.len(),
    };
    payload
        .first_chunk::<SEQUENCE_BYTES>()
        .map(|bytes| u32::from_le_bytes(*bytes))
        .ok_or(cut)
}

pub(in crate::replication) fn decode<'a, T: Deserialize<'a>>(
    payload: &'a [u8],
    what: &'static str,
) -> Result<T, PayloadError> {
    let body = payload.get(SEQUENCE_BYTES..).unwrap_or_default();
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Ok(value),
        _ => Err(PayloadError::Malformed(what)),
    }
}

/// Reads little-endian fields off the front of a slice.
struct Fields<'a> {
    rest: &'a [u8],
    what: &'static str,
    bytes: usize,
}

impl<'a> Fields<'a> {
    fn new(what: &'static str, rest: &'a [u8]) -> Self {
        Self {
            rest,
            what,
            bytes: rest.len(),
        }
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], PayloadError> {
        let cut = PayloadError::CutOff {
            what: self.what,
            bytes: self.bytes,
        };
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(cut)?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], PayloadError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }
}

/// Puts disk changes into payloads of about [`PAYLOAD_TARGET_BYTES`] behind `prefix` bytes of zeroes; hands over each
/// that is full.
pub(in crate::replication) fn encode_disk<E>(
    changes: &[DiskChange],
    prefix: usize,
    mut full: impl FnMut(Vec<u8>) -> Result<(), E>,
) -> Result<(), E> {
    let mut payload = vec![0; prefix];
    for change in changes {
        match &change.what {
            DiskData::Zeroed(len) => disk_record(&mut payload, DISK_ZEROED, change.disk, change.offset, *len, &[]),
            DiskData::Written(data) => {
                let mut offset = change.offset;
                for piece in data.chunks(WRITE_PIECE_BYTES) {
                    disk_record(
                        &mut payload,
                        DISK_WRITTEN,
                        change.disk,
                        offset,
                        piece.len() as u64,
                        piece,
                    );
                    offset += piece.len() as u64;
                    if payload.len() >= PAYLOAD_TARGET_BYTES {
                        full(std::mem::replace(&mut payload, vec![0; prefix]))?;
                    }
                }
            }
        }
        if payload.len() >= PAYLOAD_TARGET_BYTES {
            full(std::mem::replace(&mut payload, vec![0; prefix]))?;
        }
    }
    if payload.len() > prefix { full(payload) } else { Ok(()) }
}

/// Records that [`encode_disk`] makes of a change.
pub(in crate::replication) fn disk_records(change: &DiskChange) -> u64 {
    match &change.what {
        DiskData::Zeroed(_) => 1,
        DiskData::Written(data) => data.len().div_ceil(WRITE_PIECE_BYTES) as u64,
    }
}

/// Records that [`encode_ports`] makes of an item.
pub(super) fn port_records(item: &PortData) -> u64 {
    item.bytes.len().div_ceil(PORT_DATA_MAX_BYTES) as u64
}

fn disk_record(payload: &mut Vec<u8>, kind: u8, disk: u16, offset: u64, len: u64, data: &[u8]) {
    payload.reserve(DISK_RECORD_HEADER + data.len());
    payload.push(kind);
    payload.extend_from_slice(&disk.to_le_bytes());
    payload.extend_from_slice(&offset.to_le_bytes());
    payload.extend_from_slice(&len.to_le_bytes());
    payload.extend_from_slice(data);
}

/// Decodes the disk changes behind `prefix` bytes, for disks of these sizes.
pub(in crate::replication) fn decode_disk(
    payload: &[u8],
    prefix: usize,
    disk_bytes: &[u64],
) -> Result<Vec<DiskChange>, PayloadError> {
    const WHAT: &str = "disk";
    let mut fields = Fields::new(WHAT, payload);
    fields.take(prefix)?;
    let mut changes = Vec::new();
    while !fields.rest.is_empty() {
        let [kind] = fields.array()?;
        let disk = u16::from_le_bytes(fields.array()?);
        let offset = u64::from_le_bytes(fields.array()?);
        let len = u64::from_le_bytes(fields.array()?);
        let size = *disk_bytes.get(usize::from(disk)).ok_or(PayloadError::NoDisk {
            disk,
            disks: disk_bytes.len(),
        })?;
        let inside = offset.checked_add(len).is_some_and(|end| end <= size);
        if len == 0 || !inside || !offset.is_multiple_of(SECTOR_BYTES) || !len.is_multiple_of(SECTOR_BYTES) {
            return Err(PayloadError::DiskRange {
                disk,
                offset,
                len,
                size,
            });
        }
        let what = match kind {
            DISK_WRITTEN => DiskData::Written(fields.take(usize::try_from(len).unwrap_or(usize::MAX))?.into()),
            DISK_ZEROED => DiskData::Zeroed(len),
            _ => return Err(PayloadError::Malformed(WHAT)),
        };
        changes.push(DiskChange { disk, offset, what });
    }
    Ok(changes)
}

/// Puts what left or entered at ports into payloads of about [`PAYLOAD_TARGET_BYTES`] behind `prefix` bytes of
/// zeroes.
pub(super) fn encode_ports<E>(
    items: &[PortData],
    prefix: usize,
    mut full: impl FnMut(Vec<u8>) -> Result<(), E>,
) -> Result<(), E> {
    let mut payload = vec![0; prefix];
    for PortData { port, bytes } in items {
        let (kind, number) = match port {
            Port::Nic(number) => (PORT_NIC, *number),
            Port::Console => (PORT_CONSOLE, 0),
        };
        for piece in bytes.chunks(PORT_DATA_MAX_BYTES) {
            payload.push(kind);
            payload.extend_from_slice(&number.to_le_bytes());
            payload.extend_from_slice(&(piece.len() as u32).to_le_bytes());
            payload.extend_from_slice(piece);
            // Input payloads may have 256 KiB: closed while another piece still fits.
            if payload.len() + PORT_RECORD_HEADER + PORT_DATA_MAX_BYTES > PAYLOAD_TARGET_BYTES {
                full(std::mem::replace(&mut payload, vec![0; prefix]))?;
            }
        }
    }
    if payload.len() > prefix { full(payload) } else { Ok(()) }
}

/// Decodes what left or entered at ports, behind `prefix` bytes, for a machine with `nics` network interfaces.
pub(super) fn decode_ports(
    payload: &[u8],
    prefix: usize,
    what: &'static str,
    nics: u16,
) -> Result<Vec<PortData>, PayloadError> {
    let mut fields = Fields::new(what, payload);
    fields.take(prefix)?;
    let mut items = Vec::new();
    while !fields.rest.is_empty() {
        let [kind] = fields.array()?;
        let number = u16::from_le_bytes(fields.array()?);
        let len = u32::from_le_bytes(fields.array()?) as usize;
        let port = match kind {
            PORT_NIC if number < nics => Port::Nic(number),
            PORT_CONSOLE if number == 0 => Port::Console,
            _ => return Err(PayloadError::NoPort { kind, number, nics }),
        };
        if len == 0 || len > PORT_DATA_MAX_BYTES {
            return Err(PayloadError::PortSize(len));
        }
        items.push(PortData {
            port,
            bytes: fields.take(len)?.to_vec(),
        });
    }
    Ok(items)
}

/// Payloads of `Input` frames: what entered the guest at its ports, in this order. The frame's header says in which
/// epoch.
pub fn encode_input(items: &[PortData]) -> Vec<Vec<u8>> {
    let mut payloads = Vec::new();
    let result: Result<(), std::convert::Infallible> = encode_ports(items, 0, |payload| {
        payloads.push(payload);
        Ok(())
    });
    match result {
        Ok(()) => payloads,
        Err(never) => match never {},
    }
}

/// Decodes the payload of an `Input` frame for a machine with `nics` network interfaces.
pub fn decode_input(payload: &[u8], nics: u16) -> Result<Vec<PortData>, PayloadError> {
    decode_ports(payload, 0, "Input", nics)
}
