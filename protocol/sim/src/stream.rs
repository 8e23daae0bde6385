//! The replication stream of a simulated seat: sealing, sending, staging.

use std::rc::Rc;

use ftvm_protocol::core::{Event, Seal, StorageHealth};
use ftvm_protocol::identity::{Epoch, SessionId};

use crate::disk::Flush;
use crate::seat::Bulk;
use crate::world::{Input, World};

impl World {
    // ---- leading

    pub(crate) fn schedule_seal(&mut self, slot: usize) {
        let delay_ms = self.rng.range(6, 25);
        let Some(engine) = &mut self.slots[slot].engine else {
            return;
        };
        if !engine.driver.seal_scheduled {
            engine.driver.seal_scheduled = true;
            self.input_after(delay_ms, slot, Input::Seal);
        }
    }

    pub(crate) fn seal_due(&mut self, slot: usize) {
        let Some(engine) = &mut self.slots[slot].engine else {
            return;
        };
        engine.driver.seal_scheduled = false;
        let driver = &engine.driver;
        let live = driver.leading.as_ref().is_some_and(|leading| leading.live);
        let running = driver.guest.as_ref().is_some_and(|guest| guest.running);
        if !live || !running || driver.last_epoch {
            return;
        }
        let lag = driver.epoch.saturating_sub(engine.core.status().acked);
        if lag <= 4 {
            self.seal(slot, Seal::Ordinary);
        }
        self.schedule_seal(slot);
    }

    pub(crate) fn cut_due(&mut self, slot: usize, session: SessionId) {
        let Some(engine) = &mut self.slots[slot].engine else {
            return;
        };
        match &mut engine.driver.leading {
            Some(leading) if leading.session == session => leading.live = true,
            _ => return,
        }
        self.seal(slot, Seal::JoinCut);
        self.schedule_seal(slot);
    }

    pub(crate) fn seal(&mut self, slot: usize, seal: Seal) {
        let mut flushed = false;
        if seal == Seal::Final {
            match self.last_flush(slot) {
                Flush::Done => flushed = true,
                Flush::Failed => self.step(slot, Event::Storage(StorageHealth::Failed)),
                Flush::Hangs(wait_ms) => {
                    self.input_after(wait_ms, slot, Input::Captured(seal));
                    return;
                }
            }
        }
        let Some(engine) = &mut self.slots[slot].engine else {
            return;
        };
        let driver = &mut engine.driver;
        let Some(guest) = &driver.guest else { return };
        let state = guest.state;
        let epoch = driver.epoch;
        driver.epoch += 1;
        let outputs = std::mem::take(&mut driver.produced);
        let join = seal == Seal::JoinCut;
        let flush = join
            || driver
                .last_sealed
                .is_none_or(|last| self.history.flushed(last) != self.history.flushed(state))
            || seal == Seal::Final;
        driver.last_sealed = Some(state);
        if flushed {
            self.slots[slot].disk.durable = Some(state);
        }
        let leader_acked = engine.core.status().acked;
        if let Some(leading) = driver.leading.as_ref().filter(|leading| leading.live) {
            let (session, link) = (leading.session, leading.link);
            let parts = self.rng.range(1, 3) as u8;
            let bulk = Rc::new(Bulk {
                link,
                session,
                epoch,
                parts,
                join,
                state,
                flush,
                outputs,
                leader_acked,
            });
            for part in 0..parts {
                self.carry(slot, link, || Input::Bulk(bulk.clone(), part), true);
            }
        }
        self.log(|| format!("{slot}: seals epoch {epoch} ({seal:?}) with state {state}"));
        self.step(slot, Event::EpochSealed { epoch, seal });
        self.mutate_after_seal(slot, seal, epoch);
    }

    // ---- following

