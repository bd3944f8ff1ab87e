//! Every tensor of a spec, declared once. The loader reads what is declared, the planner counts it, the engine asks for
//! it by id; nobody else knows a checkpoint's tensor names.
//!
//! A tied head has no declaration of its own: the engine multiplies with [`Role::Embedding`], which the last stage of
//! a pipeline then holds as well as the first ([`on_stage`]).

mod names;
mod shapes;

pub use names::{ROPE_FACTORS, dialect, gguf_name, ignored, predictor_copies, settle};
pub use shapes::{Shape, layer_shapes, outer_shapes, predictor_shapes, stack};

use crate::cut::{self, Cut, Slice};
use crate::mesh::{Mesh, RankId};
use crate::spec::ModelSpec;
use std::ops::Range;

/// A tensor's place in the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TensorId {
    /// `None` for embedding, head and final norm. Predictors' follow the last layer's.
    pub layer: Option<usize>,
    pub role: Role,
    /// For the routed experts' tensors.
    pub expert: Option<usize>,
}

/// What a tensor does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    Embedding,
    FinalNorm,
    Head,
    MixerNorm,
    BranchNorm,
    // of norms that centre
    EmbeddingNorm,
    EmbeddingNormBias,
    FinalNormBias,
    MixerNormBias,
    BranchNormBias,
    // grouped attention
    Query,
    Key,
    Value,
    Output,
    QueryBias,
    KeyBias,
    ValueBias,
    OutputBias,
    QueryNorm,
    KeyNorm,
    /// `[heads]`.
    Sinks,
    // latent attention
    /// `[query_rank, hidden]`.
    QueryDown,
    QueryDownNorm,
    /// `[heads * (nope + rope), query_rank]`; without a query rank [`Role::Query`] stands in its place.
    QueryUp,
    /// `[kv_rank + rope, hidden]`: the latent and the shared rotated key.
    KvDown,
    KvDownNorm,
    /// `[heads * (nope + value), kv_rank]`.
    KvUp,
    /// Its halves, where they are kept apart: `[heads * kv_rank, nope]`, each head's turned around.
    Absorb,
    /// `[heads * value, kv_rank]`.
    Expand,
    // dense branch
    Gate,
    Up,
    Down,
    GateBias,
    UpBias,
    DownBias,
    // mixture
    Router,
    RouterBias,
    RouterCorrection,
    SharedGate,
    SharedUp,
    SharedDown,
    ExpertGate,
    ExpertUp,
    ExpertDown,
    ExpertGateBias,
    ExpertUpBias,
    ExpertDownBias,
    // predictor, beside its layer's
    PredictorEmbeddingNorm,
    PredictorHiddenNorm,
    /// `[hidden, 2 * hidden]`: columns that meet the embedding, then those that meet the hidden row.
    PredictorProjection,
    PredictorNorm,
}

impl Role {
    /// Norms, biases and corrections, which are kept in f32.
    pub fn is_vector(self) -> bool {
        use Role::{
            BranchNorm, BranchNormBias, DownBias, EmbeddingNorm, EmbeddingNormBias, ExpertDownBias, ExpertGateBias,
            ExpertUpBias, FinalNorm, FinalNormBias, GateBias, KeyBias, KeyNorm, KvDownNorm, MixerNorm, MixerNormBias,
            OutputBias, PredictorEmbeddingNorm, PredictorHiddenNorm, PredictorNorm, QueryBias, QueryDownNorm,
            QueryNorm, RouterBias, RouterCorrection, Sinks, UpBias, ValueBias,
        };
        matches!(
            self,
            FinalNorm
                | MixerNorm
                | BranchNorm
                | QueryBias
                | KeyBias
                | ValueBias
                | OutputBias
                | QueryNorm
                | KeyNorm
                | QueryDownNorm
                | KvDownNorm
                | GateBias
                | UpBias
                | DownBias
                | RouterBias
                | RouterCorrection
                | EmbeddingNorm
                | EmbeddingNormBias
                | FinalNormBias
                | MixerNormBias
                | BranchNormBias
                | Sinks
                | ExpertGateBias
                | ExpertUpBias
                | ExpertDownBias
                | PredictorEmbeddingNorm
                | PredictorHiddenNorm
                | PredictorNorm
        )
    }
}

/// One tensor: where it is in a checkpoint, its full shape, its cut.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorDecl {
    pub id: TensorId,
    pub source: Source,
    /// Output rows. A vector over the whole hidden width, or one that every rank holds, is `[1, cols]`; a bias that is
    /// cut with its matrix's rows is `[rows, 1]`, so that the same cut slices both.
    pub rows: usize,
    pub cols: usize,
    pub cut: Cut,
}

