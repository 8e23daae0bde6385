//! `kubectl ftvm`, as kubectl runs it, beside the objects that it shows and changes.

use std::fs::File;
use std::path::PathBuf;
use std::process::Child;

use anyhow::{Context, ensure};
use ftvm_e2e::cluster::{self, Answer, Cluster, wait_for};
use serde_json::Value;

use super::{PATIENCE, condition};

/// Exit codes (`docs/exit-codes.md`).
const CONFIG: i32 = 10;
const REFUSED: i32 = 26;
const TIMEOUT: i32 = 28;
const NOT_FOUND: i32 = 32;

/// The plugin and its cluster.
pub struct Plugin<'a> {
    cluster: &'a Cluster,
    plugin: cluster::Plugin,
}

impl<'a> Plugin<'a> {
    pub fn new(cluster: &'a Cluster) -> anyhow::Result<Plugin<'a>> {
        let plugin = cluster::Plugin::new(cluster)?;
        Ok(Plugin { cluster, plugin })
    }

    fn ftvm(&self, words: &[&str]) -> anyhow::Result<Answer> {
        self.plugin.run(self.cluster, &[&["ftvm"], words].concat())
    }

    /// What it shows is what the objects say.
    pub fn shows_the_objects(&self) -> anyhow::Result<()> {
        wait_for("the plugin shows what kubectl does", PATIENCE, || {
            let before = self.cluster.get(&["ftvm", "web"])?;
            let json = self.ftvm(&["status", "web", "--output", "json"])?;
            let yaml = self.ftvm(&["status", "web", "--output", "yaml"])?;
            let list = self.ftvm(&["status", "-o", "json"])?;
            let (table, all) = (self.ftvm(&["status"])?, self.ftvm(&["status", "-A"])?);
            let full = self.ftvm(&["status", "web"])?;
            ensure!(
                self.cluster.get(&["ftvm", "web"])? == before,
                "it was changed meanwhile"
            );
            let read = |said: &Answer| anyhow::Ok(serde_json::from_str::<Value>(said.with(0)?)?);
            ensure!(read(&json)? == before, "{}", json.out);
            ensure!(ftvm_crds::yaml::read::<Value>(yaml.with(0)?)? == before, "{}", yaml.out);
            let items = read(&list)?["items"].as_array().context("no list")?.clone();
            ensure!(items.contains(&before), "{}", list.out);
            in_a_line(&before, table.with(0)?)?;
            let of_web = |line: &&str| line.starts_with("default ") && line.contains(" web ");
            ensure!(all.with(0)?.lines().filter(of_web).count() == 1, "{}", all.out);
            in_full(&before, full.with(0)?)
        })?;
        self.ftvm(&["status", "nobody"])?
            .fails(NOT_FOUND, "there is no FaultTolerantVM default/nobody")?;
        self.ftvm(&["status", "web", "--context", "elsewhere"])?
            .fails(CONFIG, "elsewhere")?;
        for (last, expected) in [
            (&["sta"][..], &["status", "start"][..]),
            (&["stop", "we"][..], &["web"][..]),
        ] {
            let words = [&["__complete", "ftvm"], last].concat();
            let offered = self.plugin.run(self.cluster, &words)?;
            let offered: Vec<&str> = offered.with(0)?.lines().collect();
            ensure!(offered.starts_with(expected), "{offered:?}");
        }
        Ok(())
    }

    /// One VM that this release can't read hides no other one, and none is taken for another.
    pub fn bears_a_newer_one(&self) -> anyhow::Result<()> {
        let said = self.ftvm(&["status"])?;
        let line = |name: &str| said.out.lines().find(|line| line.starts_with(name));
        let newer = line("newer ").with_context(|| said.out.clone())?;
        ensure!(
            newer.contains("can't read it (spec.runStrategy: unknown variant `Sometimes`"),
            "{newer}"
        );
        ensure!(line("web ").is_some(), "{}", said.out);
        self.ftvm(&["status", "newer"])?
            .fails(REFUSED, "can't be read by this release")?;
        let yaml = self.ftvm(&["status", "newer", "-o", "yaml"])?;
        ensure!(yaml.with(0)?.contains("runStrategy: Sometimes"), "{}", yaml.out);
        Ok(())
    }

    /// A switchover is asked for by its annotation, and waited for in vain: there is no guest.
    pub fn asks_for_a_switchover(&self) -> anyhow::Result<()> {
        let said = self.ftvm(&["switchover", "web", "--timeout-seconds", "1"])?;
        said.fails(TIMEOUT, "the operator has not taken it up yet")?;
        let vm = self.cluster.get(&["ftvm", "web"])?;
        let asked = vm["metadata"]["annotations"]["ftvm.dev/switchover"].as_str();
        ensure!(
            asked.is_some_and(|text| text.starts_with("kubectl-ftvm-")),
            "{}",
            vm["metadata"]
        );
        self.cluster
            .kubectl(&["annotate", "ftvm", "web", "ftvm.dev/switchover-"])?;
        self.ftvm(&["accept-data-loss", "web", "--yes-i-lose-data", "web"])?
            .fails(REFUSED, "the VM has no Lease")
    }

    /// Halts it and starts it again. Whoever watches sees both, and that it goes.
    pub fn stops_and_starts(&self) -> anyhow::Result<()> {
        let stopped = self.ftvm(&["stop", "web", "--timeout-seconds", "180"])?;
        ensure!(
            stopped.with(0)? == "stop of web: the VM is halted; its disks are kept\n",
            "{}",
            stopped.out
        );
        let vm = self.cluster.get(&["ftvm", "web"])?;
        ensure!(
            vm["spec"]["runStrategy"] == "Halted" && vm["status"]["phase"] == "Halted",
            "{vm}"
        );
        let started = self.ftvm(&["start", "web", "--wait=false"])?;
        ensure!(started.with(0)? == "start of web: asked for\n", "{}", started.out);
        ensure!(self.cluster.get(&["ftvm", "web"])?["spec"]["runStrategy"] == "Always");
        Ok(())
    }

    /// Watches a VM; what it says goes into a file.
    pub fn watch(&self, name: &str) -> anyhow::Result<Watching> {
        let path = self.cluster.folder().join("watched.txt");
        let words = ["ftvm", "status", name, "--watch"];
        let mut command = self.plugin.command(self.cluster, &words);
        let file = File::create(&path)?;
        command.stdout(file.try_clone()?).stderr(file);
        let child = self.cluster.sandbox().spawn(command)?;
        let watching = Watching { child, path };
        // What changes from here on is seen.
        wait_for("the watch has begun", PATIENCE, || {
            let text = std::fs::read_to_string(&watching.path)?;
            ensure!(text.contains("to be done.") || text.contains("what to do\n"), "{text}");
            Ok(())
        })?;
        Ok(watching)
    }

    /// A loss is accepted in the words of the record, and by the VM's name alone.
    pub fn accepts_a_loss(&self, name: &str, holder: &str) -> anyhow::Result<()> {
        let accept = ["accept-data-loss", name, "--wait=false"];
        self.ftvm(&accept)?.fails(REFUSED, "nobody can be asked")?;
        let other = [&accept[..], &["--yes-i-lose-data", "web"]].concat();
        self.ftvm(&other)?.fails(REFUSED, "nothing was asked for")?;
        let annotation = || {
            let vm = self.cluster.get(&["ftvm", name])?;
            anyhow::Ok(
                vm["metadata"]["annotations"]["ftvm.dev/accept-data-loss"]
                    .as_str()
                    .map(str::to_owned),
            )
        };
        ensure!(annotation()?.is_none(), "accepted by nobody");
        let this = [&accept[..], &["--yes-i-lose-data", name]].concat();
        let said = self.ftvm(&this)?;
        ensure!(
            said.with(0).is_ok() && said.err.contains("It was protected"),
            "{}",
            said.err
        );
        let text = annotation()?.context("no annotation")?;
        ensure!(text.starts_with(&format!("{holder}@7 kubectl-ftvm-")), "{text}");
        Ok(())
    }
}

/// Somebody watches a VM.
pub struct Watching {
    child: Child,
    path: PathBuf,
}

impl Watching {
    /// The VM is gone: that was told last, after all else.
    pub fn end(mut self) -> anyhow::Result<()> {
        let code = wait_for("the watch ends with its VM", PATIENCE, || {
            self.child.try_wait()?.context("it goes on").map(|status| status.code())
        })?;
        let text = std::fs::read_to_string(&self.path)?;
        ensure!(code == Some(NOT_FOUND), "{code:?}: {text}");
        let places = ["Starting", "Halted", "was deleted meanwhile"].map(|words| text.find(words));
        ensure!(places.iter().all(Option::is_some) && places.is_sorted(), "{text}");
        Ok(())
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The line of a VM that waits for nodes.
fn in_a_line(vm: &Value, table: &str) -> anyhow::Result<()> {
    let line = table.lines().find(|line| line.starts_with("web ")).context("no line")?;
    let words: Vec<&str> = line.split_whitespace().collect();
    let phase = vm["status"]["phase"].as_str().context("no phase")?;
    ensure!(words.starts_with(&["web", phase, "no"]), "{line}");
    let (reason, message) = condition(vm, "Ready");
    ensure!(line.ends_with(&format!(" {reason}: {message}")), "{line}");
    Ok(())
}

/// All of it.
fn in_full(vm: &Value, text: &str) -> anyhow::Result<()> {
    let has = |words: &str| {
        ensure!(text.contains(words), "{words}: {text}");
        Ok(())
    };
    has("web in namespace default\n")?;
    has(&format!(
        "  Phase      {}\n",
        vm["status"]["phase"].as_str().context("no phase")?
    ))?;
    for seat in vm["status"]["seats"].as_array().context("no book")? {
        has(&format!("  {}  none  -", seat["name"].as_str().context("no name")?))?;
    }
    for condition in vm["status"]["conditions"].as_array().context("no conditions")? {
        let words = ["type", "status", "reason"].map(|key| condition[key].as_str().unwrap_or_default());
        let told = |line: &str| line.split_whitespace().take(words.len()).eq(words);
        ensure!(text.lines().any(told), "{words:?}: {text}");
    }
    has(&format!("  -  {}\n", condition(vm, "Protected").1))
}
