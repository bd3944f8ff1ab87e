//! A draft model on a rank of the last stage: a smaller decoder of the same vocabulary that reads along and guesses. Each rank has
//! all of it and exchanges nothing, so that it runs as on one rank whatever the mesh: few small models have heads for a wide
//! cut, and ranks that all do the same wait for nobody. Its caches lie over the same block tables as the model's: what is cached,
//! moved or computed anew of the model is of the draft model too.

use super::batch::Batch;
use super::comm::Communicators;
use super::head::Head;
use super::pass::Pass;
use super::stage::{Stage, Weights};
use super::tables::Kinds;
use super::weights::LayerLoader;
use crate::backend::{Backend, Kind, NormWeights};
use crate::collective::device::Devices;
use crate::collective::solo::Solo;
use crate::load::checkpoint::Checkpoint;
use crate::load::loader::Loader;
use crate::load::shelf::Shelf;
use model::fault::{Fault, FaultKind};
use model::mesh::{Mesh, RankId};
use model::plan::Plan;
use model::spec::ModelSpec;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a draft model is loaded from.
pub struct Assignment<'a, M> {
    pub spec: &'a ModelSpec,
    pub checkpoint: &'a Checkpoint,
    /// Its own: matrices of two models never lie on one.
    pub shelf: &'a Shelf<M>,
}

pub struct Draft<B: Backend> {
    stage: Stage<B>,
    alone: Communicators,
    hidden: usize,
    vocab: usize,
    /// Positions that it takes.
    pub len_max: usize,
    progress: Arc<AtomicU64>,
}

impl<B: Backend> Draft<B> {
    /// For the model `of` under `plan`. `progress` moves at every layer.
    pub fn load(
        backend: &B,
        assignment: &Assignment<'_, B::Matrix>,
        (of, plan): (&ModelSpec, &Plan),
        progress: Arc<AtomicU64>,
    ) -> Result<Draft<B>, Fault> {
        let Assignment { spec, checkpoint, shelf } = *assignment;
        of.drafted_by(spec).map_err(|e| Fault::new(FaultKind::Incompatible, e.to_string()))?;
        let spec = &spec.predicting(0).expect("every model does without predictors");
        let (plan, rank) = (&plan.of_draft(spec), RankId(0));
        let loader = &Loader::new(checkpoint, spec, plan, rank, &|_, _| {}, shelf.kept())?;
        let kinds = Kinds::of(spec.layers.iter());
        let (mesh, hidden) = (Mesh::ONE, spec.hidden);
        let from = |layer| LayerLoader { backend, loader, shelf, layer, mesh, rank, hidden };
        let tick = || {
            progress.fetch_add(1, Ordering::Relaxed);
            true
        };
        let weights = Weights::load(from, spec, plan, mesh.place(rank), &kinds, tick)?;
        let stage = weights.expect("only a tick can break it off").ready(backend, &kinds, &plan.limits)?;
        let solo = || Box::new(Solo::default());
        let alone = Communicators { tensor: solo(), lane: solo(), pipe: solo(), devices: Devices::default() };
        Ok(Draft { stage, alone, hidden, vocab: spec.vocab, len_max: plan.limits.model_len_max, progress })
    }

    /// Takes the tokens `ids` in at the batch's rows: the rows that foretell the tokens after them, before the norm. Full, from the
    /// pool that [`Self::give`] takes it back to.
    pub fn run(&mut self, pass: &mut Pass<'_, B>, batch: &Batch, ids: &[u32]) -> Result<B::Buffer, Fault> {
        let meta = pass.backend.meta(batch)?;
        let mut own = Pass {
            backend: pass.backend,
            communicators: &mut self.alone,
            pool: pass.pool,
            meta: &meta,
            rows: ids.len(),
            hidden: self.hidden,
        };
        let mut x = own.take(self.hidden, Kind::Full)?;
        self.stage.embed(&mut own, ids, &mut x)?;
        self.stage.run(&mut own, &mut x, |_, _| {
            self.progress.fetch_add(1, Ordering::Relaxed);
        })?;
        Ok(x)
    }

    pub fn give(&self, pass: &mut Pass<'_, B>, rows: usize, x: B::Buffer) {
        pass.pool.give(self.hidden, Kind::Full, rows, x);
    }

    /// Does `what` with its own head, over `rows` rows: each rank has all logits and draws by itself.
    pub fn with_head<T>(
        &mut self,
        pass: &mut Pass<'_, B>,
        head: &mut Head<'_, B>,
        rows: usize,
        what: impl FnOnce(&mut Pass<'_, B>, &mut Head<'_, B>, &NormWeights<B::Vector>) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        let mut pass = Pass {
            backend: pass.backend,
            communicators: &mut self.alone,
            pool: pass.pool,
            meta: pass.meta,
            rows,
            hidden: self.hidden,
        };
        let mut head = Head {
            vocabulary: &self.stage.vocabulary,
            sequences: &mut *head.sequences,
            trace: head.trace.as_deref_mut(),
            vocab: self.vocab,
            hidden: self.hidden,
            leader: true,
            guessed: false,
        };
        let norm = head.norm();
        what(&mut pass, &mut head, norm)
    }
}
