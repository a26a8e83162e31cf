// SPDX-License-Identifier: GPL-2.0
/*
 * Wrappers of functions that Rust cannot call: inline functions and macros of
 * the kernel's headers, and functions that are not exported or that the
 * kernel's bindings do not contain.
 *
 * Each function does what the kernel's function or macro of that name does, and
 * contains no policy.  In the kernel's tree, they would be in rust/helpers/.
 *
 * The module's parameters are here as well: kernel::module_param (7.2, 7.3)
 * does not create sysfs entries, and operators change these at run time.
 */

#include <linux/cred.h>
#include <linux/dma-map-ops.h>
#include <linux/dma-mapping.h>
#include <linux/hugetlb.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/page_table_check.h>
#include <linux/pgalloc.h>
#include <linux/pgtable.h>
#include <linux/scatterlist.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/sched/user.h>
#include <linux/uaccess.h>
#include <linux/uidgid.h>
#include <linux/vmalloc.h>

#include "helpers.h"

/* The macro module! of 7.2 and 7.3 does not support a version. */
MODULE_VERSION(PINBUF_VERSION);

static unsigned int allowance_mb = 128;
module_param(allowance_mb, uint, 0644);
MODULE_PARM_DESC(allowance_mb,
		 "MiB that each user may keep in place beyond RLIMIT_MEMLOCK (default 128)");

static unsigned int allowance_system_mb;
module_param(allowance_system_mb, uint, 0644);
MODULE_PARM_DESC(allowance_system_mb,
		 "MiB that all users together may keep in place beyond their limits (default 0: a sixteenth of memory)");

static unsigned int pin_retries = 10;
module_param(pin_retries, uint, 0644);
MODULE_PARM_DESC(pin_retries,
		 "Number of retries, after growing pauses, when pages cannot be migrated (default 10, maximum 16)");

unsigned int pinbuf_param_allowance_mb(void)
{
	return READ_ONCE(allowance_mb);
}

unsigned int pinbuf_param_allowance_system_mb(void)
{
	return READ_ONCE(allowance_system_mb);
}

unsigned int pinbuf_param_pin_retries(void)
{
	return READ_ONCE(pin_retries);
}

/* Tasks and users */

bool pinbuf_fatal_signal_pending(struct task_struct *task)
{
	return fatal_signal_pending(task);
}

void pinbuf_cond_resched(void)
{
	cond_resched();
}

unsigned int pinbuf_memalloc_pin_save(void)
{
	return memalloc_pin_save();
}

void pinbuf_memalloc_pin_restore(unsigned int flags)
{
	memalloc_pin_restore(flags);
}

unsigned long pinbuf_rlimit(unsigned int limit)
{
	return rlimit(limit);
}

struct user_struct *pinbuf_get_current_user(void)
{
	return get_current_user();
}

struct user_namespace *pinbuf_current_user_ns(void)
{
	return current_user_ns();
}

kuid_t pinbuf_make_kuid(struct user_namespace *ns, uid_t uid)
{
	return make_kuid(ns, uid);
}

unsigned long pinbuf_totalram_pages(void)
{
	return totalram_pages();
}

/* Pages and folios */

unsigned long pinbuf_untagged_addr(unsigned long addr)
{
	return untagged_addr(addr);
}

struct page *pinbuf_pfn_to_page(unsigned long pfn)
{
	return pfn_to_page(pfn);
}

void *pinbuf_page_address(const struct page *page)
{
	return page_address(page);
}

bool pinbuf_is_page_hwpoison(const struct page *page)
{
	return is_page_hwpoison(page);
}

struct folio *pinbuf_page_folio(struct page *page)
{
	return page_folio(page);
}

unsigned long pinbuf_folio_nr_pages(const struct folio *folio)
{
	return folio_nr_pages(folio);
}

bool pinbuf_folio_test_hugetlb(const struct folio *folio)
{
	return folio_test_hugetlb(folio);
}

bool pinbuf_folio_mapped(const struct folio *folio)
{
	return folio_mapped(folio);
}

