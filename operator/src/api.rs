//! Requests to the API server: each is counted, none is repeated in here.

use std::fmt::Debug;

use ftvm_crds::names::{
    ANNOTATION_LOOK, ANNOTATION_NODES, ANNOTATION_REQUEST, FINALIZER, MANAGED_BY, authority_secret_name,
    identity_secret_name,
};
use ftvm_crds::quantity::QuantityError;
use ftvm_crds::seat::SeatRequest;
use ftvm_crds::{FaultTolerantVM, FaultTolerantVMStatus, lease};
use ftvm_protocol::identity::SeatId;
use ftvm_protocol::record::{Phase, Record};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, PersistentVolumeClaim, Pod, Secret};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::core::Status;
use kube::{Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::build::{self, Authority, IdentityError};
use crate::metrics::{Metrics, VERBS};

/// Why something could not be done.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The API server's answer, or none.
    #[error("{verb} {kind} {name}: {source}")]
    Request {
        /// What was asked.
        verb: &'static str,
        /// Of which kind.
        kind: String,
        /// Of which object.
        name: String,
        /// The answer.
        source: Box<kube::Error>,
    },
    /// An identity could not be made.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// A size in the spec is none.
    #[error("the VM's spec: {0}")]
    Quantity(#[from] QuantityError),
    /// The authority is gone, and who may live trusts it alone.
    #[error(
        "Secret {name} is gone, and {trusts} trusts that authority alone: restore the Secret from a backup, with its labels and owner; or set spec.runStrategy to Halted, wait until the VM is halted, and start it: a new one is made once nobody trusts the old one"
    )]
    AuthorityGone {
        /// Name of the Secret.
        name: String,
        /// Who.
        trusts: String,
    },
    /// The authority is another VM's of this name.
    #[error(
        "Secret {name} belongs to another object than this VM ({found}): wait until the deleted VM of this name is gone, or remove that Secret"
    )]
    AuthorityForeign {
        /// Name of the Secret.
        name: String,
        /// UID of the owner, or `no owner`.
        found: String,
    },
    /// It is not known how guest images come into pods here.
    #[error(
        "whether the cluster has image volumes is not known ({0}): no pod of a seat is made until it is; it is asked again, or say so with the chart's value imageVolumes (always, never)"
    )]
    ImageVolumes(String),
    /// The VM is not in a namespace, or has no UID.
    #[error("the VM {0} has no namespace or UID: it was not read from an API server")]
    Unread(String),
}

impl ApiError {
    /// What the API server answered.
    fn answer(&self) -> Option<&Status> {
        let ApiError::Request { source, .. } = self else {
            return None;
        };
        match &**source {
            kube::Error::Api(status) => Some(status),
            _ => None,
        }
    }

    /// Somebody was faster: what was observed is old. The next look decides anew.
    pub fn is_conflict(&self) -> bool {
        self.answer().is_some_and(|status| status.code == 409)
    }

    /// The object is not there.
    pub fn is_gone(&self) -> bool {
        self.answer().is_some_and(|status| status.code == 404)
    }

    /// The object is there already. Another conflict says nothing of the kind: a quota that changes at that moment is one.
    fn is_there(&self) -> bool {
        self.is_conflict() && self.answer().is_some_and(|status| status.reason == "AlreadyExists")
    }

    /// Why the API server refuses this, if it is likely to refuse the same again: not what it could not answer, what needs other
    /// credentials, nor what somebody changed meanwhile. A webhook that it can't ask is an error of its own for it, and lasts, too.
    pub fn refusal(&self) -> Option<&Status> {
        let status = self.answer()?;
        let of_request = (400..500).contains(&status.code) && ![401, 408, 409, 429].contains(&status.code);
        let of_webhook = status.code == 500 && status.message.contains("webhook");
        (of_request || of_webhook).then_some(status)
    }

