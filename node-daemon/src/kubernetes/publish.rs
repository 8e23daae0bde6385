//! What a seat's pod says of its seat: annotation and label, written on change, progress at most every two seconds, interval and
//! lag alone every 20 minutes. And written again where somebody changed it, or a backup took it back ([`super::echo`]).

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ftvm_crds::names::{ANNOTATION_SEAT_STATUS, LABEL_ROLE, ROLE_ACTIVE, ROLE_STANDBY};
use ftvm_crds::seat::{self, SeatExit, SeatPublished, SeatRole, StorageTrouble, Takeover};
use ftvm_engine::control::{Event, Role, exit_code};
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::echo::{Echo, difference};
use super::node::NodeSeat;
use super::pace::Pace;
use super::request::Told;
use super::storage;
use crate::api::SeatStatus;
use crate::config::AbsentSeat;
use crate::random;
use crate::seat_socket::DiskProgress;

/// An engine answers a status within this time.
const STATUS_PATIENCE: Duration = Duration::from_millis(500);
/// Progress alone is written no more often.
const PROGRESS: Duration = Duration::from_secs(2);
/// Interval and lag alone are written no more often: they always change.
const REFRESH: Duration = Duration::from_secs(20 * 60);
/// Pauses after failed writes.
const PAUSE_MIN: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// Longest reason that is published.
const WHY_CHARS_MAX: usize = 500;

struct State {
    /// What was found in the pod, or none as long as the pod was not seen.
    written: Option<SeatPublished>,
    written_at: Option<Instant>,
    /// What was sent last without an answer that says that it was written: it may be yet.
    sent: Option<SeatPublished>,
    /// Whether the pod still says what was written.
    echo: Echo,
    /// What the operator drew at its first look, as it was seen last.
    look: Option<String>,
    last_takeover: Option<Takeover>,
    last_exit: Option<SeatExit>,
    /// What did not work of its storage at the last look.
    storage: Vec<StorageTrouble>,
    /// How often storage ended engines before, by what an earlier daemon published, until the seat knows.
    storage_failures: u32,
    failures: u32,
    next: Option<Instant>,
    pace: Pace,
}

/// Keeps in mind what was published of one seat.
pub struct Publisher(Mutex<State>);

