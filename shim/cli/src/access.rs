// SPDX-License-Identifier: MIT OR Apache-2.0

//! Which users may open a device, by its mode; and what refuses it where the mode does not.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};

use nix::errno::Errno;
use nix::fcntl::{openat2, OFlag, OpenHow, ResolveFlag};
use nix::sys::statvfs::{fstatvfs, FsFlags};

/// Whom the kernel takes a process for when it opens a file, and what else bounds it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Credentials {
    uid: u32,
    groups: Vec<u32>,
    /// `CAP_DAC_OVERRIDE` in our namespace: modes do not bind it, where users are the host's.
    overrides: bool,
    /// `CAP_IPC_LOCK` where users are the host's: what it locks is charged to nobody.
    pub locks_memory: bool,
    /// Users are not the host's, so that one number stands for all that have none.
    in_namespace: bool,
    /// Filters of system calls that are in force.
    pub filters: u32,
}

impl Credentials {
    /// Those of a process; `self` is this one.
    pub fn of(pid: &str) -> io::Result<Self> {
        let text = fs::read(format!("/proc/{pid}/status"))?;
        let mut found = Self::parse(&text);
        for map in ["uid_map", "gid_map"] {
            let ids = fs::read_to_string(format!("/proc/{pid}/{map}"))?;
            let all = ["0", "0", "4294967295"];
            found.in_namespace |= !ids.split_whitespace().eq(all);
        }
        // A namespace may have the host's numbers, and its privileges are its own all the same.
        let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/user")).ok();
        let is_ours = namespace(pid) == namespace("self");
        found.locks_memory &= !found.in_namespace && is_ours;
        found.overrides &= is_ours;
        Ok(found)
    }

    /// From /proc/PID/status. The process's name, in its first line, has its line breaks escaped.
    fn parse(text: &[u8]) -> Self {
        const DAC_OVERRIDE: u32 = 1;
        const IPC_LOCK: u32 = 14;
        let field = |name: &str| -> Vec<String> {
            String::from_utf8_lossy(text)
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .map(|rest| rest.split_whitespace().map(str::to_owned).collect())
                .unwrap_or_default()
        };
        let number = |word: Option<&String>| word.and_then(|word| word.parse().ok());
        let mut groups: Vec<u32> = field("Groups")
            .iter()
            .filter_map(|w| w.parse().ok())
            .collect();
        // The last of the four is the one that counts for files.
        groups.extend(number(field("Gid").get(3)));
        let effective = field("CapEff");
        let effective = effective
            .first()
            .and_then(|word| u64::from_str_radix(word, 16).ok());
        let mode = number(field("Seccomp").first()).unwrap_or(0);
        // Mode 1 is a fixed list of four calls; older kernels do not count filters.
        let filters = number(field("Seccomp_filters").first()).unwrap_or(1);
        Self {
            uid: number(field("Uid").get(3)).unwrap_or(u32::MAX),
            groups,
            overrides: effective.is_some_and(|bits| bits >> DAC_OVERRIDE & 1 == 1),
            locks_memory: effective.is_some_and(|bits| bits >> IPC_LOCK & 1 == 1),
            in_namespace: false,
            filters: if mode == 0 { 0 } else { filters.max(1) },
        }
    }
}

/// A device's file, as a process sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub mode: u32,
    pub owner: u32,
    pub group: u32,
    /// Its number; 0 if it is no character device.
    pub number: u64,
    /// Its mount does not let devices be opened.
    nodev: bool,
    /// Entries for other users and groups, such as those that udev gives to the user at the local seat: what each is for, and
    /// its bits. With entries, the mode's bits for the group are the mask of these.
    acl: Option<Vec<(Entry, u32)>>,
}

/// Whom an entry of an access control list is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    User(u32),
    /// The file's own group.
    Own,
    Group(u32),
    Mask,
    /// The file's owner and all others, as in the mode.
    InMode,
}

