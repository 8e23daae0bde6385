//! The seat's own disks: what fails, what hangs, and their last flush before a stop. What follows from it the core decides
//! (rule 13 in `docs/protocol.md`).

use std::time::{Duration, Instant};

use ftvm_protocol::core::{Event, RoleName, Seal, Status as CoreStatus, StorageHealth};

use super::seat::{Work, flush_all};
use super::{Driver, Input};
use crate::control::StoragePart;
use crate::devices::event::DeviceEvent;

/// Whoever ends waits so long for what its disks are doing.
const IDLE_WITHIN: Duration = Duration::from_secs(1);
/// One look counts no more: if it comes later than that, this process did not run, and neither did those that work for its disks.
const LOOK_MAX: Duration = Duration::from_millis(500);

/// Counts how long the disks' requests are under way. Time in which this process did not run does not count: all of a host that stood
/// still would have disks that hang, and each of two such hosts would want the other one to have the guest.
#[derive(Debug, Default)]
pub struct Watch {
    looked: Option<Instant>,
    /// By disk: since when its request has been under way, and how long that counts.
    requests: Vec<Option<(Instant, Duration)>>,
}

impl Watch {
    /// One look; gives how much it counts.
    fn look(&mut self, now: Instant, since: &[Option<Instant>]) -> Duration {
        let looked = self.looked.replace(now).unwrap_or(now);
        let ran = now.saturating_duration_since(looked).min(LOOK_MAX);
        let before = std::mem::take(&mut self.requests);
        let counted = |(disk, since): (usize, &Option<Instant>)| {
            let since = (*since)?;
            let known = before.get(disk).copied().flatten();
            let known = known.filter(|(known, _)| *known == since);
            Some((since, known.map_or(Duration::ZERO, |(_, lasts)| lasts + ran)))
        };
        self.requests = since.iter().enumerate().map(counted).collect();
        ran
    }

    /// The disk whose request under way has been so for longest, and for how long.
    fn slowest(&self) -> Option<(usize, Duration)> {
        let requests = self.requests.iter().enumerate();
        let lasts = requests.filter_map(|(disk, request)| request.map(|(_, lasts)| (disk, lasts)));
        lasts.max_by_key(|(_, lasts)| *lasts)
    }
}

/// Counts how long volumes or journal have kept this seat waiting as a follower of one session.
#[derive(Debug, Default)]
pub struct FollowerWatch {
    watch: Watch,
    /// The leader knows.
    told: bool,
}

impl FollowerWatch {
    /// One look. Some if the leader is to be told: true, that it waits for too long, and false, that it does so no more.
    fn look(&mut self, now: Instant, since: Option<Instant>, limit: Duration) -> Option<bool> {
        self.watch.look(now, &[since]);
        let hangs = self.watch.slowest().is_some_and(|(_, lasts)| lasts > limit);
        (std::mem::replace(&mut self.told, hangs) != hangs).then_some(hangs)
    }

    /// There is another leader, or this one was told something that is not to be taken back.
    pub fn forget(&mut self) {
        *self = Self::default();
    }
}

impl Driver {
    pub(super) fn device_event(&mut self, event: &DeviceEvent) {
        self.failing_disks.noticed(event);
        self.warn(event.to_string());
        match event {
            DeviceEvent::DiskError { .. } => self.step(Event::Storage(StorageHealth::Failed)),
            DeviceEvent::DiskRecovered { disk } => self.seat.failures.forget(StoragePart::Disk(*disk)),
            DeviceEvent::Reset
            | DeviceEvent::PowerOff
            | DeviceEvent::NetError { .. }
            | DeviceEvent::NeedsReset { .. } => {}
        }
    }

    /// Looks for a request that takes too long, and whether one that did has ended.
    pub(super) fn watch_disks(&mut self) {
        self.watch_as_follower();
        let ran = self.watch.look(Instant::now(), &self.seat.machine.requests_since());
        if let Some(flushing) = &mut self.flushing {
            *flushing += ran;
            if *flushing > self.seat.hangs_after {
                self.flushed(Err("the last flush hangs: whether it was done is unknown".to_owned()));
            }
        }
        let slowest = self.watch.slowest();
        let lasts = slowest.map_or(Duration::ZERO, |(_, lasts)| lasts);
        self.figures.slowest_request = self.figures.slowest_request.max(lasts);
        let hanging = slowest.filter(|_| lasts > self.seat.hangs_after).map(|(disk, _)| disk);
        if !self.failing_disks.hangs(hanging) {
            return;
        }
        match hanging {
            Some(disk) => {
                let why = super::status::hanging_text(self.seat.hangs_after);
                self.warn(format!("disk {disk} hangs: {why}"));
                self.step(Event::Storage(StorageHealth::Hangs));
            }
            None => {
                self.warn("no disk hangs any more".to_owned());
                self.step(Event::Storage(StorageHealth::Works));
            }
        }
    }

    /// Nobody acknowledges anything while this seat's own disks or journal hang, and its leader ejects it before long: it is told why. What
    /// was said is taken back should the seat go on in time.
    fn watch_as_follower(&mut self) {
        let since = self.seat.storage_since().filter(|_| self.following.is_some());
        let limit = if self.core.status().role == RoleName::Standby {
            self.seat.tells_after
        } else {
            // Nobody ejects a joiner, and the sync of all that a resync brought may take long.
            self.seat.tells_after.max(self.seat.hangs_after)
        };
        match self.follower_watch.look(Instant::now(), since, limit) {
            Some(true) => {
                let why = format!("its storage hangs: {}", super::status::hanging_text(limit));
                self.tell_leader(&why);
                self.warn(format!("this seat can't follow: {why}"));
            }
            Some(false) => self.tell_leader(""),
            None => {}
        }
    }

