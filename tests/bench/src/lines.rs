// SPDX-License-Identifier: MIT OR Apache-2.0

//! The lines of the table: what is measured, on which memory, and what pinbuf is meant to reach.

use std::collections::BTreeSet;

use pinbuf_test_harness::support::memory::{HUGE, PAGE};
use serde::{Deserialize, Serialize};

use crate::memory::{framebuffer, pieces, shuffled, whole};
use crate::report::bytes;
use crate::task::{Item, Metric, Shape, Side, What};

/// What a line should show.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Goal {
    /// Nothing: the line tells.
    None,
    /// So many times faster than what it is compared with.
    Faster(f64),
    /// At most so many times what it is compared with.
    AtMost(f64),
    /// No more than this, at any time.
    Below(f64),
    /// No less than this.
    AtLeast(f64),
}

/// A line of the table.
#[derive(Debug)]
pub struct Line {
    /// What it shows.
    pub title: String,
    /// The figure.
    pub metric: Metric,
    /// Whose figure it is.
    pub subject: Side,
    /// What it is compared with.
    pub reference: Option<Side>,
    /// What it should be.
    pub goal: Goal,
}

/// A measurement, which gives one line or several.
#[derive(Debug)]
pub struct Experiment {
    /// What all its lines are about.
    about: String,
    /// The memory.
    pub shape: Shape,
    /// Its parts.
    pub items: Vec<Item>,
    /// What is measured.
    pub what: What,
    /// What it gives.
    pub lines: Vec<Line>,
    /// It needs so many processors.
    pub processors: u32,
}

impl Experiment {
    fn new(about: impl Into<String>, shape: Shape, items: Vec<Item>, what: What) -> Self {
        Self {
            about: about.into(),
            shape,
            items,
            what,
            lines: Vec::new(),
            processors: 1,
        }
    }

    fn line(
        mut self,
        verb: &str,
        metric: Metric,
        subject: Side,
        reference: impl Into<Option<Side>>,
        goal: Goal,
    ) -> Self {
        let mut title = format!("{verb}, {}", self.about);
        match subject {
            Shim => title.push_str(", through the shim"),
            // What udmabuf's figure cannot be undercut by, however it is pinned.
            Pin | FilePin => title.push_str(": the pin alone"),
            Empty => title.push_str(": the dma-buf alone"),
            Pinbuf | Own | Udmabuf => {}
        }
        self.lines.push(Line {
            title,
            metric,
            subject,
            reference: reference.into(),
            goal,
        });
        self
    }

    /// Who has to be measured.
    pub fn sides(&self) -> BTreeSet<Side> {
        self.lines
            .iter()
            .flat_map(|line| [Some(line.subject), line.reference])
            .flatten()
            .collect()
    }
}

/// How large the measured memory is.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Huge pages.
    pub huge: u64,
    /// Small pages, for most lines.
    pub small: u64,
    /// Small pages, for the lines that want many.
    pub large: u64,
    /// One-page items of a list.
    pub list: u64,
}

impl Sizes {
    /// The sizes that the goals are about.
    pub const FULL: Self = Self {
        huge: 1 << 30,
        small: 256 << 20,
        large: 1 << 30,
        list: 16_384,
    };
    /// Sizes to try it out.
    pub const QUICK: Self = Self {
        huge: 128 << 20,
        small: 64 << 20,
        large: 128 << 20,
        list: 2048,
    };
}

use Goal::{AtLeast, AtMost, Below, Faster};
use Side::{Empty, FilePin, Own, Pin, Pinbuf, Shim, Udmabuf};

const ONCE: What = What::Cycle { times: 1 };
/// Framebuffers: 1920 × 1080 and 3840 × 2160, four bytes a pixel.
const FRAMES: [(u64, &str); 2] = [(8_294_400, "8 MiB"), (33_177_600, "33 MiB")];

/// All lines, in the order of the table.
pub fn all(sizes: Sizes) -> Vec<Experiment> {
    let mut list = huge(sizes);
    list.extend(small(sizes));
    list
}

fn frames(shape: Shape, kind: &str, goal: f64) -> Vec<Experiment> {
    let counts = [(0, 4), (0, 138), (1, 17), (1, 138)];
    let experiment = |(frame, count): (usize, u64)| {
        let (size, name) = FRAMES[frame];
        let about = format!("framebuffer of {name} in {count} items, {kind}");
        let items = framebuffer(size, count, shape.bytes);
        Experiment::new(about, shape, items, What::Cycle { times: 16 })
            .line("create", Metric::Create, Pinbuf, Udmabuf, Faster(goal))
            .line("create", Metric::Create, Shim, Udmabuf, Goal::None)
            .line("create", Metric::Create, Pin, Udmabuf, Goal::None)
            .line("create", Metric::Create, FilePin, Udmabuf, Goal::None)
            .line("close", Metric::Close, Pinbuf, Udmabuf, Goal::None)
    };
    counts.into_iter().map(experiment).collect()
}

