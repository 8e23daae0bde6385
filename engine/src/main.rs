//! The engine process of one seat.

use std::error::Error;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use ftvm_engine::control::{exit_code, inherited_connection};
use ftvm_engine::driver::process;
use ftvm_engine::log;
use ftvm_engine::outbox;
use ftvm_engine::run::{self, RunArgs};

/// Without a command: the engine of a seat, started by ftvm-node-daemon with its control socket on descriptor 3.
#[derive(Debug, Parser)]
#[command(name = "ftvm-engine", version, about)]
struct Cli {
    /// VM and seat, for people who list processes; the launch message says the same.
    seat: Option<String>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run one guest without protection.
    Run(RunArgs),
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(log::line)
        .with_ansi(false)
        .with_env_filter(tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()))
        .init();
    match Cli::parse().command {
        Some(Command::Run(args)) => match run::run(&args) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error, error.exit_code()),
        },
        // SAFETY: nothing of this process has opened or taken descriptor 3 yet.
        None => match unsafe { inherited_connection() } {
            Ok(connection) => ExitCode::from(process::run(connection, outbox::admitted)),
            Err(error) => fail(&error, exit_code::LAUNCH),
        },
    }
}

/// Prints the error and its causes on one line.
fn fail(error: &dyn Error, code: u8) -> ExitCode {
    eprintln!("ftvm-engine: {}", ftvm_engine::error_chain(error));
    ExitCode::from(code)
}
