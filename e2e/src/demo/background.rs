//! A program that somebody waits for while the play goes on.
use std::process::Child;

use anyhow::Context;

/// At most one at a time; dropping it kills what runs.
#[derive(Debug)]
pub struct Background {
    name: &'static str,
    process: Option<Child>,
}

impl Background {
    /// Nothing runs yet. `name` is for messages.
    pub fn new(name: &'static str) -> Self {
        Self { name, process: None }
    }

    /// It runs; its standard error must be piped.
    pub fn began(&mut self, process: Child) {
        self.process = Some(process);
    }

    /// What it complained of, if it ended with an error since it was asked last.
    pub fn trouble(&mut self) -> Option<String> {
        self.process.as_mut()?.try_wait().ok()??;
        self.finish().ok()?
    }

    /// Waits for its end; returns what it complained of, if it ended with an error.
    ///
    /// # Errors
    /// If it can't be waited for.
    pub fn finish(&mut self) -> anyhow::Result<Option<String>> {
        let Some(process) = self.process.take() else {
            return Ok(None);
        };
        let waiting = || format!("waiting for {}", self.name);
        let output = process.wait_with_output().with_context(waiting)?;
        let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Ok((!output.status.success()).then(|| format!("{} ({}): {text}", self.name, output.status)))
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            // It may have ended by itself.
            process.kill().ok();
            process.wait().ok();
        }
    }
}
