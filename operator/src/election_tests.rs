//! Replicas at a small server that keeps the Lease as the API server does, and answers as badly as it is told.
//!
//! The clock is a paused one: it goes on when all wait for it, so a machine that is slow or stands still changes nothing. That needs a server
//! without a network, for whoever waits for a socket does not wait for the clock.
use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{Method, Request, Response};
use kube::client::Body;
use serde_json::{Value, json};
use tower::service_fn;

use super::*;

/// By the paused clock.
const PATIENCE: Duration = Duration::from_secs(300);

/// What becomes of a request.
#[derive(Clone, Copy, PartialEq)]
enum Does {
    /// What it should.
    Right,
    /// Nothing, and says this.
    Says(u16),
    /// What it should, and says this.
    RightAndSays(u16),
    /// What it should, and says so after this time.
    Slowly(Duration),
    /// What it should, after this time; nobody hears of it.
    Later(Duration),
}

type Misbehaviour = Box<dyn FnMut(&Method, &str) -> Does + Send>;

#[derive(Default)]
struct Server {
    lease: Mutex<Option<Value>>,
    version: Mutex<u64>,
    /// By method and replica; without the replica where it is not in the request.
    does: Mutex<Option<Misbehaviour>>,
}

impl Server {
    /// It, and a client whose requests it is handed.
    fn start() -> (Arc<Server>, Client) {
        let server = Arc::new(Server::default());
        let serving = server.clone();
        let service = service_fn(move |request: Request<Body>| {
            let serving = serving.clone();
            async move {
                let (head, body) = request.into_parts();
                let body = body.collect().await.unwrap().to_bytes();
                let (code, body) = serving.answer(head.method, body).await;
                let response = Response::builder()
                    .status(code)
                    .header("content-type", "application/json");
                Ok::<_, Infallible>(response.body(Full::new(Bytes::from(body))).unwrap())
            }
        });
        (server, Client::new(service, "system"))
    }

    fn misbehaves(&self, does: impl FnMut(&Method, &str) -> Does + Send + 'static) {
        *self.does.lock().unwrap() = Some(Box::new(does));
    }

    /// The holder's pod.
    fn holder(&self) -> String {
        let lease = self.lease.lock().unwrap();
        let holder = lease
            .as_ref()
            .and_then(|lease| lease["spec"]["holderIdentity"].as_str());
        pod_of(holder.unwrap_or_default()).to_owned()
    }

    async fn answer(self: Arc<Self>, method: Method, body: Bytes) -> (u16, String) {
        let object: Value = serde_json::from_slice(&body).unwrap_or_default();
        let replica = pod_of(object["spec"]["holderIdentity"].as_str().unwrap_or_default()).to_owned();
        let does = match &mut *self.does.lock().unwrap() {
            Some(does) => does(&method, &replica),
            None => Does::Right,
        };
        let (code, body) = match does {
            Does::Right => self.right(&method, object),
            Does::Says(code) => (code, failure(code)),
            Does::RightAndSays(code) => {
                self.right(&method, object);
                (code, failure(code))
            }
            Does::Slowly(time) => {
                let done = self.right(&method, object);
                sleep(time).await;
                done
            }
            Does::Later(time) => {
                let later = tokio::spawn(async move {
                    sleep(time).await;
                    self.right(&method, object);
                });
                // Whoever asked has left by then.
                later.await.unwrap();
                (500, failure(500))
            }
        };
        (code, body.to_string())
    }

    fn right(&self, method: &Method, mut object: Value) -> (u16, Value) {
        let (mut lease, mut version) = (self.lease.lock().unwrap(), self.version.lock().unwrap());
        let known = lease.as_ref().map(|lease| lease["metadata"]["resourceVersion"].clone());
        match (method, known) {
            (&Method::GET, Some(_)) => return (200, lease.clone().unwrap()),
            (&Method::GET | &Method::PUT, None) => return (404, failure(404)),
            (&Method::POST, None) => {}
            (&Method::PUT, Some(known)) if known == object["metadata"]["resourceVersion"] => {}
            _ => return (409, failure(409)),
        }
        *version += 1;
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        *lease = Some(object.clone());
        (200, object)
    }
}

fn pod_of(holder: &str) -> &str {
    holder.split_once('_').map_or(holder, |(pod, _)| pod)
}

fn failure(code: u16) -> Value {
    let reason = match code {
        404 => "NotFound",
        409 => "Conflict",
        _ => "InternalError",
    };
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": "", "code": code})
}

fn replica(client: &Client, name: &str) -> Election {
    Election::new(client.clone(), "system", name, TIMES)
}

async fn soon<T>(event: impl Future<Output = T>) -> T {
    timeout(PATIENCE, event).await.expect("in time")
}

/// Two replicas; the first leads.
async fn two() -> (Arc<Server>, Election, Election) {
    let (server, client) = Server::start();
    let (mut first, second) = (replica(&client, "first"), replica(&client, "second"));
    soon(first.won()).await;
    (server, first, second)
}

