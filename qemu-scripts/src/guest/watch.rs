// SPDX-License-Identifier: MIT OR Apache-2.0

//! Watches the kernel's log: a report of its checkers fails a run.

/// Parts of lines that only a checker, or a kernel in trouble, writes.
const COMPLAINTS: &[&str] = &[
    "BUG:",
    "WARNING:",
    "Oops",
    "KASAN:",
    "KCSAN:",
    "KFENCE:",
    "KMSAN:",
    "UBSAN:",
    "ODEBUG:",
    "DMA-API:",
    "kernel BUG at",
    "Kernel panic",
    "general protection fault",
    "unable to handle",
    "possible circular locking",
    "possible recursive locking",
    "inconsistent lock state",
    "suspicious RCU usage",
    "bad unlock balance",
    "held lock freed",
    "lock held when returning to user space",
    "sleeping function called",
    "scheduling while atomic",
    "new suspected memory leaks",
    "unreferenced object",
    "refcount_t:",
    "rcu_sched self-detected stall",
    "detected stall",
    "detected expedited stall",
    "page_table_check",
    "blocked for more than",
    "soft lockup",
    "hard LOCKUP",
    "list_add corruption",
    "list_del corruption",
    "Bad page",
    "bad pgd",
    "bad p4d",
    "bad pud",
    "bad pmd",
    "bad: scheduling",
    "Bad rss-counter",
    "non-zero pgtables_bytes",
    "Memory exposure attempt",
    "Memory overwrite attempt",
    "stack-protector:",
    "rust_kernel: panicked",
    "Slab corruption",
    "Object already free",
    "Poison overwritten",
    "Objects remaining",
    "still has objects",
];

/// What is allowed, with the reasons.
const ALLOWED: &str = include_str!("../../allowed-splats.txt");

/// The reports in a kernel's log.
pub fn complaints(log: &str) -> Vec<String> {
    let allowed = entries(ALLOWED);
    log.lines()
        .filter(|line| COMPLAINTS.iter().any(|complaint| line.contains(complaint)))
        .filter(|line| !allowed.iter().any(|pattern| matches(pattern, line)))
        .map(str::to_owned)
        .collect()
}

/// The entries of a list of exceptions: lines that are neither empty nor remarks.
pub fn entries(list: &str) -> Vec<&str> {
    list.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .collect()
}

/// Whether a line contains the pattern; `*` in it stands for anything.
pub fn matches(pattern: &str, line: &str) -> bool {
    let mut rest = line;
    pattern.split('*').all(|part| match rest.find(part) {
        Some(start) => {
            rest = &rest[start + part.len()..];
            true
        }
        None => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkers_are_heard() {
        let log = "[    1.0] all is well\n\
                   [    2.0] WARNING: CPU: 0 PID: 1 at mm/gup.c:1 foo\n\
                   [    3.0] BUG: KASAN: slab-use-after-free in bar\n\
                   [    4.0] kmemleak: 1 new suspected memory leaks (see /sys/kernel/debug)\n\
                   [    5.0] WARNING: possible circular locking dependency detected\n\
                   [    6.0] mm/pgtable-generic.c:42: bad pud 00000000c0ffee(80000001400008e7)\n";
        assert_eq!(complaints(log).len(), 5);
    }

    #[test]
    fn patterns() {
        assert!(matches("at a.c:* in b", "WARNING: at a.c:17 in b"));
        assert!(!matches("at a.c:* in b", "WARNING: at a.c:17 in c"));
        assert!(!matches("b * a", "a then b"));
    }

    #[test]
    fn every_exception_has_a_reason() {
        let mut reason = false;
        for line in ALLOWED.lines() {
            match line.trim() {
                "" => reason = false,
                remark if remark.starts_with('#') => reason = true,
                entry => assert!(reason, "no reason is given for: {entry}"),
            }
        }
    }
}
