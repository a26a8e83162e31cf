// SPDX-License-Identifier: MIT OR Apache-2.0

//! What `test` runs in guests.  A new row here is a new run.

use crate::guest::VFIO;

/// When a run happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// With every change.
    Always,
    /// Only with `--long`.
    Long,
}

/// How the result of a run is determined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// By KTAP on standard output.
    Ktap,
    /// By its exit status: one test.
    Status,
}

/// One guest, and what runs in it.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    /// A name for people, and for `--run`.
    pub name: &'static str,
    /// When it happens.
    pub when: When,
    /// The kernel, as `vm --kernel` takes it.
    pub kernel: &'static str,
    /// Memory, as `vm --mem` takes it.
    pub memory: &'static str,
    /// Words for the kernel's command line.
    pub cmdline: &'static str,
    /// Arguments for QEMU, as in a shell.
    pub qemu: &'static str,
    /// The image, as `vm --image` takes it.
    pub image: &'static str,
    /// A guest without pinbuf.
    pub bare: bool,
    /// Modules that are loaded besides pinbuf.
    pub modules: &'static [&'static str],
    /// The command, as in a shell.
    pub command: &'static str,
    /// How its result is determined.
    pub verdict: Verdict,
    /// The package of the workspace that has all that the command runs, if that is known. Programs for another
    /// architecture are built for a run, and with this, no others.
    pub package: Option<&'static str>,
    /// Whether the command takes `--filter`.
    pub filters: bool,
    /// Seconds until the guest is stopped.
    pub timeout: u64,
    /// About how many seconds it takes on a machine with other work, if that was measured: long runs come first.
    pub seconds: u64,
}

impl Run {
    /// About how many seconds it takes.
    pub fn takes(&self) -> u64 {
        match self.seconds {
            0 => self.timeout / 10,
            seconds => seconds,
        }
    }
}

/// The ordinary run; rows say what is different.
const PLAIN: Run = Run {
    name: "",
    when: When::Always,
    kernel: "default",
    memory: "5G",
    // Set aside during boot: later, there may be no free GiB in one piece.
    cmdline: "hugepagesz=1G hugepages=1",
    qemu: "",
    image: "base",
    bare: false,
    modules: &["pinbuf_test_importer"],
    // These have a row of their own, `mappings`: what the mm core does to a mapping does not depend on the
    // devices of a row.
    command: "pinbuf-selftest --without mappings.",
    verdict: Verdict::Ktap,
    package: None,
    filters: true,
    timeout: 600,
    seconds: 0,
};

/// Devices see copies of all memory.
const FORCED_BOUNCES: &str = "swiotlb=force hugepagesz=1G hugepages=1";

/// Virtual machines inside of the guest; rows say which.
const NESTED: Run = Run {
    when: When::Long,
    memory: "3G",
    // The kernel reports a free page that is written, and one that is freed while it is in use.
    cmdline: "initcall_blacklist=udmabuf_dev_init intel_iommu=on page_poison=1",
    image: "qemu",
    modules: &[],
    command: "pinbuf-nested",
    timeout: 1800,
    ..PLAIN
};

/// On the kernel with checkers and fault injection; rows say what.
const CHECKED: Run = Run {
    when: When::Long,
    kernel: "debug",
    memory: "3G",
    // With its checks enabled, the slab allocator keeps no stocks of free objects, which it would refill now
    // and then. So a call makes the same allocations each time, and none is missed.
    cmdline: "slab_debug=F",
    timeout: 1800,
    ..PLAIN
};

/// Processes that are killed; rows say how many.
const KILLS: Run = Run {
    memory: "2G",
    cmdline: "movablecore=640M",
    ..PLAIN
};

/// A disk for the image of a machine that hibernates, kept in a temporary file.
const SWAP: &str =
    "-drive if=none,id=swap,file.driver=null-co,file.size=6G,file.read-zeroes=on,format=raw,\
snapshot=on -device virtio-blk-pci,drive=swap,serial=swap";

/// The old API, on the kernel's udmabuf and under the shim, case by case.
const CONFORMANCE: Run = Run {
    name: "conformance",
    memory: "3G",
    cmdline: "",
    modules: &[],
    command: "tests/conformance/run",
    verdict: Verdict::Status,
    filters: false,
    seconds: 160,
    ..PLAIN
};

