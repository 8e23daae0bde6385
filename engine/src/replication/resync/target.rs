//! The side that receives a resync.

use ftvm_protocol::wire::Kind;

use super::window::{CREDIT_EVERY_BYTES, CREDIT_EVERY_WORK_BYTES, credit_payload, told_payload};
use super::{Begin, DISK_CHANGES, DISK_COPY, DISK_PREFIX_BYTES, End, Offer, Plan, ResyncError};
use crate::devices::virtio::net::check_mtu;
use crate::replication::buffers;
use crate::replication::epoch::{DiskChange, PayloadError, StagingLimits, wire};
use crate::replication::memory::{PAGE_SIZE, PageMemory};
use crate::replication::pages::PageChunk;
use crate::replication::standby_disks::StandbyDisks;

/// What has arrived.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ResyncTotals {
    /// Pages applied.
    pub pages: u64,
    /// Bytes of disks copied.
    pub disk_bytes: u64,
    /// Payload bytes of all frames.
    pub payload_bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Waiting,
    /// Begun, and this side has said what its disks hold.
    Told,
    Running,
    Complete,
}

/// Writes what a resync brings to memory and disks as it arrives; knows whether everything came.
pub struct ResyncTarget {
    page_count: u32,
    disk_bytes: Vec<u64>,
    offer: Offer,
    phase: Phase,
    next: u32,
    checksum: crc32fast::Hasher,
    /// A bit for each page that came.
    pages: Vec<u64>,
    /// Whether this side is asked what its disks hold.
    told: bool,
    /// By disk, bytes that are announced, if only what changed comes.
    announced: Option<Vec<u64>>,
    /// How far each disk is copied.
    copied: Vec<u64>,
    /// Bytes of each disk that came.
    came: Vec<u64>,
    totals: ResyncTotals,
    credited: u64,
    /// Bytes written or zeroed since then.
    work_bytes: u64,
}

impl ResyncTarget {
    /// For the machine that `limits` and `offer` describe. `told`: the other side asks first what these disks hold
    /// ([`super::ResyncSource::asking`]), as drivers do.
    pub fn new(limits: &StagingLimits, offer: Offer, told: bool) -> Self {
        Self {
            offer,
            page_count: limits.page_count,
            disk_bytes: limits.disk_bytes.clone(),
            phase: Phase::Waiting,
            next: 0,
            checksum: crc32fast::Hasher::new(),
            pages: Vec::new(),
            told,
            announced: None,
            copied: vec![0; limits.disk_bytes.len()],
            came: vec![0; limits.disk_bytes.len()],
            totals: ResyncTotals::default(),
            credited: 0,
            work_bytes: 0,
        }
    }

    /// Everything came: the join checkpoint may follow.
    pub fn is_complete(&self) -> bool {
        self.phase == Phase::Complete
    }

    /// What has arrived so far.
    pub fn totals(&self) -> ResyncTotals {
        self.totals
    }

    /// Takes a frame of one of the resync kinds. `Some` is a frame to send to the active, `ResyncHolds` or `Credit`: without
    /// it, the active stops sending.
    pub fn accept(
        &mut self,
        kind: Kind,
        payload: Vec<u8>,
        memory: &dyn PageMemory,
        disks: &mut StandbyDisks,
    ) -> Result<Option<(Kind, Vec<u8>)>, ResyncError> {
        let found = wire::sequence_of(&payload, "resync")?;
        if found != self.next {
            return Err(ResyncError::Sequence {
                found,
                expected: self.next,
            });
        }
        match (kind, self.phase) {
            (Kind::ResyncBegin, Phase::Waiting) => self.begin(&payload, disks)?,
            (Kind::ResyncPlan, Phase::Told) => self.plan(&payload, disks)?,
            (Kind::ResyncMemory | Kind::ResyncDisk | Kind::ResyncEnd, Phase::Running) => {}
            (Kind::ResyncBegin, _) => return Err(ResyncError::Unexpected("a second beginning")),
            (_, Phase::Waiting) => return Err(ResyncError::Unexpected("no resync was begun")),
            (Kind::ResyncPlan, _) => return Err(ResyncError::Unexpected("a plan that nobody waits for")),
            (_, Phase::Told) => return Err(ResyncError::Unexpected("the plan is missing")),
            _ => return Err(ResyncError::Unexpected("the resync had ended")),
        }
        self.next += 1;
        let len = payload.len() as u64;
        if kind == Kind::ResyncEnd {
            self.end(&payload)?;
        } else {
            self.checksum.update(&payload);
        }
        match kind {
            Kind::ResyncMemory => self.memory(payload, memory)?,
            Kind::ResyncDisk => self.disk(&payload, disks)?,
            _ => {}
        }
        self.totals.payload_bytes += len;
        if self.phase == Phase::Told {
            return Ok(Some((Kind::ResyncHolds, told_payload(disks.holds())?)));
        }
        let is_due = self.totals.payload_bytes - self.credited >= CREDIT_EVERY_BYTES
            || self.work_bytes >= CREDIT_EVERY_WORK_BYTES
            || kind == Kind::ResyncEnd;
        if !is_due {
            return Ok(None);
        }
        self.credited = self.totals.payload_bytes;
        self.work_bytes = 0;
        Ok(Some((Kind::Credit, credit_payload(self.credited))))
    }

