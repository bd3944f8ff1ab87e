//! Multiplications with weights that are kept in codes. Codes are small numbers that bf16 holds exactly, so they are
//! multiplied as they are; what a run of inputs shares, its scale, is applied once to the run's sum:
//!
//! ```text
//! acc <- acc + scale * sum(code x)      acc <- acc - shift * sum(x)      (one FMA each)
//! ```
//! A run's sum starts at zero and follows the kernel family's order; `sum(x)` adds vectors of sixteen inputs, then their lanes.

use super::alone;
use super::chains::{Grid, Wide, cover, emulated};
use super::coded::{Coded, RUNS_MAX, TILE_PAIRS, TILE_WORDS};
use super::lanes::{Element, LANES, Lanes};
use super::pack::PANEL;
#[cfg(target_arch = "x86_64")]
use super::panel::AMX_ROWS;
use super::panel::{AMX_PAIRS, Input, TASK_ROWS, Task};
use super::products::{FullByHalf, HalfByHalf, Product};
use half::bf16;
use model::plan::KernelFamily;
use std::marker::PhantomData;
use std::mem::MaybeUninit;

/// Some runs of one segment for all rows of a task: at most [`RUNS_MAX`], and [`TILE_PAIRS`] pairs of inputs.
pub struct Stretch<'a, T> {
    /// Codes as bf16 pairs: pair-rows of `width` words.
    w: *const u32,
    width: usize,
    x: &'a [*const T],
    /// Offset of the stretch in each row.
    at: usize,
    runs: usize,
    /// Pairs of a run.
    pairs: usize,
    factors: &'a Factors,
    shifted: bool,
    /// `[row][run]`, where shifted.
    totals: *const f32,
    /// `[row][PANEL]`.
    acc: *mut f32,
}

/// What the runs of a stretch share, each `[run][output]`.
#[repr(C, align(64))]
pub struct Factors {
    pub scales: [[f32; PANEL]; RUNS_MAX],
    pub shifts: [[f32; PANEL]; RUNS_MAX],
}

#[repr(C, align(64))]
struct Tile([u32; TILE_WORDS]);

/// Adds a segment's products to the accumulators of all rows, a stretch after the other.
///
/// # Safety
/// As the maker of the task vouches: rows hold the inputs `at..at + length`, accumulators are `[row][PANEL]`.
#[inline(always)]
pub unsafe fn stretches<L: Lanes, T: Input>(
    task: &Task<'_, T>,
    coded: &Coded,
    (at, length): (usize, usize),
    acc: *mut f32,
) {
    let (place, pairs) = ((task.panel, task.w.width(task.panel)), coded.run_pairs());
    let most = (TILE_PAIRS / pairs).min(RUNS_MAX);
    let mut tile = MaybeUninit::<Tile>::uninit();
    let tile = tile.as_mut_ptr().cast::<u32>();
    let mut factors = MaybeUninit::<Factors>::uninit();
    let mut totals = MaybeUninit::<[f32; TASK_ROWS * RUNS_MAX]>::uninit();
    let totals = totals.as_mut_ptr().cast::<f32>();
    let shifted = coded.is_shifted();
    let all = length / (2 * pairs);
    for run in (0..all).step_by(most) {
        let (runs, at) = (most.min(all - run), at + run * 2 * pairs);
        // SAFETY: the caller's promises, some runs of them; the factors that are read were written.
        unsafe {
            coded.spread::<L>(place, (at, runs * pairs), tile);
            coded.factors::<L>(place, (at, runs), factors.as_mut_ptr());
            if shifted {
                for (row, x) in task.x.iter().enumerate() {
                    for run in 0..runs {
                        *totals.add(row * RUNS_MAX + run) = total::<L, T>(x.add(at + run * 2 * pairs), 2 * pairs);
                    }
                }
            }
            let factors = &*factors.as_ptr();
            T::runs::<L>(
                task,
                &Stretch { w: tile, width: place.1, x: task.x, at, runs, pairs, factors, shifted, totals, acc },
            );
        }
    }
}

