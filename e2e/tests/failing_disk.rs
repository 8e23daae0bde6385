//! The active's disk fails under the guest: its file system is full, and the disk's blocks are gone.
//!
//! With a standby the guest does not notice: what its disk could not do the other seat's does, and the client gets its answer. Without
//! one it gets the error, which is the negative control.
use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use ftvm_e2e::bench::client::GuestClient;
use ftvm_e2e::demo::programs::{Profile, Programs, build};
use ftvm_e2e::demo::standalone::{DISK, DISK_MIB, Standalone};
use ftvm_e2e::demo::system::{Role, System};
use ftvm_e2e::demo::{GUEST_ADDRESS, Options};
use ftvm_e2e::guest_protocol::{DEFAULT_PORT, Op};
use ftvm_e2e::hosts::outer::{made_outside, test_inside};
use ftvm_e2e::hosts::{Lab, LabPlan};
use ftvm_e2e::scene;

/// Nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(120);
const DISK_BYTES: u64 = DISK_MIB << 20;

/// Built before the namespaces are entered: there is no network in them.
fn built() -> Programs {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("failing-disk.json");
    made_outside(&file, || build(Profile::Dev)).expect("the programs build")
}

fn path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).expect("no NUL in a path")
}

fn mount(source: &CStr, target: &Path, kind: Option<&CStr>, flags: libc::c_ulong, options: Option<&CStr>) {
    let target = path(target);
    let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: all pointers are NUL-terminated strings or null, as mount(2) allows.
    let result = unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            pointer(kind),
            flags,
            pointer(options).cast(),
        )
    };
    assert_eq!(result, 0, "mounting {target:?}: {}", std::io::Error::last_os_error());
}

/// A file system of its own, just large enough for the disk.
struct Datastore {
    folder: PathBuf,
}

impl Datastore {
    /// Under the disk of the host of that name. Before the hosts are made: they see what is mounted then.
    fn of(folder: &Path, host: &str) -> Self {
        let disk = folder.join(host).join(DISK);
        let datastore = Self {
            folder: folder.join("datastore"),
        };
        fs::create_dir_all(&datastore.folder).expect("a folder");
        fs::create_dir_all(folder.join(host)).expect("a host's folder");
        let size = CString::new(format!("size={}m", DISK_MIB + 1)).expect("no NUL");
        mount(c"tmpfs", &datastore.folder, Some(c"tmpfs"), 0, Some(&size));
        File::create(datastore.disk())
            .and_then(|file| file.set_len(DISK_BYTES))
            .expect("the original disk");
        File::create(&disk).expect("a place for it");
        mount(&path(&datastore.disk()), &disk, None, libc::MS_BIND, None);
        datastore
    }

    fn disk(&self) -> PathBuf {
        self.folder.join(DISK)
    }

    fn filler(&self) -> PathBuf {
        self.folder.join("filler")
    }

    fn set_len(&self, bytes: u64) {
        let disk = File::options().write(true).open(self.disk()).expect("the disk");
        disk.set_len(bytes).expect("its size");
    }

    /// The disk has no block any more, and gets none. While the guest asks nothing of it.
    fn fail(&self) {
        self.set_len(0);
        let mut filler = File::create(self.filler()).expect("a file");
        for bytes in [1 << 20, 4096, 1] {
            let full = loop {
                if let Err(error) = filler.write_all(&vec![1; bytes]) {
                    break error;
                }
            };
            assert_eq!(full.kind(), ErrorKind::StorageFull);
        }
    }

    /// There is room for a disk again.
    fn mend(&self) {
        fs::remove_file(self.filler()).expect("it was there");
        self.set_len(DISK_BYTES);
    }
}

/// A guest that was protected, with its client.
struct Scene {
    // Ends first.
    client: GuestClient,
    system: Standalone,
    lab: Rc<Lab>,
    datastore: Datastore,
}

