//! Rules of taste that neither rustfmt nor clippy knows.
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail, ensure};

const FILE_LINES_MAX: usize = 800;
const FUNCTION_LINES_MAX: usize = 90;
/// A test tells a story; it may be longer.
const TEST_LINES_MAX: usize = 160;

/// Words that are finished or gone before a change lands. Written in halves, so that this file passes.
const UNFINISHED: &[&str] = &[
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("to", "do!("),
    concat!("unimple", "mented!("),
    concat!("db", "g!("),
    concat!("#[ig", "nore"),
];

/// Places of one machine or of a package registry: the project builds anywhere, from whatever its tools are set up for.
const PLACES: &[&str] = &[
    concat!("/ho", "me/"),
    concat!("/Use", "rs/"),
    concat!("/wo", "rk/"),
    concat!("deb.", "debian.org"),
    concat!("crates.", "io/"),
    concat!("pypi.", "org"),
    concat!("proxy.", "golang.org"),
    concat!("registry.", "npmjs"),
];

/// Checks all files that git knows or would add.
///
/// # Errors
/// Every violation, one a line.
pub fn check(root: &Path) -> anyhow::Result<()> {
    let mut complaints = String::new();
    for name in files(root)? {
        let Ok(text) = fs::read_to_string(root.join(&name)) else {
            // Not text, or deleted but not yet committed.
            continue;
        };
        for (line, complaint) in examine(&name, &text) {
            writeln!(complaints, "{name}:{line}: {complaint}")?;
        }
    }
    ensure!(complaints.is_empty(), "{}", complaints.trim_end());
    Ok(())
}

fn files(root: &Path) -> anyhow::Result<Vec<String>> {
    let output = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root)
        .output()
        .context("cannot start git")?;
    if !output.status.success() {
        bail!("git ls-files: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(str::to_owned)
        .collect())
}

/// All complaints about one file, with line numbers.
fn examine(name: &str, text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let lock = name.ends_with(".lock") || name.ends_with(".sum");
    let rust = name.ends_with(".rs");
    let lines: Vec<&str> = text.lines().collect();
    if !lock {
        if !text.is_empty() && !text.ends_with('\n') {
            found.push((lines.len(), "no newline at the end of the file".to_owned()));
        }
        for (index, line) in lines.iter().enumerate() {
            found.extend(
                examine_line(name, line)
                    .into_iter()
                    .map(|complaint| (index + 1, complaint)),
            );
        }
    }
    if (rust || name.ends_with(".sh")) && lines.len() > FILE_LINES_MAX {
        found.push((
            FILE_LINES_MAX,
            format!(
                "{} lines, at most {FILE_LINES_MAX}: split it by what it does",
                lines.len()
            ),
        ));
    }
    if rust {
        found.extend(long_functions(name, &lines));
        found.extend(undocumented_unsafe(&lines));
    }
    found
}

fn examine_line(name: &str, line: &str) -> Vec<String> {
    let mut found = Vec::new();
    let code = name.ends_with(".rs") || name.ends_with(".toml") || name.ends_with(".sh") || name.ends_with(".md");
    if code && line.contains('\t') {
        found.push("a tab".to_owned());
    }
    if line.ends_with([' ', '\t', '\r']) {
        found.push("blanks at the end of the line".to_owned());
    }
    let prose = name.ends_with(".md");
    let words = UNFINISHED.iter().filter(|_| !prose).chain(PLACES);
    found.extend(
        words
            .filter(|word| line.contains(**word))
            .map(|word| format!("contains {word:?}")),
    );
    found
}

/// rustfmt puts a function's closing brace at the indentation of its first line: that is all the parsing needed.
fn long_functions(name: &str, lines: &[&str]) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (index, line) in lines.iter().enumerate() {
        let body = line.trim_start();
        if !is_function(body) {
            continue;
        }
        // Only what has a body of several lines.
        let head = lines[index..].iter().position(|line| line.ends_with(['{', '}', ';']));
        if !head.is_some_and(|head| lines[index + head].ends_with('{')) {
            continue;
        }
        let end = format!("{}}}", &line[..line.len() - body.len()]);
        let Some(length) = lines[index..].iter().position(|line| *line == end) else {
            continue;
        };
        let attributes = lines[..index].iter().rev().take(4);
        let test = name.contains("tests/") || attributes.into_iter().any(|line| line.trim() == "#[test]");
        let most = if test { TEST_LINES_MAX } else { FUNCTION_LINES_MAX };
        if length + 1 > most {
            found.push((index + 1, format!("a function of {} lines, at most {most}", length + 1)));
        }
    }
    found
}

fn is_function(line: &str) -> bool {
    let mut words = line.split([' ', '(']);
    words.by_ref().find(|word| {
        !matches!(
            *word,
            "pub" | "crate)" | "super)" | "const" | "unsafe" | "async" | "extern" | "\"C\""
        )
    }) == Some("fn")
}