    /// Does it need a person, and last until then? Not what could not be answered, nor what somebody changed meanwhile.
    pub fn needs_person(&self) -> bool {
        let of_authority = matches!(
            self,
            ApiError::AuthorityGone { .. } | ApiError::AuthorityForeign { .. } | ApiError::Identity(_)
        );
        of_authority || self.refusal().is_some()
    }
}

/// Kinds that this operator reads and writes.
pub trait Kind:
    Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + Serialize + DeserializeOwned
{
}
impl<K> Kind for K where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + Serialize + DeserializeOwned
{
}

/// The objects of one namespace.
#[derive(Clone)]
pub struct Objects {
    client: Client,
    metrics: Metrics,
    namespace: String,
}

impl Objects {
    /// Those of this namespace.
    pub fn new(client: Client, metrics: Metrics, namespace: &str) -> Objects {
        Objects {
            client,
            metrics,
            namespace: namespace.to_owned(),
        }
    }

    fn api<K: Kind>(&self, verb: &'static str) -> Api<K> {
        debug_assert!(VERBS.contains(&verb), "the list of metrics lacks {verb}");
        self.metrics.requests.with_label_values(&[verb, &K::kind(&())]).inc();
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// An object past every cache; none if there is none.
    ///
    /// # Errors
    /// If the API server can't be asked.
    pub async fn get<K: Kind>(&self, name: &str) -> Result<Option<K>, ApiError> {
        let got = self.api::<K>("get").get_opt(name).await;
        got.map_err(failed::<K>("get", name))
    }

    /// A node past every cache; none if there is none.
    ///
    /// # Errors
    /// If the API server can't be asked.
    pub async fn node(&self, name: &str) -> Result<Option<Node>, ApiError> {
        let requests = &self.metrics.requests;
        requests.with_label_values(&["get", &Node::kind(&())]).inc();
        let got = Api::<Node>::all(self.client.clone()).get_opt(name).await;
        got.map_err(failed::<Node>("get", name))
    }

    /// Server-side apply; makes the object if there is none.
    ///
    /// # Errors
    /// If the API server refuses.
    pub async fn apply<K: Kind>(&self, object: &K) -> Result<K, ApiError> {
        let name = object.name_any();
        let params = PatchParams::apply(MANAGED_BY).force();
        let applied = self
            .api::<K>("apply")
            .patch(&name, &params, &Patch::Apply(object))
            .await;
        applied.map_err(failed::<K>("apply", &name))
    }

    /// Makes an object; that it exists already is no error.
    ///
    /// # Errors
    /// If the API server refuses.
    pub async fn create<K: Kind>(&self, object: &K) -> Result<(), ApiError> {
        let name = object.name_any();
        let made = self.api::<K>("create").create(&params(), object).await;
        match made.map_err(failed::<K>("create", &name)) {
            Err(error) if !error.is_there() => Err(error),
            _ => Ok(()),
        }
    }

    /// What the API server would make of an object; nothing is made.
    ///
    /// # Errors
    /// If the API server refuses.
    pub async fn try_create<K: Kind>(&self, object: &K) -> Result<K, ApiError> {
        let name = object.name_any();
        let params = PostParams {
            dry_run: true,
            ..params()
        };
        let tried = self.api::<K>("dry-run").create(&params, object).await;
        tried.map_err(failed::<K>("dry-run", &name))
    }

    async fn merge<K: Kind>(&self, name: &str, patch: serde_json::Value) -> Result<K, ApiError> {
        let params = PatchParams {
            field_manager: Some(MANAGED_BY.to_owned()),
            ..PatchParams::default()
        };
        let merged = self.api::<K>("patch").patch(name, &params, &Patch::Merge(patch)).await;
        merged.map_err(failed::<K>("patch", name))
    }

    /// Deletes exactly this object; that it is gone already is no error.
    ///
    /// # Errors
    /// If it is another one by now, or the API server refuses.
    pub async fn delete<K: Kind>(
        &self,
        name: &str,
        uid: &str,
        version: Option<&str>,
        force: bool,
    ) -> Result<(), ApiError> {
        let params = DeleteParams {
            grace_period_seconds: force.then_some(0),
            preconditions: Some(Preconditions {
                uid: Some(uid.to_owned()),
                resource_version: version.map(str::to_owned),
            }),
            ..DeleteParams::default()
        };
        let deleted = self.api::<K>("delete").delete(name, &params).await;
        match deleted.map_err(failed::<K>("delete", name)) {
            Err(error) if !error.is_gone() => Err(error),
            _ => Ok(()),
        }
    }

    /// Writes the status over exactly the object that was observed.
    ///
    /// # Errors
    /// A conflict if it was changed meanwhile.
    pub async fn write_status(
        &self,
        vm: &FaultTolerantVM,
        status: FaultTolerantVMStatus,
    ) -> Result<FaultTolerantVM, ApiError> {
        let name = vm.name_any();
        let mut object = vm.clone();
        object.status = Some(status);
        object.metadata.managed_fields = None;
        let written = self
            .api::<FaultTolerantVM>("status")
            .replace_status(&name, &params(), &object)
            .await;
        written.map_err(failed::<FaultTolerantVM>("write status of", &name))
    }

    /// Puts the finalizer on or takes it off, over exactly the object that was observed.
    ///
    /// # Errors
    /// A conflict if it was changed meanwhile.
    pub async fn set_finalizer(&self, vm: &FaultTolerantVM, on: bool) -> Result<FaultTolerantVM, ApiError> {
        let mut finalizers: Vec<String> = vm
            .finalizers()
            .iter()
            .filter(|name| *name != FINALIZER)
            .cloned()
            .collect();
        if on {
            finalizers.push(FINALIZER.to_owned());
        }
        let metadata = json!({ "finalizers": finalizers, "resourceVersion": vm.resource_version() });
        self.merge(&vm.name_any(), json!({ "metadata": metadata })).await
    }

    /// Makes a VM's Lease; returns what is there now, whoever made it.
    ///
    /// # Errors
    /// If the API server refuses.
    pub async fn create_lease(&self, vm: &FaultTolerantVM, original: SeatId, node: &str) -> Result<(), ApiError> {
        let name = vm.name_any();
        let owner = build::owner(vm).ok_or_else(|| ApiError::Unread(name.clone()))?;
        self.create(&lease::genesis(
            &self.namespace,
            &name,
            owner,
            original,
            node,
            Timestamp::now(),
        ))
        .await
    }

    /// Makes a VM's Lease anew; that there is one is no error: the next look tells what it is.
    ///
    /// # Errors
    /// If the API server refuses.
    pub async fn recreate_lease(&self, vm: &FaultTolerantVM, record: &Record, nodes: &str) -> Result<(), ApiError> {
        let name = vm.name_any();
        let owner = build::owner(vm).ok_or_else(|| ApiError::Unread(name.clone()))?;
        let nodes = nodes.to_owned();
        self.create(&lease::new(
            &self.namespace,
            &name,
            owner,
            record,
            nodes,
            Timestamp::now(),
        ))
        .await
    }

    /// Writes the first record anew, over exactly the Lease that has this version.
    ///
    /// # Errors
    /// A conflict if an engine wrote its own meanwhile.
    pub async fn rewrite_genesis(&self, name: &str, version: u64, original: SeatId) -> Result<(), ApiError> {
        let Some(mut lease) = self.get::<Lease>(name).await? else {
            return Ok(());
        };
        if lease.resource_version() != Some(version.to_string()) {
            // Another look decides.
            return Ok(());
        }
        lease::set_record(&mut lease, &Record::genesis(original, Phase::Running), Timestamp::now());
        let replaced = self.api::<Lease>("update").replace(name, &params(), &lease).await;
        replaced.map(|_| ()).map_err(failed::<Lease>("update", name))
    }

    /// Says which nodes' daemons may write the record, over exactly the Lease that was observed.
    ///
    /// # Errors
    /// A conflict if it was changed meanwhile.
    pub async fn set_lease_nodes(&self, name: &str, uid: &str, version: &str, nodes: &str) -> Result<(), ApiError> {
        let metadata = json!({ "uid": uid, "resourceVersion": version, "annotations": { ANNOTATION_NODES: nodes } });
        self.merge::<Lease>(name, json!({ "metadata": metadata }))
            .await
            .map(|_| ())
    }

    /// Asks a seat's daemon for something, over exactly the pod that was observed: what a former leader sent takes the place of nothing that
    /// was asked for since.
    ///
    /// # Errors
    /// A conflict if it was changed meanwhile.
    pub async fn request(&self, pod: &str, uid: &str, version: &str, request: &SeatRequest) -> Result<(), ApiError> {
        // Plain data with text keys always encodes.
        let text = serde_json::to_string(request).unwrap_or_default();
        let metadata = json!({ "uid": uid, "resourceVersion": version, "annotations": { ANNOTATION_REQUEST: text } });
        self.merge::<Pod>(pod, json!({ "metadata": metadata }))
            .await
            .map(|_| ())
    }

    /// Asks a seat's daemon to repeat what was drawn. Over whatever the pod is: of two leaders that ask, each asks again.
    ///
    /// # Errors
    /// If the API server refuses, or the pod is another one.
    pub async fn ask_for_word(&self, pod: &str, uid: &str, drawn: &str) -> Result<(), ApiError> {
        let metadata = json!({ "uid": uid, "annotations": { ANNOTATION_LOOK: drawn } });
        self.merge::<Pod>(pod, json!({ "metadata": metadata }))
            .await
            .map(|_| ())
    }

    /// Makes a claim.
    ///
    /// # Errors
    /// If the API server refuses.
    pub async fn create_claim(&self, claim: &PersistentVolumeClaim) -> Result<(), ApiError> {
        self.create(claim).await
    }

    /// The VM's authority; none if it has no Secret.
    ///
    /// # Errors
    /// If the Secret is damaged or another VM's, or the API server refuses.
    pub async fn authority(&self, vm: &FaultTolerantVM) -> Result<Option<Authority>, ApiError> {
        let Some(secret) = self.own_secret(&authority_secret_name(&vm.name_any())).await? else {
            return Ok(None);
        };
        check_owner(&secret, vm)?;
        Ok(Some(build::authority(vm, Some(&secret))?))
    }

    /// Makes the VM's authority. A Secret that is there already is a conflict.
    ///
    /// # Errors
    /// If the API server refuses.
    pub async fn make_authority(&self, vm: &FaultTolerantVM) -> Result<Authority, ApiError> {
        let made = build::authority(vm, None)?;
        let secret = build::secret_of_authority(vm, &made);
        let created = self.api::<Secret>("create").create(&params(), &secret).await;
        created.map_err(failed::<Secret>("create", &secret.name_any()))?;
        Ok(made)
    }

    /// Was an identity made for this pod?
    ///
    /// # Errors
    /// If the API server can't be asked.
    pub async fn has_identity(&self, pod: &str, uid: &str) -> Result<bool, ApiError> {
        let secret = self.own_secret(&identity_secret_name(pod)).await?;
        let mut owners = secret.iter().flat_map(|secret| secret.owner_references());
        Ok(owners.any(|owner| owner.uid == uid))
    }

    /// Makes the identity of a pod.
    ///
    /// # Errors
    /// If a UID is none, or the API server refuses.
    pub async fn issue_identity(
        &self,
        vm: &FaultTolerantVM,
        seat: &str,
        pod_uid: &str,
        authority: &Authority,
    ) -> Result<(), ApiError> {
        match identity_of(vm, seat, pod_uid, authority)? {
            Some(secret) => self.apply(&secret).await.map(|_| ()),
            None => Ok(()),
        }
    }

    /// Has a pod of this name no identity?
    ///
    /// # Errors
    /// If the API server can't be asked.
    pub async fn lacks_identity(&self, pod: &str) -> Result<bool, ApiError> {
        Ok(self.own_secret(&identity_secret_name(pod)).await?.is_none())
    }

    /// Makes the identity of a pod anew that somebody deleted: another key for the same name under the same authority, which is all that others go by. One that
    /// is there is a conflict.
    ///
    /// # Errors
    /// If a UID is none, or the API server refuses.
    pub async fn restore_identity(
        &self,
        vm: &FaultTolerantVM,
        seat: &str,
        pod_uid: &str,
        authority: &Authority,
    ) -> Result<(), ApiError> {
        match identity_of(vm, seat, pod_uid, authority)? {
            // Whoever was faster is right: it is written over nothing.
            Some(secret) => self.create(&secret).await,
            None => Ok(()),
        }
    }

    /// A Secret that the operator made; none if there is none. An empty patch is answered with the object: there is no right to read Secrets.
    async fn own_secret(&self, name: &str) -> Result<Option<Secret>, ApiError> {
        match self.merge::<Secret>(name, json!({})).await {
            Ok(secret) => Ok(Some(secret)),
            Err(error) if error.is_gone() => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The identity of a seat's pod; none if the book has no such seat.
fn identity_of(
    vm: &FaultTolerantVM,
    seat: &str,
    pod_uid: &str,
    authority: &Authority,
) -> Result<Option<Secret>, IdentityError> {
    let mut entries = vm.status.iter().flat_map(|status| &status.seats);
    let entry = entries.find(|entry| entry.name == seat);
    entry
        .map(|entry| build::identity_secret(vm, entry, pod_uid, authority))
        .transpose()
}

/// A VM that is made anew under a name finds what its predecessor had until that is collected.
fn check_owner(secret: &Secret, vm: &FaultTolerantVM) -> Result<(), ApiError> {
    let owners = secret.owner_references();
    if owners.iter().any(|owner| Some(&owner.uid) == vm.metadata.uid.as_ref()) {
        return Ok(());
    }
    let found: Option<String> = owners.first().map(|owner| owner.uid.chars().take(64).collect());
    Err(ApiError::AuthorityForeign {
        name: secret.name_any(),
        found: found.unwrap_or_else(|| "no owner".to_owned()),
    })
}

fn params() -> PostParams {
    PostParams {
        field_manager: Some(MANAGED_BY.to_owned()),
        ..PostParams::default()
    }
}

fn failed<K: Resource<DynamicType = ()>>(verb: &'static str, name: &str) -> impl FnOnce(kube::Error) -> ApiError {
    let name = name.to_owned();
    move |source| ApiError::Request {
        verb,
        kind: K::kind(&()).into_owned(),
        name,
        source: Box::new(source),
    }
}

#[cfg(test)]
mod tests {
    use std::future::ready;
    use std::sync::Arc;

    use ftvm_crds::SeatEntry;
    use ftvm_crds::seat::Order;
    use hyper::Method;
    use hyper::http::request::Parts;
    use tokio::sync::mpsc;

    use super::*;
    use crate::decide::rig;
    use crate::testing::{refused, serve};

    /// An API server that answers everything with 409 and this reason, and what is sent to it.
    async fn conflict(reason: &'static str) -> (Objects, mpsc::UnboundedReceiver<serde_json::Value>) {
        let (sent, told) = mpsc::unbounded_channel();
        let config = serve(move |_, body| {
            sent.send(serde_json::from_slice(&body).unwrap()).unwrap();
            ready(refused(409, reason))
        });
        (objects(config.await), told)
    }

    /// An API server that has these Secrets, and what is made there.
    async fn keeping(secrets: Vec<Secret>) -> (Objects, mpsc::UnboundedReceiver<serde_json::Value>) {
        let (sent, told) = mpsc::unbounded_channel();
        let secrets = Arc::new(secrets);
        let config = serve(move |head: Parts, body| {
            let name = head.uri.path().rsplit('/').next().unwrap_or_default();
            let found = secrets.iter().find(|secret| secret.name_any() == name);
            ready(match found {
                _ if head.method == Method::POST => {
                    let made: serde_json::Value = serde_json::from_slice(&body).unwrap();
                    sent.send(made.clone()).unwrap();
                    Some((201, made.to_string()))
                }
                Some(secret) => Some((200, serde_json::to_string(secret).unwrap())),
                None => refused(404, "NotFound"),
            })
        });
        (objects(config.await), told)
    }

    fn objects(config: kube::Config) -> Objects {
        let client = Client::try_from(config).unwrap();
        Objects::new(client, Metrics::new().unwrap(), "shop")
    }

    /// Somebody deleted it, and a sandbox that is made anew needs it.
    #[tokio::test]
    async fn an_identity_that_is_gone_is_made_anew_and_no_other_one() {
        let uid = "0123abcd-0000-4000-8000-0000000000aa";
        let mut vm = rig::vm();
        let entry = SeatEntry {
            name: "web-a".to_owned(),
            pod_uid: Some(uid.to_owned()),
            ..SeatEntry::default()
        };
        vm.status = Some(FaultTolerantVMStatus {
            seats: vec![entry],
            ..FaultTolerantVMStatus::default()
        });
        let authority = build::authority(&vm, None).unwrap();
        let (objects, mut told) = keeping(Vec::new()).await;
        assert!(objects.lacks_identity("web-a").await.unwrap());
        objects.restore_identity(&vm, "web-a", uid, &authority).await.unwrap();
        let made: Secret = serde_json::from_value(told.recv().await.unwrap()).unwrap();
        assert_eq!(made.name_any(), "web-a-identity");
        assert_eq!(made.owner_references()[0].uid, uid);
        let part = |secret: &Secret, key: &str| secret.data.as_ref().unwrap()[key].clone();
        let secret = build::secret_of_authority(&vm, &authority);
        assert_eq!(part(&made, "authority.pem"), part(&secret, "tls.crt"));
        // One that is there is what an engine may be going by.
        let (objects, _told) = keeping(vec![made]).await;
        assert!(!objects.lacks_identity("web-a").await.unwrap());
    }

    #[tokio::test]
    async fn what_a_seat_is_asked_for_is_written_over_what_was_observed() {
        let (objects, mut told) = conflict("Conflict").await;
        let request = SeatRequest {
            id: "switchover-a".to_owned(),
            order: Order::Switchover,
            until_unix_ms: None,
        };
        let asked = objects.request("web-a", "uid", "7", &request).await;
        assert!(asked.unwrap_err().is_conflict());
        let nodes = objects.set_lease_nodes("web", "uid", "8", "one,two").await;
        assert!(nodes.unwrap_err().is_conflict());
        for version in ["7", "8"] {
            let sent = told.recv().await.unwrap();
            assert_eq!(sent["metadata"]["resourceVersion"], version);
        }
    }

    /// A quota that changes at the same moment is answered with a conflict, too, and nothing is made.
    #[tokio::test]
    async fn only_what_is_there_already_counts_as_made() {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "web-a"}})).unwrap();
        let (objects, _told) = conflict("AlreadyExists").await;
        objects.create(&pod).await.unwrap();
        let (objects, _told) = conflict("Conflict").await;
        assert!(objects.create(&pod).await.unwrap_err().is_conflict());
    }
    #[test]
    fn an_authority_of_another_vm_is_not_taken() {
        let vm = crate::decide::rig::vm();
        let made = build::authority(&vm, None).unwrap();
        let mut secret = build::secret_of_authority(&vm, &made);
        check_owner(&secret, &vm).unwrap();
        let mut anew = vm.clone();
        anew.metadata.uid = Some("99999999-4567-4000-8000-0000000000ff".to_owned());
        let error = check_owner(&secret, &anew).unwrap_err();
        let uid = vm.uid().unwrap();
        assert!(error.needs_person() && error.to_string().contains(&uid), "{error}");
        assert!(error.to_string().contains("remove that Secret"), "{error}");
        secret.metadata.owner_references = None;
        let error = check_owner(&secret, &vm).unwrap_err().to_string();
        assert!(error.contains("no owner"), "{error}");
    }
}