/// Debian's programs that use udmabuf, and the command `pinbuf`, as users run them.
const CLIENTS: Run = Run {
    name: "clients",
    memory: "2G",
    // An example of the library shows a picture, and the test reads the display's memory, which is its driver's.
    cmdline: "initcall_blacklist=udmabuf_dev_init iomem=relaxed",
    qemu: "-device bochs-display",
    image: "clients",
    modules: &[],
    command: "pinbuf-clients",
    seconds: 190,
    ..PLAIN
};

/// Every kind of memory.
const MEMORY: Run = Run {
    name: "memory",
    memory: "2688M",
    // With a memory range that the kernel treats as persistent memory of a device.
    cmdline: "hugepagesz=1G hugepages=1 memmap=128M!2G",
    command: "pinbuf-memtest kinds populate safety discard promises late owners throttled",
    seconds: 150,
    ..PLAIN
};

/// Memory where nothing may stay pinned.
const MOVABLE: Run = Run {
    name: "movable",
    // With room for a page of 1 GiB outside of ZONE_MOVABLE, which is at the end.
    memory: "3712M",
    cmdline: "movablecore=640M hugepagesz=1G hugepages=1",
    command: "pinbuf-memtest movable passing",
    ..PLAIN
};

/// Huge pages of 1 GiB in CMA.
const CMA: Run = Run {
    name: "cma",
    memory: "2560M",
    // The kernel must not lie in the only GiB that the area can be. Kernels for arm64 have another area by default.
    cmdline: "hugetlb_cma=1G nokaslr cma=0",
    command: "pinbuf-memtest cma",
    ..PLAIN
};

/// The same on arm64, where memory that is there at boot does not go offline: ZONE_MOVABLE is memory that is
/// plugged in.
const MOVABLE_ARM64: Run = Run {
    when: When::Long,
    memory: "3G",
    cmdline: "memhp_default_state=online_movable hugepagesz=1G hugepages=1",
    qemu: "-m size=3G,maxmem=8G -object memory-backend-ram,id=movable,size=640M \
        -device virtio-mem-pci,memdev=movable,requested-size=640M",
    modules: &["virtio_mem", "pinbuf_test_importer"],
    timeout: 1800,
    ..MOVABLE
};

/// arm64 with pages of 16 KiB: a test of each part that sizes matter to, and devices without coherency.
const ARM64: Run = Run {
    name: "arm64",
    kernel: "arm64-16k",
    memory: "2G",
    cmdline: "",
    command: "pinbuf-selftest --filter coherency. --filter memory_types. --filter compat32. --filter create.one_page \
    --filter create.memfd --filter huge.shared --filter huge.odd_offsets --filter huge.transparent_in_part \
    --filter mmap.huge_entries",
    package: Some("pinbuf-guest-tests"),
    filters: false,
    timeout: 300,
    // With the build of its user space, which no other row needs.
    seconds: 150,
    ..PLAIN
};

