//! A simulated lane: its "cache" keeps the token of each slot, written and read only through block tables, as the real
//! one keeps keys and values.

use std::collections::BTreeMap;

use model::plan::{BLOCK_TOKENS, Limits};
use model::step::{BlockId, Chunk, Guesses, LaneBatch, LaneResult, PromptScores, Sample, Sampling, SeqId};

use super::oracle;

/// Tells the tenants' tokens apart in the cache: the profile puts a job's salt into its seed's lowest bit.
fn tenant(sampling: &Sampling) -> u32 {
    (sampling.seed as u32 & 1) << 16
}

/// What nobody wrote reads as a token that no prompt has.
const UNWRITTEN: u32 = u32::MAX;

#[derive(Debug)]
pub struct Rank {
    limits: Limits,
    cache: Vec<u32>,
    sequences: BTreeMap<SeqId, Known>,
}

/// A sequence as the rank remembers it.
#[derive(Debug)]
struct Known {
    sampling: Sampling,
    prompt_len: usize,
    history: Vec<u32>,
    table: Vec<BlockId>,
    /// Positions in the cache that go on with what was drawn; `None` before the first chunk.
    len: Option<usize>,
    /// What was drawn behind the last chunk, if that had no drafts.
    drawn: Option<u32>,
}

impl Rank {
    pub fn new(limits: Limits) -> Rank {
        Rank { limits, cache: vec![UNWRITTEN; limits.blocks * BLOCK_TOKENS], sequences: BTreeMap::new() }
    }

    pub fn sequences(&self) -> usize {
        self.sequences.len()
    }

    /// Computes a lane's part of a step, and demands of it what an engine would.
    pub fn step(&mut self, batch: &LaneBatch) -> LaneResult {
        assert!(batch.chunks.len() <= self.limits.step_sequences_max, "too many sequences");
        let tokens: usize = batch.chunks.iter().map(Chunk::rows).sum();
        assert!(tokens <= self.limits.step_tokens_max, "too many tokens");
        for seq in &batch.ended {
            assert!(self.sequences.remove(seq).is_some(), "{seq:?} ended and was not known");
        }
        for begin in &batch.begun {
            let known = Known {
                sampling: begin.sampling.clone(),
                prompt_len: begin.prompt_len as usize,
                history: begin.history.clone(),
                table: Vec::new(),
                len: None,
                drawn: None,
            };
            assert!(self.sequences.insert(begin.seq, known).is_none(), "{:?} begins twice", begin.seq);
        }
        let mut result = LaneResult::default();
        for chunk in &batch.chunks {
            self.compute(chunk, batch.guesses as usize, &mut result);
        }
        result
    }

    /// The blocks of a sequence with those that a chunk brings.
    pub fn table(&self, chunk: &Chunk) -> Vec<BlockId> {
        let known = self.sequences.get(&chunk.seq).map(|known| known.table.as_slice()).unwrap_or_default();
        [known, &chunk.blocks].concat()
    }

    fn compute(&mut self, chunk: &Chunk, guesses: usize, result: &mut LaneResult) {
        let known = self.sequences.get_mut(&chunk.seq).expect("a chunk's sequence has begun");
        known.table.extend(&chunk.blocks);
        let (start, end) = (chunk.start as usize, chunk.start as usize + chunk.rows());
        assert!(end <= self.limits.model_len_max, "a chunk of {start}..{end}");
        let drawn = known.drawn.take();
        let fed = chunk.is_fed().then(|| drawn.expect("a chunk without tokens follows a draw"));
        // More where somebody guesses on.
        assert!(known.table.len() >= end.div_ceil(BLOCK_TOKENS), "{} blocks for {end} tokens", known.table.len());
        for (position, token) in (start..end).zip(chunk.tokens.iter().chain(&fed)) {
            self.cache[slot(&known.table, position)] = *token | tenant(&known.sampling);
        }
        let known = &self.sequences[&chunk.seq];
        let read =
            |len: usize| (0..len).map(|position| self.cache[slot(&known.table, position)] ^ tenant(&known.sampling));
        match known.len {
            Some(len) => assert_eq!(start, len, "a chunk follows the one before, and the drafts that it had right"),
            None if known.sampling.needs_history() => assert!(read(start).eq(known.history.iter().copied())),
            None => assert!(known.history.is_empty()),
        }
        if known.sampling.prompt_logprobs.is_some() {
            let scores = (start.max(1)..end.min(known.prompt_len)).map(|position| oracle::score(read(position + 1)));
            let start = start.max(1) as u32;
            result.prompt_scores.push(PromptScores { seq: chunk.seq, start, scores: scores.collect() });
        }
        let (mut len, drafts) = (end - chunk.drafts as usize, chunk.drafted());
        assert!(drafts.is_empty() || chunk.sample && len >= known.prompt_len.max(start + 1), "drafts behind an answer");
        let (first, mut last) = (len, None);
        let mut draws = chunk.sample;
        while draws {
            let token = oracle::draw(&known.sampling, read(len));
            last = Some(token);
            let score = known.sampling.logprobs.map(|_| oracle::score(read(len).chain([token])));
            result.samples.push(Sample { seq: chunk.seq, token, score });
            draws = drafts.get(len - first) == Some(&token);
            len += usize::from(draws);
        }
        if let Some(last) = last.filter(|_| guesses > 0) {
            let mut tokens: Vec<u32> = read(len).chain([last]).collect();
            // Some have none, some fewer than were asked for, and some are wrong.
            let count = guesses * (len % 4) / 3;
            for _ in 0..count {
                let likely = oracle::draw(&known.sampling, tokens.iter().copied());
                tokens.push(if (likely as usize + tokens.len()).is_multiple_of(5) { likely ^ 1 } else { likely });
            }
            if count > 0 {
                result.guesses.push(Guesses { seq: chunk.seq, tokens: tokens.split_off(tokens.len() - count) });
            }
        }
        let drawn = last.filter(|_| drafts.is_empty());
        let known = self.sequences.get_mut(&chunk.seq).expect("it was just read");
        (known.len, known.drawn) = (Some(len), drawn);
    }
}

fn slot(table: &[BlockId], position: usize) -> usize {
    table[position / BLOCK_TOKENS].0 as usize * BLOCK_TOKENS + position % BLOCK_TOKENS
}
