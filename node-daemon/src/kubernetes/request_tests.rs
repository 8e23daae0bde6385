use ftvm_crds::names::ANNOTATION_REQUEST;
use serde_json::json;

use super::*;
use crate::seat::testing::Rig;

fn pod(text: &str) -> Pod {
    serde_json::from_value(json!({"metadata": {"annotations": {ANNOTATION_REQUEST: text}}})).unwrap()
}

fn failover(id: &str) -> Pod {
    pod(&json!({"id": id, "do": "failover"}).to_string())
}

/// The daemon looks at the pod again and again.
fn look_until_done(rig: &Rig, requests: &Requests, pod: &Pod, id: &str) -> DoneRequest {
    let seat = rig.pod();
    rig.wait("the request is answered", |_| {
        requests.noticed(pod, &seat);
        requests.done().is_some_and(|done| done.id == id)
    });
    requests.done().unwrap()
}

#[test]
fn a_failure_is_brought_about_once_for_each_id() {
    let rig = Rig::new();
    let requests = Requests::new(rig.seat.folder().clone());
    let done = look_until_done(&rig, &requests, &failover("failover-x"), "failover-x");
    assert_eq!(done.refused, None);
    rig.wait("its end is noticed", |rig| !rig.seat.has_engine());
    assert_eq!(rig.gone().len(), 1);
    // The engine that comes after it, and a daemon that comes after this one, are asked for nothing more by the same annotation.
    rig.launch(2);
    let successor = Requests::new(rig.seat.folder().clone());
    for requests in [&requests, &successor] {
        for _ in 0..20 {
            requests.noticed(&failover("failover-x"), &rig.pod());
        }
        assert_eq!(requests.done(), Some(done.clone()));
    }
    assert!(rig.seat.has_engine() && rig.gone().len() == 1, "{:?}", rig.gone());
    let done = look_until_done(&rig, &successor, &failover("failover-y"), "failover-y");
    assert_eq!(done.refused, None);
    rig.wait("its end is noticed", |rig| rig.gone().len() == 2);
}

#[test]
fn a_failure_that_is_refused_says_why_and_is_not_tried_again() {
    let rig = Rig::new();
    let requests = Requests::new(rig.seat.folder().clone());
    rig.say(|status| status.protected = false);
    let done = look_until_done(&rig, &requests, &failover("failover-x"), "failover-x");
    assert!(done.refused.is_some_and(|why| why.contains("not protected")));
    rig.say(|status| status.protected = true);
    for _ in 0..20 {
        requests.noticed(&failover("failover-x"), &rig.pod());
    }
    rig.assert_alive();
}

/// It is remembered before it is begun: the successor of a daemon that died in between does not know, and does nothing.
#[test]
fn a_daemon_that_died_in_between_is_succeeded_by_one_that_kills_nothing() {
    let rig = Rig::new();
    let folder = rig.seat.folder().clone();
    let requests = Requests::new(folder.clone());
    requests.noticed(&failover("failover-x"), &rig.pod());
    let remembered: Last = folder.read_json(FILE).unwrap().expect("remembered when it is begun");
    assert_eq!(remembered.id, "failover-x");
    rig.wait("its end is noticed", |rig| !rig.seat.has_engine());
    // As it was while the engine was being killed.
    let begun = Last {
        id: "failover-x".to_owned(),
        outcome: None,
        former: Vec::new(),
        version: None,
        again: None,
    };
    rig.wait("the first daemon is done with it", |_| requests.done().is_some());
    folder.write_json(FILE, &begun).unwrap();
    rig.launch(2);
    let successor = Requests::new(folder);
    for _ in 0..20 {
        successor.noticed(&failover("failover-x"), &rig.pod());
    }
    let done = successor.done().unwrap();
    assert!(done.refused.is_some_and(|why| why.contains("not known")));
    assert!(rig.seat.has_engine() && rig.gone().len() == 1, "{:?}", rig.gone());
}