/// When each of these came about.
async fn times(first: impl Future<Output = ()>, second: impl Future<Output = ()>) -> (Instant, Instant) {
    let first = async {
        first.await;
        Instant::now()
    };
    let second = async {
        second.await;
        Instant::now()
    };
    soon(async { tokio::join!(first, second) }).await
}

/// The first one goes on leading for longer than a Lease lasts, and the second one does not lead.
async fn first_stays(server: &Server, first: &mut Election, second: &mut Election) {
    let nothing = async {
        tokio::select! {
            () = first.lost() => panic!("lost"),
            () = second.won() => panic!("two lead"),
        }
    };
    assert!(timeout(2 * TIMES.lease, nothing).await.is_err());
    assert_eq!(server.holder(), "first");
}

#[tokio::test(start_paused = true)]
async fn one_leads_and_another_one_waits() {
    let (server, mut first, mut second) = two().await;
    first_stays(&server, &mut first, &mut second).await;
    // It ends without a word.
    drop(first);
    soon(second.won()).await;
    assert_eq!(server.holder(), "second");
    assert_eq!(
        server.lease.lock().unwrap().as_ref().unwrap()["spec"]["leaseTransitions"],
        2
    );
}

/// Whatever becomes of its renewals, a leader has ended before another one leads.
#[tokio::test(start_paused = true)]
async fn who_cannot_renew_leads_no_longer_before_another_one_does() {
    for does in [
        Does::Says(500),
        Does::Says(409),
        Does::Later(2 * TIMES.lease),
        Does::Later(PATIENCE),
    ] {
        let (server, mut first, mut second) = two().await;
        server.misbehaves(move |method, replica| match replica {
            "first" if method == Method::PUT => does,
            _ => Does::Right,
        });
        let (lost, won) = times(first.lost(), second.won()).await;
        assert!(lost < won, "both led for {:?}", lost - won);
        assert_eq!(server.holder(), "second");
    }
}

/// What it sends is done and said to be refused. It must not keep the Lease from all others by that: who lost it waits as they do.
#[tokio::test(start_paused = true)]
async fn who_lost_the_lease_does_not_keep_it_from_others() {
    let (server, mut first, mut second) = two().await;
    server.misbehaves(move |method, replica| match replica {
        "first" if method == Method::PUT => Does::RightAndSays(409),
        _ => Does::Right,
    });
    let goes_on = async {
        loop {
            first.lost().await;
            first.won().await;
        }
    };
    let won = async {
        tokio::select! {
            () = goes_on => (),
            () = second.won() => (),
        }
    };
    soon(won).await;
    assert_eq!(server.holder(), "second");
}

/// What the old leader sent arrives when another one leads: it is refused, and changes nothing.
#[tokio::test(start_paused = true)]
async fn a_late_renewal_takes_nothing_from_the_next_leader() {
    let (server, mut first, mut second) = two().await;
    server.misbehaves(|method, replica| match replica {
        "first" if method == Method::PUT => Does::Later(2 * TIMES.lease),
        _ => Does::Right,
    });
    times(first.lost(), second.won()).await;
    assert!(timeout(2 * TIMES.lease, second.lost()).await.is_err());
    assert_eq!(server.holder(), "second");
}

/// One that says that it failed when it did not, or the other way round, now and then.
#[tokio::test(start_paused = true)]
async fn a_leader_stays_one_through_single_failures() {
    for does in [
        Does::Says(500),
        Does::Says(409),
        Does::RightAndSays(500),
        Does::RightAndSays(409),
        Does::Says(404),
    ] {
        let (server, mut first, _) = two().await;
        let mut count = 0;
        server.misbehaves(move |method, _| {
            count += u32::from(method == Method::PUT);
            if method == Method::PUT && count % 3 == 0 {
                does
            } else {
                Does::Right
            }
        });
        assert!(timeout(2 * TIMES.lease, first.lost()).await.is_err());
    }
}

/// A candidate whose answer is lost leads once it reads that it was taken.
#[tokio::test(start_paused = true)]
async fn a_candidate_bears_an_api_server_that_fails() {
    let (server, client) = Server::start();
    let mut failures = [
        Does::Says(500),
        Does::RightAndSays(500),
        Does::Says(503),
        Does::Says(409),
    ]
    .into_iter();
    server.misbehaves(move |_, _| failures.next().unwrap_or(Does::Right));
    let mut first = replica(&client, "first");
    soon(first.won()).await;
    assert_eq!(server.holder(), "first");
}

/// Somebody deletes the Lease: its leader ends as soon as it sees that.
#[tokio::test(start_paused = true)]
async fn a_lease_that_is_gone_is_nobodys() {
    let (server, mut first, mut second) = two().await;
    *server.lease.lock().unwrap() = None;
    times(first.lost(), second.won()).await;
    assert_eq!(server.holder(), "second");
}

/// Another process under the name of the leader's pod is another replica: both must not lead.
#[tokio::test(start_paused = true)]
async fn another_process_of_the_same_name_waits_as_any_other() {
    let (server, client) = Server::start();
    let (mut first, mut second) = (replica(&client, "first"), replica(&client, "first"));
    soon(first.won()).await;
    first_stays(&server, &mut first, &mut second).await;
}

