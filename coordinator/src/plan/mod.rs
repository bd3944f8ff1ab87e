//! Decides how a model is cut over the devices that workers offer. Pure: the same offers, in any order, give the same
//! plan.
//!
//! ```text
//! offers -> meshes, best first ([`mesh`]) -> ranks on devices ([`place`]) -> stages, bytes, blocks ([`fit`])
//!        -> of those that fit alike the one that keeps least twice ([`copies`]) -> Plan
//! ```
//!
//! [`check`] asserts what every plan keeps; [`explain`] tells people what one means; [`devices`] reads sizes and device
//! lists as people write them.

pub mod check;
pub mod copies;
pub mod devices;
pub mod explain;
mod fit;
mod mesh;
mod place;
mod served;
mod smallest;

pub use devices::{format_bytes, parse_bytes, parse_devices};
pub use served::Served;
pub use smallest::smallest;

use copies::Copies;
use model::mesh::Mesh;
use model::plan::{Epoch, Guesser, KernelFamily, Plan, WorkerId};
use model::quant::Dtype;
use model::size::{Keeping, RankBytes};
use model::storage::Storage;
use model::{ModelSpec, RankId, SpecError};
use place::{Seated, Seats};
use std::collections::BTreeSet;
use std::sync::Arc;

/// One device that a worker offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// What a rank may use for weights, cache and workspace.
    pub memory_bytes: u64,
    /// CPU threads; 1 for a GPU.
    pub threads: usize,
}

/// What a worker that joined can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    pub worker: WorkerId,
    /// Workers of one host have near neighbours: tensor groups stay within it.
    pub host: String,
    pub data_address: String,
    pub devices: Vec<Device>,
    pub families: Vec<KernelFamily>,
}

/// What the operator asked for; `None` leaves it to the planner.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    pub tensor: Option<usize>,
    pub data: Option<usize>,
    pub pipeline: Option<usize>,
    pub expert: Option<usize>,
    /// By default the checkpoint's: bf16 unless it is f32.
    pub dtype: Option<Dtype>,
    /// Longest sequence; by default the model's own, as far as the cache holds one.
    pub model_len_max: Option<usize>,
    /// Cache of each rank; by default what memory leaves, up to `step_sequences_max` of the longest sequences.
    pub cache_bytes: Option<u64>,
    /// Where `cache_bytes` is not given: no more than this, or than one of the longest sequences needs. For hosts whose
    /// memory others want too.
    pub cache_bytes_modest: Option<u64>,
    pub step_tokens_max: usize,
    pub step_sequences_max: usize,
    /// Load so many of the model's predictors; none beside a draft model.
    pub predictors: usize,
    /// Load this draft model.
    pub draft: Option<Arc<DraftModel>>,
}

/// A draft model as planners see it.
#[derive(Debug, Clone, PartialEq)]
pub struct DraftModel {
    pub spec: ModelSpec,
    pub storage: Storage,
}

impl Policy {
    fn guesser(&self) -> Guesser {
        match self.draft {
            Some(_) => Guesser::Draft,
            None => Guesser::of_predictors(self.predictors),
        }
    }
}

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            tensor: None,
            data: None,
            pipeline: None,
            expert: None,
            dtype: None,
            model_len_max: None,
            cache_bytes: None,
            cache_bytes_modest: None,
            step_tokens_max: 512,
            step_sequences_max: 128,
            predictors: 0,
            draft: None,
        }
    }
}

/// A plan and what each rank needs under it.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    pub plan: Plan,
    /// By rank.
    pub bytes: Vec<RankBytes>,
}

