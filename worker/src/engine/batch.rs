//! A lane's part of a step, resolved: rows, positions, cache slots and block tables.

use model::step::BlockId;

/// What attention and the cache need to know of a step; row order is chunk order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    pub spans: Vec<Sequence>,
    /// Absolute position of each row.
    pub positions: Vec<u32>,
}

/// One sequence's rows and cache.
#[derive(Debug, Clone, PartialEq)]
pub struct Sequence {
    /// Its first row in the batch, and how many.
    pub row: usize,
    pub rows: usize,
    /// Position of its first row: that many earlier positions are in the cache.
    pub start: usize,
    /// Its whole block table; position `p` lives in `blocks[p / BLOCK_TOKENS]` at `p % BLOCK_TOKENS`.
    pub blocks: Vec<BlockId>,
}
