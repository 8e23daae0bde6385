//! What the policies let a node-daemon change: records of its node's VMs, state of its node's seats.
use serde_json::{Value, json};

use crate::admission::{Installed, SHOP, SYSTEM, User, is_yes, refused};

const ACCOUNT: &str = "ftvm-node-daemon";
const RECORD: &str = "/metadata/annotations/ftvm.dev~1record";

pub fn lease(name: &str, nodes: &str) -> Value {
    json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {
            "name": name, "namespace": SHOP,
            "labels": {"app.kubernetes.io/managed-by": "ftvm-operator", "ftvm.dev/vm": name},
            "annotations": {"ftvm.dev/nodes": nodes, "ftvm.dev/record": "{\"term\":1}"},
            "finalizers": ["example.com/kept"],
        },
        "spec": {"holderIdentity": "a/0", "leaseTransitions": 1},
    })
}

/// A pod that Pod Security's `restricted` admits.
pub fn seat(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": name, "namespace": SHOP,
            "labels": {"app.kubernetes.io/managed-by": "ftvm-operator", "ftvm.dev/vm": "web", "ftvm.dev/seat": name},
        },
        "spec": {
            "automountServiceAccountToken": false,
            "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "seat", "image": "nothing", "command": ["/seat"],
                "env": [{"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
                "securityContext": {
                    "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]}
                },
                "volumeMounts": [{"name": "disk", "mountPath": "/disks/root"}, {"name": "identity", "mountPath": "/identity"}],
            }],
            "volumes": [
                {"name": "disk", "persistentVolumeClaim": {"claimName": format!("{name}-root")}},
                {"name": "identity", "secret": {"secretName": format!("{name}-identity")}},
            ],
        },
    })
}

fn swap(object: &mut Value) {
    *object.pointer_mut(RECORD).unwrap() = json!("{\"term\":2}");
    object["spec"] = json!({"holderIdentity": "b/1", "leaseTransitions": 2});
}

type Change = fn(&mut Value);

