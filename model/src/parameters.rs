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

fn of_shape(shape: &Shape, layer: &Layer) -> (u64, u64) {
    let each = (shape.rows * shape.cols) as u64;
    let Cut::Expert { of, .. } = shape.cut else { return (each, each) };
    let chosen = layer.branches.iter().find_map(|b| if let Branch::Moe(m) = b { Some(m.active) } else { None });
    (each * of as u64, each * chosen.unwrap_or(of) as u64)
}
