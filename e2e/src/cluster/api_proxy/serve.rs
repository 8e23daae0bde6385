//! Connections, and what is done under each fault.
use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame, Incoming};
use hyper::header::{
    AUTHORIZATION, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue, RETRY_AFTER, TRANSFER_ENCODING,
};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, http};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::time::{Sleep, sleep};
use tokio_rustls::TlsAcceptor;

use super::upstream::Caller;
use super::{Asked, Asker, Fault, Shared, path, watch};

/// Between the first half of an answer and the end of its connection: the first half gets there.
pub(super) const BEFORE_CUT: Duration = Duration::from_millis(20);
/// The uid of no object.
const NOBODYS_UID: &str = "00000000-0000-4000-8000-0000000000ff";

pub(super) type Answer = Response<UnsyncBoxBody<Bytes, anyhow::Error>>;

/// Serves until `ended` says so.
pub(super) async fn serve(
    shared: Arc<Shared>,
    acceptor: TlsAcceptor,
    listener: TcpListener,
    ended: oneshot::Receiver<()>,
) {
    tokio::spawn(async move {
        loop {
            // A client that left before it was accepted is nobody's business.
            if let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(converse(Arc::clone(&shared), acceptor.clone(), stream));
            }
        }
    });
    // The sender is dropped. Everything else ends with the runtime.
    let _ = ended.await;
}

async fn converse(shared: Arc<Shared>, acceptor: TlsAcceptor, stream: TcpStream) {
    let conversation = async {
        stream.set_nodelay(true)?;
        let socket = stream.as_fd().try_clone_to_owned()?;
        let stream = acceptor.accept(stream).await?;
        let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
        let caller = shared.upstream.caller(certificate)?;
        let conversation = Conversation { shared, caller, socket };
        let service = service_fn(|request| conversation.answer(request));
        let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
        // How it ends is up to both sides, and often to a fault.
        let _ = connection.await;
        anyhow::Ok(())
    };
    // Health checks connect and say nothing; whoever fails at TLS says so himself.
    let _ = conversation.await;
}

/// One connection.
struct Conversation {
    shared: Arc<Shared>,
    caller: Caller,
    /// Its socket, for a reset.
    socket: OwnedFd,
}

/// A request that was read whole, and can be sent more than once.
#[derive(Clone)]
struct Question {
    head: http::request::Parts,
    body: Bytes,
    /// Where it is written down.
    written: Option<usize>,
}

impl Question {
    fn request(self) -> Request<Full<Bytes>> {
        let mut head = self.head;
        for header in [CONNECTION, TRANSFER_ENCODING] {
            head.headers.remove(header);
        }
        Request::from_parts(head, Full::new(self.body))
    }

    /// An update with something changed.
    fn changed(self, change: impl FnOnce(&mut Value)) -> anyhow::Result<Self> {
        let mut object: Value = serde_json::from_slice(&self.body)?;
        change(&mut object["metadata"]);
        let (mut head, body) = (self.head.clone(), Bytes::from(object.to_string()));
        head.headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
        Ok(Self { head, body, ..self })
    }
}

/// An answer of the API server that was read whole.
#[derive(Clone)]
pub(super) struct Passed {
    head: http::response::Parts,
    body: Bytes,
}

impl Passed {
    fn answer(self) -> Answer {
        let body = Full::new(self.body).map_err(|never| match never {});
        Response::from_parts(self.head, body.boxed_unsync())
    }

    /// Half of it, though its head promises everything.
    fn half(mut self) -> Answer {
        self.head
            .headers
            .insert(CONTENT_LENGTH, HeaderValue::from(self.body.len()));
        let body = Cut {
            half: Some(self.body.slice(..self.body.len() / 2)),
            pause: Box::pin(sleep(BEFORE_CUT)),
        };
        Response::from_parts(self.head, body.boxed_unsync())
    }

