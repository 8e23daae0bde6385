//! Connections, and what is done under each fault.
use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::{Arc, mpsc};
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use anyhow::Context;
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

use super::super::plan::{API_PORT, api_front_address};
use super::upstream::Caller;
use super::{Asked, Asker, Dice, Fault, Shared, path};

/// States of one object that are kept for stale answers.
const KEPT_MAX: usize = 32;
/// Between the first half of an answer and the end of its connection: the first half gets there.
const BEFORE_CUT: Duration = Duration::from_millis(20);
/// The uid of no object.
const NOBODYS_UID: &str = "00000000-0000-4000-8000-0000000000ff";

type Answer = Response<UnsyncBoxBody<Bytes, anyhow::Error>>;

/// Serves until `ended` says so; `tell` gets to know whether it listens.
pub(super) async fn serve(
    shared: Arc<Shared>,
    acceptor: TlsAcceptor,
    ended: oneshot::Receiver<()>,
    tell: &mpsc::Sender<anyhow::Result<()>>,
) {
    let address = SocketAddr::from((api_front_address(), API_PORT));
    let listener = TcpListener::bind(address).await;
    let listener = listener.with_context(|| format!("cannot listen at {address}"));
    let (listener, listens) = match listener {
        Ok(listener) => (Some(listener), Ok(())),
        Err(error) => (None, Err(error)),
    };
    // Who started this waits for it.
    let _ = tell.send(listens);
    let Some(listener) = listener else { return };
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
        let (mut head, body) = (self.head, Bytes::from(object.to_string()));
        head.headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
        Ok(Self { head, body })
    }
}

/// An answer of the API server that was read whole.
#[derive(Clone)]
struct Passed {
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
        object["metadata"]["resourceVersion"].as_str()?.parse().ok()
    }
}

/// What objects were, as the API server itself told: by path and version.
pub(super) struct History {
    states: HashMap<String, BTreeMap<u64, Passed>>,
    dice: Dice,
}

impl Default for History {
    fn default() -> Self {
        Self {
            states: HashMap::new(),
            dice: Dice::new(0x5eed),
        }
    }
}

impl History {
    fn remember(&mut self, path: &str, version: u64, state: &Passed) {
        let states = self.states.entry(path.to_owned()).or_default();
        states.insert(version, state.clone());
        if states.len() > KEPT_MAX {
            states.pop_first();
        }
    }

    /// One of the states before this version.
    fn before(&mut self, path: &str, version: u64) -> Option<Passed> {
        let older: Vec<&Passed> = self
            .states
            .get(path)?
            .range(..version)
            .map(|(_, state)| state)
            .collect();
        (!older.is_empty()).then(|| self.dice.pick(&older).clone())
    }

    fn at(&self, path: &str, version: u64) -> Option<Passed> {
        self.states.get(path)?.get(&version).cloned()
    }
}

impl Conversation {
    async fn answer(&self, request: Request<Incoming>) -> anyhow::Result<Answer> {
        let (head, body) = request.into_parts();
        let question = Question {
            head,
            body: body.collect().await?.to_bytes(),
        };
        let token = question
            .head
            .headers
            .get(AUTHORIZATION)
            .and_then(|value| value.to_str().ok());
        let asker = token.and_then(path::asker_of_token).unwrap_or_else(|| Asker {
            user: self.caller.user.clone().unwrap_or_default(),
            node: None,
        });
        let asked = Asked::new(asker, question.head.method.as_str(), &question.head.uri);
        let fault = self.shared.choose(&asked);
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
            Fault::OtherUid | Fault::WithoutVersion | Fault::OverNewest => {
                let question = self.changed(fault, &asked, question).await?;
                Ok(applied(&shared, &caller, &asked, question, fault).await?.answer())
            }
        }
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

/// Passes a request on, once, and remembers the state of an object that is in its answer.
async fn pass(shared: &Shared, caller: &Caller, asked: &Asked, question: Question) -> anyhow::Result<Passed> {
    let path = question.head.uri.path().to_owned();
    let (mut head, body) = caller.ask(question.request()).await?.into_parts();
    for header in [CONNECTION, TRANSFER_ENCODING] {
        head.headers.remove(header);
    }
    let body = body.collect().await?.to_bytes();
    let passed = Passed { head, body };
    if passed.head.status == StatusCode::OK
        && asked.name.is_some()
        && asked.subresource.is_none()
        && let Some(version) = passed.version()
    {
        shared.history().remember(&path, version, &passed);
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

/// As the API server words it.
fn refusal(code: u16) -> anyhow::Result<Passed> {
    let reason = match code {
        409 => "Conflict",
        429 => "TooManyRequests",
        500 => "InternalError",
        503 => "ServiceUnavailable",
        _ => anyhow::bail!("no refusal is known for status {code}"),
    };
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": "the proxy says so", "reason": reason, "code": code,
    });
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
