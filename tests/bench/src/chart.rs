// SPDX-License-Identifier: MIT OR Apache-2.0

//! The chart: how many times faster than udmabuf each line is, and how many it should be.

use std::path::Path;

use anyhow::{anyhow, Result};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::lines::Goal;
use crate::report::{Clock, Report, Row};
use crate::task::{Side, Unit};

const WIDTH: u32 = 1000;
/// Where the bars begin and end.
const LEFT: i32 = 470;
const RIGHT: i32 = 960;
const TOP: i32 = 64;
const STEP: i32 = 22;

const AHEAD: RGBColor = RGBColor(46, 125, 50);
const BEHIND: RGBColor = RGBColor(198, 40, 40);
const GRID: RGBColor = RGBColor(200, 200, 200);
const INK: RGBColor = RGBColor(40, 40, 40);

/// A bar: a line's title, how many times faster it is, and the goal.
struct Bar<'a> {
    title: &'a str,
    times: f64,
    goal: Option<f64>,
}

/// The lines that compare times with udmabuf's and have a goal.
fn bar(row: &Row) -> Option<Bar<'_>> {
    let (Side::Udmabuf, _) = row.reference? else {
        return None;
    };
    let goal = match row.goal {
        Goal::Faster(times) => Some(times),
        Goal::AtMost(times) => Some(1.0 / times),
        _ => return None,
    };
    (row.metric.unit() == Unit::Time).then_some(())?;
    Some(Bar {
        title: &row.title,
        times: 1.0 / row.times()?,
        goal,
    })
}

/// Draws the chart.
pub fn draw(report: &Report, path: &Path) -> Result<()> {
    let bars: Vec<Bar<'_>> = report.lines.iter().filter_map(bar).collect();
    let height = TOP + STEP * bars.len() as i32 + 40;
    let area = SVGBackend::new(path, (WIDTH, height as u32)).into_drawing_area();
    paint(&area, &bars, report, height).map_err(|error| anyhow!("drawing the chart: {error}"))
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Drawn<'a> = Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>;

fn paint<'a>(area: &Area<'a>, bars: &[Bar<'_>], report: &Report, height: i32) -> Drawn<'a> {
    let text = |size: i32, horizontal| {
        ("sans-serif", size)
            .into_font()
            .color(&INK)
            .pos(Pos::new(horizontal, VPos::Center))
    };
    area.fill(&WHITE)?;
    let counted = match report.clock {
        Clock::Instructions => "by instructions of the guest",
        Clock::Nanoseconds => "by time",
    };
    let title = format!(
        "pinbuf: times faster than udmabuf, {counted} (kernel {})",
        report.kernel
    );
    area.draw_text(&title, &text(17, HPos::Center), (WIDTH as i32 / 2, 20))?;
    area.draw_text("| goal", &text(13, HPos::Right), (RIGHT, 44))?;

    let bottom = height - 36;
    let most = bars
        .iter()
        .flat_map(|bar| [Some(bar.times), bar.goal])
        .flatten();
    let decades = most.fold(10.0, f64::max).log10().ceil();
    // From a tenth on, where being slower shows.
    let place = |times: f64| {
        let part = (times.log10() + 1.0).max(0.0) / (decades + 1.0);
        LEFT + (part * f64::from(RIGHT - LEFT)) as i32
    };
    for decade in -1..=decades as i32 {
        let x = place(10f64.powi(decade));
        area.draw(&PathElement::new([(x, TOP - 6), (x, bottom)], GRID))?;
        let label = if decade < 0 {
            format!("1/{}", 10i64.pow(-decade as u32))
        } else {
            10i64.pow(decade as u32).to_string()
        };
        area.draw_text(&label, &text(13, HPos::Center), (x, bottom + 14))?;
    }
    for (number, bar) in bars.iter().enumerate() {
        let y = TOP + STEP * number as i32;
        let middle = y + STEP / 2 - 2;
        area.draw_text(bar.title, &text(12, HPos::Right), (LEFT - 8, middle))?;
        let (one, end) = (place(1.0), place(bar.times));
        let met = bar.goal.is_none_or(|goal| bar.times >= goal);
        let colour = if met { AHEAD } else { BEHIND };
        let corners = [(one.min(end), y), (one.max(end).max(one + 1), y + STEP - 6)];
        area.draw(&Rectangle::new(corners, colour.filled()))?;
        if let Some(goal) = bar.goal {
            let x = place(goal);
            area.draw(&PathElement::new(
                [(x, y - 2), (x, y + STEP - 4)],
                INK.stroke_width(2),
            ))?;
        }
        let label = if bar.times >= 10.0 {
            format!("{:.0}", bar.times)
        } else {
            format!("{:.1}", bar.times)
        };
        let after = bar.goal.map_or(end, |goal| end.max(place(goal))).max(one);
        area.draw_text(&label, &text(12, HPos::Left), (after + 6, middle))?;
    }
    area.present()
}
