//! What a status means for somebody who waits. Pure.

use std::fmt;

use ftvm_crds::{AskedFor, FaultTolerantVMStatus, Outcome};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

use crate::status::{PROTECTED, READY};

/// What a status means for somebody who waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Look<T> {
    /// It is so.
    Found(T),
    /// It may become so.
    Yet(String),
    /// It won't.
    Never(String),
}

/// Nodes of a protected VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pair {
    pub(super) active: String,
    pub(super) standby: String,
}

impl fmt::Display for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "active on node {}, standby on node {}", self.active, self.standby)
    }
}

fn told(condition: &Condition) -> String {
    let Condition {
        type_,
        status,
        reason,
        message,
        ..
    } = condition;
    format!("{type_} is {status} ({reason}): {message}")
}

/// Does the guest run on one node, with a standby on another?
pub(super) fn protected(status: &FaultTolerantVMStatus) -> Look<Pair> {
    for kind in [PROTECTED, READY] {
        match status.condition(kind) {
            None => {
                return Look::Yet(
                    "the operator has not looked at the VM yet; if that lasts: does it run, and has it a leader?"
                        .to_owned(),
                );
            }
            Some(condition) if condition.status != "True" => return Look::Yet(told(condition)),
            Some(_) => {}
        }
    }
    match (&status.active, &status.standby) {
        (Some(active), Some(standby)) if active == standby => Look::Never(format!(
            "both seats are on node {active}, whose death would end the VM: that is a defect of the operator"
        )),
        (Some(active), Some(standby)) => Look::Found(Pair {
            active: active.clone(),
            standby: standby.clone(),
        }),
        _ => Look::Yet("Protected is True, and the status does not name two nodes".to_owned()),
    }
}

/// What was asked for, and where the VM was before.
pub(super) struct Asked<'a> {
    /// `failover` or `switchover`.
    pub(super) what: &'static str,
    /// Its text.
    pub(super) request: &'a str,
    pub(super) before: &'a Pair,
}

/// Was this done, and is the VM protected again with its active on another node?
fn moved(status: &FaultTolerantVMStatus, outcome: Option<&AskedFor>, asked: &Asked<'_>) -> Look<Pair> {
    let Asked { what, request, before } = asked;
    let Some(known) = outcome.filter(|known| known.request == *request) else {
        return Look::Yet(format!(
            "the operator has not taken up the {what} yet; if that lasts: does it run, and has it a leader?"
        ));
    };
    let why = known.why.as_deref().unwrap_or("no reason given");
    match known.outcome {
        Outcome::Pending => Look::Yet(format!("the {what} is pending ({why})")),
        Outcome::Refused => Look::Never(format!(
            "the {what} was refused ({why}): see the logs of the node-daemon and of the seats on node {}",
            before.active
        )),
        Outcome::Done if status.active.as_ref() == Some(&before.active) => Look::Yet(format!(
            "the {what} is told as done, and the active is still on node {}",
            before.active
        )),
        Outcome::Done => protected(status),
    }
}

/// Was this switchover done?
pub(super) fn switched_over(status: &FaultTolerantVMStatus, asked: &Asked<'_>) -> Look<Pair> {
    moved(status, status.switchover.as_ref(), asked)
}

/// Did the other seat take over because the active was lost? Also: how long no seat ran the guest, in microseconds.
pub(super) fn failed_over(status: &FaultTolerantVMStatus, asked: &Asked<'_>) -> Look<(Pair, u64)> {
    let after = match moved(status, status.failover.as_ref(), asked) {
        Look::Found(after) => after,
        Look::Yet(why) => return Look::Yet(why),
        Look::Never(why) => return Look::Never(why),
    };
    // A hand-over would leave no trace there, and the VM had no other failure: it was made for this.
    match &status.last_failover {
        Some(failover) if failover.node.as_ref() == Some(&after.active) => {
            Look::Found((after, failover.gap_microseconds))
        }
        _ => Look::Yet(format!(
            "the failover is told as done, and status.lastFailover does not say that node {} took over",
            after.active
        )),
    }
}

/// All that a status says, for somebody who has to find out why.
pub(super) fn story(status: &FaultTolerantVMStatus) -> Vec<String> {
    let node = |node: &Option<String>| node.clone().unwrap_or_else(|| "none".to_owned());
    let phase = status
        .phase
        .map_or_else(|| "none".to_owned(), |phase| format!("{phase:?}"));
    let head = format!(
        "last seen: phase {phase}, active on node {}, standby on node {}",
        node(&status.active),
        node(&status.standby)
    );
    std::iter::once(head)
        .chain(
            status
                .conditions
                .iter()
                .map(|condition| format!("  {}", told(condition))),
        )
        .collect()
}

#[cfg(test)]
mod tests {
    use ftvm_crds::Failover;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use k8s_openapi::jiff::Timestamp;

    use super::*;
    fn condition_of(kind: &str, status: &str, reason: &str) -> Condition {
        Condition {
            type_: kind.to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            message: format!("why {kind}"),
            last_transition_time: Time(Timestamp::UNIX_EPOCH),
            observed_generation: None,
        }
    }

