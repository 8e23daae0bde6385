//! `kubectl ftvm` as a person has it: found by kubectl.
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};

use super::Cluster;
use crate::lab::binaries::{self, Profile};

/// The plugin in a folder of its own, which is all that kubectl's `PATH` has.
pub struct Plugin {
    folder: PathBuf,
}

/// What a command said.
pub struct Answer {
    /// Exit code; none: a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Answer {
    /// Standard output, if it ended with this code.
    ///
    /// # Errors
    /// If it did not, with what it said.
    pub fn with(&self, code: i32) -> anyhow::Result<&str> {
        let Answer { code: found, out, err } = self;
        ensure!(*found == Some(code), "code {found:?}, not {code}: {out}{err}");
        Ok(out)
    }

    /// Did it fail like this, in these words?
    ///
    /// # Errors
    /// If it did not, with what it said.
    pub fn fails(&self, code: i32, words: &str) -> anyhow::Result<()> {
        self.with(code)?;
        ensure!(self.err.contains(words), "{words}: {}", self.err);
        Ok(())
    }
}

impl Plugin {
    /// Builds it, if it is not fresh, and says where it is. That takes the processors for minutes, from which a machine may suffer.
    ///
    /// # Errors
    /// If it does not compile.
    pub fn build() -> anyhow::Result<PathBuf> {
        let mut built = binaries::build(&[("ftvm-plugin", "kubectl-ftvm")], Profile::Dev)?;
        built.pop().context("cargo built nothing")
    }

    /// For a cluster, built if it is not.
    ///
    /// # Errors
    /// If it does not compile, or was put into the cluster's folder before.
    pub fn new(cluster: &Cluster) -> anyhow::Result<Self> {
        let program = &Self::build()?;
        let folder = cluster.folder().join("plugin");
        std::fs::create_dir(&folder)?;
        for name in ["kubectl-ftvm", "kubectl_complete-ftvm"] {
            symlink(program, folder.join(name))?;
        }
        Ok(Self { folder })
    }

    /// kubectl with these words, as the administrator.
    #[must_use]
    pub fn command(&self, cluster: &Cluster, words: &[&str]) -> Command {
        let mut command = Command::new(cluster.programs().join("kubectl"));
        command
            .args(words)
            .env("KUBECONFIG", cluster.admin_kubeconfig())
            .env("PATH", &self.folder)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs that to its end.
    ///
    /// # Errors
    /// If it can't be started, or says what is no text.
    pub fn run(&self, cluster: &Cluster, words: &[&str]) -> anyhow::Result<Answer> {
        let child = cluster.sandbox().spawn(self.command(cluster, words))?;
        let output = child.wait_with_output()?;
        Ok(Answer {
            code: output.status.code(),
            out: String::from_utf8(output.stdout)?,
            err: String::from_utf8(output.stderr)?,
        })
    }
}
