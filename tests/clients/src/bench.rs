// SPDX-License-Identifier: MIT OR Apache-2.0

//! `pinbuf bench`: each way is measured as what it is called. (What the numbers are is not tested.)

use anyhow::{ensure, Context, Result};
use pinbuf_test_harness::support::kernel::HugePool;
use pinbuf_test_harness::tests;
use serde_json::Value;

use crate::process::{no_udmabuf, Start};

tests!("bench":
    measures_each_way within 180,
    refuses_what_is_nothing,
);

/// What each kind of memory is measured by, where the kernel has no udmabuf.
const SIDES: [(&str, &[&str]); 7] = [
    ("anonymous", &["pinbuf"]),
    ("anonymous-thp", &["pinbuf"]),
    ("hugetlb", &["pinbuf"]),
    ("memfd", &["pinbuf", "shim", "supervisor"]),
    ("memfd-unmapped", &["shim", "supervisor"]),
    ("memfd-hugetlb", &["pinbuf", "shim", "supervisor"]),
    ("memfd-hugetlb-unmapped", &["shim", "supervisor"]),
];

fn measures_each_way() -> Result<()> {
    no_udmabuf()?;
    let _pool = HugePool::with_free(4)?;
    let words = ["pinbuf", "bench", "--size", "4", "--repeat", "2", "--json"];
    let end = Start::program(&words).end()?;
    ensure!(end.status == Some(0), "{end:?}");
    let report: Value = serde_json::from_str(&end.out)?;
    let rows = report["rows"].as_array().context("no rows")?;
    ensure!(rows.len() == SIDES.len(), "{report:#}");
    for (row, (memory, sides)) in rows.iter().zip(SIDES) {
        ensure!(row["memory"] == memory, "{row:#}");
        let medians = row["medians"].as_object().context("no medians")?;
        let found: Vec<&str> = medians.keys().map(String::as_str).collect();
        ensure!(found == sides, "{row:#}");
        for times in medians.values() {
            for name in ["create", "touch", "unmap", "close"] {
                let time = times[name].as_f64().context("no time")?;
                ensure!(time > 0.0 && time < 60e6, "{name}: {row:#}");
            }
        }
        // Only udmabuf is missing.
        let missing = row["missing"].as_object().context("nothing is missing")?;
        let missing: Vec<&str> = missing.keys().map(String::as_str).collect();
        let wanted = memory.starts_with("memfd").then_some("udmabuf");
        ensure!(missing == wanted.as_slice(), "{row:#}");
        let both = &row["shim_and_native_create"];
        let mapped = memory == "memfd" || memory == "memfd-hugetlb";
        ensure!(both.is_array() == mapped, "{row:#}");
    }
    Ok(())
}

fn refuses_what_is_nothing() -> Result<()> {
    for (option, value) in [("--size", "0"), ("--repeat", "0")] {
        let end = Start::program(&["pinbuf", "bench", option, value]).end()?;
        ensure!(
            end.status == Some(125) && end.err.contains("greater than zero"),
            "{end:?}"
        );
    }
    Ok(())
}
