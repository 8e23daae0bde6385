//! A guest of a few hundred bytes for tests: it works in user mode, driven by timer interrupts, and checks itself.
//!
//! Its loop counts, writes the count and its complement to pages of a working set (and checks what it finds there),
//! keeps the count in an SSE register as well, checks that the TSC never steps back, and now and then writes the count
//! to a port and reads it back plus one. What does not hold it reports at [`FAIL_PORT`] and stops.

use crate::devices::bus::{BusDevice, Buses};
use crate::memory::GuestRam;
use std::arch::global_asm;
use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use vm_memory::{Bytes, GuestAddress};

/// Where the guest is loaded.
const LOAD_ADDRESS: u64 = 0x10_0000;
/// Where the guest finds its [`Setup`] (its working set is at 4 MiB), and keeps its counters.
const SETUP_ADDRESS: u64 = 0x20_0000;
const TICKS_ADDRESS: u64 = 0x20_1000;
const COUNT_ADDRESS: u64 = 0x20_1008;
/// RAM page of the counters.
pub const COUNTERS_PAGE: u32 = 0x201;
/// The guest writes its count here, and reads it plus one.
pub const ECHO_PORT: u64 = 0x500;
/// The guest writes what went wrong here.
pub const FAIL_PORT: u64 = 0x504;

