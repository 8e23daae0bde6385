//! The API server takes what the chart renders, and finds nothing wrong with the policies' expressions.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use ftvm_e2e::cluster::{Cluster, Options, wait_for};
use serde_json::{Value, json};

use crate::{chart, uninstall, value_sets};

/// Where the chart is installed.
pub const SYSTEM: &str = "ftvm-system";
/// Where VMs are. Nothing but Pod Security's `restricted` may run there.
pub const SHOP: &str = "shop";
/// Long enough for a busy machine; nothing is judged by it.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A cluster with the chart installed, two nodes that nobody plays, and a namespace for VMs.
pub struct Installed {
    pub cluster: Cluster,
    files: AtomicU32,
}

impl Installed {
    pub fn new() -> Self {
        let installed = Self {
            cluster: Cluster::start(Options {
                nodes: 0,
                ..Options::default()
            })
            .unwrap(),
            files: AtomicU32::new(0),
        };
        for node in ["n1", "n2"] {
            installed.create(&json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}}));
        }
        let labels = json!({"pod-security.kubernetes.io/enforce": "restricted"});
        installed.cluster.make_namespace(SHOP, &labels).unwrap();
        installed
            .cluster
            .helm(&[
                "install",
                "ftvm",
                &chart().display().to_string(),
                "--namespace",
                SYSTEM,
                "--create-namespace",
            ])
            .unwrap();
        for namespace in [SYSTEM, SHOP] {
            wait_for("the namespace has its service account", PATIENCE, || {
                let words = ["get", "serviceaccount", "default", "--namespace", namespace];
                installed.cluster.kubectl(&words).map(drop)
            })
            .unwrap();
        }
        installed
    }

    /// Creates an object as the administrator.
    pub fn create(&self, object: &Value) {
        let file = self.file(object);
        self.cluster.kubectl(&["create", "--filename", &file]).unwrap();
    }

    pub fn get(&self, kind: &str, namespace: &str, name: &str) -> Value {
        self.cluster.get(&[kind, "--namespace", namespace, name]).unwrap()
    }

    /// An object in a file; returns its name.
    pub fn file(&self, object: &Value) -> String {
        let number = self.files.fetch_add(1, Ordering::Relaxed);
        let path = self.cluster.folder().join(format!("object-{number}.json"));
        fs::write(&path, object.to_string()).unwrap();
        path.display().to_string()
    }

    /// A service account with a token such as a pod has, or with one that names no pod and no node.
    pub fn account(&self, account: &str, pod: Option<&str>) -> User<'_> {
        let mut words = vec!["create", "token", account, "--namespace", SYSTEM];
        words.extend(
            pod.iter()
                .flat_map(|pod| ["--bound-object-kind=Pod", "--bound-object-name", *pod]),
        );
        let token = self.cluster.kubectl(&words).unwrap();
        // Without the administrator's certificate, which would go before the token.
        let view = self
            .cluster
            .kubectl(&["config", "view", "--raw", "--output=json"])
            .unwrap();
        let mut config: Value = serde_json::from_str(&view).unwrap();
        for user in config["users"].as_array_mut().unwrap() {
            user["user"] = json!({"token": token.trim()});
        }
        User {
            installed: self,
            kubeconfig: self.file(&config).into(),
        }
    }

    /// A pod that is bound to a node, with this service account.
    pub fn bound_pod(&self, name: &str, account: &str, node: &str) {
        self.create(&json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": SYSTEM},
            "spec": {
                "serviceAccountName": account, "nodeName": node,
                "containers": [{"name": "one", "image": "nothing"}],
            },
        }));
    }

    /// The negative control of a policy: without its binding the API server lets pass what it refused.
    pub fn unbind(&self, policy: &str) {
        self.cluster
            .kubectl(&["delete", "validatingadmissionpolicybinding", policy])
            .unwrap();
    }
}

/// Somebody with a token.
pub struct User<'a> {
    installed: &'a Installed,
    kubeconfig: PathBuf,
}

