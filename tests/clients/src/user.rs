// SPDX-License-Identifier: MIT OR Apache-2.0

//! Who gets buffers: members of the group that udev gives the device to.

use anyhow::{ensure, Result};
use pinbuf_test_harness::tests;

use crate::process::{no_udmabuf, Start, DEBIAN_MEMLOCK};

tests!("user":
    of_group_kvm_gets_4k_framebuffer,
    of_no_group_is_refused,
);

const CLIENT: &[&str] = &["pinbuf-udmabuf-client"];
const MADE: &str = "33177600 bytes by pinbuf\n";

fn of_group_kvm_gets_4k_framebuffer() -> Result<()> {
    no_udmabuf()?;
    let end = Start::program(CLIENT).on_pinbuf().by_kvm_user().end()?;
    end.show();
    ensure!(end.status == Some(0) && end.out == MADE, "{end:?}");
    Ok(())
}

/// Neither early, by `pinbuf run`, nor through a shim that was preloaded for the program.
fn of_no_group_is_refused() -> Result<()> {
    no_udmabuf()?;
    let limited = |start: Start| start.memlock(DEBIAN_MEMLOCK, DEBIAN_MEMLOCK).by_user(None);
    let end = limited(Start::program(CLIENT).on_pinbuf()).end()?;
    ensure!(end.status == Some(125) && end.out.is_empty(), "{end:?}");
    ensure!(
        end.err
            .contains("open to the group kvm, and this user is not in it"),
        "{end:?}"
    );
    let output = limited(Start::program(CLIENT))
        .command()
        .env("LD_PRELOAD", "/usr/lib/pinbuf/libudmabuf_shim.so")
        .output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(
        !output.status.success() && text.contains("Permission denied"),
        "{output:?}"
    );
    Ok(())
}
