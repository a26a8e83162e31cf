// SPDX-License-Identifier: MIT OR Apache-2.0

//! Inputs that went where no other had gone, in files.

use std::collections::BTreeSet;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use fastrand::Rng;

use crate::input::Input;
use crate::kcov::Edge;

/// An input, and where it went.
#[derive(Debug)]
pub struct Entry {
    /// The input.
    pub input: Input,
    /// Where it went.
    pub edges: BTreeSet<Edge>,
    /// How long it took.
    pub took: Duration,
}

/// All of them.
#[derive(Debug, Default)]
pub struct Corpus {
    /// Those that found something new, in this order.
    pub entries: Vec<Entry>,
    /// Where any of them went.
    pub edges: BTreeSet<Edge>,
}

impl Corpus {
    /// Keeps an input if it reached code that no other did, or in any case.
    pub fn offer(
        &mut self,
        input: &Input,
        edges: BTreeSet<Edge>,
        took: Duration,
        always: bool,
    ) -> bool {
        if !always && edges.is_subset(&self.edges) {
            return false;
        }
        self.edges.extend(&edges);
        let input = input.clone();
        self.entries.push(Entry { input, edges, took });
        true
    }

    /// One of them, with a preference for fast ones. There must be one.
    pub fn choose(&self, rng: &mut Rng) -> &Input {
        let index = (0..3)
            .map(|_| rng.usize(0..self.entries.len()))
            .min_by_key(|index| self.entries[*index].took);
        &self.entries[index.unwrap_or(0)].input
    }

    /// A small set of inputs that together reach everything that any of them reaches: each time the input that
    /// adds most.
    pub fn minimal(&self) -> Vec<&Entry> {
        let mut missing = self.edges.clone();
        let mut chosen = Vec::new();
        while !missing.is_empty() {
            let gain = |entry: &&Entry| {
                let gain = entry.edges.intersection(&missing).count();
                (gain, std::cmp::Reverse(entry.input.operations.len()))
            };
            let Some(best) = self.entries.iter().max_by_key(gain) else {
                break;
            };
            missing = missing.difference(&best.edges).copied().collect();
            chosen.push(best);
        }
        chosen
    }
}

/// An input as text: one operation per line.
pub fn to_text(input: &Input) -> Result<String> {
    let lines = |values: Vec<serde_json::Result<String>>| -> Result<String> {
        let texts = values.into_iter().collect::<serde_json::Result<Vec<_>>>()?;
        Ok(texts.join(",\n    "))
    };
    Ok(format!(
        "{{\n  \"caller\": {},\n  \"memory\": [\n    {}\n  ],\n  \"operations\": [\n    {}\n  ]\n}}\n",
        serde_json::to_string(&input.caller)?,
        lines(input.memory.iter().map(serde_json::to_string).collect())?,
        lines(input.operations.iter().map(serde_json::to_string).collect())?,
    ))
}

/// Several inputs as text, as `--replay` takes each.
pub fn to_text_all(inputs: &[Input]) -> Result<String> {
    inputs.iter().map(to_text).collect()
}

/// Reads an input.
pub fn read(path: &Path) -> Result<Input> {
    let text = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is no input", path.display()))
}

/// Writes an input to a directory, under a name that its contents give.
pub fn save(directory: &Path, prefix: &str, input: &Input) -> Result<PathBuf> {
    let text = to_text(input)?;
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    let path = directory.join(format!("{prefix}{:016x}.json", hasher.finish()));
    fs::create_dir_all(directory)?;
    fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    Ok(path)
}

/// Writes inputs to a directory of their own inside of another one, by names in their order.
pub fn save_all(directory: &Path, prefix: &str, inputs: &[Input]) -> Result<PathBuf> {
    let mut hasher = DefaultHasher::new();
    to_text_all(inputs)?.hash(&mut hasher);
    let path = directory.join(format!("{prefix}{:016x}", hasher.finish()));
    fs::create_dir_all(&path)?;
    for (index, input) in inputs.iter().enumerate() {
        let file = path.join(format!("{index:02}.json"));
        fs::write(&file, to_text(input)?).with_context(|| format!("writing {}", file.display()))?;
    }
    Ok(path)
}

/// The inputs in a directory, by name.
pub fn list(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let entries = fs::read_dir(directory).with_context(|| format!("{}", directory.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutate::generate;

    #[test]
    fn text_is_json() {
        let mut rng = Rng::with_seed(3);
        for input in [Input::default(), generate(&mut rng), generate(&mut rng)] {
            let text = to_text(&input).unwrap();
            assert_eq!(serde_json::from_str::<Input>(&text).unwrap(), input);
        }
    }

    #[test]
    fn what_adds_nothing_is_left_out() {
        let mut corpus = Corpus::default();
        let offer = |corpus: &mut Corpus, edges| {
            corpus.offer(&Input::default(), edges, Duration::ZERO, false)
        };
        assert!(offer(&mut corpus, BTreeSet::from([(0, 1)])));
        assert!(offer(&mut corpus, BTreeSet::from([(0, 2)])));
        assert!(!offer(&mut corpus, BTreeSet::from([(0, 1), (0, 2)])));
        assert!(offer(&mut corpus, BTreeSet::from([(0, 1), (0, 2), (0, 3)])));
        let minimal = corpus.minimal();
        assert_eq!(minimal.len(), 1);
        assert_eq!(minimal[0].edges.len(), 3);
    }
}
