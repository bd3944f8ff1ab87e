//! Both attentions: what is checked before a launch, and the structs that go with it.

use super::driver::Address;
use super::kernels::{
    AttendArgs, LatentArgs, Layout, MatmulArgs, PANEL, PrepareArgs, Row, SquaresArgs, THREADS, WARPS,
};
use super::memory::Piece;
use super::scratch::Use;
use super::{Buffer, CudaBackend, Matrix, Vector, address};
use crate::backend::contract::{ensure, rows};
use crate::backend::{GroupedShape, HeadNorm, LatentShape, NormWeights, PerHead};
use crate::engine::batch::Batch;
use model::fault::Fault;
use model::plan::BLOCK_TOKENS;
use model::quant::Dtype;
use model::rope::{self, Rope};
use model::spec::{CacheKind, NormForm, Span};

/// The widest head: a block's warps keep their answers in shared memory.
const WIDTH_MAX: usize = 1024;
/// Rows that pass through the scratch memory of latent attention together.
const TOGETHER: usize = 256;

/// A step's sequences on the device.
pub struct Meta {
    /// [`Row`]s, then block tables, then where each sequence's table begins.
    piece: Piece,
    tables: Address,
    starts: Address,
    rows: usize,
    /// One past the last position, and past the last block.
    positions: usize,
    blocks: usize,
}

/// One layer's cache, in the compute dtype.
pub struct Cache {
    kind: CacheKind,
    layout: Layout,
    blocks: usize,
    piece: Piece,
}

/// Cosines, then sines, by position.
pub struct RopeTable {
    piece: Piece,
    positions: usize,
    pairs: usize,
}

impl RopeTable {
    fn sin(&self) -> Address {
        self.piece.at + (self.positions * self.pairs * 4) as u64
    }
}

fn turn(rope: &Rope) -> u32 {
    if rope.layout == rope::Layout::Half { 1 } else { 2 }
}

/// The address of an element.
fn element(base: Address, dtype: Dtype, index: usize) -> Address {
    base + (index * dtype.bytes()) as u64
}

impl CudaBackend {
    pub(super) fn make_meta(&self, batch: &Batch) -> Result<Meta, Fault> {
        let rows = rows(batch)?;
        let (mut tables, mut starts) = (Vec::new(), Vec::new());
        for sequence in &batch.spans {
            starts.push(tables.len() as u32);
            tables.extend(sequence.blocks.iter().map(|block| block.0));
        }
        let positions = rows.iter().map(|row| row.position + 1).max().unwrap_or(0);
        let words = rows.iter().flat_map(|r| [r.position as u32, r.sequence as u32, r.block.0, r.slot as u32]);
        let words: Vec<u32> = words.collect();
        let (tables_at, starts_at) = (words.len(), words.len() + tables.len());
        let blocks = tables.iter().max().map_or(0, |block| *block as usize + 1);
        let piece = self.device.upload(&[words, tables, starts].concat())?;
        let at = |word: usize| piece.at + 4 * word as u64;
        Ok(Meta { tables: at(tables_at), starts: at(starts_at), rows: rows.len(), positions, blocks, piece })
    }

    pub(super) fn make_cache(&self, kind: CacheKind, blocks: usize) -> Result<Cache, Fault> {
        let slots = BLOCK_TOKENS as u32;
        let (layout, width) = match kind {
            // Keys as [channel][slot], so that the lanes of a span read neighbours; values as [slot][channel].
            CacheKind::Paged { kv_heads, head_dim } => {
                let dim = head_dim as u32;
                let (head, value) = (2 * slots * dim, slots * dim);
                let block = kv_heads as u64 * u64::from(head);
                (Layout { block, head, key_d: slots, key_t: 1, value, value_t: dim }, head_dim)
            }
            CacheKind::Latent { kv_rank, rope_dim } => {
                let width = (kv_rank + rope_dim) as u32;
                let block = u64::from(slots * width);
                (Layout { block, head: 0, key_d: 1, key_t: width, value: 0, value_t: width }, kv_rank + rope_dim)
            }
        };
        ensure(width <= WIDTH_MAX, || format!("{width} channels in a head, {WIDTH_MAX} at most"))?;
        let bytes = blocks.checked_mul(layout.block as usize * self.dtype.bytes());
        let bytes = bytes
            .ok_or_else(|| Fault::new(model::fault::FaultKind::OutOfMemory, format!("{blocks} blocks overflow")))?;
        Ok(Cache { kind, layout, blocks, piece: self.zeroed(bytes)? })
    }

    pub(super) fn make_table(&self, rope: &Rope, positions: usize) -> Result<RopeTable, Fault> {
        let table = rope.table(positions);
        let piece = self.device.upload(&[table.cos, table.sin].concat())?;
        Ok(RopeTable { piece, positions, pairs: table.pairs })
    }

