/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * pinbuf: dma-bufs of a process's own memory.
 *
 * Install as <linux/pinbuf.h>.  uapi/src/contract.rs declares the same for
 * Rust; a test compares the two, field by field.
 */
#ifndef _UAPI_LINUX_PINBUF_H
#define _UAPI_LINUX_PINBUF_H

#include <linux/ioctl.h>
#include <linux/types.h>

/*
 * The device is /dev/pinbuf.  Opening it, for reading or for writing, creates
 * no state: every call acts on its caller, whichever process opened the
 * descriptor.
 *
 * The struct of each call begins with its own size in bytes, as the caller
 * knows it, and grows only at its end.  The kernel accepts shorter structs than
 * its own (missing fields read as zero) down to the size of version 1, and
 * longer ones if the tail that it does not know is zero.  All structs have the
 * same layout for 32-bit and 64-bit callers.
 *
 * Errors that all calls share:
 *   EFAULT  the struct, or memory that it points to, cannot be read or written
 *   EINVAL  the size is smaller than that of version 1; a reserved field is not
 *           zero; a flag is unknown
 *   E2BIG   the struct is longer than the kernel's and its tail is not zero, or
 *           it is longer than a page
 *   ENOTTY  the command is unknown
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
 * This is the layout of a 64-bit struct iovec: an array of these can be passed
 * unchanged.
 */
struct pinbuf_range {
	__u64 addr;
	__u64 len;
};

/**
 * struct pinbuf_backing - the part of a file that a range is expected to map
 * @fd:       a descriptor of the file (memfd, tmpfs or hugetlbfs)
 * @reserved: zero
 * @offset:   the offset in the file that the range begins at; a multiple of the
 *            page size
 */
struct pinbuf_backing {
	__s32 fd;
	__u32 reserved;
	__u64 offset;
};

/* The descriptor of the dma-buf is closed on execve(). */
#define PINBUF_CREATE_CLOEXEC		(1U << 0)
/*
 * @backing names, for each range, the file and the offset that the caller
 * expects to be mapped.  The kernel compares each page that it pinned with
 * these, and returns EAGAIN if a page is a different one: the mapping has
 * changed.
 */
#define PINBUF_CREATE_CHECK_BACKING	(1U << 1)
/*
 * Bit 2 is reserved for notifications of discards under a live buffer.  Bit 3
 * was used by a development version and stays unused.
 */
#define PINBUF_CREATE_FLAGS \
	(PINBUF_CREATE_CLOEXEC | PINBUF_CREATE_CHECK_BACKING)

