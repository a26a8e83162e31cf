// SPDX-License-Identifier: MIT OR Apache-2.0

//! The kernels that Debian's archive has now.

use std::collections::BTreeMap;

use anyhow::{bail, Result};

use crate::debian::arch::Arch;
use crate::debian::tree::Tree;

/// The oldest series that pinbuf supports.
const OLDEST: (u32, u32) = (7, 2);

/// A kernel of the archive, with the packages that make it up, each as `name=version`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stock {
    /// What `uname -r` says.
    pub release: String,
    /// `vmlinuz`.
    pub binary: String,
    /// `config` and lists of built-in modules.
    pub base: String,
    /// The modules.
    pub modules: String,
    /// `.config`, `Module.symvers` and type information.
    pub headers: String,
    /// The source, of the same version if the archive has it.
    pub source: String,
    /// Major, minor and patch level.
    pub version: (u32, u32, u32),
    /// Empty for the ordinary flavour, or `cloud`, `rt`, `16k`.
    pub flavour: String,
    /// What it runs on.
    pub arch: Arch,
}

impl Stock {
    /// Says where the source's version differs from the kernel's.
    pub fn source_mismatch(&self) -> Option<String> {
        let version = |package: &str| package.split_once('=').map(|(_, v)| v.to_owned());
        let (source, kernel) = (version(&self.source), version(&self.headers));
        (source != kernel).then(|| {
            format!(
                "the archive has no source of {}: {} is the nearest; modules that are built with \
                 it may refuse to load",
                self.release, self.source
            )
        })
    }
}

/// The architecture that a selector or a release names.
pub fn arch(selector: &str) -> Arch {
    let named = |arch: &Arch| selector.split('-').any(|word| word == arch.debian());
    Arch::ALL.into_iter().find(named).unwrap_or(Arch::Amd64)
}

/// Reads the archive's kernels for an architecture from a tree's package lists, oldest first.
pub fn kernels(tree: &Tree, arch: Arch) -> Result<Vec<Stock>> {
    let names = tree.query(&["apt-cache", "pkgnames", "linux-"])?;
    let mut arguments = vec!["apt-cache", "madison"];
    arguments.extend(names.split_whitespace().filter(|name| {
        ["binary-", "base-", "modules-", "headers-", "source-"]
            .iter()
            .any(|kind| {
                name.strip_prefix("linux-")
                    .is_some_and(|rest| rest.starts_with(kind))
            })
    }));
    Ok(parse(&tree.query(&arguments)?, arch))
}

/// `apt-cache madison`: lines of `package | version | origin`.
fn parse(madison: &str, arch: Arch) -> Vec<Stock> {
    // The first version listed of a package is the newest.
    let mut packages: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for line in madison.lines() {
        let mut columns = line.split('|').map(str::trim);
        if let (Some(name), Some(version)) = (columns.next(), columns.next()) {
            // A foreign architecture is part of the name.
            let name = name.split(':').next().unwrap_or(name);
            packages.entry(name).or_default().push(version);
        }
    }
    let newest = |name: &str| {
        packages
            .get(name)
            .and_then(|v| v.first())
            .map(|v| format!("{name}{}={v}", qualifier(name, arch)))
    };
    let mut stocks = Vec::new();
    for name in packages.keys() {
        let Some(rest) = name.strip_prefix("linux-modules-") else {
            continue;
        };
        let Some((version, flavour)) = split(rest, arch) else {
            continue;
        };
        let found = (|| {
            let modules = newest(name)?;
            let package_version = modules.split_once('=')?.1;
            let source = format!("linux-source-{}.{}", version.0, version.1);
            let same = packages.get(source.as_str())?.contains(&package_version);
            Some(Stock {
                release: rest.to_owned(),
                binary: newest(&format!("linux-binary-{rest}"))
                    .or_else(|| newest(&format!("linux-binary-unsigned-{rest}")))?,
                base: newest(&format!("linux-base-{rest}"))?,
                headers: newest(&format!("linux-headers-{rest}"))?,
                source: if same {
                    format!("{source}={package_version}")
                } else {
                    newest(&source)?
                },
                modules,
                version,
                flavour,
                arch,
            })
        })();
        stocks.extend(found);
    }
    stocks.sort_by(|a, b| (a.version, &a.release).cmp(&(b.version, &b.release)));
    stocks
}

