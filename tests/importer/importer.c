// SPDX-License-Identifier: GPL-2.0
/*
 * A dma-buf importer for tests.  Every open descriptor is a device of its own,
 * which reads and writes the buffer at the DMA addresses of its mapping.
 *
 * Such a device is not behind an IOMMU: a DMA address is the physical address
 * of the page or of a bounce buffer, and both are in the direct map.  On behalf
 * of a PCI device (struct pti_attach, @pci), a buffer can be mapped through an
 * IOMMU, but it cannot be read or written.
 */
#include <linux/align.h>
#include <linux/bits.h>
#include <linux/dma-buf.h>
#include <linux/dma-direct.h>
#include <linux/dma-map-ops.h>
#include <linux/dma-mapping.h>
#include <linux/device/faux.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/idr.h>
#include <linux/iosys-map.h>
#include <linux/kmemleak.h>
#include <linux/kstrtox.h>
#include <linux/ktime.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/scatterlist.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "failing_pins.h"
#include "importer.h"
#include "syncs.h"

/* The maximum number of pages or folios per call of a function that pins. */
#define PIN_BATCH 512
/* The maximum number of pins that PTI_PIN holds: 16 GiB in small pages. */
#define PIN_MAX (1UL << 22)
/* The maximum number of entries of PTI_SEGMENTS: 64 GiB in 64 KiB segments. */
#define SEGMENTS_MAX (1U << 20)

/**
 * struct pti_mapping - the result of a map call
 * @table:     the scatterlist, NULL if the slot is free
 * @direction: the direction that it was mapped for
 */
struct pti_mapping {
	struct sg_table *table;
	enum dma_data_direction direction;
};

/**
 * struct pti - an open descriptor
 * @lock:     taken by every call that uses the fields below, before the buffer's
 *            reservation lock
 * @dev:      the device, NULL while detached
 * @faux:     the same, if it is not a PCI device
 * @id:       the number in the name of @faux
 * @parms:    the DMA limits of @faux
 * @max_seg:  the limit of the PCI device, which is restored on detach
 * @buf:      the buffer
 * @attach:   the attachment
 * @mappings: the mappings
 * @vmap:     the kernel mapping
 * @vmapped:  whether @vmap is valid
 * @page:     the page that mmap() maps
 * @pins:     the calls that have to fail
 * @watch:    the maintenance of caches that is noted, or NULL
 * @coherent: whether new devices are coherent; -1: as the platform has it
 */
struct pti {
	struct mutex lock; /* see above */
	struct device *dev;
	struct faux_device *faux;
	int id;
	struct device_dma_parameters parms;
	unsigned int max_seg;
	struct dma_buf *buf;
	struct dma_buf_attachment *attach;
	struct pti_mapping mappings[PTI_MAPPINGS];
	struct iosys_map vmap;
	bool vmapped;
	struct page *page;
	struct pti_failing_pins pins;
	struct pti_watch *watch;
	int coherent;
};

static DEFINE_IDA(pti_ids);

static bool pti_direction_valid(u32 direction)
{
	return direction == DMA_BIDIRECTIONAL || direction == DMA_TO_DEVICE ||
	       direction == DMA_FROM_DEVICE;
}

static u64 pti_unmap_slot(struct pti *pti, struct pti_mapping *slot)
{
	u64 start = ktime_get_ns();

	dma_buf_unmap_attachment_unlocked(pti->attach, slot->table,
					  slot->direction);
	slot->table = NULL;
	return ktime_get_ns() - start;
}

static u64 pti_vunmap_now(struct pti *pti)
{
	u64 start = ktime_get_ns();

	dma_buf_vunmap_unlocked(pti->buf, &pti->vmap);
	pti->vmapped = false;
	return ktime_get_ns() - start;
}

