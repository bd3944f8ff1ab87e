//! What the outside may know of the cluster: written by the cluster's shell, read by health checks, `/status` and the
//! page. Data only.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::schedule::load::Load;

/// Where a group is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Waiting for enough workers.
    #[default]
    Gathering,
    Planning,
    Loading,
    Serving,
    /// A rank died; what was accepted waits for the next plan.
    Recovering,
    /// Finishes what was accepted, takes nothing more.
    Draining,
}

impl Phase {
    pub fn name(self) -> &'static str {
        match self {
            Phase::Gathering => "gathering",
            Phase::Planning => "planning",
            Phase::Loading => "loading",
            Phase::Serving => "serving",
            Phase::Recovering => "recovering",
            Phase::Draining => "draining",
        }
    }
}

/// The cluster as of the last change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
pub struct ClusterView {
    pub phase: Phase,
    /// 0 before the first plan.
    pub epoch: u64,
    /// As `Mesh` prints; empty before the first plan.
    pub mesh: String,
    /// The plan as a table for people; empty before the first plan.
    pub plan: String,
    pub members: Vec<MemberView>,
    /// Why the phase is not `Serving`, each a sentence.
    pub reasons: Vec<String>,
    pub load: LoadView,
    /// Plans and loads that failed since it last served: where it never did, waiting longer may be in vain.
    pub failures: u32,
    /// Longest sequence under the plan, 0 where only the model's own bound is known.
    pub model_len_max: usize,
    /// One digest for all weights that workers have proven to hold; empty before the first epoch serves.
    #[serde(default)]
    pub weights: String,
    /// What the plan computes in, and the kernels that it names; empty without a plan.
    #[serde(default)]
    pub dtype: String,
    #[serde(default)]
    pub kernel_family: String,
    /// Each group, where there are several; the rest is then of all of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<GroupView>,
    /// Where the leader's node plane is, of several coordinators; empty for one alone.
    #[serde(default)]
    pub leader: String,
    /// This coordinator forwards to that one.
    #[serde(default)]
    pub stands_by: bool,
    /// When a step, or an idle heartbeat, last completed under the current epoch; none leaves it to the phase alone.
    #[serde(skip)]
    pub progress: Option<Instant>,
}

/// One of several groups.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupView {
    pub phase: Phase,
    pub epoch: u64,
    pub mesh: String,
    /// Names of its workers.
    pub members: Vec<String>,
    pub reasons: Vec<String>,
    pub load: LoadView,
}

/// A worker, as people want to see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct MemberView {
    pub id: String,
    pub host: String,
    pub ranks: Vec<u32>,
    /// Bytes of its devices, and of them in use.
    pub memory_bytes: u64,
    pub used_bytes: u64,
    /// Layers that its ranks have run.
    pub progress: u64,
    /// Steps that its ranks were given and have not finished, each rank's counted.
    pub steps_pending: u32,
    /// As the worker says: joining, idle, loading, ready, stepping.
    pub phase: String,
}

/// What the scheduler has to do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
pub struct LoadView {
    pub running: usize,
    pub waiting: usize,
    /// Of the cache's blocks, 0 to 1.
    pub cache_used: f64,
}

impl From<&Load> for LoadView {
    fn from(load: &Load) -> LoadView {
        let cache_used = load.blocks_used as f64 / load.blocks_total.max(1) as f64;
        LoadView { running: load.running, waiting: load.waiting, cache_used }
    }
}
