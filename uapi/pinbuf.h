/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * pinbuf: dma-bufs of a process's own memory.
 *
 * Install as <linux/pinbuf.h>.  The Rust twin of this file is uapi/src/lib.rs;
 * a test compares the two, field by field.
 */
#ifndef _UAPI_LINUX_PINBUF_H
#define _UAPI_LINUX_PINBUF_H

#include <linux/ioctl.h>
#include <linux/types.h>

/*
 * The device is /dev/pinbuf.  Opening it, for reading or for writing, gives no
 * state: every call acts on its caller, whoever opened the descriptor.
 *
 * Every struct begins with its own size in bytes, as its caller knows it, and
 * grows only at its end.  The kernel accepts shorter structs than its own
 * (missing fields read as zero) down to the size of version 1, and longer ones
 * when the tail that it does not know is zero.  All have the same layout for
 * 32-bit and 64-bit callers.
 *
 * Errors that every call shares:
 *   EFAULT  the struct, or memory that it points to, cannot be read or written
 *   EINVAL  size is smaller than version 1's; a reserved field is not zero;
 *           a flag is not known
 *   E2BIG   the struct is longer than the kernel's and the tail is not zero, or
 *           it is longer than a page
 *   ENOTTY  the command is not known
 */

/* The version of this interface; PINBUF_QUERY returns the kernel's. */
#define PINBUF_VERSION 1

/* The maximum number of ranges of one PINBUF_CREATE. */
#define PINBUF_MAX_RANGES 65536

/**
 * struct pinbuf_range - a range of the caller's address space
 * @addr: first byte; a multiple of the page size
 * @len:  length in bytes; a multiple of the page size, not zero
 *
 * The layout of a 64-bit struct iovec: one can be passed as it is.
 */
struct pinbuf_range {
	__u64 addr;
	__u64 len;
};

/**
 * struct pinbuf_backing - the part of a file that a range is expected to map
 * @fd:       a descriptor of the file (memfd, tmpfs or hugetlbfs)
 * @reserved: zero
 * @offset:   the byte of the file that is the range's first; a multiple of the
 *            page size
 */
struct pinbuf_backing {
	__s32 fd;
	__u32 reserved;
	__u64 offset;
};

/* The dma-buf's descriptor is closed on execve(). */
#define PINBUF_CREATE_CLOEXEC		(1U << 0)
/*
 * @backing says, range by range, which file and offset the caller believes to
 * be mapped.  The kernel compares that with the pages that it pinned and
 * answers EAGAIN when one of them is another's: the mapping changed meanwhile.
 */
#define PINBUF_CREATE_CHECK_BACKING	(1U << 1)
/*
 * Bit 2 is reserved for notices of discards under a live buffer.  Bit 3 was used
 * by a development version and stays unused.
 */
#define PINBUF_CREATE_FLAGS \
	(PINBUF_CREATE_CLOEXEC | PINBUF_CREATE_CHECK_BACKING)

/**
 * struct pinbuf_create - pin ranges and make them one dma-buf
 * @size:     sizeof(struct pinbuf_create)
 * @flags:    PINBUF_CREATE_*
 * @ranges:   address of @count struct pinbuf_range, in the buffer's order
 * @count:    ranges, 1 to PINBUF_MAX_RANGES
 * @reserved: zero
 * @backing:  address of @count struct pinbuf_backing with
 *            PINBUF_CREATE_CHECK_BACKING, else zero
 *
 * Returns a dma-buf's descriptor, opened O_RDWR.  The buffer holds the pages
 * that the ranges mapped during the call; ranges may repeat and overlap.  It
 * stays with these pages until its last user is gone: after munmap(), a hole
 * punched into the file or MADV_DONTNEED the process sees other pages there,
 * the buffer does not.  A process that forks should give private memory
 * MADV_DONTFORK while a buffer of it lives.
 *
 * A buffer consists of anonymous memory, shmem (memfd, tmpfs, System V) and
 * hugetlb.  Each page is faulted in as if the process wrote to it, so a page
 * that a userfaultfd has to provide is waited for.  SIGKILL ends the wait, and
 * so does any signal without a handler that would end the process, unless one
 * with a handler is pending: that does not end the wait.  A thread must not
 * create a buffer of memory whose userfaults it alone resolves: it would wait
 * for itself until it is killed.
 *
 * The pages are charged to the caller's user under RLIMIT_MEMLOCK, whichever
 * process they are released in, and shown as VmPin in /proc/PID/status.  In a
 * user namespace, all buffers that belong to one user of the host count
 * together; of a container that root made, all that belong to its root user.  A
 * process with CAP_IPC_LOCK has no limit.
 *
 * All or nothing: after an error no page is pinned or charged and no
 * descriptor is open.
 *
 *   EINVAL     no range or too many; a range that is empty, or whose address or
 *              length is no multiple of the page size; a backing whose offset is
 *              no multiple of it, or that ends beyond 2^63
 *   EOVERFLOW  the end of a range does not fit into 64 bits, or the sum of the
 *              lengths not into 63
 *   EFAULT     (of a range) not mapped, or beyond what can be mapped, not
 *              writable, of another kind than those above (a file on disk mapped
 *              shared, memory of a device or of a driver, memfd_secret), broken,
 *              or its backing store is exhausted (a hugetlb pool, a full tmpfs).
 *              Map it, or free some.
 *   ENOMEM     over the memlock limit and over the allowance (PINBUF_QUERY), out
 *              of memory, larger than the machine's memory, or a page that is
 *              pinned a million times already.  Raise `ulimit -l`.
 *   EBUSY      pages lie where nothing may stay pinned (ZONE_MOVABLE, CMA) and
 *              could not be migrated, also after retries.  Try again later.
 *   EINTR      a fatal signal arrived
 *   EAGAIN     PINBUF_CREATE_CHECK_BACKING: a page is not the one named
 *   EBADF      PINBUF_CREATE_CHECK_BACKING: a descriptor is not open
 *   EMFILE, ENFILE  no descriptor is free
 *   ENODEV     the module is being unloaded
 *
 * Importers of the dma-buf see, besides their own errors:
 *
 *   EBUSY      a mapping that its device may write to, and that needs bounce
 *              buffers, cannot be beside another one that a device may write to
 *   EHWPOISON  memory of the buffer was found broken
 *   EINVAL     the device takes no whole page in one piece
 *
 * A mapping that needs bounce buffers and that its device only reads shows what
 * the CPU writes (between DMA_BUF_IOCTL_SYNC calls), and not what other devices
 * write after it was made.  Beside a mapping that needs bounce buffers and that
 * its device writes to, what the CPU writes is safe after the call that ends the
 * access; other accesses, or the end of that mapping, may undo it before.
 */
