//! The engine: one decoder loop over [`crate::backend::Backend`] for every model, on one rank of the mesh.
//!
//! ```text
//! first stage   embedding, summed over the vocabulary's shards
//! every stage   per layer: x += mixer(norm(x)); x += branches(norm(x))       ([`layer`] [`grouped`] [`latent`] [`mlp`] [`moe`])
//! between       f32 residual rows along the pipe
//! last stage    logits of the wanted rows, scores, samples                   ([`head`] [`score`] [`sample`])
//!               and, by predictors or a draft model, guesses of what follows  ([`foresight`] [`predict`] [`draft`])
//! ```
//! The residual rows are equal on all tensor ranks of a lane. All ranks of a communicator run the same collectives in
//! the same order: what a step does follows from the batch alone.

mod ahead;
pub mod batch;
pub mod comm;
pub mod draft;
mod exchange;
mod feed;
mod foresight;
mod grouped;
mod head;
mod latent;
mod layer;
pub mod math;
mod mlp;
mod moe;
pub mod pass;
mod predict;
pub mod random;
pub mod sample;
pub mod score;
pub mod shard;
mod stage;
pub mod state;
mod tables;
pub mod trace;
mod weights;

use crate::backend::cpu::simd::flush::Flush;
use crate::backend::{Backend, Kind};
use crate::load::checkpoint::Checkpoint;
use crate::load::loader::{Loader, Progress};
use crate::load::shelf::Shelf;
use batch::Resolved;
use comm::Communicators;
use draft::Draft;
use foresight::Source;
use head::Head;
use model::fault::{Fault, FaultKind};
use model::mesh::{Mesh, Place, RankId};
use model::plan::{Guesser, Plan};
use model::spec::ModelSpec;
use model::step::{LaneBatch, LaneResult, StepBatch};
use pass::{Pass, Pool};
use predict::Predictor;
use stage::{Stage, Weights};
use state::Sequences;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tables::Kinds;
use trace::Trace;
use weights::LayerLoader;

/// One rank: its weights, its cache, its sequences.
pub struct Engine<B: Backend> {
    backend: B,
    spec: Arc<ModelSpec>,
    mesh: Mesh,
    place: Place,
    stage: Stage<B>,
    /// On the last stage, where the plan has somebody who guesses.
    source: Source<B>,
    guesser: Guesser,
    sequences: Sequences,
    communicators: Communicators,
    pool: Pool<B>,
    progress: Arc<AtomicU64>,
    trace: Option<Trace>,
}

/// What an engine is made for.
pub struct Assignment<'a, M> {
    pub spec: Arc<ModelSpec>,
    pub plan: &'a Plan,
    pub rank: RankId,
    pub checkpoint: &'a Checkpoint,
    /// Where matrices are taken from, and left for the next epoch.
    pub shelf: &'a Shelf<M>,
    /// Where the plan has a draft model and the rank is of the last stage.
    pub draft: Option<draft::Assignment<'a, M>>,
    pub communicators: Communicators,
    /// Moves at every layer of every step: a watcher's proof of life.
    pub progress: Arc<AtomicU64>,
    /// Told of the bytes loaded.
    pub loading: Progress<'a>,
}

/// Puts the matrices that a rank of a plan to come needs, those of who guesses apart, on the shelf, as long as `tick`, called
/// after each layer, says yes.
pub fn prepare<B: Backend>(
    backend: &B,
    assignment: &Preparation<'_, B::Matrix>,
    tick: impl Fn() -> bool,
) -> Result<(), Fault> {
    let Preparation { spec, plan, rank, checkpoint, shelf } = *assignment;
    let loader = Loader::new(checkpoint, spec, plan, rank, &|_, _| {}, shelf.kept())?;
    let place = plan.mesh.place(rank);
    let kinds = Kinds::of(spec.layers[plan.stages[place.stage].clone()].iter());
    let (loader, hidden) = (&loader, spec.hidden);
    let from = |layer| LayerLoader { backend, loader, shelf, layer, mesh: plan.mesh, rank, hidden };
    Weights::load(from, spec, plan, place, &kinds, tick).map(|_| ())
}

