// SPDX-License-Identifier: MIT OR Apache-2.0

//! The chart: how many times faster than udmabuf whole lives and creates are, and should be. One panel per
//! clock, in it one row per piece of memory, and in that one bar per way to make the buffer.

use std::path::Path;

use anyhow::{anyhow, Result};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::lines::Goal;
use crate::report::{Clock, Report, Row};
use crate::task::{Metric, Side};

const WIDTH: i32 = 1180;
/// Where the panels begin, and what is left free behind each for the last bar's number.
const LEFT: i32 = 300;
const MARGIN: i32 = 56;
const TOP: i32 = 84;
const BOTTOM: i32 = 36;
/// A bar with the gap below it, a row's gap, and a section's title.
const BAR: i32 = 13;
const GAP: i32 = 9;
const TITLE: i32 = 34;

const GRID: RGBColor = RGBColor(215, 215, 215);
const INK: RGBColor = RGBColor(40, 40, 40);
const MISSED: RGBColor = RGBColor(198, 40, 40);

/// The ways to make a buffer, their colours and their names.
const WAYS: [(Side, RGBColor, &str); 3] = [
    (Side::Pinbuf, RGBColor(46, 125, 50), "pinbuf's own call"),
    (
        Side::Shim,
        RGBColor(30, 100, 180),
        "through the shim, memory mapped by the program",
    ),
    (
        Side::Unmapped,
        RGBColor(230, 150, 30),
        "through the shim, not mapped",
    ),
];

const SECTIONS: [&str; 2] = [
    "Whole life: create, first sync, mmap, a write to every page, munmap, close",
    "Create",
];

/// Numbers on the axes.
const TICKS: [f64; 15] = [
    0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0,
];

/// What is drawn for a line of the table.
struct Bar {
    times: f64,
    goal: Option<f64>,
}

/// Lines that differ only in how the buffer is made.
struct Group<'a> {
    section: usize,
    label: &'a str,
    /// For each way that was measured, one bar per panel.
    ways: Vec<(RGBColor, Vec<Option<Bar>>)>,
}

/// Which section a line belongs to, if it may be drawn.
fn section(row: &Row) -> Option<usize> {
    let (Side::Udmabuf, _) = row.reference? else {
        return None;
    };
    match row.metric {
        Metric::Life => Some(0),
        Metric::Create | Metric::Cycle => Some(1),
        _ => None,
    }
}

fn bar(row: &Row) -> Option<Bar> {
    let goal = match row.goal {
        Goal::Faster(times) => Some(times),
        Goal::AtMost(times) => Some(1.0 / times),
        Goal::None => None,
    };
    Some(Bar {
        times: 1.0 / row.times()?,
        goal,
    })
}

/// All whole lives, and of the creates those with a goal.
fn groups<'a>(reports: &[&'a Report]) -> Vec<Group<'a>> {
    let rows = |report: &&'a Report| report.lines.iter();
    let same = |one: &Row, other: &Row| one.about == other.about && section(one) == section(other);
    let mut heads: Vec<&Row> = Vec::new();
    for row in reports.iter().flat_map(rows) {
        if section(row).is_some() && !heads.iter().any(|head| same(head, row)) {
            heads.push(row);
        }
    }
    let group = |head: &&'a Row| -> Option<Group<'a>> {
        let section = section(head)?;
        let of = |report: &&'a Report, side: Side| {
            rows(report)
                .find(|row| row.subject == side && same(head, row))
                .and_then(bar)
        };
        let way = |(side, colour, _)| {
            let bars: Vec<_> = reports.iter().map(|report| of(report, side)).collect();
            let measured = bars.iter().any(Option::is_some);
            measured.then_some((colour, bars))
        };
        let ways: Vec<_> = WAYS.into_iter().filter_map(way).collect();
        let mut bars = ways.iter().flat_map(|(_, bars)| bars).flatten();
        let wanted = section == 0 || bars.any(|bar| bar.goal.is_some());
        let plain = ["whole life, ", "create, "];
        let label = plain
            .iter()
            .find_map(|verb| head.about.strip_prefix(verb))
            .unwrap_or(&head.about);
        (wanted && !ways.is_empty()).then_some(Group {
            section,
            label,
            ways,
        })
    };
    let mut groups: Vec<_> = heads.iter().filter_map(group).collect();
    groups.sort_by_key(|group| group.section);
    groups
}

