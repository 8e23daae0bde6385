//! What is loaded where, and what is refused with which words.

use super::*;
use crate::machine::test_guest::{elf, file_with, kernel};

const RAM_BYTES: u64 = 64 << 20;

fn ram() -> GuestRam {
    GuestRam::new(RAM_BYTES, false).expect("RAM")
}

fn source(kernel: File) -> BootSource {
    BootSource {
        kernel,
        initrd: None,
        cmdline: "console=ttyS0".into(),
        kernel_name: "/boot/kernel".into(),
        initrd_name: "/boot/initrd".into(),
    }
}

fn read_u32(ram: &GuestRam, address: u64) -> u32 {
    ram.mem().read_obj(GuestAddress(address)).expect("RAM")
}

fn read_u64(ram: &GuestRam, address: u64) -> u64 {
    ram.mem().read_obj(GuestAddress(address)).expect("RAM")
}

/// A bzImage's header as Linux 6 has it, with a "kernel" of `kernel_bytes` bytes of 0x90.
fn bzimage(kernel_bytes: usize) -> Vec<u8> {
    let mut image = vec![0; 5 * 512];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1F1, &[4]);
    put(0x202, b"HdrS");
    put(0x206, &0x020Fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22C, &0x7FFF_FFFFu32.to_le_bytes());
    put(0x236, &0x3Fu16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x20_0000u32.to_le_bytes());
    image.resize(image.len() + kernel_bytes, 0x90);
    image
}

#[test]
fn a_bzimage_is_loaded_by_the_64_bit_protocol() {
    let ram = ram();
    let mut source = source(file_with(&bzimage(10_000)));
    source.initrd = Some(file_with(&[7; 5000]));
    let entry = load(&ram, &source, 2).expect("boot");
    assert_eq!(
        entry,
        Entry::Linux64 {
            rip: 0x100_0200,
            zero_page: 0x7000
        }
    );
    assert_eq!(read_u64(&ram, 0x100_0000 + 9992), 0x9090_9090_9090_9090);
    assert_eq!(read_u32(&ram, 0x7000 + 0x202), u32::from_le_bytes(*b"HdrS"));
    let (initrd, size) = (read_u32(&ram, 0x7000 + 0x218), read_u32(&ram, 0x7000 + 0x21C));
    assert_eq!((u64::from(initrd), size), (RAM_BYTES - 8192, 5000));
    assert_eq!(read_u64(&ram, initrd.into()), 0x0707_0707_0707_0707);
    let mut cmdline = [0; 14];
    let cmdline_at = read_u32(&ram, 0x7000 + 0x228);
    ram.mem()
        .read_slice(&mut cmdline, GuestAddress(cmdline_at.into()))
        .expect("RAM");
    assert_eq!(&cmdline, b"console=ttyS0\0");
    assert_eq!(read_u64(&ram, 0x7000 + 0x070), acpi::TABLES_START);
    let ranges: u8 = ram.mem().read_obj(GuestAddress(0x7000 + 0x1E8)).expect("RAM");
    assert_eq!(usize::from(ranges), memory_map(ram.layout()).len());
    assert_eq!(read_u64(&ram, acpi::TABLES_START), u64::from_le_bytes(*b"RSD PTR "));
}

#[test]
fn a_pvh_kernel_is_told_where_everything_is() {
    let ram = ram();
    ram.mem()
        .write_slice(&[0xAA; 4096], GuestAddress(0x10_0000 + 0x4000))
        .expect("RAM");
    let mut source = source(kernel());
    source.initrd = Some(file_with(b"initrd"));
    let entry = load(&ram, &source, 1).expect("boot");
    assert_eq!(
        entry,
        Entry::Pvh {
            eip: 0x10_0000,
            start_info: 0x6000
        }
    );
    assert_eq!((read_u32(&ram, 0x6000), read_u32(&ram, 0x6004)), (0x336E_C578, 1));
    assert_eq!(read_u32(&ram, 0x600C), 1, "one module");
    let module = read_u64(&ram, 0x6010);
    assert_eq!(
        (read_u64(&ram, module), read_u64(&ram, module + 8)),
        (RAM_BYTES - 4096, 6)
    );
    assert_eq!(read_u64(&ram, 0x6020), acpi::TABLES_START);
    let map = memory_map(ram.layout());
    assert_eq!(read_u32(&ram, 0x6030) as usize, map.len());
    let last = read_u64(&ram, 0x6028) + 24 * (map.len() as u64 - 2);
    assert_eq!((read_u64(&ram, last), read_u32(&ram, last + 16)), (0x10_0000, 1));
    assert_eq!(
        read_u64(&ram, 0x10_4000),
        0,
        "memory beyond the file's part of a segment is cleared"
    );
}

fn refused(kernel: &[u8]) -> String {
    load(&ram(), &source(file_with(kernel)), 1)
        .expect_err("refused")
        .to_string()
}

