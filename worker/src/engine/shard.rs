//! The door between async code and a rank's own thread: whoever drives a rank knows neither backend nor model.

use super::comm::Communicators;
use super::{Assignment, Engine, Preparation};
use crate::backend::Backend;
use crate::backend::cpu::{CpuBackend, CpuConfig};
use crate::load::checkpoint::Checkpoint;
use crate::load::loader::Progress;
use crate::load::shelf::{self, Setting, Shelf};
use model::fault::Fault;
use model::mesh::RankId;
use model::plan::{Limits, Plan};
use model::spec::ModelSpec;
use model::step::{LaneResult, StepBatch};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// A loaded rank.
pub trait Shard: Send {
    /// The bounds it was loaded for.
    fn capacity(&self) -> Limits;

    /// One forward pass; the answer on its lane's leader. After a fault the shard must be dropped.
    fn step(&mut self, batch: &StepBatch) -> Result<Option<LaneResult>, Fault>;
}

impl<B: Backend> Shard for Engine<B>
where
    Engine<B>: Send,
{
    fn capacity(&self) -> Limits {
        self.sequences.limits()
    }

    fn step(&mut self, batch: &StepBatch) -> Result<Option<LaneResult>, Fault> {
        Engine::step(self, batch)
    }
}

/// The matrices that a worker keeps from epoch to epoch, by backend.
#[derive(Default)]
pub struct Shelves {
    cpu: Shelf<<CpuBackend as Backend>::Matrix>,
}

impl Shelves {
    /// Drops what `ranks` of `plan` do not need of the model with this identity. `spec` has the plan's predictors.
    pub fn keep(&self, identity: &[u8], spec: &ModelSpec, plan: &Plan, ranks: &[RankId]) {
        self.cpu.keep(&setting(identity, plan), &shelf::needed(spec, plan, ranks));
    }

    /// What `ranks` of `plan`, all loaded, prove of their weights (see [`model::proof`]).
    pub fn proof(&self, spec: &ModelSpec, plan: &Plan, ranks: &[RankId]) -> Result<Vec<u8>, Fault> {
        self.cpu.proofs().of(spec, plan, ranks)
    }

    /// Bytes that are still to be loaded for `ranks` of `plan`, at most: all of them counted as plain numbers.
    pub fn lacking(&self, identity: &[u8], spec: &ModelSpec, plan: &Plan, ranks: &[RankId]) -> u64 {
        let mut needed = shelf::needed(spec, plan, ranks);
        if self.cpu.generation(&setting(identity, plan)).is_some() {
            let held = self.cpu.pieces();
            needed.retain(|piece| !held.contains(piece));
        }
        needed.iter().map(|piece| (piece.values() * plan.dtype.bytes()) as u64).sum()
    }

    /// Loads the matrices of one rank of a plan to come beside those in use, until [`Self::keep`] is called. Does nothing
    /// where another model, or other kernels, are in use.
    pub fn prepare(
        &self,
        (spec, checkpoint): (&ModelSpec, &Checkpoint),
        plan: &Plan,
        rank: RankId,
        threads: usize,
    ) -> Result<(), Fault> {
        let setting = setting(&checkpoint.identity(), plan);
        let Some(generation) = self.cpu.generation(&setting) else { return Ok(()) };
        let backend = CpuBackend::new(CpuConfig { dtype: plan.dtype, family: plan.family, threads, spin: 0 })?;
        let preparation = Preparation { spec, plan, rank, checkpoint, shelf: &self.cpu };
        super::prepare(&backend, &preparation, || self.cpu.generation(&setting) == Some(generation))
    }
}

fn setting(identity: &[u8], plan: &Plan) -> Setting {
    Setting { identity: identity.to_vec(), dtype: plan.dtype, family: plan.family }
}

/// What a rank is loaded from.
pub struct ShardConfig<'a> {
    pub spec: Arc<ModelSpec>,
    pub plan: &'a Plan,
    pub rank: RankId,
    pub checkpoint: &'a Checkpoint,
    pub shelves: &'a Shelves,
    pub communicators: Communicators,
    /// Threads of a CPU rank.
    pub threads: usize,
    /// How long they wait awake, see [`CpuConfig::spin`].
    pub spin: u32,
    /// See [`Assignment::progress`].
    pub progress: Arc<AtomicU64>,
    /// See [`Assignment::loading`].
    pub loading: Progress<'a>,
}

/// Loads a rank on the backend that this machine and the plan's kernel family ask for.
pub fn load_shard(config: ShardConfig<'_>) -> Result<Box<dyn Shard>, Fault> {
    Ok(Box::new(load_cpu(config)?))
}

/// Loads a rank on the CPU.
pub fn load_cpu(config: ShardConfig<'_>) -> Result<Engine<CpuBackend>, Fault> {
    let ShardConfig { spec, plan, rank, checkpoint, shelves, communicators, threads, spin, progress, loading } = config;
    let shelf = &shelves.cpu;
    let backend = CpuBackend::new(CpuConfig { dtype: plan.dtype, family: plan.family, threads, spin })?;
    Engine::new(backend, Assignment { spec, plan, rank, checkpoint, shelf, communicators, progress, loading })
}
