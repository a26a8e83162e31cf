/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * libpinbuf: dma-bufs of a process's own memory, for C.
 *
 * Link with -lpinbuf.  All lengths are in bytes, and multiples of the page size unless stated
 * otherwise.  On success, functions return zero or a positive number; on failure, a negative error
 * number, as <linux/pinbuf.h> documents for the kernel's calls.  They do not set errno.  All
 * functions may be called from any thread; a struct pinbuf_watch is used by one thread at a time.
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
 * Opens /dev/pinbuf and returns a descriptor (close-on-exec), to be closed with close().
 *   -ENOENT  there is no such device: load the module
 *   -EACCES  this user may not open it
 *   -ENOTTY  it is not the device of pinbuf
 */
int pinbuf_open(void);

/* Fills in the features and limits of the kernel's pinbuf.  Sets query->size itself.  Returns 0. */
int pinbuf_query(int device, struct pinbuf_query *query);

/* Fills in what a buffer consists of.  Sets info->size and info->fd itself.  Returns 0.
 *   -EINVAL  buffer is not a dma-buf of pinbuf
 */
int pinbuf_info(int device, int buffer, struct pinbuf_info *info);

/*
 * Lists the parts of a buffer that the memory's owner does not see any more, or may not see: at
 * most count parts, from the byte *offset on.  Sets *offset to the byte where the next call
 * continues, which is the size of the buffer if nothing is left.  Returns the number of parts.
 *   -EINVAL  buffer is not a dma-buf of pinbuf, or *offset is beyond its end or within a page
 *   -ENOTTY  the kernel's pinbuf does not know the call
 */
int pinbuf_discards(int device, int buffer, struct pinbuf_discard *list, size_t count,
		    uint64_t *offset);

/* A set of buffers, watched for discarded parts.  It has no thread: poll it from time to time. */
struct pinbuf_watch;

/* Stores a watch of no buffers at watch.  It keeps a descriptor of the device.  Returns 0. */
int pinbuf_watch_new(struct pinbuf_watch **watch, int device);

/*
 * Adds a buffer to the watch, which duplicates the descriptor: buffer may be closed, and its number
 * still names this buffer in the watch.  Do not add another one with the same number before it is
 * removed.  Returns 0.  On failure, the buffer is not watched, and the others still are.
 *   -EINVAL  buffer is not a dma-buf, or is one of another exporter than pinbuf
 *   -ENOTTY  the kernel's pinbuf does not know PINBUF_DISCARDS
 */
int pinbuf_watch_add(struct pinbuf_watch *watch, int buffer);

/* Removes a buffer from the watch, and closes the watch's descriptor of it.  Returns 0.
 *   -ENOENT  no buffer was added with this number
 */
int pinbuf_watch_remove(struct pinbuf_watch *watch, int buffer);

/*
 * Checks all buffers, and stores the numbers of those whose discarded parts are not the same as at
 * the last check (before the first check: none), at most count.  The next call stores the others.
 * Returns the number of stored numbers.  pinbuf_discards() lists the parts.  On failure, the watch
 * does not change: the next call that succeeds stores the numbers.
 *   -EINVAL  one of the buffers is not a dma-buf of pinbuf
 *   -ENOTTY  the kernel's pinbuf does not know the call
 */
int pinbuf_watch_poll(struct pinbuf_watch *watch, int *buffers, size_t count);

/* Closes the watch's descriptors, and frees the watch.  Does nothing if it is null. */
void pinbuf_watch_free(struct pinbuf_watch *watch);

/*
 * Makes a dma-buf of a range of the address space and returns its descriptor (close-on-exec).
 * From this call on, every holder of the buffer can read and write this memory.  Errors: see
 * struct pinbuf_create.
 */
int pinbuf_export(int device, void *address, size_t len);

/*
 * The same for count ranges, in their order: an array of struct iovec can be cast on 64-bit
 * systems.  flags are PINBUF_CREATE_*, except PINBUF_CREATE_CHECK_BACKING (-EINVAL).
 */
int pinbuf_export_ranges(int device, const struct pinbuf_range *ranges, size_t count,
			 uint32_t flags);

/* Kinds of memory. */
#define PINBUF_REGION_ANONYMOUS		0	/* pages of ordinary size */
#define PINBUF_REGION_THP		1	/* transparent huge pages, if available */
#define PINBUF_REGION_HUGETLB_2M	2	/* pages of the pool of 2 MiB pages */
#define PINBUF_REGION_HUGETLB_1G	3	/* pages of the pool of 1 GiB pages */

/* Memory that a child does not inherit on fork(), as is recommended for exported memory. */
struct pinbuf_region {
	void *address;
	size_t len;		/* rounded up to whole pages of its kind */
};

/*
 * Allocates zeroed memory of at least len bytes; len need not be a multiple of the page size.
 * Returns 0.
 *   -EINVAL     len is zero, or kind is unknown
 *   -EOVERFLOW  len is larger than the address space
 *   -ENOMEM     there is not enough memory, or there are too few free huge pages
 */
int pinbuf_region_new(struct pinbuf_region *region, size_t len, int kind);

/* Frees the memory.  Buffers that were made of it keep their pages. */
void pinbuf_region_free(struct pinbuf_region *region);

/*
 * Maps a whole dma-buf for reading and writing, aligned so that huge page-table entries fit.
 * Stores its size at len unless len is null.  Returns 0.  Unmap it with munmap().
 */
int pinbuf_map(int buffer, void **address, size_t *len);

/* Kinds of access between pinbuf_begin() and pinbuf_end(); may be combined. */
#define PINBUF_READ	1
#define PINBUF_WRITE	2

/* Begins an access by the CPU, through any mapping of the memory.  Returns 0. */
int pinbuf_begin(int buffer, int access);

/* Ends an access that began with the same value of access.  Returns 0. */
int pinbuf_end(int buffer, int access);

#ifdef __cplusplus
}
#endif

#endif /* LIBPINBUF_H */
