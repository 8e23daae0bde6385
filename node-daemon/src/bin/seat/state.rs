//! What the daemon said last, for `seat ready`: a file in shared memory, which is writable and goes with the pod.

use std::path::PathBuf;
use std::process::ExitCode;

use serde::{Deserialize, Serialize};

use crate::Layout;

/// What the daemon said.
#[derive(Serialize, Deserialize)]
pub struct State {
    pub role: String,
    pub ready: bool,
    pub why: String,
}

fn path(layout: &Layout) -> PathBuf {
    layout.path("dev/shm/ftvm-state")
}

/// Forgets what an earlier run of this program was told.
pub fn forget(layout: &Layout) {
    // Usually there is none.
    let _ = std::fs::remove_file(path(layout));
}

/// Keeps it, in one step for whoever reads.
pub fn keep(layout: &Layout, state: &State) -> Result<(), String> {
    let (path, new) = (path(layout), path(layout).with_extension("new"));
    let text = serde_json::to_vec(state).unwrap_or_default();
    std::fs::write(&new, text)
        .and_then(|()| std::fs::rename(&new, &path))
        .map_err(|error| {
            format!(
                "{} can't be written ({error}): the pod will never be ready",
                path.display()
            )
        })
}

/// `seat ready`.
pub fn report(layout: &Layout) -> ExitCode {
    let Ok(text) = std::fs::read(path(layout)) else {
        println!("the node daemon has said nothing yet");
        return ExitCode::FAILURE;
    };
    match serde_json::from_slice::<State>(&text) {
        Ok(State { role, ready: true, .. }) => {
            println!("{role}");
            ExitCode::SUCCESS
        }
        Ok(State { role, why, .. }) => {
            println!("{role}: {why}");
            ExitCode::FAILURE
        }
        Err(error) => {
            println!("{}: {error}", path(layout).display());
            ExitCode::FAILURE
        }
    }
}
