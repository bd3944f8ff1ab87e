//! Latent attention in its absorbed form: all heads meet one cached row a position, `[latent | rotated key]`.
//!
//! Scores have heads in their lanes (sixteen at a time, queries packed `[channel][head]`), outputs have channels. A
//! span's sum of weights adds position i to position i+16, then +8, +4, +2, +1, as the grouped form does.

use super::attention::{Answers, LOWEST, QUERIES, Running, Values, WIDTH_MAX, Weights, apply};
use super::lanes::{Element, Kernel, LANES, Lanes};
use super::norms::NormInPlace;
use super::pack::Packed;
use super::panel::{Input, Source, TASK_ROWS, Target, panels};
use super::pool::Pool;
use super::rows::{Rotate, Round, Scale};
use super::{Level, math, shared::Shared};
use crate::backend::LatentShape;
use crate::backend::cpu::meta::Meta;
use model::plan::{BLOCK_TOKENS, KernelFamily};
use model::rope::Table;
use model::step::BlockId;
use std::mem::MaybeUninit;

/// Positions whose scores are summed side by side.
const TOGETHER: usize = 8;

/// The place of things in a latent cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    pub kv_rank: usize,
    pub rope_dim: usize,
}

impl Layout {
    /// Channels of a row.
    pub fn width(&self) -> usize {
        self.kv_rank + self.rope_dim
    }

    /// Elements of a row.
    pub fn stride(&self) -> usize {
        self.width().next_multiple_of(LANES)
    }

    pub fn block_elements(&self) -> usize {
        BLOCK_TOKENS * self.stride()
    }
}

/// Writes one position's row.
pub struct Write<'a, T> {
    pub layout: Layout,
    pub cache: &'a Shared<'a, T>,
    pub block: BlockId,
    pub slot: usize,
    pub row: &'a [f32],
}

impl<T: Element> Kernel for Write<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let n = self.row.len();
        let start = self.block.0 as usize * self.layout.block_elements() + self.slot * self.layout.stride();
        assert!(n == self.layout.width() && self.slot < BLOCK_TOKENS && start + n <= self.cache.len());
        for i in (0..n).step_by(LANES) {
            // SAFETY: inside the row; a slot belongs to one task.
            unsafe {
                let v = f32::load_up_to::<L>(self.row.as_ptr().add(i), n - i);
                T::store_up_to::<L>(self.cache.pointer().add(start + i), v, n - i);
            }
        }
    }
}

/// Up to sixteen heads of one row.
pub struct Attend<'a, T> {
    pub layout: Layout,
    pub cache: &'a [T],
    pub blocks: &'a [BlockId],
    /// Positions seen: `0..sees`.
    pub sees: usize,
    /// Heads, and their queries as `[channel][16]`, zero for absent heads.
    pub heads: usize,
    pub queries: &'a [f32],
    pub scale: f32,
    /// `[heads][kv_rank]`.
    pub out: &'a mut [T],
}