/**
 * struct pinbuf_create - pin ranges and export them as one dma-buf
 * @size:     sizeof(struct pinbuf_create)
 * @flags:    PINBUF_CREATE_*
 * @ranges:   address of an array of @count struct pinbuf_range, in the order of
 *            the buffer
 * @count:    number of ranges, 1 to PINBUF_MAX_RANGES
 * @reserved: zero
 * @backing:  with PINBUF_CREATE_CHECK_BACKING, address of an array of @count
 *            struct pinbuf_backing; otherwise zero
 *
 * Returns the descriptor of a dma-buf, opened O_RDWR.  The buffer holds the
 * pages that the ranges mapped during the call; ranges may repeat and overlap.
 * It keeps these pages until its last user is gone: after munmap(),
 * MADV_DONTNEED or a hole punched into the file, the process sees other pages
 * there, and the buffer does not.  A process that forks should apply
 * MADV_DONTFORK to private memory while a buffer of it exists.
 *
 * A buffer can consist of anonymous memory, shmem (memfd, tmpfs, System V) and
 * hugetlb.  Each page is faulted in as if the process wrote to it, so the call
 * waits for pages that a userfaultfd has yet to provide.  SIGKILL ends the
 * wait, and so does any signal without a handler that would terminate the
 * process, unless a signal with a handler is pending, which does not end the
 * wait.  A thread must not create a buffer of memory whose userfaults it alone
 * resolves: it would wait for itself until it is killed.
 *
 * The pages are charged to the caller's user under RLIMIT_MEMLOCK, whichever
 * process releases them, and are included in VmPin of /proc/PID/status.  In a
 * user namespace, all buffers count together: as those of the host user that
 * created the namespace, or, if root created it, as those of the namespace's
 * root user.  A process with CAP_IPC_LOCK in the initial user namespace has no
 * limit.
 *
 * All or nothing: after an error, no page is pinned or charged and no
 * descriptor is open.
 *
 *   EINVAL     there is no range, or there are too many; a range is empty, or
 *              its address or length is not a multiple of the page size; the
 *              offset of a backing is not a multiple of the page size, or its
 *              end does not fit into 63 bits; @backing is given without
 *              PINBUF_CREATE_CHECK_BACKING
 *   EOVERFLOW  the end of a range or of a backing does not fit into 64 bits, or
 *              the sum of the lengths does not fit into 63
 *   EFAULT     a range is not mapped, beyond what can be mapped, not writable,
 *              broken, or of a kind other than those above (a file on disk
 *              mapped shared, memory of a device or of a driver, memfd_secret);
 *              or its backing store is exhausted (a hugetlb pool, a full
 *              tmpfs).  Map the range, or free memory of that kind.
 *   ENOMEM     the buffer exceeds both RLIMIT_MEMLOCK and the allowance
 *              (PINBUF_QUERY), or is larger than the machine's memory; memory
 *              is exhausted; or a page is pinned a million times already.
 *              Raise `ulimit -l`.
 *   EBUSY      pages are in memory where nothing may stay pinned (ZONE_MOVABLE,
 *              CMA) and could not be migrated, also after retries.  Try again
 *              later.
 *   EINTR      a fatal signal arrived
 *   EAGAIN     PINBUF_CREATE_CHECK_BACKING: a page is not that of its backing
 *   EBADF      PINBUF_CREATE_CHECK_BACKING: a descriptor is not open
 *   EMFILE, ENFILE  no descriptor is free
 *   ENODEV     the module is being unloaded
 *
 * Importers of the dma-buf get, besides their own errors:
 *
 *   EBUSY      the device may write to the mapping, and bounce buffers are
 *              needed for it or for another mapping that a device may write to
 *   EHWPOISON  memory of the buffer was found broken
 *   EINVAL     the device does not accept a whole page in one segment
 *
 * mmap() of the dma-buf fails, besides the core's own errors, with:
 *
 *   EINVAL     the mapping is not shared
 *   EPERM      the mapping is executable
 *
 * A mapping that needs bounce buffers and that its device only reads shows what
 * the CPU writes (between DMA_BUF_IOCTL_SYNC calls), and not what other devices
 * write after the mapping was made.  While a mapping exists that needs bounce
 * buffers and that its device writes to, what the CPU writes is safe after the
 * call that ends the access; before that call, other accesses, or the end of
 * that mapping, may overwrite it.
 */
struct pinbuf_create {
	__u32 size;
	__u32 flags;
	__u64 ranges;
	__u32 count;
	__u32 reserved;
	__u64 backing;
};

/* Mappings for the CPU use huge page-table entries where they fit. */
#define PINBUF_FEATURE_HUGE_MMAP	(1ULL << 0)
/* PINBUF_CREATE_CHECK_BACKING is supported. */
#define PINBUF_FEATURE_CHECK_BACKING	(1ULL << 1)
/* Bit 2 was used by a development version and stays unused. */
/* PINBUF_DISCARDS and the fields of PINBUF_INFO for discards are supported. */
#define PINBUF_FEATURE_DISCARDS		(1ULL << 3)

/*
 * How pages are charged; see struct pinbuf_query and struct pinbuf_info.  1 was
 * used by a development version and stays unused.
 */
#define PINBUF_CHARGE_USER	0	/* the user's limit, RLIMIT_MEMLOCK */
#define PINBUF_CHARGE_ALLOWANCE	2	/* the user's allowance beyond the limit */
#define PINBUF_CHARGE_NONE	3	/* nothing: CAP_IPC_LOCK */

