//! Whether KVM works here: a guest of a few instructions is run and must do exactly what it should.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};
use tokio::sync::watch;

/// How often it is tested.
const INTERVAL: Duration = Duration::from_secs(60);
/// A test that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(20);

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
        let (sender, trouble) = watch::channel(Some("not tested yet".to_owned()));
        let work = move || {
            let hanging = Arc::new(AtomicBool::new(false));
            loop {
                let said = test_in_time(&hanging).err();
                if *sender.borrow() != said {
                    match &said {
                        None => tracing::info!("KVM works"),
                        Some(why) => tracing::error!("KVM: {why}; no new seats are placed here"),
                    }
                    // The receivers live as long as the process.
                    let _ = sender.send(said);
                }
                std::thread::sleep(INTERVAL);
            }
        };
        if let Err(error) = std::thread::Builder::new().name("kvm-test".to_owned()).spawn(work) {
            tracing::error!("no thread to test KVM: {error}");
        }
        Tested { trouble }
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

/// On a thread of its own: a broken KVM may never answer. No second one is sent after it.
fn test_in_time(hanging: &Arc<AtomicBool>) -> Result<(), String> {
    if hanging.swap(true, Ordering::SeqCst) {
        return Err("an earlier test still hangs in the kernel".to_owned());
    }
    let (sender, receiver) = channel();
    let done = hanging.clone();
    let work = move || {
        let said = test();
        done.store(false, Ordering::SeqCst);
        // Nobody waits any more after the patience.
        let _ = sender.send(said);
    };
    let spawned = std::thread::Builder::new().name("kvm-guest".to_owned()).spawn(work);
    if let Err(error) = spawned {
        hanging.store(false, Ordering::SeqCst);
        return Err(format!("no thread: {error}"));
    }
    let late = |_| {
        format!(
            "a guest of six instructions did not end within {} s",
            PATIENCE.as_secs()
        )
    };
    receiver.recv_timeout(PATIENCE).map_err(late)?
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

fn test() -> Result<(), String> {
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

    #[test]
    fn a_test_that_hangs_is_not_joined_by_others() {
        let hanging = Arc::new(AtomicBool::new(true));
        assert!(test_in_time(&hanging).is_err_and(|why| why.contains("still hangs")));
    }
}