impl<T: Element> Kernel for Attend<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (rank, width) = (self.layout.kv_rank, self.layout.width());
        assert!(self.heads <= LANES && self.queries.len() == width * LANES && self.out.len() == self.heads * rank);
        assert!(width <= WIDTH_MAX && self.sees > 0);
        let wide = rank.next_multiple_of(LANES);
        let mut outputs = MaybeUninit::<[f32; LANES * WIDTH_MAX]>::uninit();
        let outputs = outputs.as_mut_ptr().cast::<f32>();
        let mut running = Running::begin();
        // SAFETY: `heads * wide` fits; each span's rows are checked against the cache.
        unsafe {
            std::ptr::write_bytes(outputs, 0, self.heads * wide);
            for span in 0..self.sees.div_ceil(BLOCK_TOKENS) {
                let count = (self.sees - span * BLOCK_TOKENS).min(BLOCK_TOKENS);
                let start = self.blocks[span].0 as usize * self.layout.block_elements();
                let rows = self.cache[start..start + self.layout.block_elements()].as_ptr();
                let mut p = [[0.0f32; LANES]; BLOCK_TOKENS];
                let (span_most, span_total) = self.weigh::<L>(rows, count, &mut p);
                running.merge::<L>(&span_most, &span_total);
                let v = Values { rows, stride: self.layout.stride(), width: rank };
                for h in (0..self.heads).step_by(QUERIES) {
                    let weights = Weights { p: p[0].as_ptr().add(h), query_step: 1, position_step: LANES };
                    let out = Answers { outputs: outputs.add(h * wide), stride: wide };
                    apply::<L, T>((self.heads - h).min(QUERIES), 0..count, weights, v, running.join(h), out);
                }
            }
            for h in 0..self.heads {
                let inverse = L::splat(running.inverse(h));
                for i in (0..rank).step_by(LANES) {
                    let v = L::mul(L::load(outputs.add(h * wide + i)), inverse);
                    T::store_up_to::<L>(self.out.as_mut_ptr().add(h * rank + i), v, rank - i);
                }
            }
        }
    }
}

impl<T: Element> Attend<'_, T> {
    /// Weights `[position][head]` of the first `count` positions, zero after; maxima and sums by head.
    #[inline(always)]
    unsafe fn weigh<L: Lanes>(
        &self,
        rows: *const T,
        count: usize,
        p: &mut [[f32; LANES]; BLOCK_TOKENS],
    ) -> ([f32; LANES], [f32; LANES]) {
        let (mut most, mut total) = ([0.0f32; LANES], [0.0f32; LANES]);
        unsafe {
            for t in (0..count).step_by(TOGETHER) {
                self.scores::<L>(rows.add(t * self.layout.stride()), (count - t).min(TOGETHER), &mut p[t..]);
            }
            let mut high = L::splat(LOWEST);
            for t in 0..count {
                let score = L::mul(L::load(p[t].as_ptr()), L::splat(self.scale));
                L::store(p[t].as_mut_ptr(), score);
                high = L::max(high, score);
            }
            L::store(most.as_mut_ptr(), high);
            let mut sums = [L::splat(0.0); BLOCK_TOKENS];
            for t in 0..count {
                sums[t] = math::exp::<L>(L::sub(L::load(p[t].as_ptr()), high));
                L::store(p[t].as_mut_ptr(), sums[t]);
            }
            for half in [16, 8, 4, 2, 1] {
                for i in 0..half {
                    sums[i] = L::add(sums[i], sums[i + half]);
                }
            }
            L::store(total.as_mut_ptr(), sums[0]);
        }
        (most, total)
    }

    /// Products of the heads with up to eight positions, one chain over the channels each.
    #[inline(always)]
    unsafe fn scores<L: Lanes>(&self, rows: *const T, count: usize, out: &mut [[f32; LANES]]) {
        let stride = self.layout.stride();
        let mut wide = MaybeUninit::<[f32; TOGETHER * (WIDTH_MAX + LANES)]>::uninit();
        let wide = wide.as_mut_ptr().cast::<f32>();
        unsafe {
            for i in (0..count * stride).step_by(LANES) {
                L::store(wide.add(i), T::load::<L>(rows.add(i)));
            }
            for i in (count * stride..TOGETHER * stride).step_by(LANES) {
                L::store(wide.add(i), L::splat(0.0));
            }
            let mut sums = [L::splat(0.0); TOGETHER];
            for d in 0..self.layout.width() {
                let query = L::load(self.queries.as_ptr().add(d * LANES));
                for t in 0..TOGETHER {
                    sums[t] = L::fma(L::splat(*wide.add(t * stride + d)), query, sums[t]);
                }
            }
            for t in 0..count {
                L::store(out[t].as_mut_ptr(), sums[t]);
            }
        }
    }
}

/// Rows that pass through the scratch memory together.
pub const ROWS: usize = 32;
const _: () = assert!(ROWS <= TASK_ROWS);

