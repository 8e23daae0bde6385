//! `helm lint` and `helm template`; no cluster.
use std::process::{Command, Output};
use std::sync::Arc;

use ftvm_e2e::cluster::programs;
use serde_json::Value;

use crate::{chart, value_sets};

fn helm(arguments: &[&str]) -> Output {
    let programs = programs::folder(&(Arc::new(|line: &str| eprintln!("{line}")) as _)).unwrap();
    let mut command = Command::new(programs.join("helm"));
    let nowhere = std::env::temp_dir().join(format!("ftvm-helm-{}", std::process::id()));
    for name in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
        command.env(name, &nowhere);
    }
    command.args(arguments).output().unwrap()
}

fn text(output: &Output) -> String {
    let both = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    String::from_utf8(both).unwrap()
}

/// What `helm template` makes of the chart with these arguments.
pub fn template(arguments: &[&str]) -> Output {
    let chart = chart();
    let head = [
        "template",
        "ftvm",
        chart.to_str().unwrap(),
        "--namespace=ftvm-system",
        "--kube-version=1.37.0",
    ];
    helm(&[&head, arguments].concat())
}

#[test]
fn lint_is_clean_with_every_set_of_values() {
    let chart = chart();
    let chart = chart.to_str().unwrap();
    let sets = value_sets();
    let all = std::iter::once(None).chain(sets.iter().map(Some));
    for set in all {
        let values = set.map(|path| format!("--values={}", path.display()));
        let output = helm(
            &[
                &["lint", "--strict", chart][..],
                &values.iter().map(String::as_str).collect::<Vec<_>>(),
            ]
            .concat(),
        );
        let text = text(&output);
        assert!(
            output.status.success() && !text.contains("[WARNING]"),
            "{set:?}: {text}"
        );
    }
}

