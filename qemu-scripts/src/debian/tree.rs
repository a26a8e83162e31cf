// SPDX-License-Identifier: MIT OR Apache-2.0

//! Debian trees: what compiles the kernel's parts, what QEMU comes from, what guests run on.
//!
//! A tree is entered by chroot inside a mount and a process namespace of its own: nothing stays
//! mounted and nothing keeps running, however this program ends.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{bail, Context, Result};

use crate::cache::{ensure, lock, Key};
use crate::debian::apt::Mirror;
use crate::debian::arch::Arch;
use crate::paths;
use crate::ui::{say, step, Step};

/// A Debian release, which trees are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Suite {
    /// The one whose backports have the kernels, and whose rustc they are built with.
    Stable,
    /// The newest one whose packages can be installed together, by the name that it has until its release.
    Testing,
}

impl Suite {
    /// As debootstrap and apt call it.
    fn name(self) -> &'static str {
        match self {
            Self::Stable => "trixie",
            Self::Testing => "testing",
        }
    }

    /// What the name of a tree ends with.
    fn suffix(self) -> &'static str {
        match self {
            Self::Stable => "",
            Self::Testing => "-testing",
        }
    }

    /// What apt's sources list.
    fn sources(self) -> String {
        let name = self.name();
        match self {
            Self::Stable => format!("{name} {name}-updates {name}-backports"),
            Self::Testing => name.to_owned(),
        }
    }
}

/// Package lists are fetched again when they are older than this, and when a download fails.
const LISTS_AGE: Duration = Duration::from_secs(7 * 24 * 3600);

/// A file in a tree whose age is that of the package lists.
const UPDATED: &str = "var/lib/apt/pinbuf-updated";

/// Where `build/` is seen inside of a tree.
pub const BUILD: &str = "/build";

/// A path below `build/` as it is seen inside of a tree.
pub fn inside(path: &Path) -> Result<String> {
    let below = path
        .strip_prefix(paths::build())
        .context("this is outside of build/")?;
    Ok(Path::new(BUILD).join(below).display().to_string())
}

/// Unpacks packages of another architecture into an empty directory.
///
/// apt resolves what they depend on as if nothing were installed, so that it asks for the essential
/// packages too. Then what their scripts would have done as far as guests use it: the files of users and
/// groups, the links of alternatives, and directories.
const FOREIGN: &str = r#"
    set -eu
    place=$1 arch=$2; shift 2
    export APT_CONFIG=/tmp/apt-$arch.conf
    : >/tmp/apt-$arch.status
    cat >"$APT_CONFIG" <<CONFIG
        APT::Architecture "$arch";
        APT::Architectures { "$arch"; };
        Dir::State::status "/tmp/apt-$arch.status";
        Dir::Cache::pkgcache "";
        Dir::Cache::srcpkgcache "";
CONFIG
    set -- install --yes --no-install-recommends '?essential' "$@"
    # What has been downloaded is not listed, so nothing may have been.
    mkdir -p /tmp/empty/partial
    files=$(apt-get --print-uris -o Dir::Cache::archives=/tmp/empty "$@" | sed -n "s/^'[^']*' \([^ ]*\.deb\) .*/\1/p")
    apt-get --download-only "$@"
    # The links /bin, /lib, /sbin first: other packages have files behind them.
    for file in $files; do
        case $file in base-files_*) dpkg-deb -x "/var/cache/apt/archives/$file" "$place" ;; esac
    done
    for file in $files; do
        dpkg-deb -x "/var/cache/apt/archives/$file" "$place"
    done
    for name in passwd group; do
        cp "$place/usr/share/base-passwd/$name.master" "$place/etc/$name"
    done
    for name in kvm:104 render:105; do
        echo "${name%:*}:x:${name#*:}:" >>"$place/etc/group"
    done
    [ -e "$place/usr/bin/awk" ] || ln -s mawk "$place/usr/bin/awk"
    mkdir -p "$place/mnt" "$place/usr/local/bin"
    ln -s ../proc/self/mounts "$place/etc/mtab"
    echo "127.0.0.1 localhost" >"$place/etc/hosts"
    echo guest >"$place/etc/hostname"
    : >"$place/etc/resolv.conf"
