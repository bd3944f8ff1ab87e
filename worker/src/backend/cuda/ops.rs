//! [`Backend`] for CUDA: checks at the door, then kernels.

use super::driver::Address;
use super::kernels::{
    ActivateArgs, AddArgs, CopyArgs, EmbedArgs, MatmulArgs, NormArgs, PANEL, SumPartsArgs, THREADS, WARPS,
};
use super::scratch::Parcel;
use super::{Buffer, Cache, CudaBackend, Matrix, Meta, RopeTable, Vector, address};
use crate::backend::contract::{check_parts, ensure};
use crate::backend::cpu::weights as packing;
use crate::backend::{
    Backend, GroupedShape, Grouping, HeadNorm, HostSlice, Kind, LatentShape, MatrixView, NormWeights, PerHead, Routing,
};
use crate::collective::device::DeviceRows;
use crate::engine::batch::Batch;
use half::bf16;
use model::fault::{Fault, FaultKind};
use model::quant::Dtype;
use model::rope::Rope;
use model::spec::{Activation, CacheKind, NormForm, Router};

/// Blocks of element-wise kernels.
fn flat(values: usize) -> [usize; 3] {
    [values.div_ceil(THREADS), 1, 1]
}

impl CudaBackend {
    /// Copies rows of f32 of `cols`, `x_stride` apart, and rounds them to the compute dtype.
    pub(super) fn round(
        &self,
        x: Address,
        x_stride: usize,
        out: Address,
        cols: usize,
        rows: usize,
    ) -> Result<(), Fault> {
        let (values, cols) = (rows * cols, cols as u32);
        let (x_stride, out_stride) = (x_stride as u32, cols);
        let args = CopyArgs { x, out, rows: 0, weights: 0, values: values as u64, cols, x_stride, out_stride };
        self.device.driver.launch(self.device.kernels.round[self.which()], flat(values), THREADS, 0, &args)
    }

    fn keep(&self, packed: &packing::Matrix) -> Result<Matrix, Fault> {
        let matrix = Matrix::upload(&self.device, packed.as_ref())?;
        self.count(matrix.bytes());
        Ok(matrix)
    }
}

impl Backend for CudaBackend {
    type Matrix = Matrix;
    type Vector = Vector;
    type Buffer = Buffer;
    type Cache = Cache;
    type Meta = Meta;
    type RopeTable = RopeTable;

