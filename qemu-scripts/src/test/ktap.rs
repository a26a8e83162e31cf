// SPDX-License-Identifier: MIT OR Apache-2.0

//! Reads KTAP, the kernel's test protocol.

/// How many lines before a failure are kept.
const DIAGNOSTICS: usize = 60;

/// What a test program reported.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Names of tests that passed.
    pub passed: Vec<String>,
    /// Tests that failed, with the lines that came before the result.
    pub failed: Vec<(String, Vec<String>)>,
    /// Tests that were skipped, with the reasons.
    pub skipped: Vec<(String, String)>,
    /// What is wrong with the report itself.
    pub problems: Vec<String>,
}

/// Results at one depth of nesting.
struct Level {
    indent: usize,
    plan: Option<usize>,
    results: usize,
    failures: usize,
}

impl Level {
    fn new(indent: usize) -> Self {
        Self {
            indent,
            plan: None,
            results: 0,
            failures: 0,
        }
    }

    /// The level is complete: as many results as its plan said?
    fn check(&self, problems: &mut Vec<String>) {
        match self.plan {
            None if self.results > 0 || self.indent == 0 => {
                problems.push("there is no plan line".to_owned());
            }
            Some(plan) if plan != self.results => {
                problems.push(format!(
                    "{plan} results were planned, {} were reported",
                    self.results
                ));
            }
            _ => {}
        }
    }
}

/// Reads a program's output.
pub fn parse(text: &str) -> Report {
    let mut report = Report::default();
    let mut levels = vec![Level::new(0)];
    let mut diagnostics: Vec<String> = Vec::new();
    let mut subtest = None;
    for line in text.lines() {
        let content = line.trim_start_matches(' ');
        let indent = line.len() - content.len();
        if let Some(plan) = plan(content) {
            level_at(&mut levels, indent, &mut report.problems).plan = Some(plan);
            continue;
        }
        if let Some(name) = content.strip_prefix("# Subtest: ") {
            subtest = Some(name.to_owned());
            continue;
        }
        if content.starts_with("KTAP version") || content.starts_with("TAP version") {
            continue;
        }
        if content.starts_with("Bail out!") {
            report.problems.push(content.to_owned());
        }
        let Some((good, name, directive)) = result(content) else {
            diagnostics.push(line.to_owned());
            if diagnostics.len() > DIAGNOSTICS {
                diagnostics.remove(0);
            }
            continue;
        };
        // Deeper results belong to this one: it is a group, and its tests are counted already.
        let mut group = None;
        while levels.last().is_some_and(|level| level.indent > indent) {
            if let Some(level) = levels.pop() {
                level.check(&mut report.problems);
                group = Some(level.failures);
            }
        }
        let level = level_at(&mut levels, indent, &mut report.problems);
        level.results += 1;
        level.failures += usize::from(!good);
        let name = if name.is_empty() {
            subtest.take().unwrap_or_default()
        } else {
            name.to_owned()
        };
        let lines = std::mem::take(&mut diagnostics);
        match (directive.strip_prefix("SKIP"), good, group) {
            (Some(reason), ..) => report.skipped.push((name, reason.trim().to_owned())),
            (None, true, None) => report.passed.push(name),
            (None, true, Some(0)) => {}
            (None, true, Some(_)) => {
                report
                    .problems
                    .push(format!("{name} is ok although tests in it are not"));
            }
            (None, false, None | Some(0)) => report.failed.push((name, lines)),
            (None, false, Some(_)) => {}
        }
    }
    while let Some(level) = levels.pop() {
        level.check(&mut report.problems);
        if level.indent > 0 {
            report
                .problems
                .push("the output ends inside of a group of tests".to_owned());
        }
    }
    report
}

/// The level of this indentation; deeper ones end.
fn level_at<'a>(
    levels: &'a mut Vec<Level>,
    indent: usize,
    problems: &mut Vec<String>,
) -> &'a mut Level {
    while levels.len() > 1 && levels.last().is_some_and(|level| level.indent > indent) {
        if let Some(level) = levels.pop() {
            level.check(problems);
        }
    }
    if levels.last().is_none_or(|level| level.indent < indent) {
        levels.push(Level::new(indent));
    }
    let last = levels.len() - 1;
    &mut levels[last]
}

/// `1..N`, possibly with a remark.
fn plan(line: &str) -> Option<usize> {
    line.strip_prefix("1..")?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

/// `ok N name # DIRECTIVE`.
fn result(line: &str) -> Option<(bool, &str, &str)> {
    let (good, rest) = match (line.strip_prefix("ok "), line.strip_prefix("not ok ")) {
        (Some(rest), _) => (true, rest),
        (_, Some(rest)) => (false, rest),
        _ => return None,
    };
    let (number, rest) = rest.split_once(' ').unwrap_or((rest, ""));
    number.parse::<usize>().ok()?;
    let (name, directive) = rest.split_once('#').unwrap_or((rest, ""));
    Some((good, name.trim().trim_start_matches("- "), directive.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flat() {
        let report = parse(
            "KTAP version 1\n1..3\nok 1 a\n# expected 1, seen 2\nnot ok 2 b\n\
             ok 3 - c # SKIP no huge pages\n",
        );
        assert_eq!(report.passed, ["a"]);
        assert_eq!(
            report.failed,
            [("b".to_owned(), vec!["# expected 1, seen 2".to_owned()])]
        );
        assert_eq!(
            report.skipped,
            [("c".to_owned(), "no huge pages".to_owned())]
        );
        assert!(report.problems.is_empty());
    }

    #[test]
    fn nested() {
        let report = parse(
            "KTAP version 1\n1..2\n  KTAP version 1\n  # Subtest: group\n  1..2\n  ok 1 a\n  \
             not ok 2 b\nnot ok 1 group\nok 2 alone\n",
        );
        assert_eq!(report.passed, ["a", "alone"]);
        assert_eq!(report.failed.len(), 1);
        assert_eq!(report.problems, Vec::<String>::new());
    }

    #[test]
    fn what_is_missing_is_noticed() {
        assert_eq!(parse("").problems.len(), 1);
        assert_eq!(parse("ok 1 a\n").problems.len(), 1);
        assert_eq!(parse("1..2\nok 1 a\n").problems.len(), 1);
        assert_eq!(parse("1..1\n  1..1\n  ok 1 a\n").problems.len(), 2);
        assert_eq!(
            parse("1..1\n  1..1\n  not ok 1 a\nok 1 group\n")
                .problems
                .len(),
            1
        );
        assert_eq!(parse("1..1\nBail out! no\nok 1 a\n").problems.len(), 1);
    }

    #[test]
    fn a_group_that_fails_by_itself_counts() {
        let report = parse("1..1\n  1..1\n  ok 1 a\nnot ok 1 group\n");
        assert_eq!(report.failed.len(), 1);
    }
}
