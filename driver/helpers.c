// SPDX-License-Identifier: GPL-2.0
/*
 * What Rust cannot call: inline functions and macros of the kernel's headers,
 * and functions that the kernel's bindings leave out.
 *
 * In the kernel's tree this file would be split among rust/helpers/; each
 * function here does nothing but call what it is named after.  Its Rust
 * prototypes are in driver/ffi.rs; both change together.
 *
 * The module's parameters are here too: kernel::module_param (7.2, 7.3) has no
 * sysfs entries, and an operator wants to change these at run time.
 */

#include <linux/cred.h>
#include <linux/dma-mapping.h>
#include <linux/fs.h>
#include <linux/hugetlb.h>
#include <linux/memremap.h>
#include <linux/mm.h>
#include <linux/moduleparam.h>
#include <linux/page_table_check.h>
#include <linux/pgtable.h>
#include <linux/sched/signal.h>
#include <linux/sched/user.h>
#include <linux/scatterlist.h>
#include <linux/user_namespace.h>
#include <linux/vmalloc.h>

#include "helpers.h"

static unsigned int allowance_mb = 128;
module_param(allowance_mb, uint, 0644);
MODULE_PARM_DESC(allowance_mb,
		 "MiB that each user may pin beyond RLIMIT_MEMLOCK (default 128)");

static unsigned int allowance_system_mb;
module_param(allowance_system_mb, uint, 0644);
MODULE_PARM_DESC(allowance_system_mb,
		 "MiB that all users together may pin beyond their limits (default 0: a sixteenth of memory)");

static bool charge_process;
module_param(charge_process, bool, 0644);
MODULE_PARM_DESC(charge_process,
		 "Compare a process's own pins with RLIMIT_MEMLOCK, not its user's (default N)");

static unsigned int pin_retries = 10;
module_param(pin_retries, uint, 0644);
MODULE_PARM_DESC(pin_retries,
		 "How often to try again, with growing pauses, when pages cannot be moved (default 10, at most 16)");

unsigned int pinbuf_param_allowance_mb(void)
{
	return READ_ONCE(allowance_mb);
}

unsigned int pinbuf_param_allowance_system_mb(void)
{
	return READ_ONCE(allowance_system_mb);
}

bool pinbuf_param_charge_process(void)
{
	return READ_ONCE(charge_process);
}

unsigned int pinbuf_param_pin_retries(void)
{
	return READ_ONCE(pin_retries);
}

/* Tasks and users */

bool pinbuf_fatal_signal_pending(void)
{
	return fatal_signal_pending(current);
}

void pinbuf_cond_resched(void)
{
	cond_resched();
}

unsigned long pinbuf_rlimit_memlock(void)
{
	return rlimit(RLIMIT_MEMLOCK);
}

struct user_struct *pinbuf_get_current_user(void)
{
	return get_uid(current_user());
}

/*
 * io_uring and the like do not want a security module to log that somebody has
 * no need for a capability.
 */
bool pinbuf_capable_ipc_lock_noaudit(void)
{
	return ns_capable_noaudit(&init_user_ns, CAP_IPC_LOCK);
}

/*
 * The user of the initial user namespace that the current task belongs to: its
 * own, or, in a user namespace, the owner of the outermost one.
 */
unsigned int pinbuf_current_host_uid(void)
{
	const struct user_namespace *ns = current_user_ns();

	if (ns == &init_user_ns)
		return __kuid_val(current_uid());
	while (ns->parent && ns->parent != &init_user_ns)
		ns = ns->parent;
	return __kuid_val(ns->owner);
}

unsigned long pinbuf_totalram_pages(void)
{
	return totalram_pages();
}

/* Pages */

unsigned long pinbuf_page_to_pfn(const struct page *page)
{
	return page_to_pfn(page);
}

struct page *pinbuf_pfn_to_page(unsigned long pfn)
{
	return pfn_to_page(pfn);
}

void *pinbuf_page_address(const struct page *page)
{
	return page_address(page);
}