"#;

/// What building for the kernel takes, and running QEMU.
const TOOLS: &[&str] = &[
    "bc",
    "bindgen",
    "bison",
    "cpio",
    "dwarves",
    "e2fsprogs",
    "flex",
    "gcc-14",
    "kmod",
    "libc6-dev",
    "libclang-19-dev",
    "libelf-dev",
    "libssl-dev",
    "make",
    "python3",
    "qemu-system-x86",
    "rsync",
    "rust-src",
    "rustc",
    "xz-utils",
];

/// A Debian tree.
#[derive(Debug, Clone)]
pub struct Tree {
    /// Its root directory.
    pub path: PathBuf,
    name: String,
    suite: Suite,
}

impl Tree {
    /// The tree with compilers and QEMU.
    pub fn tools() -> Result<Self> {
        Self::with_packages("tools", TOOLS)
    }

    /// A tree with these packages and what they depend on.
    pub fn with_packages(name: &str, packages: &[&str]) -> Result<Self> {
        Self::of_suite(Suite::Stable, name, packages)
    }

    /// The same of this release.
    pub fn of_suite(suite: Suite, name: &str, packages: &[&str]) -> Result<Self> {
        let base = Self::minimal(suite)?;
        let tree = Self::named(name, suite);
        let key = base.key()?.texts(packages);
        ensure(
            &format!("tree/{name}"),
            &format!("Debian tree `{name}`"),
            key,
            |step| {
                remove(&tree.path)?;
                let mut copy = Command::new("cp");
                copy.args(["-a", "--reflink=auto"])
                    .arg(&base.path)
                    .arg(&tree.path);
                step.run(&mut copy, "trees.log")?;
                tree.install(step, packages)
            },
        )?;
        Ok(tree)
    }

    /// The tree of this name, which need not be there yet.
    fn named(name: &str, suite: Suite) -> Self {
        Self {
            path: trees().join(name),
            name: name.to_owned(),
            suite,
        }
    }

    /// A copy that may be changed, and is made again by each call.
    pub fn copy(&self, name: &str) -> Result<Self> {
        let tree = Self::named(name, self.suite);
        step(format!("copy of the Debian tree `{}`", self.name), |step| {
            remove(&tree.path)?;
            let mut copy = Command::new("cp");
            copy.args(["-a", "--reflink=auto"])
                .arg(&self.path)
                .arg(&tree.path);
            step.run(&mut copy, "trees.log")
        })?;
        Ok(tree)
    }

    /// Adds packages to this tree, unless they were added before.
    pub fn require(&self, set: &str, packages: &[&str]) -> Result<()> {
        let name = &self.name;
        let title = format!("packages for {set} in the tree `{name}`");
        let stamp = fs::read_to_string(paths::build().join("stamps/tree").join(name))?;
        let key = Key::new().text(&stamp).texts(packages);
        ensure(&format!("tree/{name}-{set}"), &title, key, |step| {
            self.install(step, packages)
        })
    }

    /// Adds what cross-compiling for this architecture and running its guests takes, once.
    pub fn require_arch(&self, arch: Arch) -> Result<()> {
        if arch.is_native() {
            return Ok(());
        }
        let debian = arch.debian();
        let set = format!("lists for {debian}");
        let name = &self.name;
        let stamp = fs::read_to_string(paths::build().join("stamps/tree").join(name))?;
        let key = Key::new().text("1").text(&stamp);
        ensure(
            &format!("tree/{name}-lists{}", arch.suffix()),
            &set,
            key,
            |step| {
                let mut command = self.command(&["dpkg", "--add-architecture", debian])?;
                step.run(&mut command, "trees.log")?;
                let _lock = lock("apt")?;
                self.update(step)
            },
        )?;
        let gcc = format!("gcc-14-{}", arch.gnu());
        let libc = format!("libc6-dev-{debian}-cross");
        let std = format!("libstd-rust-dev:{debian}");
        let gcc32 = format!("gcc-{}", arch.gnu32());
        let packages = [
            gcc.as_str(),
            &gcc32,
            &libc,
            &std,
            "cargo",
            "qemu-system-arm",
        ];
        self.require(debian, &packages)
    }

