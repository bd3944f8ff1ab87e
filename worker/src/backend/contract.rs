//! What every backend demands of a call before it computes anything, and what it makes of one on the host.

use super::Grouping;
use crate::engine::batch::Batch;
use model::fault::{Fault, FaultKind};
use model::plan::BLOCK_TOKENS;
use model::spec::Router;
use model::step::BlockId;

/// Experts of one mixture, at most.
pub const EXPERTS_MAX: usize = 1024;

/// A call that breaks the contract: a bug of the engine.
pub fn wrong(text: impl Into<String>) -> Fault {
    Fault::new(FaultKind::Internal, text)
}

pub fn ensure(holds: bool, text: impl FnOnce() -> String) -> Result<(), Fault> {
    if holds { Ok(()) } else { Err(wrong(text())) }
}

/// Where one row of a batch stands.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    pub position: usize,
    pub sequence: usize,
    /// Where its key and value go.
    pub block: BlockId,
    pub slot: usize,
}

/// A batch's rows: every one belongs to one sequence, has its consecutive position, and a block.
pub fn rows(batch: &Batch) -> Result<Vec<Row>, Fault> {
    let mut rows = Vec::with_capacity(batch.positions.len());
    for (index, sequence) in batch.spans.iter().enumerate() {
        ensure(sequence.row == rows.len(), || format!("sequence {index} starts at row {}", sequence.row))?;
        let end = sequence.start + sequence.rows;
        ensure(sequence.blocks.len() * BLOCK_TOKENS >= end, || {
            format!("sequence {index} has {} blocks for {end} positions", sequence.blocks.len())
        })?;
        for position in sequence.start..end {
            let given = batch.positions.get(rows.len()).copied();
            ensure(given == Some(position as u32), || format!("row {} is at {given:?}, not {position}", rows.len()))?;
            let block = sequence.blocks[position / BLOCK_TOKENS];
            rows.push(Row { position, sequence: index, block, slot: position % BLOCK_TOKENS });
        }
    }
    ensure(rows.len() == batch.positions.len(), || {
        format!("{} rows, {} of them in sequences", batch.positions.len(), rows.len())
    })?;
    Ok(rows)
}

/// So many of `experts` can be chosen as `router` says, with so many corrections.
pub fn check_router(router: &Router, experts: usize, active: usize, corrections: Option<usize>) -> Result<(), Fault> {
    ensure(experts <= EXPERTS_MAX, || format!("{experts} experts, {EXPERTS_MAX} at most"))?;
    ensure(active >= 1 && active <= experts, || format!("{active} of {experts} experts can't be chosen"))?;
    ensure(corrections.is_none_or(|c| c == experts), || "one correction for each expert".into())?;
    let Some(groups) = router.groups else { return Ok(()) };
    let fits = groups.count >= 1 && experts.is_multiple_of(groups.count) && groups.kept <= groups.count;
    ensure(fits, || format!("{experts} experts in {groups:?}"))?;
    ensure(groups.kept * (experts / groups.count) >= active, || format!("{groups:?} keep fewer than {active}"))
}

/// Parts that can be summed at once, at most.
const PARTS_MAX: usize = 16;

/// So many parts have a balanced sum.
pub fn check_parts(parts: usize) -> Result<(), Fault> {
    let fits = parts.is_power_of_two() && parts <= PARTS_MAX;
    ensure(fits, || format!("{parts} parts have no balanced sum: a power of two is needed, {PARTS_MAX} at most"))
}

/// The balanced sum of the terms' values at `at`; a power of two of terms.
pub fn tree(terms: &[&[f32]], at: usize) -> f32 {
    match terms {
        [one] => one[at],
        _ => {
            let (left, right) = terms.split_at(terms.len() / 2);
            tree(left, at) + tree(right, at)
        }
    }
}

impl Grouping {
    /// Its pairs are those of so many experts.
    pub fn check(&self, experts: usize) -> Result<(), Fault> {
        let (pairs, offsets) = (self.rows.len(), &self.offsets);
        let whole = offsets.len() == experts + 1
            && offsets.first() == Some(&0)
            && offsets.last() == Some(&(pairs as u32))
            && offsets.is_sorted();
        ensure(whole, || format!("offsets of {} experts, {pairs} pairs, {experts} matrices", offsets.len()))
    }

    /// Its pairs have weights, and its experts are so many segments; experts of one segment.
    pub fn check_sums(&self, segments: usize) -> Result<usize, Fault> {
        let experts = self.offsets.len().saturating_sub(1);
        let fits = segments.is_power_of_two() && segments <= 8 && experts.is_multiple_of(segments) && experts > 0;
        ensure(fits, || format!("{experts} experts can't be summed in {segments} segments"))?;
        ensure(self.weights.len() == self.rows.len(), || "one weight for each pair".into())?;
        Ok(experts / segments)
    }

    /// The rows of a source that it reads, at least so many.
    pub fn rows_read(&self) -> usize {
        self.rows.iter().max().map_or(0, |row| *row as usize + 1)
    }
}

/// Pairs by row, kept between calls for their memory.
#[derive(Default)]
pub struct Index {
    /// Pairs of row `r` are `pairs[starts[r]..starts[r + 1]]`, ascending, and so by expert.
    pub starts: Vec<u32>,
    pub pairs: Vec<u32>,
}

impl Index {
    /// Of the pairs of `n` rows.
    pub fn fill(&mut self, rows: &[u32], n: usize) -> Result<(), Fault> {
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

    pub fn of(&self, row: usize) -> &[u32] {
        &self.pairs[self.starts[row] as usize..self.starts[row + 1] as usize]
    }
}
