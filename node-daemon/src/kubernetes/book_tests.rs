use super::*;
use serde_json::{Value, json};

const POD: &str = "00000000-0000-4000-8000-00000000000a";
const PEER: &str = "00000000-0000-4000-8000-00000000000b";
const VM: &str = "00000000-0000-4000-8000-000000000001";
const CPU: &str = "tsc=2400000 0:d,756e6547,6c65746e,49656e69 1:806e8,800,80982201,781fbff 80000001:0,0,1,2c100800";

fn vm(change: impl FnOnce(&mut Value)) -> FaultTolerantVM {
    let mut vm = json!({
        "apiVersion": "ftvm.dev/v1alpha1", "kind": "FaultTolerantVM",
        "metadata": {"name": "web", "namespace": "shop", "uid": VM},
        "spec": {
            "machine": {"memory": "512Mi", "vcpus": 2},
            "boot": {"image": {"reference": "web:1"}, "cmdline": "quiet"},
            "disks": [
                {"name": "root", "size": "1Gi", "source": {"image": {}}},
                {"name": "data", "size": "64Mi"},
            ],
            "networks": [{"name": "lan", "addresses": ["192.0.2.7", "2001:db8::7"], "bridge": {"name": "br0"}}, {"name": "wan", "mac": "02:00:00:00:00:09", "bridge": {"name": "br1"}}],
            "faultTolerance": {
                "detectionMs": 400, "diskHangMs": 2000, "interval": {"minMs": 3, "maxMs": 40}, "targetLatencyMs": 15,
                "whenUnprotected": "Pause",
            },
        },
        "status": {"cpu": {"source": "Common", "baseline": CPU, "why": "common to 3 nodes"}, "seats": [
            {"name": "web-aaaaa", "podUid": POD, "node": "one", "podIP": "10.0.0.1", "hostIP": "192.0.2.1"},
            {"name": "web-bbbbb", "podUid": PEER, "node": "two", "podIP": "10.0.0.2", "hostIP": "192.0.2.2"},
            {"name": "web-ccccc"},
        ]},
    });
    change(&mut vm);
    serde_json::from_value(vm).unwrap()
}

fn pod(change: impl FnOnce(&mut Value)) -> Pod {
    let mut pod = json!({
        "metadata": {"name": "web-aaaaa", "namespace": "shop", "uid": POD, "labels": {"ftvm.dev/vm": "web"}},
        "spec": {"nodeName": "one", "containers": []},
    });
    change(&mut pod);
    serde_json::from_value(pod).unwrap()
}

fn seat(pod: &Pod, vm: &FaultTolerantVM, node: &str) -> Result<Seat, Refusal> {
    super::seat(pod, vm, node, Some("machine"))
}

#[test]
fn earlier_pods_of_all_seats_are_known() {
    let (own, other, bad) = (VM, PEER, "nobody");
    let since = "2026-11-27T00:00:00Z";
    let vm = vm(|vm| {
        let boot = "Machine/1";
        vm["status"]["seats"][0]["former"] = json!([{"uid": own, "node": "one", "boot": boot, "missingSince": since}]);
        vm["status"]["seats"][1]["former"] = json!([
            {"uid": other, "node": "one", "boot": boot, "missingSince": since, "ended": true},
            {"uid": bad, "missingSince": since},
        ]);
    });
    let seat = seat(&pod(|_| {}), &vm, "one").unwrap();
    let former = |uid: &str, own, ended| Former {
        seat_id: uid.parse().unwrap(),
        own,
        here: true,
        ended,
    };
    assert_eq!(seat.former, [former(own, true, false), former(other, false, true)]);
}

