//! What the guest is told about its memory.

use super::acpi;
use crate::memory::{HIGH_RAM_START, MemoryLayout};

/// End of conventional memory; what follows up to 1 MiB belongs to firmware.
const CONVENTIONAL_END: u64 = 0x9_FC00;
const ONE_MIB: u64 = 0x10_0000;
/// KVM's own pages for Intel's real mode, see `kvm::vm`.
const KVM_PAGES: (u64, u64) = (0xFFFB_C000, 0xFFFC_0000);

/// Use of a range, numbered as in BIOS call E820 and in PVH's memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum RangeKind {
    /// RAM that the guest may use.
    Ram = 1,
    /// Not to be touched.
    Reserved = 2,
}

/// A range of guest physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRange {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub size_bytes: u64,
    /// Its use.
    pub kind: RangeKind,
}

/// All ranges, ascending.
pub fn memory_map(layout: &MemoryLayout) -> Vec<MemoryRange> {
    let range = |start, end, kind| MemoryRange {
        start,
        size_bytes: end - start,
        kind,
    };
    let mut ranges = vec![
        range(0, CONVENTIONAL_END, RangeKind::Ram),
        range(CONVENTIONAL_END, acpi::TABLES_END.max(ONE_MIB), RangeKind::Reserved),
    ];
    for region in layout.regions() {
        let start = region.gpa.max(ONE_MIB);
        if start >= HIGH_RAM_START {
            ranges.push(range(KVM_PAGES.0, KVM_PAGES.1, RangeKind::Reserved));
        }
        ranges.push(range(start, region.gpa + region.size_bytes, RangeKind::Ram));
    }
    if ranges.last().is_some_and(|last| last.start < KVM_PAGES.0) {
        ranges.push(range(KVM_PAGES.0, KVM_PAGES.1, RangeKind::Reserved));
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_ascend_without_overlap_and_contain_the_ram() {
        for size in [64 << 20, 3 << 30, 5 << 30] {
            let map = memory_map(&MemoryLayout::new(size).expect("size"));
            assert!(
                map.windows(2)
                    .all(|pair| pair[0].start + pair[0].size_bytes <= pair[1].start),
                "{map:x?}"
            );
            let ram: u64 = map
                .iter()
                .filter(|range| range.kind == RangeKind::Ram)
                .map(|range| range.size_bytes)
                .sum();
            assert_eq!(ram, size - (ONE_MIB - CONVENTIONAL_END));
        }
    }
}
