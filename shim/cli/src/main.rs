// SPDX-License-Identifier: MIT OR Apache-2.0

//! The command `pinbuf`.

use std::process::ExitCode;

fn main() -> ExitCode {
    pinbuf_cli::main()
}
