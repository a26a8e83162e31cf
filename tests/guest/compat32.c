// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * A 32-bit process that calls ioctl() for a 64-bit one: its calls take the
 * compat path into the kernel.  src/compat32.rs starts it.
 *
 * usage: pinbuf-compat32 FD ADDRESS LENGTH
 *
 * Maps the file FD at ADDRESS.  Then reads calls from standard input, and
 * writes their results, or negative error numbers, to standard output.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

_Static_assert(sizeof(void *) == 4, "a program for 32 bits");

int main(int argc, char **argv)
{
	struct {
		int32_t fd;
		uint32_t command;
		uint32_t argument;
	} call;

	if (argc != 4)
		return 2;
	if (mmap((void *)strtoul(argv[2], NULL, 0), strtoul(argv[3], NULL, 0),
		 PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE,
		 atoi(argv[1]), 0) == MAP_FAILED)
		return 1;
	while (read(STDIN_FILENO, &call, sizeof(call)) == sizeof(call)) {
		int32_t result = ioctl(call.fd, call.command, call.argument);

		if (result < 0)
			result = -errno;
		if (write(STDOUT_FILENO, &result, sizeof(result)) != sizeof(result))
			return 1;
	}
	return 0;
}
