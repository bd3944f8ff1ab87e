//! What a coordinator decided for one epoch: data only. The planner makes it, the store keeps it, workers obey it.

use crate::mesh::{Mesh, RankId};
use crate::quant::Dtype;
use crate::spec::ModelSpec;

/// Grows with every plan; a worker acts on the highest it has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Epoch(pub u64);

/// One agent process, by the id it was given when it joined.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(pub String);

/// Positions in one block of cache, and in one span of attention: a span is walked with its own maximum, so the
/// number is part of the answer and the same everywhere.
pub const BLOCK_TOKENS: usize = 32;

/// A group's cut and limits.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    pub epoch: Epoch,
    pub mesh: Mesh,
    pub dtype: Dtype,
    pub family: KernelFamily,
    /// Layers of each pipeline stage, in order; they tile the model.
    pub stages: Vec<std::ops::Range<usize>>,
    /// Which worker holds which ranks; together they hold each rank once.
    pub members: Vec<Member>,
    pub limits: Limits,
    pub guesser: Guesser,
}

/// Who guesses what sequences go on with (see [`crate::step::Guesses`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Guesser {
    #[default]
    Nobody,
    /// So many of the model's own predictors (see [`crate::spec::Predictor`]), 1 or more.
    Predictors(usize),
    /// A smaller model of the same vocabulary, whole on every rank of the last stage.
    Draft,
}

impl Guesser {
    pub fn of_predictors(number: usize) -> Guesser {
        if number == 0 { Guesser::Nobody } else { Guesser::Predictors(number) }
    }

    /// How many of the model's predictors are loaded.
    pub fn predictors(self) -> usize {
        match self {
            Guesser::Predictors(number) => number,
            Guesser::Nobody | Guesser::Draft => 0,
        }
    }
}

impl Plan {
    /// The plan of the draft model `spec` on one rank of this plan: all of it, for sequences as long as it takes.
    pub fn of_draft(&self, spec: &ModelSpec) -> Plan {
        let whole = 0..spec.layers.len();
        Plan {
            mesh: Mesh::ONE,
            stages: vec![whole],
            members: Vec::new(),
            limits: self.limits.of_draft(spec),
            guesser: Guesser::Nobody,
            ..self.clone()
        }
    }
}

impl Limits {
    /// A draft model's under these: guesses end where its positions do.
    pub fn of_draft(self, spec: &ModelSpec) -> Limits {
        Limits { model_len_max: self.model_len_max.min(spec.positions_max), ..self }
    }
}

/// A worker's share of a plan.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    pub worker: WorkerId,
    /// Tells which members can share memory.
    pub host: String,
    /// Where its ranks listen for peers' data (`ip:port`).
    pub data_address: String,
    pub ranks: Vec<RankId>,
    /// Threads of each CPU rank.
    pub threads: usize,
}

/// Bounds that every rank sizes its buffers by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Longest sequence, prompt and answer together.
    pub model_len_max: usize,
    /// Tokens in one lane's part of a step.
    pub step_tokens_max: usize,
    /// Sequences in one lane's part of a step.
    pub step_sequences_max: usize,
    /// Cache blocks of [`BLOCK_TOKENS`] positions in each lane's pool.
    pub blocks: usize,
}

/// A set of kernels that accumulate in the same order, and so give the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KernelFamily {
    /// One fused-multiply-add chain over K per output, odd element of each pair first (as `VDPBF16PS` does). Run by
    /// AVX-512 BF16, AVX-512, AVX2 and portable code alike.
    Vector,
    /// Intel AMX's order: 32 K at a time, even and odd chains from zero, their sum added to the accumulator.
    Amx,
    /// Tensor cores of GPUs since sm_80, for bf16; all else is as in `Vector`. In each segment four chains of steps of 16 inputs, joined by
    /// the tree; how a core adds 16 products is its own affair, so the bits are those of one kind of GPU.
    Tensor,
}
