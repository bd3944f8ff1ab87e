//! Grouped-query attention over the paged cache.
//!
//! ```text
//! one kv head of a block:  K [head_dim][32 positions]   V [32 positions][head_dim in whole vectors]
//! ```
//! but for AMX's order, where both are in pairs ([`super::blocked`]).
//! Scores have positions in their lanes, outputs have channels: no sum crosses lanes but that of a span's weights
//! (lane i + lane i+16, then +8, +4, +2, +1).

use super::attention::{Answers, LOWEST, QUERIES, Running, Values, WIDTH_MAX, Weights, apply};
use super::blocked::Blocked;
use super::lanes::{Element, Kernel, LANES, Lanes};
use super::pack::PANEL;
use super::pool::Pool;
use super::rows::Positions;
use super::{Level, math, shared::Shared};
use crate::backend::cpu::meta::Meta;
use crate::backend::{GroupedShape, PerHead};
use crate::engine::batch::Sequence;
use half::bf16;
use model::plan::{BLOCK_TOKENS, KernelFamily};
use model::quant::Dtype;
use model::spec::Span;
use model::step::BlockId;
use std::mem::MaybeUninit;
use std::ops::Range;

/// The place of things in a paged cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Pairs of channels and of positions lie in words.
    pub paired: bool,
}

/// Most queries of one task: rows of a tile.
pub const TASK: usize = LANES;

impl Layout {
    pub fn new(kv_heads: usize, head_dim: usize, dtype: Dtype, family: KernelFamily) -> Layout {
        let paired = dtype == Dtype::Bf16 && family == KernelFamily::Amx && head_dim.is_multiple_of(2);
        Layout { kv_heads, head_dim, paired }
    }

    /// Queries that are handled together.
    fn queries(&self) -> usize {
        if self.paired { TASK } else { QUERIES }
    }

    /// The place of a channel at a slot among a head's keys in pairs, and among its values.
    pub(super) fn pair_of_key(channel: usize, slot: usize) -> usize {
        channel / 2 * (2 * BLOCK_TOKENS) + 2 * slot + channel % 2
    }

    pub(super) fn pair_of_value(&self, channel: usize, slot: usize) -> usize {
        let (first, lane) = (channel / PANEL * PANEL, channel % PANEL);
        let width = PANEL.min(self.value_stride() - first);
        first * BLOCK_TOKENS + slot / 2 * (2 * width) + 2 * lane + slot % 2
    }

    /// Elements of a value row.
    pub(super) fn value_stride(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    pub(super) fn head_elements(&self) -> usize {
        BLOCK_TOKENS * (self.head_dim + self.value_stride())
    }

    pub fn block_elements(&self) -> usize {
        self.kv_heads * self.head_elements()
    }

    /// First element of a head's keys; its values follow.
    pub(super) fn head_start(&self, block: BlockId, head: usize) -> usize {
        block.0 as usize * self.block_elements() + head * self.head_elements()
    }

    pub(super) fn values_start(&self, block: BlockId, head: usize) -> usize {
        self.head_start(block, head) + BLOCK_TOKENS * self.head_dim
    }
}

/// Up to [`QUERIES`] queries of one sequence that share a key/value head.
pub struct Attend<'a, T> {
    pub layout: Layout,
    pub cache: &'a [T],
    pub blocks: &'a [BlockId],
    pub kv_head: usize,
    /// Each query's channels, f32.
    pub queries: &'a [*const f32],
    /// The positions each query sees.
    pub sees: &'a [Range<usize>],
    pub scale: f32,
    /// Each query's slope and sink; empty where attention has none.
    pub slopes: &'a [f32],
    pub sinks: &'a [f32],
    /// Where each query's `head_dim` outputs go.
    pub outputs: &'a [*mut T],
}

impl<T: Element> Kernel for Attend<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let count = self.check();
        assert!(count <= QUERIES && !self.layout.paired);
        let stride = self.layout.value_stride();
        let mut outputs = MaybeUninit::<[f32; QUERIES * WIDTH_MAX]>::uninit();
        let outputs = outputs.as_mut_ptr().cast::<f32>();
        let mut running = Running::begin();
        // SAFETY: `count * stride` fits by the bounds above; blocks and cache are checked span by span.
        unsafe {
            std::ptr::write_bytes(outputs, 0, count * stride);
            for span in self.spans() {
                self.span::<L>(span, &mut running, outputs);
            }
            self.finish::<L>(&mut running, outputs);
        }
    }
}

