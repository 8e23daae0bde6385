use serde_json::{Value, json};

use super::*;
use crate::testing::{HALTED, PROTECTED, RESYNCING, of, seen};

fn vm(object: Value) -> FaultTolerantVM {
    *of(object).vm.unwrap()
}

/// A VM with this status in which `change` was made.
fn changed(status: &str, change: impl Fn(&mut Value)) -> FaultTolerantVM {
    let mut object = seen("web", status).object;
    change(&mut object);
    vm(object)
}

fn yet(verdict: &Verdict, words: &str) {
    assert!(
        matches!(verdict, Yet(why) if why.contains(words)),
        "{words}: {verdict:?}"
    );
}

fn never(verdict: &Verdict, words: &str) {
    assert!(
        matches!(verdict, Never(why) if why.contains(words)),
        "{words}: {verdict:?}"
    );
}

fn annotated(object: &mut Value, name: &str, text: &str) {
    object["metadata"]["annotations"] = json!({ name: text });
}

#[test]
fn a_switchover_is_done_when_this_one_is_and_the_guest_moved() {
    let asked = Asked::Switchover {
        request: "this".to_owned(),
        before: Some("n2".to_owned()),
    };
    let told = |request: &str, outcome: &str| {
        let switchover = json!({"request": request, "outcome": outcome, "why": "because"});
        changed(PROTECTED, |object| {
            annotated(object, ANNOTATION_SWITCHOVER, "this");
            object["status"]["switchover"] = switchover.clone();
        })
    };
    assert_eq!(
        asked.judge(&told("this", "Done")),
        Done("the guest runs on node n1".to_owned())
    );
    yet(&asked.judge(&told("this", "Pending")), "because");
    never(&asked.judge(&told("this", "Refused")), "refused: because");
    yet(&asked.judge(&told("former", "Done")), "has not taken it up yet");
    let back = Asked::Switchover {
        request: "this".to_owned(),
        before: Some("n1".to_owned()),
    };
    yet(&back.judge(&told("this", "Done")), "on n1 as before");
    // The status was old when it was asked for: who was told had the guest.
    for (pod, moved) in [('a', false), ('b', true)] {
        let uid = format!("0123abcd-0000-4000-8000-00000000000{pod}");
        let vm = changed(PROTECTED, |object| {
            object["status"]["switchover"] = json!({"request": "this", "outcome": "Done", "told": {"podUid": uid}});
        });
        assert_eq!(matches!(back.judge(&vm), Done(_)), moved, "{pod}");
    }
    let other = changed(PROTECTED, |object| annotated(object, ANNOTATION_SWITCHOVER, "another"));
    never(&asked.judge(&other), "was changed or removed");
}

#[test]
fn a_start_is_done_when_the_guest_runs_by_this_spec() {
    let asked = Asked::Start { generation: 3 };
    let running = changed(PROTECTED, |_| ());
    assert_eq!(asked.judge(&running), Done("the guest runs on node n1".to_owned()));
    // What the status says of an earlier spec proves nothing.
    yet(
        &Asked::Start { generation: 4 }.judge(&running),
        "has not looked at the change",
    );
    yet(
        &asked.judge(&changed(HALTED, |_| ())),
        "Halted: Halted: the VM is halted",
    );
    let paused = changed(PROTECTED, |object| object["status"]["phase"] = json!("Paused"));
    yet(&asked.judge(&paused), "Paused: GuestRuns");
    let halted = changed(PROTECTED, |object| object["spec"]["runStrategy"] = json!("Halted"));
    never(&asked.judge(&halted), "asked for a stop");
    yet(&asked.judge(&changed("", |_| ())), "has not looked at the VM");
}

#[test]
fn a_stop_is_done_when_nothing_runs_by_this_spec() {
    let asked = Asked::Stop { generation: 3 };
    let halted = |status: &str| changed(status, |object| object["spec"]["runStrategy"] = json!("Halted"));
    assert!(matches!(asked.judge(&halted(HALTED)), Done(_)));
    yet(&asked.judge(&halted(PROTECTED)), "Running: GuestRuns");
    yet(
        &Asked::Stop { generation: 4 }.judge(&halted(HALTED)),
        "has not looked at the change",
    );
    never(&asked.judge(&changed(HALTED, |_| ())), "asked for a start");
    let goes = changed(PROTECTED, |object| {
        object["metadata"]["deletionTimestamp"] = json!("2026-01-02T05:04:05Z");
    });
    never(&asked.judge(&goes), "being deleted");
}

#[test]
fn a_loss_was_worth_it_when_the_guest_runs_by_a_later_record() {
    let asked = Asked::AcceptDataLoss {
        annotation: "holder@7 text".to_owned(),
        term: 7,
    };
    let with =
        |status: &str, text: &str| changed(status, |object| annotated(object, ANNOTATION_ACCEPT_DATA_LOSS, text));
    // The status of before, when the holder had the guest.
    yet(&asked.judge(&with(PROTECTED, "holder@7 text")), "Running: GuestRuns");
    assert!(matches!(asked.judge(&with(RESYNCING, "holder@7 text")), Done(_)));
    never(
        &asked.judge(&with(PROTECTED, "holder@7 other")),
        "was changed or removed",
    );
    let waits = changed(PROTECTED, |object| {
        annotated(object, ANNOTATION_ACCEPT_DATA_LOSS, "holder@7 text");
        object["status"]["phase"] = json!("Starting");
        let ready = &mut object["status"]["conditions"][0];
        ready["reason"] = json!("DataLossRefused");
        ready["message"] = json!("boot node n1");
    });
    yet(&asked.judge(&waits), "Starting: DataLossRefused: boot node n1");
}
