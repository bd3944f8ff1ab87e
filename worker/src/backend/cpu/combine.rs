//! Expert outputs back to their rows.

use super::simd::Level;
use super::simd::pool::Pool;
use super::simd::rows::{Add, Weigh};
use crate::backend::Grouping;
use crate::backend::contract::Index;
use model::fault::Fault;

/// Sums pending in the tree: one for each power of two up to 8 segments.
const PENDING: usize = 4;
/// Columns that one task sums.
const STRIP: usize = 1024;

/// Weighs and adds `pairs` into `n` rows of `out`, which hold `cols`.
#[allow(clippy::too_many_arguments)] // one fused operation
pub(super) fn combine(
    pool: &Pool,
    level: Level,
    index: &mut Index,
    pairs: &[f32],
    grouping: &Grouping,
    segments: usize,
    (n, cols): (usize, usize),
    out: &mut [f32],
) -> Result<(), Fault> {
    let experts_each = grouping.check_sums(segments)?;
    index.fill(&grouping.rows, n)?;
    let index = &*index;
    pool.rows(out, cols, n, (8192 / cols.max(1)).max(1), &|row, out| {
        for start in (0..cols).step_by(STRIP) {
            let width = STRIP.min(cols - start);
            let mut sums = [[0.0f32; STRIP]; PENDING];
            let mut mine = index.of(row);
            let mut depth = 0;
            for segment in 0..segments {
                let end = grouping.offsets[(segment + 1) * experts_each];
                let acc = &mut sums[depth][..width];
                acc.fill(0.0);
                while let [pair, rest @ ..] = mine
                    && *pair < end
                {
                    let y = &pairs[*pair as usize * cols + start..][..width];
                    level.run(Weigh { acc: &mut *acc, weight: grouping.weights[*pair as usize], y });
                    mine = rest;
                }
                depth += 1;
                let mut joined = segment + 1;
                while joined % 2 == 0 {
                    let (left, right) = sums.split_at_mut(depth - 1);
                    level.run(Add { x: &mut left[depth - 2][..width], y: &right[0][..width], bias: None });
                    depth -= 1;
                    joined /= 2;
                }
            }
            out[start..start + width].copy_from_slice(&sums[0][..width]);
        }
    });
    Ok(())
}