    fn begin(&mut self, payload: &[u8], disks: &mut StandbyDisks) -> Result<(), ResyncError> {
        let begin: Begin = wire::decode(payload, "ResyncBegin")?;
        let (theirs, ours) = (begin.mtus.len(), self.offer.nics.len());
        if begin.page_count != self.page_count || begin.disk_bytes != self.disk_bytes || theirs != ours {
            let describe = |pages: u32, disks: &[u64], nics: usize| {
                format!("{pages} pages, disks of {disks:?} bytes and {nics} network cards")
            };
            return Err(ResyncError::OtherMachine {
                theirs: describe(
                    begin.page_count,
                    &begin.disk_bytes[..begin.disk_bytes.len().min(64)],
                    theirs,
                ),
                ours: describe(self.page_count, &self.disk_bytes, ours),
            });
        }
        // Before anything of this seat's is overwritten.
        self.offer.cpu.check(&begin.cpu)?;
        for ((nic, mtu_max), mtu) in self.offer.nics.iter().zip(begin.mtus) {
            check_mtu(mtu, *mtu_max).map_err(|why| ResyncError::Mtu { nic: nic.clone(), why })?;
        }
        self.pages = vec![0; self.page_count.div_ceil(64) as usize];
        if self.told {
            self.phase = Phase::Told;
            return Ok(());
        }
        disks.begin_resync(None)?;
        self.phase = Phase::Running;
        Ok(())
    }

    fn plan(&mut self, payload: &[u8], disks: &mut StandbyDisks) -> Result<(), ResyncError> {
        let Plan { changed_bytes } = wire::decode(payload, "ResyncPlan")?;
        let holds = disks.holds().filter(|_| changed_bytes.is_some());
        if let Some(bytes) = &changed_bytes {
            let fits = |(bytes, size): (&u64, &u64)| bytes <= size;
            if bytes.len() != self.disk_bytes.len() || !bytes.iter().zip(&self.disk_bytes).all(fits) {
                let what = "the plan is for other disks than this seat's";
                return Err(ResyncError::Plan(what.to_owned()));
            }
            if holds.is_none() {
                let what = "only what changed is to come, and this seat's disks are not known to hold the rest";
                return Err(ResyncError::Plan(what.to_owned()));
            }
        }
        self.announced = changed_bytes;
        disks.begin_resync(holds)?;
        self.phase = Phase::Running;
        Ok(())
    }

    fn memory(&mut self, payload: Vec<u8>, memory: &dyn PageMemory) -> Result<(), ResyncError> {
        let chunk = PageChunk::check(payload, self.page_count)?;
        chunk.apply(memory);
        let pages = &mut self.pages;
        chunk.visit_pages(|page| pages[page as usize / 64] |= 1 << (page % 64));
        self.totals.pages += chunk.pages();
        self.work_bytes += chunk.pages() * PAGE_SIZE as u64;
        Ok(())
    }

    fn disk(&mut self, payload: &[u8], disks: &mut StandbyDisks) -> Result<(), ResyncError> {
        let changes = wire::decode_disk(payload, DISK_PREFIX_BYTES, &self.disk_bytes)?;
        let written = changes.iter().map(DiskChange::len).fold(0, u64::saturating_add);
        self.work_bytes = self.work_bytes.saturating_add(written);
        match payload[DISK_PREFIX_BYTES - 1] {
            DISK_CHANGES => Ok(disks.write_resync(changes)?),
            DISK_COPY => {
                changes.iter().try_for_each(|change| self.copied(change))?;
                Ok(disks.copy_resync(changes)?)
            }
            _ => Err(PayloadError::Malformed("ResyncDisk").into()),
        }
    }

    fn copied(&mut self, change: &DiskChange) -> Result<(), ResyncError> {
        let disk = usize::from(change.disk);
        let copied = &mut self.copied[disk];
        let follows = match &self.announced {
            None => change.offset == *copied,
            Some(_) => change.offset >= *copied,
        };
        if !follows {
            return Err(ResyncError::Block {
                disk: change.disk,
                found: change.offset,
                expected: *copied,
            });
        }
        *copied = change.end();
        self.came[disk] += change.len();
        self.totals.disk_bytes += change.len();
        Ok(())
    }

    fn end(&mut self, payload: &[u8]) -> Result<(), ResyncError> {
        let end: End = wire::decode(payload, "ResyncEnd")?;
        let came: u64 = self.pages.iter().map(|word| u64::from(word.count_ones())).sum();
        let incomplete = |what| Err(ResyncError::Incomplete(what));
        if came != u64::from(self.page_count) {
            return incomplete(format!("{came} of {} pages came", self.page_count));
        }
        let expected = self.announced.as_ref().unwrap_or(&self.disk_bytes);
        if let Some(disk) = (0..expected.len()).find(|&disk| self.came[disk] != expected[disk]) {
            return incomplete(format!(
                "of disk {disk} {} of {} bytes came",
                self.came[disk], expected[disk]
            ));
        }
        if end.payload_bytes != self.totals.payload_bytes || end.checksum != self.checksum.clone().finalize() {
            return incomplete("its bytes are not those that were sent".to_owned());
        }
        self.phase = Phase::Complete;
        buffers::forget();
        Ok(())
    }
}
