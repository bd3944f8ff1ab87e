//! The cluster's core: pure, time is an argument.
//!
//! ```text
//! Gathering -> Committing -> Loading -> Serving
//!     ^            |            |          |       a death, a fault, a lost race, a failed load
//!     +------------+------------+----------+       (with a growing pause after failures)
//! ```
//! While an epoch serves, newcomers and workers that shall end make the next one: its members load what they lack beside
//! what they run, then the plan is committed, the old epoch halts and the new one, nearly loaded, takes over. Until the
//! commit nothing of this touches what is served, and a death ends it.
//!
//! Invariants: the epoch only grows; a worker is asked to load only what the store has taken; steps run only when every
//! member of the plan is ready under its epoch; whoever is not in the plan is a spare.

mod reshape;
mod slow;
mod spare;
mod stuck;

use super::event::{Action, Beat, Event};
use super::pace::Paces;
use crate::plan::Offer;
use model::fault::{Fault, FaultKind};
use model::plan::{Epoch, Plan, WorkerId};
use reshape::Reshape;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// Told to one worker: enough to find one that has the model's files, short enough for a message to each.
const LENDERS_MAX: usize = 256;

/// What the core is told once.
#[derive(Debug, Clone, PartialEq)]
pub struct Rules {
    /// Workers to wait for before planning.
    pub workers: usize,
    /// Plan on fewer after this long without a newcomer, where that fits; `None` waits for all.
    pub settle: Option<Duration>,
    /// Silence after which a worker is dead.
    pub silence: Duration,
    /// Pause before the next try after a failed plan or load; doubles up to 8 times itself, so that all is served again soon
    /// after what made them fail has passed.
    pub retry: Duration,
    /// How long after the last newcomer a serving cluster grows.
    pub grow: Duration,
}

/// A worker as the core knows it.
#[derive(Debug, Clone, PartialEq)]
pub struct Worker {
    pub offer: Offer,
    pub heard: Duration,
    pub beat: Beat,
    /// When `beat.progress` last moved.
    pub moved: Duration,
    pub loading: Option<(u64, u64)>,
    pub ready: Option<Epoch>,
    /// It shall end; with why it can't yet.
    pub drain: Option<String>,
    /// It is slow: how many times its peers' pace its slowest rank takes, and since when.
    pub slow: Option<(f64, Duration)>,
    /// What it loads is not what the others have: it is planned with no more, until it joins anew.
    pub unfit: Option<String>,
    /// It was told that its group serves without it.
    pub spare: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Phase {
    Gathering,
    Committing(Arc<Plan>),
    Loading(Arc<Plan>),
    Serving(Arc<Plan>),
}

/// Makes a plan for the members at hand; pure. The epoch is the plan's.
pub trait Planner {
    fn plan(&self, epoch: Epoch, members: &[Offer], previous: Option<&Plan>) -> Result<Plan, String>;
}

pub struct Cluster<P> {
    rules: Rules,
    planner: P,
    workers: BTreeMap<WorkerId, Worker>,
    phase: Phase,
    /// Highest epoch ever used, or seen while planning.
    epoch: Epoch,
    /// The store's, or that of a worker that joined, where that is higher.
    epoch_stored: Epoch,
    /// Why the store can't be written; plans wait for it.
    store_lost: Option<String>,
    previous: Option<Arc<Plan>>,
    reshape: Option<Reshape>,
    /// The workers for whom a reshape was last thought of: without a change it is not thought of again.
    considered: Option<BTreeSet<WorkerId>>,
    paces: Paces,
    /// Slow workers that plans do without where they can, and until when.
    avoided: BTreeMap<WorkerId, Duration>,
    /// When the membership last grew or a phase ended: `settle` counts from here.
    since: Duration,
    /// Not before this time.
    retry_at: Duration,
    failures: u32,
    /// Why it is not serving, for people.
    reason: String,
    /// What ended the last epoch, or the last try for one; empty while serving and before.
    cause: String,
}

impl<P: Planner> Cluster<P> {
    pub fn new(rules: Rules, planner: P, epoch: Epoch) -> Cluster<P> {
        let reason = format!("waiting for {} workers, 0 joined", rules.workers);
        Cluster {
            rules,
            planner,
            workers: BTreeMap::new(),
            phase: Phase::Gathering,
            epoch,
            epoch_stored: epoch,
            store_lost: None,
            previous: None,
            reshape: None,
            considered: None,
            paces: Paces::default(),
            avoided: BTreeMap::new(),
            since: Duration::ZERO,
            retry_at: Duration::ZERO,
            failures: 0,
            reason,
            cause: String::new(),
        }
    }

