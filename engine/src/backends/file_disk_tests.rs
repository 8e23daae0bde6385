use super::*;
use std::os::unix::fs::MetadataExt;

struct Dir(PathBuf);

impl Dir {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ftvm-disk-{}-{test}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str, size: u64) -> PathBuf {
        let path = self.0.join(name);
        File::create(&path).unwrap().set_len(size).unwrap();
        path
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn what_is_written_is_read_and_survives_a_flush() {
    let dir = Dir::new("rw");
    let path = dir.file("disk", 1 << 20);
    let mut disk = FileDisk::open(&path, false).unwrap();
    assert_eq!((disk.size_bytes(), disk.read_only()), (1 << 20, false));
    disk.write_at(512, &[7; 1024]).unwrap();
    disk.flush().unwrap();
    let mut data = [0; 1536];
    disk.read_at(0, &mut data).unwrap();
    assert!(data[..512].iter().all(|byte| *byte == 0) && data[512..].iter().all(|byte| *byte == 7));
    assert!(
        disk.read_at((1 << 20) - 512, &mut [0; 1024]).is_err(),
        "a short read is an error"
    );
}

#[test]
fn discarded_blocks_read_as_zeroes_and_stay_allocated() {
    let dir = Dir::new("thick");
    let path = dir.file("disk", 4 << 20);
    let mut disk = FileDisk::open(&path, false).unwrap();
    disk.write_at(0, &vec![1; 4 << 20]).unwrap();
    let allocated = std::fs::metadata(&path).unwrap().blocks();
    assert!(allocated * 512 >= 4 << 20, "only {allocated} blocks");
    disk.discard(4096, 1 << 20).unwrap();
    disk.write_zeroes(2 << 20, 1 << 20).unwrap();
    // Where the file system is not known to keep its blocks, zeros are written.
    disk.zeroing = Zeroing::Written;
    disk.write_zeroes((3 << 20) + 512, 512).unwrap();
    disk.flush().unwrap();
    let mut data = vec![9; 4 << 20];
    disk.read_at(0, &mut data).unwrap();
    let zeroed = [
        4096..4096 + (1 << 20),
        2 << 20..3 << 20,
        (3 << 20) + 512..(3 << 20) + 1024,
    ];
    let zero = |at: usize| zeroed.iter().any(|range| range.contains(&at));
    assert!(data.iter().enumerate().all(|(at, byte)| *byte == u8::from(!zero(at))));
    assert!(
        std::fs::metadata(&path).unwrap().blocks() * 512 >= 4 << 20,
        "blocks were given back"
    );
}

#[test]
fn unfit_disks_are_refused_with_their_reason() {
    let dir = Dir::new("unfit");
    assert!(matches!(
        FileDisk::open(&dir.0.join("none"), false),
        Err(DiskError::Missing { .. })
    ));
    assert!(matches!(FileDisk::open(&dir.0, false), Err(DiskError::NotADisk { .. })));
    assert!(matches!(FileDisk::open(&dir.0, true), Err(DiskError::NotADisk { .. })));
    let odd = dir.file("odd", 1000);
    assert!(matches!(
        FileDisk::open(&odd, false),
        Err(DiskError::Size { size_bytes: 1000, .. })
    ));
    let empty = dir.file("empty", 0);
    assert!(matches!(
        FileDisk::open(&empty, false),
        Err(DiskError::Size { size_bytes: 0, .. })
    ));
    let path = dir.file("disk", 1024);
    let read_only = File::open(&path).unwrap();
    assert!(matches!(
        FileDisk::from_file(read_only, &path, false),
        Err(DiskError::ReadOnly { .. })
    ));
    let short = FileDisk::open(&path, false).unwrap().expect_size(2048);
    let message = short.unwrap_err().to_string();
    assert!(
        message.contains("1024") && message.contains("2048") && message.contains("disk"),
        "{message}"
    );
}

#[test]
fn a_disk_in_use_is_refused_and_readers_share() {
    let dir = Dir::new("lock");
    let path = dir.file("disk", 1024);
    let writer = FileDisk::open(&path, false).unwrap();
    assert!(matches!(FileDisk::open(&path, false), Err(DiskError::InUse { .. })));
    assert!(matches!(FileDisk::open(&path, true), Err(DiskError::InUse { .. })));
    let handed_over = writer.file().try_clone().unwrap();
    drop(writer);
    assert!(
        matches!(FileDisk::open(&path, false), Err(DiskError::InUse { .. })),
        "the lock travels with the descriptor"
    );
    let again = FileDisk::from_file(handed_over, &path, false).unwrap();
    drop(again);
    let (first, second) = (FileDisk::open(&path, true), FileDisk::open(&path, true));
    assert!(first.is_ok() && second.is_ok());
    assert!(matches!(FileDisk::open(&path, false), Err(DiskError::InUse { .. })));
}

/// Runs `test` in a full file system of one mebibyte of its own, in a mount namespace of this thread's own.
fn in_small_file_system(test: impl FnOnce(&Path)) {
    let dir = Dir::new("small");
    let target = std::ffi::CString::new(dir.0.to_str().unwrap()).unwrap();
    // SAFETY: the strings are terminated and live during the calls; namespaces and mounts have no memory effects.
    unsafe {
        let none = std::ptr::null();
        assert_eq!(
            libc::unshare(libc::CLONE_FS | libc::CLONE_NEWNS),
            0,
            "needs CAP_SYS_ADMIN"
        );
        assert_eq!(
            libc::mount(none, c"/".as_ptr(), none, libc::MS_REC | libc::MS_PRIVATE, none.cast()),
            0
        );
        let size = c"size=1m".as_ptr().cast();
        assert_eq!(
            libc::mount(c"t".as_ptr(), target.as_ptr(), c"tmpfs".as_ptr(), 0, size),
            0
        );
    }
    test(&dir.0);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) }, 0);
}

#[test]
fn a_file_system_without_room_fails_the_write() {
    in_small_file_system(|dir| {
        let path = dir.join("disk");
        File::create(&path).unwrap().set_len(4 << 20).unwrap();
        let mut disk = FileDisk::open(&path, false).unwrap();
        let error = disk.write_at(0, &vec![1; 4 << 20]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    });
}
