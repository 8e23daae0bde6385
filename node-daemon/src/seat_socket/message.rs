//! What passes over the seat socket: JSON datagrams ([`ftvm_engine::control::Connection`]), some with descriptors.

use serde::{Deserialize, Serialize};

use crate::disks::Step;
use crate::disks::source::Source;

/// Version of these messages.
pub const VERSION: u16 = 2;
/// Name of the socket in its folder.
pub const SOCKET: &str = "seat.sock";
/// Most disks of a seat.
pub const DISKS_MAX: usize = 32;

/// From the seat's program to the daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", rename_all_fields = "camelCase")]
pub enum FromSeat {
    /// First message.
    Hello {
        /// [`VERSION`].
        version: u16,
    },
    /// A disk is being prepared.
    Progress {
        /// Its name.
        disk: String,
        /// What is being done to it.
        step: Step,
        /// Bytes of that step that are done.
        done_bytes: u64,
        /// Of so many.
        total_bytes: u64,
    },
    /// Everything is prepared. Descriptors beside it, in this order: `seat.json`, `certificate.pem`, `key.pem`,
    /// `authority.pem`, kernel, initrd (if there is one), the disks in the order of [`ToSeat::Prepare`], header, journal, console.
    Ready {
        /// Whether there is an initrd.
        initrd: bool,
    },
    /// The disks can't be prepared; it is tried again. For people.
    Failed {
        /// What, where, why, what to do.
        why: String,
    },
    /// The pod is to end: hand over, and end the engine.
    Terminate {},
}

/// From the daemon to the seat's program.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", rename_all_fields = "camelCase")]
pub enum ToSeat {
    /// Not now: try again later.
    Refused {
        /// Why.
        why: String,
    },
    /// Prepare the disks, and hand everything over.
    Prepare(Recipe),
    /// What the seat is now.
    State {
        /// `active`, `standby`, `joining`, `frozen`, `starting`, or `none` without an engine.
        role: String,
        /// Whether the pod is ready.
        ready: bool,
        /// Why not, for people.
        why: String,
    },
    /// The engine has ended for good.
    End {
        /// Exit code for the seat's program.
        code: u8,
        /// Why.
        why: String,
    },
}

/// What a seat is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Recipe {
    /// Path of the kernel in the guest image.
    pub kernel: String,
    /// Path of the initial RAM disk there; if missing, [`DEFAULT_INITRD`] if there is such a file.
    #[serde(default)]
    pub initrd: Option<String>,
    /// The disks; header and journal of the seat lie beside the first one.
    pub disks: Vec<DiskToPrepare>,
}

/// The initial RAM disk if none is named and it exists.
pub const DEFAULT_INITRD: &str = "/boot/initrd";

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DiskToPrepare {
    /// Its name.
    pub name: String,
    /// Its size.
    pub size_bytes: u64,
    /// True while no guest ever ran: it gets its first contents. Otherwise it is filled by replication, or holds what it held.
    pub original: bool,
    /// First contents. Zeros if missing.
    #[serde(default)]
    pub source: Option<Source>,
}

/// Names under which descriptors are spoken of, in the order of [`FromSeat::Ready`].
pub fn descriptor_names(disks: &[String], initrd: bool) -> Vec<String> {
    let identity = ["seat.json", "certificate.pem", "key.pem", "authority.pem", "kernel"];
    let mut names: Vec<String> = identity.map(str::to_owned).to_vec();
    names.extend(initrd.then(|| "initrd".to_owned()));
    names.extend(disks.iter().map(|disk| format!("disk {disk}")));
    names.extend(["header", "journal", "console"].map(str::to_owned));
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disks::source::{Format, Place};

    #[test]
    fn the_wire_form_is_the_documented_one() {
        let prepare = ToSeat::Prepare(Recipe {
            kernel: "/boot/vmlinuz".into(),
            initrd: None,
            disks: vec![DiskToPrepare {
                name: "root".into(),
                size_bytes: 7,
                original: true,
                source: Some(Source {
                    place: Place::Image {
                        path: "/disk/root.qcow2".into(),
                        backing: Vec::new(),
                    },
                    format: Some(Format::Qcow2),
                    compression: None,
                    sha256: None,
                }),
            }],
        });
        let text = serde_json::to_string(&prepare).unwrap();
        assert_eq!(
            text,
            r#"{"type":"prepare","kernel":"/boot/vmlinuz","initrd":null,"disks":[{"name":"root","sizeBytes":7,"original":true,"source":{"place":{"kind":"image","path":"/disk/root.qcow2"},"format":"qcow2","compression":null,"sha256":null}}]}"#
        );
        // Peers of an earlier release have no word for backing files.
        let backed = text.replace(
            r#""path":"/disk/root.qcow2""#,
            r#""path":"/disk/root.qcow2","backing":["/disk/base.raw"]"#,
        );
        let ToSeat::Prepare(recipe) = serde_json::from_str::<ToSeat>(&backed).unwrap() else {
            panic!("{backed}")
        };
        let place = recipe.disks[0].source.as_ref().map(|source| &source.place);
        assert!(
            matches!(place, Some(Place::Image { backing, .. }) if backing[..] == ["/disk/base.raw"]),
            "{place:?}"
        );
        assert_eq!(serde_json::to_string(&ToSeat::Prepare(recipe)).unwrap(), backed);
        let progress = r#"{"type":"progress","disk":"root","step":"downloading","doneBytes":1,"totalBytes":2}"#;
        let progress: FromSeat = serde_json::from_str(progress).unwrap();
        assert!(matches!(progress, FromSeat::Progress { done_bytes: 1, .. }));
        let terminate: FromSeat = serde_json::from_str(r#"{"type":"terminate"}"#).unwrap();
        assert_eq!(terminate, FromSeat::Terminate {});
    }
}