    pub fn workers(&self) -> &BTreeMap<WorkerId, Worker> {
        &self.workers
    }

    pub fn phase(&self) -> &Phase {
        &self.phase
    }

    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Why nothing is served now; empty while serving.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// Plans and loads that failed since it last served.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Data addresses of all others that may lend `worker` the model's files: each is told to begin with another one.
    pub fn lenders(&self, worker: &WorkerId) -> Vec<String> {
        let others = || self.workers.iter().filter(|(id, w)| *id != worker && w.unfit.is_none());
        let first = others().take_while(|(id, _)| *id < worker).count();
        let addresses = others().cycle().skip(first).take(others().count().min(LENDERS_MAX));
        addresses.map(|(_, w)| w.offer.data_address.clone()).collect()
    }

    /// Whether a worker loads for an epoch that is to follow the one that serves.
    pub fn prepares(&self, worker: &WorkerId) -> bool {
        self.reshape.as_ref().is_some_and(|r| r.waiting.contains(worker))
    }

    /// Whether plans do without it where they can, because it was slow.
    pub fn avoids(&self, worker: &WorkerId) -> bool {
        self.avoided.contains_key(worker)
    }

    /// The plan that members were asked to load or run.
    pub fn plan(&self) -> Option<&Arc<Plan>> {
        match &self.phase {
            Phase::Gathering => None,
            Phase::Committing(p) | Phase::Loading(p) | Phase::Serving(p) => Some(p),
        }
    }

    /// Takes one event at time `now` (since start; never goes back).
    pub fn handle(&mut self, now: Duration, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Joined { offer } => self.joined(now, offer, &mut actions),
            Event::Seen { epoch } => self.epoch_stored = self.epoch_stored.max(epoch),
            Event::Lost { worker, why } => self.lost(now, &worker, &why, &mut actions),
            Event::Beat { worker, beat } => self.beat(now, &worker, beat, &mut actions),
            Event::Loading { worker, epoch, bytes_done, bytes_total } => {
                if epoch == self.epoch
                    && let Some(w) = self.workers.get_mut(&worker)
                {
                    w.heard = now;
                    w.loading = Some((bytes_done, bytes_total));
                }
            }
            Event::LoadFailed { worker, epoch, fault } => {
                if epoch == self.epoch {
                    self.failed(now, format!("{} could not load: {fault}", worker.0), &mut actions);
                    self.set_aside(now, &worker, &fault);
                }
            }
            Event::Ready { worker, epoch } => self.ready(now, &worker, epoch, &mut actions),
            Event::Drain { worker } => {
                if let Some(w) = self.workers.get_mut(&worker) {
                    w.drain.get_or_insert_default();
                    self.considered = None;
                }
            }
            Event::Prepared { worker, epoch } => self.prepared(&worker, epoch, &mut actions),
            // Whatever it answers, the store is there.
            Event::Committed { epoch } => {
                self.store_lost = None;
                self.committed(epoch, &mut actions);
            }
            Event::CommitFailed { found, why } => {
                self.store_lost = None;
                self.epoch_stored = self.epoch_stored.max(found);
                self.drop_reshape(now, |r| r.committing);
                if matches!(self.phase, Phase::Committing(_)) {
                    self.failed(now, format!("the store refused the plan: {why}"), &mut actions);
                }
            }
            Event::StoreRead { epoch } => {
                self.epoch_stored = self.epoch_stored.max(epoch);
                if self.store_lost.take().is_some() {
                    self.retry_at = now;
                }
            }
            Event::StoreLost { why } => {
                self.store_lost = Some(why);
                self.drop_reshape(now, |r| r.committing);
                if matches!(self.phase, Phase::Committing(_)) {
                    // Nobody was asked to load it yet.
                    self.phase = Phase::Gathering;
                }
            }
            Event::GroupFault { epoch, fault } => self.group_fault(now, epoch, &fault, &mut actions),
            Event::Tick => {
                self.silent(now, &mut actions);
                self.stuck(now, &mut actions);
                self.watch_paces(now);
            }
        }
        self.try_reshape(now, &mut actions);
        self.dismiss(&mut actions);
        if self.phase == Phase::Gathering {
            self.try_plan(now, &mut actions);
        }
        self.tell_spares(&mut actions);
        actions
    }

