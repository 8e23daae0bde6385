use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::*;
use crate::seen::Seen;
use crate::testing::{HALTED, PROTECTED as IN_STEP, RESYNCING, now, of, seen};

const FIRST: &str = "0123abcd-0000-4000-8000-00000000000a";
const SECOND: &str = "0123abcd-0000-4000-8000-00000000000b";

fn vm(seen: Seen) -> FaultTolerantVM {
    *seen.vm.unwrap()
}

/// What pods say, as their daemons write it.
fn said(pods: &[(&str, Value)]) -> Said {
    let read = |(uid, said): &(&str, Value)| {
        let said: SeatPublished = serde_json::from_value(said.clone()).unwrap();
        ((*uid).to_owned(), Ok(said))
    };
    Ok(pods.iter().map(read).collect())
}

fn pair() -> Said {
    said(&[
        (FIRST, json!({"role": "active", "term": 7, "protected": true})),
        (SECOND, json!({"role": "standby", "term": 7, "protected": true})),
    ])
}

fn shown(vm: &FaultTolerantVM, said: &Said) -> String {
    render(vm, said, now(), Paper::default())
}

#[test]
fn a_protected_vm_in_full() {
    let expected = "\
web in namespace shop
  Phase          Running
  Protected      yes: seat web-bbbbb on node n2 would take over
  Active         node n1, seat web-x7k2q
  Standby        node n2, seat web-bbbbb
  Term           7
  Mode           Checkpoint, epochs of 20 ms, output waits 3 ms for the standby
  Last failover  2026-01-02T03:04:05Z (2h ago): seat web-x7k2q took over on n1 (the peer was lost), nobody ran the guest for 12.3 ms

Seats
  NAME       NODE  ROLE     TERM  NOTE
  web-x7k2q  n1    active   7
  web-bbbbb  n2    standby  7

Disks
  NAME  SIZE  CLASS    FIRST CONTENTS
  root  2Gi   default  /disk/root.raw of the guest image

Networks
  NAME   ATTACHED TO  MAC                ADDRESSES
  front  bridge br0   MAC_OF_THE_FIRST_  any

Conditions
  CONDITION  STATUS  REASON          SINCE
  Ready      True    GuestRuns       2h
  Protected  True    StandbyFollows  60m
  Resyncing  False   InStep          60m

Nothing is to be done.
";
    let vm = vm(seen("web", IN_STEP));
    let mac = mac::of(vm.uid().unwrap().parse().unwrap(), 0);
    assert_eq!(shown(&vm, &pair()), expected.replace("MAC_OF_THE_FIRST_", &mac));
}

