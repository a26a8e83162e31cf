/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * The ioctls of the test importer.  src/uapi.rs declares the same for Rust;
 * tests/host compares the two.
 *
 * Every descriptor of /dev/pinbuf_test_importer is one device, which can be
 * attached to one dma-buf and hold several mappings of it, and one vmap.
 * Closing the descriptor removes all of these.  mmap() of the descriptor maps
 * one page of kernel memory as VM_PFNMAP, which nothing can pin.
 */
#ifndef _PINBUF_TEST_IMPORTER_H
#define _PINBUF_TEST_IMPORTER_H

#include <linux/ioctl.h>
#include <linux/types.h>

/* The maximum number of mappings that one device holds at the same time. */
#define PTI_MAPPINGS 8

/* The same values as in enum dma_data_direction. */
#define PTI_BIDIRECTIONAL	0
#define PTI_TO_DEVICE		1
#define PTI_FROM_DEVICE		2

/**
 * struct pti_attach - make the device and attach it to a dma-buf
 * @fd:       the dma-buf
 * @mask_bits: width of the device's addresses, 24 to 64
 * @max_seg:  the maximum length of a segment, in bytes; 0: not declared, which
 *            means 64 KiB
 * @pci:      0: a device of its own, which is not behind an IOMMU; otherwise
 *            the address of a PCI device of domain 0, bus << 8 | devfn, on
 *            whose behalf the buffer is mapped: that device's own mask applies
 *            instead of @mask_bits, and PTI_RW needs PTI_RW_VMAP
 * @boundary: no segment may cross an address that is a multiple of @boundary
 *            plus one; 0: not declared, which means 4 GiB.  Only for a device
 *            of its own
 * @max_mapping: out: the longest segment that the DMA layer can map, in bytes
 */
struct pti_attach {
	__s32 fd;
	__u32 mask_bits;
	__u32 max_seg;
	__u32 pci;
	__u64 boundary;
	__u64 max_mapping;
};

/**
 * struct pti_map - map the buffer for the device
 * @direction: PTI_*
 * @mapping:   out: the mapping's number
 * @ns:        out: the duration of dma_buf_map_attachment()
 */
struct pti_map {
	__u32 direction;
	__u32 mapping;
	__u64 ns;
};

/**
 * struct pti_unmap - remove a mapping
 * @mapping: its number
 * @reserved: zero
 * @ns:      out: the duration of dma_buf_unmap_attachment()
 */
struct pti_unmap {
	__u32 mapping;
	__u32 reserved;
	__u64 ns;
};

/**
 * struct pti_entry - one scatterlist entry, as the device sees it
 * @addr: DMA address
 * @len:  length in bytes
 */
struct pti_entry {
	__u64 addr;
	__u64 len;
};

/**
 * struct pti_report - the scatterlist of a mapping
 * @mapping:  its number
 * @capacity: capacity of @entries, in elements
 * @entries:  address of an array of struct pti_entry
 * @count:    out: number of DMA entries
 * @total:    out: sum of their lengths
 * @min_len:  out: length of the shortest
 * @max_len:  out: length of the longest
 * @align:    out: bitwise OR of all addresses and lengths
 * @adjacent: out: number of entries that begin where the previous one ends
 */
struct pti_report {
	__u32 mapping;
	__u32 capacity;
	__u64 entries;
	__u64 count;
	__u64 total;
	__u64 min_len;
	__u64 max_len;
	__u64 align;
	__u64 adjacent;
};

#define PTI_RW_WRITE	(1U << 0)	/* from @data to the buffer */
#define PTI_RW_VMAP	(1U << 1)	/* through the vmap, not as the device */

/**
 * struct pti_rw - read or write as the device does, or through the vmap
 * @mapping: the mapping's number (not with PTI_RW_VMAP)
 * @flags:   PTI_RW_*
 * @offset:  first byte in the buffer
 * @len:     length in bytes
 * @data:    address of the caller's memory to copy to or from
 */