int pinbuf_folio_entire_mapcount(const struct folio *folio)
{
	return folio_entire_mapcount(folio);
}

void pinbuf_smp_rmb(void)
{
	/* Pairs with the atomic operations of folio_remove_rmap_pmd(). */
	smp_rmb();
}

/* Scatterlists and DMA */

void pinbuf_sg_set_page(struct scatterlist *sg, struct page *page,
			unsigned int len, unsigned int offset)
{
	sg_set_page(sg, page, len, offset);
}

unsigned int pinbuf_dma_get_max_seg_size(struct device *dev)
{
	return dma_get_max_seg_size(dev);
}

unsigned long pinbuf_dma_get_seg_boundary(struct device *dev)
{
	return dma_get_seg_boundary(dev);
}

bool pinbuf_dma_need_sync(struct device *dev, u64 addr)
{
	return dma_need_sync(dev, addr);
}

bool pinbuf_dev_is_dma_coherent(struct device *dev)
{
	return dev_is_dma_coherent(dev);
}

void pinbuf_dma_sync_sgtable_for_cpu(struct device *dev, struct sg_table *sgt,
				     enum dma_data_direction dir)
{
	dma_sync_sgtable_for_cpu(dev, sgt, dir);
}

void pinbuf_dma_sync_sgtable_for_device(struct device *dev,
					struct sg_table *sgt,
					enum dma_data_direction dir)
{
	dma_sync_sgtable_for_device(dev, sgt, dir);
}

/* Mappings */

/*
 * driver/kernel_ext/pfn_map.rs relies on a page table being one page of 8-byte
 * entries.
 */
static_assert(PAGE_SHIFT + PAGE_SHIFT - 3 == PMD_SHIFT);

void *pinbuf_vmap(struct page **pages, unsigned int count)
{
	return vmap(pages, count, VM_MAP, PAGE_KERNEL);
}

void pinbuf_vunmap(const void *addr)
{
	vunmap(addr);
}

void pinbuf_vm_flags_mod(struct vm_area_struct *vma, unsigned long set,
			 unsigned long clear)
{
	vm_flags_mod(vma, set, clear);
}

bool pinbuf_page_table_check_enabled(void)
{
#ifdef CONFIG_PAGE_TABLE_CHECK
	return !static_branch_likely(&page_table_check_disabled);
#else
	return false;
#endif
}

bool pinbuf_pmd_none(pmd_t *pmd)
{
	return pmd_none(pmdp_get_lockless(pmd));
}

bool pinbuf_pmd_leaf(pmd_t *pmd)
{
	return pmd_leaf(pmdp_get_lockless(pmd));
}

/*
 * Does what pmd_install() of mm/memory.c does, which is not exported, with the
 * page table that the core has allocated for the fault.  Returns whether the
 * PMD refers to a page table now.
 */
bool pinbuf_pmd_install(struct vm_fault *vmf)
{
	struct mm_struct *mm = vmf->vma->vm_mm;
	spinlock_t *ptl = pmd_lock(mm, vmf->pmd);
	bool table;

	if (pmd_none(*vmf->pmd) && vmf->prealloc_pte) {
		mm_inc_nr_ptes(mm);
		/* The page table is initialised before others can see it. */
		smp_wmb();
		pmd_populate(mm, vmf->pmd, vmf->prealloc_pte);
		vmf->prealloc_pte = NULL;
	}
	table = !pmd_none(*vmf->pmd) && !pmd_leaf(*vmf->pmd);
	spin_unlock(ptl);
	return table;
}

bool pinbuf_pte_none(pte_t *pte)
{
	return pte_none(ptep_get(pte));
}

void pinbuf_set_pte_pfn(struct vm_area_struct *vma, unsigned long addr,
			pte_t *pte, unsigned long pfn)
{
	set_pte_at(vma->vm_mm, addr, pte,
		   pte_mkspecial(pfn_pte(pfn, vma->vm_page_prot)));
}
