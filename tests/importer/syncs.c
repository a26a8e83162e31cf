// SPDX-License-Identifier: GPL-2.0
/*
 * What a device without cache coherency needs of the kernel.  An emulator has
 * no caches, so the calls that maintain them are observed by probes.
 */
#include <linux/container_of.h>
#include <linux/errno.h>
#include <linux/kprobes.h>
#include <linux/mm.h>
#include <linux/preempt.h>
#include <linux/ptrace.h>
#include <linux/sched/task.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "syncs.h"

#if defined(CONFIG_ARCH_HAS_SYNC_DMA_FOR_DEVICE) && defined(CONFIG_KPROBES)

/* No lock is needed: only the watched task gets beyond the first condition. */
static int pti_note(struct pti_watch *watch, struct pt_regs *regs, u32 for_cpu)
{
	if (READ_ONCE(watch->task) != current || !in_task())
		return 0;
	if (watch->count < PTI_SYNCS)
		watch->syncs[watch->count] = (struct pti_sync) {
			.addr = regs_get_kernel_argument(regs, 0),
			.len = regs_get_kernel_argument(regs, 1),
			.direction = regs_get_kernel_argument(regs, 2),
			.for_cpu = for_cpu,
		};
	watch->count++;
	return 0;
}

NOKPROBE_SYMBOL(pti_note);

static int pti_device_probe(struct kprobe *probe, struct pt_regs *regs)
{
	return pti_note(container_of(probe, struct pti_watch, for_device), regs,
			0);
}

NOKPROBE_SYMBOL(pti_device_probe);

static int pti_cpu_probe(struct kprobe *probe, struct pt_regs *regs)
{
	return pti_note(container_of(probe, struct pti_watch, for_cpu), regs, 1);
}

NOKPROBE_SYMBOL(pti_cpu_probe);

int pti_watch_syncs(struct pti_watch **place)
{
	struct pti_watch *watch;
	struct kprobe *probes[2];
	int ret;

	if (*place)
		return -EBUSY;
	watch = kzalloc_obj(*watch);
	if (!watch)
		return -ENOMEM;
	watch->for_device.symbol_name = "arch_sync_dma_for_device";
	watch->for_device.pre_handler = pti_device_probe;
	watch->for_cpu.symbol_name = "arch_sync_dma_for_cpu";
	watch->for_cpu.pre_handler = pti_cpu_probe;
	probes[0] = &watch->for_device;
	probes[1] = &watch->for_cpu;
	ret = register_kprobes(probes, ARRAY_SIZE(probes));
	if (ret) {
		pr_err("pinbuf_test_importer: cannot probe the maintenance of caches: %d\n",
		       ret);
		kfree(watch);
		return ret;
	}
	*place = watch;
	/* While the reference is held, no other task can get this address. */
	WRITE_ONCE(watch->task, get_task_struct(current));
	return 0;
}

int pti_syncs(struct pti_watch **place, struct pti_syncs __user *user)
{
	struct pti_watch *watch = *place;
	struct pti_syncs arg;
	int ret = 0;

	if (!watch || watch->task != current)
		return -EINVAL;
	if (copy_from_user(&arg, user, sizeof(arg)))
		return -EFAULT;
	arg.count = watch->count;
	if (copy_to_user(u64_to_user_ptr(arg.syncs), watch->syncs,
			 min_t(u32, watch->count, PTI_SYNCS) *
				 sizeof(watch->syncs[0])) ||
	    copy_to_user(user, &arg, sizeof(arg)))
		ret = -EFAULT;
	pti_end_watch(place);
	return ret;
}

void pti_end_watch(struct pti_watch **place)
{
	struct pti_watch *watch = *place;
	struct kprobe *probes[2];

	if (!watch)
		return;
	probes[0] = &watch->for_device;
	probes[1] = &watch->for_cpu;
	/* Waits for running handlers. */
	unregister_kprobes(probes, ARRAY_SIZE(probes));
	put_task_struct(watch->task);
	kfree(watch);
	*place = NULL;
}

#else /* CONFIG_ARCH_HAS_SYNC_DMA_FOR_DEVICE && CONFIG_KPROBES */