/// Where a checkpoint keeps a tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Source {
    pub name: String,
    pub part: Part,
}

/// Which part of the named tensor it is, and how that lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Part {
    /// Entry of a stack of matrices (all experts in one tensor).
    pub stack: Option<Entry>,
    /// Rows that are shared out among several matrices in runs: query, key and value of each head (BLOOM), gate and up
    /// by turns (gpt-oss) or one after the other (Llama 4).
    pub fused: Option<Fused>,
    /// Stored as `[cols, rows]`.
    pub transposed: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub index: usize,
    pub of: usize,
}

/// Row `r` of the part is row `(r / run * of + index) * run + r % run` of the stored matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fused {
    pub index: usize,
    pub of: usize,
    /// Neighbouring rows that stay together.
    pub run: usize,
}

impl Part {
    /// All of a tensor that holds nothing else.
    pub const WHOLE: Part = Part { stack: None, fused: None, transposed: false };
}

impl Fused {
    pub const fn stored_row(&self, row: usize) -> usize {
        (row / self.run * self.of + self.index) * self.run + row % self.run
    }
}

/// Every tensor of `spec`, embedding first, then layer by layer, then predictors, final norm and head last.
pub fn tensors(spec: &ModelSpec) -> Vec<TensorDecl> {
    let [embedding, outer @ ..] = &outer_shapes(spec)[..] else { unreachable!("an embedding comes first") };
    let mut out = vec![declare(spec, None, None, embedding)];
    for (index, layer) in spec.all_layers().enumerate() {
        let predictor = index.checked_sub(spec.layers.len()).map(|_| predictor_shapes(spec)).unwrap_or_default();
        for shape in predictor.into_iter().chain(layer_shapes(spec, layer)) {
            match shape.cut {
                Cut::Expert { of, .. } => {
                    out.extend((0..of).map(|expert| declare(spec, Some(index), Some(expert), &shape)));
                }
                _ => out.push(declare(spec, Some(index), None, &shape)),
            }
        }
    }
    out.extend(outer.iter().map(|shape| declare(spec, None, None, shape)));
    out
}

/// What `spec`'s checkpoint calls a tensor, be it declared or not.
pub fn tensor_name(spec: &ModelSpec, id: &TensorId) -> String {
    names::source(spec, id).name
}

fn declare(spec: &ModelSpec, layer: Option<usize>, expert: Option<usize>, shape: &Shape) -> TensorDecl {
    let id = TensorId { layer, role: shape.role, expert };
    let cut = match (shape.cut, expert) {
        (Cut::Expert { of, within, .. }, Some(id)) => Cut::Expert { id, of, within },
        (cut, _) => cut,
    };
    TensorDecl { id, source: names::source(spec, &id), rows: shape.rows, cols: shape.cols, cut }
}

/// Whether pipeline stage `stage` of `stages` holds a tensor: layers by their range, the embedding and its norm
/// first (the table last too, where the head is tied to it or something predicts), predictors, final norm and head last.
pub fn on_stage(spec: &ModelSpec, id: &TensorId, stages: &[Range<usize>], stage: usize) -> bool {
    let last = stage + 1 == stages.len();
    match (id.layer, id.role) {
        (Some(layer), _) if layer >= spec.layers.len() => last,
        (Some(layer), _) => stages[stage].contains(&layer),
        (None, Role::Embedding) => stage == 0 || (last && embeds_last(spec)),
        (None, Role::EmbeddingNorm | Role::EmbeddingNormBias) => stage == 0,
        (None, _) => last,
    }
}

/// Whether the last stage needs the embedding table.
pub fn embeds_last(spec: &ModelSpec) -> bool {
    spec.head.tied || !spec.predictors.is_empty()
}

/// What `rank` holds: each of its tensors with the slice of it, in the order of [`tensors`]. Empty slices (vocabulary
/// rows past the end) are left out.
pub fn held(spec: &ModelSpec, mesh: &Mesh, stages: &[Range<usize>], rank: RankId) -> Vec<(TensorDecl, Slice)> {
    assert_eq!(stages.len(), mesh.pipeline, "one range of layers for each stage");
    let stage = mesh.place(rank).stage;
    let here = tensors(spec).into_iter().filter(|decl| on_stage(spec, &decl.id, stages, stage));
    let cut = here.filter_map(|decl| {
        let slice = cut::slice(decl.cut, decl.rows, decl.cols, mesh, rank)?;
        Some((decl, slice))
    });
    cut.filter(|(_, slice)| !slice.rows.is_empty() && !slice.cols.is_empty()).collect()
}

#[cfg(test)]
mod tests;
