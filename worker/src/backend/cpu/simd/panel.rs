//! Multiplications: panels of packed weights against rows of activations, in the canonical order (see the parent).
//!
//! ```text
//! task (panel, up to 48 rows)      per segment: accumulators <- +0.0
//!   per 256 pairs of inputs            per 6 rows x 4 vectors: registers <- accumulators, 256 pairs, and back
//!                                  then the tree over segments, the bias, and out
//! ```
//! Storing and reloading an f32 accumulator changes no bit, so the blocking is free to serve the caches.

use super::Level;
use super::coded::{TILE_PAIRS, TILE_WORDS};
use super::lanes::{Element, Kernel, LANES, Lanes};
use super::pack::{PANEL, Packed};
use super::pool::Pool;
use super::shared::Shared;
use half::bf16;
use model::plan::KernelFamily;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Rows of one task.
pub const TASK_ROWS: usize = 48;
/// Most pairs between two stores of the accumulators: 64 KiB of a bf16 panel.
pub const CHUNK: usize = 256;
/// Pairs that AMX sums from zero before it adds to the accumulator.
pub const AMX_PAIRS: usize = 16;
/// Rows that registers hold at once.
const PASS_ROWS: usize = 6;
/// Sums pending in the tree: one for each power of two up to 8 segments.
const PENDING: usize = 4;

/// Pairs between two stores: with a few passes of [`PASS_ROWS`] a chunk stays in the first cache between them.
const fn chunk(rows: usize) -> usize {
    match rows.div_ceil(PASS_ROWS) {
        2 => CHUNK / 8,
        3 | 4 => CHUNK / 4,
        _ => CHUNK,
    }
}

/// Activations of one format that weights can meet.
pub trait Input: Element {
    /// # Safety
    /// As [`Task::run`].
    unsafe fn accumulate<L: Lanes>(task: &Task<'_, Self>, part: &Part<'_, Self>);
}

/// How one format of activations meets one format of weights.
trait Product<L: Lanes> {
    type X: Copy;
    /// Sixteen outputs' weights of a pair of inputs.
    type W: Copy;
    /// A pair of inputs, splat.
    type P: Copy;
    /// Words of a pair in one output.
    const WORDS: usize;
    unsafe fn weights(p: *const u32, width: usize) -> Self::W;
    unsafe fn pair(p: *const Self::X) -> Self::P;
    /// A last input without a partner.
    unsafe fn lone(p: *const Self::X) -> Self::P;
    unsafe fn odd(acc: L::F, w: Self::W, x: Self::P) -> L::F;
    unsafe fn even(acc: L::F, w: Self::W, x: Self::P) -> L::F;
    #[inline(always)]
    unsafe fn both(acc: L::F, w: Self::W, x: Self::P) -> L::F {
        unsafe { Self::even(Self::odd(acc, w, x), w, x) }
    }
}

struct HalfByHalf;

