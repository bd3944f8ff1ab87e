//! Predictors (see [`model::spec::Predictor`]) on the last stage: from rows that foretell a token, and that token, rows that
//! foretell the one after it. All ranks of the stage run them together.

use super::batch::{Ahead, Resolved};
use super::comm;
use super::head::Head;
use super::layer::replace;
use super::pass::Pass;
use super::tables::{Kinds, Tables};
use super::weights::{LayerLoader, LayerWeights, Vocabulary};
use crate::backend::{Backend, Kind, MatrixView, NormWeights, Routing};
use model::catalog::Role;
use model::fault::Fault;
use model::spec;

/// One predictor's weights and cache on this rank.
pub struct Predictor<B: Backend> {
    embedding_norm: NormWeights<B::Vector>,
    hidden_norm: NormWeights<B::Vector>,
    /// The projection's halves, which meet the embedding and the hidden row: this rank's outputs.
    of_embedding: B::Matrix,
    of_hidden: B::Matrix,
    /// Outputs of this rank.
    channels: usize,
    /// Among all layers.
    number: usize,
    layer: LayerWeights<B>,
    cache: B::Cache,
    norm: NormWeights<B::Vector>,
}

impl<B: Backend> Predictor<B> {
    /// `kinds` are those of the stage's tables, `blocks` those of its caches.
    pub fn load(
        spec: &spec::Predictor,
        from: &LayerLoader<'_, B>,
        kinds: &Kinds,
        blocks: usize,
    ) -> Result<Predictor<B>, Fault> {
        let window = from.window(Role::PredictorProjection)?;
        let all = window.view();
        let half = |index: usize| {
            let view = MatrixView { col: all.col + index * from.hidden, cols: from.hidden, ..all };
            from.made_of(Role::PredictorProjection, index, || from.backend.matrix(&[view], 1))
        };
        let (of_embedding, of_hidden) = (half(0)?, half(1)?);
        let layer = from.load(&spec.layer, kinds)?;
        Ok(Predictor {
            embedding_norm: from.plain_norm(&spec.embedding_norm, Role::PredictorEmbeddingNorm)?,
            hidden_norm: from.plain_norm(&spec.hidden_norm, Role::PredictorHiddenNorm)?,
            of_embedding,
            of_hidden,
            channels: all.rows,
            number: from.layer,
            cache: from.backend.cache(layer.mixer.cache(), blocks)?,
            layer,
            norm: from.plain_norm(&spec.norm, Role::PredictorNorm)?,
        })
    }

    /// Goes on from a pass's `rows`, normed, by the tokens `ids` that they foretold: the rows that foretell the tokens
    /// after those, before the predictor's norm. Both buffers are from the pass's pool.
    pub fn run(
        &mut self,
        pass: &mut Pass<'_, B>,
        (vocabulary, tables): (&Vocabulary<B>, &Tables<B>),
        rows: B::Buffer,
        ids: &[u32],
    ) -> Result<(B::Buffer, Vec<Routing>), Fault> {
        let (hidden, channels, n) = (pass.hidden, self.channels, pass.rows);
        let mut x = pass.take(hidden, Kind::Full)?;
        let mut normed = pass.take(hidden, Kind::Input)?;
        if n > 0 {
            vocabulary.embed(pass, ids, &mut x)?;
            let (mut sum, mut part) = (pass.take(channels, Kind::Full)?, pass.take(channels, Kind::Full)?);
            pass.backend.norm(&x, &self.embedding_norm, n, &mut normed)?;
            pass.backend.matmul(&normed, &self.of_embedding, None, n, &mut sum)?;
            pass.backend.norm(&rows, &self.hidden_norm, n, &mut normed)?;
            pass.backend.matmul(&normed, &self.of_hidden, None, n, &mut part)?;
            pass.backend.add(&mut sum, &part, None, n)?;
            pass.gather(&mut sum, &mut x, hidden)?;
            pass.give(channels, Kind::Full, part);
            pass.give(channels, Kind::Full, sum);
        }
        pass.give(hidden, Kind::Full, rows);
        let routings = self.layer.run(pass, tables, &mut self.cache, &mut x, &mut normed)?;
        pass.give(hidden, Kind::Input, normed);
        Ok((x, routings))
    }
}

/// A stage's predictors, and what they share with the model.
pub struct Foresight<'a, B: Backend> {
    pub predictors: &'a mut [Predictor<B>],
    pub vocabulary: &'a Vocabulary<B>,
    pub tables: &'a Tables<B>,
}

impl<B: Backend> Foresight<'_, B> {
    /// Runs the predictors that a step asks for, each on the rows of the one before, the first on the residual rows `x`.
    /// Their logits go to the head's trace, and `x` back to the pool.
    pub fn run(
        &mut self,
        pass: &mut Pass<'_, B>,
        head: &mut Head<'_, B>,
        resolved: &Resolved,
        x: B::Buffer,
    ) -> Result<(), Fault> {
        let hidden = pass.hidden;
        // What the next predictor goes on from, how many rows of it, and their norm.
        let (mut before, mut count, mut norm) = (x, pass.rows, head.norm());
        for (index, (predictor, ahead)) in self.predictors.iter_mut().zip(&resolved.ahead).enumerate() {
            if count > 0 {
                replace(&mut over(pass, count, pass.meta), norm, &mut before)?;
            }
            let meta = pass.backend.meta(&ahead.batch)?;
            let mut own = over(pass, ahead.rows(), &meta);
            let picked = pick(&mut own, head, index, ahead, &mut before, count)?;
            own.pool.give(hidden, Kind::Full, count, before);
            let (x, routings) = predictor.run(&mut own, (self.vocabulary, self.tables), picked, &ahead.ids)?;
            let logits = head.all(&mut own, &predictor.norm, &x)?;
            if let Some(trace) = &mut head.trace {
                trace.routings.extend(routings.into_iter().map(|routing| (predictor.number, routing)));
                if trace.predicted.len() <= index {
                    trace.predicted.resize_with(index + 1, Vec::new);
                }
                let spans = ahead.batch.spans.iter().zip(&ahead.sequences);
                let places = spans.flat_map(|(span, seq)| (span.start..span.start + span.rows).map(|p| (*seq, p)));
                trace.predicted[index].extend(places.zip(logits).map(|((seq, at), row)| (seq, at, row)));
            }
            (before, count, norm) = (x, ahead.rows(), &predictor.norm);
        }
        pass.pool.give(hidden, Kind::Full, count, before);
        Ok(())
    }
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
        let values = comm::full(pass.backend, &mut picked, n)?;
        for (span, seq) in ahead.batch.spans.iter().zip(&ahead.sequences) {
            if ahead.from[span.row].is_none() {
                let tail = &head.sequences.get(*seq)?.tails[index];
                values[span.row * hidden..(span.row + 1) * hidden].copy_from_slice(tail);
            }
        }
        pass.backend.host_done(&mut picked, n)?;
    }
    if !ahead.kept.is_empty() {
        let values = comm::full(pass.backend, before, count)?;
        for (seq, row) in &ahead.kept {
            let at = *row as usize * hidden;
            let tail = &mut head.sequences.get(*seq)?.tails[index];
            tail.clear();
            tail.extend_from_slice(&values[at..at + hidden]);
        }
        pass.backend.host_done(before, count)?;
    }
    Ok(picked)
}
