// SPDX-License-Identifier: MIT OR Apache-2.0

//! `udmabuf-conformance`: a program that tests udmabuf's interface and nothing else.
//!
//! Run it on the kernel's own udmabuf, and under the shim or its supervisor, in the same guest, with `--json`; then
//! `--compare` demands that every case had the same result, except for the differences in [`compare::INTENDED`]. Each case
//! runs in its own process, so that a crash is a result like others.

mod cases;
mod compare;
#[cfg(target_arch = "x86_64")]
mod crosvm;
mod filter;
mod late;
mod mappings;
mod run;
mod sandbox;
mod stack;
mod stale;
mod udmabuf;
mod unfilled;

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;

/// Check what udmabuf promises, and print the results in KTAP.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Write each case's return value and errno to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Compare two such files, udmabuf's first, instead of running the cases.
    #[arg(long, num_args = 2, value_names = ["UDMABUF", "SHIM"], conflicts_with = "json")]
    compare: Option<Vec<PathBuf>>,
    /// The second of the two was served by the supervisor, which stands outside of the program.
    #[arg(long, requires = "compare")]
    supervisor: bool,
    /// Leave out the cases that the supervisor answers differently from the shim, by design.
    #[arg(long)]
    supervised: bool,
    /// Run only the cases whose names contain this, or one of these.
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// Print the names of the cases.
    #[arg(long)]
    list: bool,
    /// Used by the case `device/exec`: makes a buffer with an inherited descriptor.
    #[arg(long, hide = true, value_name = "FD")]
    create_with: Option<i32>,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if let Some(device) = arguments.create_with {
        return Ok(ExitCode::from(cases::create_with(device)));
    }
    if let Some(files) = arguments.compare {
        let read = |path: &PathBuf| -> Result<Vec<run::Outcome>> {
            let text = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
            serde_json::from_slice(&text).with_context(|| format!("parsing {}", path.display()))
        };
        let same = compare::compare(&read(&files[0])?, &read(&files[1])?, arguments.supervisor);
        return Ok(if same {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        });
    }
    let mut cases = cases::all();
    let only = &arguments.only;
    cases.retain(|case| only.is_empty() || only.iter().any(|text| case.name.contains(text)));
    if arguments.supervised {
        cases.retain(|case| compare::left_out(&case.name).is_none());
    }
    if arguments.list {
        for case in &cases {
            println!("{}", case.name);
        }
        return Ok(ExitCode::SUCCESS);
    }
    cases::prepare();
    println!("KTAP version 1");
    println!("1..{}", cases.len());
    let mut outcomes = Vec::new();
    let mut failed = 0;
    for (number, case) in (1..).zip(&cases) {
        let outcome = run::isolated(case)?;
        let verdict = case.expect.verdict(&outcome);
        let (word, note) = match &verdict {
            run::Verdict::Pass => ("ok", String::new()),
            run::Verdict::Skip(why) => ("ok", format!(" # SKIP {why}")),
            run::Verdict::Fail(why) => {
                failed += 1;
                println!("# {}: {why}", case.name);
                ("not ok", String::new())
            }
        };
        println!("{word} {number} {}{note}", case.name);
        std::io::stdout().flush()?;
        outcomes.push(outcome);
    }
    println!("# {} passed, {failed} failed", cases.len() - failed);
    if let Some(path) = arguments.json {
        let text = serde_json::to_vec_pretty(&outcomes)?;
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
