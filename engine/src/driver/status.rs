//! What the driver tells: status, events, figures.

use std::collections::BTreeMap;
use std::time::Duration;

use ftvm_protocol::core::{AcceptedLoss as CoreLoss, ArbiterState, RoleName, Status as CoreStatus};
use ftvm_protocol::identity::{Epoch, SessionId};
use serde_json::{Map, Value, json};

use super::figures::is_figure;
use super::{Driver, Guest, hold};
use crate::checkpoint::Histogram;
use crate::control::{
    AcceptedLoss, Digest, Event, FailingDisk, FailingStorage, PeerStatus, Role, StandbyStatus, Status, StorageKind,
    StoragePart,
};
use crate::devices::event::DeviceEvent;
use crate::devices::set::DeviceCounts;
use crate::pause::clock::{PauseClock, SlowestPauses};
use crate::replication::epoch::EpochStats;
use crate::replication::pages::PageStats;
use crate::replication::resync::ResyncStats;

/// Everything that is counted or measured since the engine started.
#[derive(Debug, Default)]
pub struct Figures {
    /// How long the guest stood still for each epoch.
    pub pause: Histogram,
    /// The longest of these of late, and what took the time.
    pub slowest: SlowestPauses,
    /// From the seal of an epoch to its acknowledgment.
    pub acknowledged: Histogram,
    /// Epochs sealed.
    pub epochs: u64,
    /// Pages copied inside pauses.
    pub residue_pages: u64,
    /// Rounds sent before seals.
    pub rounds: u64,
    /// Pages by kind.
    pub pages: PageStats,
    /// Payload bytes of epochs.
    pub epoch_bytes: u64,
    /// What the delta cache takes, in bytes.
    pub cache_bytes: usize,
    /// What the last resync took that this seat led; the join checkpoint comes after it.
    pub resync: ResyncStats,
    /// Time that the guest was held back because it outran the link.
    pub braked: Duration,
    /// Time that it stood still for want of a standby, up to the last time that it went on.
    pub unprotected: Duration,
    /// The longest that a request of a disk was seen to be under way.
    pub slowest_request: Duration,
    /// As a follower: the digest that the leader asked for last.
    pub digest: Option<Digest>,
}

/// What is counted elsewhere, as it is at one time.
#[derive(Debug, Default)]
struct Now {
    devices: DeviceCounts,
    link_sent_bytes: u64,
    /// Time that the guest stood still for want of a standby.
    paused: Duration,
    output_dropped: u64,
    nic_mtus: Vec<u16>,
    /// By card and reason.
    nic_refused: Value,
    input_frames: u64,
    guest_running: bool,
}

/// What did not work on the way to protection, for as long as that is the reason that there is none.
#[derive(Debug, Default)]
pub struct Troubles {
    /// Why there is no link, with its exit code, if a person has to mend it.
    pub link: Option<(u8, String)>,
    /// Why the last session failed.
    pub session: Option<String>,
    /// The session of which its follower has said so.
    pub told: Option<SessionId>,
    /// What the follower of a session says of itself while that goes on.
    pub said: Option<(SessionId, String)>,
    /// As a joiner: its exit code, if a person has to mend it.
    pub session_code: Option<u8>,
    /// Why the arbiter did not do what it was asked last.
    pub arbiter: Option<String>,
    /// Why the last connection was refused.
    pub connection: Option<String>,
}

impl Troubles {
    /// A link is up: what was wrong with connections is so no more.
    pub fn link_up(&mut self) {
        self.link = None;
        self.connection = None;
    }

    /// A resync begins, or there is protection: what failed before is over.
    pub fn session_works(&mut self) {
        self.session = None;
        self.session_code = None;
        self.told = None;
    }

    /// The follower's words, why it can't go on.
    pub fn follower_said(&mut self, session: SessionId, why: String) {
        self.said = Some((session, why.clone()));
        self.session = Some(why);
        self.told = Some(session);
    }