/// The entries in the attribute `system.posix_acl_access`: a version, and tag, bits and number of each.
fn entries(attribute: &[u8]) -> Vec<(Entry, u32)> {
    let entries = attribute.get(4..).unwrap_or_default().chunks_exact(8);
    entries
        .map(|entry| {
            let half = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
            let id = u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]);
            let whose = match half(0) {
                0x02 => Entry::User(id),
                0x04 => Entry::Own,
                0x08 => Entry::Group(id),
                0x10 => Entry::Mask,
                _ => Entry::InMode,
            };
            (whose, u32::from(half(2)))
        })
        .collect()
}

impl Node {
    /// Looks at a path as a process sees it, with its own root; `self` is this one.
    pub fn of(pid: &str, path: &str) -> io::Result<Self> {
        // AppArmor's profiles do not mediate O_PATH.
        let root = File::options()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(format!("/proc/{pid}/root"))?;
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT);
        let file = File::from(openat2(&root, path, how)?);
        let metadata = file.metadata()?;
        let name = c"system.posix_acl_access";
        let link = format!("/proc/self/fd/{}\0", file.as_raw_fd());
        // The largest that the kernel has.
        let mut attribute = vec![0; 64 << 10];
        // SAFETY: terminated strings, and a buffer of that length.
        let len = unsafe {
            libc::getxattr(
                link.as_ptr().cast(),
                name.as_ptr(),
                attribute.as_mut_ptr().cast(),
                attribute.len(),
            )
        };
        let acl = match Errno::result(len) {
            Ok(len) => Some(len as usize).filter(|&len| len > 0),
            // None, or a file system without any. Of another error, nothing follows.
            Err(Errno::ENODATA | Errno::EOPNOTSUPP) => None,
            Err(error) => return Err(error.into()),
        };
        let is_device = metadata.file_type().is_char_device();
        Ok(Self {
            mode: metadata.mode() & 0o777,
            owner: metadata.uid(),
            group: metadata.gid(),
            number: if is_device { metadata.rdev() } else { 0 },
            nodev: fstatvfs(file.as_fd())?.flags().contains(FsFlags::ST_NODEV),
            acl: acl.map(|len| entries(&attribute[..len])),
        })
    }

    /// The name of its group, or its number.
    pub fn group_name(&self) -> String {
        match nix::unistd::Group::from_gid(self.group.into()) {
            Ok(Some(group)) => group.name,
            _ => self.group.to_string(),
        }
    }

    /// Do its mode and its entries let a process open it for reading and writing? `None` where that is not known: a namespace
    /// shows its owner, its group, whom an entry is for, or the user's groups as nobody.
    pub fn permits(&self, who: &Credentials) -> Option<bool> {
        const NOBODY: u32 = 65534;
        let is_nobody = |id| who.in_namespace && (id == NOBODY || id == u32::MAX);
        let has = |group: u32| who.groups.contains(&group);
        let acl = self.acl.as_deref().unwrap_or_default();
        let hidden = acl.iter().any(|(whose, _)| match whose {
            Entry::User(id) => is_nobody(*id) && who.uid == NOBODY,
            Entry::Group(id) => is_nobody(*id) && has(NOBODY),
            _ => false,
        });
        // Where everybody may, or the user itself is named, groups do not matter.
        let names_user = acl
            .iter()
            .any(|(whose, _)| *whose == Entry::User(who.uid) && self.mode & 0o070 != 0);
        let by_user = who.uid != NOBODY && (who.uid == self.owner || names_user);
        let by_all = acl.is_empty() && self.mode & 0o666 == 0o666;
        let hides = is_nobody(self.owner) && who.uid == NOBODY
            || is_nobody(self.group) && has(NOBODY)
            || hidden;
        let unknown = hides && !by_user && !by_all;
        // The device belongs to the host's users, over whom a namespace's root has no power.
        let overrides = who.overrides && !who.in_namespace;
        let permitted = overrides || self.bits(who).iter().any(|bits| bits & 0o6 == 0o6);
        (!unknown).then_some(permitted)
    }

    /// The bits that count for a process: of its user, of its groups, of which one entry with both bits is enough, or of all
    /// others, as the kernel chooses.
    fn bits(&self, who: &Credentials) -> Vec<u32> {
        let has = |group: u32| who.groups.contains(&group);
        let mut found = Vec::new();
        if who.uid == self.owner {
            found.push(self.mode >> 6);
        } else if let Some(acl) = self.acl.as_ref().filter(|_| self.mode & 0o070 != 0) {
            // The mask. Where it lets nobody do anything, the kernel does not look at the entries.
            let most = self.mode >> 3;
            let of = |wanted: &dyn Fn(Entry) -> bool| -> Vec<u32> {
                let entries = acl.iter().filter(|(whose, _)| wanted(*whose));
                entries.map(|(_, bits)| bits & most).collect()
            };
            found = of(&|whose| whose == Entry::User(who.uid));
            found.truncate(1);
            if found.is_empty() {
                found = of(&|whose| match whose {
                    Entry::Own => has(self.group),
                    Entry::Group(id) => has(id),
                    _ => false,
                });
            }
            if found.is_empty() {
                found.push(self.mode);
            }
        } else if has(self.group) {
            found.push(self.mode >> 3);
        } else {
            found.push(self.mode);
        }
        found
    }

    /// The kernel lets `we` open it. Does it let `who`, too?
    pub fn opens_for(&self, who: &Credentials, we: &Credentials) -> bool {
        // As far as it is seen from here, it does not, or that is not known: the kernel knows better, and lets us. It lets
        // whoever has what we have.
        let has_ours =
            who.uid == we.uid && who.groups == we.groups && (who.overrides || !we.overrides);
        self.permits(who) == Some(true) || has_ours
    }

    /// Is it on a mount that lets no device be opened?
    pub fn on_nodev_mount(&self) -> bool {
        self.nodev
    }
}

