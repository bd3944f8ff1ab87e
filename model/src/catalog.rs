//! Every tensor of a spec, declared once. The loader reads what is declared, the planner counts it, the engine asks for
//! it by id; nobody else knows a checkpoint's tensor names.

use crate::cut::Cut;

/// A tensor's place in the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TensorId {
    /// `None` for embedding, head and final norm.
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
    // dense branch
    Gate,
    Up,
    Down,
    GateBias,
    UpBias,
    DownBias,
    // mixture
    Router,
    RouterCorrection,
    SharedGate,
    SharedUp,
    SharedDown,
    ExpertGate,
    ExpertUp,
    ExpertDown,
}

/// One tensor: where it is in a checkpoint, its full shape, its cut.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorDecl {
    pub id: TensorId,
    pub source: Source,
    /// Output rows; a vector is `[1, cols]`... except that a vector which is cut with its matrix's rows (a bias) is
    /// `[rows, 1]`, so that the same cut slices both.
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

/// Which part of the named tensor it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Whole,
    /// Entry `index` of a stack of `of` matrices (GGUF experts).
    Stacked {
        index: usize,
        of: usize,
    },
}