    /// It can go on after all.
    pub fn follower_goes_on(&mut self, session: SessionId) {
        self.said = None;
        if self.told.take_if(|told| *told == session).is_some() {
            self.session = None;
        }
    }

    /// A session that this seat led is over. What its follower said is the reason, also where it could be one for as long as the pair was
    /// whole.
    pub fn session_over(&mut self, session: SessionId) {
        if let Some((of, why)) = self.said.take()
            && of == session
        {
            self.session = Some(why);
            self.told = Some(session);
        }
    }

    /// What a session that this seat led came to. That the link is down is no reason beside the follower's own.
    pub fn session_failed(&mut self, session: SessionId, why: String) {
        if self.told != Some(session) {
            self.session = Some(why);
        }
    }

    /// The first of them, before what the core says.
    fn first(&self) -> Option<&str> {
        let link = self.link.as_ref().map(|(_, text)| text);
        link.or(self.session.as_ref())
            .or(self.arbiter.as_ref())
            .map(String::as_str)
    }
}

impl Figures {
    /// An epoch was sealed.
    pub fn sealed(&mut self, epoch: Epoch, clock: &PauseClock, residue_pages: usize, rounds: u32) {
        self.pause.add(clock.total());
        self.slowest.add(epoch, residue_pages, clock);
        self.epochs += 1;
        self.residue_pages += residue_pages as u64;
        self.rounds += u64::from(rounds);
    }

    /// An epoch was queued whole.
    pub fn sent(&mut self, stats: &EpochStats) {
        self.pages.add(&stats.pages);
        self.epoch_bytes += stats.payload_bytes;
    }

    /// All of it, with what others count now.
    fn told(&self, now: &Now) -> Map<String, Value> {
        let DeviceCounts { nics, disks } = &now.devices;
        let us = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let counters = json!({
            "pause_us_p50": self.pause.quantile_us(0.5),
            "pause_us_p99": self.pause.quantile_us(0.99),
            "pause_us_max": us(self.pause.max()),
            "pause_us_total": us(self.pause.sum()),
            "pause_slowest": self.slowest.to_json(),
            "pause_us_buckets": self.pause.buckets_us(),
            "ack_us_p50": self.acknowledged.quantile_us(0.5),
            "ack_us_p99": self.acknowledged.quantile_us(0.99),
            "epochs": self.epochs,
            "residue_pages": self.residue_pages,
            "precopy_rounds": self.rounds,
            "pages_sent": self.pages.pages,
            "pages_zero": self.pages.zero,
            "pages_unchanged": self.pages.unchanged,
            "pages_raw": self.pages.raw,
            "delta_cache_bytes": self.cache_bytes,
            "resync_us": us(self.resync.time),
            "resync_copied_bytes": self.resync.copied_bytes(),
            "resync_disk_bytes": self.resync.disk_bytes,
            "resync_spared_bytes": self.resync.spared_bytes,
            "resync_passes": self.resync.passes,
            "resync_again_pages": self.resync.again_pages,
            "resync_sent_bytes": self.resync.payload_bytes,
            "epoch_sent_bytes": self.epoch_bytes,
            "link_sent_bytes": now.link_sent_bytes,
            "braked_us": us(self.braked),
            "paused_us": us(now.paused),
            "output_dropped": now.output_dropped,
            "nic_mtus": &now.nic_mtus,
            "nic_tx_dropped": nics.iter().map(|nic| nic.tx_dropped).sum::<u64>(),
            "nic_rx_dropped": nics.iter().map(|nic| nic.rx_dropped).sum::<u64>(),
            "nic_refused": &now.nic_refused,
            "input_frames": now.input_frames,
            "guest_running": now.guest_running,
        });
        let Value::Object(mut counters) = counters else {
            return Map::new();
        };
        let errors: u64 = disks.iter().map(|disk| disk.errors).sum();
        counters.insert("disk_errors".to_owned(), errors.into());
        counters.insert("disk_request_us_max".to_owned(), us(self.slowest_request).into());
        let held: u64 = disks.iter().map(|disk| disk.held).sum();
        counters.insert("disk_held".to_owned(), held.into());
        let held_ms_max = disks.iter().map(|disk| disk.held_ms_max).max().unwrap_or(0);
        counters.insert("disk_held_ms_max".to_owned(), held_ms_max.into());
        counters
    }
}

