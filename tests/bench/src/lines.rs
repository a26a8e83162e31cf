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
    /// Nothing: the line is for information.
    None,
    /// This many times faster than what it is compared with, or more.
    Faster(f64),
    /// At most this many times what it is compared with.
    AtMost(f64),
}

/// A line of the table.
#[derive(Debug)]
pub struct Line {
    /// What it shows.
    pub title: String,
    /// The part of the title that does not say how the buffer is made: the same for all lines that
    /// differ in nothing else.
    pub about: String,
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
    /// How many processors it needs.
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
        let about = format!("{verb}, {}", self.about);
        let how = match subject {
            Shim => ", through the shim, mapped",
            Unmapped => ", through the shim, not mapped",
            // The lower bound for any exporter that pins by address.
            Pin => ": the pin alone",
            Empty => ": the dma-buf alone",
            Pinbuf | Own | Udmabuf => "",
        };
        self.lines.push(Line {
            title: format!("{about}{how}"),
            about,
            metric,
            subject,
            reference: reference.into(),
            goal,
        });
        self
    }

    /// A line against udmabuf for each way to make a buffer of memory that the program has mapped,
    /// with one goal, and one without a goal for memory that it has not mapped.
    fn against_udmabuf(self, verb: &str, metric: Metric, goal: Goal) -> Self {
        self.line(verb, metric, Pinbuf, Udmabuf, goal)
            .line(verb, metric, Shim, Udmabuf, goal)
            .line(verb, metric, Unmapped, Udmabuf, Goal::None)
    }

    /// A line against udmabuf without a goal.
    fn inform(self, verb: &str, metric: Metric) -> Self {
        self.line(verb, metric, Pinbuf, Udmabuf, Goal::None)
    }

    /// The sides that have to be measured.
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

use Goal::{AtMost, Faster};
use Side::{Empty, Own, Pin, Pinbuf, Shim, Udmabuf, Unmapped};

const ONCE: What = What::Cycle { times: 1 };
/// Framebuffers: 1920 × 1080 and 3840 × 2160, four bytes per pixel.
const FRAMES: [(u64, &str); 2] = [(8_294_400, "8 MiB"), (33_177_600, "33 MiB")];

/// For creating a buffer of mapped memory in 4 KiB pages.
const SMALL_CREATE: Goal = AtMost(1.2);
/// For what the kernel keeps for a buffer.
const FOOTPRINT: Goal = AtMost(1.0);

/// All lines, in the order of the table.
pub fn all(sizes: Sizes) -> Vec<Experiment> {
    let mut list = huge(sizes);
    list.extend(small(sizes));
    list
}

/// Memory of this size that the program has mapped.
fn mapped(bytes: u64, huge: bool) -> Shape {
    Shape {
        bytes,
        huge,
        mapped: true,
        sparse: false,
        scattered: false,
    }
}

fn of_kind(size: u64, kind: &str) -> String {
    format!("{} of {kind}", bytes(size as f64))
}

/// Whole lives of buffers of memory that the program has mapped: of `all` the memory where there is a
/// goal for that, and of a framebuffer.
fn lives(shape: Shape, kind: &str, all: Goal) -> Vec<Experiment> {
    let life = |about: String, items, times, goal| {
        let what = What::Life { times };
        Experiment::new(about, shape, items, what)
            .line("whole life", Metric::Life, Pinbuf, Udmabuf, goal)
            .line("whole life", Metric::Life, Shim, Udmabuf, goal)
    };
    let (size, name) = FRAMES[0];
    let pieces = framebuffer(size, 138, shape.bytes);
    vec![
        life(of_kind(shape.bytes, kind), whole(shape.bytes), 1, all),
        life(
            format!("{name} in 138 items, {kind}"),
            pieces,
            4,
            Faster(1.5),
        ),
    ]
}

/// Whole lives of buffers of memory that no process has mapped.
fn unmapped_lives(shape: Shape, kind: &str, goal: Goal) -> Vec<Experiment> {
    let shape = Shape {
        mapped: false,
        ..shape
    };
    let life = |(size, times): (u64, u32)| {
        let about = of_kind(size, kind);
        Experiment::new(about, shape, whole(size), What::Life { times })
            .line("whole life", Metric::Life, Unmapped, Udmabuf, goal)
            .line(
                "of it create",
                Metric::Create,
                Unmapped,
                Udmabuf,
                Goal::None,
            )
    };
    [(8 << 20, 4), (64 << 20, 1)].map(life).into()
}

fn frames(shape: Shape, kind: &str, goal: Goal) -> Vec<Experiment> {
    let counts = [(0, 4), (0, 138), (1, 17), (1, 138)];
    let experiment = |(frame, count): (usize, u64)| {
        let (size, name) = FRAMES[frame];
        let about = format!("framebuffer of {name} in {count} items, {kind}");
        let items = framebuffer(size, count, shape.bytes);
        Experiment::new(about, shape, items, What::Cycle { times: 16 })
            .against_udmabuf("create", Metric::Create, goal)
            .line("create", Metric::Create, Pin, Udmabuf, Goal::None)
            .inform("close", Metric::Close)
    };
    counts.into_iter().map(experiment).collect()
}

