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
#include <linux/falloc.h>
#include <linux/fcntl.h>
#include <linux/fs.h>
#include <linux/hugetlb.h>
#include <linux/memremap.h>
#include <linux/mm.h>
#include <linux/mmap_lock.h>
#include <linux/mmu_context.h>
#include <linux/moduleparam.h>
#include <linux/page_table_check.h>
#include <linux/pagemap.h>
#include <linux/pgtable.h>
#include <linux/sched/signal.h>
#include <linux/sched/user.h>
#include <linux/scatterlist.h>
#include <linux/shmem_fs.h>
#include <linux/user_namespace.h>
#include <linux/userfaultfd_k.h>
#include <linux/vmalloc.h>
#include <linux/xarray.h>

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

struct page *pinbuf_pfn_to_page(unsigned long pfn)
{
	return pfn_to_page(pfn);
}

void *pinbuf_page_address(const struct page *page)
{
	return page_address(page);
}

void pinbuf_page_place(const struct page *page, struct pinbuf_place *out)
{
	const struct folio *folio = page_folio(page);

	out->pfn = page_to_pfn(page);
	out->folio_pages = folio_nr_pages(folio);
	out->left = out->folio_pages - folio_page_idx(folio, page);
	out->hugetlb = folio_test_hugetlb(folio);
	out->device = folio_is_zone_device(folio);
	/*
	 * Anonymous memory and page cache (shmem, hugetlbfs, files) have a
	 * mapping and belong to user space.  What has none was allocated by a
	 * driver and mapped with vm_insert_page(): its memory type and lifetime
	 * are that driver's.  A page that was truncated meanwhile has lost its
	 * mapping, but shmem's stays swap-backed and hugetlb's stays hugetlb.
	 */
	out->user = out->hugetlb || READ_ONCE(folio->mapping) ||
		    folio_test_swapbacked(folio);
}

/*
 * Pins one page of the current process, and tells what it is.  Returns what
 * pin_user_pages_fast() does.
 */
int pinbuf_pin_one(unsigned long addr, unsigned int flags, struct page **page,
		   struct pinbuf_place *out)
{
	int ret = pin_user_pages_fast(addr, 1, flags, page);

	if (ret == 1)
		pinbuf_page_place(*page, out);
	return ret;
}