impl<T: Element> Attend<'_, T> {
    /// How many queries there are.
    #[inline(always)]
    pub(super) fn check(&self) -> usize {
        let count = self.queries.len();
        assert!(count <= TASK && count == self.sees.len() && count == self.outputs.len());
        assert!(self.layout.head_dim <= WIDTH_MAX);
        assert!([self.slopes, self.sinks].iter().all(|each| each.is_empty() || each.len() == count));
        count
    }

    /// Those that any query sees a position of.
    pub(super) fn spans(&self) -> Range<usize> {
        let first = self.sees.iter().map(|s| s.start).min().unwrap_or(0) / BLOCK_TOKENS;
        first..self.sees.iter().map(|s| s.end).max().unwrap_or(0).div_ceil(BLOCK_TOKENS)
    }

    /// A query's slope, and its own position from a span's start on: it stands at the last one that it sees.
    pub(super) fn slope(&self, query: usize, start: usize) -> Option<(f32, usize)> {
        self.slopes.get(query).map(|slope| (*slope, self.sees[query].end - 1 - start))
    }

    /// Writes the answers.
    ///
    /// # Safety
    /// `outputs` has each query's running answer.
    #[inline(always)]
    pub(super) unsafe fn finish<L: Lanes>(&self, running: &mut Running, outputs: *const f32) {
        let (count, dim, stride) = (self.queries.len(), self.layout.head_dim, self.layout.value_stride());
        // SAFETY: the caller's promise; what `self` names was checked.
        unsafe {
            let mut inverses = [0.0; LANES];
            if self.sinks.is_empty() {
                (0..count).for_each(|q| inverses[q] = running.inverse(q));
            } else {
                inverses = running.sink::<L>(self.sinks);
            }
            for q in 0..count {
                let inverse = L::splat(inverses[q]);
                for i in (0..dim).step_by(LANES) {
                    let v = L::mul(L::load(outputs.add(q * stride + i)), inverse);
                    T::store_up_to::<L>(self.outputs[q].add(i), v, dim - i);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn span<L: Lanes>(&self, span: usize, running: &mut Running, outputs: *mut f32) {
        let count = self.queries.len();
        let start = span * BLOCK_TOKENS;
        let mut weights = [[0.0f32; BLOCK_TOKENS]; QUERIES];
        let mut seen: [Range<usize>; QUERIES] = std::array::from_fn(|_| 0..0);
        let block = self.blocks[span];
        let head = self.layout.head_start(block, self.kv_head);
        let keys = &self.cache[head..head + self.layout.head_elements()];
        let values = keys[BLOCK_TOKENS * self.layout.head_dim..].as_ptr();
        unsafe {
            let next = self.layout.head_start(*self.blocks.get(span + 1).unwrap_or(&block), self.kv_head);
            self.scores::<L>(keys.as_ptr(), self.cache[next..].as_ptr(), &mut weights);
            let (mut most, mut total) = ([LOWEST; LANES], [0.0f32; LANES]);
            for q in 0..count {
                let from = self.sees[q].start.max(start);
                let to = self.sees[q].end.min(start + BLOCK_TOKENS);
                if from < to {
                    seen[q] = from - start..to - start;
                    let slope = self.slope(q, start);
                    (most[q], total[q]) = weigh::<L>(weights[q].as_mut_ptr(), seen[q].clone(), slope, self.scale);
                }
            }
            running.merge::<L>(&most, &total);
            let stride = self.layout.value_stride();
            let v = Values { rows: values, stride, width: self.layout.head_dim };
            let together = seen[..count].iter().all(|s| *s == seen[0] && !s.is_empty());
            let step = if together { count } else { 1 };
            for q in (0..count).step_by(step) {
                if seen[q].is_empty() {
                    continue;
                }
                let p = Weights { p: weights[q].as_ptr(), query_step: BLOCK_TOKENS, position_step: 1 };
                let out = Answers { outputs: outputs.add(q * stride), stride };
                apply::<L, T>(step, seen[q].clone(), p, v, running.join(q), out);
            }
        }
    }

    /// Products of all queries with a block's keys, while `next`, the next span's, comes nearer; those of slots not written yet are never looked at.
    #[inline(always)]
    unsafe fn scores<L: Lanes>(&self, keys: *const T, next: *const T, out: &mut [[f32; BLOCK_TOKENS]; QUERIES]) {
        let mut first = 0;
        while first < self.queries.len() {
            unsafe {
                first += match self.queries.len() - first {
                    8.. => self.score_tile::<L, 8>(keys, next, first, out),
                    4.. => self.score_tile::<L, 4>(keys, next, first, out),
                    2.. => self.score_tile::<L, 2>(keys, next, first, out),
                    _ => self.score_tile::<L, 1>(keys, next, first, out),
                };
            }
        }
    }

    #[inline(always)]
    unsafe fn score_tile<L: Lanes, const Q: usize>(
        &self,
        keys: *const T,
        next: *const T,
        first: usize,
        out: &mut [[f32; BLOCK_TOKENS]; QUERIES],
    ) -> usize {
        unsafe {
            let mut sums = [[L::splat(0.0); 2]; Q];
            let mut queries = [self.queries[first]; Q];
            queries.copy_from_slice(&self.queries[first..first + Q]);
            for d in 0..self.layout.head_dim {
                let key = [T::load::<L>(keys.add(d * BLOCK_TOKENS)), T::load::<L>(keys.add(d * BLOCK_TOKENS + LANES))];
                if first == 0 {
                    // The next span's keys and values, whose lines are twice as many.
                    L::prefetch(next.wrapping_add(2 * d * BLOCK_TOKENS).cast());
                    L::prefetch(next.wrapping_add((2 * d + 1) * BLOCK_TOKENS).cast());
                }
                for q in 0..Q {
                    let x = L::splat(*queries[q].add(d));
                    sums[q][0] = L::fma(x, key[0], sums[q][0]);
                    sums[q][1] = L::fma(x, key[1], sums[q][1]);
                }
            }
            for q in 0..Q {
                L::store(out[first + q].as_mut_ptr(), sums[q][0]);
                L::store(out[first + q].as_mut_ptr().add(LANES), sums[q][1]);
            }
        }
        Q
    }
}

/// Products to weights of the positions seen, zero elsewhere; returns the span's maximum and sum. A slope comes with the
/// query's own position from the span's start on.
///
/// # Safety
/// `p` has a number for each position.
#[inline(always)]
pub(super) unsafe fn weigh<L: Lanes>(
    p: *mut f32,
    seen: Range<usize>,
    slope: Option<(f32, usize)>,
    scale: f32,
) -> (f32, f32) {
    unsafe {
        let (from, to) = (L::splat(seen.start as f32), L::splat(seen.end as f32));
        let lanes = [Positions::<L>::first(), L::add(Positions::<L>::first(), L::splat(LANES as f32))];
        let only =
            |lane: L::F, v: L::F, other: L::F| L::select_less(lane, from, other, L::select_less(lane, to, v, other));
        let (scale, none, zero) = (L::splat(scale), L::splat(f32::NEG_INFINITY), L::splat(0.0));
        let mut low = L::mul(L::load(p), scale);
        let mut high = L::mul(L::load(p.add(LANES)), scale);
        if let Some((slope, own)) = slope {
            let (slope, own) = (L::splat(slope), L::splat(own as f32));
            low = L::fma(slope, L::sub(lanes[0], own), low);
            high = L::fma(slope, L::sub(lanes[1], own), high);
        }
        let (low, high) = (only(lanes[0], low, none), only(lanes[1], high, none));
        let most = L::greatest(L::max(low, high));
        let low = only(lanes[0], math::exp::<L>(L::sub(low, L::splat(most))), zero);
        let high = only(lanes[1], math::exp::<L>(L::sub(high, L::splat(most))), zero);
        L::store(p, low);
        L::store(p.add(LANES), high);
        (most, L::sum(L::add(low, high)))
    }
}

/// The step of one attention, beside its cache.
#[derive(Clone, Copy)]
pub struct Step<'a> {
    pub pool: &'a Pool,
    pub level: Level,
    pub layout: Layout,
    pub shape: &'a GroupedShape,
    pub meta: &'a Meta,
}

impl Step<'_> {
    /// Columns of `[q | k | v]`.
    pub fn width(&self) -> usize {
        (self.shape.heads + 2 * self.shape.kv_heads) * self.shape.head_dim
    }

    /// Attention of prepared queries; `tiles` is memory kept between calls.
    pub fn attend<T: Element>(
        &self,
        qkv: &[f32],
        per_head: PerHead<&[f32]>,
        cache: &[T],
        tiles: &mut Vec<u32>,
        out: &mut [T],
    ) {
        let (shape, meta) = (self.shape, self.meta);
        let (group, most) = (shape.heads / shape.kv_heads, self.layout.queries());
        let (heads_each, rows_each) = (group.min(most), (most / group).max(1));
        let head_tiles = group.div_ceil(heads_each);
        tiles.clear();
        tiles.push(0);
        for sequence in &meta.sequences {
            tiles.push(tiles[tiles.len() - 1] + sequence.rows.div_ceil(rows_each) as u32);
        }
        let tiles = &*tiles;
        let row_tiles = tiles[tiles.len() - 1] as usize;
        let out = Shared::new(out);
        self.pool.run(row_tiles * shape.kv_heads * head_tiles, &|task| {
            // The last tiles of a prompt see most and go first.
            let tile = row_tiles - 1 - task / (shape.kv_heads * head_tiles);
            let (kv_head, head_tile) = (task / head_tiles % shape.kv_heads, task % head_tiles);
            let index = tiles.partition_point(|t| *t as usize <= tile) - 1;
            let sequence = &meta.sequences[index];
            let first = (tile - tiles[index] as usize) * rows_each;
            let rows = sequence.row + first..sequence.row + sequence.rows.min(first + rows_each);
            let start = kv_head * group + head_tile * heads_each;
            let heads = start..(start + heads_each).min((kv_head + 1) * group);
            self.tile(qkv, per_head, cache, sequence, rows, heads, kv_head, &out);
        });
    }

    #[allow(clippy::too_many_arguments)] // one tile's place in everything
    fn tile<T: Element>(
        &self,
        qkv: &[f32],
        per_head: PerHead<&[f32]>,
        cache: &[T],
        sequence: &Sequence,
        rows: Range<usize>,
        heads: Range<usize>,
        kv_head: usize,
        out: &Shared<'_, T>,
    ) {
        let (dim, width) = (self.shape.head_dim, self.width());
        let mut queries = [std::ptr::null::<f32>(); TASK];
        let mut outputs = [std::ptr::null_mut::<T>(); TASK];
        let mut sees: [Range<usize>; TASK] = std::array::from_fn(|_| 0..0);
        let (mut slopes, mut sinks) = ([0.0; TASK], [0.0; TASK]);
        let mut count = 0;
        for row in rows {
            let end = self.meta.rows[row].position + 1;
            let start = match self.shape.span {
                Span::Full => 0,
                Span::Window(window) => end.saturating_sub(window),
                Span::Chunk(chunk) => (end - 1) / chunk * chunk,
            };
            for head in heads.clone() {
                queries[count] = qkv[row * width + head * dim..][..dim].as_ptr();
                let at = (row * self.shape.heads + head) * dim;
                assert!(at + dim <= out.len());
                // SAFETY: inside the output; each (row, head) belongs to one task.
                outputs[count] = unsafe { out.pointer().add(at) };
                sees[count] = start..end;
                slopes[count] = per_head.slopes.map_or(0.0, |each| each[head]);
                sinks[count] = per_head.sinks.map_or(0.0, |each| each[head]);
                count += 1;
            }
        }
        let attend = Attend {
            layout: self.layout,
            cache,
            blocks: &sequence.blocks,
            kv_head,
            queries: &queries[..count],
            sees: &sees[..count],
            scale: self.shape.scale,
            slopes: if per_head.slopes.is_some() { &slopes[..count] } else { &[] },
            sinks: if per_head.sinks.is_some() { &sinks[..count] } else { &[] },
            outputs: &outputs[..count],
        };
        if !attend.layout.paired {
            return self.level.run(attend);
        }
        let halves = outputs.map(|output| output.cast::<bf16>());
        let Attend { layout, blocks, queries, sees, scale, slopes, sinks, .. } = attend;
        let (cache, outputs) = (bytemuck::cast_slice(cache), &halves[..count]);
        self.level.run(Blocked(Attend {
            layout,
            cache,
            blocks,
            kv_head,
            queries,
            sees,
            scale,
            slopes,
            sinks,
            outputs,
        }));
    }
}