/// (what a daemon may not do to a Lease of its node, and what it is told)
const LEASE_CHANGES: &[(&str, Change)] = &[
    ("may change no annotation", |lease| {
        lease["metadata"]["annotations"]["ftvm.dev/nodes"] = json!("n1,n2,n3")
    }),
    ("may change no annotation", |lease| {
        lease["metadata"]["annotations"]["other"] = json!("x")
    }),
    ("may change no annotation", |lease| {
        lease["metadata"]["annotations"]
            .as_object_mut()
            .unwrap()
            .remove("ftvm.dev/nodes");
    }),
    ("may not change a Lease's labels", |lease| {
        lease["metadata"]["labels"]["ftvm.dev/vm"] = json!("other")
    }),
    ("may not change a Lease's labels", |lease| {
        lease["metadata"]["labels"]["other"] = json!("x")
    }),
    ("may not change a Lease's labels", |lease| {
        lease["metadata"].as_object_mut().unwrap().remove("labels");
    }),
    ("may not change owners or finalizers", |lease| {
        lease["metadata"]["ownerReferences"] = json!([{"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "1"}]);
    }),
    ("may not change owners or finalizers", |lease| {
        lease["metadata"]["finalizers"] = json!(["example.com/other"])
    }),
];

#[test]
fn a_daemon_swaps_the_records_of_its_nodes_vms_alone() {
    let installed = Installed::new();
    installed.create(&lease("web", "n1,n2"));
    installed.create(&lease("far", "n2"));
    installed.create(&lease("nowhere", ""));
    let mut foreign = lease("foreign", "n1");
    foreign["metadata"]["labels"] = json!({});
    installed.create(&foreign);
    for (pod, node) in [("one", "n1"), ("two", "n2")] {
        installed.bound_pod(pod, ACCOUNT, node);
    }
    let one = installed.account(ACCOUNT, Some("one"));
    let two = installed.account(ACCOUNT, Some("two"));
    let homeless = installed.account(ACCOUNT, None);

    let far = |user: &User<'_>| user.replaces("lease", "far", swap);
    one.waits_for_refusal(
        "the node \"n1\" of this token is not in the Lease's annotation ftvm.dev/nodes",
        far,
    );
    one.replaces("lease", "web", swap).unwrap();
    two.replaces("lease", "web", swap).unwrap();
    far(&two).unwrap();
    for lease in ["web", "nowhere"] {
        refused(homeless.replaces("lease", lease, swap), "the node \"\" of this token").unwrap();
    }
    refused(
        one.replaces("lease", "foreign", swap),
        "only Leases of fault-tolerant VMs",
    )
    .unwrap();
    for (words, change) in LEASE_CHANGES {
        refused(one.replaces("lease", "web", change), words).unwrap();
    }
    // A swap of what somebody else has swapped since is a conflict, certainly.
    let stale = installed.get("lease", SHOP, "web")["metadata"]["resourceVersion"].clone();
    two.replaces("lease", "web", |lease| lease["spec"]["leaseTransitions"] = json!(3))
        .unwrap();
    let late = one.replaces("lease", "web", |lease| lease["metadata"]["resourceVersion"] = stale);
    refused(late, "the object has been modified").unwrap();

    finds_the_api_servers(&one);
    // RBAC gives no other verb, and the policy would not either.
    let patch = json!({"spec": {"leaseTransitions": 9}});
    refused(one.patches("lease", SHOP, "web", &patch), "cannot patch resource").unwrap();
    refused(one.creates(&lease("new", "n1")), "cannot create resource").unwrap();
    let list = ["get", "leases", "--namespace", SHOP];
    refused(one.does(&list), "cannot list resource").unwrap();
    let delete: &[&str] = &["delete", "lease", "web", "--namespace", SHOP, "--wait=false"];
    refused(one.does(delete), "cannot delete resource").unwrap();
    give_everything(&installed, ACCOUNT);
    one.waits_for_refusal("may neither create nor delete Leases", |user| {
        user.creates(&lease("new", "n1"))
    });
    refused(one.does(delete), "may neither create nor delete Leases").unwrap();

    refused(far(&one), "is not in the Lease's annotation").unwrap();
    installed.unbind("ftvm-node-daemon-leases");
    one.waits_for_success("without the policy the same update passes", far);
}

/// The API servers' own addresses are told to a daemon, as it asks for them, and nobody else's.
fn finds_the_api_servers(daemon: &User<'_>) {
    let list = |words: &[&str]| daemon.does(&[&["get", "endpointslices", "--output=name"], words].concat());
    let by_name = "--field-selector=metadata.name=kubernetes";
    let found = list(&["--namespace=default", by_name]).unwrap();
    assert_eq!(found.trim(), "endpointslice.discovery.k8s.io/kubernetes");
    for (verb, expected) in [("get", false), ("list", true), ("watch", true)] {
        let object = "endpointslices.discovery.k8s.io/kubernetes";
        let may = |namespace: &str| is_yes(daemon.does(&["auth", "can-i", verb, object, "--namespace", namespace]));
        assert_eq!((may("default"), may(SHOP)), (expected, false), "{verb}");
    }
    refused(list(&["--namespace=default"]), "cannot list resource").unwrap();
    refused(list(&["--namespace", SHOP, by_name]), "cannot list resource").unwrap();
}

/// More than the chart gives: so that it is the policy that refuses.
pub fn give_everything(installed: &Installed, account: &str) {
    let subject = format!("--serviceaccount={SYSTEM}:{account}");
    let words = [
        "create",
        "clusterrolebinding",
        "too-much",
        "--clusterrole=cluster-admin",
        &subject,
    ];
    installed.cluster.kubectl(&words).unwrap();
}

/// (what a daemon may not do to a seat's pod of its node, and what it is told)
const POD_PATCHES: &[(&str, &str)] = &[
    (
        "may change no annotation",
        r#"{"metadata": {"annotations": {"ftvm.dev/request": "{}"}}}"#,
    ),
    (
        "may change no annotation",
        r#"{"metadata": {"annotations": {"kept": null}}}"#,
    ),
    (
        "may change no label",
        r#"{"metadata": {"labels": {"ftvm.dev/vm": "other"}}}"#,
    ),
    (
        "may change no label",
        r#"{"metadata": {"labels": {"app.kubernetes.io/managed-by": null}}}"#,
    ),
    (
        "is active, standby or absent",
        r#"{"metadata": {"labels": {"ftvm.dev/role": "king"}}}"#,
    ),
    (
        "may not change owners or finalizers",
        r#"{"metadata": {"finalizers": ["example.com/stay"]}}"#,
    ),
    (
        "may not change a pod's spec",
        r#"{"spec": {"activeDeadlineSeconds": 1}}"#,
    ),
];

#[test]
fn a_daemon_publishes_the_state_of_its_nodes_seats_alone() {
    let installed = Installed::new();
    for (name, node) in [("web-aaaaa", "n1"), ("web-bbbbb", "n2")] {
        let mut pod = seat(name);
        pod["spec"]["nodeName"] = json!(node);
        pod["metadata"]["annotations"] = json!({"kept": "x"});
        installed.create(&pod);
    }
    let mut other = seat("other");
    other["spec"]["nodeName"] = json!("n1");
    other["metadata"]["labels"] = json!({"app": "other"});
    installed.create(&other);
    installed.create(&seat("web-ccccc"));
    for (pod, node) in [("one", "n1"), ("two", "n2")] {
        installed.bound_pod(pod, ACCOUNT, node);
    }
    let one = installed.account(ACCOUNT, Some("one"));
    let homeless = installed.account(ACCOUNT, None);

    let publish = json!({"metadata": {
        "annotations": {"ftvm.dev/seat-status": "{}"}, "labels": {"ftvm.dev/role": "active"}
    }});
    let far = |user: &User<'_>| user.patches("pod", SHOP, "web-bbbbb", &publish);
    one.waits_for_refusal("the pod is not on the node \"n1\" of this token", far);
    one.patches("pod", SHOP, "web-aaaaa", &publish).unwrap();
    let take_back = json!({"metadata": {
        "annotations": {"ftvm.dev/seat-status": null}, "labels": {"ftvm.dev/role": null}
    }});
    one.patches("pod", SHOP, "web-aaaaa", &take_back).unwrap();
    installed
        .account(ACCOUNT, Some("two"))
        .patches("pod", SHOP, "web-bbbbb", &publish)
        .unwrap();
    for (user, pod, words) in [
        (&homeless, "web-aaaaa", "the node \"\" of this token"),
        (&homeless, "web-ccccc", "the node \"\" of this token"),
        (&one, "web-ccccc", "the pod is not on the node"),
        (&one, "other", "may update only seat pods"),
    ] {
        refused(user.patches("pod", SHOP, pod, &publish), words).unwrap();
    }
    for (words, patch) in POD_PATCHES {
        let patch: Value = serde_json::from_str(patch).unwrap();
        refused(one.patches("pod", SHOP, "web-aaaaa", &patch), words).unwrap();
    }

    let delete: &[&str] = &["delete", "pod", "web-aaaaa", "--namespace", SHOP, "--wait=false"];
    refused(one.does(delete), "cannot delete resource").unwrap();
    refused(one.creates(&seat("web-ddddd")), "cannot create resource").unwrap();
    for kind in ["secrets", "persistentvolumeclaims", "nodes", "configmaps"] {
        refused(one.does(&["get", kind, "--namespace", SHOP]), "cannot list resource").unwrap();
    }
    give_everything(&installed, ACCOUNT);
    one.waits_for_refusal("may neither create nor delete pods", |user| {
        user.creates(&seat("web-ddddd"))
    });
    refused(one.does(delete), "may neither create nor delete pods").unwrap();
    let exec = ["exec", "web-aaaaa", "--namespace", SHOP, "--", "/seat"];
    refused(one.does(&exec), "nor use what is below them").unwrap();

    refused(far(&one), "is not on the node").unwrap();
    installed.unbind("ftvm-node-daemon-pods");
    one.waits_for_success("without the policy the same patch passes", far);
}

/// (what a daemon may not do to its own node, and what it is told)
const NODE_PATCHES: &[(&str, &str)] = &[
    (
        "may change no label",
        r#"{"metadata": {"labels": {"node-role.kubernetes.io/control-plane": ""}}}"#,
    ),
    ("may change no label", r#"{"metadata": {"labels": {"kept": null}}}"#),
    (
        "may change no annotation",
        r#"{"metadata": {"annotations": {"kept": "other"}}}"#,
    ),
    ("may not change a node's spec", r#"{"spec": {"unschedulable": true}}"#),
    (
        "may not change a node's spec",
        r#"{"spec": {"taints": [{"key": "a", "effect": "NoSchedule"}]}}"#,
    ),
    (
        "may not change owners or finalizers",
        r#"{"metadata": {"finalizers": ["example.com/stay"]}}"#,
    ),
    (
        "is 16 hexadecimal digits",
        r#"{"metadata": {"labels": {"ftvm.dev/cpu": "much"}}}"#,
    ),
];

#[test]
fn a_daemon_publishes_cpu_and_networks_of_its_own_node_alone() {
    let installed = Installed::new();
    let keep = json!({"metadata": {"labels": {"kept": "x"}, "annotations": {"kept": "x"}}}).to_string();
    for node in ["n1", "n2"] {
        let words = ["patch", "node", node, "--type=merge", "--patch", &keep];
        installed.cluster.kubectl(&words).unwrap();
    }
    for (pod, node) in [("one", "n1"), ("two", "n2")] {
        installed.bound_pod(pod, ACCOUNT, node);
    }
    let one = installed.account(ACCOUNT, Some("one"));
    let homeless = installed.account(ACCOUNT, None);

    let publish = json!({"metadata": {
        "annotations": {"ftvm.dev/cpu": "{}"}, "labels": {"ftvm.dev/cpu": "0123456789abcdef"}
    }});
    let far = |user: &User<'_>| user.patches_node("n2", &publish);
    one.waits_for_refusal("this token is of the node \"n1\"", far);
    refused(homeless.patches_node("n1", &publish), "this token is of the node \"\"").unwrap();
    one.patches_node("n1", &publish).unwrap();
    // The same again is no write: nobody who watches nodes is told anything.
    let version = || installed.cluster.get(&["node", "n1"]).unwrap()["metadata"]["resourceVersion"].clone();
    let before = version();
    one.patches_node("n1", &publish).unwrap();
    assert_eq!(version(), before);
    installed
        .account(ACCOUNT, Some("two"))
        .patches_node("n2", &publish)
        .unwrap();
    for (words, patch) in NODE_PATCHES {
        let patch: Value = serde_json::from_str(patch).unwrap();
        refused(one.patches_node("n1", &patch), words).unwrap();
    }
    let long = json!({"metadata": {"annotations": {"ftvm.dev/cpu": "x".repeat(16641)}}});
    refused(one.patches_node("n1", &long), "at most 16640 bytes").unwrap();
    // Its networks: written, as long as can be, and taken away.
    let networks = |text: Value| json!({"metadata": {"annotations": {"ftvm.dev/networks": text}}});
    for text in [json!("{}"), json!("x".repeat(4096)), Value::Null] {
        one.patches_node("n1", &networks(text)).unwrap();
    }
    let long = networks(json!("x".repeat(4097)));
    refused(one.patches_node("n1", &long), "at most 4096 bytes").unwrap();
    let far_networks = networks(json!("{}"));
    refused(
        one.patches_node("n2", &far_networks),
        "this token is of the node \"n1\"",
    )
    .unwrap();

    // RBAC gives no other verb, and the policy would not either.
    let ready = json!({"status": {"conditions": []}});
    let status = |user: &User<'_>| user.patches_node("n1/status", &ready);
    refused(status(&one), "cannot patch resource").unwrap();
    let delete: &[&str] = &["delete", "node", "n1", "--wait=false"];
    refused(one.does(delete), "cannot delete resource").unwrap();
    refused(one.does(&["get", "node", "n1"]), "cannot get resource").unwrap();
    give_everything(&installed, ACCOUNT);
    one.waits_for_refusal("may neither create nor delete nodes", status);
    refused(one.does(delete), "may neither create nor delete nodes").unwrap();

    refused(far(&one), "may change no other").unwrap();
    installed.unbind("ftvm-node-daemon-nodes");
    one.waits_for_success("without the policy the same patch passes", far);
}
