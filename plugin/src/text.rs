//! How text gets onto a terminal: made harmless, in columns, with colours only where somebody sees them.
//!
//! Invariant: what an object says reaches the output through [`plain`], as every [`Cell`] does, or through `objects`. Whoever may write an object, or make a node
//! or a pod say something, must not write to the terminal of whoever looks at it.

use std::ffi::OsStr;
use std::io::IsTerminal as _;

use k8s_openapi::jiff::Timestamp;
use rustix::termios::tcgetwinsize;

/// Between two columns.
const GAP: usize = 2;
/// The last column gets so much room, however narrow the terminal is.
const LAST_MIN: usize = 24;

/// What is written on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Paper {
    /// It has colours.
    pub colours: bool,
    /// Characters of a line; none: a line is as long as it is.
    pub width: Option<usize>,
}

impl Paper {
    /// Standard output.
    pub fn stdout() -> Paper {
        let stdout = std::io::stdout();
        let terminal = stdout.is_terminal();
        let (no_color, term) = (std::env::var_os("NO_COLOR"), std::env::var_os("TERM"));
        let size = if terminal { tcgetwinsize(&stdout).ok() } else { None };
        Paper {
            colours: wants_colours(terminal, no_color.as_deref(), term.as_deref()),
            width: size.map(|size| usize::from(size.ws_col)).filter(|width| *width > 0),
        }
    }

    fn paint(self, cell: &Cell) -> String {
        let code = match cell.tone {
            Tone::Plain => "",
            Tone::Head => "1",
            Tone::Good => "32",
            Tone::Busy => "33",
            Tone::Bad => "31",
        };
        if !self.colours || code.is_empty() || cell.text.is_empty() {
            return cell.text.clone();
        }
        format!("\u{1b}[{code}m{}\u{1b}[0m", cell.text)
    }
}

/// Colours are for terminals that have some, unless NO_COLOR is set to anything (no-color.org).
fn wants_colours(terminal: bool, no_color: Option<&OsStr>, term: Option<&OsStr>) -> bool {
    terminal && no_color.is_none_or(OsStr::is_empty) && term != Some(OsStr::new("dumb"))
}

/// Does a character show itself, and nothing else? Not those that control a terminal, end a line, turn the direction of writing, have no width, or sit on
/// the one before.
pub fn is_plain(character: char) -> bool {
    // `escape_debug` is for what can't be printed, and for what would end a literal.
    matches!(character, '\\' | '\'' | '"') || character.escape_debug().len() == 1
}

/// A text as it may be shown: what is not plain in it becomes an escape.
pub fn plain(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        if is_plain(character) {
            shown.push(character);
        } else {
            shown.extend(character.escape_debug());
        }
    }
    shown
}

/// How a cell is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    Plain,
    Head,
    Good,
    Busy,
    Bad,
}

/// One field of a table; its text is harmless.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cell {
    text: String,
    tone: Tone,
}

impl Cell {
    /// A field without a meaning of its own.
    pub fn new(text: impl AsRef<str>) -> Cell {
        Cell::toned(text, Tone::Plain)
    }

    /// A field that means something.
    pub fn toned(text: impl AsRef<str>, tone: Tone) -> Cell {
        let text = plain(text.as_ref());
        Cell { text, tone }
    }

    fn width(&self) -> usize {
        self.text.chars().count()
    }
}

/// What becomes of a last column for which there is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Last {
    /// Its end is left out.
    Cut,
    /// It goes on in the next line.
    Wrap,
}

/// Columns as wide as their widest field.
#[derive(Debug)]
pub struct Columns {
    widths: Vec<usize>,
    indent: usize,
    last: Last,
}

impl Columns {
    /// Without any row.
    pub fn new(indent: usize, last: Last) -> Columns {
        let widths = Vec::new();
        Columns { widths, indent, last }
    }

    /// Makes room for a row.
    pub fn fit(&mut self, row: &[Cell]) {
        self.widths.resize(self.widths.len().max(row.len()), 0);
        for (width, cell) in self.widths.iter_mut().zip(row) {
            *width = cell.width().max(*width);
        }
    }

    /// A row that fits.
    pub fn line(&self, row: &[Cell], paper: Paper) -> String {
        let mut line = " ".repeat(self.indent);
        let mut at = self.indent;
        let last = self.widths.len().saturating_sub(1);
        for (column, (cell, width)) in row.iter().zip(&self.widths).enumerate() {
            if column == last {
                line.push_str(&self.last_field(cell, at, paper));
            } else {
                line.push_str(&paper.paint(cell));
                line.push_str(&" ".repeat(width.saturating_sub(cell.width()) + GAP));
                at += width + GAP;
            }
        }
        format!("{}\n", line.trim_end())
    }

    fn last_field(&self, cell: &Cell, at: usize, paper: Paper) -> String {
        let Some(room) = paper.width.map(|width| width.saturating_sub(at).max(LAST_MIN)) else {
            return paper.paint(cell);
        };
        let painted = |text: String| {
            let tone = cell.tone;
            paper.paint(&Cell { text, tone })
        };
        match self.last {
            Last::Cut if cell.width() <= room => paper.paint(cell),
            Last::Cut => {
                let kept: String = cell.text.chars().take(room - 1).collect();
                painted(format!("{}…", kept.trim_end()))
            }
            Last::Wrap => {
                let lines: Vec<String> = wrapped(&cell.text, room).into_iter().map(painted).collect();
                lines.join(&format!("\n{}", " ".repeat(at)))
            }
        }
    }
}

