//! docs/kubernetes.md lists phases, conditions and their reasons: are they those of the code?
use std::collections::BTreeSet;

use super::obstacles::IMAGE_TROUBLES;
use super::{ARBITER_REACHABLE, CONDITIONS, CPU_CHOSEN, NETWORKS_REDUNDANT, PROTECTED, READY, STORAGE_HEALTHY};

const PAGE: &str = include_str!("../../../docs/kubernetes.md");
/// Where reasons are written.
const SOURCES: [&str; 6] = [
    include_str!("mod.rs"),
    include_str!("networks.rs"),
    include_str!("obstacles.rs"),
    include_str!("storage.rs"),
    include_str!("../decide/run.rs"),
    include_str!("../decide/words.rs"),
];
/// Words in these files that are no reasons: conditions (but for the one that is called like a reason), their statuses, and what others say.
const OTHERS: [&str; 10] = [
    READY,
    PROTECTED,
    STORAGE_HEALTHY,
    ARBITER_REACHABLE,
    CPU_CHOSEN,
    NETWORKS_REDUNDANT,
    "True",
    "False",
    "Unknown",
    "PersistentVolumeClaim",
];

/// Texts of a source that are one word with a capital.
fn words(source: &str) -> impl Iterator<Item = &str> {
    let capital = |text: &&str| text.starts_with(|letter: char| letter.is_ascii_uppercase());
    let pieces = source.split('"').filter(capital);
    pieces.filter(|text| text.bytes().all(|letter| letter.is_ascii_alphabetic()))
}

/// What stands in back quotes in this column of the table below a heading.
fn column<'a>(page: &'a str, heading: &str, place: usize) -> BTreeSet<&'a str> {
    let section = page.lines().skip_while(|line| *line != heading).skip(1);
    let section = section.take_while(|line| !line.starts_with('#'));
    let rows = section.filter(|line| line.starts_with('|')).skip(2);
    let cells = rows.filter_map(|row| row.split('|').nth(place + 1));
    cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).collect()
}

#[test]
fn the_page_lists_each_phase() {
    let definition = ftvm_crds::definition();
    let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    let phases = schema["properties"]["status"]["properties"]["phase"]["enum"].as_array();
    let phases: BTreeSet<&str> = phases.unwrap().iter().filter_map(|phase| phase.as_str()).collect();
    assert_eq!(column(PAGE, "### Phase", 0), phases);
}

#[test]
fn the_page_lists_each_condition_with_its_reasons() {
    assert_eq!(column(PAGE, "### Conditions", 0), BTreeSet::from(CONDITIONS));
    let reasons = SOURCES.into_iter().flat_map(words);
    let reasons = reasons.filter(|word| !OTHERS.contains(word) && !IMAGE_TROUBLES.contains(word));
    assert_eq!(column(PAGE, "### Conditions", 2), reasons.collect::<BTreeSet<_>>());
}

#[test]
fn what_is_listed_and_what_is_written_is_found() {
    let source = r#"said(READY, "GuestRuns", "the guest runs", "\"", "Two words", "Halted")"#;
    assert_eq!(words(source).collect::<Vec<_>>(), ["GuestRuns", "Halted"]);
    let page = "# A\n| `no` |\n## B\n\n| a | b |\n|---|---|\n| `x` | `One`, `Two` not |\n| y | `Three` |\n\n## C\n| `z` | `Four` |\n";
    assert_eq!(column(page, "## B", 0), BTreeSet::from(["x"]));
    assert_eq!(column(page, "## B", 1), BTreeSet::from(["One", "Two", "Three"]));
}
