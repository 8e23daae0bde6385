//! What the policies let the operator touch: what it made. That is also all that it can read of Secrets.
use serde_json::{Value, json};

use crate::admission::{Installed, SHOP, SYSTEM, User, is_yes, refused};
use crate::daemon::{give_everything, lease, seat};

const ACCOUNT: &str = "ftvm-operator";
const NOT_ITS_OWN: &str = "the operator of fault-tolerant VMs did not make";
const UNLABELLED: &str = "has the label app.kubernetes.io/managed-by=ftvm-operator";

fn secret(name: &str, labels: &Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": SHOP, "labels": labels},
        "stringData": {"tls.key": format!("key of {name}")},
    })
}

fn owned() -> Value {
    json!({"app.kubernetes.io/managed-by": "ftvm-operator"})
}

#[test]
fn the_operator_reads_no_secret_that_it_did_not_make() {
    let installed = Installed::new();
    installed.create(&secret("others", &json!({"app.kubernetes.io/managed-by": "Helm"})));
    installed.create(&secret("bare", &json!({})));
    let operator = installed.account(ACCOUNT, None);

    let nothing = json!({});
    operator.waits_for_refusal(NOT_ITS_OWN, |user| user.patches("secret", SHOP, "others", &nothing));
    refused(operator.patches("secret", SHOP, "bare", &nothing), NOT_ITS_OWN).unwrap();
    let label = json!({"metadata": {"labels": owned()}});
    refused(operator.patches("secret", SHOP, "bare", &label), NOT_ITS_OWN).unwrap();

    operator.creates(&secret("web-authority", &owned())).unwrap();
    let answer = operator.patches("secret", SHOP, "web-authority", &nothing).unwrap();
    let key = serde_json::from_str::<Value>(&answer).unwrap()["data"]["tls.key"].clone();
    // "key of web-authority" in base64.
    assert_eq!(key, "a2V5IG9mIHdlYi1hdXRob3JpdHk=");
    refused(operator.patches("secret", SHOP, "none", &nothing), "NotFound").unwrap();
    refused(operator.creates(&secret("unlabelled", &json!({}))), UNLABELLED).unwrap();
    let unlabel = json!({"metadata": {"labels": null}});
    refused(operator.patches("secret", SHOP, "web-authority", &unlabel), UNLABELLED).unwrap();

    for words in [
        &["get", "secret", "web-authority"][..],
        &["get", "secrets"],
        &["get", "secrets", "--watch"],
    ] {
        refused(operator.does(&[words, &["--namespace", SHOP]].concat()), "cannot ").unwrap();
    }
    let delete = ["delete", "secret", "web-authority", "--namespace", SHOP];
    refused(operator.does(&delete), "cannot delete resource").unwrap();

    installed.unbind("ftvm-operator-objects");
    operator.waits_for_success("without the policy the same patch reads it", |user| {
        user.patches("secret", SHOP, "others", &nothing)
    });
}

#[test]
fn the_operator_touches_nothing_that_it_did_not_make() {
    let installed = Installed::new();
    let operator = installed.account(ACCOUNT, None);
    let claim = |name: &str, labels: &Value| {
        json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name, "namespace": SHOP, "labels": labels},
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
        })
    };
    let budget = |name: &str, labels: &Value| {
        json!({
            "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": name, "namespace": SHOP, "labels": labels},
            "spec": {"minAvailable": 1, "selector": {"matchLabels": {"ftvm.dev/vm": "web"}}},
        })
    };
    let network = |name: &str, labels: &Value| {
        json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": name, "namespace": SHOP, "labels": labels}, "spec": {"podSelector": {}},
        })
    };
    let none = json!({});
    for object in [
        claim("others", &none),
        budget("others", &none),
        network("others", &none),
    ] {
        installed.create(&object);
    }
    let touch = json!({"metadata": {"annotations": {"touched": "yes"}}});
    operator.waits_for_refusal(NOT_ITS_OWN, |user| {
        user.patches("networkpolicy", SHOP, "others", &touch)
    });
    let delete = |kind, name| operator.does(&["delete", kind, name, "--namespace", SHOP, "--wait=false"]);
    // What is collected with the VM is applied, and nothing else.
    for (kind, own, unlabelled) in [
        ("poddisruptionbudget", budget("web", &owned()), budget("new", &none)),
        ("networkpolicy", network("web", &owned()), network("new", &none)),
    ] {
        refused(operator.patches(kind, SHOP, "others", &touch), NOT_ITS_OWN).unwrap();
        refused(operator.applies(&unlabelled), UNLABELLED).unwrap();
        for _ in 0..2 {
            operator.applies(&own).unwrap();
        }
        operator.patches(kind, SHOP, "web", &touch).unwrap();
        refused(delete(kind, "web"), "cannot delete resource").unwrap();
    }
    let kind = "persistentvolumeclaim";
    refused(operator.creates(&claim("new", &none)), UNLABELLED).unwrap();
    operator.creates(&claim("web", &owned())).unwrap();
    refused(operator.patches(kind, SHOP, "web", &touch), "cannot patch resource").unwrap();
    refused(delete(kind, "others"), NOT_ITS_OWN).unwrap();
    delete(kind, "web").unwrap();
    election(&operator);
    leases(&installed, &operator);
    for (verb, kind, part) in [
        ("list", "configmaps", ""),
        ("create", "serviceaccounts", ""),
        ("list", "services", ""),
        ("create", "pods", "exec"),
        // What it has of these kinds is enough.
        ("get", "poddisruptionbudgets.policy", ""),
        ("list", "networkpolicies.networking.k8s.io", ""),
        ("update", "pods", ""),
        ("update", "persistentvolumeclaims", ""),
        ("update", "faulttolerantvms.ftvm.dev", ""),
        ("patch", "faulttolerantvms.ftvm.dev", "status"),
    ] {
        let part = format!("--subresource={part}");
        let answer = operator.does(&["auth", "can-i", verb, kind, &part, "--namespace", SHOP]);
        assert!(!is_yes(answer), "{verb} {kind}");
    }
}