/// The step of one attention, beside its cache.
#[derive(Clone, Copy)]
pub struct Step<'a> {
    pub pool: &'a Pool,
    pub level: Level,
    pub family: KernelFamily,
    pub shape: &'a LatentShape,
    pub meta: &'a Meta,
}

/// Scratch memory for [`ROWS`] rows.
pub struct Scratch<'a, T> {
    /// `[row][head][nope]`, then `[row][head][kv_rank]`.
    pub inputs: &'a mut [T],
    /// `[row][head][kv_rank]`, then `[row][head][value]`.
    pub products: &'a mut [f32],
    /// `[row][sixteen heads][channel][head]`.
    pub packed: &'a mut [f32],
}

impl Step<'_> {
    pub fn layout(&self) -> Layout {
        Layout { kv_rank: self.shape.kv_rank, rope_dim: self.shape.rope_dim }
    }

    /// Elements that the parts of the scratch memory need.
    pub fn scratch(&self) -> (usize, usize, usize) {
        let s = self.shape;
        let inputs = s.heads * s.nope_dim.max(s.kv_rank);
        let products = s.heads * s.value_dim.max(s.kv_rank);
        (ROWS * inputs, ROWS * products, ROWS * s.heads.next_multiple_of(LANES) * self.layout().width())
    }

    /// Rotates and scales queries, norms and rotates cached rows, and writes them.
    pub fn prepare<T: Element>(
        &self,
        q: &mut [f32],
        kv: &mut [f32],
        (weight, eps): (&[f32], f32),
        table: &Table,
        query_scale: Option<&[f32]>,
        cache: &mut [T],
    ) {
        let (shape, n) = (self.shape, self.meta.rows.len());
        let turn = |x: &mut [f32], position: usize| {
            let of = position * table.pairs..(position + 1) * table.pairs;
            let (cos, sin) = (&table.cos[of.clone()], &table.sin[of]);
            self.level.run(Rotate { x: &mut x[..2 * table.pairs], cos, sin, layout: shape.rope.layout });
        };
        let head = shape.nope_dim + shape.rope_dim;
        self.pool.rows(q, shape.heads * head, n, 4, &|index, row| {
            for x in row.chunks_exact_mut(head) {
                turn(&mut x[shape.nope_dim..], self.meta.rows[index].position);
            }
            if let Some(scales) = query_scale {
                self.level.run(Scale { x: row, by: scales[self.meta.rows[index].position] });
            }
        });
        let cache = Shared::new(cache);
        self.pool.rows(kv, self.layout().width(), n, 16, &|index, row| {
            let at = self.meta.rows[index];
            self.level.run(NormInPlace { x: &mut row[..shape.kv_rank], weight, eps });
            turn(&mut row[shape.kv_rank..], at.position);
            self.level.run(Write { layout: self.layout(), cache: &cache, block: at.block, slot: at.slot, row });
        });
    }

    /// Attention of prepared queries, [`ROWS`] rows at a time.
    pub fn attend<T: Input, M: AsRef<Packed> + Sync>(
        &self,
        q: &[f32],
        absorb: &[M],
        expand: &[M],
        cache: &[T],
        mut scratch: Scratch<'_, T>,
        out: &mut [T],
    ) {
        let n = self.meta.rows.len();
        let (q_width, out_width) = (q.len() / n.max(1), self.shape.heads * self.shape.value_dim);
        for first in (0..n).step_by(ROWS) {
            let count = (n - first).min(ROWS);
            let q = &q[first * q_width..][..count * q_width];
            self.absorb(q, count, absorb, &mut scratch);
            self.meet(first, count, cache, &mut scratch);
            self.expand(count, expand, &mut scratch, &mut out[first * out_width..][..count * out_width]);
        }
    }

    /// Queries to the latent's space, packed beside their rotated parts.
    fn absorb<T: Input, M: AsRef<Packed> + Sync>(
        &self,
        q: &[f32],
        count: usize,
        absorb: &[M],
        scratch: &mut Scratch<'_, T>,
    ) {
        let (s, width) = (self.shape, self.layout().width());
        let head = s.nope_dim + s.rope_dim;
        self.pool.rows(scratch.inputs, s.heads * s.nope_dim, count, 1, &|row, inputs| {
            for h in 0..s.heads {
                let x = &q[(row * s.heads + h) * head..][..s.nope_dim];
                self.level.run(Round { x, out: &mut inputs[h * s.nope_dim..][..s.nope_dim] });
            }
        });
        self.each_head(absorb, scratch.inputs, (s.nope_dim, s.kv_rank), count, scratch.products);
        let groups = s.heads.div_ceil(LANES);
        let products = &*scratch.products;
        self.pool.rows(scratch.packed, width * LANES, count * groups, 1, &|index, packed| {
            let (row, group) = (index / groups, index % groups);
            packed.fill(0.0);
            for lane in 0..LANES.min(s.heads - group * LANES) {
                let h = row * s.heads + group * LANES + lane;
                let absorbed = &products[h * s.kv_rank..][..s.kv_rank];
                let rotated = &q[h * head + s.nope_dim..][..s.rope_dim];
                for (d, x) in absorbed.iter().chain(rotated).enumerate() {
                    packed[d * LANES + lane] = *x;
                }
            }
        });
    }

    /// The attention itself.
    fn meet<T: Input>(&self, first: usize, count: usize, cache: &[T], scratch: &mut Scratch<'_, T>) {
        let (s, width) = (self.shape, self.layout().width());
        let groups = s.heads.div_ceil(LANES);
        let out = Shared::new(scratch.inputs);
        let packed = &*scratch.packed;
        self.pool.run(count * groups, &|index| {
            let (row, group) = (index / groups, index % groups);
            let at = self.meta.rows[first + row];
            let heads = LANES.min(s.heads - group * LANES);
            // SAFETY: each (row, group of heads) belongs to one task.
            let out = unsafe { out.part((row * s.heads + group * LANES) * s.kv_rank, heads * s.kv_rank) };
            self.level.run(Attend {
                layout: self.layout(),
                cache,
                blocks: &self.meta.sequences[at.sequence].blocks,
                sees: at.position + 1,
                heads,
                queries: &packed[index * width * LANES..][..width * LANES],
                scale: s.scale,
                out,
            });
        });
    }

    fn expand<T: Input, M: AsRef<Packed> + Sync>(
        &self,
        count: usize,
        expand: &[M],
        scratch: &mut Scratch<'_, T>,
        out: &mut [T],
    ) {
        let (s, width) = (self.shape, self.shape.heads * self.shape.value_dim);
        self.each_head(expand, scratch.inputs, (s.kv_rank, s.value_dim), count, scratch.products);
        let products = &*scratch.products;
        self.pool.rows(out, width, count, 1, &|row, out| {
            self.level.run(Round { x: &products[row * width..][..width], out });
        });
    }

    /// `out[row][head] = x[row][head] w[head]^T`.
    fn each_head<T: Input, M: AsRef<Packed> + Sync>(
        &self,
        w: &[M],
        x: &[T],
        (inputs, outputs): (usize, usize),
        count: usize,
        out: &mut [f32],
    ) {
        let heads = self.shape.heads;
        let values = &Shared::new(out);
        let each = w[0].as_ref().panels();
        self.pool.run(heads * each, &|task| {
            let (h, index) = (task / each, task % each);
            let x = Source { values: x, start: h * inputs, stride: heads * inputs, picks: None };
            let target = Target { values, start: h * outputs, stride: heads * outputs };
            // SAFETY: each task has its own head's panel.
            unsafe { panels(self.level, self.family, x, w[h].as_ref(), index..index + 1, None, 0..count, target) };
        });
    }
}
