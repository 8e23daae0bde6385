//! MSI-X (PCI Local Bus 3.0, section 6.8.2): a table of messages and one pending bit for each.

use serde::{Deserialize, Serialize};

use crate::devices::irq::MsiSender;

/// Bytes of one table entry.
pub const ENTRY_BYTES: u64 = 16;
/// Message control: MSI-X is on.
pub const CONTROL_ENABLE: u16 = 1 << 15;
/// Message control: all vectors are masked.
pub const CONTROL_MASK_ALL: u16 = 1 << 14;

const VECTOR_MASKED: u32 = 1;

/// One message and its mask bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Where the message is written.
    pub address: u64,
    /// What is written.
    pub data: u32,
    /// Bit 0 masks the vector.
    pub control: u32,
}

const RESET_ENTRY: Entry = Entry {
    address: 0,
    data: 0,
    control: VECTOR_MASKED,
};

/// Table and pending bits of one function. Whether MSI-X is enabled and masked as a whole stands in the configuration
/// space and is passed in as `control`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msix {
    entries: Vec<Entry>,
    pending: u64,
}

impl Msix {
    /// A table of `vectors` masked messages; 1 to 64.
    pub fn new(vectors: usize) -> Self {
        assert!((1..=64).contains(&vectors), "an MSI-X table here has 1 to 64 vectors");
        Self {
            entries: vec![RESET_ENTRY; vectors],
            pending: 0,
        }
    }

    /// Number of vectors.
    pub fn vectors(&self) -> usize {
        self.entries.len()
    }

    /// Whether this is a state that a table of `vectors` entries can be in.
    pub fn is_sound(&self, vectors: usize) -> bool {
        self.entries.len() == vectors
            && (vectors == 64 || self.pending >> vectors == 0)
            && self
                .entries
                .iter()
                .all(|entry| entry.address % 4 == 0 && entry.control & !VECTOR_MASKED == 0)
    }

    /// A guest read of the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let Some(entry) = self.entries.get((offset / ENTRY_BYTES) as usize) else {
            return data.fill(0);
        };
        let mut raw = [0; ENTRY_BYTES as usize];
        raw[0..8].copy_from_slice(&entry.address.to_le_bytes());
        raw[8..12].copy_from_slice(&entry.data.to_le_bytes());
        raw[12..16].copy_from_slice(&entry.control.to_le_bytes());
        read_image(&raw, (offset % ENTRY_BYTES) as usize, data);
    }

    /// A guest write to the table, of 4 or 8 aligned bytes; others are dropped. A vector that becomes unmasked delivers
    /// what is pending.
    pub fn write_table(&mut self, offset: u64, data: &[u8], control: u16, msi: &dyn MsiSender) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let vector = (offset / ENTRY_BYTES) as usize;
        let Some(entry) = self.entries.get_mut(vector) else {
            return;
        };
        for (at, chunk) in (offset % ENTRY_BYTES..).step_by(4).zip(data.chunks_exact(4)) {
            let value = u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
            match at {
                0 => entry.address = entry.address & !0xffff_ffff | u64::from(value & !3),
                4 => entry.address = entry.address & 0xffff_ffff | u64::from(value) << 32,
                8 => entry.data = value,
                _ => entry.control = value & VECTOR_MASKED,
            }
        }
        self.deliver_pending(control, msi);
    }

    /// A guest read of the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        read_image(&self.pending.to_le_bytes(), offset as usize, data);
    }

    /// The message control register changed: delivers what is pending and no longer masked.
    pub fn deliver_pending(&mut self, control: u16, msi: &dyn MsiSender) {
        if control & CONTROL_ENABLE == 0 || control & CONTROL_MASK_ALL != 0 {
            return;
        }
        for (vector, entry) in self.entries.iter().enumerate() {
            let bit = 1u64 << vector;
            if self.pending & bit != 0 && entry.control & VECTOR_MASKED == 0 {
                self.pending &= !bit;
                msi.send(entry.address, entry.data);
            }
        }
    }

    /// The device raises `vector`; a vector that does not exist (0xffff: none) is dropped.
    pub fn raise(&mut self, vector: u16, control: u16, msi: &dyn MsiSender) {
        let Some(entry) = self.entries.get(usize::from(vector)) else {
            return;
        };
        if control & CONTROL_ENABLE == 0 {
            return;
        }
        if control & CONTROL_MASK_ALL != 0 || entry.control & VECTOR_MASKED != 0 {
            self.pending |= 1 << vector;
        } else {
            msi.send(entry.address, entry.data);
        }
    }
}