static void pti_drop_device(struct pti *pti)
{
	if (pti->faux) {
		faux_device_destroy(pti->faux);
		pti->faux = NULL;
		ida_free(&pti_ids, pti->id);
	} else {
		dma_set_max_seg_size(pti->dev, pti->max_seg);
		pci_dev_put(to_pci_dev(pti->dev));
	}
	pti->dev = NULL;
}

static void pti_detach_now(struct pti *pti)
{
	int i;

	if (!pti->attach)
		return;
	for (i = 0; i < PTI_MAPPINGS; i++)
		if (pti->mappings[i].table)
			pti_unmap_slot(pti, &pti->mappings[i]);
	if (pti->vmapped)
		pti_vunmap_now(pti);
	dma_buf_detach(pti->buf, pti->attach);
	pti->attach = NULL;
	dma_buf_put(pti->buf);
	pti->buf = NULL;
	pti_drop_device(pti);
}

static int pti_take_pci_device(struct pti *pti, const struct pti_attach *arg)
{
	struct pci_dev *pdev;

	pdev = pci_get_domain_bus_and_slot(0, arg->pci >> 8, arg->pci & 0xff);
	if (!pdev)
		return -ENODEV;
	pti->dev = &pdev->dev;
	pti->max_seg = dma_get_max_seg_size(pti->dev);
	if (arg->max_seg)
		dma_set_max_seg_size(pti->dev, arg->max_seg);
	return 0;
}

static int pti_make_device(struct pti *pti, const struct pti_attach *arg)
{
	char name[40];
	struct device *dev;
	int ret;

	if (arg->pci)
		return pti_take_pci_device(pti, arg);

	pti->id = ida_alloc(&pti_ids, GFP_KERNEL);
	if (pti->id < 0)
		return pti->id;
	snprintf(name, sizeof(name), "pinbuf_test_importer.%d", pti->id);
	pti->faux = faux_device_create(name, NULL, NULL);
	if (!pti->faux) {
		ida_free(&pti_ids, pti->id);
		return -ENOMEM;
	}

	dev = &pti->faux->dev;
	pti->dev = dev;
	memset(&pti->parms, 0, sizeof(pti->parms));
	dev->dma_parms = &pti->parms;
	if (arg->max_seg)
		dma_set_max_seg_size(dev, arg->max_seg);
	if (pti->coherent >= 0)
		dev_assign_dma_coherent(dev, pti->coherent);
	if (arg->boundary)
		dma_set_seg_boundary(dev, arg->boundary);
	ret = dma_coerce_mask_and_coherent(dev, DMA_BIT_MASK(arg->mask_bits));
	if (ret)
		pti_drop_device(pti);
	return ret;
}

static int pti_attach(struct pti *pti, struct pti_attach __user *user)
{
	struct pti_attach arg;
	struct dma_buf_attachment *attach;
	struct dma_buf *buf;
	int ret;

	if (copy_from_user(&arg, user, sizeof(arg)))
		return -EFAULT;
	if (arg.pci > 0xffff || arg.mask_bits < 24 || arg.mask_bits > 64 ||
	    (arg.pci && arg.boundary))
		return -EINVAL;
	if (pti->attach)
		return -EBUSY;

	buf = dma_buf_get(arg.fd);
	if (IS_ERR(buf))
		return PTR_ERR(buf);
	ret = pti_make_device(pti, &arg);
	if (ret)
		goto put;
	attach = dma_buf_attach(buf, pti->dev);
	if (IS_ERR(attach)) {
		ret = PTR_ERR(attach);
		goto destroy;
	}
	pti->buf = buf;
	pti->attach = attach;

	arg.max_mapping = dma_max_mapping_size(pti->dev);
	if (copy_to_user(user, &arg, sizeof(arg))) {
		pti_detach_now(pti);
		return -EFAULT;
	}
	return 0;

destroy:
	pti_drop_device(pti);
put:
	dma_buf_put(buf);
	return ret;
}

