// SPDX-License-Identifier: MIT OR Apache-2.0

//! Numbers in the product that may stand for the size of a page or of a huge page, which differ between machines.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use walkdir::WalkDir;

/// The product's code.
const PRODUCT: [&str; 3] = ["driver", "shim", "uapi"];

/// What a page of 4 KiB and a huge page of 2 MiB are written as, and the shifts by them; without spaces and
/// underscores.
const SIZES: [&str; 14] = [
    "4096",
    "0x1000",
    "4<<10",
    "4*1024",
    "4095",
    "0xfff",
    "1<<12",
    "2<<20",
    "2097152",
    "0x200000",
    "1<<21",
    "2*1024*1024",
    "<<12",
    ">>12",
];

/// Lines with such a number that is none of these sizes, or that names one: a part of the file's path, the line's
/// beginning, and why.
const ALLOWED: [(&str, &str, &str); 8] = [
    (
        "driver/kernel_ext/sg_table.rs",
        "if index % 4096 ==",
        "entries between two looks at the scheduler",
    ),
    (
        "driver/kernel_ext/vmap.rs",
        "if array.len() % 4096 ==",
        "the same",
    ),
    (
        "driver/buffer.rs",
        "const AT_ONCE: usize = 4096;",
        "the same, of pages",
    ),
    (
        "shim/cli/src/security.rs",
        "let mut context = [0_u8; 4096];",
        "longer than any label",
    ),
    (
        "shim/preload/src/discards.rs",
        "const MOST: c_int = 4096;",
        "a number of descriptors",
    ),
    (
        "shim/pinbuf/src/region.rs",
        "Self::Mib2 => 2 << 20,",
        "the size of the name",
    ),
    (
        "shim/pinbuf/src/lib.rs",
        ".unwrap_or(4 << 10)",
        "where the kernel tells no size",
    ),
    ("uapi/", "#define", "a bit of flags"),
];

/// The lines of all files that look so.
pub fn check(root: &Path) -> Result<Vec<String>> {
    let mut complaints = Vec::new();
    for directory in PRODUCT {
        for entry in WalkDir::new(root.join(directory)).sort_by_file_name() {
            let entry = entry?;
            let path = entry.path();
            let extension = path.extension().and_then(|extension| extension.to_str());
            if !matches!(extension, Some("rs" | "c" | "h")) || path.ends_with("examples") {
                continue;
            }
            let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
            let name = path.strip_prefix(root)?.display().to_string();
            complaints.extend(in_file(&name, &text));
        }
    }
    Ok(complaints)
}

fn in_file(name: &str, text: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        // Tests are at the end of a file, and may have any size that they like.
        if line.starts_with("#[cfg(test)]")
            && !text.lines().nth(index + 1).unwrap_or("").ends_with(';')
        {
            break;
        }
        let allowed =
            |&(file, start, _): &(&str, &str, &str)| name.contains(file) && line.starts_with(start);
        if is_comment(line) || ALLOWED.iter().any(allowed) {
            continue;
        }
        let code = line.split("//").next().unwrap_or(line);
        let packed: String = code.chars().filter(|c| !" _".contains(*c)).collect();
        if let Some(size) = SIZES.iter().find(|size| has(&packed, size)) {
            complaints.push(format!(
                "{name}:{}: `{line}` has {size}: a page or a huge page of x86-64? Ask the kernel, or add the line \
                 with its meaning to qemu-scripts/src/test/lint/sizes.rs",
                index + 1
            ));
        }
    }
    complaints
}

fn is_comment(line: &str) -> bool {
    ["//", "/*", "* ", "*/"]
        .iter()
        .any(|start| line.starts_with(start))
        || line == "*"
}

/// Whether a number is there, as a whole.
fn has(code: &str, number: &str) -> bool {
    let digit = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    code.match_indices(number).any(|(at, _)| {
        // A shift follows anything.
        let starts = number.starts_with(['<', '>']) || !digit(code[..at].chars().next_back());
        let rest = &code[at + number.len()..];
        // A type may follow: `4096usize`.
        let kinds = ["u", "i"].iter().any(|kind| rest.starts_with(kind));
        starts && (kinds || !digit(rest.chars().next()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_found() {
        for line in [
            "let page = 4096;",
            "let page = 4_096_usize;",
            "for at in (0..len).step_by(0x1000) {",
            "let huge = 2 << 20;",
            "let pfn = address >> 12;",
            "let end = (start + 4095) & !0xfff;",
            "let huge = 2 * 1024 * 1024;",
        ] {
            assert_eq!(in_file("shim/x.rs", line).len(), 1, "{line}");
        }
    }

    #[test]
    fn other_numbers_are_none() {
        for line in [
            "let page = page_size();",
            "let most = 14096;",
            "let most = 40960;",
            "// 4096 bytes",
            "let all = 12 << 20;",
            "let all = 1 << 120;",
            "let port = 0x10001;",
        ] {
            assert_eq!(in_file("shim/x.rs", line), Vec::<String>::new(), "{line}");
        }
        let test = "fn product() {}\n#[cfg(test)]\nmod tests {\n let page = 4096;\n}\n";
        assert_eq!(in_file("shim/x.rs", test), Vec::<String>::new());
    }

    #[test]
    fn what_is_allowed_is_there() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        for (file, line, _) in ALLOWED {
            if file.ends_with('/') {
                continue;
            }
            let text = fs::read_to_string(root.join(file)).unwrap();
            assert!(
                text.lines().any(|l| l.trim().starts_with(line)),
                "{file}: {line}"
            );
        }
    }
}
