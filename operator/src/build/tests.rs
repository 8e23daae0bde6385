use std::path::Path;

use ftvm_crds::names::RESOURCE_SEAT;
use ftvm_crds::{FaultTolerantVM, SeatEntry, quantity, yaml};
use ftvm_protocol::room;
use k8s_openapi::api::core::v1::{Container, EmptyDirVolumeSource, Pod, PodSpec, Secret};
use serde::Serialize;

use super::*;

const UID: &str = "11111111-2222-4333-8444-555555555555";

fn vm() -> FaultTolerantVM {
    yaml::read(crate::decide::rig::VM).unwrap()
}

fn entry() -> SeatEntry {
    SeatEntry {
        name: "web-x7k2q".to_owned(),
        slot: 1,
        ..SeatEntry::default()
    }
}

fn image() -> SeatImage {
    SeatImage {
        image: "registry.example/ftvm:1".to_owned(),
        pull_policy: "IfNotPresent".to_owned(),
        pull_secrets: vec!["registry".to_owned()],
    }
}

/// Compares with the file of this name; writes it anew if FTVM_WRITE_SNAPSHOTS is set.
fn snapshot<T: Serialize>(name: &str, object: &T) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("src/build/snapshots")
        .join(name);
    let text = yaml::write(object).unwrap();
    if std::env::var_os("FTVM_WRITE_SNAPSHOTS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(
        text, kept,
        "if that is meant: FTVM_WRITE_SNAPSHOTS=1 cargo test -p ftvm-operator --lib build"
    );
}

#[test]
fn pods() {
    snapshot(
        "pod.yaml",
        &pod(&vm(), &entry(), &image(), GuestFiles::Mounted, None, false).unwrap(),
    );
}

#[test]
fn pods_of_clusters_without_image_volumes() {
    let copied = |vm: &FaultTolerantVM, ran| pod(vm, &entry(), &image(), GuestFiles::Copied, None, ran).unwrap();
    let pod = copied(&vm(), false);
    snapshot("pod-copied.yaml", &pod);
    let spec = pod.spec.unwrap();
    let requests = |container: &Container| container.resources.clone().unwrap().requests.unwrap();
    let seats = requests(&spec.containers[0]);
    for init in spec.init_containers.iter().flatten() {
        // kubelet gives the folder with the daemon's socket to who asks for a seat, and the pod asks for no more than its seat does.
        let asked = requests(init);
        assert!(!asked.contains_key(RESOURCE_SEAT), "{}", init.name);
        assert!(
            asked.iter().all(|(name, size)| seats.get(name) == Some(size)),
            "{asked:?}"
        );
        assert_eq!(init.security_context, spec.containers[0].security_context);
    }
    let command = |pod: Pod| pod.spec.unwrap().init_containers.unwrap()[1].command.clone().unwrap();
    let head = ["/ftvm-tools/seat", "copy", "--to", "/ftvm-guest"];
    // Nothing is imported any more; the one initrd is that which was named, and no file is copied twice.
    let mut vm = vm();
    vm.spec.boot.initrd = Some("/initrd".to_owned());
    assert_eq!(
        command(copied(&vm, true)),
        [&head[..], &["/boot/vmlinuz", "/initrd"]].concat()
    );
    let disks = serde_json::json!([
        {"name": "root", "size": "1Gi", "source": {"image": {"path": "/disk/a.qcow2"}}},
        {"name": "data", "size": "1Gi", "source": {"image": {"path": "/disk/b.qcow2", "backing": ["/disk/a.qcow2", "/disk/base.raw"]}}},
        {"name": "more", "size": "1Gi", "source": {"claim": {"claimName": "golden", "backing": ["/base.raw"]}}},
    ]);
    vm.spec.disks = serde_json::from_value(disks).unwrap();
    let files = [
        "/boot/vmlinuz",
        "/disk/a.qcow2",
        "/disk/b.qcow2",
        "/disk/base.raw",
        "/initrd",
    ];
    assert_eq!(command(copied(&vm, false)), [&head[..], &files].concat());
}

