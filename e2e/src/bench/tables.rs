//! A report as tables: for a terminal, and as the marked section of a Markdown page.
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, ensure};

use super::block;
use super::goals::Verdict;
use super::kubernetes::shown;
use super::report::{ColoPoint, CostPoint, LoadKey, PauseFigures, PausePoint, Report};
use super::{Options, Part};

/// Where the section of these figures begins and ends in a Markdown page; everything between is replaced. Some parts have one to themselves, so
/// that each can be measured anew alone; the others share one.
fn marks(part: Option<Part>) -> [String; 2] {
    let of = part.map_or_else(String::new, |part| format!(" of {}", part.name()));
    [
        format!("<!-- figures{of}: begin, written by cargo xtask bench --markdown -->"),
        format!("<!-- figures{of}: end -->"),
    ]
}

/// Rows under a title; the first row is the head.
pub(super) struct Table {
    title: &'static str,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(title: &'static str, head: &[&str]) -> Self {
        Self {
            title,
            rows: vec![head.iter().map(|cell| (*cell).to_owned()).collect()],
        }
    }

    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    fn widths(&self) -> Vec<usize> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let cell = |row: &Vec<String>, column: usize| row.get(column).map_or(0, |cell| cell.chars().count());
        (0..columns)
            .map(|column| self.rows.iter().map(|row| cell(row, column)).max().unwrap_or(0))
            .collect()
    }

    /// First column to the left, figures to the right.
    fn aligned(&self) -> impl Iterator<Item = Vec<String>> {
        let widths = self.widths();
        self.rows.iter().map(move |row| {
            let cells = row.iter().zip(&widths).enumerate();
            cells
                .map(|(column, (cell, &width))| match column {
                    0 => format!("{cell:<width$}"),
                    _ => format!("{cell:>width$}"),
                })
                .collect()
        })
    }

    fn text(&self, out: &mut String) {
        let _ = writeln!(out, "\n{}\n", self.title);
        for row in self.aligned() {
            let _ = writeln!(out, "  {}", row.join("  ").trim_end());
        }
    }

    fn markdown(&self, out: &mut String) {
        let _ = writeln!(out, "\n### {}\n", self.title);
        for (index, row) in self.aligned().enumerate() {
            let _ = writeln!(out, "| {} |", row.join(" | "));
            if index == 0 {
                let rules: Vec<&str> = (0..row.len())
                    .map(|column| if column == 0 { "---" } else { "--:" })
                    .collect();
                let _ = writeln!(out, "| {} |", rules.join(" | "));
            }
        }
    }
}

/// The report for a terminal.
pub fn text(report: &Report) -> String {
    let mut out = String::new();
    for line in preamble(report) {
        let _ = writeln!(out, "{line}");
    }
    tables(report).iter().for_each(|table| table.text(&mut out));
    for complaint in &report.complaints {
        let _ = writeln!(out, "\n  not measured: {complaint}");
    }
    out
}

/// The report as Markdown.
pub fn markdown(report: &Report) -> String {
    let mut out = String::new();
    for line in preamble(report) {
        let _ = writeln!(out, "{line}  ");
    }
    tables(report).iter().for_each(|table| table.markdown(&mut out));
    for complaint in &report.complaints {
        let _ = writeln!(out, "\nNot measured: {}", in_short(complaint));
    }
    // Two blanks at a line's end are a line break in Markdown, and untidy: a backslash says the same.
    out.replace("  \n", "\\\n")
}

/// The part and what was said last: a program may have printed a screenful before. No character of it is Markdown, or a section's mark.
fn in_short(complaint: &str) -> String {
    let (part, why) = complaint.split_at(complaint.find(": ").map_or(0, |colon| colon + 2));
    let last = why.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
    let mut short = String::new();
    for letter in part.chars().chain(last.trim().chars()) {
        if r"\`*_<>[]|".contains(letter) {
            short.push('\\');
        }
        short.push(letter);
    }
    short
}

