//! What a rank keeps of each sequence between steps: its block table, how far it is computed, and on the leader what
//! sampling needs. A step's message says only what changed; here it is checked and made whole.

use super::ahead::Foreseen;
use super::batch::{Foretold, PromptRow, Resolved, Sequence, Wanted};
use super::feed::Drawn;
use super::sample::{History, Moment};
use model::fault::{Fault, FaultKind};
use model::plan::{BLOCK_TOKENS, Limits};
use model::step::{Begin, BlockId, Chunk, LaneBatch, Sampling, SeqId};
use std::collections::BTreeMap;

/// One sequence.
#[derive(Debug, Clone)]
pub struct State {
    pub sampling: Sampling,
    pub prompt_len: usize,
    pub history: History,
    /// Logits after the last computed prompt token, waiting for the next chunk to say which token they foretold.
    pub held: Option<Vec<f32>>,
    /// Guesses that the last chunk ended with. Those that the next chunk begins behind are tokens.
    pub drafts: Vec<u32>,
    /// What was drawn behind the last chunk.
    pub drawn: Drawn,
    blocks: Vec<BlockId>,
    /// Positions computed, drafts and all; `None` before the first chunk, which may begin behind a cached prefix.
    computed: Option<usize>,
    /// What those who guess made of it.
    pub foreseen: Foreseen,
}

impl State {
    /// The draw of the token at `position`.
    pub fn moment(&self, position: usize) -> Moment {
        Moment { position: position as u64, generated: position.saturating_sub(self.prompt_len) as u32 }
    }
}

/// A lane's sequences.
#[derive(Debug)]
pub struct Sequences {
    states: BTreeMap<SeqId, State>,
    limits: Limits,
    /// Tokens that can be read: rows of the embedding table, which may be more than the head answers with.
    readable: usize,
    predictors: usize,
}

impl Sequences {
    pub fn new(limits: Limits, readable: usize) -> Sequences {
        Sequences { states: BTreeMap::new(), limits, readable, predictors: 0 }
    }

    /// The same for a rank that has so many predictors.
    pub fn predicting(self, predictors: usize) -> Sequences {
        Sequences { predictors, ..self }
    }

    pub fn limits(&self) -> Limits {
        self.limits
    }

    pub fn get(&mut self, seq: SeqId) -> Result<&mut State, Fault> {
        self.states.get_mut(&seq).ok_or_else(|| wrong(format!("sequence {} was never begun", seq.0)))
    }

    pub fn predictors(&self) -> usize {
        self.predictors
    }

    /// Takes a step's changes in and resolves its rows. For a trace `all` rows' logits are wanted. An error leaves the
    /// sequences unusable: whoever sent the step and this rank no longer agree.
    pub fn resolve(&mut self, lane: &LaneBatch, all: bool) -> Result<Resolved, Fault> {
        for seq in &lane.ended {
            self.states.remove(seq);
        }
        for begin in &lane.begun {
            self.begin(begin)?;
        }
        let most = self.limits.step_sequences_max;
        if lane.chunks.len() > most {
            return Err(wrong(format!("{} chunks in a step, {most} are possible", lane.chunks.len())));
        }
        let (tokens, most) = (lane.chunks.iter().map(|c| c.tokens.len()).sum::<usize>(), self.limits.step_tokens_max);
        if tokens > most {
            return Err(wrong(format!("{tokens} tokens in a step, {most} are possible")));
        }
        let mut resolved = Resolved { guesses: lane.guesses as usize, ..Resolved::default() };
        for (index, chunk) in lane.chunks.iter().enumerate() {
            if lane.chunks[..index].iter().any(|c| c.seq == chunk.seq) {
                return Err(wrong(format!("sequence {} has two chunks in a step", chunk.seq.0)));
            }
            self.chunk(chunk, all, &mut resolved)?;
        }
        Ok(resolved)
    }

    fn begin(&mut self, begin: &Begin) -> Result<(), Fault> {
        let mut history = History::default();
        let prompt_len = begin.prompt_len as usize;
        for (position, &token) in begin.history.iter().enumerate() {
            history.note(token, position >= prompt_len);
        }
        let state = State {
            sampling: begin.sampling.clone(),
            prompt_len,
            history,
            held: None,
            drafts: Vec::new(),
            drawn: Drawn::Nothing,
            blocks: Vec::new(),
            computed: None,
            foreseen: Foreseen::new(self.predictors),
        };
        match self.states.insert(begin.seq, state) {
            None => Ok(()),
            Some(_) => Err(wrong(format!("sequence {} was begun twice", begin.seq.0))),
        }
    }

