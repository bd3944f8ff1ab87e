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

use super::event::{Action, Beat, Event};
use crate::plan::Offer;
use model::fault::Fault;
use model::plan::{Epoch, Member, Plan, WorkerId};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// What the core is told once.
#[derive(Debug, Clone, PartialEq)]
pub struct Rules {
    /// Workers to wait for before planning.
    pub workers: usize,
    /// Plan on fewer after this long without a newcomer, where that fits; `None` waits for all.
    pub settle: Option<Duration>,
    /// Silence after which a worker is dead.
    pub silence: Duration,
    /// Pause before the next try after a failed plan or load; doubles up to 32 times itself.
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
}

/// The epoch that is to follow the one that serves.
#[derive(Debug, Clone, PartialEq)]
struct Reshape {
    plan: Arc<Plan>,
    /// Members that have not said that they are prepared.
    waiting: BTreeSet<WorkerId>,
    committing: bool,
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
    /// The store's, where that is higher.
    epoch_stored: Epoch,
    /// Why the store can't be written; plans wait for it.
    store_lost: Option<String>,
    previous: Option<Arc<Plan>>,
    reshape: Option<Reshape>,
    /// The workers for whom a reshape was last thought of: without a change it is not thought of again.
    considered: Option<BTreeSet<WorkerId>>,
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

    /// Whether a worker loads for an epoch that is to follow the one that serves.
    pub fn prepares(&self, worker: &WorkerId) -> bool {
        self.reshape.as_ref().is_some_and(|r| r.waiting.contains(worker))
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
            Event::Lost { worker, why } => self.lost(now, &worker, &why, &mut actions),
            Event::Beat { worker, beat } => self.beat(now, &worker, beat),
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
            Event::Committed { epoch } => self.committed(epoch, &mut actions),
            Event::CommitFailed { found, why } => {
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
            Event::Tick => self.silent(now, &mut actions),
        }
        self.try_reshape(now, &mut actions);
        self.dismiss(&mut actions);
        if self.phase == Phase::Gathering {
            self.try_plan(now, &mut actions);
        }
        actions
    }

