//! Completions of `kubectl ftvm`. kubectl asks a program `kubectl_complete-ftvm` for them (KEP-2379): a link of that name to this one.

use std::ffi::OsStr;
use std::path::Path;

use clap::{Arg, Command};

/// Name by which kubectl asks.
const NAME: &str = "kubectl_complete-ftvm";
/// The last line: nothing else, such as names of files, is offered (cobra's ShellCompDirectiveNoFileComp).
const NOTHING_ELSE: &str = ":4";

/// Was the program begun by that name?
pub fn is_asked(program: &OsStr) -> bool {
    Path::new(program).file_name() == Some(OsStr::new(NAME))
}

/// What may stand in place of the last of these words, a line each.
pub fn answer(command: &Command, words: &[String]) -> String {
    let Some((last, before)) = words.split_last() else {
        return format!("{NOTHING_ELSE}\n");
    };
    let mut at = command;
    for word in before {
        at = at.find_subcommand(word).unwrap_or(at);
    }
    let option = before
        .last()
        .and_then(|word| at.get_arguments().find(|arg| is_named(arg, word)));
    let found: Vec<String> = match option.filter(|option| option.get_action().takes_values()) {
        Some(option) => values(option),
        None if last.starts_with('-') => options(at),
        None => commands(at).into_iter().chain(places(at)).collect(),
    };
    let mut lines: String = found
        .iter()
        .filter(|candidate| candidate.starts_with(last.as_str()))
        .map(|candidate| format!("{candidate}\n"))
        .collect();
    lines.push_str(NOTHING_ELSE);
    lines.push('\n');
    lines
}

fn is_named(arg: &Arg, word: &str) -> bool {
    let long = word.strip_prefix("--").filter(|long| !long.is_empty());
    let short = word.strip_prefix('-').filter(|short| short.chars().count() == 1);
    (long.is_some() && long == arg.get_long())
        || short
            .and_then(|short| short.chars().next())
            .is_some_and(|short| arg.get_short() == Some(short))
}

fn values(arg: &Arg) -> Vec<String> {
    let values = arg.get_possible_values();
    values.iter().map(|value| value.get_name().to_owned()).collect()
}

fn options(command: &Command) -> Vec<String> {
    let longs = command.get_arguments().filter_map(Arg::get_long);
    longs.map(|long| format!("--{long}")).collect()
}

fn commands(command: &Command) -> Vec<String> {
    let commands = command.get_subcommands();
    commands.map(|command| command.get_name().to_owned()).collect()
}

/// Values of what stands without an option before it.
fn places(command: &Command) -> Vec<String> {
    command.get_positionals().flat_map(values).collect()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::arguments::Arguments;

    fn answered(words: &[&str]) -> String {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        answer(&Arguments::command(), &words)
    }

    #[test]
    fn words_are_completed_by_what_may_stand_there() {
        assert_eq!(answered(&["st"]), "status\nstart\nstop\n:4\n");
        assert_eq!(answered(&["stop", "web", "--wa"]), "--wait\n:4\n");
        assert_eq!(answered(&["status", "-o", ""]), "table\njson\nyaml\n:4\n");
        assert_eq!(answered(&["status", "--output", "y"]), "yaml\n:4\n");
        assert_eq!(answered(&["completion", "z"]), "zsh\n:4\n");
        assert_eq!(answered(&["status", "-A", "--wat"]), "--watch\n:4\n");
        assert_eq!(answered(&["status", "--namespace", ""]), ":4\n");
        assert_eq!(answered(&[]), ":4\n");
    }

    #[test]
    fn kubectl_asks_by_another_name() {
        assert!(is_asked(OsStr::new("/usr/local/bin/kubectl_complete-ftvm")));
        assert!(!is_asked(OsStr::new("/usr/local/bin/kubectl-ftvm")));
    }
}
