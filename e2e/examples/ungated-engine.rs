//! The engine with its output gate switched off: what the guest says leaves at once, whether or not the standby could repeat it.
//!
//! It exists to show that the judge sees the difference (`tests/ungated.rs`), and protects nobody. No configuration, feature or
//! flag turns the real engine into this: it is another program, in no package that anyone installs.
use std::process::ExitCode;

use ftvm_engine::control::{exit_code, inherited_connection};
use ftvm_engine::driver::process;

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    tracing::error!(
        "THE OUTPUT GATE IS OFF: this engine makes promises that a failover breaks. It is for tests of the judge alone"
    );
    // SAFETY: nothing of this process has opened or taken descriptor 3 yet.
    match unsafe { inherited_connection() } {
        Ok(connection) => ExitCode::from(process::run(connection, |_, _| true)),
        Err(error) => {
            eprintln!("ungated-engine: {}", ftvm_engine::error_chain(&error));
            ExitCode::from(exit_code::LAUNCH)
        }
    }
}
