use serde_json::json;

use super::*;
use crate::testing::{HALTED, PROTECTED, RESYNCING, now, of, seen};

fn fleet() -> Vec<Seen> {
    vec![
        seen("web", PROTECTED),
        seen("joins", RESYNCING),
        seen("off", HALTED),
        seen("new", ""),
    ]
}

#[test]
fn a_fleet_is_a_line_for_each() {
    let expected = "\
NAME   PHASE    PROTECTED  ACTIVE  STANDBY  TERM  FAILOVER  AGE  NOTE
web    Running  yes        n1      n2       7     2h        24h
joins  Running  no         n1               8               24h  Resyncing: a seat is being brought up to date: 42 %
off    Halted   -                           9               24h
new    ?        ?                                           24h  the operator has not looked at the VM yet; if that lasts: does it run, and has it a leader?
";
    assert_eq!(render(&fleet(), false, now(), Paper::default()), expected);
}

#[test]
fn a_narrow_terminal_cuts_notes_and_nothing_else() {
    let paper = Paper {
        width: Some(100),
        ..Paper::default()
    };
    let expected = "\
NAMESPACE  NAME   PHASE    PROTECTED  ACTIVE  STANDBY  TERM  FAILOVER  AGE  NOTE
shop       web    Running  yes        n1      n2       7     2h        24h
shop       joins  Running  no         n1               8               24h  Resyncing: a seat is be…
shop       off    Halted   -                           9               24h
shop       new    ?        ?                                           24h  the operator has not lo…
";
    assert_eq!(render(&fleet(), true, now(), paper), expected);
}

/// Of paths that nobody named nobody has to do anything about; one that is down is somebody's business.
#[test]
fn what_is_not_known_is_no_trouble() {
    let told_of = |status: &str, reason: &str| {
        let condition = format!(
            "- {{type: NetworksRedundant, status: '{status}', reason: {reason}, message: a cable, lastTransitionTime: '2026-01-02T03:04:05Z'}}"
        );
        note(&seen("web", &format!("{PROTECTED}{condition}\n")))
    };
    assert_eq!(told_of("Unknown", "NotConfigured"), "");
    assert_eq!(told_of("Unknown", "NotKnown"), "");
    assert_eq!(told_of("False", "PathDown"), "PathDown: a cable");
}

#[test]
fn a_vm_of_another_release_is_told_beside_the_others() {
    let mut strange = seen("strange", PROTECTED).object;
    strange["status"]["phase"] = json!("Dreaming");
    let text = render(&[of(strange), seen("web", PROTECTED)], false, now(), Paper::default());
    let lines: Vec<&str> = text.lines().collect();
    assert!(
        lines[1].starts_with("strange ")
            && lines[1].contains("this release can't read it (status.phase: unknown variant `Dreaming`"),
        "{text}"
    );
    assert!(lines[2].starts_with("web      Running  yes"), "{text}");
}

#[test]
fn hostile_objects_write_into_their_line_alone() {
    let mut hostile = seen("web", RESYNCING).object;
    hostile["status"]["active"] = json!("n1\u{1b}[2J\r\nfine  Running  yes");
    hostile["status"]["conditions"][1]["message"] = json!("\u{9b}2K\u{202e}all is well\u{7}");
    hostile["metadata"]["name"] = json!("a\nb");
    let text = render(&[of(hostile)], false, now(), Paper::default());
    assert_eq!(text.lines().count(), 2, "{text}");
    let harmless = |character: char| character == '\n' || crate::text::is_plain(character);
    assert!(text.chars().all(harmless), "{text}");
    assert!(
        text.contains("a\\nb") && text.contains("n1\\u{1b}[2J\\r\\nfine"),
        "{text}"
    );
    assert!(
        text.contains("Resyncing: \\u{9b}2K\\u{202e}all is well\\u{7}"),
        "{text}"
    );
}

#[test]
fn tones_say_what_matters() {
    let cells = row(&seen("joins", RESYNCING), false, now());
    assert_eq!(cells[1], Cell::toned("Running", Tone::Good));
    assert_eq!(cells[2], Cell::toned("no", Tone::Bad));
    assert_eq!(row(&seen("off", HALTED), false, now())[2], Cell::new("-"));
}

#[test]
fn one_that_is_gone_says_nothing_else() {
    let cells = gone(&seen("web", PROTECTED), true, now());
    assert_eq!(
        cells,
        [Cell::new("shop"), Cell::new("web"), Cell::toned("gone", Tone::Bad)]
    );
}

#[test]
fn storage_that_fails_is_told_of_a_protected_vm() {
    let fails = "- {type: StorageHealthy, status: 'False', reason: DiskFailed, message: disk root of seat web-x7k2q fails, lastTransitionTime: '2026-01-02T05:04:05Z'}";
    let text = render(
        &[seen("web", &format!("{}{fails}\n", PROTECTED.trim_start()))],
        false,
        now(),
        Paper::default(),
    );
    assert!(
        text.ends_with("DiskFailed: disk root of seat web-x7k2q fails\n"),
        "{text}"
    );
}