global_asm!(
    ".pushsection .rodata.ftvm_test_guest, \"a\", @progbits",
    ".balign 4096",
    "ftvm_test_guest_start:",
    ".set LOAD, 0x100000",
    ".code32",
    // Long mode, with everything up to 1 GiB mapped for user mode.
    // LGDT of an address that Intel's syntax has no words for; likewise below.
    ".byte 0x0F, 0x01, 0x15",
    ".long (ftg_gdt_pointer - ftvm_test_guest_start) + LOAD",
    ".byte 0xB8", // MOV EAX
    ".long (ftg_pml4 - ftvm_test_guest_start) + LOAD",
    "mov cr3, eax",
    "mov eax, 0x620", // PAE, OSFXSR, OSXMMEXCPT
    "mov cr4, eax",
    "mov ecx, 0xC0000080",
    "mov eax, 0x100",
    "xor edx, edx",
    "wrmsr",
    "mov eax, 0x80000013", // PG, ET, MP, PE
    "mov cr0, eax",
    // A far jump to selector 8.
    ".byte 0xEA",
    ".long (ftg_long - ftvm_test_guest_start) + LOAD",
    ".word 0x08",
    ".code64",
    "ftg_long:",
    "mov eax, 0x10",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "mov rsp, 0x203000",
    "mov eax, 0x28",
    "ltr ax",
    ".byte 0x0F, 0x01, 0x1C, 0x25", // LIDT
    ".long (ftg_idt_pointer - ftvm_test_guest_start) + LOAD",
    // PICs: vectors from 0x20 and 0x28, only the timer unmasked.
    "mov al, 0x11",
    "out 0x20, al",
    "out 0xA0, al",
    "mov al, 0x20",
    "out 0x21, al",
    "mov al, 0x28",
    "out 0xA1, al",
    "mov al, 4",
    "out 0x21, al",
    "mov al, 2",
    "out 0xA1, al",
    "mov al, 1",
    "out 0x21, al",
    "out 0xA1, al",
    "mov al, 0xFE",
    "out 0x21, al",
    "mov al, 0xFF",
    "out 0xA1, al",
    // PIT channel 0: mode 2, 1193 counts.
    "mov al, 0x34",
    "out 0x43, al",
    "mov al, 0xA9",
    "out 0x40, al",
    "mov al, 0x04",
    "out 0x40, al",
    // User mode with interrupts; its ports are free by the map in the TSS.
    "push 0x23",
    "push 0x203F00",
    "push 0x202",
    "push 0x1B",
    "lea rax, [rip + ftg_user]",
    "push rax",
    "iretq",
    "ftg_timer:",
    "push rax",
    "inc qword ptr [0x201000]",
    "mov al, 0x20",
    "out 0x20, al",
    "pop rax",
    "iretq",
    "ftg_user:",
    "mov r14, [0x200000]", // number of pages less one (a mask)
    "mov r15, [0x200008]", // port access every so many rounds less one (a mask)
    "xor r12, r12",
    "xor r13, r13",
    "pxor xmm0, xmm0",
    "mov eax, 1",
    "movq xmm1, rax",
    "ftg_loop:",
    "inc r12",
    "paddq xmm0, xmm1",
    "mov [0x201008], r12",
    // A page by a multiplicative hash of the count.
    "mov rax, r12",
    "imul rax, rax, 0x1E3779B1",
    "shr rax, 12",
    "and rax, r14",
    "shl rax, 12",
    "lea rdi, [rax + 0x400000]",
    "mov rbx, [rdi]",
    "mov rcx, [rdi + 8]",
    "mov esi, 1",
    "test rcx, rcx",
    "jz ftg_fresh",
    "not rcx",
    "cmp rbx, rcx",
    "jne ftg_fail",
    "ftg_fresh:",
    "mov [rdi], r12",
    "mov rcx, r12",
    "not rcx",
    "mov [rdi + 8], rcx",
    "mov esi, 2",
    "movq rax, xmm0",
    "cmp rax, r12",
    "jne ftg_fail",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "mov esi, 3",
    "cmp rax, r13",
    "jb ftg_fail",
    "mov r13, rax",
    "test r12, r15",
    "jnz ftg_loop",
    "mov edx, 0x500",
    "mov eax, r12d",
    "out dx, eax",
    "in eax, dx",
    "dec eax",
    "mov esi, 4",
    "cmp eax, r12d",
    "je ftg_loop",
    "ftg_fail:",
    "mov edx, 0x504",
    "mov eax, esi",
    "out dx, eax",
    "jmp ftg_fail",
    ".balign 16",
    "ftg_gdt:",
    ".quad 0",
    ".quad 0x00AF9B000000FFFF", // 0x08 code
    ".quad 0x00CF93000000FFFF", // 0x10 data
    ".quad 0x00AFFB000000FFFF", // 0x18 user code
    ".quad 0x00CFF3000000FFFF", // 0x20 user data
    // 0x28 TSS
    ".word ftg_tss_end - ftg_tss - 1",
    ".word ((ftg_tss - ftvm_test_guest_start) + LOAD) & 0xFFFF",
    ".byte (((ftg_tss - ftvm_test_guest_start) + LOAD) >> 16) & 0xFF",
    ".byte 0x89, 0, 0",
    ".quad 0",
    "ftg_gdt_pointer:",
    ".word 55",
    ".quad (ftg_gdt - ftvm_test_guest_start) + LOAD",
    ".balign 16",
    "ftg_tss:",
    ".long 0",
    ".quad 0x203000", // stack of ring 0
    ".rept 22",
    ".long 0",
    ".endr",
    ".word 0, 0x68", // ports up to 0x5FF are free for user mode
    ".rept 0xC0",
    ".byte 0",
    ".endr",
    ".byte 0xFF",
    "ftg_tss_end:",
    "ftg_idt_pointer:",
    ".word 0x20F",
    ".quad (ftg_idt - ftvm_test_guest_start) + LOAD",
    ".balign 16",
    "ftg_idt:",
    ".rept 64",
    ".quad 0",
    ".endr",
    // Vector 0x20.
    ".word ((ftg_timer - ftvm_test_guest_start) + LOAD) & 0xFFFF",
    ".word 8",
    ".word 0x8E00",
    ".word ((ftg_timer - ftvm_test_guest_start) + LOAD) >> 16",
    ".quad 0",
    ".balign 4096",
    "ftg_pml4:",
    ".quad ((ftg_pdpt - ftvm_test_guest_start) + LOAD) + 7",
    ".balign 4096",
    "ftg_pdpt:",
    ".quad ((ftg_pd - ftvm_test_guest_start) + LOAD) + 7",
    ".balign 4096",
    "ftg_pd:",
    ".set ftg_page, 0x87",
    ".rept 512",
    ".quad ftg_page",
    ".set ftg_page, ftg_page + 0x200000",
    ".endr",
    "ftvm_test_guest_end:",
    ".popsection",
);

// SAFETY: the assembly above defines both labels, in this order; only what lies between them is read.
unsafe extern "C" {
    static ftvm_test_guest_start: u8;
    static ftvm_test_guest_end: u8;
}

