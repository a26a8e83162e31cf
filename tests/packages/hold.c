/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Holds a buffer and compares it with its memory until SIGTERM. Exits with 0 if they never differed,
 * and if another buffer can be made then.
 */

#include <libpinbuf.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static volatile sig_atomic_t ended;

static void end(int signal)
{
	(void)signal;
	ended = 1;
}

int main(void)
{
	struct pinbuf_region memory;
	void *map;
	int device = pinbuf_open();
	int buffer;
	unsigned char value = 0;

	if (device < 0 || pinbuf_region_new(&memory, 8 << 20, PINBUF_REGION_THP))
		return 1;
	buffer = pinbuf_export(device, memory.address, memory.len);
	if (buffer < 0 || pinbuf_map(buffer, &map, NULL))
		return 2;
	signal(SIGTERM, end);
	puts("holding");
	fflush(stdout);
	while (!ended) {
		memset(memory.address, ++value, memory.len);
		if (pinbuf_begin(buffer, PINBUF_READ) || memcmp(memory.address, map, memory.len) ||
		    pinbuf_end(buffer, PINBUF_READ))
			return 3;
		usleep(100000);
	}
	return pinbuf_export(device, memory.address, memory.len) < 0 ? 4 : 0;
}
