//! Bytes of weights, cache and workspace a rank. The same declarations that the loader cuts by are counted here.

use crate::catalog::{self, Role, Shape};
use crate::cut::{self, Cut, Slice};
use crate::keep::{self, LANES, Stored, Window};
use crate::mesh::{Mesh, Place, RankId};
use crate::plan::{BLOCK_TOKENS, KernelFamily, Limits};
use crate::quant::{Dtype, Format};
use crate::rope::Rope;
use crate::spec::{Branch, Dense, Layer, Mixer, ModelSpec, Moe, QkNorm, QueryScale, Residual, Weigh};
use crate::storage::Storage;
use std::ops::{Add, Range};

/// What one rank needs, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RankBytes {
    pub weights: u64,
    /// Of one block ([`BLOCK_TOKENS`] positions) through all layers of the rank's stage.
    pub cache_per_block: u64,
    /// Activations of one step.
    pub workspace: u64,
    /// Cosines, sines and query scales by position, slopes by head.
    pub rope: u64,
}

impl RankBytes {
    /// All but the cache.
    pub fn fixed(&self) -> u64 {
        self.weights + self.workspace + self.rope
    }

    /// Everything, with `blocks` blocks of cache.
    pub fn total(&self, blocks: u64) -> u64 {
        self.fixed() + self.cache_per_block * blocks
    }
}

impl Add for RankBytes {
    type Output = RankBytes;

    fn add(self, more: RankBytes) -> RankBytes {
        RankBytes {
            weights: self.weights + more.weights,
            cache_per_block: self.cache_per_block + more.cache_per_block,
            workspace: self.workspace + more.workspace,
            rope: self.rope + more.rope,
        }
    }
}

/// What decides how a rank keeps its matrices.
#[derive(Debug, Clone, Copy)]
pub struct Keeping<'a> {
    pub storage: &'a Storage,
    /// What is computed in.
    pub dtype: Dtype,
    pub family: KernelFamily,
}

/// What the rank at `place` needs of `spec` under `mesh`, where its stage holds `layers`.
pub fn rank(
    spec: &ModelSpec,
    mesh: &Mesh,
    place: Place,
    layers: Range<usize>,
    keeping: Keeping<'_>,
    limits: &Limits,
) -> RankBytes {
    let outer = Outer::of(mesh, place.stage, spec);
    let mut bytes = RankBytes { weights: outer_weights(spec, mesh, place, outer, keeping), ..RankBytes::default() };
    let mut buffers = Buffers::new(keeping.dtype, limits);
    buffers.stream(spec, mesh, outer);
    let own = spec.layers.len();
    let predictors = if outer.head { own..own + spec.predictors.len() } else { own..own };
    for index in predictors.clone() {
        let shapes = catalog::predictor_shapes(spec);
        let one = |shape: &Shape| stack_bytes(&[*shape], (spec, Some(index)), mesh, place, keeping);
        bytes.weights += shapes.iter().map(one).sum::<u64>();
    }
    let (mut ropes, mut scales): (Vec<&Rope>, Vec<QueryScale>) = (Vec::new(), Vec::new());
    for run in alike(spec, layers.chain(predictors), keeping.storage) {
        let (layer, repeats) = (spec.layer(run.start), run.len() as u64);
        bytes.weights += repeats * layer_weights(spec, run.start, mesh, place, keeping);
        bytes.cache_per_block += repeats * block_bytes(layer, mesh, place, keeping.dtype);
        buffers.layer(spec, layer, mesh);
        if let Mixer::Grouped(g) = &layer.mixer
            && g.alibi
        {
            bytes.rope += repeats * (g.heads / mesh.tensor * F32) as u64;
        }
        if let Some(rope) = layer.mixer.rope()
            && !ropes.contains(&rope)
        {
            ropes.push(rope);
            bytes.rope += (limits.model_len_max * rope.dims * F32) as u64;
        }
        let scale = match &layer.mixer {
            Mixer::Grouped(g) => g.query_scale,
            Mixer::Latent(l) => l.query_scale,
        };
        if let Some(scale) = scale
            && !scales.contains(&scale)
        {
            scales.push(scale);
            bytes.rope += (limits.model_len_max * F32) as u64;
        }
    }
    bytes.workspace = buffers.bytes();
    bytes
}