/// What [`prepare`] needs to know.
pub struct Preparation<'a, M> {
    /// With the plan's predictors.
    pub spec: &'a ModelSpec,
    pub plan: &'a Plan,
    pub rank: RankId,
    pub checkpoint: &'a Checkpoint,
    pub shelf: &'a Shelf<M>,
}

impl<B: Backend> Engine<B> {
    /// Loads the rank's weights and reserves its cache.
    pub fn new(backend: B, assignment: Assignment<'_, B::Matrix>) -> Result<Engine<B>, Fault> {
        let Assignment { spec, plan, rank, checkpoint, shelf, draft, communicators, progress, loading } = assignment;
        let place = plan.mesh.place(rank);
        check_members(&communicators, &plan.mesh, place)?;
        let asked = spec.predicting(plan.guesser.predictors());
        let spec = Arc::new(asked.map_err(|e| Fault::new(FaultKind::Incompatible, e.to_string()))?);
        let loader = Loader::new(checkpoint, &spec, plan, rank, loading, shelf.kept())?;
        let range = plan.stages[place.stage].clone();
        let last = place.stage + 1 == plan.mesh.pipeline;
        let foreseen = if last { &spec.predictors[..] } else { &[] };
        let kinds = Kinds::of(spec.layers[range.clone()].iter().chain(foreseen.iter().map(|p| &p.layer)));
        let from = |layer| LayerLoader {
            backend: &backend,
            loader: &loader,
            shelf,
            layer,
            mesh: plan.mesh,
            rank,
            hidden: spec.hidden,
        };
        let tick = || {
            progress.fetch_add(1, Ordering::Relaxed);
            true
        };
        let weights = Weights::load(from, &spec, plan, place, &kinds, tick)?;
        let stage = weights.expect("only a tick can break it off").ready(&backend, &kinds, &plan.limits)?;
        let source = match plan.guesser {
            Guesser::Predictors(_) if last => {
                let mut predictors = Vec::with_capacity(foreseen.len());
                for (index, predictor) in foreseen.iter().enumerate() {
                    let from = from(spec.layers.len() + index);
                    predictors.push(Predictor::load(predictor, &from, &kinds, plan.limits.blocks)?);
                    progress.fetch_add(1, Ordering::Relaxed);
                }
                Source::Predictors(predictors)
            }
            Guesser::Draft if last => {
                let missing = || Fault::new(FaultKind::Internal, "the plan has a draft model, and none was opened");
                let assigned = draft.ok_or_else(missing)?;
                Source::Draft(Box::new(Draft::load(&backend, &assigned, (&spec, plan), progress.clone())?))
            }
            Guesser::Nobody | Guesser::Predictors(_) | Guesser::Draft => Source::Nobody,
        };
        Ok(Engine {
            sequences: Sequences::new(plan.limits, spec.embedding_rows).predicting(foreseen.len()),
            mesh: plan.mesh,
            backend,
            spec,
            place,
            stage,
            source,
            guesser: plan.guesser,
            communicators,
            pool: Pool::default(),
            progress,
            trace: None,
        })
    }

    /// What it runs on.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Starts to record, or hands over what was recorded; see [`Trace`].
    pub fn trace(&mut self, on: bool) -> Option<Trace> {
        std::mem::replace(&mut self.trace, on.then(Trace::default))
    }

    /// One forward pass; the answer on the lane's leader. After a fault the engine is done for: cache and peers are in
    /// no known state.
    pub fn step(&mut self, batch: &StepBatch) -> Result<Option<LaneResult>, Fault> {
        if batch.lanes.len() != self.mesh.data {
            let (lanes, data) = (batch.lanes.len(), self.mesh.data);
            return Err(Fault::new(FaultKind::Internal, format!("a step of {lanes} lanes for dp{data}")));
        }
        self.step_lane(&batch.lanes[self.place.lane])
    }

