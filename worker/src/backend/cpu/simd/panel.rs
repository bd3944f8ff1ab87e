//! Multiplications: panels of packed weights against rows of activations, in the canonical order (see the parent).
//!
//! ```text
//! task (panel, up to 64 rows)      per segment: accumulators <- +0.0
//!   per chunk of up to 256 pairs       per 6 rows x 4 vectors, or tiles: registers <- accumulators, the chunk, and back
//!                                  then the tree over segments, the bias, and out
//! ```
//! Storing and reloading an f32 accumulator changes no bit, so the blocking is free to serve the caches.

use super::Level;
use super::chains::{PASS_ROWS, Part, Tiles, blocks, chains, widened};
use super::coded::Coded;
use super::lanes::{Element, Kernel, LANES, Lanes};
use super::pack::{PANEL, Packed};
use super::pool::Pool;
use super::products::{FullByFull, FullByHalf, HalfByHalf};
use super::runs::{self, Stretch};
use super::shared::Shared;
use half::bf16;
use model::plan::KernelFamily;
use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Most rows of one task.
pub const TASK_ROWS: usize = 64;
/// Most pairs between two stores of the accumulators: 64 KiB of a bf16 panel.
pub const CHUNK: usize = 256;
/// Pairs that AMX sums from zero before it adds to the accumulator.
pub const AMX_PAIRS: usize = 16;
/// Rows of one of its tiles.
pub const AMX_ROWS: usize = 16;
/// Sums pending in the tree: one for each power of two up to 8 segments.
pub const PENDING: usize = 4;

/// Rows of one task: whole passes, or whole pairs of tiles.
pub const fn task_rows(family: KernelFamily) -> usize {
    match family {
        KernelFamily::Amx => TASK_ROWS,
        KernelFamily::Vector | KernelFamily::Tensor => 8 * PASS_ROWS,
    }
}

/// Pairs between two stores: with a few passes over the rows a chunk stays in the first cache between them. Weights that are met
/// `once` come from memory: the shorter the stretch, the sooner the next one is asked for.
const fn chunk(rows: usize, family: KernelFamily, once: bool) -> usize {
    match family {
        KernelFamily::Amx if rows > AMX_ROWS => CHUNK / if once { 4 } else { 2 },
        KernelFamily::Amx => CHUNK,
        KernelFamily::Vector | KernelFamily::Tensor => match rows.div_ceil(PASS_ROWS) {
            2 => CHUNK / 8,
            3 | 4 => CHUNK / 4,
            _ => CHUNK,
        },
    }
}

/// Activations of one format that weights can meet.
pub trait Input: Element {
    /// A task's sums over all segments, `[rows][PANEL]`, where there is a shorter way to them; whether there was.
    ///
    /// # Safety
    /// As [`Task::run`].
    #[inline(always)]
    unsafe fn sums<L: Lanes>(_task: &Task<'_, Self>, _out: *mut f32) -> bool {
        false
    }
    /// # Safety
    /// As [`Task::run`].
    unsafe fn accumulate<L: Lanes>(task: &Task<'_, Self>, part: &Part<'_, Self>);
    /// A segment's codes, `(first input, inputs)`.
    ///
    /// # Safety
    /// The same.
    unsafe fn coded<L: Lanes>(task: &Task<'_, Self>, coded: &Coded, extent: (usize, usize), acc: *mut f32);
    /// # Safety
    /// The same.
    unsafe fn runs<L: Lanes>(task: &Task<'_, Self>, stretch: &Stretch<'_, Self>);
}

/// Rows of activations against one panel.
pub struct Task<'a, T> {
    pub w: &'a Packed,
    pub panel: usize,
    pub family: KernelFamily,
    /// The first input of each row; for tiles at one distance.
    pub x: &'a [*const T],
    pub bias: Option<&'a [f32]>,
    /// Where the first row's outputs of the panel go, and the distance of rows.
    pub place: (*mut f32, usize),
    /// No other task meets the panel soon.
    pub once: bool,
    pub tiles: Tiles,
}