/// Why there is no plan. Each says what would have to change.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PlanError {
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error("no worker offers a device")]
    NoDevices,
    #[error("{mesh} needs {needs} devices, {has} are offered")]
    TooFew { mesh: Mesh, needs: usize, has: usize },
    #[error("no kernel family runs on all workers: {0}")]
    Family(String),
    #[error("{what} = {value}: {why}")]
    Policy { what: &'static str, value: String, why: String },
    #[error(
        "rank {} of {mesh} needs {}, has {}: {} missing (weights {}, workspace {}, cache for one sequence of {tokens} \
         tokens {})",
        rank.0, format_bytes(bytes.fixed() + cache), format_bytes(*has),
        format_bytes((bytes.fixed() + cache).saturating_sub(*has)),
        format_bytes(bytes.weights), format_bytes(bytes.workspace + bytes.rope), format_bytes(*cache)
    )]
    Memory { mesh: Mesh, rank: RankId, bytes: RankBytes, cache: u64, tokens: usize, has: u64 },
    #[error(
        "{} of cache a rank hold {holds} tokens, a sequence of {tokens} needs {}",
        format_bytes(*given), format_bytes(*needs)
    )]
    Cache { given: u64, holds: usize, tokens: usize, needs: u64 },
}

impl PlanError {
    /// How far a rank is from fitting; `None` where memory is not what is missing.
    fn missing(&self) -> Option<u64> {
        match self {
            PlanError::Memory { bytes, cache, has, .. } => Some((bytes.fixed() + cache).saturating_sub(*has)),
            _ => None,
        }
    }
}

/// Plans `spec`, whose matrices are stored as `storage` says, on what `members` offer. `previous` keeps ranks where they
/// were, so that what is loaded stays loaded. The plan's epoch is the one after `previous`.
pub fn plan(
    spec: &ModelSpec,
    storage: &Storage,
    members: &[Offer],
    policy: &Policy,
    previous: Option<&Plan>,
) -> Result<Planned, PlanError> {
    check_policy(spec, policy)?;
    let spec = &spec.predicting(policy.guesser().predictors())?;
    if let Some(draft) = &policy.draft {
        spec.drafted_by(&draft.spec)?;
    }
    let family = family(members, previous)?;
    let seats = Seats::new(members);
    if seats.len() == 0 {
        return Err(PlanError::NoDevices);
    }
    let dtype = policy.dtype.unwrap_or_else(|| auto_dtype(storage));
    let keeping = Keeping { storage, dtype, family };
    let served = Served { spec, keeping, draft: policy.draft.as_deref() };
    let meshes = mesh::candidates(spec, &seats, policy)?;
    let mut nearest: Option<PlanError> = None;
    // A mesh that serves the model's whole length goes before one that must shorten it, unless a flag decides.
    let free = policy.model_len_max.is_none() && policy.cache_bytes.is_none();
    for whole in [true, false].into_iter().filter(|whole| free || !whole) {
        let ask = fit::Ask { served, policy, whole };
        let try_one = |mesh: &Mesh| {
            let seated = seats.seat(mesh, previous)?;
            Some(fit::fit(&ask, mesh, &seated.memory, previous).map(|fit| Chosen { mesh: *mesh, seated, fit }))
        };
        for candidate in &meshes {
            match try_one(&candidate.mesh) {
                None => {}
                Some(Ok(first)) => {
                    let rivals = meshes.iter().filter(|other| candidate.rivals(other));
                    let fitting = rivals.filter_map(|rival| try_one(&rival.mesh)?.ok());
                    let cost = |c: &Chosen| Copies::of(served, &c.mesh, &c.fit.bytes, c.fit.limits.blocks).total();
                    // The first of equals.
                    let chosen = std::iter::once(first).chain(fitting).min_by_key(cost).expect("one fits");
                    return Ok(finish(&ask, &seats, chosen, previous));
                }
                Some(Err(error)) if !whole && nearest.as_ref().is_none_or(|best| nearer(&error, best)) => {
                    nearest = Some(error);
                }
                Some(Err(_)) => {}
            }
        }
    }
    let flags = [policy.pipeline, policy.data, policy.tensor].map(|flag| flag.unwrap_or(1));
    Err(nearest.unwrap_or_else(|| {
        let mesh = Mesh { pipeline: flags[0], data: flags[1], tensor: flags[2], expert: policy.expert.unwrap_or(1) };
        PlanError::TooFew { mesh, needs: mesh.ranks(), has: seats.len() }
    }))
}

