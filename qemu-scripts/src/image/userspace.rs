// SPDX-License-Identifier: MIT OR Apache-2.0

//! What cargo builds: the programs and libraries that guests get, and the guests' first process.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{bail, Context, Result};

use crate::cache::{self, Key};
use crate::debian::arch::Arch;
use crate::debian::tree::{inside, Tree};
use crate::paths;
use crate::ui::{step, Step};

/// How programs are built, which is a profile of cargo's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// With assertions and checked arithmetic, for tests.
    Dev,
    /// As users get them, for what is measured.
    Release,
}

impl Profile {
    /// Where cargo puts what it builds.
    fn directory(self, to: Target) -> PathBuf {
        let target = if to.arch.is_native() {
            target()
        } else {
            to.directory().join(to.arch.rust())
        };
        target.join(match self {
            Self::Dev => "debug",
            Self::Release => "release",
        })
    }
}

/// What is built before a guest starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Build {
    /// Nothing: the guest gets what was built last.
    Nothing,
    /// All programs and libraries.
    All,
    /// The programs of this package.
    Package(&'static str),
}

impl Build {
    /// All, unless the caller wants nothing to be built.
    pub fn unless(nothing: bool) -> Self {
        if nothing {
            Self::Nothing
        } else {
            Self::All
        }
    }
}

/// cargo, at the root of the repository.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(paths::root());
    // Set by the `cargo run` that started this program; they would make cargo build all anew.
    for (name, _) in std::env::vars_os() {
        let name_text = name.to_string_lossy();
        if name_text.starts_with("CARGO_PKG_") || name_text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(name);
        }
    }
    command
}

/// Where cargo puts what the repository's users see.
fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(directory) => paths::root().join(directory),
        None => paths::root().join("target"),
    }
}

/// Where cargo puts programs for guests that the host cannot run, and for the initramfs.
fn guest_target() -> PathBuf {
    paths::build().join("guest-target")
}

/// What programs are built for. Those of pinbuf ask the kernel how large a page is; tests have a constant for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// The processor.
    pub arch: Arch,
    /// The size of a page, in KiB.
    pub page: u32,
}

impl Target {
    /// The host's own programs.
    pub const HOST: Self = Self {
        arch: Arch::Amd64,
        page: 4,
    };

    /// Where cargo keeps what it builds.
    fn directory(self) -> PathBuf {
        guest_target().join(format!("pages-{}k", self.page))
    }
}

/// cargo and rustc of the tree of tools, which have the libraries for another architecture, where rustup may
/// have them not. What the host's cargo downloads is all that they get.
fn foreign_cargo(tools: &Tree, step: &Step, arch: Arch, arguments: &[&str]) -> Result<Command> {
    tools.require_arch(arch)?;
    step.run(cargo().args(["fetch", "--locked"]), "userspace.log")
        .context("fetching the crates of Cargo.lock")?;
    let home = cargo_home()?;
    let mut words = vec!["/usr/bin/cargo"];
    words.extend(arguments);
    words.extend(["--offline", "--locked", "--target", arch.rust()]);
    let mut command = tools.command_on(&[paths::root(), &home], &words)?;
    let linker = format!("CARGO_TARGET_{}_LINKER", arch.rust().replace('-', "_"));
    without_host_s_rust(&mut command)
        .env(linker.to_uppercase(), format!("{}-gcc-14", arch.gnu()))
        .env("CARGO_HOME", home);
    Ok(command)
}

/// Where the host's cargo keeps what it downloads.
pub fn cargo_home() -> Result<PathBuf> {
    match (std::env::var_os("CARGO_HOME"), std::env::home_dir()) {
        (Some(directory), _) => Ok(PathBuf::from(directory)),
        (None, Some(home)) => Ok(home.join(".cargo")),
        (None, None) => bail!("neither CARGO_HOME nor HOME is set"),
    }
}

/// Takes from a command what would make a tree's cargo use the host's compiler, or its flags.
pub fn without_host_s_rust(command: &mut Command) -> &mut Command {
    for name in ["CARGO", "RUSTC", "RUSTUP_TOOLCHAIN", "RUSTFLAGS"] {
        command.env_remove(name);
    }
    command
}