impl Publisher {
    /// What an earlier daemon published is gone on with.
    pub fn new(pod: Option<&Pod>) -> Publisher {
        let publisher = Publisher(Mutex::new(State {
            written: None,
            written_at: None,
            sent: None,
            echo: Echo::default(),
            look: None,
            last_takeover: None,
            last_exit: None,
            storage: Vec::new(),
            storage_failures: 0,
            failures: 0,
            next: None,
            pace: Pace::default(),
        }));
        if let Some(pod) = pod {
            publisher.noticed(pod);
        }
        publisher
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pod as the watch has it. The first time that it is seen, it says what was published before; later, whether that is still there.
    pub fn noticed(&self, pod: &Pod) {
        let (mut state, nothing) = (self.lock(), BTreeMap::new());
        let annotations = pod.metadata.annotations.as_ref().unwrap_or(&nothing);
        // One that an old state of the pod lacks was drawn all the same.
        if let Some(look) = seat::look(annotations) {
            state.look = Some(look.clone());
        }
        let version = version(pod.metadata.resource_version.as_deref());
        if !state.echo.is_news(version) {
            return;
        }
        let (found, now) = (SeatPublished::of(annotations), Instant::now());
        if state.sent.is_some() && state.sent.as_ref() == found.as_ref().ok() {
            // An own write that was not answered in time.
            state.written = state.sent.take();
        }
        let what = match &state.written {
            Some(written) => {
                let labels = pod.metadata.labels.as_ref();
                let label = labels.and_then(|labels| labels.get(LABEL_ROLE)).map(String::as_str);
                difference((written, role_label(written)), (&found, label))
            }
            None => {
                // What can't be read is written over.
                let found = found.unwrap_or_default();
                state.last_takeover = state.last_takeover.take().or_else(|| found.last_takeover.clone());
                state.last_exit = state.last_exit.take().or_else(|| found.last_exit.clone());
                if state.storage.is_empty() {
                    state.storage.clone_from(&found.storage_troubles);
                }
                state.storage_failures = found.storage_failures;
                state.written = Some(found);
                None
            }
        };
        state.echo.saw(version, what, now);
    }

    /// The patch that is due, and what it publishes.
    pub fn due(&self, seat: &NodeSeat) -> Option<(Value, SeatPublished)> {
        let earlier = std::mem::take(&mut self.lock().storage_failures);
        seat.pod.seat.had_storage_failures(earlier);
        let status = seat.pod.seat.status(STATUS_PATIENCE);
        let mut state = self.lock();
        let told = seat.requests.told();
        let over = told.over.clone();
        let now = self.outlook(&mut state, seat, &status, told);
        let written = state.written.as_ref()?;
        if written.over {
            seat.pod.said_over();
        }
        let instant = Instant::now();
        let waits = state.next.is_some_and(|next| instant < next);
        let changed = state.echo.due(instant);
        // Known for the first time, or old.
        let old = (written.interval_ms.is_none() && now.interval_ms.is_some())
            || (state.written_at.is_some_and(|at| at.elapsed() >= REFRESH) && *written != now);
        let is_same = same(written, &now);
        if waits || (is_same && !old && over.is_none() && changed.is_none()) {
            return None;
        }
        let only_progress = same(
            &SeatPublished {
                resync_percent: now.resync_percent,
                ..written.clone()
            },
            &now,
        );
        if only_progress
            && over.is_none()
            && changed.is_none()
            && state.written_at.is_some_and(|at| at.elapsed() < PROGRESS)
        {
            return None;
        }
        if let Some(what) = changed.filter(|_| is_same) {
            tracing::warn!(
                seat = seat.known().config.label(),
                "its pod does not say what was written there ({what}): somebody changed it, or the cluster was restored from a backup; it is written again"
            );
        }
        let text = serde_json::to_string(&now).ok()?;
        let mut patch = json!({
            "metadata": {
                // Another pod of this name is not this seat.
                "uid": seat.known().seat_id.to_string(),
                "annotations": {ANNOTATION_SEAT_STATUS: text},
                "labels": {LABEL_ROLE: role_label(&now)},
            },
        });
        if let Some(version) = over {
            // Of a pod that asks for what is said to be begun: it may have been taken back since.
            patch["metadata"]["resourceVersion"] = version.into();
        }
        Some((patch, now))
    }

    /// It was written, which gave the pod this version.
    pub fn written(&self, published: SeatPublished, version: Option<u64>) {
        let (mut state, now) = (self.lock(), Instant::now());
        state.echo.wrote(version, now);
        state.written = Some(published);
        state.written_at = Some(now);
        state.failures = 0;
        state.next = None;
    }

    /// It was not, as far as is known: tried again after a pause that grows, and differs from daemon to daemon.
    pub fn failed(&self, published: SeatPublished) {
        let mut state = self.lock();
        let pause = PAUSE_MIN.saturating_mul(1 << state.failures.min(10)).min(PAUSE_MAX);
        let part = (random::nonzero_u64() % 1000) as f64 / 1000.0;
        state.failures += 1;
        state.next = Some(Instant::now() + pause.mul_f64(0.5 + part / 2.0));
        state.sent = Some(published);
    }

    fn outlook(&self, state: &mut State, seat: &NodeSeat, status: &SeatStatus, told: Told) -> SeatPublished {
        // Before anything else: it stays true.
        let over = seat.pod.is_over();
        note_exit(state, status);
        note_takeover(state, status);
        state.storage = storage::troubles(&state.storage, status, &seat.known().config.disks, unix_ms());
        match &status.engine {
            Some(engine) if engine.role == Role::Active => state.pace.look(&engine.counters, Instant::now()),
            _ => state.pace.forget(),
        }
        let incarnation = seat.pod.seat.incarnation();
        // What is said of an engine that does not answer, or may be there, is no answer to anybody.
        let is_known = status.engine.is_some() || (incarnation.is_none() && !seat.pod.seat.has_engine());
        let repeated = || state.written.as_ref().and_then(|written| written.look.clone());
        let look = if is_known { state.look.clone() } else { repeated() };
        let progress = seat.pod.progress();
        // A disk that can't be prepared is no progress: whoever waits for this seat waits in vain.
        let preparing = progress.disk.as_ref().filter(|_| progress.trouble.is_none());
        let mut published = SeatPublished {
            incarnation,
            why: clip(&status.why),
            code: status.code,
            resync_percent: preparing.map(DiskProgress::percent),
            storage_troubles: state.storage.clone(),
            storage_failures: status.storage_failures,
            last_takeover: state.last_takeover.clone(),
            last_exit: state.last_exit.clone(),
            done_request: told.done,
            begun: told.begun,
            over,
            machine: seat.machine.clone(),
            look,
            arbiter_reachable: true,
            interval_ms: state.pace.interval_ms,
            lag_ms: state.pace.lag_ms,
            ..SeatPublished::default()
        };
        if let Some(engine) = &status.engine {
            published.role = Some(role(engine.role));
            published.protected = engine.protected;
            published.paused = engine.paused;
            published.holds_guest = engine.holds_guest;
            published.term = engine.term;
            published.why = clip(&with_name(&engine.why, &seat.known().config.link.absent));
            published.code = engine.code;
            published.peer_connected = engine.peer.as_ref().is_some_and(|peer| peer.connected);
            published.arbiter_reachable = engine.arbiter_reachable;
            published.lease_uid = engine.arbiter_uid;
            published.vouches.clone_from(&engine.vouches);
            published.resync_percent = engine.resync_percent;
            if let Some(why) = progress.cut_off {
                published.why = clip(&format!("{why}; {}", engine.why));
                published.code = exit_code::NETWORK;
            }
        } else if incarnation.is_some() {
            // It runs and does not answer now: what it was, it may still be.
            if let Some(written) = &state.written {
                published.role = written.role;
                published.paused = written.paused;
                published.holds_guest = written.holds_guest;
                published.term = written.term;
                published.lease_uid = written.lease_uid;
            }
            "the engine does not answer".clone_into(&mut published.why);
        } else if let Some(refusal) = seat.refusal().filter(|refusal| refusal.code != 0) {
            (published.why, published.code) = (clip(&refusal.why), refusal.code);
        } else if let Some(trouble) = progress.trouble {
            (published.why, published.code) = (clip(&trouble), exit_code::DISK);
        } else if let Some(disk) = &progress.disk {
            published.why = clip(&disk.to_string());
        } else if !progress.connected {
            "its program is not connected to the node daemon".clone_into(&mut published.why);
        }
        published
    }
}

/// The label that belongs to it.
fn role_label(published: &SeatPublished) -> Option<&'static str> {
    match published.role {
        Some(SeatRole::Active) => Some(ROLE_ACTIVE),
        Some(SeatRole::Standby) => Some(ROLE_STANDBY),
        _ => None,
    }
}