    /// A tree for another architecture: packages, unpacked, whose programs cannot run here.
    ///
    /// The scripts of packages cannot run either. What guests need of these is done here.
    pub fn foreign(tools: &Self, name: &str, packages: &[&str], arch: Arch) -> Result<Self> {
        let tree = Self::named(name, tools.suite);
        let key = tools.key()?.text("4").text(arch.debian()).texts(packages);
        ensure(
            &format!("tree/{name}"),
            &format!("Debian tree `{name}`"),
            key,
            |step| {
                remove(&tree.path)?;
                fs::create_dir_all(&tree.path)?;
                let place = inside(&tree.path)?;
                let mut arguments = vec!["sh", "-c", FOREIGN, "sh", &place, arch.debian()];
                arguments.extend(packages);
                let _lock = lock("apt")?;
                let first = step.run(&mut tools.enter(&arguments, true)?, "trees.log");
                if first.is_err() {
                    tools.update(step)?;
                    step.run(&mut tools.enter(&arguments, true)?, "trees.log")?;
                }
                Ok(())
            },
        )?;
        Ok(tree)
    }

    /// The smallest tree, which the others begin as copies of.
    fn minimal(suite: Suite) -> Result<Self> {
        let tree = Self::named(&format!("minimal{}", suite.suffix()), suite);
        let release = suite.name();
        if !nix::unistd::geteuid().is_root() {
            bail!(
                "this needs root, for debootstrap, chroot and mount: guests and tools are made in \
                 Debian trees under build/.\nRun the same command as root."
            );
        }
        ensure(
            &format!("tree/{}", tree.name),
            &format!("smallest tree of Debian {release} (debootstrap)"),
            tree.key()?,
            |step| {
                install_debootstrap(step)?;
                remove(&tree.path)?;
                fs::create_dir_all(trees())?;
                let mirror = Mirror::of_host()?;
                let mut command = isolated();
                command
                    .arg("debootstrap")
                    .args(["--variant=minbase", "--include=ca-certificates"]);
                command.arg(format!("--keyring={}", mirror.keyring.display()));
                command.arg(release).arg(&tree.path).arg(&mirror.uri);
                // debootstrap does not read apt's configuration.
                for option in &mirror.options {
                    if let Some(proxy) = option.strip_prefix("Acquire::http::Proxy ") {
                        command.env("http_proxy", proxy.trim_matches(['"', ';']));
                    }
                }
                step.run(&mut command, "trees.log").with_context(|| {
                    format!(
                        "debootstrap could not make a {release} tree from {}",
                        mirror.uri
                    )
                })?;
                tree.configure(&mirror)?;
                tree.update(step)
            },
        )?;
        Ok(tree)
    }

    fn key(&self) -> Result<Key> {
        // The number changes when what is done to a tree does.
        let mirror = Mirror::of_host()?;
        Ok(Key::new()
            .text("1")
            .text(self.suite.name())
            .text(&mirror.uri)
            .texts(&mirror.options))
    }

    /// Gives the tree's apt the host's mirror and options.
    fn configure(&self, mirror: &Mirror) -> Result<()> {
        let uri = &mirror.uri;
        let suites = self.suite.sources();
        let write = |path: &str, text: &str| {
            fs::write(self.path.join(path), text).with_context(|| format!("writing {path}"))
        };
        fs::copy(
            &mirror.keyring,
            self.path.join("usr/share/keyrings/pinbuf-mirror.gpg"),
        )?;
        write("etc/apt/sources.list", "")?;
        write(
            "etc/apt/sources.list.d/pinbuf.sources",
            &format!(
                "Types: deb\nURIs: {uri}\nSuites: {suites}\n\
                 Components: main\nSigned-By: /usr/share/keyrings/pinbuf-mirror.gpg\n"
            ),
        )?;
        let options = mirror.options.join("\n");
        write(
            "etc/apt/apt.conf.d/90pinbuf",
            &format!(
                "{options}\nAPT::Install-Recommends \"false\";\nAcquire::Languages \"none\";\n\
                 DPkg::Options:: \"--force-unsafe-io\";\n"
            ),
        )?;
        write(
            "etc/dpkg/dpkg.cfg.d/90pinbuf",
            "path-exclude=/usr/share/doc/*\npath-exclude=/usr/share/man/*\n\
             path-exclude=/usr/share/locale/*\n",
        )?;
        // No service starts in a tree.
        write("usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n")?;
        let executable = fs::Permissions::from_mode(0o755);
        fs::set_permissions(self.path.join("usr/sbin/policy-rc.d"), executable)?;
        Ok(())
    }