    fn status(active: &str, standby: &str) -> FaultTolerantVMStatus {
        FaultTolerantVMStatus {
            active: Some(active.to_owned()),
            standby: Some(standby.to_owned()),
            last_failover: Some(Failover {
                time: Time(Timestamp::UNIX_EPOCH),
                reason: "the other seat was lost".to_owned(),
                seat: "seat".to_owned(),
                node: Some(active.to_owned()),
                gap_microseconds: 12_345,
            }),
            conditions: vec![
                condition_of(READY, "True", "GuestRuns"),
                condition_of(PROTECTED, "True", "StandbyFollows"),
            ],
            ..FaultTolerantVMStatus::default()
        }
    }

    fn pair(active: &str, standby: &str) -> Pair {
        Pair {
            active: active.to_owned(),
            standby: standby.to_owned(),
        }
    }

    fn yet<T: fmt::Debug>(look: Look<T>, words: &str) {
        assert!(
            matches!(&look, Look::Yet(why) if why.contains(words)),
            "{words}: {look:?}"
        );
    }

    fn never<T: fmt::Debug>(look: Look<T>, words: &str) {
        assert!(
            matches!(&look, Look::Never(why) if why.contains(words)),
            "{words}: {look:?}"
        );
    }

    #[test]
    fn protected_is_what_the_conditions_say_with_two_nodes() {
        assert_eq!(protected(&status("a", "b")), Look::Found(pair("a", "b")));
        yet(protected(&FaultTolerantVMStatus::default()), "has not looked at the VM");
        for (place, kind) in [READY, PROTECTED].into_iter().enumerate() {
            let mut waiting = status("a", "b");
            waiting.conditions[place] = condition_of(kind, "False", "ImagePullFailed");
            yet(
                protected(&waiting),
                &format!("{kind} is False (ImagePullFailed): why {kind}"),
            );
        }
        let mut alone = status("a", "b");
        alone.standby = None;
        yet(protected(&alone), "does not name two nodes");
        never(protected(&status("a", "a")), "both seats are on node a");
    }

    #[test]
    fn what_was_asked_for_is_done_when_this_one_is_and_the_active_moved() {
        let before = pair("a", "b");
        let (done, pending, refused) = (Outcome::Done, Outcome::Pending, Outcome::Refused);
        type Judge = fn(&FaultTolerantVMStatus, &Asked<'_>) -> Look<Pair>;
        let judges: [(&'static str, Judge); 2] = [
            ("switchover", switched_over),
            ("failover", |status, asked| match failed_over(status, asked) {
                Look::Found((after, 12_345)) => Look::Found(after),
                Look::Yet(why) => Look::Yet(why),
                Look::Found((_, gap)) => Look::Never(format!("gap {gap}")),
                Look::Never(why) => Look::Never(why),
            }),
        ];
        for (what, judge) in judges {
            let request = "this";
            let judge = |status: &FaultTolerantVMStatus| {
                judge(
                    status,
                    &Asked {
                        what,
                        request,
                        before: &before,
                    },
                )
            };
            let asked = |active: &str, standby: &str, request: &str, outcome| {
                let asked = Some(AskedFor {
                    request: request.to_owned(),
                    outcome,
                    why: Some("because".to_owned()),
                    told: None,
                });
                let (switchover, failover) = if what == "switchover" {
                    (asked, None)
                } else {
                    (None, asked)
                };
                FaultTolerantVMStatus {
                    switchover,
                    failover,
                    ..status(active, standby)
                }
            };
            assert_eq!(judge(&asked("b", "a", "this", done)), Look::Found(pair("b", "a")));
            yet(judge(&status("b", "a")), &format!("has not taken up the {what}"));
            yet(judge(&asked("b", "a", "another", done)), "has not taken up");
            yet(judge(&asked("b", "a", "this", pending)), "pending (because)");
            yet(judge(&asked("a", "b", "this", done)), "still on node a");
            never(
                judge(&asked("b", "a", "this", refused)),
                &format!("the {what} was refused (because)"),
            );
            let mut alone = asked("b", "a", "this", done);
            alone.conditions[1] = condition_of(PROTECTED, "False", "Resyncing");
            yet(judge(&alone), "Protected is False (Resyncing)");
        }
    }

    /// The other's outcome, or a hand-over that leaves no trace of a failure, is no failover.
    #[test]
    fn a_failover_is_told_by_who_took_over() {
        let before = pair("a", "b");
        let asked = Asked {
            what: "failover",
            request: "this",
            before: &before,
        };
        let done = Some(AskedFor {
            request: "this".to_owned(),
            outcome: Outcome::Done,
            why: None,
            told: None,
        });
        let mut handed_over = status("b", "a");
        handed_over.switchover = done.clone();
        yet(failed_over(&handed_over, &asked), "has not taken up");
        handed_over.failover = done;
        handed_over.last_failover = None;
        yet(
            failed_over(&handed_over, &asked),
            "status.lastFailover does not say that node b took over",
        );
    }

    #[test]
    fn a_failure_tells_every_condition() {
        let told = story(&status("a", "b"));
        assert_eq!(told[0], "last seen: phase none, active on node a, standby on node b");
        assert_eq!(
            told[1..],
            [
                "  Ready is True (GuestRuns): why Ready",
                "  Protected is True (StandbyFollows): why Protected"
            ]
        );
    }
}