    fn check_grouped(shape: &GroupedShape, qkv: &Buffer, meta: &Meta, cache: &Cache) -> Result<Address, Fault> {
        let GroupedShape { heads, kv_heads, head_dim, .. } = *shape;
        ensure(cache.kind == CacheKind::Paged { kv_heads, head_dim }, || {
            format!("{:?} can't serve {shape:?}", cache.kind)
        })?;
        ensure(kv_heads > 0 && heads.is_multiple_of(kv_heads), || format!("{heads} heads share {kv_heads}"))?;
        ensure(meta.blocks <= cache.blocks, || format!("block {} of a cache of {}", meta.blocks, cache.blocks))?;
        let width = (heads + 2 * kv_heads) * head_dim;
        ensure(qkv.cols == width, || format!("rows of {} for {width}", qkv.cols))?;
        qkv.full(meta.rows)
    }

    fn check_table(table: &RopeTable, meta: &Meta, width: usize) -> Result<(), Fault> {
        ensure(meta.positions <= table.positions && 2 * table.pairs <= width, || {
            format!("a table of {} positions, {} pairs for {}, {width}", table.positions, table.pairs, meta.positions)
        })
    }

    fn check_scales(scales: Option<&Vector>, meta: &Meta) -> Result<Address, Fault> {
        ensure(scales.is_none_or(|s| meta.positions <= s.len), || "fewer query scales than positions".into())?;
        Ok(address(scales))
    }

    pub(super) fn squares(
        &self,
        shape: &GroupedShape,
        qkv: &Buffer,
        (first, keys): (usize, Option<usize>),
        n: usize,
        out: &Buffer,
    ) -> Result<(), Fault> {
        let GroupedShape { heads, kv_heads, head_dim, .. } = *shape;
        ensure(qkv.cols == (heads + 2 * kv_heads) * head_dim, || format!("rows of {} for {shape:?}", qkv.cols))?;
        ensure(first + heads <= out.cols && keys.is_none_or(|keys| keys + kv_heads <= out.cols), || {
            format!("{heads} and {kv_heads} heads at columns {first}, {keys:?} of {}", out.cols)
        })?;
        let args = SquaresArgs {
            qkv: qkv.full(n)?,
            out: out.full(n)?,
            n: n as u32,
            cols: out.cols as u32,
            heads: heads as u32,
            kv_heads: kv_heads as u32,
            dim: head_dim as u32,
            first: first as u32,
            keys: keys.unwrap_or(0) as u32,
            counts: u32::from(keys.is_some()),
        };
        let grid = [(n * out.cols).div_ceil(WARPS), 1, 1];
        self.device.driver.launch(self.device.kernels.head_squares, grid, THREADS, 0, &args)
    }

    #[allow(clippy::too_many_arguments)] // the contract's
    pub(super) fn prepare_grouped(
        &self,
        shape: &GroupedShape,
        qkv: &Buffer,
        norm: Option<HeadNorm<&Vector, &Buffer>>,
        rope: Option<&RopeTable>,
        query_scale: Option<&Vector>,
        meta: &Meta,
        cache: &Cache,
    ) -> Result<(), Fault> {
        let at = Self::check_grouped(shape, qkv, meta, cache)?;
        ensure(rope.is_some() == shape.rope.is_some(), || "a rotation and its table come together".into())?;
        if let Some(table) = rope {
            Self::check_table(table, meta, shape.head_dim)?;
        }
        let GroupedShape { heads, kv_heads, head_dim, .. } = *shape;
        let fits = |weights: &Vector, n: usize| {
            ensure(weights.len == n, || format!("a norm of {} for {n} channels", weights.len))?;
            Ok(weights.piece.at)
        };
        let mut args = PrepareArgs {
            qkv: at,
            cache: cache.piece.at,
            rows: meta.piece.at,
            query_weight: 0,
            key_weight: 0,
            squares: 0,
            cos: rope.map_or(0, |table| table.piece.at),
            sin: rope.map_or(0, RopeTable::sin),
            query_scale: Self::check_scales(query_scale, meta)?,
            layout: cache.layout,
            n: meta.rows as u32,
            heads: heads as u32,
            kv_heads: kv_heads as u32,
            dim: head_dim as u32,
            norm: 0,
            turn: shape.rope.as_ref().map_or(0, turn),
            pairs: rope.map_or(0, |table| table.pairs as u32),
            square_cols: 0,
            all_heads: 0,
            eps: 0.0,
        };
        match norm {
            None => {}
            Some(HeadNorm::Heads { query, key, eps }) => {
                (args.query_weight, args.key_weight) = (fits(query, head_dim)?, fits(key, head_dim)?);
                (args.norm, args.eps) = (1, eps);
            }
            Some(HeadNorm::Whole { query, key, eps, squares, heads: all }) => {
                ensure(heads <= all && all + kv_heads <= squares.cols, || {
                    format!("{heads} of {all} heads and {kv_heads} key heads in rows of {} squares", squares.cols)
                })?;
                args.query_weight = fits(query, heads * head_dim)?;
                args.key_weight = fits(key, kv_heads * head_dim)?;
                (args.squares, args.square_cols) = (squares.full(meta.rows)?, squares.cols as u32);
                (args.all_heads, args.norm, args.eps) = (all as u32, 2, eps);
            }
            Some(HeadNorm::Rotated { eps }) => (args.norm, args.eps) = (3, eps),
        }
        let grid = [(meta.rows * (heads + 2 * kv_heads)).div_ceil(WARPS), 1, 1];
        self.device.driver.launch(self.device.kernels.prepare[self.which()], grid, THREADS, 0, &args)
    }

