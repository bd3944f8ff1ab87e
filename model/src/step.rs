//! What one forward pass of a group is asked and what it answers: data only, the words between scheduler and engine.
//!
//! A message holds only what changed: new tokens, new blocks, begun and ended sequences. Ranks keep the rest.

/// Numbers the forward passes of one epoch, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StepId(pub u64);

/// A sequence as ranks know it. A sequence that is preempted and comes back gets a new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeqId(pub u64);

/// A block of [`crate::plan::BLOCK_TOKENS`] cache positions in a lane's pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u32);

/// One step for all lanes of a group. A lane with nothing to do still steps: its ranks enter every exchange.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepBatch {
    pub lanes: Vec<LaneBatch>,
}

/// One data-parallel lane's part.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LaneBatch {
    /// Sequences first seen in this step, before any chunk of theirs.
    pub begun: Vec<Begin>,
    /// In the order in which rows are packed.
    pub chunks: Vec<Chunk>,
    /// Sequences whose state may be dropped after earlier steps.
    pub ended: Vec<SeqId>,
    /// So many tokens to guess behind each that is drawn, by the plan's predictors: the same number in all lanes of a step.
    pub guesses: u32,
}

/// A sequence's fixed facts.
#[derive(Debug, Clone, PartialEq)]
pub struct Begin {
    pub seq: SeqId,
    pub sampling: Sampling,
    /// Tokens of the prompt; later ones count as generated (penalties tell them apart).
    pub prompt_len: u32,
    /// Tokens before the first chunk's position, where sampling needs them (penalties); else empty.
    pub history: Vec<u32>,
}

/// Consecutive tokens of one sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Chunk {
    pub seq: SeqId,
    /// Position of the first token.
    pub start: u32,
    /// None stand for one: that which was drawn behind the sequence's last chunk, a chunk without drafts. So a step can be
    /// asked for before the one before it was answered.
    pub tokens: Vec<u32>,
    /// Blocks appended to the sequence's table before this chunk; on its first chunk those of a cached prefix too.
    pub blocks: Vec<BlockId>,
    /// Sample a token after the last one, and after each that a draft follows.
    pub sample: bool,
    /// So many of the last tokens are drafts: guesses, each drawn anew from what is before it. The sequence goes on behind those
    /// that were drawn as guessed; what a guess that was not left in the cache is written over. Only where `sample` is.
    pub drafts: u32,
}

impl Chunk {
    /// Whether it goes on from a token that only the group knows.
    pub fn is_fed(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Positions that it computes.
    pub fn rows(&self) -> usize {
        self.tokens.len().max(1)
    }

    /// The drafts among the tokens.
    pub fn drafted(&self) -> &[u32] {
        &self.tokens[self.tokens.len() - self.drafts as usize..]
    }
}

/// How tokens are drawn. The token depends on (weights, tokens, this) alone.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest.
    pub temperature: f32,
    pub top_p: f32,
    /// 0 keeps all.
    pub top_k: u32,
    pub min_p: f32,
    /// 1 changes nothing.
    pub repetition_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    /// Added to logits before anything else, by token id.
    pub logit_bias: Vec<(u32, f32)>,
    /// Ids that can't be drawn before `suppress_until` tokens were generated (`min_tokens`).
    pub suppress: Vec<u32>,
    pub suppress_until: u32,
    /// Keys the draw together with `choice` and the position.
    pub seed: u64,
    /// Which of a request's `n` answers.
    pub choice: u32,
    /// Report the token's log-probability and those of this many best.
    pub logprobs: Option<u8>,
    /// The same for each prompt token.
    pub prompt_logprobs: Option<u8>,
}

impl Sampling {
    /// The likeliest token, nothing reported.
    pub const GREEDY: Sampling = Sampling {
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        logit_bias: Vec::new(),
        suppress: Vec::new(),
        suppress_until: 0,
        seed: 0,
        choice: 0,
        logprobs: None,
        prompt_logprobs: None,
    };

    /// Whether drawing needs the tokens before.
    pub fn needs_history(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

/// What a group answers to a step: one entry a lane, each holding the lane's samples in chunk order. A chunk with
/// drafts has a sample for each that was drawn as guessed, and one more.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepResult {
    pub lanes: Vec<LaneResult>,
}

#[derive(Debug, Clone, PartialEq, Default)]
pub struct LaneResult {
    pub samples: Vec<Sample>,
    pub prompt_scores: Vec<PromptScores>,
    /// Where guesses were asked for: at most one entry a chunk that was sampled.
    pub guesses: Vec<Guesses>,
}

/// What is likely to be drawn behind a sequence's last token: drafts for its next chunk.
#[derive(Debug, Clone, PartialEq)]
pub struct Guesses {
    pub seq: SeqId,
    pub tokens: Vec<u32>,
}

/// How many of a chunk's drafts its samples have as guessed. One more of the samples counts: the draw behind the last of those.
pub fn guessed(drafts: &[u32], samples: &[Sample]) -> usize {
    drafts.iter().zip(samples).take_while(|(draft, sample)| sample.token == **draft).count()
}

/// A drawn token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    pub seq: SeqId,
    pub token: u32,
    /// Where asked: of the unmodified distribution (before temperature and penalties).
    pub score: Option<Score>,
}

/// A token's natural-log probability and the best candidates', best first, ties to the lower id.
#[derive(Debug, Clone, PartialEq)]
pub struct Score {
    pub logprob: f32,
    /// The token's place among all, 0 the best.
    pub rank: u32,
    pub best: Vec<(u32, f32)>,
}

/// Scores of prompt tokens at positions `start..start + scores.len()`, each given the tokens before it.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptScores {
    pub seq: SeqId,
    pub start: u32,
    pub scores: Vec<Score>,
}
