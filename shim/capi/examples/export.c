/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Makes a buffer of memory and reads it through the buffer: cc export.c -lpinbuf */

#include <libpinbuf.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int main(void)
{
	struct pinbuf_region memory;
	struct pinbuf_info info;
	void *map;
	size_t len;
	int device, buffer, error;

	device = pinbuf_open();
	if (device < 0) {
		fprintf(stderr, "pinbuf_open: %s\n", strerror(-device));
		return 1;
	}
	error = pinbuf_region_new(&memory, 5 << 20, PINBUF_REGION_THP);
	if (error) {
		fprintf(stderr, "pinbuf_region_new: %s\n", strerror(-error));
		return 1;
	}
	strcpy(memory.address, "hello");
	buffer = pinbuf_export(device, memory.address, memory.len);
	if (buffer < 0) {
		fprintf(stderr, "pinbuf_export: %s\n", strerror(-buffer));
		return 1;
	}
	error = pinbuf_info(device, buffer, &info);
	if (!error)
		error = pinbuf_map(buffer, &map, &len);
	if (!error)
		error = pinbuf_begin(buffer, PINBUF_READ);
	if (error) {
		fprintf(stderr, "the buffer: %s\n", strerror(-error));
		return 1;
	}
	printf("%zu bytes in %llu extents at %p: %s\n", len,
	       (unsigned long long)info.extents, map, (const char *)map);
	pinbuf_end(buffer, PINBUF_READ);
	munmap(map, len);
	close(buffer);
	pinbuf_region_free(&memory);
	close(device);
	return 0;
}
