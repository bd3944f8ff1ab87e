//! Expert outputs back to their rows.

use super::buffer::ensure;
use super::simd::Level;
use super::simd::pool::Pool;
use super::simd::rows::{Add, Weigh};
use crate::backend::Grouping;
use model::fault::Fault;

/// Sums pending in the tree: one for each power of two up to 8 segments.
const PENDING: usize = 4;
/// Columns that one task sums.
const STRIP: usize = 1024;

/// Pairs by row, kept between calls for their memory.
#[derive(Default)]
pub(super) struct Index {
    /// Pairs of row `r` are `pairs[starts[r]..starts[r + 1]]`, ascending, and so by expert.
    starts: Vec<u32>,
    pairs: Vec<u32>,
}

impl Index {
    fn fill(&mut self, rows: &[u32], n: usize) -> Result<(), Fault> {
        let most = rows.iter().max();
        ensure(most.is_none_or(|r| (*r as usize) < n), || format!("a pair of row {most:?} of {n}"))?;
        self.starts.clear();
        self.starts.resize(n + 2, 0);
        for row in rows {
            self.starts[*row as usize + 2] += 1;
        }
        for row in 0..n {
            self.starts[row + 2] += self.starts[row + 1];
        }
        self.pairs.clear();
        self.pairs.resize(rows.len(), 0);
        for (pair, row) in rows.iter().enumerate() {
            let next = &mut self.starts[*row as usize + 1];
            self.pairs[*next as usize] = pair as u32;
            *next += 1;
        }
        Ok(())
    }

    fn of(&self, row: usize) -> &[u32] {
        &self.pairs[self.starts[row] as usize..self.starts[row + 1] as usize]
    }
}

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
    let experts = grouping.offsets.len().saturating_sub(1);
    let fits = segments.is_power_of_two() && segments <= 8 && experts.is_multiple_of(segments) && experts > 0;
    ensure(fits, || format!("{experts} experts can't be summed in {segments} segments"))?;
    ensure(grouping.weights.len() == grouping.rows.len(), || "one weight for each pair".into())?;
    index.fill(&grouping.rows, n)?;
    let index = &*index;
    pool.rows(out, cols, n, (8192 / cols.max(1)).max(1), &|row, out| {
        for start in (0..cols).step_by(STRIP) {
            let width = STRIP.min(cols - start);
            let mut sums = [[0.0f32; STRIP]; PENDING];
            let mut mine = index.of(row);
            let mut depth = 0;
            for segment in 0..segments {
                let end = grouping.offsets[(segment + 1) * (experts / segments)];
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