/// Disks that failed what the guest asked for, and have not worked since, with what they said.
#[derive(Debug)]
pub struct FailingDisks {
    failed: BTreeMap<usize, String>,
    /// The one whose request has been under way for too long.
    hanging: Option<usize>,
    /// How long that is.
    hangs_after: Duration,
}

impl FailingDisks {
    /// None yet. A request that is under way for longer hangs.
    pub fn new(hangs_after: Duration) -> Self {
        Self {
            failed: BTreeMap::new(),
            hanging: None,
            hangs_after,
        }
    }

    /// Takes what a device says of itself.
    pub fn noticed(&mut self, event: &DeviceEvent) {
        match event {
            DeviceEvent::DiskError { disk, message } => {
                self.failed.entry(*disk).or_insert_with(|| message.clone());
            }
            DeviceEvent::DiskRecovered { disk } => {
                self.failed.remove(disk);
            }
            DeviceEvent::Reset
            | DeviceEvent::PowerOff
            | DeviceEvent::NetError { .. }
            | DeviceEvent::NeedsReset { .. } => {}
        }
    }

    fn told(&self) -> Vec<FailingDisk> {
        let told = |(disk, why): (&usize, &String)| FailingDisk {
            disk: *disk,
            kind: StorageKind::Failed,
            why: why.clone(),
        };
        let hanging = self.hanging.filter(|disk| !self.failed.contains_key(disk));
        let hanging = hanging.map(|disk| FailingDisk {
            disk,
            kind: StorageKind::Hangs,
            why: hanging_text(self.hangs_after),
        });
        self.failed.iter().map(told).chain(hanging).collect()
    }

    /// The disk that hangs now, if one does. True: that is news.
    pub fn hangs(&mut self, disk: Option<usize>) -> bool {
        std::mem::replace(&mut self.hanging, disk) != disk
    }

    /// The first of them, in words.
    pub fn first(&self) -> Option<String> {
        let told = self.told().into_iter().next();
        told.map(|FailingDisk { disk, why, .. }| format!("disk {disk} fails ({why})"))
    }
}

/// What is said of a disk that hangs.
pub fn hanging_text(hangs_after: Duration) -> String {
    let seconds = hangs_after.as_secs_f64();
    format!("a request has been under way for more than {seconds} s")
}

/// What was told last, so that only changes are told.
#[derive(Debug, Default)]
pub struct Told {
    role: Option<RoleName>,
    protected: Option<bool>,
    arbiter: Option<ArbiterState>,
}

impl Told {
    /// A new daemon is told everything.
    pub fn forget(&mut self) {
        *self = Told::default();
    }
}

fn role_of(role: RoleName) -> Role {
    match role {
        RoleName::Starting => Role::Starting,
        RoleName::Joining => Role::Joining,
        RoleName::Standby => Role::Standby,
        RoleName::Active => Role::Active,
        RoleName::Frozen => Role::Frozen,
        RoleName::Ended => Role::Ended,
    }
}

impl Driver {
    /// Tells the daemon what changed in this step.
    pub(super) fn tell_changes(&mut self, status: &CoreStatus) {
        self.acknowledged(status.acked);
        if status.protected {
            self.troubles.session_works();
        }
        if self.told.role != Some(status.role) {
            self.told.role = Some(status.role);
            let why = self.why(status);
            tracing::info!("role {:?}, term {}: {why}", status.role, status.term);
            self.control.event(Event::Role {
                role: role_of(status.role),
                term: status.term,
                why,
            });
        }
        if self.told.protected != Some(status.protected) {
            self.told.protected = Some(status.protected);
            let why = self.why(status);
            self.control.event(Event::Protected {
                protected: status.protected,
                why,
            });
        }
        if self.told.arbiter != Some(status.arbiter) {
            self.told.arbiter = Some(status.arbiter);
            let reachable = matches!(status.arbiter, ArbiterState::Reachable);
            let why = format!("{:?}", status.arbiter);
            self.control.event(Event::Arbiter { reachable, why });
        }
    }

