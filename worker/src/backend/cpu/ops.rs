//! [`Backend`] for the CPU: checks at the door, then kernels.

use super::buffer::{Buffer, Data};
use super::simd::activations::{Activate, Alone, ClampedSwiglu, Gated, GeluTanh, Silu};
use super::simd::grouped;
use super::simd::lanes::Element;
use super::simd::latent;
use super::simd::norms::{LayerNorm, Norm};
use super::simd::panel::{self, Source};
use super::simd::rows::{Add, Scaled};
use super::{Cache, CpuBackend, Matrix, Meta, Place, Vector, combine, route, weights};
use crate::backend::contract::{ensure, wrong};
use crate::backend::{
    Backend, GroupedShape, Grouping, HeadNorm, HostSlice, Kind, LatentShape, MatrixView, NormWeights, PerHead, Routing,
};
use crate::engine::batch::Batch;
use model::fault::Fault;
use model::quant::Dtype;
use model::rope::{Rope, Table};
use model::spec::{Activation, CacheKind, NormForm, Router};

/// Values that make one task of a row-wise operation.
const TASK_VALUES: usize = 8192;

fn grain(cols: usize) -> usize {
    (TASK_VALUES / cols.max(1)).max(1)
}

/// Runs `$body` with `$activation` bound to the kernel of what `$of` names.
macro_rules! with_kernel {
    ($of:expr, $activation:ident => $body:expr) => {
        match $of {
            Activation::Silu => {
                let $activation = Silu;
                $body
            }
            Activation::GeluTanh => {
                let $activation = GeluTanh;
                $body
            }
            Activation::ClampedSwiglu { alpha, limit } => {
                let $activation = ClampedSwiglu { alpha, limit };
                $body
            }
        }
    };
}

/// Runs `$body` with `$a`, `$b`.. bound to slices of one dtype, or refuses buffers of different dtypes.
macro_rules! by_dtype {
    ([$($name:ident = $data:expr),+] => $body:expr) => {
        match ($($data,)+) {
            ($(Data::F32($name),)+) => $body,
            ($(Data::Bf16($name),)+) => $body,
            #[allow(unreachable_patterns)] // where there is one operand
            _ => return Err(wrong("operands of different dtypes")),
        }
    };
}

pub(super) use {by_dtype, with_kernel};

