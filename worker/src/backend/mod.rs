//! What a device can do: about two dozen fused inference operations. The engine is generic over [`Backend`]; a backend is
//! chosen at run time and passes one contract suite ([`suite`]), which compares it with naive loops.
//!
//! Numerics every backend keeps (ARCHITECTURE.md, "One answer"): a row's result depends on that row alone, sums run in
//! one fixed order, and inputs of multiplications are rounded once to the compute dtype.

pub(crate) mod contract;
pub mod cpu;
pub mod cuda;
pub mod suite;

use crate::collective::device::DeviceRows;
use crate::engine::batch::Batch;
use crate::load::beside::Beside;
use model::catalog::Fused;
use model::fault::Fault;
use model::quant::Format;
use model::rope::Rope;
use model::spec::{Activation, CacheKind, Norm, Router, Span};

/// A window of a tensor in host memory (usually the mapped checkpoint), not yet widened.
#[derive(Clone, Copy)]
pub struct MatrixView<'a> {
    pub format: Format,
    /// All bytes of the stored tensor, row-major, rows of `stored_cols` values.
    pub bytes: &'a [u8],
    pub stored_cols: usize,
    /// Which of the stored rows are the matrix's; all of them without.
    pub fused: Option<Fused>,
    /// Stored rows are the matrix's columns, and the other way round; plain numbers only.
    pub transposed: bool,
    /// Where `bytes` are the codes of a matrix whose scales are other tensors: what they need to have values. `format`
    /// is then that of the container alone.
    pub beside: Option<Beside<'a>>,
    /// The window in the matrix: first row, rows, first column, columns.
    pub row: usize,
    pub rows: usize,
    pub col: usize,
    pub cols: usize,
}

impl<'a> MatrixView<'a> {
    /// All of a matrix that is stored as it is.
    pub fn whole(format: Format, bytes: &'a [u8], rows: usize, cols: usize) -> MatrixView<'a> {
        let (fused, transposed, beside) = (None, false, None);
        MatrixView { format, bytes, stored_cols: cols, fused, transposed, beside, row: 0, rows, col: 0, cols }
    }

    /// The stored row of the window's row `row` (a stored column, where transposed).
    pub fn stored_row(&self, row: usize) -> usize {
        let row = self.row + row;
        self.fused.map_or(row, |fused| fused.stored_row(row))
    }
}

/// A kind of activation buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// f32: the residual stream, results of multiplications.
    Full,
    /// The compute dtype: inputs of multiplications.
    Input,
}

/// One token's chosen experts, per row `active` of them, ids ascending by choice order (best score first).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Routing {
    pub active: usize,
    pub ids: Vec<u32>,
    pub weights: Vec<f32>,
}

/// (row, expert) pairs sorted by local expert, rows ascending within: what grouped multiplications run over.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Grouping {
    /// Source row of each pair.
    pub rows: Vec<u32>,
    /// Routing weight of each pair.
    pub weights: Vec<f32>,
    /// Pairs of local expert `e` are `offsets[e]..offsets[e + 1]`.
    pub offsets: Vec<u32>,
}

