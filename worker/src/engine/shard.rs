//! The door between async code and a rank's own thread: whoever drives a rank knows neither backend nor model.

use super::comm::Communicators;
use super::{Assignment, Engine, Preparation, draft};
use crate::backend::Backend;
use crate::backend::cpu::{CpuBackend, CpuConfig};
use crate::backend::cuda::{CudaBackend, CudaConfig, Device};
use crate::hardware::Hardware;
use crate::load::checkpoint::Checkpoint;
use crate::load::loader::Progress;
use crate::load::shelf::{self, Setting, Shelf};
use model::fault::{Fault, FaultKind};
use model::mesh::RankId;
use model::plan::{Limits, Plan};
use model::spec::ModelSpec;
use model::step::{LaneResult, StepBatch};
use std::collections::BTreeSet;
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

/// The matrices that a worker keeps from epoch to epoch, in the memory of what it computes on.
pub struct Shelves(Place);

enum Place {
    Cpu(Pair<<CpuBackend as Backend>::Matrix>),
    Gpu(Arc<Device>, Pair<<CudaBackend as Backend>::Matrix>),
}

/// A shelf holds one model's.
struct Pair<M> {
    model: Shelf<M>,
    draft: Shelf<M>,
}

impl<M> Default for Pair<M> {
    fn default() -> Pair<M> {
        Pair { model: Shelf::default(), draft: Shelf::default() }
    }
}

impl Default for Shelves {
    fn default() -> Shelves {
        Shelves::on(Hardware::Cpu)
    }
}

/// Runs `$body` with `$shelf` bound to one of whichever pair there is.
macro_rules! with_shelf {
    ($shelves:expr, $which:ident as $shelf:ident => $body:expr) => {
        match &$shelves.0 {
            Place::Cpu(Pair { $which: $shelf, .. }) => $body,
            Place::Gpu(_, Pair { $which: $shelf, .. }) => $body,
        }
    };
}

impl Shelves {
    pub fn on(hardware: Hardware) -> Shelves {
        Shelves(match hardware {
            Hardware::Cpu => Place::Cpu(Pair::default()),
            Hardware::Gpu(device) => Place::Gpu(device, Pair::default()),
        })
    }

    /// What the matrices are on, where that is no CPU.
    pub fn device(&self) -> Option<&Arc<Device>> {
        match &self.0 {
            Place::Cpu(_) => None,
            Place::Gpu(device, _) => Some(device),
        }
    }

    /// Drops what `ranks` of `plan` do not need of the model with this identity. `spec` has the plan's predictors.
    pub fn keep(&self, identity: &[u8], spec: &ModelSpec, plan: &Plan, ranks: &[RankId]) {
        with_shelf!(self, model as shelf => shelf.keep(&setting(identity, plan), &shelf::needed(spec, plan, ranks)));
    }

    /// Drops what `plan` does not need of a draft model: all, where `draft` is none.
    pub fn keep_draft(&self, plan: &Plan, draft: Option<DraftOf<'_>>) {
        let (identity, needed) = match draft {
            Some(DraftOf { spec, checkpoint }) => {
                let needed = shelf::needed(spec, &plan.of_draft(spec), &[RankId(0)]);
                (checkpoint.identity(), needed)
            }
            None => (Vec::new(), BTreeSet::new()),
        };
        with_shelf!(self, draft as shelf => shelf.keep(&setting(&identity, plan), &needed));
    }

    /// What `ranks` of `plan`, all loaded, prove of their weights (see [`model::proof`]).
    pub fn proof(&self, spec: &ModelSpec, plan: &Plan, ranks: &[RankId]) -> Result<Vec<u8>, Fault> {
        with_shelf!(self, model as shelf => shelf.proofs().of(spec, plan, ranks))
    }