static int pti_map(struct pti *pti, struct pti_map __user *user)
{
	struct pti_map arg;
	struct pti_mapping *slot = NULL;
	struct sg_table *table;
	u64 start;
	u32 i;

	if (copy_from_user(&arg, user, sizeof(arg)))
		return -EFAULT;
	if (!pti_direction_valid(arg.direction))
		return -EINVAL;
	if (!pti->attach)
		return -ENOTCONN;
	for (i = 0; i < PTI_MAPPINGS; i++) {
		if (!pti->mappings[i].table) {
			slot = &pti->mappings[i];
			break;
		}
	}
	if (!slot)
		return -ENOSPC;

	start = ktime_get_ns();
	table = dma_buf_map_attachment_unlocked(pti->attach, arg.direction);
	if (IS_ERR(table))
		return PTR_ERR(table);
	arg.ns = ktime_get_ns() - start;
	arg.mapping = i;
	slot->table = table;
	slot->direction = arg.direction;

	if (copy_to_user(user, &arg, sizeof(arg))) {
		pti_unmap_slot(pti, slot);
		return -EFAULT;
	}
	return 0;
}

static struct pti_mapping *pti_slot(struct pti *pti, u32 mapping)
{
	if (mapping >= PTI_MAPPINGS || !pti->mappings[mapping].table)
		return NULL;
	return &pti->mappings[mapping];
}

static int pti_unmap(struct pti *pti, struct pti_unmap __user *user)
{
	struct pti_unmap arg;
	struct pti_mapping *slot;

	if (copy_from_user(&arg, user, sizeof(arg)))
		return -EFAULT;
	slot = pti_slot(pti, arg.mapping);
	if (!slot || arg.reserved)
		return -EINVAL;
	arg.ns = pti_unmap_slot(pti, slot);
	return copy_to_user(user, &arg, sizeof(arg)) ? -EFAULT : 0;
}

static int pti_report(struct pti *pti, struct pti_report __user *user)
{
	struct pti_report arg;
	struct pti_mapping *slot;
	struct pti_entry __user *entries;
	struct scatterlist *sg;
	u64 end = 0;
	int i;

	if (copy_from_user(&arg, user, sizeof(arg)))
		return -EFAULT;
	slot = pti_slot(pti, arg.mapping);
	if (!slot)
		return -EINVAL;

	entries = u64_to_user_ptr(arg.entries);
	arg.count = 0;
	arg.total = 0;
	arg.min_len = U64_MAX;
	arg.max_len = 0;
	arg.align = 0;
	arg.adjacent = 0;
	for_each_sgtable_dma_sg(slot->table, sg, i) {
		struct pti_entry entry = {
			.addr = sg_dma_address(sg),
			.len = sg_dma_len(sg),
		};

		if (arg.count < arg.capacity &&
		    copy_to_user(&entries[arg.count], &entry, sizeof(entry)))
			return -EFAULT;
		if (arg.count && entry.addr == end)
			arg.adjacent++;
		end = entry.addr + entry.len;
		arg.count++;
		arg.total += entry.len;
		arg.min_len = min(arg.min_len, entry.len);
		arg.max_len = max(arg.max_len, entry.len);
		arg.align |= entry.addr | entry.len;
		cond_resched();
	}
	return copy_to_user(user, &arg, sizeof(arg)) ? -EFAULT : 0;
}

/*
 * Copies between @data and @memory, page by page, because hardened usercopy
 * refuses ranges that cross from one folio into the next.
 */
static int pti_copy(char *memory, char __user *data, u64 len, u32 flags)
{
	while (len) {
		u64 chunk = min(len, (u64)(PAGE_SIZE - offset_in_page(memory)));
		unsigned long missing;

		if (flags & PTI_RW_WRITE)
			missing = copy_from_user(memory, data, chunk);
		else
			missing = copy_to_user(data, memory, chunk);
		if (missing)
			return -EFAULT;
		memory += chunk;
		data += chunk;
		len -= chunk;
		cond_resched();
	}
	return 0;
}

