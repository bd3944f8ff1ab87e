//! The last stage's end: logits of the wanted rows, gathered over the vocabulary's shards, and what becomes of them.
//! Where the likeliest token is all that is asked, only each shard's candidate travels.

use super::ahead::Behind;
use super::batch::{PromptRow, Resolved, Wanted};
use super::comm;
use super::feed::{self, Drawn};
use super::pass::Pass;
use super::sample;
use super::score;
use super::state::Sequences;
use super::trace::Trace;
use super::weights::Vocabulary;
use crate::backend::{Backend, Kind, NormWeights};
use model::fault::{Fault, FaultKind};
use model::step::{LaneResult, PromptScores, Sample, SeqId, guessed};
use std::borrow::Cow;

/// Rows whose logits are held at once: bounds the memory that scores of a long prompt take.
const TILE_ROWS: usize = 32;

/// The step's end on one rank of the last stage.
pub struct Head<'a, B: Backend> {
    pub vocabulary: &'a Vocabulary<B>,
    pub sequences: &'a mut Sequences,
    pub trace: Option<&'a mut Trace>,
    pub vocab: usize,
    pub hidden: usize,
    /// Samples, scores and keeps what waits; other ranks only compute.
    pub leader: bool,
    /// Somebody goes on from what is drawn, on every tensor rank.
    pub guessed: bool,
}

/// A token that is to be guessed.
pub struct Unknown {
    pub wanted: Wanted,
    /// The tokens before it that the sequence's history has not noted yet.
    pub since: Vec<u32>,
}

impl<'a, B: Backend> Head<'a, B> {
    /// Answers a step from the residual rows `x`. Where somebody goes on from it every tensor rank learns what was drawn.
    pub fn run(
        &mut self,
        pass: &mut Pass<'_, B>,
        resolved: &Resolved,
        x: &B::Buffer,
    ) -> Result<(LaneResult, Vec<Behind>), Fault> {
        let mut scores = Scores::default();
        if self.leader {
            self.foretold(resolved, &mut scores)?;
        }
        let (plain, whole) = self.split(resolved.wanted.iter())?;
        let mut samples: Vec<(usize, Sample)> = Vec::new();
        for tile in plain.chunks(TILE_ROWS) {
            let tokens = self.likeliest(pass, self.norm(), tile, x)?;
            for (&(index, wanted), token) in tile.iter().zip(tokens) {
                self.note(wanted, Drawn::Everywhere(token))?;
                samples.push((index, Sample { seq: wanted.seq, token, score: None }));
            }
        }
        let mut row = vec![0.0; self.vocab];
        for tile in whole.chunks(TILE_ROWS) {
            let rows: Vec<u32> = tile.iter().map(|(_, w)| w.row).collect();
            let shards = self.gathered(pass, self.norm(), &rows, x)?;
            for (i, &(index, wanted)) in tile.iter().enumerate() {
                self.assemble(&shards, i, tile.len(), &mut row)?;
                if let Some(trace) = &mut self.trace {
                    trace.logits.push((wanted.seq, wanted.next - 1, row.clone()));
                }
                let sample = if self.leader { self.answer(wanted, &mut row, &mut scores)? } else { None };
                self.note(wanted, Drawn::ByLeader(sample.as_ref().map(|sample| sample.token)))?;
                samples.extend(sample.map(|sample| (index, sample)));
            }
        }
        samples.sort_by_key(|s| s.0);
        let samples = self.counting(samples.into_iter().map(|s| s.1).collect())?;
        let behind = if self.guessed { self.behind(pass, resolved, &samples)? } else { Vec::new() };
        Ok((LaneResult { samples, prompt_scores: scores.lists, guesses: Vec::new() }, behind))
    }

