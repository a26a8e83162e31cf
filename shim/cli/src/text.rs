// SPDX-License-Identifier: MIT OR Apache-2.0

//! Output. Other users choose the names of buffers, processes, files and profiles, which may contain bytes that are no
//! UTF-8, and characters that a terminal acts on. All output passes through here.

use std::fmt;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use crate::OWN_ERROR;

/// The text of a byte string: each byte that is not part of UTF-8 becomes `\x` and two digits.
pub fn of_bytes(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        text.extend(chunk.invalid().iter().map(|byte| format!("\\x{byte:02x}")));
    }
    text
}

/// The text of a path.
pub fn of_path(path: &Path) -> String {
    of_bytes(path.as_os_str().as_bytes())
}

/// May a terminal do something else with this character than show it? Rust's notion of what is not printable has
/// the control characters (C1's too), and those that change the direction of text or show nothing.
fn is_active(character: char) -> bool {
    !matches!(character, '\'' | '"' | '\\') && character.escape_debug().len() > 1
}

/// A line without characters that a terminal acts on: these are escaped as in Rust's strings.
pub fn escaped(line: &str) -> String {
    let mut text = String::with_capacity(line.len());
    for character in line.chars() {
        if is_active(character) {
            text.extend(character.escape_debug());
        } else {
            text.push(character);
        }
    }
    text
}

/// JSON, with everything that a terminal acts on escaped as JSON escapes it.
fn json(value: &impl Serialize) -> Result<String> {
    Ok(json_escaped(&serde_json::to_string_pretty(value)?))
}

fn json_escaped(json: &str) -> String {
    let mut text = String::new();
    for character in json.chars() {
        // Line breaks are the layout's: those in strings are escaped already.
        if character != '\n' && is_active(character) {
            let mut units = [0; 2];
            let units = character.encode_utf16(&mut units);
            text.extend(units.iter().map(|unit| format!("\\u{unit:04x}")));
        } else {
            text.push(character);
        }
    }
    text
}

/// The same in one line.
pub fn json_line(value: &impl Serialize) -> Result<String> {
    Ok(json_escaped(&serde_json::to_string(value)?))
}

/// Prints a line.
pub fn print_line(line: fmt::Arguments<'_>) {
    print(&escaped(&line.to_string()));
}

/// Prints JSON, from [`json`]. (Its line breaks are the layout's.)
pub fn print_json(value: &impl Serialize) -> Result<()> {
    print(&json(value)?);
    Ok(())
}

/// Prints text that is escaped already. Where that fails, nothing can be said to the reader any more: the
/// program ends, silently if the reader has gone, as `head` does.
fn print(text: &str) {
    if let Err(error) = writeln!(io::stdout(), "{text}") {
        if error.kind() != io::ErrorKind::BrokenPipe {
            print_error(format_args!("cannot write to standard output: {error}"));
        }
        std::process::exit(OWN_ERROR.into());
    }
}

/// Prints a line on standard error, with the name of this program before it.
pub fn print_error(line: fmt::Arguments<'_>) {
    let text = format!("pinbuf: {}\n", escaped(&line.to_string()));
    // In one call, so that it does not mix with what others write. There is no other place to report a failure.
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Prints a line.
macro_rules! say {
    ($($part:tt)*) => { $crate::text::print_line(format_args!($($part)*)) };
}

/// Prints a line on standard error, with the name of this program before it.
macro_rules! complain {
    ($($part:tt)*) => { $crate::text::print_error(format_args!($($part)*)) };
}

pub(crate) use {complain, say};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_all_shown() {
        assert_eq!(of_bytes(b"plain \xc3\xa4"), "plain \u{e4}");
        assert_eq!(of_bytes(b"\x80\xffa\xc3"), "\\x80\\xffa\\xc3");
        let path = Path::new(std::ffi::OsStr::from_bytes(b"/tmp/\xfe"));
        assert_eq!(of_path(path), "/tmp/\\xfe");
    }

    #[test]
    fn nothing_that_a_terminal_acts_on_is_left() {
        let shown = "it's \"\u{e4}\" \\x80 \u{1f980}";
        assert_eq!(escaped(shown), shown);
        for (raw, wanted) in [
            ("\x1b[2J", "\\u{1b}[2J"),
            ("a\nb\r\t\0", "a\\nb\\r\\t\\0"),
            ("\x7f\u{9b}2J", "\\u{7f}\\u{9b}2J"),
            ("\u{202e}\u{2066}\u{2028}", "\\u{202e}\\u{2066}\\u{2028}"),
        ] {
            assert_eq!(escaped(raw), wanted);
        }
    }

    #[test]
    fn json_is_escaped_as_json_is() {
        let hostile = "\x1b[2J\n\x7f\u{9b}\u{202e}\u{e0001}\"\\";
        let text = json(&[hostile]).unwrap();
        assert_eq!(
            text,
            "[\n  \"\\u001b[2J\\n\\u007f\\u009b\\u202e\\udb40\\udc01\\\"\\\\\"\n]"
        );
        let back: Vec<String> = serde_json::from_str(&text).unwrap();
        assert_eq!(back, [hostile]);
    }
}
