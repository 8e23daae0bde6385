//! A leader's first look at a VM. What it reads then may be old: the cluster may have been restored from a backup, times and all, and daemons write
//! again only once their watches have told them. So patience begins with this look, and is of this process's clock alone.
//!
//! ```text
//!   first look ─► something is drawn ─► asked for on pods, before what can't be taken back ─┬─► daemons repeat it: what they say was said since
//!                                                                                           └─► 120 s: they had the time for it
//! ```
//!
//! A process that goes on leading sees by versions that go backwards that it has to look anew. One that loses the election has a new one at its
//! next turn.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::observe::{LeaseSeen, Observed};

/// So long after its first look a leader takes what seats say for what they are, also where no daemon has repeated what it drew: that may be away,
/// or of an earlier release. A daemon needs for it, once an API server is there again: up to 60 s until its watch asks again, 10 s until it knows that
/// the watch does not lag, and one write.
pub const TOLD: Duration = Duration::from_secs(120);
/// Versions that go backwards are another first look so often at most: until the watches know of a restored store, they tell of the former one.
const ANEW: Duration = Duration::from_secs(10);

/// What decisions know of a first look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirstLook {
    /// Drawn then. A daemon that repeats it, or what begins with it (`decide::words`), has said all else since.
    pub drawn: String,
    /// How long ago that was.
    pub age: Duration,
}

/// What a leader keeps of its looks at one VM.
#[derive(Debug, Clone)]
pub struct Looked {
    began: Instant,
    /// None: the VM had no seats, so nobody had anything to say.
    drawn: Option<String>,
    /// The highest resourceVersions that were seen of what is there, by UID.
    highest: BTreeMap<String, u64>,
}

impl Looked {
    /// The first one.
    pub fn new(seen: &Observed, now: Instant) -> Looked {
        let is_bare = seen.status().seats.is_empty() && seen.lease == LeaseSeen::Missing;
        Looked {
            began: now,
            drawn: (!is_bare).then(|| draw(seen)),
            highest: versions(seen),
        }
    }

    /// This is what the watches tell. They may lag, or tell something once more, which proves nothing.
    pub fn told(&mut self, seen: &Observed, _: Instant) {
        let known = std::mem::take(&mut self.highest);
        let higher = |(uid, version): (String, u64)| {
            let version = known.get(&uid).map_or(version, |known| version.max(*known));
            (uid, version)
        };
        self.highest = versions(seen).into_iter().map(higher).collect();
    }

    /// This was read past every cache. If anything of it is older than what was seen, the store is another one.
    pub fn read(&mut self, seen: &Observed, now: Instant) {
        let versions = versions(seen);
        let mut known = self.highest.iter();
        let is_back = known.any(|(uid, known)| versions.get(uid).is_some_and(|version| version < known));
        if is_back && now.saturating_duration_since(self.began) >= ANEW {
            (self.began, self.drawn) = (now, Some(draw(seen)));
        }
        self.highest = versions;
    }

    /// What decisions are to know; none: nothing can be older than this leader.
    pub fn first(&self, now: Instant) -> Option<FirstLook> {
        Some(FirstLook {
            drawn: self.drawn.clone()?,
            age: now.saturating_duration_since(self.began),
        })
    }
}

fn draw(seen: &Observed) -> String {
    format!("{:016x}", seen.draws[0])
}