    pub(super) fn tell_guest(&self, what: &str) {
        tracing::info!("the guest {what}");
        self.control.event(Event::Guest { what: what.to_owned() });
    }

    pub(super) fn tell_link(&self, up: bool, why: String) {
        self.control.event(Event::Link { up, why });
    }

    pub(super) fn warn(&mut self, text: String) {
        tracing::warn!("{text}");
        self.control.event(Event::Warning { text });
    }

    fn why(&self, status: &CoreStatus) -> String {
        let why = match self.why_storage(status) {
            Some(storage) => format!("{storage}; {}", self.why_so(status)),
            None => self.why_so(status),
        };
        match self.guest {
            Guest::Held => format!("{}: {why}", hold::WHY),
            Guest::None | Guest::Running | Guest::Paused => why,
        }
    }

    fn why_so(&self, status: &CoreStatus) -> String {
        if let Some(failure) = &status.failure {
            return failure.clone();
        }
        if status.protected {
            return match status.peer {
                Some(peer) => format!("protected by {peer}"),
                None => "protected".to_owned(),
            };
        }
        if let Some(trouble) = self.troubles.first() {
            return trouble.to_owned();
        }
        if let Some(why) = self.why_leaving() {
            return why;
        }
        match (status.refused, &self.troubles.connection) {
            (Some(refusal), _) => refusal.to_string(),
            (None, Some(trouble)) => trouble.clone(),
            (None, None) => match status.role {
                RoleName::Active => "no standby has joined yet".to_owned(),
                RoleName::Starting => "waits for its turn to boot, or for an active seat to join".to_owned(),
                _ => String::new(),
            },
        }
    }

    /// Disks that fail the guest, and how.
    fn disks_that_fail(&self) -> Vec<FailingDisk> {
        let mut told = self.failing_disks.told();
        for failing in told.iter_mut().filter(|failing| failing.kind == StorageKind::Failed) {
            let kind = self.seat.failures.kind(StoragePart::Disk(failing.disk));
            failing.kind = kind.unwrap_or_default();
        }
        told
    }

    /// What has failed of this seat's storage, or hangs, whoever used it: for whoever reads how this engine ended.
    pub(super) fn failing_storage(&self) -> Vec<FailingStorage> {
        let mut told = self.seat.failures.told();
        for failing in self.disks_that_fail() {
            let part = StoragePart::Disk(failing.disk);
            match told.iter_mut().find(|failed| failed.part == part) {
                Some(failed) => failed.under_guest = true,
                None => told.push(FailingStorage {
                    part,
                    kind: failing.kind,
                    under_guest: true,
                    why: failing.why,
                }),
            }
        }
        told
    }

