// SPDX-License-Identifier: MIT OR Apache-2.0

//! Comparing two runs.

use crate::run::Outcome;

/// The differences that are meant: names (or their beginnings, with `*`), and why.
pub const INTENDED: &[(&str, Difference, &str)] = &[
    (
        "limit/*",
        Difference::OnlyFirstRefuses,
        "udmabuf's list_limit and size_limit_mb; pinbuf has the memlock limit instead",
    ),
    (
        "buffer/sync-end-first",
        Difference::OnlyFirstRefuses,
        "udmabuf demands a START before the first END; pinbuf, as dma-heaps, does not",
    ),
    (
        "late/*",
        Difference::OnlySecondWaits,
        "udmabuf fills pages that userfaultfd has yet to deliver with zeroes; pinbuf waits for them",
    ),
];

/// In which way two runs may differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// udmabuf says EINVAL, the shim succeeds and all that was seen is as it should be.
    OnlyFirstRefuses,
    /// Both succeed; on udmabuf something that was seen is wrong, under the shim all is right.
    OnlySecondWaits,
}

fn intended(name: &str) -> Option<&'static (&'static str, Difference, &'static str)> {
    INTENDED
        .iter()
        .find(|(pattern, ..)| match pattern.strip_suffix('*') {
            Some(start) => name.starts_with(start),
            None => *pattern == name,
        })
}

/// A case that is worse than on udmabuf is a failure.
fn must_differ(name: &str) -> bool {
    intended(name).is_some_and(|(_, difference, _)| *difference == Difference::OnlySecondWaits)
}

fn is_intended(first: &Outcome, second: &Outcome) -> Option<&'static str> {
    let (_, difference, why) = intended(&first.name)?;
    let fine = |outcome: &Outcome| {
        outcome.ret != "-1"
            && outcome.ret != "crash"
            && outcome.facts.values().all(|value| value != "false")
    };
    let expected = match difference {
        Difference::OnlyFirstRefuses => first.ret == "-1" && first.errno == "EINVAL",
        Difference::OnlySecondWaits => first.ret == second.ret && !fine(first),
    };
    (expected && fine(second)).then_some(*why)
}

/// Compares, prints the differences in KTAP, and returns whether all of them are intended.
pub fn compare(first: &[Outcome], second: &[Outcome]) -> bool {
    let mut same = 0;
    let mut meant = 0;
    let mut skipped = 0;
    let mut wrong = 0;
    for one in first {
        let Some(other) = second.iter().find(|other| other.name == one.name) else {
            println!("not ok {}: only in the first run", one.name);
            wrong += 1;
            continue;
        };
        if let Some(why) = one.skipped.as_ref().or(other.skipped.as_ref()) {
            println!("# {}: skipped: {why}", one.name);
            skipped += 1;
        } else if one == other && !must_differ(&one.name) {
            same += 1;
        } else if let Some(why) = is_intended(one, other) {
            println!(
                "# {}: {}, then {}; intended: {why}",
                one.name,
                text(one),
                text(other)
            );
            meant += 1;
        } else {
            println!("not ok {}: {}, then {}", one.name, text(one), text(other));
            wrong += 1;
        }
    }
    for other in second {
        if !first.iter().any(|one| one.name == other.name) {
            println!("not ok {}: only in the second run", other.name);
            wrong += 1;
        }
    }
    println!("# {same} equal, {meant} differ as intended, {skipped} skipped, {wrong} differ");
    wrong == 0 && same > 0
}

fn text(outcome: &Outcome) -> String {
    let mut text = outcome.ret.clone();
    if !outcome.errno.is_empty() {
        text.push(' ');
        text.push_str(&outcome.errno);
    }
    for (name, value) in &outcome.facts {
        text.push_str(&format!(" {name}={value}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(name: &str, ret: &str, errno: &str) -> Outcome {
        Outcome {
            name: name.to_owned(),
            ret: ret.to_owned(),
            errno: errno.to_owned(),
            ..Outcome::default()
        }
    }

    #[test]
    fn equal_is_equal() {
        let runs = [outcome("a", "fd", ""), outcome("b", "-1", "EINVAL")];
        assert!(compare(&runs, &runs));
        assert!(!compare(&runs, &runs[..1]));
        assert!(!compare(&runs[..1], &runs));
        assert!(!compare(&[], &[]));
    }

    #[test]
    fn only_some_may_differ_and_in_one_way() {
        let equal = outcome("a", "fd", "");
        let einval = outcome("limit/x", "-1", "EINVAL");
        let success = outcome("limit/x", "fd", "");
        let enomem = outcome("limit/x", "-1", "ENOMEM");
        assert!(compare(
            &[equal.clone(), einval.clone()],
            &[equal.clone(), success.clone()]
        ));
        assert!(!compare(
            &[equal.clone(), success.clone()],
            &[equal.clone(), einval.clone()]
        ));
        assert!(!compare(
            &[equal.clone(), einval.clone()],
            &[equal.clone(), enomem]
        ));
        let mut late = outcome("late/x", "fd", "");
        late.fact("contents", true);
        let mut zeroes = outcome("late/x", "fd", "");
        zeroes.fact("contents", false);
        let (late, zeroes) = ([equal.clone(), late], [equal.clone(), zeroes]);
        assert!(compare(&zeroes, &late));
        assert!(!compare(&late, &zeroes));
        assert!(!compare(&zeroes, &zeroes));
        let other = [outcome("b", "-1", "EINVAL"), equal.clone()];
        assert!(!compare(&other, &[outcome("b", "fd", ""), equal]));
    }
}
