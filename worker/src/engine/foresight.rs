//! What a stage's predictors do in a step: they run over the rows whose next tokens are known, those just drawn among them, and
//! guess what follows.
//!
//! ```text
//! position            0   1   2   3        tokens 0..=3 and 4, just drawn
//! the model's rows    r0  r1  r2  r3  ->  4
//! predictor 0         takes (r0, token 1) .. (r3, token 4), the last row foretells token 5: the first guess
//! predictor 1         takes predictor 0's rows and tokens 2..=4: its row of position 3 waits for token 5
//! further guesses     each a pass of one row a sequence that takes in the guess before: by the next predictor, and behind
//!                     the last one by that at the next position. The next step writes over what they leave in the cache.
//! ```

use super::batch::{Batch, Resolved, Sequence, Wanted};
use super::comm;
use super::head::Head;
use super::layer::replace;
use super::pass::Pass;
use super::predict::Predictor;
use super::state::Sequences;
use super::tables::Tables;
use super::weights::Vocabulary;
use crate::backend::{Backend, Kind, Routing};
use model::fault::Fault;
use model::plan::BLOCK_TOKENS;
use model::step::{BlockId, Guesses, SeqId};

/// A sequence as predictors know it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Foreseen {
    /// Its first position with a row of predictors. What is cached before was predicted by another sequence's steps.
    from: usize,
    /// Tokens that were known after the last step; `None` before the first.
    known: Option<usize>,
    /// By predictor: the row that its next one goes on from, normed.
    tails: Vec<Vec<f32>>,
}

impl Foreseen {
    pub fn new(predictors: usize) -> Foreseen {
        Foreseen { tails: vec![Vec::new(); predictors], ..Foreseen::default() }
    }
}

/// What was drawn behind a chunk: so many of its drafts again, and then a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Behind {
    pub seq: SeqId,
    pub guessed: usize,
    pub token: u32,
}

/// One predictor's part of a step. A row needs the token after the one that it goes on from foretells.
#[derive(Debug, Clone, Default, PartialEq)]
struct Ahead {
    batch: Batch,
    /// Token that each row takes in: the one that the row before it foretold.
    ids: Vec<u32>,
    /// The row that each goes on from, of this step's (of the predictor's before); `None` for one kept from the step
    /// before.
    from: Vec<Option<u32>>,
    /// Whose each of the batch's spans is.
    sequences: Vec<SeqId>,
    /// Rows (of this step's, or of the predictor's before) that the next step goes on from.
    kept: Vec<(SeqId, u32)>,
}

impl Ahead {
    fn rows(&self) -> usize {
        self.ids.len()
    }
}

/// What each predictor runs over in a step that drew `behind`, in the order of chunks.
fn ahead(sequences: &mut Sequences, resolved: &Resolved, behind: &[Behind]) -> Result<Vec<Ahead>, Fault> {
    let mut all = vec![Ahead::default(); sequences.predictors()];
    let mut behind = behind.iter().peekable();
    for (span, &seq) in resolved.batch.spans.iter().zip(&resolved.sequences) {
        let drawn = behind.next_if(|drawn| drawn.seq == seq);
        let state = sequences.get(seq)?;
        // Rows of drafts that were not drawn again foretell nothing.
        let rows = span.rows - drawn.map_or(0, |drawn| state.drafts.len() - drawn.guessed);
        let (start, end) = (span.start, span.start + rows);
        let tokens = &resolved.ids[span.row..span.row + rows];
        let token = |position: usize| match tokens.get(position - start) {
            Some(token) => *token,
            None => drawn.expect("nothing else is known behind a chunk").token,
        };
        let foreseen = &mut state.foreseen;
        let begins = foreseen.known.is_none();
        let before_known = *foreseen.known.get_or_insert(start);
        if begins || start > before_known {
            foreseen.from = start;
        }
        let now_known = end + usize::from(drawn.is_some());
        foreseen.known = Some(now_known);
        // Positions of the rows that a predictor goes on from, and the first one's row.
        let (mut before, mut first) = (start..end, span.row);
        for (index, ahead) in all.iter_mut().enumerate() {
            // The row at `p` takes in the token at `p + lag`.
            let lag = index + 1;
            let at = |known: usize| known.saturating_sub(lag).max(foreseen.from);
            let (row, positions) = (ahead.rows(), at(before_known)..at(now_known));
            if !before.is_empty() && before.end > positions.end {
                ahead.kept.push((seq, (first + before.len() - 1) as u32));
            }
            if !positions.is_empty() {
                ahead.ids.extend(positions.clone().map(|p| token(p + lag)));
                let of = |p: usize| p.checked_sub(before.start).map(|i| (first + i) as u32);
                ahead.from.extend(positions.clone().map(of));
                ahead.batch.positions.extend(positions.clone().map(|p| p as u32));
                let (start, rows) = (positions.start, positions.len());
                ahead.batch.spans.push(Sequence { row, rows, start, blocks: span.blocks.clone() });
                ahead.sequences.push(seq);
            }
            (before, first) = (positions, row);
        }
    }
    Ok(all)
}

