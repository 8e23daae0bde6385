//! Kubernetes, etcd, containerd and Helm, built from the Go module proxy and kept in the cache.
//!
//! Two Go modules (`e2e/cluster/kubernetes`, `e2e/cluster/tools`: their dependencies conflict in one) pin every version and checksum.
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use super::Say;
use crate::lab::cache;

/// The version of Kubernetes that `e2e/cluster/kubernetes/go.mod` names; a test compares them.
const KUBERNETES: &str = "1.37.2";
/// The oldest Go that builds the modules, as their `go.mod` name it; a test compares them.
const GO: &str = "1.26.6";
/// A line of progress after so long.
const PROGRESS: Duration = Duration::from_secs(15);

/// A Go module whose packages are programs.
struct Module {
    name: &'static str,
    files: [(&'static str, &'static str); 2],
    /// (package, name of the program)
    programs: &'static [(&'static str, &'static str)],
}

const MODULES: [Module; 2] = [
    Module {
        name: "Kubernetes",
        files: [
            ("go.mod", include_str!("../../cluster/kubernetes/go.mod")),
            ("go.sum", include_str!("../../cluster/kubernetes/go.sum")),
        ],
        programs: &[
            ("k8s.io/kubernetes/cmd/kube-apiserver", "kube-apiserver"),
            (
                "k8s.io/kubernetes/cmd/kube-controller-manager",
                "kube-controller-manager",
            ),
            ("k8s.io/kubernetes/cmd/kube-scheduler", "kube-scheduler"),
            ("k8s.io/kubernetes/cmd/kubelet", "kubelet"),
            ("k8s.io/kubernetes/cmd/kube-proxy", "kube-proxy"),
            ("k8s.io/kubernetes/cmd/kubectl", "kubectl"),
        ],
    },
    Module {
        name: "etcd, containerd and Helm",
        files: [
            ("go.mod", include_str!("../../cluster/tools/go.mod")),
            ("go.sum", include_str!("../../cluster/tools/go.sum")),
        ],
        programs: &[
            ("go.etcd.io/etcd/server/v3", "etcd"),
            ("github.com/containerd/containerd/v2/cmd/containerd", "containerd"),
            (
                "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
                "containerd-shim-runc-v2",
            ),
            ("github.com/containerd/containerd/v2/cmd/ctr", "ctr"),
            ("helm.sh/helm/v4/cmd/helm", "helm"),
        ],
    },
];

/// The folder with all programs. Built once (about 12 minutes on two cores), then cached.
///
/// # Errors
/// Without Go, or if one does not build.
pub fn folder(say: &Say) -> anyhow::Result<PathBuf> {
    let go = go_version()?;
    let flags = flags();
    let mut parts = vec![go.as_bytes()];
    parts.extend(flags.iter().map(String::as_bytes));
    for module in &MODULES {
        parts.extend(module.files.iter().map(|(_, text)| text.as_bytes()));
        parts.extend(module.programs.iter().map(|(_, program)| program.as_bytes()));
    }
    cache::entry("kubernetes", &cache::key(&parts), |folder| {
        say("building Kubernetes, etcd, containerd and Helm from source: about 12 minutes on two cores, then kept");
        let begin = Instant::now();
        MODULES
            .iter()
            .try_for_each(|module| build(module, folder, &flags, say))?;
        say(&format!("built, in {} s", begin.elapsed().as_secs()));
        Ok(())
    })
}

/// Small programs that say which version they are: kubectl and the API server compare theirs.
fn flags() -> Vec<String> {
    let (major, minor) = KUBERNETES.split_once('.').unwrap_or((KUBERNETES, ""));
    let minor = minor.split('.').next().unwrap_or("");
    let version = "k8s.io/component-base/version";
    vec![
        "-trimpath".to_owned(),
        "-mod=readonly".to_owned(),
        format!(
            "-ldflags=-s -w -X {version}.gitVersion=v{KUBERNETES} -X {version}.gitMajor={major} -X {version}.gitMinor={minor}"
        ),
    ]
}

/// Go without C: the programs run in every node, whatever its C library.
fn go() -> Command {
    let mut command = Command::new("go");
    command.env("CGO_ENABLED", "0").stdin(Stdio::null());
    command
}

