/* SPDX-License-Identifier: GPL-2.0 */
#ifndef _PINBUF_TEST_SYNCS_H
#define _PINBUF_TEST_SYNCS_H

#include <linux/kprobes.h>
#include <linux/types.h>

#include "importer.h"

struct task_struct;

/**
 * struct pti_watch - the maintenance of caches that one task's calls lead to
 * @for_device: the probe of arch_sync_dma_for_device()
 * @for_cpu:    the probe of arch_sync_dma_for_cpu()
 * @task:       the task, with a reference; NULL if there is none
 * @count:      number of calls since the watch began
 * @syncs:      the first PTI_SYNCS of them
 */
struct pti_watch {
	struct kprobe for_device;
	struct kprobe for_cpu;
	struct task_struct *task;
	u32 count;
	struct pti_sync syncs[PTI_SYNCS];
};

/* Not concurrent: the callers hold the descriptor's lock. */
int pti_watch_syncs(struct pti_watch **place);
int pti_syncs(struct pti_watch **place, struct pti_syncs __user *user);
void pti_end_watch(struct pti_watch **place);

int pti_attributes(struct pti_attributes __user *user, const void *vmap,
		   phys_addr_t phys);

#endif /* _PINBUF_TEST_SYNCS_H */
