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
        "late/unseen-*",
        Difference::OnlySecondRefuses,
        "udmabuf fills pages that userfaultfd has yet to deliver with zeroes; the shim cannot wait for them, and refuses",
    ),
    (
        "markers/poison-*",
        Difference::OnlySecondRefuses,
        "udmabuf takes the file's page; the shim cannot know that nobody will supply it, and refuses",
    ),
    (
        "late/*",
        Difference::OnlySecondWaits,
        "udmabuf fills pages that userfaultfd has yet to deliver with zeroes; pinbuf waits for them",
    ),
];

/// The same for the supervisor, where it differs from the shim.
pub const SUPERVISOR: &[(&str, Difference, &str)] = &[
    (
        "late/unseen-user-mode-*",
        Difference::OnlySecondRefuses,
        "the kernel's own accesses are refused such pages",
    ),
    (
        "late/unseen-sigbus-*",
        Difference::OnlySecondRefuses,
        "the kernel's own accesses are refused such pages",
    ),
    (
        "late/unseen-*",
        Difference::OnlySecondWaits,
        "the supervisor knows the program's mappings in these cases, and waits",
    ),
    (
        "markers/poison-4k",
        Difference::None,
        "the supervisor sees such a marker, and takes the file's page",
    ),
    (
        "late/4k-protected",
        Difference::None,
        "as on udmabuf, a write by the device is no fault of the program's; the shim has the first one reported",
    ),
    (
        "late/2m-protected",
        Difference::None,
        "as on udmabuf, a write by the device is no fault of the program's; the shim has the first one reported",
    ),
];

/// Cases that are not run under the supervisor, and why.
const LEFT_OUT: &[(&str, &str)] = &[
    (
        "no-pinbuf/",
        "these take pinbuf's device away from the program, and the supervisor has its own",
    ),
    (
        "markers/poison-2m",
        "/proc does not show such markers of hugetlb: the page is taken for one that is late, and the call is ENOMEM",
    ),
];

/// Why a case is not run under the supervisor.
pub fn left_out(name: &str) -> Option<&'static str> {
    let found = LEFT_OUT.iter().find(|(start, _)| name.starts_with(start));
    found.map(|(_, why)| *why)
}

/// In which way two runs may differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// udmabuf says EINVAL, the shim succeeds and all that was seen is as it should be.
    OnlyFirstRefuses,
    /// Not at all.
    None,
    /// udmabuf makes a buffer, the second says ENOMEM and all that was seen then is as it should be.
    OnlySecondRefuses,
    /// Both succeed; on udmabuf something that was seen is wrong, under the shim all is right.
    OnlySecondWaits,
}

/// Who made a buffer in the second run, if it was not pinbuf: a call that is left to the kernel has the same outcome.
fn made_by_another(outcome: &Outcome) -> Option<&str> {
    let maker = outcome.made_by.as_deref()?;
    (maker != "pinbuf" && !outcome.name.starts_with("no-pinbuf/")).then_some(maker)
}

/// The outcome without the maker's name.
fn anonymous(outcome: &Outcome) -> Outcome {
    Outcome {
        made_by: None,
        ..outcome.clone()
    }
}

type Intended = &'static (&'static str, Difference, &'static str);

fn intended(name: &str, supervisor: bool) -> Option<Intended> {
    let own = if supervisor { SUPERVISOR } else { &[] };
    own.iter()
        .chain(INTENDED)
        .find(|(pattern, ..)| match pattern.strip_suffix('*') {
            Some(start) => name.starts_with(start),
            None => *pattern == name,
        })
}

/// A case that is worse than on udmabuf is a failure.
fn must_differ(intended: Option<Intended>) -> bool {
    use Difference::{OnlySecondRefuses, OnlySecondWaits};
    intended
        .is_some_and(|(_, difference, _)| matches!(difference, OnlySecondWaits | OnlySecondRefuses))
}

