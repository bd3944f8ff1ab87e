//! What travels between simulated processes, and what a process is to do at a time.

use std::sync::Arc;

use coordinator::cluster::book;
use coordinator::cluster::service::Said;
use coordinator::cluster::store::{Revision, StoreError};
use coordinator::group::Told;
use coordinator::lead::candidate;
use coordinator::plan::Offer;
use coordinator::schedule::job::{Job, Output, Refusal};
use model::fault::Fault;
use model::plan::{Epoch, Plan, WorkerId};
use model::step::{LaneBatch, LaneResult, StepId};

use super::net::StreamId;

/// A word on a stream.
#[derive(Debug)]
pub enum Word {
    /// A worker asks to be let in; refused by a coordinator that does not lead.
    Join {
        offer: Offer,
        seen: Epoch,
    },
    NotHere,
    Said(Said),
    Command(Command),
    /// A loaded worker opens its step stream.
    Steps {
        worker: WorkerId,
        epoch: Epoch,
    },
    StepsAccepted,
    Order(Order),
    Answer {
        epoch: Epoch,
        told: Told,
    },
    /// A request for the leader.
    Carry(Box<Job>),
    Entered(Result<(), Refusal>),
    Output(Output),
    Enough(u32),
    Closed(String),
}

#[derive(Debug, Clone)]
pub enum Command {
    Load(Arc<Plan>),
    Prepare(Arc<Plan>),
    Release(Epoch),
    Drained,
}

#[derive(Debug, Clone)]
pub struct Order {
    pub epoch: Epoch,
    pub step: StepId,
    /// The lanes that the worker's ranks serve.
    pub lanes: Arc<Vec<(usize, LaneBatch)>>,
}

/// What ranks tell their worker.
#[derive(Debug, Clone)]
pub enum Report {
    Loaded { epoch: Epoch },
    Prepared { epoch: Epoch },
    Answer { epoch: Epoch, step: StepId, lane: usize, result: LaneResult },
    Failed { epoch: Epoch, fault: Fault },
}

/// What a coordinator asks the store about.
#[derive(Debug, Clone)]
pub enum Question {
    Lead(candidate::Ask),
    Plan { ask: book::Ask, term: Option<Revision> },
}

#[derive(Debug, Clone)]
pub enum Reply {
    Lead(Result<candidate::Told, StoreError>),
    Plan(book::Answer),
}

/// What a process does at a time.
#[derive(Debug)]
pub enum Task {
    // A coordinator.
    Look,
    Replied { call: u64, reply: Reply },
    Tick { reign: u64 },
    Ledger { reign: u64 },
    Again { request: usize },
    EntryLate { request: usize, stream: StreamId },
    Deposed { address: String, term: Revision },
    View { made: u64, model_len_max: usize },
    // A worker.
    Connect,
    Beat { session: u64 },
    Report { session: u64, report: Report },
    Unblock { session: u64 },
    Overdue,
}

/// What happens outside of all processes.
#[derive(Debug)]
pub enum Rpc {
    /// A question arrives at the store.
    Asked {
        from: usize,
        life: u64,
        call: u64,
        question: Question,
    },
    /// All ranks of an epoch have computed a step.
    Computed {
        epoch: Epoch,
        step: StepId,
    },
    ConnectLate {
        epoch: Epoch,
    },
    Fault,
    Heal,
    /// A client comes.
    Arrive {
        number: usize,
    },
    HangUp {
        request: usize,
    },
    Restart {
        coordinator: bool,
        number: usize,
    },
    /// A coordinator that was asked to end ends.
    End {
        number: usize,
    },
    Check,
}