/// Its election's Lease needs no label; others do.
fn election(operator: &User<'_>) {
    let election = |name: &str, namespace: &str| {
        json!({
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name, "namespace": namespace},
            "spec": {"holderIdentity": "a"},
        })
    };
    operator.creates(&election("ftvm-operator", SYSTEM)).unwrap();
    let renew = json!({"spec": {"holderIdentity": "b"}});
    operator.patches("lease", SYSTEM, "ftvm-operator", &renew).unwrap();
    refused(operator.creates(&election("other", SYSTEM)), UNLABELLED).unwrap();
    refused(operator.creates(&election("ftvm-operator", SHOP)), UNLABELLED).unwrap();
}

/// The record is its to write until the VM has run.
fn leases(installed: &Installed, operator: &User<'_>) {
    operator.creates(&lease("web", "n1")).unwrap();
    let rewrite = |lease: &mut Value| lease["spec"]["holderIdentity"] = json!("c/0");
    let forge = |lease: &mut Value| lease["metadata"]["annotations"]["ftvm.dev/record"] = json!("{\"term\":9}");
    operator.replaces("lease", "web", rewrite).unwrap();
    operator.replaces("lease", "web", forge).unwrap();
    let run = json!({"spec": {"leaseTransitions": 2}}).to_string();
    let words = [
        "patch",
        "lease",
        "web",
        "--namespace",
        SHOP,
        "--type=merge",
        "--patch",
        &run,
    ];
    installed.cluster.kubectl(&words).unwrap();
    let words = "only while spec.leaseTransitions is 1";
    let change: fn(&mut Value) = |lease| lease["spec"]["holderIdentity"] = json!("d/0");
    let annotate: fn(&mut Value) = |lease| lease["metadata"]["annotations"]["ftvm.dev/record"] = json!("{}");
    let back: fn(&mut Value) = |lease| lease["spec"]["leaseTransitions"] = json!(1);
    for change in [change, annotate, back] {
        refused(operator.replaces("lease", "web", change), words).unwrap();
    }
    let place = |lease: &mut Value| lease["metadata"]["annotations"]["ftvm.dev/nodes"] = json!("n1,n2");
    operator.replaces("lease", "web", place).unwrap();
    let delete = ["delete", "lease", "web", "--namespace", SHOP, "--wait=false"];
    refused(operator.does(&delete), "cannot delete resource").unwrap();
}

type Change = fn(&mut Value);

