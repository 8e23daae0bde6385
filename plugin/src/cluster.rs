//! What is asked of the API server. Nothing is decided in here.

use std::collections::BTreeMap;
use std::time::Duration;

use ftvm_crds::FaultTolerantVM;
use ftvm_crds::names::LABEL_VM;
use ftvm_crds::seat::SeatPublished;
use ftvm_watch::explain;
use futures::Stream;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams, Patch, PatchParams};
use kube::config::KubeConfigOptions;
use kube::core::PartialObjectMeta;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event};
use kube::{Client, Config, ResourceExt as _};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::arguments::Place;
use crate::failure::Failure;
use crate::seen::Seen;

/// Who writes what is asked for.
const MANAGER: &str = "kubectl-ftvm";
/// An API server that does not answer for so long is given up.
const ANSWER: Duration = Duration::from_secs(20);
/// VMs, or pods, that one answer may have.
const PAGE: u32 = 500;
/// Which proxy that is is not told: there may be a password in it.
const NO_PROXIES: &str = "this program can't use the proxy that HTTPS_PROXY, https_proxy, or proxy-url in the kubeconfig names; unset the variable for this command if the API server is reached without";

/// What the pods of a VM's seats say of themselves, by the pods' UIDs; or why they can't be read.
pub type Said = Result<BTreeMap<String, Result<SeatPublished, String>>, String>;

/// A namespace of a cluster.
pub struct Cluster {
    client: Client,
    /// Its name.
    pub namespace: String,
}

impl Cluster {
    /// The one that is chosen. Nothing is asked yet.
    pub async fn connect(place: &Place) -> Result<Cluster, Failure> {
        let config = match &place.context {
            Some(context) => {
                let options = KubeConfigOptions {
                    context: Some(context.clone()),
                    ..KubeConfigOptions::default()
                };
                let read = Config::from_kubeconfig(&options).await;
                read.map_err(|error| Failure::Config(explain(&error)))?
            }
            None => Config::infer()
                .await
                .map_err(|error| Failure::Config(explain(&error)))?,
        };
        if config.proxy_url.is_some() {
            return Err(Failure::Config(NO_PROXIES.to_owned()));
        }
        let namespace = place.namespace.clone();
        let namespace = namespace.unwrap_or_else(|| config.default_namespace.clone());
        let client = ftvm_watch::client(config).map_err(|error| Failure::Config(explain(&error)))?;
        Ok(Cluster { client, namespace })
    }

    fn vms(&self) -> Api<Seen> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    fn vms_of(&self, all: bool) -> Api<Seen> {
        if all { Api::all(self.client.clone()) } else { self.vms() }
    }

    /// How people find it again.
    fn path(&self, name: &str) -> String {
        format!("FaultTolerantVM {}/{name}", self.namespace)
    }

    /// A VM, whether or not it can be read; none if there is none.
    pub async fn look(&self, name: &str) -> Result<Option<Seen>, Failure> {
        answered(&format!("get {}", self.path(name)), self.vms().get_opt(name)).await
    }

    /// A VM, whether or not it can be read.
    pub async fn seen(&self, name: &str) -> Result<Seen, Failure> {
        let found = self.look(name).await?;
        found.ok_or_else(|| Failure::NoVm {
            namespace: self.namespace.clone(),
            name: name.to_owned(),
        })
    }

    /// A VM that this release can read.
    pub async fn vm(&self, name: &str) -> Result<Box<FaultTolerantVM>, Failure> {
        self.readable(name, self.seen(name).await?)
    }

    /// What this release makes of it.
    pub fn readable(&self, name: &str, seen: Seen) -> Result<Box<FaultTolerantVM>, Failure> {
        seen.vm.map_err(|why| Failure::Unreadable {
            namespace: self.namespace.clone(),
            name: name.to_owned(),
            why,
        })
    }

    /// All VMs of the namespace, or of all namespaces, in the API server's order.
    pub async fn fleet(&self, all: bool) -> Result<Vec<Seen>, Failure> {
        let api = self.vms_of(all);
        let mut found = Vec::new();
        let mut params = ListParams::default().limit(PAGE);
        loop {
            let page = answered("list FaultTolerantVMs", api.list(&params)).await?;
            found.extend(page.items);
            match page.metadata.continue_ {
                Some(token) if !token.is_empty() => params = params.continue_token(&token),
                _ => return Ok(found),
            }
        }
    }

    /// Changes of one VM, or of all that [`Cluster::fleet`] has, from how they are now on.
    pub fn changes(&self, name: Option<&str>, all: bool) -> impl Stream<Item = watcher::Result<Event<Seen>>> {
        let config = watcher::Config::default();
        let config = match name {
            Some(name) => config.fields(&format!("metadata.name={name}")),
            None => config,
        };
        ftvm_watch::lasting(self.vms_of(all), config).default_backoff()
    }

    /// What the pods of a VM say. Nobody needs the right to see pods to be told how a VM is.
    pub async fn said(&self, name: &str) -> Said {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let params = ListParams::default().labels(&format!("{LABEL_VM}={name}")).limit(PAGE);
        let listed = answered("list pods", pods.list_metadata(&params)).await;
        let listed = listed.map_err(|failure| failure.to_string())?;
        let said = |pod: PartialObjectMeta<Pod>| {
            let published = SeatPublished::of(pod.annotations()).map_err(|error| error.to_string());
            Some((pod.uid()?, published))
        };
        Ok(listed.items.into_iter().filter_map(said).collect())
    }

    /// A VM's Lease, with the arbiter's record.
    pub async fn lease(&self, name: &str) -> Result<Option<Lease>, Failure> {
        let leases: Api<Lease> = Api::namespaced(self.client.clone(), &self.namespace);
        let what = format!("get Lease {}/{name}", self.namespace);
        answered(&what, leases.get_opt(name)).await
    }

    /// Changes exactly this VM, not another one of its name; returns it as it is then.
    pub async fn change(&self, vm: &FaultTolerantVM, mut change: Value) -> Result<Box<FaultTolerantVM>, Failure> {
        change["metadata"]["uid"] = json!(vm.uid());
        let name = vm.name_any();
        let params = PatchParams {
            field_manager: Some(MANAGER.to_owned()),
            ..PatchParams::default()
        };
        let what = format!("patch {}", self.path(&name));
        let changed = answered(&what, self.vms().patch(&name, &params, &Patch::Merge(change))).await;
        let changed = changed.map_err(|failure| match failure {
            // It was there a moment ago.
            Failure::NoKind { .. } => Failure::Gone {
                namespace: self.namespace.clone(),
                name: name.clone(),
            },
            Failure::ApiServer {
                what,
                why,
                lasts: false,
            } => Failure::ApiServer {
                what,
                why: format!("{why}; it may have been changed all the same: see before you ask again"),
                lasts: false,
            },
            failure => failure,
        });
        self.readable(&name, changed?)
    }
}

async fn answered<T>(what: &str, request: impl Future<Output = kube::Result<T>>) -> Result<T, Failure> {
    match timeout(ANSWER, request).await {
        Ok(answer) => answer.map_err(|error| Failure::of(what, &error)),
        Err(_) => Err(Failure::ApiServer {
            what: what.to_owned(),
            why: format!("the API server has not answered for {} s", ANSWER.as_secs()),
            lasts: false,
        }),
    }
}
