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