impl CpuBackend {
    pub(super) fn input<'a>(&self, x: &'a Buffer) -> Result<&'a Data, Fault> {
        let fits = matches!((&x.data, self.dtype), (Data::F32(_), Dtype::F32) | (Data::Bf16(_), Dtype::Bf16));
        if fits { Ok(&x.data) } else { Err(wrong("an Input buffer is needed, a Full one was given")) }
    }

    /// A grouped multiplication; where it `gathers` a pair's source row is the one that it names, else its own.
    fn experts(
        &mut self,
        x: &Buffer,
        w: &[Matrix],
        grouping: &Grouping,
        gathers: bool,
        out: &mut Buffer,
    ) -> Result<(), Fault> {
        let (pairs, offsets) = (grouping.rows.len(), &grouping.offsets);
        let (rows, cols) = w.first().map_or((out.cols, x.cols), |first| (first.0.rows, first.0.cols));
        self.check_experts(x, w, grouping, gathers, (rows, cols))?;
        let picks = gathers.then_some(&grouping.rows[..]);
        ensure(out.cols == rows, || format!("[{rows}, {cols}] weights, [{}] outputs", out.cols))?;
        let active = &self.scratch.active;
        let out = out.full_mut(pairs)?;
        by_dtype!([x = self.input(x)?] => {
            let x = Source { values: x, start: 0, stride: cols, picks };
            panel::multiply_experts(&self.pool, self.level, self.family, x, w, offsets, active, out)
        });
        Ok(())
    }

    /// Whether pairs, experts and inputs fit together; notes the experts that have pairs.
    pub(super) fn check_experts(
        &mut self,
        x: &Buffer,
        w: &[Matrix],
        grouping: &Grouping,
        gathers: bool,
        (rows, cols): (usize, usize),
    ) -> Result<(), Fault> {
        grouping.check(w.len())?;
        ensure(w.iter().all(|m| m.0.rows == rows && m.0.cols == cols), || "experts differ in shape".into())?;
        ensure(x.cols == cols, || format!("[{}] inputs, [{rows}, {cols}] weights", x.cols))?;
        x.check(if gathers { grouping.rows_read() } else { grouping.rows.len() })?;
        let (offsets, active) = (&grouping.offsets, &mut self.scratch.active);
        active.clear();
        active.extend((0..w.len()).filter(|e| offsets[e + 1] > offsets[*e]).map(|e| e as u32));
        Ok(())
    }

    fn activate_rows<T: Element, A: Activate + Sync>(
        &self,
        activation: A,
        (x, cols): (&[f32], usize),
        n: usize,
        (out, width): (&mut [T], usize),
    ) {
        let level = self.level;
        self.pool.rows(out, width, n, grain(width), &|row, out| {
            let x = &x[row * cols..][..cols];
            if cols == width {
                level.run(Alone { activation, x, out });
            } else {
                let (gate, up) = x.split_at(width);
                level.run(Gated { activation, gate, up, out });
            }
        });
    }

    fn layout_of(&self, shape: &GroupedShape) -> grouped::Layout {
        grouped::Layout::new(shape.kv_heads, shape.head_dim, self.dtype, self.family)
    }

    fn grouped_layout(&self, shape: &GroupedShape, meta: &Meta, cache: &Cache) -> Result<(), Fault> {
        let layout = self.layout_of(shape);
        ensure(cache.place == Place::Grouped(layout), || format!("{:?} can't serve {layout:?}", cache.place))?;
        ensure(shape.kv_heads > 0 && shape.heads.is_multiple_of(shape.kv_heads), || {
            format!("{} heads share {} key/value heads", shape.heads, shape.kv_heads)
        })?;
        meta.fits(cache.blocks)
    }

    fn latent_layout(&self, shape: &LatentShape, meta: &Meta, cache: &Cache) -> Result<(), Fault> {
        let layout = latent::Layout { kv_rank: shape.kv_rank, rope_dim: shape.rope_dim };
        ensure(cache.place == Place::Latent(layout), || format!("{:?} can't serve {layout:?}", cache.place))?;
        meta.fits(cache.blocks)
    }
}

/// A rotation table that covers a batch and fits in `width` channels.
fn check_table(table: &Table, meta: &Meta, width: usize) -> Result<(), Fault> {
    let positions = table.cos.len().checked_div(table.pairs).unwrap_or(usize::MAX);
    let most = meta.rows.iter().map(|r| r.position + 1).max().unwrap_or(0);
    ensure(most <= positions && 2 * table.pairs <= width, || {
        format!("a table of {positions} positions and {} pairs for {most} and {width} channels", table.pairs)
    })
}

/// One number for each position of a batch.
fn check_scales<'a>(scales: Option<&'a Vector>, meta: &Meta) -> Result<Option<&'a [f32]>, Fault> {
    let most = meta.rows.iter().map(|r| r.position + 1).max().unwrap_or(0);
    let scales = scales.map(|v| &v.0[..]);
    ensure(scales.is_none_or(|s| most <= s.len()), || format!("fewer query scales than {most} positions"))?;
    Ok(scales)
}

/// Copies `rows` of `x`, `cols` wide.
fn pick<T: Copy + Send + Sync>(pool: &super::simd::pool::Pool, x: &[T], (rows, cols): (&[u32], usize), out: &mut [T]) {
    pool.rows(&mut out[..rows.len() * cols], cols, rows.len(), grain(cols), &|row, out| {
        out.copy_from_slice(&x[rows[row] as usize * cols..][..cols]);
    });
}