/// A sequence whose next tokens are guessed.
struct Tip {
    /// What was drawn behind its chunk stands here.
    position: usize,
    blocks: Vec<BlockId>,
    guesses: Guesses,
}

/// A stage's predictors, and what they share with the model.
pub struct Foresight<'a, B: Backend> {
    pub predictors: &'a mut [Predictor<B>],
    pub vocabulary: &'a Vocabulary<B>,
    pub tables: &'a Tables<B>,
}

impl<B: Backend> Foresight<'_, B> {
    /// Runs the predictors, each on the rows of the one before, the first on the residual rows `x`, which go back to the pool.
    /// A trace gets their logits, the scheduler as many guesses as the step asks for.
    pub fn run(
        &mut self,
        pass: &mut Pass<'_, B>,
        head: &mut Head<'_, B>,
        (resolved, behind): (&Resolved, &[Behind]),
        x: B::Buffer,
    ) -> Result<Vec<Guesses>, Fault> {
        let hidden = pass.hidden;
        let all = ahead(head.sequences, resolved, behind)?;
        let (mut tips, mut normed) = (Vec::new(), None);
        // What the next predictor goes on from, how many rows of it, and their norm.
        let (mut before, mut count, mut norm) = (x, pass.rows, head.norm());
        for (index, (predictor, ahead)) in self.predictors.iter_mut().zip(&all).enumerate() {
            if count > 0 {
                replace(&mut over(pass, count, pass.meta), norm, &mut before)?;
            }
            let meta = pass.backend.meta(&ahead.batch)?;
            let mut own = over(pass, ahead.rows(), &meta);
            let picked = pick(&mut own, head, index, ahead, &mut before, count)?;
            own.pool.give(hidden, Kind::Full, count, before);
            let (x, routings) = predictor.run(&mut own, (self.vocabulary, self.tables), picked, &ahead.ids)?;
            record(&mut own, head, (index, predictor), ahead, (&x, routings))?;
            if index == 0 && resolved.guesses > 0 {
                (tips, normed) = first_guesses(&mut own, head, predictor, (ahead, behind), &x)?;
            }
            (before, count, norm) = (x, ahead.rows(), &predictor.norm);
        }
        pass.pool.give(hidden, Kind::Full, count, before);
        for further in 1..resolved.guesses {
            normed = Some(self.guess_on(pass, head, further, &mut tips, normed)?);
        }
        if let Some((rows, buffer)) = normed {
            pass.pool.give(hidden, Kind::Full, rows, buffer);
        }
        Ok(tips.into_iter().map(|tip| tip.guesses).collect())
    }

    /// The `further`th guess after the first of each sequence, from the `rows` that foretold the one before, normed. Without any
    /// too the predictor runs: other lanes may have some.
    fn guess_on(
        &mut self,
        pass: &mut Pass<'_, B>,
        head: &mut Head<'_, B>,
        further: usize,
        tips: &mut [Tip],
        rows: Option<(usize, B::Buffer)>,
    ) -> Result<(usize, B::Buffer), Fault> {
        let hidden = pass.hidden;
        let index = further.min(self.predictors.len() - 1);
        let predictor = &mut self.predictors[index];
        let moved = further - index;
        let len_max = head.sequences.limits().model_len_max;
        let (mut batch, mut ids, mut from, mut wanted) = (Batch::default(), Vec::new(), Vec::new(), Vec::new());
        let had = tips.iter_mut().filter(|tip| tip.guesses.tokens.len() == further);
        let mut going = Vec::new();
        for (at, tip) in had.enumerate() {
            let (row, start) = (ids.len(), tip.position - 1 + moved);
            if start >= len_max.min(tip.blocks.len() * BLOCK_TOKENS) {
                // There is no room for the predictor's row: it has the guesses that it has.
                continue;
            }
            batch.positions.push(start as u32);
            batch.spans.push(Sequence { row, rows: 1, start, blocks: tip.blocks.clone() });
            ids.push(tip.guesses.tokens[further - 1]);
            from.push(at as u32);
            wanted.push(guess_at(row, tip.guesses.seq, tip.position + 1 + further));
            going.push(tip);
        }
        let meta = pass.backend.meta(&batch)?;
        let mut own = over(pass, ids.len(), &meta);
        let mut picked = own.take(hidden, Kind::Full)?;
        if let Some((count, buffer)) = rows {
            if !from.is_empty() {
                own.backend.select(&buffer, &from, &mut picked)?;
            }
            own.pool.give(hidden, Kind::Full, count, buffer);
        }
        let (mut x, _) = predictor.run(&mut own, (self.vocabulary, self.tables), picked, &ids)?;
        let tokens = head.guess(&mut own, &predictor.norm, &wanted, &x)?;
        for (tip, token) in going.into_iter().zip(tokens) {
            tip.guesses.tokens.push(token);
        }
        if !ids.is_empty() {
            replace(&mut own, &predictor.norm, &mut x)?;
        }
        Ok((ids.len(), x))
    }
}