#[test]
fn what_is_no_kernel_is_refused_with_the_reason() {
    let no_note = elf(&[0xF4], 0x10_0000, None);
    let mut arm = elf(&[0xF4], 0x10_0000, Some(0x10_0000));
    arm[18] = 183;
    let mut many = elf(&[0xF4], 0x10_0000, Some(0x10_0000));
    many[56..58].copy_from_slice(&u16::MAX.to_le_bytes());
    let mut huge_note = elf(&[0xF4], 0x10_0000, Some(0x10_0000));
    huge_note[64 + 56 + 32..64 + 56 + 40].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut wraps = elf(&[0xF4], 0x10_0000, Some(0x10_0000));
    wraps[64 + 40..64 + 48].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut old = bzimage(100);
    old[0x206..0x208].copy_from_slice(&0x0204u16.to_le_bytes());
    let mut small = bzimage(100);
    small[0x236] = 0;
    let whole = elf(&[0xF4; 100], 0x10_0000, Some(0x10_0000));
    let cases: [(&[u8], &str); 13] = [
        (b"", "the file is empty"),
        (b"#!/bin/sh\necho no kernel\n", "it begins with [23, 21, 2f, 62]"),
        (&no_note, "no PVH entry point"),
        (&arm, "not one for x86-64"),
        (&many, "program headers make no sense"),
        (&huge_note, "larger than 64 KiB"),
        (&wraps, "overflows"),
        (&elf(&[0xF4], 0x8000, Some(0x8000)), "below 1 MiB"),
        (&elf(&[0xF4], 0x10_0000, Some(0x50_0000)), "outside what is loaded"),
        (&whole[..whole.len() - 50], "ends before its header says"),
        (&whole[..40], "ends before its header says"),
        (&old, "boot protocol 2.04"),
        (&small, "32-bit kernel"),
    ];
    for (kernel, words) in cases {
        let text = refused(kernel);
        assert!(text.starts_with("kernel /boot/kernel: it is neither"), "{text}");
        assert!(text.contains(words), "{words}: {text}");
        assert!(text.contains("give the file that the distribution installs"), "{text}");
    }
    assert!(refused(&bzimage(0)).contains("ends before its header says"));
}

/// No cut and no flipped byte of a kernel file may make the loader panic, allocate without bound or write elsewhere.
#[test]
fn damaged_kernels_never_panic() {
    let ram = ram();
    for image in [elf(&[0xF4; 64], 0x10_0000, Some(0x10_0000)), bzimage(64)] {
        for at in 0..image.len().min(0x270) {
            for value in [0, 0xFF, image[at] ^ 0x80] {
                let mut damaged = image.clone();
                damaged[at] = value;
                // Refused or not: it has to return.
                let _ = load(&ram, &source(file_with(&damaged)), 1);
            }
            assert!(load(&ram, &source(file_with(&image[..at])), 1).is_err(), "cut at {at}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_with_numbers() {
    let mut large = bzimage(100);
    large[0x260..0x264].copy_from_slice(&(60u32 << 20).to_le_bytes());
    let text = refused(&large);
    assert!(
        text.contains("up to 76 MiB") && text.contains("64 MiB below 3 GiB"),
        "{text}"
    );
    let text = refused(&elf(&[0xF4], 64 << 20, Some(64 << 20)));
    assert!(text.contains("give the guest more memory"), "{text}");

    let initrd = |size: u64| {
        let file = file_with(b"");
        file.set_len(size).expect("sparse file");
        let source = BootSource {
            initrd: Some(file),
            ..source(file_with(&bzimage(100)))
        };
        load(&ram(), &source, 1).map(drop).map_err(|error| error.to_string())
    };
    let free = RAM_BYTES - (0x100_0000 + 0x20_0000);
    assert_eq!(initrd(free), Ok(()));
    let text = initrd(free + 1).expect_err("too large");
    assert!(
        text.starts_with("initrd /boot/initrd: 48234497 bytes do not fit"),
        "{text}"
    );
    assert!(
        initrd(u64::MAX >> 1)
            .expect_err("too large")
            .contains("use a smaller initrd")
    );
    assert!(initrd(0).expect_err("empty").contains("the file is empty"));

    let cmdline = |cmdline: String| {
        let source = BootSource {
            cmdline,
            ..source(file_with(&bzimage(100)))
        };
        load(&ram(), &source, 1).map(drop).map_err(|error| error.to_string())
    };
    assert_eq!(cmdline("x".repeat(2047)), Ok(()));
    assert!(
        cmdline("x".repeat(2048))
            .expect_err("too long")
            .contains("2048 bytes are more than the 2047")
    );
    assert!(cmdline("a\0b".into()).expect_err("zero").contains("zero byte"));
}