    /// The object's version, if it is an object in JSON.
    fn version(&self) -> Option<u64> {
        let object: Value = serde_json::from_slice(&self.body).ok()?;
        version_of(&object)
    }

    /// Which objects a list has, and in which versions.
    fn items(&self) -> Option<BTreeSet<(String, String)>> {
        let list: Value = serde_json::from_slice(&self.body).ok()?;
        let text = |item: &Value, name: &str| item["metadata"][name].as_str().unwrap_or_default().to_owned();
        let items = list["items"].as_array()?.iter();
        Some(
            items
                .map(|item| (text(item, "uid"), text(item, "resourceVersion")))
                .collect(),
        )
    }
}

impl Conversation {
    async fn answer(&self, request: Request<Incoming>) -> anyhow::Result<Answer> {
        let (head, body) = request.into_parts();
        let mut question = Question {
            head,
            body: body.collect().await?.to_bytes(),
            written: None,
        };
        let token = question
            .head
            .headers
            .get(AUTHORIZATION)
            .and_then(|value| value.to_str().ok());
        let asker = token.and_then(path::asker_of_token).unwrap_or_else(|| Asker {
            user: self.caller.user.clone().unwrap_or_default(),
            ..Asker::default()
        });
        let asked = Asked::new(asker, question.head.method.as_str(), &question.head.uri);
        let fault = self.shared.choose(&asked);
        question.written = self.shared.arrived(&asked);
        if asked.watch {
            return self.watch(fault, asked, question).await;
        }
        if asked.passes_always() {
            let answer = self.caller.ask(question.request()).await?;
            return Ok(answer.map(|body| body.map_err(Into::into).boxed_unsync()));
        }
        self.answer_with(fault, asked, question).await
    }

    async fn answer_with(&self, fault: Fault, asked: Asked, question: Question) -> anyhow::Result<Answer> {
        let (shared, caller) = (Arc::clone(&self.shared), self.caller.clone());
        match fault {
            Fault::None => Ok(pass(&shared, &caller, &asked, question).await?.answer()),
            Fault::Refused(status) => {
                shared.told(&asked, fault);
                Ok(refusal(status)?.answer())
            }
            Fault::Reset => {
                shared.told(&asked, fault);
                self.reset()
            }
            Fault::Late(time) => {
                // It goes on when the asker has left.
                let later = tokio::spawn(async move {
                    sleep(time).await;
                    applied(&shared, &caller, &asked, question, fault).await
                });
                later.await??;
                anyhow::bail!("nobody is answered")
            }
            Fault::AppliedThen(status) => {
                applied(&shared, &caller, &asked, question, fault).await?;
                Ok(refusal(status)?.answer())
            }
            Fault::AppliedThenCut => Ok(applied(&shared, &caller, &asked, question, fault).await?.half()),
            Fault::AppliedThenReset => {
                applied(&shared, &caller, &asked, question, fault).await?;
                self.reset()
            }
            Fault::Twice => {
                applied(&shared, &caller, &asked, question.clone(), fault).await?;
                Ok(pass(&shared, &caller, &asked, question).await?.answer())
            }
            Fault::Stale | Fault::StaleAt(_) => Ok(self.stale(fault, &asked, question).await?.answer()),
            Fault::ListOld(age, lag) => {
                let old = self.old_list(fault, (age, lag), &asked, question).await?;
                Ok(old.answer())
            }
            // Watches are answered elsewhere: of this there is nothing to falsify.
            Fault::WatchLate(_)
            | Fault::WatchSilent(_)
            | Fault::WatchCut
            | Fault::WatchCutInEvent
            | Fault::WatchGone
            | Fault::WatchReplayed
            | Fault::WatchTwice
            | Fault::WatchWithoutBookmarks => Ok(pass(&shared, &caller, &asked, question).await?.answer()),
            Fault::OtherUid | Fault::WithoutVersion | Fault::OverNewest => {
                let question = self.changed(fault, &asked, question).await?;
                Ok(applied(&shared, &caller, &asked, question, fault).await?.answer())
            }
        }
    }

