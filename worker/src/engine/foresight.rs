//! Who guesses on the last stage, and what it does in a step: it runs over the rows whose tokens became known, those just drawn
//! among them, and guesses what follows.
//!
//! ```text
//! position            0   1   2   3        tokens 0..=3 and 4, just drawn
//! the model's rows    r0  r1  r2  r3  ->  4
//! predictor 0         takes (r0, token 1) .. (r3, token 4), the last row foretells token 5: the first guess
//! predictor 1         takes predictor 0's rows and tokens 2..=4: its row of position 3 waits for token 5
//! further guesses     each a pass of one row a sequence that takes in the guess before: by the next predictor, and behind
//!                     the last one by that at the next position. The next step writes over what they leave in the cache.
//!
//! a draft model       takes tokens 0 .. 4, the last row (of position 4) foretells token 5; each further guess is a pass of
//!                     one row a sequence, at the next position
//! ```

use super::ahead::{self, Ahead, Behind};
use super::batch::{Batch, Resolved, Sequence, Wanted};
use super::comm;
use super::draft::Draft;
use super::head::{Head, Unknown};
use super::layer::replace;
use super::pass::Pass;
use super::predict::Predictor;
use super::tables::Tables;
use super::weights::Vocabulary;
use crate::backend::{Backend, Kind, NormWeights};
use model::fault::Fault;
use model::plan::BLOCK_TOKENS;
use model::step::{BlockId, Guesses};

/// Who guesses on a rank.
pub enum Source<B: Backend> {
    Nobody,
    Predictors(Vec<Predictor<B>>),
    Draft(Box<Draft<B>>),
}

/// A sequence whose next tokens are guessed.
struct Tip {
    /// What was drawn behind its chunk stands here.
    position: usize,
    blocks: Vec<BlockId>,
    /// Tokens behind its history: drafts that were drawn again, what was drawn then, guesses.
    since: Vec<u32>,
    guesses: Guesses,
}

impl Tip {
    fn guess(&mut self, token: u32) {
        self.since.push(token);
        self.guesses.tokens.push(token);
    }

    /// What its next guess stands for, foretold by a row.
    fn unknown(&self, row: usize) -> Unknown {
        let next = self.position + 1 + self.guesses.tokens.len();
        let wanted = Wanted { row: row as u32, seq: self.guesses.seq, next, sample: true, drafts: 0, prompt: None };
        Unknown { wanted, since: self.since.clone() }
    }
}

/// Runs whoever guesses in a step that drew `behind`, and gives the residual rows `x` back to the pool. A trace gets all logits, the
/// scheduler as many guesses as the step asks for.
pub fn run<B: Backend>(
    source: &mut Source<B>,
    (vocabulary, tables): (&Vocabulary<B>, &Tables<B>),
    pass: &mut Pass<'_, B>,
    head: &mut Head<'_, B>,
    step: (&Resolved, &[Behind]),
    x: B::Buffer,
) -> Result<Vec<Guesses>, Fault> {
    match source {
        Source::Predictors(predictors) => Foresight { predictors, vocabulary, tables }.run(pass, head, step, x),
        Source::Nobody => {
            pass.give(pass.hidden, Kind::Full, x);
            Ok(Vec::new())
        }
        Source::Draft(draft) => {
            pass.give(pass.hidden, Kind::Full, x);
            read_along(draft, pass, head, step)
        }
    }
}

/// A step of a draft model.
fn read_along<B: Backend>(
    draft: &mut Draft<B>,
    pass: &mut Pass<'_, B>,
    head: &mut Head<'_, B>,
    (resolved, behind): (&Resolved, &[Behind]),
) -> Result<Vec<Guesses>, Fault> {
    let ahead = ahead::drafted(head.sequences, resolved, behind, draft.len_max)?;
    let mut tips = if resolved.guesses > 0 { tips(head, &ahead, behind, 0)? } else { Vec::new() };
    if ahead.rows() > 0 {
        let x = draft.run(pass, &ahead.batch, &ahead.ids)?;
        let unknown: Vec<Unknown> = tips.iter().zip(last_rows(&ahead)).map(|(tip, row)| tip.unknown(row)).collect();
        let tokens = draft.with_head(pass, head, ahead.rows(), |pass, head, norm| {
            record(pass, head, norm, 0, &ahead, &x)?;
            head.guess(pass, norm, &unknown, &x)
        })?;
        tips.iter_mut().zip(tokens).for_each(|(tip, token)| tip.guess(token));
        draft.give(pass, ahead.rows(), x);
    }
    for further in 1..resolved.guesses {
        let Onward { batch, ids, unknown, going, .. } = onward(&mut tips, further, 0, draft.len_max);
        if ids.is_empty() {
            break;
        }
        let x = draft.run(pass, &batch, &ids)?;
        let guess = |pass: &mut Pass<'_, B>, head: &mut Head<'_, B>, norm: &_| head.guess(pass, norm, &unknown, &x);
        let tokens = draft.with_head(pass, head, ids.len(), guess)?;
        going.into_iter().zip(tokens).for_each(|(tip, token)| tip.guess(token));
        draft.give(pass, ids.len(), x);
    }
    Ok(tips.into_iter().map(|tip| tip.guesses).collect())
}