/* Copies between @data and the memory that the device would access. */
static int pti_rw_device(struct pti *pti, const struct pti_rw *arg)
{
	struct pti_mapping *slot = pti_slot(pti, arg->mapping);
	char __user *data = u64_to_user_ptr(arg->data);
	u64 offset = arg->offset;
	u64 left = arg->len;
	struct scatterlist *sg;
	int i;

	if (!slot)
		return -EINVAL;
	if (!pti->faux)
		return -EOPNOTSUPP;
	for_each_sgtable_dma_sg(slot->table, sg, i) {
		u64 len = sg_dma_len(sg);
		char *memory;
		int ret;

		if (!left)
			break;
		if (offset >= len) {
			offset -= len;
			continue;
		}
		memory = phys_to_virt(dma_to_phys(pti->dev,
						  sg_dma_address(sg)));
		len = min(len - offset, left);
		ret = pti_copy(memory + offset, data, len, arg->flags);
		if (ret)
			return ret;
		data += len;
		left -= len;
		offset = 0;
	}
	return left ? -ERANGE : 0;
}

static int pti_rw_vmap(struct pti *pti, const struct pti_rw *arg)
{
	if (!pti->vmapped || pti->vmap.is_iomem)
		return -EINVAL;
	return pti_copy((char *)pti->vmap.vaddr + arg->offset,
			u64_to_user_ptr(arg->data), arg->len, arg->flags);
}

static int pti_rw(struct pti *pti, struct pti_rw __user *user)
{
	struct pti_rw arg;

	if (copy_from_user(&arg, user, sizeof(arg)))
		return -EFAULT;
	if (arg.flags & ~(PTI_RW_WRITE | PTI_RW_VMAP))
		return -EINVAL;
	if (!pti->attach)
		return -ENOTCONN;
	if (arg.offset > pti->buf->size || arg.len > pti->buf->size - arg.offset)
		return -ERANGE;
	if (arg.flags & PTI_RW_VMAP)
		return pti_rw_vmap(pti, &arg);
	return pti_rw_device(pti, &arg);
}

static int pti_vmap(struct pti *pti, struct pti_time __user *user)
{
	struct pti_time arg;
	u64 start;
	int ret;

	if (!pti->attach)
		return -ENOTCONN;
	if (pti->vmapped)
		return -EBUSY;
	start = ktime_get_ns();
	ret = dma_buf_vmap_unlocked(pti->buf, &pti->vmap);
	if (ret)
		return ret;
	arg.ns = ktime_get_ns() - start;
	pti->vmapped = true;
	return copy_to_user(user, &arg, sizeof(arg)) ? -EFAULT : 0;
}

static int pti_vunmap(struct pti *pti, struct pti_time __user *user)
{
	struct pti_time arg;

	if (!pti->vmapped)
		return -EINVAL;
	arg.ns = pti_vunmap_now(pti);
	return copy_to_user(user, &arg, sizeof(arg)) ? -EFAULT : 0;
}

static int pti_cpu(struct pti *pti, struct pti_cpu __user *user)
{
	struct pti_cpu arg;
	u64 start;
	int ret;

	if (copy_from_user(&arg, user, sizeof(arg)))
		return -EFAULT;
	if (!pti_direction_valid(arg.direction) || (arg.flags & ~PTI_CPU_END))
		return -EINVAL;
	if (!pti->attach)
		return -ENOTCONN;
	start = ktime_get_ns();
	if (arg.flags & PTI_CPU_END)
		ret = dma_buf_end_cpu_access(pti->buf, arg.direction);
	else
		ret = dma_buf_begin_cpu_access(pti->buf, arg.direction);
	if (ret)
		return ret;
	arg.ns = ktime_get_ns() - start;
	return copy_to_user(user, &arg, sizeof(arg)) ? -EFAULT : 0;
}