/// Pages of 2 MiB.
fn huge(sizes: Sizes) -> Vec<Experiment> {
    let shape = Shape {
        bytes: sizes.huge,
        huge: true,
        mapped: true,
        sparse: false,
        scattered: false,
    };
    let unmapped = Shape {
        mapped: false,
        ..shape
    };
    let size = |size: u64| format!("{} of 2 MiB hugetlb", bytes(size as f64));
    let all = size(sizes.huge);
    let part = sizes.huge.min(64 << 20);
    let of = |about: &str, what| {
        let about = if about.is_empty() {
            all.clone()
        } else {
            format!("{all}, {about}")
        };
        Experiment::new(about, shape, whole(sizes.huge), what)
    };
    let device = |about, max_segment, iommu| of(about, What::Device { max_segment, iommu });

    let mut list = vec![
        of("", ONCE)
            .line("create", Metric::Create, Pinbuf, Udmabuf, Faster(10.0))
            .line("create", Metric::Create, Shim, Udmabuf, Goal::None)
            .line("create", Metric::Create, Pinbuf, Pin, Goal::None)
            .line("close", Metric::Close, Pinbuf, Udmabuf, Goal::None)
            .line("close", Metric::Close, Pinbuf, Pin, Goal::None)
            .line("create + close", Metric::Cycle, Pinbuf, Pin, AtMost(1.25)),
        // A short call: the mean of several, as for framebuffers.
        Experiment::new(size(part), shape, whole(part), What::Cycle { times: 16 }).line(
            "create + close",
            Metric::Cycle,
            Pinbuf,
            Pin,
            AtMost(1.25),
        ),
        Experiment::new(
            format!("{all}, never mapped"),
            unmapped,
            whole(sizes.huge),
            ONCE,
        )
        .line("create", Metric::Create, Shim, Udmabuf, Goal::None),
    ];
    list.extend(frames(shape, "hugetlb", 3.0));
    list.extend([
        device("large segments", u32::MAX, false)
            .line(
                "map for a device",
                Metric::Map,
                Pinbuf,
                Udmabuf,
                Faster(50.0),
            )
            .line("unmap", Metric::MapEnd, Pinbuf, Udmabuf, Goal::None)
            .line(
                "scatterlist entries",
                Metric::Entries,
                Pinbuf,
                Udmabuf,
                Goal::None,
            ),
        device("64 KiB segments", 1 << 16, false)
            .line("map for a device", Metric::Map, Pinbuf, Udmabuf, Goal::None)
            .line("map for a device", Metric::Map, Pinbuf, Own, Goal::None)
            .line("unmap", Metric::MapEnd, Pinbuf, Udmabuf, Goal::None)
            .line(
                "scatterlist entries",
                Metric::Entries,
                Pinbuf,
                Udmabuf,
                Goal::None,
            ),
        device("through an IOMMU", u32::MAX, true)
            .line("map for a device", Metric::Map, Pinbuf, Udmabuf, Goal::None)
            .line("unmap", Metric::MapEnd, Pinbuf, Udmabuf, Goal::None)
            .line(
                "scatterlist entries",
                Metric::Entries,
                Pinbuf,
                Udmabuf,
                Goal::None,
            ),
        device("through an IOMMU, 64 KiB segments", 1 << 16, true)
            .line("map for a device", Metric::Map, Pinbuf, Udmabuf, Goal::None)
            .line("unmap", Metric::MapEnd, Pinbuf, Udmabuf, Goal::None)
            .line(
                "scatterlist entries",
                Metric::Entries,
                Pinbuf,
                Udmabuf,
                Goal::None,
            ),
        of("", What::Sync)
            .line(
                "first DMA_BUF_IOCTL_SYNC",
                Metric::Sync,
                Pinbuf,
                Udmabuf,
                Goal::None,
            )
            .line(
                "next DMA_BUF_IOCTL_SYNC",
                Metric::SyncAgain,
                Pinbuf,
                Udmabuf,
                Goal::None,
            ),
        of("aligned", What::Touch { aligned: true })
            .line(
                "mmap + touch of every page",
                Metric::Touch,
                Pinbuf,
                Udmabuf,
                Faster(8.0),
            )
            .line(
                "mmap + touch of every page",
                Metric::Touch,
                Pinbuf,
                Own,
                AtMost(1.2),
            )
            .line(
                "its page faults",
                Metric::Faults,
                Pinbuf,
                Udmabuf,
                Below(512.0),
            )
            .line(
                "first fault alone",
                Metric::First,
                Pinbuf,
                Udmabuf,
                Faster(20.0),
            )
            .line("munmap", Metric::Unmap, Pinbuf, Udmabuf, Faster(20.0))
            .line("munmap", Metric::Unmap, Pinbuf, Own, AtMost(1.5)),
        of("any address", What::Touch { aligned: false })
            .line(
                "mmap + touch of every page",
                Metric::Touch,
                Pinbuf,
                Udmabuf,
                Faster(4.0),
            )
            .line(
                "its page faults",
                Metric::Faults,
                Pinbuf,
                Udmabuf,
                Goal::None,
            )
            .line("munmap", Metric::Unmap, Pinbuf, Udmabuf, Goal::None),
        Experiment::new("contiguous 8 MiB", shape, whole(8 << 20), What::Vmap)
            .line("vmap", Metric::Vmap, Pinbuf, Udmabuf, Faster(20.0))
            .line("vunmap", Metric::Vunmap, Pinbuf, Udmabuf, Goal::None),
        of("contiguous", What::Footprint { buffers: 64 })
            .line(
                "kernel memory",
                Metric::Kernel,
                Pinbuf,
                Udmabuf,
                AtMost(0.001),
            )
            .line(
                "of it the driver's extents",
                Metric::Kept,
                Pinbuf,
                None,
                Goal::None,
            )
            .line("extents", Metric::Extents, Pinbuf, None, Goal::None)
            .line("pins", Metric::Pins, Pinbuf, None, Goal::None),
        Experiment::new(
            format!("{all}, scattered"),
            shape,
            shuffled(sizes.huge, HUGE as u64),
            What::Footprint { buffers: 64 },
        )
        .line(
            "kernel memory",
            Metric::Kernel,
            Pinbuf,
            Udmabuf,
            AtMost(0.002),
        )
        .line(
            "of it the driver's extents",
            Metric::Kept,
            Pinbuf,
            None,
            Goal::None,
        )
        .line("extents", Metric::Extents, Pinbuf, None, Goal::None),
        of(
            "large segments",
            What::Table {
                max_segment: u32::MAX,
            },
        )
        .line(
            "scatterlist's memory",
            Metric::Kernel,
            Pinbuf,
            Udmabuf,
            Goal::None,
        ),
        of(
            "64 KiB segments",
            What::Table {
                max_segment: 1 << 16,
            },
        )
        .line(
            "scatterlist's memory",
            Metric::Kernel,
            Pinbuf,
            Udmabuf,
            Goal::None,
        ),
    ]);
    list
}

