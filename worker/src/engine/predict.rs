//! Predictors (see [`model::spec::Predictor`]) on the last stage: from rows that foretell a token, and that token, rows that
//! foretell the one after it. All ranks of the stage run them together.

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
    pub number: usize,
    layer: LayerWeights<B>,
    cache: B::Cache,
    pub norm: NormWeights<B::Vector>,
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