impl<T: Input> Kernel for Task<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let w = self.w;
        let rows = self.x.len();
        assert!(rows <= TASK_ROWS && self.panel < w.panels());
        let mut sums = MaybeUninit::<[f32; PENDING * TASK_ROWS * PANEL]>::uninit();
        let sums = sums.as_mut_ptr().cast::<f32>();
        let length = w.cols / w.segments;
        let mut depth = 0;
        // SAFETY: there is room for several; the rest is what the maker of the task vouches for.
        let done = w.coded.is_none() && unsafe { T::sums::<L>(&self, sums) };
        for segment in 0..if done { 0 } else { w.segments } {
            // SAFETY: at most PENDING sums are pending, each of `rows * PANEL`; offsets stay inside the panel and
            // the rows, which the maker of the task vouches for.
            unsafe {
                let acc = sums.add(depth * rows * PANEL);
                std::ptr::write_bytes(acc, 0, rows * PANEL);
                match &w.coded {
                    Some(coded) => T::coded::<L>(&self, coded, (segment * length, length), acc),
                    None => self.segment::<L>(segment, length, acc),
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
        // SAFETY: the first sum is complete; the place is the maker's promise.
        unsafe { self.finish::<L>(sums) };
    }
}

/// `a += b`.
///
/// # Safety
/// Both have `n` numbers, in whole vectors.
#[inline(always)]
pub unsafe fn join<L: Lanes>(a: *mut f32, b: *const f32, n: usize) {
    for i in (0..n).step_by(LANES) {
        unsafe { L::store(a.add(i), L::add(L::load(a.add(i)), L::load(b.add(i)))) };
    }
}

impl<T: Input> Task<'_, T> {
    /// Adds a segment's products to the accumulators of all rows.
    #[inline(always)]
    unsafe fn segment<L: Lanes>(&self, segment: usize, length: usize, acc: *mut f32) {
        let (w, width, most) = (self.w, self.w.width(self.panel), chunk(self.x.len(), self.family, self.once));
        let words = if w.wide { 2 } else { 1 };
        let mut pair = 0;
        while pair < length.div_ceil(2) {
            let pairs = (length / 2).saturating_sub(pair).min(most);
            let lone = length % 2 == 1 && pair + pairs == length / 2;
            let at = segment * length + pair * 2;
            let start = w.panel_start(self.panel) + (segment * w.pairs + pair) * words * width;
            // SAFETY: offsets stay inside the panel and the rows, which the maker of the task vouches for.
            unsafe {
                let from = w.words.as_ptr().add(start);
                T::accumulate::<L>(self, &Part { w: from, width, x: self.x, at, pairs, lone, acc });
            }
            pair += pairs + usize::from(lone);
        }
    }

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
                    f32::store_up_to::<L>(self.place.0.add(row * self.place.1 + at), v, n);
                }
            }
        }
    }
}

impl Input for bf16 {
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn sums<L: Lanes>(task: &Task<'_, bf16>, out: *mut f32) -> bool {
        unsafe { super::tree::sums::<L>(task, out) }
    }

    #[inline(always)]
    unsafe fn accumulate<L: Lanes>(task: &Task<'_, bf16>, part: &Part<'_, bf16>) {
        unsafe {
            match task.family {
                KernelFamily::Vector if L::DOT => chains::<L, HalfByHalf>(part),
                KernelFamily::Vector | KernelFamily::Tensor => widened::<L>(part),
                KernelFamily::Amx => blocks::<L>(&task.tiles, part),
            }
        }
    }

    #[inline(always)]
    unsafe fn coded<L: Lanes>(task: &Task<'_, bf16>, coded: &Coded, extent: (usize, usize), acc: *mut f32) {
        unsafe { runs::segment::<L>(task, coded, extent, acc) }
    }