/// The sequences whose last rows take in what was just drawn, each the token `lag` further on.
fn tips<B: Backend>(head: &mut Head<'_, B>, ahead: &Ahead, behind: &[Behind], lag: usize) -> Result<Vec<Tip>, Fault> {
    let (mut tips, mut behind) = (Vec::with_capacity(ahead.drawn.len()), behind.iter());
    for &at in &ahead.drawn {
        let (span, seq) = (&ahead.batch.spans[at], ahead.sequences[at]);
        let drawn = behind.find(|drawn| drawn.seq == seq).expect("the rows are those of what was drawn, in its order");
        let mut since = head.sequences.get(seq)?.drafts[..drawn.guessed].to_vec();
        since.push(drawn.token);
        let (position, blocks) = (span.start + span.rows - 1 + lag, span.blocks.clone());
        tips.push(Tip { position, blocks, since, guesses: Guesses { seq, tokens: Vec::new() } });
    }
    Ok(tips)
}

/// The rows that foretell the first guesses.
fn last_rows(ahead: &Ahead) -> impl Iterator<Item = usize> {
    ahead.drawn.iter().map(|&at| ahead.batch.spans[at].row + ahead.batch.spans[at].rows - 1)
}

/// A row for each sequence that has all guesses so far, and room for one more.
struct Onward<'t> {
    batch: Batch,
    ids: Vec<u32>,
    /// By row: the place among those that had all guesses so far.
    from: Vec<u32>,
    unknown: Vec<Unknown>,
    going: Vec<&'t mut Tip>,
}

/// The rows that take the `further`th guesses in, `lag` positions before those.
fn onward(tips: &mut [Tip], further: usize, lag: usize, len_max: usize) -> Onward<'_> {
    let (batch, ids, from, unknown, going) = Default::default();
    let mut onward = Onward { batch, ids, from, unknown, going };
    let had = tips.iter_mut().filter(|tip| tip.guesses.tokens.len() == further);
    for (at, tip) in had.enumerate() {
        let (row, start) = (onward.ids.len(), tip.position + further - lag);
        if start >= len_max.min(tip.blocks.len() * BLOCK_TOKENS) {
            // There is no room for the row: it has the guesses that it has.
            continue;
        }
        onward.batch.positions.push(start as u32);
        onward.batch.spans.push(Sequence { row, rows: 1, start, blocks: tip.blocks.clone() });
        onward.ids.push(tip.guesses.tokens[further - 1]);
        onward.from.push(at as u32);
        onward.unknown.push(tip.unknown(row));
        onward.going.push(tip);
    }
    onward
}

/// A stage's predictors, and what they share with the model.
struct Foresight<'a, B: Backend> {
    predictors: &'a mut [Predictor<B>],
    vocabulary: &'a Vocabulary<B>,
    tables: &'a Tables<B>,
}

impl<B: Backend> Foresight<'_, B> {
    /// Runs the predictors, each on the rows of the one before, the first on the residual rows `x`.
    fn run(
        &mut self,
        pass: &mut Pass<'_, B>,
        head: &mut Head<'_, B>,
        (resolved, behind): (&Resolved, &[Behind]),
        x: B::Buffer,
    ) -> Result<Vec<Guesses>, Fault> {
        let hidden = pass.hidden;
        let all = ahead::predicted(head.sequences, resolved, behind)?;
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
            if let Some(trace) = &mut head.trace {
                trace.routings.extend(routings.into_iter().map(|routing| (predictor.number, routing)));
            }
            record(&mut own, head, &predictor.norm, index, ahead, &x)?;
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
        let len_max = head.sequences.limits().model_len_max;
        let Onward { batch, ids, from, unknown, going } = onward(tips, further, index + 1, len_max);
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
        let tokens = head.guess(&mut own, &predictor.norm, &unknown, &x)?;
        going.into_iter().zip(tokens).for_each(|(tip, token)| tip.guess(token));
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
    let mut tips = tips(head, ahead, behind, 1)?;
    let unknown: Vec<Unknown> = tips.iter().zip(last_rows(ahead)).map(|(tip, row)| tip.unknown(row)).collect();
    let tokens = head.guess(pass, &predictor.norm, &unknown, x)?;
    tips.iter_mut().zip(tokens).for_each(|(tip, token)| tip.guess(token));
    if tips.is_empty() {
        return Ok((tips, None));
    }
    let rows: Vec<u32> = unknown.iter().map(|unknown| unknown.wanted.row).collect();
    let mut own = over(pass, rows.len(), pass.meta);
    let mut picked = own.take(own.hidden, Kind::Full)?;
    own.backend.select(x, &rows, &mut picked)?;
    replace(&mut own, &predictor.norm, &mut picked)?;
    Ok((tips, Some((rows.len(), picked))))
}

/// Leaves the logits of the guesser's rows, its `index`th predictor's or a draft model's, in the trace, where there is one.
fn record<B: Backend>(
    pass: &mut Pass<'_, B>,
    head: &mut Head<'_, B>,
    norm: &NormWeights<B::Vector>,
    index: usize,
    ahead: &Ahead,
    x: &B::Buffer,
) -> Result<(), Fault> {
    if head.trace.is_none() {
        return Ok(());
    }
    let logits = head.all(pass, norm, x)?;
    let Some(trace) = &mut head.trace else { return Ok(()) };
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
