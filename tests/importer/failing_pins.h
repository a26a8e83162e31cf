/* SPDX-License-Identifier: GPL-2.0 */
#ifndef _PINBUF_TEST_FAILING_PINS_H
#define _PINBUF_TEST_FAILING_PINS_H

#include <linux/kprobes.h>
#include <linux/types.h>

struct pti_fail_pins;
struct pti_pins_failed;
struct task_struct;

/**
 * struct pti_failing_pins - the task whose pins fail, and which of them
 * @pages:  the probe of pin_user_pages_fast()
 * @folios: the probe of memfd_pin_folios()
 * @probed: whether they are registered
 * @task:   the armed task, with a reference; NULL if there is none
 * @nth:    the first call that fails
 * @flags:  PTI_PINS_*
 * @error:  the error that it returns; 0: it returns that it pinned nothing
 * @seen:   number of calls that @task made
 * @failed: number of these that failed
 */
struct pti_failing_pins {
	struct kprobe pages;
	struct kprobe folios;
	bool probed;
	struct task_struct *task;
	u32 nth;
	u32 flags;
	u32 error;
	u64 seen;
	u64 failed;
};

/* Not concurrent: the callers hold the descriptor's lock. */
int pti_fail_pins(struct pti_failing_pins *pins,
		  struct pti_fail_pins __user *user);
int pti_pins_failed(struct pti_failing_pins *pins,
		    struct pti_pins_failed __user *user);
void pti_end_failing_pins(struct pti_failing_pins *pins);

#endif /* _PINBUF_TEST_FAILING_PINS_H */
