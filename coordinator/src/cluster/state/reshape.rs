//! The epoch that is to follow while one serves: without workers that shall end, or on more devices. Prepared, committed,
//! then switched to.

use super::{Cluster, Phase, Planner};
use crate::cluster::event::Action;
use crate::plan::Offer;
use model::plan::{Epoch, Member, Plan, WorkerId};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// The epoch that is to follow the one that serves.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Reshape {
    pub plan: Arc<Plan>,
    /// Members that have not said that they are prepared.
    pub waiting: BTreeSet<WorkerId>,
    pub committing: bool,
}

impl<P: Planner> Cluster<P> {
    /// Those that may be planned with.
    pub(super) fn offers(&self) -> Vec<Offer> {
        self.workers.values().filter(|w| w.drain.is_none() && w.unfit.is_none()).map(|w| w.offer.clone()).collect()
    }

    pub(super) fn epoch_next(&self) -> Epoch {
        Epoch(self.epoch.max(self.epoch_stored).0 + 1)
    }

    /// Thinks of another epoch while one serves: without those that shall end, or on more devices.
    pub(super) fn try_reshape(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let Phase::Serving(current) = &self.phase else { return };
        if self.reshape.is_some() || self.store_lost.is_some() || now < self.retry_at {
            return;
        }
        let current = current.clone();
        let offers = self.offers();
        let wanted = offers.iter().filter(|offer| !self.avoided.contains_key(&offer.worker));
        let ids: BTreeSet<WorkerId> = wanted.map(|offer| offer.worker.clone()).collect();
        let drains = current.members.iter().any(|m| !ids.contains(&m.worker));
        let newcomers = ids.iter().any(|id| current.members.iter().all(|m| m.worker != *id));
        let settled = now >= self.since + self.rules.grow;
        if self.considered.as_ref() == Some(&ids) || !(drains || newcomers && settled) {
            return;
        }
        self.considered = Some(ids);
        match self.planned(&offers) {
            // Where nothing fits without whom it should do without, all stays as it is.
            Ok(plan) if plan.members.iter().map(|m| &m.worker).eq(current.members.iter().map(|m| &m.worker)) => {}
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

    pub(super) fn prepared(&mut self, worker: &WorkerId, epoch: Epoch, actions: &mut Vec<Action>) {
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
    pub(super) fn drop_reshape(&mut self, now: Duration, which: impl Fn(&Reshape) -> bool) {
        if self.reshape.take_if(|r| which(r)).is_some() {
            self.considered = None;
            self.retry_at = now + self.rules.retry;
        }
    }

    /// Ends what serves for the sake of `next`, which is committed. Those that it has too replace their ranks themselves.
    pub(super) fn leave(&mut self, old: &Plan, next: &Plan, actions: &mut Vec<Action>) {
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

    /// Lets those end that shall and that nothing needs. While an epoch is loaded they may have to lend it the model.
    pub(super) fn dismiss(&mut self, actions: &mut Vec<Action>) {
        if matches!(self.phase, Phase::Loading(_)) {
            return;
        }
        let plans = [self.plan(), self.reshape.as_ref().map(|r| &r.plan)];
        let needed = |id: &WorkerId| plans.iter().flatten().any(|p| p.members.iter().any(|m| m.worker == *id));
        let done: Vec<WorkerId> =
            self.workers.iter().filter(|(id, w)| w.drain.is_some() && !needed(id)).map(|(id, _)| id.clone()).collect();
        for worker in done {
            self.workers.remove(&worker);
            actions.push(Action::Dismiss { worker });
        }
    }
}
