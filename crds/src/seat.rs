//! What daemon and operator tell each other through annotations of a seat's pod.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use ftvm_protocol::identity::{ArbiterUid, Incarnation, Term};
use ftvm_protocol::record::Record;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::names::{ANNOTATION_LOOK, ANNOTATION_REQUEST, ANNOTATION_SEAT_STATUS};

/// A failure on request ([`Order::Failover`]) that its daemon has not begun within this time does not come any more.
pub const FAILOVER_WITHIN: Duration = Duration::from_secs(60);

/// Most bytes of one of these annotations.
pub const BYTES_MAX: usize = 8 * 1024;
/// Most bytes of a look that is repeated.
pub const LOOK_BYTES_MAX: usize = 64;

/// An annotation that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AnnotationError {
    /// Longer than [`BYTES_MAX`].
    #[error(
        "annotation {annotation} has {length_bytes} bytes, at most {BYTES_MAX} are read: remove it, its writer writes it anew"
    )]
    TooLong {
        /// Its name.
        annotation: &'static str,
        /// Its length.
        length_bytes: usize,
    },
    /// Not what it should be.
    #[error("annotation {annotation} is malformed ({why}): remove it, its writer writes it anew")]
    Malformed {
        /// Its name.
        annotation: &'static str,
        /// Where and why.
        why: String,
    },
}

/// What an engine is, in the engine's own words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum SeatRole {
    /// Waits: for its turn to boot, or for a leader to join.
    Starting,
    /// Receives its first whole checkpoint.
    Joining,
    /// Holds a complete checkpoint and follows the active.
    Standby,
    /// Runs the guest.
    Active,
    /// Handed the guest over and waits for the outcome.
    Frozen,
    /// Ended for good.
    Ended,
}

/// Published by the daemon as [`ANNOTATION_SEAT_STATUS`]. A missing annotation is the same as the default.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SeatPublished {
    /// The engine that runs: written once it does, removed once it has ended. Missing does not prove that none runs; a pod that is gone does.
    pub incarnation: Option<Incarnation>,
    /// What the engine is.
    pub role: Option<SeatRole>,
    /// The engine leads or follows a protected pair.
    pub protected: bool,
    /// The engine has the guest, which stands still until a standby has joined.
    pub paused: bool,
    /// The engine has a guest, or a checkpoint that it may run, or has written itself into the record to boot.
    pub holds_guest: bool,
    /// Term in force as the engine knows it.
    pub term: Term,
    /// Why the role is what it is, why not protected, or why there is no engine.
    pub why: String,
    /// Exit code (`docs/exit-codes.md`) of what `why` says if a person has to mend it, else 0.
    pub code: u8,
    /// The link to the peer is up.
    pub peer_connected: bool,
    /// False after the last request to the arbiter failed.
    pub arbiter_reachable: bool,
    /// UID of the Lease that the engine goes by: its header says so, durably.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lease_uid: Option<ArbiterUid>,
    /// The record that may be created in place of a Lease that the engine found gone (rule 10). What was vouched for once stays
    /// true of that Lease; see [`ftvm_protocol::recreation`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vouches: Option<Record>,
    /// Progress of preparing disks or of a resync, 0 to 100.
    pub resync_percent: Option<u8>,
    /// What of the seat's storage does not work: under the guest, until it works again; what ended an engine (code 21), until a later one has served for long.
    /// Not `storage`, which was a text in earlier releases: theirs would not read another shape, nor anything else of this seat then.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "known_troubles")]
    pub storage_troubles: Vec<StorageTrouble>,
    /// Engines in a row that ended because of the seat's storage (code 21), none of which was a standby or had the guest for long.
    #[serde(skip_serializing_if = "crate::status::is_zero")]
    pub storage_failures: u32,
    /// The last time that this seat became active.
    pub last_takeover: Option<Takeover>,
    /// How the last engine ended.
    pub last_exit: Option<SeatExit>,
    /// The last request that was executed.
    pub done_request: Option<DoneRequest>,
    /// Id of a failure ([`Order::Failover`]) that its daemon brings about. Written only over a pod that asks for it, so that whoever takes that
    /// back, over a pod without this, knows that it never comes. Stays until the answer is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub begun: Option<String>,
    /// The pod is being deleted, no engine of it runs, and none is begun any more, by this daemon or a later one: never taken back.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub over: bool,
    /// The machine that the daemon is on, as kubelet tells machines: what it says of engines it says of that one. Missing if it can't tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
    /// What [`ANNOTATION_LOOK`] says, as its daemon saw it: whoever wrote that knows that all this was said since. Not repeated while the engine does
    /// not answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub look: Option<String>,
    /// Average length of epochs in milliseconds as of this writing; no reason to write soon.
    pub interval_ms: Option<u32>,
    /// Average time in milliseconds that output waited for the standby, as of this writing; no reason to write soon.
    pub lag_ms: Option<u32>,
}

