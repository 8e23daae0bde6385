//! etcd, kube-apiserver, kube-controller-manager and kube-scheduler: plain processes in the lab's outer namespaces.
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, ensure};
use rustix::process::{Pid, Signal};

use super::pki::{Authority, Subject};
use super::plan::{API_PORT, Options, SERVICES, api_address, api_front_address, api_url};
use super::wait::{Hopeless, wait_for};
use super::{kubectl_command, log_end};
use crate::lab::Sandbox;

/// Long enough for a busy machine; nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(180);
const ETCD_URL: &str = "http://127.0.0.1:2379";
/// The API server's certificate and key in the cluster's folder, without their extensions.
pub(super) const SERVING: &str = "apiserver";

/// A program of the control plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Component {
    /// The store.
    Etcd,
    /// The API.
    ApiServer,
    /// Node lifecycle, garbage collection, volumes' binding and so on.
    ControllerManager,
    /// Places pods.
    Scheduler,
}

impl Component {
    /// Its program.
    #[must_use]
    pub fn program(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::ApiServer => "kube-apiserver",
            Self::ControllerManager => "kube-controller-manager",
            Self::Scheduler => "kube-scheduler",
        }
    }
}

/// The running control plane; dropping it ends it.
pub(super) struct ControlPlane {
    sandbox: Arc<Sandbox>,
    programs: PathBuf,
    folder: PathBuf,
    arguments: BTreeMap<Component, Vec<String>>,
    children: Mutex<BTreeMap<Component, Child>>,
}

impl ControlPlane {
    /// Starts it and waits until the API server is ready. `folder` gets its data, logs and the administrator's kubeconfig.
    pub(super) fn start(
        sandbox: &Arc<Sandbox>,
        programs: &Path,
        folder: &Path,
        authority: &Authority,
        options: &Options,
    ) -> anyhow::Result<Self> {
        fs::create_dir_all(folder.join("log"))?;
        let url = api_url(api_address());
        for (name, user) in [
            (Component::ControllerManager, "system:kube-controller-manager"),
            (Component::Scheduler, "system:kube-scheduler"),
        ] {
            let path = folder.join(name.program()).with_extension("kubeconfig");
            authority.kubeconfig(&path, &url, &Subject { user, group: None })?;
        }
        let admin = Subject {
            user: "admin",
            group: Some("system:masters"),
        };
        authority.kubeconfig(&folder.join("admin.kubeconfig"), &url, &admin)?;
        let this = Self {
            sandbox: Arc::clone(sandbox),
            programs: programs.to_owned(),
            folder: folder.to_owned(),
            arguments: arguments(folder, authority, options)?,
            children: Mutex::default(),
        };
        this.start_component(Component::Etcd)?;
        this.start_component(Component::ApiServer)?;
        this.wait_ready()?;
        this.start_component(Component::ControllerManager)?;
        this.start_component(Component::Scheduler)?;
        Ok(this)
    }

    /// Starts one of its programs, which must not run.
    pub(super) fn start_component(&self, component: Component) -> anyhow::Result<()> {
        let name = component.program();
        let mut children = self.lock();
        ensure!(!children.contains_key(&component), "{name} runs already");
        let log = File::options().create(true).append(true).open(self.log(component))?;
        let mut command = Command::new(self.programs.join(name));
        command
            .args(&self.arguments[&component])
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        children.insert(component, self.sandbox.spawn(command)?);
        Ok(())
    }