    pub(crate) fn bulk_arrives(&mut self, slot: usize, bulk: &Rc<Bulk>, part: u8) {
        let Some(engine) = &mut self.slots[slot].engine else {
            return;
        };
        let Some(following) = engine.driver.following.as_mut().filter(|f| f.session == bulk.session) else {
            return;
        };
        if following.next.is_some_and(|next| bulk.epoch < next) || following.next.is_none() && !bulk.join {
            // Epochs behind the join checkpoint may overtake it; keep them.
            if following.next.is_some() {
                return;
            }
        }
        if following.arrived.len() > 64 {
            return;
        }
        let (mask, _) = following.arrived.entry(bulk.epoch).or_insert((0, bulk.clone()));
        *mask |= 1 << part;
        self.stage_next(slot);
    }

    fn stage_next(&mut self, slot: usize) {
        let delay_ms = self.rng.range(1, 4);
        let partial_is_enough = [false, true].map(|join| self.mutated_partial_is_enough(join));
        let Some(engine) = &mut self.slots[slot].engine else {
            return;
        };
        let Some(following) = &mut engine.driver.following else {
            return;
        };
        if following.staging.is_some() {
            return;
        }
        let whole = |mask: u8, bulk: &Bulk| mask & ((1 << bulk.parts) - 1) == (1 << bulk.parts) - 1;
        let ready = following.arrived.iter().find(|(epoch, (mask, bulk))| {
            (whole(*mask, bulk) || partial_is_enough[usize::from(bulk.join)])
                && following.next.map_or(bulk.join, |next| next == **epoch)
        });
        let Some((epoch, (mask, bulk))) = ready.map(|(epoch, entry)| (*epoch, entry.clone())) else {
            return;
        };
        following.staging = Some((whole(mask, &bulk), bulk));
        let session = following.session;
        following.arrived = following.arrived.split_off(&(epoch + 1));
        self.input_after(delay_ms, slot, Input::Staged(session, epoch));
    }

    pub(crate) fn staged(&mut self, slot: usize, session: SessionId, epoch: Epoch) {
        let journals = self.mutated_journals();
        let engine = self.slots[slot].engine.as_ref();
        let following = engine.and_then(|engine| engine.driver.following.as_ref());
        let staging = following
            .filter(|following| following.session == session)
            .and_then(|following| following.staging.as_ref());
        let flush = staging.is_some_and(|(_, bulk)| bulk.flush);
        if flush && journals && !self.journal_flushes(slot, session, epoch) {
            return;
        }
        let Some(engine) = &mut self.slots[slot].engine else {
            return;
        };
        let driver = &mut engine.driver;
        let Some(following) = driver
            .following
            .as_mut()
            .filter(|following| following.session == session)
        else {
            return;
        };
        let Some((whole, bulk)) = following.staging.take() else {
            return;
        };
        following.next = Some(epoch + 1);
        let state = if whole {
            Some(bulk.state)
        } else {
            driver.checkpoint.map(|(_, state)| state)
        };
        let before = driver.checkpoint.filter(|_| !bulk.join);
        let staged = before.into_iter().chain(driver.checkpoints_before.drain(..));
        driver.checkpoints_before = staged.filter(|(staged, _)| *staged >= bulk.leader_acked).collect();
        driver.checkpoint = state.map(|state| (epoch, state));
        driver.stored_outputs.insert(epoch, bulk.outputs.clone());
        while driver.stored_outputs.len() > 16 {
            driver.stored_outputs.pop_first();
        }
        let disk = &mut self.slots[slot].disk;
        if bulk.join {
            disk.volatile = state;
            disk.durable = state;
        } else {
            // An epoch makes no disk whole.
            disk.volatile = disk.volatile.and(state);
            if bulk.flush && journals && !disk.unsure {
                disk.durable = disk.volatile;
            }
        }
        self.log(|| format!("{slot}: staged epoch {epoch} with state {state:?}"));
        self.step(
            slot,
            Event::EpochStaged {
                session,
                epoch,
                leader_acked: bulk.leader_acked,
            },
        );
        self.mutate_after_staging(slot, session, epoch);
        self.stage_next(slot);
    }
}