    #[inline(always)]
    unsafe fn runs<L: Lanes>(task: &Task<'_, bf16>, stretch: &Stretch<'_, bf16>) {
        unsafe { runs::halves::<L>(task, stretch) }
    }
}

impl Input for f32 {
    #[inline(always)]
    unsafe fn accumulate<L: Lanes>(task: &Task<'_, f32>, part: &Part<'_, f32>) {
        unsafe { if task.w.wide { chains::<L, FullByFull>(part) } else { chains::<L, FullByHalf>(part) } }
    }

    #[inline(always)]
    unsafe fn coded<L: Lanes>(task: &Task<'_, f32>, coded: &Coded, extent: (usize, usize), acc: *mut f32) {
        unsafe { runs::stretches::<L, f32>(task, coded, extent, acc) }
    }

    #[inline(always)]
    unsafe fn runs<L: Lanes>(_task: &Task<'_, f32>, stretch: &Stretch<'_, f32>) {
        unsafe { runs::chained::<L, FullByHalf>(stretch) }
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
    pub fn rows<'b>(&self, range: Range<usize>, cols: usize, into: &'b mut [*const T; TASK_ROWS]) -> &'b [*const T] {
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

/// Some panels of `rows` of the result.
///
/// # Safety
/// No two calls at the same time write the same (panel, row) of a target.
#[allow(clippy::too_many_arguments)] // the parts of one product
pub unsafe fn panels<T: Input>(
    level: Level,
    family: KernelFamily,
    x: Source<'_, T>,
    w: &Packed,
    panels: Range<usize>,
    bias: Option<&[f32]>,
    rows: Range<usize>,
    out: Target<'_>,
) {
    assert!(bias.is_none_or(|b| b.len() == w.rows));
    assert!(rows.is_empty() || out.start + (rows.end - 1) * out.stride + w.rows <= out.values.len());
    assert!(!w.wide || size_of::<T>() == 4, "f32 weights need f32 inputs");
    let once = rows.len() <= TASK_ROWS;
    let run = |x: &[*const T], panel: usize, first: usize| {
        // SAFETY: inside the target by the assertion above.
        let start = unsafe { out.values.pointer().add(out.start + first * out.stride + panel * PANEL) };
        level.run(Task { w, panel, family, x, bias, place: (start, out.stride), once, tiles: Tiles::default() });
    };
    let mut pointers = [std::ptr::null(); TASK_ROWS];
    if x.picks.is_some() && level.has_tiles() && family == KernelFamily::Amx {
        for first in rows.clone().step_by(TASK_ROWS) {
            let some = x.rows(first..rows.end.min(first + TASK_ROWS), w.cols, &mut pointers);
            at_one_distance(some, w.cols, |x| panels.clone().for_each(|panel| run(x, panel, first)));
        }
        return;
    }
    let height = task_rows(family);
    for panel in panels {
        for first in rows.clone().step_by(height) {
            run(x.rows(first..rows.end.min(first + height), w.cols, &mut pointers), panel, first);
        }
    }
}

/// The distance of rows in bytes, where it is one and the same.
pub fn even_stride<T>(rows: &[*const T]) -> Option<usize> {
    let Some(second) = rows.get(1) else { return Some(0) };
    let stride = (*second as usize).wrapping_sub(rows[0] as usize);
    let even = rows.windows(2).all(|pair| (pair[1] as usize).wrapping_sub(pair[0] as usize) == stride);
    even.then_some(stride)
}

/// Calls `with` with rows at one distance: these, or copies of them, whose distance then is no multiple of large powers of two,
/// or the lines of a tile would share few sets of the first cache.
pub fn at_one_distance<T: Input>(x: &[*const T], cols: usize, with: impl FnOnce(&[*const T])) {
    if even_stride(x).is_some() {
        return with(x);
    }
    thread_local! {
        static COPY: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    const LINE: usize = 64;
    let stride = (cols * size_of::<T>()).next_multiple_of(2 * LINE) + LINE;
    COPY.with_borrow_mut(|copy| {
        let needed = TASK_ROWS * stride + LINE;
        if copy.len() < needed {
            copy.resize(needed, 0);
        }
        let start = copy.as_mut_ptr();
        let start = start.wrapping_add(start.align_offset(LINE));
        let mut rows = [std::ptr::null::<T>(); TASK_ROWS];
        for (row, from) in x.iter().enumerate() {
            let to = start.wrapping_add(row * stride).cast::<T>();
            // SAFETY: the maker of the rows checked that each holds `cols` inputs; the copy has room for `TASK_ROWS` of them.
            unsafe { std::ptr::copy_nonoverlapping(*from, to, cols) };
            rows[row] = to;
        }
        with(&rows[..x.len()]);
    });
}

/// Rows that a task multiplies with a panel: as many as fit in half of a usual second cache, where they stay while panels come
/// and go.
pub fn strip_rows(family: KernelFamily, cols: usize) -> usize {
    const CACHE: usize = 1 << 20;
    let height = task_rows(family);
    (CACHE / (2 * cols) / height * height).clamp(height, 8 * height)
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
    in_strips(pool, (n, strip_rows(family, w.cols)), w.panels(), &|panel, rows| {
        // SAFETY: each task has its own panel and rows.
        unsafe { panels(level, family, x, w, panel, bias, rows, target) };
    });
}

/// Gives each task a panel and up to `height` of a product's `n` rows.
pub fn in_strips(
    pool: &Pool,
    (n, height): (usize, usize),
    panels: usize,
    task: &(dyn Fn(Range<usize>, Range<usize>) + Sync),
) {
    pool.run(n.div_ceil(height) * panels, &|number| {
        let (strip, panel) = (number / panels, number % panels);
        task(panel..panel + 1, strip * height..n.min((strip + 1) * height));
    });
}

/// Gives each task an expert of `active`, some of its `panels`, and its pairs `offsets[e]..offsets[e + 1]`: what is gathered for a task
/// is worth several panels.
pub fn by_expert(
    pool: &Pool,
    (offsets, active): (&[u32], &[u32]),
    panels: usize,
    gathers: bool,
    task: &(dyn Fn(usize, Range<usize>, Range<usize>) + Sync),
) {
    let many = offsets.last().is_some_and(|&pairs| pairs as usize > active.len() * AMX_ROWS);
    let each = if gathers && many { panels.div_ceil(2) } else { 1 };
    let groups = panels.div_ceil(each);
    pool.run(active.len() * groups, &|number| {
        let (expert, group) = (active[number / groups] as usize, number % groups);
        let pairs = offsets[expert] as usize..offsets[expert + 1] as usize;
        task(expert, group * each..panels.min((group + 1) * each), pairs);
    });
}

/// `out[p] = x[p] w[e]^T` for the pairs of each expert in `active`; matrices alike.
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
    let (all, rows) = (w[first as usize].as_ref().panels(), w[first as usize].as_ref().rows);
    let out = Shared::new(out);
    by_expert(pool, (offsets, active), all, x.picks.is_some(), &|expert, range, pairs| {
        let w = w[expert].as_ref();
        assert_eq!(w.rows, rows, "experts differ in shape");
        let target = Target { values: &out, start: 0, stride: rows };
        // SAFETY: each task has its own panels of its own expert's pairs.
        unsafe { panels(level, family, x, w, range, None, pairs, target) };
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_rows_at_one_distance_are_loaded_in_place() {
        let memory = [bf16::ZERO; 64];
        let at = |i: usize| memory[i..].as_ptr();
        assert_eq!(even_stride(&[at(8)]), Some(0));
        assert_eq!(even_stride(&[at(0), at(8), at(16)]), Some(16));
        assert_eq!(even_stride(&[at(0), at(8), at(8)]), None);
        assert_eq!(even_stride(&[at(3), at(3)]), Some(0));
    }
}
