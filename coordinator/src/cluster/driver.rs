//! The shell around the cluster's core: what comes from the wire becomes events, what the core decides becomes
//! messages, store writes and groups for the scheduler. Everything here runs on the engine's thread.

use super::event::{Action, Event};
use super::ledger::Ledger;
use super::links::{Knock, Links};
use super::proof::Reference;
use super::service::{Notice, Said};
use super::state::{Cluster, Phase, Planner};
use super::store::Store;
use super::stranger::Stranger;
use crate::api::view::{self, ClusterView, LoadView, MemberView};
use crate::group::{Answer, GrpcGroup, ORDERS_MAX, StepStream};
use crate::metrics;
use crate::schedule::load::Load;
use model::fault::{Fault, FaultKind};
use model::plan::{Epoch, Plan, WorkerId};
use proto::cluster::v1 as wire;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};

/// How often silence and pauses are looked at.
pub const TICK: Duration = Duration::from_millis(100);

/// What the scheduler's loop is told.
pub enum Turn {
    Serve {
        plan: Arc<Plan>,
        group: GrpcGroup,
    },
    /// Whether something died, or the epoch only ends for the next one's sake.
    Halt {
        died: bool,
    },
}

/// Told by the scheduler's loop.
pub struct GroupEnded {
    pub epoch: Epoch,
    pub fault: Fault,
}

/// An operator's wish; the answer is sent at once, not when it is fulfilled.
pub enum Ask {
    /// Let this worker end as soon as others can do without it. Refused with the names of those that are members.
    Drain { worker: String, answer: oneshot::Sender<Result<(), String>> },
}

/// What the shell is built from.
pub struct Parts<S, P> {
    /// Its number.
    pub group: usize,
    pub ledger: Ledger<S>,
    pub cluster: Cluster<P>,
    pub notices: mpsc::Receiver<Notice>,
    pub turns: mpsc::Sender<Turn>,
    pub ended: mpsc::Receiver<GroupEnded>,
    /// What operators ask for.
    pub asks: mpsc::Receiver<Ask>,
    pub view: watch::Sender<ClusterView>,
    pub load: watch::Receiver<Load>,
    /// Where workers find the model, and what proves that they read the same.
    pub model_path: String,
    pub identity: Vec<u8>,
    /// The same of the draft model.
    pub draft: Option<(String, Vec<u8>)>,
    /// What the weights that they load are compared with; taken when the shell is made.
    pub reference: Option<Reference>,
    /// The plan as people read it.
    pub explain: Box<dyn Fn(&Plan) -> String + Send>,
}

pub struct Shell<S, P> {
    parts: Parts<S, P>,
    began: Instant,
    links: Links<Commands, Steps>,
    answers: Option<Answers>,
    /// When the epoch that served last was lost, until another serves.
    died: Option<Instant>,
    /// Those that were named for being slow.
    slow: BTreeSet<WorkerId>,
    /// What metrics last heard of.
    observed: Load,
}

type Commands = mpsc::Sender<Result<wire::Command, tonic::Status>>;

/// A step stream, and how it is accepted.
struct Steps {
    stream: StepStream,
    accept: Option<oneshot::Sender<mpsc::Sender<Answer>>>,
}

/// What comes up the step streams of the epoch that is being loaded or served.
struct Answers {
    sender: mpsc::Sender<Answer>,
    queue: Option<mpsc::Receiver<Answer>>,
}

/// Whoever leads no more has nothing that runs or waits.
impl<S, P> Drop for Shell<S, P> {
    fn drop(&mut self) {
        metrics::stood_down(self.parts.group);
    }
}

impl<S: Store, P: Planner> Shell<S, P> {
    pub fn new(mut parts: Parts<S, P>) -> Shell<S, P> {
        let unread = Event::StoreLost { why: "the store was not read yet".into() };
        let actions = parts.cluster.handle(Duration::ZERO, unread);
        assert!(actions.is_empty(), "nobody joined yet");
        let links = Links::new(parts.identity.clone()).comparing(parts.reference.take());
        let slow = BTreeSet::new();
        Shell { parts, began: Instant::now(), links, answers: None, died: None, slow, observed: Load::default() }
    }

