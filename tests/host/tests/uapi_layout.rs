// SPDX-License-Identifier: MIT OR Apache-2.0

//! The C headers and their Rust twins say the same: sizes, offsets, numbers, for 64-bit and 32-bit
//! callers. The C compiler is asked, by assertions that are made from the Rust side.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use pinbuf_test_importer::uapi as importer;
use pinbuf_uapi as pinbuf;

/// A header, and what its twin says about it.
struct Header {
    path: PathBuf,
    prefix: &'static str,
    structs: Vec<Struct>,
    constants: Vec<(&'static str, i128)>,
    commands: Vec<(&'static str, u32)>,
}

/// A struct by its C name.
struct Struct {
    name: &'static str,
    size: usize,
    fields: Vec<(&'static str, usize, usize)>,
}

/// Describes a Rust struct; does not compile if a field is left out.
macro_rules! describe {
    ($type:path as $name:literal { $($field:ident),* $(,)? }) => {{
        let value = <$type>::default();
        let $type { $($field: _),* } = value;
        Struct {
            name: $name,
            size: size_of::<$type>(),
            fields: vec![$((
                stringify!($field),
                std::mem::offset_of!($type, $field),
                size_of_val(&value.$field),
            )),*],
        }
    }};
}

/// Pairs C names with the values of Rust constants.
macro_rules! constants {
    ($($name:literal = $value:expr),* $(,)?) => { vec![$(($name, i128::from($value))),*] };
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn pinbuf_header() -> Header {
    Header {
        path: repository().join("uapi/pinbuf.h"),
        prefix: "PINBUF_",
        structs: vec![
            describe!(pinbuf::Range as "pinbuf_range" { addr, len }),
            describe!(pinbuf::Backing as "pinbuf_backing" { fd, reserved, offset }),
            describe!(pinbuf::Create as "pinbuf_create" {
                size, flags, ranges, count, reserved, backing,
            }),
            describe!(pinbuf::Query as "pinbuf_query" {
                size, version, features, create_flags, max_ranges, page_size, charge_mode,
                reserved, memlock_bytes, allowance_bytes, allowance_used, allowance_system,
            }),
            describe!(pinbuf::Info as "pinbuf_info" {
                size, fd, bytes, pages, extents, pins, kernel_bytes, charged_pages, charge,
                mappings, state, held_bytes, discarded_bytes, unsure_bytes,
            }),
            describe!(pinbuf::Discard as "pinbuf_discard" { offset, len, state, reserved }),
            describe!(pinbuf::Discards as "pinbuf_discards" {
                size, fd, offset, list, count, reserved,
            }),
        ],
        constants: constants! {
            "PINBUF_VERSION" = pinbuf::VERSION,
            "PINBUF_MAX_RANGES" = pinbuf::MAX_RANGES,
            "PINBUF_CREATE_CLOEXEC" = pinbuf::CREATE_CLOEXEC,
            "PINBUF_CREATE_CHECK_BACKING" = pinbuf::CREATE_CHECK_BACKING,
            "PINBUF_CREATE_FLAGS" = pinbuf::CREATE_FLAGS,
            "PINBUF_FEATURE_HUGE_MMAP" = pinbuf::FEATURE_HUGE_MMAP,
            "PINBUF_FEATURE_CHECK_BACKING" = pinbuf::FEATURE_CHECK_BACKING,
            "PINBUF_FEATURE_DISCARDS" = pinbuf::FEATURE_DISCARDS,
            "PINBUF_STATE_DISCARDED" = pinbuf::STATE_DISCARDED,
            "PINBUF_STATE_UNSURE" = pinbuf::STATE_UNSURE,
            "PINBUF_CHARGE_USER" = pinbuf::CHARGE_USER,
            "PINBUF_CHARGE_ALLOWANCE" = pinbuf::CHARGE_ALLOWANCE,
            "PINBUF_CHARGE_NONE" = pinbuf::CHARGE_NONE,
            "PINBUF_IOC_TYPE" = pinbuf::IOC_TYPE,
        },
        commands: vec![
            ("PINBUF_CREATE", pinbuf::CREATE),
            ("PINBUF_QUERY", pinbuf::QUERY),
            ("PINBUF_INFO", pinbuf::INFO),
            ("PINBUF_DISCARDS", pinbuf::DISCARDS),
        ],
    }
}

fn importer_header() -> Header {
    Header {
        path: repository().join("tests/importer/importer.h"),
        prefix: "PTI_",
        structs: vec![
            describe!(importer::Attach as "pti_attach" {
                fd, mask_bits, max_seg, pci, boundary, max_mapping,
            }),
            describe!(importer::Map as "pti_map" { direction, mapping, ns }),
            describe!(importer::Unmap as "pti_unmap" { mapping, reserved, ns }),
            describe!(importer::Entry as "pti_entry" { addr, len }),
            describe!(importer::Report as "pti_report" {
                mapping, capacity, entries, count, total, min_len, max_len, align, adjacent,
            }),
            describe!(importer::Rw as "pti_rw" { mapping, flags, offset, len, data }),
            describe!(importer::Time as "pti_time" { ns }),
            describe!(importer::Cpu as "pti_cpu" { direction, flags, ns }),
            describe!(importer::Pin as "pti_pin" { addr, len, stride, pages, pin_ns, unpin_ns, fd, reserved }),
            describe!(importer::Segments as "pti_segments" { count, reserved, map_ns, unmap_ns }),
            describe!(importer::FailPins as "pti_fail_pins" { nth, flags, error, reserved }),
            describe!(importer::PinsFailed as "pti_pins_failed" { seen, failed }),
            describe!(importer::Sync as "pti_sync" { addr, len, direction, for_cpu }),
            describe!(importer::Syncs as "pti_syncs" { syncs, count, reserved }),
            describe!(importer::Attributes as "pti_attributes" { addr, user, vmap, direct }),
        ],
        constants: constants! {
            "PTI_MAPPINGS" = importer::MAPPINGS,
            "PTI_BIDIRECTIONAL" = importer::BIDIRECTIONAL,
            "PTI_TO_DEVICE" = importer::TO_DEVICE,
            "PTI_FROM_DEVICE" = importer::FROM_DEVICE,
            "PTI_RW_WRITE" = importer::RW_WRITE,
            "PTI_RW_VMAP" = importer::RW_VMAP,
            "PTI_CPU_END" = importer::CPU_END,
            "PTI_PINS_LASTING" = importer::PINS_LASTING,
            "PTI_PINS_LONGTERM" = importer::PINS_LONGTERM,
            "PTI_PINS_OTHER" = importer::PINS_OTHER,
            "PTI_SYNCS" = importer::SYNCS,
            "PTI_NOT_MAPPED" = importer::NOT_MAPPED,
            "PTI_IOC_TYPE" = b'u',
        },
        commands: vec![
            ("PTI_ATTACH", importer::ATTACH),
            ("PTI_DETACH", importer::DETACH),
            ("PTI_MAP", importer::MAP),
            ("PTI_UNMAP", importer::UNMAP),
            ("PTI_REPORT", importer::REPORT),
            ("PTI_RW", importer::RW),
            ("PTI_VMAP", importer::VMAP),
            ("PTI_VUNMAP", importer::VUNMAP),
            ("PTI_CPU", importer::CPU),
            ("PTI_PIN", importer::PIN),
            ("PTI_SEGMENTS", importer::SEGMENTS),
            ("PTI_FAIL_PINS", importer::FAIL_PINS),
            ("PTI_PINS_FAILED", importer::PINS_FAILED),
            ("PTI_COHERENT", importer::COHERENT),
            ("PTI_SYNCS_BEGIN", importer::SYNCS_BEGIN),
            ("PTI_SYNCS_END", importer::SYNCS_END),
            ("PTI_ATTRIBUTES", importer::ATTRIBUTES),
            ("PTI_EXPORT", importer::EXPORT),
        ],
    }
}

/// A C file that compiles only if the header says what its twin does.
fn assertions(header: &Header) -> String {
    let path = header.path.canonicalize().expect("the header is there");
    let mut text = format!("#include \"{}\"\n", path.display());
    let mut check = |condition: String| {
        writeln!(text, "_Static_assert({condition}, \"differs\");").expect("a string grows");
    };
    for Struct { name, size, fields } in &header.structs {
        check(format!("sizeof(struct {name}) == {size}"));
        // No field of the C struct is missing here, and none has another size or place.
        let mut end = 0;
        for (field, offset, size) in fields {
            assert_eq!(*offset, end, "a gap before {name}.{field}");
            end = offset + size;
            check(format!(
                "__builtin_offsetof(struct {name}, {field}) == {offset}"
            ));
            check(format!("sizeof(((struct {name} *)0)->{field}) == {size}"));
        }
        assert_eq!(*size, end, "a gap at the end of {name}");
    }
    for (name, value) in &header.constants {
        check(format!("({name}) == {value}"));
    }
    for (name, value) in &header.commands {
        check(format!("({name}) == {value}U"));
    }
    text
}

/// The compiler's errors; empty if there are none.
fn compile(source: &str, options: &[&str]) -> String {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join("layout.c");
    fs::write(&file, source).expect("writing a C file");
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    let output = Command::new(&compiler)
        .args(["-fsyntax-only", "-Wall", "-Wextra", "-Werror"])
        .args(options)
        // Debian keeps <asm/*.h> here, for the 64-bit architecture; they serve -m32 as well.
        .args(["-idirafter", "/usr/include/x86_64-linux-gnu"])
        .arg(&file)
        .output()
        .unwrap_or_else(|error| panic!("{compiler}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(
        output.status.success(),
        said.is_empty(),
        "{compiler}: {said}"
    );
    said
}

#[test]
fn layouts_are_equal() {
    for header in [pinbuf_header(), importer_header()] {
        let source = assertions(&header);
        for options in [["-m64"], ["-m32"]] {
            let said = compile(&source, &options);
            assert_eq!(said, "", "{} with {options:?}", header.path.display());
        }
    }
}

/// The check above can fail.
#[test]
fn a_difference_is_noticed() {
    let mut header = pinbuf_header();
    header.commands[0].1 += 1;
    assert!(compile(&assertions(&header), &["-m64"]).contains("differs"));
    let mut header = pinbuf_header();
    header.structs[4].fields.swap(2, 3);
    header.structs[4].fields[2].1 = 8;
    header.structs[4].fields[3].1 = 16;
    assert!(compile(&assertions(&header), &["-m32"]).contains("differs"));
}

#[test]
fn nothing_is_missing() {
    for header in [pinbuf_header(), importer_header()] {
        let text = fs::read_to_string(&header.path).expect("the header is there");
        let defined = text
            .lines()
            .filter_map(|line| line.strip_prefix("#define ")?.split_whitespace().next())
            .filter(|name| name.starts_with(header.prefix));
        let constants = header.constants.iter().map(|constant| constant.0);
        let commands = header.commands.iter().map(|command| command.0);
        assert_eq!(
            defined.collect::<BTreeSet<_>>(),
            constants.chain(commands).collect::<BTreeSet<_>>(),
            "{}",
            header.path.display()
        );
        let structs = text
            .lines()
            .filter_map(|line| line.strip_prefix("struct ")?.strip_suffix(" {"))
            .collect::<BTreeSet<_>>();
        let described = header
            .structs
            .iter()
            .map(|described| described.name)
            .collect();
        assert_eq!(structs, described, "{}", header.path.display());
    }
}

/// A program may be old, strict or in C++.
#[test]
fn header_serves_any_program() {
    let path = pinbuf_header()
        .path
        .canonicalize()
        .expect("the header is there");
    let source = format!(
        "#include \"{0}\"\n#include \"{0}\"\nint nothing;\n",
        path.display()
    );
    for options in [
        &["-std=c99", "-pedantic"][..],
        &["-std=gnu2x", "-Wpadded"],
        &["-x", "c++", "-std=c++11", "-pedantic"],
    ] {
        assert_eq!(compile(&source, options), "", "{options:?}");
    }
}
