//! What the project depends on: licences that may be shipped, and one version of each crate.
use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use ftvm_e2e::cargo::cargo;
use serde::Deserialize;

/// Licences that may be part of a distributed program, in SPDX's words.
const ALLOWED: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Crates that come in several versions, and why that can't be helped for now.
const DUPLICATES: &[(&str, &str)] = &[
    ("base64", "k8s-openapi has version 0.22, the newest pem (of rcgen) 0.23"),
    ("bitflags", "vmm-sys-util has version 1, all others 2"),
    ("getrandom", "ring and kube-runtime (ahash) have a version each"),
    ("hashbrown", "kube-runtime has version 0.16, indexmap 0.17"),
    ("miniz_oxide", "imago has version 0.8, flate2 0.9"),
    ("embedded-io", "postcard names two versions; neither is built"),
    ("syn", "at build time only: derive macros move to version 3 one by one"),
];

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
}

/// Checks everything that is built for the project's target.
///
/// # Errors
/// Every crate in question, one a line.
pub fn check(root: &Path) -> anyhow::Result<()> {
    let output = cargo()
        .args([
            "metadata",
            "--format-version",
            "1",
            "--locked",
            "--filter-platform",
            "x86_64-unknown-linux-gnu",
        ])
        .current_dir(root)
        .output()
        .context("cannot start cargo")?;
    if !output.status.success() {
        bail!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let metadata: Metadata = serde_json::from_slice(&output.stdout).context("cannot read cargo's metadata")?;
    let complaints = complaints(&metadata.packages, DUPLICATES);
    ensure!(complaints.is_empty(), "{}", complaints.join("\n"));
    Ok(())
}

fn complaints(packages: &[Package], duplicates: &[(&str, &str)]) -> Vec<String> {
    let mut found = Vec::new();
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in packages {
        let license = package.license.as_deref().unwrap_or("no licence named");
        if !acceptable(license) {
            found.push(format!(
                "{} {}: licence {license:?} is not on the list",
                package.name, package.version
            ));
        }
        versions.entry(&package.name).or_default().push(&package.version);
    }
    for (name, versions) in &versions {
        let listed = duplicates.iter().any(|(known, _)| known == name);
        if versions.len() > 1 && !listed {
            found.push(format!(
                "{name} comes in versions {}: use one, or list it with the reason",
                versions.join(", ")
            ));
        }
    }
    let single = |name: &str| versions.get(name).is_none_or(|versions| versions.len() < 2);
    found.extend(
        duplicates
            .iter()
            .filter(|(name, _)| single(name))
            .map(|(name, _)| format!("{name} is listed as a duplicate and is none")),
    );
    found
}

/// Whether an SPDX expression can be met with the allowed licences.
fn acceptable(expression: &str) -> bool {
    // "/" is what old crates write for OR.
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut rest = words.as_slice();
    any_of(&mut rest) == Some(true) && rest.is_empty()
}

// Each of these takes what it understands from the front; none: the expression is malformed.

fn any_of(words: &mut &[&str]) -> Option<bool> {
    let mut met = all_of(words)?;
    while take(words, "OR") {
        met |= all_of(words)?;
    }
    Some(met)
}

fn all_of(words: &mut &[&str]) -> Option<bool> {
    let mut met = one(words)?;
    while take(words, "AND") {
        met &= one(words)?;
    }
    Some(met)
}

fn one(words: &mut &[&str]) -> Option<bool> {
    if take(words, "(") {
        let met = any_of(words)?;
        return take(words, ")").then_some(met);
    }
    let mut name = next(words)?.to_owned();
    if take(words, "WITH") {
        name = format!("{name} WITH {}", next(words)?);
    }
    Some(ALLOWED.contains(&name.as_str()))
}

fn next<'a>(words: &mut &[&'a str]) -> Option<&'a str> {
    let (first, rest) = words.split_first()?;
    *words = rest;
    Some(first)
}

fn take(words: &mut &[&str], word: &str) -> bool {
    let found = words.first() == Some(&word);
    if found {
        *words = &words[1..];
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, version: &str, license: Option<&str>) -> Package {
        Package {
            name: name.into(),
            version: version.into(),
            license: license.map(Into::into),
        }
    }

    #[test]
    fn licence_expressions() {
        for good in [
            "MIT",
            "GPL-2.0 OR MIT",
            "MIT/Apache-2.0",
            "(MIT OR GPL-3.0) AND Unicode-3.0",
            "Apache-2.0 WITH LLVM-exception OR GPL-2.0",
        ] {
            assert!(acceptable(good), "{good}");
        }
        for bad in [
            "GPL-2.0",
            "MIT AND GPL-2.0",
            "(MIT OR GPL-3.0) AND GPL-2.0",
            "MIT OR",
            "(MIT",
            "MIT MIT",
            "",
        ] {
            assert!(!acceptable(bad), "{bad}");
        }
    }

    #[test]
    fn duplicates_are_listed_or_gone() {
        let two = [package("a", "1.0.0", Some("MIT")), package("a", "2.0.0", Some("MIT"))];
        assert_eq!(complaints(&two, &[]).len(), 1);
        assert!(complaints(&two, &[("a", "because")]).is_empty());
        assert_eq!(complaints(&two[..1], &[("a", "because")]).len(), 1);
        assert_eq!(complaints(&[package("a", "1.0.0", None)], &[]).len(), 1);
    }
}