/// What apt wants after the name of a package of a foreign architecture.
fn qualifier(name: &str, arch: Arch) -> String {
    if arch.is_native() || name.starts_with("linux-source-") {
        String::new()
    } else {
        format!(":{}", arch.debian())
    }
}

/// Splits `7.2.12+deb13-cloud-amd64`, `7.2.12+deb13-arm64-16k` into version and flavour.
fn split(release: &str, arch: Arch) -> Option<((u32, u32, u32), String)> {
    let (version, rest) = release
        .split_once('+')
        .or_else(|| release.split_once('-'))?;
    let mut numbers = version.split('.').map(|number| number.parse().ok());
    let version = (numbers.next()??, numbers.next()??, numbers.next()??);
    let mut words: Vec<&str> = rest.split('-').filter(|w| !w.starts_with("deb")).collect();
    let place = words.iter().position(|word| *word == arch.debian())?;
    words.remove(place);
    Some((version, words.join("-")))
}

/// Finds the kernel that a selector means: a release; or a series (`7.2`, `default` for the oldest
/// that is supported, `newest`), followed by a flavour if it is not the ordinary one (`7.2-cloud`).
/// The name of the architecture may stand anywhere, or alone before a flavour (`arm64`, `arm64-16k`).
pub fn select<'a>(stocks: &'a [Stock], selector: &str) -> Result<&'a Stock> {
    let series_of = |stock: &Stock| (stock.version.0, stock.version.1);
    let supported = |stock: &&Stock| series_of(stock) >= OLDEST;
    let exact = stocks.iter().find(|stock| stock.release == selector);
    let found = exact.or_else(|| {
        let arch = arch(selector).debian();
        let mut words: Vec<&str> = selector.split('-').collect();
        let named = words.contains(&arch);
        words.retain(|word| *word != arch);
        let is_series = |word: &str| word.contains('.') || ["default", "newest"].contains(&word);
        let name = if named && !words.first().is_some_and(|word| is_series(word)) {
            "default"
        } else {
            words.remove(0)
        };
        let flavour = words.join("-");
        let mut candidates = stocks.iter().filter(|stock| stock.flavour == flavour);
        let series = match name {
            "default" => candidates.clone().find(supported).map(series_of),
            "newest" => candidates.clone().next_back().map(series_of),
            _ => name
                .split_once('.')
                .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?))),
        };
        candidates.rfind(|stock| Some(series_of(stock)) == series)
    });
    let Some(found) = found else {
        let releases: Vec<&str> = stocks
            .iter()
            .filter(supported)
            .map(|stock| stock.release.as_str())
            .collect();
        bail!(
            "the archive has no kernel `{selector}`.\nUse default, newest, debug, a series such \
             as {}.{}, a series and a flavour such as {}.{}-cloud, or one of: {}",
            OLDEST.0,
            OLDEST.1,
            OLDEST.0,
            OLDEST.1,
            releases.join(" ")
        );
    };
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(arch: Arch) -> Vec<Stock> {
        let mut text = String::new();
        let mut add = |name: &str, version: &str| {
            let foreign = if name.contains("arm64") { ":arm64" } else { "" };
            text +=
                &format!(" {name}{foreign} | {version} | http://mirror trixie-backports/main\n");
        };
        for (release, version, kind) in [
            ("7.1.13+deb13-amd64", "7.1.13-1", "binary"),
            ("7.2.9+deb13-amd64", "7.2.9-1", "binary"),
            ("7.2.12+deb13-amd64", "7.2.12-1", "binary"),
            ("7.2.12+deb13-cloud-amd64", "7.2.12-1", "binary"),
            ("7.2.13+deb13-rt-amd64", "7.2.13-1", "binary"),
            ("7.3.4+deb13-amd64", "7.3.4-1", "binary-unsigned"),
            ("7.2.12+deb13-arm64", "7.2.12-1", "binary"),
            ("7.2.12+deb13-arm64-16k", "7.2.12-1", "binary"),
            ("7.2.12+deb13-cloud-arm64", "7.2.12-1", "binary"),
            ("7.3.4+deb13-arm64-16k", "7.3.4-1", "binary"),
        ] {
            for kind in [kind, "base", "modules", "headers"] {
                add(&format!("linux-{kind}-{release}"), version);
            }
        }
        // Incomplete: no headers.
        for kind in ["binary", "base", "modules"] {
            add(&format!("linux-{kind}-7.2.14+deb13-amd64"), "7.2.14-1");
        }
        add("linux-source-7.1", "7.1.13-1");
        add("linux-source-7.2", "7.2.12-1");
        add("linux-source-7.2", "7.2.8-1");
        add("linux-source-7.3", "7.3.4-1");
        parse(&text, arch)
    }

    #[test]
    fn selectors() {
        let stocks = archive(Arch::Amd64);
        for (selector, release) in [
            ("default", "7.2.12+deb13-amd64"),
            ("7.2", "7.2.12+deb13-amd64"),
            ("7.2-cloud", "7.2.12+deb13-cloud-amd64"),
            ("default-cloud", "7.2.12+deb13-cloud-amd64"),
            ("newest", "7.3.4+deb13-amd64"),
            ("7.2-rt", "7.2.13+deb13-rt-amd64"),
            ("default-rt", "7.2.13+deb13-rt-amd64"),
            ("7.3", "7.3.4+deb13-amd64"),
            ("7.2.9+deb13-amd64", "7.2.9+deb13-amd64"),
        ] {
            assert_eq!(
                select(&stocks, selector).unwrap().release,
                release,
                "{selector}"
            );
        }
        assert!(select(&stocks, "7.4").is_err());
        assert!(select(&stocks, "7.3-cloud").is_err());
        assert!(select(&stocks, "7.2.14+deb13-amd64").is_err());
    }

    #[test]
    fn other_architectures() {
        let stocks = archive(Arch::Arm64);
        for (selector, release) in [
            ("arm64", "7.2.12+deb13-arm64"),
            ("default-arm64", "7.2.12+deb13-arm64"),
            ("arm64-16k", "7.2.12+deb13-arm64-16k"),
            ("cloud-arm64", "7.2.12+deb13-cloud-arm64"),
            ("arm64-cloud", "7.2.12+deb13-cloud-arm64"),
            ("newest-arm64-16k", "7.3.4+deb13-arm64-16k"),
            ("7.2.12+deb13-arm64", "7.2.12+deb13-arm64"),
        ] {
            assert_eq!(arch(selector), Arch::Arm64, "{selector}");
            assert_eq!(
                select(&stocks, selector).unwrap().release,
                release,
                "{selector}"
            );
        }
        assert_eq!(arch("default-cloud"), Arch::Amd64);
        assert!(select(&stocks, "arm64-rt").is_err());
    }

    #[test]
    fn sources() {
        let stocks = archive(Arch::Amd64);
        let newest = select(&stocks, "7.2").unwrap();
        assert_eq!(newest.source, "linux-source-7.2=7.2.12-1");
        assert_eq!(newest.source_mismatch(), None);
        let older = select(&stocks, "7.2.9+deb13-amd64").unwrap();
        assert_eq!(older.source, "linux-source-7.2=7.2.12-1");
        assert!(older.source_mismatch().is_some());
    }
}