/// The number of a miscellaneous device of the kernel's, whatever it is called in /dev.
pub fn number_of(name: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/sys/class/misc/{name}/dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some(nix::sys::stat::makedev(
        major.parse().ok()?,
        minor.parse().ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &[u8] = b"Name:\tx\\nUid:\t0 0 0 0\nUid:\t7\t7\t7\t1000\nGid:\t7\t7\t7\t1000\n\
                            Groups:\t27 108 \nCapEff:\t0000000000000000\nSeccomp:\t2\nSeccomp_filters:\t3\n";

    #[test]
    fn credentials() {
        let user = Credentials::parse(STATUS);
        let wanted = Credentials {
            uid: 1000,
            groups: vec![27, 108, 1000],
            overrides: false,
            locks_memory: false,
            in_namespace: false,
            filters: 3,
        };
        assert_eq!(user, wanted);
        let strict = Credentials::parse(b"Seccomp:\t1\nSeccomp_filters:\t0\nCapEff:\t2\n");
        assert!(strict.overrides && strict.filters == 1 && !strict.locks_memory);
        assert!(Credentials::parse(b"CapEff:\t4000\n").locks_memory);
        assert_eq!(
            Credentials::parse(b"Seccomp:\t0\nSeccomp_filters:\t0\n").filters,
            0
        );
        assert!(Credentials::of("self").is_ok());
    }

    #[test]
    fn modes() {
        let who = Credentials::parse(STATUS);
        let node = |mode, owner, group, has_acl: bool| Node {
            mode,
            owner,
            group,
            number: 1,
            nodev: false,
            acl: has_acl.then(|| vec![(Entry::User(5), 6), (Entry::Own, 0), (Entry::Mask, 6)]),
        };
        for (node, wanted) in [
            (node(0o660, 0, 108, false), Some(true)),
            (node(0o660, 0, 109, false), Some(false)),
            (node(0o660, 0, 109, true), Some(false)),
            // The mode's bits are the mask, and the group itself has none.
            (node(0o660, 0, 108, true), Some(false)),
            (node(0o666, 0, 108, true), Some(false)),
            (node(0o666, 0, 109, true), Some(true)),
            (node(0o600, 1000, 0, false), Some(true)),
            (node(0o066, 1000, 0, false), Some(false)),
            (node(0o606, 0, 108, false), Some(false)),
            (node(0o666, 0, 0, false), Some(true)),
            (node(0o664, 0, 0, false), Some(false)),
        ] {
            assert_eq!(node.permits(&who), wanted, "{node:?}");
        }
        let contained = Credentials {
            groups: vec![65534],
            in_namespace: true,
            ..who.clone()
        };
        assert_eq!(node(0o660, 65534, 65534, false).permits(&contained), None);
        assert_eq!(
            node(0o660, 65534, 108, false).permits(&contained),
            Some(false)
        );
        // Entries for users whom the namespace does not have.
        let hidden = Node {
            acl: Some(vec![
                (Entry::User(u32::MAX), 6),
                (Entry::Own, 6),
                (Entry::Mask, 6),
            ]),
            ..node(0o660, 65534, 108, false)
        };
        let mapped = Credentials {
            groups: vec![108],
            in_namespace: true,
            ..who.clone()
        };
        assert_eq!(hidden.permits(&mapped), Some(true));
        let nobody = Credentials {
            uid: 65534,
            ..mapped
        };
        assert_eq!(hidden.permits(&nobody), None);
        let root = Credentials {
            overrides: true,
            ..who
        };
        assert_eq!(node(0, 0, 0, false).permits(&root), Some(true));
    }

    #[test]
    fn others_open_what_we_may() {
        let we = Credentials::parse(STATUS);
        let node = |mode, has_acl: bool| Node {
            mode,
            owner: 0,
            group: 0,
            number: 1,
            nodev: false,
            acl: has_acl.then(|| vec![(Entry::User(1000), 6), (Entry::Own, 6), (Entry::Mask, 6)]),
        };
        let stranger = Credentials {
            uid: 8,
            ..we.clone()
        };
        let without_groups = Credentials {
            groups: vec![],
            ..we.clone()
        };
        let root = Credentials {
            overrides: true,
            ..we.clone()
        };
        // Within a namespace, in which the device's owner and group are nobody.
        let inside = Credentials {
            in_namespace: true,
            groups: vec![65534],
            ..we.clone()
        };
        let without_hidden_groups = Credentials {
            groups: vec![],
            ..inside.clone()
        };
        let inside_root = Credentials {
            overrides: true,
            ..inside.clone()
        };
        for (who, we, wanted) in [
            (&inside, &inside, true),
            (&without_hidden_groups, &inside, false),
            // It may be by this privilege alone that we may open it.
            (&inside, &inside_root, false),
            (&inside_root, &inside_root, true),
            (&inside_root, &inside, true),
        ] {
            for mode in [0o660, 0o600] {
                let hidden = Node {
                    owner: 65534,
                    group: 65534,
                    ..node(mode, false)
                };
                assert_eq!(hidden.opens_for(who, we), wanted, "{mode:o} {who:?}");
            }
        }
        let in_view = Node {
            owner: 65534,
            group: 65534,
            ..node(0o660, true)
        };
        let for_all = Node {
            mode: 0o666,
            acl: None,
            ..in_view.clone()
        };
        for node in [in_view, for_all] {
            assert!(node.opens_for(&inside, &inside_root), "{node:?}");
        }
        for (mode, acl, who, we, wanted) in [
            (0o666, false, &stranger, &we, true),
            (0o660, false, &stranger, &we, false),
            (0o660, false, &we, &we, true),
            (0o660, false, &without_groups, &we, false),
            (0o660, false, &we, &root, false),
            (0o660, false, &root, &root, true),
            (0o660, true, &stranger, &we, false),
            (0o660, true, &without_groups, &we, true),
        ] {
            let node = node(mode, acl);
            assert_eq!(node.opens_for(who, we), wanted, "{node:?} {who:?}");
        }
    }

    #[test]
    fn devices_as_a_process_sees_them() {
        let null = Node::of("self", "/dev/null").unwrap();
        assert_eq!(null.number, nix::sys::stat::makedev(1, 3));
        assert_eq!(Node::of("self", "/proc/version").unwrap().number, 0);
        assert!(Node::of("self", "/no/such/file").is_err());
    }
}
