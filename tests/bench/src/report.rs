// SPDX-License-Identifier: MIT OR Apache-2.0

//! What was measured, as data and as text.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::{Deserialize, Serialize};

use crate::lines::{Goal, Line};
use crate::run::Figures;
use crate::stats::{exponent, marginal, Summary};
use crate::task::{Metric, Side, Unit};

/// What the guest's clock counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Clock {
    /// Time.
    Nanoseconds,
    /// The guest's instructions, one a nanosecond.
    Instructions,
}

/// All results of a run.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    /// The guest's kernel.
    pub kernel: String,
    /// What times are counted in.
    pub clock: Clock,
    /// The guest's memory, bytes.
    pub memory: u64,
    /// The guest's processors.
    pub processors: usize,
    /// How often each thing was measured.
    pub rounds: usize,
    /// Sizes were smaller than those that the goals are about.
    pub quick: bool,
    /// The table.
    pub lines: Vec<Row>,
    /// How cost grows.
    pub curves: Vec<Curve>,
    /// What was not measured, and why.
    pub missing: Vec<Missing>,
}

/// A line of the table, measured.
#[derive(Debug, Serialize, Deserialize)]
pub struct Row {
    /// What it shows.
    pub title: String,
    /// The same without how the buffer is made.
    pub about: String,
    /// The figure.
    pub metric: Metric,
    /// Whose it is.
    pub subject: Side,
    /// Its value.
    pub value: Summary,
    /// What it is compared with.
    pub reference: Option<(Side, Summary)>,
    /// What it should be.
    pub goal: Goal,
    /// Whether it is.
    pub met: Option<bool>,
}

/// A cost by a size.
#[derive(Debug, Serialize, Deserialize)]
pub struct Curve {
    /// What it shows.
    pub title: String,
    /// What there is more and more of.
    pub unit: String,
    /// The points.
    pub points: Vec<Point>,
}

/// A point of a curve.
#[derive(Debug, Serialize, Deserialize)]
pub struct Point {
    /// How much of it.
    pub x: f64,
    /// Its cost.
    pub sides: BTreeMap<Side, Summary>,
}

/// Something that was not measured.
#[derive(Debug, Serialize, Deserialize)]
pub struct Missing {
    /// What.
    pub title: String,
    /// Why.
    pub reason: String,
    /// It should have been.
    pub failed: bool,
}

impl Row {
    /// The line with its figures, if both sides have them.
    pub fn new(line: &Line, figures: &Figures) -> Option<Self> {
        let of = |side: Side| figures.get(&side)?.get(&line.metric).copied();
        let value = of(line.subject)?;
        let reference = match line.reference {
            Some(side) => Some((side, of(side)?)),
            None => None,
        };
        let mut row = Self {
            title: line.title.clone(),
            about: line.about.clone(),
            metric: line.metric,
            subject: line.subject,
            value,
            reference,
            goal: line.goal,
            met: None,
        };
        row.met = match line.goal {
            Goal::None => None,
            Goal::Faster(times) => row.times().map(|seen| seen <= 1.0 / times),
            Goal::AtMost(times) => row.times().map(|seen| seen <= times),
        };
        Some(row)
    }

    /// The value, in parts of what it is compared with.
    pub fn times(&self) -> Option<f64> {
        let (_, reference) = self.reference?;
        (reference.median > 0.0).then(|| self.value.median / reference.median)
    }

    fn ratio(&self) -> String {
        let (Some(times), Some((side, _))) = (self.times(), self.reference) else {
            return String::new();
        };
        let of_it = side != Side::Udmabuf || matches!(self.goal, Goal::AtMost(1.0..));
        match self.metric.unit() {
            Unit::Time if !of_it && times > 1.005 => format!("{}x slower", short(times)),
            Unit::Time if !of_it => format!("{}x faster", short(1.0 / times)),
            Unit::Time => format!("{}x of it", short(times)),
            _ if times == 0.0 => "nothing".to_owned(),
            _ if times < 1.0 => format!("1/{}", short(1.0 / times)),
            _ => format!("{}x", short(times)),
        }
    }

    fn wanted(&self) -> String {
        match self.goal {
            Goal::None => String::new(),
            Goal::Faster(times) => format!("{}x faster", short(times)),
            Goal::AtMost(times) => format!("<= {}x of it", short(times)),
        }
    }

    fn cells(&self, clock: Clock) -> [String; 6] {
        let unit = self.metric.unit();
        let show = |side: Side, value: Summary| {
            let spread = match value.spread() {
                little if little < 0.005 => String::new(),
                some if some < 1.0 => format!(" ±{:.0}%", some * 100.0),
                _ => format!(", up to {}", amount(value.max, unit, clock)),
            };
            format!("{side} {}{spread}", amount(value.median, unit, clock))
        };
        [
            self.title.clone(),
            self.reference
                .map(|(side, value)| show(side, value))
                .unwrap_or_default(),
            show(self.subject, self.value),
            self.ratio(),
            self.wanted(),
            match self.met {
                None => String::new(),
                Some(true) => "met".to_owned(),
                Some(false) => "NOT MET".to_owned(),
            },
        ]
    }
}