/// The packages that have nothing for guests of other architectures: they run on the host, are for x86-64, or are for
/// rows that these guests do not have.
const LEFT_OUT: [&str; 7] = [
    "pinbuf-bench",
    "pinbuf-demo",
    "pinbuf-fuzz",
    "pinbuf-guest",
    "pinbuf-host-tests",
    "pinbuf-nested",
    "pinbuf-pure",
];

/// Builds the programs and libraries, all or those of one package, and returns the paths of all that were built.
pub fn build(
    tools: &Tree,
    profile: Profile,
    to: Target,
    only: Option<&str>,
) -> Result<Vec<PathBuf>> {
    let title = format!("userspace{}", to.arch.suffix());
    step(title, |step| {
        let mut arguments = vec!["build"];
        match only {
            Some(package) => arguments.extend(["--package", package]),
            // Everything, although guests do not get this program: with the same packages cargo chooses the same
            // features, and what `cargo test` has compiled is not compiled again.
            None => arguments.push("--workspace"),
        }
        let mut command = if to.arch.is_native() {
            let mut command = cargo();
            command.args(arguments);
            command
        } else {
            if only.is_none() {
                for name in LEFT_OUT {
                    arguments.extend(["--exclude", name]);
                }
            }
            let mut command = foreign_cargo(tools, step, to.arch, &arguments)?;
            command
                .env("CARGO_TARGET_DIR", to.directory())
                .env("PINBUF_TEST_PAGES", format!("{}K", to.page));
            command
        };
        if profile == Profile::Release {
            command.arg("--release");
        }
        step.run(&mut command, "userspace.log")
            .context("userspace does not compile")
    })?;
    built(profile, to)
}

/// The programs and libraries that were built last.
pub fn built(profile: Profile, to: Target) -> Result<Vec<PathBuf>> {
    programs_in(&profile.directory(to))
}

