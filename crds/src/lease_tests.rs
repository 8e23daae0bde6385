use ftvm_protocol::identity::{Incarnation, Nonce};
use ftvm_protocol::record::Members;

use super::*;

const VM: &str = "0123abcd-4567-4000-8000-0000000000ff";
const HOLDER: &str = "0123abcd-4567-4000-8000-0000000000ff/0000000000000000";
const SEAT: SeatId = SeatId(7);

fn owner() -> OwnerReference {
    OwnerReference {
        uid: VM.to_owned(),
        ..OwnerReference::default()
    }
}

fn read_back() -> Lease {
    let mut lease = genesis("shop", "web", owner(), SEAT, "one", Timestamp::UNIX_EPOCH);
    lease.metadata.uid = Some("0123abcd-0000-4000-8000-000000000001".to_owned());
    lease.metadata.resource_version = Some("12345".to_owned());
    lease
}

#[test]
fn records_round_trip() {
    let mut lease = read_back();
    let first = snapshot(&lease).unwrap();
    assert_eq!(first.record, Record::genesis(SEAT, Phase::Running));
    assert_eq!(first.version, 12345);
    let [a, b] = [1, 2].map(|start| Incarnation { seat: SEAT, start });
    let record = Record {
        holder: a,
        members: Members::pair(a, b),
        term: u64::MAX,
        nonce: Nonce(u128::MAX),
        phase: Phase::Stopped,
        group: 0,
        predecessor: Some(first.uid),
    };
    set_record(&mut lease, &record, Timestamp::UNIX_EPOCH);
    assert_eq!(snapshot(&lease).unwrap().record, record);
    let spec = lease.spec.unwrap();
    assert_eq!(spec.holder_identity, Some(a.to_string()));
    assert_eq!(spec.lease_transitions, Some(i32::MAX));
}

#[test]
fn a_record_of_four_members_fits() {
    let members = (0..4).map(|start| Incarnation {
        seat: SeatId(u128::MAX),
        start,
    });
    let mut lease = read_back();
    let mut record = Record::genesis(SeatId(u128::MAX), Phase::Running);
    record.members = Members::from_list(members.collect()).unwrap();
    record.predecessor = Some(ArbiterUid(u128::MAX));
    set_record(&mut lease, &record, Timestamp::UNIX_EPOCH);
    assert_eq!(snapshot(&lease).unwrap().record, record);
}

#[test]
fn every_malformed_lease_has_its_error() {
    let broken = |change: fn(&mut Lease)| {
        let mut lease = read_back();
        change(&mut lease);
        snapshot(&lease).unwrap_err()
    };
    let record = |lease: &mut Lease, text: &str| {
        let annotations = lease.metadata.annotations.as_mut().unwrap();
        annotations.insert(ANNOTATION_RECORD.to_owned(), text.to_owned());
    };
    assert_eq!(broken(|lease| lease.metadata.uid = None), LeaseError::NoUid);
    assert!(matches!(
        broken(|lease| lease.metadata.uid = Some("x".into())),
        LeaseError::Uid(_)
    ));
    assert_eq!(
        broken(|lease| lease.metadata.resource_version = None),
        LeaseError::NoVersion
    );
    assert_eq!(
        broken(|lease| lease.metadata.resource_version = Some(String::new())),
        LeaseError::NoVersion
    );
    for bad in ["+1", "01", "-1", "1.0", "0x1", "18446744073709551616", "é"] {
        let mut lease = read_back();
        lease.metadata.resource_version = Some(bad.to_owned());
        assert!(matches!(snapshot(&lease), Err(LeaseError::Version(_))), "{bad}");
    }
    assert_eq!(broken(|lease| lease.metadata.annotations = None), LeaseError::NoRecord);
    let mut lease = read_back();
    record(&mut lease, &" ".repeat(RECORD_BYTES_MAX + 1));
    assert_eq!(snapshot(&lease), Err(LeaseError::TooLong(RECORD_BYTES_MAX + 1)));
    let good = serde_json::to_string(&Record::genesis(SEAT, Phase::Running)).unwrap();
    for bad in [
        String::new(),
        "{}".to_owned(),
        "null".to_owned(),
        format!("[{:?},[{:?}],1,{:?},\"Running\",0,null]", HOLDER, HOLDER, VM),
        good.replace("Running", "Walking"),
        good.replacen('{', r#"{"extra":1,"#, 1),
        good.replace(r#""term":1"#, r#""term":-1"#),
        good[..good.len() - 1].to_owned(),
    ] {
        record(&mut lease, &bad);
        assert!(matches!(snapshot(&lease), Err(LeaseError::Malformed(_))), "{bad}");
    }
    let mut other = Record::genesis(SEAT, Phase::Running);
    other.holder = Incarnation { seat: SEAT, start: 5 };
    set_record(&mut lease, &other, Timestamp::UNIX_EPOCH);
    assert_eq!(snapshot(&lease), Err(LeaseError::HolderIsNoMember));
}

#[test]
fn somebody_elses_lease_is_refused() {
    let vm: VmId = VM.parse().unwrap();
    let lease = read_back();
    assert_eq!(check_owner(&lease, "web", vm), Ok(()));
    assert!(matches!(
        check_owner(&lease, "shop", vm),
        Err(LeaseError::Foreign { .. })
    ));
    assert!(matches!(
        check_owner(&lease, "web", VmId(5)),
        Err(LeaseError::OtherOwner { .. })
    ));
    let mut bare = lease.clone();
    bare.metadata.owner_references = None;
    assert!(matches!(
        check_owner(&bare, "web", vm),
        Err(LeaseError::OtherOwner { .. })
    ));
    bare.metadata.labels = None;
    let error = check_owner(&bare, "web", vm).unwrap_err();
    assert!(error.to_string().contains("give the VM another name"), "{error}");
}