/// Prints a report and writes it where it was asked for; `logs` is told if something could not be measured.
///
/// # Errors
/// If a file can't be written.
pub fn conclude(report: &Report, options: &Options, logs: &Path) -> anyhow::Result<ExitCode> {
    print!("{}", text(report));
    if let Some(path) = &options.json {
        report
            .write_json(path)
            .with_context(|| format!("writing {}", path.display()))?;
        println!("\n  written to {}", path.display());
    }
    if let Some(page) = &options.markdown {
        write_markdown(report, &options.parts, page)?;
        println!("\n  written to {}", page.display());
    }
    if report.complaints.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    println!("\n  logs: {}\n", logs.display());
    Ok(ExitCode::FAILURE)
}

/// Writes the report of these parts into the marked sections of a page; other sections stay as they are.
///
/// # Errors
/// If the page can't be read or written, or has no such section.
pub fn write_markdown(report: &Report, parts: &[Part], page: &Path) -> anyhow::Result<()> {
    let written = with_sections(page, parts, |section| markdown(&of_section(report, section)))?;
    std::fs::write(page, written).with_context(|| format!("writing {}", page.display()))
}

/// Whether the page is there and has the sections of these parts.
///
/// # Errors
/// If not.
pub fn check_page(parts: &[Part], page: &Path) -> anyhow::Result<()> {
    with_sections(page, parts, |_| String::new()).map(drop)
}

/// The page with these parts' sections anew.
fn with_sections(page: &Path, parts: &[Part], figures: impl Fn(Option<Part>) -> String) -> anyhow::Result<String> {
    let mut text = std::fs::read_to_string(page).with_context(|| format!("reading {}", page.display()))?;
    let sections: BTreeSet<Option<Part>> = parts
        .iter()
        .map(|part| Some(*part).filter(|part| part.has_section()))
        .collect();
    for section in sections {
        text = with_section(&text, &marks(section), &figures(section)).with_context(|| page.display().to_string())?;
    }
    Ok(text)
}

/// The report as if what belongs to this section had been measured alone.
fn of_section(report: &Report, section: Option<Part>) -> Report {
    let whose = |text: &str| Part::all().find(|part| part.has_section() && text.starts_with(part.name()));
    let mut alone = match section {
        None => report.clone(),
        Some(_) => Report {
            machine: report.machine.clone(),
            settings: report.settings.clone(),
            block: report.block.clone(),
            cluster: report.cluster.clone(),
            operator: report.operator.clone(),
            fleet: report.fleet.clone(),
            goals: report.goals.clone(),
            complaints: report.complaints.clone(),
            took_s: report.took_s,
            ..Report::default()
        },
    };
    alone.block = alone.block.filter(|_| section == Some(Part::Block));
    alone.cluster = alone.cluster.filter(|_| section == Some(Part::Cluster));
    alone.operator = alone.operator.filter(|_| section == Some(Part::Operator));
    alone.fleet = alone.fleet.filter(|_| section == Some(Part::Fleet));
    alone.goals.retain(|verdict| whose(verdict.name) == section);
    alone.complaints.retain(|complaint| whose(complaint) == section);
    alone
}

fn with_section(page: &str, [begin, end]: &[String; 2], section: &str) -> anyhow::Result<String> {
    let (before, rest) = page
        .split_once(begin)
        .with_context(|| format!("the page has no line {begin:?} where the figures go"))?;
    ensure!(rest.contains(end), "the page has no line {end:?} after the figures");
    let (_, after) = rest.split_once(end).unwrap_or_default();
    Ok(format!("{before}{begin}\n\n{}\n\n{end}{after}", section.trim()))
}