/// The programs and libraries for guests in a directory of cargo's.
pub fn programs_in(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(directory) else {
        return Ok(found);
    };
    for entry in entries {
        let path = entry?.path();
        let metadata = fs::metadata(&path)?;
        let name = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        let Some(name) = name else { continue };
        let program = !name.contains('.') && metadata.permissions().mode() & 0o111 != 0;
        let ours = !["guest", "guest-init", "pinbuf-guest-init"].contains(&name.as_str());
        if metadata.is_file() && ours && (program || name.ends_with(".so")) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Builds the program of `tests/guest` that runs as a 32-bit process, and returns its path.
pub fn compat32(tools: &Tree, arch: Arch) -> Result<PathBuf> {
    const SOURCE: &str = "tests/guest/compat32.c";
    let gnu = arch.gnu32();
    let directory = guest_target().join("32-bit").join(gnu);
    let program = directory.join("pinbuf-compat32");
    let source = fs::read(paths::root().join(SOURCE)).context(SOURCE)?;
    let key = Key::new().text("1").text(&String::from_utf8_lossy(&source));
    let name = format!("compat32{}", arch.suffix());
    cache::ensure(
        &name,
        &format!("program for 32 bits ({gnu})"),
        key,
        |step| {
            let libc = match arch {
                Arch::Amd64 => "libc6-dev-i386-cross",
                Arch::Arm64 => "libc6-dev-armhf-cross",
            };
            tools.require(gnu, &[&format!("gcc-{gnu}"), libc])?;
            fs::create_dir_all(&directory)?;
            let copy = directory.join("compat32.c");
            fs::write(&copy, &source)?;
            let compiler = format!("{gnu}-gcc");
            let options = ["-static", "-O1", "-Wall", "-Wextra", "-Werror"];
            let mut words = vec![compiler.as_str()];
            words.extend(options);
            let (copy, to) = (inside(&copy)?, inside(&program)?);
            words.extend(["-o", &to, &copy]);
            step.run(&mut tools.command(&words)?, "userspace.log")
        },
    )?;
    Ok(program)
}

/// Builds the guests' first process, which needs no library, and returns its path.
pub fn init(tools: &Tree, arch: Arch) -> Result<PathBuf> {
    const PACKAGE: [&str; 3] = ["build", "--package", "pinbuf-guest-init"];
    // Apart from other programs: linked otherwise, all of it would be compiled again each time.
    let target = match arch.is_native() {
        true => guest_target(),
        false => guest_target().join("init"),
    };
    let program = target.join(arch.rust()).join("debug/pinbuf-guest-init");
    let key = Key::new()
        .text("2")
        .files(&paths::root().join("qemu-scripts/init"))?;
    let name = format!("init{}", arch.suffix());
    cache::ensure(&name, "guests' first process", key, |step| {
        let mut command = if arch.is_native() {
            let mut command = cargo();
            command.args(PACKAGE).args(["--target", arch.rust()]);
            command
        } else {
            foreign_cargo(tools, step, arch, &PACKAGE)?
        };
        command
            .env("CARGO_TARGET_DIR", &target)
            .env("RUSTFLAGS", "-C target-feature=+crt-static");
        step.run(&mut command, "userspace.log").context(
            "the guests' first process does not compile; it needs gcc and libc6-dev \
             (`apt-get install gcc libc6-dev` as root)",
        )
    })?;
    Ok(program)
}

/// Builds the program of the conformance tests without libraries, as LD_PRELOAD does not reach it, and returns its path.
pub fn static_client(tools: &Tree, to: Target) -> Result<PathBuf> {
    const PACKAGE: [&str; 3] = ["build", "--package", "pinbuf-conformance"];
    // Apart from other programs, as it is linked otherwise.
    let target = match to.arch.is_native() {
        true => guest_target(),
        false => guest_target().join(format!("static-{}k", to.page)),
    };
    let built = target
        .join(to.arch.rust())
        .join("debug/udmabuf-conformance");
    let key = Key::new()
        .text("4")
        .files(&paths::root().join("uapi"))?
        .files(&paths::root().join("tests/conformance"))?;
    let name = match to.arch.is_native() {
        true => "static-client".to_owned(),
        false => format!("static-client{}-{}k", to.arch.suffix(), to.page),
    };
    cache::ensure(&name, "static client of udmabuf", key, |step| {
        let mut command = if to.arch.is_native() {
            let mut command = cargo();
            command.args(PACKAGE).args(["--target", to.arch.rust()]);
            command
        } else {
            foreign_cargo(tools, step, to.arch, &PACKAGE)?
        };
        command
            .env("CARGO_TARGET_DIR", &target)
            .env("PINBUF_TEST_PAGES", format!("{}K", to.page))
            .env("RUSTFLAGS", "-C target-feature=+crt-static");
        step.run(&mut command, "userspace.log").context(
            "the static client does not compile; it needs gcc and libc6-dev (`apt-get install gcc libc6-dev` as root)",
        )
    })?;
    Ok(built)
}

/// Where a file goes in the guest.
pub fn place(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?;
    let library = path.extension().is_some_and(|extension| extension == "so");
    Some(Path::new(if library { "usr/lib/pinbuf" } else { "usr/bin" }).join(name))
}

#[cfg(test)]
mod tests {
    use walkdir::WalkDir;

    use super::*;

    /// A test in a program whose manifest says that it has none would never run.
    #[test]
    fn programs_without_tests_have_none() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut without = 0;
        for directory in ["shim", "tests", "qemu-scripts", "uapi"] {
            for entry in WalkDir::new(root.join(directory)) {
                let path = entry.unwrap().into_path();
                if !path.ends_with("Cargo.toml") {
                    continue;
                }
                let manifest = fs::read_to_string(&path).unwrap();
                for section in manifest.split("\n[") {
                    if !section.lines().any(|line| line == "test = false") {
                        continue;
                    }
                    without += 1;
                    let main = section.lines().find_map(|line| {
                        let quoted = line.strip_prefix("path = \"")?;
                        quoted.strip_suffix('"')
                    });
                    // A program's modules are beside its main.rs; another file is a whole program.
                    let main = path.with_file_name(main.unwrap_or("src/main.rs"));
                    let sources = match main.ends_with("main.rs") || main.ends_with("lib.rs") {
                        true => main.parent().unwrap().to_owned(),
                        false => main,
                    };
                    for source in WalkDir::new(sources) {
                        let source = source.unwrap().into_path();
                        if source
                            .extension()
                            .is_some_and(|extension| extension == "rs")
                        {
                            let text = fs::read_to_string(&source).unwrap();
                            assert!(!text.contains("#[test]"), "{}", source.display());
                        }
                    }
                }
            }
        }
        assert!(without > 0);
    }
}