impl User<'_> {
    pub fn does(&self, words: &[&str]) -> anyhow::Result<String> {
        self.installed.cluster.kubectl_as(&self.kubeconfig, words)
    }

    pub fn creates(&self, object: &Value) -> anyhow::Result<String> {
        let file = self.installed.file(object);
        self.does(&["create", "--validate=false", "--filename", &file])
    }

    /// Server-side apply.
    pub fn applies(&self, object: &Value) -> anyhow::Result<String> {
        let file = self.installed.file(object);
        self.does(&["apply", "--server-side", "--validate=false", "--filename", &file])
    }

    /// PUTs an object as the API server has it, with a change.
    pub fn replaces(&self, kind: &str, name: &str, change: impl FnOnce(&mut Value)) -> anyhow::Result<String> {
        let mut object = self.installed.get(kind, SHOP, name);
        change(&mut object);
        let file = self.installed.file(&object);
        self.does(&["replace", "--validate=false", "--filename", &file])
    }

    /// A merge patch; returns the object that the API server answers. (`kubectl patch` reads the object first, which not all may.)
    pub fn patches(&self, kind: &str, namespace: &str, name: &str, patch: &Value) -> anyhow::Result<String> {
        let group = match kind {
            "lease" => "apis/coordination.k8s.io/v1",
            "poddisruptionbudget" => "apis/policy/v1",
            "networkpolicy" => "apis/networking.k8s.io/v1",
            _ => "api/v1",
        };
        let plural = kind
            .strip_suffix('y')
            .map_or(format!("{kind}s"), |stem| format!("{stem}ies"));
        let path = format!("/{group}/namespaces/{namespace}/{plural}/{name}");
        self.installed.cluster.patch_as(&self.kubeconfig, &path, patch)
    }

    /// A merge patch of a node, or of what is below it.
    pub fn patches_node(&self, path: &str, patch: &Value) -> anyhow::Result<String> {
        let path = format!("/api/v1/nodes/{path}");
        self.installed.cluster.patch_as(&self.kubeconfig, &path, patch)
    }

    /// Waits until the API server enforces a policy: it reads new ones from a watch.
    pub fn waits_for_refusal(&self, words: &str, attempt: impl Fn(&Self) -> anyhow::Result<String>) {
        wait_for(&format!("the policy says {words:?}"), PATIENCE, || {
            refused(attempt(self), words)
        })
        .unwrap();
    }

    /// Waits until a removed policy is no longer enforced.
    pub fn waits_for_success(&self, what: &str, attempt: impl Fn(&Self) -> anyhow::Result<String>) {
        wait_for(what, PATIENCE, || attempt(self).map(drop)).unwrap();
    }
}

/// Whether something was refused with these words.
pub fn refused(result: anyhow::Result<String>, words: &str) -> anyhow::Result<()> {
    match result {
        Ok(answer) => anyhow::bail!("it was allowed: {answer}"),
        Err(error) => {
            let text = format!("{error:#}");
            ensure!(text.contains(words), "no {words:?} in: {text}");
            Ok(())
        }
    }
}

/// The answer of `kubectl auth can-i`, which fails when it is no.
pub fn is_yes(answer: anyhow::Result<String>) -> bool {
    match answer {
        Ok(text) => text.trim() == "yes",
        Err(error) => {
            let text = format!("{error:#}");
            assert!(text.trim_end().ends_with(" no"), "{text}");
            false
        }
    }
}

#[test]
fn every_set_of_values_is_taken_and_typechecks() {
    let installed = Installed::new();
    install_monitoring_definitions(&installed.cluster);
    // A dry run makes no account, and a pod is not admitted without its own: that of the test's pod in `ci/everything-values.yaml`.
    let account = [
        "create",
        "serviceaccount",
        "vms-test",
        "--namespace",
        SYSTEM,
        "--save-config",
    ];
    installed.cluster.kubectl(&account).unwrap();
    let sets = value_sets();
    for set in std::iter::once(None).chain(sets.iter().map(Some)) {
        let values = set.map(|set| format!("--values={}", set.display()));
        let chart = chart().display().to_string();
        let mut words = vec![
            "template",
            "ftvm",
            &chart,
            "--namespace",
            SYSTEM,
            "--kube-version=1.37.0",
        ];
        words.extend(values.as_deref());
        let manifests = installed.cluster.folder().join("rendered.yaml");
        fs::write(&manifests, installed.cluster.helm(&words).unwrap()).unwrap();
        let manifests = manifests.display().to_string();
        for way in [
            &["--server-side", "--force-conflicts", "--warnings-as-errors"][..],
            &["--warnings-as-errors"],
        ] {
            let words = [
                &[
                    "apply",
                    "--dry-run=server",
                    "--validate=strict",
                    "--filename",
                    &manifests,
                ],
                way,
            ]
            .concat();
            let answer = installed.cluster.kubectl(&words);
            assert!(answer.is_ok(), "{set:?} {way:?}: {:#}", answer.unwrap_err());
        }
    }
    typecheck(&installed);
    uninstall::hook(&installed);
    notes(&installed);
}

