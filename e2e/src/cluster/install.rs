//! The project on a cluster, as its users install it: the image that its Dockerfile makes of its programs, and its chart.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::json;

use super::plan::{CLIENT_BRIDGE, KIND_LABEL, NodeKind};
use super::{Cluster, images};
use crate::cargo::workspace;
use crate::demo::Guest;
use crate::demo::programs::build_guest;
use crate::lab::binaries::{self, Profile};
use crate::lab::image::Image;

/// The image of all programs.
const REPOSITORY: &str = "lab.ftvm.dev/fault-tolerant-vm";
const TAG: &str = "lab";
/// The image of the embedded guest.
pub const GUEST_IMAGE: &str = "lab.ftvm.dev/embedded-guest:lab";
/// The image of the Debian guest.
pub const DEBIAN_IMAGE: &str = "lab.ftvm.dev/debian-guest:lab";
/// Its root disk in it.
pub const DEBIAN_DISK: &str = "/disk/root.raw";
/// Namespace of operator and node-daemons.
pub const NAMESPACE: &str = "ftvm-system";
/// Name of the release.
pub const RELEASE: &str = "ftvm";
/// What the Dockerfile's first stage compiles.
const PROGRAMS: [(&str, &str); 5] = [
    ("ftvm-operator", "ftvm-operator"),
    ("ftvm-node-daemon", "ftvm-node-daemon"),
    ("ftvm-engine", "ftvm-engine"),
    ("ftvm-node-daemon", "seat"),
    ("ftvm-node-daemon", "importer"),
];

/// A program that only asks the daemon is started so slowly on an emulated node, at worst. Each start costs such a node's one processor seconds, so
/// two of them are as far apart as this, too: with the chart's 10 s they would take half of it.
const SLOW_PROBE_S: u32 = 60;
/// For operator and node-daemons to be ready.
const PATIENCE: Duration = Duration::from_secs(180);

/// Images as OCI archives, ready for a cluster.
#[derive(Debug, Clone)]
pub struct Images {
    product: PathBuf,
    guest: PathBuf,
}

impl Images {
    /// Builds what is not fresh and makes the archives in `folder`: the product's, and a guest's.
    ///
    /// # Errors
    /// If something does not compile, or buildah fails.
    pub fn make(folder: &Path, profile: Profile, guest: Guest) -> anyhow::Result<Self> {
        let binaries = folder.join("image");
        fs::create_dir_all(binaries.join("programs"))?;
        for program in binaries::build_as_shipped(&PROGRAMS, profile)? {
            let name = program.file_name().context("a program without a name")?;
            strip(&program, &binaries.join("programs").join(name))?;
        }
        let made = Self {
            product: folder.join("fault-tolerant-vm.tar"),
            guest: folder.join("guest.tar"),
        };
        let dockerfile = workspace()?.join("Dockerfile");
        images::build(&dockerfile, &format!("{REPOSITORY}:{TAG}"), &binaries, &made.product)?;
        match guest {
            Guest::Embedded => images::pack_guest(GUEST_IMAGE, &build_guest()?, None, &[], &made.guest)?,
            Guest::Linux => {
                let debian = Image::guest()?;
                let disks = [(DEBIAN_DISK.trim_start_matches("/disk/"), debian.disk.as_path())];
                images::pack_guest(DEBIAN_IMAGE, &debian.kernel, Some(&debian.initrd), &disks, &made.guest)?;
            }
        }
        fs::remove_dir_all(&binaries).with_context(|| format!("cannot remove {}", binaries.display()))?;
        Ok(made)
    }

    /// The archives, for [`Options::images`](super::Options::images).
    #[must_use]
    pub fn archives(&self) -> Vec<PathBuf> {
        vec![self.product.clone(), self.guest.clone()]
    }
}

/// Copies a program without debug information, which no node needs.
fn strip(program: &Path, to: &Path) -> anyhow::Result<()> {
    let mut strip = Command::new("strip");
    strip.arg("--strip-debug").arg("-o").arg(to).arg(program);
    let status = strip
        .status()
        .context("cannot start `strip`: install the Debian package binutils")?;
    ensure!(status.success(), "strip {}: {status}", program.display());
    Ok(())
}

impl Cluster {
    /// Gives both images to the nodes if they lack them, and installs the chart; returns once operator and node-daemons are ready.
    ///
    /// # Errors
    /// What Helm says, with what the pods say.
    pub fn install(&self, images: &Images) -> anyhow::Result<()> {
        for archive in images.archives() {
            if !self.shared.options.images.contains(&archive) {
                self.import_image(&archive)?;
            }
        }
        self.make_namespace(NAMESPACE, &json!({"pod-security.kubernetes.io/enforce": "privileged"}))?;
        self.helm_install("install", &[])
    }

    /// `helm install` or `helm upgrade` of the chart, with more arguments of Helm; returns once everything is ready.
    ///
    /// # Errors
    /// What Helm says, with what the pods say.
    pub fn helm_install(&self, verb: &str, more: &[&str]) -> anyhow::Result<()> {
        let chart = workspace()?.join("charts/fault-tolerant-vm");
        let chart = chart.to_str().context("the chart's path is no UTF-8")?;
        let (repository, tag) = (format!("image.repository={REPOSITORY}"), format!("image.tag={TAG}"));
        let timeout = format!("{}s", self.kind().patience(PATIENCE).as_secs());
        let arguments = [
            verb,
            RELEASE,
            chart,
            "--namespace",
            NAMESPACE,
            "--wait",
            "--timeout",
            &timeout,
        ];
        let bridges = format!("nodeDaemon.allowedBridges={{{CLIENT_BRIDGE}}}");
        let probe = |name: &str| format!("nodeDaemon.{name}Probe.timeoutSeconds={SLOW_PROBE_S}");
        let rarely = |name: &str| format!("nodeDaemon.{name}Probe.periodSeconds={SLOW_PROBE_S}");
        let probes = ["startup", "readiness", "liveness"].map(probe).into_iter();
        let probes = probes.chain(["readiness", "liveness"].map(rarely));
        let on = |part: &str, kind: NodeKind| format!("{part}.nodeSelector.{KIND_LABEL}={}", kind.name());
        // Emulated nodes have enough to do.
        let places = [on("operator", NodeKind::Native), on("nodeDaemon", NodeKind::Emulated)];
        let mut values = vec![repository, tag, "image.pullPolicy=Never".to_owned(), bridges];
        if self.kind() == NodeKind::Emulated {
            values.extend(places.into_iter().chain(probes));
        }
        let values: Vec<&str> = values.iter().flat_map(|value| ["--set", value]).collect();
        self.helm(&[&arguments[..], &values, more].concat())
            .map(drop)
            .with_context(|| self.pods_story(NAMESPACE))
    }

    /// What the pods of a namespace say of themselves, for who waits in vain.
    #[must_use]
    pub fn pods_story(&self, namespace: &str) -> String {
        let pods = self.get(&["pods", "--namespace", namespace]);
        let pods = pods
            .ok()
            .and_then(|pods| pods["items"].as_array().cloned())
            .unwrap_or_default();
        let mut text = String::new();
        for pod in pods {
            let name = pod["metadata"]["name"].as_str().unwrap_or_default();
            let logs = self.kubectl(&["logs", "--namespace", namespace, name, "--tail=15"]);
            let logs = logs.unwrap_or_else(|error| format!("{error:#}"));
            text += &format!("pod {name}: {}\nits log:\n{logs}\n", self.pod_story(&pod));
        }
        text
    }
}