    fn matrix(&self, parts: &[MatrixView<'_>], segments: usize) -> Result<Matrix, Fault> {
        self.keep(&packing::pack(&self.pool, self.dtype, self.family, parts, segments)?)
    }

    fn matrix_f32(&self, values: &[f32], rows: usize, cols: usize, segments: usize) -> Result<Matrix, Fault> {
        self.keep(&packing::pack_f32(&self.pool, self.dtype, self.family, values, (rows, cols), segments)?)
    }

    fn vector(&self, values: &[f32]) -> Result<Vector, Fault> {
        self.count(std::mem::size_of_val(values));
        Ok(Vector { piece: self.device.upload(values)?, len: values.len() })
    }

    fn buffer(&self, rows: usize, cols: usize, kind: Kind) -> Result<Buffer, Fault> {
        let dtype = Buffer::dtype_of(kind, self.dtype);
        let bytes = rows.checked_mul(cols).and_then(|values| values.checked_mul(dtype.bytes()));
        let bytes = bytes.ok_or_else(|| Fault::new(FaultKind::OutOfMemory, format!("{rows} x {cols} overflows")))?;
        Ok(Buffer { rows, cols, dtype, piece: self.zeroed(bytes)?, full: Vec::new(), halves: Vec::new() })
    }

    fn cache(&self, kind: CacheKind, blocks: usize) -> Result<Cache, Fault> {
        self.make_cache(kind, blocks)
    }

    fn rope_table(&self, rope: &Rope, positions: usize) -> Result<RopeTable, Fault> {
        self.make_table(rope, positions)
    }

    fn meta(&self, batch: &Batch) -> Result<Meta, Fault> {
        self.make_meta(batch)
    }

    fn host<'a>(&'a mut self, buffer: &'a mut Buffer, rows: usize) -> Result<HostSlice<'a>, Fault> {
        let (at, values) = (buffer.check(rows)?, rows * buffer.cols);
        Ok(match buffer.dtype {
            Dtype::F32 => {
                buffer.full.resize(values, 0.0);
                self.device.driver.download(at, &mut buffer.full)?;
                HostSlice::F32(&mut buffer.full)
            }
            Dtype::Bf16 => {
                buffer.halves.resize(values, bf16::ZERO);
                self.device.driver.download(at, &mut buffer.halves)?;
                HostSlice::Bf16(&mut buffer.halves)
            }
        })
    }

    fn host_done(&mut self, buffer: &mut Buffer, rows: usize) -> Result<(), Fault> {
        let (at, values) = (buffer.check(rows)?, rows * buffer.cols);
        let held = buffer.full.len().max(buffer.halves.len());
        ensure(values <= held, || format!("{values} values given back, {held} were lent"))?;
        match buffer.dtype {
            Dtype::F32 => self.device.driver.upload(at, &buffer.full[..values]),
            Dtype::Bf16 => self.device.driver.upload(at, &buffer.halves[..values]),
        }
    }

    fn embed(&mut self, table: &Matrix, first: u32, ids: &[u32], out: &mut Buffer) -> Result<(), Fault> {
        let (n, cols) = (ids.len(), table.cols());
        ensure(out.cols == cols, || format!("embeddings of {cols} in rows of {}", out.cols))?;
        let out = out.full(n)?;
        let mut parcel = Parcel::default();
        let ids = parcel.add(ids);
        let ids = self.scratch.send(&parcel)?(ids);
        let args = EmbedArgs { table: table.descriptor(), ids, out, n: n as u32, first };
        let grid = [cols.div_ceil(PANEL).min(64), n, 1];
        self.device.driver.launch(self.device.kernels.embed, grid, PANEL, 0, &args)
    }

    fn norm(&mut self, x: &Buffer, norm: &NormWeights<Vector>, n: usize, out: &mut Buffer) -> Result<(), Fault> {
        let (width, weight) = (x.cols, &norm.weight);
        ensure(width == weight.len && width == out.cols, || {
            format!("a norm of {} on rows of {width}, {} outputs", weight.len, out.cols)
        })?;
        let bias = norm.bias.as_ref();
        let fits = match norm.norm.form {
            NormForm::Rms => bias.is_none(),
            NormForm::Layer => bias.is_some_and(|bias| bias.len == width),
        };
        ensure(fits, || format!("a {:?} norm of {width} with biases {:?}", norm.norm.form, bias.map(|b| b.len)))?;
        let args = NormArgs {
            x: x.full(n)?,
            weight: weight.piece.at,
            bias: address(bias),
            out: out.check(n)?,
            n: n as u32,
            width: width as u32,
            eps: norm.norm.eps,
        };
        let kernel = self.device.kernels.norm[usize::from(out.dtype == Dtype::Bf16)];
        self.device.driver.launch(kernel, [n.div_ceil(WARPS), 1, 1], THREADS, 0, &args)
    }

    fn matmul(
        &mut self,
        x: &Buffer,
        w: &Matrix,
        bias: Option<&Vector>,
        n: usize,
        out: &mut Buffer,
    ) -> Result<(), Fault> {
        let (rows, cols) = (w.rows(), w.cols());
        ensure(x.cols == cols && out.cols == rows && x.dtype == self.dtype, || {
            format!("[{}] inputs, [{rows}, {cols}] weights, [{}] outputs", x.cols, out.cols)
        })?;
        ensure(bias.is_none_or(|b| b.len == rows), || format!("{rows} outputs and another bias"))?;
        let args = MatmulArgs {
            x: x.check(n)?,
            out: out.full(n)?,
            bias: address(bias),
            one: w.descriptor(),
            many: 0,
            tiles: 0,
            picks: 0,
            n: n as u32,
            x_stride: cols as u32,
            x_step: 0,
            out_stride: rows as u32,
            out_step: 0,
        };
        let (kernel, each) = self.product(std::slice::from_ref(w), n);
        self.multiply(kernel, [rows.div_ceil(PANEL), n.div_ceil(each), 1], &args)
    }

    fn add(&mut self, x: &mut Buffer, y: &Buffer, bias: Option<&Vector>, n: usize) -> Result<(), Fault> {
        let (cols, values) = (x.cols, n * x.cols);
        ensure(y.cols == cols && bias.is_none_or(|b| b.len == cols), || format!("{cols} += {}", y.cols))?;
        let (x, y, bias) = (x.full(n)?, y.full(n)?, address(bias));
        let args = AddArgs { x, y, bias, row_biases: 0, values: values as u64, cols: cols as u32 };
        self.device.driver.launch(self.device.kernels.add, flat(values), THREADS, 0, &args)
    }

    fn activate(&mut self, x: &Buffer, activation: Activation, n: usize, out: &mut Buffer) -> Result<(), Fault> {
        let (width, gated, values) = (out.cols, x.cols == 2 * out.cols, n * out.cols);
        ensure(gated || x.cols == width, || format!("{} gates and ups for {width} outputs", x.cols))?;
        let (kind, alpha, limit) = match activation {
            Activation::Silu => (0, 0.0, 0.0),
            Activation::GeluTanh => (1, 0.0, 0.0),
            Activation::ClampedSwiglu { alpha, limit } => (2, alpha, limit),
        };
        ensure(gated || kind != 2, || format!("{activation:?} without a gate"))?;
        let (x, cols) = (x.full(n)?, width as u32);
        let kernel = self.device.kernels.activate[usize::from(out.dtype == Dtype::Bf16)];
        let out = out.check(n)?;
        let gated = u32::from(gated);
        let args = ActivateArgs { x, out, values: values as u64, cols, gated, kind, alpha, limit };
        self.device.driver.launch(kernel, flat(values), THREADS, 0, &args)
    }

    fn head_squares(
        &mut self,
        shape: &GroupedShape,
        qkv: &Buffer,
        columns: (usize, Option<usize>),
        n: usize,
        out: &mut Buffer,
    ) -> Result<(), Fault> {
        self.squares(shape, qkv, columns, n, out)
    }

    fn grouped_prepare(
        &mut self,
        shape: &GroupedShape,
        qkv: &mut Buffer,
        norm: Option<HeadNorm<&Vector, &Buffer>>,
        rope: Option<&RopeTable>,
        query_scale: Option<&Vector>,
        meta: &Meta,
        cache: &mut Cache,
    ) -> Result<(), Fault> {
        self.prepare_grouped(shape, qkv, norm, rope, query_scale, meta, cache)
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
        self.attend_grouped(shape, qkv, per_head, meta, cache, out)
    }

    fn latent_prepare(
        &mut self,
        shape: &LatentShape,
        q: &mut Buffer,
        kv: &mut Buffer,
        norm: &NormWeights<Vector>,
        rope: &RopeTable,
        query_scale: Option<&Vector>,
        meta: &Meta,
        cache: &mut Cache,
    ) -> Result<(), Fault> {
        self.prepare_latent(shape, q, kv, norm, rope, query_scale, meta, cache)
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
        self.attend_latent(shape, q, absorb, expand, meta, cache, out)
    }

    fn route(
        &mut self,
        logits: &Buffer,
        router: &Router,
        active: usize,
        correction: Option<&Vector>,
        n: usize,
    ) -> Result<Routing, Fault> {
        self.choose(logits, router, active, correction, n)
    }

    fn expert_matmul(&mut self, x: &Buffer, w: &[Matrix], grouping: &Grouping, out: &mut Buffer) -> Result<(), Fault> {
        self.experts(x, w, grouping, true, out)
    }

    fn pair_matmul(&mut self, x: &Buffer, w: &[Matrix], grouping: &Grouping, out: &mut Buffer) -> Result<(), Fault> {
        self.experts(x, w, grouping, false, out)
    }

    fn weigh_rows(&mut self, x: &Buffer, grouping: &Grouping, out: &mut Buffer) -> Result<(), Fault> {
        self.weigh(x, grouping, out)
    }

    fn add_expert_bias(&mut self, x: &mut Buffer, biases: &[Vector], grouping: &Grouping) -> Result<(), Fault> {
        let (cols, pairs, offsets) = (x.cols, grouping.rows.len(), &grouping.offsets);
        ensure(offsets.len() == biases.len() + 1 && offsets.last() == Some(&(pairs as u32)), || {
            format!("offsets of {} experts, {pairs} pairs, {} biases", offsets.len(), biases.len())
        })?;
        ensure(biases.iter().all(|b| b.len == cols), || format!("biases are not of {cols}"))?;
        let x = x.full(pairs)?;
        let each = |(expert, ends): (usize, &[u32])| {
            std::iter::repeat_n(biases[expert].piece.at, ends[1].saturating_sub(ends[0]) as usize)
        };
        let mut parcel = Parcel::default();
        let biases = parcel.add(&offsets.windows(2).enumerate().flat_map(each).collect::<Vec<Address>>());
        let row_biases = self.scratch.send(&parcel)?(biases);
        let values = pairs * cols;
        let args = AddArgs { x, y: 0, bias: 0, row_biases, values: values as u64, cols: cols as u32 };
        self.device.driver.launch(self.device.kernels.add, flat(values), THREADS, 0, &args)
    }

    fn combine(
        &mut self,
        pairs: &Buffer,
        grouping: &Grouping,
        segments: usize,
        n: usize,
        out: &mut Buffer,
    ) -> Result<(), Fault> {
        self.join(pairs, grouping, segments, n, out)
    }

    fn on_device(&self, buffer: &Buffer, rows: usize) -> Result<Option<DeviceRows>, Fault> {
        Ok(Some(DeviceRows { at: buffer.check(rows)?, width: buffer.cols * buffer.dtype.bytes() }))
    }

    fn sum_parts(&mut self, all: &mut Buffer, parts: usize, rows: usize, out: &mut Buffer) -> Result<(), Fault> {
        check_parts(parts)?;
        ensure(all.cols == out.cols, || format!("rows of {} summed to rows of {}", all.cols, out.cols))?;
        let values = rows * out.cols;
        let (from, out) = (all.full(rows * parts)?, out.full(rows)?);
        let args = SumPartsArgs { parts: from, out, values: values as u64, count: parts as u32 };
        self.device.driver.launch(self.device.kernels.sum_parts, flat(values), THREADS, 0, &args)
    }

    fn select(&mut self, x: &Buffer, rows: &[u32], out: &mut Buffer) -> Result<(), Fault> {
        let (cols, values) = (x.cols, rows.len() * x.cols);
        ensure(out.cols == cols && out.dtype == x.dtype, || {
            format!("rows of {cols} {:?} into rows of {} {:?}", x.dtype, out.cols, out.dtype)
        })?;
        let kernel = self.device.kernels.copy[usize::from(x.dtype == Dtype::Bf16)];
        let x = x.check(rows.iter().max().map_or(0, |r| *r as usize + 1))?;
        let out = out.check(rows.len())?;
        let mut parcel = Parcel::default();
        let picked = parcel.add(rows);
        let rows = self.scratch.send(&parcel)?(picked);
        let stride = cols as u32;
        let (x_stride, out_stride) = (stride, stride);
        let args = CopyArgs { x, out, rows, weights: 0, values: values as u64, cols: stride, x_stride, out_stride };
        self.device.driver.launch(kernel, flat(values), THREADS, 0, &args)
    }
}