/// What API servers make of the probe: with the feature, without it, and of a version that never heard of it.
#[test]
fn the_answer_to_the_probe_tells_whether_there_are_image_volumes() {
    let sent = image_volume_probe(&image());
    snapshot("pod-probe.yaml", &sent);
    assert_eq!(judge_probe(&sent, &sent), Some(GuestFiles::Mounted));
    let with = |change: &dyn Fn(&mut PodSpec)| {
        let mut answer = sent.clone();
        change(answer.spec.as_mut().unwrap());
        judge_probe(&sent, &answer)
    };
    let left_out = with(&|spec| {
        spec.volumes = None;
        spec.containers[0].volume_mounts = None;
    });
    assert_eq!(left_out, Some(GuestFiles::Copied));
    let unknown = with(&|spec| {
        let volume = &mut spec.volumes.as_mut().unwrap()[0];
        (volume.image, volume.empty_dir) = (None, Some(EmptyDirVolumeSource::default()));
    });
    assert_eq!(unknown, Some(GuestFiles::Copied));
    // A mesh adds its container to each pod, and a volume to it.
    let inject = |spec: &mut PodSpec| {
        let mut proxy = spec.containers[0].clone();
        proxy.name = "proxy".to_owned();
        spec.containers.insert(0, proxy);
    };
    assert_eq!(with(&inject), Some(GuestFiles::Mounted));
    let injected_without = with(&|spec| {
        inject(spec);
        spec.volumes.as_mut().unwrap()[0].name = "proxy".to_owned();
    });
    assert_eq!(injected_without, Some(GuestFiles::Copied));
    // Whatever else is answered tells nothing.
    assert_eq!(with(&|spec| spec.containers[0].name = "other".to_owned()), None);
    assert_eq!(judge_probe(&sent, &Pod::default()), None);
    let mut renamed = sent.clone();
    renamed.metadata.name = None;
    assert_eq!(judge_probe(&sent, &renamed), None);
}

#[test]
fn pods_with_every_wish() {
    let mut vm = vm();
    let wishes = "
placement:
  topologyKey: topology.kubernetes.io/zone
  seats: [{}, {nodeSelector: {rack: two}}]
  tolerations: [{key: dedicated, operator: Exists, effect: NoSchedule}]
  priorityClassName: vms
resources: {cpuRequest: 500m, cpuLimit: '3', memoryOverhead: 1Gi}
boot: {volume: {claimName: guest}, kernel: /boot/linux}
";
    let wishes: serde_json::Value = yaml::read(wishes).unwrap();
    vm.spec.placement = serde_json::from_value(wishes["placement"].clone()).unwrap();
    vm.spec.resources = serde_json::from_value(wishes["resources"].clone()).unwrap();
    vm.spec.boot = serde_json::from_value(wishes["boot"].clone()).unwrap();
    let unfit = ["0123456789abcdef".to_owned()].into();
    snapshot(
        "pod-wishes.yaml",
        &pod(&vm, &entry(), &image(), GuestFiles::Copied, Some(&unfit), false).unwrap(),
    );
}

/// On different nodes and in different domains in any case; in different zones if that can be. What says which domain a node is in is there.
#[test]
fn seats_are_spread_over_zones() {
    let mut vm = vm();
    let zone = "topology.kubernetes.io/zone";
    let node = "kubernetes.io/hostname";
    for (key, apart_by, preferred) in [
        (node, vec![node], vec![(100, zone)]),
        ("example.com/rack", vec![node, "example.com/rack"], vec![(100, zone)]),
        (zone, vec![node, zone], vec![]),
    ] {
        vm.spec.placement.topology_key = key.to_owned();
        let pod = pod(&vm, &entry(), &image(), GuestFiles::Mounted, None, false).unwrap();
        let affinity = pod.spec.unwrap().affinity.unwrap();
        let selector = affinity.node_affinity.map(|affinity| {
            let selector = affinity.required_during_scheduling_ignored_during_execution.unwrap();
            selector.node_selector_terms[0].match_expressions.clone().unwrap()
        });
        let said = selector.iter().flatten();
        let told: Vec<_> = said.map(|said| (said.key.as_str(), said.operator.as_str())).collect();
        let expected = (key != node).then_some((key, "Exists"));
        assert_eq!(told, expected.into_iter().collect::<Vec<_>>());
        let apart = affinity.pod_anti_affinity.unwrap();
        let required = apart.required_during_scheduling_ignored_during_execution.unwrap();
        let wished = apart.preferred_during_scheduling_ignored_during_execution;
        let wished = wished.unwrap_or_default();
        let terms = wished.iter().map(|term| &term.pod_affinity_term).chain(&required);
        for term in terms {
            let labels = term.label_selector.as_ref().unwrap().match_labels.as_ref().unwrap();
            assert_eq!(labels.get(LABEL_VM).map(String::as_str), Some("web"));
        }
        let keys: Vec<&str> = required.iter().map(|term| term.topology_key.as_str()).collect();
        assert_eq!(keys, apart_by);
        let keys = wished
            .iter()
            .map(|term| (term.weight, term.pod_affinity_term.topology_key.as_str()));
        assert_eq!(keys.collect::<Vec<_>>(), preferred, "{key}");
    }
}

