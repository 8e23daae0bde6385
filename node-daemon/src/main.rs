//! The daemon process of one node.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use ftvm_engine::control::exit_code;
use ftvm_node_daemon::check;
use ftvm_node_daemon::config::Config;
use ftvm_node_daemon::daemon::Daemon;

/// Starts, jails and supervises the engines of this node.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run until SIGTERM or SIGINT; engines go on without the daemon and are adopted by the next one.
    Run {
        /// The configuration (docs/standalone.md).
        #[arg(long)]
        config: PathBuf,
    },
    /// Check a configuration and everything that it names, and start nothing.
    Check {
        /// The configuration (docs/standalone.md).
        #[arg(long)]
        config: PathBuf,
    },
    /// Print the JSON schema of the configuration.
    Schema,
}

fn main() -> ExitCode {
    // Usage errors are clap's own exit code, 2.
    let code = match Arguments::parse().command {
        Command::Run { config } => run(&config),
        Command::Check { config } => check::report(&config),
        Command::Schema => {
            println!("{:#}", Config::schema());
            exit_code::OK
        }
    };
    ExitCode::from(code)
}

fn run(path: &std::path::Path) -> u8 {
    let filter = tracing_subscriber::EnvFilter::try_from_env("FTVM_LOG").unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let config = match Config::load(path) {
        Ok(config) => config,
        Err(error) => return fail(&error, exit_code::CONFIG),
    };
    // Blocked before there are threads, so that this thread alone gets them.
    let signals = block_signals();
    let daemon = match Daemon::start(config) {
        Ok(daemon) => daemon,
        Err(error) => return fail(&error, error.exit_code()),
    };
    let server = std::thread::Builder::new().name("server".to_owned()).spawn(move || {
        if let Err(error) = daemon.serve() {
            // Without its socket the daemon is of no use; engines go on.
            std::process::exit(i32::from(fail(&error, error.exit_code())));
        }
    });
    if let Err(error) = server {
        return fail(&error, exit_code::INTERNAL);
    }
    wait_for(&signals);
    tracing::info!("ending; engines go on");
    exit_code::OK
}

fn fail(error: &(dyn std::error::Error + 'static), code: u8) -> u8 {
    eprintln!("ftvm-node-daemon: {}", ftvm_node_daemon::explain(error));
    code
}

fn block_signals() -> libc::sigset_t {
    // SAFETY: an initialised set, changed for this thread and those that it will start.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::sigaddset(&mut set, libc::SIGINT);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        set
    }
}

fn wait_for(signals: &libc::sigset_t) {
    let mut signal = 0;
    // SAFETY: waits for a blocked signal of a valid set.
    while unsafe { libc::sigwait(signals, &mut signal) } != 0 {}
}