const HEAD: [&str; 6] = ["figure", "against", "is", "ratio", "goal", ""];

impl Report {
    /// How many goals were met, and how many there are.
    fn goals(&self) -> (usize, usize) {
        let with_goal = || self.lines.iter().filter_map(|line| line.met);
        (with_goal().filter(|met| *met).count(), with_goal().count())
    }

    /// What the figures are, in a few words.
    fn about(&self) -> String {
        let clock = match self.clock {
            Clock::Nanoseconds => "Times are wall time of an emulated machine",
            Clock::Instructions => {
                "Costs are the guest's INSTRUCTIONS (QEMU's icount), not time: caches, locks and \
                 memory's speed do not show"
            }
        };
        let quick = if self.quick {
            " Sizes are smaller than those that the goals are about."
        } else {
            ""
        };
        format!(
            "kernel {}, {} of memory, processors: {}; medians of {} (± the furthest, where 1% or \
             more). {clock}.{quick}",
            self.kernel,
            bytes(self.memory as f64),
            self.processors,
            self.rounds,
        )
    }

    /// The table of the lines, with columns between `bar`s.
    fn table(&self) -> Vec<[String; 6]> {
        let mut table = vec![HEAD.map(str::to_owned)];
        table.extend(self.lines.iter().map(|line| line.cells(self.clock)));
        table
    }

    /// Everything, for a terminal.
    pub fn text(&self) -> String {
        let mut out = format!("{}\n\n", self.about());
        if !self.lines.is_empty() {
            out.push_str(&columns(&self.table()));
            let (met, all) = self.goals();
            let _ = writeln!(out, "\n{met} of {all} goals met");
        }
        for curve in &self.curves {
            let _ = write!(
                out,
                "\n{}\n{}",
                curve.title,
                columns(&curve.table(self.clock))
            );
            for line in curve.fits(self.clock) {
                let _ = writeln!(out, "  {line}");
            }
        }
        for missing in &self.missing {
            let what = if missing.failed {
                "FAILED"
            } else {
                "not measured"
            };
            let _ = writeln!(out, "\n{what}: {}: {}", missing.title, missing.reason);
        }
        out
    }
}

/// The greatest power of a size that counts as linear: what is measured varies by some percent.
const LINEAR: f64 = 1.05;

/// A page of the repository: tests/bench/RESULTS.md.
pub fn page(reports: &[Report]) -> String {
    let mut out = String::from(PAGE_HEAD);
    for report in reports {
        let title = match report.clock {
            Clock::Instructions => "In instructions",
            Clock::Nanoseconds => "In time",
        };
        let _ = write!(
            out,
            "\n## {title}\n\n```\n{}\n```\n",
            report.text().trim_end()
        );
    }
    out
}

const PAGE_HEAD: &str = "\
<!-- SPDX-License-Identifier: MIT OR Apache-2.0 -->
<!-- Written by `pinbuf-bench --page`. -->
# pinbuf beside udmabuf: figures

The kernel's udmabuf (with its limits raised) and pinbuf take turns on the same memory in the same
guest. *is* is the figure of the line, *against* what it is compared with, *ratio* the one in terms of
the other.

| name | what it is |
|---|---|
| udmabuf | the kernel's driver, on a memfd |
| pinbuf | `PINBUF_CREATE`, on addresses where the memfd is mapped |
| shim, *mapped* | udmabuf's calls through the shim, by a program that has the memfd mapped shared and writable, as QEMU has |
| shim, *not mapped* | the same, by a program that has not mapped the memfd: the shim maps it for the length of the call |
| bare pin | pin and unpin of the same memory by GUP, in the test importer module; a huge page once |
| bare | a mapping of the memfd itself, or a scatterlist with as many entries |

*whole life* is all that a program does that fills a buffer once: create, the first
`DMA_BUF_IOCTL_SYNC` (which makes udmabuf build its scatterlist), `mmap`, one byte written to each page
of 4 KiB, `munmap`, close. pinbuf's own buffers are mapped at a multiple of 2 MiB, as its library does;
through the shim and on udmabuf the program passes no address. *sparse* memory has no pages before the
create, *populated* memory has them all. In *not mapped* lives no process has the memfd mapped.

*the pin alone* compares udmabuf's whole create with nothing but the pin of the same memory by address,
and *the dma-buf alone* with a dma-buf that has no memory: an exporter that pins by address can avoid
neither.

To repeat it:

```
./qemu-scripts/bench --icount --json build/icount.json    # in instructions: the same on any machine
./qemu-scripts/bench --json build/time.json               # in time, on an idle machine, 2 processors
target/release/pinbuf-bench --from build/icount.json --from build/time.json \\
    --page tests/bench/RESULTS.md --chart tests/bench/chart.svg
```

Instructions repeat under an emulator, time does not. But instructions do not show what caches, locks
and memory cost.

![times faster than udmabuf](chart.svg)
";

impl Curve {
    fn sides(&self) -> Vec<Side> {
        let last = self.points.last();
        last.map(|point| point.sides.keys().copied().collect())
            .unwrap_or_default()
    }

