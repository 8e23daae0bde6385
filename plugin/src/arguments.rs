//! The command line.

use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::objects::Form;

/// How fault-tolerant virtual machines are, and what a person may ask of them.
#[derive(Parser)]
#[command(
    name = "kubectl-ftvm",
    bin_name = "kubectl ftvm",
    version,
    disable_help_subcommand = true
)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Tell how VMs are: those of a namespace, or one in full with what to do.
    Status(Status),
    /// Hand the guest over to the standby, as planned: no client notices more than a short pause.
    Switchover(Ask),
    /// Start a halted VM (spec.runStrategy: Always).
    Start(Ask),
    /// Stop a VM; its disks are kept (spec.runStrategy: Halted).
    Stop(Ask),
    /// Boot a VM although what only seats that are gone have may be lost. Tells what that is, and asks.
    AcceptDataLoss(AcceptDataLoss),
    /// Print a shell's completions for `kubectl-ftvm`.
    Completion {
        /// Which shell.
        shell: Shell,
    },
    /// Write the manual pages into a folder.
    Man {
        /// The folder.
        folder: PathBuf,
    },
}

/// Which cluster and namespace.
#[derive(Args, Default)]
pub struct Place {
    /// Namespace; if missing that of the context.
    #[arg(short, long, value_parser = object_name)]
    pub namespace: Option<String>,
    /// Context of the kubeconfig; if missing the current one.
    #[arg(long)]
    pub context: Option<String>,
}

#[derive(Args)]
pub struct Status {
    /// Name of the VM; if missing all are told of, in a line each.
    #[arg(value_parser = object_name)]
    pub name: Option<String>,
    #[command(flatten)]
    pub place: Place,
    /// VMs of all namespaces.
    #[arg(short = 'A', long, conflicts_with_all = ["namespace", "name"])]
    pub all_namespaces: bool,
    /// Form of the answer. json and yaml are the objects themselves.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
    /// Go on telling what changes.
    #[arg(short, long)]
    pub watch: bool,
}

/// Form of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Table,
    Json,
    Yaml,
}

impl Output {
    /// None: for people.
    pub fn form(self) -> Option<Form> {
        match self {
            Output::Table => None,
            Output::Json => Some(Form::Json),
            Output::Yaml => Some(Form::Yaml),
        }
    }
}

/// One VM of which something is asked.
#[derive(Args)]
pub struct Ask {
    /// Name of the VM.
    #[arg(value_parser = object_name)]
    pub name: String,
    #[command(flatten)]
    pub place: Place,
    #[command(flatten)]
    pub patience: Patience,
}

/// How long is waited.
#[derive(Args)]
pub struct Patience {
    /// Wait until it is done.
    #[arg(
        long, value_name = "BOOL", default_value_t = true, default_missing_value = "true",
        num_args = 0..=1, require_equals = true, action = ArgAction::Set
    )]
    pub wait: bool,
    /// Wait no longer than so many seconds. What was asked for stays asked for.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout_seconds: u64,
}

#[derive(Args)]
pub struct AcceptDataLoss {
    #[command(flatten)]
    pub ask: Ask,
    /// Do not ask: the name of the VM once more.
    #[arg(long, value_name = "NAME")]
    pub yes_i_lose_data: Option<String>,
}

/// A name that stays one in a path: no other object is asked for by it.
pub fn object_name(text: &str) -> Result<String, String> {
    let letters = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte);
    let begins = text.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    if begins && text.len() <= 253 && text.bytes().all(letters) {
        return Ok(text.to_owned());
    }
    Err("write lower-case letters, digits and dashes, beginning with a letter or digit, such as web-1".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn read(words: &str) -> Result<Command, clap::Error> {
        let read = Arguments::try_parse_from(words.split(' '));
        read.map(|arguments| arguments.command)
    }

    #[test]
    fn the_definition_holds() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn names_are_no_paths() {
        for name in ["web", "web-1", "0", "a.b"] {
            assert_eq!(object_name(name), Ok(name.to_owned()));
        }
        for bad in ["", "../pods/x", "Web", "-n", "a/b", "a%2fb", "a\u{1b}", ".", "é"] {
            assert!(object_name(bad).is_err(), "{bad}");
        }
        assert!(read("ftvm status ../x").is_err());
        assert!(read("ftvm status -n a/b").is_err());
    }

    #[test]
    fn who_asks_waits_unless_told_otherwise() {
        for (words, wait, seconds) in [
            ("ftvm stop web", true, 600),
            ("ftvm stop web --wait", true, 600),
            ("ftvm stop web --wait=false --timeout-seconds 5", false, 5),
        ] {
            let Ok(Command::Stop(ask)) = read(words) else {
                panic!("{words}");
            };
            let patience = ask.patience;
            assert_eq!((patience.wait, patience.timeout_seconds), (wait, seconds), "{words}");
            assert_eq!(ask.name, "web");
        }
        assert!(read("ftvm stop").is_err());
        assert!(read("ftvm stop web --timeout-seconds 0").is_err());
    }

    #[test]
    fn all_namespaces_are_not_one() {
        let Ok(Command::Status(status)) = read("ftvm status -A -o yaml -w") else {
            panic!("refused");
        };
        assert!(status.all_namespaces && status.watch && status.output == Output::Yaml);
        assert!(read("ftvm status -A -n shop").is_err());
        assert!(read("ftvm status web -A").is_err());
        assert!(read("ftvm status -o xml").is_err());
    }
}