/// The sum of `n` inputs.
#[inline(always)]
pub unsafe fn total<L: Lanes, T: Element>(x: *const T, n: usize) -> f32 {
    unsafe {
        let mut sum = T::load_up_to::<L>(x, n);
        for i in (LANES..n).step_by(LANES) {
            sum = L::add(sum, T::load_up_to::<L>(x.add(i), n - i));
        }
        L::sum(sum)
    }
}

impl Factors {
    /// Adds a run's sum of sixteen outputs to their accumulators; `total` is that of its inputs, where shifted.
    #[inline(always)]
    pub unsafe fn join<L: Lanes>(&self, (run, lane): (usize, usize), sum: L::F, total: Option<f32>, acc: *mut f32) {
        unsafe {
            let scale = L::load(self.scales[run].as_ptr().add(lane));
            let mut sum = L::fma(sum, scale, L::load(acc));
            if let Some(total) = total {
                sum = L::fma(L::load(self.shifts[run].as_ptr().add(lane)), L::splat(-total), sum);
            }
            L::store(acc, sum);
        }
    }
}

impl<T> Stretch<'_, T> {
    /// The sum of a run's inputs, where shifted.
    #[inline(always)]
    unsafe fn total(&self, row: usize, run: usize) -> Option<f32> {
        if self.shifted { Some(unsafe { *self.totals.add(row * RUNS_MAX + run) }) } else { None }
    }

    /// Adds a run's sums of some outputs to their accumulators.
    #[inline(always)]
    unsafe fn join<L: Lanes, const V: usize>(&self, (row, lane): (usize, usize), run: usize, sums: [L::F; V]) {
        unsafe {
            let total = self.total(row, run);
            for v in 0..V {
                let lane = lane + v * LANES;
                self.factors.join::<L>((run, lane), sums[v], total, self.acc.add(row * PANEL + lane));
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl Stretch<'_, bf16> {
    /// [`join`](Stretch::join) for N runs of some rows at once, whose sums lie in memory.
    #[inline(always)]
    unsafe fn settle<L: Lanes, const N: usize>(
        &self,
        (first, rows, lane): (usize, usize, usize),
        run: usize,
        sums: *const f32,
    ) {
        unsafe {
            let (mut scales, mut shifts) = ([L::splat(0.0); N], [L::splat(0.0); N]);
            for n in 0..N {
                scales[n] = L::load(self.factors.scales[run + n].as_ptr().add(lane));
                if self.shifted {
                    shifts[n] = L::load(self.factors.shifts[run + n].as_ptr().add(lane));
                }
            }
            for row in 0..rows {
                let acc = self.acc.add((first + row) * PANEL + lane);
                let mut sum = L::load(acc);
                for n in 0..N {
                    let add = L::load(sums.add((n * AMX_ROWS + row) * PANEL + lane));
                    sum = L::fma(add, scales[n], sum);
                    if let Some(total) = self.total(first + row, run + n) {
                        sum = L::fma(shifts[n], L::splat(-total), sum);
                    }
                }
                L::store(acc, sum);
            }
        }
    }
}

/// Runs summed in chains.
struct Chained<'a, L: Lanes, M: Product<L>>(&'a Stretch<'a, M::X>, PhantomData<L>);

impl<L: Lanes, M: Product<L>> Grid<L> for Chained<'_, L, M> {
    #[inline(always)]
    unsafe fn tile<const R: usize, const V: usize>(&self, row: usize, lane: usize) {
        let stretch = self.0;
        unsafe {
            let mut x = [stretch.x[row]; R];
            for r in 0..R {
                x[r] = stretch.x[row + r].add(stretch.at);
            }
            let mut w = stretch.w.add(lane);
            for run in 0..stretch.runs {
                let mut sums = [[L::splat(0.0); V]; R];
                for pair in run * stretch.pairs..(run + 1) * stretch.pairs {
                    let mut weights = [M::weights(w, stretch.width); V];
                    for v in 1..V {
                        weights[v] = M::weights(w.add(v * LANES), stretch.width);
                    }
                    for r in 0..R {
                        let input = M::pair(x[r].add(2 * pair));
                        for v in 0..V {
                            sums[r][v] = M::both(sums[r][v], weights[v], input);
                        }
                    }
                    w = w.add(stretch.width);
                }
                for r in 0..R {
                    stretch.join::<L, V>((row + r, lane), run, sums[r]);
                }
            }
        }
    }
}

/// # Safety
/// The stretch holds what it names.
#[inline(always)]
pub unsafe fn chained<L: Lanes, M: Product<L>>(stretch: &Stretch<'_, M::X>) {
    unsafe { cover::<L, _>(&Chained::<L, M>(stretch, PhantomData), (stretch.x.len(), stretch.width)) }
}

/// [`stretches`] of bf16 inputs; where they are few and go through tiles, run by run.
///
/// # Safety
/// As [`stretches`].
#[inline(always)]
pub unsafe fn segment<L: Lanes>(task: &Task<'_, bf16>, coded: &Coded, (at, length): (usize, usize), acc: *mut f32) {
    if task.family == KernelFamily::Amx && L::WIDE && task.x.len() == 1 && coded.run_pairs().is_multiple_of(4) {
        return unsafe { alone::row::<L>(task, coded, (at, length), acc) };
    }
    #[cfg(target_arch = "x86_64")]
    if task.family == KernelFamily::Amx && fits_tiles::<L>(coded.run_pairs()) && task.x.len() <= AMX_ROWS {
        return unsafe { piped::<L>(task, coded, (at, length), acc) };
    }
    unsafe { stretches::<L, bf16>(task, coded, (at, length), acc) }
}

/// bf16 inputs in any family's order.
///
/// # Safety
/// As [`chained`].
#[inline(always)]
pub unsafe fn halves<L: Lanes>(task: &Task<'_, bf16>, stretch: &Stretch<'_, bf16>) {
    unsafe {
        match task.family {
            KernelFamily::Vector if L::DOT => chained::<L, HalfByHalf>(stretch),
            KernelFamily::Vector | KernelFamily::Tensor => widened::<L>(stretch),
            KernelFamily::Amx => blocks::<L>(task, stretch),
        }
    }
}

/// Without bf16 products the rows are widened once for all columns; the chains are the same.
#[inline(always)]
unsafe fn widened<L: Lanes>(stretch: &Stretch<'_, bf16>) {
    let Stretch { w, width, at, runs, pairs, factors, shifted, totals, acc, .. } = *stretch;
    let mut wide = Wide::<{ 2 * TILE_PAIRS + LANES }>::new();
    // SAFETY: a row of a stretch is at most a tile.
    unsafe {
        let x = wide.rows::<L>(stretch.x, at, 2 * runs * pairs);
        chained::<L, FullByHalf>(&Stretch { w, width, x, at: 0, runs, pairs, factors, shifted, totals, acc });
    }
}

/// In AMX's order: by its tiles where a run is a block or several, or emulated.
#[inline(always)]
unsafe fn blocks<L: Lanes>(task: &Task<'_, bf16>, stretch: &Stretch<'_, bf16>) {
    #[cfg(target_arch = "x86_64")]
    if fits_tiles::<L>(stretch.pairs) {
        return unsafe { tiles::<L>(task, stretch) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = task;
    struct Blocks<'a>(&'a Stretch<'a, bf16>);
    impl<L: Lanes> Grid<L> for Blocks<'_> {
        #[inline(always)]
        unsafe fn tile<const R: usize, const V: usize>(&self, row: usize, lane: usize) {
            let Stretch { w, width, pairs, .. } = *self.0;
            unsafe {
                for row in row..row + R {
                    let x = self.0.x[row].add(self.0.at);
                    for run in 0..self.0.runs {
                        let w = w.add(run * pairs * width + lane);
                        let x = x.add(run * 2 * pairs);
                        let sums = emulated::<L, V>(x, (pairs, false), (w, width), [L::splat(0.0); V]);
                        self.0.join::<L, V>((row, lane), run, sums);
                    }
                }
            }
        }
    }
    unsafe { cover::<L, _>(&Blocks(stretch), (stretch.x.len(), stretch.width)) }
}

/// Whether runs of so many pairs are a block or several.
#[cfg(target_arch = "x86_64")]
fn fits_tiles<L: Lanes>(pairs: usize) -> bool {
    L::TILES && (pairs <= AMX_PAIRS || pairs.is_multiple_of(AMX_PAIRS))
}

/// Runs whose sums wait in memory for their scales: those of 16 rows fill 16 KiB.
#[cfg(target_arch = "x86_64")]
const WAITING: usize = 4;

#[cfg(target_arch = "x86_64")]
#[repr(C, align(64))]
struct Sums([f32; WAITING * AMX_ROWS * PANEL]);

#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn tiles<L: Lanes>(task: &Task<'_, bf16>, stretch: &Stretch<'_, bf16>) {
    use super::amx::sums;
    let mut waiting = MaybeUninit::<Sums>::uninit();
    let waiting = waiting.as_mut_ptr().cast::<f32>();
    let Stretch { w, width, pairs, .. } = *stretch;
    for first in (0..stretch.x.len()).step_by(AMX_ROWS) {
        let rows = &stretch.x[first..stretch.x.len().min(first + AMX_ROWS)];
        for run in (0..stretch.runs).step_by(WAITING) {
            let runs = WAITING.min(stretch.runs - run);
            let (at, w) = (stretch.at + run * 2 * pairs, w.wrapping_add(run * pairs * width));
            // SAFETY: the level was made after `amx::available` said yes; the stretch holds what it names.
            unsafe {
                sums(&task.tiles, rows, at, (runs, pairs), (w, width), waiting);
                for lane in (0..width).step_by(LANES) {
                    if runs == WAITING {
                        stretch.settle::<L, WAITING>((first, rows.len(), lane), run, waiting);
                        continue;
                    }
                    for r in 0..runs {
                        let waiting = waiting.add(r * AMX_ROWS * PANEL);
                        stretch.settle::<L, 1>((first, rows.len(), lane), run + r, waiting);
                    }
                }
            }
        }
    }
}

/// A segment for at most a tile of rows: while a run is multiplied the next one's codes are read and spread, so that memory is
/// never idle and no tile waits for words that were stored just before.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn piped<L: Lanes>(task: &Task<'_, bf16>, coded: &Coded, (at, length): (usize, usize), acc: *mut f32) {
    let (place, pairs) = ((task.panel, task.w.width(task.panel)), coded.run_pairs());
    let mut words = MaybeUninit::<[Tile; 2]>::uninit();
    let words = words.as_mut_ptr().cast::<u32>();
    let mut waiting = MaybeUninit::<Sums>::uninit();
    let waiting = waiting.as_mut_ptr().cast::<f32>();
    let mut factors = MaybeUninit::<Factors>::uninit();
    let mut totals = MaybeUninit::<[f32; AMX_ROWS * RUNS_MAX]>::uninit();
    let totals = totals.as_mut_ptr().cast::<f32>();
    let (width, shifted, runs) = (place.1, coded.is_shifted(), length / (2 * pairs));
    // SAFETY: the caller's promises, a run after the other; what is read of words, sums and factors was written.
    unsafe {
        coded.spread::<L>(place, (at, pairs), words);
        for run in 0..runs {
            let at = at + run * 2 * pairs;
            let (w, next) = (words.add(run % 2 * TILE_WORDS), words.add((run + 1) % 2 * TILE_WORDS));
            if run + 1 < runs {
                coded.spread::<L>(place, (at + 2 * pairs, pairs), next);
            }
            super::amx::sums(&task.tiles, task.x, at, (1, pairs), (w, width), waiting);
            coded.factors::<L>(place, (at, 1), factors.as_mut_ptr());
            if shifted {
                for (row, x) in task.x.iter().enumerate() {
                    *totals.add(row * RUNS_MAX) = total::<L, bf16>(x.add(at), 2 * pairs);
                }
            }
            let factors = &*factors.as_ptr();
            let stretch = Stretch { w, width, x: task.x, at, runs: 1, pairs, factors, shifted, totals, acc };
            for lane in (0..width).step_by(LANES) {
                stretch.settle::<L, 1>((0, task.x.len(), lane), 0, waiting);
            }
        }
    }
}