/// A norm that fits the heads of `n` rows.
fn head_norm<'a>(
    shape: &GroupedShape,
    norm: HeadNorm<&'a Vector, &'a Buffer>,
    n: usize,
) -> Result<HeadNorm<&'a [f32], &'a [f32]>, Fault> {
    let fits = |weights: &'a Vector, n: usize| {
        ensure(weights.0.len() == n, || format!("a norm of {} for {n} channels", weights.0.len()))?;
        Ok(&weights.0[..])
    };
    let GroupedShape { heads: own, kv_heads, head_dim, .. } = *shape;
    Ok(match norm {
        HeadNorm::Rotated { eps } => HeadNorm::Rotated { eps },
        HeadNorm::Heads { query, key, eps } => {
            HeadNorm::Heads { query: fits(query, head_dim)?, key: fits(key, head_dim)?, eps }
        }
        HeadNorm::Whole { query, key, eps, squares, heads } => {
            ensure(own <= heads && heads + kv_heads <= squares.cols, || {
                format!("{own} of {heads} heads and {kv_heads} key heads in rows of {} squares", squares.cols)
            })?;
            let (query, key) = (fits(query, own * head_dim)?, fits(key, kv_heads * head_dim)?);
            HeadNorm::Whole { query, key, eps, squares: squares.full(n)?, heads }
        }
    })
}

impl Backend for CpuBackend {
    type Matrix = Matrix;
    type Vector = Vector;
    type Buffer = Buffer;
    type Cache = Cache;
    type Meta = Meta;
    type RopeTable = Table;

