// SPDX-License-Identifier: MIT OR Apache-2.0

//! The topmost layer of a guest: pinbuf, installed.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result};

use crate::cache::{self, Key};
use crate::debian::tree::{remove, Tree, BUILD};
use crate::image::userspace::{self, Build, Profile, Target};
use crate::kernel::module;
use crate::kernel::Kernel;
use crate::{image, paths};

/// How many layers are kept, for runs that change nothing.
const KEPT: usize = 12;

/// Makes the layer for this kernel, and returns its path.
pub fn ensure(tools: &Tree, kernel: &Kernel, profile: Profile, build: Build) -> Result<PathBuf> {
    let mut files: BTreeMap<PathBuf, PathBuf> = BTreeMap::new();
    let target = Target {
        arch: kernel.arch,
        page: kernel.page()?,
    };
    let programs = match build {
        Build::Nothing => userspace::built(profile, target)?,
        Build::All => userspace::build(tools, profile, target, None)?,
        Build::Package(name) => userspace::build(tools, profile, target, Some(name))?,
    };
    for path in programs {
        if let Some(place) = userspace::place(&path) {
            files.insert(place, path);
        }
    }
    let program = userspace::compat32(tools, kernel.arch)?;
    files.extend(userspace::place(&program).map(|place| (place, program)));
    if !matches!(build, Build::Package(_)) {
        let client = userspace::static_client(tools, target)?;
        files.insert("usr/bin/udmabuf-conformance-static".into(), client);
    }
    let modules = module::ensure(tools, kernel)?;
    let place = Path::new("usr/lib/modules").join(&kernel.release);
    for entry in fs::read_dir(lists(tools, kernel, &modules)?)? {
        let entry = entry?;
        files.insert(place.join(entry.file_name()), entry.path());
    }
    for path in modules {
        let name = path
            .file_name()
            .context("module without a name")?
            .to_owned();
        files.insert(place.join("updates").join(name), path);
    }
    files.insert(
        "usr/include/linux/pinbuf.h".into(),
        paths::root().join("uapi/pinbuf.h"),
    );

    // Other processes may build meanwhile: the key is made of what was copied.
    let directory = paths::build().join("payloads");
    fs::create_dir_all(&directory)?;
    let stage = tempfile::Builder::new()
        .prefix("stage-")
        .tempdir_in(&directory)?;
    fs::set_permissions(stage.path(), fs::Permissions::from_mode(0o755))?;
    for (place, path) in &files {
        let to = stage.path().join(place);
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::copy(path, &to).with_context(|| format!("copying {}", path.display()))?;
    }
    let key = Key::new().text("1").files(stage.path())?;
    let name = format!("{}-{}", kernel.release, &key.clone().finish()[..16]);
    let image = directory.join(format!("{name}.img"));
    cache::ensure(
        &format!("payload/{name}"),
        "pinbuf's layer of the guest",
        key,
        |step| {
            forget_old()?;
            image::pack(tools, step, stage.path(), &image)
        },
    )?;
    Ok(image)
}

/// Makes the lists that modprobe reads, of the kernel's modules and of ours, and returns where they
/// are.  depmod reads every module for that, so it runs only when ours need or offer other things.
fn lists(tools: &Tree, kernel: &Kernel, ours: &[PathBuf]) -> Result<PathBuf> {
    let mut key = Key::new().text("1").text(&kernel.stamp()?);
    for path in ours {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        key = key.text(&name).texts(needs_and_aliases(&fs::read(path)?));
    }
    let release = &kernel.release;
    let name = format!("{release}/lists-{}", &key.clone().finish()[..16]);
    let directory = paths::build().join("kernels").join(&name);
    cache::ensure(
        &format!("lists/{name}"),
        "lists of modules (depmod)",
        key,
        |step| {
            const SCRIPT: &str = r#"
            set -eu
            lists=$1 root=$2 release=$3; shift 3
            updates=$lists/updates/usr/lib/modules/$release/updates
            mkdir -p /mnt "$updates"
            cp "$@" "$updates"
            mount -t overlay overlay -o "lowerdir=$lists/updates:$root" /mnt
            depmod -b /mnt -o "$lists/out" "$release"
            find "$lists/out" -name 'modules.*' -exec mv '{}' "$lists" ';'
            rm -r "$lists/out" "$lists/updates"
        "#;
            remove(&directory)?;
            fs::create_dir_all(&directory)?;
            let root = format!("{BUILD}/kernels/{release}/root");
            let lists = format!("{BUILD}/kernels/{name}");
            let ours = ours
                .iter()
                .map(|path| crate::debian::tree::inside(path))
                .collect::<Result<Vec<_>>>()?;
            let mut arguments = vec!["sh", "-c", SCRIPT, "sh", &lists, &root, release];
            arguments.extend(ours.iter().map(String::as_str));
            step.run(&mut tools.command(&arguments)?, "images.log")
        },
    )?;
    Ok(directory)
}

/// What depmod reads of a module: which ones it needs, and by which names it is asked for.
fn needs_and_aliases(module: &[u8]) -> Vec<String> {
    module
        .split(|&byte| byte == 0)
        .filter(|text| {
            ["depends=", "softdep=", "alias="]
                .iter()
                .any(|n| text.starts_with(n.as_bytes()))
        })
        .map(|text| String::from_utf8_lossy(text).into_owned())
        .collect()
}

/// Removes the layers that were made longest ago.  (A guest that runs keeps its own open.)
fn forget_old() -> Result<()> {
    let directory = paths::build().join("payloads");
    let mut images: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in fs::read_dir(&directory).into_iter().flatten() {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "img") {
            images.push((fs::metadata(&path)?.modified()?, path));
        }
    }
    images.sort();
    let surplus = images.len().saturating_sub(KEPT);
    for (_, path) in images.drain(..surplus) {
        let name = path.file_stem().unwrap_or_default();
        remove(&paths::build().join("stamps/payload").join(name))?;
        remove(&path)?;
    }
    Ok(())
}