/// The guest as a PVH ELF kernel.
pub fn kernel() -> File {
    let code = {
        // SAFETY: both are labels of one section; the bytes between are constant.
        unsafe {
            let start = &raw const ftvm_test_guest_start;
            std::slice::from_raw_parts(start, (&raw const ftvm_test_guest_end).offset_from(start) as usize)
        }
    };
    file_with(&elf(code, LOAD_ADDRESS, Some(LOAD_ADDRESS as u32)))
}

/// An unnamed file with this content.
pub fn file_with(content: &[u8]) -> File {
    let fd = rustix::fs::memfd_create(c"test", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
    let mut file = File::from(fd);
    file.write_all(content).expect("write");
    file
}

/// An ELF file with one segment, and with a PVH note if there is an entry.
pub fn elf(code: &[u8], address: u64, entry: Option<u32>) -> Vec<u8> {
    let note: Vec<u8> = match entry {
        Some(entry) => [4u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), entry]
            .iter()
            .flat_map(|w| w.to_le_bytes())
            .collect(),
        None => Vec::new(),
    };
    let code_at = 64 + 2 * 56 + note.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2u16, 62].iter().flat_map(|half| half.to_le_bytes()));
    file.extend(1u32.to_le_bytes());
    file.extend([address, 64, 0].iter().flat_map(|word| word.to_le_bytes()));
    file.extend(0u32.to_le_bytes());
    file.extend([64u16, 56, 2, 0, 0, 0].iter().flat_map(|half| half.to_le_bytes()));
    let mut header = |kind: u32, words: [u64; 6]| {
        file.extend(kind.to_le_bytes());
        file.extend(7u32.to_le_bytes());
        file.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    };
    let length = code.len() as u64;
    header(1, [code_at, address, address, length, length + 0x1000, 0x1000]);
    header(4, [64 + 2 * 56, 0, 0, note.len() as u64, note.len() as u64, 4]);
    file.extend(&note);
    file.extend(code);
    file
}

/// What the guest does.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    /// Pages of the working set, a power of two.
    pub pages: u64,
    /// Rounds between two port accesses, a power of two.
    pub rounds_per_access: u64,
}

impl Setup {
    /// Writes it where the guest looks.
    pub fn write(&self, ram: &GuestRam) {
        let words = [self.pages - 1, self.rounds_per_access - 1];
        for (index, word) in words.into_iter().enumerate() {
            ram.mem()
                .write_obj(word, GuestAddress(SETUP_ADDRESS + 8 * index as u64))
                .expect("RAM");
        }
    }
}

/// Rounds that the guest has made.
pub fn count(ram: &GuestRam) -> u64 {
    ram.mem().read_obj(GuestAddress(COUNT_ADDRESS)).expect("RAM")
}

/// Timer interrupts that the guest has taken.
pub fn ticks(ram: &GuestRam) -> u64 {
    ram.mem().read_obj(GuestAddress(TICKS_ADDRESS)).expect("RAM")
}

/// The device that the guest talks to.
#[derive(Debug, Default)]
pub struct Port {
    last: u32,
    seen: Arc<PortSeen>,
}

/// What the guest said.
#[derive(Debug, Default)]
pub struct PortSeen {
    /// Number of port accesses.
    pub accesses: AtomicU64,
    /// What went wrong in the guest; 0 if nothing did.
    pub failure: AtomicU64,
}

impl Port {
    /// Puts the device on the bus.
    pub fn plug_in(buses: &Buses) -> (Arc<Mutex<Self>>, Arc<PortSeen>) {
        let port = Self::default();
        let seen = port.seen.clone();
        let port = Arc::new(Mutex::new(port));
        buses.pio.insert(ECHO_PORT, 8, port.clone()).expect("free");
        (port, seen)
    }

    /// The device's state.
    pub fn last(&self) -> u32 {
        self.last
    }

    /// Loads the device's state.
    pub fn set_last(&mut self, last: u32) {
        self.last = last;
    }
}

impl BusDevice for Port {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        self.seen.accesses.fetch_add(1, Ordering::Relaxed);
        data.copy_from_slice(&self.last.wrapping_add(1).to_le_bytes()[..data.len()]);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        bytes[..data.len()].copy_from_slice(data);
        if offset == FAIL_PORT - ECHO_PORT {
            self.seen
                .failure
                .store(u32::from_le_bytes(bytes).into(), Ordering::Relaxed);
        } else {
            self.last = u32::from_le_bytes(bytes);
        }
    }
}