    /// An answer that goes on. What becomes of it after its head is decided as long as it does.
    async fn watch(&self, fault: Fault, asked: Asked, question: Question) -> anyhow::Result<Answer> {
        match fault {
            Fault::Refused(status) => {
                self.shared.told(&asked, fault);
                return Ok(refusal(status)?.answer());
            }
            Fault::Reset => {
                self.shared.told(&asked, fault);
                return self.reset();
            }
            _ => {}
        }
        let silent = path::parameter(&question.head.uri, "resourceVersion")
            .and_then(|version| version.parse().ok())
            .and_then(|version| self.shared.history().lags(question.head.uri.path(), version));
        let (mut head, body) = self.caller.ask(question.request()).await?.into_parts();
        for header in [CONNECTION, TRANSFER_ENCODING] {
            head.headers.remove(header);
        }
        let format = head.headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let json = format.is_some_and(|format| format.starts_with("application/json"));
        if head.status != StatusCode::OK || !json {
            let body = body.map_err(Into::into).boxed_unsync();
            return Ok(Response::from_parts(head, body));
        }
        let body = watch::relay(Arc::clone(&self.shared), asked, fault, silent, body);
        Ok(Response::from_parts(head, body.boxed_unsync()))
    }

    /// The list as it was a while ago, if it was another one.
    async fn old_list(
        &self,
        fault: Fault,
        (age, lag): (Duration, Duration),
        asked: &Asked,
        question: Question,
    ) -> anyhow::Result<Passed> {
        let mut then = question.clone();
        let newest = pass(&self.shared, &self.caller, asked, question).await?;
        let before = self.shared.history().version_at(Instant::now().checked_sub(age));
        let older = before.zip(newest.version()).filter(|(before, newest)| before < newest);
        let Some((before, _)) = older.filter(|_| asked.lists()) else {
            return Ok(newest);
        };
        let path = then.head.uri.path().to_owned();
        then.head.uri = path::as_of(&then.head.uri, before)?;
        let old = pass(&self.shared, &self.caller, asked, then).await?;
        // The API server's store may have forgotten it.
        if old.head.status != StatusCode::OK || old.items() == newest.items() {
            return Ok(newest);
        }
        self.shared.history().lag(path, before, Instant::now() + lag);
        self.shared.told(asked, fault);
        Ok(old)
    }

    /// The newest state, or an older one if the fault wants one that is known.
    async fn stale(&self, fault: Fault, asked: &Asked, question: Question) -> anyhow::Result<Passed> {
        let path = question.head.uri.path().to_owned();
        let newest = pass(&self.shared, &self.caller, asked, question).await?;
        let Some(version) = newest.version().filter(|_| asked.reads_one()) else {
            return Ok(newest);
        };
        let older = match fault {
            Fault::StaleAt(at) => self.shared.history().at(&path, at).filter(|_| at < version),
            _ => self.shared.history().before(&path, version),
        };
        let Some(older) = older else { return Ok(newest) };
        self.shared.told(asked, fault);
        Ok(older)
    }

    /// An update as the fault wants it; everything else as it is.
    async fn changed(&self, fault: Fault, asked: &Asked, question: Question) -> anyhow::Result<Question> {
        if asked.method != "PUT" {
            return Ok(question);
        }
        match fault {
            Fault::OtherUid => question.changed(|metadata| metadata["uid"] = json!(NOBODYS_UID)),
            Fault::WithoutVersion => question.changed(|metadata| {
                metadata.as_object_mut().map(|all| all.remove("resourceVersion"));
            }),
            _ => {
                let mut read = Request::get(question.head.uri.path()).body(Full::default())?;
                read.headers_mut().clone_from(&question.head.headers);
                for header in [CONTENT_LENGTH, CONTENT_TYPE, CONNECTION, TRANSFER_ENCODING] {
                    read.headers_mut().remove(header);
                }
                let newest = self.caller.ask(read).await?.into_body().collect().await?.to_bytes();
                let newest: Value = serde_json::from_slice(&newest)?;
                let version = newest["metadata"]["resourceVersion"].clone();
                question.changed(|metadata| metadata["resourceVersion"] = version)
            }
        }
    }

