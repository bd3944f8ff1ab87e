//! One row against codes in AMX's order. Tiles would be nearly empty, so codes are multiplied in registers; the sums are the tiles'.

use super::coded::{Coded, Decode, Fp8, Integers, Nibbles, TILE_PAIRS, Whole};
use super::lanes::{Element, LANES, Lanes};
use super::pack::PANEL;
use super::panel::{AMX_PAIRS, Task};
use super::runs::{Factors, total};
use half::bf16;
use std::mem::MaybeUninit;

/// Vectors of a panel.
const VECTORS: usize = PANEL / LANES;

/// A segment for a task of one row.
///
/// # Safety
/// As [`stretches`](super::runs::stretches); runs are whole fours of pairs.
#[inline(always)]
pub unsafe fn row<L: Lanes>(task: &Task<'_, bf16>, coded: &Coded, extent: (usize, usize), acc: *mut f32) {
    unsafe {
        match coded.table() {
            Some(table) => segment::<L, _>(task, coded, &Nibbles::<L>(L::table(table)), extent, acc),
            None if coded.is_fp8() => segment::<L, _>(task, coded, &Whole(Fp8), extent, acc),
            None => segment::<L, _>(task, coded, &Whole(Integers), extent, acc),
        }
    }
}

#[inline(always)]
unsafe fn segment<L: Lanes, D: Decode<L>>(
    task: &Task<'_, bf16>,
    coded: &Coded,
    decode: &D,
    (at, length): (usize, usize),
    acc: *mut f32,
) {
    let (place, pairs) = ((task.panel, task.w.width(task.panel)), coded.run_pairs());
    let (vectors, shifted) = (place.1 / LANES, coded.is_shifted());
    let mut factors = MaybeUninit::<Factors>::uninit();
    let mut wide = [0.0f32; 2 * TILE_PAIRS + LANES];
    // SAFETY: the caller's promises, a run after the other; inputs are read no further than the run goes.
    unsafe {
        for run in 0..length / (2 * pairs) {
            let at = at + run * 2 * pairs;
            let x = task.x[0].add(at);
            for i in (0..2 * pairs).step_by(LANES) {
                L::store(wide.as_mut_ptr().add(i), bf16::load_up_to::<L>(x.add(i), 2 * pairs - i));
            }
            let mut sums = [L::splat(0.0); VECTORS];
            for start in (0..pairs).step_by(AMX_PAIRS) {
                let (mut even, mut odd) = ([L::splat(0.0); VECTORS], [L::splat(0.0); VECTORS]);
                for pair in (start..pairs.min(start + AMX_PAIRS)).step_by(4) {
                    let x = wide.as_ptr().add(2 * pair);
                    for v in 0..vectors {
                        let weights = coded.four::<L, D>(decode, place, at + 2 * pair, v * LANES);
                        for n in 0..4 {
                            even[v] = L::fma(L::splat(*x.add(2 * n)), weights[n][0], even[v]);
                            odd[v] = L::fma(L::splat(*x.add(2 * n + 1)), weights[n][1], odd[v]);
                        }
                    }
                }
                for v in 0..vectors {
                    sums[v] = L::add(sums[v], L::add(even[v], odd[v]));
                }
            }
            coded.factors::<L>(place, (at, 1), factors.as_mut_ptr());
            let factors = &*factors.as_ptr();
            let total = if shifted { Some(total::<L, bf16>(x, 2 * pairs)) } else { None };
            for v in 0..vectors {
                factors.join::<L>((0, v * LANES), sums[v], total, acc.add(v * LANES));
            }
        }
    }
}
