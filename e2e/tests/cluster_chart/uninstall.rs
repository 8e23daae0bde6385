//! The hook of `helm uninstall`: how it is rendered, and what it may do.
use ftvm_crds::yaml;
use serde_json::{Value, json};

use crate::admission::{Installed, SHOP, SYSTEM, is_yes, refused};
use crate::chart;
use crate::render::template;

const NAME: &str = "ftvm-uninstall";
const HOOK: &str = "--show-only=templates/uninstall.yaml";

/// The objects that `helm template` makes of one template.
fn objects(arguments: &[&str]) -> Vec<Value> {
    let output = template(arguments);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let read = |document: &str| yaml::read::<Value>(document).unwrap();
    let documents = text.split("\n---\n").map(read);
    documents.filter(|document| !document.is_null()).collect()
}

fn of_kind<'a>(objects: &'a [Value], kind: &str) -> &'a Value {
    objects.iter().find(|object| object["kind"] == kind).unwrap()
}

/// No part of the release; pulled and placed as the operator is. Its rights are gone with it, and what it said when it failed is not.
#[test]
fn the_hook_runs_where_the_operator_does() {
    let everything = format!("--values={}", chart().join("ci/everything-values.yaml").display());
    let with_hook = "--set=uninstall.evenWithVms=false";
    let named = "--set=fullnameOverride=ftvm";
    let nodes = json!({"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
        {"matchExpressions": [{"key": "kubernetes.io/arch", "operator": "In", "values": ["amd64"]}]},
    ]}});
    let nodes_set = format!("--set-json=operator.affinity.nodeAffinity={nodes}");
    let hook = objects(&[HOOK, &everything, &nodes_set, with_hook, named]);
    let mut kinds: Vec<&str> = hook.iter().filter_map(|object| object["kind"].as_str()).collect();
    kinds.sort_unstable();
    assert_eq!(kinds, ["ClusterRole", "ClusterRoleBinding", "Job", "ServiceAccount"]);
    for object in &hook {
        let (kind, metadata) = (&object["kind"], &object["metadata"]);
        let annotation = |name: &str| metadata["annotations"][format!("helm.sh/{name}")].as_str();
        assert_eq!(metadata["name"], NAME, "{kind}");
        assert_eq!(annotation("hook"), Some("pre-delete"), "{kind}");
        let policy = Some("before-hook-creation,hook-succeeded");
        assert_eq!(annotation("hook-delete-policy"), policy, "{kind}");
        let weight = (kind != "Job").then_some("-1");
        assert_eq!(annotation("hook-weight"), weight, "{kind}");
    }
    let job = of_kind(&hook, "Job");
    assert_eq!(job["spec"]["backoffLimit"], 0);
    assert!(job["spec"]["activeDeadlineSeconds"].as_u64() > Some(300), "{job}");
    assert_eq!(
        job["metadata"]["annotations"]["helm.sh/hook-output-log-policy"],
        "hook-failed"
    );
    let operator = "--show-only=templates/operator/deployment.yaml";
    let operator = objects(&[operator, &everything]);
    let (pod, of_operator) = (
        &job["spec"]["template"]["spec"],
        &of_kind(&operator, "Deployment")["spec"]["template"]["spec"],
    );
    for field in ["imagePullSecrets", "nodeSelector", "tolerations"] {
        assert!(!pod[field].is_null(), "no {field}");
        assert_eq!(pod[field], of_operator[field], "{field}");
    }
    // On its nodes, and not away from its pods as its replicas are from each other.
    assert_eq!(pod["affinity"], json!({"nodeAffinity": nodes}));
    let (container, of_operator) = (&pod["containers"][0], &of_operator["containers"][0]);
    for field in ["image", "imagePullPolicy"] {
        assert_eq!(container[field], of_operator[field], "{field}");
    }
    assert_eq!(container["args"], json!(["--release=ftvm", "--revision=1"]));
}

/// Where it may run, and what it may do: nothing but look for VMs.
pub fn hook(installed: &Installed) {
    let hook = objects(&[HOOK]);
    meets_restricted(installed, of_kind(&hook, "Job"));
    for kind in ["ServiceAccount", "ClusterRole", "ClusterRoleBinding"] {
        installed.create(of_kind(&hook, kind));
    }
    let user = installed.account(NAME, None);
    let list = ["get", "faulttolerantvms", "--all-namespaces"];
    user.waits_for_success("the hook lists VMs", |user| user.does(&list));
    let definition = ["get", "customresourcedefinition", "faulttolerantvms.ftvm.dev"];
    user.does(&definition).unwrap();
    refused(user.does(&["get", "customresourcedefinitions"]), "cannot list").unwrap();
    for (verb, kind) in [
        ("get", "faulttolerantvms.ftvm.dev"),
        ("watch", "faulttolerantvms.ftvm.dev"),
        ("patch", "faulttolerantvms.ftvm.dev"),
        ("delete", "faulttolerantvms.ftvm.dev"),
        ("deletecollection", "faulttolerantvms.ftvm.dev"),
        ("list", "secrets"),
        ("list", "pods"),
        ("create", "pods"),
    ] {
        let words = ["auth", "can-i", verb, kind, "--all-namespaces"];
        assert!(!is_yes(user.does(&words)), "{verb} {kind}");
    }
    // The negative control: it is these rights by which it lists.
    let words = ["delete", "clusterrolebinding", NAME];
    installed.cluster.kubectl(&words).unwrap();
    user.waits_for_refusal("cannot list", |user| user.does(&list));
}

/// A namespace with the strictest Pod Security takes its pod, and not the same one with a right more.
fn meets_restricted(installed: &Installed, job: &Value) {
    assert_eq!(job["metadata"]["namespace"], SYSTEM);
    let mut pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": NAME, "namespace": SHOP},
        "spec": job["spec"]["template"]["spec"],
    });
    // Its own is not there.
    pod["spec"]["serviceAccountName"] = json!("default");
    let create = |pod: &Value| {
        let file = installed.file(pod);
        installed
            .cluster
            .kubectl(&["create", "--dry-run=server", "--filename", &file])
    };
    create(&pod).unwrap();
    pod["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = json!(true);
    refused(create(&pod), "violates PodSecurity \"restricted:").unwrap();
}
