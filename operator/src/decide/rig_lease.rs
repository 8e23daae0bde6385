//! What becomes of the rig's Lease by other hands than its engines': deleted, made anew, put back from a copy.

use ftvm_protocol::identity::ArbiterUid;
use ftvm_protocol::record::{Phase, Record, Snapshot};

use super::is_genesis;
use super::rig::World;

impl World {
    /// Somebody deletes the Lease of a VM whose guest ran. (Before that nobody vouches, and the VM is deleted.)
    pub fn delete_lease(&mut self) {
        if self.record().is_some_and(is_genesis) {
            return;
        }
        if let Some((snapshot, _)) = self.lease.take() {
            self.ended.insert(snapshot.uid, snapshot.record);
        }
    }

    /// Whatever was vouched for when: it never contradicts what the record said when it was deleted.
    pub fn recreate_lease(&mut self, record: &Record, nodes: &str) {
        let last = &self.ended[&record.predecessor.unwrap()];
        assert_eq!(
            (record.holder, &record.members, record.phase),
            (last.holder, &last.members, Phase::Running),
            "a successor contradicts its predecessor"
        );
        assert!(record.term > last.term && record.nonce.0 != 0);
        if self.lease.is_none() {
            let uid = ArbiterUid(self.next().into());
            let version = self.next();
            let snapshot = Snapshot {
                record: record.clone(),
                uid,
                version,
            };
            self.lease = Some((snapshot, nodes.to_owned()));
        }
    }

    /// What docs/kubernetes.md tells a person to do if nobody vouches: the record as it was, naming what it succeeds.
    pub fn put_copy_back(&mut self) {
        let gone: ArbiterUid = self
            .vm
            .status
            .as_ref()
            .unwrap()
            .lease_uid
            .clone()
            .unwrap()
            .parse()
            .unwrap();
        let last = self.ended[&gone].clone();
        let record = Record {
            term: last.term + 1,
            predecessor: Some(gone),
            ..last
        };
        let (uid, version) = (ArbiterUid(self.next().into()), self.next());
        self.lease = Some((Snapshot { record, uid, version }, String::new()));
    }

    /// Do some seats go by a successor that was deleted before the others did?
    pub fn is_split(&self) -> bool {
        let known = self.vm.status.as_ref().and_then(|status| status.lease_uid.clone());
        let book = self.book();
        let mut uids = book.iter().filter_map(|entry| self.known.get(&entry.name));
        self.lease.is_none() && uids.any(|uid| Some(uid.to_string()) != known)
    }
}