fn is_intended(
    intended: Option<Intended>,
    first: &Outcome,
    second: &Outcome,
) -> Option<&'static str> {
    let (_, difference, why) = intended?;
    let right = |outcome: &Outcome| outcome.facts.values().all(|value| value != "false");
    let fine = |outcome: &Outcome| outcome.ret != "-1" && outcome.ret != "crash" && right(outcome);
    let expected = match difference {
        Difference::OnlyFirstRefuses => {
            first.ret == "-1" && first.errno == "EINVAL" && fine(second)
        }
        Difference::OnlySecondRefuses => {
            first.ret == "fd" && second.errno == "ENOMEM" && right(second)
        }
        Difference::OnlySecondWaits => first.ret == second.ret && !fine(first) && fine(second),
        Difference::None => false,
    };
    expected.then_some(*why)
}

/// Compares, prints the differences in KTAP, and returns whether all of them are intended.
pub fn compare(first: &[Outcome], second: &[Outcome], supervisor: bool) -> bool {
    let mut same = 0;
    let mut meant = 0;
    let mut skipped = 0;
    let mut wrong = 0;
    for one in first {
        if let Some(why) = left_out(&one.name).filter(|_| supervisor) {
            println!("# {}: left out: {why}", one.name);
            skipped += 1;
            continue;
        }
        let Some(other) = second.iter().find(|other| other.name == one.name) else {
            println!("not ok {}: only in the first run", one.name);
            wrong += 1;
            continue;
        };
        let intended = intended(&one.name, supervisor);
        if let Some(maker) = made_by_another(other) {
            println!("not ok {}: made by {maker}, and not by pinbuf", one.name);
            wrong += 1;
            continue;
        }
        let (one, other) = (&anonymous(one), &anonymous(other));
        if let Some(why) = one.skipped.as_ref().or(other.skipped.as_ref()) {
            println!("# {}: skipped: {why}", one.name);
            skipped += 1;
        } else if one == other && !must_differ(intended) {
            same += 1;
        } else if let Some(why) = is_intended(intended, one, other) {
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

    fn compare(first: &[Outcome], second: &[Outcome]) -> bool {
        super::compare(first, second, false)
    }

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
    fn the_second_run_has_to_be_pinbufs() {
        let by = |name: &str, maker: &str| Outcome {
            made_by: Some(maker.to_owned()),
            ..outcome(name, "fd", "")
        };
        let first = [by("a", "udmabuf"), by("no-pinbuf/b", "udmabuf")];
        assert!(compare(
            &first,
            &[by("a", "pinbuf"), by("no-pinbuf/b", "udmabuf")]
        ));
        assert!(!compare(&first, &first));
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
        let [mut filled, mut refused] =
            [("fd", ""), ("-1", "ENOMEM")].map(|(ret, errno)| outcome("late/unseen-x", ret, errno));
        filled.fact("none was filled", false);
        refused.fact("none was filled", true);
        let wrong = Outcome {
            facts: filled.facts.clone(),
            ..refused.clone()
        };
        let runs = [filled, refused, wrong].map(|run| [equal.clone(), run]);
        let [filled, refused, wrong] = &runs;
        assert!(compare(filled, refused));
        assert!(!compare(filled, filled) && !compare(refused, refused));
        assert!(!compare(filled, wrong) && !compare(refused, filled));
        let other = [outcome("b", "-1", "EINVAL"), equal.clone()];
        assert!(!compare(&other, &[outcome("b", "fd", ""), equal]));
    }

    #[test]
    fn the_supervisors_differences_are_its_own() {
        let equal = outcome("a", "fd", "");
        let mut protected = outcome("late/4k-protected", "fd", "");
        protected.fact("waited", false);
        let own = outcome("no-pinbuf/x", "fd", "");
        let first = [equal.clone(), protected.clone(), own];
        let second = [equal, protected];
        assert!(super::compare(&first, &second, true));
        assert!(!super::compare(&first, &second, false));
    }
}