    /// Fetches the package lists.
    fn update(&self, step: &Step) -> Result<()> {
        let mut command = self.enter(&["apt-get", "update", "--error-on=any"], true)?;
        step.run(&mut command, "trees.log").with_context(|| {
            format!(
                "apt-get update failed in the tree: is the mirror in /etc/apt reachable, and does \
                 it carry {}?",
                self.suite.sources()
            )
        })?;
        fs::write(self.path.join(UPDATED), "").context("noting the time")
    }

    /// Fetches the package lists if they are old. Without a network, the old ones are used.
    pub fn refresh_lists(&self, force: bool) -> Result<()> {
        let made = fs::metadata(self.path.join(UPDATED)).and_then(|m| m.modified());
        let age = made
            .ok()
            .and_then(|time| SystemTime::now().duration_since(time).ok());
        if !force && age.is_some_and(|age| age < LISTS_AGE) {
            return Ok(());
        }
        let _lock = lock("apt")?;
        if let Err(error) = step("package lists", |step| self.update(step)) {
            if force {
                return Err(error);
            }
            say(&format!(
                "  warning: using the old package lists: {error:#}"
            ));
        }
        Ok(())
    }

    fn install(&self, step: &Step, packages: &[&str]) -> Result<()> {
        let _lock = lock("apt")?;
        let mut arguments = vec!["apt-get", "install", "--yes", "--no-install-recommends"];
        arguments.extend(packages);
        let first = step.run(&mut self.enter(&arguments, true)?, "trees.log");
        if first.is_err() {
            // The lists may be older than the archive.
            self.update(step)?;
            step.run(&mut self.enter(&arguments, true)?, "trees.log")?;
        }
        Ok(())
    }

    /// Downloads packages (`name=version` or `name:architecture=version`) into `build/debs/` and unpacks them below a directory.
    pub fn unpack(&self, step: &Step, packages: &[String], target: &Path) -> Result<()> {
        let _lock = lock("apt")?;
        let mut arguments = vec!["apt-get", "download"];
        arguments.extend(packages.iter().map(String::as_str));
        step.run(
            &mut self.enter_at("/var/cache/apt/archives", &arguments, true)?,
            "trees.log",
        )
        .with_context(|| {
            format!(
                "the archive no longer has {}: run `./qemu-scripts/module --update` for new \
                     package lists",
                packages.join(", ")
            )
        })?;
        for package in packages {
            let (name, version) = package
                .split_once('=')
                .context("package without a version")?;
            let file = find_deb(name, version)?;
            let mut command = Command::new("dpkg-deb");
            step.run(command.arg("-x").arg(file).arg(target), "trees.log")?;
        }
        Ok(())
    }