/// What a draft model adds to each rank of the last stage under a plan of these `limits`: all of it, and a cache over the same
/// blocks.
pub fn draft(spec: &ModelSpec, keeping: Keeping<'_>, limits: &Limits) -> RankBytes {
    let place = Mesh::ONE.place(RankId(0));
    rank(spec, &Mesh::ONE, place, 0..spec.layers.len(), keeping, &limits.of_draft(spec))
}

/// Equal neighbours counted: models repeat a layer dozens of times.
pub fn runs(layers: &[Layer]) -> Vec<(&Layer, u64)> {
    let mut out: Vec<(&Layer, u64)> = Vec::new();
    for layer in layers {
        match out.last_mut() {
            Some((last, repeats)) if *last == layer => *repeats += 1,
            _ => out.push((layer, 1)),
        }
    }
    out
}

/// Runs of neighbours among `layers` that take the same bytes.
pub fn alike(spec: &ModelSpec, layers: impl IntoIterator<Item = usize>, storage: &Storage) -> Vec<Range<usize>> {
    let mut out: Vec<Range<usize>> = Vec::new();
    for index in layers {
        match out.last_mut() {
            Some(run)
                if run.end == index
                    && spec.layer(run.start) == spec.layer(index)
                    && storage.alike(run.start, index) =>
            {
                run.end = index + 1;
            }
            _ => out.push(index..index + 1),
        }
    }
    out
}

/// Which tensors outside layers a stage holds.
#[derive(Debug, Clone, Copy)]
struct Outer {
    first: bool,
    embedding: bool,
    head: bool,
}

impl Outer {
    fn of(mesh: &Mesh, stage: usize, spec: &ModelSpec) -> Outer {
        let head = stage + 1 == mesh.pipeline;
        Outer { first: stage == 0, embedding: stage == 0 || (head && catalog::embeds_last(spec)), head }
    }
}

fn outer_weights(spec: &ModelSpec, mesh: &Mesh, place: Place, outer: Outer, keeping: Keeping<'_>) -> u64 {
    let here = |shape: &&Shape| match shape.role {
        Role::Embedding => outer.embedding,
        Role::EmbeddingNorm | Role::EmbeddingNormBias => outer.first,
        _ => outer.head,
    };
    let shapes = catalog::outer_shapes(spec);
    let one = |shape: &Shape| stack_bytes(&[*shape], (spec, None), mesh, place, keeping);
    shapes.iter().filter(here).map(one).sum()
}

/// Weights of layer `index` on the rank at `place`.
pub fn layer_weights(spec: &ModelSpec, index: usize, mesh: &Mesh, place: Place, keeping: Keeping<'_>) -> u64 {
    let shapes = catalog::layer_shapes(spec, spec.layer(index));
    // What is stacked stands side by side.
    let stacks = shapes.chunk_by(|a, b| catalog::stack(a.role) == catalog::stack(b.role));
    stacks.map(|stack| stack_bytes(stack, (spec, Some(index)), mesh, place, keeping)).sum()
}