    fn chunk(&mut self, chunk: &Chunk, all: bool, resolved: &mut Resolved) -> Result<(), Fault> {
        let (limits, readable) = (self.limits, self.readable);
        let state = self.get(chunk.seq)?;
        let (seq, start, rows) = (chunk.seq.0, chunk.start as usize, chunk.tokens.len());
        let end = start + rows;
        if rows == 0 {
            return Err(wrong(format!("sequence {seq} has a chunk of no tokens")));
        }
        if let Some(computed) = state.computed
            && !(computed - state.drafts.len()..=computed).contains(&start)
        {
            return Err(wrong(format!("sequence {seq} goes on at position {start}, it was computed up to {computed}")));
        }
        let drafts = chunk.drafts as usize;
        if drafts >= rows || drafts > 0 && (!chunk.sample || start + rows - drafts < state.prompt_len) {
            let sampled = if chunk.sample { "sampled" } else { "not sampled" };
            return Err(wrong(format!("sequence {seq} has {drafts} drafts among {rows} tokens, {sampled}")));
        }
        if end > limits.model_len_max {
            return Err(wrong(format!("sequence {seq} reaches {end} tokens, {} are possible", limits.model_len_max)));
        }
        state.blocks.extend_from_slice(&chunk.blocks);
        if let Some(block) = chunk.blocks.iter().find(|b| b.0 as usize >= limits.blocks) {
            return Err(wrong(format!("sequence {seq} was given block {} of {}", block.0, limits.blocks)));
        }
        if state.blocks.len() * BLOCK_TOKENS < end {
            let blocks = state.blocks.len();
            return Err(wrong(format!("sequence {seq} reaches {end} tokens with {blocks} blocks of {BLOCK_TOKENS}")));
        }
        if let Some(id) = chunk.tokens.iter().find(|&&id| id as usize >= readable) {
            return Err(wrong(format!("sequence {seq} has token {id}, {readable} can be read")));
        }
        let guessed = state.computed.map_or(0, |computed| start - (computed - state.drafts.len()));
        state.computed = Some(end);
        state.drawn = Drawn::Nothing;
        let before = std::mem::replace(&mut state.drafts, chunk.drafted().to_vec());
        if state.sampling.needs_history() {
            before[..guessed].iter().for_each(|&token| state.history.note(token, true));
            for (position, &token) in (start..).zip(&chunk.tokens[..rows - drafts]) {
                state.history.note(token, position >= state.prompt_len);
            }
        }
        if state.held.is_some() {
            resolved.foretold.push(Foretold { seq: chunk.seq, position: start, token: chunk.tokens[0] });
        }
        let row = resolved.rows();
        resolved.ids.extend_from_slice(&chunk.tokens);
        resolved.batch.positions.extend(start as u32..end as u32);
        resolved.batch.spans.push(Sequence { row, rows, start, blocks: state.blocks.clone() });
        resolved.sequences.push(chunk.seq);
        for i in 0..rows {
            let next = start + i + 1;
            let scored = state.sampling.prompt_logprobs.is_some() && next < state.prompt_len;
            let prompt = scored.then(|| chunk.tokens.get(i + 1).map_or(PromptRow::Held, |&t| PromptRow::Token(t)));
            let drafts = (i + 1 + drafts).saturating_sub(rows);
            let sample = chunk.sample && i + 1 + chunk.drafts as usize >= rows;
            if sample || prompt.is_some() || all {
                resolved.wanted.push(Wanted { row: (row + i) as u32, seq: chunk.seq, next, sample, drafts, prompt });
            }
        }
        Ok(())
    }
}

