//! Whether KVM works here: a guest of a few instructions is run and must do exactly what it should.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};
use tokio::sync::watch;

/// How often it is tested.
const INTERVAL: Duration = Duration::from_secs(60);
/// A test that takes longer counts as failed until it ends, unless this machine has been slow before.
const PATIENCE: Duration = Duration::from_secs(20);
/// So many times as long as the last good test may one take, where that is more.
const SLOWER: u32 = 4;
/// But not longer than this.
const PATIENCE_MAX: Duration = Duration::from_secs(300);

/// `mov dx, 0x3f8; mov al, 'k'; out dx, al; add al, 1; out dx, al; hlt` in real mode.
const CODE: [u8; 10] = [0xba, 0xf8, 0x03, 0xb0, b'k', 0xee, 0x04, 0x01, 0xee, 0xf4];
const PORT: u16 = 0x3f8;
const SAID: [u8; 2] = *b"kl";
const MEMORY_BYTES: usize = 4096;

/// What the last test said: none if all is well.
#[derive(Clone)]
pub struct Tested {
    trouble: watch::Receiver<Option<String>>,
}

impl Tested {
    /// Tests now and from time to time, in a thread of its own. Until the first test is done KVM counts as broken.
    pub fn start() -> Tested {
        Tested::every(INTERVAL, test)
    }

    /// The same with this test, and this long between two of them.
    pub(super) fn every(interval: Duration, test: impl Fn() -> Result<(), String> + Clone + Send + 'static) -> Tested {
        let (sender, trouble) = watch::channel(Some("not tested yet".to_owned()));
        let work = move || {
            let mut patience = PATIENCE;
            let say = |said: Option<String>| tell(&sender, said);
            loop {
                let took = examine(test.clone(), patience, &say);
                patience = took.map_or(patience, patience_after);
                std::thread::sleep(interval);
            }
        };
        if let Err(error) = std::thread::Builder::new().name("kvm-test".to_owned()).spawn(work) {
            tracing::error!("no thread to test KVM: {error}");
        }
        Tested { trouble }
    }

    /// Tested once, with a test that ends, and goes well, when the other end says so.
    #[cfg(test)]
    pub(super) fn held() -> (Tested, std::sync::mpsc::Sender<()>) {
        let (pass, passes) = channel::<()>();
        let passes = std::sync::Arc::new(std::sync::Mutex::new(passes));
        let test = move || {
            let passed = passes.lock().unwrap().recv();
            passed.map_err(|error| error.to_string())
        };
        (Tested::every(Duration::from_secs(3600), test), pass)
    }

    /// What is wrong, if anything is.
    pub fn trouble(&self) -> Option<String> {
        self.trouble.borrow().clone()
    }

    /// Waits until that changes.
    pub async fn changed(&mut self) {
        if self.trouble.changed().await.is_err() {
            // No more tests: nothing changes any more.
            std::future::pending().await
        }
    }
}

fn tell(sender: &watch::Sender<Option<String>>, said: Option<String>) {
    if *sender.borrow() == said {
        return;
    }
    match &said {
        None => tracing::info!("KVM works"),
        Some(why) => tracing::error!("KVM: {why}; no new seats are placed here"),
    }
    // The receivers live as long as the process.
    let _ = sender.send(said);
}

/// How long a test may take on a machine on which a good one took so long: a fast machine's failure is seen soon, a slow one is no failure.
fn patience_after(took: Duration) -> Duration {
    (SLOWER * took).clamp(PATIENCE, PATIENCE_MAX)
}

/// Runs the test on a thread of its own, as a broken KVM may never answer, and says what it said, or meanwhile that it is late. Returns how long it
/// took if all is well. A test that hangs is waited for without end: no second one is sent after it into the kernel.
fn examine(
    test: impl FnOnce() -> Result<(), String> + Send + 'static,
    patience: Duration,
    say: &impl Fn(Option<String>),
) -> Option<Duration> {
    let begin = Instant::now();
    let (sender, receiver) = channel();
    // Whoever waits does not go away.
    let work = move || drop(sender.send(test()));
    if let Err(error) = std::thread::Builder::new().name("kvm-guest".to_owned()).spawn(work) {
        say(Some(format!("no thread: {error}")));
        return None;
    }
    let in_time = receiver.recv_timeout(patience);
    let said = in_time.or_else(|error| {
        if error == RecvTimeoutError::Timeout {
            let seconds = patience.as_secs();
            say(Some(format!(
                "a guest of six instructions did not end within {seconds} s"
            )));
        }
        receiver.recv()
    });
    let said = said.unwrap_or_else(|_| Err("the test itself failed".to_owned()));
    let took = said.is_ok().then(|| begin.elapsed());
    say(said.err());
    took
}