    /// Bytes that are still to be loaded for `ranks` of `plan`, at most: all of them counted as plain numbers.
    pub fn lacking(&self, identity: &[u8], spec: &ModelSpec, plan: &Plan, ranks: &[RankId]) -> u64 {
        let mut needed = shelf::needed(spec, plan, ranks);
        let setting = setting(identity, plan);
        let held = with_shelf!(self, model as shelf => shelf.generation(&setting).map(|_| shelf.pieces()));
        if let Some(held) = held {
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
        match &self.0 {
            Place::Cpu(Pair { model: shelf, .. }) => {
                let config = CpuConfig { dtype: plan.dtype, family: plan.family, threads, spin: 0 };
                prepare(|| CpuBackend::new(config), &Preparation { spec, plan, rank, checkpoint, shelf }, &setting)
            }
            Place::Gpu(device, Pair { model: shelf, .. }) => {
                let config = CudaConfig { dtype: plan.dtype, family: plan.family, threads };
                let backend = || CudaBackend::new(device.clone(), &config);
                prepare(backend, &Preparation { spec, plan, rank, checkpoint, shelf }, &setting)
            }
        }
    }
}

fn prepare<B: Backend>(
    backend: impl FnOnce() -> Result<B, Fault>,
    preparation: &Preparation<'_, B::Matrix>,
    setting: &Setting,
) -> Result<(), Fault> {
    let Some(generation) = preparation.shelf.generation(setting) else { return Ok(()) };
    super::prepare(&backend()?, preparation, || preparation.shelf.generation(setting) == Some(generation))
}

fn setting(identity: &[u8], plan: &Plan) -> Setting {
    Setting { identity: identity.to_vec(), dtype: plan.dtype, family: plan.family }
}

/// A draft model that is open, without predictors of its own.
#[derive(Clone, Copy)]
pub struct DraftOf<'a> {
    pub spec: &'a ModelSpec,
    pub checkpoint: &'a Checkpoint,
}

/// What a rank is loaded from.
pub struct ShardConfig<'a> {
    pub spec: Arc<ModelSpec>,
    pub plan: &'a Plan,
    pub rank: RankId,
    pub checkpoint: &'a Checkpoint,
    /// See [`Assignment::draft`].
    pub draft: Option<DraftOf<'a>>,
    pub shelves: &'a Shelves,
    pub communicators: Communicators,
    /// Threads of a CPU rank, or of the host that pack a GPU's weights.
    pub threads: usize,
    /// How long they wait awake, see [`CpuConfig::spin`].
    pub spin: u32,
    /// See [`Assignment::progress`].
    pub progress: Arc<AtomicU64>,
    /// See [`Assignment::loading`].
    pub loading: Progress<'a>,
}

/// Loads a rank on what the shelves are of.
pub fn load_shard(config: ShardConfig<'_>) -> Result<Box<dyn Shard>, Fault> {
    let Place::Gpu(device, pair) = &config.shelves.0 else { return Ok(Box::new(load_cpu(config)?)) };
    let ShardConfig { spec, plan, rank, checkpoint, draft, communicators, threads, progress, loading, .. } = config;
    let backend = CudaBackend::new(device.clone(), &CudaConfig { dtype: plan.dtype, family: plan.family, threads })?;
    let (shelf, draft) = (&pair.model, draft.map(|of| assigned(of, &pair.draft)));
    let assignment = Assignment { spec, plan, rank, checkpoint, shelf, draft, communicators, progress, loading };
    Ok(Box::new(Engine::new(backend, assignment)?))
}

/// Loads a rank on the CPU.
pub fn load_cpu(config: ShardConfig<'_>) -> Result<Engine<CpuBackend>, Fault> {
    let ShardConfig { spec, plan, rank, checkpoint, draft, shelves, communicators, progress, loading, .. } = config;
    let (threads, spin) = (config.threads, config.spin);
    let Place::Cpu(pair) = &shelves.0 else {
        return Err(Fault::new(FaultKind::Internal, "the CPU is asked for matrices of a GPU"));
    };
    let backend = CpuBackend::new(CpuConfig { dtype: plan.dtype, family: plan.family, threads, spin })?;
    let (shelf, draft) = (&pair.model, draft.map(|of| assigned(of, &pair.draft)));
    Engine::new(backend, Assignment { spec, plan, rank, checkpoint, shelf, draft, communicators, progress, loading })
}

fn assigned<'a, M>(of: DraftOf<'a>, shelf: &'a Shelf<M>) -> draft::Assignment<'a, M> {
    draft::Assignment { spec: of.spec, checkpoint: of.checkpoint, shelf }
}