fn go_version() -> anyhow::Result<String> {
    let output = go().args(["env", "GOVERSION"]).output().with_context(|| {
        format!("cannot start `go`: Go {GO} or newer builds Kubernetes (https://go.dev/dl; add its bin folder to PATH)")
    })?;
    ensure!(
        output.status.success(),
        "go env: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn build(module: &Module, folder: &Path, flags: &[String], say: &Say) -> anyhow::Result<()> {
    let source = folder.join("source");
    fs::create_dir(&source)?;
    for (name, text) in module.files {
        fs::write(source.join(name), text)?;
    }
    let log = folder.join("build.log");
    let packages: Vec<&str> = module.programs.iter().map(|(package, _)| *package).collect();
    let total = count_packages(&source, &packages)?;
    say(&format!(
        "{}: {total} packages, less those that Go has in its cache",
        module.name
    ));
    // Written next to each other in one go, named after their packages' last folders; a version suffix is none.
    let mut command = go();
    command
        .current_dir(&source)
        .args(["build", "-v", "-o"])
        .arg(folder.join("built"))
        .args(flags)
        .args(&packages);
    fs::create_dir(folder.join("built"))?;
    watch(command, module.name, total, &log, say)?;
    for (package, program) in module.programs {
        let built = package
            .rsplit('/')
            .find(|part| !is_version(part))
            .with_context(|| format!("{package} has no name"))?;
        fs::rename(folder.join("built").join(built), folder.join(program))
            .with_context(|| format!("go built no {built} from {package}"))?;
    }
    fs::remove_dir(folder.join("built"))?;
    fs::remove_dir_all(source)?;
    Ok(())
}

fn is_version(part: &str) -> bool {
    part.strip_prefix('v')
        .is_some_and(|digits| digits.parse::<u32>().is_ok())
}

/// How many packages these programs consist of.
fn count_packages(source: &Path, packages: &[&str]) -> anyhow::Result<usize> {
    let output = go()
        .current_dir(source)
        .args(["list", "-mod=readonly", "-deps"])
        .args(packages)
        .output()?;
    ensure!(
        output.status.success(),
        "go list: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(output.stdout.split(|byte| *byte == b'\n').count())
}

/// Runs `go build -v`, which names each package that it compiles.
fn watch(mut command: Command, name: &str, total: usize, log: &Path, say: &Say) -> anyhow::Result<()> {
    let mut child = command
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start `go`")?;
    let stderr = child.stderr.take().context("go has no standard error")?;
    let mut file = File::options().create(true).append(true).open(log)?;
    let (mut compiled, mut said) = (0, Instant::now());
    let mut end = std::collections::VecDeque::new();
    for line in BufReader::new(stderr).lines() {
        let line = line?;
        std::io::Write::write_all(&mut file, format!("{line}\n").as_bytes())?;
        if !line.starts_with("go: downloading ") {
            compiled += 1;
        }
        end.push_back(line);
        if end.len() > 15 {
            end.pop_front();
        }
        if said.elapsed() > PROGRESS {
            said = Instant::now();
            say(&format!("{name}: {compiled} of {total} packages"));
        }
    }
    let status = child.wait()?;
    if !status.success() {
        let end: Vec<String> = end.into();
        bail!("go build of {name} failed ({status}):\n{}", end.join("\n"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_module_names_the_version() {
        let wanted = format!("require k8s.io/kubernetes v{KUBERNETES}\n");
        assert!(MODULES[0].files[0].1.contains(&wanted), "go.mod lacks {wanted}");
        assert!(flags().iter().any(|flag| flag.contains("gitMinor=37")));
    }

    #[test]
    fn the_modules_name_the_oldest_go() {
        let named = |module: &Module| {
            let line = module.files[0].1.lines().find_map(|line| line.strip_prefix("go "));
            let numbers = line.unwrap().split('.').map(|number| number.parse().unwrap());
            numbers.collect::<Vec<u32>>()
        };
        let oldest = MODULES.iter().map(named).max().unwrap();
        let words: Vec<String> = oldest.iter().map(u32::to_string).collect();
        assert_eq!(GO, words.join("."));
        let page = include_str!("../../../README.md");
        assert!(page.contains(&format!("Go {GO}")), "README.md does not say so");
    }

    #[test]
    fn every_program_is_a_tool_of_its_module() {
        for module in &MODULES {
            for (package, _) in module.programs {
                let line = format!("\t{package}\n");
                assert!(module.files[0].1.contains(&line), "go.mod lacks {package}");
            }
        }
    }
}
