//! Whether a mesh fits the devices: layers dealt out to stages by bytes, then cache blocks from what memory is left.

use super::{PlanError, Policy, Served};
use model::mesh::{Mesh, Place, RankId};
use model::plan::{BLOCK_TOKENS, Limits, Plan};
use model::size::{self, RankBytes};
use std::ops::Range;

/// What is to be fitted.
pub(super) struct Ask<'a> {
    pub served: Served<'a>,
    pub policy: &'a Policy,
    /// Refuse a mesh whose cache can't hold the model's longest sequence, rather than shorten it.
    pub whole: bool,
}

pub(super) struct Fit {
    pub stages: Vec<Range<usize>>,
    pub limits: Limits,
    /// By rank.
    pub bytes: Vec<RankBytes>,
}

/// A model whose own length does not fit is served with a shorter one, but not with less than this.
const MODEL_LEN_LEAST: usize = 1024;
/// Blocks are numbered by `u32`.
const BLOCKS_MAX: u64 = u32::MAX as u64;

/// Fits `mesh` into the `memory` of each rank, or says which rank is furthest from fitting.
pub(super) fn fit(ask: &Ask<'_>, mesh: &Mesh, memory: &[u64], previous: Option<&Plan>) -> Result<Fit, PlanError> {
    assert_eq!(memory.len(), mesh.ranks());
    let kept = previous.filter(|p| p.mesh == *mesh && tiles(&p.stages, ask.served.spec.layers.len()));
    if let Some(plan) = kept
        && let Ok(fit) = with_stages(ask, mesh, memory, plan.stages.clone())
    {
        return Ok(fit);
    }
    with_stages(ask, mesh, memory, deal(ask, mesh, memory))
}

fn tiles(stages: &[Range<usize>], layers: usize) -> bool {
    stages.last().is_some_and(|last| last.end == layers)
}

fn with_stages(ask: &Ask<'_>, mesh: &Mesh, memory: &[u64], stages: Vec<Range<usize>>) -> Result<Fit, PlanError> {
    let policy = ask.policy;
    let longest = match policy.model_len_max {
        Some(length) => length,
        None if ask.whole => ask.served.spec.positions_max,
        None => shortened(ask, mesh, memory, &stages),
    };
    let mut limits = limits(policy, longest);
    let mut bytes = rank_bytes(ask, mesh, &stages, &limits);
    let blocks = blocks(ask, mesh, memory, &bytes, longest)?;
    limits.blocks = blocks;
    if blocks < longest.div_ceil(BLOCK_TOKENS) {
        // `blocks` refused this where the whole length was asked for.
        limits.model_len_max = blocks * BLOCK_TOKENS;
        bytes = rank_bytes(ask, mesh, &stages, &limits);
    }
    Ok(Fit { stages, limits, bytes })
}

/// Bounds without a cache yet.
fn limits(policy: &Policy, model_len_max: usize) -> Limits {
    let Policy { step_tokens_max, step_sequences_max, .. } = *policy;
    Limits { model_len_max, step_tokens_max, step_sequences_max, blocks: 0 }
}

/// The longest sequence that every rank has room for, tables of its positions and its cache: the model's own length, or whole blocks
/// of a shorter one, down to the least that is served.
fn shortened(ask: &Ask<'_>, mesh: &Mesh, memory: &[u64], stages: &[Range<usize>]) -> usize {
    let longest = ask.served.spec.positions_max;
    let fits = |length: usize| {
        let bytes = rank_bytes(ask, mesh, stages, &limits(ask.policy, length));
        let blocks = length.div_ceil(BLOCK_TOKENS) as u64;
        bytes.iter().zip(memory).all(|(need, has)| need.total(blocks) <= *has)
    };
    if fits(longest) {
        return longest;
    }
    let (mut low, mut high) = (MODEL_LEN_LEAST.div_ceil(BLOCK_TOKENS), longest.div_ceil(BLOCK_TOKENS));
    while high > low + 1 {
        let middle = low + (high - low) / 2;
        if fits(middle * BLOCK_TOKENS) { low = middle } else { high = middle }
    }
    longest.min(low * BLOCK_TOKENS)
}

/// What each rank needs. Ranks of a stage differ by their slice alone.
fn rank_bytes(ask: &Ask<'_>, mesh: &Mesh, stages: &[Range<usize>], limits: &Limits) -> Vec<RankBytes> {
    let mut out = Vec::with_capacity(mesh.ranks());
    for (stage, layers) in stages.iter().enumerate() {
        let of = |slice| {
            let place = Place { stage, lane: 0, slice };
            ask.served.rank(mesh, place, layers.clone(), limits)
        };
        let slices: Vec<RankBytes> = (0..mesh.tensor).map(of).collect();
        for _ in 0..mesh.data {
            out.extend_from_slice(&slices);
        }
    }
    out
}

