//! What becomes of files that were handed over.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use ftvm_protocol::core::SwapOutcome;
use ftvm_protocol::identity::ArbiterUid;
use ftvm_protocol::record::{self, Record, Snapshot};

use super::*;
use crate::arbiter::{Arbiter, Said};
use crate::config::Config;
use crate::seat::testing::{Rig, healthy};
use crate::seat_socket::message::Recipe;
use crate::testing::unnamed_file;

const OWN: SeatId = SeatId(0xa);
const OTHER: SeatId = SeatId(0xb);

/// The record names this seat as the first one.
struct First(SeatId);

impl Arbiter for First {
    fn read(&self) -> Said<ReadOutcome> {
        let snapshot = Snapshot {
            record: Record::genesis(self.0, record::Phase::Running),
            uid: ArbiterUid(0x1ea5e),
            version: 1,
        };
        (ReadOutcome::Found(snapshot), None)
    }

    fn swap(&self, _: ArbiterUid, _: u64, _: &Record, _: Instant) -> Said<SwapOutcome> {
        panic!("nothing of this writes the record")
    }
}

fn handed() -> Handed {
    let expected = Expected {
        vm: "web".to_owned(),
        vm_id: VmId(1),
        seat: "web-a".to_owned(),
        seat_id: OWN,
    };
    Handed::new(expected, Hierarchies::read().unwrap())
}

fn held(original: bool) -> Held {
    Held {
        peer: Arc::new(Peer::own(OWN)),
        who: SeatIdentity {
            vm: "web".to_owned(),
            vm_id: VmId(1),
            seat: "web-a".to_owned(),
            seat_id: OWN,
            seats: BTreeMap::new(),
        },
        identity: Identity {
            certificate_pem: String::new(),
            key_pem: Secret(String::new()),
            authority_pem: String::new(),
        },
        kernel: unnamed_file(),
        initrd: None,
        disks: vec![unnamed_file()],
        original,
        header: unnamed_file(),
        journal: unnamed_file(),
        console: unnamed_file(),
    }
}

/// The record moved here after the disks were made: zeros would be booted in the place of the guest's first contents.
#[test]
fn a_guest_begins_only_on_disks_that_were_prepared_for_it() {
    let example = include_str!("../../../docs/examples/standalone-a.yaml");
    let config = Config::parse(example, Path::new("example")).unwrap().seats.remove(0);
    let settle = |handed: &Handed, first| handed.settle(&config, &Bounded::new(Arc::new(First(first))));
    let header = |handed: &Handed| read_header(&handed.whole().unwrap().header).unwrap();
    let handed = handed();
    handed.put(held(false));
    settle(&handed, OTHER).unwrap();
    assert_eq!(header(&handed), StoredHeader::Absent, "it joins");
    let blank = handed.whole().unwrap();
    let refused = settle(&handed, OWN).unwrap_err();
    assert!(matches!(refused, SeatError::NotYet { .. }), "{refused}");
    assert_eq!(read_header(&blank.header).unwrap(), StoredHeader::Absent);
    assert!(!handed.is_whole(), "its program is asked anew");
    handed.put(held(true));
    settle(&handed, OWN).unwrap();
    assert!(matches!(header(&handed), StoredHeader::Found(_)));
}

/// A daemon that starts while the API server is away takes the programs of its engines all the same.
#[test]
fn a_program_whose_engine_runs_is_asked_without_a_record() {
    let rig = Rig::new();
    let pod = rig.pod();
    pod.set_recipe(Recipe {
        kernel: "/boot/vmlinuz".to_owned(),
        initrd: None,
        disks: vec![DiskToPrepare {
            name: "root".to_owned(),
            size_bytes: 1 << 20,
            original: false,
            source: None,
        }],
    });
    let (_, mut first) = healthy(1);
    first.record = Record::genesis(OWN, record::Phase::Running);
    for record in [None, Some(first)] {
        rig.write(record);
        assert!(!pod.recipe().unwrap().disks[0].original, "its engine has them");
    }
    rig.seat.kill();
    rig.wait("its end is noticed", |rig| !rig.seat.has_engine());
    assert!(pod.recipe().unwrap().disks[0].original);
    rig.write(None);
    assert_eq!(pod.recipe().unwrap_err(), "no route to it");
}