/// Bytes of one matrix, or vector, on a rank: of all the experts' that it holds, where it is an expert's.
fn stack_bytes(
    stack: &[Shape],
    (spec, layer): (&ModelSpec, Option<usize>),
    mesh: &Mesh,
    place: Place,
    keeping: Keeping<'_>,
) -> u64 {
    let rank = mesh.rank(place);
    let mut count = 1;
    let slices = stack.iter().filter_map(|shape| {
        let cut = match shape.cut {
            Cut::Expert { of, within, .. } => {
                count = of / mesh.expert;
                Cut::Expert { id: mesh.expert_share(rank).0 * count, of, within }
            }
            cut => cut,
        };
        Some((shape.role, cut::slice(cut, shape.rows, shape.cols, mesh, rank)?))
    });
    let slices: Vec<(Role, Slice)> = slices.collect();
    let (all, ranks) = cut::summed(stack[0].cut, stack[0].cols, mesh);
    count as u64 * kept_bytes(&slices, all / ranks, (spec, layer), keeping) as u64
}

/// Bytes of the slices of tensors of one stack as the engine keeps them: vectors in f32, matrices as [`keep`] says. The
/// latent's expansion is kept as two matrices a head, rearranged and so in the compute dtype.
pub fn kept_bytes(
    slices: &[(Role, Slice)],
    segments: usize,
    (spec, layer): (&ModelSpec, Option<usize>),
    keeping: Keeping<'_>,
) -> usize {
    let Some((role, slice)) = slices.first() else { return 0 };
    if role.is_vector() {
        return slices.iter().map(|(_, slice)| slice.rows.len() * slice.cols.len() * F32).sum();
    }
    let bytes = |windows: &[Window], segments| keep::bytes(windows, segments, keeping.dtype, keeping.family);
    let window = |(role, slice): &(Role, Slice)| Window {
        rows: slice.rows.len(),
        cols: slice.cols.len(),
        first: slice.cols.start,
        stored: keeping.storage.of(layer, *role),
    };
    let latent = layer.and_then(|layer| match &spec.layer(layer).mixer {
        Mixer::Latent(l) => Some(l),
        Mixer::Grouped(_) => None,
    });
    match (role, latent) {
        (Role::KvUp, Some(l)) => {
            let made = |rows, cols| bytes(&[Window { rows, cols, first: 0, stored: Stored::Plain(Format::F32) }], 1);
            let heads = slice.rows.len() / (l.nope_dim + l.value_dim);
            heads * (made(l.kv_rank, l.nope_dim) + made(l.value_dim, l.kv_rank))
        }
        (Role::Absorb | Role::Expand, Some(l)) => {
            let each = if *role == Role::Absorb { l.kv_rank } else { l.value_dim };
            slice.rows.len() / each * bytes(&[Window { rows: each, ..window(&slices[0]) }], 1)
        }
        _ => bytes(&slices.iter().map(window).collect::<Vec<_>>(), segments),
    }
}

fn padded(rows: usize) -> usize {
    rows.next_multiple_of(LANES)
}

/// One block's bytes of one layer: keys and values of the rank's heads, or the latent, which every slice keeps whole.
/// Values, and latent rows, are filled up to whole vectors.
fn block_bytes(layer: &Layer, mesh: &Mesh, place: Place, dtype: Dtype) -> u64 {
    let channels = match &layer.mixer {
        Mixer::Grouped(g) => {
            cut::kv_heads(g.kv_heads, mesh.tensor, place.slice).len() * (g.head_dim + padded(g.head_dim))
        }
        Mixer::Latent(l) => padded(l.kv_rank + l.rope_dim),
    };
    (BLOCK_TOKENS * channels * dtype.bytes()) as u64
}

const F32: usize = 4;
/// Rows whose logits the engine holds at once.
const LOGITS_ROWS: usize = 32;

/// The engine's activations. Its pool keeps buffers apart by width and by rows, in powers of two, and gives none back:
/// a ladder of them costs twice its largest, and layers that differ in width do not share.
struct Buffers<'a> {
    dtype: Dtype,
    limits: &'a Limits,
    /// Bytes of what lives all through a step.
    stream: usize,
    /// Bytes of each kind of mixer or branch, once.
    kinds: Vec<usize>,
}

