// SPDX-License-Identifier: MIT OR Apache-2.0

//! The kernels that Debian's archive has now.

use std::collections::BTreeMap;

use anyhow::{bail, Result};

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
    /// Empty for the ordinary flavour, or `cloud`, `rt`.
    pub flavour: String,
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

/// Reads the archive's kernels from a tree's package lists, oldest first.
pub fn kernels(tree: &Tree) -> Result<Vec<Stock>> {
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
    Ok(parse(&tree.query(&arguments)?))
}

/// `apt-cache madison`: lines of `package | version | origin`.
fn parse(madison: &str) -> Vec<Stock> {
    // The first version listed of a package is the newest.
    let mut packages: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for line in madison.lines() {
        let mut columns = line.split('|').map(str::trim);
        if let (Some(name), Some(version)) = (columns.next(), columns.next()) {
            packages.entry(name).or_default().push(version);
        }
    }
    let newest = |name: &str| {
        packages
            .get(name)
            .and_then(|v| v.first())
            .map(|v| format!("{name}={v}"))
    };
    let mut stocks = Vec::new();
    for name in packages.keys() {
        let Some(rest) = name.strip_prefix("linux-modules-") else {
            continue;
        };
        let Some((version, flavour)) = split(rest) else {
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
                flavour: flavour.to_owned(),
            })
        })();
        stocks.extend(found);
    }
    stocks.sort_by(|a, b| (a.version, &a.release).cmp(&(b.version, &b.release)));
    stocks
}

/// Splits `7.2.12+deb13-cloud-amd64` into its version and flavour.
fn split(release: &str) -> Option<((u32, u32, u32), &str)> {
    let (version, rest) = release
        .split_once('+')
        .or_else(|| release.split_once('-'))?;
    let mut numbers = version.split('.').map(|number| number.parse().ok());
    let version = (numbers.next()??, numbers.next()??, numbers.next()??);
    let flavour = rest.strip_suffix("amd64")?.trim_end_matches('-');
    let flavour = flavour.split_once('-').map_or("", |(_, flavour)| flavour);
    Some((version, flavour))
}

/// Finds the kernel that a selector means: a release; or a series (`7.2`, `default` for the oldest
/// that is supported, `newest`), followed by a flavour if it is not the ordinary one (`7.2-cloud`).
pub fn select<'a>(stocks: &'a [Stock], selector: &str) -> Result<&'a Stock> {
    let series_of = |stock: &Stock| (stock.version.0, stock.version.1);
    let supported = |stock: &&Stock| series_of(stock) >= OLDEST;
    let exact = stocks.iter().find(|stock| stock.release == selector);
    let found = exact.or_else(|| {
        let (name, flavour) = selector.split_once('-').unwrap_or((selector, ""));
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

    fn archive() -> Vec<Stock> {
        let mut text = String::new();
        let mut add = |name: &str, version: &str| {
            text += &format!(" {name} | {version} | http://mirror trixie-backports/main amd64\n");
        };
        for (release, version, kind) in [
            ("7.1.13+deb13-amd64", "7.1.13-1", "binary"),
            ("7.2.9+deb13-amd64", "7.2.9-1", "binary"),
            ("7.2.12+deb13-amd64", "7.2.12-1", "binary"),
            ("7.2.12+deb13-cloud-amd64", "7.2.12-1", "binary"),
            ("7.2.13+deb13-rt-amd64", "7.2.13-1", "binary"),
            ("7.3.4+deb13-amd64", "7.3.4-1", "binary-unsigned"),
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
        parse(&text)
    }

    #[test]
    fn selectors() {
        let stocks = archive();
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
    fn sources() {
        let stocks = archive();
        let newest = select(&stocks, "7.2").unwrap();
        assert_eq!(newest.source, "linux-source-7.2=7.2.12-1");
        assert_eq!(newest.source_mismatch(), None);
        let older = select(&stocks, "7.2.9+deb13-amd64").unwrap();
        assert_eq!(older.source, "linux-source-7.2=7.2.12-1");
        assert!(older.source_mismatch().is_some());
    }
}
