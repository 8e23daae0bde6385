//! What the rig's seats have on their volumes, what a cluster does to claims, what it does while no engine does anything, and what the operator remembers.

use std::time::Duration;

use ftvm_crds::SeatEntry;
use ftvm_crds::names::claim_name;
use ftvm_crds::seat::SeatPublished;
use ftvm_protocol::record::Record;

use super::rig::World;
use super::words::WORD_HOLDS;
use super::{WORD_WITHIN, accepted_since, holder, is_genesis, is_named};
use crate::observe::{ClaimSeen, Observed};

/// What is on a seat's volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disk {
    /// Zeros: it was prepared to get everything by replication.
    Blank,
    /// What the VM begins with.
    First,
    /// What the guest wrote. On the first disk there is a complete header, too.
    Guest,
}

impl World {
    /// Nothing of a seat that the record names is ever taken away while the VM is to exist.
    pub fn delete_claim(&mut self, claim: &str, uid: &str) {
        let Some(seen) = self.claims.get_mut(claim).filter(|seen| seen.uid == uid) else {
            return;
        };
        seen.deleting = true;
        let seat = seen.seat.clone();
        assert!(!self.pods.contains_key(&seat), "a claim is deleted under a pod");
        let goes = self.vm.metadata.deletion_timestamp.is_some();
        if let (Some(entry), Some(record)) = (self.entry(&seat), self.record()) {
            assert!(
                goes || is_genesis(record) || !is_named(&entry, record),
                "a claim of seat {seat} is deleted: {record:?}"
            );
            assert!(
                goes || is_genesis(record) || self.is_spoken_for(&seat, record),
                "nobody was asked before a claim of seat {seat} is deleted: {record:?}"
            );
        }
    }

    /// Did the holder's daemon say what it is once the operator had asked because of this seat, and only just?
    fn is_spoken_for(&self, seat: &str, record: &Record) -> bool {
        let book = self.book();
        let pod = holder(&book, record).and_then(|entry| self.pods.get(&entry.name));
        let look = pod.and_then(|pod| pod.told()?.look.as_deref());
        let parts: Vec<&str> = look.unwrap_or_default().split('.').collect();
        let [_, of, at] = parts[..] else { return false };
        let age = self.now.as_second() - at.parse::<i64>().unwrap();
        seat.ends_with(&format!("-{of}")) && (0..=WORD_HOLDS.as_secs().cast_signed()).contains(&age)
    }

    /// Daemons repeat what they were asked for, with what they said before.
    pub fn repeat_looks(&mut self) {
        for seat in self.pods.keys().cloned().collect::<Vec<_>>() {
            let lives = self.alive(&seat);
            if let Some(pod) = self.pods.get_mut(&seat).filter(|_| lives)
                && let Ok(published) = &mut pod.published
            {
                published.look = pod.look.clone();
            }
        }
    }

    /// Volumes that are deleted go once no pod that is bound to a node uses them (the controller `pvc-protection`).
    pub fn volumes(&mut self) {
        let pods = &self.pods;
        let is_used = |claim: &ClaimSeen| pods.get(&claim.seat).is_some_and(|pod| pod.node.is_some());
        self.claims.retain(|_, claim| !claim.deleting || is_used(claim));
    }

    /// Everybody but engines and daemons does what they can, for so many rounds.
    pub fn without_engines(&mut self, rounds: usize) {
        for _ in 0..rounds {
            self.step();
            for seat in self.pods.keys().cloned().collect::<Vec<_>>() {
                self.schedule(&seat);
                self.kubelet(&seat);
            }
            self.volumes();
            self.pass(2);
        }
    }

    /// What was observed, and for how long the operator has seen that the same loss is accepted.
    pub fn recall(&mut self, seen: Observed) -> Observed {
        let since = accepted_since(&mut self.acceptance, &seen, self.now);
        let accepted_for = since.and_then(|since| Duration::try_from(self.now.duration_since(since)).ok());
        Observed { accepted_for, ..seen }
    }

    /// A loss was accepted, and whoever has told nothing yet has had its time to.
    pub fn pass_for_words(&mut self) {
        self.observe();
        self.pass(WORD_WITHIN.as_secs().cast_signed());
    }

    /// The storage of the seat's node fails what it joins with: the engine ends, and its daemon tells that until another one begins.
    pub fn fails_to_join(&mut self, seat: &str) -> bool {
        let pod = self.pods.get_mut(seat).unwrap();
        if pod.node.as_ref().is_none_or(|node| !self.bad_storage.contains(node)) {
            return false;
        }
        self.joins_failed += 1;
        let failures = self.storage_failures.entry(pod.uid.clone()).or_default();
        *failures += 1;
        pod.published = Ok(SeatPublished {
            why: "this seat's storage failed".to_owned(),
            code: 21,
            storage_failures: *failures,
            done_request: self.executed.get(&pod.uid).cloned(),
            look: pod.look.clone(),
            ..SeatPublished::default()
        });
        true
    }

    /// The seat's claims, in the order of its disks; none of one that is missing.
    pub fn claims_of(&self, seat: &str) -> Vec<Option<&ClaimSeen>> {
        let disks = self.vm.spec.disks.iter();
        disks
            .map(|disk| self.claims.get(&claim_name(seat, &disk.name)))
            .collect()
    }

    /// Somebody deletes a claim.
    pub fn delete_claim_by_hand(&mut self, seat: &str, disk: &str) {
        self.claims.get_mut(&claim_name(seat, disk)).unwrap().deleting = true;
    }

    /// The seat's program prepares disks that are new, once, by what the record says then.
    pub fn prepare(&mut self, seat: &str, original: bool) {
        let contents = if original { Disk::First } else { Disk::Blank };
        let claims = self.claims_of(seat).into_iter().flatten();
        let uids: Vec<String> = claims.map(|claim| claim.uid.clone()).collect();
        for uid in uids {
            self.disks.entry(uid).or_insert(contents);
        }
    }

    /// What is on the seat's disks; none where one is missing or not prepared.
    pub fn contents_of(&self, seat: &str) -> Vec<Option<Disk>> {
        let claims = self.claims_of(seat).into_iter();
        claims.map(|claim| self.disks.get(&claim?.uid).copied()).collect()
    }

    /// Is there a header, on the first disk, of a seat that has what the guest wrote?
    pub fn has_header(&self, seat: &str) -> bool {
        self.contents_of(seat).first() == Some(&Some(Disk::Guest))
    }

    /// Is the record's holder another seat that is there and could boot?
    pub fn holder_could(&self, others: &[SeatEntry], record: &Record) -> bool {
        let holder = record.holder.seat.to_string();
        let mut found = others.iter().filter(|other| other.had_uid(&holder));
        found.any(|other| self.alive(&other.name) && self.has_header(&other.name))
    }

    /// The guest is booted from the disks of this seat, or goes on there.
    pub fn boots(&mut self, seat: &str, first_time: bool) {
        let contents = self.contents_of(seat);
        let sound = |disk: &Option<Disk>| *disk == Some(Disk::Guest) || (first_time && *disk == Some(Disk::First));
        assert!(
            contents.iter().all(sound),
            "a guest runs on disks of seat {seat} that lack what it had: {contents:?}"
        );
        self.holds_guest(seat);
    }

    /// All that the guest wrote is on this seat's disks.
    pub fn holds_guest(&mut self, seat: &str) {
        let claims = self.claims_of(seat).into_iter().flatten();
        let uids: Vec<String> = claims.map(|claim| claim.uid.clone()).collect();
        self.disks.extend(uids.into_iter().map(|uid| (uid, Disk::Guest)));
    }
}