fn preamble(report: &Report) -> Vec<String> {
    let (machine, settings) = (&report.machine, &report.settings);
    let guest = format!(
        "Guest: {} vCPU, {} MiB, epochs of {} ms. ",
        settings.vcpus, settings.memory_mib, settings.epoch_ms
    );
    let (guest, qemu) = match settings.kubernetes {
        true => (String::new(), String::new()),
        false => (guest, format!("; {}", machine.qemu)),
    };
    let mut lines = vec![
        format!(
            "Command: `{}`, programs built as {}, {:.0} s.",
            settings.command, settings.profile, report.took_s
        ),
        format!(
            "Machine: {} CPUs ({}), {} MiB, Linux {}, {}{qemu}.",
            machine.cpus, machine.cpu_model, machine.memory_mib, machine.kernel, machine.kvm
        ),
        format!(
            "{guest}Load average before: {}; others took {} of the processors meanwhile.",
            machine.load_before,
            machine.others_share.map_or_else(|| "–".to_owned(), percent)
        ),
    ];
    if settings.short {
        lines.push("A short run, to try the harness: its figures mean nothing.".to_owned());
    }
    lines
}

fn tables(report: &Report) -> Vec<Table> {
    let made = [
        goals(report),
        pauses(report),
        costs(report),
        threads("Processor time of the active engine, µs an epoch", report, |point| {
            &point.active_us_per_epoch
        }),
        threads("Processor time of the standby engine, µs an epoch", report, |point| {
            &point.standby_us_per_epoch
        }),
        colo(report),
        ratios(report),
        latency(report),
        memory(report),
        resync(report),
        gaps(report),
        block::table(report),
    ];
    let made = made.into_iter().chain(shown::tables(report));
    made.filter(|table| table.rows.len() > 1).collect()
}

fn goals(report: &Report) -> Table {
    let mut table = Table::new("Goals", &["", "goal", "figure", ""]);
    for verdict in report.goals.iter().filter(|verdict| verdict.figure.is_some()) {
        let bound = if verdict.at_least { "≥" } else { "≤" };
        table.row([
            verdict.what.clone(),
            format!("{bound} {} {}", plain(verdict.goal), verdict.unit),
            optional(verdict.figure.map(plain)),
            judged(verdict),
        ]);
    }
    table
}

fn judged(verdict: &Verdict) -> String {
    match (verdict.met, verdict.missed_by_percent) {
        (Some(true), _) => "met".to_owned(),
        (Some(false), Some(by)) => format!("missed by {by:.0} %"),
        _ => "–".to_owned(),
    }
}

fn pauses(report: &Report) -> Table {
    let head = [
        "pages an epoch",
        "p50 ms",
        "p99 ms",
        "max ms",
        "pauses",
        "epochs/s",
        "dirtied/s",
        "dirty an epoch",
    ];
    let mut table = Table::new("Pause of the guest, this project", &head);
    for point in report.pause.iter().flatten() {
        let mut cells = vec![load(point.load)];
        cells.extend(pause_cells(point.pauses));
        cells.push(format!("{:.1}", point.epochs_per_s));
        cells.push(thousands(point.dirty_pages_per_s));
        cells.push(thousands(point.dirty_pages_per_epoch));
        table.row(cells);
    }
    table
}

fn pause_cells(pauses: PauseFigures) -> [String; 4] {
    let ms = |us: Option<u64>| optional(us.map(milliseconds));
    [
        ms(pauses.pause_us_p50),
        ms(pauses.pause_us_p99),
        ms(pauses.pause_us_max),
        pauses.pauses.to_string(),
    ]
}

fn costs(report: &Report) -> Table {
    let head = [
        "pages an epoch",
        "sent an epoch",
        "in the pause",
        "KiB an epoch",
        "on the link",
        "paused",
        "braked",
        "speed",
    ];
    let mut table = Table::new("What an epoch costs, this project", &head);
    let kib = |bytes: f64| thousands(bytes / 1024.0);
    for point in report.pause.iter().flatten() {
        table.row([
            load(point.load),
            thousands(point.sent_pages_per_epoch),
            thousands(point.residue_pages_per_epoch),
            kib(point.bytes_per_epoch),
            kib(point.link_bytes_per_epoch),
            percent(point.paused_share),
            percent(point.braked_share),
            speed_of(point),
        ]);
    }
    table
}