/// The first predictor's guesses, one a sequence that was drawn for; and the rows that they came from, normed.
#[allow(clippy::type_complexity)] // two of a kind, used once
fn first_guesses<B: Backend>(
    pass: &mut Pass<'_, B>,
    head: &mut Head<'_, B>,
    predictor: &Predictor<B>,
    (ahead, behind): (&Ahead, &[Behind]),
    x: &B::Buffer,
) -> Result<(Vec<Tip>, Option<(usize, B::Buffer)>), Fault> {
    let (mut tips, mut wanted) = (Vec::new(), Vec::new());
    let mut spans = ahead.batch.spans.iter().zip(&ahead.sequences);
    for &Behind { seq, .. } in behind {
        let Some((span, _)) = spans.find(|(_, of)| **of == seq) else { continue };
        let position = span.start + span.rows;
        wanted.push(guess_at(span.row + span.rows - 1, seq, position + 1));
        tips.push(Tip { position, blocks: span.blocks.clone(), guesses: Guesses { seq, tokens: Vec::new() } });
    }
    let tokens = head.guess(pass, &predictor.norm, &wanted, x)?;
    for (tip, token) in tips.iter_mut().zip(tokens) {
        tip.guesses.tokens.push(token);
    }
    if tips.is_empty() {
        return Ok((tips, None));
    }
    let rows: Vec<u32> = wanted.iter().map(|wanted| wanted.row).collect();
    let mut own = over(pass, rows.len(), pass.meta);
    let mut picked = own.take(own.hidden, Kind::Full)?;
    own.backend.select(x, &rows, &mut picked)?;
    replace(&mut own, &predictor.norm, &mut picked)?;
    Ok((tips, Some((rows.len(), picked))))
}

fn guess_at(row: usize, seq: SeqId, next: usize) -> Wanted {
    Wanted { row: row as u32, seq, next, sample: true, drafts: 0, prompt: None }
}

