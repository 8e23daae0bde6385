//! docs/errors.md names a test for each line: do these tests exist, and are the codes documented?
use std::fs;
use std::path::Path;

use anyhow::{Context, ensure};

/// Checks the table.
///
/// # Errors
/// Every line that is not as it should be.
pub fn check(root: &Path) -> anyhow::Result<()> {
    let read = |name: &str| fs::read_to_string(root.join(name)).with_context(|| format!("reading {name}"));
    let complaints = complaints(&read("docs/errors.md")?, &read("docs/exit-codes.md")?, |path| {
        fs::read_to_string(root.join(path)).ok()
    });
    ensure!(complaints.is_empty(), "{}", complaints.join("\n"));
    Ok(())
}

fn complaints(errors: &str, codes: &str, source: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let mut found = Vec::new();
    let mut rows = 0;
    for (number, line) in errors.lines().enumerate() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let ["", _, _, code, _, test, ""] = cells[..] else {
            continue;
        };
        if code == "code" || code.starts_with('-') {
            continue;
        }
        rows += 1;
        let mut complain = |what: String| found.push(format!("docs/errors.md:{}: {what}", number + 1));
        for code in code.split(", ").filter(|code| *code != "none") {
            if !codes.lines().any(|line| line.starts_with(&format!("| {code} |"))) {
                complain(format!("docs/exit-codes.md has no code {code}"));
            }
        }
        let Some((path, name)) = test.trim_matches('`').split_once("::") else {
            complain(format!("{test} is not a test as `path::name`"));
            continue;
        };
        match source(path) {
            None => complain(format!("there is no file {path}")),
            Some(text) if !is_test(&text, name) => complain(format!("{path} has no test {name}")),
            Some(_) => {}
        }
    }
    if rows == 0 {
        found.push("docs/errors.md has no table".to_owned());
    }
    found
}

fn is_test(text: &str, name: &str) -> bool {
    let head = format!("fn {name}()");
    let mut lines = text.lines().map(str::trim);
    while lines.by_ref().any(|line| line == "#[test]") {
        if lines.next().is_some_and(|line| line.starts_with(&head)) {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    const CODES: &str = "| 16 | disk | x | engine |\n";

    fn of(row: &str) -> Vec<String> {
        let file = |path: &str| (path == "a.rs").then(|| "#[test]\nfn good() {\n}\nfn helper() {\n}\n".to_owned());
        complaints(
            &format!("| what | where | code | do | test |\n|---|---|---|---|---|\n{row}\n"),
            CODES,
            file,
        )
    }

    #[test]
    fn tests_and_codes_must_exist() {
        assert_eq!(of("| x | status | 16 | y | `a.rs::good` |"), Vec::<String>::new());
        assert_eq!(of("| x | status | none | y | `a.rs::good` |"), Vec::<String>::new());
        for (row, complaint) in [
            ("| x | status | 99 | y | `a.rs::good` |", "no code 99"),
            ("| x | status | 16 | y | `b.rs::good` |", "no file b.rs"),
            ("| x | status | 16 | y | `a.rs::helper` |", "no test helper"),
            ("| x | status | 16 | y | by hand |", "not a test"),
            ("", "no table"),
        ] {
            let found = of(row);
            assert!(found.len() == 1 && found[0].contains(complaint), "{row}: {found:?}");
        }
    }
}
