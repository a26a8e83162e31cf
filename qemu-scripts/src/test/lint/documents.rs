// SPDX-License-Identifier: MIT OR Apache-2.0

//! Checks that relative links and anchors in Markdown files lead somewhere, that the commands in their
//! code blocks exist in the repository, and that examples in Rust are those that cargo compiles.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{ensure, Context, Result};
use clap::CommandFactory;
use pulldown_cmark::{CodeBlockKind, Event, Options, Parser, Tag, TagEnd};
use walkdir::WalkDir;

use crate::image::userspace;
use crate::test;

/// Commands of the system that documents may name.
const SYSTEM: &[&str] = &[
    "apt", "cargo", "cd", "git", "grep", "modprobe", "mokutil", "prlimit", "sysctl", "udevadm",
];

/// Where the examples are that documents show.
const EXAMPLES: &str = "shim/pinbuf/examples";

/// A Markdown file.
#[derive(Debug, Default)]
struct Document {
    anchors: HashSet<String>,
    links: Vec<String>,
    /// Language and content.
    blocks: Vec<(String, String)>,
}

/// Complaints about all documents below `root`.
pub fn check(root: &Path) -> Result<Vec<String>> {
    let mut documents = BTreeMap::new();
    let files = WalkDir::new(root).into_iter().filter_entry(|entry| {
        let name = entry.file_name().to_string_lossy();
        // Not what is fetched or made.
        !(entry.depth() > 0 && name.starts_with('.')
            || entry.depth() == 1 && (name == "build" || name == "target"))
    });
    for entry in files {
        let entry = entry?;
        if entry.path().extension().is_some_and(|end| end == "md") {
            let name = entry.path().strip_prefix(root)?.to_owned();
            documents.insert(name, Document::parse(&fs::read_to_string(entry.path())?));
        }
    }
    ensure!(!documents.is_empty(), "there are no documents");
    let examples = examples(&root.join(EXAMPLES))?;
    let mut commands = Commands::new(root)?;
    let mut complaints = Vec::new();
    for (path, document) in &documents {
        let mut complain = |text: String| complaints.push(format!("{}: {text}", path.display()));
        for link in &document.links {
            if let Err(why) = resolve(root, path, link, &documents) {
                complain(format!("the link `{link}` leads nowhere: {why}"));
            }
        }
        for (language, text) in &document.blocks {
            match language.as_str() {
                "sh" | "console" => {
                    for command in split(text) {
                        if let Err(why) = commands.check(&command) {
                            complain(format!("`{}`: {why}", command.join(" ")));
                        }
                    }
                }
                // Its commands would not be checked.
                "" if path == Path::new("README.md") => {
                    complain("a code block without a language; commands are `sh`".to_owned());
                }
                "rust" if path.starts_with("docs") && !examples.contains(text.trim()) => {
                    complain(format!("a block in Rust is no example of {EXAMPLES}"));
                }
                _ => {}
            }
        }
    }
    Ok(complaints)
}

impl Document {
    fn parse(text: &str) -> Self {
        let mut document = Self::default();
        let mut slugs: HashMap<String, usize> = HashMap::new();
        let mut heading: Option<String> = None;
        let mut block: Option<(String, String)> = None;
        for event in Parser::new_ext(text, Options::ENABLE_TABLES) {
            match event {
                Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                    document.links.push(dest_url.into_string());
                }
                Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
                Event::End(TagEnd::Heading(_)) => {
                    let slug = slug(&heading.take().unwrap_or_default());
                    let before = slugs.entry(slug.clone()).or_insert(0);
                    document.anchors.insert(match *before {
                        0 => slug,
                        n => format!("{slug}-{n}"),
                    });
                    *before += 1;
                }
                Event::Start(Tag::CodeBlock(kind)) => {
                    let language = match kind {
                        CodeBlockKind::Fenced(language) => language.into_string(),
                        CodeBlockKind::Indented => "text".to_owned(),
                    };
                    block = Some((language, String::new()));
                }
                Event::End(TagEnd::CodeBlock) => document.blocks.extend(block.take()),
                Event::Text(text) | Event::Code(text) => {
                    if let Some((_, content)) = &mut block {
                        content.push_str(&text);
                    } else if let Some(heading) = &mut heading {
                        heading.push_str(&text);
                    }
                }
                _ => {}
            }
        }
        document
    }
}

