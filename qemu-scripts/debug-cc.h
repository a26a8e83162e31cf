/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Headers of the kernel's that are compiled once for all files (debug-cc).  One that most files include
 * saves most; one that few include costs them little.
 */
#include <linux/module.h>
#include <linux/kernel.h>
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/fs.h>
#include <linux/interrupt.h>
#include <linux/device.h>
#include <linux/seq_file.h>
#include <linux/highmem.h>
#include <linux/kthread.h>
#include <linux/pagemap.h>
#include <linux/memcontrol.h>
#include <linux/swap.h>
#include <linux/ftrace.h>
#include <linux/security.h>
#include <linux/dma-mapping.h>
#include <linux/pci.h>
#include <linux/blkdev.h>
#include <linux/proc_fs.h>
#include <linux/perf_event.h>
#include <linux/syscalls.h>
#include <linux/acpi.h>