    /// The whole state, for the daemon.
    pub(super) fn status(&self) -> Status {
        let status = self.core.status();
        let (holder, members) = match (status.role, status.peer, status.protected) {
            (RoleName::Active, Some(peer), true) => (Some(status.incarnation), vec![status.incarnation, peer]),
            (RoleName::Active, _, _) => (Some(status.incarnation), vec![status.incarnation]),
            (RoleName::Standby, Some(peer), _) => (Some(peer), vec![peer, status.incarnation]),
            _ => (None, Vec::new()),
        };
        let peer = self.seat.peers.first().map(|peer| PeerStatus {
            seat: peer.seat.clone(),
            incarnation: status.peer,
            address: peer.address,
            connected: self.links.values().any(|link| link.peer.seat == peer.seat_id),
        });
        let standby = |contact_age_ms| StandbyStatus {
            contact_age_ms,
            unacknowledged_ms: status.unacknowledged_ms.unwrap_or_default(),
            not_ready: status.switchover.map(|refusal| refusal.to_string()),
        };
        let leads = status.role == RoleName::Active;
        Status {
            vm: self.seat.vm.clone(),
            seat: self.seat.seat.clone(),
            incarnation: status.incarnation,
            role: role_of(status.role),
            holds_guest: status.holds_guest,
            protected: status.protected,
            paused: self.guest == Guest::Held,
            leaving: self.leaving.is_some(),
            unsettled: Some(status.unsettled),
            why: self.why(&status),
            code: self.troubles.link.as_ref().map_or(0, |(code, _)| *code),
            term: status.term,
            holder,
            members,
            epoch: status.epoch,
            acknowledged: status.acked,
            peer,
            standby: status.contact_age_ms.filter(|_| leads).map(standby),
            arbiter_reachable: matches!(status.arbiter, ArbiterState::Reachable),
            arbiter_uid: status.uid,
            vouches: status.recreate.clone(),
            resync_percent: self.seat.resync_percent(),
            failing_disks: self.disks_that_fail(),
            accepted_loss: status.accepted_loss.map(|loss| match loss {
                CoreLoss::UnderWay => AcceptedLoss::UnderWay,
                CoreLoss::Refused(refusal) => AcceptedLoss::Refused {
                    why: refusal.to_string(),
                },
            }),
            counters: self.counters(),
        }
    }

