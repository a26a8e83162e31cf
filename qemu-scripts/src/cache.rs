// SPDX-License-Identifier: MIT OR Apache-2.0

//! Things that are made once, and made again when their inputs change.

use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};
use walkdir::WalkDir;

use crate::paths;
use crate::ui::{say, step, Step};

/// A digest of all that a made thing depends on.
#[derive(Clone, Default)]
pub struct Key(Sha256);

impl Key {
    /// The digest of nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a text.
    pub fn text(mut self, text: &str) -> Self {
        self.0.update((text.len() as u64).to_le_bytes());
        self.0.update(text);
        self
    }

    /// Adds several texts.
    pub fn texts<S: AsRef<str>>(self, texts: impl IntoIterator<Item = S>) -> Self {
        texts
            .into_iter()
            .fold(self, |key, text| key.text(text.as_ref()))
    }

    /// Adds a file's contents, or everything below a directory.
    pub fn files(mut self, path: &Path) -> Result<Self> {
        for entry in WalkDir::new(path).sort_by_file_name() {
            let entry = entry?;
            let name = entry.path().strip_prefix(path)?.as_os_str().as_bytes();
            if entry.file_type().is_dir() {
                continue;
            }
            let mode = entry.metadata()?.permissions().mode();
            let contents = if entry.path_is_symlink() {
                fs::read_link(entry.path())?.as_os_str().as_bytes().to_vec()
            } else {
                fs::read(entry.path()).with_context(|| format!("reading {:?}", entry.path()))?
            };
            for part in [name, &mode.to_le_bytes(), &contents] {
                self.0.update((part.len() as u64).to_le_bytes());
                self.0.update(part);
            }
        }
        Ok(self)
    }

    /// The digest, in hexadecimal.
    pub fn finish(self) -> String {
        self.0
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

/// Makes something unless it was already made from the same inputs. `name` identifies it (it may contain
/// slashes); other processes that want the same thing wait until it is there.
pub fn ensure(
    name: &str,
    title: &str,
    key: Key,
    make: impl FnOnce(&Step) -> Result<()>,
) -> Result<()> {
    let stamp = paths::build().join("stamps").join(name);
    let key = key.finish();
    let fresh = || fs::read_to_string(&stamp).is_ok_and(|found| found == key);
    // First without the lock, so that what exists can be used while something else is made.
    if fresh() {
        return Ok(());
    }
    let _lock = lock(name)?;
    if fresh() {
        return Ok(());
    }
    // From here on, the directory holds neither the old thing nor the new one.
    match fs::remove_file(&stamp) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    step(title, make)?;
    if let Some(directory) = stamp.parent() {
        fs::create_dir_all(directory)?;
    }
    fs::write(&stamp, key).with_context(|| format!("writing {}", stamp.display()))
}

/// Takes the lock of this name, which other processes that use `build/` respect.
pub fn lock(name: &str) -> Result<Flock<File>> {
    let directory = paths::build().join("locks");
    fs::create_dir_all(&directory)?;
    let path = directory.join(name.replace('/', "_"));
    let file = File::options().create(true).append(true).open(&path)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((file, Errno::EWOULDBLOCK)) => {
            say(&format!(
                "  ... waiting for another process that builds {name}"
            ));
            Flock::lock(file, FlockArg::LockExclusive)
                .map_err(|(_, error)| error)
                .with_context(|| format!("locking {}", path.display()))
        }
        Err((_, error)) => Err(error).with_context(|| format!("locking {}", path.display())),
    }
}
