use ftvm_crds::names::ANNOTATION_REQUEST;
use serde_json::json;

use super::*;
use crate::seat::testing::Rig;

fn pod(version: &str, request: &serde_json::Value) -> Pod {
    let annotations = json!({ANNOTATION_REQUEST: request.to_string()});
    let metadata = json!({"resourceVersion": version, "annotations": annotations});
    serde_json::from_value(json!({ "metadata": metadata })).unwrap()
}

fn failover_at(version: &str, id: &str) -> Pod {
    pod(version, &json!({"id": id, "do": "failover"}))
}

fn failover(id: &str) -> Pod {
    failover_at("7", id)
}

/// What is to be written over a version of the pod is: nobody changed it.
fn write(requests: &Requests) {
    let Told { begun, over, .. } = requests.told();
    if let (Some(id), Some(_)) = (begun, over) {
        requests.granted(&id, Instant::now());
    }
}

/// The daemon looks at the pod again and again, and publishes what is to be published.
fn look_until_done(rig: &Rig, requests: &Requests, pod: &Pod, id: &str) -> DoneRequest {
    let seat = rig.pod();
    rig.wait("the request is answered", |_| {
        requests.noticed(pod, &seat);
        write(requests);
        requests.told().done.is_some_and(|done| done.id == id)
    });
    requests.told().done.unwrap()
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
            write(requests);
        }
        assert_eq!(requests.told().done, Some(done.clone()));
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
        write(&requests);
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
    write(&requests);
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
        before: None,
    };
    rig.wait("the first daemon is done with it", |_| requests.told().done.is_some());
    folder.write_json(FILE, &begun).unwrap();
    rig.launch(2);
    let successor = Requests::new(folder);
    for _ in 0..20 {
        successor.noticed(&failover("failover-x"), &rig.pod());
        write(&successor);
    }
    let done = successor.told().done.unwrap();
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
        write(&requests);
    }
    assert_eq!(requests.told().done, None);
    rig.assert_alive();
}

/// Whatever a watch says that lags: only what was written over a pod that asks is begun. Whoever takes it back over a pod without that word knows
/// that it never comes.
#[test]
fn a_failure_begins_once_it_is_written_over_a_pod_that_asks_for_it() {
    let rig = Rig::new();
    let (requests, seat) = (Requests::new(rig.seat.folder().clone()), rig.pod());
    let told = |begun: bool, over: Option<&str>| Told {
        begun: begun.then(|| "failover-x".to_owned()),
        over: over.map(str::to_owned),
        done: None,
    };
    for _ in 0..20 {
        requests.noticed(&failover_at("7", "failover-x"), &seat);
        assert_eq!(requests.told(), told(true, Some("7")));
    }
    // Somebody wrote the pod: not tried again before it is seen as it is now.
    requests.outrun("failover-x", "7");
    requests.noticed(&failover_at("7", "failover-x"), &seat);
    assert_eq!(requests.told(), told(false, None));
    requests.noticed(&failover_at("8", "failover-x"), &seat);
    assert_eq!(requests.told(), told(true, Some("8")));
    requests.outrun("failover-x", "8");
    requests.noticed(&pod("9", &json!({"id": "failover-x", "do": "takeBack"})), &seat);
    let Told { begun, over, done } = requests.told();
    assert_eq!((begun, over), (None, None));
    assert!(done.unwrap().refused.is_some_and(|why| why.contains("taken back")));
    // Neither by an answer that is late, nor by an old state, nor by the next daemon.
    requests.granted("failover-x", Instant::now());
    for requests in [&requests, &Requests::new(rig.seat.folder().clone())] {
        for version in ["8", "10"] {
            requests.noticed(&failover_at(version, "failover-x"), &seat);
            write(requests);
        }
        assert_eq!(requests.told().begun, None);
    }
    rig.assert_alive();
}

/// What was asked for before it could begin is asked for by nobody any more; so is what another request took the place of.
#[test]
fn what_a_pod_does_not_ask_for_any_more_does_not_begin() {
    let rig = Rig::new();
    let (requests, seat) = (Requests::new(rig.seat.folder().clone()), rig.pod());
    let nothing: Pod = serde_json::from_value(json!({"metadata": {"resourceVersion": "9"}})).unwrap();
    for instead in [nothing, pod("9", &json!({"id": "failover-y", "do": "failover"}))] {
        requests.noticed(&failover_at("8", "failover-x"), &seat);
        write(&requests);
        requests.noticed(&instead, &seat);
        assert_ne!(requests.told().begun.as_deref(), Some("failover-x"));
        requests.granted("failover-x", Instant::now());
        requests.noticed(&instead, &seat);
    }
    rig.assert_alive();
}

/// A process that stood still after it was told that it may begin asks once more.
#[test]
fn that_a_failure_may_begin_does_not_count_for_long() {
    let rig = Rig::new();
    let (requests, seat) = (Requests::new(rig.seat.folder().clone()), rig.pod());
    requests.noticed(&failover_at("7", "failover-x"), &seat);
    let long_ago = Instant::now().checked_sub(2 * GRANT).unwrap();
    requests.granted("failover-x", long_ago);
    requests.noticed(&failover_at("8", "failover-x"), &seat);
    let told = requests.told();
    assert_eq!(
        (told.begun.as_deref(), told.over.as_deref()),
        (Some("failover-x"), Some("8"))
    );
    rig.assert_alive();
}

