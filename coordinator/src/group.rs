//! The door to a group of ranks: several steps in flight, answers in the order of submission.

use model::fault::{Fault, FaultKind};
use model::plan::{Plan, WorkerId};
use model::step::{LaneResult, StepBatch, StepId, StepResult};
use proto::cluster::v1 as wire;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use tokio::sync::mpsc;

/// One replica of one model, loaded under one epoch. Production speaks gRPC to workers; tests simulate.
pub trait ShardGroup: Send {
    /// Starts a step. Returns at once; steps run in the order of submission.
    fn submit(&mut self, step: StepId, batch: StepBatch) -> Result<(), Fault>;

    /// Waits for the oldest step that was not yet answered. A fault ends the group: nothing is in flight afterwards.
    /// Dropping the future loses nothing.
    fn next(&mut self) -> impl Future<Output = Result<(StepId, StepResult), Fault>> + Send;
}

/// Steps in flight that a worker's stream holds before `submit` refuses; the scheduler keeps far fewer.
pub const ORDERS_MAX: usize = 64;

/// A group over the workers' step streams: one message a worker and step, holding only the lanes that its ranks serve;
/// each lane's leader answers.
pub struct GrpcGroup {
    plan: Arc<Plan>,
    workers: Vec<Worker>,
    answers: mpsc::Receiver<Answer>,
    pending: VecDeque<Pending>,
}

struct Worker {
    id: WorkerId,
    lanes: BTreeSet<usize>,
    orders: mpsc::Sender<Result<wire::StepOrder, tonic::Status>>,
}

struct Pending {
    step: StepId,
    /// Lanes that have not answered.
    missing: BTreeSet<usize>,
    result: StepResult,
}

/// Where a worker's orders go.
pub struct StepStream {
    pub orders: mpsc::Sender<Result<wire::StepOrder, tonic::Status>>,
}

/// What comes up a step stream.
#[derive(Debug)]
pub enum Answer {
    Step { worker: WorkerId, answer: wire::StepAnswer },
    Closed { worker: WorkerId, why: String },
}

impl GrpcGroup {
    /// A group over one open stream for each member of `plan`.
    pub fn new(plan: Arc<Plan>, streams: BTreeMap<WorkerId, StepStream>, answers: mpsc::Receiver<Answer>) -> GrpcGroup {
        let lanes_of = |id: &WorkerId| {
            let member = plan.members.iter().find(|m| m.worker == *id).expect("streams are opened by members");
            member.ranks.iter().map(|&r| plan.mesh.place(r).lane).collect()
        };
        let workers =
            streams.into_iter().map(|(id, s)| Worker { lanes: lanes_of(&id), id, orders: s.orders }).collect();
        GrpcGroup { plan, workers, answers, pending: VecDeque::new() }
    }

    fn take(&mut self, answer: Answer) -> Result<(), Fault> {
        let (worker, answer) = match answer {
            Answer::Closed { worker, why } => {
                let text = format!("the step stream of {} closed: {why}", worker.0);
                return Err(Fault::new(FaultKind::RankLost, text));
            }
            Answer::Step { worker, answer } => (worker, answer),
        };
        if answer.epoch != self.plan.epoch.0 {
            return Ok(()); // an older epoch's last words
        }
        if let Some(fault) = answer.fault {
            return Err(proto::fault::from_wire(fault));
        }
        let step = StepId(answer.step);
        let diverged = |what: String| Err(Fault::new(FaultKind::Diverged, format!("{} {what}", worker.0)));
        let Some(pending) = self.pending.iter_mut().find(|p| p.step == step) else {
            return diverged(format!("answered step {}, which is not in flight", step.0));
        };
        for lane in answer.lanes {
            let (lane, result) = proto::step::result_from_wire(lane);
            if !pending.missing.remove(&lane) {
                return diverged(format!("answered lane {lane} of step {} out of turn", step.0));
            }
            pending.result.lanes[lane] = result;
        }
        Ok(())
    }
}

impl ShardGroup for GrpcGroup {
    fn submit(&mut self, step: StepId, batch: StepBatch) -> Result<(), Fault> {
        let lanes = self.plan.mesh.data;
        assert_eq!(batch.lanes.len(), lanes, "a step names every lane");
        for worker in &self.workers {
            let mine = worker.lanes.iter().map(|&lane| proto::step::lane_to_wire(lane, &batch.lanes[lane])).collect();
            let order = wire::StepOrder { epoch: self.plan.epoch.0, step: step.0, lanes: mine };
            worker
                .orders
                .try_send(Ok(order))
                .map_err(|e| Fault::new(FaultKind::RankLost, format!("{} takes no more orders: {e}", worker.id.0)))?;
        }
        let result = StepResult { lanes: vec![LaneResult::default(); lanes] };
        self.pending.push_back(Pending { step, missing: (0..lanes).collect(), result });
        Ok(())
    }

    async fn next(&mut self) -> Result<(StepId, StepResult), Fault> {
        loop {
            if self.pending.front().is_some_and(|p| p.missing.is_empty()) {
                let done = self.pending.pop_front().expect("checked");
                return Ok((done.step, done.result));
            }
            let closed = || Fault::new(FaultKind::RankLost, "every step stream has closed");
            let answer = self.answers.recv().await.ok_or_else(closed)?;
            self.take(answer)?;
        }
    }
}
