use super::*;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

const SIZE: u64 = 8 << 20;

fn file(length: u64) -> File {
    let file = crate::testing::unnamed_file();
    file.set_len(length).unwrap();
    file
}

#[test]
fn a_hole_is_found_wherever_it_is() {
    for (hole, length) in [(0, SIZE), (SIZE - 4096, 4096), (SIZE / 2, 4096), (0, 4096)] {
        let file = file(SIZE);
        assert!(allocate(&file, SIZE).unwrap());
        verify(&file, SIZE).unwrap();
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(file.as_fd(), flags, hole, length).unwrap();
        let error = verify(&file, SIZE).unwrap_err();
        assert!(
            matches!(error, DiskError::NotThick { at_bytes, .. } if at_bytes == hole),
            "hole at {hole}: {error}"
        );
        make(&file, SIZE).unwrap();
        verify(&file, SIZE).unwrap();
    }
}

#[test]
fn extents_that_are_not_written_yet_count_and_contents_stay() {
    let file = file(SIZE);
    file.write_all_at(b"contents", SIZE / 2).unwrap();
    assert!(verify(&file, SIZE).is_err());
    make(&file, SIZE).unwrap();
    let mut found = [0; 8];
    file.read_exact_at(&mut found, SIZE / 2).unwrap();
    assert_eq!(&found, b"contents");
}

#[test]
fn holes_can_be_filled_by_writing_alone() {
    let file = file(SIZE);
    file.write_all_at(b"contents", SIZE / 2).unwrap();
    fill_holes(&file, SIZE).unwrap();
    file.sync_all().unwrap();
    verify(&file, SIZE).unwrap();
    let mut found = [0; 8];
    file.read_exact_at(&mut found, SIZE / 2).unwrap();
    assert_eq!(&found, b"contents");
}

#[test]
fn another_size_and_too_little_room_are_told_before_any_of_it_is_taken() {
    let file = file(SIZE);
    assert!(matches!(verify(&file, SIZE + 512), Err(DiskError::Size { .. })));
    let error = allocate(&file, 1 << 60).unwrap_err();
    assert!(matches!(error, DiskError::NoRoom { .. }), "{error}");
    assert_eq!(allocated_bytes(&file).unwrap(), 0);
    let text = error.to_string();
    assert!(
        text.contains("bytes free") && text.contains("make the volume"),
        "{text}"
    );
}

#[test]
fn flaws_of_extents_are_named() {
    for (flags, word) in [
        (DELAYED, "later"),
        (ENCODED, "compressed"),
        (INLINE, "own"),
        (SHARED, "shared"),
    ] {
        assert!(flaw(flags | 0x1000).unwrap().contains(word));
    }
    // Allocated and not written (FIEMAP_EXTENT_UNWRITTEN), merged, last.
    assert_eq!(flaw(0x800 | 0x1000 | LAST), None);
}