struct pinbuf_create {
	__u32 size;
	__u32 flags;
	__u64 ranges;
	__u32 count;
	__u32 reserved;
	__u64 backing;
};

/* Buffers map for the CPU with huge page-table entries where they fit. */
#define PINBUF_FEATURE_HUGE_MMAP	(1ULL << 0)
/* PINBUF_CREATE_CHECK_BACKING is known. */
#define PINBUF_FEATURE_CHECK_BACKING	(1ULL << 1)
/* Bit 2 was used by a development version and stays unused. */
/* PINBUF_DISCARDS is known, and PINBUF_INFO fills in what it says of discards. */
#define PINBUF_FEATURE_DISCARDS		(1ULL << 3)

/*
 * How pages are charged; see struct pinbuf_query and struct pinbuf_info.  1 was
 * used by a development version and stays unused.
 */
#define PINBUF_CHARGE_USER	0	/* the user's limit, RLIMIT_MEMLOCK */
#define PINBUF_CHARGE_ALLOWANCE	2	/* the user's allowance beyond the limit */
#define PINBUF_CHARGE_NONE	3	/* nothing: CAP_IPC_LOCK */

/**
 * struct pinbuf_query - what this kernel's pinbuf can do
 * @size:            in: sizeof(struct pinbuf_query); out: the kernel's own size
 * @version:         PINBUF_VERSION
 * @features:        PINBUF_FEATURE_*
 * @create_flags:    the PINBUF_CREATE_* that are known
 * @max_ranges:      the maximum number of ranges per call
 * @page_size:       bytes; what addresses and lengths must be multiples of
 * @charge_mode:     PINBUF_CHARGE_USER: how the limit is applied
 * @memlock_bytes:   the caller's RLIMIT_MEMLOCK; all ones: no limit, or the
 *                   caller has CAP_IPC_LOCK
 * @allowance_bytes: what a user may pin beyond it
 * @allowance_used:  of that, the caller's user's share in live buffers, bytes
 * @allowance_system: the same for all users together, at most, bytes
 */
struct pinbuf_query {
	__u32 size;
	__u32 version;
	__u64 features;
	__u64 create_flags;
	__u32 max_ranges;
	__u32 page_size;
	__u32 charge_mode;
	__u32 reserved;
	__u64 memlock_bytes;
	__u64 allowance_bytes;
	__u64 allowance_used;
	__u64 allowance_system;
};

/**
 * struct pinbuf_info - one of pinbuf's dma-bufs
 * @size:         in: sizeof(struct pinbuf_info); out: the kernel's own size
 * @fd:           in: the dma-buf's descriptor
 * @bytes:        the buffer's size
 * @pages:        the same in pages
 * @extents:      runs of physically adjacent pages that it consists of
 * @pins:         page or folio references that it holds
 * @kernel_bytes: kernel memory kept for its extents
 * @charged_pages: pages charged; more than @pages where an allowance is charged
 *                for the whole of large folios, or for a buffer of few pages
 * @charge:       PINBUF_CHARGE_*: to what
 * @mappings:     devices' mappings that live now
 * @state:        PINBUF_STATE_*: which kinds of parts there are
 * @held_bytes:   memory that the buffer keeps in place: its pages (each as often
 *                as it is there), and the rest of the large folios that they are
 *                in.  One page of a transparent huge page keeps all of it.  Of
 *                hugetlb, the pages alone: its pool is bounded already
 * @discarded_bytes: of @bytes, those that the memory's owner does not see any
 *                more
 * @unsure_bytes: of @bytes, those whose state is unknown
 *
 * PINBUF_DISCARDS says where they are.  Without PINBUF_FEATURE_DISCARDS, @state
 * and these two say nothing, and must be zero in the call.  The time that the call
 * takes grows with the number of pages, or of huge pages.
 *
 *   EBADF   @fd is not open
 *   EINVAL  @fd is no dma-buf of pinbuf's
 *   EINTR   a fatal signal arrived
 */
