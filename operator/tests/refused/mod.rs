//! What the API server refuses, with the message it gives: one example at least for each rule of the resource.

/// (changes to `docs/examples/web.yaml`, what the message says)
pub const AT_CREATION: &[(&str, &str)] = &[
    ("metadata: {name: web.shop}", "metadata.name is part of pods' names"),
    (
        "metadata: {name: a-name-that-is-much-too-long-for-pods-to-be}",
        "at most 34 lower-case letters",
    ),
    (
        "spec: {machine: {memory: 512MB}}",
        "write memory as a whole number with Mi, Gi or Ti",
    ),
    (
        "spec: {machine: {memory: 0.5Gi}}",
        "write memory as a whole number with Mi, Gi or Ti",
    ),
    ("spec: {machine: {memory: 8Mi}}", "memory must be from 16Mi to 1Ti"),
    ("spec: {machine: {memory: 2Ti}}", "memory must be from 16Mi to 1Ti"),
    ("spec: {machine: {vcpus: 17}}", "should be less than or equal to 16"),
    ("spec: {machine: {vcpus: 0}}", "should be greater than or equal to 1"),
    (
        "spec: {disks: [{name: root, size: 2G}]}",
        "write a size as a whole number with Mi, Gi or Ti",
    ),
    ("spec: {disks: []}", "should have at least 1 items"),
    ("spec: {disks: null}", "spec.disks: Required value"),
    (
        "spec: {disks: [{name: a, size: 1Gi}, {name: a, size: 1Gi}]}",
        "Duplicate value",
    ),
    ("spec: {disks: [{name: Root, size: 2Gi}]}", "such as root or data-1"),
    (
        "spec: {disks: [{name: guest, size: 2Gi}]}",
        "guest and identity are names of the seat's own volumes",
    ),
    (
        "spec: {disks: [{name: root, size: 2Gi, storageClassName: fast, storageClassNames: [fast, slow]}]}",
        "name one class for both seats in storageClassName, or one for each seat in storageClassNames",
    ),
    (
        "spec: {disks: [{name: root, size: 2Gi, storageClassNames: [fast, slow, slow]}]}",
        "at most 2 items",
    ),
    (
        "spec: {disks: [{name: root, size: 2Gi, source: {image: {}, blank: {}}}]}",
        "name one of source.image, source.claim, source.http and source.blank",
    ),
    (
        "spec: {disks: [{name: root, size: 2Gi, source: {claim: {claimName: a}, http: {url: 'http://a/b'}}}]}",
        "name one of source.image, source.claim, source.http and source.blank",
    ),
    (
        "spec: {disks: [{name: root, size: 2Gi, source: {format: Qcow2}}]}",
        "are about a file: name it with",
    ),
    (
        "spec: {disks: [{name: root, size: 2Gi, source: {http: {url: 'https://images.example/root.qcow2'}}}]}",
        "write the SHA-256 of the file into source.sha256",
    ),
    (
        "spec: {disks: [{name: root, size: 2Gi, source: {image: {}, format: Qcow2, compression: Gzip}}]}",
        "a compressed qcow2 file can't be read",
    ),
    (
        "spec: {disks: [{name: root, size: 2Gi, source: {image: {path: /disk/a.qcow2, backing: [/disk/../../etc/shadow]}}}]}",
        "write backing files as absolute paths",
    ),
    (
        "spec: {disks: [{name: root, size: 2Gi, source: {claim: {claimName: a, path: /a.qcow2, backing: [/b.qcow2, base.raw]}}}]}",
        "write backing files as absolute paths",
    ),
    (
        "spec: {disks: [{name: root, size: 2Gi, source: {claim: {claimName: a, path: /a.qcow2, backing: [/b.qcow2, /c.qcow2, /b.qcow2]}}}]}",
        "name each backing file once",
    ),
    (
        "spec: {disks: [{name: root, size: 2Gi, source: {image: {backing: [/disk/base.raw]}, format: Raw}}]}",
        "only a qcow2 file has backing files",
    ),
    (
        "spec: {disks: [{name: root, size: 2Gi, source: {claim: {claimName: a, backing: [/base.raw]}, format: Raw}}]}",
        "only a qcow2 file has backing files",
    ),
    (
        "spec: {disks: [{name: root, size: 2Gi, source: {image: {path: /a.qcow2, backing: [/b, /c, /d, /e, /f, /g, /h, /i, /j]}}}]}",
        "at most 8 items",
    ),
    (
        "spec: {disks: [{name: root, size: 2Gi, source: {image: {path: /a.qcow2, backing: []}}}]}",
        "should have at least 1 items",
    ),
    // What a web server has is one file.
    (
        "spec: {disks: [{name: root, size: 2Gi, source: {http: {url: 'https://images.example/a.qcow2', backing: [/b]}}}]}",
        "unknown field \"spec.disks[0].source.http.backing\"",
    ),
    (
        "spec: {disks: [{name: root, size: 2Gi, source: {image: {}, format: Vmdk}}]}",
        "supported values: \"Raw\", \"Qcow2\"",
    ),
    (
        "spec: {disks: [{name: root, size: 2Gi, source: {image: {}, sha256: ABCDEF}}]}",
        "write a SHA-256 as 64 hexadecimal digits in lower case",
    ),
    (
        "spec: {disks: [{name: root, size: 2Gi, source: {http: {url: 'https://me:secret@images.example/root.qcow2'}}}]}",
        "without user and password",
    ),
    (
        "spec: {disks: [{name: root, size: 2Gi, source: {http: {url: 'file:///etc/shadow'}}}]}",
        "write an address of a file, http or https",
    ),
    (
        "spec: {disks: [{name: root, size: 2Gi, source: {http: {url: 'https://images.example/a', authority: x}}}]}",
        "write certificates as PEM",
    ),
    (
        "spec: {disks: [{name: root, size: 2Gi, source: {claim: {claimName: a, path: ../b}}}]}",
        "write an absolute path of letters",
    ),
    (
        "spec: {disks: [{name: root, size: 2Gi, source: {image: {path: ../../etc/shadow}}}]}",
        "write an absolute path of letters",
    ),
    (
        "spec: {boot: {kernel: /boot/../../dev/mem}}",
        "write an absolute path of letters",
    ),
    (
        "spec: {boot: {initrd: initrd.img}}",
        "write an absolute path of letters",
    ),
    (
        "spec: {boot: {volume: {claimName: guest}}}",
        "name exactly one of boot.image",
    ),
    ("spec: {boot: {image: null}}", "name exactly one of boot.image"),
    (
        "spec: {networks: [{name: root, bridge: {name: br0}}]}",
        "a network and a disk have the same name",
    ),
    ("spec: {networks: [{name: front}]}", "say what the card is attached to"),
    (
        "spec: {networks: [{name: FRONT, bridge: {name: br0}}]}",
        "such as root or net-1",
    ),
    (
        "spec: {networks: [{name: front, mac: '01:00:00:00:00:01', bridge: {name: br0}}]}",
        "write a unicast MAC address in lower case",
    ),
    (
        "spec: {networks: [{name: front, mac: '00:00:00:00:00:00', bridge: {name: br0}}]}",
        "write a unicast MAC address in lower case",
    ),
    (
        "spec: {networks: [{name: front, addresses: [192.0.2.7/24], bridge: {name: br0}}]}",
        "write the guest's addresses without prefixes",
    ),
    (
        "spec: {networks: [{name: front, addresses: ['2001:DB8::0:7'], bridge: {name: br0}}]}",
        "write the guest's addresses without prefixes and in their shortest form",
    ),
    (
        "spec: {networks: [{name: front, addresses: [192.0.2.7, 224.0.0.1], bridge: {name: br0}}]}",
        "write addresses that one host has",
    ),
    (
        "spec: {networks: [{name: front, addresses: ['::'], bridge: {name: br0}}]}",
        "write addresses that one host has",
    ),
    (
        "spec: {networks: [{name: front, addresses: [192.0.2.7, 192.0.2.7], bridge: {name: br0}}]}",
        "Duplicate value",
    ),
    (
        "spec: {networks: [{name: front, bridge: {name: 'br 0'}}]}",
        "write the name of a network interface",
    ),
    (
        "spec: {faultTolerance: {interval: {minMs: 60, maxMs: 50}}}",
        "interval.minMs is above interval.maxMs",
    ),
    (
        "spec: {faultTolerance: {targetLatencyMs: 3, interval: {minMs: 5}}}",
        "targetLatencyMs can't be met with epochs of interval.minMs",
    ),
    (
        "spec: {faultTolerance: {detectionMs: 100, interval: {maxMs: 100}}}",
        "detectionMs must be longer than an epoch",
    ),
    (
        "spec: {faultTolerance: {diskHangMs: 499}}",
        "should be greater than or equal to 500",
    ),
    (
        "spec: {faultTolerance: {diskHangMs: 60001}}",
        "should be less than or equal to 60000",
    ),
    (
        "spec: {faultTolerance: {diskHoldMs: -1}}",
        "should be greater than or equal to 0",
    ),
    (
        "spec: {faultTolerance: {diskHoldMs: 60001}}",
        "should be less than or equal to 60000",
    ),
    (
        "spec: {faultTolerance: {mode: Lockstep}}",
        "supported values: \"Checkpoint\"",
    ),
    (
        "spec: {resources: {cpuRequest: two}}",
        "write CPU as a number of CPUs or thousandths with m",
    ),
    (
        "spec: {resources: {memoryOverhead: '100'}}",
        "write a size as a whole number with Mi, Gi or Ti",
    ),
    // More than any program could hold: the operator could read no VM any more.
    (
        "spec: {placement: {tolerations: [{key: a, tolerationSeconds: 9007199254740993}]}}",
        "should be less than or equal to 9007199254740991",
    ),
    (
        "spec: {runStrategy: Sometimes}",
        "supported values: \"Always\", \"Halted\"",
    ),
];