/// Whoever boots waits for what its disk says (rule 8): a seat is left out neither for the moment in which its pod is made anew, nor while it is removed.
#[test]
fn a_seat_that_cant_be_dialled_is_asked_after() {
    const FIRST: &str = "00000000-0000-4000-8000-0000000000b1";
    const SECOND: &str = "00000000-0000-4000-8000-0000000000b2";
    let since = "2026-11-27T00:00:00Z";
    let former = |uid: &str, node: Option<&str>, ended: bool| json!({"uid": uid, "node": node, "missingSince": since, "ended": ended});
    let (two, nowhere) = (Some("two"), None);
    let absent = |change: Value| {
        let vm = vm(|vm| {
            vm["status"]["seats"][1] = change;
            vm["status"]["seats"][1]["name"] = json!("web-bbbbb");
        });
        let link = seat(&pod(|_| {}), &vm, "one").unwrap().config.link;
        assert!(link.peers.is_empty(), "{:?}", link.peers);
        assert!(link.absent.iter().all(|absent| absent.seat == "web-bbbbb"));
        let ids = link.absent.iter().map(|absent| absent.seat_id.to_string());
        ids.collect::<Vec<_>>()
    };
    let earlier = json!([former(FIRST, two, true)]);
    assert_eq!(absent(json!({"former": earlier})), [FIRST], "for its disk");
    let bound = json!({"podUid": PEER, "node": "two", "hostIP": "192.0.2.2", "former": earlier});
    assert_eq!(absent(bound), [FIRST]);
    let open = json!({"former": [former(FIRST, two, false), former(SECOND, two, true)]});
    assert_eq!(absent(open), [FIRST, SECOND], "the first may run");
    let unplaced = json!({"former": [former(FIRST, two, true), former(SECOND, nowhere, true)]});
    assert_eq!(absent(unplaced), [FIRST]);
    let leaving = json!({"podUid": PEER, "podIP": "10.0.0.2", "leaving": true, "former": earlier});
    assert_eq!(absent(leaving), [PEER]);
    // One that never ran has nothing to say, or no guest would ever begin.
    let none: [&str; 0] = [];
    assert_eq!(absent(json!({})), none);
    let bound = json!({"podUid": PEER, "node": "two", "hostIP": "192.0.2.2"});
    assert_eq!(absent(bound), none);
    let unplaced = json!({"former": [former(FIRST, nowhere, true)]});
    assert_eq!(absent(unplaced), none);
    // As soon as it can be dialled it answers for itself.
    let dialled = vm(|vm| vm["status"]["seats"][1]["former"] = earlier);
    let link = seat(&pod(|_| {}), &dialled, "one").unwrap().config.link;
    assert_eq!((link.peers.len(), link.absent), (1, Vec::new()));
}

/// A machine that was set up under the name of one that is only cut off has forgotten nothing.
#[test]
fn an_earlier_pod_was_here_if_node_and_machine_are_the_same() {
    let here = |former: Value, machine: Option<&str>| {
        let vm = vm(|vm| {
            vm["status"]["seats"][0]["former"] = json!([former]);
            vm["status"]["seats"][0]["former"][0]["uid"] = json!(PEER);
            vm["status"]["seats"][0]["former"][0]["missingSince"] = json!("2026-11-27T00:00:00Z");
        });
        super::seat(&pod(|_| {}), &vm, "one", machine).unwrap().former[0].here
    };
    let machine = Some("machine");
    assert!(here(json!({"node": "one", "boot": "machine/1"}), machine));
    assert!(
        here(json!({"node": "one", "boot": "machine/"}), machine),
        "its boot is not known"
    );
    assert!(!here(json!({"node": "one", "boot": "other/1"}), machine));
    assert!(!here(json!({"node": "two", "boot": "machine/1"}), machine));
    assert!(!here(json!({"node": "one"}), machine), "nobody knows");
    assert!(!here(json!({"node": "one", "boot": "machine/1"}), None));
}

/// A machine that took the name of one that is only cut off would say that no guest is here, while the former one runs it.
#[test]
fn a_pod_that_was_bound_to_another_machine_is_no_seat_here() {
    let bound_to = |on: &str, here: Option<&str>| {
        let vm = vm(|vm| vm["status"]["seats"][0]["machine"] = json!(on));
        super::seat(&pod(|_| {}), &vm, "one", here)
    };
    assert!(bound_to("Machine", Some("machine")).is_ok());
    for here in [Some("other"), None] {
        let refused = bound_to("machine", here).unwrap_err();
        assert!(refused.why.contains("was machine machine"), "{refused}");
        assert_ne!(refused.code, 0, "a person has to do something: {refused}");
    }
    assert!(super::seat(&pod(|_| {}), &vm(|_| {}), "one", None).is_ok());
    // Entered by an earlier release.
    assert!(bound_to("FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF", None).is_ok());
}

