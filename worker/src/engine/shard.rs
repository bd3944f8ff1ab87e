//! The door between async code and a rank's own thread: whoever drives a rank knows neither backend nor model.

use super::comm::Communicators;
use super::{Assignment, Engine};
use crate::backend::Backend;
use crate::backend::cpu::{CpuBackend, CpuConfig};
use crate::load::checkpoint::Checkpoint;
use crate::load::loader::Progress;
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

/// What a rank is loaded from.
pub struct ShardConfig<'a> {
    pub spec: Arc<ModelSpec>,
    pub plan: &'a Plan,
    pub rank: RankId,
    pub checkpoint: &'a Checkpoint,
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
    let ShardConfig { spec, plan, rank, checkpoint, communicators, threads, spin, progress, loading } = config;
    let backend = CpuBackend::new(CpuConfig { dtype: plan.dtype, family: plan.family, threads, spin })?;
    Engine::new(backend, Assignment { spec, plan, rank, checkpoint, communicators, progress, loading })
}