/// Rows below each other.
pub fn table(rows: &[Vec<Cell>], indent: usize, last: Last, paper: Paper) -> String {
    let mut columns = Columns::new(indent, last);
    for row in rows {
        columns.fit(row);
    }
    rows.iter().map(|row| columns.line(row, paper)).collect()
}

/// A paragraph, indented, with a mark before its first line.
pub fn paragraph(mark: &str, text: &str, paper: Paper) -> String {
    let row = [Cell::new(mark), Cell::new(text)];
    let mut columns = Columns::new(2, Last::Wrap);
    columns.fit(&row);
    columns.line(&row, paper)
}

/// Lines of at most so many characters; a word that is longer stays whole, for it may be copied.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ').filter(|word| !word.is_empty()) {
        let line = lines.last().map_or(0, |line| line.chars().count());
        if line > 0 && line + 1 + word.chars().count() > width {
            lines.push(String::new());
        }
        if let Some(line) = lines.last_mut() {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines
}

/// How long ago something was, in one unit as kubectl has it.
pub fn age(then: Timestamp, now: Timestamp) -> String {
    let seconds = now.as_second().saturating_sub(then.as_second()).max(0);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7_200 => format!("{}m", seconds / 60),
        7_200..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(texts: &[&str]) -> Vec<Cell> {
        texts.iter().map(Cell::new).collect()
    }

    fn on(width: usize) -> Paper {
        Paper {
            width: Some(width),
            ..Paper::default()
        }
    }

    #[test]
    fn what_controls_a_terminal_or_hides_becomes_an_escape() {
        for (hostile, shown) in [
            ("a\u{1b}[2Jb", "a\\u{1b}[2Jb"),
            ("a\u{9b}31mb", "a\\u{9b}31mb"),
            ("a\r\nb\tc\0", "a\\r\\nb\\tc\\0"),
            ("\u{7f}\u{8}", "\\u{7f}\\u{8}"),
            ("\u{202e}txt\u{2066}", "\\u{202e}txt\\u{2066}"),
            ("\u{200b}\u{feff}\u{ad}\u{2028}", "\\u{200b}\\u{feff}\\u{ad}\\u{2028}"),
            ("e\u{301}\u{e0041}", "e\\u{301}\\u{e0041}"),
        ] {
            assert_eq!(plain(hostile), shown);
        }
        for harmless in ["it's \"so\" \\ [31m", "Größe 5 µs, 名前", ""] {
            assert_eq!(plain(harmless), harmless);
        }
    }

    #[test]
    fn columns_are_as_wide_as_they_must_be() {
        let rows = [row(&["NAME", "NOTE"]), row(&["a-long-name", ""]), row(&["b", "x y"])];
        assert_eq!(
            table(&rows, 0, Last::Cut, Paper::default()),
            "NAME         NOTE\na-long-name\nb            x y\n"
        );
        assert_eq!(table(&[], 0, Last::Cut, Paper::default()), "");
    }

    #[test]
    fn a_narrow_terminal_cuts_or_wraps_the_last_column_alone() {
        let rows = [row(&["name", "one two three four five six seven eight"])];
        assert_eq!(
            table(&rows, 2, Last::Cut, on(40)),
            "  name  one two three four five six sev…\n"
        );
        assert_eq!(
            table(&rows, 2, Last::Wrap, on(40)),
            "  name  one two three four five six\n        seven eight\n"
        );
        // However narrow it is, something of it is to be seen.
        let narrow = table(&rows, 2, Last::Cut, on(1));
        assert_eq!(narrow, "  name  one two three four five…\n");
        let long = format!("kubectl {}", "x".repeat(60));
        assert!(table(&[row(&["n", &long])], 0, Last::Wrap, on(40)).contains(&"x".repeat(60)));
        assert_eq!(paragraph("-", "one two", on(80)), "  -  one two\n");
    }

    #[test]
    fn colours_are_for_terminals_of_people_who_want_them() {
        let (set, empty) = (Some(OsStr::new("1")), Some(OsStr::new("")));
        assert!(wants_colours(true, None, Some(OsStr::new("xterm"))));
        assert!(wants_colours(true, empty, None));
        assert!(!wants_colours(true, set, None));
        assert!(!wants_colours(false, None, None));
        assert!(!wants_colours(true, None, Some(OsStr::new("dumb"))));
        let painted = [Cell::toned("no", Tone::Bad), Cell::new("x")];
        let colours = Paper {
            colours: true,
            width: None,
        };
        assert_eq!(
            table(&[painted.to_vec()], 0, Last::Cut, colours),
            "\u{1b}[31mno\u{1b}[0m  x\n"
        );
        assert_eq!(table(&[painted.to_vec()], 0, Last::Cut, Paper::default()), "no  x\n");
    }

    #[test]
    fn ages_have_one_unit() {
        let now = Timestamp::from_second(1_000_000).unwrap();
        for (seconds, text) in [
            (-5, "0s"),
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (7_199, "119m"),
            (7_200, "2h"),
            (172_800, "2d"),
        ] {
            let then = Timestamp::from_second(1_000_000 - seconds).unwrap();
            assert_eq!(age(then, now), text);
        }
    }
}
