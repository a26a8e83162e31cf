/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * libpinbuf: dma-bufs of a process's own memory, for C.
 *
 * Link with -lpinbuf_c.  All lengths are bytes, and whole pages unless said otherwise.  Functions
 * return zero or a positive number, or a negative errno as the kernel's calls are documented in
 * <linux/pinbuf.h>; errno itself is not set.  All of them may be called from any thread.
 *
 *	struct pinbuf_region memory;
 *	int device = pinbuf_open();
 *	if (device < 0 || pinbuf_region_new(&memory, 8 << 20, PINBUF_REGION_THP) < 0)
 *		...
 *	int buffer = pinbuf_export(device, memory.address, memory.len);
 *	...
 *	close(buffer);
 *	pinbuf_region_free(&memory);
 *	close(device);
 */
#ifndef LIBPINBUF_H
#define LIBPINBUF_H

#include <stddef.h>
#include <stdint.h>
#include <linux/pinbuf.h>

#ifdef __cplusplus
extern "C" {
#endif

/*
 * Opens /dev/pinbuf, and returns its descriptor (close-on-exec); close() it.
 *   -ENOENT  there is none: load the module
 *   -EACCES  not for this user
 *   -ENOTTY  it is another device
 */
int pinbuf_open(void);

/* Fills in what the kernel can do; size is set by the call.  Returns 0. */
int pinbuf_query(int device, struct pinbuf_query *query);

/* Fills in what a buffer consists of; size and fd are set by the call.  Returns 0.
 *   -EINVAL  buffer is no dma-buf of pinbuf's
 */
int pinbuf_info(int device, int buffer, struct pinbuf_info *info);

/*
 * Lists parts of a buffer that the memory's owner does not see any more, or may not see: from the
 * byte *offset on, up to count.  *offset becomes the byte where the next call goes on; it is the
 * buffer's size when nothing is left.  Returns how many parts were filled in.
 *   -EINVAL  buffer is no dma-buf of pinbuf's, or *offset is beyond its end or inside of a page
 *   -ENOTTY  the kernel's pinbuf does not know the call
 */
int pinbuf_discards(int device, int buffer, struct pinbuf_discard *list, size_t count,
		    uint64_t *offset);

/*
 * Makes a dma-buf of a range of the address space and returns its descriptor (close-on-exec).
 * From now on, whoever has the buffer can read and write this memory.  Errors: see
 * struct pinbuf_create.
 */
int pinbuf_export(int device, void *address, size_t len);

/*
 * The same for count ranges, in their order: an array of struct iovec can be cast on 64-bit
 * systems.  flags are PINBUF_CREATE_*, without PINBUF_CREATE_CHECK_BACKING (-EINVAL).
 */
int pinbuf_export_ranges(int device, const struct pinbuf_range *ranges, size_t count,
			 uint32_t flags);

/* Kinds of memory. */
#define PINBUF_REGION_ANONYMOUS		0	/* pages as malloc() gives */
#define PINBUF_REGION_THP		1	/* transparent huge pages, where there are */
#define PINBUF_REGION_HUGETLB_2M	2	/* of the pool of 2 MiB pages */
#define PINBUF_REGION_HUGETLB_1G	3	/* of the pool of 1 GiB pages */

/* Memory that is not inherited by fork(), as exported memory should not be. */
struct pinbuf_region {
	void *address;
	size_t len;		/* rounded up to whole pages of its kind */
};

/*
 * Makes zeroed memory of len bytes or more, of any len but zero.  Returns 0.
 *   -EINVAL  len is zero, or kind is not known
 *   -ENOMEM  no memory, or no free huge pages
 */
int pinbuf_region_new(struct pinbuf_region *region, size_t len, int kind);

/* Frees it.  Buffers made of it keep their pages. */
void pinbuf_region_free(struct pinbuf_region *region);

/*
 * Maps a dma-buf for reading and writing, all of it, aligned so that huge page-table entries fit.
 * Stores its size at len unless that is null.  Returns 0.  munmap() it.
 */
int pinbuf_map(int buffer, void **address, size_t *len);

/* What the CPU does between pinbuf_begin() and pinbuf_end(). */
#define PINBUF_READ	1
#define PINBUF_WRITE	2

/* Begins an access by the CPU, through any mapping of the memory.  Returns 0. */
int pinbuf_begin(int buffer, int access);

/* Ends it, with the same access.  Returns 0. */
int pinbuf_end(int buffer, int access);

#ifdef __cplusplus
}
#endif

#endif /* LIBPINBUF_H */