    fn joined(&mut self, now: Duration, offer: Offer, actions: &mut Vec<Action>) {
        let id = offer.worker.clone();
        if self.workers.contains_key(&id) {
            // The same name twice: the newer process is the real one (the older's socket is about to close).
            self.lost(now, &id, "joined again", actions);
        }
        let (beat, heard, moved) = (Beat::default(), now, now);
        let (loading, ready, drain, slow, unfit, spare) = (None, None, None, None, None, false);
        let worker = Worker { offer, heard, beat, moved, loading, ready, drain, slow, unfit, spare };
        self.avoided.remove(&id);
        self.workers.insert(id, worker);
        self.since = now;
        self.retry_at = now;
    }

    fn lost(&mut self, now: Duration, worker: &WorkerId, why: &str, actions: &mut Vec<Action>) {
        if self.workers.remove(worker).is_none() {
            return;
        }
        actions.push(Action::Expel { worker: worker.clone(), why: why.into() });
        self.drop_reshape(now, |r| r.plan.members.iter().any(|m| m.worker == *worker));
        if self.plan().is_some_and(|p| p.members.iter().any(|m| m.worker == *worker)) {
            self.stand_down(now, format!("{} was lost: {why}", worker.0), actions);
        }
    }

    fn beat(&mut self, now: Duration, worker: &WorkerId, beat: Beat, actions: &mut Vec<Action>) {
        self.hear_paces(now, worker, &beat);
        let epoch = beat.epoch;
        if let Some(w) = self.workers.get_mut(worker) {
            w.heard = now;
            // A step that has just begun has had no time to show progress.
            let begun = beat.steps_pending > 0 && w.beat.steps_pending == 0;
            if beat.progress != w.beat.progress || begun {
                w.moved = now;
            }
            w.beat = beat;
        }
        // Steps show it too, but there may be none for hours.
        let serving = |p: &Plan| p.epoch != epoch && p.members.iter().any(|m| m.worker == *worker);
        if matches!(&self.phase, Phase::Serving(p) if serving(p)) {
            self.stand_down(now, format!("{} has dropped its ranks", worker.0), actions);
        }
    }

    fn silent(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let silence = self.rules.silence;
        let dead: Vec<WorkerId> = self
            .workers
            .iter()
            .filter(|(_, w)| now.saturating_sub(w.heard) > silence)
            .map(|(id, _)| id.clone())
            .collect();
        for worker in dead {
            self.lost(now, &worker, &format!("silent for more than {} ms", silence.as_millis()), actions);
        }
    }

    fn try_plan(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let offers = self.offers();
        let (have, want) = (offers.len(), self.rules.workers);
        let settled = self.rules.settle.is_some_and(|s| now >= self.since + s) && have > 0;
        let few = (have < want && !settled).then(|| format!("waiting for {want} workers, {have} joined"));
        let unfit =
            self.workers.iter().filter_map(|(id, w)| Some(format!("{} is set aside: {}", id.0, w.unfit.as_ref()?)));
        let unfit: Vec<String> = if few.is_some() { unfit.collect() } else { Vec::new() };
        let obstacles: Vec<String> = few.into_iter().chain(unfit).chain(self.store_lost.clone()).collect();
        if !obstacles.is_empty() {
            self.reason = self.after_cause(&obstacles.join("; "));
            return;
        }
        if now < self.retry_at {
            return;
        }
        match self.planned(&offers) {
            Ok(plan) => {
                self.epoch = plan.epoch;
                let plan = Arc::new(plan);
                self.reason = self.after_cause(&format!("planning epoch {}", plan.epoch.0));
                self.phase = Phase::Committing(plan.clone());
                actions.push(Action::Commit { plan });
            }
            Err(why) => self.failed(now, why, actions),
        }
    }

