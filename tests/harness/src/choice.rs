// SPDX-License-Identifier: MIT OR Apache-2.0

//! The options that all test programs have: which subtests to run.

use std::process::ExitCode;

use anyhow::{bail, Result};

use crate::runner::{report, Test};

/// Which subtests to run.
#[derive(Debug, clap::Args)]
pub struct Choice {
    /// Run only these themes: the part of a name before its dot
    pub themes: Vec<String>,

    /// Run only subtests whose name contains one of these
    #[arg(long, value_name = "SUBSTR")]
    filter: Vec<String>,

    /// Leave out subtests whose name contains this
    #[arg(long, value_name = "SUBSTR")]
    without: Vec<String>,

    /// Print the names of the subtests and do nothing
    #[arg(long)]
    list: bool,

    /// Do not check what a subtest left behind
    #[arg(long)]
    no_leak_checks: bool,
}

impl Choice {
    /// Those of all subtests that are to run. Prints their names and returns `None` if that is all that is asked
    /// for.
    pub fn of<'a>(
        &self,
        all: impl Iterator<Item = &'a Test> + Clone,
    ) -> Result<Option<Vec<&'a Test>>> {
        for theme in &self.themes {
            if !all.clone().any(|test| test.theme() == theme) {
                bail!("there is no theme `{theme}`");
            }
        }
        let chosen: Vec<&Test> = all.filter(|test| self.wants(test)).collect();
        if self.list {
            for test in chosen {
                println!("{}", test.name);
            }
            return Ok(None);
        }
        Ok(Some(chosen))
    }

    fn wants(&self, test: &Test) -> bool {
        let named = |parts: &[String]| parts.iter().any(|part| test.name.contains(part));
        (self.themes.is_empty() || self.themes.iter().any(|theme| theme == test.theme()))
            && (self.filter.is_empty() || named(&self.filter))
            && !named(&self.without)
    }

    /// Runs subtests one after the other, and reports in KTAP on standard output.
    pub fn report(&self, tests: &[&Test]) -> Result<ExitCode> {
        report(tests, !self.no_leak_checks)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Options {
        #[command(flatten)]
        choice: Choice,
    }

    fn chosen(words: &[&str]) -> Result<Vec<&'static str>> {
        const fn named(name: &'static str) -> Test {
            Test {
                name,
                run: || Ok(()),
                timeout: std::time::Duration::ZERO,
                allowed: &[],
            }
        }
        static ALL: [Test; 3] = [
            named("create.order"),
            named("create.sizes"),
            named("mmap.order"),
        ];
        let options = Options::parse_from([&["program"], words].concat());
        let chosen = options.choice.of(ALL.iter())?.unwrap_or_default();
        Ok(chosen.iter().map(|test| test.name).collect())
    }

    #[test]
    fn subtests_are_chosen_by_theme_and_name() {
        let all = ["create.order", "create.sizes", "mmap.order"];
        assert_eq!(chosen(&[]).unwrap(), all);
        assert_eq!(chosen(&["create"]).unwrap(), all[..2]);
        assert_eq!(
            chosen(&["--filter", "order", "--filter", "x"]).unwrap(),
            [all[0], all[2]]
        );
        assert_eq!(chosen(&["mmap", "--filter", "order"]).unwrap(), all[2..]);
        assert_eq!(chosen(&["--without", "order"]).unwrap(), all[1..2]);
        assert!(chosen(&["--list"]).unwrap().is_empty());
        assert!(chosen(&["creat"]).is_err());
    }
}