/* The minimum cost of any driver that pins. */
static int pti_pin_addresses(struct pti_pin *arg, struct page **pages,
			     unsigned long want)
{
	unsigned long done = 0;
	u64 start = ktime_get_ns();
	int ret = 0;

	while (done < want) {
		unsigned long batch = 1;

		if (fatal_signal_pending(current)) {
			ret = -EINTR;
			break;
		}
		if (arg->stride == PAGE_SIZE)
			batch = min(want - done, (unsigned long)PIN_BATCH);
		ret = pin_user_pages_fast(arg->addr + done * arg->stride, batch,
					  FOLL_WRITE | FOLL_LONGTERM,
					  pages + done);
		if (ret <= 0) {
			ret = ret ?: -EFAULT;
			break;
		}
		done += ret;
		ret = 0;
		cond_resched();
	}
	arg->pin_ns = ktime_get_ns() - start;

	start = ktime_get_ns();
	unpin_user_pages_dirty_lock(pages, done, true);
	arg->unpin_ns = ktime_get_ns() - start;
	arg->pages = done;
	return ret;
}

static int pti_pin_file(struct pti_pin *arg, struct folio **folios,
			unsigned long want)
{
	struct file *file = fget(arg->fd);
	u64 at = arg->addr, end = arg->addr + arg->len, start;
	unsigned long done = 0;
	pgoff_t offset;
	long ret = 0;

	if (!file)
		return -EBADF;
	start = ktime_get_ns();
	while (at < end && done < want) {
		unsigned long batch = min(want - done, (unsigned long)PIN_BATCH);

		if (fatal_signal_pending(current)) {
			ret = -EINTR;
			break;
		}
		ret = memfd_pin_folios(file, at, end - 1, folios + done, batch,
				       &offset);
		if (ret <= 0) {
			ret = ret ?: -EFAULT;
			break;
		}
		at += folio_size(folios[done]) - offset;
		for (done++; --ret > 0; done++)
			at += folio_size(folios[done]);
		cond_resched();
	}
	arg->pin_ns = ktime_get_ns() - start;

	start = ktime_get_ns();
	unpin_folios(folios, done);
	arg->unpin_ns = ktime_get_ns() - start;
	arg->pages = done;
	fput(file);
	return ret;
}

static int pti_pin(struct pti_pin __user *user)
{
	struct pti_pin arg;
	unsigned long want;
	void **pinned;
	int ret;

	if (copy_from_user(&arg, user, sizeof(arg)))
		return -EFAULT;
	if (!arg.len || arg.stride < PAGE_SIZE || arg.reserved ||
	    !IS_ALIGNED(arg.addr | arg.len | arg.stride, PAGE_SIZE) ||
	    arg.addr + arg.len < arg.addr)
		return -EINVAL;
	want = DIV_ROUND_UP(arg.len, arg.stride);
	if (want > PIN_MAX)
		return -E2BIG;
	pinned = kvmalloc_array(want, sizeof(*pinned), GFP_KERNEL_ACCOUNT);
	if (!pinned)
		return -ENOMEM;
	if (arg.fd < 0)
		ret = pti_pin_addresses(&arg, (struct page **)pinned, want);
	else
		ret = pti_pin_file(&arg, (struct folio **)pinned, want);
	kvfree(pinned);
	if (ret)
		return ret;
	return copy_to_user(user, &arg, sizeof(arg)) ? -EFAULT : 0;
}

/* The minimum cost of any exporter: a dma-buf without memory. */

static struct sg_table *pti_empty_map(struct dma_buf_attachment *attach,
				      enum dma_data_direction dir)
{
	return ERR_PTR(-EOPNOTSUPP);
}

static void pti_empty_unmap(struct dma_buf_attachment *attach,
			    struct sg_table *table, enum dma_data_direction dir)
{
}

static void pti_empty_release(struct dma_buf *buf)
{
}