struct pinbuf_info {
	__u32 size;
	__s32 fd;
	__u64 bytes;
	__u64 pages;
	__u64 extents;
	__u64 pins;
	__u64 kernel_bytes;
	__u64 charged_pages;
	__u32 charge;
	__u32 mappings;
	__u64 state;
	__u64 held_bytes;
	__u64 discarded_bytes;
	__u64 unsure_bytes;
};

/*
 * The memory's owner does not see this part of the buffer any more, and never
 * will again: the buffer and the owner have different pages there.
 */
#define PINBUF_STATE_DISCARDED	(1U << 0)
/* Whether the owner sees this part of the buffer is unknown. */
#define PINBUF_STATE_UNSURE	(1U << 1)

/**
 * struct pinbuf_discard - a part of a buffer
 * @offset:   first byte of the buffer; a multiple of the page size
 * @len:      length in bytes; a multiple of the page size, not zero
 * @state:    one of PINBUF_STATE_*
 * @reserved: zero
 */
struct pinbuf_discard {
	__u64 offset;
	__u64 len;
	__u32 state;
	__u32 reserved;
};

/**
 * struct pinbuf_discards - parts of a buffer that its memory's owner may not see
 * @size:     in: sizeof(struct pinbuf_discards); out: the kernel's own size
 * @fd:       in: the dma-buf's descriptor
 * @offset:   in: the first byte to check, a multiple of the page size; out: the
 *            byte behind the last that was checked
 * @list:     address of an array of struct pinbuf_discard
 * @count:    in: elements for which @list has room; out: those filled in
 * @reserved: zero
 *
 * Lists the parts of the buffer, from @offset on and in its order, that the
 * memory's owner does not see any more or may not see.  When @list is full the
 * call returns, and @offset is where the next call goes on; it is the buffer's
 * size when nothing is left.  With a @count of zero, @offset becomes the first
 * byte of the first such part.
 *
 * Memory of files (memfd, tmpfs, System V, hugetlbfs, shared anonymous memory)
 * is seen while it is the file's, whether a process maps it or not.  A hole, a
 * truncation and the end of the file take pages away.  Private memory is seen
 * while a process maps it, at whatever address: munmap(), MADV_DONTNEED,
 * MADV_GUARD_INSTALL, a shrinking mremap(), another mapping in its place, execve()
 * and the end of the last process or device that has the address space take it
 * away, and the truncation of the file for copies of its pages.  A part of a
 * huge page that a hole or a truncation cuts is cleared and stays seen.
 *
 * What the call reports as discarded stays so.  What it does not report may be
 * discarded by the time it returns.  PINBUF_STATE_UNSURE is reported of parts of
 * transparent huge pages on a kernel without CONFIG_PAGE_MAPCOUNT.  Memory that
 * the kernel found broken, whose owner gets SIGBUS, may be reported or not.
 *
 * The time that the call takes grows with the number of pages, or of huge pages;
 * a call whose @list is full checks up to the end of the next such part.  After
 * EFAULT and EINTR, @list may have been written to, @offset and @count are as
 * before.
 *
 *   EBADF   @fd is not open
 *   EINVAL  @fd is no dma-buf of pinbuf's; @offset is beyond its end, or no
 *           multiple of the page size
 *   EFAULT  @list cannot be written
 *   EINTR   a fatal signal arrived
 */
struct pinbuf_discards {
	__u32 size;
	__s32 fd;
	__u64 offset;
	__u64 list;
	__u32 count;
	__u32 reserved;
};

/* 'u' 50-5F: behind udmabuf's 'u' 40-4F, free in ioctl-number.rst. */
#define PINBUF_IOC_TYPE	'u'
#define PINBUF_CREATE	_IOW(PINBUF_IOC_TYPE, 0x50, struct pinbuf_create)
#define PINBUF_QUERY	_IOWR(PINBUF_IOC_TYPE, 0x51, struct pinbuf_query)
#define PINBUF_INFO	_IOWR(PINBUF_IOC_TYPE, 0x52, struct pinbuf_info)
#define PINBUF_DISCARDS	_IOWR(PINBUF_IOC_TYPE, 0x53, struct pinbuf_discards)

#endif /* _UAPI_LINUX_PINBUF_H */