#[test]
fn a_failure_that_comes_too_late_by_this_clock_is_refused() {
    let ms = |seconds: u64| 1_000_000_000_000 + 1000 * seconds;
    let within = FAILOVER_WITHIN.as_secs();
    for (now, words) in [
        (ms(within) + 1, Some("too late")),
        (ms(within), None),
        (ms(0), None),
        (ms(0) - 29_000, None),
        (ms(0) - 31_000, Some("clock is 31 s behind")),
    ] {
        let why = timely(Some(ms(within)), now).err();
        let told = why.as_deref().zip(words);
        assert_eq!(why.is_some(), words.is_some(), "{now}: {why:?}");
        assert!(told.is_none_or(|(why, words)| why.contains(words)), "{now}: {why:?}");
    }
    assert_eq!(timely(None, 7), Ok(()), "an operator of an earlier release");
    let rig = Rig::new();
    let requests = Requests::new(rig.seat.folder().clone());
    let late = json!({"id": "failover-x", "do": "failover", "untilUnixMs": unix_ms() - 1});
    let done = look_until_done(&rig, &requests, &pod("7", &late), "failover-x");
    assert!(done.refused.is_some_and(|why| why.contains("too late")));
    let in_time = json!({"id": "failover-y", "do": "failover", "untilUnixMs": unix_ms() + 1000 * within});
    let done = look_until_done(&rig, &requests, &pod("8", &in_time), "failover-y");
    assert_eq!(done.refused, None);
    rig.wait("its end is noticed", |rig| rig.gone().len() == 1);
}

fn accepts_loss(id: &str) -> Pod {
    let holder = "0123abcd-0000-4000-8000-0000000000ff/000000000000beef";
    pod(
        "7",
        &json!({"id": id, "do": "acceptDataLoss", "holder": holder, "term": 3}),
    )
}

fn says(rig: &Rig, role: Role, loss: Option<AcceptedLoss>) {
    rig.say(|status| (status.role, status.accepted_loss) = (role, loss));
}

fn no(why: &str) -> Option<AcceptedLoss> {
    Some(AcceptedLoss::Refused { why: why.to_owned() })
}

/// The engine takes the command at once, and decides later.
#[test]
fn an_accepted_loss_is_answered_with_what_the_engine_decides() {
    let rig = Rig::new();
    let (requests, seat) = (Requests::new(rig.seat.folder().clone()), rig.pod());
    says(&rig, Role::Starting, Some(AcceptedLoss::UnderWay));
    requests.noticed(&accepts_loss("accept-data-loss-3~0-1"), &seat);
    rig.wait("it was told", |rig| !rig.commands().is_empty());
    assert_eq!(requests.told().done, None, "it has not decided");
    says(&rig, Role::Starting, no("a guest may run on seat b"));
    let done = look_until_done(
        &rig,
        &requests,
        &accepts_loss("accept-data-loss-3~0-1"),
        "accept-data-loss-3~0-1",
    );
    assert_eq!(done.refused.as_deref(), Some("a guest may run on seat b"));
    // It stays told while the next attempt is under way, and is told once.
    says(&rig, Role::Starting, Some(AcceptedLoss::UnderWay));
    requests.noticed(&accepts_loss("accept-data-loss-3~1-9"), &seat);
    rig.wait("it was told again", |rig| rig.commands().len() == 2);
    assert_eq!(requests.told().done, Some(done));
    says(&rig, Role::Active, None);
    let done = look_until_done(
        &rig,
        &requests,
        &accepts_loss("accept-data-loss-3~1-9"),
        "accept-data-loss-3~1-9",
    );
    assert_eq!(done.refused, None);
}

#[test]
fn only_the_engine_that_was_told_has_the_last_word_of_a_loss() {
    let (mut status, _) = crate::seat::testing::healthy(1);
    let told = Some(status.incarnation);
    status.role = Role::Starting;
    status.accepted_loss = Some(AcceptedLoss::UnderWay);
    assert_eq!(final_word(told, told, Some(&status)), None);
    assert_eq!(final_word(told, told, None), None, "it may answer yet");
    status.accepted_loss = no("why");
    assert_eq!(final_word(told, told, Some(&status)), Some(Err("why".to_owned())));
    // An engine of an earlier version does not tell.
    status.accepted_loss = None;
    assert_eq!(final_word(told, told, Some(&status)), Some(Ok(())));
    let (successor, _) = crate::seat::testing::healthy(2);
    let runs = Some(successor.incarnation);
    let (mut ends, _) = crate::seat::testing::healthy(1);
    ends.role = Role::Ended;
    for (runs, status) in [(runs, &successor), (None, &status), (told, &successor), (told, &ends)] {
        let word = final_word(told, runs, Some(status));
        assert!(word.is_some_and(|word| word.is_err_and(|why| why.contains("ended"))));
    }
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