impl<'a> Buffers<'a> {
    fn new(dtype: Dtype, limits: &'a Limits) -> Buffers<'a> {
        Buffers { dtype, limits, stream: 0, kinds: Vec::new() }
    }

    fn bytes(&self) -> u64 {
        (self.stream + self.kinds.iter().sum::<usize>()) as u64
    }

    /// All sizes of a buffer of up to `rows` rows of `bytes` bytes.
    fn ladder(rows: usize, bytes: usize) -> usize {
        2 * rows.next_power_of_two().max(LANES) * bytes
    }

    /// The residual stream, the sums of a branch and of its shared expert (f32), the normed input, once more in f32 where
    /// it replaces the stream; on the last stage a tile of logits, this rank's and whole ones.
    fn stream(&mut self, spec: &ModelSpec, mesh: &Mesh, outer: Outer) {
        let replaced = spec.embedding_norm.is_some() || spec.layers.iter().any(|l| l.residual == Residual::Normed);
        let row = spec.hidden * ((3 + usize::from(replaced)) * F32 + self.dtype.bytes());
        self.stream = Buffers::ladder(self.limits.step_tokens_max, row);
        if outer.head {
            let vocab = spec.vocab.div_ceil(mesh.tensor) + 2 * spec.vocab;
            self.stream += Buffers::ladder(LOGITS_ROWS, spec.hidden * (F32 + self.dtype.bytes()) + vocab * F32);
            if !spec.predictors.is_empty() {
                // Both halves of a predictor's projection; its rows lie where the stream's did.
                self.stream += Buffers::ladder(self.limits.step_tokens_max, 2 * spec.hidden / mesh.tensor * F32);
            }
        }
    }

    fn layer(&mut self, spec: &ModelSpec, layer: &Layer, mesh: &Mesh) {
        let tokens = self.limits.step_tokens_max;
        let mixer = Buffers::ladder(tokens, self.mixer_row(&layer.mixer, mesh));
        let mut found = vec![mixer];
        found.extend(layer.branches.iter().map(|b| match b {
            Branch::Dense(d) => Buffers::ladder(tokens, self.dense_row(d, mesh)),
            Branch::Moe(m) => self.mixture(spec, m, mesh),
        }));
        for kind in found {
            if !self.kinds.contains(&kind) {
                self.kinds.push(kind);
            }
        }
    }

    fn mixer_row(&self, mixer: &Mixer, mesh: &Mesh) -> usize {
        match mixer {
            Mixer::Grouped(g) => {
                // `[q | k | v]` in f32, the attended values in the compute dtype, squares of all heads normed as one.
                let squares = match g.qk_norm {
                    Some(QkNorm::Whole(_)) => (g.heads + g.kv_heads) * F32,
                    _ => 0,
                };
                let heads = g.heads / mesh.tensor;
                let kv_heads = cut::kv_heads(g.kv_heads, mesh.tensor, 0).len();
                (heads + 2 * kv_heads) * g.head_dim * F32 + heads * g.head_dim * self.dtype.bytes() + squares
            }
            Mixer::Latent(l) => {
                let heads = l.heads / mesh.tensor;
                let down = l.query_rank.map_or(0, |rank| rank * (F32 + self.dtype.bytes()));
                let query = heads * (l.nope_dim + l.rope_dim) * F32;
                down + query + (l.kv_rank + l.rope_dim) * F32 + heads * l.value_dim * self.dtype.bytes()
            }
        }
    }

    /// Gate and up (or up alone) in f32, their product in the compute dtype.
    fn dense_row(&self, d: &Dense, mesh: &Mesh) -> usize {
        d.intermediate / mesh.tensor * ((1 + usize::from(d.gated)) * F32 + self.dtype.bytes())
    }

    /// Router logits and choices; the outputs of this rank's own (token, expert) pairs; and for each pair that can meet
    /// on the rank input, weighed or not, gate and up, their product and output. Spread experts see the tokens of every lane, and what
    /// travels is packed once more on either side.
    fn mixture(&self, spec: &ModelSpec, m: &Moe, mesh: &Mesh) -> usize {
        let tokens = self.limits.step_tokens_max;
        let (lanes, held) = (if mesh.expert > 1 { mesh.data } else { 1 }, m.experts / mesh.expert);
        let routing = Buffers::ladder(tokens, m.experts * F32 + m.active * 8);
        let cut = m.intermediate / mesh.expert_cut();
        let weighed = if m.weigh == Weigh::Input { spec.hidden * self.dtype.bytes() } else { 0 };
        let pair = spec.hidden * (F32 + self.dtype.bytes()) + cut * (2 * F32 + self.dtype.bytes()) + weighed;
        let met = lanes * tokens * m.active.min(held);
        let mut bytes = routing + Buffers::ladder(met, pair);
        if lanes > 1 {
            let (own, row) = (tokens * m.active, spec.hidden * (F32 + self.dtype.bytes()));
            bytes += Buffers::ladder(own, spec.hidden * F32) + (own + met) * row;
        }
        bytes + m.shared.as_ref().map_or(0, |d| Buffers::ladder(tokens, self.dense_row(d, mesh)))
    }
}

#[cfg(test)]
mod tests {
    use super::{Keeping, RankBytes, rank};
    use crate::mesh::{Mesh, Place};
    use crate::plan::{KernelFamily, Limits};
    use crate::quant::{Dtype, Format};
    use crate::samples;
    use crate::storage::Storage;