/// Copies from a register image; beyond its end there are zeroes.
fn read_image(image: &[u8], offset: usize, data: &mut [u8]) {
    for (at, byte) in (offset..).zip(data) {
        *byte = image.get(at).copied().unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Sent(Mutex<Vec<(u64, u32)>>);

    impl MsiSender for Sent {
        fn send(&self, address: u64, data: u32) {
            self.0.lock().unwrap().push((address, data));
        }
    }

    impl Sent {
        fn take(&self) -> Vec<(u64, u32)> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    const ON: u16 = CONTROL_ENABLE;

    fn program(msix: &mut Msix, vector: u64, data: u32, control: u32, sent: &Sent) {
        let at = vector * ENTRY_BYTES;
        msix.write_table(at, &0xfee0_0000u64.to_le_bytes(), ON, sent);
        msix.write_table(at + 8, &data.to_le_bytes(), ON, sent);
        msix.write_table(at + 12, &control.to_le_bytes(), ON, sent);
    }

    #[test]
    fn an_unmasked_vector_is_sent_and_a_masked_one_waits() {
        let (sent, mut msix) = (Sent::default(), Msix::new(3));
        program(&mut msix, 1, 0x41, 0, &sent);
        msix.raise(1, ON, &sent);
        assert_eq!(sent.take(), [(0xfee0_0000, 0x41)]);

        program(&mut msix, 1, 0x41, 1, &sent);
        msix.raise(1, ON, &sent);
        msix.raise(1, ON, &sent);
        assert_eq!(sent.take(), []);
        let mut pending = [0; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending[0], 2);
        program(&mut msix, 1, 0x42, 0, &sent);
        assert_eq!(sent.take(), [(0xfee0_0000, 0x42)], "once, with the data of now");
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [0; 8]);
    }

    #[test]
    fn the_function_mask_holds_everything_back() {
        let (sent, mut msix) = (Sent::default(), Msix::new(2));
        program(&mut msix, 0, 1, 0, &sent);
        program(&mut msix, 1, 2, 0, &sent);
        msix.raise(0, ON | CONTROL_MASK_ALL, &sent);
        msix.raise(1, ON | CONTROL_MASK_ALL, &sent);
        msix.deliver_pending(ON | CONTROL_MASK_ALL, &sent);
        assert_eq!(sent.take(), []);
        msix.deliver_pending(ON, &sent);
        assert_eq!(sent.take(), [(0xfee0_0000, 1), (0xfee0_0000, 2)]);
        msix.deliver_pending(ON, &sent);
        assert_eq!(sent.take(), []);
    }

    #[test]
    fn nothing_is_sent_or_kept_while_msix_is_off_or_the_vector_does_not_exist() {
        let (sent, mut msix) = (Sent::default(), Msix::new(2));
        program(&mut msix, 0, 1, 0, &sent);
        msix.raise(0, 0, &sent);
        msix.raise(2, ON, &sent);
        msix.raise(0xffff, ON, &sent);
        msix.deliver_pending(ON, &sent);
        assert_eq!(sent.take(), []);
        let before = msix.clone();
        msix.write_table(32, &[0xff; 4], ON, &sent);
        msix.write_table(1, &[0xff; 4], ON, &sent);
        msix.write_table(0, &[0xff; 2], ON, &sent);
        assert_eq!(msix, before);
    }

    #[test]
    fn the_table_reads_back_and_impossible_states_are_refused() {
        let (sent, mut msix) = (Sent::default(), Msix::new(2));
        program(&mut msix, 1, 0xabcd, 0xffff_ffff, &sent);
        let mut data = [0; 8];
        msix.read_table(ENTRY_BYTES + 8, &mut data);
        assert_eq!(data, [0xcd, 0xab, 0, 0, 1, 0, 0, 0]);
        assert!(msix.is_sound(2) && !msix.is_sound(3));
        let wrong = Msix {
            pending: 1 << 2,
            ..msix.clone()
        };
        assert!(!wrong.is_sound(2));
    }
}