fn wrong(text: String) -> Fault {
    Fault::new(FaultKind::Internal, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { model_len_max: 100, step_tokens_max: 50, step_sequences_max: 2, blocks: 4 };

    fn begin(seq: u64, sampling: Sampling) -> Begin {
        Begin { seq: SeqId(seq), sampling, prompt_len: 5, history: vec![] }
    }

    fn chunk(seq: u64, start: u32, tokens: &[u32], blocks: &[u32]) -> Chunk {
        let blocks = blocks.iter().map(|&b| BlockId(b)).collect();
        Chunk { seq: SeqId(seq), start, tokens: tokens.to_vec(), blocks, sample: true, drafts: 0 }
    }

    fn lane(begun: Vec<Begin>, chunks: Vec<Chunk>) -> LaneBatch {
        LaneBatch { begun, chunks, ..LaneBatch::default() }
    }

    #[test]
    fn rows_are_packed_in_chunk_order_over_whole_block_tables() {
        let mut sequences = Sequences::new(LIMITS, 10);
        let first = lane(vec![begin(1, Sampling::GREEDY)], vec![chunk(1, 0, &[1, 2], &[3])]);
        sequences.resolve(&first, false).unwrap();
        let second =
            lane(vec![begin(2, Sampling::GREEDY)], vec![chunk(2, 32, &[4, 5], &[1, 2]), chunk(1, 2, &[6], &[])]);
        let found = sequences.resolve(&second, false).unwrap();
        assert_eq!(found.ids, [4, 5, 6]);
        assert_eq!(found.batch.positions, [32, 33, 2]);
        assert_eq!(found.batch.spans[1], Sequence { row: 2, rows: 1, start: 2, blocks: vec![BlockId(3)] });
        assert_eq!(found.wanted.iter().map(|w| (w.row, w.next)).collect::<Vec<_>>(), [(1, 34), (2, 3)]);
    }

    #[test]
    fn prompt_rows_are_wanted_where_scores_were_asked() {
        let mut sequences = Sequences::new(LIMITS, 10);
        let sampling = Sampling { prompt_logprobs: Some(0), ..Sampling::GREEDY };
        let mut first = chunk(1, 0, &[1, 2, 3], &[0]);
        first.sample = false;
        let found = sequences.resolve(&lane(vec![begin(1, sampling)], vec![first]), false).unwrap();
        let prompts: Vec<_> = found.wanted.iter().map(|w| w.prompt).collect();
        assert_eq!(prompts, [Some(PromptRow::Token(2)), Some(PromptRow::Token(3)), Some(PromptRow::Held)]);
        let found = sequences.resolve(&lane(vec![], vec![chunk(1, 3, &[4, 5], &[])]), false).unwrap();
        let wanted: Vec<_> = found.wanted.iter().map(|w| (w.sample, w.prompt)).collect();
        assert_eq!(wanted, [(false, Some(PromptRow::Token(5))), (true, None)]);
    }

    #[test]
    fn a_sequence_goes_on_behind_the_drafts_that_were_right() {
        let penalised = Sampling { presence_penalty: 1.0, ..Sampling::GREEDY };
        let drafted = |start: u32, tokens: &[u32], drafts: u32| Chunk { drafts, ..chunk(1, start, tokens, &[]) };
        let mut sequences = Sequences::new(LIMITS, 10);
        let prompt = lane(vec![begin(1, penalised.clone())], vec![chunk(1, 0, &[1, 2, 3, 4, 5], &[0])]);
        sequences.resolve(&prompt, false).unwrap();
        let found = sequences.resolve(&lane(vec![], vec![drafted(5, &[6, 7, 8, 9], 3)]), false).unwrap();
        assert_eq!(
            found.wanted.iter().map(|w| (w.row, w.next, w.drafts)).collect::<Vec<_>>(),
            [(0, 6, 0), (1, 7, 1), (2, 8, 2), (3, 9, 3)]
        );
        // Two of three were right.
        sequences.resolve(&lane(vec![], vec![chunk(1, 8, &[2], &[])]), false).unwrap();
        let mut expected = History::default();
        [1, 2, 3, 4, 5].into_iter().for_each(|token| expected.note(token, false));
        [6, 7, 8, 2].into_iter().for_each(|token| expected.note(token, true));
        assert_eq!(sequences.get(SeqId(1)).unwrap().history, expected);
        for (chunk, said) in [
            (drafted(8, &[1], 0), "computed up to 9"),
            (drafted(9, &[1, 2], 2), "2 drafts among 2 tokens"),
            (Chunk { sample: false, ..drafted(9, &[1, 2], 1) }, "1 drafts among 2 tokens, not sampled"),
        ] {
            let fault = sequences.resolve(&lane(vec![], vec![chunk]), false).unwrap_err();
            assert!(fault.text.contains(said), "{said}: {}", fault.text);
        }
    }

    #[test]
    fn a_step_that_does_not_fit_is_refused_with_its_numbers() {
        let one = || vec![begin(1, Sampling::GREEDY)];
        for (step, said) in [
            (lane(vec![], vec![chunk(1, 0, &[1], &[0])]), "never begun"),
            (lane([one(), one()].concat(), vec![]), "begun twice"),
            (lane(one(), vec![chunk(1, 0, &[1], &[])]), "reaches 1 tokens with 0 blocks"),
            (lane(one(), vec![chunk(1, 0, &[1], &[4])]), "block 4 of 4"),
            (lane(one(), vec![chunk(1, 0, &[10], &[0])]), "token 10"),
            (lane(one(), vec![chunk(1, 100, &[1], &[0, 1, 2, 3])]), "reaches 101 tokens"),
            (lane(one(), vec![chunk(1, 0, &[], &[0])]), "no tokens"),
            (lane(one(), vec![chunk(1, 0, &[1; 51], &[0, 1])]), "51 tokens in a step"),
            (lane(one(), vec![chunk(1, 0, &[1], &[0]), chunk(1, 1, &[1], &[])]), "two chunks"),
        ] {
            let fault = Sequences::new(LIMITS, 10).resolve(&step, false).unwrap_err();
            assert!(fault.text.contains(said), "{said}: {}", fault.text);
        }
        let mut sequences = Sequences::new(LIMITS, 10);
        sequences.resolve(&lane(one(), vec![chunk(1, 0, &[1, 2], &[0])]), false).unwrap();
        let fault = sequences.resolve(&lane(vec![], vec![chunk(1, 3, &[1], &[])]), false).unwrap_err();
        assert!(fault.text.contains("position 3, it was computed up to 2"));
        let again = LaneBatch { ended: vec![SeqId(1)], ..lane(one(), vec![chunk(1, 0, &[1], &[0])]) };
        assert!(sequences.resolve(&again, false).is_ok(), "an ended sequence is forgotten");
    }
}
