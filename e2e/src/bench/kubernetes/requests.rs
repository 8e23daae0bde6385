//! Who asked the API server for what, counted from its audit log. Watches, which stay open, are no requests here.
use std::collections::BTreeMap;

use serde::Serialize;

use crate::cluster::AuditEvent;

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Who {
    Operator,
    /// The operator's replicas, for the Lease that says who leads: as often with no VM as with many.
    Election,
    Daemons,
    Kubelets,
    Others,
}

/// Requests of a window.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Requests {
    /// `get` and `list` of the operator, its election left out.
    pub operator_reads: u64,
    /// Everything of the operator that writes, its election left out, events included.
    pub operator_writes: u64,
    /// Writes of node-daemons.
    pub daemon_writes: u64,
    /// Writes of the operator's election.
    pub election_writes: u64,
    /// Writes of kubelets.
    pub kubelet_writes: u64,
    /// Writes of everybody else.
    pub other_writes: u64,
    /// What operator and daemons wrote, by verb and kind.
    pub written: BTreeMap<String, u64>,
}

impl Requests {
    /// Counts what was written down.
    pub fn count(events: &[AuditEvent]) -> Self {
        let mut counted = Self::default();
        for event in events.iter().filter(|event| event.stage == "ResponseComplete") {
            let reads = ["get", "list"].contains(&event.verb.as_str());
            if event.verb == "watch" {
                continue;
            }
            let who = who(event);
            let counter = match (who, reads) {
                (Who::Operator, true) => &mut counted.operator_reads,
                (_, true) => continue,
                (Who::Operator, false) => &mut counted.operator_writes,
                (Who::Daemons, false) => &mut counted.daemon_writes,
                (Who::Election, false) => &mut counted.election_writes,
                (Who::Kubelets, false) => &mut counted.kubelet_writes,
                (Who::Others, false) => &mut counted.other_writes,
            };
            *counter += 1;
            if !reads && matches!(who, Who::Operator | Who::Daemons) {
                *counted.written.entry(words(event)).or_default() += 1;
            }
        }
        counted
    }
}

fn who(event: &AuditEvent) -> Who {
    let user = event.user.username.as_str();
    let object = event.object_ref.as_ref();
    let leads =
        object.is_some_and(|object| object.name.as_deref() == Some("ftvm-operator") && object.resource == "leases");
    if event.user_agent.starts_with("ftvm-operator") {
        return if leads { Who::Election } else { Who::Operator };
    }
    match user {
        daemon if daemon.ends_with(":ftvm-node-daemon") => Who::Daemons,
        kubelet if kubelet.starts_with("system:node:") => Who::Kubelets,
        _ => Who::Others,
    }
}

fn words(event: &AuditEvent) -> String {
    let object = event.object_ref.as_ref();
    let kind = object.map_or("", |object| object.resource.as_str());
    let part = object.and_then(|object| object.subresource.as_deref());
    let part = part.map_or_else(String::new, |part| format!("/{part}"));
    format!("{} {kind}{part}", event.verb)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn event(verb: &str, agent: &str, user: &str, resource: &str, name: &str) -> AuditEvent {
        let stage = if verb == "watch" {
            "ResponseStarted"
        } else {
            "ResponseComplete"
        };
        let object = json!({"resource": resource, "name": name});
        let event =
            json!({"stage": stage, "verb": verb, "userAgent": agent, "user": {"username": user}, "objectRef": object});
        serde_json::from_value(event).unwrap()
    }

    #[test]
    fn writes_are_told_by_who_made_them() {
        let (operator, daemon) = (
            "ftvm-operator/0.1.0",
            "system:serviceaccount:ftvm-system:ftvm-node-daemon",
        );
        let events = [
            event("get", operator, "x", "pods", "web-1"),
            event("update", operator, "x", "faulttolerantvms", "web"),
            event("watch", operator, "x", "pods", ""),
            event("patch", operator, "x", "leases", "ftvm-operator"),
            event("update", operator, "x", "leases", "web"),
            event("patch", "", daemon, "pods", "web-1"),
            event("get", "", daemon, "leases", "web"),
            event("update", "kubelet/1.37", "system:node:n1", "leases", "n1"),
            event("create", "kubectl", "admin", "pods", "x"),
        ];
        let counted = Requests::count(&events);
        let written = ["patch pods", "update faulttolerantvms", "update leases"].map(|words| (words.to_owned(), 1));
        let expected = Requests {
            operator_reads: 1,
            operator_writes: 2,
            daemon_writes: 1,
            election_writes: 1,
            kubelet_writes: 1,
            other_writes: 1,
            written: written.into(),
        };
        assert_eq!(counted, expected);
    }
}