/// (values, what the message says)
const REFUSED: &[(&[&str], &[&str])] = &[
    (&["operator.replica=3"], &["operator", "'replica' not allowed"]),
    (&["nodedaemon.log=debug"], &["'nodedaemon' not allowed"]),
    (&["operator.replicas=0"], &["/operator/replicas", "minimum"]),
    (&["operator.replicas=two"], &["/operator/replicas", "want integer"]),
    (
        &["image.pullPolicy=Sometimes"],
        &["/image/pullPolicy", "'Always', 'IfNotPresent', 'Never'"],
    ),
    (&["image.repository="], &["/image/repository", "minLength"]),
    (
        &["image.repository=a@sha256:b"],
        &["/image/repository", "does not match pattern"],
    ),
    (
        &["image.digest=sha256:12"],
        &["/image/digest", "does not match pattern"],
    ),
    (&["image.tag=a b"], &["/image/tag", "does not match pattern"]),
    (
        &["image.pullSecrets[0]=Registry"],
        &["/image/pullSecrets/0", "does not match pattern"],
    ),
    (
        &["fullnameOverride=VMs"],
        &["/fullnameOverride", "does not match pattern"],
    ),
    (&["crds.kept=false"], &["/crds", "'kept' not allowed"]),
    (&["crds.install=maybe"], &["/crds/install", "want boolean"]),
    (&["imageVolumes=true"], &["/imageVolumes", "'auto', 'always', 'never'"]),
    (
        &["operator.resources.limit.cpu=1"],
        &["/operator/resources", "'limit' not allowed"],
    ),
    (
        &["operator.resources.limits.memory=lots"],
        &["/operator/resources/limits/memory"],
    ),
    (
        &["operator.affinity.nodes=a"],
        &["/operator/affinity", "'nodes' not allowed"],
    ),
    (
        &["nodeDaemon.tolerations[0].operator=Is"],
        &["/nodeDaemon/tolerations/0/operator"],
    ),
    (
        &["nodeDaemon.kubeletPath=var/lib/kubelet"],
        &["/nodeDaemon/kubeletPath", "does not match pattern"],
    ),
    (
        &["nodeDaemon.allowedBridges[0]=a*b"],
        &["/nodeDaemon/allowedBridges/0", "does not match pattern"],
    ),
    (
        &["nodeDaemon.allowedBridges[0]=longer-than-a-name"],
        &["/nodeDaemon/allowedBridges/0", "does not match pattern"],
    ),
    (&["nodeDaemon.seats=-1"], &["/nodeDaemon/seats", "minimum"]),
    (&["nodeDaemon.seats=many"], &["/nodeDaemon/seats", "want integer"]),
    (
        &["test.guestImage=a", "test.bridge=br0"],
        &["guests may not be connected to br0", "nodeDaemon.allowedBridges"],
    ),
    (
        &[
            "test.guestImage=a",
            "test.bridge=br0",
            "nodeDaemon.allowedBridges={br1,br,vm*}",
        ],
        &["guests may not be connected to br0"],
    ),
    (
        &["networks.storage[0].cidr=10.1.0.0/24"],
        &["/networks", "'storage' not allowed"],
    ),
    (
        &["networks.replication[0].multus=rep"],
        &["/networks/replication/0", "'multus' not allowed"],
    ),
    (
        &["networks.replication[0].cidr=10.1.0.0"],
        &["/networks/replication/0/cidr", "does not match pattern"],
    ),
    (
        &["networks.replication[0].cidr=10.1.0.256/24"],
        &["/networks/replication/0/cidr", "does not match pattern"],
    ),
    (
        &["networks.replication[0].cidr=fd00:1::/129"],
        &["/networks/replication/0/cidr", "does not match pattern"],
    ),
    (
        &["networks.client[0].interface=eth 0"],
        &["/networks/client/0/interface", "does not match pattern"],
    ),
    (&["networks.client[0].interface=lo"], &["/networks/client/0/interface"]),
    (
        &[
            "networks.client[0].interface=eth0",
            "networks.client[0].cidr=10.1.0.0/24",
        ],
        &["/networks/client/0", "maxProperties"],
    ),
    (
        &["networks.client[0].interface=eth0", "networks.client[1].interface=eth0"],
        &["/networks/client"],
    ),
    (
        &[
            "networks.client[0].interface=eth0",
            "networks.client[1].interface=eth1",
            "networks.client[2].interface=eth2",
        ],
        &["/networks/client", "maxItems"],
    ),
    (&["nodeDaemon.updateMaxSurge=0"], &["/nodeDaemon/updateMaxSurge"]),
    (&["nodeDaemon.updateMaxSurge=0%"], &["/nodeDaemon/updateMaxSurge"]),
    (
        &["nodeDaemon.livenessProbe.timeoutSeconds=0"],
        &["/nodeDaemon/livenessProbe/timeoutSeconds", "minimum"],
    ),
    (
        &["nodeDaemon.startupProbe.successThreshold=2"],
        &["/nodeDaemon/startupProbe", "'successThreshold' not allowed"],
    ),
    (
        &["networkPolicy.apiServerPorts[0]=70000"],
        &["/networkPolicy/apiServerPorts/0", "maximum"],
    ),
    (
        &["monitors.interval=often"],
        &["/monitors/interval", "does not match pattern"],
    ),
    (
        &["alerts.runbooks=a b"],
        &["/alerts/runbooks", "does not match pattern"],
    ),
    (&["alerts.enabled=maybe"], &["/alerts/enabled", "want boolean"]),
    (&["alerts.rules=none"], &["/alerts", "'rules' not allowed"]),
    (
        &["test.guestImage=a b"],
        &["/test/guestImage", "does not match pattern"],
    ),
    (&["test.memory=lots"], &["/test/memory", "does not match pattern"]),
    (&["test.bridge=a/b"], &["/test/bridge", "does not match pattern"]),
    (&["test.timeoutSeconds=0"], &["/test/timeoutSeconds", "minimum"]),
    (
        &["uninstall.evenWithVms=maybe"],
        &["/uninstall/evenWithVms", "want boolean"],
    ),
    (&["uninstall.always=true"], &["/uninstall", "'always' not allowed"]),
    (
        &["commonLabels.team=a b"],
        &["/commonLabels/team", "does not match pattern"],
    ),
];

#[test]
fn values_that_make_no_sense_are_refused_by_name() {
    for (values, expected) in REFUSED {
        let sets: Vec<String> = values.iter().map(|value| format!("--set={value}")).collect();
        let output = template(&sets.iter().map(String::as_str).collect::<Vec<_>>());
        let text = text(&output);
        assert!(!output.status.success(), "{values:?} was taken");
        for words in *expected {
            assert!(text.contains(words), "{values:?}: no {words:?} in: {text}");
        }
    }
}

#[test]
fn an_older_kubernetes_is_refused() {
    let output = template(&["--kube-version=1.31.0"]);
    assert!(
        !output.status.success() && text(&output).contains("requires kubeVersion: >=1.33"),
        "{}",
        text(&output)
    );
}

