//! Lines that tell what is going on, with the time since the start. No cursor movements: they read the same in a log.
use std::io::{IsTerminal, Write};
use std::time::Instant;

/// Prints progress. Colours are used on a terminal only, and not where `NO_COLOR` is set.
#[derive(Clone, Debug)]
pub struct Progress {
    start: Instant,
    colours: bool,
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

impl Progress {
    /// Starts the clock.
    pub fn new() -> Self {
        let plain = std::env::var_os("NO_COLOR").is_some() || std::env::var("TERM").is_ok_and(|term| term == "dumb");
        Self {
            start: Instant::now(),
            colours: !plain && std::io::stdout().is_terminal(),
        }
    }

    /// Whether colours may be used.
    pub fn colours(&self) -> bool {
        self.colours
    }

    /// Something went as it should.
    pub fn say(&self, text: impl AsRef<str>) {
        self.line("", text.as_ref());
    }

    /// Something was done to the system on purpose.
    pub fn strike(&self, text: impl AsRef<str>) {
        self.line("\x1b[33m", text.as_ref());
    }

    /// Something good.
    pub fn good(&self, text: impl AsRef<str>) {
        self.line("\x1b[32m", text.as_ref());
    }

    /// Something that must not be.
    pub fn bad(&self, text: impl AsRef<str>) {
        self.line("\x1b[31m", text.as_ref());
    }

    fn line(&self, colour: &str, text: &str) {
        let seconds = self.start.elapsed().as_secs_f64();
        let mut out = std::io::stdout().lock();
        // Whoever closed our output does not want to read on; the exit code still tells.
        let _ = if self.colours && !colour.is_empty() {
            writeln!(out, "[{seconds:7.1} s] {colour}{text}\x1b[0m")
        } else {
            writeln!(out, "[{seconds:7.1} s] {text}")
        };
        let _ = out.flush();
    }
}