    fn joined(&mut self, now: Duration, offer: Offer, actions: &mut Vec<Action>) {
        let id = offer.worker.clone();
        if self.workers.contains_key(&id) {
            // The same name twice: the newer process is the real one (the older's socket is about to close).
            self.lost(now, &id, "joined again", actions);
        }
        let worker =
            Worker { offer, heard: now, beat: Beat::default(), moved: now, loading: None, ready: None, drain: None };
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

    fn beat(&mut self, now: Duration, worker: &WorkerId, beat: Beat) {
        if let Some(w) = self.workers.get_mut(worker) {
            w.heard = now;
            // A step that has just begun has had no time to show progress.
            let begun = beat.steps_pending > 0 && w.beat.steps_pending == 0;
            if beat.progress != w.beat.progress || begun {
                w.moved = now;
            }
            w.beat = beat;
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
        let obstacles: Vec<String> = few.into_iter().chain(self.store_lost.clone()).collect();
        if !obstacles.is_empty() {
            self.reason = self.after_cause(&obstacles.join("; "));
            return;
        }
        if now < self.retry_at {
            return;
        }
        match self.planner.plan(self.epoch_next(), &offers, self.previous.as_deref()) {
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

    /// Those that may be planned with.
    fn offers(&self) -> Vec<Offer> {
        self.workers.values().filter(|w| w.drain.is_none()).map(|w| w.offer.clone()).collect()
    }

    fn epoch_next(&self) -> Epoch {
        Epoch(self.epoch.max(self.epoch_stored).0 + 1)
    }

    /// Thinks of another epoch while one serves: without those that shall end, or on more devices.
    fn try_reshape(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let Phase::Serving(current) = &self.phase else { return };
        if self.reshape.is_some() || self.store_lost.is_some() || now < self.retry_at {
            return;
        }
        let current = current.clone();
        let offers = self.offers();
        let ids: BTreeSet<WorkerId> = offers.iter().map(|offer| offer.worker.clone()).collect();
        let drains = current.members.iter().any(|m| !ids.contains(&m.worker));
        let newcomers = ids.iter().any(|id| current.members.iter().all(|m| m.worker != *id));
        let settled = now >= self.since + self.rules.grow;
        if self.considered.as_ref() == Some(&ids) || !(drains || newcomers && settled) {
            return;
        }
        self.considered = Some(ids);
        match self.planner.plan(self.epoch_next(), &offers, self.previous.as_deref()) {
            Ok(plan) if drains || plan.mesh.ranks() > current.mesh.ranks() => {
                let plan = Arc::new(plan);
                let waiting = plan.members.iter().map(|m| m.worker.clone()).collect();
                let prepare = |m: &Member| Action::Prepare { worker: m.worker.clone(), plan: plan.clone() };
                actions.extend(plan.members.iter().map(prepare));
                self.reshape = Some(Reshape { plan: plan.clone(), waiting, committing: false });
            }
            Ok(_) => {}
            Err(why) => self.workers.values_mut().filter_map(|w| w.drain.as_mut()).for_each(|d| d.clone_from(&why)),
        }
    }

    fn prepared(&mut self, worker: &WorkerId, epoch: Epoch, actions: &mut Vec<Action>) {
        let next = self.epoch_next();
        let Some(reshape) = self.reshape.as_mut().filter(|r| r.plan.epoch == epoch && !r.committing) else { return };
        reshape.waiting.remove(worker);
        if reshape.waiting.is_empty() {
            // The store may have seen another epoch meanwhile.
            reshape.plan = Arc::new(Plan { epoch: next, ..(*reshape.plan).clone() });
            reshape.committing = true;
            self.epoch = next;
            actions.push(Action::Commit { plan: reshape.plan.clone() });
        }
    }

    /// Gives up the epoch that was to follow, to be thought of again.
    fn drop_reshape(&mut self, now: Duration, which: impl Fn(&Reshape) -> bool) {
        if self.reshape.take_if(|r| which(r)).is_some() {
            self.considered = None;
            self.retry_at = now + self.rules.retry;
        }
    }

    /// Ends what serves for the sake of `next`, which is committed. Those that it has too replace their ranks themselves.
    fn leave(&mut self, old: &Plan, next: &Plan, actions: &mut Vec<Action>) {
        self.reshape = None;
        let why = format!("{} follows {}", next.mesh, old.mesh);
        actions.push(Action::Halt { epoch: old.epoch, why: why.clone() });
        let stays = |m: &&Member| next.members.iter().all(|n| n.worker != m.worker);
        for member in old.members.iter().filter(stays) {
            actions.push(Action::Release { worker: member.worker.clone(), epoch: old.epoch });
        }
        self.workers.values_mut().for_each(|w| w.ready = None);
        self.cause = why;
    }

    /// Lets those end that shall and that nothing needs.
    fn dismiss(&mut self, actions: &mut Vec<Action>) {
        let plans = [self.plan(), self.reshape.as_ref().map(|r| &r.plan)];
        let needed = |id: &WorkerId| plans.iter().flatten().any(|p| p.members.iter().any(|m| m.worker == *id));
        let done: Vec<WorkerId> =
            self.workers.iter().filter(|(id, w)| w.drain.is_some() && !needed(id)).map(|(id, _)| id.clone()).collect();
        for worker in done {
            self.workers.remove(&worker);
            actions.push(Action::Dismiss { worker });
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
            self.phase = Phase::Serving(plan.clone());
            actions.push(Action::Serve { plan });
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
        self.retry_at = now + self.rules.retry * (1 << self.failures.min(5));
        self.failures += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::fault::FaultKind;
    use model::mesh::{Mesh, RankId};
    use model::plan::{KernelFamily, Limits};
    use model::quant::Dtype;

    /// One rank a worker; refuses when `refuse` is set.
    struct OneEach {
        refuse: bool,
    }

    impl Planner for OneEach {
        fn plan(&self, epoch: Epoch, members: &[Offer], _: Option<&Plan>) -> Result<Plan, String> {
            if self.refuse {
                return Err("rank 0 needs 2 GiB, has 1 GiB".into());
            }
            let n = members.len();
            Ok(Plan {
                epoch,
                mesh: Mesh::new(n, 1, 1, 1).unwrap(),
                dtype: Dtype::F32,
                family: KernelFamily::Vector,
                stages: (0..n).map(|i| i..i + 1).collect(),
                members: (0..n)
                    .map(|i| Member {
                        worker: members[i].worker.clone(),
                        host: String::new(),
                        data_address: String::new(),
                        ranks: vec![RankId(i as u32)],
                        threads: 1,
                    })
                    .collect(),
                limits: Limits { model_len_max: 1, step_tokens_max: 1, step_sequences_max: 1, blocks: 1 },
                predictors: 0,
            })
        }
    }

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn id(n: usize) -> WorkerId {
        WorkerId(format!("w{n}"))
    }

    fn cluster(workers: usize, settle: Option<Duration>) -> Cluster<OneEach> {
        let rules = Rules { workers, settle, silence: ms(1000), retry: ms(100), grow: ms(500) };
        Cluster::new(rules, OneEach { refuse: false }, Epoch(0))
    }

    fn join(c: &mut Cluster<OneEach>, now: u64, n: usize) -> Vec<Action> {
        let offer = Offer {
            worker: id(n),
            host: "h".into(),
            data_address: "127.0.0.1:1".into(),
            devices: Vec::new(),
            families: vec![KernelFamily::Vector],
        };
        c.handle(ms(now), Event::Joined { offer })
    }

    fn serve(c: &mut Cluster<OneEach>, now: u64) -> Vec<Action> {
        let epoch = c.epoch();
        let members = c.plan().expect("a plan").members.clone();
        let mut last = c.handle(ms(now), Event::Committed { epoch });
        for m in members {
            last = c.handle(ms(now), Event::Ready { worker: m.worker, epoch });
        }
        last
    }

    #[test]
    fn it_serves_when_all_are_ready_and_not_before() {
        let mut c = cluster(2, None);
        assert!(join(&mut c, 0, 0).is_empty());
        assert!(matches!(join(&mut c, 1, 1)[..], [Action::Commit { .. }]));
        let loads = c.handle(ms(2), Event::Committed { epoch: Epoch(1) });
        assert!(matches!(loads[..], [Action::Load { .. }, Action::Load { .. }]));
        assert!(c.handle(ms(3), Event::Ready { worker: id(0), epoch: Epoch(1) }).is_empty());
        assert!(!c.reason().is_empty());
        let last = c.handle(ms(4), Event::Ready { worker: id(1), epoch: Epoch(1) });
        assert!(matches!(last[..], [Action::Serve { .. }]));
        assert_eq!(c.reason(), "");
    }

    fn prepare(c: &mut Cluster<OneEach>, now: u64) -> Vec<Action> {
        let plan = c.reshape.clone().expect("a plan to come").plan;
        let mut last = Vec::new();
        for m in &plan.members {
            last = c.handle(ms(now), Event::Prepared { worker: m.worker.clone(), epoch: plan.epoch });
        }
        last
    }

    fn served_by(n: usize) -> Cluster<OneEach> {
        let mut c = cluster(n, None);
        (0..n).for_each(|i| drop(join(&mut c, 0, i)));
        serve(&mut c, 1);
        assert!(matches!(c.phase(), Phase::Serving(_)));
        c
    }

    #[test]
    fn a_newcomer_is_loaded_before_the_switch() {
        let mut c = served_by(1);
        assert!(join(&mut c, 10, 1).is_empty());
        let actions = c.handle(ms(510), Event::Tick);
        assert!(matches!(&actions[..], [Action::Prepare { .. }, Action::Prepare { .. }]), "{actions:?}");
        assert!(c.handle(ms(511), Event::Tick).is_empty() && c.prepares(&id(1)));
        let actions = prepare(&mut c, 600);
        assert!(matches!(&actions[..], [Action::Commit { plan }] if plan.epoch == Epoch(2)));
        assert!(
            matches!(c.phase(), Phase::Serving(p) if p.epoch == Epoch(1)),
            "it serves until the store has taken it"
        );
        let actions = c.handle(ms(601), Event::Committed { epoch: Epoch(2) });
        assert!(matches!(
            &actions[..],
            [Action::Halt { epoch: Epoch(1), .. }, Action::Load { .. }, Action::Load { .. }]
        ));
        for n in 0..2 {
            c.handle(ms(602), Event::Ready { worker: id(n), epoch: Epoch(2) });
        }
        assert!(matches!(c.phase(), Phase::Serving(p) if p.mesh.ranks() == 2) && c.reason().is_empty());
    }

    #[test]
    fn a_draining_worker_serves_until_others_do_and_is_then_let_go() {
        let mut c = served_by(2);
        let actions = c.handle(ms(10), Event::Drain { worker: id(1) });
        assert!(matches!(&actions[..], [Action::Prepare { worker, .. }] if *worker == id(0)), "{actions:?}");
        assert!(matches!(&prepare(&mut c, 20)[..], [Action::Commit { .. }]));
        let actions = c.handle(ms(21), Event::Committed { epoch: Epoch(2) });
        assert!(
            matches!(&actions[..], [
            Action::Halt { .. },
            Action::Release { worker: released, .. },
            Action::Load { worker: loads, .. },
            Action::Dismiss { worker: dismissed },
        ] if *released == id(1) && *loads == id(0) && *dismissed == id(1)),
            "{actions:?}"
        );
        // What a closed stream says afterwards is no death.
        assert!(c.handle(ms(22), Event::Lost { worker: id(1), why: "closed".into() }).is_empty());
        assert!(matches!(
            c.handle(ms(23), Event::Ready { worker: id(0), epoch: Epoch(2) })[..],
            [Action::Serve { .. }]
        ));
    }

    #[test]
    fn a_spare_that_drains_is_let_go_at_once_and_the_last_worker_never() {
        let mut c = served_by(1);
        join(&mut c, 10, 1);
        assert!(matches!(&c.handle(ms(11), Event::Drain { worker: id(1) })[..], [Action::Dismiss { .. }]));
        c.planner.refuse = true;
        assert!(c.handle(ms(12), Event::Drain { worker: id(0) }).is_empty());
        assert!(matches!(c.phase(), Phase::Serving(_)));
        assert!(c.workers()[&id(0)].drain.as_ref().is_some_and(|why| why.contains("2 GiB")));
        c.planner.refuse = false;
        let actions = join(&mut c, 13, 2);
        assert!(matches!(&actions[..], [Action::Prepare { worker, .. }] if *worker == id(2)), "{actions:?}");
    }

    #[test]
    fn a_death_ends_what_was_to_follow() {
        for victim in [0, 1] {
            let mut c = served_by(1);
            join(&mut c, 10, 1);
            c.handle(ms(510), Event::Tick);
            let actions = c.handle(ms(520), Event::Lost { worker: id(victim), why: "closed".into() });
            assert!(c.reshape.is_none());
            assert_eq!(matches!(c.phase(), Phase::Serving(_)), victim == 1, "{actions:?}");
            assert!(c.handle(ms(521), Event::Prepared { worker: id(1 - victim), epoch: Epoch(2) }).is_empty());
        }
    }

    #[test]
    fn a_store_that_refuses_the_next_epoch_leaves_the_old_one_serving() {
        for lost in [true, false] {
            let mut c = served_by(1);
            join(&mut c, 10, 1);
            c.handle(ms(510), Event::Tick);
            prepare(&mut c, 520);
            let event = match lost {
                true => Event::StoreLost { why: "gone".into() },
                false => Event::CommitFailed { found: Epoch(9), why: "at revision 9".into() },
            };
            assert!(c.handle(ms(530), event).is_empty());
            assert!(matches!(c.phase(), Phase::Serving(p) if p.epoch == Epoch(1)));
            let mut actions = c.handle(ms(540), Event::StoreRead { epoch: Epoch(9) });
            actions.extend(c.handle(ms(700), Event::Tick));
            assert!(matches!(&actions[..], [Action::Prepare { plan, .. }, _] if plan.epoch == Epoch(10)));
        }
    }

    #[test]
    fn a_stale_ready_is_ignored() {
        let mut c = cluster(1, None);
        join(&mut c, 0, 0);
        c.handle(ms(1), Event::Committed { epoch: Epoch(1) });
        assert!(c.handle(ms(2), Event::Ready { worker: id(0), epoch: Epoch(0) }).is_empty());
    }

    #[test]
    fn a_death_halts_releases_the_survivors_and_waits_for_the_newcomer() {
        let mut c = cluster(2, Some(ms(5000)));
        join(&mut c, 0, 0);
        join(&mut c, 0, 1);
        serve(&mut c, 1);
        let actions = c.handle(ms(10), Event::Lost { worker: id(0), why: "closed".into() });
        assert!(matches!(&actions[..], [
            Action::Expel { .. },
            Action::Halt { .. },
            Action::Release { worker, .. },
        ] if *worker == id(1)));
        assert!(matches!(&join(&mut c, 20, 2)[..], [Action::Commit { plan }] if plan.epoch == Epoch(2)));
        assert!(matches!(serve(&mut c, 30)[..], [Action::Serve { .. }]));
    }

    #[test]
    fn after_settling_it_plans_on_fewer() {
        let mut c = cluster(2, Some(ms(5000)));
        join(&mut c, 0, 0);
        join(&mut c, 0, 1);
        serve(&mut c, 1);
        c.handle(ms(10), Event::Lost { worker: id(0), why: "closed".into() });
        for t in [1000, 3000] {
            c.handle(ms(t), Event::Beat { worker: id(1), beat: Beat::default() });
        }
        c.handle(ms(4900), Event::Beat { worker: id(1), beat: Beat::default() });
        assert!(c.handle(ms(5009), Event::Tick).is_empty());
        assert!(matches!(&c.handle(ms(5011), Event::Tick)[..], [Action::Commit { plan }] if plan.mesh.ranks() == 1));
    }

    #[test]
    fn silence_is_a_death() {
        let mut c = cluster(1, None);
        join(&mut c, 0, 0);
        serve(&mut c, 1);
        assert!(c.handle(ms(900), Event::Tick).is_empty());
        assert!(matches!(c.handle(ms(1100), Event::Tick)[..], [Action::Expel { .. }, Action::Halt { .. }]));
        assert!(c.workers().is_empty());
    }

    #[test]
    fn a_plan_that_does_not_fit_is_retried_with_growing_pauses_and_a_reason() {
        let mut c = cluster(1, None);
        c.planner.refuse = true;
        join(&mut c, 0, 0);
        assert_eq!(c.reason(), "rank 0 needs 2 GiB, has 1 GiB");
        c.planner.refuse = false;
        assert!(c.handle(ms(99), Event::Tick).is_empty());
        assert!(matches!(c.handle(ms(100), Event::Tick)[..], [Action::Commit { .. }]));
    }

    #[test]
    fn a_failed_load_releases_everyone_and_says_why() {
        let mut c = cluster(2, None);
        join(&mut c, 0, 0);
        join(&mut c, 0, 1);
        c.handle(ms(1), Event::Committed { epoch: Epoch(1) });
        let fault = Fault::new(FaultKind::BadCheckpoint, "model.safetensors is 10 bytes short");
        let actions = c.handle(ms(2), Event::LoadFailed { worker: id(0), epoch: Epoch(1), fault });
        assert!(matches!(actions[..], [Action::Release { .. }, Action::Release { .. }]));
        assert!(c.reason().contains("10 bytes short"));
    }

    #[test]
    fn a_lost_race_takes_a_higher_epoch() {
        let mut c = cluster(1, None);
        join(&mut c, 0, 0);
        c.handle(ms(1), Event::CommitFailed { found: Epoch(9), why: "at revision 9".into() });
        let again = c.handle(ms(200), Event::Tick);
        assert!(matches!(&again[..], [Action::Commit { plan }] if plan.epoch == Epoch(10)));
    }

    #[test]
    fn nothing_is_planned_before_the_store_is_read_and_the_reason_is_said() {
        let mut c = cluster(1, None);
        c.handle(ms(0), Event::StoreLost { why: "the store is unreachable: refused".into() });
        assert_eq!(c.reason(), "waiting for 1 workers, 0 joined; the store is unreachable: refused");
        assert!(join(&mut c, 1, 0).is_empty());
        assert_eq!(c.reason(), "the store is unreachable: refused");
        assert!(c.handle(ms(5000), Event::Beat { worker: id(0), beat: Beat::default() }).is_empty());
        let actions = c.handle(ms(5001), Event::StoreRead { epoch: Epoch(41) });
        assert!(matches!(&actions[..], [Action::Commit { plan }] if plan.epoch == Epoch(42)));
        assert_eq!(c.failures(), 0);
    }

    #[test]
    fn a_store_that_goes_while_serving_changes_nothing_until_a_plan_is_needed() {
        let mut c = cluster(1, None);
        join(&mut c, 0, 0);
        serve(&mut c, 1);
        assert!(c.handle(ms(2), Event::StoreLost { why: "gone".into() }).is_empty());
        assert!(matches!(c.phase(), Phase::Serving(_)));
        assert_eq!(c.reason(), "");
        c.handle(ms(3), Event::Lost { worker: id(0), why: "closed".into() });
        assert!(join(&mut c, 4, 0).is_empty());
        assert!(c.reason().contains("closed") && c.reason().ends_with("; gone"), "{}", c.reason());
        let actions = c.handle(ms(5), Event::StoreRead { epoch: Epoch(1) });
        assert!(matches!(&actions[..], [Action::Commit { plan }] if plan.epoch == Epoch(2)));
    }

    #[test]
    fn a_commit_that_got_no_answer_is_planned_again_above_what_the_store_then_says() {
        let mut c = cluster(1, None);
        join(&mut c, 0, 0);
        assert!(c.handle(ms(1), Event::StoreLost { why: "no answer".into() }).is_empty());
        // It had been written after all.
        let actions = c.handle(ms(2), Event::StoreRead { epoch: Epoch(1) });
        assert!(matches!(&actions[..], [Action::Commit { plan }] if plan.epoch == Epoch(2)));
        assert!(c.handle(ms(3), Event::Committed { epoch: Epoch(1) }).is_empty(), "the first one comes late");
        assert_eq!(c.failures(), 0);
    }

    #[test]
    fn a_fault_of_an_older_epoch_changes_nothing() {
        let mut c = cluster(1, None);
        join(&mut c, 0, 0);
        serve(&mut c, 1);
        let fault = Fault::new(FaultKind::Internal, "x");
        assert!(c.handle(ms(2), Event::GroupFault { epoch: Epoch(0), fault: fault.clone() }).is_empty());
        let actions = c.handle(ms(3), Event::GroupFault { epoch: Epoch(1), fault });
        assert!(matches!(actions[..], [Action::Halt { .. }, Action::Release { .. }, Action::Commit { .. }]));
    }
}