/// They come last, and no node is forbidden: all of them may have failed.
#[test]
fn a_seat_goes_last_where_storage_failed() {
    let mut vm = vm();
    vm.status.get_or_insert_default().storage_failed_on = vec!["one".to_owned(), "two".to_owned()];
    let pod = pod(&vm, &entry(), &image(), GuestFiles::Mounted, None, false).unwrap();
    let affinity = pod.spec.unwrap().affinity.unwrap().node_affinity.unwrap();
    assert_eq!(affinity.required_during_scheduling_ignored_during_execution, None);
    let wished = affinity.preferred_during_scheduling_ignored_during_execution.unwrap();
    let [wish] = &wished[..] else { panic!("{wished:?}") };
    let fields = wish.preference.match_fields.iter().flatten();
    let told = fields.map(|field| {
        let values = field.values.clone().unwrap_or_default();
        // One name each: no API server takes more (ValidateNodeFieldSelectorRequirement).
        (field.key.as_str(), field.operator.as_str(), values.join(" "))
    });
    let is_not = |node: &str| ("metadata.name", "NotIn", node.to_owned());
    assert_eq!(told.collect::<Vec<_>>(), [is_not("one"), is_not("two")]);
}

#[test]
fn first_contents_are_mounted_until_the_guest_ran() {
    let before = network_policy(&vm(), false);
    let mut vm = vm();
    let digest = "0".repeat(64);
    let disks = serde_json::json!([
        {"name": "root", "size": "1Gi", "source": {"http": {"url": "http://[2001:db8::1]:8080/root.qcow2"}, "sha256": digest}},
        {"name": "data", "size": "1Gi", "source": {"claim": {"claimName": "golden"}}},
    ]);
    vm.spec.disks = serde_json::from_value(disks).unwrap();
    snapshot(
        "pod-import.yaml",
        &pod(&vm, &entry(), &image(), GuestFiles::Mounted, None, false).unwrap(),
    );
    snapshot("network-policy-import.yaml", &network_policy(&vm, false));
    let later = serde_json::to_string(&pod(&vm, &entry(), &image(), GuestFiles::Mounted, None, true).unwrap()).unwrap();
    assert!(!later.contains("golden") && !later.contains("staging"), "{later}");
    assert_eq!(network_policy(&vm, true).spec, before.spec);
    for (url, port) in [
        ("https://images.example/a", 443),
        ("http://images.example/a:8", 80),
        ("https://images.example:8443/a", 8443),
        ("http://[2001:db8::1]/a", 80),
        ("http://images.example:99999/a", 80),
    ] {
        assert_eq!(super::shared::port_of(url), port, "{url}");
    }
}

#[test]
fn a_seat_is_looked_at_as_often_as_its_silence_would_be_noticed() {
    let mut vm = vm();
    for (detection_ms, period_s) in [(100, 2), (300, 2), (5_000, 5), (10_000, 10)] {
        vm.spec.fault_tolerance.detection_ms = detection_ms;
        let pod = pod(&vm, &entry(), &image(), GuestFiles::Mounted, None, false).unwrap();
        let probe = pod.spec.unwrap().containers[0].readiness_probe.clone().unwrap();
        let seconds = Some(period_s);
        assert_eq!((probe.period_seconds, probe.timeout_seconds), (seconds, seconds));
    }
}

#[test]
fn claims() {
    snapshot("claim-first.yaml", &claim(&vm(), &entry(), 0).unwrap());
    snapshot("claim-second.yaml", &claim(&vm(), &entry(), 1).unwrap());
    assert!(claim(&vm(), &entry(), 2).is_err());
}

#[test]
fn a_claim_has_the_storage_class_of_its_slot() {
    let mut vm = vm();
    let classes = |vm: &FaultTolerantVM| {
        [0, 1].map(|slot| {
            let entry = SeatEntry { slot, ..entry() };
            claim(vm, &entry, 1).unwrap().spec.unwrap().storage_class_name
        })
    };
    let named = |class: &str| Some(class.to_owned());
    assert_eq!(classes(&vm), [None, None]);
    vm.spec.disks[1].storage_class_name = named("both");
    assert_eq!(classes(&vm), [named("both"), named("both")]);
    vm.spec.disks[1].storage_class_name = None;
    vm.spec.disks[1].storage_class_names = vec!["fast".to_owned()];
    assert_eq!(classes(&vm), [named("fast"), None], "the cluster's default");
    vm.spec.disks[1].storage_class_names.push("slow".to_owned());
    assert_eq!(classes(&vm), [named("fast"), named("slow")]);
    snapshot("claim-by-slot.yaml", &claim(&vm, &entry(), 1).unwrap());
    let first = claim(&vm, &entry(), 0).unwrap();
    assert_eq!(first.spec.unwrap().storage_class_name, None, "of another disk");
}

#[test]
fn shared_objects() {
    snapshot("budget.yaml", &budget(&vm()));
    snapshot("network-policy.yaml", &network_policy(&vm(), false));
}