    fn points_of(&self, side: Side) -> Vec<(f64, f64)> {
        self.points
            .iter()
            .filter_map(|point| Some((point.x, point.sides.get(&side)?.median)))
            .collect()
    }

    fn table(&self, clock: Clock) -> Vec<Vec<String>> {
        let sides = self.sides();
        let mut head = vec![format!("{}s", self.unit)];
        head.extend(sides.iter().map(Side::to_string));
        let mut table = vec![head];
        for point in &self.points {
            let x = if self.unit == "byte" {
                bytes(point.x)
            } else {
                format!("{}", point.x)
            };
            let mut row = vec![x];
            for side in &sides {
                let value = point.sides.get(side);
                row.push(value.map_or(String::new(), |value| {
                    amount(value.median, Unit::Time, clock)
                }));
            }
            table.push(row);
        }
        table
    }

    /// How the cost of each side grows.
    fn fits(&self, clock: Clock) -> Vec<String> {
        let fit = |side: Side| {
            let points = self.points_of(side);
            let (page, name) = if self.unit == "byte" {
                (4096.0, "4 KiB")
            } else {
                (1.0, self.unit.as_str())
            };
            let power = exponent(&points)?;
            let verdict = if power <= LINEAR {
                "linear or better"
            } else {
                "WORSE THAN LINEAR"
            };
            Some(format!(
                "{side}: grows as the {power:.2}th power, {verdict}; at the end {} for each further \
                 {name}",
                amount(marginal(&points)? * page, Unit::Time, clock),
            ))
        };
        self.sides().into_iter().filter_map(fit).collect()
    }
}

/// Lines of equal columns.
fn columns<R: AsRef<[String]>>(table: &[R]) -> String {
    let width = |column: usize| {
        let cells = table.iter().filter_map(|row| row.as_ref().get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let mut out = String::new();
    for row in table {
        let mut line = String::new();
        for (column, cell) in row.as_ref().iter().enumerate() {
            let _ = write!(line, "{cell:width$}  ", width = width(column));
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// A value with its unit.
fn amount(value: f64, unit: Unit, clock: Clock) -> String {
    match unit {
        Unit::Bytes => bytes(value),
        Unit::Number => short(value),
        Unit::Time => {
            let steps = match clock {
                Clock::Instructions => [("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9)],
                Clock::Nanoseconds => [("ns", 1.0), ("µs", 1e3), ("ms", 1e6), ("s", 1e9)],
            };
            let mut chosen = steps[0];
            for step in steps {
                if value.abs() >= step.1 {
                    chosen = step;
                }
            }
            format!("{} {}", short(value / chosen.1), chosen.0)
                .trim_end()
                .to_owned()
        }
    }
}

/// Bytes.
pub fn bytes(value: f64) -> String {
    let steps = [("B", 0), ("KiB", 10), ("MiB", 20), ("GiB", 30)];
    let mut chosen = steps[0];
    for step in steps {
        if value.abs() >= f64::from(1u32 << step.1) {
            chosen = step;
        }
    }
    format!(
        "{} {}",
        short(value / f64::from(1u32 << chosen.1)),
        chosen.0
    )
}

/// Three digits, or all of a whole number's.
fn short(value: f64) -> String {
    let digits: usize = match value.abs() {
        size if size >= 100.0 || size.fract() == 0.0 => 0,
        size if size >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts() {
        let time = |value| amount(value, Unit::Time, Clock::Nanoseconds);
        assert_eq!(time(12.0), "12 ns");
        assert_eq!(time(1234.0), "1.23 µs");
        assert_eq!(time(56_789_000.0), "56.8 ms");
        assert_eq!(amount(2.5e6, Unit::Time, Clock::Instructions), "2.50 M");
        assert_eq!(bytes(4096.0), "4 KiB");
        assert_eq!(bytes(1.5 * f64::from(1 << 30)), "1.50 GiB");
    }

    #[test]
    fn goals() {
        let value = |median| Summary {
            median,
            min: median,
            max: median,
            count: 1,
        };
        let row = |goal, subject: f64| {
            let line = Line {
                title: String::new(),
                about: String::new(),
                metric: Metric::Create,
                subject: Side::Pinbuf,
                reference: Some(Side::Udmabuf),
                goal,
            };
            let figures = Figures::from([
                (
                    Side::Udmabuf,
                    BTreeMap::from([(Metric::Create, value(100.0))]),
                ),
                (
                    Side::Pinbuf,
                    BTreeMap::from([(Metric::Create, value(subject))]),
                ),
            ]);
            Row::new(&line, &figures).unwrap().met
        };
        assert_eq!(row(Goal::Faster(2.0), 50.0), Some(true));
        assert_eq!(row(Goal::Faster(2.0), 51.0), Some(false));
        assert_eq!(row(Goal::AtMost(1.25), 125.0), Some(true));
        assert_eq!(row(Goal::AtMost(1.25), 126.0), Some(false));
        assert_eq!(row(Goal::None, 10.0), None);
    }
}
