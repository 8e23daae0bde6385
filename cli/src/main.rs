//! The `ftvm` command.

mod identities;
mod pair;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use ftvm_engine::control::exit_code;
use ftvm_protocol::identity::Incarnation;

use pair::Pair;

/// Fault-tolerant virtual machines.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    area: Area,
}

#[derive(Subcommand)]
enum Area {
    /// Virtual machines without Kubernetes: two daemons, a file arbiter.
    #[command(subcommand)]
    Standalone(Standalone),
}

#[derive(Subcommand)]
enum Standalone {
    /// Make the identities (certificates) of a virtual machine's seats, or add seats to those that exist.
    Identities {
        /// Name of the virtual machine.
        #[arg(long)]
        vm: String,
        /// Names of the seats.
        #[arg(long, value_delimiter = ',', required = true)]
        seats: Vec<String>,
        /// Folder for them; each seat's own folder below it goes to that seat's node.
        #[arg(long)]
        out: PathBuf,
    },
    /// Set the virtual machines up and wait until each runs and is protected.
    Up {
        #[command(flatten)]
        daemons: Daemons,
        /// Do not wait longer than this many seconds.
        #[arg(long, default_value_t = 300)]
        wait_s: u64,
        /// Be content with an unprotected virtual machine.
        #[arg(long)]
        unprotected: bool,
        /// Then stay, and make every seat that appears the peer of the others.
        #[arg(long)]
        watch: bool,
    },
    /// Replace a lost seat: the daemon of the new one must run and be among those named.
    Replace {
        #[command(flatten)]
        daemons: Daemons,
        /// Name of the virtual machine.
        #[arg(long)]
        vm: String,
        /// Name of the lost seat.
        #[arg(long)]
        lost: String,
        /// Name of the new seat.
        #[arg(long)]
        with: String,
        /// Do not wait longer than this many seconds for protection.
        #[arg(long, default_value_t = 300)]
        wait_s: u64,
    },
    /// Tell where each virtual machine runs and whether it is protected.
    Status {
        #[command(flatten)]
        daemons: Daemons,
        /// Form of the answer.
        #[arg(short, long, value_parser = ["table", "json"], default_value = "table")]
        output: String,
        /// The same as `--output json`.
        #[arg(long)]
        json: bool,
    },
    /// Hand the guest over to the standby.
    Switchover(One),
    /// Kill the active's engine as a crash would, to see that the standby takes over; refused if it would not.
    Failover(One),
    /// Stop the virtual machine; durable on every seat.
    Stop(One),
    /// Start a stopped virtual machine.
    Start(One),
    /// Press the guest's power button.
    PowerButton(One),
    /// Boot a seat's disk although another seat holds the record alone. What only the holder has is lost.
    AcceptDataLoss {
        #[command(flatten)]
        one: One,
        /// The seat whose disk is to boot.
        #[arg(long)]
        seat: String,
        /// The holder as `status` shows it: the one whose contents are given up.
        #[arg(long)]
        holder: Incarnation,
    },
}

/// Which daemons.
#[derive(Args)]
struct Daemons {
    /// Control socket of a daemon; once for each.
    #[arg(
        long = "daemon",
        env = "FTVM_DAEMON",
        value_delimiter = ',',
        default_value = "/run/ftvm/daemon.sock"
    )]
    sockets: Vec<PathBuf>,
}

/// One virtual machine.
#[derive(Args)]
struct One {
    #[command(flatten)]
    daemons: Daemons,
    /// Name of the virtual machine.
    #[arg(long)]
    vm: String,
}

/// An error with its exit code.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
struct Failure {
    code: u8,
    message: String,
}

impl Failure {
    fn new(code: u8, message: impl Into<String>) -> Failure {
        Failure {
            code,
            message: message.into(),
        }
    }
}

fn main() -> ExitCode {
    // Usage errors are clap's own exit code, 2.
    let Area::Standalone(command) = Arguments::parse().area;
    match run(command) {
        Ok(()) => ExitCode::from(exit_code::OK),
        Err(failure) => {
            eprintln!("ftvm: {failure}");
            ExitCode::from(failure.code)
        }
    }
}

fn run(command: Standalone) -> Result<(), Failure> {
    match command {
        Standalone::Identities { vm, seats, out } => {
            let made = identities::make(&vm, &seats, &out)
                .map_err(|error| Failure::new(exit_code::IDENTITY, ftvm_node_daemon::explain(&error)))?;
            for seat in made {
                println!("{}", out.join(seat).display());
            }
            Ok(())
        }
        Standalone::Up {
            daemons,
            wait_s,
            unprotected,
            watch,
        } => {
            let pair = Pair::new(daemons.sockets);
            pair.set_up()?;
            pair.wait(None, !unprotected, Duration::from_secs(wait_s), &mut |line| {
                println!("{line}")
            })?;
            print!("{}", table::render(&pair.view()));
            if watch { pair.watch() } else { Ok(()) }
        }
        Standalone::Replace {
            daemons,
            vm,
            lost,
            with,
            wait_s,
        } => {
            let pair = Pair::new(daemons.sockets);
            pair.replace(&vm, &lost, &with)?;
            pair.wait(Some(&vm), true, Duration::from_secs(wait_s), &mut |line| {
                println!("{line}")
            })
        }
        Standalone::Status { daemons, output, json } => {
            let view = Pair::new(daemons.sockets).view();
            if json || output == "json" {
                println!("{}", table::json(&view));
            } else {
                print!("{}", table::render(&view));
            }
            view.failure().map_or(Ok(()), Err)
        }
        Standalone::Switchover(one) => Pair::new(one.daemons.sockets).switchover(&one.vm),
        Standalone::Failover(one) => Pair::new(one.daemons.sockets).failover(&one.vm),
        Standalone::Stop(one) => Pair::new(one.daemons.sockets).stop(&one.vm),
        Standalone::Start(one) => Pair::new(one.daemons.sockets).start(&one.vm),
        Standalone::PowerButton(one) => Pair::new(one.daemons.sockets).power_button(&one.vm),
        Standalone::AcceptDataLoss { one, seat, holder } => {
            Pair::new(one.daemons.sockets).accept_data_loss(&one.vm, &seat, holder)
        }
    }
}
