// SPDX-License-Identifier: MIT OR Apache-2.0

//! Medians, spread, and how a cost grows.

use serde::{Deserialize, Serialize};

/// Several measurements of one thing.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The one in the middle.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// How many there were.
    pub count: usize,
}

impl Summary {
    /// Of at least one value.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let half = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[half]
        } else {
            (sorted[half - 1] + sorted[half]) / 2.0
        };
        Some(Self {
            median,
            min,
            max,
            count: sorted.len(),
        })
    }

    /// How far the furthest value is from the median, as a part of it.
    pub fn spread(&self) -> f64 {
        if self.median == 0.0 {
            return 0.0;
        }
        (self.max - self.median).max(self.median - self.min) / self.median
    }
}

/// How a cost grows with a size: `y` as a power of `x`, by least squares over the logarithms, from
/// the points whose `x` is at least a 64th of the greatest. What comes before is the cost of the
/// call itself.
pub fn exponent(points: &[(f64, f64)]) -> Option<f64> {
    let greatest = points.iter().map(|point| point.0).fold(0.0, f64::max);
    let logs: Vec<(f64, f64)> = points
        .iter()
        .filter(|(x, y)| *x >= greatest / 64.0 && *x > 0.0 && *y > 0.0)
        .map(|(x, y)| (x.ln(), y.ln()))
        .collect();
    if logs.len() < 2 {
        return None;
    }
    let count = logs.len() as f64;
    let mean_x = logs.iter().map(|(x, _)| x).sum::<f64>() / count;
    let mean_y = logs.iter().map(|(_, y)| y).sum::<f64>() / count;
    let covariance: f64 = logs.iter().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum();
    let variance: f64 = logs.iter().map(|(x, _)| (x - mean_x).powi(2)).sum();
    (variance > 0.0).then(|| covariance / variance)
}

/// What one more unit costs at the far end: between the last two points.
pub fn marginal(points: &[(f64, f64)]) -> Option<f64> {
    let [.., (x0, y0), (x1, y1)] = points else {
        return None;
    };
    (x1 > x0).then(|| (y1 - y0) / (x1 - x0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_spread() {
        let odd = Summary::of(&[3.0, 1.0, 2.0]).unwrap();
        assert_eq!((odd.median, odd.min, odd.max), (2.0, 1.0, 3.0));
        assert_eq!(odd.spread(), 0.5);
        assert_eq!(Summary::of(&[3.0, 1.0]).unwrap().median, 2.0);
        assert_eq!(Summary::of(&[]), None);
    }

    #[test]
    fn growth() {
        let of = |f: fn(f64) -> f64| -> Vec<(f64, f64)> {
            (0..10).map(|n| 4f64.powi(n)).map(|x| (x, f(x))).collect()
        };
        let near = |seen: Option<f64>, wanted: f64| (seen.unwrap() - wanted).abs() < 0.02;
        assert!(near(exponent(&of(|x| 5.0 * x)), 1.0));
        assert!(near(exponent(&of(|x| x * x)), 2.0));
        assert!(near(exponent(&of(|_| 7.0)), 0.0));
        assert!(near(exponent(&of(|x| 100.0 + x)), 1.0));
        assert!(near(marginal(&of(|x| 100.0 + 3.0 * x)), 3.0));
        assert_eq!(exponent(&[(1.0, 1.0)]), None);
    }
}
