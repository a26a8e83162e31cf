// SPDX-License-Identifier: GPL-2.0
/*
 * Makes pins fail.  The kernel's fault injection reaches only the allocations
 * of GUP.  Probes at the entry of the functions that pin make these return at
 * once, for one task.
 */
#include <linux/container_of.h>
#include <linux/errno.h>
#include <linux/kprobes.h>
#include <linux/linkage.h>
#include <linux/mm.h>
#include <linux/objtool.h>
#include <linux/ptrace.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/string.h>
#include <linux/uaccess.h>

#include "failing_pins.h"
#include "importer.h"

#if (defined(CONFIG_X86_64) || defined(CONFIG_ARM64)) && defined(CONFIG_KPROBES)

#ifdef CONFIG_X86_64
/*
 * The code that a probed call continues at if it has to return at once: the
 * return address is on top of the stack, as at the entry of the function.  This
 * is what override_function_with_return() does, which modules cannot call.  A
 * probe that uses ftrace can change the instruction pointer, but not the stack.
 */
asmlinkage void pti_return_at_once(void);

asm(".text\n"
	".type pti_return_at_once, @function\n"
	ASM_FUNC_ALIGN
	"pti_return_at_once:\n"
		ANNOTATE_NOENDBR "\n"
		ASM_RET
	".size pti_return_at_once, .-pti_return_at_once\n"
);

static void pti_skip(struct pt_regs *regs)
{
	instruction_pointer_set(regs, (unsigned long)&pti_return_at_once);
}
#else
/* At the entry of a function the return address is in a register, not signed. */
static void pti_skip(struct pt_regs *regs)
{
	instruction_pointer_set(regs, procedure_link_pointer(regs));
}
#endif

NOKPROBE_SYMBOL(pti_skip);

/*
 * Counts a call of the armed task, and makes it return if it has to fail.  No
 * lock is needed: only that task reads and writes the fields other than @task,
 * in its own ioctl and here, and only that task clears @task.
 */
static int pti_pin_called(struct pti_failing_pins *pins, struct pt_regs *regs)
{
	u64 later;

	pins->seen++;
	if (pins->seen < pins->nth)
		return 0;
	later = pins->seen - pins->nth;
	if (later && !(pins->flags & PTI_PINS_LASTING) &&
	    (later % 2 || !(pins->flags & PTI_PINS_OTHER)))
		return 0;
	pins->failed++;
	/*
	 * The kernel returns EINTR only with a signal pending, and callers may
	 * rely on the return to user space handling that signal.
	 */
	if (pins->error == EINTR)
		set_thread_flag(TIF_SIGPENDING);
	regs_set_return_value(regs, -(long)pins->error);
	pti_skip(regs);
	return 1;
}

NOKPROBE_SYMBOL(pti_pin_called);

static int pti_pages_probe(struct kprobe *probe, struct pt_regs *regs)
{
	struct pti_failing_pins *pins =
		container_of(probe, struct pti_failing_pins, pages);

	if (READ_ONCE(pins->task) != current)
		return 0;
	/* The third argument of pin_user_pages_fast(). */
	if ((pins->flags & PTI_PINS_LONGTERM) &&
	    !(regs_get_kernel_argument(regs, 2) & FOLL_LONGTERM))
		return 0;
	return pti_pin_called(pins, regs);
}

NOKPROBE_SYMBOL(pti_pages_probe);

static int pti_folios_probe(struct kprobe *probe, struct pt_regs *regs)
{
	struct pti_failing_pins *pins =
		container_of(probe, struct pti_failing_pins, folios);

	if (READ_ONCE(pins->task) != current)
		return 0;
	return pti_pin_called(pins, regs);
}

NOKPROBE_SYMBOL(pti_folios_probe);

/*
 * Does nothing, but a probe with such a handler is not optimised into a jump.
 * An optimised probe cannot change the instruction pointer.
 */
static void pti_after_probe(struct kprobe *probe, struct pt_regs *regs,
			    unsigned long flags)
{
}

NOKPROBE_SYMBOL(pti_after_probe);

static int pti_probe(struct pti_failing_pins *pins)
{
	struct kprobe *probes[] = { &pins->pages, &pins->folios };
	int ret;

	if (pins->probed)
		return 0;
	/* Registration refuses fields that a failed attempt has left set. */
	memset(&pins->pages, 0, sizeof(pins->pages));
	memset(&pins->folios, 0, sizeof(pins->folios));
	pins->pages.symbol_name = "pin_user_pages_fast";
	pins->pages.pre_handler = pti_pages_probe;
	pins->pages.post_handler = pti_after_probe;
	pins->folios.symbol_name = "memfd_pin_folios";
	pins->folios.pre_handler = pti_folios_probe;
	pins->folios.post_handler = pti_after_probe;
	ret = register_kprobes(probes, ARRAY_SIZE(probes));
	if (ret) {
		pr_err("pinbuf_test_importer: cannot probe the functions that pin: %d\n",
		       ret);
		return ret;
	}
	pins->probed = true;
	return 0;
}

int pti_fail_pins(struct pti_failing_pins *pins,
		  struct pti_fail_pins __user *user)
{
	struct pti_fail_pins arg;
	int ret;

	if (copy_from_user(&arg, user, sizeof(arg)))
		return -EFAULT;
	if (!arg.nth || arg.error > MAX_ERRNO || arg.reserved ||
	    (arg.flags &
	     ~(PTI_PINS_LASTING | PTI_PINS_LONGTERM | PTI_PINS_OTHER)))
		return -EINVAL;
	if (pins->task)
		return -EBUSY;
	ret = pti_probe(pins);
	if (ret)
		return ret;

	pins->nth = arg.nth;
	pins->flags = arg.flags;
	pins->error = arg.error;
	pins->seen = 0;
	pins->failed = 0;
	/* While the reference is held, no other task can get this address. */
	WRITE_ONCE(pins->task, get_task_struct(current));
	return 0;
}

int pti_pins_failed(struct pti_failing_pins *pins,
		    struct pti_pins_failed __user *user)
{
	struct pti_pins_failed arg;

	if (pins->task != current)
		return -EINVAL;
	WRITE_ONCE(pins->task, NULL);
	put_task_struct(current);
	arg.seen = pins->seen;
	arg.failed = pins->failed;
	return copy_to_user(user, &arg, sizeof(arg)) ? -EFAULT : 0;
}

void pti_end_failing_pins(struct pti_failing_pins *pins)
{
	struct kprobe *probes[] = { &pins->pages, &pins->folios };

	/* Waits for running handlers. */
	if (pins->probed)
		unregister_kprobes(probes, ARRAY_SIZE(probes));
	pins->probed = false;
	if (pins->task)
		put_task_struct(pins->task);
	pins->task = NULL;
}

#else /* (CONFIG_X86_64 || CONFIG_ARM64) && CONFIG_KPROBES */

int pti_fail_pins(struct pti_failing_pins *pins,
		  struct pti_fail_pins __user *user)
{
	return -EOPNOTSUPP;
}

int pti_pins_failed(struct pti_failing_pins *pins,
		    struct pti_pins_failed __user *user)
{
	return -EOPNOTSUPP;
}

void pti_end_failing_pins(struct pti_failing_pins *pins)
{
}

#endif /* (CONFIG_X86_64 || CONFIG_ARM64) && CONFIG_KPROBES */
