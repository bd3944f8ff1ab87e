//! How many weights a model has, and how many a token meets, counted from the catalogue's declarations.

use crate::catalog::{self, Role, Shape};
use crate::cut::Cut;
use crate::size::runs;
use crate::spec::{Branch, Layer, ModelSpec};

/// Numbers of weights; a tied head counts once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parameters {
    pub total: u64,
    /// Those that a token is multiplied with: the experts that it chooses, and the head, but not the embedding table, of
    /// which it takes one row.
    pub active: u64,
}

pub fn count(spec: &ModelSpec) -> Parameters {
    let mut all = Parameters { total: 0, active: 0 };
    for shape in catalog::outer_shapes(spec) {
        let weights = (shape.rows * shape.cols) as u64;
        all.total += weights;
        if shape.role != Role::Embedding || spec.head.tied {
            all.active += weights;
        }
    }
    for (layer, repeats) in runs(&spec.layers) {
        for shape in catalog::layer_shapes(spec, layer) {
            let (total, active) = of_shape(&shape, layer);
            all.total += repeats * total;
            all.active += repeats * active;
        }
    }
    all
}

/// How many weights a step of `rows` tokens is expected to meet, where each token chooses its experts evenly and by itself.
pub fn met(spec: &ModelSpec, rows: u64) -> u64 {
    let expected = |total: u64, chosen: u64| {
        let spared = 1.0 - chosen as f64 / total.max(1) as f64;
        (total as f64 * (1.0 - spared.powi(rows.min(1 << 20) as i32))).round() as u64
    };
    let layers = runs(&spec.layers).into_iter().map(|(layer, repeats)| {
        let shapes = catalog::layer_shapes(spec, layer);
        let met = shapes.iter().map(|shape| of_shape(shape, layer)).map(|(total, chosen)| expected(total, chosen));
        repeats * met.sum::<u64>()
    });
    let outer = catalog::outer_shapes(spec).into_iter().filter(|shape| shape.role != Role::Embedding || spec.head.tied);
    layers.sum::<u64>() + outer.map(|shape| (shape.rows * shape.cols) as u64).sum::<u64>()
}

fn of_shape(shape: &Shape, layer: &Layer) -> (u64, u64) {
    let each = (shape.rows * shape.cols) as u64;
    let Cut::Expert { of, .. } = shape.cut else { return (each, each) };
    let chosen = layer.branches.iter().find_map(|b| if let Branch::Moe(m) = b { Some(m.active) } else { None });
    (each * of as u64, each * chosen.unwrap_or(of) as u64)
}