/// Cache blocks of each lane's pool: the most that every rank has room for.
fn blocks(ask: &Ask<'_>, mesh: &Mesh, memory: &[u64], bytes: &[RankBytes], longest: usize) -> Result<usize, PlanError> {
    let one = longest.div_ceil(BLOCK_TOKENS) as u64;
    let whole = ask.whole || ask.policy.model_len_max.is_some();
    let least = if whole { one } else { one.min(MODEL_LEN_LEAST.div_ceil(BLOCK_TOKENS) as u64) };
    let tokens = longest.min(least as usize * BLOCK_TOKENS);
    // The rank that is furthest from holding one sequence tells what is missing.
    let short = |(rank, (need, has)): (usize, (&RankBytes, &u64))| {
        let missing = need.total(least).checked_sub(*has).filter(|missing| *missing > 0)?;
        let cache = need.cache_per_block * least;
        let rank = RankId(rank as u32);
        Some((missing, PlanError::Memory { mesh: *mesh, rank, bytes: *need, cache, tokens, has: *has }))
    };
    let shortest = bytes.iter().zip(memory).enumerate().filter_map(short).max_by_key(|(missing, _)| *missing);
    if let Some((_, error)) = shortest {
        return Err(error);
    }
    let room = bytes.iter().zip(memory).map(|(need, has)| {
        let left = has - need.fixed();
        let given = ask.policy.cache_bytes.map_or(left, |given| given.min(left));
        given / need.cache_per_block.max(1)
    });
    let room = room.min().unwrap_or(0).min(BLOCKS_MAX);
    if room < least {
        let per_block = bytes.iter().map(|b| b.cache_per_block).max().unwrap_or(0);
        let given = ask.policy.cache_bytes.unwrap_or(0);
        let holds = room as usize * BLOCK_TOKENS;
        return Err(PlanError::Cache { given, holds, tokens, needs: per_block * least });
    }
    // More than every sequence of a step at its longest is only memory taken from others, unless it was asked for.
    let per_block = bytes.iter().map(|b| b.cache_per_block).max().unwrap_or(0).max(1);
    let modest = ask.policy.cache_bytes_modest.map_or(u64::MAX, |bytes| (bytes / per_block).max(one));
    let useful = (one * ask.policy.step_sequences_max as u64).min(modest);
    Ok(if ask.policy.cache_bytes.is_some() { room } else { room.min(useful.max(least)) } as usize)
}

/// Deals the layers out to the stages so that the fullest stage is as empty as can be, in shares of its memory.
fn deal(ask: &Ask<'_>, mesh: &Mesh, memory: &[u64]) -> Vec<Range<usize>> {
    let layers = ask.served.spec.layers.len();
    if mesh.pipeline == 1 {
        return std::iter::once(0..layers).collect();
    }
    let first = Place { stage: 0, lane: 0, slice: 0 };
    let mut weights = Vec::with_capacity(layers);
    for run in size::alike(ask.served.spec, 0..layers, ask.served.keeping.storage) {
        let bytes = size::layer_weights(ask.served.spec, run.start, mesh, first, ask.served.keeping);
        weights.extend(std::iter::repeat_n(bytes, run.len()));
    }
    let none = Limits { model_len_max: 0, step_tokens_max: 0, step_sequences_max: 0, blocks: 0 };
    let ranks = mesh.data * mesh.tensor;
    let stages: Vec<Stage> = (0..mesh.pipeline)
        .map(|stage| {
            let outer = ask.served.rank(mesh, Place { stage, ..first }, 0..0, &none);
            let memory = memory[stage * ranks..(stage + 1) * ranks].iter().min();
            Stage { outer: outer.weights, memory: *memory.expect("a stage has ranks") }
        })
        .collect();
    // Shares are counted in 65536ths; the least one at which the layers go round is found by bisection.
    let (mut low, mut high) = (0u64, 1u64);
    while pack(&weights, &stages, high).is_none() {
        high *= 2;
        if high > 1 << 62 {
            // A stage without memory: fitting will say so, with any split.
            return (0..mesh.pipeline).map(|s| layers * s / mesh.pipeline..layers * (s + 1) / mesh.pipeline).collect();
        }
    }
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if pack(&weights, &stages, middle).is_some() { high = middle } else { low = middle }
    }
    pack(&weights, &stages, high).expect("the bisection ends on a share that packs")
}

/// A pipeline stage's least device.
struct Stage {
    /// Bytes of embedding and head there.
    outer: u64,
    memory: u64,
}

/// Fills stage after stage up to `share` 65536ths of its memory, at least one layer each; `None` if layers remain.
fn pack(weights: &[u64], stages: &[Stage], share: u64) -> Option<Vec<Range<usize>>> {
    let mut out = Vec::with_capacity(stages.len());
    let mut start = 0;
    for (index, stage) in stages.iter().enumerate() {
        let room = (u128::from(stage.memory) * u128::from(share)) >> 16;
        // Later stages need a layer each.
        let end_max = weights.len() - (stages.len() - 1 - index);
        let (mut end, mut used) = (start, u128::from(stage.outer));
        while end < end_max && used + u128::from(weights[end]) <= room {
            used += u128::from(weights[end]);
            end += 1;
        }
        if end == start {
            return None;
        }
        out.push(start..end);
        start = end;
    }
    (start == weights.len()).then_some(out)
}