/// Whatever machine there may be: its pod has room for what either side's engine may hold. Usual ones take what they always took.
#[test]
fn pods_have_room_for_what_engines_may_hold() {
    let pod_mib = |memory: &str, vcpus, disks, networks| {
        let mut vm = vm();
        vm.spec.machine.memory = memory.to_owned();
        vm.spec.machine.vcpus = vcpus;
        let (disk, network) = (vm.spec.disks[0].clone(), vm.spec.networks[0].clone());
        vm.spec.disks = vec![disk; disks];
        vm.spec.networks = vec![network; networks];
        let limits = super::pod::resources(&vm).unwrap().limits.unwrap();
        quantity::bytes(&limits["memory"].0).unwrap() >> 20
    };
    for (memory, vcpus, mib) in [
        ("512Mi", 1, 896),
        ("1Gi", 1, 1536),
        ("2Gi", 1, 2816),
        ("2Gi", 2, 2816),
        ("4Gi", 4, 5376),
        ("16Gi", 4, 20736),
        // Where a quarter and 256 MiB are too little.
        ("64Mi", 1, 419),
        ("1Gi", 2, 1587),
        ("1Gi", 4, 1973),
        ("2Gi", 4, 3013),
        ("2Gi", 16, 5329),
    ] {
        assert_eq!(pod_mib(memory, vcpus, 1, 1), mib, "{memory}, {vcpus} vCPUs");
    }
    for mib in [16, 100, 512, 1 << 10, 3 << 10, 16 << 10, 100 << 10, 1 << 20] {
        for vcpus in 1..=16 {
            for number in 1..=8 {
                let pod_bytes = pod_mib(&format!("{mib}Mi"), vcpus, number, 9 - number) << 20;
                let machine = room::Machine {
                    ram_bytes: mib << 20,
                    vcpus,
                    disks: number,
                    disk_bytes: (number as u64) << 30,
                    nics: 9 - number,
                };
                assert!(pod_bytes >= machine.ram_bytes + machine.engine_bytes(), "{machine:?}");
            }
        }
    }
}

#[test]
fn sizes_that_are_none_are_errors() {
    let mut vm = vm();
    vm.spec.machine.memory = "lots".to_owned();
    vm.spec.disks[0].size = "1".to_owned();
    assert!(pod(&vm, &entry(), &image(), GuestFiles::Mounted, None, false).is_err());
    assert!(claim(&vm, &entry(), 0).is_err());
}

fn text(secret: &Secret, key: &str) -> String {
    String::from_utf8(secret.data.as_ref().unwrap()[key].0.clone()).unwrap()
}

#[test]
fn identities_are_what_the_engine_expects() {
    let vm = vm();
    let first = authority(&vm, None).unwrap();
    let kept = secret_of_authority(&vm, &first);
    let again = authority(&vm, Some(&kept)).unwrap();
    assert_eq!(again.certificate_pem, first.certificate_pem);
    let secret = identity_secret(&vm, &entry(), UID, &again).unwrap();
    let who: ftvm_protocol::identity::SeatIdentity = serde_json::from_str(&text(&secret, "seat.json")).unwrap();
    assert_eq!((who.vm.as_str(), who.seat.as_str()), ("web", "web-x7k2q"));
    assert_eq!(who.seat_id.to_string(), UID);
    assert_eq!(Some(who.vm_id.to_string()), vm.uid());
    assert_eq!(text(&secret, "authority.pem"), first.certificate_pem);
    assert!(text(&secret, "key.pem").contains("BEGIN PRIVATE KEY"));
    let owner = &secret.metadata.owner_references.as_ref().unwrap()[0];
    assert_eq!((owner.kind.as_str(), owner.uid.as_str()), ("Pod", UID));
}

#[test]
fn damaged_authorities_are_named_errors() {
    let vm = vm();
    let mut secret = secret_of_authority(&vm, &authority(&vm, None).unwrap());
    let key = secret.data.as_mut().unwrap().get_mut("tls.key").unwrap();
    let whole = std::mem::replace(&mut key.0, b"-----BEGIN PRIVATE KEY-----".to_vec());
    let error = authority(&vm, Some(&secret)).err().unwrap();
    assert!(
        matches!(error, IdentityError::Authority { key: "tls.key", .. }),
        "{error}"
    );
    assert!(error.to_string().contains("restore it from a backup"), "{error}");
    secret.data.as_mut().unwrap().get_mut("tls.key").unwrap().0 = whole;
    secret.data.as_mut().unwrap().remove("tls.crt");
    assert!(matches!(
        authority(&vm, Some(&secret)),
        Err(IdentityError::Authority { key: "tls.crt", .. })
    ));
    secret.data = None;
    assert!(authority(&vm, Some(&secret)).is_err());
    let good = authority(&vm, None).unwrap();
    assert!(matches!(
        identity_secret(&vm, &entry(), "x", &good),
        Err(IdentityError::Uid(_))
    ));
}