#[test]
fn switches_switch() {
    let count = |arguments: &[&str], kind: &str| {
        let output = template(arguments);
        assert!(output.status.success(), "{}", text(&output));
        let line = format!("kind: {kind}");
        text(&output).lines().filter(|text| *text == line).count()
    };
    for (value, kind, off, on) in [
        ("crds.install", "CustomResourceDefinition", 0, 1),
        ("namespace.create", "Namespace", 0, 1),
        ("priorityClasses.create", "PriorityClass", 0, 2),
        ("networkPolicy.enabled", "NetworkPolicy", 0, 1),
        ("monitors.enabled", "ServiceMonitor", 0, 2),
        ("alerts.enabled", "PrometheusRule", 0, 1),
        ("rbac.aggregate", "ClusterRole", 3, 5),
        ("uninstall.evenWithVms", "Job", 1, 0),
    ] {
        assert_eq!(count(&[&format!("--set={value}=false")], kind), off, "{value} off");
        assert_eq!(count(&[&format!("--set={value}=true")], kind), on, "{value} on");
    }
    assert_eq!(count(&["--set=operator.replicas=1"], "PodDisruptionBudget"), 0);
    assert_eq!(count(&["--set=operator.replicas=2"], "PodDisruptionBudget"), 1);
    // Policies have no switch.
    for set in value_sets() {
        let values = format!("--values={}", set.display());
        for kind in ["ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"] {
            assert_eq!(count(&[&values], kind), 6, "{set:?}");
        }
    }
}

/// One source: what Prometheus gets is the file that `e2e/tests/alerts` plays, but for where the runbooks are.
#[test]
fn alerts_are_those_of_the_file() {
    let parse = |text: &str| serde_yaml::from_str::<Value>(text).unwrap();
    let spec = |more: &[&str]| {
        let words = ["--show-only=templates/alerts.yaml", "--set=alerts.enabled=true"];
        let output = template(&[&words[..], more].concat());
        let text = text(&output);
        assert!(output.status.success(), "{text}");
        parse(&text)["spec"].clone()
    };
    let file = std::fs::read_to_string(chart().join("files/alerts.yaml")).unwrap();
    assert_eq!(spec(&[]), parse(&file));
    let elsewhere = file.replace("runbook_url: docs/runbooks/", "runbook_url: https://a.example/b/");
    assert_ne!(elsewhere, file);
    for place in ["https://a.example/b", "https://a.example/b/"] {
        let set = format!("--set=alerts.runbooks={place}");
        assert_eq!(spec(&[&set]), parse(&elsewhere));
    }
    // Values of an earlier release know nothing of alerts.
    assert!(template(&["--set=alerts=null"]).status.success());
    assert_eq!(
        spec(&["--set=alerts.runbooks=null", "--set=alerts.labels=null"]),
        parse(&file)
    );
}

/// Alerts go by the namespaces that metrics name, which are those of VMs and not that of the release.
#[test]
fn monitors_honour_the_labels_of_metrics() {
    let rendered = text(&template(&[
        "--show-only=templates/monitors.yaml",
        "--set=monitors.enabled=true",
    ]));
    let lines = rendered.lines().filter(|line| line.trim() == "honorLabels: true");
    assert_eq!(lines.count(), 2, "{rendered}");
}

#[test]
fn how_guest_images_are_brought_reaches_the_operator() {
    for (set, told) in [
        (None, "auto"),
        (Some("--set=imageVolumes=always"), "always"),
        (Some("--set=imageVolumes=never"), "never"),
    ] {
        let words: Vec<&str> = std::iter::once("--show-only=templates/operator/deployment.yaml")
            .chain(set)
            .collect();
        let rendered = text(&template(&words));
        let line = format!("- --image-volumes={told}");
        assert!(rendered.lines().any(|text| text.trim() == line), "{rendered}");
    }
}

/// Slow nodes need other times; those of a probe that are not set stay as they are.
#[test]
fn the_daemons_probes_are_those_of_the_values() {
    let shown = "--show-only=templates/node-daemon/daemonset.yaml";
    let probe = |more: &[&str], name: &str| {
        let output = template(&[&[shown], more].concat());
        let text = text(&output);
        assert!(output.status.success(), "{text}");
        let lines = text.lines().map(str::trim);
        let mut found: Vec<String> = lines
            .skip_while(|line| *line != format!("{name}:"))
            .skip(1)
            .take(4)
            .map(str::to_owned)
            .collect();
        found.sort();
        found
    };
    let command = "exec: {command: [/ftvm-node-daemon, probe]}";
    let expected = |failures: u32, period: u32, timeout: u32| {
        [
            command.to_owned(),
            format!("failureThreshold: {failures}"),
            format!("periodSeconds: {period}"),
            format!("timeoutSeconds: {timeout}"),
        ]
    };
    assert_eq!(probe(&[], "startupProbe"), expected(60, 1, 5));
    assert_eq!(probe(&[], "readinessProbe"), expected(3, 10, 5));
    assert_eq!(probe(&[], "livenessProbe"), expected(6, 10, 5));
    let slow = ["--set=nodeDaemon.livenessProbe.timeoutSeconds=60"];
    assert_eq!(probe(&slow, "livenessProbe"), expected(6, 10, 60));
    assert_eq!(probe(&slow, "readinessProbe"), expected(3, 10, 5));
}

