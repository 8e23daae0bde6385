//! The proxy between a real client and a real server, over TLS: lists and watches. What becomes of single requests is tested at a real API
//! server (`e2e/tests/cluster_lease.rs`).
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

use super::super::control_plane::SERVING;
use super::upstream::{Caller, acceptor};
use super::*;

const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// Long enough for a busy machine; nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(90);
/// What is late is late by this much at least.
const LATE: Duration = Duration::from_millis(300);

/// Events for the watch that is asked for next, one after the other; without its sender the watch ends.
type Events = mpsc::UnboundedReceiver<Bytes>;

/// A server that has one pod, and a proxy before it.
struct Rig {
    shared: Arc<Shared>,
    client: Caller,
    server: Arc<Server>,
    folder: PathBuf,
    _end: oneshot::Sender<()>,
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

#[derive(Default)]
struct Server {
    version: Mutex<u64>,
    asked: Mutex<Vec<String>>,
    events: Mutex<Option<Events>>,
}

struct Stream(Events);

impl Body for Stream {
    type Data = Bytes;
    type Error = anyhow::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<Bytes>, anyhow::Error>>> {
        self.0
            .poll_recv(context)
            .map(|data| data.map(|data| Ok(Frame::data(data))))
    }
}

fn event(kind: &str, version: u64) -> Bytes {
    let object = json!({"metadata": {"name": "p", "uid": "u", "resourceVersion": version.to_string()}});
    Bytes::from(format!("{}\n", json!({"type": kind, "object": object})))
}

impl Server {
    /// A list has the pod as it is in the version that is asked for.
    fn answer(
        &self,
        request: &Request<Incoming>,
    ) -> Response<http_body_util::combinators::UnsyncBoxBody<Bytes, anyhow::Error>> {
        let uri = request.uri();
        self.asked.lock().unwrap().push(uri.to_string());
        let answer = Response::builder().header("content-type", "application/json");
        if uri.query().is_some_and(|query| query.contains("watch=true")) {
            let events = self.events.lock().unwrap().take().expect("a watch is expected");
            return answer.body(Stream(events).boxed_unsync()).unwrap();
        }
        let newest = *self.version.lock().unwrap();
        let version = path::parameter(uri, "resourceVersion").map_or(newest, |version| version.parse().unwrap());
        let version = version.to_string();
        let list = json!({
            "metadata": {"resourceVersion": version},
            "items": [{"metadata": {"name": "p", "uid": "u", "resourceVersion": version}}],
        });
        let body = Full::new(Bytes::from(list.to_string())).map_err(|never| match never {});
        answer.body(body.boxed_unsync()).unwrap()
    }
}

async fn serve_tls(listener: TcpListener, acceptor: tokio_rustls::TlsAcceptor, server: Arc<Server>) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let (acceptor, server) = (acceptor.clone(), Arc::clone(&server));
        tokio::spawn(async move {
            let Ok(stream) = acceptor.accept(stream).await else {
                return;
            };
            let service = service_fn(|request| {
                let answer = server.answer(&request);
                async { Ok::<_, std::convert::Infallible>(answer) }
            });
            let http = hyper::server::conn::http1::Builder::new();
            // The proxy ends it when its asker has left.
            let _ = http.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

impl Rig {
    async fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("ftvm-api-proxy-{}-{name}", std::process::id()));
        let authority = Authority::new(&folder.join("pki")).unwrap();
        let names: &[&str] = &["localhost"];
        authority
            .server(&folder.join(SERVING), "server", names, &[LOCALHOST])
            .unwrap();
        let acceptor = acceptor(&folder, &authority).unwrap();
        let (behind, before) = (
            TcpListener::bind((LOCALHOST, 0)).await.unwrap(),
            TcpListener::bind((LOCALHOST, 0)).await.unwrap(),
        );
        let server = Arc::new(Server::default());
        *server.version.lock().unwrap() = 10;
        let upstream = Upstream::new(behind.local_addr().unwrap(), &authority).unwrap();
        let client = Upstream::new(before.local_addr().unwrap(), &authority).unwrap();
        tokio::spawn(serve_tls(behind, acceptor.clone(), Arc::clone(&server)));
        let shared = Arc::new(Shared::new(upstream));
        let (end, ended) = oneshot::channel();
        tokio::spawn(serve::serve(Arc::clone(&shared), acceptor, before, ended));
        Self {
            shared,
            client: client.caller(None).unwrap(),
            server,
            folder,
            _end: end,
        }
    }

    /// The next question of a sort gets this; then everything passes.
    fn once(&self, running: bool, fault: Fault) {
        let mut left = Some(fault);
        self.shared.falsify(move |asked| {
            let is_it = asked.running == running;
            left.take_if(|_| is_it).unwrap_or(Fault::None)
        });
    }

    fn told(&self, fault: Fault) -> u64 {
        let deeds = self.shared.deeds();
        deeds.told(fault, |_, resource| resource == "pods")
    }

    async fn ask(&self, query: &str) -> Response<Incoming> {
        let uri = format!("/api/v1/pods?{query}");
        let request = Request::get(uri)
            .header("host", "localhost")
            .body(Full::default())
            .unwrap();
        timeout(PATIENCE, self.client.ask(request))
            .await
            .expect("in time")
            .expect("an answer")
    }

    async fn list(&self) -> u64 {
        let body = self
            .ask("limit=500")
            .await
            .into_body()
            .collect()
            .await
            .unwrap()
            .to_bytes();
        serve::version_of(&serde_json::from_slice(&body).unwrap()).unwrap()
    }

    /// A watch, and what to make happen with.
    async fn watch(&self) -> (mpsc::UnboundedSender<Bytes>, Incoming) {
        let (send, events) = mpsc::unbounded_channel();
        *self.server.events.lock().unwrap() = Some(events);
        // Its head does not come before it began.
        (send, self.ask("watch=true&resourceVersion=10").await.into_body())
    }
}

/// What a watch tells from now on: this much data, or until its end; whether it was cut.
async fn hear(body: &mut Incoming, length: usize) -> (String, bool) {
    let mut heard = Vec::new();
    while heard.len() < length {
        match timeout(PATIENCE, body.frame()).await.expect("in time") {
            Some(Ok(frame)) => heard.extend_from_slice(&frame.into_data().unwrap()),
            Some(Err(_)) => return (String::from_utf8(heard).unwrap(), true),
            None => break,
        }
    }
    (String::from_utf8(heard).unwrap(), false)
}

fn text(events: &[Bytes]) -> String {
    String::from_utf8(events.concat()).unwrap()
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.unwrap().block_on(test);
}

#[test]
fn a_list_is_told_as_it_was_and_the_watch_from_there_is_silent() {
    run(async {
        let rig = Rig::new("list").await;
        let minute = Duration::from_secs(60);
        let earlier = std::time::Instant::now()
            .checked_sub(minute)
            .expect("the machine runs for longer");
        rig.shared.history().note_at(earlier, 10);
        *rig.server.version.lock().unwrap() = 20;
        assert_eq!(rig.list().await, 20);
        let fault = Fault::ListOld(minute / 2, LATE);
        rig.once(false, fault);
        assert_eq!(rig.list().await, 10);
        let asked = rig.server.asked.lock().unwrap().last().cloned().unwrap();
        assert!(
            asked.ends_with("limit=500&resourceVersion=10&resourceVersionMatch=Exact"),
            "{asked}"
        );
        assert_eq!(rig.told(fault), 1);
        let begin = Instant::now();
        let (happens, mut body) = rig.watch().await;
        happens.send(event("MODIFIED", 20)).unwrap();
        let (heard, _) = hear(&mut body, 1).await;
        assert_eq!(heard, text(&[event("MODIFIED", 20)]));
        assert!(
            begin.elapsed() >= LATE - Duration::from_millis(50),
            "{:?}",
            begin.elapsed()
        );
        // Where nothing happened since, an old list is none.
        rig.once(false, Fault::ListOld(Duration::ZERO, LATE));
        assert_eq!((rig.list().await, rig.told(fault)), (20, 1));
    });
}

#[test]
fn a_watch_passes_and_a_state_that_is_gone_is_told_both_ways() {
    run(async {
        let rig = Rig::new("gone").await;
        let (happens, mut body) = rig.watch().await;
        let events = [event("ADDED", 11), event("BOOKMARK", 12), event("DELETED", 13)];
        for event in &events {
            happens.send(event.clone()).unwrap();
        }
        drop(happens);
        assert_eq!(hear(&mut body, usize::MAX).await, (text(&events), false));
        rig.once(false, Fault::Refused(410));
        let refused = rig.ask("watch=true&resourceVersion=10").await;
        assert_eq!((refused.status().as_u16(), rig.told(Fault::Refused(410))), (410, 1));
        let (_happens, mut body) = rig.watch().await;
        rig.once(true, Fault::WatchGone);
        let (heard, cut) = hear(&mut body, usize::MAX).await;
        let heard: Value = serde_json::from_str(&heard).unwrap();
        assert_eq!(
            (&heard["type"], &heard["object"]["code"]),
            (&json!("ERROR"), &json!(410))
        );
        assert!(!cut && rig.told(Fault::WatchGone) == 1);
    });
}

#[test]
fn a_watch_is_cut_between_and_in_events() {
    run(async {
        let rig = Rig::new("cut").await;
        let (happens, mut body) = rig.watch().await;
        let first = event("ADDED", 11);
        happens.send(first.clone()).unwrap();
        assert_eq!(
            hear(&mut body, first.len()).await,
            (text(std::slice::from_ref(&first)), false)
        );
        rig.once(true, Fault::WatchCut);
        assert_eq!(hear(&mut body, usize::MAX).await, (String::new(), true));
        let (happens, mut body) = rig.watch().await;
        rig.once(true, Fault::WatchCutInEvent);
        happens.send(first.clone()).unwrap();
        let half = text(&[first.slice(..first.len() / 2)]);
        assert_eq!(hear(&mut body, usize::MAX).await, (half, true));
        assert_eq!((rig.told(Fault::WatchCut), rig.told(Fault::WatchCutInEvent)), (1, 1));
    });
}

/// One event before the fault's turn, two in it.
async fn told_under(rig: &Rig, fault: Fault) -> (String, Duration) {
    let (happens, mut body) = rig.watch().await;
    let first = event("ADDED", 11);
    happens.send(first.clone()).unwrap();
    hear(&mut body, first.len()).await;
    // Its turn begins when the chooser is asked, which is now or a little later.
    let begin = Instant::now();
    rig.once(true, fault);
    tokio::task::yield_now().await;
    for event in [event("MODIFIED", 12), event("BOOKMARK", 13), event("DELETED", 14)] {
        happens.send(event).unwrap();
    }
    drop(happens);
    let (heard, cut) = hear(&mut body, usize::MAX).await;
    assert!(!cut && rig.told(fault) > 0, "{fault:?}: {heard}");
    (heard, begin.elapsed())
}

#[test]
fn events_are_late_held_back_doubled_and_replayed_and_bookmarks_left_out() {
    run(async {
        let rig = Rig::new("events").await;
        let [first, second, mark, third] = [
            event("ADDED", 11),
            event("MODIFIED", 12),
            event("BOOKMARK", 13),
            event("DELETED", 14),
        ];
        let all = text(&[second.clone(), mark.clone(), third.clone()]);
        for fault in [Fault::WatchLate(LATE), Fault::WatchSilent(LATE)] {
            let (heard, time) = told_under(&rig, fault).await;
            assert_eq!(heard, all, "{fault:?}");
            assert!(time >= LATE - Duration::from_millis(50), "{fault:?}: {time:?}");
        }
        let (heard, _) = told_under(&rig, Fault::WatchTwice).await;
        assert_eq!(
            heard,
            text(&[
                second.clone(),
                second.clone(),
                mark.clone(),
                third.clone(),
                third.clone()
            ])
        );
        let (heard, _) = told_under(&rig, Fault::WatchReplayed).await;
        assert_eq!(
            heard,
            text(&[second.clone(), first, second.clone(), mark, third.clone()])
        );
        let (heard, _) = told_under(&rig, Fault::WatchWithoutBookmarks).await;
        assert_eq!(heard, text(&[second, third]));
    });
}

#[test]
fn writes_of_pods_are_written_down() {
    run(async {
        let rig = Rig::new("writes").await;
        let payload = r#"{"sub":"system:serviceaccount:a:b","kubernetes.io":{"pod":{"name":"p"}}}"#;
        let payload = base64::Engine::encode(&base64::prelude::BASE64_URL_SAFE_NO_PAD, payload);
        let ask = async |method: &str| {
            let request = Request::builder().method(method).uri("/api/v1/namespaces/a/pods/p");
            let request = request.header("authorization", format!("Bearer e30.{payload}.c2ln"));
            rig.client.ask(request.body(Full::default()).unwrap()).await
        };
        ask("GET").await.unwrap();
        ask("PUT").await.unwrap();
        rig.once(false, Fault::Refused(500));
        ask("PATCH").await.unwrap();
        let writes = rig.shared.writes().clone();
        let [taken, refused] = &writes[..] else {
            panic!("{writes:?}")
        };
        assert_eq!(taken.asked.asker.pod.as_deref(), Some("p"));
        assert!(taken.sent >= Some(taken.arrived) && taken.made.is_some());
        assert_eq!(
            (refused.asked.method.as_str(), refused.sent, &refused.made),
            ("PATCH", None, &None)
        );
    });
}
