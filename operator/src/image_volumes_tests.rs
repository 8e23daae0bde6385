use hyper::body::Bytes;
use kube::Client;
use serde_json::{Value, json};

use super::*;
use crate::metrics::Metrics;
use crate::testing::{Answer, Questions, refused, scripted};

/// What an API server answers to the object that it is sent.
type Makes = fn(Value) -> Answer;

fn as_it_is(pod: Value) -> Answer {
    Some((201, pod.to_string()))
}

fn without_the_volume(mut pod: Value) -> Answer {
    pod["spec"].as_object_mut().unwrap().remove("volumes");
    as_it_is(pod)
}

fn another(mut pod: Value) -> Answer {
    pod["metadata"]["name"] = json!("other");
    without_the_volume(pod)
}

/// The cluster's API server gives these answers, one after the other; which questions it was asked. What is no answer is not gone by.
async fn asked(setting: Setting, again: Duration, answers: &[Makes]) -> (ImageVolumes, Questions) {
    let answers = answers
        .iter()
        .map(|&makes| move |body: Bytes| makes(serde_json::from_slice(&body).unwrap()));
    let (config, questions) = scripted(answers).await;
    let client = Client::try_from(config).unwrap();
    let objects = Objects::new(client, Metrics::new().unwrap(), "ftvm-system");
    let mut volumes = ImageVolumes::new(setting, SeatImage::default(), objects);
    volumes.waits = Waits {
        answered: again,
        kept: Duration::ZERO,
        unanswered: Duration::ZERO,
    };
    (volumes, questions)
}

const NEVER_AGAIN: Duration = Duration::from_secs(1_000_000);

#[tokio::test]
async fn the_api_server_is_asked_once_in_a_while_and_nothing_is_made() {
    let clear: [(Makes, GuestFiles); 2] = [
        (as_it_is, GuestFiles::Mounted),
        (without_the_volume, GuestFiles::Copied),
    ];
    for (answer, files) in clear {
        let (volumes, questions) = asked(Setting::Auto, NEVER_AGAIN, &[answer]).await;
        for _ in 0..3 {
            assert_eq!(volumes.files().await.unwrap(), files);
        }
        let question = questions.lock().unwrap().clone();
        assert_eq!(question.len(), 1, "{question:?}");
        assert!(
            question[0].starts_with("POST /api/v1/namespaces/ftvm-system/pods?") && question[0].contains("dryRun=All"),
            "{question:?}"
        );
    }
    // The control plane is upgraded.
    let (volumes, _) = asked(Setting::Auto, Duration::ZERO, &[without_the_volume, as_it_is]).await;
    assert_eq!(volumes.files().await.unwrap(), GuestFiles::Copied);
    assert_eq!(volumes.files().await.unwrap(), GuestFiles::Mounted);
}

#[tokio::test]
async fn what_tells_nothing_is_an_error_and_no_answer() {
    let unclear: [(Makes, &str); 5] = [
        (|_| refused(403, "Forbidden"), "not so"),
        (|_| refused(500, "InternalError"), "not so"),
        (|_| refused(409, "AlreadyExists"), "not so"),
        (another, "another pod"),
        (|_| None, "dry-run Pod"),
    ];
    for (answer, words) in unclear {
        let (volumes, _) = asked(Setting::Auto, NEVER_AGAIN, &[answer, as_it_is]).await;
        let error = volumes.files().await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains(words) && text.contains("imageVolumes"), "{text}");
        assert!(!error.is_conflict(), "a conflict is told to nobody: {text}");
        assert_eq!(volumes.files().await.unwrap(), GuestFiles::Mounted, "asked again");
        // What was true before is true until something else is said.
        let (volumes, questions) = asked(Setting::Auto, Duration::ZERO, &[without_the_volume, answer, as_it_is]).await;
        assert_eq!(volumes.files().await.unwrap(), GuestFiles::Copied);
        assert_eq!(volumes.files().await.unwrap(), GuestFiles::Copied);
        assert_eq!(volumes.files().await.unwrap(), GuestFiles::Mounted);
        assert_eq!(questions.lock().unwrap().len(), 3);
    }
}

/// Neither does each pod wait for a question of its own, nor is an answer that was known before asked for with each of them.
#[tokio::test]
async fn what_tells_nothing_is_gone_by_for_a_while() {
    let fails: Makes = |_| refused(403, "Forbidden");
    let (mut volumes, questions) = asked(Setting::Auto, Duration::ZERO, &[fails]).await;
    volumes.waits.unanswered = NEVER_AGAIN;
    for _ in 0..3 {
        let text = volumes.files().await.unwrap_err().to_string();
        assert!(text.contains("not so"), "{text}");
    }
    assert_eq!(questions.lock().unwrap().len(), 1);
    let (mut volumes, questions) = asked(Setting::Auto, Duration::ZERO, &[without_the_volume, fails]).await;
    volumes.waits.kept = NEVER_AGAIN;
    for _ in 0..4 {
        assert_eq!(volumes.files().await.unwrap(), GuestFiles::Copied);
    }
    assert_eq!(questions.lock().unwrap().len(), 2);
    assert!(WAITS.unanswered < WAITS.kept && WAITS.kept < WAITS.answered);
}

#[tokio::test]
async fn what_was_said_is_not_asked() {
    for (setting, files) in [
        (Setting::Always, GuestFiles::Mounted),
        (Setting::Never, GuestFiles::Copied),
    ] {
        let (volumes, questions) = asked(setting, Duration::ZERO, &[]).await;
        assert_eq!(volumes.files().await.unwrap(), files);
        assert!(questions.lock().unwrap().is_empty());
    }
}