/**
 * struct pinbuf_query - version, features and limits of this kernel's pinbuf
 * @size:            in: sizeof(struct pinbuf_query); out: the kernel's own size
 * @version:         PINBUF_VERSION
 * @features:        PINBUF_FEATURE_*
 * @create_flags:    the PINBUF_CREATE_* that are supported
 * @max_ranges:      the maximum number of ranges per call
 * @page_size:       in bytes; addresses and lengths must be multiples of it
 * @charge_mode:     PINBUF_CHARGE_USER: how the limit is applied
 * @reserved:        zero
 * @memlock_bytes:   the caller's RLIMIT_MEMLOCK in bytes; all ones: it is
 *                   unlimited, or the caller has CAP_IPC_LOCK
 * @allowance_bytes: the number of bytes that a user may keep in place beyond it
 * @allowance_used:  the part of it that live buffers of the caller's user use,
 *                   in bytes
 * @allowance_system: the maximum amount for all users together, in bytes
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
 * @bytes:        the size of the buffer in bytes
 * @pages:        the same in pages
 * @extents:      number of runs of physically adjacent pages in the buffer
 * @pins:         number of pins of pages or folios that the buffer holds
 * @kernel_bytes: kernel memory that the list of extents takes, in bytes
 * @charged_pages: number of pages charged; more than @pages if an allowance is
 *                charged for whole large folios, or for a buffer of few pages
 * @charge:       PINBUF_CHARGE_*: what the pages are charged to
 * @mappings:     number of mappings of devices that exist
 * @state:        PINBUF_STATE_*: the states of its parts
 * @held_bytes:   memory that the buffer keeps in place, in bytes: its pages
 *                (each as often as the buffer contains it), and the rest of the
 *                large folios that contain them.  One page of a transparent
 *                huge page keeps all of it.  Of hugetlb, only the pages count,
 *                because its pool is bounded already
 * @discarded_bytes: the number of bytes that the memory's owner does not see
 *                any more
 * @unsure_bytes: the number of bytes whose state is unknown
 *
 * PINBUF_DISCARDS lists these parts.  Without PINBUF_FEATURE_DISCARDS, @state,
 * @discarded_bytes and @unsure_bytes have no meaning, and must be zero in the
 * call.  The time that the call takes grows with the number of pages, or of
 * huge pages.
 *
 *   EBADF   @fd is not open
 *   EINVAL  @fd is not a dma-buf of pinbuf
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
 * struct pinbuf_discards - parts of a buffer that the owner may not see any
 * more
 * @size:     in: sizeof(struct pinbuf_discards); out: the kernel's own size
 * @fd:       in: the dma-buf's descriptor
 * @offset:   in: the first byte to check, a multiple of the page size; out: the
 *            byte after the last one that was checked
 * @list:     address of an array of struct pinbuf_discard
 * @count:    in: capacity of @list, in elements; out: number of elements that
 *            were filled in
 * @reserved: zero
 *
 * Lists the parts of the buffer, from @offset on and in the order of the
 * buffer, that the memory's owner does not see any more or may not see.  When
 * @list is full, the call returns, and @offset is where the next call
 * continues; it is the size of the buffer when nothing is left.  With a @count
 * of zero, @offset becomes the first byte of the first such part.
 *
 * Memory of files (memfd, tmpfs, System V, hugetlbfs, shared anonymous memory)
 * is seen as long as it belongs to the file, whether a process maps it or not.
 * A hole, truncation and the release of the file remove pages from it.  Private
 * memory is seen as long as a process maps it, at whatever address.  munmap(),
 * MADV_DONTNEED, MADV_GUARD_INSTALL, a shrinking mremap(), another mapping in
 * its place, execve(), and the end of the last process or device that uses the
 * address space remove it, and so does truncation of the file for private
 * copies of its pages.  If a hole or a truncation cuts a huge page, the part
 * that is cut off is cleared and stays seen.
 *
 * Parts that the call reports as discarded stay discarded.  Other parts may be
 * discarded by the time it returns.  On a kernel without CONFIG_PAGE_MAPCOUNT,
 * PINBUF_STATE_UNSURE is reported for private memory in a transparent huge page
 * that is not mapped as a whole, from when its mapping is split, for example
 * because a part is unmapped, until no page of it is mapped; and in a folio of
 * another size, which is always mapped page by page.  Memory that the kernel
 * found broken, whose owner gets SIGBUS, may be reported or not.
 *
 * The time that the call takes grows with the number of pages, or of huge
 * pages; a call whose @list is full checks up to the end of the next such part.
 * After EFAULT and EINTR, @list may have been written to; @offset and @count
 * are unchanged.
 *
 *   EBADF   @fd is not open
 *   EINVAL  @fd is not a dma-buf of pinbuf; @offset is beyond its end, or not a
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

/* 'u' 50-5F follows udmabuf's 'u' 40-4F, and is free in ioctl-number.rst. */
#define PINBUF_IOC_TYPE	'u'
#define PINBUF_CREATE	_IOW(PINBUF_IOC_TYPE, 0x50, struct pinbuf_create)
#define PINBUF_QUERY	_IOWR(PINBUF_IOC_TYPE, 0x51, struct pinbuf_query)
#define PINBUF_INFO	_IOWR(PINBUF_IOC_TYPE, 0x52, struct pinbuf_info)
#define PINBUF_DISCARDS	_IOWR(PINBUF_IOC_TYPE, 0x53, struct pinbuf_discards)

#endif /* _UAPI_LINUX_PINBUF_H */