impl<L: Lanes> Product<L> for HalfByHalf {
    type X = bf16;
    type W = L::I;
    type P = L::I;
    const WORDS: usize = 1;
    #[inline(always)]
    unsafe fn weights(p: *const u32, _width: usize) -> L::I {
        unsafe { L::load_bits(p) }
    }
    #[inline(always)]
    unsafe fn pair(p: *const bf16) -> L::I {
        unsafe { L::splat_bits(p.cast::<u32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn lone(p: *const bf16) -> L::I {
        unsafe { L::splat_bits((*p).to_bits() as u32) }
    }
    #[inline(always)]
    unsafe fn odd(acc: L::F, w: L::I, x: L::I) -> L::F {
        unsafe { L::fma(L::high(x), L::high(w), acc) }
    }
    #[inline(always)]
    unsafe fn even(acc: L::F, w: L::I, x: L::I) -> L::F {
        unsafe { L::fma(L::low(x), L::low(w), acc) }
    }
    #[inline(always)]
    unsafe fn both(acc: L::F, w: L::I, x: L::I) -> L::F {
        unsafe { L::dot(acc, w, x) }
    }
}

struct FullByHalf;

impl<L: Lanes> Product<L> for FullByHalf {
    type X = f32;
    type W = L::I;
    type P = (L::F, L::F);
    const WORDS: usize = 1;
    #[inline(always)]
    unsafe fn weights(p: *const u32, _width: usize) -> L::I {
        unsafe { L::load_bits(p) }
    }
    #[inline(always)]
    unsafe fn pair(p: *const f32) -> Self::P {
        unsafe { (L::splat(*p), L::splat(*p.add(1))) }
    }
    #[inline(always)]
    unsafe fn lone(p: *const f32) -> Self::P {
        unsafe { (L::splat(*p), L::splat(0.0)) }
    }
    #[inline(always)]
    unsafe fn odd(acc: L::F, w: L::I, x: Self::P) -> L::F {
        unsafe { L::fma(x.1, L::high(w), acc) }
    }
    #[inline(always)]
    unsafe fn even(acc: L::F, w: L::I, x: Self::P) -> L::F {
        unsafe { L::fma(x.0, L::low(w), acc) }
    }
}

struct FullByFull;

impl<L: Lanes> Product<L> for FullByFull {
    type X = f32;
    type W = (L::F, L::F);
    type P = (L::F, L::F);
    const WORDS: usize = 2;
    #[inline(always)]
    unsafe fn weights(p: *const u32, width: usize) -> Self::W {
        unsafe { (L::load(p.cast()), L::load(p.add(width).cast())) }
    }
    #[inline(always)]
    unsafe fn pair(p: *const f32) -> Self::P {
        unsafe { (L::splat(*p), L::splat(*p.add(1))) }
    }
    #[inline(always)]
    unsafe fn lone(p: *const f32) -> Self::P {
        unsafe { (L::splat(*p), L::splat(0.0)) }
    }
    #[inline(always)]
    unsafe fn odd(acc: L::F, w: Self::W, x: Self::P) -> L::F {
        unsafe { L::fma(x.1, w.1, acc) }
    }
    #[inline(always)]
    unsafe fn even(acc: L::F, w: Self::W, x: Self::P) -> L::F {
        unsafe { L::fma(x.0, w.0, acc) }
    }
}

/// Words that codes are widened to; their last chunk is padded to a whole block of AMX's at most.
#[repr(C, align(64))]
struct Tile([u32; TILE_WORDS]);

/// Rows of activations against one panel.
pub struct Task<'a, T> {
    pub w: &'a Packed,
    pub panel: usize,
    pub family: KernelFamily,
    /// The first input of each row.
    pub x: &'a [*const T],
    pub bias: Option<&'a [f32]>,
    /// The first row's first output of the whole matrix, and the distance of rows.
    pub out: *mut f32,
    pub out_stride: usize,
}

/// A stretch of one segment for all rows of a task.
pub struct Part<'a, T> {
    w: *const u32,
    width: usize,
    x: &'a [*const T],
    /// Offset of the stretch in each row.
    at: usize,
    pairs: usize,
    lone: bool,
    acc: *mut f32,
}

impl<T: Input> Kernel for Task<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let w = self.w;
        let (rows, width) = (self.x.len(), w.width(self.panel));
        assert!(rows <= TASK_ROWS && self.panel < w.panels());
        let mut sums = MaybeUninit::<[f32; PENDING * TASK_ROWS * PANEL]>::uninit();
        let sums = sums.as_mut_ptr().cast::<f32>();
        let length = w.cols / w.segments;
        let words = if w.wide { 2 } else { 1 };
        let most = if w.coded.is_some() { chunk(rows).min(TILE_PAIRS) } else { chunk(rows) };
        let mut tile = MaybeUninit::<Tile>::uninit();
        let tile = tile.as_mut_ptr().cast::<u32>();
        let mut depth = 0;
        for segment in 0..w.segments {
            // SAFETY: at most PENDING sums are pending, each of `rows * PANEL`; offsets stay inside the panel and
            // the rows, which the maker of the task vouches for.
            unsafe {
                let acc = sums.add(depth * rows * PANEL);
                std::ptr::write_bytes(acc, 0, rows * PANEL);
                let mut pair = 0;
                while pair < length.div_ceil(2) {
                    let pairs = (length / 2).saturating_sub(pair).min(most);
                    let lone = length % 2 == 1 && pair + pairs == length / 2;
                    let at = segment * length + pair * 2;
                    let from = if let Some(coded) = &w.coded {
                        // The padding is the end of the segment's last block, so less than one of `TILE_PAIRS`.
                        let pad = if pair + pairs == length / 2 { w.pairs - length / 2 } else { 0 };
                        coded.widen::<L>((self.panel, width), (at, pairs, pad), w.wide, tile);
                        tile.cast_const()
                    } else {
                        let start = w.panel_start(self.panel) + (segment * w.pairs + pair) * words * width;
                        w.words.as_ptr().add(start)
                    };
                    let part = Part { w: from, width, x: self.x, at, pairs, lone, acc };
                    T::accumulate::<L>(&self, &part);
                    pair += pairs + usize::from(lone);
                }
                depth += 1;
                let mut joined = segment + 1;
                while joined % 2 == 0 {
                    join::<L>(sums.add((depth - 2) * rows * PANEL), sums.add((depth - 1) * rows * PANEL), rows * PANEL);
                    depth -= 1;
                    joined /= 2;
                }
            }
        }
        // SAFETY: the first sum is complete; `out` is the maker's promise.
        unsafe { self.finish::<L>(sums) };
    }
}