    fn matrix(&self, parts: &[MatrixView<'_>], segments: usize) -> Result<Matrix, Fault> {
        let made = weights::pack(&self.pool, self.dtype, self.family, parts, segments)?;
        self.count(made.bytes());
        Ok(made)
    }

    fn matrix_f32(&self, values: &[f32], rows: usize, cols: usize, segments: usize) -> Result<Matrix, Fault> {
        let made = weights::pack_f32(&self.pool, self.dtype, self.family, values, (rows, cols), segments)?;
        self.count(made.bytes());
        Ok(made)
    }

    fn vector(&self, values: &[f32]) -> Result<Vector, Fault> {
        self.count(std::mem::size_of_val(values));
        Ok(Vector(values.to_vec()))
    }

    fn buffer(&self, rows: usize, cols: usize, kind: Kind) -> Result<Buffer, Fault> {
        let dtype = if kind == Kind::Full { Dtype::F32 } else { self.dtype };
        let len = rows.checked_mul(cols).ok_or_else(|| wrong(format!("{rows} x {cols} overflows")))?;
        Ok(Buffer { rows, cols, data: Data::zeroed(dtype, len)? })
    }

    fn cache(&self, kind: CacheKind, blocks: usize) -> Result<Cache, Fault> {
        Cache::new(kind, blocks, (self.dtype, self.family))
    }

    fn rope_table(&self, rope: &Rope, positions: usize) -> Result<Table, Fault> {
        Ok(rope.table(positions))
    }

    fn meta(&self, batch: &Batch) -> Result<Meta, Fault> {
        Meta::new(batch)
    }

    fn host<'a>(&'a mut self, buffer: &'a mut Buffer, rows: usize) -> Result<HostSlice<'a>, Fault> {
        buffer.check(rows)?;
        let count = rows * buffer.cols;
        Ok(match &mut buffer.data {
            Data::F32(v) => HostSlice::F32(&mut v[..count]),
            Data::Bf16(v) => HostSlice::Bf16(&mut v[..count]),
        })
    }

    fn host_done(&mut self, buffer: &mut Buffer, rows: usize) -> Result<(), Fault> {
        buffer.check(rows)
    }

    fn embed(&mut self, table: &Matrix, first: u32, ids: &[u32], out: &mut Buffer) -> Result<(), Fault> {
        let (rows, cols) = (table.0.rows, table.0.cols);
        ensure(out.cols == cols, || format!("embeddings of {cols} in rows of {}", out.cols))?;
        let n = ids.len();
        self.pool.rows(out.full_mut(n)?, cols, n, 1, &|row, out| match ids[row]
            .checked_sub(first)
            .map(|id| id as usize)
            .filter(|id| *id < rows)
        {
            Some(id) => table.0.row(id, out),
            None => out.fill(0.0),
        });
        Ok(())
    }

    fn norm(&mut self, x: &Buffer, norm: &NormWeights<Vector>, n: usize, out: &mut Buffer) -> Result<(), Fault> {
        let (width, eps, weight) = (x.cols, norm.norm.eps, &norm.weight.0[..]);
        ensure(width == weight.len() && width == out.cols, || {
            format!("a norm of {} on rows of {width}, {} outputs", weight.len(), out.cols)
        })?;
        out.check(n)?;
        let (x, level) = (x.full(n)?, self.level);
        match (norm.norm.form, &norm.bias) {
            (NormForm::Rms, None) => {
                by_dtype!([out = &mut out.data] => self.pool.rows(out, width, n, grain(width), &|row, out| {
                    level.run(Norm { x: &x[row * width..][..width], weight, eps, out });
                }));
            }
            (NormForm::Layer, Some(bias)) if bias.0.len() == width => {
                by_dtype!([out = &mut out.data] => self.pool.rows(out, width, n, grain(width), &|row, out| {
                    level.run(LayerNorm { x: &x[row * width..][..width], weight, bias: &bias.0, eps, out });
                }));
            }
            (form, bias) => {
                let bias = bias.as_ref().map(|b| b.0.len());
                return Err(wrong(format!("a {form:?} norm of {width} with biases {bias:?}")));
            }
        }
        Ok(())
    }

    fn matmul(
        &mut self,
        x: &Buffer,
        w: &Matrix,
        bias: Option<&Vector>,
        n: usize,
        out: &mut Buffer,
    ) -> Result<(), Fault> {
        let w = &w.0;
        ensure(x.cols == w.cols && out.cols == w.rows, || {
            format!("[{}] inputs, [{}, {}] weights, [{}] outputs", x.cols, w.rows, w.cols, out.cols)
        })?;
        ensure(bias.is_none_or(|b| b.0.len() == w.rows), || format!("{} outputs and another bias", w.rows))?;
        x.check(n)?;
        let (out, bias) = (out.full_mut(n)?, bias.map(|b| &b.0[..]));
        by_dtype!([x = self.input(x)?] => {
            let x = Source { values: x, start: 0, stride: w.cols, picks: None };
            panel::multiply(&self.pool, self.level, self.family, x, w, bias, n, out)
        });
        Ok(())
    }

    fn add(&mut self, x: &mut Buffer, y: &Buffer, bias: Option<&Vector>, n: usize) -> Result<(), Fault> {
        let cols = x.cols;
        ensure(y.cols == cols && bias.is_none_or(|b| b.0.len() == cols), || format!("{cols} += {}", y.cols))?;
        let (y, bias, level) = (y.full(n)?, bias.map(|b| &b.0[..]), self.level);
        self.pool.rows(x.full_mut(n)?, cols, n, grain(cols), &|row, x| {
            level.run(Add { x, y: &y[row * cols..][..cols], bias });
        });
        Ok(())
    }

    fn activate(&mut self, x: &Buffer, activation: Activation, n: usize, out: &mut Buffer) -> Result<(), Fault> {
        let (width, gated) = (out.cols, x.cols == 2 * out.cols);
        ensure(gated || x.cols == width, || format!("{} gates and ups for {width} outputs", x.cols))?;
        out.check(n)?;
        let fits = gated || !matches!(activation, Activation::ClampedSwiglu { .. });
        ensure(fits, || format!("{activation:?} without a gate"))?;
        let cols = x.cols;
        let x = x.full(n)?;
        with_kernel!(activation, kernel => by_dtype!([out = &mut out.data] => {
            self.activate_rows(kernel, (x, cols), n, (out, width))
        }));
        Ok(())
    }

    fn matmul_activate(
        &mut self,
        x: &Buffer,
        (w, bias): (&Matrix, Option<&Vector>),
        activation: Activation,
        n: usize,
        between: &mut Buffer,
        out: &mut Buffer,
    ) -> Result<(), Fault> {
        if self.gated(x, (w, bias), activation, n, out)? {
            return Ok(());
        }
        self.matmul(x, w, bias, n, between)?;
        self.activate(between, activation, n, out)
    }

    fn head_squares(
        &mut self,
        shape: &GroupedShape,
        qkv: &Buffer,
        columns: (usize, Option<usize>),
        n: usize,
        out: &mut Buffer,
    ) -> Result<(), Fault> {
        let cols = out.cols;
        let meta = &Meta::NONE;
        let layout = self.layout_of(shape);
        let step = grouped::Step { pool: &self.pool, level: self.level, layout, shape, meta };
        ensure(qkv.cols == step.width(), || format!("rows of {} for {}", qkv.cols, step.width()))?;
        let (first, keys) = columns;
        ensure(first + shape.heads <= cols && keys.is_none_or(|keys| keys + shape.kv_heads <= cols), || {
            format!("{} and {} heads at columns {columns:?} of {cols}", shape.heads, shape.kv_heads)
        })?;
        step.squares(qkv.full(n)?, columns, n, cols, out.full_mut(n)?);
        Ok(())
    }

    fn grouped_prepare(
        &mut self,
        shape: &GroupedShape,
        qkv: &mut Buffer,
        norm: Option<HeadNorm<&Vector, &Buffer>>,
        rope: Option<&Table>,
        query_scale: Option<&Vector>,
        meta: &Meta,
        cache: &mut Cache,
    ) -> Result<(), Fault> {
        self.grouped_layout(shape, meta, cache)?;
        let layout = self.layout_of(shape);
        let step = grouped::Step { pool: &self.pool, level: self.level, layout, shape, meta };
        ensure(qkv.cols == step.width(), || format!("rows of {} for {}", qkv.cols, step.width()))?;
        ensure(rope.is_some() == shape.rope.is_some(), || "a rotation and its table come together".into())?;
        if let Some(table) = rope {
            check_table(table, meta, shape.head_dim)?;
        }
        let query_scale = check_scales(query_scale, meta)?;
        let norm = norm.map(|norm| head_norm(shape, norm, meta.rows())).transpose()?;
        let qkv = qkv.full_mut(meta.rows())?;
        by_dtype!([cache = &mut cache.data] => step.prepare(qkv, norm, rope, query_scale, cache));
        Ok(())
    }

    fn grouped_attention(
        &mut self,
        shape: &GroupedShape,
        qkv: &Buffer,
        per_head: PerHead<&Vector>,
        meta: &Meta,
        cache: &Cache,
        out: &mut Buffer,
    ) -> Result<(), Fault> {
        self.grouped_layout(shape, meta, cache)?;
        let layout = self.layout_of(shape);
        let step = grouped::Step { pool: &self.pool, level: self.level, layout, shape, meta };
        ensure(qkv.cols == step.width() && out.cols == shape.heads * shape.head_dim, || {
            format!("rows of {} to {} for {} heads of {}", qkv.cols, out.cols, shape.heads, shape.head_dim)
        })?;
        let per_head = PerHead { slopes: per_head.slopes.map(|v| &v.0[..]), sinks: per_head.sinks.map(|v| &v.0[..]) };
        ensure([per_head.slopes, per_head.sinks].iter().flatten().all(|each| each.len() == shape.heads), || {
            format!("one number for each of {} heads", shape.heads)
        })?;
        out.check(meta.rows())?;
        let (qkv, tiles) = (qkv.full(meta.rows())?, &mut self.scratch.tiles);
        by_dtype!([cache = &cache.data, out = &mut out.data] => step.attend(qkv, per_head, cache, tiles, out));
        Ok(())
    }

    fn latent_prepare(
        &mut self,
        shape: &LatentShape,
        q: &mut Buffer,
        kv: &mut Buffer,
        norm: &NormWeights<Vector>,
        rope: &Table,
        query_scale: Option<&Vector>,
        meta: &Meta,
        cache: &mut Cache,
    ) -> Result<(), Fault> {
        self.latent_layout(shape, meta, cache)?;
        let head = shape.nope_dim + shape.rope_dim;
        ensure(q.cols == shape.heads * head && kv.cols == shape.kv_rank + shape.rope_dim, || {
            format!("rows of {} and {} for {shape:?}", q.cols, kv.cols)
        })?;
        let (weight, eps) = (&norm.weight.0[..], norm.norm.eps);
        ensure(norm.norm.form == NormForm::Rms && weight.len() == shape.kv_rank, || {
            format!("a {:?} norm of {} for {shape:?}", norm.norm.form, weight.len())
        })?;
        check_table(rope, meta, shape.rope_dim)?;
        let query_scale = check_scales(query_scale, meta)?;
        let step = latent::Step { pool: &self.pool, level: self.level, family: self.family, shape, meta };
        let (q, kv) = (q.full_mut(meta.rows())?, kv.full_mut(meta.rows())?);
        by_dtype!([cache = &mut cache.data] => step.prepare(q, kv, (weight, eps), rope, query_scale, cache));
        Ok(())
    }

    fn latent_attention(
        &mut self,
        shape: &LatentShape,
        q: &Buffer,
        absorb: &[Matrix],
        expand: &[Matrix],
        meta: &Meta,
        cache: &Cache,
        out: &mut Buffer,
    ) -> Result<(), Fault> {
        self.latent_layout(shape, meta, cache)?;
        let all =
            |w: &[Matrix], rows, cols| w.len() == shape.heads && w.iter().all(|m| (m.0.rows, m.0.cols) == (rows, cols));
        let fit = all(absorb, shape.kv_rank, shape.nope_dim) && all(expand, shape.value_dim, shape.kv_rank);
        ensure(fit && shape.heads > 0, || format!("absorbing and expanding matrices do not fit {shape:?}"))?;
        ensure(q.cols == shape.heads * (shape.nope_dim + shape.rope_dim), || {
            format!("rows of {} for {shape:?}", q.cols)
        })?;
        ensure(out.cols == shape.heads * shape.value_dim, || format!("outputs of {} for {shape:?}", out.cols))?;
        out.check(meta.rows())?;
        let step = latent::Step { pool: &self.pool, level: self.level, family: self.family, shape, meta };
        let (inputs, products, packed) = step.scratch();
        self.scratch.inputs.reserve(inputs)?;
        self.scratch.products.reserve(products)?;
        self.scratch.packed.reserve(packed)?;
        let (Data::F32(products), Data::F32(packed)) = (&mut self.scratch.products, &mut self.scratch.packed) else {
            return Err(wrong("scratch memory of products is not f32"));
        };
        let q = q.full(meta.rows())?;
        by_dtype!([cache = &cache.data, inputs = &mut self.scratch.inputs, out = &mut out.data] => {
            step.attend(q, absorb, expand, cache, latent::Scratch { inputs, products, packed }, out)
        });
        Ok(())
    }

    fn route(
        &mut self,
        logits: &Buffer,
        router: &Router,
        active: usize,
        correction: Option<&Vector>,
        n: usize,
    ) -> Result<Routing, Fault> {
        let experts = (logits.full(n)?, logits.cols);
        route::route(&self.pool, self.level, experts, router, active, correction.map(|c| &c.0[..]), n)
    }

    fn expert_matmul(&mut self, x: &Buffer, w: &[Matrix], grouping: &Grouping, out: &mut Buffer) -> Result<(), Fault> {
        self.experts(x, w, grouping, true, out)
    }

    fn expert_matmul_activate(
        &mut self,
        x: &Buffer,
        w: &[Matrix],
        grouping: &Grouping,
        activation: Activation,
        between: &mut Buffer,
        out: &mut Buffer,
    ) -> Result<(), Fault> {
        if self.gated_experts(x, w, grouping, activation, out)? {
            return Ok(());
        }
        self.expert_matmul(x, w, grouping, between)?;
        self.activate(between, activation, grouping.rows.len(), out)
    }

    fn pair_matmul(&mut self, x: &Buffer, w: &[Matrix], grouping: &Grouping, out: &mut Buffer) -> Result<(), Fault> {
        self.experts(x, w, grouping, false, out)
    }

    fn weigh_rows(&mut self, x: &Buffer, grouping: &Grouping, out: &mut Buffer) -> Result<(), Fault> {
        let (cols, pairs, level) = (x.cols, grouping.rows.len(), self.level);
        ensure(out.cols == cols && grouping.weights.len() == pairs, || {
            format!("{} weights for {pairs} pairs, rows of {cols} into {}", grouping.weights.len(), out.cols)
        })?;
        x.check(grouping.rows_read())?;
        out.check(pairs)?;
        by_dtype!([x = self.input(x)?, out = &mut out.data] => {
            self.pool.rows(out, cols, pairs, grain(cols), &|pair, out| {
                let x = &x[grouping.rows[pair] as usize * cols..][..cols];
                level.run(Scaled { x, by: grouping.weights[pair], out });
            })
        });
        Ok(())
    }

    fn add_expert_bias(&mut self, x: &mut Buffer, biases: &[Vector], grouping: &Grouping) -> Result<(), Fault> {
        let (cols, pairs, offsets, level) = (x.cols, grouping.rows.len(), &grouping.offsets, self.level);
        ensure(offsets.len() == biases.len() + 1 && offsets.last() == Some(&(pairs as u32)), || {
            format!("offsets of {} experts, {pairs} pairs, {} biases", offsets.len(), biases.len())
        })?;
        ensure(biases.iter().all(|b| b.0.len() == cols), || format!("biases are not of {cols}"))?;
        self.pool.rows(x.full_mut(pairs)?, cols, pairs, grain(cols), &|pair, x| {
            let expert = offsets.partition_point(|o| *o as usize <= pair) - 1;
            level.run(Add { x, y: &biases[expert].0, bias: None });
        });
        Ok(())
    }

    fn combine(
        &mut self,
        pairs: &Buffer,
        grouping: &Grouping,
        segments: usize,
        n: usize,
        out: &mut Buffer,
    ) -> Result<(), Fault> {
        let cols = out.cols;
        ensure(pairs.cols == cols, || format!("pairs of {} in rows of {cols}", pairs.cols))?;
        let pairs = pairs.full(grouping.rows.len())?;
        let (out, index) = (out.full_mut(n)?, &mut self.scratch.index);
        combine::combine(&self.pool, self.level, index, pairs, grouping, segments, (n, cols), out)
    }

    fn select(&mut self, x: &Buffer, rows: &[u32], out: &mut Buffer) -> Result<(), Fault> {
        let cols = x.cols;
        ensure(out.cols == cols, || format!("rows of {cols} into rows of {}", out.cols))?;
        x.check(rows.iter().max().map_or(0, |r| *r as usize + 1))?;
        out.check(rows.len())?;
        match (&x.data, &mut out.data) {
            (Data::F32(x), Data::F32(out)) => pick(&self.pool, x, (rows, cols), out),
            (Data::Bf16(x), Data::Bf16(out)) => pick(&self.pool, x, (rows, cols), out),
            _ => return Err(wrong("rows of one kind into rows of another")),
        }
        Ok(())
    }
}