/// Leaves a predictor's logits and choices in the trace, where there is one.
fn record<B: Backend>(
    pass: &mut Pass<'_, B>,
    head: &mut Head<'_, B>,
    (index, predictor): (usize, &Predictor<B>),
    ahead: &Ahead,
    (x, routings): (&B::Buffer, Vec<Routing>),
) -> Result<(), Fault> {
    if head.trace.is_none() {
        return Ok(());
    }
    let logits = head.all(pass, &predictor.norm, x)?;
    let Some(trace) = &mut head.trace else { return Ok(()) };
    trace.routings.extend(routings.into_iter().map(|routing| (predictor.number, routing)));
    if trace.predicted.len() <= index {
        trace.predicted.resize_with(index + 1, Vec::new);
    }
    let spans = ahead.batch.spans.iter().zip(&ahead.sequences);
    let places = spans.flat_map(|(span, seq)| (span.start..span.start + span.rows).map(|p| (*seq, p)));
    trace.predicted[index].extend(places.zip(logits).map(|((seq, at), row)| (seq, at, row)));
    Ok(())
}

/// The same pass over other rows.
fn over<'a, B: Backend>(pass: &'a mut Pass<'_, B>, rows: usize, meta: &'a B::Meta) -> Pass<'a, B> {
    Pass { backend: pass.backend, communicators: pass.communicators, pool: pass.pool, meta, rows, hidden: pass.hidden }
}

