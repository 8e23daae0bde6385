use hyper::body::Bytes;
use serde_json::{Value, json};

use super::*;
use crate::testing::{Answer, Questions, refused, scripted};

const AT_ONCE: Waits = Waits {
    patience: Duration::ZERO,
    pause: Duration::ZERO,
};
const FOR_EVER: Waits = Waits {
    patience: Duration::from_secs(1_000_000),
    pause: Duration::ZERO,
};

async fn serving(answers: Vec<Answer>) -> (Client, Questions) {
    let answers = answers.into_iter().map(|answer| move |_: Bytes| answer);
    let (config, questions) = scripted(answers).await;
    (client(config).unwrap(), questions)
}

/// A page with VMs of these names; the last one is being deleted, and none of them can be read as a VM.
fn page(names: &[&str], token: &str) -> Answer {
    let last = names.last();
    let items: Vec<Value> = names
        .iter()
        .map(|name| {
            let mut metadata = json!({"name": name, "namespace": "shop"});
            if Some(name) == last {
                metadata["deletionTimestamp"] = json!("2026-01-02T03:04:05Z");
            }
            json!({
                "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata,
                "spec": {"runStrategy": "Sometimes"},
            })
        })
        .collect();
    let list = json!({
        "kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1",
        "metadata": {"resourceVersion": "7", "continue": token}, "items": items,
    });
    Some((200, list.to_string()))
}

/// What API servers say of a path that they don't know, and proxies of much.
fn no_such_path() -> Answer {
    Some((404, "404 page not found\n".to_owned()))
}

fn definition() -> Answer {
    let metadata = json!({"name": "faulttolerantvms.ftvm.dev"});
    let definition = json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata});
    Some((200, definition.to_string()))
}

fn release() -> Release {
    Release {
        name: "vms".to_owned(),
        namespace: "vms-system".to_owned(),
        revision: 3,
    }
}

/// What comes of these answers, if nothing is asked twice.
async fn once(answers: Vec<Answer>) -> (Result<Found, String>, Vec<String>) {
    let (client, questions) = serving(answers).await;
    let answer = ask(&client, AT_ONCE).await.map_err(|unknown| unknown.why);
    let questions = questions.lock().unwrap().clone();
    (answer, questions)
}

#[tokio::test]
async fn every_vm_counts_whatever_it_is() {
    let first = ["a", "b", "c", "d", "e", "f", "g"];
    let (found, questions) = once(vec![page(&first, "more"), page(&["h", "i", "j", "k", "l"], "")]).await;
    let found = found.unwrap();
    assert_eq!((found.count, found.names.len()), (12, NAMED_MAX));
    assert_eq!(
        found.to_string(),
        "12 FaultTolerantVMs: shop/a, shop/b, shop/c, shop/d, shop/e, shop/f, shop/g (being deleted), shop/h, shop/i, shop/j and 2 more"
    );
    assert_eq!(questions.len(), 2, "{questions:?}");
    for (question, token) in questions.iter().zip([false, true]) {
        let asked = question.starts_with("GET /apis/ftvm.dev/v1alpha1/faulttolerantvms?")
            && question.contains("limit=500")
            && question.contains("as=PartialObjectMetadataList")
            && question.contains("continue=more") == token;
        assert!(asked, "{question}");
    }
    let (found, _) = once(vec![page(&[], "")]).await;
    assert_eq!(found, Ok(Found::default()));
}

/// A kind that is not there has no objects; a version of it that is not served may have.
#[tokio::test]
async fn without_the_definition_there_are_no_vms() {
    for missing in [no_such_path(), refused(404, "NotFound")] {
        let (found, questions) = once(vec![missing.clone(), refused(404, "NotFound")]).await;
        assert_eq!(found, Ok(Found::default()));
        let path = "GET /apis/apiextensions.k8s.io/v1/customresourcedefinitions/faulttolerantvms.ftvm.dev ";
        assert!(questions[1].starts_with(path), "{questions:?}");
        let (found, _) = once(vec![missing.clone(), definition()]).await;
        let why = found.unwrap_err();
        assert!(why.contains("it does not serve v1alpha1"), "{why}");
        for unclear in [no_such_path(), refused(403, "Forbidden"), None] {
            let (found, _) = once(vec![missing.clone(), unclear.clone()]).await;
            assert!(found.is_err(), "{unclear:?}: {found:?}");
        }
    }
}

#[tokio::test]
async fn what_tells_nothing_is_no_permission() {
    for (answer, words) in [
        (refused(403, "Forbidden"), "API server: not so (code 403)"),
        (refused(401, "Unauthorized"), "not so (code 401)"),
        (refused(503, "ServiceUnavailable"), "not so (code 503)"),
        (Some((200, "{}".to_owned())), "the API server gives no answer"),
        (None, "the API server gives no answer"),
    ] {
        let (client, _) = serving(vec![answer.clone()]).await;
        let unknown = ask(&client, AT_ONCE).await;
        let error = judged(release(), unknown).unwrap_err();
        assert_eq!(error.exit_code(), 31);
        let text = error.to_string();
        for words in [
            words,
            "not uninstalled",
            "`helm uninstall vms --namespace vms-system --no-hooks`",
        ] {
            assert!(text.contains(words), "{answer:?}: no {words:?} in: {text}");
        }
        // It may pass.
        let (client, questions) = serving(vec![answer.clone(), answer, page(&["web"], "")]).await;
        assert_eq!(ask(&client, FOR_EVER).await.unwrap().count, 1);
        assert_eq!(questions.lock().unwrap().len(), 3);
    }
}

/// Pages belong together: what was counted before one that can't be had is not counted twice.
#[tokio::test]
async fn a_list_that_breaks_off_is_begun_anew() {
    let expired = refused(410, "Expired");
    let answers = vec![page(&["a"], "more"), expired, page(&["a"], "more"), page(&["b"], "")];
    let (client, questions) = serving(answers).await;
    let found = ask(&client, FOR_EVER).await.unwrap();
    assert_eq!(
        found.to_string(),
        "2 FaultTolerantVMs: shop/a (being deleted), shop/b (being deleted)"
    );
    assert!(!questions.lock().unwrap()[2].contains("continue="));
}

#[test]
fn it_is_said_which_vms_there_are_and_what_to_do() {
    judged(release(), Ok(Found::default())).unwrap();
    let mut found = Found::default();
    found.add(&ObjectMeta {
        name: Some("web".to_owned()),
        namespace: Some("shop".to_owned()),
        ..ObjectMeta::default()
    });
    let error = judged(release(), Ok(found)).unwrap_err();
    let text = error.to_string();
    for words in [
        "not uninstalled because of 1 FaultTolerantVM: shop/web. ",
        "`kubectl delete faulttolerantvms --all --all-namespaces`",
        "`helm rollback vms 3 --namespace vms-system`",
        "`helm uninstall vms --namespace vms-system --no-hooks`",
    ] {
        assert!(text.contains(words), "no {words:?} in: {text}");
    }
    assert_eq!(error.exit_code(), 26);
    let codes = include_str!("../../docs/exit-codes.md");
    for line in ["| 26 | refused |", "| 31 | api-server |"] {
        assert!(codes.contains(line), "docs/exit-codes.md has no {line}");
    }
}
