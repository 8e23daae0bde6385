//! etcd, kube-apiserver, kube-controller-manager and kube-scheduler: plain processes in the lab's outer namespaces.
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, ensure};
use rustix::process::{Pid, Signal};

use super::pki::{Authority, Pair, Subject};
use super::plan::{API_PORT, Options, SERVICES, api_address, api_front_address, api_url, second_api_address};
use super::wait::{Hopeless, wait_for};
use super::{kubectl_command, log_end};
use crate::lab::Sandbox;

/// Long enough for a busy machine; nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(180);
const ETCD_URL: &str = "http://127.0.0.1:2379";
const ETCD_PORT: u16 = 2379;
/// The API server's certificate and key in the cluster's folder, without their extensions.
pub(super) const SERVING: &str = "apiserver";
/// Likewise those with which it asks kubelets.
const KUBELET_CLIENT: &str = "apiserver-kubelet";
/// Likewise the keys of service account tokens, in the authority's folder.
const TOKENS: &str = "service-accounts";

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
            format!("--listen-client-urls={}", etcd_urls(options).join(",")),
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

/// Where etcd listens: for a second API server, which is on a node, at the address of the first one, too.
fn etcd_urls(options: &Options) -> Vec<String> {
    let outside = options.has_second_api_server().then(second_etcd_url);
    std::iter::once(ETCD_URL.to_owned()).chain(outside).collect()
}

fn second_etcd_url() -> String {
    format!("http://{}:{ETCD_PORT}", api_address())
}

/// The first API server's arguments; `folder` gets what only it has.
fn api_server(folder: &Path, authority: &Authority, options: &Options) -> anyhow::Result<Vec<String>> {
    let own = [api_address(), api_front_address()];
    let server = ApiServer {
        etcd: ETCD_URL.to_owned(),
        address: api_address(),
        advertised: options.api_advertised(),
        serving: serving(authority, &folder.join(SERVING), &own)?,
        client: kubelets_client(authority, &folder.join(KUBELET_CLIENT))?,
        authority: authority.file("ca.crt"),
        tokens: authority.file(TOKENS),
    };
    let mut arguments = server.arguments(options);
    if options.audit {
        let policy = folder.join("audit-policy.yaml");
        fs::write(&policy, include_str!("../../cluster/audit-policy.yaml"))?;
        arguments.push(format!("--audit-policy-file={}", policy.display()));
        arguments.push(format!("--audit-log-path={}", super::audit::log(folder).display()));
    }
    Ok(arguments)
}

/// Puts what the second API server needs into the folder of its node.
pub(super) fn write_second_api_server(folder: &Path, authority: &Authority) -> anyhow::Result<()> {
    serving(authority, &folder.join(SERVING), &[second_api_address()])?;
    kubelets_client(authority, &folder.join(KUBELET_CLIENT))?;
    for extension in ["key", "pub"] {
        let from = authority.file(TOKENS).with_extension(extension);
        let to = folder.join(TOKENS).with_extension(extension);
        fs::copy(&from, &to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    }
    Ok(())
}

/// Its arguments, where its node has that folder here.
pub(super) fn second_api_server(folder: &Path, options: &Options) -> Vec<String> {
    let pair = |name: &str| Pair {
        certificate: folder.join(name).with_extension("crt"),
        key: folder.join(name).with_extension("key"),
    };
    let server = ApiServer {
        etcd: second_etcd_url(),
        address: second_api_address(),
        advertised: second_api_address(),
        serving: pair(SERVING),
        client: pair(KUBELET_CLIENT),
        authority: folder.join("ca.crt"),
        tokens: folder.join(TOKENS),
    };
    server.arguments(options)
}

/// The certificate of an API server at these addresses.
fn serving(authority: &Authority, base: &Path, own: &[Ipv4Addr]) -> anyhow::Result<Pair> {
    let dns = [
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
        "localhost",
    ];
    let service: IpAddr = "10.96.0.1".parse()?;
    let mut addresses = vec![IpAddr::from([127, 0, 0, 1]), service];
    addresses.extend(own.iter().copied().map(IpAddr::from));
    authority.server(base, "kube-apiserver", &dns, &addresses)
}

/// Who an API server is for kubelets.
fn kubelets_client(authority: &Authority, base: &Path) -> anyhow::Result<Pair> {
    let subject = Subject {
        user: "kube-apiserver",
        group: Some("system:masters"),
    };
    authority.client(base, &subject)
}

/// An API server, and where it finds its files.
struct ApiServer {
    etcd: String,
    address: Ipv4Addr,
    /// Where others reach it.
    advertised: Ipv4Addr,
    serving: Pair,
    client: Pair,
    /// Certificate of the authority.
    authority: PathBuf,
    /// Keys of service account tokens, without their extensions.
    tokens: PathBuf,
}

impl ApiServer {
    fn arguments(&self, options: &Options) -> Vec<String> {
        let (public, private) = (self.tokens.with_extension("pub"), self.tokens.with_extension("key"));
        let files: [(&str, &Path); 8] = [
            ("tls-cert-file", &self.serving.certificate),
            ("tls-private-key-file", &self.serving.key),
            ("client-ca-file", &self.authority),
            ("kubelet-certificate-authority", &self.authority),
            ("kubelet-client-certificate", &self.client.certificate),
            ("kubelet-client-key", &self.client.key),
            ("service-account-key-file", &public),
            ("service-account-signing-key-file", &private),
        ];
        let mut arguments: Vec<String> = files
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
        arguments.push(format!("--etcd-servers={}", self.etcd));
        arguments.push(format!("--service-cluster-ip-range={SERVICES}"));
        arguments.push(format!("--bind-address={}", self.address));
        arguments.push(format!("--secure-port={API_PORT}"));
        arguments.push(format!("--advertise-address={}", self.advertised));
        arguments.extend(
            options
                .api_version
                .map(|version| format!("--emulated-version={version}")),
        );
        arguments
    }
}
