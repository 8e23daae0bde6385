use super::*;

/// A name that no other test of this process uses.
fn name(test: &str) -> String {
    format!("ft{}{test}", std::process::id() % 100_000)
}

/// Enters a network namespace of this thread's own, so that no interface of the host is touched.
fn own_namespace() {
    // SAFETY: unshare of this thread's network namespace has no memory effects.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(
        result,
        0,
        "these tests need CAP_SYS_ADMIN: {}",
        io::Error::last_os_error()
    );
}

#[test]
fn a_new_tap_is_exclusive() {
    own_namespace();
    let name = name("n");
    let tap = Tap::create(&name).unwrap();
    assert_eq!(tap.name(), name);
    assert!(matches!(Tap::create(&name), Err(TapError::Exists { .. })));
    assert!(matches!(Tap::attach(&name), Err(TapError::Busy { .. })));
    drop(tap);
    assert!(
        matches!(Tap::attach(&name), Err(TapError::Missing { .. })),
        "it lived as long as it was open"
    );
}

#[test]
fn interfaces_that_are_no_taps_are_refused() {
    own_namespace();
    assert!(matches!(
        Tap::attach("lo"),
        Err(TapError::NotATap { .. } | TapError::Busy { .. })
    ));
    assert!(matches!(
        Tap::create("lo"),
        Err(TapError::Exists { .. } | TapError::NotATap { .. })
    ));
    let null = File::open("/dev/null").unwrap();
    assert!(matches!(Tap::from_fd("x", null.into()), Err(TapError::NotATap { .. })));
    for bad in ["", "a/b", "with space", "a-name-that-is-too-long", "."] {
        assert!(matches!(Tap::attach(bad), Err(TapError::Name { .. })), "{bad:?}");
    }
}

#[test]
fn a_descriptor_can_be_handed_over() {
    own_namespace();
    let name = name("h");
    let tap = Tap::create(&name).unwrap();
    let fd = tap.file.try_clone().unwrap();
    rustix::fs::fcntl_setfl(&fd, rustix::fs::OFlags::empty()).unwrap();
    let mut other = Tap::from_fd(&name, fd.into()).unwrap();
    assert!(
        rustix::fs::fcntl_getfl(&other.file)
            .unwrap()
            .contains(rustix::fs::OFlags::NONBLOCK)
    );
    assert_eq!(other.wake_fd(), other.file.as_raw_fd());
    // The interface is down: receiving waits or fails, sending loses; neither blocks.
    other.transmit(&[0; 60]);
    assert!(!matches!(other.receive(&mut [0; 2000]), Ok(Some(_))));
}
