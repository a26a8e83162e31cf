// SPDX-License-Identifier: MIT OR Apache-2.0

//! Gives the shared library the name under which it is installed. The number changes when programs
//! that use the library have to be compiled again.

fn main() {
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libpinbuf.so.1");
    println!("cargo::rerun-if-changed=build.rs");
}
