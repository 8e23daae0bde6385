//! A proxy before the API server that does what networks, load balancers and overloaded servers do: it delays and applies later, says
//! that it failed when it did not, answers with what was true once, cuts in the middle.
//!
//! ```text
//!   kubelets, kube-proxies, pods ──TLS──► ApiProxy 10.77.0.2 ──TLS──► kube-apiserver 10.77.0.1 ◄── people, control plane
//!                                            │ asks [`Chooser`] for a [`Fault`], request by request
//! ```
//!
//! Who asks stays who they are: tokens pass, and for a client certificate the proxy presents the same one, whose key it has from the
//! cluster's authority. HTTP/1.1 on both sides, without upgrades (`kubectl exec`).
//!
//! Invariant: watches, and paths that are no objects (`/readyz`, discovery), always pass as they are.
//!
//! Invariant: what is counted as a falsehood was one. A write counts as applied if the API server said so to the proxy, a read as stale
//! if the API server's own answer was newer.
mod fault;
mod path;
mod serve;
mod upstream;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;

use anyhow::Context;
use tokio::sync::oneshot;

pub use fault::{Dice, Fault};
pub use path::{Asked, Asker};

use self::serve::History;
use self::upstream::Upstream;
use super::pki::Authority;
use crate::hosts::namespace;
use crate::lab::Sandbox;

/// Chooses what becomes of a request.
type Chooser = Box<dyn FnMut(&Asked) -> Fault + Send>;

/// What the proxy did so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Deeds {
    /// Requests, watches among them.
    pub requests: BTreeMap<Asker, u64>,
    /// Falsehoods that came about, by user, resource and [`Fault::name`].
    pub falsehoods: BTreeMap<(String, String, &'static str), u64>,
}

impl Deeds {
    /// How many falsehoods of a kind came about, of those that are told to such users about such resources.
    #[must_use]
    pub fn told(&self, fault: Fault, about: impl Fn(&str, &str) -> bool) -> u64 {
        let fits = |(user, resource, name): &(String, String, &str)| *name == fault.name() && about(user, resource);
        let told = self.falsehoods.iter().filter(|(key, _)| fits(key));
        told.map(|(_, count)| count).sum()
    }
}

/// A running proxy; dropping it cuts everyone off.
pub struct ApiProxy {
    shared: Arc<Shared>,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// What all its connections share.
struct Shared {
    upstream: Upstream,
    chooser: Mutex<Chooser>,
    deeds: Mutex<Deeds>,
    history: Mutex<History>,
}

impl Shared {
    fn choose(&self, asked: &Asked) -> Fault {
        *self.deeds().requests.entry(asked.asker.clone()).or_default() += 1;
        if asked.passes_always() {
            return Fault::None;
        }
        (self.chooser.lock().unwrap_or_else(PoisonError::into_inner))(asked)
    }

    /// A falsehood came about.
    fn told(&self, asked: &Asked, fault: Fault) {
        let key = (asked.asker.user.clone(), asked.resource.clone(), fault.name());
        *self.deeds().falsehoods.entry(key).or_default() += 1;
    }

    fn deeds(&self) -> MutexGuard<'_, Deeds> {
        self.deeds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ApiProxy {
    /// Listens at the address that the cluster's nodes and pods get; everything passes until [`ApiProxy::falsify`].
    pub(super) fn start(sandbox: &Sandbox, folder: &Path, authority: &Authority) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared {
            upstream: Upstream::new(authority)?,
            chooser: Mutex::new(Box::new(|_| Fault::None)),
            deeds: Mutex::default(),
            history: Mutex::default(),
        });
        let acceptor = upstream::acceptor(folder, authority)?;
        let network = sandbox.network().try_clone()?;
        let (end, ended) = oneshot::channel();
        let (tell, told) = mpsc::channel();
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("api-proxy".to_owned())
            .spawn(move || {
                let runtime = || -> anyhow::Result<_> {
                    namespace::enter_network(&network)?;
                    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
                };
                match runtime() {
                    Ok(runtime) => runtime.block_on(serve::serve(for_thread, acceptor, ended, &tell)),
                    Err(error) => drop(tell.send(Err(error))),
                }
            })?;
        told.recv().context("the proxy's thread ended")??;
        Ok(Self {
            shared,
            end: Some(end),
            thread: Some(thread),
        })
    }

    /// From now on this decides what becomes of each request that is about an object or a list.
    pub fn falsify(&self, chooser: impl FnMut(&Asked) -> Fault + Send + 'static) {
        *self.shared.chooser.lock().unwrap_or_else(PoisonError::into_inner) = Box::new(chooser);
    }

    /// From now on everything passes. What was held back to be applied later still will be.
    pub fn calm(&self) {
        self.falsify(|_| Fault::None);
    }

    /// What it did so far.
    #[must_use]
    pub fn deeds(&self) -> Deeds {
        self.shared.deeds().clone()
    }
}

impl Drop for ApiProxy {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            // A panic was printed.
            let _ = thread.join();
        }
    }
}