static const struct dma_buf_ops pti_empty_ops = {
	.map_dma_buf = pti_empty_map,
	.unmap_dma_buf = pti_empty_unmap,
	.release = pti_empty_release,
};

static int pti_export(void)
{
	DEFINE_DMA_BUF_EXPORT_INFO(info);
	struct dma_buf *buf;
	int fd;

	info.ops = &pti_empty_ops;
	info.priv = THIS_MODULE;
	info.size = PAGE_SIZE;
	info.flags = O_RDWR;
	buf = dma_buf_export(&info);
	if (IS_ERR(buf))
		return PTR_ERR(buf);
	fd = dma_buf_fd(buf, O_CLOEXEC);
	if (fd < 0)
		dma_buf_put(buf);
	return fd;
}

/* The minimum cost of the map_dma_buf callback of any exporter. */
static int pti_segments(struct pti *pti, struct pti_segments __user *user)
{
	const struct pti_attach limits = {
		.mask_bits = 64,
		.max_seg = UINT_MAX,
	};
	struct pti_segments arg;
	struct scatterlist *sg;
	struct sg_table table;
	u64 start;
	int ret, i;

	if (copy_from_user(&arg, user, sizeof(arg)))
		return -EFAULT;
	if (!arg.count || arg.count > SEGMENTS_MAX || arg.reserved)
		return -EINVAL;
	if (pti->attach)
		return -EBUSY;
	ret = pti_make_device(pti, &limits);
	if (ret)
		return ret;

	start = ktime_get_ns();
	ret = sg_alloc_table(&table, arg.count, GFP_KERNEL_ACCOUNT);
	if (ret)
		goto destroy;
	for_each_sgtable_sg(&table, sg, i)
		sg_set_page(sg, pti->page, PAGE_SIZE, 0);
	ret = dma_map_sgtable(pti->dev, &table, DMA_BIDIRECTIONAL, 0);
	arg.map_ns = ktime_get_ns() - start;
	if (ret)
		goto free_table;

	start = ktime_get_ns();
	dma_unmap_sgtable(pti->dev, &table, DMA_BIDIRECTIONAL, 0);
free_table:
	sg_free_table(&table);
	arg.unmap_ns = ktime_get_ns() - start;
destroy:
	pti_drop_device(pti);
	if (ret)
		return ret;
	return copy_to_user(user, &arg, sizeof(arg)) ? -EFAULT : 0;
}

static int pti_set_coherent(struct pti *pti, u32 __user *user)
{
	u32 coherent;

	if (get_user(coherent, user))
		return -EFAULT;
	if (coherent > 1)
		return -EINVAL;
	if (!coherent && !IS_ENABLED(CONFIG_ARCH_HAS_SYNC_DMA_FOR_DEVICE))
		return -EOPNOTSUPP;
	pti->coherent = coherent;
	return 0;
}

static int pti_buffer_attributes(struct pti *pti,
				 struct pti_attributes __user *user)
{
	struct pti_mapping *slot = pti_slot(pti, 0);

	if (!slot)
		return -EINVAL;
	return pti_attributes(user, pti->vmapped ? pti->vmap.vaddr : NULL,
			      dma_to_phys(pti->dev,
					  sg_dma_address(slot->table->sgl)));
}

