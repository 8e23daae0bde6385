use std::convert::Infallible;

use http_body_util::Full;
use hyper::Response;
use hyper::body::Bytes;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::net::TcpListener;

use super::*;

const UID: &str = "00000000-0000-4000-8000-00000000000a";

/// What is made of this answer to the question for the pod `web-a`.
async fn judged(code: u16, body: &str) -> Answer {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let body = Bytes::from(body.to_owned());
    let serving = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let service = service_fn(|_| {
            let answer = Response::builder()
                .status(code)
                .header("content-type", "application/json");
            let answer = answer.body(Full::new(body.clone())).unwrap();
            async { Ok::<_, Infallible>(answer) }
        });
        let http = hyper::server::conn::http1::Builder::new();
        // The client leaves as it likes.
        let _ = http.serve_connection(TokioIo::new(stream), service).await;
    });
    let client = Client::try_from(kube::Config::new(url.parse().unwrap())).unwrap();
    let answer = ask(client, "shop".to_owned(), "web-a".to_owned(), UID.to_owned()).await;
    serving.abort();
    answer
}

fn status(code: u16, reason: &str, kind: &str, name: &str) -> String {
    let details = json!({"kind": kind, "name": name});
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "", "reason": reason, "code": code, "details": details,
    });
    status.to_string()
}

fn object(metadata: &serde_json::Value) -> String {
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata}).to_string()
}

#[tokio::test]
async fn a_pod_is_gone_only_by_the_api_servers_word_about_it() {
    let other = object(&json!({"name": "web-a", "uid": "00000000-0000-4000-8000-00000000000b"}));
    for (code, body) in [(404, status(404, "NotFound", "pods", "web-a")), (200, other)] {
        assert_eq!(judged(code, &body).await, Answer::Gone, "{code} {body}");
    }
    for (code, body) in [
        (404, String::new()),
        (404, "404 page not found".to_owned()),
        (404, "{}".to_owned()),
        (
            404,
            json!({"kind": "Status", "reason": "NotFound", "code": 404}).to_string(),
        ),
        (404, status(404, "NotFound", "namespaces", "shop")),
        (404, status(404, "NotFound", "pods", "web-b")),
        (404, status(404, "", "pods", "web-a")),
        (403, status(403, "Forbidden", "pods", "web-a")),
        (503, status(503, "ServiceUnavailable", "pods", "web-a")),
        (200, "{}".to_owned()),
        (200, object(&json!({}))),
        (200, object(&json!({"name": "web-a"}))),
        (200, object(&json!({"name": "web-a", "uid": ""}))),
    ] {
        assert_eq!(judged(code, &body).await, Answer::Nothing, "{code} {body}");
    }
}

#[tokio::test]
async fn a_pod_that_is_there_may_be_being_deleted() {
    let there = object(&json!({"name": "web-a", "uid": UID}));
    assert_eq!(judged(200, &there).await, Answer::There { ends: false });
    let deleted = json!({"name": "web-a", "uid": UID, "deletionTimestamp": "2026-01-01T00:00:00Z"});
    assert_eq!(judged(200, &object(&deleted)).await, Answer::There { ends: true });
}

/// The next question counts from the answer to the last one, and waits longer and longer.
#[tokio::test]
async fn a_seat_is_asked_for_more_and_more_rarely() {
    let mut now = Instant::now();
    let mut asked = Asked::new(now);
    let mut pauses = Vec::new();
    for _ in 0..8 {
        assert!(asked.is_due(now));
        asked.asking = Some(tokio::spawn(std::future::pending()));
        now += 3 * PAUSE.1;
        assert!(
            asked.answered(now).is_none() && !asked.is_due(now),
            "not twice at a time"
        );
        let (answer, given) = (tokio::spawn(async { Answer::Nothing }), now);
        while !answer.is_finished() {
            tokio::task::yield_now().await;
        }
        asked.asking = Some(answer);
        assert_eq!(asked.answered(now), Some(Answer::Nothing));
        while !asked.is_due(now) {
            now += Duration::from_secs(1);
        }
        pauses.push((now - given).as_secs());
    }
    assert_eq!(pauses, [2, 4, 8, 16, 32, 60, 60, 60]);
}
