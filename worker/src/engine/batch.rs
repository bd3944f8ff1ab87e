//! A lane's part of a step, resolved: rows, positions, cache slots and block tables.

use model::step::{BlockId, SeqId};

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

/// A lane's part of a step as the engine runs it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Resolved {
    pub batch: Batch,
    /// Token of each row.
    pub ids: Vec<u32>,
    /// Whose each of the batch's spans is.
    pub sequences: Vec<SeqId>,
    /// The rows whose logits somebody wants, ascending.
    pub wanted: Vec<Wanted>,
    /// Prompt tokens that logits held since an earlier step foretold.
    pub foretold: Vec<Foretold>,
    /// Tokens to guess behind each that is drawn.
    pub guesses: usize,
}

impl Resolved {
    pub fn rows(&self) -> usize {
        self.ids.len()
    }
}

/// Why a row's logits are wanted.
#[derive(Debug, Clone, PartialEq)]
pub struct Wanted {
    pub row: u32,
    pub seq: SeqId,
    /// Position of the token that the logits foretell.
    pub next: usize,
    /// Draw that token.
    pub sample: bool,
    /// Drafts of the chunk up to this row: the draw counts only if they were drawn as guessed.
    pub drafts: usize,
    /// It is a token of the prompt whose score was asked for.
    pub prompt: Option<PromptRow>,
}

/// A prompt token's score: given now, or when the next chunk says which token it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PromptRow {
    Token(u32),
    Held,
}

/// A prompt token whose score waited for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Foretold {
    pub seq: SeqId,
    pub position: usize,
    pub token: u32,
}
