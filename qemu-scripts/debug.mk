# SPDX-License-Identifier: MIT OR Apache-2.0
#
# The directories that KASAN does not instrument.  make reads this file before each of the kernel's Makefiles,
# which can override it ($(obj) is the directory that is being built).
#
# Objects that the driver allocates are accessed by the driver, memory management, the cores of dma-buf, DRM,
# media and IOMMUs, the VFS, locks, queues and the scheduler.  KASAN instruments all of these, and every
# directory that is not listed here.  The code below never accesses such an object (sockets pass the file of a
# dma-buf, but the VFS drops its references), and instrumenting it would slow down each guest: the interpreter
# of ACPI alone took a third of the boot time.
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