/// Pages of 4 KiB: shmem.
fn small(sizes: Sizes) -> Vec<Experiment> {
    let page = PAGE as u64;
    let shape = Shape {
        bytes: sizes.small,
        huge: false,
        mapped: true,
        sparse: false,
        scattered: false,
    };
    let large = Shape {
        bytes: sizes.large,
        ..shape
    };
    let unmapped = Shape {
        mapped: false,
        ..shape
    };
    let sparse = Shape {
        sparse: true,
        ..unmapped
    };
    let scattered = Shape {
        scattered: true,
        ..shape
    };
    let size = |size: u64| format!("{} of 4 KiB shmem", bytes(size as f64));
    let all = size(sizes.small);
    let part = sizes.small.min(64 << 20);
    let list_bytes = sizes.list * page;
    let list_of = |order: &str, items| {
        let about = format!("list of {} one-page items, {order}", sizes.list);
        Experiment::new(about, shape, items, ONCE)
            .line("create", Metric::Create, Pinbuf, Udmabuf, Faster(2.0))
            .line("create", Metric::Create, Shim, Udmabuf, Goal::None)
            .line("close", Metric::Close, Pinbuf, Udmabuf, Goal::None)
    };

    let mut list = vec![
        Experiment::new(
            format!("{all}, mapped by the caller"),
            shape,
            whole(sizes.small),
            ONCE,
        )
        .line("create", Metric::Create, Pinbuf, Udmabuf, Faster(2.0))
        .line("create", Metric::Create, Shim, Udmabuf, Faster(1.8))
        .line("create", Metric::Create, Pin, Udmabuf, Goal::None)
        .line("create", Metric::Create, FilePin, Udmabuf, Goal::None)
        .line("create", Metric::Create, Pinbuf, Pin, Goal::None)
        .line("close", Metric::Close, Pinbuf, Udmabuf, Goal::None)
        .line("close", Metric::Close, Pinbuf, Pin, Goal::None)
        .line("create + close", Metric::Cycle, Pinbuf, Pin, AtMost(1.25)),
        Experiment::new(size(part), shape, whole(part), ONCE).line(
            "create + close",
            Metric::Cycle,
            Pinbuf,
            Pin,
            AtMost(1.25),
        ),
        Experiment::new(
            format!("{all}, never mapped, populated"),
            unmapped,
            whole(sizes.small),
            ONCE,
        )
        .line("create", Metric::Create, Shim, Udmabuf, AtMost(3.0)),
        Experiment::new("4 KiB", shape, whole(page), What::Cycle { times: 1000 })
            .line(
                "create + close",
                Metric::Cycle,
                Pinbuf,
                Udmabuf,
                Faster(1.2),
            )
            .line("create", Metric::Create, Pinbuf, Udmabuf, Goal::None)
            .line("close", Metric::Close, Pinbuf, Udmabuf, Goal::None)
            .line("create + close", Metric::Cycle, Shim, Udmabuf, Goal::None)
            .line("create + close", Metric::Cycle, Empty, Udmabuf, Goal::None),
        list_of("in order", pieces(list_bytes, page)),
        list_of("shuffled", shuffled(list_bytes, page)),
    ];
    list.extend(frames(shape, "shmem", 1.5));
    list.extend([
        Experiment::new(
            all.clone(),
            shape,
            whole(sizes.small),
            What::Touch { aligned: true },
        )
        .line(
            "mmap + touch of every page",
            Metric::Touch,
            Pinbuf,
            Udmabuf,
            Goal::None,
        )
        .line(
            "mmap + touch of every page",
            Metric::Touch,
            Pinbuf,
            Own,
            Goal::None,
        )
        .line(
            "its page faults",
            Metric::Faults,
            Pinbuf,
            Udmabuf,
            Goal::None,
        )
        .line("munmap", Metric::Unmap, Pinbuf, Udmabuf, Goal::None),
        Experiment::new(
            format!("{all}, large segments"),
            shape,
            whole(sizes.small),
            What::Device {
                max_segment: u32::MAX,
                iommu: false,
            },
        )
        .line("map for a device", Metric::Map, Pinbuf, Udmabuf, Goal::None)
        .line(
            "scatterlist entries",
            Metric::Entries,
            Pinbuf,
            Udmabuf,
            Goal::None,
        ),
        Experiment::new(
            format!("{all}, scattered"),
            shape,
            shuffled(sizes.small, page),
            What::Footprint { buffers: 32 },
        )
        .line(
            "kernel memory",
            Metric::Kernel,
            Pinbuf,
            Udmabuf,
            Below((8 * (sizes.small / page) + page) as f64),
        )
        .line(
            "of it the driver's extents",
            Metric::Kept,
            Pinbuf,
            None,
            Goal::None,
        )
        .line("extents", Metric::Extents, Pinbuf, None, Goal::None),
        threads(shape, 16 << 20, Pinbuf, AtLeast(1.6)),
        threads(shape, 16 << 20, Udmabuf, Goal::None),
        Experiment::new(
            format!("{all}, adjacent to no other, mapped"),
            scattered,
            whole(sizes.small),
            ONCE,
        )
        .line("create", Metric::Create, Pinbuf, Udmabuf, Goal::None)
        .line("create", Metric::Create, Shim, Udmabuf, Goal::None)
        .line("close", Metric::Close, Pinbuf, Udmabuf, Goal::None)
        .line("create + close", Metric::Cycle, Pinbuf, Pin, AtMost(1.25)),
        Experiment::new(size(sizes.large), large, whole(sizes.large), ONCE)
            .line("create", Metric::Create, Pinbuf, Udmabuf, Goal::None)
            .line("close", Metric::Close, Pinbuf, Udmabuf, Goal::None)
            .line("create + close", Metric::Cycle, Pinbuf, Pin, AtMost(1.25)),
        Experiment::new(
            format!("during close of {}", size(sizes.large)),
            large,
            whole(sizes.large),
            What::Stretch,
        )
        .line(
            "longest wait of a real-time task",
            Metric::Stretch,
            Pinbuf,
            Udmabuf,
            Below(10e6),
        ),
        Experiment::new(
            format!("{all}, never mapped, sparse"),
            sparse,
            whole(sizes.small),
            ONCE,
        )
        .line("create", Metric::Create, Shim, Udmabuf, AtMost(1.1)),
    ]);
    list
}

fn threads(shape: Shape, bytes: u64, side: Side, goal: Goal) -> Experiment {
    let what = What::Threads {
        threads: 2,
        times: 8,
    };
    let about = format!("{side}, times one thread's");
    let mut experiment = Experiment::new(about, shape, whole(bytes), what).line(
        "throughput of 2 threads creating at once",
        Metric::Scaling,
        side,
        None,
        goal,
    );
    experiment.processors = 2;
    experiment
}