struct pti_rw {
	__u32 mapping;
	__u32 flags;
	__u64 offset;
	__u64 len;
	__u64 data;
};

/**
 * struct pti_time - a call without arguments
 * @ns: out: the duration of the call
 */
struct pti_time {
	__u64 ns;
};

#define PTI_CPU_END	(1U << 0)	/* end_cpu_access, else begin_ */

/**
 * struct pti_cpu - begin or end the kernel's own access
 * @direction: PTI_*
 * @flags:     PTI_CPU_*
 * @ns:        out: the duration of the call
 */
struct pti_cpu {
	__u32 direction;
	__u32 flags;
	__u64 ns;
};

/**
 * struct pti_pin - pin a range of the caller's memory and unpin it
 * @addr:   first byte; with @fd, the offset in the file
 * @len:    length in bytes
 * @stride: pin one page per @stride bytes; a multiple of the page size.  If it
 *          equals the page size, pages are pinned in batches, otherwise one by
 *          one.
 * @pages:  out: number of pages pinned
 * @pin_ns: out: the duration of pinning
 * @unpin_ns: out: the duration of unpinning
 * @fd:     a memfd, whose folios are pinned by memfd_pin_folios(), in batches;
 *          -1: pin by pin_user_pages_fast()
 * @reserved: zero
 */
struct pti_pin {
	__u64 addr;
	__u64 len;
	__u64 stride;
	__u64 pages;
	__u64 pin_ns;
	__u64 unpin_ns;
	__s32 fd;
	__u32 reserved;
};

/**
 * struct pti_segments - measure the cost of mapping and unmapping a scatterlist
 * @count:    number of entries, 1 to 2^20; all refer to the same page
 * @reserved: zero
 * @map_ns:   out: the duration of allocating, filling and mapping it
 * @unmap_ns: out: the duration of unmapping and freeing it
 */
struct pti_segments {
	__u32 count;
	__u32 reserved;
	__u64 map_ns;
	__u64 unmap_ns;
};

#define PTI_PINS_LASTING	(1U << 0)	/* all later calls, too */
#define PTI_PINS_LONGTERM	(1U << 1)	/* only calls with FOLL_LONGTERM count */
#define PTI_PINS_OTHER		(1U << 2)	/* every other later call, too */

/**
 * struct pti_fail_pins - make calls that pin fail
 * @nth:      the first call that fails, from 1 on
 * @flags:    PTI_PINS_*
 * @error:    the errno that it returns; 0: it returns that it pinned nothing
 * @reserved: zero
 *
 * Counts the calling task's own calls of pin_user_pages_fast() and
 * memfd_pin_folios(), from this call until PTI_PINS_FAILED or until the
 * descriptor is closed.  Calls that fail do nothing else.  With EINTR, the task
 * is marked as having a signal pending, but no signal is pending.
 *
 *   EBUSY       the descriptor's last PTI_FAIL_PINS has not ended
 *   EOPNOTSUPP  needs x86-64 or arm64, and a kernel with CONFIG_KPROBES
 *
 * and the errors of register_kprobes().
 */
struct pti_fail_pins {
	__u32 nth;
	__u32 flags;
	__u32 error;
	__u32 reserved;
};

/**
 * struct pti_pins_failed - end PTI_FAIL_PINS, by the task that made that call
 * @seen:   out: number of calls that were counted
 * @failed: out: number of these that were made to fail
 *
 *   EINVAL  no PTI_FAIL_PINS is active, or another task made it
 */
struct pti_pins_failed {
	__u64 seen;
	__u64 failed;
};

/* The maximum number of calls that PTI_SYNCS_END lists. */
#define PTI_SYNCS 256

/**
 * struct pti_sync - one call that maintains caches
 * @addr:      physical address
 * @len:       length in bytes
 * @direction: PTI_*
 * @for_cpu:   1: arch_sync_dma_for_cpu(), 0: arch_sync_dma_for_device()
 */
