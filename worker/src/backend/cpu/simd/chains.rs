//! Sums over a stretch of inputs, in the order of a kernel family: register tiles of chains, and AMX's blocks.

use super::lanes::{Element, LANES, Lanes};
use super::pack::PANEL;
use super::panel::{AMX_PAIRS, CHUNK, TASK_ROWS};
use super::products::{FullByHalf, HalfByHalf, Product};
use half::bf16;
use std::marker::PhantomData;
use std::mem::MaybeUninit;

#[cfg(target_arch = "x86_64")]
pub use super::amx::Tiles;
/// No tiles.
#[cfg(not(target_arch = "x86_64"))]
#[derive(Default)]
pub struct Tiles;

/// Rows that registers hold at once.
pub const PASS_ROWS: usize = 6;

/// A stretch of one segment for all rows of a task.
pub struct Part<'a, T> {
    pub w: *const u32,
    pub width: usize,
    pub x: &'a [*const T],
    /// Offset of the stretch in each row.
    pub at: usize,
    pub pairs: usize,
    pub lone: bool,
    pub acc: *mut f32,
}

/// Work on rows times outputs, of which registers hold a tile at a time.
pub trait Grid<L: Lanes> {
    /// R rows by V vectors of outputs, from `row` and `lane` on.
    ///
    /// # Safety
    /// As [`Lanes`]; the tile lies inside the grid.
    unsafe fn tile<const R: usize, const V: usize>(&self, row: usize, lane: usize);
}

/// All of a grid's rows, and its outputs in whole vectors.
///
/// # Safety
/// As [`Grid::tile`].
#[inline(always)]
pub unsafe fn cover<L: Lanes, G: Grid<L>>(grid: &G, (rows, width): (usize, usize)) {
    unsafe {
        let mut row = 0;
        // Sixteen registers hold four rows' chains, weights and inputs.
        while L::WIDE && rows - row >= PASS_ROWS {
            columns::<L, G, PASS_ROWS>(grid, row, width);
            row += PASS_ROWS;
        }
        while rows - row >= 4 {
            columns::<L, G, 4>(grid, row, width);
            row += 4;
        }
        if rows - row >= 2 {
            columns::<L, G, 2>(grid, row, width);
            row += 2;
        }
        if rows - row == 1 {
            columns::<L, G, 1>(grid, row, width);
        }
    }
}

#[inline(always)]
unsafe fn columns<L: Lanes, G: Grid<L>, const R: usize>(grid: &G, row: usize, width: usize) {
    let mut lane = 0;
    unsafe {
        if L::WIDE || R == 1 {
            if width == 4 * LANES {
                return grid.tile::<R, 4>(row, 0);
            }
            while width - lane >= 2 * LANES {
                grid.tile::<R, 2>(row, lane);
                lane += 2 * LANES;
            }
        }
        while lane < width {
            grid.tile::<R, 1>(row, lane);
            lane += LANES;
        }
    }
}

/// Chains that go on from a part's accumulators.
struct Chains<'a, L: Lanes, M: Product<L>>(&'a Part<'a, M::X>, PhantomData<L>);

/// # Safety
/// The part holds what it names.
#[inline(always)]
pub unsafe fn chains<L: Lanes, M: Product<L>>(part: &Part<'_, M::X>) {
    unsafe { cover::<L, _>(&Chains::<L, M>(part, PhantomData), (part.x.len(), part.width)) }
}

impl<L: Lanes, M: Product<L>> Grid<L> for Chains<'_, L, M> {
    #[inline(always)]
    unsafe fn tile<const R: usize, const V: usize>(&self, row: usize, lane: usize) {
        let part = self.0;
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
                    let input =
                        if pair < part.pairs { M::pair(x[r].add(2 * pair)) } else { M::lone(x[r].add(2 * pair)) };
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
}

/// Without bf16 products the rows are widened once for all columns of the part; the chains are the same.
///
/// # Safety
/// As [`chains`].
#[inline(always)]
pub unsafe fn widened<L: Lanes>(part: &Part<'_, bf16>) {
    let Part { w, width, at, pairs, lone, acc, .. } = *part;
    let mut wide = Wide::<{ 2 * CHUNK + LANES }>::new();
    // SAFETY: a row of a part is at most a chunk.
    unsafe {
        let x = wide.rows::<L>(part.x, at, 2 * pairs + usize::from(lone));
        chains::<L, FullByHalf>(&Part { w, width, x, at: 0, pairs, lone, acc });
    }
}

/// Rows of a task as f32, each in `STRIDE` places.
pub struct Wide<const STRIDE: usize> {
    values: MaybeUninit<[[f32; STRIDE]; TASK_ROWS]>,
    rows: [*const f32; TASK_ROWS],
}

impl<const STRIDE: usize> Wide<STRIDE> {
    #[inline(always)]
    pub fn new() -> Wide<STRIDE> {
        Wide { values: MaybeUninit::uninit(), rows: [std::ptr::null(); TASK_ROWS] }
    }

