use ftvm_crds::seat::SeatPublished;
use ftvm_protocol::identity::SeatId;
use ftvm_protocol::record::Members;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::*;
use crate::testing::{PROTECTED, of, seen};

const FIRST: &str = "0123abcd-0000-4000-8000-00000000000a";
const SECOND: &str = "0123abcd-0000-4000-8000-00000000000b";
const STRANGER: &str = "0123abcd-0000-4000-8000-0000000000ee";
const LEASE: &str = "0123abcd-0000-4000-8000-000000000001";

fn incarnation(seat: &str) -> Incarnation {
    let seat: SeatId = seat.parse().unwrap();
    Incarnation { seat, start: 0xbeef }
}

fn record_of(members: &[&str], phase: Phase) -> Record {
    let holder = incarnation(members[0]);
    let members = members.iter().map(|seat| incarnation(seat)).collect();
    Record {
        holder,
        members: Members::from_list(members).unwrap(),
        term: 7,
        ..Record::genesis(holder.seat, phase)
    }
}

/// As the operator makes it, and the API server gives it.
fn lease_of(record: &Record) -> Lease {
    let owner = OwnerReference {
        uid: "0123abcd-4567-4000-8000-0000000000ff".to_owned(),
        ..OwnerReference::default()
    };
    let mut lease = ftvm_crds::lease::new("shop", "web", owner, record, String::new(), Timestamp::UNIX_EPOCH);
    lease.metadata.uid = Some(LEASE.to_owned());
    lease.metadata.resource_version = Some("12345".to_owned());
    lease
}

/// Which terms pods tell.
fn said(terms: &[(&str, Term)]) -> Said {
    let told = |(uid, term): &(&str, Term)| {
        let told = SeatPublished {
            term: *term,
            ..SeatPublished::default()
        };
        ((*uid).to_owned(), Ok(told))
    };
    Ok(terms.iter().map(told).collect())
}

/// Nobody has the guest; `change` is made of that.
fn waiting(change: impl Fn(&mut Value)) -> FaultTolerantVM {
    let mut object = seen("web", PROTECTED).object;
    object["status"]["phase"] = json!("Starting");
    object["status"]["active"] = Value::Null;
    object["status"]["leaseUid"] = json!(LEASE);
    let ready = &mut object["status"]["conditions"][0];
    ready["status"] = json!("False");
    ready["reason"] = json!("NodeNeeded");
    ready["message"] =
        json!("node n1 is away: accept it (kubectl annotate ftvm web --overwrite ftvm.dev/accept-data-loss=X@7)");
    change(&mut object);
    *of(object).vm.unwrap()
}

fn lines(record: &Record, change: impl Fn(&mut Value)) -> String {
    plan(&waiting(change), Some(&lease_of(record)), &said(&[(FIRST, 7)]))
        .unwrap()
        .lines
        .join("\n")
}

#[test]
fn the_annotation_names_holder_and_term_as_the_record_has_them() {
    let record = record_of(&[FIRST, SECOND], Phase::Running);
    let plan = plan(&waiting(|_| ()), Some(&lease_of(&record)), &said(&[])).unwrap();
    assert_eq!(plan.of, format!("{FIRST}/000000000000beef@7"));
    assert_eq!(plan.term, 7);
}

#[test]
fn who_is_used_and_what_is_lost_is_told() {
    let pair = lines(&record_of(&[FIRST, SECOND], Phase::Running), |_| ());
    for words in [
        "term 7 seat web-x7k2q on node n1 had the guest last",
        "It was protected: nothing that it flushed",
        "is lost in any case: it is booted",
        "Seat web-x7k2q: node n1; the record names it; it knows term 7.",
        "Seat web-bbbbb: node n2; the record names it; it does not say which term it knows.",
        "The VM says: node n1 is away",
    ] {
        assert!(pair.contains(words), "{words}: {pair}");
    }
    assert!(
        !pair.contains("No condition of the VM asks for this") && !pair.contains("old copy. All"),
        "{pair}"
    );
    let alone = lines(&record_of(&[FIRST], Phase::Running), |_| ());
    assert!(
        alone.contains("It ran alone") && alone.contains("Seat web-bbbbb: node n2; the record does not name it;"),
        "{alone}"
    );
    let stopped = lines(&record_of(&[FIRST, SECOND], Phase::Stopped), |_| ());
    assert!(stopped.contains("It was stopped in order"), "{stopped}");
    let unknown = lines(&record_of(&[STRANGER], Phase::Running), |_| ());
    assert!(
        unknown.contains("which is none of the VM's seats, had the guest last. Its disk is not used"),
        "{unknown}"
    );
}