/// The test's pod is no part of the release, and has rights to its own VM alone.
#[test]
fn the_test_is_rendered_when_it_has_a_guest() {
    let shown = "--show-only=templates/tests/failover.yaml";
    let without = template(&[]);
    assert!(without.status.success() && !text(&without).contains("helm.sh/hook: test"));
    let with = text(&template(&[shown, "--set=test.guestImage=a"]));
    assert_eq!(with.matches("\nkind: ").count(), 4, "{with}");
    assert_eq!(with.matches("helm.sh/hook: test\n").count(), 4, "{with}");
    let rights: Vec<&str> = with
        .lines()
        .skip_while(|line| *line != "rules:")
        .skip(1)
        .take_while(|line| *line != "---")
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .collect();
    assert_eq!(
        rights,
        [
            "- apiGroups: [ftvm.dev]",
            "resources: [faulttolerantvms]",
            "verbs: [create]",
            "- apiGroups: [ftvm.dev]",
            "resources: [faulttolerantvms]",
            "resourceNames: [ftvm-helm-test]",
            "verbs: [get, patch, delete]",
        ]
    );
}

/// The daemons' arguments that have this in them.
fn told_to_daemons(word: &str, sets: &[&str]) -> Vec<String> {
    let output = text(&template(
        &[&["--show-only=templates/node-daemon/daemonset.yaml"], sets].concat(),
    ));
    let lines = output.lines().map(str::trim);
    lines.filter(|line| line.contains(word)).map(str::to_owned).collect()
}

#[test]
fn the_number_of_seats_reaches_the_daemons() {
    assert_eq!(told_to_daemons("--seats", &[]), [""; 0], "by their memory");
    let set = "--set=nodeDaemon.seats=7";
    assert_eq!(told_to_daemons("--seats", &[set]), ["- --seats=7"]);
}

/// In the order of the values: it numbers paths on all nodes alike.
#[test]
fn networks_reach_the_daemons_in_their_order() {
    let told = |sets: &[&str]| told_to_daemons("--network=", sets);
    assert_eq!(told(&[]), [""; 0], "none by default");
    assert_eq!(told(&["--set=networks=null"]), [""; 0], "values of an earlier release");
    assert_eq!(
        told(&[
            "--set=networks.replication[0].interface=eth2",
            "--set=networks.replication[1].cidr=10.1.0.0/24",
            "--set=networks.client[0].cidr=fd00:1::/64",
        ]),
        [
            r#"- "--network=client=fd00:1::/64""#,
            r#"- "--network=replication=eth2""#,
            r#"- "--network=replication=10.1.0.0/24""#,
        ]
    );
}

/// What the daemons are told, and that the test's own bridge has to be among it.
#[test]
fn bridges_for_guests_reach_the_daemons() {
    let told = |sets: &[&str]| told_to_daemons("allowed-bridge", sets);
    assert_eq!(told(&[]), [""; 0], "none by default");
    assert_eq!(
        told(&["--set=nodeDaemon.allowedBridges={br0,vm-*}"]),
        [r#"- "--allowed-bridge=br0""#, r#"- "--allowed-bridge=vm-*""#]
    );
    for allowed in ["br0", "br*", "*"] {
        let allowed = format!("--set=nodeDaemon.allowedBridges={{{allowed}}}");
        let output = template(&["--set=test.guestImage=a", "--set=test.bridge=br0", &allowed]);
        assert!(output.status.success(), "{}", text(&output));
    }
}

/// Helm deletes the operator before them: whatever is set, VMs are not deleted with nobody there to stop them. `crds.keep` is what an earlier
/// release had for it.
#[test]
fn definitions_outlive_the_release() {
    let sets = value_sets();
    let all = std::iter::once(None).chain(sets.iter().map(Some));
    let mut rendered = 0;
    for set in all {
        let values = set.map(|path| format!("--values={}", path.display()));
        let values = values.as_deref().into_iter().chain(["--set=crds.keep=false"]);
        let output = text(&template(&values.collect::<Vec<_>>()));
        let objects = output.split("\n---\n");
        for definition in objects.filter(|object| object.contains("\nkind: CustomResourceDefinition\n")) {
            assert!(definition.contains("helm.sh/resource-policy: keep"), "{set:?}");
            rendered += 1;
        }
    }
    // But for one set, which installs none.
    assert_eq!(rendered, sets.len());
}
