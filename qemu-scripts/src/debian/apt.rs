// SPDX-License-Identifier: MIT OR Apache-2.0

//! The host's apt configuration: which mirror of Debian to use, with which keys and options.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{bail, Context, Result};

/// What the trees need to know of the host's apt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    /// Where the archive is.
    pub uri: String,
    /// The keys that sign it.
    pub keyring: PathBuf,
    /// Lines of apt.conf: the host's choices about downloads.
    pub options: Vec<String>,
}

/// One place that packages come from, as apt's sources name it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Source {
    uris: Vec<String>,
    suites: Vec<String>,
    components: Vec<String>,
    signed_by: Option<String>,
}

/// Options that say how to download, as opposed to what apt asks for.
const OPTIONS: [&str; 12] = [
    "Acquire::Check-Valid-Until",
    "Acquire::Check-Date",
    "Acquire::Max-ValidTime",
    "Acquire::Min-ValidTime",
    "Acquire::By-Hash",
    "Acquire::Retries",
    "Acquire::ForceIPv4",
    "Acquire::ForceIPv6",
    "Acquire::Queue-Mode",
    "Acquire::http",
    "Acquire::https",
    "Acquire::ftp",
];

impl Mirror {
    /// Reads the host's configuration.
    pub fn of_host() -> Result<Self> {
        let mut texts = Vec::new();
        let etc = Path::new("/etc/apt");
        if let Ok(text) = fs::read_to_string(etc.join("sources.list")) {
            texts.push((false, text));
        }
        let mut parts: Vec<PathBuf> = fs::read_dir(etc.join("sources.list.d"))
            .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
            .unwrap_or_default();
        parts.sort();
        for path in parts {
            let deb822 = match path.extension().and_then(|extension| extension.to_str()) {
                Some("list") => false,
                Some("sources") => true,
                _ => continue,
            };
            let text = fs::read_to_string(&path);
            texts.push((
                deb822,
                text.with_context(|| format!("reading {}", path.display()))?,
            ));
        }
        let sources: Vec<Source> = texts
            .iter()
            .flat_map(|(deb822, text)| if *deb822 { stanzas(text) } else { lines(text) })
            .collect();
        let Some((uri, signed_by)) = choose(&sources) else {
            bail!(
                "/etc/apt names no mirror of Debian's main archive over http, https or ftp.\n\
                 Add a line such as `deb http://MIRROR/debian SUITE main` to \
                 /etc/apt/sources.list and run this again."
            );
        };
        Ok(Self {
            uri,
            keyring: keyring(signed_by.as_deref())?,
            options: options()?,
        })
    }
}

/// Reads the one-line format.
fn lines(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        let Some(mut rest) = line.strip_prefix("deb ").map(str::trim_start) else {
            continue;
        };
        let mut signed_by = None;
        if let Some(bracket) = rest.strip_prefix('[') {
            let Some((options, after)) = bracket.split_once(']') else {
                continue;
            };
            signed_by = options
                .split_whitespace()
                .find_map(|o| o.strip_prefix("signed-by="))
                .map(Into::into);
            rest = after;
        }
        let mut words = rest.split_whitespace().map(str::to_owned);
        let (Some(uri), Some(suite)) = (words.next(), words.next()) else {
            continue;
        };
        sources.push(Source {
            uris: vec![uri],
            suites: vec![suite],
            components: words.collect(),
            signed_by,
        });
    }
    sources
}

/// Reads the deb822 format.
fn stanzas(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let text: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    for stanza in text.split(|line| line.trim().is_empty()) {
        let mut fields: Vec<(String, String)> = Vec::new();
        for line in stanza {
            if line.starts_with([' ', '\t']) {
                if let Some((_, value)) = fields.last_mut() {
                    value.push('\n');
                    value.push_str(line.trim());
                }
            } else if let Some((name, value)) = line.split_once(':') {
                fields.push((name.to_ascii_lowercase(), value.trim().to_owned()));
            }
        }
        let field = |name: &str| {
            fields
                .iter()
                .find(|(found, _)| found == name)
                .map(|(_, value)| value.as_str())
        };
        let words = |name: &str| -> Vec<String> {
            field(name)
                .unwrap_or_default()
                .split_whitespace()
                .map(str::to_owned)
                .collect()
        };
        let off = field("enabled").is_some_and(|value| value.eq_ignore_ascii_case("no"));
        if off || !words("types").iter().any(|kind| kind == "deb") {
            continue;
        }
        sources.push(Source {
            uris: words("uris"),
            suites: words("suites"),
            components: words("components"),
            signed_by: field("signed-by").map(str::to_owned),
        });
    }
    sources
}

