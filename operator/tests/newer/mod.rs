//! A VM that says what only another release of the operator knows: it is told so, and no other VM notices.

use anyhow::ensure;
use ftvm_e2e::cluster::{Cluster, wait_for};
use serde_json::json;

use super::troubles::small;
use super::{PATIENCE, merge, wait_event, wait_reason};

/// Where the definition has the third run strategy, which a newer release might have.
const THIRD: &str = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/runStrategy/enum/2";

/// Changes the definition.
fn define(cluster: &Cluster, patch: &serde_json::Value) -> anyhow::Result<()> {
    let (definition, patch) = ("crd/faulttolerantvms.ftvm.dev", patch.to_string());
    cluster
        .kubectl(&["patch", definition, "--type=json", "--patch", &patch])
        .map(drop)
}

/// Makes one; the operator tells of it.
pub fn apply(cluster: &Cluster) -> anyhow::Result<()> {
    define(cluster, &json!([{"op": "add", "path": THIRD, "value": "Sometimes"}]))?;
    let mut vm = small("newer", "local");
    merge(&mut vm["spec"], &json!({"runStrategy": "Sometimes"}));
    wait_for("the API server takes the newer definition", PATIENCE, || {
        cluster.apply(&vm.to_string())
    })?;
    wait_event(
        cluster,
        "newer",
        "Unreadable",
        "spec.runStrategy: unknown variant `Sometimes`",
    )?;
    beside(cluster, "beside")
}

/// Another VM is attended to.
pub fn beside(cluster: &Cluster, name: &str) -> anyhow::Result<()> {
    cluster.apply(&small(name, "local").to_string())?;
    wait_reason(cluster, name, "Protected", "NoKvmNode")?;
    cluster.kubectl(&["delete", "ftvm", name, "--timeout=180s"]).map(drop)
}

/// Whoever leads now attends to others, and to this one once it can be read.
pub fn correct(cluster: &Cluster) -> anyhow::Result<()> {
    beside(cluster, "beside-too")?;
    let untouched = cluster.get(&["ftvm", "newer"])?;
    ensure!(untouched["status"].is_null(), "{untouched}");
    let halt = json!({"spec": {"runStrategy": "Halted"}}).to_string();
    cluster.kubectl(&["patch", "ftvm", "newer", "--type=merge", "-p", &halt])?;
    wait_reason(cluster, "newer", "Ready", "Halted")?;
    cluster.kubectl(&["delete", "ftvm", "newer", "--timeout=180s"])?;
    let third = json!([
        {"op": "test", "path": THIRD, "value": "Sometimes"},
        {"op": "remove", "path": THIRD},
    ]);
    define(cluster, &third)
}
