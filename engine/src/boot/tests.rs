use std::io::Write;

use super::*;

fn file(bytes: &[u8]) -> File {
    let fd = rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut file = File::from(fd);
    file.write_all(bytes).unwrap();
    file
}

fn boot(kernel: &[u8], initrd: Option<&[u8]>, cmdline: &str, ram_mib: u64) -> Result<(GuestRam, BspStart), BootError> {
    let ram = GuestRam::new(ram_mib << 20, false).unwrap();
    let mut initrd = initrd.map(file);
    let start = load(
        &ram,
        BootSource {
            kernel: &mut file(kernel),
            initrd: initrd.as_mut(),
            cmdline,
            vcpus: 2,
        },
    )?;
    Ok((ram, start))
}

/// A bzImage of one setup sector whose kernel is `payload`.
fn bz_image(xloadflags: u16, init_size: u32, payload: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 1024];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x202, b"HdrS");
    put(0x206, &0x20fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x214, &0x10_0000u32.to_le_bytes());
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x236, &xloadflags.to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &init_size.to_le_bytes());
    image.extend_from_slice(payload);
    image
}

/// A minimal ELF: one segment at 1 MiB, and a PVH note if asked for.
fn elf(note: bool) -> Vec<u8> {
    let mut image = vec![0u8; 0x400];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &2u16.to_le_bytes());
    put(18, &62u16.to_le_bytes());
    put(24, &0x10_0000u64.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &if note { 2u16 } else { 1 }.to_le_bytes());
    let mut header = |at: usize, kind: u32, offset: u64, size: u64| {
        put(at, &kind.to_le_bytes());
        put(at + 8, &offset.to_le_bytes());
        put(at + 24, &0x10_0000u64.to_le_bytes());
        put(at + 32, &size.to_le_bytes());
        put(at + 40, &size.to_le_bytes());
        put(at + 48, &4u64.to_le_bytes());
    };
    header(64, 1, 0x300, 16);
    header(120, 4, 0x200, 20);
    put(0x200, &4u32.to_le_bytes());
    put(0x204, &4u32.to_le_bytes());
    put(0x208, &18u32.to_le_bytes());
    put(0x20c, b"Xen\0");
    put(0x210, &0x10_0000u32.to_le_bytes());
    put(0x300, b"kernel kernel...");
    image
}

fn read<const N: usize>(ram: &GuestRam, address: u64) -> [u8; N] {
    let mut bytes = [0; N];
    ram.mem().read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

#[test]
fn an_elf_with_a_note_is_entered_by_pvh() {
    let (ram, start) = boot(&elf(true), Some(b"initrd"), "a=b", 16).unwrap();
    assert_eq!(
        start,
        BspStart::Pvh {
            entry: 0x10_0000,
            start_info: PVH_INFO as u32
        }
    );
    assert_eq!(read::<6>(&ram, 0x10_0000), *b"kernel");
    assert_eq!(read::<4>(&ram, CMDLINE), *b"a=b\0");
    assert_eq!(u32::from_le_bytes(read(&ram, PVH_INFO)), PVH_MAGIC);
    let initrd = u64::from_le_bytes(read(&ram, PVH_MODULES));
    assert_eq!(read::<6>(&ram, initrd), *b"initrd");
}

#[test]
fn a_bzimage_is_entered_in_long_mode() {
    let (ram, start) = boot(&bz_image(1, 1 << 20, b"payload"), Some(&[7; 5000]), "x", 64).unwrap();
    let BspStart::Linux64 { entry, zero_page, .. } = start else {
        panic!("{start:?}");
    };
    assert_eq!(entry, 0x10_0200);
    assert_eq!(read::<7>(&ram, 0x10_0000), *b"payload");
    let initrd = u32::from_le_bytes(read(&ram, zero_page + 0x218));
    assert_eq!(u32::from_le_bytes(read(&ram, zero_page + 0x21c)), 5000);
    assert_eq!(read::<4>(&ram, u64::from(initrd)), [7; 4]);
    assert!(u64::from(initrd) + 5000 <= 64 << 20);
}

#[test]
fn what_is_no_kernel_is_refused_by_name() {
    let not = |bytes: &[u8]| matches!(boot(bytes, None, "", 16), Err(BootError::NotAKernel { .. }));
    assert!(not(b""));
    assert!(not(&[0x55; 4096]));
    assert!(matches!(boot(&elf(false), None, "", 16), Err(BootError::NoPvhNote)));
    assert!(matches!(
        boot(&bz_image(0, 4096, b"x"), None, "", 64),
        Err(BootError::Not64Bit)
    ));
    let mut cut = elf(true);
    cut.truncate(0x304);
    assert!(matches!(boot(&cut, None, "", 16), Err(BootError::Image { .. })));
}

#[test]
fn an_initrd_that_does_not_fit_is_refused_with_numbers() {
    let large = vec![1; 60 << 20];
    let error = boot(&bz_image(1, 8 << 20, b"x"), Some(&large), "", 64)
        .map(|_| ())
        .unwrap_err();
    let text = error.to_string();
    assert!(text.contains("60 MiB") && text.contains("64 MiB"), "{text}");
}

#[test]
fn command_lines_are_bounded() {
    let long = "x".repeat(CMDLINE_BYTES_MAX);
    assert!(matches!(
        boot(&elf(true), None, &long, 16),
        Err(BootError::CmdlineTooLong(_))
    ));
    assert!(matches!(
        boot(&elf(true), None, "a\0b", 16),
        Err(BootError::CmdlineZero)
    ));
}

/// Every table's checksum is right, and the chain RSDP → XSDT → FADT → DSDT, MADT hangs together.
#[test]
fn the_tables_are_reachable_and_sum_to_zero() {
    for vcpus in [1, 16, acpi::VCPUS_MAX] {
        let ram = GuestRam::new(16 << 20, false).unwrap();
        let rsdp = acpi::write_tables(ram.mem(), vcpus).unwrap();
        let sum = |at: u64, len: u32| {
            let mut bytes = vec![0u8; len as usize];
            ram.mem().read_slice(&mut bytes, GuestAddress(at)).unwrap();
            bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        };
        let length = |at: u64| u32::from_le_bytes(read(&ram, at + 4));
        assert_eq!(read::<8>(&ram, rsdp), *b"RSD PTR ");
        assert_eq!(sum(rsdp, 36), 0);
        let xsdt = u64::from_le_bytes(read(&ram, rsdp + 24));
        let fadt = u64::from_le_bytes(read(&ram, xsdt + 36));
        let madt = u64::from_le_bytes(read(&ram, xsdt + 44));
        let dsdt = u64::from_le_bytes(read(&ram, fadt + 140));
        for (at, signature) in [(xsdt, b"XSDT"), (fadt, b"FACP"), (madt, b"APIC"), (dsdt, b"DSDT")] {
            assert_eq!(&read::<4>(&ram, at), signature);
            assert_eq!(sum(at, length(at)), 0, "{vcpus} vCPUs: checksum at {at:#x}");
        }
        assert_eq!(length(madt), 44 + 8 * vcpus + 12 + 10 + 6);
    }
    let ram = GuestRam::new(16 << 20, false).unwrap();
    assert!(acpi::write_tables(ram.mem(), 0).is_err());
    assert!(acpi::write_tables(ram.mem(), acpi::VCPUS_MAX + 1).is_err());
}