static bool page_is_backed_by(const struct page *page, const struct file *file,
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

/*
 * How many of the @count pinned pages, from the first on, need no look of their
 * own: user space's, neither hugetlb's nor a device's.  Their frames go to @pfns.
 */
unsigned long pinbuf_pages_ordinary(struct page *const *pages,
				    unsigned long count, unsigned long *pfns)
{
	unsigned long n;

	for (n = 0; n < count; n++) {
		const struct folio *folio = page_folio(pages[n]);

		if (!READ_ONCE(folio->mapping) && !folio_test_swapbacked(folio))
			break;
		if (folio_test_hugetlb(folio) || folio_is_zone_device(folio))
			break;
		pfns[n] = page_to_pfn(pages[n]);
	}
	return n;
}

/* How many of the @count pinned pages are those of the file from @index on. */
unsigned long pinbuf_pages_backed_by(struct page *const *pages,
				     unsigned long count,
				     const struct file *file,
				     unsigned long index)
{
	unsigned long n;

	for (n = 0; n < count; n++)
		if (!page_is_backed_by(pages[n], file, index + n))
			break;
	return n;
}

/* Files whose pages can be pinned without a mapping */

/*
 * Whether the file is of a kind whose pages can be pinned.  Its lock and its
 * pages must be the same inode's; Coda, for one, lends the mapping of another.
 */
static bool file_has_pinnable_kind(struct file *file)
{
	return (shmem_file(file) || is_file_hugepages(file)) &&
	       file->f_mapping->host == file_inode(file);
}

static unsigned int file_seals(struct file *file)
{
#ifdef CONFIG_HUGETLBFS
	if (is_file_hugepages(file))
		return HUGETLBFS_I(file_inode(file))->seals;
#endif
	return SHMEM_I(file_inode(file))->seals;
}

/*
 * Whether its pages may be read and written at any place, as a shared mapping
 * would: 0, EACCES (not open for both, or append-only) or EPERM (sealed).  Who
 * has such a mapping (@mapped) was asked when it was made, and keeps it when the
 * file is sealed against further ones.  The answer holds while the inode is
 * locked: F_ADD_SEALS and chattr take that lock exclusively, and F_SEAL_WRITE is
 * refused while pages are pinned.
 */
static int may_pin_file(struct file *file, bool mapped)
{
	unsigned int sealed = F_SEAL_WRITE;

	if (!mapped) {
		if ((file->f_mode & (FMODE_READ | FMODE_WRITE)) !=
		    (FMODE_READ | FMODE_WRITE))
			return -EACCES;
		if (IS_APPEND(file_inode(file)))
			return -EACCES;
		sealed |= F_SEAL_FUTURE_WRITE;
	}
	return file_seals(file) & sealed ? -EPERM : 0;
}

/*
 * Pages that fallocate() gave to a file of shmem are cleared when somebody first
 * reads them; until then they hold what was in them before, and
 * memfd_pin_folios() pins them so.  Reading waits for writers, too.  0, or an
 * error: EAGAIN if the folio is not the file's any more.
 */
static int make_uptodate(struct file *file, struct folio *pinned)
{
	struct address_space *mapping = file->f_mapping;
	struct folio *folio;

	if (folio_test_uptodate(pinned))
		return 0;
	if (is_file_hugepages(file))
		return -EAGAIN;
	folio = shmem_read_folio_gfp(mapping, pinned->index,
				     mapping_gfp_mask(mapping));
	if (IS_ERR(folio))
		return PTR_ERR(folio);
	folio_put(folio);
	return folio_test_uptodate(pinned) ? 0 : -EAGAIN;
}

/* How many pages one page of the file has: more than one for hugetlbfs alone. */
unsigned long pinbuf_file_unit(struct file *file)
{
	if (is_file_hugepages(file))
		return pages_per_huge_page(hstate_file(file));
	return 1;
}

/* Whether the file has pages, not swapped out, for all of @count from @index. */
bool pinbuf_file_has_pages(struct file *file, unsigned long index,
			   unsigned long count)
{
	unsigned long end = index + count;

	while (index < end) {
		struct folio *folio = filemap_get_folio(file->f_mapping, index);

		if (IS_ERR(folio))
			return false;
		index = folio_next_index(folio);
		folio_put(folio);
		cond_resched();
	}
	return true;
}

/*
 * Whether the file has all of its pages from @index to @end, none of them swapped
 * out; @unit pages of this kind are one page of the file's.  Its inode is locked,
 * so that none is taken away meanwhile but by swapping.
 */
static bool is_whole(struct address_space *mapping, pgoff_t index, pgoff_t end,
		     unsigned long unit)
{
	XA_STATE(xas, &mapping->i_pages, index);
	struct xa_node *node = NULL;
	bool whole = true;
	pgoff_t reach = 0;

	rcu_read_lock();
	while (index < end) {
		void *entry = NULL;

		if (index < reach) {
			/* In the node where the last one was found. */
			xas.xa_index = index;
			xas.xa_offset = (index >> node->shift) & XA_CHUNK_MASK;
			entry = xas_reload(&xas);
		}
		if (!entry || xa_is_internal(entry)) {
			xas_set(&xas, index);
			entry = xas_load(&xas);
		}
		if (!entry || xa_is_value(entry)) {
			whole = false;
			break;
		}
		node = xas.xa_node;
		if (!node) {
			/* The only page of a file. */
			index++;
			continue;
		}
		reach = (index | ((XA_CHUNK_SIZE << node->shift) - 1)) + 1;
		/*
		 * A full node without swap entries tells of all its pages, if
		 * what it has are pages, or pieces of one, and not nodes.  (Its
		 * count is not ordered with its slots; whoever adds the last
		 * page just now has long done it when it is asked for.)
		 */
		if (1UL << node->shift <= unit &&
		    READ_ONCE(node->count) == XA_CHUNK_SIZE &&
		    !READ_ONCE(node->nr_values))
			index = reach;
		else
			index = max(index | ((1UL << node->shift) - 1),
				    index | (unit - 1)) + 1;
	}
	rcu_read_unlock();
	return whole;
}

/*
 * Pins the folios of the file's bytes from @start to @end, of a range that ends at
 * @all.  Holes in a file of shmem are filled; for hugetlbfs, ENOENT tells of one:
 * memfd_pin_folios() would fill it without a word to faults, and the loser of
 * that race takes somebody else's reservation with it.  For a mapping, holes are
 * left to page faults, which know of userfaultfd and of what the mapping wants
 * for pages, and nobody is waited for: ENOENT, EAGAIN.
 */
static long file_pin_folios(struct file *file, loff_t start, loff_t end,
			    loff_t all, struct folio **folios, unsigned int max,
			    bool mapped)
{
	struct inode *inode = file_inode(file);
	unsigned long unit = pinbuf_file_unit(file);
	pgoff_t offset;
	long count = 0;
	int ret;

	/* As udmabuf has it. */
	if (mapped) {
		if (!inode_trylock_shared(inode))
			return -EAGAIN;
	} else if (inode_lock_shared_killable(inode)) {
		return -EINTR;
	}
	ret = may_pin_file(file, mapped);
	/* A folio may reach beyond the file's end, and beyond @end. */
	if (!ret && all > i_size_read(inode))
		ret = -EINVAL;
	/* Who punches holes needs the lock for himself. */
	if (!ret && (mapped || unit > 1) &&
	    !is_whole(file->f_mapping, start >> PAGE_SHIFT, end >> PAGE_SHIFT,
		      unit))
		ret = -ENOENT;
	if (ret)
		goto out;
	count = memfd_pin_folios(file, start, end - 1, folios, max, &offset);
	if (count < 0)
		ret = count;
out:
	inode_unlock_shared(inode);
	return ret ? ret : count;
}

long pinbuf_file_pin_folios(struct file *file, loff_t start, loff_t end,
			    loff_t all, struct folio **folios, unsigned int max)
{
	long ret;

	if (!file_has_pinnable_kind(file))
		return -EINVAL;
	ret = file_pin_folios(file, start, end, all, folios, max, false);
	if (ret != -ENOENT)
		return ret;
	ret = vfs_fallocate(file, FALLOC_FL_KEEP_SIZE, start, end - start);
	if (ret)
		return ret;
	ret = file_pin_folios(file, start, end, all, folios, max, false);
	/* Somebody punches holes as fast as they are filled. */
	return ret == -ENOENT ? -EAGAIN : ret;
}

/*
 * The same for @pages pages from @index on that lie in one page of the file, small
 * or huge: pins its folio, and tells where they are in it.  1; or 0 where
 * pinbuf_file_pin_folios() has to do it: they lie in several, or in one that
 * hugetlbfs does not have yet.
 */
int pinbuf_file_pin_one(struct file *file, unsigned long index,
			unsigned long pages, struct folio **folio,
			struct pinbuf_place *out)
{
	unsigned long unit;
	loff_t start, end;
	int ret;

	if (!file_has_pinnable_kind(file))
		return -EINVAL;
	unit = pinbuf_file_unit(file);
	if (pages > unit - (index & (unit - 1)))
		return 0;
	start = (loff_t)index << PAGE_SHIFT;
	end = start + ((loff_t)pages << PAGE_SHIFT);
	ret = file_pin_folios(file, start, end, end, folio, 1, false);
	if (ret == -ENOENT)
		return 0;
	if (ret != 1)
		return ret ? ret : -EAGAIN;
	ret = pinbuf_folio_place(*folio, file, index, out);
	if (!ret && pages <= out->left)
		return 1;
	unpin_folio(*folio);
	return ret ? ret : -EAGAIN;
}

/*
 * The same for who has them mapped, where all are there: any error means that GUP
 * is to be asked, which knows better.
 */
long pinbuf_mapped_pin_folios(struct file *file, loff_t start, loff_t end,
			      loff_t all, struct folio **folios,
			      unsigned int max)
{
	return file_pin_folios(file, start, end, all, folios, max, true);
}

/*
 * Whether a page fault in the VMA could only lead to the pages that its file has
 * at the places that the VMA's offset says, and GUP for writing would get these.
 */
static bool maps_file_plainly(struct vm_area_struct *vma)
{
	const vm_flags_t needed = VM_SHARED | VM_READ | VM_WRITE;
	const vm_flags_t strange = VM_IO | VM_PFNMAP | VM_MIXEDMAP;

	/* There GUP has to ask the firmware for some pages. */
	if (IS_ENABLED(CONFIG_S390))
		return false;
	if ((vma->vm_flags & (needed | strange)) != needed)
		return false;
	/* Somebody wants to hear of missing pages, or of writes. */
	if (userfaultfd_armed(vma))
		return false;
	/* GUP looks at protection keys, too. */
	if (!arch_vma_access_permitted(vma, true, false, false))
		return false;
	if (!vma->vm_file || !file_has_pinnable_kind(vma->vm_file))
		return false;
	if (is_file_hugepages(vma->vm_file))
		return is_vm_hugetlb_page(vma);
	/* What faults around maps the page cache, in the order of the file. */
	return vma->vm_ops && vma->vm_ops->map_pages == filemap_map_pages;
}

/*
 * Whether the current task has mapped the address so; then @out owns a reference
 * to the file.  @out tells the bounds of the mapping in any case, or that of the
 * page alone where the mapping is not to be had without waiting.
 */
bool pinbuf_mapped_file(unsigned long addr, struct pinbuf_mapped *out)
{
	struct vm_area_struct *vma = lock_vma_under_rcu(current->mm, addr);
	bool plain;

	out->start = addr;
	out->end = addr + 1;
	if (!vma)
		return false;
	out->start = vma->vm_start;
	out->end = vma->vm_end;
	plain = maps_file_plainly(vma);
	if (plain) {
		out->file = get_file(vma->vm_file);
		out->index = vma->vm_pgoff;
		out->unit = 1;
		if (is_vm_hugetlb_page(vma))
			out->unit = pages_per_huge_page(hstate_vma(vma));
	}
	vma_end_read(vma);
	return plain;
}

/* Whether the folio has 1 << @order pages, and can be shown as it is. */
static __always_inline bool is_plain(struct folio *folio, unsigned int order)
{
	if (!order)
		return !folio_test_large(folio) && folio_test_uptodate(folio) &&
		       !folio_test_hwpoison(folio);
	return folio_order(folio) == order && folio_test_uptodate(folio) &&
	       !folio_contain_hwpoisoned_page(folio);
}

static __always_inline unsigned long
count_plain(struct folio *const *folios, unsigned long count,
	    const struct file *file, unsigned long index, unsigned int order,
	    unsigned long *pfns)
{
	const struct address_space *mapping = file->f_mapping;
	const unsigned long step = 1UL << order;
	unsigned long n;

	for (n = 0; n < count; n++, index += step) {
		struct folio *folio = folios[n];

		if (!is_plain(folio, order) || folio->index != index ||
		    READ_ONCE(folio->mapping) != mapping)
			break;
		pfns[n] = folio_pfn(folio);
	}
	return n;
}

/*
 * Of the @count pinned folios, which are expected to follow each other in the
 * file, how many from the first on need no look of their own: they have
 * 1 << @order pages, are where they should be, and can be shown.  Their frames
 * go to @pfns.
 */
unsigned long pinbuf_folios_plain(struct folio *const *folios,
				  unsigned long count, const struct file *file,
				  unsigned long index, unsigned int order,
				  unsigned long *pfns)
{
	/* Small folios are many, and worth a loop of their own. */
	if (!order)
		return count_plain(folios, count, file, index, 0, pfns);
	return count_plain(folios, count, file, index, order, pfns);
}

/*
 * Where the page @index of the file is in the pinned folio, after seeing to it
 * that the folio can be shown.  EAGAIN if it is not in it, EHWPOISON if some of
 * it is lost, as GUP and read() have it; or why it cannot be read.
 */
int pinbuf_folio_place(struct folio *folio, struct file *file,
		       unsigned long index, struct pinbuf_place *out)
{
	unsigned long skipped = index - folio->index;
	unsigned long pages = folio_nr_pages(folio);
	int ret;

	if (READ_ONCE(folio->mapping) != file->f_mapping || skipped >= pages)
		return -EAGAIN;
	if (folio_contain_hwpoisoned_page(folio))
		return -EHWPOISON;
	ret = make_uptodate(file, folio);
	if (ret)
		return ret;
	out->pfn = folio_pfn(folio) + skipped;
	out->folio_pages = pages;
	out->left = pages - skipped;
	out->hugetlb = folio_test_hugetlb(folio);
	out->device = false;
	out->user = true;
	return 0;
}

/*
 * Drops one pin of each folio, @max at most, that the @pages adjacent page frames
 * from @pfn on are in, after marking them dirty: of how many of these pages.
 */
unsigned long pinbuf_unpin_folios_dirty(unsigned long pfn, unsigned long pages,
					unsigned long max)
{
	unsigned long done = 0;

	for (; done < pages && max; max--) {
		struct page *page = pfn_to_page(pfn + done);
		struct folio *folio = page_folio(page);

		done += folio_nr_pages(folio) - folio_page_idx(folio, page);
		if (folio_test_dirty(folio))
			unpin_folio(folio);
		else
			unpin_user_page_range_dirty_lock(page, 1, true);
	}
	return min(done, pages);
}

/*
 * Drops one pin of each page frame, after marking them dirty.  The numbers are
 * overwritten.
 */
void pinbuf_unpin_pfns_dirty(unsigned long *pfns, unsigned long count)
{
	struct page **pages = (struct page **)pfns;
	unsigned long n;

	BUILD_BUG_ON(sizeof(*pages) != sizeof(*pfns));
	for (n = 0; n < count; n++)
		pages[n] = pfn_to_page(pfns[n]);
	unpin_user_pages_dirty_lock(pages, count, true);
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
 * The page-table checker overlooks special PTEs, but counts special PMDs as
 * mappings of their pages, and takes a second writable one of an
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

/*
 * Enters a huge page that is @distance entries away from the one that the fault
 * is about, in the same table, if nothing is there.  Others may enter the same
 * one meanwhile, which vmf_insert_pfn_pmd() copes with, but not a page table:
 * whether a block gets one is the same for all faults.
 */
void pinbuf_insert_pfn_pmd_near(const struct vm_fault *vmf, long distance,
				unsigned long pfn, bool write)
{
#ifdef CONFIG_ARCH_SUPPORTS_PMD_PFNMAP
	struct vm_fault near = {
		.vma = vmf->vma,
		.address = (vmf->address & PMD_MASK) + distance * PMD_SIZE,
		.flags = vmf->flags,
		.pmd = vmf->pmd + distance,
	};

	if (pmd_none(pmdp_get_lockless(near.pmd)))
		vmf_insert_pfn_pmd(&near, pfn, write);
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