    /// RST instead of FIN: the other side can't know what became of its request.
    fn reset(&self) -> anyhow::Result<Answer> {
        rustix::net::sockopt::set_socket_linger(&self.socket, Some(Duration::ZERO))?;
        anyhow::bail!("the connection is reset")
    }
}

/// The version of an object, or of a list.
pub(in crate::cluster) fn version_of(object: &Value) -> Option<u64> {
    object["metadata"]["resourceVersion"].as_str()?.parse().ok()
}

/// Passes a request on, once, and remembers the state of an object that is in its answer, and what a pod wrote.
async fn pass(shared: &Shared, caller: &Caller, asked: &Asked, question: Question) -> anyhow::Result<Passed> {
    let (path, written) = (question.head.uri.path().to_owned(), question.written);
    if let Some(at) = written {
        shared.writes()[at].sent.get_or_insert_with(Instant::now);
    }
    let (mut head, body) = caller.ask(question.request()).await?.into_parts();
    for header in [CONNECTION, TRANSFER_ENCODING] {
        head.headers.remove(header);
    }
    let body = body.collect().await?.to_bytes();
    let passed = Passed { head, body };
    if let Some(at) = written.filter(|_| passed.head.status.is_success()) {
        let made = serde_json::from_slice(&passed.body).ok();
        let mut writes = shared.writes();
        writes[at].made = writes[at].made.take().or(made);
    }
    if passed.head.status == StatusCode::OK
        && let Some(version) = passed.version()
    {
        let mut history = shared.history();
        history.note(version);
        if asked.name.is_some() && asked.subresource.is_none() {
            history.remember(&path, version, &passed);
        }
    }
    Ok(passed)
}

/// Passes a request on that a falsehood is told about: it is one if the API server took it.
async fn applied(
    shared: &Shared,
    caller: &Caller,
    asked: &Asked,
    question: Question,
    fault: Fault,
) -> anyhow::Result<Passed> {
    let passed = pass(shared, caller, asked, question).await?;
    if passed.head.status.is_success() {
        shared.told(asked, fault);
    }
    Ok(passed)
}

/// A `Status` that tells of a failure.
pub(super) fn failure(code: u16, reason: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": "the proxy says so", "reason": reason, "code": code,
    })
}

/// As the API server words it.
fn refusal(code: u16) -> anyhow::Result<Passed> {
    let reason = match code {
        409 => "Conflict",
        410 => "Expired",
        429 => "TooManyRequests",
        500 => "InternalError",
        503 => "ServiceUnavailable",
        _ => anyhow::bail!("no refusal is known for status {code}"),
    };
    let status = failure(code, reason);
    let mut answer = Response::builder()
        .status(code)
        .header(CONTENT_TYPE, "application/json");
    if code == 429 {
        answer = answer.header(RETRY_AFTER, "1");
    }
    let (head, ()) = answer.body(())?.into_parts();
    Ok(Passed {
        head,
        body: status.to_string().into(),
    })
}

/// A body that breaks off.
struct Cut {
    half: Option<Bytes>,
    pause: Pin<Box<Sleep>>,
}

impl Body for Cut {
    type Data = Bytes;
    type Error = anyhow::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut TaskContext<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, anyhow::Error>>> {
        if let Some(half) = self.half.take() {
            return Poll::Ready(Some(Ok(Frame::data(half))));
        }
        let cut = || Some(Err(anyhow::anyhow!("the answer is cut")));
        self.pause.as_mut().poll(context).map(|()| cut())
    }
}
