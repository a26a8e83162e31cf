// SPDX-License-Identifier: MIT OR Apache-2.0

//! Mesa's software renderer, which makes the memory that it exports by udmabuf.

use anyhow::{ensure, Result};
use pinbuf_test_harness::tests;

use crate::process::{no_udmabuf, Start};

tests!("vulkan":
    exports_by_pinbuf within 240,
    exports_nothing_without_pinbuf within 120,
);

fn client() -> Start {
    Start::program(&["pinbuf-vulkan-client"])
}

fn exports_by_pinbuf() -> Result<()> {
    no_udmabuf()?;
    let end = client().on_pinbuf().by_kvm_user().end()?;
    end.show();
    ensure!(end.status == Some(0), "{end:?}");
    Ok(())
}

fn exports_nothing_without_pinbuf() -> Result<()> {
    no_udmabuf()?;
    let end = client().by_kvm_user().end()?;
    ensure!(end.status == Some(3), "{end:?}");
    Ok(())
}
