// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory of the kernel's that nobody refers to any more, after all that went before.

use std::time::Duration;

use anyhow::{Context, Result};

use pinbuf_test_harness::support::{check, kernel};
use pinbuf_test_harness::tests;

tests! { "leaks":
    kmemleak within 600,
}

/// kmemleak's file: what is written there is a command, what is read its findings.
const KMEMLEAK: &str = "/sys/kernel/debug/kmemleak";
/// kmemleak does not suspect what is younger than five seconds.
const AGE: Duration = Duration::from_secs(6);

fn kmemleak() -> Result<()> {
    std::thread::sleep(AGE);
    // What a register or a stale stack frame still refers to during one scan is found by the next.
    for _ in 0..2 {
        kernel::write(KMEMLEAK, "scan")
            .context("kmemleak has switched itself off, or is missing")?;
    }
    let found = kernel::read(KMEMLEAK)?;
    check!(found.is_empty(), "kmemleak found\n{found}");
    Ok(())
}
