// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * A program written for udmabuf, in C: it is built statically, for 64 and for 32 bits. Makes a dma-buf of a memfd as
 * large as a 4K framebuffer, writes through the one, and reads through the other. It prints who made the dma-buf.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/dma-buf.h>
#include <linux/udmabuf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define SIZE (3840 * 2160 * 4)
#define PAGE 4096

static void check(int failed, const char *what)
{
	if (failed) {
		perror(what);
		exit(1);
	}
}

static uint32_t value(uint32_t page)
{
	return (page + 1) * 0x9e3779b9;
}

int main(void)
{
	int memfd = memfd_create("client", MFD_ALLOW_SEALING);
	check(memfd < 0, "memfd_create");
	check(ftruncate(memfd, SIZE), "ftruncate");
	check(fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK), "sealing the memfd");
	char *memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
	check(memory == MAP_FAILED, "mapping the memfd");

	int device = open("/dev/udmabuf", O_RDWR | O_CLOEXEC);
	check(device < 0, "opening /dev/udmabuf");
	struct udmabuf_create create = { .memfd = memfd, .flags = UDMABUF_FLAGS_CLOEXEC, .size = SIZE };
	int buffer = ioctl(device, UDMABUF_CREATE, &create);
	check(buffer < 0, "UDMABUF_CREATE");
	check(fcntl(buffer, F_GETFD) != FD_CLOEXEC, "no FD_CLOEXEC");

	for (uint32_t page = 0; page < SIZE / PAGE; page++)
		memcpy(memory + page * PAGE, &(uint32_t){ value(page) }, 4);
	const char *seen = mmap(NULL, SIZE, PROT_READ, MAP_SHARED, buffer, 0);
	check(seen == MAP_FAILED, "mapping the buffer");
	struct dma_buf_sync sync = { .flags = DMA_BUF_SYNC_START | DMA_BUF_SYNC_READ };
	check(ioctl(buffer, DMA_BUF_IOCTL_SYNC, &sync), "DMA_BUF_IOCTL_SYNC");
	for (uint32_t page = 0; page < SIZE / PAGE; page++) {
		if (memcmp(seen + page * PAGE, &(uint32_t){ value(page) }, 4)) {
			fprintf(stderr, "page %u is another\n", page);
			return 1;
		}
	}

	char path[64], line[128];
	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", buffer);
	FILE *info = fopen(path, "r");
	check(!info, path);
	while (fgets(line, sizeof(line), info)) {
		if (!strncmp(line, "exp_name:\t", 10))
			printf("%d bytes by %s", SIZE, line + 10);
	}
	return 0;
}