/// Draws the chart: a panel for each report.
pub fn draw(reports: &[Report], path: &Path) -> Result<()> {
    let mut reports: Vec<&Report> = reports.iter().collect();
    reports.dedup_by_key(|report| report.clock);
    let groups = groups(&reports);
    let sections = (0..SECTIONS.len()).filter(|n| groups.iter().any(|it| it.section == *n));
    let bars: usize = groups.iter().map(|group| group.ways.len()).sum();
    let height = TOP
        + TITLE * sections.count() as i32
        + GAP * groups.len() as i32
        + BAR * bars as i32
        + BOTTOM;
    let size = (WIDTH as u32, height as u32);
    let area = SVGBackend::new(path, size).into_drawing_area();
    paint(&area, &groups, &reports, height).map_err(|error| anyhow!("drawing the chart: {error}"))
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Drawn<'a> = Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>;

fn text(size: i32, horizontal: HPos, colour: RGBColor) -> TextStyle<'static> {
    ("sans-serif", size)
        .into_font()
        .color(&colour)
        .pos(Pos::new(horizontal, VPos::Center))
}

/// How many times, in two digits or three.
fn times(value: f64) -> String {
    if value >= 10.0 {
        format!("{value:.0}×")
    } else {
        format!("{value:.2}×")
    }
}

/// Where numbers are on the axes: logarithmic, the same in every panel.
struct Scale {
    least: f64,
    most: f64,
    width: i32,
}

impl Scale {
    fn new(groups: &[Group<'_>], panels: i32) -> Self {
        let bars = groups.iter().flat_map(|group| &group.ways);
        let bars = bars.flat_map(|(_, bars)| bars.iter().flatten());
        let values = bars.flat_map(|bar| [Some(bar.times), bar.goal]).flatten();
        let (least, most) = values.fold((0.5f64, 2.0f64), |(least, most), value| {
            (least.min(value), most.max(value))
        });
        Self {
            least,
            most,
            width: (WIDTH - LEFT) / panels.max(1) - MARGIN,
        }
    }

    /// The first column of a panel.
    fn start(&self, panel: usize) -> i32 {
        LEFT + panel as i32 * (self.width + MARGIN)
    }

    fn x(&self, panel: usize, value: f64) -> i32 {
        let part = (value / self.least).ln() / (self.most / self.least).ln();
        self.start(panel) + (part * f64::from(self.width)) as i32
    }
}

fn paint<'a>(area: &Area<'a>, groups: &[Group<'_>], reports: &[&Report], height: i32) -> Drawn<'a> {
    area.fill(&WHITE)?;
    let kernel = reports.first().map_or("", |report| report.kernel.as_str());
    let title = format!("pinbuf: times faster than udmabuf (kernel {kernel})");
    area.draw_text(&title, &text(21, HPos::Center, INK), (WIDTH / 2, 18))?;
    legend(area)?;
    let scale = Scale::new(groups, reports.len() as i32);
    for (panel, report) in reports.iter().enumerate() {
        axis(area, &scale, panel, report.clock, height)?;
    }
    let mut y = TOP;
    let mut last = None;
    for group in groups {
        if last != Some(group.section) {
            last = Some(group.section);
            // The axes' lines do not run through it.
            let free = [(LEFT, y), (WIDTH, y + TITLE - 4)];
            area.draw(&Rectangle::new(free, WHITE.filled()))?;
            let style = text(17, HPos::Left, INK);
            area.draw_text(SECTIONS[group.section], &style, (12, y + TITLE / 2))?;
            y += TITLE;
        }
        let rows = BAR * group.ways.len() as i32;
        let style = text(15, HPos::Right, INK);
        area.draw_text(group.label, &style, (LEFT - 10, y + rows / 2 - 1))?;
        for (colour, bars) in &group.ways {
            for (panel, bar) in bars.iter().enumerate() {
                if let Some(bar) = bar {
                    paint_bar(area, &scale, panel, bar, *colour, y)?;
                }
            }
            y += BAR;
        }
        y += GAP;
    }
    area.present()
}

fn legend<'a>(area: &Area<'a>) -> Drawn<'a> {
    let mut x = 12;
    for (_, colour, name) in WAYS {
        area.draw(&Rectangle::new([(x, 38), (x + 14, 48)], colour.filled()))?;
        area.draw_text(name, &text(14, HPos::Left, INK), (x + 20, 43))?;
        x += 60 + 7 * name.len() as i32;
    }
    let goal = PathElement::new([(x, 36), (x, 50)], INK.stroke_width(2));
    area.draw(&goal)?;
    area.draw_text("goal", &text(14, HPos::Left, INK), (x + 8, 43))?;
    let missed = PathElement::new([(x + 64, 36), (x + 64, 50)], MISSED.stroke_width(2));
    area.draw(&missed)?;
    area.draw_text("missed", &text(14, HPos::Left, MISSED), (x + 72, 43))
}