    fn counters(&self) -> Map<String, Value> {
        let now = Now {
            devices: self.seat.machine.device_counts(),
            link_sent_bytes: self.links.values().map(|link| link.sender.state().taken_bytes).sum(),
            paused: self.figures.unprotected + self.hold.lasts(),
            output_dropped: self.seat.dropped(),
            nic_mtus: self.seat.machine.mtus(),
            nic_refused: json!(self.seat.refused()),
            input_frames: self.seat.inbox.frames(),
            guest_running: self.guest == Guest::Running,
        };
        let mut counters = self.figures.told(&now);
        self.seat.outbox.counters(&mut counters);
        if let Some(trace) = self.takeover.trace() {
            trace.counters(&mut counters);
        }
        let mut numbers = counters.iter().filter(|(_, value)| value.is_number());
        debug_assert!(numbers.all(|(name, _)| is_figure(name)), "{counters:?}");
        counters
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Instant;

    use super::*;
    use crate::driver::figures::FIGURES;
    use crate::driver::trace::{Change, Trace};
    use crate::outbox::{Outbox, Output, Sink, admitted};

    /// What the status says beside numbers.
    const NO_NUMBERS: [&str; 7] = [
        "guest_running",
        "held_us_buckets",
        "nic_mtus",
        "nic_refused",
        "pause_slowest",
        "pause_us_buckets",
        "takeover_noticed_by",
    ];

    struct Nowhere;

    impl Sink for Nowhere {
        fn emit(&self, _: &Output) {}
    }

    /// As [`Driver::counters`] puts it together, with a switchover and a takeover.
    #[test]
    fn the_list_of_figures_has_the_numbers_of_the_status_and_no_others() {
        let mut counters = Figures::default().told(&Now::default());
        Outbox::new(Box::new(Nowhere), admitted).counters(&mut counters);
        let lost = Change::Takeover {
            by: "its silence",
            silence: Duration::ZERO,
        };
        for change in [lost, Change::Switchover] {
            Trace::new(change, Instant::now()).counters(&mut counters);
        }
        let told = counters.keys().map(String::as_str);
        let told: BTreeSet<&str> = told.filter(|name| !NO_NUMBERS.contains(name)).collect();
        let listed: BTreeSet<&str> = FIGURES.iter().map(|figure| figure.name).collect();
        assert_eq!(told, listed);
        assert_eq!(listed.len(), FIGURES.len(), "each once");
        for name in NO_NUMBERS {
            assert!(counters.get(name).is_some_and(|value| !value.is_number()), "{name}");
        }
    }

    #[test]
    fn a_trouble_is_told_while_it_lasts_and_no_longer() {
        let mut troubles = Troubles {
            link: Some((18, "identity".to_owned())),
            session: Some("resync failed".to_owned()),
            told: None,
            said: None,
            session_code: None,
            arbiter: None,
            connection: Some("no route".to_owned()),
        };
        assert_eq!(
            troubles.first(),
            Some("identity"),
            "nothing works before that is mended"
        );
        troubles.link_up();
        assert_eq!(troubles.connection, None);
        assert_eq!(troubles.first(), Some("resync failed"), "a link alone mends no session");
        troubles.session_works();
        assert_eq!(troubles.first(), None);
    }

    #[test]
    fn a_disk_fails_until_it_works_again() {
        let hangs_after = Duration::from_millis(1_500);
        let mut failing = FailingDisks::new(hangs_after);
        let mut fails = |disk, message: &str| {
            failing.noticed(&DeviceEvent::DiskError {
                disk,
                message: message.to_owned(),
            });
            failing.told()
        };
        let disk = |disk, why: &str| FailingDisk {
            disk,
            kind: StorageKind::Failed,
            why: why.to_owned(),
        };
        assert_eq!(fails(1, "writing"), [disk(1, "writing")]);
        assert_eq!(fails(0, "reading"), [disk(0, "reading"), disk(1, "writing")]);
        assert_eq!(fails(1, "flushing"), [disk(0, "reading"), disk(1, "writing")]);
        failing.noticed(&DeviceEvent::Reset);
        failing.noticed(&DeviceEvent::DiskRecovered { disk: 1 });
        assert_eq!(failing.told(), [disk(0, "reading")]);
        failing.noticed(&DeviceEvent::DiskRecovered { disk: 1 });
        failing.noticed(&DeviceEvent::DiskRecovered { disk: 0 });
        assert!(failing.told().is_empty());
        assert!(failing.hangs(Some(1)) && !failing.hangs(Some(1)), "told once");
        let kind = StorageKind::Hangs;
        let hangs = disk(1, "a request has been under way for more than 1.5 s");
        assert_eq!(failing.told(), [FailingDisk { kind, ..hangs }]);
        assert!(failing.hangs(None));
        assert_eq!(failing.first(), None);
    }

    #[test]
    fn what_a_follower_says_outlives_its_link() {
        let mut troubles = Troubles::default();
        troubles.follower_said(SessionId(3), "it lacks room".to_owned());
        troubles.session_failed(SessionId(3), "the link is down".to_owned());
        assert_eq!(troubles.first(), Some("it lacks room"));
        troubles.session_failed(SessionId(4), "no thread".to_owned());
        assert_eq!(troubles.first(), Some("no thread"), "another session");
        troubles.follower_said(SessionId(5), "it lacks room".to_owned());
        troubles.session_works();
        troubles.session_failed(SessionId(5), "the link is down".to_owned());
        assert_eq!(troubles.first(), Some("the link is down"), "since then it worked");
    }

    /// A follower whose disk hangs says so before its leader ejects it, while the pair is whole still.
    #[test]
    fn what_a_follower_says_is_the_reason_once_its_session_is_over() {
        let said = |session| {
            let mut troubles = Troubles::default();
            troubles.follower_said(SessionId(session), "its storage hangs".to_owned());
            troubles.session_works();
            assert_eq!(troubles.first(), None, "protected");
            troubles
        };
        let mut troubles = said(3);
        troubles.session_over(SessionId(3));
        troubles.session_failed(SessionId(3), "the link is down".to_owned());
        assert_eq!(troubles.first(), Some("its storage hangs"));
        let mut troubles = said(4);
        troubles.follower_goes_on(SessionId(4));
        troubles.session_over(SessionId(4));
        assert_eq!(troubles.first(), None, "it went on");
        let mut troubles = said(5);
        troubles.session_over(SessionId(6));
        assert_eq!(troubles.first(), None, "another session");
    }
}