    /// What was drawn behind each chunk, on every tensor rank: the leader tells what it alone drew.
    fn behind(
        &mut self,
        pass: &mut Pass<'_, B>,
        resolved: &Resolved,
        samples: &[Sample],
    ) -> Result<Vec<Behind>, Fault> {
        let mut own = samples.chunk_by(|a, b| a.seq == b.seq).peekable();
        let sampled: Vec<&Wanted> = resolved.wanted.iter().filter(|wanted| wanted.sample).collect();
        let (mut found, mut told) = (Vec::new(), Vec::new());
        for wanted in sampled.chunk_by(|a, b| a.seq == b.seq) {
            let seq = wanted[0].seq;
            let mut everywhere = true;
            for wanted in wanted {
                everywhere &= self.is_plain(wanted)?;
            }
            let drawn = own.next_if(|own| own[0].seq == seq).unwrap_or_default();
            if !everywhere {
                told.push(found.len());
            }
            let (guessed, token) = (drawn.len().saturating_sub(1), drawn.last().map_or(0, |sample| sample.token));
            found.push(Behind { seq, guessed, token });
        }
        if !told.is_empty() {
            let words = |at: &usize| [found[*at].guessed as u32, found[*at].token];
            let words = self.leader.then(|| told.iter().flat_map(words).collect());
            let words = feed::of_leader(words, 2 * told.len(), &mut *pass.communicators.tensor)?;
            for (at, words) in told.into_iter().zip(words.chunks_exact(2)) {
                (found[at].guessed, found[at].token) = (words[0] as usize, words[1]);
            }
        }
        Ok(found)
    }

    /// What is likely to be drawn from a guesser's rows `x` after its `norm`, on every tensor rank: drawn as the token itself will
    /// be, so that it is the same wherever the guesser is right about what is likely.
    pub fn guess(
        &mut self,
        pass: &mut Pass<'_, B>,
        norm: &NormWeights<B::Vector>,
        unknown: &[Unknown],
        x: &B::Buffer,
    ) -> Result<Vec<u32>, Fault> {
        let mut tokens = vec![0; unknown.len()];
        let (plain, whole) = self.split(unknown.iter().map(|unknown| &unknown.wanted))?;
        for tile in plain.chunks(TILE_ROWS) {
            let found = self.likeliest(pass, norm, tile, x)?;
            tile.iter().zip(found).for_each(|(&(index, _), token)| tokens[index] = token);
        }
        let mut row = vec![0.0; self.vocab];
        for tile in whole.chunks(TILE_ROWS) {
            let rows: Vec<u32> = tile.iter().map(|(_, w)| w.row).collect();
            let shards = self.gathered(pass, norm, &rows, x)?;
            let mut drawn = Vec::with_capacity(tile.len());
            let drawing = if self.leader { tile } else { &[] };
            for (i, (index, wanted)) in drawing.iter().enumerate() {
                self.assemble(&shards, i, tile.len(), &mut row)?;
                let state = self.sequences.get(wanted.seq)?;
                let mut history = Cow::Borrowed(&state.history);
                if state.sampling.needs_history() {
                    unknown[*index].since.iter().for_each(|&token| history.to_mut().note(token, true));
                }
                drawn.push(sample::draw(&mut row, &state.sampling, &history, state.moment(wanted.next)));
            }
            let drawn = self.leader.then_some(drawn);
            let found = feed::of_leader(drawn, tile.len(), &mut *pass.communicators.tensor)?;
            tile.iter().zip(found).for_each(|(&(index, _), token)| tokens[index] = token);
        }
        Ok(tokens)
    }

    /// Remembers a draw that the next step may go on from.
    fn note(&mut self, wanted: &Wanted, drawn: Drawn) -> Result<(), Fault> {
        let state = self.sequences.get(wanted.seq)?;
        if wanted.sample && state.drafts.is_empty() {
            state.drawn = drawn;
        }
        Ok(())
    }

    /// Of a step's samples those that count: up to the first behind a draft that was not drawn as guessed.
    fn counting(&mut self, samples: Vec<Sample>) -> Result<Vec<Sample>, Fault> {
        let mut counting = Vec::with_capacity(samples.len());
        for own in samples.chunk_by(|a, b| a.seq == b.seq) {
            let guessed = guessed(&self.sequences.get(own[0].seq)?.drafts, own);
            counting.extend(own.iter().take(guessed + 1).cloned());
        }
        Ok(counting)
    }

