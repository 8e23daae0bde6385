//! Disks of a seat that ran before.

use std::time::{Duration, Instant};

use super::*;

const SIZE: u64 = 1 << 20;

/// A seat with the disks `root` and `data`, whose claims are empty.
struct Claims(Arc<Layout>);

impl Claims {
    fn new(test: &str) -> Claims {
        let root = std::env::temp_dir().join(format!("ftvm-seat-disks-{test}-{}", std::process::id()));
        let claims = Claims(Arc::new(Layout { root }));
        for name in ["root", "data"] {
            claims.make(name);
        }
        claims
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.0.path("disks").join(name)
    }

    /// An empty volume in the place of the one that was there.
    fn make(&self, name: &str) {
        let folder = self.folder(name);
        // There may be none.
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
    }

    fn prepare(&self) -> Result<(), String> {
        let disk = |name: &str| DiskToPrepare {
            name: name.to_owned(),
            size_bytes: SIZE,
            original: false,
            source: None,
        };
        let recipe = Recipe {
            kernel: "/boot/vmlinuz".to_owned(),
            initrd: None,
            disks: vec![disk("root"), disk("data")],
        };
        let work = Work::start(self.0.clone(), recipe);
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(outcome) = work.outcome() {
                return outcome;
            }
            assert!(Instant::now() < until, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Claims {
    fn drop(&mut self) {
        // What is left lies in the folder for temporary files.
        let _ = std::fs::remove_dir_all(self.0.path(""));
    }
}

/// The other seat would get its zeros in the place of the only good copy.
#[test]
fn a_claim_that_was_lost_is_not_replaced_by_zeros_once_a_guest_ran() {
    for lost in ["data", "root"] {
        let claims = Claims::new(&format!("lost-{lost}"));
        claims.prepare().unwrap();
        std::fs::write(claims.folder("root").join("ftvm-header"), "a header").unwrap();
        claims.prepare().unwrap();
        claims.make(lost);
        let header = claims.folder("root").join("ftvm-header");
        if lost == "root" {
            // Its header went with it: nothing is booted from what is left, and the seat joins as one that has nothing.
            assert!(!header.exists());
            claims.prepare().unwrap();
            continue;
        }
        let why = claims.prepare().unwrap_err();
        assert!(
            why.contains("disk data") && why.contains("was used by a guest"),
            "{why}"
        );
        assert!(!claims.folder("data").join("disk.raw").exists(), "nothing is made");
    }
}

#[test]
fn before_a_guest_ran_disks_are_made_anew() {
    let claims = Claims::new("unused");
    claims.prepare().unwrap();
    // As the program opens it for the daemon, which writes it before the first engine.
    std::fs::write(claims.folder("root").join("ftvm-header"), "").unwrap();
    claims.make("data");
    claims.prepare().unwrap();
    assert!(claims.folder("data").join("disk.raw").exists());
}

#[test]
fn a_header_that_cant_be_looked_at_proves_nothing() {
    let claims = Claims::new("header");
    let header = claims.folder("root").join("ftvm-header");
    std::os::unix::fs::symlink(&header, &header).unwrap();
    let why = claims.prepare().unwrap_err();
    assert!(why.contains("ftvm-header can't be looked at"), "{why}");
    assert!(!claims.folder("root").join("disk.raw").exists());
}