struct pti_sync {
	__u64 addr;
	__u64 len;
	__u32 direction;
	__u32 for_cpu;
};

/**
 * struct pti_syncs - end PTI_SYNCS_BEGIN, by the task that made that call
 * @syncs: address of an array of PTI_SYNCS elements of struct pti_sync
 * @count: out: number of calls; the first PTI_SYNCS of them are in @syncs
 * @reserved: zero
 *
 *   EOPNOTSUPP  devices are always coherent on this machine, or the kernel has
 *               no CONFIG_KPROBES
 */
struct pti_syncs {
	__u64 syncs;
	__u32 count;
	__u32 reserved;
};

/* No attribute, which has eight bits. */
#define PTI_NOT_MAPPED 0x100

/**
 * struct pti_attributes - the memory attributes of the buffer's first page
 * @addr:   where the caller has mapped it, and accessed it
 * @user:   out: the attributes of that mapping: as in MAIR_EL1 on arm64, the
 *          bits for caching of the page-table entry on x86
 * @vmap:   out: those of the kernel's mapping, PTI_NOT_MAPPED without one
 * @direct: out: those of the page in the direct map
 *
 * Needs a mapping for the device, whose first entry names the page.
 *
 *   EOPNOTSUPP  on other architectures
 */
struct pti_attributes {
	__u64 addr;
	__u64 user;
	__u64 vmap;
	__u64 direct;
};

#define PTI_IOC_TYPE	'u'
#define PTI_ATTACH	_IOWR(PTI_IOC_TYPE, 0xe0, struct pti_attach)
#define PTI_DETACH	_IO(PTI_IOC_TYPE, 0xe1)
#define PTI_MAP		_IOWR(PTI_IOC_TYPE, 0xe2, struct pti_map)
#define PTI_UNMAP	_IOWR(PTI_IOC_TYPE, 0xe3, struct pti_unmap)
#define PTI_REPORT	_IOWR(PTI_IOC_TYPE, 0xe4, struct pti_report)
#define PTI_RW		_IOW(PTI_IOC_TYPE, 0xe5, struct pti_rw)
#define PTI_VMAP	_IOR(PTI_IOC_TYPE, 0xe6, struct pti_time)
#define PTI_VUNMAP	_IOR(PTI_IOC_TYPE, 0xe7, struct pti_time)
#define PTI_CPU		_IOWR(PTI_IOC_TYPE, 0xe8, struct pti_cpu)
#define PTI_PIN		_IOWR(PTI_IOC_TYPE, 0xe9, struct pti_pin)
#define PTI_SEGMENTS	_IOWR(PTI_IOC_TYPE, 0xea, struct pti_segments)
#define PTI_FAIL_PINS	_IOW(PTI_IOC_TYPE, 0xeb, struct pti_fail_pins)
#define PTI_PINS_FAILED	_IOR(PTI_IOC_TYPE, 0xec, struct pti_pins_failed)
/*
 * Of all devices that this descriptor makes from now on: whether caches are
 * coherent with them.  Without the call they are as the platform has it for
 * devices that its firmware does not describe.
 */
#define PTI_COHERENT	_IOW(PTI_IOC_TYPE, 0xee, __u32)
#define PTI_SYNCS_BEGIN	_IO(PTI_IOC_TYPE, 0xef)
#define PTI_SYNCS_END	_IOWR(PTI_IOC_TYPE, 0xf0, struct pti_syncs)
#define PTI_ATTRIBUTES	_IOWR(PTI_IOC_TYPE, 0xf1, struct pti_attributes)
/* Returns a dma-buf of one page that supports no operation. */
#define PTI_EXPORT	_IO(PTI_IOC_TYPE, 0xed)

#endif /* _PINBUF_TEST_IMPORTER_H */
