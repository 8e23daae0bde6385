//! How often pods ask the API server, and how often their containers were started again. What is judged is what the proxy counted and what
//! kubelets tell; who looks brings it.
use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;

use super::api_proxy::{Asker, Deeds};

/// Requests a second, watches among them, of each asker whose user is one of those, between two looks. Nobody may ask `most_per_s` times.
///
/// # Errors
/// Who asked too often; or that none of them asked, so that nothing was judged.
pub fn judge(
    before: &Deeds,
    after: &Deeds,
    time: Duration,
    (whom, most_per_s): (impl Fn(&str) -> bool, f64),
) -> anyhow::Result<Vec<(Asker, f64)>> {
    let mut rates = Vec::new();
    for (asker, count) in after.requests.iter().filter(|(asker, _)| whom(&asker.user)) {
        let earlier = before.requests.get(asker).copied().unwrap_or_default();
        let per_s = (count - earlier) as f64 / time.as_secs_f64();
        ensure!(per_s < most_per_s, "{asker:?} asked {per_s:.1} times a second");
        rates.push((asker.clone(), per_s));
    }
    ensure!(
        rates.iter().any(|(_, per_s)| *per_s > 0.0),
        "none of those asked who should be judged by how often they ask: {:?}",
        after.requests.keys()
    );
    Ok(rates)
}

/// Restarts of the containers of each pod of a list, by the pod's UID; without those on a node that died, which all begin anew with it, and
/// without those that have no node yet.
///
/// # Errors
/// If a pod lacks what every pod on a node has.
pub fn restarts(pods: &Value, dead: Option<&str>) -> anyhow::Result<BTreeMap<String, u64>> {
    let pods = pods["items"].as_array().context("no pods")?.iter();
    let lives = |pod: &&Value| pod["spec"]["nodeName"].as_str().is_some_and(|node| Some(node) != dead);
    let count = |pod: &Value| {
        let uid = pod["metadata"]["uid"].as_str().context("a pod without UID")?.to_owned();
        let statuses = pod["status"]["containerStatuses"].as_array();
        let counts = statuses.context("a pod without containers")?.iter();
        Ok((uid, counts.filter_map(|one| one["restartCount"].as_u64()).sum()))
    };
    pods.filter(lives).map(count).collect()
}

/// No container was started again between two looks; a pod that is new may not have been either.
///
/// # Errors
/// Which pod's was; or that there is none, so that nothing was judged.
pub fn judge_restarts(before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>) -> anyhow::Result<()> {
    ensure!(!after.is_empty(), "no pod is left to be judged by its restarts");
    for (pod, count) in after {
        let earlier = before.get(pod).copied().unwrap_or_default();
        ensure!(
            *count == earlier,
            "pod {pod} restarted: {earlier} times before, {count} now"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const DAEMON: &str = "system:serviceaccount:ftvm-system:ftvm-node-daemon";
    const OPERATOR: &str = "system:serviceaccount:ftvm-system:ftvm-operator";

    fn asker(user: &str, pod: &str) -> Asker {
        Asker {
            user: user.to_owned(),
            node: Some("n1".to_owned()),
            pod: Some(pod.to_owned()),
        }
    }

    fn deeds(requests: &[(Asker, u64)]) -> Deeds {
        Deeds {
            requests: requests.iter().cloned().collect(),
            ..Deeds::default()
        }
    }

    #[test]
    fn who_asks_too_often_is_found() {
        let (one, other, operator) = (asker(DAEMON, "a"), asker(DAEMON, "b"), asker(OPERATOR, "o"));
        let before = deeds(&[(one.clone(), 1_000), (operator.clone(), 5)]);
        let judged = |after: &[(Asker, u64)]| {
            let whom = |user: &str| user == DAEMON;
            judge(&before, &deeds(after), Duration::from_secs(10), (whom, 20.0))
        };
        // What was asked before does not count; another user is judged apart.
        let fine = judged(&[(one.clone(), 1_199), (other.clone(), 50), (operator.clone(), 9_999)]).unwrap();
        assert_eq!(fine, [(one.clone(), 19.9), (other.clone(), 5.0)]);
        for (after, hot) in [
            ([(one.clone(), 1_200), (other.clone(), 50)], "\"a\""),
            // One that was not there before has asked all that it asked since.
            ([(one.clone(), 1_001), (other, 200)], "\"b\""),
        ] {
            let found = judged(&after).unwrap_err().to_string();
            assert!(
                found.contains(hot) && found.ends_with("asked 20.0 times a second"),
                "{found}"
            );
        }
        // Nobody is judged who is called otherwise or was not heard of: that is not the same as nobody who asks too often.
        for silent in [&[(operator, 9)][..], &[(one, 1_000)], &[]] {
            let found = judged(silent).unwrap_err().to_string();
            assert!(found.starts_with("none of those asked"), "{found}");
        }
    }

    fn pod(uid: &str, node: &str, counts: &[u64]) -> Value {
        let statuses: Vec<Value> = counts
            .iter()
            .map(|count| json!({"name": "main", "ready": true, "restartCount": count, "state": {"running": {}}}))
            .collect();
        json!({
            "metadata": {"uid": uid, "name": "ftvm-node-daemon-x"}, "spec": {"nodeName": node},
            "status": {"phase": "Running", "containerStatuses": statuses},
        })
    }

    fn counted(pods: &[Value], dead: Option<&str>) -> BTreeMap<String, u64> {
        restarts(&json!({"kind": "List", "items": pods}), dead).unwrap()
    }

    #[test]
    fn a_container_that_was_started_again_is_found() {
        let pods = |first: &[u64], second: u64| [pod("u1", "n1", first), pod("u2", "n2", &[second])];
        let before = counted(&pods(&[1, 0], 3), None);
        assert_eq!(before, BTreeMap::from([("u1".to_owned(), 1), ("u2".to_owned(), 3)]));
        judge_restarts(&before, &before).unwrap();
        let found = |after: &BTreeMap<String, u64>| judge_restarts(&before, after).unwrap_err().to_string();
        assert_eq!(
            found(&counted(&pods(&[1, 1], 3), None)),
            "pod u1 restarted: 1 times before, 2 now"
        );
        let again = pods(&[1, 0], 4);
        assert_eq!(found(&counted(&again, None)), "pod u2 restarted: 3 times before, 4 now");
        // Its node died.
        judge_restarts(&before, &counted(&again, Some("n2"))).unwrap();
        assert!(found(&counted(&again, Some("n1"))).starts_with("pod u2"));
        // A new pod in the place of another may not begin twice.
        judge_restarts(&before, &counted(&[pod("u3", "n2", &[0])], None)).unwrap();
        assert_eq!(
            found(&counted(&[pod("u3", "n2", &[1])], None)),
            "pod u3 restarted: 0 times before, 1 now"
        );
        assert!(found(&counted(&again[..1], Some("n1"))).starts_with("no pod is left"));
    }

    #[test]
    fn pods_that_tell_nothing_are_no_pods_without_restarts() {
        let mut waits = pod("u1", "n1", &[]);
        waits["spec"] = json!({});
        waits["status"] = json!({"phase": "Pending"});
        assert_eq!(counted(std::slice::from_ref(&waits), None), BTreeMap::new());
        assert_eq!(counted(std::slice::from_ref(&waits), Some("n1")), BTreeMap::new());
        waits["spec"] = json!({"nodeName": "n1"});
        let told = restarts(&json!({"items": [waits]}), None).unwrap_err().to_string();
        assert_eq!(told, "a pod without containers");
        assert!(restarts(&json!({"kind": "Status", "code": 403}), None).is_err());
    }
}