/// Definitions of the Prometheus operator, from its Go module.
fn install_monitoring_definitions(cluster: &Cluster) {
    let module = "github.com/prometheus-operator/prometheus-operator@v0.85.0";
    let output = Command::new("go")
        .args(["mod", "download", "-json", module])
        .current_dir(cluster.folder())
        .output()
        .unwrap();
    let about: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        about["Sum"], "h1:M5xLCLEoaW2IJfnuCwFzzpL+jSVQu3KGT84Pye+fW8s=",
        "{about}"
    );
    let folder = Path::new(about["Dir"].as_str().unwrap()).join("example/prometheus-operator-crd");
    for kind in ["servicemonitors", "prometheusrules"] {
        let definition = fs::read_to_string(folder.join(format!("monitoring.coreos.com_{kind}.yaml"))).unwrap();
        cluster.apply(&definition).unwrap();
        let name = format!("crd/{kind}.monitoring.coreos.com");
        let wait = ["wait", "--for=condition=Established", &name, "--timeout=180s"];
        cluster.kubectl(&wait).unwrap();
    }
}

/// The controller manager has looked at every expression and found nothing; it finds something in one that is wrong.
fn typecheck(installed: &Installed) {
    let wrong = "wrong-on-purpose";
    installed.create(&json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicy", "metadata": {"name": wrong},
        "spec": {
            "matchConstraints": {"resourceRules": [
                {"apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"], "operations": ["CREATE"]}
            ]},
            "validations": [{"expression": "object.spec.nodename == ''"}],
        },
    }));
    let policies = || installed.cluster.get(&["validatingadmissionpolicies"]);
    let mut checked = Vec::new();
    wait_for("all policies are type-checked", PATIENCE, || {
        checked = policies()?["items"].as_array().context("no list")?.clone();
        for policy in &checked {
            let name = &policy["metadata"]["name"];
            ensure!(
                policy["status"]["observedGeneration"] == policy["metadata"]["generation"],
                "{name} is not"
            );
            ensure!(policy["status"]["typeChecking"].is_object(), "{name} is not");
        }
        Ok(())
    })
    .unwrap();
    assert_eq!(checked.len(), 7, "{checked:?}");
    for policy in &checked {
        let warnings = &policy["status"]["typeChecking"]["expressionWarnings"];
        let expected = policy["metadata"]["name"] == wrong;
        assert_eq!(
            warnings.is_array(),
            expected,
            "{}: {warnings:#}",
            policy["metadata"]["name"]
        );
    }
}

/// The notes warn of a namespace in which no node-daemon can start, and only then.
fn notes(installed: &Installed) {
    let notes = || {
        let chart = chart().display().to_string();
        let words = ["upgrade", "ftvm", &chart, "--namespace", SYSTEM, "--dry-run=server"];
        installed.cluster.helm(&words).unwrap()
    };
    let text = notes();
    assert!(
        text.contains("rollout status daemonset/ftvm-node-daemon") && !text.contains("WARNING"),
        "{text}"
    );
    let first = text.find("kubectl delete faulttolerantvms --all").unwrap();
    let then = text.find("helm uninstall ftvm --namespace ftvm-system").unwrap();
    assert!(first < then, "{text}");
    let label = "pod-security.kubernetes.io/enforce=baseline";
    installed
        .cluster
        .kubectl(&["label", "namespace", SYSTEM, label])
        .unwrap();
    assert!(notes().contains("WARNING: the namespace enforces Pod Security \"baseline\""));
}