/// `a += b`.
#[inline(always)]
unsafe fn join<L: Lanes>(a: *mut f32, b: *const f32, n: usize) {
    for i in (0..n).step_by(LANES) {
        unsafe { L::store(a.add(i), L::add(L::load(a.add(i)), L::load(b.add(i)))) };
    }
}

impl<T> Task<'_, T> {
    #[inline(always)]
    unsafe fn finish<L: Lanes>(&self, sums: *const f32) {
        let first = self.panel * PANEL;
        let count = (self.w.rows - first).min(PANEL);
        for row in 0..self.x.len() {
            for at in (0..count).step_by(LANES) {
                let n = (count - at).min(LANES);
                unsafe {
                    let mut v = L::load(sums.add(row * PANEL + at));
                    if let Some(bias) = self.bias {
                        v = L::add(v, f32::load_up_to::<L>(bias.as_ptr().add(first + at), n));
                    }
                    f32::store_up_to::<L>(self.out.add(row * self.out_stride + first + at), v, n);
                }
            }
        }
    }
}

impl Input for bf16 {
    #[inline(always)]
    unsafe fn accumulate<L: Lanes>(task: &Task<'_, bf16>, part: &Part<'_, bf16>) {
        unsafe {
            match task.family {
                KernelFamily::Vector if L::DOT => chains::<L, HalfByHalf>(part),
                KernelFamily::Vector => widened::<L>(part),
                KernelFamily::Amx => blocks::<L>(part),
            }
        }
    }
}

impl Input for f32 {
    #[inline(always)]
    unsafe fn accumulate<L: Lanes>(task: &Task<'_, f32>, part: &Part<'_, f32>) {
        unsafe { if task.w.wide { chains::<L, FullByFull>(part) } else { chains::<L, FullByHalf>(part) } }
    }
}

/// Without bf16 products the rows are widened once for all columns of the part; the chains are the same.
#[inline(always)]
unsafe fn widened<L: Lanes>(part: &Part<'_, bf16>) {
    const STRIDE: usize = 2 * CHUNK + LANES;
    let mut wide = MaybeUninit::<[f32; TASK_ROWS * STRIDE]>::uninit();
    let wide = wide.as_mut_ptr().cast::<f32>();
    let mut x = [std::ptr::null::<f32>(); TASK_ROWS];
    let inputs = 2 * part.pairs + usize::from(part.lone);
    // SAFETY: a row of a part is at most a chunk, and its lanes are read no further than it goes.
    unsafe {
        for (row, from) in part.x.iter().enumerate() {
            let to = wide.add(row * STRIDE);
            x[row] = to;
            for i in (0..inputs).step_by(LANES) {
                L::store(to.add(i), bf16::load_up_to::<L>(from.add(part.at + i), inputs - i));
            }
        }
        let Part { w, width, pairs, lone, acc, .. } = *part;
        chains::<L, FullByHalf>(&Part { w, width, x: &x[..part.x.len()], at: 0, pairs, lone, acc });
    }
}

/// All rows and columns of a part, in register tiles.
#[inline(always)]
unsafe fn chains<L: Lanes, M: Product<L>>(part: &Part<'_, M::X>) {
    unsafe {
        let mut row = 0;
        // Sixteen registers hold four rows' chains, weights and inputs.
        while L::WIDE && part.x.len() - row >= PASS_ROWS {
            columns::<L, M, PASS_ROWS>(part, row);
            row += PASS_ROWS;
        }
        while part.x.len() - row >= 4 {
            columns::<L, M, 4>(part, row);
            row += 4;
        }
        if part.x.len() - row >= 2 {
            columns::<L, M, 2>(part, row);
            row += 2;
        }
        if part.x.len() - row == 1 {
            columns::<L, M, 1>(part, row);
        }
    }
}