    /// Kills one of its programs and waits for its end.
    pub(super) fn kill_component(&self, component: Component) -> anyhow::Result<()> {
        let mut child = self
            .lock()
            .remove(&component)
            .with_context(|| format!("{} does not run", component.program()))?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Sends a signal to one of its programs.
    pub(super) fn signal(&self, component: Component, signal: Signal) -> anyhow::Result<()> {
        let children = self.lock();
        let child = children
            .get(&component)
            .with_context(|| format!("{} does not run", component.program()))?;
        rustix::process::kill_process(Pid::from_child(child), signal)
            .with_context(|| format!("{} is gone", component.program()))
    }

    /// Waits until the API server says that it is ready.
    pub(super) fn wait_ready(&self) -> anyhow::Result<()> {
        wait_for("the API server is ready", PATIENCE, || {
            for component in [Component::Etcd, Component::ApiServer] {
                self.ensure_running(component)?;
            }
            let mut kubectl = kubectl_command(&self.programs, &self.folder, &self.folder.join("admin.kubeconfig"));
            kubectl.args(["get", "--raw=/readyz", "--request-timeout=5s"]);
            kubectl
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            let output = self.sandbox.spawn(kubectl)?.wait_with_output()?;
            ensure!(
                output.status.success(),
                "{}",
                String::from_utf8_lossy(&output.stderr).trim()
            );
            Ok(())
        })
    }

    fn ensure_running(&self, component: Component) -> anyhow::Result<()> {
        if let Some(child) = self.lock().get_mut(&component)
            && let Some(status) = child.try_wait()?
        {
            let end = log_end(&self.log(component));
            return Err(Hopeless(format!("{} ended ({status}):\n{end}", component.program())).into());
        }
        Ok(())
    }

    fn log(&self, component: Component) -> PathBuf {
        self.folder.join("log").join(component.program()).with_extension("log")
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Component, Child>> {
        self.children.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        for child in self.lock().values_mut() {
            // One that has ended by itself is as good.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Every program's arguments.
fn arguments(
    folder: &Path,
    authority: &Authority,
    options: &Options,
) -> anyhow::Result<BTreeMap<Component, Vec<String>>> {
    let mut all = BTreeMap::new();
    let show = |path: PathBuf| path.display().to_string();
    let kubeconfig = |component: Component| {
        let path = folder.join(component.program()).with_extension("kubeconfig");
        format!("--kubeconfig={}", path.display())
    };
    all.insert(
        Component::Etcd,
        vec![
            format!("--data-dir={}", show(folder.join("etcd"))),
            format!("--listen-client-urls={ETCD_URL}"),
            format!("--advertise-client-urls={ETCD_URL}"),
            "--listen-peer-urls=http://127.0.0.1:2380".to_owned(),
            // The data of a lab may go with the machine's power, and others share its disk.
            "--unsafe-no-fsync".to_owned(),
            "--log-level=warn".to_owned(),
        ],
    );
    all.insert(Component::ApiServer, api_server(folder, authority, options)?);
    all.insert(
        Component::ControllerManager,
        vec![
            kubeconfig(Component::ControllerManager),
            "--leader-elect=false".to_owned(),
            "--use-service-account-credentials".to_owned(),
            format!(
                "--service-account-private-key-file={}",
                show(authority.file("service-accounts.key"))
            ),
            format!("--root-ca-file={}", show(authority.file("ca.crt"))),
            format!("--cluster-signing-cert-file={}", show(authority.file("ca.crt"))),
            format!("--cluster-signing-key-file={}", show(authority.file("ca.key"))),
            "--node-monitor-period=1s".to_owned(),
            format!("--node-monitor-grace-period={}s", options.node_grace.as_secs()),
        ],
    );
    all.insert(
        Component::Scheduler,
        vec![kubeconfig(Component::Scheduler), "--leader-elect=false".to_owned()],
    );
    // The API server is all theirs: their own default of 20 requests a second would hold hundreds of VMs back.
    for component in [Component::ControllerManager, Component::Scheduler] {
        let rates = ["--kube-api-qps=1000", "--kube-api-burst=2000"].map(str::to_owned);
        all.entry(component).or_default().extend(rates);
    }
    Ok(all)
}

fn api_server(folder: &Path, authority: &Authority, options: &Options) -> anyhow::Result<Vec<String>> {
    let dns = [
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
        "localhost",
    ];
    let service: IpAddr = "10.96.0.1".parse()?;
    let addresses = [
        IpAddr::from([127, 0, 0, 1]),
        service,
        api_address().into(),
        api_front_address().into(),
    ];
    let serving = authority.server(&folder.join(SERVING), "kube-apiserver", &dns, &addresses)?;
    let subject = Subject {
        user: "kube-apiserver",
        group: Some("system:masters"),
    };
    let client = authority.client(&folder.join("apiserver-kubelet"), &subject)?;
    let mut arguments: Vec<String> = [
        ("etcd-servers", Path::new(ETCD_URL)),
        ("tls-cert-file", &serving.certificate),
        ("tls-private-key-file", &serving.key),
        ("client-ca-file", &authority.file("ca.crt")),
        ("kubelet-certificate-authority", &authority.file("ca.crt")),
        ("kubelet-client-certificate", &client.certificate),
        ("kubelet-client-key", &client.key),
        ("service-account-key-file", &authority.file("service-accounts.pub")),
        (
            "service-account-signing-key-file",
            &authority.file("service-accounts.key"),
        ),
    ]
    .into_iter()
    .map(|(option, path)| format!("--{option}={}", path.display()))
    .collect();
    arguments.extend(
        [
            "--service-account-issuer=https://kubernetes.default.svc",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--kubelet-preferred-address-types=InternalIP",
            "--allow-privileged",
        ]
        .map(str::to_owned),
    );
    arguments.push(format!("--service-cluster-ip-range={SERVICES}"));
    arguments.push(format!("--bind-address={}", api_address()));
    arguments.push(format!("--secure-port={API_PORT}"));
    arguments.push(format!("--advertise-address={}", options.api_advertised()));
    arguments.extend(
        options
            .api_version
            .map(|version| format!("--emulated-version={version}")),
    );
    if options.audit {
        let policy = folder.join("audit-policy.yaml");
        fs::write(&policy, include_str!("../../cluster/audit-policy.yaml"))?;
        arguments.push(format!("--audit-policy-file={}", policy.display()));
        arguments.push(format!("--audit-log-path={}", super::audit::log(folder).display()));
    }
    Ok(arguments)
}