/// resourceVersion as a number, which grows (Kubernetes API concepts, "Resource versions"); none: nothing is known of its order.
pub(super) fn version(text: Option<&str>) -> Option<u64> {
    text?.parse().ok()
}

/// Whether nothing differs that is worth a write.
fn same(one: &SeatPublished, other: &SeatPublished) -> bool {
    let worth = |published: &SeatPublished| SeatPublished {
        interval_ms: None,
        lag_ms: None,
        ..published.clone()
    };
    worth(one) == worth(other)
}

/// Of whatever an engine says, so much that all of it can be read, and nothing that would change how a terminal shows it.
pub(super) fn clip(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(WHY_CHARS_MAX).collect()
}

/// An engine knows seats that can't be dialled by their ids alone, and people by their names.
fn with_name(why: &str, absent: &[AbsentSeat]) -> String {
    let meant = absent.iter().find(|absent| why.contains(&absent.seat_id.to_string()));
    match meant {
        Some(AbsentSeat { seat, .. }) => format!(
            "{why}. That is seat {seat}, which can't be asked now: see to it that pod {seat} starts, or is gone if it is being deleted"
        ),
        None => why.to_owned(),
    }
}

/// Now, in milliseconds since 1970.
pub(super) fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

fn note_exit(state: &mut State, status: &SeatStatus) {
    let Some(exit) = &status.last_exit else { return };
    if state
        .last_exit
        .as_ref()
        .is_some_and(|known| known.incarnation == exit.incarnation)
    {
        return;
    }
    state.last_exit = Some(SeatExit {
        incarnation: exit.incarnation,
        code: exit.code,
        message: clip(&exit.message),
        unix_ms: unix_ms(),
    });
}

/// A takeover from a leader that was lost. A boot and a planned switchover are none: their engines measure no takeover.
fn note_takeover(state: &mut State, status: &SeatStatus) {
    let Some(engine) = &status.engine else { return };
    let microseconds = engine.counters.get("takeover_us").and_then(Value::as_u64);
    let by = engine.counters.get("takeover_noticed_by").and_then(Value::as_str);
    let last = status.events.iter().rev().find_map(|timed| match &timed.event {
        Event::Role { role: Role::Active, .. } => Some(timed.unix_ms),
        _ => None,
    });
    if let (Some(unix_ms), Some(microseconds), Some(by)) = (last, microseconds, by) {
        state.last_takeover = Some(Takeover {
            unix_ms,
            reason: clip(&format!("the other seat was lost, as {by} showed")),
            microseconds,
        });
    }
}

fn role(role: Role) -> SeatRole {
    match role {
        Role::Starting => SeatRole::Starting,
        Role::Joining => SeatRole::Joining,
        Role::Standby => SeatRole::Standby,
        Role::Active => SeatRole::Active,
        Role::Frozen => SeatRole::Frozen,
        Role::Ended => SeatRole::Ended,
    }
}

#[cfg(test)]
mod tests {
    use ftvm_protocol::core::Refusal;
    use ftvm_protocol::identity::SeatId;

    use super::*;

    #[test]
    fn a_seat_that_cant_be_asked_yet_is_told_by_its_name() {
        let absent = [AbsentSeat {
            seat: "web-b".to_owned(),
            seat_id: SeatId(0xb),
        }];
        let told = with_name(&Refusal::OtherHeaderUnreadable(SeatId(0xb)).to_string(), &absent);
        assert!(
            told.contains("accept-data-loss") && told.contains("pod web-b starts"),
            "{told}"
        );
        let other = Refusal::OtherHeaderUnreadable(SeatId(0xc)).to_string();
        assert_eq!(with_name(&other, &absent), other);
    }
}