#[test]
fn a_vm_that_is_not_protected_says_why_and_what_to_do() {
    let vm = vm(seen("web", RESYNCING));
    let said = said(&[
        (FIRST, json!({"role": "active", "term": 8})),
        (
            SECOND,
            json!({"role": "joining", "term": 8, "resyncPercent": 42, "why": "receives memory"}),
        ),
    ]);
    let text = shown(&vm, &said);
    for line in [
        "  Protected  no (Resyncing)\n",
        "  Standby    none\n",
        "  Resync     42 %\n",
        "  web-bbbbb  n2    joining  8     without an engine that joins for 30s; 42 %; receives memory\n",
        "\nWhat is wrong, and what to do\n  -  a seat is being brought up to date: 42 %\n",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
}

#[test]
fn an_import_stands_with_the_disks() {
    let vm = vm(seen("web", RESYNCING));
    let why = "disk root is being downloaded: 17 % of 2048 MiB";
    let text = shown(&vm, &said(&[(SECOND, json!({"resyncPercent": 17, "why": why}))]));
    let line = format!("of the guest image\n  -  seat web-bbbbb: {why}\n");
    assert!(text.contains(&line), "{text}");
    assert_eq!(text.matches(why).count(), 1, "{text}");
    // One that can't be prepared is in want of help.
    let helpless = said(&[(SECOND, json!({"code": 16, "why": "disk root: no space"}))]);
    let text = shown(&vm, &helpless);
    assert!(text.contains("disk root: no space (code 16)\n"), "{text}");
}

#[test]
fn what_fails_of_storage_and_each_slots_class_are_told() {
    let mut object = seen("web", IN_STEP).object;
    object["spec"]["disks"][0]["storageClassNames"] = json!(["fast", "slow"]);
    let trouble = json!({"part": "journal", "kind": "full", "sinceUnixMs": 7, "why": "writing: no space"});
    let said = said(&[(SECOND, json!({"role": "standby", "storageTroubles": [trouble]}))]);
    let text = shown(&vm(of(object)), &said);
    assert!(text.contains("  the journal is full (writing: no space)\n"), "{text}");
    assert!(text.contains("  fast, slow  /disk/root.raw"), "{text}");
}

#[test]
fn backing_files_stand_behind_their_image() {
    let mut object = seen("web", IN_STEP).object;
    let image = json!({"path": "/disk/root.qcow2", "backing": ["/disk/b.qcow2", "/disk/a.raw"]});
    object["spec"]["disks"][0]["source"] = json!({"image": image});
    let text = shown(&vm(of(object)), &said(&[]));
    let chain = "  /disk/root.qcow2 over /disk/b.qcow2 over /disk/a.raw of the guest image\n";
    assert!(text.contains(chain), "{text}");
}

#[test]
fn a_pod_that_is_not_in_the_book_says_nothing() {
    let vm = vm(seen("web", IN_STEP));
    let stranger = "0123abcd-0000-4000-8000-0000000000ee";
    let text = shown(
        &vm,
        &said(&[(stranger, json!({"role": "active", "why": "believe me"}))]),
    );
    assert!(!text.contains("believe me"), "{text}");
    assert!(text.contains("  web-x7k2q  n1    -"), "{text}");
}

#[test]
fn who_may_not_see_pods_is_told_and_sees_the_rest() {
    let vm = vm(seen("web", IN_STEP));
    let text = shown(&vm, &Err("list pods: forbidden".to_owned()));
    assert!(
        text.contains("  !  what they say themselves is missing: list pods: forbidden\n"),
        "{text}"
    );
    assert!(text.contains("Nothing is to be done."), "{text}");
    let damaged = BTreeMap::from([(FIRST.to_owned(), Err("annotation is malformed".to_owned()))]);
    let text = shown(&vm, &Ok(damaged));
    assert!(
        text.contains("  web-x7k2q  n1    -           annotation is malformed\n"),
        "{text}"
    );
}

#[test]
fn a_vm_without_a_status_says_who_is_missing() {
    let text = shown(&vm(seen("web", "")), &said(&[]));
    assert!(
        text.contains("  Phase      ?\n  Protected  ?\n  Active     none\n"),
        "{text}"
    );
    assert!(
        text.contains("  -  the operator has not looked at the VM yet"),
        "{text}"
    );
    assert!(!text.contains("Seats\n") && !text.contains("Conditions\n"), "{text}");
}

#[test]
fn a_halted_vm_is_in_want_of_nothing() {
    let mut halted = seen("web", HALTED).object;
    halted["spec"]["runStrategy"] = json!("Halted");
    halted["metadata"]["generation"] = json!(4);
    let text = shown(&vm(of(halted)), &said(&[]));
    for line in [
        "  Phase      Halted\n             the operator has not looked at the last change",
        "  Wanted     Halted (spec.runStrategy)\n",
        "  Protected  no guest runs\n",
        "  web-x7k2q  none  -\n",
        "Nothing is to be done.",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
}

#[test]
fn what_was_asked_for_is_told_with_its_outcome() {
    let mut asked = seen("web", IN_STEP).object;
    asked["status"]["switchover"] = json!({"request": "r1", "outcome": "Refused", "why": "the link is down"});
    asked["status"]["failover"] = json!({"request": "r2", "outcome": "Done"});
    let text = shown(&vm(of(asked)), &pair());
    assert!(
        text.contains("  Switchover     refused (r1): the link is down\n"),
        "{text}"
    );
    assert!(text.contains("  Failover       done (r2)\n"), "{text}");
}

#[test]
fn the_same_trouble_is_told_once_and_wrapped_on_a_narrow_terminal() {
    let words = "node n2 is away: bring it back, or make sure that it is switched off and say so with a taint";
    let mut wrong = seen("web", RESYNCING).object;
    for place in [0, 1] {
        wrong["status"]["conditions"][place]["status"] = json!("False");
        wrong["status"]["conditions"][place]["message"] = json!(words);
    }
    let vm = vm(of(wrong));
    assert_eq!(advice(&vm), [words]);
    let paper = Paper {
        width: Some(60),
        ..Paper::default()
    };
    let text = render(&vm, &pair(), now(), paper);
    let wrapped =
        "  -  node n2 is away: bring it back, or make sure that it is\n     switched off and say so with a taint\n";
    assert!(text.contains(wrapped), "{text}");
}

#[test]
fn hostile_objects_and_pods_write_no_lines_of_their_own() {
    let evil = "x\u{1b}]0;title\u{7}\r\nNothing is to be done.\u{202e}";
    let mut hostile = seen("web", RESYNCING).object;
    hostile["status"]["active"] = json!(evil);
    hostile["status"]["conditions"][1]["message"] = json!(evil);
    hostile["status"]["conditions"][1]["reason"] = json!(evil);
    hostile["spec"]["disks"][0]["storageClassName"] = json!(evil);
    hostile["spec"]["networks"][0]["mac"] = json!(evil);
    let trouble = json!({"part": {"disk": evil}, "kind": "full", "sinceUnixMs": 7, "why": evil});
    let said = said(&[(
        SECOND,
        json!({"role": "joining", "why": evil, "storageTroubles": [trouble]}),
    )]);
    let text = shown(&vm(of(hostile)), &said);
    let harmless = |character: char| character == '\n' || crate::text::is_plain(character);
    assert!(text.chars().all(harmless), "{text}");
    assert!(text.lines().all(|line| line != "Nothing is to be done."), "{text}");
    assert!(
        text.matches("x\\u{1b}]0;title\\u{7}\\r\\nNothing").count() >= 6,
        "{text}"
    );
}