static unsigned long page_describe(const struct page *page)
{
	const struct folio *folio = page_folio(page);
	unsigned long out = 1UL << PINBUF_PAGE_LEFT_SHIFT;

	if (folio_test_large(folio)) {
		out = (folio_nr_pages(folio) - folio_page_idx(folio, page)) <<
		      PINBUF_PAGE_LEFT_SHIFT;
		if (folio_test_hugetlb(folio))
			out |= PINBUF_PAGE_HUGETLB | PINBUF_PAGE_USER;
	}
	if (folio_is_zone_device(folio))
		out |= PINBUF_PAGE_DEVICE;
	/*
	 * Anonymous memory and page cache (shmem, hugetlbfs, files) have a
	 * mapping and belong to user space.  What has none was allocated by a
	 * driver and mapped with vm_insert_page(): its memory type and lifetime
	 * are that driver's.  A page that was truncated meanwhile has lost its
	 * mapping, but shmem's stays swap-backed and hugetlb's stays hugetlb.
	 */
	if (READ_ONCE(folio->mapping) || folio_test_swapbacked(folio))
		out |= PINBUF_PAGE_USER;
	return out;
}

void pinbuf_pages_describe(struct page *const *pages, unsigned long count,
			   unsigned long *out)
{
	while (count--)
		*out++ = page_describe(*pages++);
}

unsigned long pinbuf_page_folio_pages(const struct page *page)
{
	return folio_nr_pages(page_folio(page));
}

bool pinbuf_page_is_backed_by(const struct page *page, const struct file *file,
			      unsigned long index)
{
	const struct folio *folio = page_folio(page);

	/*
	 * No folio lock: the answer may be stale as soon as it is given, as after
	 * any later truncation.  hugetlb's index counts base pages too.
	 */
	return READ_ONCE(folio->mapping) == file->f_mapping &&
	       folio->index + folio_page_idx(folio, page) == index;
}

bool pinbuf_same_pgmap(const struct page *a, const struct page *b)
{
	return zone_device_pages_have_same_pgmap(a, b);
}

/* Scatterlists and DMA */

void pinbuf_sg_set_page(struct scatterlist *sg, struct page *page,
			unsigned int len)
{
	sg_set_page(sg, page, len, 0);
}

struct scatterlist *pinbuf_sg_next(struct scatterlist *sg)
{
	return sg_next(sg);
}

unsigned int pinbuf_dma_get_max_seg_size(struct device *dev)
{
	return dma_get_max_seg_size(dev);
}

unsigned long pinbuf_dma_get_seg_boundary(struct device *dev)
{
	return dma_get_seg_boundary(dev);
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

void pinbuf_dma_unmap_sgtable(struct device *dev, struct sg_table *sgt,
			      enum dma_data_direction dir)
{
	dma_unmap_sgtable(dev, sgt, dir, 0);
}

/* Mappings */

void *pinbuf_vmap(struct page **pages, unsigned int count)
{
	return vmap(pages, count, VM_MAP, PAGE_KERNEL);
}

void pinbuf_vunmap(const void *addr)
{
	vunmap(addr);
}

bool pinbuf_vma_is_shared(const struct vm_area_struct *vma)
{
	return vma->vm_flags & VM_SHARED;
}

bool pinbuf_vma_is_exec(const struct vm_area_struct *vma)
{
	return vma->vm_flags & VM_EXEC;
}

void pinbuf_vma_set_pfnmap(struct vm_area_struct *vma)
{
	vm_flags_mod(vma, VM_PFNMAP | VM_DONTEXPAND | VM_DONTDUMP,
		     VM_MIXEDMAP | VM_MAYEXEC);
}

/*
 * The page-table checker overlooks special PTEs, but counts special PMDs and
 * PUDs as mappings of their pages, and takes a second writable one of an
 * anonymous page for a bug (up to 7.3 at least).
 */
bool pinbuf_huge_pfns_allowed(void)
{
#ifdef CONFIG_PAGE_TABLE_CHECK
	return static_branch_likely(&page_table_check_disabled);
#else
	return true;
#endif
}

/* Called under the page table's lock; leaves entries alone that are present. */
void pinbuf_set_pte_pfn(struct vm_area_struct *vma, unsigned long addr,
			pte_t *pte, unsigned long pfn)
{
	if (pte_none(ptep_get(pte)))
		set_pte_at(vma->vm_mm, addr, pte,
			   pte_mkspecial(pfn_pte(pfn, vma->vm_page_prot)));
}