    /// Those of which the likeliest token is all that is asked, and those that need their whole row, by number.
    #[allow(clippy::type_complexity)] // two of a kind
    fn split<'w>(
        &mut self,
        wanted: impl Iterator<Item = &'w Wanted>,
    ) -> Result<(Vec<(usize, &'w Wanted)>, Vec<(usize, &'w Wanted)>), Fault> {
        let (mut plain, mut whole) = (Vec::new(), Vec::new());
        for (index, wanted) in wanted.enumerate() {
            let list = if self.is_plain(wanted)? { &mut plain } else { &mut whole };
            list.push((index, wanted));
        }
        Ok((plain, whole))
    }

    fn is_plain(&mut self, wanted: &Wanted) -> Result<bool, Fault> {
        let traced = self.trace.is_some();
        let state = self.sequences.get(wanted.seq)?;
        let sampling = &state.sampling;
        let unscored = wanted.prompt.is_none() && sampling.logprobs.is_none();
        Ok(!traced && wanted.sample && unscored && sample::is_plain(sampling, state.moment(wanted.next)))
    }

    /// Scores of tokens that this step brought for logits of an earlier one.
    fn foretold(&mut self, resolved: &Resolved, scores: &mut Scores) -> Result<(), Fault> {
        for f in &resolved.foretold {
            let state = self.sequences.get(f.seq)?;
            let best = state.sampling.prompt_logprobs.unwrap_or(0);
            if let Some(row) = state.held.take() {
                scores.push(f.seq, f.position, score::score(&row, f.token, usize::from(best)));
            }
        }
        Ok(())
    }

    /// Whole logits of all of a pass's rows after `norm`, row by row.
    pub fn all(
        &self,
        pass: &mut Pass<'_, B>,
        norm: &NormWeights<B::Vector>,
        x: &B::Buffer,
    ) -> Result<Vec<Vec<f32>>, Fault> {
        let rows: Vec<u32> = (0..pass.rows as u32).collect();
        let mut found = Vec::with_capacity(rows.len());
        for tile in rows.chunks(TILE_ROWS) {
            let shards = self.gathered(pass, norm, tile, x)?;
            for i in 0..tile.len() {
                let mut row = vec![0.0; self.vocab];
                self.assemble(&shards, i, tile.len(), &mut row)?;
                found.push(row);
            }
        }
        Ok(found)
    }

    /// The norm of the residual rows.
    pub fn norm(&self) -> &'a NormWeights<B::Vector> {
        self.vocabulary.final_norm.as_ref().expect("the last stage loads the final norm")
    }

    /// This shard's logits of some rows after `norm`: Full, in a buffer from the pool.
    fn logits(
        &self,
        pass: &mut Pass<'_, B>,
        norm: &NormWeights<B::Vector>,
        rows: &[u32],
        x: &B::Buffer,
    ) -> Result<B::Buffer, Fault> {
        let n = rows.len();
        let mut picked = pass.pool.take(pass.backend, n, self.hidden, Kind::Full)?;
        pass.backend.select(x, rows, &mut picked)?;
        let mut normed = pass.pool.take(pass.backend, n, self.hidden, Kind::Input)?;
        pass.backend.norm(&picked, norm, n, &mut normed)?;
        pass.pool.give(self.hidden, Kind::Full, n, picked);
        let mut logits = pass.pool.take(pass.backend, n, self.vocabulary.rows.len(), Kind::Full)?;
        pass.backend.matmul(&normed, self.vocabulary.head(), None, n, &mut logits)?;
        pass.pool.give(self.hidden, Kind::Input, n, normed);
        Ok(logits)
    }

    /// Each row's likeliest id over all shards; the same on every tensor rank.
    fn likeliest(
        &self,
        pass: &mut Pass<'_, B>,
        norm: &NormWeights<B::Vector>,
        tile: &[(usize, &Wanted)],
        x: &B::Buffer,
    ) -> Result<Vec<u32>, Fault> {
        let (n, first, width) = (tile.len(), self.vocabulary.rows.start as u32, self.vocabulary.rows.len());
        let rows: Vec<u32> = tile.iter().map(|(_, w)| w.row).collect();
        let mut logits = self.logits(pass, norm, &rows, x)?;
        let values = comm::full(pass.backend, &mut logits, n)?;
        let mut mine = Vec::with_capacity(8 * n);
        for row in values.chunks_exact(width).take(n) {
            let (id, logit) = score::best(row, first).expect("every shard holds rows");
            mine.extend_from_slice(&id.to_le_bytes());
            mine.extend_from_slice(&logit.to_le_bytes());
        }
        pass.backend.host_done(&mut logits, n)?;
        pass.pool.give(width, Kind::Full, n, logits);
        let mut all = Vec::new();
        pass.communicators.tensor.gather(&mine, &mut all)?;
        if all.iter().any(|part| part.len() != 8 * n) {
            return Err(diverged("candidates", 8 * n, &all));
        }
        let candidate = |part: &Vec<u8>, i: usize| {
            let word = |at: usize| -> [u8; 4] { part[at..at + 4].try_into().expect("four bytes") };
            (u32::from_le_bytes(word(8 * i)), f32::from_le_bytes(word(8 * i + 4)))
        };
        let best = |i: usize| all.iter().map(|part| candidate(part, i)).min_by(|&a, &b| score::better(a, b));
        Ok((0..n).map(|i| best(i).expect("a communicator has members").0).collect())
    }

    /// Every shard's logits of some rows after `norm`.
    fn gathered(
        &self,
        pass: &mut Pass<'_, B>,
        norm: &NormWeights<B::Vector>,
        rows: &[u32],
        x: &B::Buffer,
    ) -> Result<Vec<Vec<f32>>, Fault> {
        let (n, width) = (rows.len(), self.vocabulary.rows.len());
        let mut logits = self.logits(pass, norm, rows, x)?;
        let values = &comm::full(pass.backend, &mut logits, n)?[..n * width];
        let shards = if pass.communicators.tensor.size() == 1 {
            vec![values.to_vec()]
        } else {
            let mut all = Vec::new();
            pass.communicators.tensor.gather(bytemuck::cast_slice(values), &mut all)?;
            if all.iter().any(|part| !part.len().is_multiple_of(4 * n)) {
                return Err(diverged("logits", 4 * n, &all));
            }
            all.iter().map(|part| bytemuck::pod_collect_to_vec(part)).collect()
        };
        pass.backend.host_done(&mut logits, n)?;
        pass.pool.give(width, Kind::Full, n, logits);
        Ok(shards)
    }

    /// Puts row `i` of `n` of all shards beside each other.
    fn assemble(&self, shards: &[Vec<f32>], i: usize, n: usize, row: &mut [f32]) -> Result<(), Fault> {
        let mut at = 0;
        for shard in shards {
            let width = shard.len() / n;
            if at + width > row.len() {
                break;
            }
            row[at..at + width].copy_from_slice(&shard[i * width..(i + 1) * width]);
            at += width;
        }
        if at != row.len() {
            let text = format!("the ranks' shards are not a vocabulary of {}: {at} fit", row.len());
            return Err(Fault::new(FaultKind::Diverged, text));
        }
        Ok(())
    }

    /// Scores, holds and samples from a whole row, as it is wanted.
    fn answer(&mut self, wanted: &Wanted, row: &mut [f32], scores: &mut Scores) -> Result<Option<Sample>, Fault> {
        let state = self.sequences.get(wanted.seq)?;
        let best = usize::from(state.sampling.prompt_logprobs.unwrap_or(0));
        match wanted.prompt {
            Some(PromptRow::Token(token)) => scores.push(wanted.seq, wanted.next, score::score(row, token, best)),
            Some(PromptRow::Held) => state.held = Some(row.to_vec()),
            None => {}
        }
        if !wanted.sample {
            return Ok(None);
        }
        let raw = state.sampling.logprobs.map(|n| (row.to_vec(), usize::from(n)));
        let mut history = Cow::Borrowed(&state.history);
        if state.sampling.needs_history() {
            state.drafts[..wanted.drafts].iter().for_each(|&draft| history.to_mut().note(draft, true));
        }
        let token = sample::draw(row, &state.sampling, &history, state.moment(wanted.next));
        let score = raw.map(|(raw, n)| score::score(&raw, token, n));
        Ok(Some(Sample { seq: wanted.seq, token, score }))
    }
}

/// Prompt scores in the making: one list a sequence, positions consecutive.
#[derive(Default)]
struct Scores {
    lists: Vec<PromptScores>,
}

impl Scores {
    fn push(&mut self, seq: SeqId, position: usize, score: model::step::Score) {
        match self.lists.iter_mut().find(|l| l.seq == seq) {
            Some(list) => {
                assert_eq!(list.start as usize + list.scores.len(), position, "prompt rows come in order");
                list.scores.push(score);
            }
            None => self.lists.push(PromptScores { seq, start: position as u32, scores: vec![score] }),
        }
    }
}

fn diverged(what: &str, each: usize, parts: &[Vec<u8>]) -> Fault {
    let lengths: Vec<usize> = parts.iter().map(Vec::len).collect();
    Fault::new(FaultKind::Diverged, format!("ranks gathered {lengths:?} bytes of {what}, {each} belong to the rows"))
}
