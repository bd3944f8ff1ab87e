//! A step's sequences as attention needs them.

use crate::backend::cpu::buffer::ensure;
use crate::engine::batch::{Batch, Sequence};
use model::fault::Fault;
use model::plan::BLOCK_TOKENS;
use model::step::BlockId;

/// A checked batch.
pub struct Meta {
    pub(super) sequences: Vec<Sequence>,
    pub(super) rows: Vec<Row>,
}

/// Where one row stands.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row {
    pub position: usize,
    pub sequence: usize,
    /// Where its key and value go.
    pub block: BlockId,
    pub slot: usize,
}

impl Meta {
    /// Of no rows.
    pub(super) const NONE: Meta = Meta { sequences: Vec::new(), rows: Vec::new() };

    /// Every row belongs to one sequence, has its consecutive position, and a block.
    pub(super) fn new(batch: &Batch) -> Result<Meta, Fault> {
        let mut rows = Vec::with_capacity(batch.positions.len());
        for (index, sequence) in batch.spans.iter().enumerate() {
            ensure(sequence.row == rows.len(), || format!("sequence {index} starts at row {}", sequence.row))?;
            let end = sequence.start + sequence.rows;
            ensure(sequence.blocks.len() * BLOCK_TOKENS >= end, || {
                format!("sequence {index} has {} blocks for {end} positions", sequence.blocks.len())
            })?;
            for position in sequence.start..end {
                let given = batch.positions.get(rows.len()).copied();
                ensure(given == Some(position as u32), || {
                    format!("row {} is at {given:?}, not {position}", rows.len())
                })?;
                let block = sequence.blocks[position / BLOCK_TOKENS];
                rows.push(Row { position, sequence: index, block, slot: position % BLOCK_TOKENS });
            }
        }
        ensure(rows.len() == batch.positions.len(), || {
            format!("{} rows, {} of them in sequences", batch.positions.len(), rows.len())
        })?;
        Ok(Meta { sequences: batch.spans.clone(), rows })
    }

    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// No block of the batch lies outside a cache of `blocks`.
    pub(super) fn fits(&self, blocks: usize) -> Result<(), Fault> {
        let most = self.sequences.iter().flat_map(|s| &s.blocks).map(|b| b.0).max();
        ensure(most.is_none_or(|b| (b as usize) < blocks), || format!("block {most:?} of a cache of {blocks}"))
    }
}
