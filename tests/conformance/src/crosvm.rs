// SPDX-License-Identifier: MIT OR Apache-2.0

//! The calls that crosvm lets its processes make on x86-64: those with a GPU (`gpu_common.policy`) and its devices
//! (`common_device.policy`, both in `jail/seccomp/x86_64`), as of August 2026.

use crate::filter::{Allowed, Test};

/// The numbers of `ioctl` for DRM have these bits.
const DRM: u32 = 0x6400;
const USERFAULTFD: &[u32] = &[0xc018_aa3f, 0xaa00];

/// Of a process with a GPU.
pub fn gpu() -> Vec<Allowed> {
    let rw = (libc::PROT_READ | libc::PROT_WRITE) as u32;
    let (read, write) = (libc::PROT_READ as u32, libc::PROT_WRITE as u32);
    let ioctls = [0x5421, 0x5451, 0x4008_6200, 0x4008_7543].map(Test::Is);
    let ioctls = ioctls.into_iter().chain([Test::Has(DRM)]);
    let ioctls = ioctls.chain(USERFAULTFD.iter().copied().map(Test::Is));
    let mut all = vec![
        Allowed::if_any(libc::SYS_ioctl, 1, ioctls),
        Allowed::if_any(
            libc::SYS_fcntl,
            1,
            [
                libc::F_DUPFD_CLOEXEC,
                libc::F_GETFD,
                libc::F_SETFD,
                libc::F_GETFL,
                libc::F_SETFL,
                libc::F_ADD_SEALS,
                libc::F_GET_SEALS,
            ]
            .map(|command| Test::Is(command as u32)),
        ),
        Allowed::if_any(
            libc::SYS_mmap,
            2,
            [rw, 0, read | libc::PROT_EXEC as u32, write, read].map(Test::Is),
        ),
        Allowed::if_any(libc::SYS_mprotect, 2, [rw, 0, read].map(Test::Is)),
        Allowed::if_any(libc::SYS_madvise, 2, advices(&[])),
        Allowed::if_any(libc::SYS_tgkill, 2, [Test::Is(libc::SIGABRT as u32)]),
    ];
    all.extend(SHARED.iter().chain(GPU).copied().map(Allowed::always));
    all
}

/// Of a device's process.
pub fn device() -> Vec<Allowed> {
    let no_code = [Test::Lacks(libc::PROT_EXEC as u32)];
    let mut all = vec![
        Allowed::if_any(
            libc::SYS_ioctl,
            1,
            USERFAULTFD.iter().copied().map(Test::Is),
        ),
        Allowed::if_any(libc::SYS_mmap, 2, no_code),
        Allowed::if_any(libc::SYS_mprotect, 2, no_code),
        Allowed::if_any(libc::SYS_madvise, 2, advices(&[libc::MADV_NOHUGEPAGE])),
        Allowed::if_any(libc::SYS_tgkill, 2, [Test::Is(libc::SIGABRT as u32)]),
        Allowed::if_any(libc::SYS_clone, 0, [Test::Has(libc::CLONE_THREAD as u32)]),
    ];
    all.extend(SHARED.iter().chain(DEVICE).copied().map(Allowed::always));
    all
}

fn advices(more: &[i32]) -> Vec<Test> {
    // MADV_GUARD_INSTALL and MADV_GUARD_REMOVE are the last two.
    let common = [
        libc::MADV_DONTNEED,
        libc::MADV_DONTDUMP,
        libc::MADV_REMOVE,
        libc::MADV_MERGEABLE,
        libc::MADV_FREE,
        102,
        103,
    ];
    let all = common.iter().chain(more);
    all.map(|&advice| Test::Is(advice as u32)).collect()
}

/// What both have.
const SHARED: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clone3,
    libc::SYS_close,
    libc::SYS_dup2,
    libc::SYS_dup,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_ftruncate,
    libc::SYS_futex,
    libc::SYS_getcwd,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_enter,
    libc::SYS_kill,
    libc::SYS_lseek,
    libc::SYS_membarrier,
    libc::SYS_memfd_create,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_pipe2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_uname,
    libc::SYS_userfaultfd,
    libc::SYS_write,
    libc::SYS_writev,
];

/// What those with a GPU have besides.
const GPU: &[i64] = &[
    libc::SYS_access,
    libc::SYS_connect,
    libc::SYS_fallocate,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_getdents,
    libc::SYS_getdents64,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getrandom,
    libc::SYS_getsockopt,
    libc::SYS_getuid,
    libc::SYS_inotify_add_watch,
    libc::SYS_inotify_init1,
    libc::SYS_inotify_rm_watch,
    libc::SYS_kcmp,
    libc::SYS_lstat,
    libc::SYS_mkdir,
    libc::SYS_newfstatat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_rename,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_setscheduler,
    libc::SYS_setpriority,
    libc::SYS_shutdown,
    libc::SYS_stat,
    libc::SYS_statx,
    libc::SYS_sysinfo,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
];

/// What devices have besides.
const DEVICE: &[i64] = &[
    libc::SYS_fcntl,
    libc::SYS_preadv2,
    libc::SYS_prlimit64,
    libc::SYS_pwritev2,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
];