static long pti_ioctl(struct file *file, unsigned int cmd, unsigned long value)
{
	struct pti *pti = file->private_data;
	void __user *user = (void __user *)value;
	long ret;

	if (cmd == PTI_PIN)
		return pti_pin(user);
	if (cmd == PTI_EXPORT)
		return pti_export();

	if (mutex_lock_interruptible(&pti->lock))
		return -EINTR;
	switch (cmd) {
	case PTI_ATTACH:
		ret = pti_attach(pti, user);
		break;
	case PTI_DETACH:
		ret = pti->attach ? 0 : -ENOTCONN;
		pti_detach_now(pti);
		break;
	case PTI_MAP:
		ret = pti_map(pti, user);
		break;
	case PTI_UNMAP:
		ret = pti_unmap(pti, user);
		break;
	case PTI_REPORT:
		ret = pti_report(pti, user);
		break;
	case PTI_RW:
		ret = pti_rw(pti, user);
		break;
	case PTI_VMAP:
		ret = pti_vmap(pti, user);
		break;
	case PTI_VUNMAP:
		ret = pti_vunmap(pti, user);
		break;
	case PTI_CPU:
		ret = pti_cpu(pti, user);
		break;
	case PTI_SEGMENTS:
		ret = pti_segments(pti, user);
		break;
	case PTI_FAIL_PINS:
		ret = pti_fail_pins(&pti->pins, user);
		break;
	case PTI_PINS_FAILED:
		ret = pti_pins_failed(&pti->pins, user);
		break;
	case PTI_COHERENT:
		ret = pti_set_coherent(pti, user);
		break;
	case PTI_SYNCS_BEGIN:
		ret = pti_watch_syncs(&pti->watch);
		break;
	case PTI_SYNCS_END:
		ret = pti_syncs(&pti->watch, user);
		break;
	case PTI_ATTRIBUTES:
		ret = pti_buffer_attributes(pti, user);
		break;
	default:
		ret = -ENOTTY;
		break;
	}
	mutex_unlock(&pti->lock);
	return ret;
}

static int pti_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct pti *pti = file->private_data;

	if (vma->vm_pgoff || vma->vm_end - vma->vm_start != PAGE_SIZE ||
	    !(vma->vm_flags & VM_SHARED))
		return -EINVAL;
	return remap_pfn_range(vma, vma->vm_start, page_to_pfn(pti->page),
			       PAGE_SIZE, vma->vm_page_prot);
}

static int pti_open(struct inode *inode, struct file *file)
{
	struct pti *pti = kzalloc(sizeof(*pti), GFP_KERNEL);

	if (!pti)
		return -ENOMEM;
	pti->page = alloc_page(GFP_KERNEL | __GFP_ZERO);
	if (!pti->page) {
		kfree(pti);
		return -ENOMEM;
	}
	mutex_init(&pti->lock);
	pti->coherent = -1;
	file->private_data = pti;
	return 0;
}

static int pti_release(struct inode *inode, struct file *file)
{
	struct pti *pti = file->private_data;

	pti_end_failing_pins(&pti->pins);
	pti_end_watch(&pti->watch);
	pti_detach_now(pti);
	__free_page(pti->page);
	mutex_destroy(&pti->lock);
	kfree(pti);
	return 0;
}

static const struct file_operations pti_fops = {
	.owner = THIS_MODULE,
	.open = pti_open,
	.release = pti_release,
	.unlocked_ioctl = pti_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.mmap = pti_mmap,
};

static struct miscdevice pti_misc = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "pinbuf_test_importer",
	.fops = &pti_fops,
	.mode = 0600,
};
module_misc_device(pti_misc);

static int pti_set_unscanned(const char *value, const struct kernel_param *kp)
{
	u64 addr;
	int ret = kstrtou64(value, 0, &addr);

	if (!ret)
		kmemleak_ignore_phys(addr);
	return ret;
}

/*
 * Physical address of an allocation of early boot that kmemleak no longer
 * scans, for pages of 1 GiB: their contents are the tests', and scanning one
 * takes 20 seconds.  Does nothing on kernels without kmemleak.
 */
static const struct kernel_param_ops pti_unscanned = {
	.set = pti_set_unscanned,
};
module_param_cb(unscanned, &pti_unscanned, NULL, 0200);
MODULE_PARM_DESC(unscanned, "physical address of boot memory that kmemleak ignores");

MODULE_DESCRIPTION("A dma-buf importer for pinbuf's tests");
MODULE_LICENSE("GPL");
MODULE_IMPORT_NS("DMA_BUF");
