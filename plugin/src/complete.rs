//! Completions of `kubectl ftvm`. kubectl asks a program `kubectl_complete-ftvm` for them (KEP-2379): a link of that name to this one.

use std::ffi::OsStr;
use std::path::Path;
use std::time::Duration;

use clap::{Arg, Command};
use kube::ResourceExt as _;
use tokio::time::timeout;

use crate::arguments::{Place, object_name};
use crate::cluster::Cluster;
use crate::text::is_plain;

/// Name by which kubectl asks.
const NAME: &str = "kubectl_complete-ftvm";
/// The last line: nothing else, such as names of files, is offered (cobra's ShellCompDirectiveNoFileComp).
const NOTHING_ELSE: &str = ":4";
/// Whoever presses a key waits no longer for names.
const PATIENCE: Duration = Duration::from_secs(3);

/// Was the program begun by that name?
pub fn is_asked(program: &OsStr) -> bool {
    Path::new(program).file_name() == Some(OsStr::new(NAME))
}

/// Where the VMs are whose names may stand in place of the last of these words; none: no name may.
pub fn wants_names(command: &Command, words: &[String]) -> Option<Place> {
    let (last, before) = words.split_last()?;
    let (mut at, mut place, mut names) = (command, Place::default(), 0);
    let mut words = before.iter();
    while let Some(word) = words.next() {
        let parts = word.split_once('=');
        let (name, value) = parts.map_or((word.as_str(), None), |(name, value)| (name, Some(value)));
        let option = at.get_arguments().find(|arg| is_named(arg, name));
        match option.filter(|option| option.get_action().takes_values()) {
            Some(option) if value.is_none() && option.is_require_equals_set() => {}
            Some(option) => {
                // Without one the last word is it.
                let value = value.or_else(|| words.next().map(String::as_str))?;
                match option.get_id().as_str() {
                    "namespace" => place.namespace = Some(object_name(value).ok()?),
                    "context" => place.context = Some(value.to_owned()),
                    _ => {}
                }
            }
            None if word.starts_with('-') => {}
            None => match at.find_subcommand(word) {
                Some(found) => at = found,
                None => names += 1,
            },
        }
    }
    let may = at.get_positionals().any(|arg| arg.get_id().as_str() == "name");
    (may && names == 0 && !last.starts_with('-')).then_some(place)
}

/// Names of the VMs there; none if nobody says which there are.
pub async fn names(place: &Place) -> Vec<String> {
    let asked = async { Cluster::connect(place).await?.fleet(false).await };
    let Ok(Ok(vms)) = timeout(PATIENCE, asked).await else {
        return Vec::new();
    };
    let names = vms.iter().map(|seen| seen.name_any());
    names.filter(|name| name.chars().all(is_plain)).collect()
}

/// What may stand in place of the last of these words, a line each; `names` where those of VMs may.
pub fn answer(command: &Command, words: &[String], names: Vec<String>) -> String {
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
    let takes_it = |option: &&Arg| option.get_action().takes_values() && !option.is_require_equals_set();
    let found: Vec<String> = match option.filter(takes_it) {
        Some(option) => values(option),
        None if last.starts_with('-') => options(at),
        None => commands(at).into_iter().chain(places(at)).chain(names).collect(),
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

    fn said(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    fn answered(words: &[&str]) -> String {
        answer(&Arguments::command(), &said(words), said(&["web", "other"]))
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
        assert_eq!(answered(&["stop", "--wait", "w"]), "web\n:4\n");
        assert_eq!(answered(&[]), ":4\n");
    }

    #[test]
    fn names_are_wanted_where_a_vm_may_stand() {
        let wanted = |words: &[&str]| {
            let place = wants_names(&Arguments::command(), &said(words))?;
            Some((place.namespace, place.context))
        };
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(wanted(&["stop", ""]), Some((None, None)));
        assert_eq!(wanted(&["stop", "--wait", "w"]), Some((None, None)));
        assert_eq!(wanted(&["status", "-n", "shop", "w"]), Some((text("shop"), None)));
        let both = ["status", "--namespace=shop", "--context", "lab", ""];
        assert_eq!(wanted(&both), Some((text("shop"), text("lab"))));
        for no in [
            &["st"][..],
            &["stop", "web", ""],
            &["stop", "-"],
            &["status", "-n", ""],
            &["status", "-n", "../x", ""],
            &["completion", ""],
            &[],
        ] {
            assert_eq!(wanted(no), None, "{no:?}");
        }
    }

    #[test]
    fn kubectl_asks_by_another_name() {
        assert!(is_asked(OsStr::new("/usr/local/bin/kubectl_complete-ftvm")));
        assert!(!is_asked(OsStr::new("/usr/local/bin/kubectl-ftvm")));
    }
}
