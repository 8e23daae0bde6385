//! Checking a configuration and everything that it names without starting anything.

use std::path::Path;

use ftvm_engine::control::exit_code;

use crate::arbiter::FileArbiter;
use crate::bridges::AllowedBridges;
use crate::config::Config;
use crate::daemon::engine_path;
use crate::explain;
use crate::jail;
use crate::peer;
use crate::prepare::{Paths, Source, prepare};
use crate::state::StateFolder;

/// Checks, prints one line a finding, and returns the exit code of the first one.
///
/// It takes the daemon's lock and makes the taps for a moment, so it refuses while the daemon runs.
pub fn report(path: &Path) -> u8 {
    let findings = match Config::load(path) {
        Ok(config) => check(&config),
        Err(error) => vec![(exit_code::CONFIG, explain(&error))],
    };
    for (code, message) in &findings {
        eprintln!("ftvm-node-daemon: error {code}: {message}");
    }
    if findings.is_empty() {
        println!("{}: no errors", path.display());
    }
    findings.first().map_or(exit_code::OK, |(code, _)| *code)
}

/// Everything that is wrong, as exit code and message.
pub fn check(config: &Config) -> Vec<(u8, String)> {
    let state = match StateFolder::open(&config.state_folder) {
        Ok(state) => state,
        Err(error) => return vec![(exit_code::STATE_FOLDER, explain(&error))],
    };
    let mut findings = Vec::new();
    match engine_path(config.engine.as_deref()) {
        Ok(engine) => {
            if let Err(error) = jail::open_static_program(&engine) {
                findings.push((exit_code::JAIL, explain(&error)));
            }
        }
        Err(error) => findings.push((error.exit_code(), explain(&error))),
    }
    if let Some(address) = config.peer_listen
        && let Err(error) = peer::listen(address)
    {
        findings.push((exit_code::CONFIG, explain(&error)));
    }
    for seat in &config.seats {
        let folder = state.seat(&seat.vm, &seat.seat).map_err(Into::into);
        let prepared = folder.and_then(|folder| {
            let source = Paths::new(folder.clone(), &config.jail);
            prepare(seat, &source, &source.place()?, &folder, &AllowedBridges::Any)
        });
        if let Err(error) = prepared {
            findings.push((error.exit_code(), explain(&error)));
        }
        // A folder that is not set up yet is fine: `up` does that.
        let arbiter = config.arbiter.folder.join(&seat.vm);
        if (arbiter.exists() || !config.arbiter.folder.is_dir())
            && let Err(error) = FileArbiter::new(arbiter).newest()
        {
            findings.push((exit_code::ARBITER, explain(&error)));
        }
    }
    findings
}
