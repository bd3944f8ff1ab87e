//! A stage of a decoder on one rank: a run of its layers, each with its cache, and the vocabulary where the run begins or ends the
//! model.

use super::layer::replace;
use super::pass::Pass;
use super::tables::{Kinds, Tables};
use super::weights::{LayerLoader, LayerWeights, Vocabulary};
use crate::backend::{Backend, Kind, Routing};
use model::fault::Fault;
use model::mesh::Place;
use model::plan::{Limits, Plan};
use model::spec::ModelSpec;

/// The weights of a rank's stage, without its predictors.
pub struct Weights<B: Backend> {
    vocabulary: Vocabulary<B>,
    /// From `first_layer`.
    layers: Vec<LayerWeights<B>>,
    first_layer: usize,
}

impl<B: Backend> Weights<B> {
    /// `tick` is called after each layer; `None` where it said no.
    pub fn load<'a>(
        from: impl Fn(usize) -> LayerLoader<'a, B>,
        spec: &ModelSpec,
        plan: &Plan,
        place: Place,
        kinds: &Kinds,
        tick: impl Fn() -> bool,
    ) -> Result<Option<Weights<B>>, Fault>
    where
        B: 'a,
    {
        let range = plan.stages[place.stage].clone();
        let ends = (place.stage == 0, place.stage + 1 == plan.mesh.pipeline);
        let LayerLoader { backend, loader, shelf, .. } = from(range.start);
        let vocabulary = Vocabulary::load(backend, loader, shelf, spec, ends)?;
        let (first_layer, mut layers) = (range.start, Vec::with_capacity(range.len()));
        for layer in range {
            layers.push(from(layer).load(&spec.layers[layer], kinds)?);
            if !tick() {
                return Ok(None);
            }
        }
        Ok(Some(Weights { vocabulary, layers, first_layer }))
    }

    /// With caches and tables within `limits`: ready to run.
    pub fn ready(self, backend: &B, kinds: &Kinds, limits: &Limits) -> Result<Stage<B>, Fault> {
        let Weights { vocabulary, layers, first_layer } = self;
        let caches: Result<Vec<_>, Fault> =
            layers.iter().map(|layer| backend.cache(layer.mixer.cache(), limits.blocks)).collect();
        let tables = kinds.tables(backend, limits.model_len_max)?;
        Ok(Stage { vocabulary, layers, first_layer, caches: caches?, tables })
    }
}

/// A stage that runs.
pub struct Stage<B: Backend> {
    pub vocabulary: Vocabulary<B>,
    layers: Vec<LayerWeights<B>>,
    first_layer: usize,
    caches: Vec<B::Cache>,
    /// Of its layers, and of predictors where it has any.
    pub tables: Tables<B>,
}

impl<B: Backend> Stage<B> {
    /// The residual rows that the pass's tokens begin with, on the first stage.
    pub fn embed(&self, pass: &mut Pass<'_, B>, ids: &[u32], x: &mut B::Buffer) -> Result<(), Fault> {
        self.vocabulary.embed(pass, ids, x)?;
        match &self.vocabulary.embedding_norm {
            Some(norm) => replace(pass, norm, x),
            None => Ok(()),
        }
    }

    /// Runs the layers over the residual rows `x`; `done` is told of each, by its number in the model, with its mixtures' choices.
    pub fn run(
        &mut self,
        pass: &mut Pass<'_, B>,
        x: &mut B::Buffer,
        mut done: impl FnMut(usize, Vec<Routing>),
    ) -> Result<(), Fault> {
        let hidden = pass.hidden;
        let mut normed = pass.take(hidden, Kind::Input)?;
        for (index, (layer, cache)) in self.layers.iter().zip(&mut self.caches).enumerate() {
            let routings = layer.run(pass, &self.tables, cache, x, &mut normed)?;
            done(self.first_layer + index, routings);
        }
        pass.give(hidden, Kind::Input, normed);
        Ok(())
    }
}
