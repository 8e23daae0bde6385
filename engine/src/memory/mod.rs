//! Guest RAM: one memfd, mapped shared, with every write of this program tracked.

mod dirty;
mod layout;
mod tracker;

pub use dirty::DirtyPages;
pub use layout::{
    HIGH_RAM_START, LOW_RAM_END, MAX_RAM_BYTES, MIN_RAM_BYTES, MemoryLayout, PCI_MMIO_END, PCI_MMIO_START, RamRegion,
};
pub use tracker::{DirtyMap, TrackerSlice, WriteTracker};

use rustix::fs::{MemfdFlags, SealFlags};
use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use thiserror::Error;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

/// Size of a page of guest RAM and of everything that is tracked or sent.
pub const PAGE_SIZE: usize = 4096;

/// Guest memory as `vm-memory` sees it; writes through it are tracked.
pub type GuestMem = GuestMemoryMmap<WriteTracker>;

/// Why there is no guest RAM.
#[derive(Debug, Error)]
#[allow(missing_docs)] // the texts say it
pub enum MemoryError {
    #[error(
        "guest memory: {size_bytes} bytes can't be given to a guest: choose a multiple of 4096 between {MIN_RAM_BYTES} and {MAX_RAM_BYTES}"
    )]
    Size { size_bytes: u64 },
    #[error(
        "guest memory: {} MiB were asked for, this host has {} MiB in all: give the guest less or the host more",
        size_bytes >> 20, host_bytes >> 20
    )]
    MoreThanHost { size_bytes: u64, host_bytes: u64 },
    #[error("guest memory: the host refuses {} MiB ({what}): free memory on it or give the guest less", size_bytes >> 20)]
    Refused {
        size_bytes: u64,
        what: &'static str,
        source: io::Error,
    },
    #[error("guest memory: there is no page {page}, RAM has {pages} pages")]
    NoSuchPage { page: u32, pages: u32 },
}

/// The RAM of one guest.
#[derive(Debug)]
pub struct GuestRam {
    mem: GuestMem,
    layout: MemoryLayout,
    written: Arc<DirtyMap>,
    memfd: Arc<File>,
}

impl GuestRam {
    /// Makes `size_bytes` of zeroed RAM. With `prefault` every page is allocated now, so that the cgroup of this process
    /// is charged before the guest runs and no page fault meets a full host.
    pub fn new(size_bytes: u64, prefault: bool) -> Result<Self, MemoryError> {
        let layout = MemoryLayout::new(size_bytes)?;
        let host_bytes = host_ram_bytes();
        if size_bytes > host_bytes {
            return Err(MemoryError::MoreThanHost { size_bytes, host_bytes });
        }
        let refused = |what| {
            move |source: io::Error| MemoryError::Refused {
                size_bytes,
                what,
                source,
            }
        };
        let fd = rustix::fs::memfd_create(c"ftvm-guest-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(|errno| refused("memfd_create")(errno.into()))?;
        let memfd = File::from(fd);
        memfd.set_len(size_bytes).map_err(refused("ftruncate"))?;
        // Nobody who is given the descriptor may shrink it under the mapping.
        rustix::fs::fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(|errno| refused("seal")(errno.into()))?;
        if prefault {
            rustix::fs::fallocate(&memfd, rustix::fs::FallocateFlags::empty(), 0, size_bytes)
                .map_err(|errno| refused("fallocate")(errno.into()))?;
        }
        let memfd = Arc::new(memfd);
        let written = Arc::new(DirtyMap::new(layout.pages()));
        let regions = layout
            .regions()
            .map(|region| map_region(&memfd, &written, region).map_err(refused("mmap")))
            .collect::<Result<Vec<_>, _>>()?;
        let mem = GuestMem::from_regions(regions).expect("the layout's regions are ordered and do not overlap");
        let ram = Self {
            mem,
            layout,
            written,
            memfd,
        };
        if prefault {
            ram.populate().map_err(refused("populate"))?;
        }
        Ok(ram)
    }

    /// Memory for devices.
    pub fn mem(&self) -> &GuestMem {
        &self.mem
    }

    /// Placement and page numbers.
    pub fn layout(&self) -> &MemoryLayout {
        &self.layout
    }

    /// Number of RAM pages.
    pub fn pages(&self) -> u32 {
        self.layout.pages()
    }

    /// The file that holds the RAM; page `n` begins at `n * PAGE_SIZE`.
    pub fn memfd(&self) -> &Arc<File> {
        &self.memfd
    }

    /// Marks of this program's writes.
    pub fn written(&self) -> &DirtyMap {
        &self.written
    }

    /// Address of a page in this process, valid as long as `self`. The guest may change the content at any time: go
    /// through raw pointers or volatile access, never through a reference.
    pub fn page_ptr(&self, page: u32) -> Result<NonNull<u8>, MemoryError> {
        let missing = MemoryError::NoSuchPage {
            page,
            pages: self.pages(),
        };
        let gpa = self.layout.gpa_of(page).ok_or(missing)?;
        let pointer = self
            .mem
            .get_host_address(GuestAddress(gpa))
            .expect("every page of the layout is mapped");
        Ok(NonNull::new(pointer).expect("a mapping is never at zero"))
    }

    /// Copies a page out.
    pub fn read_page(&self, page: u32, into: &mut [u8; PAGE_SIZE]) -> Result<(), MemoryError> {
        let from = self.page_ptr(page)?;
        // SAFETY: both are PAGE_SIZE bytes and do not overlap; a concurrent write by the guest can tear the content,
        // which dirty tracking then reports.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into.as_mut_ptr(), PAGE_SIZE) };
        Ok(())
    }

    /// Copies a page in *without* marking it: for memory that comes from the peer.
    pub fn write_page(&self, page: u32, from: &[u8; PAGE_SIZE]) -> Result<(), MemoryError> {
        let into = self.page_ptr(page)?;
        // SAFETY: both are PAGE_SIZE bytes and do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into.as_ptr(), PAGE_SIZE) };
        Ok(())
    }

    /// Regions with their addresses in this process, for KVM's memory slots.
    pub fn mappings(&self) -> impl Iterator<Item = (RamRegion, u64)> + '_ {
        self.layout
            .regions()
            .zip(self.mem.iter())
            .map(|(region, mapping)| (region, mapping.as_ptr() as u64))
    }

