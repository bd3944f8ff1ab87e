//! What follows from a slow worker: it is named, and after a while plans do without it where they can.

use super::{Cluster, Phase, Planner};
use crate::cluster::event::Beat;
use crate::cluster::pace::Paces;
use crate::plan::Offer;
use model::plan::{Plan, WorkerId};
use std::collections::BTreeMap;
use std::time::Duration;

/// A worker that stays slow for so long after it was named is planned around.
const PATIENCE: Duration = Duration::from_secs(15);

/// For so long; what made it slow may have passed then, or it is found slow again.
const AVOIDED: Duration = Duration::from_secs(600);

impl<P: Planner> Cluster<P> {
    pub(super) fn hear_paces(&mut self, now: Duration, worker: &WorkerId, beat: &Beat) {
        let Phase::Serving(plan) = &self.phase else { return };
        if plan.epoch != beat.epoch {
            return;
        }
        let Some(member) = plan.members.iter().find(|m| m.worker == *worker) else { return };
        for (rank, toll) in beat.tolls.iter().filter(|(rank, _)| member.ranks.contains(rank)) {
            self.paces.told(now, *rank, *toll);
        }
    }

    /// Another epoch's ranks are others.
    pub(super) fn forget_paces(&mut self) {
        self.paces = Paces::default();
        self.workers.values_mut().for_each(|w| w.slow = None);
    }

    pub(super) fn watch_paces(&mut self, now: Duration) {
        let before = self.avoided.len();
        self.avoided.retain(|_, until| now < *until);
        if self.avoided.len() != before {
            self.considered = None;
        }
        let Phase::Serving(plan) = &self.phase else { return };
        let mut slow: BTreeMap<WorkerId, f64> = BTreeMap::new();
        for (rank, times) in self.paces.slow(now, &plan.mesh) {
            if let Some(member) = plan.members.iter().find(|m| m.ranks.contains(&rank)) {
                let worst = slow.entry(member.worker.clone()).or_insert(times);
                *worst = worst.max(times);
            }
        }
        for (id, worker) in &mut self.workers {
            worker.slow = slow.get(id).map(|times| (*times, worker.slow.map_or(now, |(_, since)| since)));
            let lasting = worker.slow.is_some_and(|(_, since)| since + PATIENCE <= now);
            if lasting && !self.avoided.contains_key(id) {
                self.avoided.insert(id.clone(), now + AVOIDED);
                self.considered = None;
            }
        }
    }

    /// A plan on `offers` without those that are slow, or with them where nothing else fits.
    pub(super) fn planned(&self, offers: &[Offer]) -> Result<Plan, String> {
        let (epoch, previous) = (self.epoch_next(), self.previous.as_deref());
        let quick: Vec<Offer> = offers.iter().filter(|o| !self.avoided.contains_key(&o.worker)).cloned().collect();
        if quick.len() < offers.len()
            && !quick.is_empty()
            && let Ok(plan) = self.planner.plan(epoch, &quick, previous)
        {
            return Ok(plan);
        }
        self.planner.plan(epoch, offers, previous)
    }
}
