//! `kubectl ftvm`: how fault-tolerant VMs are, and what a person may ask of them.
//!
//! It reads what operator and node-daemons publish, and writes the fields and annotations that `docs/kubernetes.md` has for people. Nothing else: whoever has it may
//! do what they may do with kubectl.
//!
//! ```text
//!   cluster    asks the API server
//!   seen       an object, and what this release makes of it
//!   health     which conditions are somebody's business
//!   fleet, detail, objects    an object as people or programs see it
//!   verdict, loss             what an object says of what was asked, or is to be asked, of it
//!   status, ask               the commands
//! ```

mod arguments;
mod ask;
mod cluster;
mod complete;
mod detail;
mod failure;
mod fleet;
mod health;
mod loss;
mod objects;
mod pace;
mod seen;
mod status;
#[cfg(test)]
mod testing;
mod text;
mod verdict;

use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};
use clap_complete::Shell;
use ftvm_crds::RunStrategy;

use arguments::{Arguments, Command};
use failure::Failure;

fn main() -> ExitCode {
    let mut words = std::env::args_os();
    let done = if words.next().is_some_and(|program| complete::is_asked(&program)) {
        let words: Vec<String> = words.map(|word| word.to_string_lossy().into_owned()).collect();
        offer(&words)
    } else {
        // Usage errors are clap's own exit code, 2.
        run(Arguments::parse().command)
    };
    let Err(failure) = done else {
        return ExitCode::SUCCESS;
    };
    let code = failure.code();
    if code != 0 {
        say(&format!("kubectl-ftvm: {failure}"));
    }
    ExitCode::from(code)
}

fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Status(status) => wait(status::run(&status)),
        Command::Switchover(ask) => wait(ask::switchover(&ask)),
        Command::Start(ask) => wait(ask::run(&ask, RunStrategy::Always)),
        Command::Stop(ask) => wait(ask::run(&ask, RunStrategy::Halted)),
        Command::AcceptDataLoss(arguments) => wait(ask::accept_data_loss(&arguments)),
        Command::Completion { shell } => completion(shell),
        Command::Man { folder } => man(&folder),
    }
}

/// What kubectl asks for when somebody asks it to complete a word.
fn offer(words: &[String]) -> Result<(), Failure> {
    let command = Arguments::command();
    wait(async {
        let names = match complete::wants_names(&command, words) {
            Some(place) => complete::names(&place).await,
            None => Vec::new(),
        };
        print(&complete::answer(&command, words, names))
    })
}

fn wait(command: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|source| Failure::Io {
        what: "no runtime".to_owned(),
        source,
    })?;
    runtime.block_on(command)
}

fn completion(shell: Shell) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "kubectl-ftvm", &mut script);
    print(&String::from_utf8_lossy(&script))
}

fn man(folder: &Path) -> Result<(), Failure> {
    clap_mangen::generate_to(Arguments::command(), folder).map_err(|source| Failure::Io {
        what: format!("manual pages in {}", folder.display()),
        source,
    })
}

/// What was asked for, to standard output. It is harmless already.
fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    written.map_err(|source| Failure::Io {
        what: "standard output".to_owned(),
        source,
    })
}

/// A line for people to standard output, made harmless.
fn print_line(text: &str) -> Result<(), Failure> {
    print(&format!("{}\n", text::plain(text)))
}

/// A line for people to standard error, made harmless.
fn say(text: &str) {
    // Nobody may be listening.
    let _ = writeln!(std::io::stderr(), "{}", text::plain(text));
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum as _;

    use super::*;

    #[test]
    fn each_shell_has_its_completions_and_each_command_its_page() {
        for shell in Shell::value_variants() {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Arguments::command(), "kubectl-ftvm", &mut script);
            let script = String::from_utf8(script).unwrap();
            assert!(script.contains("accept-data-loss"), "{shell}");
        }
        let folder = std::env::temp_dir().join(format!("ftvm-man-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let written = man(&folder);
        let page = std::fs::read_to_string(folder.join("kubectl-ftvm-switchover.1"));
        std::fs::remove_dir_all(&folder).unwrap();
        written.unwrap();
        assert!(page.unwrap().contains("Hand the guest over"));
    }
}
