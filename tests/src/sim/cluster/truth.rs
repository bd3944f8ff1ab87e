//! What is true whatever anybody believes: who has led, what was committed, which ranks were loaded. The checks that no
//! process could make by itself.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use coordinator::cluster::store::Revision;
use model::plan::{Epoch, Plan, WorkerId};

#[derive(Debug, Default)]
pub struct Truth {
    /// The leader's key, as the store has it.
    pub leader: Option<(String, Revision)>,
    /// Every epoch that the store took, by whom.
    committed: BTreeMap<Epoch, usize>,
    loaded: BTreeSet<(Epoch, WorkerId)>,
    pub believe: BTreeSet<usize>,
    pub two_believed: u64,
    /// Every plan that somebody was asked to load.
    pub plans: Vec<Arc<Plan>>,
}

impl Truth {
    pub fn begins_to_lead(&mut self, coordinator: usize) {
        self.believe.insert(coordinator);
        self.two_believed += u64::from(self.believe.len() > 1);
    }

    pub fn leads_no_more(&mut self, coordinator: usize) {
        self.believe.remove(&coordinator);
    }

    /// The store took a plan.
    pub fn committed(&mut self, epoch: Epoch, coordinator: usize, id: &str) {
        let (leader, _) = self.leader.as_ref().expect("somebody leads when a plan is committed");
        assert_eq!(leader, id, "a deposed leader committed epoch {}", epoch.0);
        let last = self.committed.last_key_value().map(|(epoch, _)| *epoch);
        assert!(last.is_none_or(|last| last < epoch), "epoch {} follows {last:?}", epoch.0);
        self.committed.insert(epoch, coordinator);
    }

    pub fn asks_to_load(&mut self, plan: &Arc<Plan>) {
        if self.plans.last().is_none_or(|last| last.epoch < plan.epoch) {
            self.plans.push(plan.clone());
        }
        assert!(self.committed.contains_key(&plan.epoch), "epoch {} is loaded and not committed", plan.epoch.0);
    }

    pub fn loaded(&mut self, epoch: Epoch, worker: WorkerId) {
        self.loaded.insert((epoch, worker));
    }

    pub fn serves(&self, coordinator: usize, plan: &Plan) {
        assert_eq!(self.committed.get(&plan.epoch), Some(&coordinator), "it serves what it committed");
        for member in &plan.members {
            let known = self.loaded.contains(&(plan.epoch, member.worker.clone()));
            assert!(known, "epoch {} is served before {} is ready", plan.epoch.0, member.worker.0);
        }
    }
}
