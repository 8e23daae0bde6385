//! Where guest RAM lies in the guest's physical address space.
//!
//! ```text
//!   0 ─────────── low RAM ─────── 3 GiB ── MMIO, IOAPIC, LAPIC, KVM's own pages ── 4 GiB ─── high RAM ───
//! ```
//!
//! RAM pages are numbered from 0 without a gap ("gfn" everywhere in this program): page 0xC0000 is the one at 4 GiB.

use super::{MemoryError, PAGE_SIZE};

/// End of low RAM, begin of the hole.
pub const LOW_RAM_END: u64 = 0xC000_0000;
/// Begin of high RAM, end of the hole.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;
/// 32-bit MMIO that PCI devices are placed in.
pub const PCI_MMIO_START: u64 = LOW_RAM_END;
/// End of the 32-bit MMIO of PCI devices; the IOAPIC is next.
pub const PCI_MMIO_END: u64 = 0xFEC0_0000;
/// Least RAM: a kernel is loaded at 1 MiB.
pub const MIN_RAM_BYTES: u64 = 2 << 20;
/// Most RAM: page numbers have to fit 32 bits with room to spare.
pub const MAX_RAM_BYTES: u64 = 4 << 40;

/// A range of guest RAM and the pages it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRegion {
    /// Guest physical address of the first byte.
    pub gpa: u64,
    /// Length in bytes, a multiple of the page size.
    pub size_bytes: u64,
    /// Number of the first page; `PAGE_SIZE` times this is the offset in the memfd.
    pub first_page: u32,
}

/// Placement of a given amount of RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryLayout {
    size_bytes: u64,
}

impl MemoryLayout {
    /// Checks the size: whole pages, within [`MIN_RAM_BYTES`] and [`MAX_RAM_BYTES`].
    pub fn new(size_bytes: u64) -> Result<Self, MemoryError> {
        if !size_bytes.is_multiple_of(PAGE_SIZE as u64) || !(MIN_RAM_BYTES..=MAX_RAM_BYTES).contains(&size_bytes) {
            return Err(MemoryError::Size { size_bytes });
        }
        Ok(Self { size_bytes })
    }

    /// All RAM in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Number of RAM pages.
    pub fn pages(&self) -> u32 {
        (self.size_bytes / PAGE_SIZE as u64) as u32
    }

    /// One region, or two if RAM reaches beyond the hole.
    pub fn regions(&self) -> impl Iterator<Item = RamRegion> {
        let low = self.size_bytes.min(LOW_RAM_END);
        let high = self.size_bytes - low;
        let first_high = (low / PAGE_SIZE as u64) as u32;
        [
            RamRegion {
                gpa: 0,
                size_bytes: low,
                first_page: 0,
            },
            RamRegion {
                gpa: HIGH_RAM_START,
                size_bytes: high,
                first_page: first_high,
            },
        ]
        .into_iter()
        .filter(|region| region.size_bytes > 0)
    }

    /// Guest physical address of a RAM page.
    pub fn gpa_of(&self, page: u32) -> Option<u64> {
        let offset = u64::from(page) * PAGE_SIZE as u64;
        if offset >= self.size_bytes {
            return None;
        }
        Some(if offset < LOW_RAM_END {
            offset
        } else {
            offset - LOW_RAM_END + HIGH_RAM_START
        })
    }

    /// Number of the RAM page that holds a guest physical address; `None` outside RAM.
    pub fn page_of(&self, gpa: u64) -> Option<u32> {
        let offset = match gpa {
            0..LOW_RAM_END => gpa,
            HIGH_RAM_START.. => gpa - HIGH_RAM_START + LOW_RAM_END,
            _ => return None,
        };
        (offset < self.size_bytes).then_some((offset / PAGE_SIZE as u64) as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_checked() {
        for bad in [0, 4096, (2 << 20) + 1, MAX_RAM_BYTES + 4096] {
            assert!(matches!(MemoryLayout::new(bad), Err(MemoryError::Size { .. })), "{bad}");
        }
    }

    #[test]
    fn pages_and_addresses_are_inverse_on_both_sides_of_the_hole() {
        let layout = MemoryLayout::new(5 << 30).expect("size");
        assert_eq!(layout.regions().count(), 2);
        assert_eq!(layout.regions().map(|region| region.size_bytes).sum::<u64>(), 5 << 30);
        for page in [0, 1, 0xB_FFFF, 0xC_0000, 0xC_0001, layout.pages() - 1] {
            let gpa = layout.gpa_of(page).expect("RAM");
            assert_eq!(layout.page_of(gpa), Some(page));
            assert_eq!(layout.page_of(gpa + 4095), Some(page));
        }
        assert_eq!(layout.gpa_of(0xC_0000), Some(HIGH_RAM_START));
        for outside in [LOW_RAM_END, HIGH_RAM_START - 1, HIGH_RAM_START + (2 << 30)] {
            assert_eq!(layout.page_of(outside), None);
        }
        assert_eq!(layout.gpa_of(layout.pages()), None);
    }
}