/// What the kernel keeps for a buffer.
fn footprint(about: impl Into<String>, shape: Shape, items: Vec<Item>, buffers: u32) -> Experiment {
    Experiment::new(
        about,
        shape,
        items,
        What::Footprint {
            buffers,
            orphans: false,
        },
    )
    .line("kernel memory", Metric::Kernel, Pinbuf, Udmabuf, FOOTPRINT)
    .line(
        "of it the driver's extents",
        Metric::Kept,
        Pinbuf,
        None,
        Goal::None,
    )
    .line("extents", Metric::Extents, Pinbuf, None, Goal::None)
}

/// Pages of 2 MiB.
fn huge(sizes: Sizes) -> Vec<Experiment> {
    const KIND: &str = "2 MiB hugetlb";
    let shape = mapped(sizes.huge, true);
    let all = of_kind(sizes.huge, KIND);
    let part = sizes.huge.min(64 << 20);
    let of = |about: &str, what| {
        let about = if about.is_empty() {
            all.clone()
        } else {
            format!("{all}, {about}")
        };
        Experiment::new(about, shape, whole(sizes.huge), what)
    };
    let device = |about, max_segment, iommu| {
        of(about, What::Device { max_segment, iommu })
            .inform("map for a device", Metric::Map)
            .inform("unmap", Metric::MapEnd)
            .inform("scatterlist entries", Metric::Entries)
    };
    let table = |about, max_segment| {
        of(about, What::Table { max_segment }).inform("scatterlist's memory", Metric::Kernel)
    };

    let mut list = lives(shape, KIND, Faster(10.0));
    list.extend(unmapped_lives(shape, KIND, Faster(1.0)));
    list.extend([
        of("", ONCE)
            .against_udmabuf("create", Metric::Create, Faster(9.0))
            .line("create", Metric::Create, Pinbuf, Pin, Goal::None)
            .inform("close", Metric::Close)
            .line("close", Metric::Close, Pinbuf, Pin, Goal::None)
            .line("create + close", Metric::Cycle, Pinbuf, Pin, Goal::None),
        // A short call: the mean of several, as for framebuffers.
        Experiment::new(
            of_kind(part, KIND),
            shape,
            whole(part),
            What::Cycle { times: 16 },
        )
        .line("create + close", Metric::Cycle, Pinbuf, Pin, Goal::None),
    ]);
    list.extend(frames(shape, "hugetlb", Faster(1.0)));
    list.extend([
        device("large segments", u32::MAX, false),
        device("64 KiB segments", 1 << 16, false).line(
            "map for a device",
            Metric::Map,
            Pinbuf,
            Own,
            Goal::None,
        ),
        device("through an IOMMU", u32::MAX, true),
        device("through an IOMMU, 64 KiB segments", 1 << 16, true),
        of("", What::Sync)
            .inform("first DMA_BUF_IOCTL_SYNC", Metric::Sync)
            .inform("next DMA_BUF_IOCTL_SYNC", Metric::SyncAgain),
        ask(of_kind(part, KIND), shape, part),
        of("aligned", What::Touch { aligned: true })
            .inform("mmap + touch of every page", Metric::Touch)
            .line(
                "mmap + touch of every page",
                Metric::Touch,
                Pinbuf,
                Own,
                Goal::None,
            )
            .inform("its page faults", Metric::Faults)
            .inform("first fault alone", Metric::First)
            .inform("munmap", Metric::Unmap)
            .line("munmap", Metric::Unmap, Pinbuf, Own, Goal::None),
        of("any address", What::Touch { aligned: false })
            .inform("mmap + touch of every page", Metric::Touch)
            .inform("its page faults", Metric::Faults)
            .inform("munmap", Metric::Unmap),
        Experiment::new("contiguous 8 MiB", shape, whole(8 << 20), What::Vmap)
            .inform("vmap", Metric::Vmap)
            .inform("vunmap", Metric::Vunmap),
        footprint(format!("{all}, contiguous"), shape, whole(sizes.huge), 64).line(
            "pins",
            Metric::Pins,
            Pinbuf,
            None,
            Goal::None,
        ),
        footprint(
            format!("{all}, scattered"),
            shape,
            shuffled(sizes.huge, HUGE as u64),
            64,
        ),
        footprint(
            "framebuffer of 8 MiB in 138 items, hugetlb",
            shape,
            framebuffer(FRAMES[0].0, 138, shape.bytes),
            512,
        ),
        table("large segments", u32::MAX),
        table("64 KiB segments", 1 << 16),
    ]);
    list
}