    /// Widens `inputs` inputs of each row, from `at` on; read no further than they go.
    ///
    /// # Safety
    /// As [`Lanes`]; rows hold the inputs, which in whole vectors are at most `STRIDE`.
    #[inline(always)]
    pub unsafe fn rows<L: Lanes>(&mut self, x: &[*const bf16], at: usize, inputs: usize) -> &[*const f32] {
        let values = self.values.as_mut_ptr().cast::<f32>();
        for (row, from) in x.iter().enumerate() {
            // SAFETY: the caller's promises.
            unsafe {
                let to = values.add(row * STRIDE);
                self.rows[row] = to;
                for i in (0..inputs).step_by(LANES) {
                    L::store(to.add(i), bf16::load_up_to::<L>(from.add(at + i), inputs - i));
                }
            }
        }
        &self.rows[..x.len()]
    }
}

/// A part in AMX's order: by its tiles, or emulated.
///
/// # Safety
/// As [`chains`].
#[inline(always)]
pub unsafe fn blocks<L: Lanes>(tiles: &Tiles, part: &Part<'_, bf16>) {
    #[cfg(target_arch = "x86_64")]
    if L::TILES {
        let (extent, w) = ((part.pairs, part.lone), (part.w, part.width));
        // SAFETY: the level was made after `amx::available` said yes; the part holds what it names.
        return unsafe { super::amx::accumulate(tiles, part.x, part.at, extent, w, part.acc) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = tiles;
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

/// The products of rows of `pairs` pairs each with up to a panel of outputs, in AMX's order from zero: `[x.len()][PANEL]`, of which
/// `width` are written.
///
/// # Safety
/// As [`chains`]; rows are at one distance, at most as many as a tile has, and `out` is `[x.len()][PANEL]`.
#[inline(always)]
pub unsafe fn fresh<L: Lanes>(
    tiles: &Tiles,
    x: &[*const bf16],
    pairs: usize,
    (w, width): (*const u32, usize),
    out: *mut f32,
) {
    #[cfg(target_arch = "x86_64")]
    if L::TILES {
        use super::amx::{add_block, sums};
        let whole = if pairs < AMX_PAIRS { pairs } else { pairs / AMX_PAIRS * AMX_PAIRS };
        // SAFETY: the level was made after `amx::available` said yes; the rest is the caller's promise.
        unsafe {
            sums(tiles, x, 0, (1, whole), (w, width), out);
            if whole < pairs {
                add_block(tiles, x, 2 * whole, pairs - whole, (w.add(whole * width), width), out);
            }
        }
        return;
    }
    // SAFETY: the caller's promises.
    unsafe {
        for row in 0..x.len() {
            std::ptr::write_bytes(out.add(row * PANEL), 0, width);
        }
        blocks::<L>(tiles, &Part { w, width, x, at: 0, pairs, lone: false, acc: out });
    }
}

#[inline(always)]
unsafe fn block_row<L: Lanes, const V: usize>(part: &Part<'_, bf16>, row: usize, lane: usize) {
    unsafe {
        let acc = part.acc.add(row * PANEL + lane);
        let mut sums = [L::splat(0.0); V];
        for v in 0..V {
            sums[v] = L::load(acc.add(v * LANES));
        }
        let (x, w) = (part.x[row].add(part.at), part.w.add(lane));
        sums = emulated::<L, V>(x, (part.pairs, part.lone), (w, part.width), sums);
        for v in 0..V {
            L::store(acc.add(v * LANES), sums[v]);
        }
    }
}

/// What AMX's blocks of one row add to `sums`: of each block the chains of its even and of its odd inputs.
///
/// # Safety
/// `x` holds the inputs, `w` pair-rows of `width` words with V vectors each.
#[inline(always)]
pub unsafe fn emulated<L: Lanes, const V: usize>(
    x: *const bf16,
    (pairs, lone): (usize, bool),
    (w, width): (*const u32, usize),
    mut sums: [L::F; V],
) -> [L::F; V] {
    type M = HalfByHalf;
    unsafe {
        let all = pairs + usize::from(lone);
        for start in (0..all).step_by(AMX_PAIRS) {
            let (mut even, mut odd) = ([L::splat(0.0); V], [L::splat(0.0); V]);
            for pair in start..all.min(start + AMX_PAIRS) {
                let input = if pair < pairs {
                    <M as Product<L>>::pair(x.add(2 * pair))
                } else {
                    <M as Product<L>>::lone(x.add(2 * pair))
                };
                for v in 0..V {
                    let w = <M as Product<L>>::weights(w.add(pair * width + v * LANES), width);
                    odd[v] = <M as Product<L>>::odd(odd[v], w, input);
                    even[v] = <M as Product<L>>::even(even[v], w, input);
                }
            }
            for v in 0..V {
                sums[v] = L::add(sums[v], L::add(even[v], odd[v]));
            }
        }
        sums
    }
}
