//! The door to a group of ranks: several steps in flight, answers in the order of submission.

use model::fault::Fault;
use model::step::{StepBatch, StepId, StepResult};

/// One replica of one model, loaded under one epoch. Production speaks gRPC to workers; tests simulate.
pub trait ShardGroup: Send {
    /// Starts a step. Returns at once; steps run in the order of submission.
    fn submit(&mut self, step: StepId, batch: StepBatch) -> Result<(), Fault>;

    /// Waits for the oldest step that was not yet answered. A fault ends the group: nothing is in flight afterwards.
    fn next(&mut self) -> impl Future<Output = Result<(StepId, StepResult), Fault>> + Send;
}