#[test]
fn a_pod_of_the_book_is_a_seat() {
    let seat = seat(&pod(|_| {}), &vm(|_| {}), "one").unwrap();
    assert_eq!(seat.expected().seat_id.to_string(), POD);
    assert_eq!((seat.vm_id.to_string().as_str(), seat.wanted), (VM, true));
    let config = &seat.config;
    assert_eq!((config.vm.as_str(), config.seat.as_str()), ("shop/web", "web-aaaaa"));
    assert_eq!((config.machine.memory_mib, config.machine.vcpus), (512, 2));
    assert_eq!(config.machine.cpu.as_deref(), Some(CPU));
    assert_eq!(config.link.listen.to_string(), "10.0.0.1:7000");
    // Whoever has no pod yet is no peer.
    let [peer] = config.link.peers.as_slice() else {
        panic!("{:?}", config.link.peers)
    };
    assert_eq!(peer.seat_id.unwrap().to_string(), PEER);
    assert_eq!(peer.address.to_string(), "10.0.0.2:7000");
    assert_eq!(peer.daemon_address.unwrap().to_string(), "192.0.2.2:7400");
    assert_eq!(config.disks[1].path.to_str(), Some("/disks/data/disk.raw"));
    assert_eq!(
        config.header.as_ref().unwrap().to_str(),
        Some("/disks/root/ftvm-header")
    );
    assert_eq!(config.timing.peer_lost_ms, Some(400));
    let of_disks = (config.timing.disk_hang_ms, config.timing.disk_hold_ms);
    assert_eq!(of_disks, (Some(2000), None));
    assert_eq!(config.checkpoint.interval_max_us, Some(40_000));
    assert_eq!(config.checkpoint.target_latency_us, Some(15_000));
    assert_eq!(config.when_unprotected, WhenUnprotected::Pause);
    let taps: Vec<_> = config.nics.iter().map(|nic| nic.tap.as_str()).collect();
    assert_eq!(taps, ["ft000000000a0", "ft000000000a1"]);
    assert_eq!(config.nics[1].mac, "02:00:00:00:00:09");
    let addresses: [IpAddr; 2] = ["192.0.2.7".parse().unwrap(), "2001:db8::7".parse().unwrap()];
    assert_eq!(config.nics[0].addresses, addresses);
    assert!(config.nics[1].addresses.is_empty(), "not known");
    assert_eq!(seat.recipe.kernel, "/boot/vmlinuz");
    let root = seat.recipe.disks[0].source.clone().unwrap();
    assert_eq!(root.name(), "/disk/root.raw");
    assert_eq!(
        (seat.recipe.disks[1].size_bytes, seat.recipe.disks[1].source.clone()),
        (64 << 20, None)
    );
    // It is remembered as it is.
    let text = serde_json::to_string(&seat).unwrap();
    assert_eq!(serde_json::from_str::<Seat>(&text).unwrap(), seat);
}

/// A daemon of an earlier release that comes back refuses to read fields that it does not know: what is as before is not written.
#[test]
fn how_long_errors_of_disks_are_held_is_remembered_where_it_was_said() {
    let remembered = |change: fn(&mut Value)| {
        let seat = seat(&pod(|_| {}), &vm(change), "one").unwrap();
        let written = serde_json::to_value(&seat).unwrap();
        assert_eq!(serde_json::from_value::<Seat>(written.clone()).unwrap(), seat);
        written["config"]["timing"].get("disk_hold_ms").cloned()
    };
    assert_eq!(remembered(|_| {}), None);
    let told_at_once = remembered(|vm| vm["spec"]["faultTolerance"]["diskHoldMs"] = json!(0));
    assert_eq!(told_at_once, Some(json!(0)));
    let usual = remembered(|vm| vm["spec"]["faultTolerance"]["diskHoldMs"] = json!(10_000));
    assert_eq!(usual, None);
}

#[test]
fn backing_files_reach_the_seat_in_their_order() {
    let claim = json!({"claimName": "golden", "path": "/a.qcow2", "backing": ["/c.qcow2", "/b.raw"]});
    let vm = vm(|vm| vm["spec"]["disks"][1]["source"] = json!({"claim": claim}));
    let seat = seat(&pod(|_| {}), &vm, "one").unwrap();
    let place = seat.recipe.disks[1].source.clone().unwrap().place;
    let backing = vec!["/c.qcow2".to_owned(), "/b.raw".to_owned()];
    let path = "/a.qcow2".to_owned();
    assert_eq!(place, Place::Claim { path, backing });
}