    /// The same, from this rank's lane alone.
    pub fn step_lane(&mut self, lane: &LaneBatch) -> Result<Option<LaneResult>, Fault> {
        // Sums over ranks are added on this thread; they must treat subnormals as the kernels do.
        let _flush = Flush::on();
        if lane.guesses > 0 && self.guesser == Guesser::Nobody {
            let text = format!("a step asks for {} guesses, and the plan has nobody who guesses", lane.guesses);
            return Err(Fault::new(FaultKind::Internal, text));
        }
        let lane = feed::fed(lane, &mut self.sequences, self.communicators.tensor.as_mut())?;
        let resolved = self.sequences.resolve(&lane, self.trace.is_some())?;
        let answer = self.forward(&resolved)?;
        // Only now are numbers that came from other devices known to be right.
        self.communicators.devices.settle()?;
        Ok(answer.filter(|_| self.place.slice == 0))
    }

    fn forward(&mut self, resolved: &Resolved) -> Result<Option<LaneResult>, Fault> {
        let (rows, hidden) = (resolved.rows(), self.spec.hidden);
        let (first, last) = (self.place.stage == 0, self.place.stage + 1 == self.mesh.pipeline);
        let meta = self.backend.meta(&resolved.batch)?;
        let mut pass = Pass {
            backend: &mut self.backend,
            communicators: &mut self.communicators,
            pool: &mut self.pool,
            meta: &meta,
            rows,
            hidden,
        };
        let mut x = pass.take(hidden, Kind::Full)?;
        if rows > 0 && first {
            self.stage.embed(&mut pass, &resolved.ids, &mut x)?;
        } else if rows > 0 {
            comm::receive(&mut pass, self.place.stage - 1, &mut x)?;
        }
        self.stage.run(&mut pass, &mut x, |layer, routings| {
            if let Some(trace) = &mut self.trace {
                trace.routings.extend(routings.into_iter().map(|routing| (layer, routing)));
            }
            self.progress.fetch_add(1, Ordering::Relaxed);
        })?;
        if !last {
            if rows > 0 {
                comm::send(&mut pass, self.place.stage + 1, &mut x)?;
            }
            pass.give(hidden, Kind::Full, x);
            return Ok(None);
        }
        let mut head = Head {
            vocabulary: &self.stage.vocabulary,
            sequences: &mut self.sequences,
            trace: self.trace.as_mut(),
            vocab: self.spec.vocab,
            hidden,
            leader: self.place.slice == 0,
            guessed: self.guesser != Guesser::Nobody,
        };
        let (mut answer, behind) = head.run(&mut pass, resolved, &x)?;
        let shared = (&self.stage.vocabulary, &self.stage.tables);
        answer.guesses = foresight::run(&mut self.source, shared, &mut pass, &mut head, (resolved, &behind), x)?;
        Ok(Some(answer))
    }
}

/// The communicators are those of the rank's place.
fn check_members(communicators: &Communicators, mesh: &Mesh, place: Place) -> Result<(), Fault> {
    let Communicators { tensor, lane, pipe, devices: _ } = communicators;
    let axes = [
        ("tensor", tensor, place.slice, mesh.tensor),
        ("lane", lane, place.lane, mesh.data),
        ("pipe", pipe, place.stage, mesh.pipeline),
    ];
    for (name, members, rank, size) in axes {
        if (members.rank(), members.size()) != (rank, size) {
            let (r, s) = (members.rank(), members.size());
            let text = format!("the {name} communicator is member {r} of {s}, the mesh says {rank} of {size}");
            return Err(Fault::new(FaultKind::Internal, text));
        }
    }
    Ok(())
}