    pub(super) fn attend_grouped(
        &self,
        shape: &GroupedShape,
        qkv: &Buffer,
        per_head: PerHead<&Vector>,
        meta: &Meta,
        cache: &Cache,
        out: &Buffer,
    ) -> Result<(), Fault> {
        let q = Self::check_grouped(shape, qkv, meta, cache)?;
        let GroupedShape { heads, kv_heads, head_dim, .. } = *shape;
        ensure(out.cols == heads * head_dim && out.dtype == self.dtype, || {
            format!("{} outputs for {shape:?}", out.cols)
        })?;
        ensure([per_head.slopes, per_head.sinks].iter().flatten().all(|each| each.len == heads), || {
            format!("one number for each of {heads} heads")
        })?;
        let (sees, size) = match shape.span {
            Span::Full => (0, 0),
            Span::Window(size) => (1, size),
            Span::Chunk(size) => (2, size),
        };
        let args = AttendArgs {
            q,
            q_rest: 0,
            cache: cache.piece.at,
            out: out.check(meta.rows)?,
            rows: meta.piece.at,
            tables: meta.tables,
            starts: meta.starts,
            slopes: address(per_head.slopes),
            sinks: address(per_head.sinks),
            layout: cache.layout,
            n: meta.rows as u32,
            heads: heads as u32,
            group: (heads / kv_heads) as u32,
            first: head_dim as u32,
            q_row: qkv.cols as u32,
            q_head: head_dim as u32,
            rest: 0,
            rest_row: 0,
            rest_head: 0,
            value_dim: head_dim as u32,
            sees,
            size: size as u32,
            scale: shape.scale,
        };
        self.attend(&args)
    }

    fn attend(&self, args: &AttendArgs) -> Result<(), Fault> {
        let grid = [((args.n * args.heads) as usize).div_ceil(WARPS), 1, 1];
        let shared = WARPS * args.value_dim as usize * 4;
        self.device.driver.launch(self.device.kernels.attend[self.which()], grid, THREADS, shared, args)
    }

    fn check_latent(shape: &LatentShape, meta: &Meta, cache: &Cache) -> Result<(), Fault> {
        let kind = CacheKind::Latent { kv_rank: shape.kv_rank, rope_dim: shape.rope_dim };
        ensure(cache.kind == kind, || format!("{:?} can't serve {shape:?}", cache.kind))?;
        ensure(meta.blocks <= cache.blocks, || format!("block {} of a cache of {}", meta.blocks, cache.blocks))
    }

    #[allow(clippy::too_many_arguments)] // the contract's
    pub(super) fn prepare_latent(
        &self,
        shape: &LatentShape,
        q: &Buffer,
        kv: &Buffer,
        norm: &NormWeights<Vector>,
        rope: &RopeTable,
        query_scale: Option<&Vector>,
        meta: &Meta,
        cache: &Cache,
    ) -> Result<(), Fault> {
        Self::check_latent(shape, meta, cache)?;
        let LatentShape { heads, kv_rank, nope_dim, rope_dim, .. } = *shape;
        ensure(q.cols == heads * (nope_dim + rope_dim) && kv.cols == kv_rank + rope_dim, || {
            format!("rows of {} and {} for {shape:?}", q.cols, kv.cols)
        })?;
        ensure(norm.norm.form == NormForm::Rms && norm.weight.len == kv_rank, || {
            format!("a {:?} norm of {} for {shape:?}", norm.norm.form, norm.weight.len)
        })?;
        Self::check_table(rope, meta, rope_dim)?;
        ensure(2 * rope.pairs == rope_dim, || format!("{} rotated pairs of {rope_dim} channels", rope.pairs))?;
        let args = LatentArgs {
            q: q.full(meta.rows)?,
            kv: kv.full(meta.rows)?,
            cache: cache.piece.at,
            rows: meta.piece.at,
            weight: norm.weight.piece.at,
            cos: rope.piece.at,
            sin: rope.sin(),
            query_scale: Self::check_scales(query_scale, meta)?,
            layout: cache.layout,
            n: meta.rows as u32,
            heads: heads as u32,
            rank: kv_rank as u32,
            nope: nope_dim as u32,
            pairs: rope.pairs as u32,
            turn: turn(&shape.rope),
            eps: norm.norm.eps,
        };
        let grid = [(meta.rows * (heads + 1)).div_ceil(WARPS), 1, 1];
        self.device.driver.launch(self.device.kernels.latent[self.which()], grid, THREADS, 0, &args)
    }