/// A page of memory for the guest.
struct Page(*mut u8);

impl Page {
    fn new() -> Result<Page, String> {
        // SAFETY: a new private mapping.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                MEMORY_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(format!("no memory for a guest: {}", std::io::Error::last_os_error()));
        }
        // SAFETY: the page is ours alone and larger than the code.
        unsafe { std::ptr::copy_nonoverlapping(CODE.as_ptr(), page.cast(), CODE.len()) };
        Ok(Page(page.cast()))
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; the virtual machine that used it is gone.
        unsafe { libc::munmap(self.0.cast(), MEMORY_BYTES) };
    }
}

/// Runs the guest.
pub(super) fn test() -> Result<(), String> {
    let page = Page::new()?;
    let failed = |what: &'static str| move |error: kvm_ioctls::Error| format!("{what}: {error}");
    let kvm = Kvm::new().map_err(failed("/dev/kvm can't be opened; load kvm-intel or kvm-amd"))?;
    let vm = kvm.create_vm().map_err(failed("no virtual machine"))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY_BYTES as u64,
        userspace_addr: page.0 as u64,
    };
    // SAFETY: the page outlives the virtual machine, which is dropped before it.
    unsafe { vm.set_user_memory_region(region) }.map_err(failed("no guest memory"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(failed("no vCPU"))?;
    let mut sregs = vcpu.get_sregs().map_err(failed("no registers"))?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).map_err(failed("segments not set"))?;
    let mut regs = vcpu.get_regs().map_err(failed("no registers"))?;
    (regs.rip, regs.rflags) = (0, 2);
    vcpu.set_regs(&regs).map_err(failed("registers not set"))?;
    let mut said = Vec::new();
    loop {
        match vcpu.run().map_err(failed("the guest does not run"))? {
            VcpuExit::IoOut(PORT, data) if said.len() < SAID.len() => said.extend_from_slice(data),
            VcpuExit::Hlt if said == SAID => return Ok(()),
            other => return Err(format!("the guest said {said:?} and then did {other:?}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_does_what_it_should() {
        assert_eq!(test(), Ok(()));
    }

    /// What is said of a test, in order, and how long it took if all was well.
    fn examined(
        test: impl FnOnce() -> Result<(), String> + Send + 'static,
        patience: Duration,
    ) -> (Vec<Option<String>>, Option<Duration>) {
        let said = std::cell::RefCell::new(Vec::new());
        let took = examine(test, patience, &|word| said.borrow_mut().push(word));
        (said.into_inner(), took)
    }

    #[test]
    fn a_test_that_ends_late_is_told_as_late_and_then_believed() {
        let (sender, receiver) = channel::<()>();
        let late = std::cell::Cell::new(false);
        let said = std::cell::RefCell::new(Vec::new());
        let sender = std::cell::Cell::new(Some(sender));
        let took = examine(
            move || receiver.recv().map_err(|error| error.to_string()),
            Duration::from_millis(20),
            &|word: Option<String>| {
                // It ends only after it was told to be late.
                late.set(late.get() || word.as_ref().is_some_and(|why| why.contains("did not end within")));
                said.borrow_mut().push(word);
                if let Some(sender) = sender.take() {
                    sender.send(()).unwrap();
                }
            },
        );
        assert!(late.get());
        assert_eq!(said.borrow().last(), Some(&None));
        assert!(took.unwrap() >= Duration::from_millis(20));
    }

    #[test]
    fn a_test_that_fails_or_dies_is_told_and_gives_no_measure() {
        let patience = Duration::from_secs(20);
        let (said, took) = examined(|| Err("it said k".to_owned()), patience);
        assert_eq!((said, took), (vec![Some("it said k".to_owned())], None));
        let (said, took) = examined(|| std::panic::resume_unwind(Box::new(())), patience);
        assert_eq!((said, took), (vec![Some("the test itself failed".to_owned())], None));
        let (said, took) = examined(|| Ok(()), patience);
        assert_eq!((said, took.is_some()), (vec![None], true));
    }

    #[test]
    fn a_fast_machines_failure_is_seen_soon_and_a_slow_machine_is_waited_for() {
        assert_eq!(patience_after(Duration::from_millis(3)), PATIENCE);
        assert_eq!(patience_after(Duration::from_secs(5)), PATIENCE);
        assert_eq!(patience_after(Duration::from_secs(30)), Duration::from_secs(120));
        assert_eq!(patience_after(Duration::from_secs(3600)), PATIENCE_MAX);
    }
}