#[inline(always)]
unsafe fn columns<L: Lanes, M: Product<L>, const R: usize>(part: &Part<'_, M::X>, row: usize) {
    let mut lane = 0;
    unsafe {
        if L::WIDE || R == 1 {
            if part.width == 4 * LANES {
                return tile::<L, M, R, 4>(part, row, 0);
            }
            while part.width - lane >= 2 * LANES {
                tile::<L, M, R, 2>(part, row, lane);
                lane += 2 * LANES;
            }
        }
        while lane < part.width {
            tile::<L, M, R, 1>(part, row, lane);
            lane += LANES;
        }
    }
}

/// R rows by V vectors of outputs, held in registers.
#[inline(always)]
unsafe fn tile<L: Lanes, M: Product<L>, const R: usize, const V: usize>(
    part: &Part<'_, M::X>,
    row: usize,
    lane: usize,
) {
    unsafe {
        let acc = part.acc.add(row * PANEL + lane);
        let mut sums = [[L::splat(0.0); V]; R];
        let mut x = [part.x[row]; R];
        for r in 0..R {
            x[r] = part.x[row + r].add(part.at);
            for v in 0..V {
                sums[r][v] = L::load(acc.add(r * PANEL + v * LANES));
            }
        }
        let mut w = part.w.add(lane);
        let (passes, chunk) = (part.x.len().div_ceil(PASS_ROWS), part.pairs * M::WORDS * part.width);
        let mut turn = if passes > 1 { row / PASS_ROWS } else { usize::MAX };
        for pair in 0..part.pairs + usize::from(part.lone) {
            let mut weights = [M::weights(w, part.width); V];
            for v in 1..V {
                weights[v] = M::weights(w.add(v * LANES), part.width);
            }
            // Passes over a chunk share the work of asking for the next one, which the hardware would not foresee.
            if turn == 0 {
                for line in 0..V * M::WORDS {
                    L::prefetch(w.wrapping_add(chunk + line * LANES).cast());
                }
                turn = passes;
            }
            turn = turn.wrapping_sub(1);
            for r in 0..R {
                let input = if pair < part.pairs { M::pair(x[r].add(2 * pair)) } else { M::lone(x[r].add(2 * pair)) };
                for v in 0..V {
                    sums[r][v] = M::both(sums[r][v], weights[v], input);
                }
            }
            w = w.add(M::WORDS * part.width);
        }
        for r in 0..R {
            for v in 0..V {
                L::store(acc.add(r * PANEL + v * LANES), sums[r][v]);
            }
        }
    }
}

/// A part in AMX's order: by its tiles, or emulated.
#[inline(always)]
unsafe fn blocks<L: Lanes>(part: &Part<'_, bf16>) {
    #[cfg(target_arch = "x86_64")]
    if L::TILES {
        let (extent, w) = ((part.pairs, part.lone), (part.w, part.width));
        // SAFETY: the level was made after `amx::available` said yes; the part holds what it names.
        return unsafe { super::amx::accumulate(part.x, part.at, extent, w, part.acc) };
    }
    for row in 0..part.x.len() {
        let mut lane = 0;
        unsafe {
            while part.width - lane >= 4 * LANES {
                block_row::<L, 4>(part, row, lane);
                lane += 4 * LANES;
            }
            while lane < part.width {
                block_row::<L, 1>(part, row, lane);
                lane += LANES;
            }
        }
    }
}

#[inline(always)]
unsafe fn block_row<L: Lanes, const V: usize>(part: &Part<'_, bf16>, row: usize, lane: usize) {
    type M = HalfByHalf;
    unsafe {
        let acc = part.acc.add(row * PANEL + lane);
        let x = part.x[row].add(part.at);
        let all = part.pairs + usize::from(part.lone);
        for start in (0..all).step_by(AMX_PAIRS) {
            let (mut even, mut odd) = ([L::splat(0.0); V], [L::splat(0.0); V]);
            for pair in start..all.min(start + AMX_PAIRS) {
                let input = if pair < part.pairs {
                    <M as Product<L>>::pair(x.add(2 * pair))
                } else {
                    <M as Product<L>>::lone(x.add(2 * pair))
                };
                for v in 0..V {
                    let w = <M as Product<L>>::weights(part.w.add(pair * part.width + lane + v * LANES), part.width);
                    odd[v] = <M as Product<L>>::odd(odd[v], w, input);
                    even[v] = <M as Product<L>>::even(even[v], w, input);
                }
            }
            for v in 0..V {
                let at = acc.add(v * LANES);
                L::store(at, L::add(L::load(at), L::add(even[v], odd[v])));
            }
        }
    }
}

