//! The README's `cargo xtask cluster demo` as a person runs it: table and JSON of a node's death on a real Kubernetes.
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;

/// The report's file; it goes with the test.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn a_killed_node_costs_nothing_and_the_report_says_so() {
    let file = Scratch(std::env::temp_dir().join(format!("ftvm-cluster-demo-{}.json", std::process::id())));
    let mut demo = Command::new(env!("CARGO_BIN_EXE_xtask"));
    demo.args(["cluster", "demo", "--fault", "kill-node", "--dev", "--json"])
        .arg(&file.0)
        .stdin(Stdio::null());
    let output = demo.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let told = format!("{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{told}");
    // The table is for people, its first words are what they look for.
    for word in ["gap", "answers lost", "protected again"] {
        assert!(text.to_lowercase().contains(word), "{word:?} is missing in:\n{told}");
    }

    let report: Value = serde_json::from_slice(&std::fs::read(&file.0).unwrap()).unwrap();
    assert_eq!(report["fault"], "kill-node", "{report:#}");
    for key in ["lost_answers", "duplicated_answers", "dual_active"] {
        assert_eq!(report[key], 0, "{key} of {report:#}");
    }
    assert_eq!(report["complaints"], serde_json::json!([]), "{report:#}");
    assert!(report["answers"].as_u64().unwrap() > 100, "{report:#}");
    // All of this happened, and took its time.
    for key in ["protected_ms", "gap_ms", "reprotect_ms", "pause_us_p50", "pause_us_p99"] {
        assert!(report[key].as_f64().unwrap() > 0.0, "{key} of {report:#}");
    }
    let round = &report["per_round"][0];
    assert!(round["standby_after"].is_string(), "{report:#}");
    assert_ne!(round["active_before"], round["active_after"], "{report:#}");
    assert_ne!(
        round["standby_after"], round["active_before"],
        "the third node: {report:#}"
    );
}
