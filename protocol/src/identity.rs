//! Names and numbers that every part of the protocol shares.
//!
//! Nothing here is secret and nothing is random by itself: random values (an incarnation's `start`) are drawn by the
//! program that starts an engine and handed in.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Term of an arbiter record: plus one at every write.
pub type Term = u64;
/// Number of an epoch. The running epoch has the number under which it will be sealed; numbers grow through the whole
/// life of a guest (takeover and switchover go on counting, a boot starts at 1).
pub type Epoch = u64;

/// Why a text is no identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Not 32 hexadecimal digits in the grouping 8-4-4-4-12.
    #[error("`{0}` is not a UUID (expected 8-4-4-4-12 hexadecimal digits)")]
    NotUuid(String),
    /// Not `UUID/16 hexadecimal digits`.
    #[error("`{0}` is not an incarnation (expected SEAT-UUID/16 hexadecimal digits)")]
    NotIncarnation(String),
}

fn clip(text: &str) -> String {
    text.chars().take(64).collect()
}

fn parse_uuid(text: &str) -> Result<u128, IdentityError> {
    let bad = || IdentityError::NotUuid(clip(text));
    let bytes = text.as_bytes();
    if bytes.len() != 36 {
        return Err(bad());
    }
    let mut value = 0u128;
    for (at, byte) in bytes.iter().enumerate() {
        if matches!(at, 8 | 13 | 18 | 23) {
            if *byte != b'-' {
                return Err(bad());
            }
            continue;
        }
        let digit = (*byte as char).to_digit(16).ok_or_else(bad)?;
        value = value << 4 | u128::from(digit);
    }
    Ok(value)
}

fn format_uuid(value: u128, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let hex = format!("{value:032x}");
    write!(
        f,
        "{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    )
}

macro_rules! uuid_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        ///
        /// Text form: a lower-case UUID. Serialised as that text in human-readable formats, as a u128 otherwise.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u128);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                format_uuid(self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({:x})", stringify!($name), self.0)
            }
        }

        impl FromStr for $name {
            type Err = IdentityError;
            fn from_str(text: &str) -> Result<Self, IdentityError> {
                parse_uuid(text).map(Self)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() { serializer.collect_str(self) } else { self.0.serialize(serializer) }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    let text = String::deserialize(deserializer)?;
                    text.parse().map_err(de::Error::custom)
                } else {
                    u128::deserialize(deserializer).map(Self)
                }
            }
        }
    };
}

uuid_type! {
    /// One of the places of a VM. On Kubernetes the UID of the seat's pod; a replaced seat is a new one.
    SeatId
}
uuid_type! {
    /// A VM. Two engines of different VMs refuse each other.
    VmId
}
uuid_type! {
    /// Identity of the arbiter's record as an object (`metadata.uid` of the Lease; of the file arbiter: drawn when its
    /// directory is set up). A deleted and re-created record has another one.
    ArbiterUid
}
uuid_type! {
    /// Fresh at every write of the record, so that a writer recognises its own write.
    Nonce
}

/// One start of the engine of a seat: node reboots and engine restarts keep the seat, never the incarnation.
///
/// Text form `SEAT-UUID/16 hexadecimal digits` (what a Lease shows as holder).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Incarnation {
    /// The seat.
    pub seat: SeatId,
    /// Random value of this engine start. Zero is reserved for [`Incarnation::genesis`].
    pub start: u64,
}

impl Incarnation {
    /// The name under which a brand-new seat with the VM's original disk is entered in the first record and in its
    /// first header (see [`crate::header::SeatHeader::genesis`]). No engine ever runs under it.
    pub fn genesis(seat: SeatId) -> Self {
        Self { seat, start: 0 }
    }
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{:016x}", self.seat, self.start)
    }
}

impl fmt::Debug for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}/{:x}", self.seat.0, self.start)
    }
}

impl FromStr for Incarnation {
    type Err = IdentityError;
    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let bad = || IdentityError::NotIncarnation(clip(text));
        let (seat, start) = text.split_once('/').ok_or_else(bad)?;
        if start.len() != 16 || !start.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(bad());
        }
        let seat = seat.parse().map_err(|_| bad())?;
        let start = u64::from_str_radix(start, 16).map_err(|_| bad())?;
        Ok(Self { seat, start })
    }
}

impl Serialize for Incarnation {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            (self.seat, self.start).serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for Incarnation {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            let text = String::deserialize(deserializer)?;
            text.parse().map_err(de::Error::custom)
        } else {
            let (seat, start) = Deserialize::deserialize(deserializer)?;
            Ok(Self { seat, start })
        }
    }
}

/// Name in the certificate of a seat: `SEAT-UUID.VM-UUID.ftvm`, the only DNS subject alternative name in it.
pub fn identity_name(vm: VmId, seat: SeatId) -> String {
    format!("{seat}.{vm}.ftvm")
}

/// Who a seat is: the file `seat.json` of its identity, beside its certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SeatIdentity {
    /// Name of the virtual machine.
    pub vm: String,
    /// The virtual machine.
    pub vm_id: VmId,
    /// Name of the seat.
    pub seat: String,
    /// The seat.
    pub seat_id: SeatId,
    /// Every seat that was known when this was made, this one too.
    pub seats: BTreeMap<String, SeatId>,
}

/// One authenticated connection to the peer's engine. Chosen by the driver, never used twice in one engine process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkId(pub u64);

/// One replication stream of one leader to one follower, from the beginning of a resync (or of a switchover's reversal)
/// to its end. Counted by the leader; unique together with the leader's incarnation. Frames and acknowledgments of
/// another session are void.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SessionId(pub u64);

/// Names a request of the core to its driver; the answer carries it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_forms_round_trip() {
        let seat: SeatId = "0123abcd-0000-4000-8000-0000000000ff".parse().unwrap();
        assert_eq!(seat.to_string(), "0123abcd-0000-4000-8000-0000000000ff");
        let incarnation = Incarnation { seat, start: 0xbeef };
        assert_eq!(
            incarnation.to_string(),
            "0123abcd-0000-4000-8000-0000000000ff/000000000000beef"
        );
        assert_eq!(incarnation.to_string().parse::<Incarnation>(), Ok(incarnation));
    }

    #[test]
    fn strange_texts_are_refused() {
        for text in [
            "",
            "x",
            "0123abcd-0000-4000-8000-0000000000f",
            "0123abcd+0000-4000-8000-0000000000ff",
            "é",
        ] {
            assert!(text.parse::<SeatId>().is_err(), "{text}");
        }
        let seat = "0123abcd-0000-4000-8000-0000000000ff";
        for tail in [
            "",
            "/",
            "/beef",
            "/+00000000000beef",
            "/000000000000beeg",
            "/000000000000beef0",
        ] {
            assert!(format!("{seat}{tail}").parse::<Incarnation>().is_err(), "{tail}");
        }
    }

    #[test]
    fn binary_form_round_trips() {
        let incarnation = Incarnation {
            seat: SeatId(7),
            start: 9,
        };
        let bytes = postcard::to_allocvec(&incarnation).unwrap();
        assert_eq!(postcard::from_bytes::<Incarnation>(&bytes).unwrap(), incarnation);
    }
}
