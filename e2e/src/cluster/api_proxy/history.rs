//! What was true before: states of objects, and which version was the newest when.
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Instant;

use super::Dice;
use super::serve::Passed;

/// States of one object that are kept for stale answers.
const KEPT_MAX: usize = 32;
/// Newest versions that are kept, with their times.
const VERSIONS_MAX: usize = 4096;

/// What objects were, as the API server itself told: by path and version.
pub(super) struct History {
    states: HashMap<String, BTreeMap<u64, Passed>>,
    /// When a version was first told of. One counter counts for all resources: the store's revision.
    versions: VecDeque<(Instant, u64)>,
    /// Until when nothing is told to watches that begin at an old state of a path.
    lags: HashMap<(String, u64), Instant>,
    dice: Dice,
}

impl Default for History {
    fn default() -> Self {
        Self {
            states: HashMap::new(),
            versions: VecDeque::new(),
            lags: HashMap::new(),
            dice: Dice::new(0x5eed),
        }
    }
}

impl History {
    /// The API server told of this version.
    pub(super) fn note(&mut self, version: u64) {
        self.note_at(Instant::now(), version);
    }

    pub(super) fn note_at(&mut self, time: Instant, version: u64) {
        if self.versions.back().is_none_or(|(_, newest)| *newest < version) {
            self.versions.push_back((time, version));
        }
        if self.versions.len() > VERSIONS_MAX {
            self.versions.pop_front();
        }
    }

    /// The newest version at this time, as far as anybody was told.
    pub(super) fn version_at(&self, time: Option<Instant>) -> Option<u64> {
        let known = self.versions.iter().rev().find(|(when, _)| Some(*when) <= time);
        known.map(|(_, version)| *version)
    }

    /// A list of this path was told in an old version; whoever watches from there hears nothing until then.
    pub(super) fn lag(&mut self, path: String, version: u64, until: Instant) {
        self.lags.insert((path, version), until);
    }

    pub(super) fn lags(&self, path: &str, version: u64) -> Option<Instant> {
        self.lags.get(&(path.to_owned(), version)).copied()
    }

    pub(super) fn remember(&mut self, path: &str, version: u64, state: &Passed) {
        let states = self.states.entry(path.to_owned()).or_default();
        states.insert(version, state.clone());
        if states.len() > KEPT_MAX {
            states.pop_first();
        }
    }

    /// One of the states before this version.
    pub(super) fn before(&mut self, path: &str, version: u64) -> Option<Passed> {
        let older: Vec<&Passed> = self
            .states
            .get(path)?
            .range(..version)
            .map(|(_, state)| state)
            .collect();
        (!older.is_empty()).then(|| self.dice.pick(&older).clone())
    }

    pub(super) fn at(&self, path: &str, version: u64) -> Option<Passed> {
        self.states.get(path)?.get(&version).cloned()
    }
}