/// Threads as columns, the loads as rows; what takes next to nothing under every load is left out.
fn threads(title: &'static str, report: &Report, of: fn(&CostPoint) -> &BTreeMap<String, f64>) -> Table {
    const NOTABLE_US: f64 = 10.0;
    let points = || report.costs.iter().flatten();
    let notable = points().flat_map(|point| of(point).iter().filter(|(_, us)| **us >= NOTABLE_US));
    let names: BTreeSet<&str> = notable.map(|(name, _)| name.as_str()).collect();
    let head: Vec<&str> = ["pages an epoch"].into_iter().chain(names.iter().copied()).collect();
    let mut table = Table::new(title, &head);
    for point in points() {
        let times = names
            .iter()
            .map(|name| thousands(of(point).get(*name).copied().unwrap_or(0.0)));
        table.row([load(point.load)].into_iter().chain(times));
    }
    table
}

fn speed_of(point: &PausePoint) -> String {
    optional(point.speed_share.map(percent))
}

fn colo(report: &Report) -> Table {
    let head = [
        "pages an epoch",
        "COLO p50 ms",
        "p99 ms",
        "max ms",
        "pauses",
        "a second",
        "dirtied/s",
        "dirty an epoch",
        "speed",
        "migration p50 ms",
        "max ms",
    ];
    let mut table = Table::new("QEMU under the same loads", &head);
    let ms = |us: Option<u64>| optional(us.map(milliseconds));
    let of = |key: LoadKey| {
        report
            .migration
            .iter()
            .flatten()
            .find(move |point| super::report::same(point.load, key))
    };
    for point in report.colo.iter().flatten() {
        let mut cells = colo_cells(point);
        let moved = of(point.load);
        cells.push(ms(moved.and_then(|moved| moved.downtime_us_p50)));
        cells.push(ms(moved.and_then(|moved| moved.downtime_us_max)));
        table.row(cells);
    }
    if report.colo.is_none() {
        for point in report.migration.iter().flatten() {
            let mut cells = vec![load(point.load)];
            cells.extend((0..8).map(|_| "–".to_owned()));
            cells.extend([ms(point.downtime_us_p50), ms(point.downtime_us_max)]);
            table.row(cells);
        }
    }
    table
}

fn colo_cells(point: &ColoPoint) -> Vec<String> {
    let mut cells = vec![load(point.load)];
    cells.extend(pause_cells(point.pauses));
    cells.push(format!("{:.1}", point.checkpoints_per_s));
    cells.push(thousands(point.dirty_pages_per_s));
    cells.push(thousands(point.dirty_pages_per_epoch));
    cells.push(optional(point.speed_share.map(percent)));
    cells
}

fn ratios(report: &Report) -> Table {
    let mut table = Table::new(
        "QEMU's pauses as multiples of ours",
        &["pages an epoch", "COLO p50", "COLO p99", "migration p50"],
    );
    let times = |ratio: Option<f64>| optional(ratio.map(|ratio| format!("{ratio:.1} ×")));
    for ratio in &report.ratios {
        table.row([
            load(ratio.load),
            times(ratio.colo_p50),
            times(ratio.colo_p99),
            times(ratio.migration_p50),
        ]);
    }
    table
}

fn latency(report: &Report) -> Table {
    let head = [
        "",
        "p50 ms",
        "p99 ms",
        "max ms",
        "requests",
        "epochs/s",
        "pause p50 ms",
        "pause p99 ms",
    ];
    let mut table = Table::new("Request to answer, one at a time", &head);
    let ms = |us: Option<u64>| optional(us.map(milliseconds));
    let Some(latency) = &report.latency else { return table };
    for (name, point) in [("protected", &latency.protected), ("unprotected", &latency.unprotected)] {
        table.row([
            name.to_owned(),
            ms(point.latency_us_p50),
            ms(point.latency_us_p99),
            milliseconds(point.latency_us_max),
            thousands(point.requests as f64),
            format!("{:.0}", point.epochs_per_s),
            ms(point.pauses.pause_us_p50),
            ms(point.pauses.pause_us_p99),
        ]);
    }
    table
}

