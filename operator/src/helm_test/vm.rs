//! The VM that is made.

use ftvm_crds::{
    Boot, Bridge, CpuBaseline, DEFAULT_KERNEL, Disk, DiskSource, FaultTolerance, FaultTolerantVM, FaultTolerantVMSpec,
    GuestImage, Machine, Network, Placement, RunStrategy, SeatResources, VolumePolicy,
};

use super::{LABEL_RUN, NAME, Options};

/// The VM of a test run.
pub(super) fn vm(options: &Options, run: &str) -> FaultTolerantVM {
    let network = |name: &String| Network {
        name: "front".to_owned(),
        mac: None,
        addresses: Vec::new(),
        bridge: Some(Bridge { name: name.clone() }),
    };
    let spec = FaultTolerantVMSpec {
        run_strategy: RunStrategy::Always,
        machine: Machine {
            vcpus: 1,
            memory: options.memory.clone(),
            cpu_baseline: CpuBaseline::default(),
        },
        boot: Boot {
            image: Some(GuestImage {
                reference: options.guest_image.clone(),
                pull_policy: options.pull_policy,
                // The operator gives the release's own to every seat.
                pull_secret: None,
            }),
            volume: None,
            kernel: DEFAULT_KERNEL.to_owned(),
            initrd: None,
            cmdline: options.cmdline.clone(),
        },
        disks: vec![Disk {
            name: "root".to_owned(),
            size: "64Mi".to_owned(),
            storage_class_name: options.storage_class_name.clone(),
            storage_class_names: Vec::new(),
            source: DiskSource::default(),
        }],
        networks: options.bridge.iter().map(network).collect(),
        fault_tolerance: FaultTolerance::default(),
        placement: Placement::default(),
        // It does next to nothing, and must find room on nodes that are in use.
        resources: SeatResources {
            cpu_request: Some("100m".to_owned()),
            ..SeatResources::default()
        },
        volume_policy: VolumePolicy::Delete,
    };
    let mut vm = FaultTolerantVM::new(NAME, spec);
    vm.metadata.labels = Some([(LABEL_RUN.to_owned(), run.to_owned())].into());
    vm
}