int pti_watch_syncs(struct pti_watch **place)
{
	return -EOPNOTSUPP;
}

int pti_syncs(struct pti_watch **place, struct pti_syncs __user *user)
{
	return -EOPNOTSUPP;
}

void pti_end_watch(struct pti_watch **place)
{
}

#endif /* CONFIG_ARCH_HAS_SYNC_DMA_FOR_DEVICE && CONFIG_KPROBES */

#ifdef CONFIG_ARM64
#include <asm/barrier.h>
#include <asm/sysreg.h>

/* The processor translates, as it does for accesses, and tells the attributes. */
#define pti_translate(stage, address) ({				\
	u64 par;							\
									\
	preempt_disable();						\
	asm volatile("at " stage ", %0" : : "r" (address) : "memory");	\
	isb();								\
	par = read_sysreg_par();					\
	preempt_enable();						\
	/* Bit 0: the translation failed. */				\
	par & 1 ? PTI_NOT_MAPPED : par >> 56;				\
})

int pti_attributes(struct pti_attributes __user *user, const void *vmap,
		   phys_addr_t phys)
{
	struct pti_attributes arg;

	if (copy_from_user(&arg, user, sizeof(arg)))
		return -EFAULT;
	arg.user = pti_translate("s1e0r", arg.addr);
	arg.vmap = vmap ? pti_translate("s1e1r", vmap) : PTI_NOT_MAPPED;
	arg.direct = pti_translate("s1e1r", phys_to_virt(phys));
	return copy_to_user(user, &arg, sizeof(arg)) ? -EFAULT : 0;
}

#elif defined(CONFIG_X86_64)
#include <linux/io.h>
#include <linux/mmap_lock.h>
#include <linux/pgtable.h>

/* The bits for caching of a large entry, where they are in one of a page. */
static u64 pti_large(unsigned long flags)
{
	pgprot_t small = pgprot_large_2_4k(__pgprot(flags));

	return pgprot_val(small) & _PAGE_CACHE_MASK;
}

/* The same of the entry that maps an address: all zero for write-back. */
static u64 pti_entry(unsigned long addr)
{
	pgd_t *pgd = pgd_offset(current->mm, addr);
	p4d_t *p4d;
	pud_t *pud;
	pmd_t *pmd;
	pte_t *pte;

	if (pgd_none(*pgd))
		return PTI_NOT_MAPPED;
	p4d = p4d_offset(pgd, addr);
	if (p4d_none(*p4d))
		return PTI_NOT_MAPPED;
	pud = pud_offset(p4d, addr);
	if (pud_none(*pud))
		return PTI_NOT_MAPPED;
	if (pud_leaf(*pud))
		return pti_large(pud_flags(*pud));
	pmd = pmd_offset(pud, addr);
	if (pmd_none(*pmd))
		return PTI_NOT_MAPPED;
	if (pmd_leaf(*pmd))
		return pti_large(pmd_flags(*pmd));
	pte = pte_offset_kernel(pmd, addr);
	return pte_present(*pte) ? pte_flags(*pte) & _PAGE_CACHE_MASK :
				   PTI_NOT_MAPPED;
}

/* The entries of user space stay while the caller uses the mapping. */
int pti_attributes(struct pti_attributes __user *user, const void *vmap,
		   phys_addr_t phys)
{
	struct pti_attributes arg;

	if (copy_from_user(&arg, user, sizeof(arg)))
		return -EFAULT;
	if (arg.addr >= TASK_SIZE)
		return -EINVAL;
	mmap_read_lock(current->mm);
	arg.user = pti_entry(arg.addr);
	mmap_read_unlock(current->mm);
	arg.vmap = vmap ? pti_entry((unsigned long)vmap) : PTI_NOT_MAPPED;
	arg.direct = pti_entry((unsigned long)phys_to_virt(phys));
	return copy_to_user(user, &arg, sizeof(arg)) ? -EFAULT : 0;
}

#else

int pti_attributes(struct pti_attributes __user *user, const void *vmap,
		   phys_addr_t phys)
{
	return -EOPNOTSUPP;
}

#endif