    /// Runs until the service is gone.
    pub async fn run(mut self) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                notice = self.parts.notices.recv() => match notice {
                    Some(notice) => self.notice(notice).await,
                    None => return,
                },
                Some(GroupEnded { epoch, fault }) = self.parts.ended.recv() => {
                    tracing::warn!("epoch {} ended: {fault}", epoch.0);
                    self.feed(Event::GroupFault { epoch, fault }).await;
                }
                Some(ask) = self.parts.asks.recv() => self.ask(ask).await,
                event = self.parts.ledger.next() => self.feed(event).await,
                _ = tick.tick() => self.feed(Event::Tick).await,
            }
            self.publish();
        }
    }

    async fn notice(&mut self, notice: Notice) {
        match notice {
            Notice::Joined { connection, offer, seen, commands } => {
                tracing::info!("{} joined from {} with {} device(s)", offer.worker.0, offer.host, offer.devices.len());
                let id = offer.worker.clone();
                self.feed(Event::Seen { epoch: seen }).await;
                let mut actions = self.parts.cluster.handle(self.began.elapsed(), Event::Joined { offer });
                if self.links.add(id.clone(), connection, commands, &mut actions).is_some() {
                    tracing::warn!("{} joined again: its older connection does not count any more", id.0);
                }
                self.perform(actions).await;
            }
            Notice::Gone { connection, worker, why } => {
                if self.links.is_current(&worker, connection) {
                    tracing::warn!("{} is gone: {why}", worker.0);
                    self.feed(Event::Lost { worker, why }).await;
                }
            }
            Notice::Moved { worker, why } => self.feed(Event::Lost { worker, why }).await,
            Notice::Said { connection, worker, message } => {
                if self.links.is_current(&worker, connection) {
                    self.said(worker, message).await;
                }
            }
            Notice::StepsOpened { worker, epoch, stream, accept } => {
                match self.links.knocks(&worker, epoch, Steps { stream, accept: Some(accept) }) {
                    Knock::Open(steps) => self.open(worker, epoch, steps).await,
                    Knock::Kept => {}
                    Knock::Refused(steps) => drop(steps), // with it the means to accept it
                }
            }
        }
    }

    async fn open(&mut self, worker: WorkerId, epoch: Epoch, mut steps: Steps) {
        let (Some(answers), Some(accept)) = (&self.answers, steps.accept.take()) else { return };
        if accept.send(answers.sender.clone()).is_ok() {
            self.links.opened(worker.clone(), steps);
            self.feed(Event::Ready { worker, epoch }).await;
        }
    }

    async fn ask(&mut self, ask: Ask) {
        let Ask::Drain { worker, answer } = ask;
        let id = WorkerId(worker);
        let members = self.parts.cluster.workers();
        let known = match members.contains_key(&id) {
            true => Ok(()),
            false => {
                let names: Vec<&str> = members.keys().map(|id| id.0.as_str()).collect();
                Err(format!("no worker is called {}; members: {}", id.0, names.join(", ")))
            }
        };
        let drain = known.is_ok();
        // Whoever asked may have hung up.
        let _ = answer.send(known);
        if drain {
            tracing::info!("{} is asked to drain", id.0);
            self.feed(Event::Drain { worker: id }).await;
        }
    }

    async fn said(&mut self, worker: WorkerId, message: Said) {
        let name = worker.0.clone();
        if matches!(message, Said::Leaving) {
            tracing::info!("{name} wants to leave");
        }
        let serving = match self.parts.cluster.phase() {
            Phase::Serving(plan) => Some(plan.epoch),
            _ => None,
        };
        if let Some(event) = self.links.said(worker.clone(), message, serving) {
            if let Event::GroupFault { fault, .. } | Event::LoadFailed { fault, .. } = &event {
                tracing::error!("{name}: {fault}");
            }
            if let Event::LoadFailed { fault, .. } = &event
                && fault.kind == FaultKind::Incompatible
            {
                Stranger::Model.refused(&name, fault);
            }
            self.feed(event).await;
        }
        if let Some((epoch, steps)) = self.links.proven(&worker) {
            self.open(worker, epoch, steps).await;
        }
    }

    async fn feed(&mut self, event: Event) {
        let actions = self.parts.cluster.handle(self.began.elapsed(), event);
        self.perform(actions).await;
        self.name_slow();
    }

    /// Says who has become slow.
    fn name_slow(&mut self) {
        let slow: BTreeSet<WorkerId> =
            self.parts.cluster.workers().iter().filter(|(_, w)| w.slow.is_some()).map(|(id, _)| id.clone()).collect();
        if slow == self.slow {
            return;
        }
        for id in slow.difference(&self.slow) {
            let times = self.parts.cluster.workers()[id].slow.map_or(0.0, |(times, _)| times);
            tracing::warn!("{} is slow: it computes {times:.1} times as long as its peers before collectives", id.0);
        }
        metrics::slow_workers(self.parts.group, slow.len());
        self.slow = slow;
    }

    async fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
            self.one(action).await;
        }
        self.links.only(self.parts.cluster.plan().map(|plan| plan.epoch));
    }

    async fn one(&mut self, action: Action) {
        use wire::command::Body;
        match action {
            Action::Commit { plan } => self.parts.ledger.commit(plan.epoch),
            Action::Load { worker, plan } => {
                if self.links.open(&plan) {
                    let (sender, queue) = mpsc::channel(ORDERS_MAX * plan.members.len());
                    self.answers = Some(Answers { sender, queue: Some(queue) });
                }
                self.command(&worker, Body::Load(self.load(&worker, &plan)));
            }
            Action::Prepare { worker, plan } => self.command(&worker, Body::Prepare(self.load(&worker, &plan))),
            Action::Dismiss { worker } => {
                tracing::info!("{} is drained", worker.0);
                self.command(&worker, Body::Drained(wire::Drained {}));
                self.links.remove(&worker);
            }
            Action::Release { worker, epoch } => {
                self.command(&worker, Body::Release(wire::Release { epoch: epoch.0 }));
            }
            Action::Expel { worker, why } => {
                tracing::warn!("{} is no member any more: {why}", worker.0);
                self.links.remove(&worker);
            }
            Action::Serve { plan } => {
                let answers = self.answers.as_mut().expect("ready workers opened their streams");
                let queue = answers.queue.take().expect("an epoch is served once");
                let streams = self.links.streams().into_iter().map(|(id, steps)| (id, steps.stream)).collect();
                let group = GrpcGroup::new(plan.clone(), streams, queue);
                let weights = self.links.weights().unwrap_or_default();
                self.parts.view.send_modify(|view| view.weights = weights);
                let (epoch, mesh) = (plan.epoch.0, plan.mesh);
                match self.died.take() {
                    // As loud as what it ends.
                    Some(died) => {
                        tracing::warn!("serving again, {} ms later: epoch {epoch}, {mesh}", died.elapsed().as_millis())
                    }
                    None => tracing::info!("serving epoch {epoch}: {mesh}"),
                }
                self.turn(Turn::Serve { plan: plan.clone(), group }).await;
                for member in &plan.members {
                    self.command(&member.worker, Body::Serving(wire::Serving { epoch: plan.epoch.0 }));
                }
            }
            Action::StandBy { worker, serves } => self.command(&worker, Body::StandBy(wire::StandBy { serves })),
            Action::Halt { epoch, why } => {
                let died = !matches!(self.parts.cluster.phase(), Phase::Loading(_));
                if died {
                    tracing::warn!("epoch {} is halted: {why}", epoch.0);
                    self.died.get_or_insert_with(Instant::now);
                } else {
                    tracing::info!("epoch {} ends: {why}", epoch.0);
                }
                self.links.close();
                self.answers = None;
                self.turn(Turn::Halt { died }).await;
            }
        }
    }

    fn load(&self, worker: &WorkerId, plan: &Plan) -> wire::Load {
        let (draft_path, draft_identity) = self.parts.draft.clone().unwrap_or_default();
        wire::Load {
            plan: Some(proto::convert::plan_to_wire(plan)),
            model_path: self.parts.model_path.clone(),
            model_identity: self.parts.identity.clone(),
            lenders: self.parts.cluster.lenders(worker),
            draft_path,
            draft_identity,
        }
    }

    async fn turn(&mut self, turn: Turn) {
        // The scheduler's loop ends only when the coordinator stops.
        let _ = self.parts.turns.send(turn).await;
    }

    fn command(&self, worker: &WorkerId, body: wire::command::Body) {
        if let Some(commands) = self.links.commands(worker) {
            // A worker that does not read its commands goes silent, and silence is noticed.
            let _ = commands.try_send(Ok(wire::Command { body: Some(body) }));
        }
    }

    fn publish(&mut self) {
        let load = *self.parts.load.borrow();
        metrics::observe(self.parts.group, &self.observed, &load);
        self.observed = load;
        let cluster = &self.parts.cluster;
        let plan = cluster.plan();
        let phase = match cluster.phase() {
            Phase::Gathering if self.parts.ledger.has_committed() => view::Phase::Recovering,
            Phase::Gathering => view::Phase::Gathering,
            Phase::Committing(_) => view::Phase::Planning,
            Phase::Loading(_) => view::Phase::Loading,
            Phase::Serving(_) => view::Phase::Serving,
        };
        let members: Vec<MemberView> = cluster
            .workers()
            .iter()
            .map(|(id, w)| MemberView {
                id: id.0.clone(),
                host: w.offer.host.clone(),
                ranks: plan
                    .into_iter()
                    .flat_map(|p| &p.members)
                    .filter(|m| m.worker == *id)
                    .flat_map(|m| m.ranks.iter().map(|r| r.0))
                    .collect(),
                memory_bytes: w.offer.devices.iter().map(|d| d.memory_bytes).sum(),
                used_bytes: w.beat.resident_bytes,
                progress: w.beat.progress,
                steps_pending: w.beat.steps_pending,
                phase: match (w.loading, w.ready) {
                    _ if w.unfit.is_some() => format!("set aside: {}", w.unfit.as_deref().unwrap_or_default()),
                    _ if w.drain.as_ref().is_some_and(|why| !why.is_empty()) => {
                        format!("draining: {}", w.drain.as_deref().unwrap_or_default())
                    }
                    _ if w.drain.is_some() => "draining".into(),
                    _ if w.slow.is_some() => {
                        format!("slow: {:.1} times its peers' pace", w.slow.map_or(0.0, |(times, _)| times))
                    }
                    _ if cluster.avoids(id) => "avoided: it was slow".into(),
                    _ if cluster.prepares(id) => "preparing".into(),
                    (Some((done, total)), _) if total > 0 => format!("loading {}%", done * 100 / total),
                    (Some(_), _) => "loading".into(),
                    (None, Some(_)) if w.beat.steps_pending > 0 => "stepping".into(),
                    (None, Some(_)) => "ready".into(),
                    (None, None) => "idle".into(),
                },
            })
            .collect();
        self.parts.view.send_if_modified(|view| {
            // What is prepared for the next epoch is not served yet.
            let epoch = plan.map_or(cluster.epoch(), |plan| plan.epoch).0;
            if view.epoch != epoch || view.mesh.is_empty() {
                view.mesh = plan.map(|p| p.mesh.to_string()).unwrap_or_default();
                view.plan = plan.map(|p| (self.parts.explain)(p)).unwrap_or_default();
                view.dtype = plan.map(|p| p.dtype.to_string()).unwrap_or_default();
                view.kernel_family = plan.map(|p| format!("{:?}", p.family).to_lowercase()).unwrap_or_default();
            }
            let reasons: Vec<String> =
                Some(cluster.reason().to_string()).filter(|r| !r.is_empty()).into_iter().collect();
            let load = LoadView::from(&load);
            view.progress = self.moved();
            let failures = cluster.failures();
            view.model_len_max = plan.map_or(0, |p| p.limits.model_len_max);
            let changed = view.load != load
                || view.failures != failures
                || view.phase != phase
                || view.epoch != epoch
                || view.members != members
                || view.reasons != reasons;
            (view.phase, view.epoch, view.members, view.reasons, view.load) = (phase, epoch, members, reasons, load);
            view.failures = failures;
            changed
        });
    }

    /// When every member of the plan last showed progress, or, idle, a sign of life.
    fn moved(&self) -> Option<Instant> {
        let plan = self.parts.cluster.plan()?;
        let at = |m: &model::plan::Member| {
            let worker = self.parts.cluster.workers().get(&m.worker)?;
            Some(if worker.beat.steps_pending > 0 { worker.moved } else { worker.heard })
        };
        let oldest = plan.members.iter().map(at).collect::<Option<Vec<_>>>()?.into_iter().min()?;
        Some(self.began + oldest)
    }
}
