// SPDX-License-Identifier: MIT OR Apache-2.0

//! The manual pages that are written by hand name everything that the sources declare.

use std::fs;
use std::path::Path;

fn read(path: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    fs::read_to_string(root.join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Fails unless the page names all of them, as whole words.
fn named(page: &str, names: impl Iterator<Item = String>) {
    let text = read(page);
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    let words: Vec<&str> = text.split(|c| !is_part(c)).collect();
    let mut count = 0;
    for name in names {
        count += 1;
        assert!(words.contains(&name.as_str()), "{page} lacks {name}");
    }
    assert!(count > 2, "{page}: only {count} names found in the sources");
}

#[test]
fn constants_of_the_interface() {
    // Of the header alone.
    let internal = ["PINBUF_IOC_TYPE", "PINBUF_CREATE_FLAGS"];
    let header = read("uapi/pinbuf.h");
    let names = header
        .lines()
        .filter_map(|line| line.strip_prefix("#define PINBUF_"))
        .filter_map(|rest| rest.split([' ', '\t', '(']).next())
        .map(|name| format!("PINBUF_{name}"))
        .filter(|name| !internal.contains(&name.as_str()));
    named("docs/man/pinbuf.4", names);
}

#[test]
fn errors_of_the_interface() {
    let header = read("uapi/pinbuf.h");
    let errors = header
        .lines()
        .filter_map(|line| line.strip_prefix(" *   E"))
        .filter_map(|rest| rest.split("  ").next())
        .flat_map(|names| names.split(", E"))
        .map(|name| format!("E{name}"));
    named("docs/man/pinbuf.4", errors);
}

#[test]
fn parameters_of_the_module() {
    let source = read("driver/helpers.c");
    let parameters = source
        .lines()
        .filter_map(|line| line.strip_prefix("module_param("))
        .filter_map(|rest| rest.split(',').next())
        .map(str::to_owned);
    named("docs/man/pinbuf.4", parameters);
}

#[test]
fn functions_of_the_library() {
    let header = read("shim/capi/include/libpinbuf.h");
    let functions = header
        .lines()
        .filter_map(|line| {
            line.strip_prefix("int ")
                .or_else(|| line.strip_prefix("void "))
        })
        .filter_map(|rest| rest.split('(').next())
        .map(str::to_owned);
    named("docs/man/libpinbuf.3", functions);
}