/// (changes to the accepted `docs/examples/web.yaml`, what the message says)
pub const AFTERWARDS: &[(&str, &str)] = &[
    (
        "spec: {machine: {memory: 1Gi}}",
        "spec.machine changes only while the VM is halted",
    ),
    (
        "spec: {machine: {memory: 1Gi}, runStrategy: Halted}",
        "spec.machine changes only while the VM is halted",
    ),
    (
        "spec: {boot: {cmdline: quiet}}",
        "spec.boot changes only while the VM is halted",
    ),
    (
        "spec: {disks: [{name: root, size: 2Gi, source: {image: {}}}, {name: b, size: 1Gi}]}",
        "spec.disks: names and order are fixed",
    ),
    (
        "spec: {disks: [{name: root, size: 4Gi, source: {image: {}}}]}",
        "a disk's size and source are fixed",
    ),
    (
        "spec: {disks: [{name: root, size: 2Gi, source: {blank: {}}}]}",
        "a disk's size and source are fixed",
    ),
    (
        "spec: {networks: [{name: front, bridge: {name: br1}}]}",
        "spec.networks changes only while the VM is halted",
    ),
    (
        "spec: {networks: [{name: front, addresses: [192.0.2.7], bridge: {name: br0}}]}",
        "spec.networks changes only while the VM is halted",
    ),
    ("spec: {networks: []}", "spec.networks: names and order are fixed"),
    (
        "spec: {networks: [{name: front, mac: '02:00:00:00:00:01', bridge: {name: br0}}]}",
        "a card's MAC address is fixed",
    ),
];

/// Changes that are accepted at any time.
pub const ACCEPTED: &[&str] = &[
    "spec: {faultTolerance: {replaceAfterSeconds: 60}}",
    "spec: {faultTolerance: {diskHangMs: 500, diskHoldMs: 0}}",
    "spec: {placement: {seats: [{nodeSelector: {rack: one}}]}}",
    "spec: {disks: [{name: root, size: 2Gi, source: {image: {}}, storageClassNames: [fast, slow]}]}",
    "spec: {runStrategy: Halted}",
];