/// A device that holds weights, cache and activations and runs the operations. Buffers are `[rows, cols]`, row-major;
/// operations work on the first `n` rows that their arguments name and leave the rest.
pub trait Backend: Sized + Send + 'static {
    /// A packed weight matrix `[out, in]`. Clones share it.
    type Matrix: Clone + Send + Sync;
    /// f32 vectors: norms, biases.
    type Vector: Send + Sync;
    type Buffer: Send;
    /// One layer's paged cache.
    type Cache: Send;
    /// A step's sequences, positions and block tables on the device.
    type Meta: Send;
    /// Cos and sin by position.
    type RopeTable: Send + Sync;

    /// Packs the rows of `parts`, stacked, into one matrix. `segments` equal parts of the inputs are summed apart and
    /// joined by the balanced tree (1 for a matrix whose inputs are never cut).
    fn matrix(&self, parts: &[MatrixView<'_>], segments: usize) -> Result<Self::Matrix, Fault>;
    /// The same from f32 rows (matrices that the loader had to rearrange).
    fn matrix_f32(&self, values: &[f32], rows: usize, cols: usize, segments: usize) -> Result<Self::Matrix, Fault>;
    fn vector(&self, values: &[f32]) -> Result<Self::Vector, Fault>;
    fn buffer(&self, rows: usize, cols: usize, kind: Kind) -> Result<Self::Buffer, Fault>;
    fn cache(&self, kind: CacheKind, blocks: usize) -> Result<Self::Cache, Fault>;
    fn rope_table(&self, rope: &Rope, positions: usize) -> Result<Self::RopeTable, Fault>;
    fn meta(&self, batch: &Batch) -> Result<Self::Meta, Fault>;

    /// Host access for collectives, sampling and tests. The CPU backend lends its own memory.
    fn host<'a>(&'a mut self, buffer: &'a mut Self::Buffer, rows: usize) -> Result<HostSlice<'a>, Fault>;
    /// Ends an access begun by `host` whose slice was written to.
    fn host_done(&mut self, buffer: &mut Self::Buffer, rows: usize) -> Result<(), Fault>;

    /// `out[i] = table[ids[i] - first]`, or zeros where the id is outside this rank's rows. Full.
    fn embed(&mut self, table: &Self::Matrix, first: u32, ids: &[u32], out: &mut Self::Buffer) -> Result<(), Fault>;
    /// Norms `n` rows: Full in; Input out, rounded once, or Full, as it is.
    fn norm(
        &mut self,
        x: &Self::Buffer,
        norm: &NormWeights<Self::Vector>,
        n: usize,
        out: &mut Self::Buffer,
    ) -> Result<(), Fault>;
    /// `out = x w^T (+ bias)`: Input in, Full out.
    fn matmul(
        &mut self,
        x: &Self::Buffer,
        w: &Self::Matrix,
        bias: Option<&Self::Vector>,
        n: usize,
        out: &mut Self::Buffer,
    ) -> Result<(), Fault>;
    /// `x += y (+ bias)`: Full both.
    fn add(
        &mut self,
        x: &mut Self::Buffer,
        y: &Self::Buffer,
        bias: Option<&Self::Vector>,
        n: usize,
    ) -> Result<(), Fault>;
    /// `out = act(gate, up)` for rows `[gate | up]`, twice as wide as `out`, or `out = act(up)` for rows as wide as
    /// `out`: Full in, Input out.
    fn activate(
        &mut self,
        x: &Self::Buffer,
        activation: Activation,
        n: usize,
        out: &mut Self::Buffer,
    ) -> Result<(), Fault>;

    /// [`Backend::activate`] of what [`Backend::matmul`] gives, to the same bits, for whoever can spare the way over memory: Input in,
    /// Input out. `between` is Full, as wide as `w` has rows; what it holds afterwards means nothing.
    fn matmul_activate(
        &mut self,
        x: &Self::Buffer,
        (w, bias): (&Self::Matrix, Option<&Self::Vector>),
        activation: Activation,
        n: usize,
        between: &mut Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<(), Fault> {
        self.matmul(x, w, bias, n, between)?;
        self.activate(between, activation, n, out)
    }

    /// Sums of squares of each query and key head of Full rows `[q | k | v]`. Those of the query heads go to the columns
    /// of Full `out` from `columns.0`, those of the key heads to the columns from `columns.1`, where given; every other
    /// column becomes zero. So ranks that own different columns complete them by adding their buffers.
    fn head_squares(
        &mut self,
        shape: &GroupedShape,
        qkv: &Self::Buffer,
        columns: (usize, Option<usize>),
        n: usize,
        out: &mut Self::Buffer,
    ) -> Result<(), Fault>;
    /// Norms (where given) and rotates query and key heads of Full rows `[q | k | v]` in place, multiplies each query
    /// with the number `query_scale` has for its position, and writes keys and values into the cache at the batch's slots.
    #[allow(clippy::too_many_arguments)] // one fused operation
    fn grouped_prepare(
        &mut self,
        shape: &GroupedShape,
        qkv: &mut Self::Buffer,
        norm: Option<HeadNorm<&Self::Vector, &Self::Buffer>>,
        rope: Option<&Self::RopeTable>,
        query_scale: Option<&Self::Vector>,
        meta: &Self::Meta,
        cache: &mut Self::Cache,
    ) -> Result<(), Fault>;
    /// Attention of the prepared queries over the cache: Input out, `[heads * head_dim]`.
    fn grouped_attention(
        &mut self,
        shape: &GroupedShape,
        qkv: &Self::Buffer,
        per_head: PerHead<&Self::Vector>,
        meta: &Self::Meta,
        cache: &Self::Cache,
        out: &mut Self::Buffer,
    ) -> Result<(), Fault>;

    /// Rotates the `rope_dim` part of each query head (`[nope | rope]` per head, Full, in place), norms the latent and
    /// rotates the shared key of Full rows `[latent | rope]`, and writes both into the cache. Whole query heads are
    /// multiplied with the number `query_scale` has for their position.
    #[allow(clippy::too_many_arguments)] // one fused operation
    fn latent_prepare(
        &mut self,
        shape: &LatentShape,
        q: &mut Self::Buffer,
        kv: &mut Self::Buffer,
        norm: &NormWeights<Self::Vector>,
        rope: &Self::RopeTable,
        query_scale: Option<&Self::Vector>,
        meta: &Self::Meta,
        cache: &mut Self::Cache,
    ) -> Result<(), Fault>;
    /// Absorbed attention: queries meet the latent through `absorb[h]` (`[kv_rank, nope]`), results leave it through
    /// `expand[h]` (`[value, kv_rank]`). Input out, `[heads * value]`.
    #[allow(clippy::too_many_arguments)] // one fused operation
    fn latent_attention(
        &mut self,
        shape: &LatentShape,
        q: &Self::Buffer,
        absorb: &[Self::Matrix],
        expand: &[Self::Matrix],
        meta: &Self::Meta,
        cache: &Self::Cache,
        out: &mut Self::Buffer,
    ) -> Result<(), Fault>;

    /// Chooses and weighs experts from router logits (Full).
    fn route(
        &mut self,
        logits: &Self::Buffer,
        router: &Router,
        active: usize,
        correction: Option<&Self::Vector>,
        n: usize,
    ) -> Result<Routing, Fault>;
    /// `out[p] = x[grouping.rows[p]] w[e]^T` for each pair `p` of expert `e`: Input in, Full out.
    fn expert_matmul(
        &mut self,
        x: &Self::Buffer,
        w: &[Self::Matrix],
        grouping: &Grouping,
        out: &mut Self::Buffer,
    ) -> Result<(), Fault>;
    /// [`Backend::activate`] of what [`Backend::expert_matmul`] gives, as [`Backend::matmul_activate`].
    fn expert_matmul_activate(
        &mut self,
        x: &Self::Buffer,
        w: &[Self::Matrix],
        grouping: &Grouping,
        activation: Activation,
        between: &mut Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<(), Fault> {
        self.expert_matmul(x, w, grouping, between)?;
        self.activate(between, activation, grouping.rows.len(), out)
    }
    /// [`Backend::expert_matmul`] where the input is already one row a pair.
    fn pair_matmul(
        &mut self,
        x: &Self::Buffer,
        w: &[Self::Matrix],
        grouping: &Grouping,
        out: &mut Self::Buffer,
    ) -> Result<(), Fault>;
    /// `out[p] = grouping.weights[p] * x[grouping.rows[p]]`, the product rounded once: Input in and out.
    fn weigh_rows(&mut self, x: &Self::Buffer, grouping: &Grouping, out: &mut Self::Buffer) -> Result<(), Fault>;
    /// `x[p] += biases[e]` for each pair `p` of expert `e`: Full.
    fn add_expert_bias(
        &mut self,
        x: &mut Self::Buffer,
        biases: &[Self::Vector],
        grouping: &Grouping,
    ) -> Result<(), Fault>;
    /// Weighs the pairs (one rounding), adds them by ascending expert inside each of `segments` equal ranges of local
    /// experts, and the ranges by the balanced tree. Full; rows without pairs become zero.
    fn combine(
        &mut self,
        pairs: &Self::Buffer,
        grouping: &Grouping,
        segments: usize,
        n: usize,
        out: &mut Self::Buffer,
    ) -> Result<(), Fault>;

    /// Where the first `rows` rows of a buffer lie in the memory of a device, for those who exchange them without the host. `None`
    /// where they lie in the host's.
    fn on_device(&self, _buffer: &Self::Buffer, _rows: usize) -> Result<Option<DeviceRows>, Fault> {
        Ok(None)
    }
    /// The balanced sum of `parts` times `rows` rows, one part behind the other in `all`, to the front of `out`: Full, equally wide.
    fn sum_parts(
        &mut self,
        all: &mut Self::Buffer,
        parts: usize,
        rows: usize,
        out: &mut Self::Buffer,
    ) -> Result<(), Fault> {
        contract::check_parts(parts)?;
        let all = match self.host(all, rows * parts)? {
            HostSlice::F32(all) => all.to_vec(),
            HostSlice::Bf16(_) => return Err(contract::wrong("parts of a sum are f32")),
        };
        let values = all.len() / parts;
        let terms: Vec<&[f32]> = all.chunks_exact(values.max(1)).collect();
        match self.host(out, rows)? {
            HostSlice::F32(out) if out.len() == values => {
                out.iter_mut().enumerate().for_each(|(at, out)| *out = contract::tree(&terms, at));
            }
            HostSlice::F32(out) => return Err(contract::wrong(format!("{} sums of {values} values", out.len()))),
            HostSlice::Bf16(_) => return Err(contract::wrong("sums are f32")),
        }
        self.host_done(out, rows)
    }

    /// Copies `rows` of `x` to the front of `out`: of one kind, equally wide.
    fn select(&mut self, x: &Self::Buffer, rows: &[u32], out: &mut Self::Buffer) -> Result<(), Fault>;
}

/// A norm's numbers on a device.
pub struct NormWeights<V> {
    pub norm: Norm,
    pub weight: V,
    /// Of norms that centre.
    pub bias: Option<V>,
}

/// How query and key heads are normed; see [`model::spec::QkNorm`].
#[derive(Debug, Clone, Copy)]
pub enum HeadNorm<V, B> {
    /// Each head by itself before the rotation, all with the same `[head_dim]` weights.
    Heads { query: V, key: V, eps: f32 },
    /// All query heads as one vector and all key heads as one, before the rotation. `query` and `key` are the weights of
    /// this rank's heads; `squares` holds the sums of squares of all heads of all ranks (see [`Backend::head_squares`]),
    /// the first `heads` of them of query heads.
    Whole { query: V, key: V, eps: f32, squares: B, heads: usize },
    /// Each head by itself, without weights, after the rotation.
    Rotated { eps: f32 },
}

/// One number for each of a rank's query heads, where its attention has them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PerHead<V> {
    /// A position `d` before the query's own scores `slope * d` less.
    pub slopes: Option<V>,
    /// The score of a position without a value, which takes part after all others.
    pub sinks: Option<V>,
}

impl<V> PerHead<V> {
    pub const NONE: PerHead<V> = PerHead { slopes: None, sinks: None };
}

/// A rank's part of a [`model::spec::Grouped`].
#[derive(Debug, Clone, PartialEq)]
pub struct GroupedShape {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub span: Span,
    pub scale: f32,
    pub rope: Option<Rope>,
}

/// A rank's part of a [`model::spec::Latent`].
#[derive(Debug, Clone, PartialEq)]
pub struct LatentShape {
    pub heads: usize,
    pub kv_rank: usize,
    pub nope_dim: usize,
    pub rope_dim: usize,
    pub value_dim: usize,
    pub scale: f32,
    pub rope: Rope,
}

/// Host memory of a buffer's first rows.
pub enum HostSlice<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [half::bf16]),
}