#[test]
fn what_is_not_in_the_book_is_no_seat() {
    let other = "00000000-0000-4000-8000-00000000000c";
    let cases: [(Pod, FaultTolerantVM, &str, &str); 8] = [
        (
            pod(|pod| pod["metadata"]["uid"] = json!(other)),
            vm(|_| {}),
            "one",
            "has no pod",
        ),
        (
            pod(|pod| pod["metadata"]["name"] = json!("web-zzzzz")),
            vm(|_| {}),
            "one",
            "has no pod",
        ),
        (
            pod(|pod| pod["metadata"]["namespace"] = json!("other")),
            vm(|_| {}),
            "one",
            "is not in namespace",
        ),
        (
            pod(|pod| pod["metadata"]["uid"] = json!("x")),
            vm(|_| {}),
            "one",
            "is no UUID",
        ),
        (pod(|_| {}), vm(|_| {}), "two", "is not on node two"),
        (
            pod(|_| {}),
            vm(|vm| vm["status"]["seats"][0]["node"] = json!("two")),
            "one",
            "is not on node one",
        ),
        (
            pod(|_| {}),
            vm(|vm| vm["status"]["seats"][0]["podIP"] = json!(null)),
            "one",
            "no IP of pod",
        ),
        (pod(|_| {}), vm(|vm| vm["status"] = json!(null)), "one", "has no pod"),
    ];
    for (pod, vm, node, expected) in cases {
        let refused = seat(&pod, &vm, node).unwrap_err();
        assert!(refused.why.contains(expected), "{refused}");
        assert_eq!(refused.code, 0, "it may come, or is no seat: {refused}");
    }
}

/// No engine runs before the operator has chosen: two that chose for themselves might not get on.
#[test]
fn the_guests_cpu_is_the_one_that_was_chosen() {
    let with = |cpu: Value, baseline: &str| {
        let change = |vm: &mut Value| {
            vm["status"]["cpu"] = cpu;
            vm["spec"]["machine"]["cpuBaseline"] = json!(baseline);
        };
        seat(&pod(|_| {}), &vm(change), "one").map(|seat| seat.config.machine.cpu)
    };
    let host = json!({"source": "Host", "why": "no node has published its CPU"});
    assert_eq!(with(host.clone(), "Common"), Ok(None));
    assert_eq!(with(json!(null), "Host"), Ok(None));
    let refused = with(json!(null), "Common").unwrap_err();
    assert!(refused.why.contains("has not chosen the guest's CPU yet"), "{refused}");
    assert_eq!(refused.code, 0, "it will be");
    let former = json!({"source": "Common", "baseline": CPU, "why": "", "former": true});
    assert!(with(former, "Common").is_err());
    let damaged = json!({"source": "Common", "baseline": "tsc=1", "why": ""});
    let refused = with(damaged, "Common").unwrap_err();
    assert!(
        refused.why.contains("machine.cpu: a CPU as text lacks fpu"),
        "{refused}"
    );
}

#[test]
fn seats_that_leave_are_not_wanted_and_no_peers() {
    let leaving = |index: usize| move |vm: &mut Value| vm["status"]["seats"][index]["leaving"] = json!(true);
    assert!(!seat(&pod(|_| {}), &vm(leaving(0)), "one").unwrap().wanted);
    assert!(
        seat(&pod(|_| {}), &vm(leaving(1)), "one")
            .unwrap()
            .config
            .link
            .peers
            .is_empty()
    );
}

#[test]
fn objects_that_the_api_servers_rules_would_have_refused_are_refused_here_too() {
    for (change, expected) in [
        (json!({"memory": "much", "vcpus": 1}), "is not a size"),
        (json!({"memory": "64Mi", "vcpus": 99}), "99 vCPUs"),
        (json!({"memory": "1Mi", "vcpus": 1}), "1 MiB"),
    ] {
        let refused = seat(&pod(|_| {}), &vm(|vm| vm["spec"]["machine"] = change), "one").unwrap_err();
        assert!(refused.why.contains(expected), "{refused}");
        assert_eq!(refused.code, 10, "a person has to mend it: {refused}");
    }
    let refused = seat(
        &pod(|_| {}),
        &vm(|vm| vm["spec"]["networks"][0]["bridge"] = json!(null)),
        "one",
    )
    .unwrap_err();
    assert!(refused.why.contains("attached to nothing"), "{refused}");
}