/// resourceVersions as numbers, which grow (Kubernetes API concepts, "Resource versions"), by UID. What has none is left out.
fn versions(seen: &Observed) -> BTreeMap<String, u64> {
    let vm = &seen.vm.metadata;
    let vm = vm.uid.clone().zip(vm.resource_version.as_deref());
    let pods = seen.pods.values().map(|pod| (pod.uid.clone(), pod.version.as_str()));
    let numbers = vm.into_iter().chain(pods);
    let mut numbers: BTreeMap<String, u64> = numbers
        .filter_map(|(uid, version)| Some((uid, version.parse().ok()?)))
        .collect();
    if let LeaseSeen::Found(record) = &seen.lease {
        numbers.insert(record.snapshot.uid.to_string(), record.snapshot.version);
    }
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decide::rig::World;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn world() -> World {
        let mut world = World::new(3);
        assert!(world.settle(60));
        world
    }

    /// Whatever comes to be is made by this process, or seen as it comes.
    #[test]
    fn of_a_vm_that_has_nothing_nothing_can_be_old() {
        let (mut world, now) = (World::new(3), Instant::now());
        let mut looked = Looked::new(&world.observe(), now);
        assert!(world.settle(60));
        looked.told(&world.observe(), now + seconds(60));
        assert_eq!(looked.first(now + seconds(60)), None);
    }

    #[test]
    fn patience_begins_with_the_first_look_of_each_leader() {
        let (mut world, now) = (world(), Instant::now());
        let mut looked = Looked::new(&world.observe(), now);
        let first = looked.first(now).unwrap();
        assert_eq!(first.age, Duration::ZERO);
        looked.told(&world.observe(), now + seconds(50));
        let later = looked.first(now + seconds(50)).unwrap();
        assert_eq!((later.age, &later.drawn), (seconds(50), &first.drawn));
        let next = Looked::new(&world.observe(), now + seconds(60)).first(now + seconds(60));
        let next = next.unwrap();
        assert!(next.age.is_zero() && next.drawn != first.drawn, "{next:?}");
    }

    /// A store that was restored while the same process went on leading: whichever object shows it.
    #[test]
    fn versions_that_go_backwards_are_a_new_first_look() {
        let mut world = world();
        world.vm.metadata.resource_version = Some("100".to_owned());
        let name = world.book()[0].name.clone();
        world.pods.get_mut(&name).unwrap().version = "200".to_owned();
        let seen = world.observe();
        let now = Instant::now();
        let age = |looked: &Looked, at: Duration| looked.first(now + at).unwrap().age;
        let lower: [fn(&mut Observed); 3] = [
            |seen| seen.vm.metadata.resource_version = Some("99".to_owned()),
            |seen| {
                let pod = seen.pods.values_mut().find(|pod| pod.version == "200");
                pod.unwrap().version = "199".to_owned();
            },
            |seen| {
                if let LeaseSeen::Found(record) = &mut seen.lease {
                    record.snapshot.version -= 1;
                }
            },
        ];
        for lower in lower {
            let mut old = seen.clone();
            lower(&mut old);
            let mut looked = Looked::new(&seen, now);
            looked.told(&seen, now + seconds(10));
            looked.read(&seen, now + seconds(20));
            // A watch that lags, or is replayed.
            looked.told(&old, now + seconds(30));
            assert_eq!(age(&looked, seconds(30)), seconds(30), "nothing went backwards");
            looked.read(&old, now + seconds(40));
            assert_eq!(age(&looked, seconds(40)), Duration::ZERO);
        }
    }

    #[test]
    fn caches_that_lag_and_pods_that_go_are_none() {
        let mut world = world();
        let name = world.book()[0].name.clone();
        let cached = world.observe();
        world.pods.get_mut(&name).unwrap().version = "100000".to_owned();
        let fresh = world.observe();
        let now = Instant::now();
        let mut looked = Looked::new(&cached, now);
        for second in [20, 40, 60] {
            looked.told(&cached, now + seconds(second));
            looked.read(&fresh, now + seconds(second));
        }
        world.pods.remove(&name);
        looked.read(&world.observe(), now + seconds(80));
        assert_eq!(looked.first(now + seconds(80)).unwrap().age, seconds(80));
    }

    /// Until the watches know as well, one restored store is not one first look after the other.
    #[test]
    fn what_goes_backwards_again_at_once_is_the_same() {
        let mut world = world();
        world.vm.metadata.resource_version = Some("100".to_owned());
        let cached = world.observe();
        world.vm.metadata.resource_version = Some("90".to_owned());
        let restored = world.observe();
        let now = Instant::now();
        let mut looked = Looked::new(&cached, now);
        looked.read(&restored, now + seconds(20));
        let drawn = looked.first(now).unwrap().drawn;
        for second in 21..29 {
            looked.told(&cached, now + seconds(second));
            looked.read(&restored, now + seconds(second));
        }
        looked.told(&restored, now + seconds(29));
        looked.read(&restored, now + seconds(60));
        let first = looked.first(now + seconds(60)).unwrap();
        assert_eq!((first.drawn, first.age), (drawn, seconds(40)));
    }
}
