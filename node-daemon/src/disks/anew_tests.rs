//! Which file a disk is.

use super::*;
use std::time::SystemTime;

const SIZE: u64 = 1 << 20;

fn job(folder: &Path) -> Job {
    Job {
        path: folder.join("disk.img"),
        size_bytes: SIZE,
        mark: folder.join("disk.mark"),
        source: None,
        file: None,
        backing: Vec::new(),
        staging: folder.join("staging"),
        importer: folder.join("importer"),
        used: false,
        original: false,
    }
}

/// What an engine knows a disk by.
fn known_by(job: &Job) -> (u64, Option<SystemTime>) {
    let data = std::fs::metadata(&job.path).unwrap();
    (data.ino(), data.created().ok())
}

/// An engine that remembers what a disk held must not take another one's contents for it.
#[test]
fn a_disk_that_is_made_anew_is_another_file() {
    let folder = crate::testing::Folder::new("anew");
    let job = job(folder.path());
    prepare(&job, &|_, _, _| ()).unwrap();
    let first = known_by(&job);
    prepare(&job, &|_, _, _| ()).unwrap();
    assert_eq!(known_by(&job), first, "complete: not touched");
    // Held open, so that its number is not given away again: file systems without times of birth are judged, too.
    let held = File::open(&job.path).unwrap();
    std::fs::remove_file(&job.mark).unwrap();
    prepare(&job, &|_, _, _| ()).unwrap();
    let second = known_by(&job);
    assert_ne!(second.0, first.0);
    drop(held);
    // One that was interrupted goes on in the file that it made.
    let marks = MarkFile::new(job.mark.clone());
    let mut mark = marks.read().unwrap().unwrap();
    mark.complete = false;
    marks.write(&mark).unwrap();
    prepare(&job, &|_, _, _| ()).unwrap();
    assert_eq!(known_by(&job), second, "interrupted");
    thick::verify(&File::open(&job.path).unwrap(), SIZE).unwrap();
}

#[test]
fn whoever_waits_for_the_old_file_never_gets_the_new_ones_place() {
    let folder = crate::testing::Folder::new("anew");
    let path = folder.path().join("disk.img");
    let old = open(&path).unwrap();
    let late = open(&path).unwrap();
    lock(&path, &old).unwrap();
    assert!(matches!(lock(&path, &late), Err(DiskError::InUse)));
    let new = anew(&path, old).unwrap();
    assert!(
        matches!(lock(&path, &late), Err(DiskError::InUse)),
        "it is not there any more"
    );
    drop(new);
    assert!(matches!(lock(&path, &late), Err(DiskError::InUse)));
}

/// A guest's disk is complete for good: whatever else is found there is not the guest's disk.
#[test]
fn nothing_is_made_in_the_place_of_a_disk_that_a_guest_used() {
    let folder = crate::testing::Folder::new("anew");
    let used = Job {
        used: true,
        ..job(folder.path())
    };
    let refused = || matches!(prepare(&used, &|_, _, _| ()), Err(DiskError::MarkGone { .. }));
    assert!(refused(), "no mark");
    let begun = Mark {
        size_bytes: SIZE,
        done_bytes: SIZE / 2,
        source: Some(BLANK.to_owned()),
        ..Mark::default()
    };
    MarkFile::new(used.mark.clone()).write(&begun).unwrap();
    assert!(refused(), "a volume that was made anew, and begun");
    assert!(!used.path.exists());
}