    const LIMITS: Limits = Limits { model_len_max: 4096, step_tokens_max: 512, step_sequences_max: 64, blocks: 0 };

    fn bytes(sample: &str, mesh: Mesh, place: Place) -> RankBytes {
        let spec = samples::spec(sample).predicting(0).unwrap();
        let layers = spec.layers.len();
        let stage = layers * place.stage / mesh.pipeline..layers * (place.stage + 1) / mesh.pipeline;
        let storage = &Storage::stated(&spec, Format::Bf16);
        let keeping = Keeping { storage, dtype: Dtype::Bf16, family: KernelFamily::Vector };
        rank(&spec, &mesh, place, stage, keeping, &LIMITS)
    }

    const FIRST: Place = Place { stage: 0, lane: 0, slice: 0 };

    #[test]
    fn one_rank_holds_two_bytes_a_weight() {
        let found = bytes("deepseek", Mesh::ONE, FIRST).weights as f64;
        assert!((found / 2.0 - 671.0e9).abs() < 1e9, "{found}");
    }

    #[test]
    fn cache_is_keys_and_values_or_one_latent() {
        let eight = Mesh::new(1, 1, 8, 1).unwrap();
        assert_eq!(bytes("llama3", Mesh::ONE, FIRST).cache_per_block, 126 * 32 * 2 * 8 * 128 * 2);
        assert_eq!(bytes("llama3", eight, FIRST).cache_per_block, 126 * 32 * 2 * 128 * 2);
        assert_eq!(bytes("qwen3_moe", eight, FIRST).cache_per_block, 94 * 32 * 2 * 128 * 2, "four heads for eight");
        assert_eq!(bytes("deepseek", eight, FIRST).cache_per_block, 61 * 32 * 576 * 2, "every slice keeps the latent");
    }

    #[test]
    fn rope_tables_count_each_rope_once() {
        assert_eq!(bytes("llama", Mesh::ONE, FIRST).rope, 4096 * 128 * 4);
    }

    #[test]
    fn workspace_grows_with_a_step_and_shrinks_with_a_cut() {
        let one = bytes("mixtral", Mesh::ONE, FIRST).workspace;
        let cut = bytes("mixtral", Mesh::new(1, 1, 8, 1).unwrap(), FIRST).workspace;
        assert!(cut < one, "{cut} is not below {one}");
        assert!(one > 512 * 2 * (14336 * 8 + 4096 * 4), "less than its pairs");
    }
}