/// The rows that a predictor goes on from, of `before`'s `count` or kept from the step before; and keeps those that the
/// next step goes on from.
fn pick<B: Backend>(
    pass: &mut Pass<'_, B>,
    head: &mut Head<'_, B>,
    index: usize,
    ahead: &Ahead,
    before: &mut B::Buffer,
    count: usize,
) -> Result<B::Buffer, Fault> {
    let (hidden, n) = (pass.hidden, pass.rows);
    let mut picked = pass.take(hidden, Kind::Full)?;
    if n > 0 {
        // A kept row's place is filled with any row first.
        let rows: Vec<u32> = ahead.from.iter().map(|from| from.unwrap_or(0)).collect();
        pass.backend.select(before, &rows, &mut picked)?;
    }
    if ahead.from.iter().any(Option::is_none) {
        let values = comm::full(pass.backend, &mut picked, n)?;
        for (span, seq) in ahead.batch.spans.iter().zip(&ahead.sequences) {
            if ahead.from[span.row].is_none() {
                let tail = &head.sequences.get(*seq)?.foreseen.tails[index];
                values[span.row * hidden..(span.row + 1) * hidden].copy_from_slice(tail);
            }
        }
        pass.backend.host_done(&mut picked, n)?;
    }
    if !ahead.kept.is_empty() {
        let values = comm::full(pass.backend, before, count)?;
        for (seq, row) in &ahead.kept {
            let at = *row as usize * hidden;
            let tail = &mut head.sequences.get(*seq)?.foreseen.tails[index];
            tail.clear();
            tail.extend_from_slice(&values[at..at + hidden]);
        }
        pass.backend.host_done(before, count)?;
    }
    Ok(picked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::plan::Limits;
    use model::step::{Begin, Chunk, LaneBatch, Sampling};

    const LIMITS: Limits = Limits { model_len_max: 100, step_tokens_max: 50, step_sequences_max: 2, blocks: 4 };

    /// What two predictors run over in a step of `chunks`: sequence, start, tokens, drafts among them, blocks, and what was drawn.
    type Told<'a> = (u64, u32, &'a [u32], u32, &'a [u32], Option<(usize, u32)>);

    fn step(sequences: &mut Sequences, begun: &[u64], chunks: &[Told<'_>]) -> Vec<Ahead> {
        let begin = |seq: &u64| Begin { seq: SeqId(*seq), sampling: Sampling::GREEDY, prompt_len: 3, history: vec![] };
        let chunk = |&(seq, start, tokens, drafts, blocks, _): &Told<'_>| {
            let blocks = blocks.iter().map(|&b| BlockId(b)).collect();
            Chunk { seq: SeqId(seq), start, tokens: tokens.to_vec(), blocks, sample: true, drafts }
        };
        let begun = begun.iter().map(begin).collect();
        let lane = LaneBatch { begun, chunks: chunks.iter().map(chunk).collect(), ..LaneBatch::default() };
        let resolved = sequences.resolve(&lane, false).unwrap();
        let behind =
            |&(seq, .., drawn): &Told<'_>| drawn.map(|(guessed, token)| Behind { seq: SeqId(seq), guessed, token });
        ahead(sequences, &resolved, &chunks.iter().filter_map(behind).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn predictors_wait_for_tokens_and_go_on_from_what_was_kept() {
        let mut sequences = Sequences::new(LIMITS, 10).predicting(2);
        let found = step(&mut sequences, &[1], &[(1, 0, &[1], 0, &[0], None)]);
        assert_eq!((found[0].rows(), found[1].rows()), (0, 0), "the next token is not known");
        assert_eq!((&found[0].kept[..], &found[1].kept[..]), (&[(SeqId(1), 0)][..], &[][..]));
        let chunks: [Told<'_>; 2] = [(2, 0, &[4, 5, 6], 0, &[1], None), (1, 1, &[2, 3], 0, &[], None)];
        let found = step(&mut sequences, &[2], &chunks);
        assert_eq!((&found[0].ids[..], &found[0].batch.positions[..]), (&[5, 6, 2, 3][..], &[0, 1, 0, 1][..]));
        assert_eq!(found[0].from, [Some(0), Some(1), None, Some(3)]);
        assert_eq!(found[0].kept, [(SeqId(2), 2), (SeqId(1), 4)]);
        assert_eq!((&found[1].ids[..], &found[1].batch.positions[..]), (&[6, 3][..], &[0, 0][..]));
        assert_eq!(found[1].from, [Some(0), Some(2)]);
        assert_eq!(found[1].kept, [(SeqId(2), 1), (SeqId(1), 3)]);
        let third = step(&mut sequences, &[], &[(1, 3, &[7], 0, &[], None)]);
        assert_eq!((&third[0].from[..], &third[1].from[..]), (&[None][..], &[None][..]));
        assert_eq!((third[0].batch.spans[0].start, third[1].batch.spans[0].start), (2, 1));
    }

    #[test]
    fn what_was_drawn_is_taken_in_at_once_and_drafts_only_as_far_as_they_were_right() {
        let mut sequences = Sequences::new(LIMITS, 10).predicting(2);
        let found = step(&mut sequences, &[1], &[(1, 0, &[1, 2, 3], 0, &[0], Some((0, 4)))]);
        assert_eq!((&found[0].ids[..], &found[0].from[..]), (&[2, 3, 4][..], &[Some(0), Some(1), Some(2)][..]));
        assert_eq!((&found[1].ids[..], &found[1].from[..]), (&[3, 4][..], &[Some(0), Some(1)][..]));
        assert_eq!((&found[0].kept[..], &found[1].kept[..]), (&[][..], &[(SeqId(1), 2)][..]));
        // Of three drafts one is right, and 9 is drawn behind it.
        let found = step(&mut sequences, &[], &[(1, 3, &[4, 5, 6, 7], 3, &[], Some((1, 9)))]);
        assert_eq!((&found[0].ids[..], &found[0].from[..]), (&[5, 9][..], &[Some(0), Some(1)][..]));
        assert_eq!(found[0].batch.positions, [3, 4]);
        assert_eq!((&found[1].ids[..], &found[1].from[..]), (&[5, 9][..], &[None, Some(0)][..]));
        assert_eq!(found[1].batch.positions, [2, 3]);
        let found = step(&mut sequences, &[], &[(1, 5, &[9], 0, &[], Some((0, 2)))]);
        assert_eq!((&found[0].batch.positions[..], &found[1].batch.positions[..]), (&[5][..], &[4][..]));
    }
}
