//! What a mesh keeps more than once, and so the trade between tensor and data ranks: lanes copy what experts do not
//! hold, slices copy the cache where it can't be cut (a latent, or key/value heads that are fewer than they).

use super::Served;
use super::devices::format_bytes;
use model::cut;
use model::mesh::{Mesh, Place};
use model::plan::{Limits, Plan};
use model::size::RankBytes;
use std::ops::Range;

/// Bytes of a whole group beyond one copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Copies {
    pub weights: u64,
    pub cache: u64,
}

impl Copies {
    /// Of ranks that need `bytes`, with `blocks` blocks of cache a lane.
    pub fn of(served: Served<'_>, mesh: &Mesh, bytes: &[RankBytes], blocks: usize) -> Copies {
        let one = alone(served);
        let weights: u64 = bytes.iter().map(|rank| rank.weights).sum();
        let per_block: u64 = bytes.iter().map(|rank| rank.cache_per_block).sum();
        Copies {
            weights: weights.saturating_sub(one.weights),
            cache: per_block.saturating_sub(mesh.data as u64 * one.cache_per_block) * blocks as u64,
        }
    }

    pub fn total(&self) -> u64 {
        self.weights + self.cache
    }
}

const NONE: Limits = Limits { model_len_max: 0, step_tokens_max: 0, step_sequences_max: 0, blocks: 0 };

/// One rank that holds everything.
fn alone(served: Served<'_>) -> RankBytes {
    served.rank(&Mesh::ONE, Place { stage: 0, lane: 0, slice: 0 }, 0..served.spec.layers.len(), &NONE)
}

/// Weights and cache of every rank. Ranks of a stage differ by their slice alone.
fn ranks(served: Served<'_>, mesh: &Mesh, stages: &[Range<usize>]) -> Vec<RankBytes> {
    let places = mesh.all().map(|rank| Place { lane: 0, ..mesh.place(rank) });
    let mut known: Vec<(Place, RankBytes)> = Vec::new();
    let mut of = |place: Place| {
        let found = known.iter().find(|(at, _)| *at == place).map(|(_, bytes)| *bytes);
        found.unwrap_or_else(|| {
            let bytes = served.rank(mesh, place, stages[place.stage].clone(), &NONE);
            known.push((place, bytes));
            bytes
        })
    };
    places.map(&mut of).collect()
}

/// What `plan` keeps more than once.
pub fn of_plan(served: Served<'_>, plan: &Plan) -> Copies {
    let bytes = ranks(served, &plan.mesh, &plan.stages);
    Copies::of(served, &plan.mesh, &bytes, plan.limits.blocks)
}

/// Why `plan` has more lanes than its ranks need, where that keeps less twice: compared with as many tensor ranks as the
/// model takes, caching as many positions.
pub fn reason(served: Served<'_>, plan: &Plan) -> Option<String> {
    let Mesh { pipeline, data, tensor, .. } = plan.mesh;
    let wider = |t: &usize| *t > tensor && (data * tensor).is_multiple_of(*t);
    let widest = cut::tensor_sizes(served.spec).into_iter().filter(wider).max()?;
    let lanes = data * tensor / widest;
    let expert = |mesh: &Mesh| cut::check(served.spec, mesh).is_ok();
    let spread = (1..=data * tensor).rev().filter_map(|e| Mesh::new(pipeline, lanes, widest, e).ok());
    let other = spread.into_iter().find(expert)?;
    let chosen = of_plan(served, plan);
    // As many positions in fewer lanes.
    let blocks = plan.limits.blocks * data / lanes;
    let copied = Copies::of(served, &other, &ranks(served, &other, &plan.stages), blocks);
    (copied.total() > chosen.total()).then(|| {
        format!(
            "dp{data} x tp{tensor} rather than dp{lanes} x tp{widest}: {} of weights and {} of cache are kept more than \
             once; there, with as many positions cached, {} and {} would be",
            format_bytes(chosen.weights),
            format_bytes(chosen.cache),
            format_bytes(copied.weights),
            format_bytes(copied.cache)
        )
    })
}
