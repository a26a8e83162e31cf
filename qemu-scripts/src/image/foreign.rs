// SPDX-License-Identifier: MIT OR Apache-2.0

//! Programs for `tests/clients` that are not Rust's, or not of this machine's usual kind: Debian's compilers make them.

use std::fs;
use std::path::PathBuf;

use anyhow::Result;

use crate::cache::{self, Key};
use crate::debian::arch::Arch;
use crate::debian::tree::{inside, remove, Tree};
use crate::paths;

/// gcc for 32 bits as well, musl with its own gcc, and Go.
const COMPILERS: &[&str] = &["gcc-multilib", "golang-go", "libc6-dev", "musl-tools"];

/// Makes a directory with everything where it goes in a guest. musl's programs take musl along.
const SCRIPT: &str = r#"
    set -eu
    cd "$1"
    mkdir -p out/usr/bin out/usr/lib
    cc="-O1 -Wall -Werror -o out/usr/bin"
    gcc $cc/pinbuf-c-client-static -static client.c
    gcc $cc/pinbuf-c-client-32 -m32 client.c -static
    musl-gcc $cc/pinbuf-c-client-musl -idirafter /usr/include -idirafter /usr/include/x86_64-linux-gnu client.c
    cp -L /lib/ld-musl-x86_64.so.1 out/usr/lib/
"#;

/// The same for arm64, by the cross compilers of the tree of tools. What `musl-gcc` does is in a file of options.
const SCRIPT_ARM64: &str = r#"
    set -eu
    cd "$1"
    mkdir -p out/usr/bin out/usr/lib
    cc="-O1 -Wall -Werror -o out/usr/bin"
    aarch64-linux-gnu-gcc-14 $cc/pinbuf-c-client-static -static client.c
    arm-linux-gnueabihf-gcc $cc/pinbuf-c-client-32 -static client.c
    musl=/usr/lib/aarch64-linux-musl
    aarch64-linux-gnu-gcc-14 $cc/pinbuf-c-client-musl -specs $musl/musl-gcc.specs \
        -idirafter /usr/aarch64-linux-gnu/include client.c
    cp -L $musl/libc.so out/usr/lib/ld-musl-aarch64.so.1
"#;

/// The client in Go, whose compiler makes programs for all processors.
const SCRIPT_GO: &str = r#"
    set -eu
    cd "$1"
    export GOCACHE=/tmp/go-cache GOPATH=/tmp/go CGO_ENABLED=0 GO111MODULE=off GOARCH="$2"
    go build -o out/usr/bin/pinbuf-go-client client.go
    rm -rf /tmp/go-cache
"#;

/// Builds the programs for guests of an architecture.
pub fn ensure(tools: &Tree, arch: Arch) -> Result<PathBuf> {
    let compilers = Tree::with_packages("foreign", COMPILERS)?;
    let (of_c, script) = match arch {
        Arch::Amd64 => (&compilers, SCRIPT),
        Arch::Arm64 => {
            tools.require_arch(arch)?;
            tools.require(
                "clients-arm64",
                &["libc6-dev-armhf-cross", "musl-dev:arm64"],
            )?;
            (tools, SCRIPT_ARM64)
        }
    };
    let sources = paths::root().join("tests/clients/programs");
    let name = format!("foreign{}", arch.suffix());
    let directory = paths::build().join(&name);
    let key = Key::new().text(script).text(SCRIPT_GO).files(&sources)?;
    cache::ensure(&name, "clients in C and Go", key, |step| {
        remove(&directory)?;
        fs::create_dir_all(&directory)?;
        for entry in fs::read_dir(&sources)? {
            let entry = entry?;
            fs::copy(entry.path(), directory.join(entry.file_name()))?;
        }
        let place = inside(&directory)?;
        let words = ["sh", "-c", script, "sh", &place];
        step.run(&mut of_c.command(&words)?, "images.log")?;
        let words = ["sh", "-c", SCRIPT_GO, "sh", &place, arch.debian()];
        step.run(&mut compilers.command(&words)?, "images.log")
    })?;
    Ok(directory.join("out"))
}