#[test]
fn an_old_copy_of_the_record_and_conditions_that_ask_for_nothing_are_told() {
    let record = record_of(&[FIRST, SECOND], Phase::Running);
    let old = lines(&record, |object| object["status"]["term"] = json!(9));
    assert!(
        old.contains("says term 7, and the status knew 9: it is an old copy. All") && !old.contains("It was protected"),
        "{old}"
    );
    // So it is where seats alone know, also if the first record was brought back.
    let genesis = Record::genesis(FIRST.parse().unwrap(), Phase::Running);
    for record in [&record, &genesis] {
        let told = said(&[(FIRST, 7), (SECOND, 12)]);
        let plan = plan(&waiting(|_| ()), Some(&lease_of(record)), &told).unwrap();
        assert_eq!(plan.of, format!("{}@{}", record.holder, record.term));
        let old = plan.lines.join("\n");
        assert!(
            old.contains("seat web-bbbbb knows 12: it is an old copy")
                && old.contains("Seat web-bbbbb: node n2;")
                && old.contains("it knows term 12, its disk is newer than the record"),
            "{old}"
        );
    }
    let unheard: Said = Err("list pods: forbidden".to_owned());
    let unheard = plan(&waiting(|_| ()), Some(&lease_of(&record)), &unheard).unwrap();
    let unheard = unheard.lines.join("\n");
    assert!(
        unheard.contains("is not known (list pods: forbidden): a seat may know a later term"),
        "{unheard}"
    );
    let unasked = lines(&record, |object| {
        object["status"]["conditions"][0]["message"] = json!("an image can't be pulled");
    });
    assert!(unasked.contains("No condition of the VM asks for this"), "{unasked}");
    // Accepted of this record, and of another one.
    for (term, known) in [(7, true), (70, false)] {
        let again = lines(&record, |object| {
            let text = format!("{FIRST}/000000000000beef@{term} text");
            object["metadata"]["annotations"] = json!({ ANNOTATION_ACCEPT_DATA_LOSS: text });
        });
        assert_eq!(again.contains("was accepted before"), known, "{again}");
    }
}

#[test]
fn a_seat_that_was_made_anew_is_known_by_its_former_pods() {
    let text = lines(&record_of(&[FIRST], Phase::Running), |object| {
        object["status"]["seats"][0] = json!({
            "name": "web-x7k2q", "lostSince": "2026-01-02T05:03:35Z",
            "former": [{"uid": FIRST, "node": "n1", "missingSince": "2026-01-02T05:03:35Z"}],
        });
    });
    assert!(
        text.contains("seat web-x7k2q on no node yet (before: n1) had the guest last"),
        "{text}"
    );
    assert!(text.contains("missed since 2026-01-02T05:03:35Z"), "{text}");
}

#[test]
fn what_can_not_be_accepted_is_refused_with_the_reason() {
    let record = record_of(&[FIRST, SECOND], Phase::Running);
    let lease = lease_of(&record);
    let refused = |change: &dyn Fn(&mut Value), lease: Option<&Lease>, words: &str| {
        let why = plan(&waiting(change), lease, &said(&[])).unwrap_err();
        assert!(why.contains(words), "{words}: {why}");
    };
    refused(&|_| (), None, "has no Lease");
    refused(
        &|object| object["status"]["phase"] = json!("Running"),
        Some(&lease),
        "the guest is on",
    );
    refused(
        &|object| object["status"]["phase"] = json!("Paused"),
        Some(&lease),
        "the guest is on",
    );
    refused(
        &|object| object["spec"]["runStrategy"] = json!("Halted"),
        Some(&lease),
        "the VM is halted",
    );
    let goes = |object: &mut Value| object["metadata"]["deletionTimestamp"] = json!("2026-01-02T05:04:05Z");
    refused(&goes, Some(&lease), "being deleted");
    let genesis = lease_of(&Record::genesis(FIRST.parse().unwrap(), Phase::Running));
    let first = |object: &mut Value| object["status"]["term"] = json!(1);
    refused(&first, Some(&genesis), "no guest of this VM ever ran");
    let replaced = |object: &mut Value| object["status"]["leaseUid"] = json!(STRANGER);
    refused(&replaced, Some(&lease), "another object than the operator made");
    let mut foreign = lease.clone();
    foreign.metadata.labels = None;
    refused(&|_| (), Some(&foreign), "is not the operator's");
    let mut edited = lease.clone();
    edited.metadata.annotations = None;
    refused(&|_| (), Some(&edited), "has no annotation");
}
