//! API servers for tests, each a few lines that say what it answers.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::ACCEPT;
use hyper::http::request::Parts;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use kube::Config;
use serde_json::json;
use tokio::net::TcpListener;

/// Code and body; without these the connection ends.
pub type Answer = Option<(u16, String)>;

/// Method, path and the form that is accepted, of each request in turn.
pub type Questions = Arc<Mutex<Vec<String>>>;

/// An API server that answers each request with what `answer` makes of its head and body.
pub async fn serve<F>(answer: impl Fn(Parts, Bytes) -> F + Clone + Send + 'static) -> Config
where
    F: Future<Output = Answer> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let answer = answer.clone();
            let service = service_fn(move |request: Request<Incoming>| {
                let answer = answer.clone();
                async move {
                    let (head, body) = request.into_parts();
                    let body = body.collect().await.unwrap().to_bytes();
                    let (code, body) = answer(head, body).await.ok_or("cut")?;
                    let response = Response::builder()
                        .status(code)
                        .header("content-type", "application/json");
                    Ok::<_, &str>(response.body(Full::new(Bytes::from(body))).unwrap())
                }
            });
            tokio::spawn(async move {
                let http = hyper::server::conn::http1::Builder::new();
                // The client leaves as it likes, and one that is cut off is an error.
                let _ = http.serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
    Config::new(url.parse().unwrap())
}

/// An API server that gives these answers, one after the other, to the bodies that it is sent, and what it was asked.
pub async fn scripted<A>(answers: impl IntoIterator<Item = A>) -> (Config, Questions)
where
    A: FnOnce(Bytes) -> Answer + Send + 'static,
{
    let left: VecDeque<A> = answers.into_iter().collect();
    let left = Arc::new(Mutex::new(left));
    let questions = Questions::default();
    let told = questions.clone();
    let config = serve(move |head: Parts, body: Bytes| {
        let form = head.headers.get(ACCEPT).map(|form| form.to_str().unwrap());
        let question = format!("{} {} {form:?}", head.method, head.uri);
        told.lock().unwrap().push(question);
        let next = left.lock().unwrap().pop_front();
        let answer = next.expect("one question more than answers");
        std::future::ready(answer(body))
    });
    (config.await, questions)
}

/// What an API server says that does not do it.
pub fn refused(code: u16, reason: &str) -> Answer {
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": "not so", "code": code});
    Some((code, status.to_string()))
}
