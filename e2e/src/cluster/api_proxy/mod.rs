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
//! A watch is asked about when it begins, and then again and again as long as it runs ([`Asked::running`]); everything that happens to it is
//! what an API server, its watch cache or something between may do. So events are never reordered or made up: the store's order is kept by
//! all of them. What is old comes from the API server itself.
//!
//! Invariant: paths that are no objects (`/readyz`, discovery), and watches in another format than JSON (kubelet's), always pass as they are.
//!
//! Invariant: what is counted as a falsehood was one. A write counts as applied if the API server said so to the proxy, a read as stale
//! if the API server's own answer was newer, a list as old if another one would have been right, what happens to events once one was there.
mod fault;
mod history;
mod path;
mod serve;
#[cfg(test)]
mod tests;
mod upstream;
mod watch;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::Context;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch as signal};

pub use fault::{Dice, Fault};
pub use path::{Asked, Asker};
pub(super) use serve::version_of;

use self::history::History;
use self::upstream::Upstream;
use super::pki::Authority;
use super::plan::{API_PORT, api_address, api_front_address};
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

/// A request of a pod that changes something.
#[derive(Debug, Clone, PartialEq)]
pub struct PodWrite {
    /// What it asked.
    pub asked: Asked,
    /// When the proxy had read it.
    pub arrived: Instant,
    /// When it was given to the API server, first; none if it was not.
    pub sent: Option<Instant>,
    /// The object that the API server made of it, if it took it.
    pub made: Option<Value>,
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
    writes: Mutex<Vec<PodWrite>>,
    /// Another chooser was set: what runs asks it.
    changed: signal::Sender<()>,
}

impl Shared {
    fn new(upstream: Upstream) -> Self {
        Self {
            upstream,
            chooser: Mutex::new(Box::new(|_| Fault::None)),
            deeds: Mutex::default(),
            history: Mutex::default(),
            writes: Mutex::default(),
            changed: signal::Sender::new(()),
        }
    }

    fn falsify(&self, chooser: impl FnMut(&Asked) -> Fault + Send + 'static) {
        *self.chooser.lock().unwrap_or_else(PoisonError::into_inner) = Box::new(chooser);
        self.changed.send_replace(());
    }

    fn choose(&self, asked: &Asked) -> Fault {
        *self.deeds().requests.entry(asked.asker.clone()).or_default() += 1;
        if asked.passes_always() {
            return Fault::None;
        }
        self.draw(asked)
    }

    /// For what was asked before and runs.
    fn draw(&self, asked: &Asked) -> Fault {
        (self.chooser.lock().unwrap_or_else(PoisonError::into_inner))(asked)
    }

    fn writes(&self) -> MutexGuard<'_, Vec<PodWrite>> {
        self.writes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a pod's write is written down.
    fn arrived(&self, asked: &Asked) -> Option<usize> {
        if !asked.writes() || asked.asker.pod.is_none() {
            return None;
        }
        let mut writes = self.writes();
        writes.push(PodWrite {
            asked: asked.clone(),
            arrived: Instant::now(),
            sent: None,
            made: None,
        });
        Some(writes.len() - 1)
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
        let upstream = Upstream::new(SocketAddr::from((api_address(), API_PORT)), authority)?;
        let shared = Arc::new(Shared::new(upstream));
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
                    Ok(runtime) => runtime.block_on(async {
                        let address = SocketAddr::from((api_front_address(), API_PORT));
                        let listener = TcpListener::bind(address).await;
                        match listener.with_context(|| format!("cannot listen at {address}")) {
                            Ok(listener) => {
                                // Who started this waits for it.
                                let _ = tell.send(Ok(()));
                                serve::serve(for_thread, acceptor, listener, ended).await;
                            }
                            Err(error) => drop(tell.send(Err(error))),
                        }
                    }),
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

    /// From now on this decides what becomes of each request that is about objects, and of each watch that runs.
    pub fn falsify(&self, chooser: impl FnMut(&Asked) -> Fault + Send + 'static) {
        self.shared.falsify(chooser);
    }

    /// From now on everything passes. What was held back to be applied later still will be.
    pub fn calm(&self) {
        self.falsify(|_| Fault::None);
    }

    /// Every write of a pod so far, in the order in which they came.
    #[must_use]
    pub fn writes(&self) -> Vec<PodWrite> {
        self.shared.writes().clone()
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