fn memory(report: &Report) -> Table {
    let mut table = Table::new("Memory of the engines, MiB", &["", "active", "standby"]);
    let Some(memory) = &report.memory else { return table };
    let mib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
    table.row([
        "guest memory".to_owned(),
        mib(memory.guest_bytes),
        mib(memory.guest_bytes),
    ]);
    table.row([
        "beside it, proportional share".to_owned(),
        mib(memory.active.pss_bytes),
        mib(memory.standby.pss_bytes),
    ]);
    table.row([
        "of that the delta cache".to_owned(),
        mib(memory.delta_cache_bytes),
        "–".to_owned(),
    ]);
    table.row([
        "the most ever resident, guest memory included".to_owned(),
        mib(memory.active.peak_bytes),
        mib(memory.standby_peak_bytes),
    ]);
    table
}

fn resync(report: &Report) -> Table {
    let head = [
        "",
        "sent MB",
        "took s",
        "MB/s",
        "plain stream MB/s",
        "share",
        "protected after s",
    ];
    let mut table = Table::new("Full resync", &head);
    for (index, round) in report.resync.iter().flat_map(|resync| &resync.rounds).enumerate() {
        table.row([
            format!("round {}", index + 1),
            thousands(round.sent_bytes as f64 / 1e6),
            format!("{:.2}", round.resync_ms / 1e3),
            thousands(round.sent_bytes_per_s / 1e6),
            thousands(round.stream_bytes_per_s / 1e6),
            percent(round.sent_bytes_per_s / round.stream_bytes_per_s.max(1.0)),
            format!("{:.2}", round.protected_ms / 1e3),
        ]);
    }
    table
}

fn gaps(report: &Report) -> Table {
    let head = [
        "",
        "rounds",
        "p50 ms",
        "longest ms",
        "answers lost",
        "protected again after s",
    ];
    let mut table = Table::new("Gap seen by a client", &head);
    let Some(gap) = &report.gap else { return table };
    for (name, figures) in [("engine killed", gap.kill_engine), ("host killed", gap.kill_host)] {
        table.row([
            name.to_owned(),
            figures.rounds.to_string(),
            format!("{:.1}", figures.gap_ms_p50),
            format!("{:.1}", figures.gap_ms_max),
            figures.lost_answers.to_string(),
            optional(figures.reprotect_ms.map(|ms| format!("{:.1}", ms / 1e3))),
        ]);
    }
    table
}

fn load(key: LoadKey) -> String {
    let mut words = thousands(key.dirty_pages.into());
    if key.whole_pages {
        words.push_str(" whole");
    }
    if key.busy {
        words.push_str(", busy");
    }
    words
}

fn milliseconds(us: u64) -> String {
    let ms = us as f64 / 1e3;
    if ms < 10.0 {
        format!("{ms:.2}")
    } else {
        format!("{ms:.1}")
    }
}

pub(super) fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

pub(super) fn optional(text: Option<String>) -> String {
    text.unwrap_or_else(|| "–".to_owned())
}