fn connect(lab: &Lab) -> GuestClient {
    let guest = SocketAddr::from((GUEST_ADDRESS, DEFAULT_PORT));
    let entrance = lab.client_entrance().expect("where clients stand");
    GuestClient::connect_from(entrance, guest, PATIENCE).expect("the guest answers")
}

impl Scene {
    fn start(test: &str, programs: &Programs) -> Scene {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(test);
        fs::remove_dir_all(&folder).ok();
        fs::create_dir_all(&folder).expect("the target folder is writable");
        let plan = LabPlan::three_hosts(&folder);
        let datastore = Datastore::of(&folder, &plan.hosts[0].name);
        let lab = Rc::new(Lab::new(&plan).expect("hosts"));
        // A host that is busy for a while must not count as dead.
        let timing = serde_json::json!({ "peer_lost_ms": 3000 });
        let mut system = Standalone::new(Rc::clone(&lab), programs, &folder, &Options::default()).with_timing(timing);
        system.start().expect("the pair starts");
        let mut scene = Scene {
            client: connect(&lab),
            system,
            lab,
            datastore,
        };
        scene.wait_for(0, true);
        scene
    }

    /// Waits until this host's seat is active, and protected or not.
    fn wait_for(&mut self, host: usize, protected: bool) {
        self.until(&format!("host {host} active, protected {protected}"), |scene| {
            let seat = scene.system.seat(host);
            seat.is_some_and(|seat| seat.role == Role::Active && seat.protected == protected)
        });
    }

    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Scene) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            let said = || [0, 1].map(|host| self.system.why(host));
            assert!(Instant::now() < deadline, "not so: {what}: {:?}", said());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn a_disk_that_fails_is_not_noticed_while_there_is_another_one() {
    let _turn = scene::turn();
    let programs = built();
    test_inside("a_disk_that_fails_is_not_noticed_while_there_is_another_one", || {
        let mut scene = Scene::start("failing", &programs);
        let before = scene.client.ask(Op::Journal, 0, 0).expect("an answer");
        assert_eq!(before.journal_errors, 0);
        scene.datastore.fail();
        let after = scene.client.ask(Op::Journal, 0, 0).expect("an answer");
        assert_eq!(
            (after.count, after.boots, after.journal_errors),
            (before.count + 1, before.boots, 0)
        );
        scene.until("host 1 active", |scene| {
            scene.system.seat(1).is_some_and(|seat| seat.role == Role::Active)
        });
        let checked = scene.client.ask(Op::Verify, 0, 0).expect("an answer");
        assert_eq!(checked.journal_errors, 0, "the other disk has everything");
        // The seat is rebuilt as soon as it can be, and not before: its disk has no room for one byte.
        scene.wait_for(1, false);
        scene.datastore.mend();
        scene.wait_for(1, true);
        scene.system.compare_sides(1, 0).expect("both sides are equal");
    });
}

#[test]
fn a_disk_that_fails_is_the_guests_error_while_there_is_no_other_one() {
    let _turn = scene::turn();
    let programs = built();
    test_inside(
        "a_disk_that_fails_is_the_guests_error_while_there_is_no_other_one",
        || {
            let mut scene = Scene::start("alone", &programs);
            scene.lab.host(1).kill().expect("it runs");
            scene.wait_for(0, false);
            scene.datastore.fail();
            let mut other = connect(&scene.lab);
            // It takes no record any more, and may answer this never.
            std::thread::spawn(move || drop(other.ask(Op::Journal, 0, 0)));
            scene.until("an error in the guest", |scene| {
                scene.client.status().expect("an answer").journal_errors > 0
            });
            // Its engine is asked by its daemon, and may answer a moment later.
            scene.until("an active that says what it can't do", |scene| {
                scene.system.seat(0).is_some_and(|seat| {
                    let says = seat.why.contains("disk 0 fails");
                    seat.role == Role::Active && says && seat.counter("disk_errors") > Some(0.0)
                })
            });
        },
    );
}
