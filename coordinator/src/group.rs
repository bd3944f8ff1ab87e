//! The door to a group of ranks: several steps in flight, answers in the order of submission.

use model::fault::{Fault, FaultKind};
use model::plan::{Epoch, Plan, WorkerId};
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
    pending: Pending,
}

struct Worker {
    id: WorkerId,
    lanes: BTreeSet<usize>,
    orders: mpsc::Sender<Result<wire::StepOrder, tonic::Status>>,
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
        let pending = Pending::new(plan.epoch, plan.mesh.data);
        GrpcGroup { plan, workers, answers, pending }
    }

    fn take(&mut self, answer: Answer) -> Result<(), Fault> {
        let (worker, answer) = match answer {
            Answer::Closed { worker, why } => {
                let text = format!("the step stream of {} closed: {why}", worker.0);
                return Err(Fault::new(FaultKind::RankLost, text));
            }
            Answer::Step { worker, answer } => (worker, answer),
        };
        let told = match answer.fault {
            Some(fault) => Err(proto::fault::from_wire(fault)),
            None => Ok((StepId(answer.step), answer.lanes.into_iter().map(proto::step::result_from_wire).collect())),
        };
        self.pending.take(&worker, Epoch(answer.epoch), told)
    }
}

/// A worker's answer: the lanes of a step whose leaders it has, or why its ranks can't go on.
pub type Told = Result<(StepId, Vec<(usize, LaneResult)>), Fault>;

/// The steps of an epoch that are not answered whole. Pure.
#[derive(Debug)]
pub struct Pending {
    epoch: Epoch,
    lanes: usize,
    /// The oldest first.
    steps: VecDeque<Step>,
}

#[derive(Debug)]
struct Step {
    step: StepId,
    /// Lanes that have not answered.
    missing: BTreeSet<usize>,
    result: StepResult,
}

impl Pending {
    pub fn new(epoch: Epoch, lanes: usize) -> Pending {
        Pending { epoch, lanes, steps: VecDeque::new() }
    }

    pub fn submit(&mut self, step: StepId) {
        let result = StepResult { lanes: vec![LaneResult::default(); self.lanes] };
        self.steps.push_back(Step { step, missing: (0..self.lanes).collect(), result });
    }

    /// Takes what a worker answered. An older epoch's last words change nothing; whatever else was not asked for is a fault.
    pub fn take(&mut self, worker: &WorkerId, epoch: Epoch, told: Told) -> Result<(), Fault> {
        if epoch != self.epoch {
            return Ok(());
        }
        let (step, lanes) = told?;
        let diverged = |what: String| Err(Fault::new(FaultKind::Diverged, format!("{} {what}", worker.0)));
        let Some(pending) = self.steps.iter_mut().find(|p| p.step == step) else {
            return diverged(format!("answered step {}, which is not in flight", step.0));
        };
        for (lane, result) in lanes {
            if !pending.missing.remove(&lane) {
                return diverged(format!("answered lane {lane} of step {} out of turn", step.0));
            }
            pending.result.lanes[lane] = result;
        }
        Ok(())
    }

    /// The oldest step, once it is answered whole.
    pub fn done(&mut self) -> Option<(StepId, StepResult)> {
        let done = self.steps.pop_front_if(|step| step.missing.is_empty())?;
        Some((done.step, done.result))
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
        self.pending.submit(step);
        Ok(())
    }

    async fn next(&mut self) -> Result<(StepId, StepResult), Fault> {
        loop {
            if let Some(done) = self.pending.done() {
                return Ok(done);
            }
            let closed = || Fault::new(FaultKind::RankLost, "every step stream has closed");
            let answer = self.answers.recv().await.ok_or_else(closed)?;
            self.take(answer)?;
        }
    }
}