/// The second seat's disk is blank and complete; if the first one goes before the guest ran, the guest begins on the second.
#[test]
fn a_blank_disk_gets_first_contents_if_its_seat_becomes_the_original() {
    let folder = crate::testing::Folder::new("anew");
    let blank = job(folder.path());
    prepare(&blank, &|_, _, _| ()).unwrap();
    let (made, marks) = (known_by(&blank), MarkFile::new(blank.mark.clone()));
    let _held = File::open(&blank.path).unwrap();
    let image = folder.path().join("root.raw");
    std::fs::write(&image, [7; 4096]).unwrap();
    let original = Job {
        original: true,
        source: Some(Source {
            place: Place::Image {
                path: "/root.raw".to_owned(),
                backing: Vec::new(),
            },
            format: Some(source::Format::Raw),
            compression: None,
            sha256: None,
        }),
        file: Some(FileAt::Path(image.clone())),
        ..blank.clone()
    };
    let is_untouched = || known_by(&blank) == made && marks.read().unwrap().unwrap().complete;
    // A guest ran, or the disk is to be zeros, or its seat is not the original.
    for job in [
        Job {
            used: true,
            ..original.clone()
        },
        Job {
            source: None,
            file: None,
            ..original.clone()
        },
        Job {
            original: false,
            ..original.clone()
        },
    ] {
        prepare(&job, &|_, _, _| ()).unwrap();
        assert!(is_untouched(), "{job:?}");
    }
    let unreadable = Job {
        file: Some(FileAt::Path(folder.path().join("nothing"))),
        ..original.clone()
    };
    assert!(prepare(&unreadable, &|_, _, _| ()).is_err());
    assert!(is_untouched());
    assert!(prepare(&original, &|_, _, _| ()).is_err(), "there is no importer here");
    assert_ne!(known_by(&blank).0, made.0, "it is begun anew");
    assert!(!marks.read().unwrap().unwrap().complete);
    // One that was filled stays, also when its source goes.
    let filled = Mark {
        size_bytes: SIZE,
        done_bytes: SIZE,
        complete: true,
        source: Some(origin(&original).unwrap()),
        download: None,
    };
    marks.write(&filled).unwrap();
    let file = File::options().write(true).open(&blank.path).unwrap();
    file.set_len(SIZE).unwrap();
    prepare(&original, &|_, _, _| ()).unwrap();
    std::fs::remove_file(&image).unwrap();
    prepare(&original, &|_, _, _| ()).unwrap();
    assert_eq!(marks.read().unwrap(), Some(filled));
}

/// As a backing file that somebody else still uses.
#[test]
fn what_is_changed_while_it_is_read_does_not_count() {
    let folder = crate::testing::Folder::new("anew");
    let [image, base] = ["root.qcow2", "base.raw"].map(|name| folder.path().join(name));
    for path in [&image, &base] {
        std::fs::write(path, [7; 4096]).unwrap();
    }
    let place = Place::Image {
        path: "/root.qcow2".to_owned(),
        backing: vec!["/base.raw".to_owned()],
    };
    let job = Job {
        source: Some(Source {
            place,
            format: None,
            compression: None,
            sha256: None,
        }),
        file: Some(FileAt::Path(image.clone())),
        backing: vec![FileAt::Path(base.clone())],
        ..job(folder.path())
    };
    // In the importer's place: it appends to a file, and says that there are no contents. A shell writes it: a program that any process
    // still has open for writing, such as a child of another test, can't be executed.
    let importer = |appends_to: &Path| {
        let end = format!("E{}", r"\000".repeat(20));
        let script = format!("#!/bin/sh\necho >> {}\nprintf '{end}'\n", appends_to.display());
        let words = ["-c", r#"printf %s "$1" > "$0" && chmod 755 "$0""#];
        let mut shell = std::process::Command::new("sh");
        let status = shell.args(words).arg(&job.importer).arg(script).status().unwrap();
        assert!(status.success());
    };
    for path in [&image, &base] {
        importer(path);
        let error = prepare(&job, &|_, _, _| ()).unwrap_err();
        assert!(error.to_string().contains("was changed while it was read"), "{error}");
        let mark = MarkFile::new(job.mark.clone()).read().unwrap().unwrap();
        assert!(!mark.complete);
    }
    // The control: the same without a change.
    importer(&folder.path().join("another"));
    prepare(&job, &|_, _, _| ()).unwrap();
}