/// Pages of 4 KiB: shmem.
fn small(sizes: Sizes) -> Vec<Experiment> {
    const KIND: &str = "4 KiB shmem";
    let page = PAGE as u64;
    let shape = mapped(sizes.small, false);
    let large = mapped(sizes.large, false);
    let scattered = Shape {
        scattered: true,
        ..shape
    };
    let sparse = Shape {
        sparse: true,
        ..shape
    };
    let all = of_kind(sizes.small, KIND);
    let list_bytes = sizes.list * page;
    let list_of = |order: &str, items| {
        let about = format!("list of {} one-page items, {order}", sizes.list);
        Experiment::new(about, shape, items, ONCE)
            .against_udmabuf("create", Metric::Create, Goal::None)
            .inform("close", Metric::Close)
    };

    let mut list = lives(shape, KIND, Faster(1.8));
    list.extend(unmapped_lives(shape, "populated shmem", Goal::None));
    list.extend([
        Experiment::new(all.clone(), shape, whole(sizes.small), ONCE)
            .against_udmabuf("create", Metric::Create, SMALL_CREATE)
            .line("create", Metric::Create, Pin, Udmabuf, Goal::None)
            .inform("close", Metric::Close)
            .line("close", Metric::Close, Pinbuf, Pin, Goal::None)
            .line("create + close", Metric::Cycle, Pinbuf, Pin, Goal::None),
        Experiment::new("4 KiB", shape, whole(page), What::Cycle { times: 1000 })
            .line(
                "create + close",
                Metric::Cycle,
                Pinbuf,
                Udmabuf,
                AtMost(1.15),
            )
            .line("create + close", Metric::Cycle, Shim, Udmabuf, AtMost(2.0))
            .line(
                "create + close",
                Metric::Cycle,
                Unmapped,
                Udmabuf,
                Goal::None,
            )
            .line("create + close", Metric::Cycle, Empty, Udmabuf, Goal::None)
            .inform("create", Metric::Create)
            .inform("close", Metric::Close),
        list_of("in order", pieces(list_bytes, page)),
        list_of("shuffled", shuffled(list_bytes, page)),
    ]);
    list.extend(frames(shape, "shmem", SMALL_CREATE));
    list.extend([
        Experiment::new(
            all.clone(),
            shape,
            whole(sizes.small),
            What::Touch { aligned: true },
        )
        .inform("mmap + touch of every page", Metric::Touch)
        .line(
            "mmap + touch of every page",
            Metric::Touch,
            Pinbuf,
            Own,
            Goal::None,
        )
        .inform("its page faults", Metric::Faults)
        .inform("munmap", Metric::Unmap),
        Experiment::new(
            format!("{all}, large segments"),
            shape,
            whole(sizes.small),
            What::Device {
                max_segment: u32::MAX,
                iommu: false,
            },
        )
        .inform("map for a device", Metric::Map)
        .inform("scatterlist entries", Metric::Entries),
        ask(of_kind(FRAMES[0].0, KIND), shape, FRAMES[0].0),
        footprint(
            "framebuffer of 8 MiB in 138 items, shmem",
            shape,
            framebuffer(FRAMES[0].0, 138, shape.bytes),
            512,
        ),
        footprint("4 KiB", shape, whole(page), 2048),
        // The driver keeps the maker's `mm_struct`, and counts it where it charges to an allowance.
        Experiment::new(
            "4 KiB, whose maker has exited",
            shape,
            whole(page),
            What::Footprint {
                buffers: 512,
                orphans: true,
            },
        )
        .inform("kernel memory", Metric::Kernel),
        threads(shape, 16 << 20, Pinbuf),
        threads(shape, 16 << 20, Udmabuf),
        Experiment::new(
            format!("{all}, adjacent to no other"),
            scattered,
            whole(sizes.small),
            ONCE,
        )
        .against_udmabuf("create", Metric::Create, SMALL_CREATE)
        .inform("close", Metric::Close)
        .line("create + close", Metric::Cycle, Pinbuf, Pin, Goal::None),
        // Many buffers: each cache that a buffer takes objects from grows by whole pages.
        footprint(
            format!("{}, adjacent to no other", of_kind(16 << 20, KIND)),
            scattered,
            whole(16 << 20),
            512,
        ),
        Experiment::new(of_kind(sizes.large, KIND), large, whole(sizes.large), ONCE)
            .line("create", Metric::Create, Pinbuf, Udmabuf, SMALL_CREATE)
            .line("create", Metric::Create, Shim, Udmabuf, SMALL_CREATE)
            .inform("close", Metric::Close)
            .line("create + close", Metric::Cycle, Pinbuf, Pin, Goal::None),
        Experiment::new(
            format!("during close of {}", of_kind(sizes.large, KIND)),
            large,
            whole(sizes.large),
            What::Stretch,
        )
        .inform("longest wait of a real-time task", Metric::Stretch),
    ]);
    // Last: its pages are freed and allocated, and later allocations would be scattered.
    list.extend(unmapped_lives(sparse, "sparse shmem", AtMost(1.5)));
    list
}

/// Asking which parts of a buffer are discarded.
fn ask(about: String, shape: Shape, bytes: u64) -> Experiment {
    Experiment::new(about, shape, whole(bytes), What::Ask { times: 8 }).line(
        "PINBUF_DISCARDS",
        Metric::Ask,
        Pinbuf,
        None,
        Goal::None,
    )
}

fn threads(shape: Shape, bytes: u64, side: Side) -> Experiment {
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
        Goal::None,
    );
    experiment.processors = 2;
    experiment
}