/// A leader that is told to end frees its Lease: the next one, whose times are far longer, waits for nothing.
#[tokio::test(start_paused = true)]
async fn a_leader_that_ends_frees_the_lease() {
    let (server, client) = Server::start();
    let (mut first, mut second) = (replica(&client, "first"), replica(&client, "second"));
    second.times.lease = 2 * PATIENCE;
    soon(first.won()).await;
    assert!(timeout(TIMES.look, second.won()).await.is_err());
    soon(first.release()).await;
    assert_eq!(server.holder(), "");
    soon(second.won()).await;
    assert_eq!(server.holder(), "second");
    // Once more, by one that has nothing to free any more.
    soon(first.release()).await;
    assert_eq!(server.holder(), "second");
}

/// A leader that is stopped, and told to end when another one leads already, takes nothing from that one.
#[tokio::test(start_paused = true)]
async fn a_late_release_takes_nothing_from_the_next_leader() {
    let (server, mut first, mut second) = two().await;
    soon(second.won()).await;
    soon(first.release()).await;
    assert_eq!(server.holder(), "second");
    // Nor does it wait for an API server that says nothing.
    server.misbehaves(|_, _| Does::Later(2 * PATIENCE));
    let began = Instant::now();
    second.release().await;
    assert!(began.elapsed() <= 2 * RELEASE_MAX);
}

/// An API server that is too slow for a leader's renewals still lets a candidate win.
#[tokio::test(start_paused = true)]
async fn a_candidate_waits_longer_for_answers() {
    let (server, client) = Server::start();
    server.misbehaves(|_, _| Does::Slowly(2 * TIMES.answer_max));
    let mut first = replica(&client, "first");
    soon(first.won()).await;
    assert_eq!(server.holder(), "first");
}

/// Reads that are never answered take nothing of the time in which a leader must renew.
#[tokio::test(start_paused = true)]
async fn a_leader_writes_again_before_it_reads() {
    let (server, mut first, _) = two().await;
    let mut count = 0;
    server.misbehaves(move |method, _| {
        count += u32::from(method == Method::PUT);
        match *method {
            Method::GET => Does::Later(2 * PATIENCE),
            _ if count % 4 != 0 => Does::Says(500),
            _ => Does::Right,
        }
    });
    assert!(timeout(2 * TIMES.lease, first.lost()).await.is_err());
}

/// Of a replica that never says anything again.
fn foreign(seconds: i64) -> Value {
    let spec = json!({"holderIdentity": "foreign", "leaseDurationSeconds": seconds});
    json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": NAME, "resourceVersion": "0"}, "spec": spec})
}

/// A holder that says that its Lease lasts for years is waited for, but not for ever, and not with one request after the other.
#[tokio::test(start_paused = true)]
async fn a_foreign_lease_lasts_no_longer_than_is_sensible() {
    let (server, client) = Server::start();
    let first = replica(&client, "first");
    for (seconds, lasts) in [
        (1, TIMES.lease),
        (20, Duration::from_secs(20)),
        (1 << 30, FOREIGN_MAX),
        (-1, TIMES.lease),
    ] {
        assert_eq!(first.lasts(&serde_json::from_value(foreign(seconds)).unwrap()), lasts);
    }
    *server.lease.lock().unwrap() = Some(foreign(1 << 30));
    let looks = counted(&server, |_| Does::Right);
    let mut first = first;
    assert!(timeout(3 * TIMES.lease, first.won()).await.is_err());
    // Each look's time and not each `again`.
    let most = 3 * TIMES.lease.as_millis() / TIMES.look.as_millis() + 2;
    assert!(u128::from(*looks.lock().unwrap()) <= most, "{looks:?}");
}

/// Neither an API server that refuses writes nor one that always says that another one was faster is asked without end.
#[tokio::test(start_paused = true)]
async fn a_candidate_asks_more_and_more_rarely() {
    for code in [500, 409] {
        let (server, client) = Server::start();
        *server.lease.lock().unwrap() = Some(foreign(1));
        let count = counted(&server, move |method| match *method {
            Method::PUT => Does::Says(code),
            _ => Does::Right,
        });
        let mut first = replica(&client, "first");
        assert!(timeout(3 * TIMES.lease, first.won()).await.is_err());
        // Each is a read and a write, and the pauses are short only at first.
        let looks = 3 * TIMES.lease.as_millis() / TIMES.look.as_millis() + 4;
        assert!(u128::from(*count.lock().unwrap()) <= 2 * looks, "{count:?}");
    }
}

/// How often was asked.
fn counted(server: &Server, mut does: impl FnMut(&Method) -> Does + Send + 'static) -> Arc<Mutex<u32>> {
    let count = Arc::new(Mutex::new(0));
    let counting = count.clone();
    server.misbehaves(move |method, _| {
        *counting.lock().unwrap() += 1;
        does(method)
    });
    count
}
