/* SPDX-License-Identifier: GPL-2.0 */
#ifndef PINBUF_HELPERS_H
#define PINBUF_HELPERS_H

#include <linux/types.h>
#include <linux/dma-direction.h>
#include <linux/pgtable.h>

struct device;
struct file;
struct folio;
struct page;
struct scatterlist;
struct sg_table;
struct user_struct;
struct vm_area_struct;
struct vm_fault;

/* Where a page is, and what it is.  driver/ffi.rs has its twin. */
struct pinbuf_place {
	unsigned long pfn;
	unsigned long left;		/* pages of its folio from it on */
	unsigned long folio_pages;
	bool hugetlb;
	bool device;			/* in ZONE_DEVICE */
	bool user;			/* not a driver's own page */
};

/* A shared mapping of a file, in the calling process.  driver/ffi.rs too. */
struct pinbuf_mapped {
	struct file *file;
	unsigned long start;		/* addresses */
	unsigned long end;
	unsigned long index;		/* the page of the file at start */
	unsigned long unit;		/* pages of one page of the file */
};

unsigned int pinbuf_param_allowance_mb(void);
unsigned int pinbuf_param_allowance_system_mb(void);
bool pinbuf_param_charge_process(void);
unsigned int pinbuf_param_pin_retries(void);

bool pinbuf_fatal_signal_pending(void);
void pinbuf_cond_resched(void);
unsigned long pinbuf_rlimit_memlock(void);
struct user_struct *pinbuf_get_current_user(void);
bool pinbuf_capable_ipc_lock_noaudit(void);
unsigned int pinbuf_current_host_uid(void);
unsigned long pinbuf_totalram_pages(void);

struct page *pinbuf_pfn_to_page(unsigned long pfn);
void *pinbuf_page_address(const struct page *page);
void pinbuf_page_place(const struct page *page, struct pinbuf_place *out);
int pinbuf_pin_one(unsigned long addr, unsigned int flags, struct page **page,
		   struct pinbuf_place *out);
unsigned long pinbuf_pages_ordinary(struct page *const *pages,
				    unsigned long count, unsigned long *pfns);
unsigned long pinbuf_pages_backed_by(struct page *const *pages,
				     unsigned long count,
				     const struct file *file,
				     unsigned long index);

long pinbuf_file_pin_folios(struct file *file, loff_t start, loff_t end,
			    loff_t all, struct folio **folios,
			    unsigned int max);
long pinbuf_mapped_pin_folios(struct file *file, loff_t start, loff_t end,
			      loff_t all, struct folio **folios,
			      unsigned int max);
bool pinbuf_mapped_file(unsigned long addr, struct pinbuf_mapped *out);
int pinbuf_file_pin_one(struct file *file, unsigned long index,
			unsigned long pages, struct folio **folio,
			struct pinbuf_place *out);
unsigned long pinbuf_file_unit(struct file *file);
bool pinbuf_file_has_pages(struct file *file, unsigned long index,
			   unsigned long count);
unsigned long pinbuf_folios_plain(struct folio *const *folios,
				  unsigned long count, const struct file *file,
				  unsigned long index, unsigned int order,
				  unsigned long *pfns);
int pinbuf_folio_place(struct folio *folio, struct file *file,
		       unsigned long index, struct pinbuf_place *out);
unsigned long pinbuf_unpin_folios_dirty(unsigned long pfn, unsigned long pages,
					unsigned long max);
void pinbuf_unpin_pfns_dirty(unsigned long *pfns, unsigned long count);

bool pinbuf_same_pgmap(const struct page *a, const struct page *b);

void pinbuf_sg_set_page(struct scatterlist *sg, struct page *page,
			unsigned int len);
struct scatterlist *pinbuf_sg_next(struct scatterlist *sg);
unsigned int pinbuf_dma_get_max_seg_size(struct device *dev);
unsigned long pinbuf_dma_get_seg_boundary(struct device *dev);
void pinbuf_dma_sync_sgtable_for_cpu(struct device *dev, struct sg_table *sgt,
				     enum dma_data_direction dir);
void pinbuf_dma_sync_sgtable_for_device(struct device *dev,
					struct sg_table *sgt,
					enum dma_data_direction dir);
void pinbuf_dma_unmap_sgtable(struct device *dev, struct sg_table *sgt,
			      enum dma_data_direction dir);

void *pinbuf_vmap(struct page **pages, unsigned int count);
void pinbuf_vunmap(const void *addr);
bool pinbuf_vma_is_shared(const struct vm_area_struct *vma);
bool pinbuf_vma_is_exec(const struct vm_area_struct *vma);
void pinbuf_vma_set_pfnmap(struct vm_area_struct *vma);
bool pinbuf_huge_pfns_allowed(void);
void pinbuf_insert_pfn_pmd_near(const struct vm_fault *vmf, long distance,
				unsigned long pfn, bool write);
void pinbuf_set_pte_pfn(struct vm_area_struct *vma, unsigned long addr,
			pte_t *pte, unsigned long pfn);

#endif /* PINBUF_HELPERS_H */