#[test]
fn what_cant_be_remembered_is_not_begun() {
    let rig = Rig::new();
    let folder = rig.seat.folder().clone();
    let requests = Requests::new(folder.clone());
    std::fs::remove_dir_all(folder.path()).unwrap();
    for _ in 0..20 {
        requests.noticed(&failover("failover-x"), &rig.pod());
    }
    assert_eq!(requests.done(), None);
    rig.assert_alive();
}

fn done(last: Option<&Last>, id: &str) -> Last {
    done_at(last, id, None)
}

fn done_at(last: Option<&Last>, id: &str, version: Option<u64>) -> Last {
    let mut next = Last::next(last, id, version).expect("a new one");
    assert!(Last::next(Some(&next), "another", None).is_none(), "one at a time");
    next.outcome = Some(Outcome { refused: None });
    next
}

/// A watch tells an old state of the pod once more: what that asks for was done.
#[test]
fn what_was_begun_once_is_not_begun_again() {
    let first = done(None, "stop-1-7");
    let second = done(Some(&first), "start-8");
    let third = done(Some(&second), "switchover-a");
    for id in ["stop-1-7", "start-8", "switchover-a"] {
        assert!(Last::next(Some(&third), id, None).is_none(), "{id}");
    }
    assert!(Last::next(Some(&third), "stop-2-9", None).is_some());
    // Nor by the next daemon, which reads it from its file; the file of an older release has the last one alone.
    let read: Last = serde_json::from_value(serde_json::to_value(&third).unwrap()).unwrap();
    assert!(Last::next(Some(&read), "stop-1-7", None).is_none());
    let older: Last = serde_json::from_str(r#"{"id": "a", "outcome": {"refused": null}}"#).unwrap();
    assert!(Last::next(Some(&older), "a", None).is_none() && Last::next(Some(&older), "b", None).is_some());
}

#[test]
fn what_is_remembered_is_bounded() {
    let mut last = done(None, "0");
    for number in 1..2 * FORMER_MAX {
        last = done(Some(&last), &number.to_string());
    }
    assert_eq!(last.former.len(), FORMER_MAX);
    assert_eq!(last.former[0], (FORMER_MAX - 1).to_string());
}

/// Texts of switchovers A, B, C, D and A once more: each seat was asked for every other one.
#[test]
fn a_text_that_is_used_again_is_refused() {
    let first = done_at(None, "switchover-a", Some(10));
    let mut last = done_at(Some(&first), "switchover-c", Some(20));
    let published = |last: &Last| last.done().map(|done| (done.id, done.refused.is_some()));
    let of_c = Some(("switchover-c".to_owned(), false));
    let of_a = Some(("switchover-a".to_owned(), true));
    // An old state of the pod that is told once more hides no answer that is waited for.
    last.noticed_again("switchover-a", Some(10));
    assert_eq!(published(&last), of_c);
    last.noticed_again("switchover-a", Some(21));
    assert_eq!(published(&last), of_a);
    last.noticed_again("switchover-c", Some(20));
    assert_eq!(published(&last), of_a, "old");
    // The next daemon finds it in the pod; so does one whose file is of an older release.
    for text in [
        serde_json::to_string(&last).unwrap(),
        r#"{"id": "switchover-c", "outcome": {"refused": null}, "former": ["switchover-a"]}"#.to_owned(),
    ] {
        let mut read: Last = serde_json::from_str(&text).unwrap();
        assert_eq!(published(&read), of_c);
        read.noticed_again("switchover-a", Some(21));
        assert_eq!(published(&read), of_a);
    }
    // What is new goes on as ever.
    let mut last = done_at(Some(&last), "switchover-e", Some(22));
    assert_eq!(published(&last), Some(("switchover-e".to_owned(), false)));
    last.outcome = None;
    last.noticed_again("switchover-a", Some(23));
    assert_eq!(published(&last), None, "under way");
}
