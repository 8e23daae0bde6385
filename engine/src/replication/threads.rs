//! Starting the threads of replication, each under the system call filter of its kind.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use crate::seccomp::{Filters, ThreadKind};

/// The filters that new threads enter; `None` where there are none (tests, measuring).
pub type ThreadFilters = Option<Arc<Filters>>;

/// Starts a thread that enters its filter first thing. A thread that can't is an engine without protection: it ends
/// the process's work by panicking, which its owner sees as a thread that is gone.
pub(super) fn spawn<T: Send + 'static>(
    name: String,
    kind: ThreadKind,
    filters: &ThreadFilters,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let filters = filters.clone();
    std::thread::Builder::new().name(name).spawn(move || {
        enter(kind, filters.as_ref());
        body()
    })
}

/// Puts the calling thread under the filter of its kind, as [`spawn`] does.
pub(super) fn enter(kind: ThreadKind, filters: Option<&Arc<Filters>>) {
    if let Some(filters) = filters {
        filters
            .enter(kind)
            .expect("a thread enters the filter that was compiled for it");
    }
}