/// A mesh that fits.
struct Chosen {
    mesh: Mesh,
    seated: Seated,
    fit: fit::Fit,
}

fn finish(ask: &fit::Ask<'_>, seats: &Seats<'_>, chosen: Chosen, previous: Option<&Plan>) -> Planned {
    let Chosen { mesh, seated, fit } = chosen;
    let (keeping, guesser) = (ask.served.keeping, ask.policy.guesser());
    let epoch = Epoch(previous.map_or(0, |p| p.epoch.0) + 1);
    let (stages, limits, members) = (fit.stages, fit.limits, seats.members(&seated));
    let plan = Plan { epoch, mesh, dtype: keeping.dtype, family: keeping.family, stages, members, limits, guesser };
    if let Err(broken) = check::check(ask.served.spec, &plan) {
        unreachable!("the planner broke its own rule: {broken}");
    }
    Planned { plan, bytes: fit.bytes }
}

/// Whether `error` came closer to a plan than `best`.
fn nearer(error: &PlanError, best: &PlanError) -> bool {
    match (error.missing(), best.missing()) {
        (Some(a), Some(b)) => a < b,
        (Some(_), None) => true,
        (None, _) => false,
    }
}

/// bf16 unless all is stored in f32.
fn auto_dtype(storage: &Storage) -> Dtype {
    if storage.is_f32() { Dtype::F32 } else { Dtype::Bf16 }
}

fn check_policy(spec: &ModelSpec, policy: &Policy) -> Result<(), PlanError> {
    let bad = |what, value: usize, why: String| Err(PlanError::Policy { what, value: value.to_string(), why });
    let axes = [
        ("tensor parallel size", policy.tensor),
        ("data parallel size", policy.data),
        ("pipeline parallel size", policy.pipeline),
        ("expert parallel size", policy.expert),
    ];
    for (what, value) in axes {
        if let Some(value) = value.filter(|v| !(1..=RANKS_MAX).contains(v)) {
            return bad(what, value, format!("must be from 1 to {RANKS_MAX}"));
        }
    }
    if let Some(tokens) = policy.model_len_max.filter(|n| !(1..=spec.positions_max).contains(n)) {
        return bad("longest sequence", tokens, format!("must be from 1 to the model's {}", spec.positions_max));
    }
    if !(1..=STEP_TOKENS_MAX).contains(&policy.step_tokens_max) {
        return bad("tokens a step", policy.step_tokens_max, format!("must be from 1 to {STEP_TOKENS_MAX}"));
    }
    if !(1..=policy.step_tokens_max).contains(&policy.step_sequences_max) {
        let why = format!("must be from 1 to the {} tokens of a step", policy.step_tokens_max);
        return bad("sequences a step", policy.step_sequences_max, why);
    }
    Ok(())
}

/// Most ranks of one group.
const RANKS_MAX: usize = 4096;
/// Most tokens of one lane's part of a step.
const STEP_TOKENS_MAX: usize = 1 << 20;

/// The family that all workers run: the one already served with, as another would change answers, else the fastest.
fn family(members: &[Offer], previous: Option<&Plan>) -> Result<KernelFamily, PlanError> {
    let fastest = [KernelFamily::Tensor, KernelFamily::Amx, KernelFamily::Vector];
    let preferred = previous.map(|p| p.family).into_iter().chain(fastest);
    let common = |family: &KernelFamily| members.iter().all(|m| m.families.contains(family));
    preferred.into_iter().find(common).ok_or_else(|| {
        let lists = members.iter().map(|m| format!("{} has {:?}", m.worker.0, m.families));
        let distinct: BTreeSet<String> = lists.collect();
        PlanError::Family(distinct.into_iter().collect::<Vec<_>>().join(", "))
    })
}

#[cfg(test)]
mod tests;