/// Something of a seat's storage does not work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StorageTrouble {
    /// Which part.
    pub part: StoragePart,
    /// How.
    pub kind: StorageKind,
    /// It was the guest that used it: the seat was the active one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub under_guest: bool,
    /// Since when, in milliseconds since 1970 by its node's clock.
    pub since_unix_ms: u64,
    /// What failed, with the operating system's error.
    pub why: String,
}

/// A part of a seat's storage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum StoragePart {
    /// A disk of the guest, by its name.
    Disk(String),
    /// The journal of a seat that follows.
    Journal,
    /// The seat's header.
    Header,
    /// One of these: `why` says which, if that is known.
    Unknown,
}

impl fmt::Display for StoragePart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk(name) => write!(f, "disk {name}"),
            Self::Journal => f.write_str("the journal"),
            Self::Header => f.write_str("the header"),
            Self::Unknown => f.write_str("its storage"),
        }
    }
}

/// How storage does not work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum StorageKind {
    /// An I/O error.
    Failed,
    /// No room, or no quota, is left.
    Full,
    /// A request has been under way for too long, and may be done yet.
    Hangs,
}

impl fmt::Display for StorageKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Failed => "fails",
            Self::Full => "is full",
            Self::Hangs => "hangs",
        })
    }
}

/// A seat became active.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Takeover {
    /// When, in milliseconds since 1970.
    pub unix_ms: u64,
    /// Why: `peer lost`, `switchover`, ...
    pub reason: String,
    /// From the reason's beginning to the running guest.
    pub microseconds: u64,
}

/// An engine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SeatExit {
    /// Which one.
    pub incarnation: Incarnation,
    /// Its exit code (`docs/exit-codes.md`).
    pub code: u8,
    /// What, where, why, what to do.
    pub message: String,
    /// When, in milliseconds since 1970.
    pub unix_ms: u64,
}

/// A request came to its end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DoneRequest {
    /// Its id.
    pub id: String,
    /// Why it was refused; missing if it was done, or begun.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

/// Written by the operator as [`ANNOTATION_REQUEST`]. A daemon executes each id once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeatRequest {
    /// Names the request: another id is another request.
    pub id: String,
    /// What to do.
    #[serde(flatten)]
    pub order: Order,
    /// Of a failure: until when it is meant, in milliseconds since 1970 by the operator's clock. Missing from an operator of an earlier release.
    #[serde(default, rename = "untilUnixMs", skip_serializing_if = "Option::is_none")]
    pub until_unix_ms: Option<u64>,
}

/// What to do, in the words of the engine's commands where it is one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Order {
    /// Planned switchover (rule 6).
    Switchover,
    /// Kill the engine as a crash would end it, if it is active and its standby would take over. Not a command of the engine:
    /// its daemon does it.
    Failover,
    /// The failure that was asked for under this id is not wanted any more. A daemon that has not begun it never does.
    TakeBack,
    /// Stop the virtual machine (rule 7).
    Stop,
    /// Start over a record that says Stopped at exactly this term (rule 7).
    Start {
        /// Term of the Stopped record.
        over_stopped_term: Term,
    },
    /// Boot although others may have more (rule 9).
    AcceptDataLoss {
        /// The holder as the person saw it.
        holder: Incarnation,
        /// The record's term as the person saw it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        term: Option<Term>,
        /// Of a record that says Stopped: start over it, too.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        over_stopped_term: Option<Term>,
    },
}

/// What a later release says otherwise is left out: whatever else the seat says counts.
fn known_troubles<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<StorageTrouble>, D::Error> {
    let told = Value::deserialize(from)?;
    let told = told.as_array().into_iter().flatten();
    Ok(told.filter_map(|told| StorageTrouble::deserialize(told).ok()).collect())
}

impl SeatPublished {
    /// What a pod's annotations say.
    ///
    /// # Errors
    /// If the annotation is too long or malformed.
    pub fn of(annotations: &BTreeMap<String, String>) -> Result<SeatPublished, AnnotationError> {
        Ok(read(annotations, ANNOTATION_SEAT_STATUS)?.unwrap_or_default())
    }
}