fn axis<'a>(area: &Area<'a>, scale: &Scale, panel: usize, clock: Clock, height: i32) -> Drawn<'a> {
    let name = match clock {
        Clock::Instructions => "in instructions of the guest",
        Clock::Nanoseconds => "in time (emulated machine)",
    };
    let middle = scale.start(panel) + scale.width / 2;
    area.draw_text(name, &text(16, HPos::Center, INK), (middle, TOP - 16))?;
    let shown = |tick: &f64| *tick >= scale.least * 0.99 && *tick <= scale.most * 1.01;
    for tick in TICKS.into_iter().filter(shown) {
        let x = scale.x(panel, tick);
        let ends = [(x, TOP), (x, height - BOTTOM)];
        let (colour, stroke) = if tick == 1.0 { (INK, 1) } else { (GRID, 1) };
        area.draw(&PathElement::new(ends, colour.stroke_width(stroke)))?;
        let label = if tick < 1.0 {
            format!("1/{:.0}", 1.0 / tick)
        } else {
            format!("{tick:.0}")
        };
        let place = (x, height - BOTTOM + 12);
        area.draw_text(&label, &text(14, HPos::Center, INK), place)?;
    }
    Ok(())
}

fn paint_bar<'a>(
    area: &Area<'a>,
    scale: &Scale,
    panel: usize,
    bar: &Bar,
    colour: RGBColor,
    y: i32,
) -> Drawn<'a> {
    let (one, end) = (scale.x(panel, 1.0), scale.x(panel, bar.times));
    let thick = BAR - 3;
    let corners = [
        (one.min(end), y),
        (one.max(end).max(one.min(end) + 1), y + thick),
    ];
    area.draw(&Rectangle::new(corners, colour.filled()))?;
    let missed = bar.goal.is_some_and(|goal| bar.times < goal);
    let ink = if missed { MISSED } else { INK };
    let mut after = end.max(one);
    if let Some(goal) = bar.goal {
        let x = scale.x(panel, goal);
        after = after.max(x);
        let ends = [(x, y - 2), (x, y + thick + 1)];
        area.draw(&PathElement::new(ends, ink.stroke_width(2)))?;
    }
    let place = (after + 6, y + thick / 2);
    area.draw_text(&times(bar.times), &text(13, HPos::Left, ink), place)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::Summary;

    fn row(about: &str, metric: Metric, subject: Side, goal: Goal) -> Row {
        let value = Summary::of(&[1.0]).unwrap();
        Row {
            title: format!("{about}, {subject:?}"),
            about: about.to_owned(),
            metric,
            subject,
            value,
            reference: Some((Side::Udmabuf, value)),
            goal,
            met: None,
        }
    }

    fn report(clock: Clock, lines: Vec<Row>) -> Report {
        Report {
            kernel: String::new(),
            clock,
            memory: 0,
            processors: 1,
            rounds: 1,
            quick: false,
            lines,
            curves: Vec::new(),
            missing: Vec::new(),
        }
    }

    #[test]
    fn lives_and_creates_with_a_goal_are_drawn() {
        let goal = Goal::AtMost(1.0);
        let lines = vec![
            row("create, a", Metric::Create, Side::Pinbuf, goal),
            row("create, a", Metric::Create, Side::Unmapped, Goal::None),
            row("create, a", Metric::Create, Side::Pin, Goal::None),
            row("create, b", Metric::Create, Side::Pinbuf, Goal::None),
            row("close, a", Metric::Close, Side::Pinbuf, goal),
            row("whole life, a", Metric::Life, Side::Shim, Goal::None),
        ];
        let one = report(Clock::Instructions, lines);
        // The other clock has no figure for one of them.
        let lines = vec![row("create, a", Metric::Create, Side::Pinbuf, goal)];
        let other = report(Clock::Nanoseconds, lines);
        let groups = groups(&[&one, &other]);
        let seen: Vec<_> = groups
            .iter()
            .map(|group| {
                let bars = |(_, bars): &(_, Vec<Option<Bar>>)| bars.iter().flatten().count();
                let bars: Vec<usize> = group.ways.iter().map(bars).collect();
                (group.section, group.label, bars)
            })
            .collect();
        assert_eq!(seen, [(0, "a", vec![1]), (1, "a", vec![2, 1])]);
    }
}