/// The anchor of a heading, as GitHub and GitLab make it.
fn slug(heading: &str) -> String {
    heading
        .to_lowercase()
        .chars()
        .filter(|&c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

/// Follows a link from the document `from`; links to other sites are not followed.
fn resolve(
    root: &Path,
    from: &Path,
    link: &str,
    documents: &BTreeMap<PathBuf, Document>,
) -> Result<(), String> {
    if link.contains("://") || link.starts_with("mailto:") {
        return Ok(());
    }
    let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
    let mut target = if file.is_empty() {
        from.to_owned()
    } else {
        from.parent().unwrap_or(from).to_owned()
    };
    for part in Path::new(file).components() {
        match part {
            Component::Normal(name) => target.push(name),
            Component::ParentDir if target.pop() => {}
            Component::CurDir => {}
            _ => return Err("it leaves the repository".to_owned()),
        }
    }
    if !root.join(&target).exists() {
        return Err(format!("there is no {}", target.display()));
    }
    if anchor.is_empty() {
        return Ok(());
    }
    match documents.get(&target) {
        Some(document) if document.anchors.contains(anchor) => Ok(()),
        Some(_) => Err(format!("{} has no such heading", target.display())),
        None => Err(format!("{} has no anchors", target.display())),
    }
}

/// The examples' code, without what stands before it.
fn examples(directory: &Path) -> Result<HashSet<String>> {
    let mut found = HashSet::new();
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let text = fs::read_to_string(entry?.path())?;
        let code = text
            .lines()
            .skip_while(|line| line.starts_with("//") || line.is_empty());
        found.insert(code.collect::<Vec<_>>().join("\n").trim().to_owned());
    }
    Ok(found)
}

/// The commands of a block, each as its words, without comments.
fn split(text: &str) -> Vec<Vec<String>> {
    let text = text.replace("\\\n", " ");
    let mut commands = Vec::new();
    for line in text.lines() {
        let line = line.strip_prefix("$ ").unwrap_or(line);
        // shell-words knows comments, but neither operators nor substitutions.
        let words = shell_words::split(line).unwrap_or_else(|_| vec![line.to_owned()]);
        let mut command = Vec::new();
        for word in words {
            match word.as_str() {
                "&&" | "||" | "|" | ";" => commands.push(std::mem::take(&mut command)),
                _ => command.push(word),
            }
        }
        commands.push(command);
    }
    commands.retain(|command| !command.is_empty());
    commands
}

/// What commands there are.
struct Commands {
    root: PathBuf,
    targets: HashSet<String>,
    /// The help of `pinbuf`'s subcommands.
    helps: HashMap<String, String>,
}

impl Commands {
    fn new(root: &Path) -> Result<Self> {
        let makefile = fs::read_to_string(root.join("Makefile")).context("Makefile")?;
        let targets = makefile
            .lines()
            .filter_map(|line| line.split_once(':'))
            .filter(|(name, rest)| !name.starts_with('\t') && !rest.starts_with('='))
            .map(|(name, _)| name.to_owned())
            .collect();
        Ok(Self {
            root: root.to_owned(),
            targets,
            helps: HashMap::new(),
        })
    }

    /// Whether this command exists, with these options.
    fn check(&mut self, words: &[String]) -> Result<(), String> {
        let (own, passed) = match words.iter().position(|word| word == "--") {
            Some(at) => (&words[..at], &words[at + 1..]),
            None => (words, &[][..]),
        };
        let [program, arguments @ ..] = own else {
            return Err("no command".to_owned());
        };
        if let Some(script) = program.strip_prefix("./qemu-scripts/") {
            self.is_executable(program)?;
            check_script(script, arguments)?;
        } else if program == "make" {
            self.check_make(arguments)?;
        } else if program == "pinbuf" {
            self.check_pinbuf(arguments)?;
        } else if program.contains('/') {
            self.is_executable(program)?;
        } else if !SYSTEM.contains(&program.as_str()) {
            return Err(format!(
                "{program} is neither of the repository nor of the system (SYSTEM in documents.rs)"
            ));
        }
        // What another program runs, of which QEMU's options and the like are not ours.
        match passed {
            [inner, ..] if inner.contains('/') || inner == "pinbuf" => self.check(passed),
            _ => Ok(()),
        }
    }

    fn is_executable(&self, program: &str) -> Result<(), String> {
        // What cargo makes is named after a package.
        if let Some(name) = program.strip_prefix("target/release/") {
            let manifests = WalkDir::new(&self.root).max_depth(3).into_iter();
            let line = format!("name = \"{name}\"");
            let found = manifests.flatten().any(|entry| {
                entry.file_name() == "Cargo.toml"
                    && fs::read_to_string(entry.path())
                        .is_ok_and(|text| text.lines().any(|found| found == line))
            });
            return found.then_some(()).ok_or("no such package".to_owned());
        }
        let metadata =
            fs::metadata(self.root.join(program)).map_err(|_| format!("there is no {program}"))?;
        if !metadata.is_file() || metadata.permissions().mode() & 0o111 == 0 {
            return Err(format!("{program} is not executable"));
        }
        Ok(())
    }

    fn check_make(&self, arguments: &[String]) -> Result<(), String> {
        // Another directory's targets are not ours.
        if arguments.iter().any(|word| word == "-C") {
            return Ok(());
        }
        let mut targets = arguments.iter().filter(|word| !word.contains('='));
        match targets.find(|target| !self.targets.contains(*target)) {
            Some(target) => Err(format!("the Makefile has no target {target}")),
            None => Ok(()),
        }
    }

    fn check_pinbuf(&mut self, arguments: &[String]) -> Result<(), String> {
        let Some(name) = arguments.first() else {
            return Err("no subcommand".to_owned());
        };
        if !self.helps.contains_key(name) {
            let help = help(name).map_err(|error| format!("{error:#}"))?;
            self.helps.insert(name.clone(), help);
        }
        let help = &self.helps[name];
        for option in options(arguments) {
            let known = help
                .split(|c: char| c.is_whitespace() || ",=[".contains(c))
                .any(|word| word == format!("--{option}"));
            if !known {
                return Err(format!("pinbuf {name} has no option --{option}"));
            }
        }
        Ok(())
    }
}

/// The help of a subcommand of `pinbuf`.
fn help(subcommand: &str) -> Result<String> {
    let output = userspace::cargo()
        .args(["run", "--quiet", "--package", "pinbuf-cli", "--"])
        .args([subcommand, "--help"])
        .output()
        .context("running pinbuf")?;
    ensure!(
        output.status.success(),
        "pinbuf has no subcommand {subcommand}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The names of long options.
fn options(arguments: &[String]) -> impl Iterator<Item = &str> {
    arguments
        .iter()
        .filter_map(|word| word.strip_prefix("--"))
        .map(|option| option.split_once('=').map_or(option, |(name, _)| name))
}

/// A script that starts this program: its options are those that clap knows.
fn check_script(name: &str, arguments: &[String]) -> Result<(), String> {
    let whole = crate::Cli::command();
    let (name, arguments) = match (name, arguments) {
        ("guest", [name, rest @ ..]) => (name.as_str(), rest),
        _ => (name, arguments),
    };
    let task = whole
        .find_subcommand(name)
        .ok_or_else(|| format!("{name} is no subcommand of qemu-scripts/guest"))?;
    for option in options(arguments) {
        if !task
            .get_arguments()
            .any(|known| known.get_long() == Some(option))
        {
            return Err(format!("{name} has no option --{option}"));
        }
    }
    let rows = arguments.windows(2).filter(|pair| pair[0] == "--run");
    match rows.map(|pair| &pair[1]).find(|row| !test::is_run(row)) {
        Some(row) => Err(format!("there is no row {row}")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Complaints about one README, beside a script, a Makefile and another document.
    fn complaints(readme: &str) -> Vec<String> {
        let root = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        };
        write("README.md", readme);
        write(
            "docs/other.md",
            "# A `heading`, or two\n\n# Again\n\n# Again\n",
        );
        write("qemu-scripts/test", "");
        write("packaging/tool", "");
        write("Makefile", "all: module\n\techo a:b\nNAME := x\n");
        write("shim/pinbuf/examples/one.rs", "//! One.\n\nfn main() {}\n");
        check(root.path()).unwrap()
    }

    #[test]
    fn good_documents() {
        let text = "[a](docs/other.md) [b](docs/other.md#a-heading-or-two) [c](docs/) \
            [d](docs/other.md#again-1) [e](https://example.org/x#y) [f](#here) [not a link]\n\n\
            # Here\n\n```sh\n./qemu-scripts/test --run lint --long   # a remark --none\n\
            packaging/tool $(uname -r) && make all DESTDIR=x\nmake -C <tree> M=$PWD\n```\n\n\
            ```text\nno command\n```\n";
        assert_eq!(complaints(text), Vec::<String>::new());
    }

    #[test]
    fn links_that_lead_nowhere() {
        for (link, why) in [
            ("docs/none.md", "there is no docs/none.md"),
            ("docs/other.md#none", "has no such heading"),
            ("docs/other.md#again-2", "has no such heading"),
            ("#none", "has no such heading"),
            ("Makefile#L1", "has no anchors"),
            ("../README.md", "leaves the repository"),
            ("/docs/other.md", "leaves the repository"),
        ] {
            let found = complaints(&format!("A [link]({link}).\n"));
            assert_eq!(found.len(), 1, "{link}: {found:?}");
            assert!(found[0].contains(why), "{link}: {found:?}");
        }
        assert_eq!(complaints("![picture](none.svg)\n").len(), 1);
    }

    #[test]
    fn commands_that_do_not_exist() {
        for (command, why) in [
            ("./qemu-scripts/none", "there is no ./qemu-scripts/none"),
            (
                "packaging/tool && packaging/none",
                "there is no packaging/none",
            ),
            ("./qemu-scripts/test --none", "test has no option --none"),
            (
                "./qemu-scripts/test \\\n  --run none",
                "there is no row none",
            ),
            ("make none", "no target none"),
            ("make NAME", "no target NAME"),
            ("misspelt", "neither of the repository"),
            (
                "prlimit -n 3 -- packaging/none",
                "there is no packaging/none",
            ),
            ("docs", "neither of the repository"),
            ("./docs", "is not executable"),
        ] {
            let found = complaints(&format!("```sh\n{command}\n```\n"));
            assert_eq!(found.len(), 1, "{command}: {found:?}");
            assert!(found[0].contains(why), "{command}: {found:?}");
        }
        assert_eq!(complaints("```\nmisspelt\n```\n").len(), 1);
    }

    #[test]
    fn examples_are_compiled_ones() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("one.rs"), "//! One.\n\nfn main() {}\n").unwrap();
        let found = examples(root.path()).unwrap();
        assert!(found.contains("fn main() {}"));
    }
}