/// Picks the mirror of Debian's main archive. Many other archives use Debian's names for their suites.
fn choose(sources: &[Source]) -> Option<(String, Option<String>)> {
    let is_release = |suite: &str| !suite.contains(['/', '-']);
    let score = |source: &Source, uri: &str| {
        let suites_here = sources
            .iter()
            .filter(|other| other.uris.iter().any(|u| u == uri));
        let has_updates = suites_here
            .flat_map(|s| &s.suites)
            .any(|s| s.ends_with("-updates"));
        let signed = source
            .signed_by
            .as_deref()
            .is_some_and(|keys| keys.contains("debian-archive"));
        let named = uri.trim_end_matches('/').ends_with("/debian");
        u32::from(has_updates) * 4 + u32::from(signed) * 2 + u32::from(named)
    };
    let mut best: Option<(u32, String, Option<String>)> = None;
    for source in sources {
        if !source
            .components
            .iter()
            .any(|component| component == "main")
            || !source.suites.iter().any(|suite| is_release(suite))
        {
            continue;
        }
        for named in &source.uris {
            let Some(uri) = resolve(named) else { continue };
            let score = score(source, named);
            if score > 0 && best.as_ref().is_none_or(|(best, ..)| score > *best) {
                best = Some((score, uri, source.signed_by.clone()));
            }
        }
    }
    best.map(|(_, uri, signed_by)| (uri, signed_by))
}

/// The address that debootstrap understands; cloud images name a file with a list of mirrors.
fn resolve(uri: &str) -> Option<String> {
    if let Some(list) = uri.strip_prefix("mirror+file:") {
        let list = fs::read_to_string(list).ok()?;
        let first = list
            .lines()
            .find_map(|line| line.split_whitespace().next())?;
        return resolve(first);
    }
    ["http://", "https://", "ftp://"]
        .iter()
        .any(|s| uri.starts_with(s))
        .then(|| uri.to_owned())
}

/// The key ring that the source names, or else the one of the package debian-archive-keyring.
fn keyring(signed_by: Option<&str>) -> Result<PathBuf> {
    if let Some(path) = signed_by
        .map(str::trim)
        .filter(|value| value.starts_with('/'))
    {
        if Path::new(path).exists() {
            return Ok(path.into());
        }
    }
    for name in ["debian-archive-keyring.gpg", "debian-archive-keyring.pgp"] {
        let path = Path::new("/usr/share/keyrings").join(name);
        if path.exists() {
            return Ok(path);
        }
    }
    bail!("the keys of Debian's archive are missing: run `apt-get install debian-archive-keyring` as root")
}

/// The host's choices about downloads, as lines of apt.conf.
fn options() -> Result<Vec<String>> {
    let output = Command::new("apt-config")
        .arg("dump")
        .output()
        .context("running apt-config, which this host lacks: building guests needs Debian")?;
    let text = String::from_utf8(output.stdout)?;
    Ok(text
        .lines()
        .filter(|line| wanted(line))
        .map(str::to_owned)
        .collect())
}

fn wanted(line: &str) -> bool {
    let Some((name, value)) = line.split_once(' ') else {
        return false;
    };
    let known = OPTIONS.iter().any(|option| {
        name.strip_prefix(option)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
    });
    // Certificates and detection scripts are files of the host.
    known && value != "\"\";" && !value.starts_with("\"/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_sources() {
        let text = "# deb http://no/debian bookworm main\n\
                    deb [arch=amd64 signed-by=/keys.gpg] http://a/debian bookworm main contrib # x\n\
                    deb-src http://b/debian bookworm main\n";
        assert_eq!(
            lines(text),
            [Source {
                uris: vec!["http://a/debian".into()],
                suites: vec!["bookworm".into()],
                components: vec!["main".into(), "contrib".into()],
                signed_by: Some("/keys.gpg".into()),
            }]
        );
    }

    #[test]
    fn deb822_sources() {
        let text = "Types: deb deb-src\n# a remark\nURIs: http://a/debian\n  http://b/debian\n\
                    Suites: bookworm\n bookworm-updates\nComponents: main\nSigned-By: /keys.gpg\n\n\
                    Types: deb\nEnabled: no\nURIs: http://c\nSuites: x\n";
        assert_eq!(
            stanzas(text),
            [Source {
                uris: vec!["http://a/debian".into(), "http://b/debian".into()],
                suites: vec!["bookworm".into(), "bookworm-updates".into()],
                components: vec!["main".into()],
                signed_by: Some("/keys.gpg".into()),
            }]
        );
    }

    #[test]
    fn others_that_use_debian_names_are_not_debian() {
        let sources = lines(
            "deb https://other.example bookworm main\n\
             deb http://security.example/debian-security bookworm-security main\n\
             deb http://mirror.example/debian bookworm main\n\
             deb http://mirror.example/debian bookworm-updates main\n",
        );
        assert_eq!(
            choose(&sources),
            Some(("http://mirror.example/debian".into(), None))
        );
        assert_eq!(choose(&sources[..2]), None);
    }

    #[test]
    fn download_options_are_kept() {
        assert!(wanted("Acquire::Check-Valid-Until \"false\";"));
        assert!(wanted("Acquire::http::Proxy \"http://proxy.example\";"));
        assert!(!wanted("Acquire::http \"\";"));
        assert!(!wanted("Acquire::GzipIndexes \"true\";"));
        assert!(!wanted("Acquire::https::CAInfo \"/etc/ca.pem\";"));
    }
}