/// All runs.
pub const RUNS: &[Run] = &[
    Run {
        name: "stock",
        seconds: 150,
        ..PLAIN
    },
    Run {
        // Mappings of every size, taken apart in every way; one shape, the slowest, with `--long` alone.
        name: "mappings",
        command: "pinbuf-selftest --filter mappings. --without giga_twice",
        filters: false,
        seconds: 120,
        ..PLAIN
    },
    Run {
        name: "mappings-debug",
        memory: "5G",
        cmdline: "page_table_check=off hugepagesz=1G hugepages=1",
        modules: &["pinbuf_test_importer"],
        command: "pinbuf-selftest --filter mappings.",
        filters: false,
        timeout: 3600,
        ..CHECKED
    },
    Run {
        // Random steps on mappings, against a model.
        name: "torture",
        command: "pinbuf-torture --seconds 10 --steps 300",
        ..PLAIN
    },
    Run {
        name: "torture-long",
        when: When::Long,
        command: "pinbuf-torture --seconds 900 --seed 1000",
        timeout: 3000,
        ..PLAIN
    },
    Run {
        // The page-table checker forbids huge entries of ours.
        name: "torture-debug",
        memory: "5G",
        cmdline: "page_table_check=off hugepagesz=1G hugepages=1",
        command: "pinbuf-torture --seconds 600",
        timeout: 3000,
        ..CHECKED
    },
    Run {
        name: "swiotlb",
        // Every device mapping goes through bounce buffers, and has to be synchronised. Nothing else is different, so
        // this row has the files whose tests map for devices, without the largest creates, of which no device gets a
        // copy.
        cmdline: FORCED_BOUNCES,
        command: "pinbuf-selftest create huge importer fences memory_types vivid leaks lifetime \
            --without create.ranges_65536 --without create.one_gib --without create.a_page_a_million_times",
        seconds: 110,
        ..PLAIN
    },
    Run {
        name: "swiotlb-long",
        when: When::Long,
        cmdline: FORCED_BOUNCES,
        ..PLAIN
    },
    Run {
        name: "vivid",
        // A camera with 32-bit addresses. Without memory above 4 GiB none of its memory is bounced, and its
        // frames can be compared.
        memory: "2G",
        cmdline: "",
        command: "pinbuf-selftest --filter vivid",
        filters: false,
        timeout: 300,
        ..PLAIN
    },
    CONFORMANCE,
    CLIENTS,
    Run {
        // What commands and libraries report of a kernel that does not count the mappings of each page.
        name: "watch-debug",
        kernel: "debug",
        memory: "3G",
        // Row `debug` looks for what the driver leaks.
        cmdline: "initcall_blacklist=udmabuf_dev_init kmemleak=off",
        qemu: "",
        command: "pinbuf-clients --filter huge_page_in_parts",
        filters: false,
        seconds: 60,
        ..CLIENTS
    },
    Run {
        // The same command, where SELinux refuses the device.
        name: "selinux",
        memory: "2G",
        cmdline: "initcall_blacklist=udmabuf_dev_init security=selinux",
        image: "clients",
        modules: &[],
        command: "pinbuf-clients selinux",
        ..PLAIN
    },
    Run {
        // Programs that use udmabuf in Debian's next release: GStreamer, GTK, compositors.
        name: "programs",
        when: When::Long,
        memory: "3G",
        cmdline: "initcall_blacklist=udmabuf_dev_init",
        image: "programs",
        modules: &[],
        command: "pinbuf-clients gstreamer weston gtk kwin",
        timeout: 3000,
        ..PLAIN
    },
    Run {
        // The compositor Jay, whose build takes a quarter of an hour of a processor.
        name: "jay",
        when: When::Long,
        memory: "2G",
        cmdline: "initcall_blacklist=udmabuf_dev_init",
        image: "jay",
        modules: &[],
        command: "pinbuf-clients jay",
        timeout: 2500,
        ..PLAIN
    },
    Run {
        name: "install",
        bare: true,
        memory: "1G",
        cmdline: "",
        modules: &[],
        command: "tests/install/run",
        filters: false,
        timeout: 300,
        ..PLAIN
    },
    Run {
        // Every pin of a create fails in turn, by a probe: this needs no special kernel.
        name: "pins",
        memory: "1500M",
        cmdline: "",
        command: "pinbuf-stress faults --filter faults.pin",
        filters: false,
        ..PLAIN
    },
    Run {
        // Debian's cloud kernel leaves out drivers; its options for memory, page tables and scheduling are those of
        // the default kernel. So this row tests the module's build and load, and one part of each layer.
        name: "cloud",
        kernel: "default-cloud",
        command: "pinbuf-selftest --filter create. --filter mmap. --filter importer.",
        filters: false,
        ..PLAIN
    },
    Run {
        name: "cloud-long",
        when: When::Long,
        kernel: "default-cloud",
        ..PLAIN
    },
    Run {
        // PREEMPT_RT: spinlocks sleep, interrupt handlers are threads, and Debian's configuration leaves
        // out transparent huge pages.
        name: "rt",
        kernel: "default-rt",
        // Without the largest creates, which take no other locks than smaller ones, and without the search for a page
        // below 4 GiB, which takes long without huge pages, for a test of addresses alone.
        command: "pinbuf-selftest --without mappings. --without create.ranges_65536 --without create.one_gib \
            --without create.a_page_a_million_times --without of_memory_partly_beyond",
        seconds: 150,
        ..PLAIN
    },
    Run {
        // What `rt` leaves out.
        name: "rt-sizes",
        when: When::Long,
        kernel: "default-rt",
        command: "pinbuf-selftest --filter create.ranges_65536 --filter create.one_gib \
            --filter create.a_page_a_million_times --filter of_memory_partly_beyond",
        filters: false,
        ..PLAIN
    },
    ARM64,
    Run {
        name: "stock-arm64",
        when: When::Long,
        kernel: "arm64",
        // Memory with tags has a row of its own.
        command: "pinbuf-selftest --without mappings. --without mte.",
        timeout: 1800,
        ..PLAIN
    },
    Run {
        name: "mappings-arm64",
        when: When::Long,
        kernel: "arm64",
        command: "pinbuf-selftest --filter mappings. --without giga_twice",
        filters: false,
        timeout: 1800,
        ..PLAIN
    },
    Run {
        name: "memory-arm64",
        when: When::Long,
        kernel: "arm64",
        cmdline: PLAIN.cmdline,
        qemu: "-machine virtualization=on",
        timeout: 1800,
        ..MEMORY
    },
    Run {
        name: "movable-arm64",
        kernel: "arm64",
        ..MOVABLE_ARM64
    },
    Run {
        name: "cma-arm64",
        when: When::Long,
        kernel: "arm64",
        timeout: 1800,
        ..CMA
    },
    Run {
        name: "conformance-arm64",
        when: When::Long,
        kernel: "arm64",
        timeout: 1800,
        ..CONFORMANCE
    },
    Run {
        name: "clients-arm64",
        when: When::Long,
        kernel: "arm64",
        timeout: 1800,
        ..CLIENTS
    },
    Run {
        name: "races-arm64",
        when: When::Long,
        kernel: "arm64",
        memory: "3G",
        cmdline: "",
        command: "pinbuf-stress races --seconds 20",
        timeout: 1800,
        ..PLAIN
    },
    Run {
        name: "kills-arm64",
        when: When::Long,
        kernel: "arm64",
        command: "pinbuf-stress kills --kills 300",
        timeout: 1800,
        ..KILLS
    },
    Run {
        name: "stock-arm64-16k",
        when: When::Long,
        kernel: "arm64-16k",
        // Memory with tags has a row of its own.
        command: "pinbuf-selftest --without mappings. --without mte.",
        timeout: 1800,
        ..PLAIN
    },
    Run {
        name: "mappings-arm64-16k",
        when: When::Long,
        kernel: "arm64-16k",
        command: "pinbuf-selftest --filter mappings. --without giga_twice",
        filters: false,
        timeout: 1800,
        ..PLAIN
    },
    Run {
        name: "memory-arm64-16k",
        when: When::Long,
        kernel: "arm64-16k",
        cmdline: PLAIN.cmdline,
        qemu: "-machine virtualization=on",
        timeout: 1800,
        ..MEMORY
    },
    Run {
        name: "movable-arm64-16k",
        kernel: "arm64-16k",
        ..MOVABLE_ARM64
    },
    Run {
        name: "cma-arm64-16k",
        when: When::Long,
        kernel: "arm64-16k",
        timeout: 1800,
        ..CMA
    },
    Run {
        name: "conformance-arm64-16k",
        when: When::Long,
        kernel: "arm64-16k",
        timeout: 1800,
        ..CONFORMANCE
    },
    Run {
        name: "clients-arm64-16k",
        when: When::Long,
        kernel: "arm64-16k",
        timeout: 1800,
        ..CLIENTS
    },
    Run {
        name: "races-arm64-16k",
        when: When::Long,
        kernel: "arm64-16k",
        memory: "3G",
        cmdline: "",
        command: "pinbuf-stress races --seconds 20",
        timeout: 1800,
        ..PLAIN
    },
    Run {
        name: "kills-arm64-16k",
        when: When::Long,
        kernel: "arm64-16k",
        command: "pinbuf-stress kills --kills 300",
        timeout: 1800,
        ..KILLS
    },
    Run {
        name: "cloud-arm64",
        when: When::Long,
        kernel: "cloud-arm64",
        ..ARM64
    },
    Run {
        name: "rt-arm64",
        when: When::Long,
        kernel: "rt-arm64",
        ..ARM64
    },
    Run {
        // Memory with tags. Kernel and processor have them in this machine alone.
        name: "arm64-mte",
        when: When::Long,
        kernel: "arm64-16k",
        memory: "2G",
        cmdline: "",
        qemu: "-machine mte=on",
        command: "pinbuf-selftest --filter mte. --filter coherency. --filter memory_types.",
        filters: false,
        ..PLAIN
    },
    Run {
        name: "next",
        kernel: "newest",
        // Without the largest creates: a kernel does the same for smaller ones.
        command: "pinbuf-selftest --without mappings. --without create.ranges_65536 --without create.one_gib",
        seconds: 150,
        ..PLAIN
    },
    Run {
        name: "next-sizes",
        when: When::Long,
        kernel: "newest",
        command: "pinbuf-selftest --filter create.ranges_65536 --filter create.one_gib",
        filters: false,
        ..PLAIN
    },
    MEMORY,
    MOVABLE,
    Run {
        name: "pinners",
        memory: "2G",
        cmdline: "movablecore=640M intel_iommu=on",
        // A device that no driver takes, behind an IOMMU, for vfio.
        qemu: "-device intel-iommu,intremap=off -device edu",
        command: "pinbuf-memtest pinners",
        ..PLAIN
    },
    CMA,
    Run {
        name: "cma-spare",
        // Zeroing and moving gigabytes takes minutes without KVM.
        when: When::Long,
        // With less, no second GiB is free in one piece.
        memory: "8G",
        cmdline: "hugetlb_cma=1G nokaslr",
        command: "pinbuf-memtest cma-spare",
        ..PLAIN
    },
    Run {
        name: "debug",
        // The selftests under the kernel's own checkers.
        kernel: "debug",
        memory: "4G",
        // The largest creates take minutes here, and the checkers see nothing in them that they do not see in
        // smaller ones. Row `debug-sizes` has them.
        command: "pinbuf-selftest --without mappings. --without create.ranges_65536 --without create.one_gib \
            --without create.a_page_a_million_times",
        timeout: 2700,
        ..PLAIN
    },
    Run {
        name: "debug-sizes",
        when: When::Long,
        kernel: "debug",
        memory: "4G",
        command: "pinbuf-selftest --filter create.ranges_65536 --filter create.one_gib \
            --filter create.a_page_a_million_times",
        filters: false,
        ..PLAIN
    },
    Run {
        // Every allocation, every user copy and every pin of a call fails in turn.
        name: "faults",
        command: "pinbuf-stress faults leaks",
        ..CHECKED
    },
    Run {
        name: "faults-movable",
        // The page-table checker forbids huge entries of ours.
        cmdline: "slab_debug=F movablecore=640M page_table_check=off",
        command: "pinbuf-stress huge migration leaks",
        ..CHECKED
    },
    Run {
        // Fifteen races of two minutes each.
        name: "races",
        when: When::Long,
        memory: "3G",
        cmdline: "",
        command: "pinbuf-stress races --seconds 120",
        timeout: 3600,
        ..PLAIN
    },
    Run {
        name: "races-debug",
        command: "pinbuf-stress races leaks --seconds 120",
        timeout: 3600,
        ..CHECKED
    },
    Run {
        // Calls of every kind, guided by the code in the module that they reach; the seeds first.
        name: "fuzz",
        when: When::Always,
        // Without this there would be no huge entries: the page-table checker forbids them. And only a page of
        // 1 GiB gives an extent that is too large to be entered at once.
        memory: "4G",
        cmdline: "page_table_check=off hugepagesz=1G hugepages=1",
        command: "tests/fuzz/run --seconds 20",
        verdict: Verdict::Status,
        filters: false,
        ..CHECKED
    },
    Run {
        // SIGKILL at random moments. With ZONE_MOVABLE, so that creates have to migrate pages.
        name: "kills-quick",
        command: "pinbuf-stress kills --kills 300",
        ..KILLS
    },
    Run {
        name: "kills",
        when: When::Long,
        command: "pinbuf-stress kills --kills 10000",
        timeout: 5400,
        ..KILLS
    },
    Run {
        name: "kills-debug",
        cmdline: "movablecore=640M",
        command: "pinbuf-stress kills leaks --kills 2000",
        timeout: 5400,
        ..CHECKED
    },
    Run {
        // Suspend to RAM and hibernation while buffers live.
        name: "suspend",
        when: When::Long,
        qemu: SWAP,
        command: "pinbuf-stress suspend",
        timeout: 1800,
        ..PLAIN
    },
    Run {
        name: "nested-screen",
        command: "pinbuf-nested --group screen",
        ..NESTED
    },
    Run {
        name: "nested-large",
        command: "pinbuf-nested --group large",
        ..NESTED
    },
    Run {
        name: "nested-levels",
        command: "pinbuf-nested --group levels",
        ..NESTED
    },
    Run {
        // Displays that take the dma-buf itself: D-Bus, EGL, GTK.
        name: "nested-gl",
        command: "pinbuf-nested --group gl",
        ..NESTED
    },
    Run {
        name: "nested-gl-next",
        image: "qemu-next",
        command: "pinbuf-nested --group gl",
        ..NESTED
    },
    Run {
        name: "nested-screen-next",
        // The QEMU of trixie-backports.
        image: "qemu-next",
        command: "pinbuf-nested --group screen",
        ..NESTED
    },
    Run {
        name: "nested-vfio-next",
        image: "qemu-next",
        qemu: VFIO,
        command: "pinbuf-nested --group vfio",
        ..NESTED
    },
    Run {
        name: "nested-vfio",
        qemu: VFIO,
        command: "pinbuf-nested --group vfio",
        ..NESTED
    },
    Run {
        name: "nested-zones",
        memory: "5G",
        // Most memory, the inner guest's too, begins where nothing may stay pinned.
        cmdline: "initcall_blacklist=udmabuf_dev_init intel_iommu=on page_poison=1 movablecore=3G",
        qemu: VFIO,
        command: "pinbuf-nested --group zones",
        ..NESTED
    },
    Run {
        name: "nested-cma",
        memory: "4G",
        // The kernel takes movable memory from CMA areas while most free memory is in them. If the kernel's own
        // image lay above 4 GiB, the area would be below, where the kernel takes memory last.
        cmdline: "initcall_blacklist=udmabuf_dev_init intel_iommu=on page_poison=1 cma=1536M nokaslr",
        qemu: VFIO,
        command: "pinbuf-nested --group cma",
        ..NESTED
    },
    Run {
        name: "nested-large-next",
        image: "qemu-next",
        command: "pinbuf-nested --group large",
        ..NESTED
    },
    Run {
        name: "nested-levels-next",
        image: "qemu-next",
        command: "pinbuf-nested --group levels",
        ..NESTED
    },
    Run {
        name: "nested-zones-next",
        image: "qemu-next",
        memory: "5G",
        cmdline: "initcall_blacklist=udmabuf_dev_init intel_iommu=on page_poison=1 movablecore=3G",
        qemu: VFIO,
        command: "pinbuf-nested --group zones",
        ..NESTED
    },
    Run {
        name: "nested-cma-next",
        image: "qemu-next",
        memory: "4G",
        cmdline: "initcall_blacklist=udmabuf_dev_init intel_iommu=on page_poison=1 cma=1536M nokaslr",
        qemu: VFIO,
        command: "pinbuf-nested --group cma",
        ..NESTED
    },
    Run {
        // As docs/operators.md describes for libvirt.
        name: "nested-libvirt",
        image: "libvirt",
        // libvirt looks for udmabuf, though QEMU will not use it.
        cmdline: "",
        command: "pinbuf-nested --group libvirt",
        ..NESTED
    },
    Run {
        // A guest moves to another QEMU, before its memory has arrived there and after; with the same on the
        // kernel's own udmabuf, for comparison.
        name: "nested-migrate",
        cmdline: "",
        command: "pinbuf-nested --group migrate",
        timeout: 3600,
        ..NESTED
    },
    Run {
        name: "nested-migrate-next",
        image: "qemu-next",
        cmdline: "",
        command: "pinbuf-nested --group migrate",
        timeout: 3600,
        ..NESTED
    },
    Run {
        name: "nested-discards",
        command: "pinbuf-nested --group discards",
        ..NESTED
    },
    Run {
        name: "nested-discards-next",
        image: "qemu-next",
        command: "pinbuf-nested --group discards",
        ..NESTED
    },
    Run {
        // Ten minutes of a guest that discards only what it does not use.
        name: "nested-honest",
        command: "pinbuf-nested --group honest",
        ..NESTED
    },
    Run {
        name: "nested-udmabuf",
        // The comparison: what the same does on the kernel's own udmabuf.
        cmdline: "",
        command: "pinbuf-nested --group udmabuf",
        ..NESTED
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_complete() {
        for (index, run) in RUNS.iter().enumerate() {
            assert!(!run.name.is_empty() && !run.command.is_empty());
            assert!(shell_words::split(run.qemu).is_ok(), "{}", run.name);
            assert!(shell_words::split(run.command).is_ok(), "{}", run.name);
            assert!(
                RUNS[..index].iter().all(|other| other.name != run.name),
                "{}",
                run.name
            );
        }
    }
}
