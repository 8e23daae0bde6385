//! Memory that exists once and is handed out once: the guest has no heap.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, Ordering};

/// A static that one owner takes for good.
#[repr(C, align(4096))]
pub struct Once<T> {
    value: UnsafeCell<T>,
    taken: AtomicBool,
}

// SAFETY: `take` hands out the only reference, to one caller.
unsafe impl<T: Send> Sync for Once<T> {}

impl<T> Once<T> {
    /// A value to be taken once.
    pub const fn new(value: T) -> Self {
        Self {
            value: UnsafeCell::new(value),
            taken: AtomicBool::new(false),
        }
    }

    /// The value; a second call is a defect of this program.
    #[allow(clippy::mut_from_ref)] // the flag makes the reference unique
    pub fn take(&'static self) -> &'static mut T {
        assert!(!self.taken.swap(true, Ordering::AcqRel), "taken twice");
        // SAFETY: the flag lets one caller through, ever.
        unsafe { &mut *self.value.get() }
    }
}

/// A value that one vCPU publishes for all, once.
pub struct Published<T> {
    value: UnsafeCell<Option<T>>,
    there: AtomicBool,
}

// SAFETY: written once, before `there`; from then on only read.
unsafe impl<T: Send + Sync> Sync for Published<T> {}

impl<T: Copy> Published<T> {
    /// Nothing yet.
    pub const fn new() -> Self {
        Self {
            value: UnsafeCell::new(None),
            there: AtomicBool::new(false),
        }
    }

    /// Publishes the value. Only the first vCPU calls it, once.
    pub fn set(&self, value: T) {
        assert!(!self.there.load(Ordering::Acquire), "published twice");
        // SAFETY: nobody reads before `there`, and only one vCPU writes.
        unsafe { *self.value.get() = Some(value) };
        self.there.store(true, Ordering::Release);
    }

    /// The value, once it is there.
    pub fn get(&self) -> Option<T> {
        if !self.there.load(Ordering::Acquire) {
            return None;
        }
        // SAFETY: written before `there`, never again.
        unsafe { *self.value.get() }
    }
}
