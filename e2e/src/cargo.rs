//! Cargo, called from programs that cargo started.
use std::path::Path;
use std::process::Command;

use anyhow::Context;

/// What cargo tells a program that it runs about that program's package.
const ABOUT_THE_CALLER: [&str; 3] = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_"];

/// A cargo that builds what it would build if a person called it.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    forget_caller(&mut command);
    command
}

/// The workspace's folder.
///
/// # Errors
/// If this package is in none.
pub fn workspace() -> anyhow::Result<&'static Path> {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("no workspace above this package")
}

/// Takes the calling program's package out of a command's environment. Build scripts look at these words: with another
/// caller's in it, cargo would build them and all that depends on them anew, and anew again for the next caller.
pub fn forget_caller(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if ABOUT_THE_CALLER.iter().any(|word| text.starts_with(word)) {
            command.env_remove(&name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_callers_package_is_not_named() {
        // Cargo runs this test, so it is there to be removed.
        assert!(std::env::var_os("CARGO_PKG_NAME").is_some());
        let removed: Vec<_> = cargo()
            .get_envs()
            .filter(|(_, value)| value.is_none())
            .map(|(name, _)| name.to_owned())
            .collect();
        for name in ["CARGO_PKG_NAME", "CARGO_PKG_VERSION", "CARGO_MANIFEST_DIR"] {
            assert!(
                removed.iter().any(|removed| removed == name),
                "{name} is not among {removed:?}"
            );
        }
    }
}