/// (what a seat's pod may not have, and what the operator is told)
const POD_CHANGES: &[(&str, Change)] = &[
    ("automountServiceAccountToken false", |pod| {
        pod["spec"]["automountServiceAccountToken"] = json!(true)
    }),
    ("automountServiceAccountToken false", |pod| {
        pod["spec"]
            .as_object_mut()
            .unwrap()
            .remove("automountServiceAccountToken");
    }),
    ("the volumes of a seat pod", |pod| {
        pod["spec"]["volumes"][1]["secret"]["secretName"] = json!("others")
    }),
    ("the volumes of a seat pod", |pod| {
        pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] = json!("others")
    }),
    ("the volumes of a seat pod", |pod| {
        pod["spec"]["volumes"][0] =
            json!({"name": "disk", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}});
    }),
    ("the volumes of a seat pod", |pod| {
        let guest = json!({"name": "guest", "persistentVolumeClaim": {"claimName": "others"}});
        pod["spec"]["volumes"].as_array_mut().unwrap().push(guest);
    }),
    ("the volumes of a seat pod", |pod| {
        pod["spec"]["volumes"][0] = json!({"name": "disk", "hostPath": {"path": "/"}});
    }),
    ("uses no namespace of the node", |pod| {
        pod["spec"]["hostNetwork"] = json!(true)
    }),
    ("uses no namespace of the node", |pod| {
        pod["spec"]["hostPID"] = json!(true)
    }),
    ("uses no namespace of the node", |pod| {
        pod["spec"]["hostIPC"] = json!(true)
    }),
    ("have no privileges", |pod| {
        pod["spec"]["containers"][0]["securityContext"] = json!({"privileged": true})
    }),
    ("have no privileges", |pod| {
        pod["spec"]["containers"][0]["securityContext"]["capabilities"] =
            json!({"drop": ["ALL"], "add": ["NET_ADMIN"]});
    }),
    ("have no privileges", |pod| {
        pod["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"] = json!(false)
    }),
    ("have no privileges", |pod| {
        let mut second = pod["spec"]["containers"][0].clone();
        second["name"] = json!("init");
        second.as_object_mut().unwrap().remove("securityContext");
        pod["spec"]["initContainers"] = json!([second]);
    }),
    ("no environment from Secrets", |pod| {
        pod["spec"]["containers"][0]["env"] =
            json!([{"name": "A", "valueFrom": {"secretKeyRef": {"name": "others", "key": "tls.key"}}}]);
    }),
    ("no environment from Secrets", |pod| {
        pod["spec"]["containers"][0]["envFrom"] = json!([{"secretRef": {"name": "others"}}]);
    }),
    ("no ports of the node", |pod| {
        pod["spec"]["containers"][0]["ports"] = json!([{"containerPort": 7000, "hostPort": 7000}]);
    }),
];

#[test]
fn pods_of_the_operator_are_seats() {
    let installed = Installed::new();
    // Not Pod Security is to refuse.
    installed
        .cluster
        .kubectl(&[
            "label",
            "namespace",
            SHOP,
            "pod-security.kubernetes.io/enforce-",
            "--overwrite",
        ])
        .unwrap();
    let operator = installed.account(ACCOUNT, None);
    let changed = |change: Change| {
        let mut pod = seat("web-aaaaa");
        change(&mut pod);
        pod
    };
    let (words, first) = POD_CHANGES[0];
    // Under a name of its own: it may be made before the policy is in force.
    let mut early = changed(first);
    early["metadata"]["name"] = json!("web-early");
    operator.waits_for_refusal(words, |user| user.creates(&early));
    for (words, change) in POD_CHANGES {
        refused(operator.creates(&changed(*change)), words).unwrap();
    }
    operator.creates(&seat("web-aaaaa")).unwrap();
    let image = |pod: &mut Value| {
        pod["metadata"]["name"] = json!("web-bbbbb");
        pod["spec"]["volumes"] = json!([
            {"name": "disk", "image": {"reference": "guest", "pullPolicy": "IfNotPresent"}},
            {"name": "identity", "emptyDir": {}},
            {"name": "guest", "persistentVolumeClaim": {"claimName": "others", "readOnly": true}},
        ]);
    };
    operator.creates(&changed(image)).unwrap();
    // Where there are no image volumes.
    let copied = |pod: &mut Value| {
        pod["metadata"]["name"] = json!("web-ddddd");
        let mut copies = pod["spec"]["containers"][0].clone();
        (copies["name"], copies["image"]) = (json!("guest"), json!("others/guest"));
        pod["spec"]["initContainers"] = json!([copies]);
        pod["spec"]["volumes"] = json!([{"name": "disk", "emptyDir": {}}, {"name": "identity", "emptyDir": {}}]);
    };
    operator.creates(&changed(copied)).unwrap();
    // Not even with every right.
    give_everything(&installed, ACCOUNT);
    refused(operator.creates(&changed(first)), words).unwrap();
    installed.unbind("ftvm-operator-pods");
    operator.waits_for_success("without the policy the same pod is made", |user| {
        user.creates(&changed(|pod| {
            pod["metadata"]["name"] = json!("web-ccccc");
            pod["spec"]["hostNetwork"] = json!(true);
        }))
    });
}