/// What needs a SAFETY line: blocks, implementations, foreign items, attributes. (A function says `# Safety` to its callers.)
const UNSAFE: &[&str] = &["unsafe {", "unsafe impl ", "unsafe extern \"C\" {", "#[unsafe("];

fn undocumented_unsafe(lines: &[&str]) -> Vec<(usize, String)> {
    let begins = |line: &str| {
        let code = line.split("//").next().unwrap_or_default();
        UNSAFE.iter().any(|word| {
            code.find(word)
                .is_some_and(|place| !code[..place].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '"'))
        })
    };
    (0..lines.len())
        .filter(|&index| begins(lines[index]) && !explained(lines, index))
        .map(|index| (index + 1, "unsafe without a SAFETY line directly above".to_owned()))
        .collect()
}

/// Whether the comment directly above the statement that this line is part of says why it is safe.
fn explained(lines: &[&str], index: usize) -> bool {
    if lines[index].contains("SAFETY:") {
        return true;
    }
    let above = lines[..index].iter().rev().map(|line| line.trim());
    let statement = above.skip_while(|line| {
        let ends_another = line.is_empty() || line.ends_with([';', '{', '}']);
        let attribute = line.starts_with("#[");
        !line.starts_with("//") && (attribute || !ends_another)
    });
    let mut comment = statement.take_while(|line| line.starts_with("//"));
    comment.any(|line| line.contains("SAFETY:") || line.contains("# Safety"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaints(name: &str, text: &str) -> Vec<String> {
        examine(name, text)
            .into_iter()
            .map(|(line, complaint)| format!("{line}: {complaint}"))
            .collect()
    }

    #[test]
    fn clean_code_passes() {
        let text = "fn f() {\n    // SAFETY: nothing happens.\n    unsafe { g() }\n}\n";
        assert_eq!(complaints("a.rs", text), Vec::<String>::new());
    }

    #[test]
    fn a_safety_line_belongs_to_what_follows_it() {
        let complaint = |line: usize| vec![format!("{line}: unsafe without a SAFETY line directly above")];
        let stands_elsewhere = concat!("// SAFETY: x\nlet a = 1;\nuns", "afe { g() }\n");
        assert_eq!(complaints("a.rs", stands_elsewhere), complaint(3));
        assert_eq!(
            complaints("a.rs", concat!("uns", "afe extern \"C\" {\n}\n")),
            complaint(1)
        );
        assert_eq!(
            complaints("a.rs", concat!("/// x\n#[uns", "afe(no_mangle)]\n")),
            complaint(2)
        );
        assert_eq!(
            complaints("a.rs", concat!("uns", "afe impl Send for A {}\n")),
            complaint(1)
        );
        for good in [
            concat!(
                "// SAFETY: of two\n// lines\n#[inline]\nuns",
                "afe impl Send for A {}\n"
            ),
            concat!("// SAFETY: x\nlet a = f(\n    1,\n    uns", "afe { g() },\n);\n"),
            concat!("/// # Safety\n/// x\n#[uns", "afe(no_mangle)]\n"),
        ] {
            assert_eq!(complaints("a.rs", good), Vec::<String>::new());
        }
    }

    #[test]
    fn each_rule_bites() {
        assert_eq!(
            complaints("a.rs", "fn f() {}"),
            ["1: no newline at the end of the file"]
        );
        assert_eq!(complaints("a.rs", "// x \n"), ["1: blanks at the end of the line"]);
        assert_eq!(complaints("a.rs", "\tx\n"), ["1: a tab"]);
        assert_eq!(
            complaints("a.rs", concat!("fn f() {\n    uns", "afe { g() }\n}\n")),
            ["2: unsafe without a SAFETY line directly above"]
        );
        assert_eq!(complaints("a.rs", concat!("// TO", "DO\n")).len(), 1);
        assert_eq!(complaints("a.md", concat!("see /ho", "me/me\n")).len(), 1);
        let empty = format!(
            "    fn f() {{}}\n    fn g(\n    );\n{}    }}\n",
            "        g();\n".repeat(FUNCTION_LINES_MAX)
        );
        assert_eq!(complaints("a.rs", &empty), Vec::<String>::new());
        let long = format!(
            "    pub(crate) fn f() {{\n{}    }}\n",
            "        g();\n".repeat(FUNCTION_LINES_MAX)
        );
        assert_eq!(
            complaints("a.rs", &long),
            [format!(
                "1: a function of {} lines, at most {FUNCTION_LINES_MAX}",
                FUNCTION_LINES_MAX + 2
            )]
        );
        assert_eq!(
            complaints("a.rs", &format!("#[test]\n{}", &long[4..].replace("\n    }", "\n}"))),
            Vec::<String>::new()
        );
        assert!(complaints("a.rs", &"x\n".repeat(FILE_LINES_MAX + 1))[0].contains("split it"));
    }
}