    /// Makes the page tables of the whole mapping, which also shows now whether the host can back it.
    fn populate(&self) -> io::Result<()> {
        for mapping in self.mem.iter() {
            // SAFETY: the range is exactly one mapping that we own; populating changes no content.
            let result = unsafe {
                libc::madvise(
                    mapping.as_ptr().cast(),
                    mapping.len() as usize,
                    libc::MADV_POPULATE_WRITE,
                )
            };
            if result != 0 {
                let error = io::Error::last_os_error();
                // Kernels before 5.14 do not know it; the pages are allocated, only faulted in later.
                if error.raw_os_error() != Some(libc::EINVAL) {
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}

fn map_region(
    memfd: &Arc<File>,
    written: &Arc<DirtyMap>,
    region: RamRegion,
) -> io::Result<GuestRegionMmap<WriteTracker>> {
    let offset = u64::from(region.first_page) * PAGE_SIZE as u64;
    let mapping = MmapRegionBuilder::new_with_bitmap(
        region.size_bytes as usize,
        WriteTracker::new(written.clone(), offset as usize),
    )
    .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
    .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
    .with_file_offset(FileOffset::from_arc(memfd.clone(), offset))
    .build()
    .map_err(io::Error::other)?;
    Ok(
        GuestRegionMmap::new(mapping, GuestAddress(region.gpa))
            .expect("the layout does not reach the end of addresses"),
    )
}

/// All memory of this host, sysinfo(2).
fn host_ram_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    (info.totalram as u64).saturating_mul(u64::from(info.mem_unit))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn writes_through_vm_memory_are_tracked_and_peer_pages_are_not() {
        let ram = GuestRam::new(4 << 20, true).expect("RAM");
        ram.mem().write_obj(7u64, GuestAddress(0x3FFC)).expect("write");
        ram.write_page(9, &[1; PAGE_SIZE]).expect("page");
        let mut dirty = DirtyPages::new(ram.pages());
        ram.written().collect(&mut dirty);
        dirty.sort();
        assert_eq!(dirty.iter().collect::<Vec<_>>(), [3, 4]);
        let mut page = [0; PAGE_SIZE];
        ram.read_page(9, &mut page).expect("page");
        assert_eq!(page, [1; PAGE_SIZE]);
        assert!(matches!(
            ram.page_ptr(1024),
            Err(MemoryError::NoSuchPage {
                page: 1024,
                pages: 1024
            })
        ));
    }

    #[test]
    fn pages_beyond_the_hole_are_tracked_by_number() {
        let ram = GuestRam::new((3 << 30) + (2 << 20), false).expect("RAM");
        ram.mem()
            .write_obj(7u8, GuestAddress(HIGH_RAM_START + 5000))
            .expect("write");
        assert!(ram.written().is_marked(0xC_0001));
        let pointer = ram.page_ptr(0xC_0001).expect("page");
        // SAFETY: offset 904 lies in that page.
        assert_eq!(unsafe { pointer.as_ptr().add(904).read() }, 7);
    }

    #[test]
    fn more_memory_than_the_host_has_is_refused() {
        let error = GuestRam::new(MAX_RAM_BYTES, false).expect_err("no host has 4 TiB here");
        let text = error.to_string();
        assert!(
            text.contains("this host has") && text.contains("give the guest less"),
            "{text}"
        );
    }
}