/// What a leader of the operator wrote as [`ANNOTATION_LOOK`]; none, too, if it is longer than any that it draws.
pub fn look(annotations: &BTreeMap<String, String>) -> Option<&String> {
    annotations
        .get(ANNOTATION_LOOK)
        .filter(|look| look.len() <= LOOK_BYTES_MAX)
}

impl SeatRequest {
    /// What a pod's annotations ask for.
    ///
    /// # Errors
    /// If the annotation is too long or malformed.
    pub fn of(annotations: &BTreeMap<String, String>) -> Result<Option<SeatRequest>, AnnotationError> {
        read(annotations, ANNOTATION_REQUEST)
    }
}

fn read<T: DeserializeOwned>(
    annotations: &BTreeMap<String, String>,
    annotation: &'static str,
) -> Result<Option<T>, AnnotationError> {
    let Some(text) = annotations.get(annotation) else {
        return Ok(None);
    };
    if text.len() > BYTES_MAX {
        let length_bytes = text.len();
        return Err(AnnotationError::TooLong {
            annotation,
            length_bytes,
        });
    }
    let parsed = crate::from_json_object(text).map_err(|why| AnnotationError::Malformed { annotation, why });
    parsed.map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotated(name: &str, text: &str) -> BTreeMap<String, String> {
        [(name.to_owned(), text.to_owned())].into()
    }

    #[test]
    fn requests_are_written_as_documented() {
        let holder = "0123abcd-0000-4000-8000-0000000000ff/000000000000beef";
        for (order, text) in [
            (Order::Switchover, r#"{"id":"1","do":"switchover"}"#.to_owned()),
            (Order::Failover, r#"{"id":"1","do":"failover"}"#.to_owned()),
            (Order::TakeBack, r#"{"id":"1","do":"takeBack"}"#.to_owned()),
            (Order::Stop, r#"{"id":"1","do":"stop"}"#.to_owned()),
            (
                Order::Start { over_stopped_term: 7 },
                r#"{"id":"1","do":"start","overStoppedTerm":7}"#.to_owned(),
            ),
            (
                Order::AcceptDataLoss {
                    holder: holder.parse().unwrap(),
                    term: None,
                    over_stopped_term: None,
                },
                format!(r#"{{"id":"1","do":"acceptDataLoss","holder":"{holder}"}}"#),
            ),
            (
                Order::AcceptDataLoss {
                    holder: holder.parse().unwrap(),
                    term: Some(7),
                    over_stopped_term: Some(7),
                },
                format!(r#"{{"id":"1","do":"acceptDataLoss","holder":"{holder}","term":7,"overStoppedTerm":7}}"#),
            ),
        ] {
            let request = SeatRequest {
                id: "1".to_owned(),
                order,
                until_unix_ms: None,
            };
            assert_eq!(serde_json::to_string(&request).unwrap(), text);
            assert_eq!(
                SeatRequest::of(&annotated(ANNOTATION_REQUEST, &text)),
                Ok(Some(request))
            );
        }
        let meant = SeatRequest {
            id: "1".to_owned(),
            order: Order::Failover,
            until_unix_ms: Some(7),
        };
        let text = r#"{"id":"1","do":"failover","untilUnixMs":7}"#;
        assert_eq!(serde_json::to_string(&meant).unwrap(), text);
        assert_eq!(SeatRequest::of(&annotated(ANNOTATION_REQUEST, text)), Ok(Some(meant)));
    }

    #[test]
    fn a_status_survives_and_unknown_fields_are_left_to_later_versions() {
        let text = r#"{"role":"active","protected":true,"term":9,"arbiterReachable":true,"later":1,
            "lastTakeover":{"unixMs":1,"reason":"peer lost","microseconds":2},"doneRequest":{"id":"x"}}"#;
        let published = SeatPublished::of(&annotated(ANNOTATION_SEAT_STATUS, text)).unwrap();
        assert_eq!(published.role, Some(SeatRole::Active));
        assert_eq!((published.protected, published.term), (true, 9));
        assert_eq!(published.done_request.as_ref().unwrap().refused, None);
        let again = serde_json::to_string(&published).unwrap();
        assert_eq!(
            SeatPublished::of(&annotated(ANNOTATION_SEAT_STATUS, &again)),
            Ok(published)
        );
        assert_eq!(SeatPublished::of(&BTreeMap::new()), Ok(SeatPublished::default()));
    }

    #[test]
    fn storage_is_written_as_documented() {
        let trouble = |part, kind| StorageTrouble {
            part,
            kind,
            under_guest: kind == StorageKind::Full,
            since_unix_ms: 7,
            why: "no".to_owned(),
        };
        let published = SeatPublished {
            storage_troubles: vec![
                trouble(StoragePart::Disk("root".to_owned()), StorageKind::Full),
                trouble(StoragePart::Journal, StorageKind::Hangs),
            ],
            storage_failures: 2,
            ..SeatPublished::default()
        };
        let text = serde_json::to_string(&published).unwrap();
        let root = r#"{"part":{"disk":"root"},"kind":"full","underGuest":true,"sinceUnixMs":7,"why":"no"}"#;
        let journal = r#"{"part":"journal","kind":"hangs","sinceUnixMs":7,"why":"no"}"#;
        let fields = format!(r#""storageTroubles":[{root},{journal}],"storageFailures":2"#);
        assert!(text.contains(&fields), "{text}");
        assert_eq!(
            SeatPublished::of(&annotated(ANNOTATION_SEAT_STATUS, &text)),
            Ok(published)
        );
        let well = serde_json::to_string(&SeatPublished::default()).unwrap();
        assert!(!well.contains("storage"), "{well}");
    }

    /// Operator and daemons are never replaced at once.
    #[test]
    fn storage_of_another_release_costs_no_other_word() {
        let known = r#"{"part":"header","kind":"failed","sinceUnixMs":7,"why":"no"}"#;
        for (text, troubles) in [
            (r#""storage":"disk root: writing: I/O error""#.to_owned(), 0),
            (r#""storageTroubles":"disk root: writing: I/O error""#.to_owned(), 0),
            (format!(r#""storageTroubles":[{{"part":"roof"}},{known},7]"#), 1),
        ] {
            let text = format!(r#"{{"role":"active","protected":true,"term":9,{text},"look":"x"}}"#);
            let published = SeatPublished::of(&annotated(ANNOTATION_SEAT_STATUS, &text)).unwrap();
            assert_eq!((published.role, published.term), (Some(SeatRole::Active), 9));
            assert!(published.protected && published.look.is_some(), "{text}");
            assert_eq!(published.storage_troubles.len(), troubles, "{text}");
        }
        // An earlier one reads a text there, or nothing.
        let published = SeatPublished {
            storage_troubles: vec![serde_json::from_str(known).unwrap()],
            ..SeatPublished::default()
        };
        let told = serde_json::to_value(&published).unwrap();
        assert!(
            told.get("storageTroubles").is_some() && told.get("storage").is_none(),
            "{told}"
        );
    }

    #[test]
    fn a_look_is_bounded() {
        let short = annotated(ANNOTATION_LOOK, "0123456789abcdef");
        assert_eq!(look(&short).map(String::as_str), Some("0123456789abcdef"));
        assert_eq!(look(&annotated(ANNOTATION_LOOK, &"x".repeat(LOOK_BYTES_MAX + 1))), None);
        assert_eq!(look(&BTreeMap::new()), None);
        let published = SeatPublished {
            look: Some("x".to_owned()),
            ..SeatPublished::default()
        };
        let text = serde_json::to_string(&published).unwrap();
        assert_eq!(
            SeatPublished::of(&annotated(ANNOTATION_SEAT_STATUS, &text)),
            Ok(published)
        );
    }

    #[test]
    fn hostile_annotations_are_named_errors() {
        let long = annotated(ANNOTATION_SEAT_STATUS, &" ".repeat(BYTES_MAX + 1));
        assert!(matches!(SeatPublished::of(&long), Err(AnnotationError::TooLong { .. })));
        for text in [
            "",
            "[]",
            "{",
            r#"{"role":"king"}"#,
            r#"{"incarnation":"x"}"#,
            r#"{"code":256}"#,
            r#"{"storageFailures":-1}"#,
        ] {
            let error = SeatPublished::of(&annotated(ANNOTATION_SEAT_STATUS, text)).unwrap_err();
            assert!(matches!(error, AnnotationError::Malformed { .. }), "{text}");
        }
        for text in [r#"{"id":"1"}"#, r#"{"id":"1","do":"dance"}"#, r#"{"do":"stop"}"#] {
            assert!(SeatRequest::of(&annotated(ANNOTATION_REQUEST, text)).is_err(), "{text}");
        }
    }
}
