//! The table at the end.
use std::fmt::Write;

use super::{Report, Round};

/// A report as text for people; `colours` for a terminal.
pub fn table(report: &Report, colours: bool) -> String {
    let mut text = String::new();
    let vcpus = if report.vcpus == 1 {
        "1 vCPU".to_owned()
    } else {
        format!("{} vCPUs", report.vcpus)
    };
    let rounds = if report.rounds == 1 {
        "1 round".to_owned()
    } else {
        format!("{} rounds", report.rounds)
    };
    let _ = writeln!(
        text,
        "\nFault {}, {rounds}; {} guest with {vcpus} and {} MiB\n",
        report.fault, report.guest, report.memory_mib
    );
    rounds_table(&mut text, &report.per_round);
    let rows = [
        (
            "gap seen by the client, worst",
            format!("{} ms", decimals(report.gap_ms)),
        ),
        (
            "gap seen by the client, median",
            format!("{} ms", decimals(report.gap_ms_p50)),
        ),
        ("answers received", thousands(report.answers)),
        ("answers lost", thousands(report.lost_answers)),
        ("answers duplicated", thousands(report.duplicated_answers)),
        ("two active hosts", thousands(report.dual_active)),
        ("time to protected at first", optional(report.protected_ms, "ms")),
        ("time to protected again, worst", optional(report.reprotect_ms, "ms")),
        ("epochs", thousands(report.epochs)),
        ("pause of the guest, p50", optional(report.pause_us_p50, "µs")),
        ("pause of the guest, p99", optional(report.pause_us_p99, "µs")),
        (
            "request to answer, p50",
            optional(report.latency_us_p50.map(|us| us as f64), "µs"),
        ),
        (
            "request to answer, p99",
            optional(report.latency_us_p99.map(|us| us as f64), "µs"),
        ),
        ("sent over the replication link", bytes(report.sent_bytes)),
    ];
    let width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    let value_width = rows.iter().map(|(_, value)| value.chars().count()).max().unwrap_or(0);
    for (name, value) in rows {
        let _ = writeln!(text, "  {name:<width$}  {value:>value_width$}");
    }
    text.push('\n');
    for complaint in &report.complaints {
        let _ = writeln!(text, "  {}", paint(colours, "\x1b[31m", &format!("wrong: {complaint}")));
    }
    let verdict = if report.passed() {
        paint(
            colours,
            "\x1b[32m",
            "Nothing was lost: one connection, one guest, one history.",
        )
    } else {
        paint(colours, "\x1b[31m", "FAILED: what a client was told did not hold.")
    };
    let _ = writeln!(text, "  {verdict}");
    text
}

fn rounds_table(text: &mut String, rounds: &[Round]) {
    if rounds.is_empty() {
        return;
    }
    let head = [
        "round",
        "active",
        "calm gap",
        "gap",
        "gap in resync",
        "protected after",
        "lost",
        "doubled",
        "dual active",
    ];
    let mut rows = vec![head.map(str::to_owned)];
    for round in rounds {
        rows.push([
            round.round.to_string(),
            if round.active_before == round.active_after {
                round.active_before.clone()
            } else {
                format!("{} → {}", round.active_before, round.active_after)
            },
            format!("{} ms", decimals(round.calm_gap_ms)),
            format!("{} ms", decimals(round.gap_ms)),
            format!("{} ms", decimals(round.rebuild_gap_ms)),
            optional(round.reprotect_ms, "ms"),
            round.lost_answers.to_string(),
            round.duplicated_answers.to_string(),
            round.dual_active.to_string(),
        ]);
    }
    let widths: Vec<usize> = (0..head.len())
        .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
        .collect();
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:>width$}"))
            .collect();
        let _ = writeln!(text, "  {}", cells.join("  "));
    }
    text.push('\n');
}

fn paint(colours: bool, colour: &str, text: &str) -> String {
    if colours {
        format!("{colour}{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

fn optional(value: Option<f64>, unit: &str) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{} {unit}", decimals(value)))
}

/// Three significant digits, never an exponent.
fn decimals(value: f64) -> String {
    match value.abs() {
        small if small < 10.0 => format!("{value:.2}"),
        middle if middle < 100.0 => format!("{value:.1}"),
        _ => thousands(value.round() as u64),
    }
}

fn thousands(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

fn bytes(value: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let power = (value.max(1).ilog2() / 10).min(UNITS.len() as u32 - 1);
    if power == 0 {
        return format!("{value} B");
    }
    format!(
        "{} {}",
        decimals(value as f64 / f64::from(1u32 << 10).powi(power as i32)),
        UNITS[power as usize]
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(
            [0, 999, 1000, 1_234_567].map(thousands),
            ["0", "999", "1 000", "1 234 567"]
        );
        assert_eq!(
            [0.0, 1.234, 12.34, 1234.5].map(decimals),
            ["0.00", "1.23", "12.3", "1 235"]
        );
        assert_eq!(
            [0, 1023, 1024, 5 << 20].map(bytes),
            ["0 B", "1023 B", "1.00 KiB", "5.00 MiB"]
        );
    }

    #[test]
    fn the_verdict_is_in_words() {
        let mut report = Report {
            fault: "kill-host".to_owned(),
            guest: "embedded".to_owned(),
            vcpus: 2,
            per_round: vec![Round {
                round: 1,
                active_before: "h1".to_owned(),
                active_after: "h2".to_owned(),
                gap_ms: 320.4,
                ..Round::default()
            }],
            ..Report::default()
        };
        report.sum_up();
        let text = table(&report, false);
        assert!(
            text.contains("Nothing was lost") && text.contains("h1 → h2") && text.contains("320 ms"),
            "{text}"
        );
        assert!(!text.contains('\x1b'));
        report.complaints.push("3 answers lost".to_owned());
        let text = table(&report, true);
        assert!(
            text.contains("FAILED") && text.contains("3 answers lost") && text.contains('\x1b'),
            "{text}"
        );
        assert!(!text.contains("Nothing was lost"));
    }
}
