// SPDX-License-Identifier: MIT OR Apache-2.0

//! Programs for `tests/clients` that are not Rust's, or not of this machine's usual kind: Debian's compilers make them.

use std::fs;
use std::path::PathBuf;

use anyhow::Result;

use crate::cache::{self, Key};
use crate::debian::tree::{inside, remove, Tree};
use crate::paths;

/// gcc for 32 bits as well, musl with its own gcc, and Go.
const COMPILERS: &[&str] = &["gcc-multilib", "golang-go", "libc6-dev", "musl-tools"];

/// Makes a directory with everything where it goes in a guest, and returns its path. musl's programs take musl along.
const SCRIPT: &str = r#"
    set -eu
    cd "$1"
    mkdir -p out/usr/bin out/usr/lib
    cc="-O1 -Wall -Werror -o out/usr/bin"
    gcc $cc/pinbuf-c-client-static -static client.c
    gcc $cc/pinbuf-c-client-32 -m32 client.c -static
    musl-gcc $cc/pinbuf-c-client-musl -idirafter /usr/include -idirafter /usr/include/x86_64-linux-gnu client.c
    cp -L /lib/ld-musl-x86_64.so.1 out/usr/lib/
    export GOCACHE=/tmp/go-cache GOPATH=/tmp/go CGO_ENABLED=0 GO111MODULE=off
    go build -o out/usr/bin/pinbuf-go-client client.go
    rm -rf /tmp/go-cache
"#;

/// Builds the programs.
pub fn ensure() -> Result<PathBuf> {
    let compilers = Tree::with_packages("foreign", COMPILERS)?;
    let sources = paths::root().join("tests/clients/programs");
    let directory = paths::build().join("foreign");
    let key = Key::new().text(SCRIPT).files(&sources)?;
    cache::ensure("foreign", "clients in C and Go", key, |step| {
        remove(&directory)?;
        fs::create_dir_all(&directory)?;
        for entry in fs::read_dir(&sources)? {
            let entry = entry?;
            fs::copy(entry.path(), directory.join(entry.file_name()))?;
        }
        let place = inside(&directory)?;
        let arguments = ["sh", "-c", SCRIPT, "sh", &place];
        step.run(&mut compilers.command(&arguments)?, "images.log")
    })?;
    Ok(directory.join("out"))
}
