//! What people choose, accept and ask for, on a real cluster. Each act has a machine of its own, and is played whatever became of those before it.
mod accepted;
mod asked;
mod paused;

use std::rc::Rc;
use std::time::Instant;

use anyhow::{Context, ensure};
use ftvm_e2e::cluster::{Cluster, wait_for};
use ftvm_e2e::demo::cluster::own::PATIENCE;
use ftvm_e2e::demo::cluster::{NAMESPACE, Setting, on_cluster, story};
use ftvm_e2e::demo::{Options, place};
use ftvm_e2e::lab::binaries::Profile;
use ftvm_e2e::report::Progress;

/// Key of the taint by which a person says that a node is switched off.
const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";

/// An act: its name, and what is played.
type Act = (&'static str, fn(&Rc<Cluster>) -> anyhow::Result<()>);

const ACTS: [Act; 5] = [
    ("a guest that may not run alone", paused::stands_still_alone),
    (
        "a loss is accepted over a stop, by the holder's own seat",
        accepted::over_a_stop,
    ),
    ("an accepted loss is refused late", accepted::refused_late),
    ("a loss is accepted of a dead holder", accepted::of_a_dead_holder),
    ("a failure is asked for, and taken back", asked::taken_back),
];

#[test]
fn what_people_choose_accept_and_ask_for_is_done() -> anyhow::Result<()> {
    let options = Options {
        // Each seat leaves a volume behind.
        rounds: 12,
        ..Options::default()
    };
    let setting = Setting {
        api_servers: 1,
        profile: Profile::Dev,
        api_proxy: false,
    };
    let progress = Progress::new();
    let folder = place::new_folder("cluster-choices")?;
    on_cluster(&options, setting, &folder, &progress, |cluster| {
        ensure!(cluster.nodes().len() == 3, "the acts are for three nodes");
        let mut failed = Vec::new();
        for (name, act) in ACTS {
            let begin = Instant::now();
            let played = act(cluster);
            let seconds = begin.elapsed().as_secs_f64();
            match played {
                Ok(()) => progress.good(format!("{name}: {seconds:.0} s")),
                Err(error) => {
                    let error = format!("{name}: {error:#}");
                    progress.bad(format!("{error}\n{}", story(cluster)));
                    failed.push(error);
                }
            }
            if let Err(error) = mended(cluster) {
                failed.push(format!("after {name}: {error:#}"));
                break;
            }
        }
        ensure!(failed.is_empty(), "{}", failed.join("\n"));
        Ok(())
    })
}

/// All nodes are up, take pods and offer seats, and no machine is left.
fn mended(cluster: &Cluster) -> anyhow::Result<()> {
    for node in cluster.nodes() {
        let name = node.name();
        if !node.is_running() {
            node.start()?;
        }
        let object = cluster.get(&["node", &name])?;
        let mut taints = object["spec"]["taints"].as_array().into_iter().flatten();
        if taints.any(|taint| taint["key"] == OUT_OF_SERVICE) {
            cluster.kubectl(&["taint", "node", &name, &format!("{OUT_OF_SERVICE}-")])?;
        }
        cluster.kubectl(&["uncordon", &name])?;
    }
    for node in cluster.nodes() {
        let name = node.name();
        cluster.wait_node_ready(&name)?;
        wait_for(&format!("node {name} offers seats"), PATIENCE, || {
            let node = cluster.get(&["node", &name])?;
            let seats = node["status"]["allocatable"]["ftvm.dev/seat"].as_str();
            ensure!(seats.is_some_and(|seats| seats != "0"), "{seats:?}");
            Ok(())
        })?;
    }
    let all = ["delete", "ftvm", "--all", "--namespace", NAMESPACE, "--timeout=180s"];
    cluster.kubectl(&all).map(drop)
}

/// Names of the three nodes.
fn nodes(cluster: &Cluster) -> anyhow::Result<[String; 3]> {
    let names: Vec<String> = cluster.nodes().iter().map(|node| node.name()).collect();
    names.try_into().ok().context("not three nodes")
}

/// The node that has neither seat.
fn third(cluster: &Cluster, pair: (&str, &str)) -> anyhow::Result<String> {
    let mut names = nodes(cluster)?.into_iter();
    names
        .find(|name| name != pair.0 && name != pair.1)
        .context("no third node")
}

fn cordon(cluster: &Cluster, node: &str) -> anyhow::Result<()> {
    cluster.kubectl(&["cordon", node]).map(drop)
}

fn uncordon(cluster: &Cluster, node: &str) -> anyhow::Result<()> {
    cluster.kubectl(&["uncordon", node]).map(drop)
}

/// Waits until the API server knows that a node is dead, and lets no pod be placed there.
fn is_away(cluster: &Cluster, node: &str) -> anyhow::Result<()> {
    cluster.wait_node_not_ready(node)?;
    wait_for(&format!("nothing is placed on node {node}"), PATIENCE, || {
        let object = cluster.get(&["node", node])?;
        let mut taints = object["spec"]["taints"].as_array().into_iter().flatten();
        let bars =
            taints.any(|taint| taint["key"] == "node.kubernetes.io/unreachable" && taint["effect"] == "NoSchedule");
        ensure!(bars, "{}", object["spec"]);
        Ok(())
    })
}
