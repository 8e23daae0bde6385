//! What happened to a VM, told to people as events of the API server.

use ftvm_crds::FaultTolerantVM;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, Resource};

/// Longest reason and note; the API server takes 128 and 1024 bytes.
const REASON_CHARS_MAX: usize = 128;
const NOTE_CHARS_MAX: usize = 1000;

/// Tells it.
pub struct Events {
    client: Client,
    reporter: Reporter,
}

impl Events {
    /// In the name of this replica.
    pub fn new(client: Client, replica: String) -> Events {
        Events {
            client,
            reporter: Reporter {
                controller: "ftvm-operator".to_owned(),
                instance: Some(replica),
            },
        }
    }

    /// One thing, one event. A recorder that is kept takes whatever it is told of an object under one reason within six minutes for repetitions of the
    /// first: it counts them, and the note stays that of the first, so that after a second failover the wrong node would be named. Hence a new one
    /// each time.
    ///
    /// # Errors
    /// The API server's.
    pub async fn publish(
        &self,
        vm: &FaultTolerantVM,
        type_: EventType,
        reason: &str,
        note: &str,
    ) -> Result<(), kube::Error> {
        let event = Event {
            type_,
            reason: reason.chars().take(REASON_CHARS_MAX).collect(),
            note: Some(note.chars().take(NOTE_CHARS_MAX).collect()),
            action: "Reconcile".to_owned(),
            secondary: None,
        };
        let recorder = Recorder::new(self.client.clone(), self.reporter.clone());
        recorder.publish(&event, &vm.object_ref(&())).await
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::{Arc, Mutex};

    use http_body_util::{BodyExt, Full};
    use hyper::body::{Bytes, Incoming};
    use hyper::service::service_fn;
    use hyper::{Method, Request, Response};
    use hyper_util::rt::TokioIo;
    use kube::Config;
    use serde_json::Value;
    use tokio::net::TcpListener;

    use super::*;
    use crate::decide::rig;

    /// Takes every event and says so.
    type Taken = Arc<Mutex<Vec<(Method, Value)>>>;

    async fn server() -> (Client, Taken) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let config = Config::new(format!("http://{}", listener.local_addr().unwrap()).parse().unwrap());
        let taken = Taken::default();
        let taking = taken.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let taken = taking.clone();
                tokio::spawn(async move {
                    let service = service_fn(|request| take(request, taken.clone()));
                    let http = hyper::server::conn::http1::Builder::new();
                    // The client leaves as it likes.
                    let _ = http.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        (Client::try_from(config).unwrap(), taken)
    }

    async fn take(request: Request<Incoming>, taken: Taken) -> Result<Response<Full<Bytes>>, Infallible> {
        let method = request.method().clone();
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let event: Value = serde_json::from_slice(&body).unwrap();
        taken.lock().unwrap().push((method, event));
        let answer = Response::builder().header("content-type", "application/json");
        Ok(answer.body(Full::new(body)).unwrap())
    }

    #[tokio::test]
    async fn what_happens_twice_is_told_twice() {
        let (client, taken) = server().await;
        let events = Events::new(client, "one".to_owned());
        let notes = [
            "the guest runs on node a, before: b",
            "the guest runs on node b, before: a",
        ];
        for note in notes {
            let vm = rig::vm();
            let told = events.publish(&vm, EventType::Normal, "ActiveChanged", note).await;
            told.unwrap();
        }
        let taken = taken.lock().unwrap();
        let told: Vec<_> = taken.iter().map(|(method, event)| (method, &event["note"])).collect();
        assert_eq!(told[0], (&Method::POST, &Value::from(notes[0])));
        assert_eq!(told[1], (&Method::POST, &Value::from(notes[1])));
        let name = |index: usize| &taken[index].1["metadata"]["name"];
        assert!(told.len() == 2 && name(0) != name(1), "{taken:?}");
        assert_eq!(taken[0].1["regarding"]["name"], "web");
    }
}