/// As few digits as a person needs.
fn plain(value: f64) -> String {
    match value.abs() {
        large if large >= 100.0 => thousands(value),
        middle if middle >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Whole, with a comma between thousands.
pub(super) fn thousands(value: f64) -> String {
    let digits = format!("{:.0}", value.max(0.0));
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::report::{Ratio, Speed};
    use super::*;

    fn report() -> Report {
        let mut report = Report {
            speed: Some(Speed {
                protected_per_s: 90.0,
                unprotected_per_s: 100.0,
                share: 0.9,
            }),
            ..Report::default()
        };
        report.sum_up();
        report.ratios.push(Ratio {
            load: super::super::Load::busy(8192).into(),
            colo_p50: Some(12.34),
            colo_p99: None,
            migration_p50: None,
        });
        report
    }

    #[test]
    fn a_missed_goal_says_by_how_much() {
        let text = text(&report());
        assert!(text.contains("missed by 7 %"), "{text}");
        assert!(text.contains("12.3 ×") && text.contains("8,192, busy"), "{text}");
        assert!(
            !text.contains("Full resync"),
            "a table without rows is left out: {text}"
        );
    }

    #[test]
    fn the_section_of_a_page_is_replaced_and_nothing_else() {
        let (engine, fleet) = (marks(None), marks(Some(Part::Fleet)));
        let page = |new: &str, old: &str| {
            let [[begin, end], [other, last]] = [&engine, &fleet];
            format!(
                "# Title\n\nbefore\n\n{begin}\n\n{new}\n\n{end}\n\nbetween\n\n{other}\n\n{old}\n\n{last}\n\nafter\n"
            )
        };
        let first = page("old", "old");
        let once = with_section(&first, &engine, "new").unwrap();
        assert_eq!(once, page("new", "old"));
        assert_eq!(with_section(&once, &engine, "new").unwrap(), once);
        assert_eq!(with_section(&once, &fleet, "newest").unwrap(), page("new", "newest"));
        assert!(
            with_section("no section", &engine, "new")
                .unwrap_err()
                .to_string()
                .contains("has no line")
        );
    }

    /// What else was measured by the same run is not in it, nor is it in what the others share.
    #[test]
    fn a_section_has_what_belongs_to_it() {
        let mut report = report();
        report.block = Some(block::Block {
            rounds: 1,
            window_ms: 1,
            area_bytes: 1,
            points: Vec::new(),
        });
        report.complaints = vec!["block: a wrong byte".to_owned(), "gap: no answer".to_owned()];
        report
            .goals
            .retain(|verdict| verdict.name == "speed_share" || verdict.name.starts_with("block_random"));
        let of = |section| {
            let alone = of_section(&report, section);
            let goals: Vec<_> = alone.goals.iter().map(|verdict| verdict.name).collect();
            (alone.block.is_some(), alone.speed.is_some(), goals, alone.complaints)
        };
        let complaints = |index: usize| vec![report.complaints[index].clone()];
        assert_eq!(of(None), (false, true, vec!["speed_share"], complaints(1)));
        let goals = vec!["block_random_read_share", "block_random_write_share"];
        assert_eq!(of(Some(Part::Block)), (true, false, goals, complaints(0)));
        assert_eq!(of(Some(Part::Fleet)), (false, false, vec![], vec![]));
    }

    #[test]
    fn markdown_is_tidy() {
        let text = markdown(&report());
        assert!(text.contains("| --- | --:"), "{text}");
        assert!(text.lines().all(|line| !line.ends_with(' ')), "{text}");
    }

    /// The terminal has all of it.
    #[test]
    fn of_a_long_complaint_the_page_has_its_part_and_its_last_line() {
        let mut report = report();
        let said = "colo: qemu: 1 of 2\n\n2 of 2\n  Error: no <a|b> in *my_list*  \n \n";
        report.complaints = vec![said.to_owned(), "gap: no answer: none".to_owned()];
        let page = markdown(&report);
        let expected = r"Not measured: colo: Error: no \<a\|b\> in \*my\_list\*";
        let lines: Vec<&str> = page.lines().filter(|line| line.starts_with("Not measured")).collect();
        assert_eq!(lines, [expected, "Not measured: gap: no answer: none"]);
        assert!(!page.contains("of 2"), "{page}");
        assert!(text(&report).contains(said));
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!([0.0, 999.4, 1234567.0].map(thousands), ["0", "999", "1,234,567"]);
        assert_eq!([0.97, 20.0, 500.0].map(plain), ["0.97", "20.0", "500"]);
        assert_eq!([70, 23_000].map(milliseconds), ["0.07", "23.0"]);
    }
}
