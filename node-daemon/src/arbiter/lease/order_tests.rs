//! Several API servers that live: which of them is asked, and when.

use super::*;

#[test]
fn a_swap_goes_to_who_answered_its_read_unless_that_was_put_back_since() {
    let cluster = Cluster::new();
    let (one, other) = (cluster.server(), cluster.server());
    let arbiter = cluster.arbiter(other.address, &[one.address]);
    let before = found(&arbiter);
    assert_eq!(one.asked(), ["GET"]);
    // The other one comes first by now, for another machine's sake.
    stand(&arbiter, &other, 1);
    wins(&arbiter, &before);
    assert_eq!((one.asked().len(), other.asked().len()), (1, 0));
    let before = found(&arbiter);
    assert_eq!(one.asked(), ["GET"]);
    stand(&arbiter, &other, 1);
    let endpoints = &arbiter.leases.server.endpoints;
    endpoints.slow(&endpoints.in_order()[1]);
    wins(&arbiter, &before);
    assert_eq!((one.asked().len(), other.asked().len()), (0, 1));
}

#[test]
fn whose_answer_was_late_is_asked_last() {
    let cluster = Cluster::new();
    let (slow, other) = (cluster.server(), cluster.server());
    let arbiter = cluster.arbiter(other.address, &[slow.address]);
    let before = found(&arbiter);
    assert_eq!(slow.asked(), ["GET"]);
    slow.is(Mood::Slow(2 * TURN));
    wins(&arbiter, &before);
    assert_eq!(slow.asked(), ["PUT"]);
    found(&arbiter);
    assert_eq!((slow.asked().len(), other.asked().len()), (0, 1));
}

#[test]
fn who_lags_behind_is_asked_last() {
    let cluster = Cluster::new();
    let (lags, other) = (cluster.server(), cluster.server());
    let arbiter = cluster.arbiter(other.address, &[lags.address]);
    let before = found(&arbiter);
    lags.is(Mood::Lags);
    assert_eq!(found(&arbiter), before);
    assert_eq!(lags.asked(), ["GET", "GET"]);
    wins(&arbiter, &before);
    assert_eq!(other.asked(), ["GET", "PUT"]);
    // Each of them once, if all do.
    other.is(Mood::Lags);
    let (outcome, why) = arbiter.read();
    assert_eq!(outcome, ReadOutcome::Unreachable);
    assert!(why.as_ref().is_some_and(|why| why.contains("old")), "{why:?}");
    assert_eq!(
        (lags.asked(), other.asked()),
        (vec!["GET".to_owned()], vec!["GET".to_owned()])
    );
}

/// Each read of each machine finds out again, and an answer that is old is an answer: the log would have two lines for each.
#[test]
fn who_lags_behind_all_the_time_is_told_of_once() {
    let cluster = Cluster::new();
    let (lags, other) = (cluster.server(), cluster.server());
    let arbiter = cluster.arbiter(other.address, &[lags.address]);
    found(&arbiter);
    lags.is(Mood::Lags);
    let endpoints = &arbiter.leases.server.endpoints;
    let address = lags.address.to_string();
    let endpoint = endpoints.in_order().into_iter().find(|one| one.address == address);
    let endpoint = endpoint.unwrap();
    for _ in 0..2 {
        endpoints.answered(&endpoint);
        found(&arbiter);
        assert!(!endpoint.lag_is_news(), "it was not told");
    }
}

#[test]
fn who_has_too_much_to_do_is_asked_once_more_when_it_says_so() {
    let cluster = Cluster::new();
    let api = cluster.server();
    let arbiter = cluster.arbiter(api.address, &[]);
    api.is(Mood::Says(429));
    let begin = Instant::now();
    let (outcome, why) = arbiter.read();
    assert_eq!(outcome, ReadOutcome::Unreachable, "{why:?}");
    assert!(begin.elapsed() >= Duration::from_secs(1), "asked again at once");
    assert_eq!(api.asked(), ["GET", "GET"]);
    // Not where the answer would come too late. Of a machine on which nothing is left of that time this says nothing, and it is asked anew.
    let (leases, path) = (&arbiter.leases, &arbiter.path);
    let asked_in_vain = || {
        let soon = Instant::now() + Duration::from_secs(1);
        let answer = leases.runtime.block_on(leases.server.read(path, soon));
        let asked = api.asked();
        (Instant::now() < soon).then(|| (answer.unwrap().status, asked))
    };
    let told = Some((StatusCode::TOO_MANY_REQUESTS, vec!["GET".to_owned()]));
    assert!(
        (0..20).any(|_| asked_in_vain() == told),
        "waited for nothing, or asked again"
    );
    let outcome = std::thread::scope(|scope| {
        let reading = scope.spawn(|| arbiter.read().0);
        api.wait_until("it is not asked", |seen| !seen.requests.is_empty());
        api.is(Mood::Well);
        reading.join().unwrap()
    });
    assert!(matches!(outcome, ReadOutcome::Found(_)), "{outcome:?}");
    assert_eq!(api.asked(), ["GET", "GET"]);
}

/// The one that is left after a node's death may have too much to do, and the dead one must not keep it from being asked again.
#[test]
fn who_has_too_much_to_do_is_asked_again_while_another_one_is_dead() {
    let cluster = Cluster::new();
    let (dead, busy) = (cluster.server(), cluster.server());
    let arbiter = cluster.arbiter(busy.address, &[dead.address]);
    for first in [&dead, &busy] {
        dead.is(Mood::Well);
        stand(&arbiter, first, 1);
        dead.is(Mood::Dead);
        busy.is(Mood::Says(429));
        let outcome = std::thread::scope(|scope| {
            let reading = scope.spawn(|| arbiter.read().0);
            busy.wait_until("it is not asked", |seen| !seen.requests.is_empty());
            busy.is(Mood::Well);
            reading.join().unwrap()
        });
        assert!(matches!(outcome, ReadOutcome::Found(_)), "{outcome:?}");
        assert_eq!(busy.asked(), ["GET", "GET"]);
    }
}
