//! The words of the cluster's core: what happens to it and what it decides.

use super::pace::Toll;
use crate::plan::Offer;
use model::fault::Fault;
use model::mesh::RankId;
use model::plan::{Epoch, Plan, WorkerId};
use std::sync::Arc;
use std::time::Duration;

/// What the shell reports.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A worker was let in (token, wire version and build were checked at the door).
    Joined {
        offer: Offer,
    },
    /// A worker that is about to join takes no epoch at or below this one.
    Seen {
        epoch: Epoch,
    },
    /// Its stream ended.
    Lost {
        worker: WorkerId,
        why: String,
    },
    Beat {
        worker: WorkerId,
        beat: Beat,
    },
    Loading {
        worker: WorkerId,
        epoch: Epoch,
        bytes_done: u64,
        bytes_total: u64,
    },
    LoadFailed {
        worker: WorkerId,
        epoch: Epoch,
        fault: Fault,
    },
    /// Loaded, identity proven, step stream open.
    Ready {
        worker: WorkerId,
        epoch: Epoch,
    },
    /// It shall end, by its own wish or somebody's: it serves on until others can do without it.
    Drain {
        worker: WorkerId,
    },
    /// It holds what the plan to come needs of it, as far as there was room.
    Prepared {
        worker: WorkerId,
        epoch: Epoch,
    },
    /// The store took the plan, or somebody else's was there first.
    Committed {
        epoch: Epoch,
    },
    CommitFailed {
        found: Epoch,
        why: String,
    },
    /// The store answers, and knows this epoch: at the start, after an outage, or since somebody else planned.
    StoreRead {
        epoch: Epoch,
    },
    /// The store does not answer: no plan can be committed until it is read. What is served goes on.
    StoreLost {
        why: String,
    },
    /// A step of the epoch failed.
    GroupFault {
        epoch: Epoch,
        fault: Fault,
    },
    /// Time passed.
    Tick,
}

/// A worker's sign of life.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Beat {
    pub epoch: Epoch,
    /// Moves at every layer.
    pub progress: u64,
    pub steps_pending: u32,
    pub resident_bytes: u64,
    /// Of each of its ranks.
    pub tolls: Vec<(RankId, Toll)>,
    /// How long all of its ranks that have a step have waited within collectives, and no byte has moved.
    pub waiting: Duration,
}

/// What the shell must do, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Compare-and-swap the plan into the store; answer with `Committed`, `CommitFailed` or `StoreLost`.
    Commit {
        plan: Arc<Plan>,
    },
    Load {
        worker: WorkerId,
        plan: Arc<Plan>,
    },
    /// Load what a plan to come needs, beside what serves; answered with `Prepared`.
    Prepare {
        worker: WorkerId,
        plan: Arc<Plan>,
    },
    /// Nothing needs a draining worker any more: let it end. It is no member from now on.
    Dismiss {
        worker: WorkerId,
    },
    /// Drop the epoch's ranks, abort their collectives.
    Release {
        worker: WorkerId,
        epoch: Epoch,
    },
    /// Close a worker's stream; it is no member any more.
    Expel {
        worker: WorkerId,
        why: String,
    },
    /// All ranks are ready: steps may run under this plan.
    Serve {
        plan: Arc<Plan>,
    },
    /// Tell a worker that no plan needs whether its group serves without it. Said when it changes.
    StandBy {
        worker: WorkerId,
        serves: bool,
    },
    /// Stop stepping; requests wait for the next `Serve`.
    Halt {
        epoch: Epoch,
        why: String,
    },
}
