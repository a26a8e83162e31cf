/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The functions that driver/helpers.c provides for Rust.  bindgen generates the
 * Rust prototypes from this file when the module is built (driver/Kbuild).
 */
#ifndef PINBUF_HELPERS_H
#define PINBUF_HELPERS_H

#include <linux/dma-direction.h>
#include <linux/pgtable.h>
#include <linux/types.h>
#include <linux/uidgid_types.h>

struct device;
struct folio;
struct page;
struct scatterlist;
struct sg_table;
struct task_struct;
struct user_namespace;
struct user_struct;
struct vm_area_struct;
struct vm_fault;

/* Module parameters */
unsigned int pinbuf_param_allowance_mb(void);
unsigned int pinbuf_param_allowance_system_mb(void);
unsigned int pinbuf_param_pin_retries(void);

/* Tasks and users */
bool pinbuf_fatal_signal_pending(struct task_struct *task);
void pinbuf_cond_resched(void);
unsigned int pinbuf_memalloc_pin_save(void);
void pinbuf_memalloc_pin_restore(unsigned int flags);
unsigned long pinbuf_rlimit(unsigned int limit);
struct user_struct *pinbuf_get_current_user(void);
struct user_namespace *pinbuf_current_user_ns(void);
kuid_t pinbuf_make_kuid(struct user_namespace *ns, uid_t uid);
unsigned long pinbuf_totalram_pages(void);

/* Pages and folios */
unsigned long pinbuf_untagged_addr(unsigned long addr);
struct page *pinbuf_pfn_to_page(unsigned long pfn);
void *pinbuf_page_address(const struct page *page);
bool pinbuf_is_page_hwpoison(const struct page *page);
struct folio *pinbuf_page_folio(struct page *page);
unsigned long pinbuf_folio_nr_pages(const struct folio *folio);
bool pinbuf_folio_test_hugetlb(const struct folio *folio);
bool pinbuf_folio_mapped(const struct folio *folio);
int pinbuf_folio_entire_mapcount(const struct folio *folio);
void pinbuf_smp_rmb(void);

/* Scatterlists and DMA */
void pinbuf_sg_set_page(struct scatterlist *sg, struct page *page,
			unsigned int len, unsigned int offset);
unsigned int pinbuf_dma_get_max_seg_size(struct device *dev);
unsigned long pinbuf_dma_get_seg_boundary(struct device *dev);
bool pinbuf_dma_need_sync(struct device *dev, u64 addr);
bool pinbuf_dev_is_dma_coherent(struct device *dev);
void pinbuf_dma_sync_sgtable_for_cpu(struct device *dev, struct sg_table *sgt,
				     enum dma_data_direction dir);
void pinbuf_dma_sync_sgtable_for_device(struct device *dev,
					struct sg_table *sgt,
					enum dma_data_direction dir);

/* Mappings */
void *pinbuf_vmap(struct page **pages, unsigned int count);
void pinbuf_vunmap(const void *addr);
void pinbuf_vm_flags_mod(struct vm_area_struct *vma, unsigned long set,
			 unsigned long clear);
bool pinbuf_page_table_check_enabled(void);
bool pinbuf_pmd_none(pmd_t *pmd);
bool pinbuf_pmd_leaf(pmd_t *pmd);
bool pinbuf_pmd_install(struct vm_fault *vmf);
bool pinbuf_pte_none(pte_t *pte);
void pinbuf_set_pte_pfn(struct vm_area_struct *vma, unsigned long addr,
			pte_t *pte, unsigned long pfn);

#endif /* PINBUF_HELPERS_H */