    fn after_cause(&self, now: &str) -> String {
        if self.cause.is_empty() { now.into() } else { format!("{}; {now}", self.cause) }
    }

    fn committed(&mut self, epoch: Epoch, actions: &mut Vec<Action>) {
        let plan = match (&self.phase, &self.reshape) {
            (Phase::Committing(plan), _) if plan.epoch == epoch => plan.clone(),
            (Phase::Serving(old), Some(next)) if next.committing && next.plan.epoch == epoch => {
                let (old, next) = (old.clone(), next.plan.clone());
                self.leave(&old, &next, actions);
                next
            }
            _ => return,
        };
        for member in &plan.members {
            if let Some(w) = self.workers.get_mut(&member.worker) {
                w.loading = Some((0, 0));
                w.ready = None;
            }
            actions.push(Action::Load { worker: member.worker.clone(), plan: plan.clone() });
        }
        self.reason = self.after_cause(&format!("loading epoch {}", epoch.0));
        self.phase = Phase::Loading(plan);
    }

    fn ready(&mut self, now: Duration, worker: &WorkerId, epoch: Epoch, actions: &mut Vec<Action>) {
        let Phase::Loading(plan) = &self.phase else { return };
        if plan.epoch != epoch {
            return;
        }
        let plan = plan.clone();
        if let Some(w) = self.workers.get_mut(worker) {
            w.heard = now;
            w.loading = None;
            w.ready = Some(epoch);
        }
        let ready: BTreeSet<&WorkerId> =
            self.workers.iter().filter(|(_, w)| w.ready == Some(epoch)).map(|(id, _)| id).collect();
        if plan.members.iter().all(|m| ready.contains(&m.worker)) {
            self.failures = 0;
            self.reason.clear();
            self.cause.clear();
            self.previous = Some(plan.clone());
            self.forget_paces();
            self.phase = Phase::Serving(plan.clone());
            actions.push(Action::Serve { plan });
        }
    }

    /// One whose model is another than everyone's fails every epoch that it is part of: the next does without.
    fn set_aside(&mut self, now: Duration, worker: &WorkerId, fault: &Fault) {
        if fault.kind != FaultKind::Incompatible {
            return;
        }
        if let Some(w) = self.workers.get_mut(worker).filter(|w| w.unfit.is_none()) {
            w.unfit = Some(fault.text.clone());
            self.retry_at = now;
        }
    }

    fn group_fault(&mut self, now: Duration, epoch: Epoch, fault: &Fault, actions: &mut Vec<Action>) {
        if matches!(&self.phase, Phase::Serving(p) if p.epoch == epoch) {
            self.stand_down(now, format!("a step of epoch {} failed: {fault}", epoch.0), actions);
        }
    }

    /// Leaves the current plan: members drop their ranks, the next plan may be made at once.
    fn stand_down(&mut self, now: Duration, why: String, actions: &mut Vec<Action>) {
        let Some(plan) = self.plan().cloned() else { return };
        self.reshape = None;
        self.considered = None;
        if matches!(self.phase, Phase::Serving(_)) {
            actions.push(Action::Halt { epoch: plan.epoch, why: why.clone() });
        }
        for member in plan.members.iter().filter(|m| self.workers.contains_key(&m.worker)) {
            actions.push(Action::Release { worker: member.worker.clone(), epoch: plan.epoch });
        }
        for worker in self.workers.values_mut() {
            worker.loading = None;
            worker.ready = None;
        }
        self.phase = Phase::Gathering;
        self.reason.clone_from(&why);
        self.cause = why;
        self.since = now;
    }

    /// A plan or load that failed: the next try waits, longer each time.
    fn failed(&mut self, now: Duration, why: String, actions: &mut Vec<Action>) {
        self.stand_down(now, why.clone(), actions);
        self.phase = Phase::Gathering;
        self.reason.clone_from(&why);
        self.cause = why;
        self.retry_at = now + self.rules.retry * (1 << self.failures.min(3));
        self.failures += 1;
    }
}

#[cfg(test)]
mod tests;