/// Where a multiplication's rows of activations lie.
#[derive(Clone, Copy)]
pub struct Source<'a, T> {
    pub values: &'a [T],
    /// The first input of row 0, and the distance of rows.
    pub start: usize,
    pub stride: usize,
    /// Row of `values` for each row of the result; the same where `None`.
    pub picks: Option<&'a [u32]>,
}

impl<T> Source<'_, T> {
    /// Pointers to rows `range` of the result, each checked to hold `cols` inputs.
    fn rows<'b>(&self, range: Range<usize>, cols: usize, into: &'b mut [*const T; TASK_ROWS]) -> &'b [*const T] {
        let count = range.len();
        for (slot, row) in into.iter_mut().zip(range) {
            let source = self.picks.map_or(row, |picks| picks[row] as usize);
            *slot = self.values[self.start + source * self.stride..][..cols].as_ptr();
        }
        &into[..count]
    }
}

/// Rows of a result inside a wider one.
#[derive(Clone, Copy)]
pub struct Target<'a> {
    pub values: &'a Shared<'a, f32>,
    pub start: usize,
    pub stride: usize,
}

/// One panel of `rows` of the result.
///
/// # Safety
/// No two calls at the same time write the same (panel, row) of a target.
#[allow(clippy::too_many_arguments)] // the parts of one product
pub unsafe fn panel<T: Input>(
    level: Level,
    family: KernelFamily,
    x: Source<'_, T>,
    w: &Packed,
    panel: usize,
    bias: Option<&[f32]>,
    rows: Range<usize>,
    out: Target<'_>,
) {
    assert!(bias.is_none_or(|b| b.len() == w.rows));
    assert!(rows.is_empty() || out.start + (rows.end - 1) * out.stride + w.rows <= out.values.len());
    assert!(!w.wide || size_of::<T>() == 4, "f32 weights need f32 inputs");
    let mut pointers = [std::ptr::null(); TASK_ROWS];
    let first = rows.start;
    let x = x.rows(rows, w.cols, &mut pointers);
    // SAFETY: inside the target by the assertion above.
    let start = unsafe { out.values.pointer().add(out.start + first * out.stride) };
    level.run(Task { w, panel, family, x, bias, out: start, out_stride: out.stride });
}

/// `out[n, w.rows] = x w^T (+ bias)`.
#[allow(clippy::too_many_arguments)] // the parts of one product
pub fn multiply<T: Input>(
    pool: &Pool,
    level: Level,
    family: KernelFamily,
    x: Source<'_, T>,
    w: &Packed,
    bias: Option<&[f32]>,
    n: usize,
    out: &mut [f32],
) {
    let out = Shared::new(out);
    let target = Target { values: &out, start: 0, stride: w.rows };
    let strips = n.div_ceil(TASK_ROWS);
    pool.run(w.panels() * strips, &|task| {
        let (panel_index, strip) = (task / strips, task % strips);
        let rows = strip * TASK_ROWS..n.min((strip + 1) * TASK_ROWS);
        // SAFETY: each task has its own panel and rows.
        unsafe { panel(level, family, x, w, panel_index, bias, rows, target) };
    });
}

/// `out[p] = x[p] w[e]^T` for the pairs `offsets[e]..offsets[e + 1]` of each expert in `active`; matrices alike.
#[allow(clippy::too_many_arguments)] // the parts of one product
pub fn multiply_experts<T: Input>(
    pool: &Pool,
    level: Level,
    family: KernelFamily,
    x: Source<'_, T>,
    w: &[impl AsRef<Packed> + Sync],
    offsets: &[u32],
    active: &[u32],
    out: &mut [f32],
) {
    let Some(&first) = active.first() else { return };
    let (panels, rows) = (w[first as usize].as_ref().panels(), w[first as usize].as_ref().rows);
    let out = Shared::new(out);
    pool.run(active.len() * panels, &|task| {
        let expert = active[task / panels] as usize;
        let w = w[expert].as_ref();
        assert_eq!(w.rows, rows, "experts differ in shape");
        let target = Target { values: &out, start: 0, stride: rows };
        let (start, end) = (offsets[expert] as usize, offsets[expert + 1] as usize);
        for at in (start..end).step_by(TASK_ROWS) {
            // SAFETY: each task has its own panel of its own expert's pairs.
            unsafe { panel(level, family, x, w, task % panels, None, at..end.min(at + TASK_ROWS), target) };
        }
    });
}