    /// What a query of the tree's package lists answers.
    pub fn query(&self, arguments: &[&str]) -> Result<String> {
        let output = self.enter(arguments, false)?.output()?;
        if !output.status.success() {
            bail!("{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// A command inside of this tree, with /proc, and `build/` as [`BUILD`].
    pub fn command(&self, arguments: &[&str]) -> Result<Command> {
        self.enter(arguments, false)
    }

    /// The same in one of the host's directories; these are there at the paths that they have on the host.
    pub fn command_on(&self, directories: &[&Path], arguments: &[&str]) -> Result<Command> {
        const SCRIPT: &str = r#"
            set -eu
            tree=$1 count=$2; shift 2
            first=$1
            while [ "$count" -gt 0 ]; do
                mkdir -p "$tree$1"
                mount --bind "$1" "$tree$1"
                shift; count=$((count - 1))
            done
            exec chroot "$tree" /bin/sh -c 'cd "$0" && exec "$@"' "$first" "$@"
        "#;
        let mut command = isolated();
        command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
        command.args(["bash", "-c", SCRIPT, "bash"]);
        command
            .arg(&self.path)
            .arg((directories.len() + 1).to_string());
        command.args(directories).arg("/proc").args(arguments);
        self.environment(&mut command);
        Ok(command)
    }

    /// The same, and names of hosts are known.
    pub fn network(&self, arguments: &[&str]) -> Result<Command> {
        self.enter(arguments, true)
    }

    fn enter(&self, arguments: &[&str], network: bool) -> Result<Command> {
        self.enter_at("/", arguments, network)
    }

    fn enter_at(&self, directory: &str, arguments: &[&str], network: bool) -> Result<Command> {
        const SCRIPT: &str = r#"
            set -eu
            tree=$1 build=$2 directory=$3; shift 3
            mount -t proc proc "$tree/proc"
            mkdir -p "$tree/build" "$build/debs/partial"
            mount --bind "$build" "$tree/build"
            mount --bind "$build/debs" "$tree/var/cache/apt/archives"
            exec chroot "$tree" /bin/sh -c 'cd "$0" && exec "$@"' "$directory" "$@"
        "#;
        if network {
            for file in ["etc/resolv.conf", "etc/hosts"] {
                let host = Path::new("/").join(file);
                let copy = self.path.join(file);
                if host.exists() {
                    remove(&copy)?;
                    fs::copy(host, copy)?;
                }
            }
        }
        let mut command = isolated();
        command.args([
            "--pid",
            "--fork",
            "--kill-child",
            "bash",
            "-c",
            SCRIPT,
            "bash",
        ]);
        command
            .arg(&self.path)
            .arg(paths::build())
            .arg(directory)
            .args(arguments);
        self.environment(&mut command);
        Ok(command)
    }

    /// What commands find in their environment, whatever the host has there.
    fn environment(&self, command: &mut Command) {
        command.env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        );
        command
            .env("LC_ALL", "C.UTF-8")
            .env("DEBIAN_FRONTEND", "noninteractive");
        for name in [
            "TMPDIR",
            "MAKEFLAGS",
            "MFLAGS",
            "ARCH",
            "CROSS_COMPILE",
            "KBUILD_OUTPUT",
        ] {
            command.env_remove(name);
        }
    }
}

/// Where trees are.
fn trees() -> PathBuf {
    paths::build().join("trees")
}

/// `unshare`, to which its own options and a command are to be added: mounts that the command makes
/// vanish with it, and it vanishes with this process.
fn isolated() -> Command {
    let mut command = Command::new("setpriv");
    command.args([
        "--pdeathsig",
        "KILL",
        "unshare",
        "--mount",
        "--propagation",
        "private",
    ]);
    command
}

fn install_debootstrap(step: &Step) -> Result<()> {
    let found = ["/usr/sbin/debootstrap", "/usr/bin/debootstrap"];
    if found.iter().any(|path| Path::new(path).exists()) {
        return Ok(());
    }
    let run = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        command
            .args(arguments)
            .env("DEBIAN_FRONTEND", "noninteractive");
        step.run(&mut command, "trees.log")
    };
    let install = ["install", "--yes", "--no-install-recommends", "debootstrap"];
    if run(&install).is_err() {
        run(&["update"])?;
        run(&install).context("run `apt-get install debootstrap` as root")?;
    }
    Ok(())
}

/// apt writes a colon of the version as `%3a`.
fn find_deb(name: &str, version: &str) -> Result<PathBuf> {
    let version = version.replace(':', "%3a");
    let name = name.split(':').next().unwrap_or(name);
    for architecture in Arch::ALL.map(Arch::debian).into_iter().chain(["all"]) {
        let path = paths::build().join(format!("debs/{name}_{version}_{architecture}.deb"));
        if path.exists() {
            return Ok(path);
        }
    }
    bail!("apt-get download did not leave {name} {version} in build/debs/");
}

/// Removes a file or a directory with all that is in it, if it is there.
pub fn remove(path: &Path) -> Result<()> {
    let result = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(_) => Ok(()),
    };
    result.with_context(|| format!("removing {}", path.display()))
}
