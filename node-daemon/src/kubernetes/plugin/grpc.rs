//! As much of gRPC as a device plugin needs, over hyper's HTTP/2: unary calls and one stream of answers.
//!
//! A message is framed by a byte 0 (not compressed) and its length as four bytes, big endian; the outcome of a call is in the
//! trailer `grpc-status` (github.com/grpc/grpc, doc/PROTOCOL-HTTP2.md).

use std::convert::Infallible;
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures::stream::BoxStream;
use futures::{StreamExt, stream};
use http_body_util::{BodyExt, Full, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http2 as client;
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderValue, TE};
use hyper::server::conn::http2 as server;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio::net::{UnixListener, UnixStream};

/// Longest message that is taken.
const MESSAGE_BYTES_MAX: usize = 1 << 20;
/// A call takes no longer, also of a kubelet that has just started on a busy node.
const CALL_MAX: Duration = Duration::from_secs(60);

/// `UNIMPLEMENTED` and `INVALID_ARGUMENT` of grpc's status codes.
pub const UNIMPLEMENTED: u16 = 12;
pub const INVALID_ARGUMENT: u16 = 3;

/// A refusal: status code and message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal(pub u16, pub String);

/// The answers of a call, in their encoded form.
pub type Answers = BoxStream<'static, Bytes>;
type Body = http_body_util::combinators::UnsyncBoxBody<Bytes, Infallible>;

/// What answers calls.
pub trait Service: Clone + Send + Sync + 'static {
    /// The answers to a call of this method (`/package.Service/Method`) with this message.
    fn call(&self, method: &str, message: Bytes) -> Result<Answers, Refusal>;
}

/// One encoded answer.
pub fn one(message: &impl Message) -> Answers {
    let bytes = Bytes::from(message.encode_to_vec());
    stream::once(async move { bytes }).boxed()
}

/// Serves this socket until the future is dropped.
pub async fn serve(listener: UnixListener, service: impl Service) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!("kubelet can't connect: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let service = service.clone();
        let answer = service_fn(move |request| {
            let service = service.clone();
            async move { Ok::<_, Infallible>(answer(request, &service).await) }
        });
        tokio::spawn(async move {
            let connection = server::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), answer);
            if let Err(error) = connection.await {
                tracing::debug!("kubelet's connection: {error}");
            }
        });
    }
}

async fn answer(request: Request<Incoming>, service: &impl Service) -> Response<Body> {
    let method = request.uri().path().to_owned();
    let body = Limited::new(request.into_body(), MESSAGE_BYTES_MAX).collect();
    let outcome = match tokio::time::timeout(CALL_MAX, body).await {
        Ok(Ok(body)) => unframe(body.to_bytes()).and_then(|message| service.call(&method, message)),
        Ok(Err(error)) => Err(Refusal(INVALID_ARGUMENT, error.to_string())),
        Err(_) => Err(Refusal(INVALID_ARGUMENT, "the message does not end".to_owned())),
    };
    let (answers, refusal) = match outcome {
        Ok(answers) => (answers, None),
        Err(refusal) => (stream::empty().boxed(), Some(refusal)),
    };
    let answers = answers.map(|message| Frame::data(frame(&message)));
    let trailers = stream::once(async move { Frame::trailers(trailers(refusal.as_ref())) });
    let body = StreamBody::new(answers.chain(trailers).map(Ok::<_, Infallible>));
    let mut response = Response::new(BodyExt::boxed_unsync(body));
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

fn trailers(refusal: Option<&Refusal>) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    let code = refusal.map_or(0, |refusal| refusal.0);
    trailers.insert("grpc-status", HeaderValue::from(code));
    let text = refusal.map(|refusal| {
        refusal
            .1
            .chars()
            .filter(|c| c.is_ascii_graphic() || *c == ' ')
            .collect::<String>()
    });
    if let Some(text) = text.and_then(|text| HeaderValue::from_str(&text).ok()) {
        trailers.insert("grpc-message", text);
    }
    trailers
}

fn frame(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::with_capacity(5 + message.len());
    framed.put_u8(0);
    // Messages of this module are far shorter.
    framed.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    framed.put_slice(message);
    framed.freeze()
}

/// The one message of a body.
fn unframe(mut body: Bytes) -> Result<Bytes, Refusal> {
    let refuse = |why: &str| Err(Refusal(INVALID_ARGUMENT, why.to_owned()));
    if body.len() < 5 {
        return refuse("no message");
    }
    let compressed = body.get_u8();
    let length = body.get_u32();
    if compressed != 0 {
        return refuse("compressed messages are not taken");
    }
    if usize::try_from(length).ok() != Some(body.len()) {
        return refuse("not one whole message");
    }
    Ok(body)
}

/// Calls a method of the server at this socket and gives its one answer.
///
/// # Errors
/// Why there is none, for people.
pub async fn call(socket: &Path, method: &str, message: &impl Message) -> Result<Bytes, String> {
    let calling: Pin<Box<dyn Future<Output = Result<Bytes, String>> + Send>> = Box::pin(call_in_time(
        socket.to_owned(),
        method.to_owned(),
        frame(&message.encode_to_vec()),
    ));
    match tokio::time::timeout(CALL_MAX, calling).await {
        Ok(outcome) => outcome,
        Err(_) => Err(format!(
            "{} does not answer within {} s",
            socket.display(),
            CALL_MAX.as_secs()
        )),
    }
}

async fn call_in_time(socket: std::path::PathBuf, method: String, framed: Bytes) -> Result<Bytes, String> {
    let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", socket.display());
    let stream = UnixStream::connect(&socket).await.map_err(|error| failed(&error))?;
    let handshake = client::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|error| failed(&error))?;
    let connection = tokio::spawn(connection);
    let request = Request::builder()
        .method(Method::POST)
        .uri(format!("http://localhost{method}"))
        .header(CONTENT_TYPE, "application/grpc")
        .header(TE, "trailers")
        .body(Full::new(framed))
        .map_err(|error| failed(&error))?;
    let response = sender.send_request(request).await.map_err(|error| failed(&error))?;
    let (head, body) = response.into_parts();
    let body = Limited::new(body, MESSAGE_BYTES_MAX)
        .collect()
        .await
        .map_err(|error| failed(&error))?;
    connection.abort();
    // An outcome without a message comes in the headers alone.
    let trailers = body.trailers().cloned().unwrap_or_default();
    let text = |name| {
        let found = trailers.get(name).or_else(|| head.headers.get(name));
        found
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
            .to_owned()
    };
    if head.status != StatusCode::OK || text("grpc-status") != "0" {
        let (code, why) = (text("grpc-status"), text("grpc-message"));
        return Err(failed(&format!("{method} was refused ({} {code} {why})", head.status)));
    }
    unframe(body.to_bytes()).map_err(|refusal| failed(&refusal.1))
}
