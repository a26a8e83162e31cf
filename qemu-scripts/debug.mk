# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Where KASAN does not look.  make reads this before each of the kernel's Makefiles, which still decide
# for themselves if they say more ($(obj) is the directory that is being built).
#
# What the driver allocates is touched by the driver, by memory management, by the cores of dma-buf, DRM,
# media and IOMMUs, by the VFS, and by locks, queues and the scheduler: all that stays under KASAN, and so
# does what is not named here.  What follows never sees an object of the driver's (sockets pass a
# dma-buf's file, whose references the VFS drops), and would slow each guest down: ACPI's interpreter alone
# took a third of the time until one was up.
unchecked := \
	arch/x86/events/% arch/x86/kernel/% arch/x86/lib/% arch/x86/pci/% \
	block/partitions/% crypto/% \
	drivers/acpi/% drivers/block/% drivers/clocksource/% drivers/firmware/% drivers/i2c/% \
	drivers/irqchip/% drivers/net/% drivers/pci/% drivers/pnp/% drivers/rtc/% drivers/tty/% \
	drivers/video/% \
	fs/9p/% fs/configfs/% fs/ext4/% fs/iomap/% fs/jbd2/% fs/netfs/% fs/overlayfs/% fs/tracefs/% \
	kernel/cgroup/% kernel/irq/% kernel/power/% kernel/printk/% kernel/time/% kernel/trace/% \
	lib/crypto/% lib/kunit/% lib/lzo/% \
	net/% security/%
KASAN_SANITIZE = $(if $(filter $(unchecked),$(obj)/),n)