    #[allow(clippy::too_many_arguments)] // the contract's
    pub(super) fn attend_latent(
        &mut self,
        shape: &LatentShape,
        q: &Buffer,
        absorb: &[Matrix],
        expand: &[Matrix],
        meta: &Meta,
        cache: &Cache,
        out: &Buffer,
    ) -> Result<(), Fault> {
        Self::check_latent(shape, meta, cache)?;
        let LatentShape { heads, kv_rank, nope_dim, rope_dim, value_dim, .. } = *shape;
        let all = |w: &[Matrix], rows, cols| w.len() == heads && w.iter().all(|m| (m.rows(), m.cols()) == (rows, cols));
        ensure(heads > 0 && all(absorb, kv_rank, nope_dim) && all(expand, value_dim, kv_rank), || {
            format!("absorbing and expanding matrices do not fit {shape:?}")
        })?;
        let head = nope_dim + rope_dim;
        ensure(q.cols == heads * head && out.cols == heads * value_dim && out.dtype == self.dtype, || {
            format!("rows of {} to {} for {shape:?}", q.cols, out.cols)
        })?;
        let (q, out) = (q.full(meta.rows)?, out.check(meta.rows)?);
        let room = TOGETHER.min(meta.rows) * heads;
        let inputs = self.scratch.room(Use::Inputs, room * nope_dim.max(kv_rank) * 4)?;
        let products = self.scratch.room(Use::Products, room * value_dim.max(kv_rank) * 4)?;
        let rest = self.scratch.room(Use::Answers, room * nope_dim * 4)?;
        for first in (0..meta.rows).step_by(TOGETHER) {
            let n = TOGETHER.min(meta.rows - first);
            let q = element(q, Dtype::F32, first * heads * head);
            // Queries to the latent's space; a query's first part is rounded as an input of that multiplication.
            self.round(q, head, rest, nope_dim, n * heads)?;
            self.each_head(absorb, (rest, nope_dim), (products, kv_rank), n)?;
            self.attend(&AttendArgs {
                q: products,
                q_rest: element(q, Dtype::F32, nope_dim),
                cache: cache.piece.at,
                out: inputs,
                rows: meta.piece.at + (first * size_of::<Row>()) as u64,
                tables: meta.tables,
                starts: meta.starts,
                slopes: 0,
                sinks: 0,
                layout: cache.layout,
                n: n as u32,
                heads: heads as u32,
                group: heads as u32,
                first: kv_rank as u32,
                q_row: (heads * kv_rank) as u32,
                q_head: kv_rank as u32,
                rest: rope_dim as u32,
                rest_row: (heads * head) as u32,
                rest_head: head as u32,
                value_dim: kv_rank as u32,
                sees: 0,
                size: 0,
                scale: shape.scale,
            })?;
            self.each_head(expand, (inputs, kv_rank), (products, value_dim), n)?;
            let out = element(out, self.dtype, first * heads * value_dim);
            self.round(products, heads * value_dim, out, heads * value_dim, n)?;
        }
        Ok(())
    }

    /// `out[row][head] = x[row][head] w[head]^T`.
    fn each_head(
        &mut self,
        w: &[Matrix],
        (x, inputs): (Address, usize),
        (out, outputs): (Address, usize),
        n: usize,
    ) -> Result<(), Fault> {
        let many = self.weights_of(w)?;
        let args = MatmulArgs {
            x,
            out,
            bias: 0,
            one: 0,
            many,
            tiles: 0,
            picks: 0,
            n: n as u32,
            x_stride: (w.len() * inputs) as u32,
            x_step: inputs as u32,
            out_stride: (w.len() * outputs) as u32,
            out_step: outputs as u32,
        };
        let (kernel, each) = self.product(w, n);
        self.multiply(kernel, [outputs.div_ceil(PANEL), n.div_ceil(each), w.len()], &args)
    }
}
