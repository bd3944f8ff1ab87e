//! A step's sequences as attention needs them.

use crate::backend::contract::{Row, ensure, rows};
use crate::engine::batch::{Batch, Sequence};
use model::fault::Fault;

/// A checked batch.
pub struct Meta {
    pub(super) sequences: Vec<Sequence>,
    pub(super) rows: Vec<Row>,
}

impl Meta {
    /// Of no rows.
    pub(super) const NONE: Meta = Meta { sequences: Vec::new(), rows: Vec::new() };

    pub(super) fn new(batch: &Batch) -> Result<Meta, Fault> {
        Ok(Meta { rows: rows(batch)?, sequences: batch.spans.clone() })
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