    pub(super) fn storage_failed(&mut self, why: String) {
        self.warn(why);
        self.step(Event::Storage(StorageHealth::Failed));
    }

    /// The last epoch of a pair before a stop. Once that is told, this seat's disks have everything, too. A flush may take long, and heartbeats
    /// are answered meanwhile. The guest stands still, and nothing lets it go on before the epoch is sealed.
    pub(super) fn flush_then_seal(&mut self) {
        self.pause_guest();
        self.flushing = Some(Duration::ZERO);
        let (volumes, queue, enter) = (self.seat.volumes(), self.queue.clone(), self.seat.enter(Work::Storage));
        let flush = move || {
            enter();
            queue.put(Input::Flushed(flush_all(&volumes)));
        };
        if let Err(error) = std::thread::Builder::new().name("flush".to_owned()).spawn(flush) {
            self.flushed(Err(format!("can't start the thread that flushes the disks: {error}")));
        }
    }

    pub(super) fn flushed(&mut self, flushed: Result<(), String>) {
        if self.flushing.take().is_none() {
            // It had been given up.
            return;
        }
        if let Err(why) = flushed {
            self.storage_failed(why);
        }
        // It may have been overtaken by the end of this seat.
        let status = self.core.status();
        if status.stopping && status.role == RoleName::Active {
            self.seal(Seal::Final);
        }
    }

    /// What is wrong with this seat's storage, and what comes of it.
    pub(super) fn why_storage(&self, status: &CoreStatus) -> Option<String> {
        if status.storage == StorageHealth::Works {
            return None;
        }
        let what = self.failing_disks.first();
        let what = what.unwrap_or_else(|| "this seat's storage has failed".to_owned());
        Some(match (status.role, status.peer) {
            (RoleName::Active, Some(_)) => format!("{what}: the guest goes to the standby as soon as that can take it"),
            (RoleName::Active, None) if status.storage == StorageHealth::Hangs => {
                format!("{what}: the guest waits for it, or until a standby has joined and takes over")
            }
            (RoleName::Active, None) => {
                format!("{what}: the guest gets its errors until a standby has joined and takes over")
            }
            _ => what,
        })
    }

    /// Whether a disk is still being used after a while: by a request that hangs.
    pub fn is_hanging(&self) -> bool {
        !self.seat.machine.disks_in_use().end_within(IDLE_WITHIN)
    }

    /// Nobody hears of this engine any more, however long its process may still be there.
    pub fn close_links(&self) {
        self.hub.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leader_is_told_once_that_its_follower_waits_and_once_that_it_does_not() {
        let (mut watch, began) = (FollowerWatch::default(), Instant::now());
        let limit = Duration::from_millis(100);
        let mut at = |ms, since: Option<u64>| {
            let moment = |ms| began + Duration::from_millis(ms);
            watch.look(moment(ms), since.map(moment), limit)
        };
        assert_eq!(at(0, None), None);
        assert_eq!(at(50, Some(40)), None);
        assert_eq!(at(100, Some(90)), None, "another request");
        assert_eq!(at(200, Some(90)), None, "no longer than it may");
        assert_eq!(at(250, Some(90)), Some(true));
        assert_eq!(at(300, Some(90)), None, "told");
        assert_eq!(at(350, Some(340)), Some(false));
        assert_eq!(at(400, None), None);
    }

    #[test]
    fn what_ends_with_an_error_does_not_take_that_back() {
        let (mut watch, began) = (FollowerWatch::default(), Instant::now());
        let moment = |ms| began + Duration::from_millis(ms);
        let look = |watch: &mut FollowerWatch, ms, since: Option<u64>| {
            watch.look(moment(ms), since.map(moment), Duration::from_millis(100))
        };
        for (ms, told) in [(0, None), (100, None), (200, Some(true))] {
            assert_eq!(look(&mut watch, ms, Some(0)), told);
        }
        watch.forget();
        assert_eq!(look(&mut watch, 250, None), None);
        // Another leader is told anew.
        for (ms, told) in [(300, None), (400, None), (500, Some(true))] {
            assert_eq!(look(&mut watch, ms, Some(260)), told);
        }
    }

    #[test]
    fn a_request_hangs_by_the_time_in_which_this_process_ran() {
        let (mut watch, began) = (Watch::default(), Instant::now());
        let at = |ms| began + Duration::from_millis(ms);
        let quick = Some(at(0));
        let look = |watch: &mut Watch, ms, since: &[Option<Instant>]| {
            watch.look(at(ms), since);
            watch.slowest()
        };
        let ms = Duration::from_millis;
        assert_eq!(look(&mut watch, 10, &[None, quick]), Some((1, ms(0))), "seen");
        assert_eq!(look(&mut watch, 60, &[None, quick]), Some((1, ms(50))));
        // Frozen for a minute, and then it goes on.
        assert_eq!(look(&mut watch, 60_060, &[None, quick]), Some((1, ms(50) + LOOK_MAX)));
        // Another request, and one of the other disk.
        let other = Some(at(60_070));
        assert_eq!(
            look(&mut watch, 60_110, &[other, other]).map(|(_, lasts)| lasts),
            Some(ms(0))
        );
        assert_eq!(look(&mut watch, 60_160, &[other, None]), Some((0, ms(50))));
        assert_eq!(look(&mut watch, 60_210, &[None, None]), None);
        // One that really hangs is found.
        let hangs_after = Duration::from_secs(30);
        for tick in 1..=602_u64 {
            let slowest = look(&mut watch, 60_210 + 50 * tick, &[other, None]);
            let hangs = slowest.is_some_and(|(_, lasts)| lasts > hangs_after);
            assert_eq!(hangs, tick == 602);
        }
    }
}
