//! The agent's core: pure, and the fence against stale epochs.
//!
//! ```text
//! Idle -> Loading(e) -> Ready(e) -> Idle      only ever to a higher e
//! ```

use model::fault::{Fault, FaultKind};
use model::plan::{Epoch, Plan};
use std::sync::Arc;

#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The coordinator wants this plan loaded.
    Load {
        plan: Arc<Plan>,
        model_path: String,
        identity: Vec<u8>,
    },
    /// The coordinator may want this plan next.
    Prepare {
        plan: Arc<Plan>,
        model_path: String,
    },
    Release {
        epoch: Epoch,
    },
    /// All of this worker's ranks have loaded.
    RanksLoaded {
        epoch: Epoch,
        identity: Vec<u8>,
        /// Of their weights, see [`model::proof`].
        proof: Vec<u8>,
    },
    /// A rank failed, while loading or in a step.
    RankFailed {
        epoch: Epoch,
        fault: Fault,
    },
    /// The step stream of an epoch ended.
    StepsClosed {
        epoch: Epoch,
    },
    /// The coordinator's stream ended.
    Disconnected,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    StartRanks {
        plan: Arc<Plan>,
        model_path: String,
    },
    /// Load what the plan will need, beside the ranks that run.
    Prepare {
        plan: Arc<Plan>,
        model_path: String,
    },
    /// Abort collectives, end the threads, free the memory but for the matrices, which the next epoch may need.
    StopRanks {
        epoch: Epoch,
    },
    SayLoaded {
        epoch: Epoch,
        identity: Vec<u8>,
        proof: Vec<u8>,
    },
    SayFailed {
        epoch: Epoch,
        fault: Fault,
    },
    OpenSteps {
        epoch: Epoch,
    },
}

#[derive(Debug, Clone, PartialEq)]
pub enum Phase {
    Idle,
    Loading { epoch: Epoch, expected: Vec<u8> },
    Ready { epoch: Epoch },
}

#[derive(Debug)]
pub struct Agent {
    phase: Phase,
    /// Highest epoch seen; nothing at or below it is ever loaded again, whoever leads. Told at every join, so that the
    /// leader plans above it.
    seen: Epoch,
}

impl Default for Agent {
    fn default() -> Agent {
        Agent { phase: Phase::Idle, seen: Epoch(0) }
    }
}

impl Agent {
    pub fn phase(&self) -> &Phase {
        &self.phase
    }

    pub fn seen(&self) -> Epoch {
        self.seen
    }

    /// The epoch whose ranks exist.
    pub fn epoch(&self) -> Option<Epoch> {
        match self.phase {
            Phase::Idle => None,
            Phase::Loading { epoch, .. } | Phase::Ready { epoch } => Some(epoch),
        }
    }

    /// Whether a step of this epoch is for the ranks that exist; others are dropped.
    pub fn runs(&self, epoch: Epoch) -> bool {
        self.epoch() == Some(epoch)
    }

    pub fn handle(&mut self, event: Event) -> Vec<Action> {
        match event {
            Event::Load { plan, model_path, identity } => self.load(plan, model_path, identity),
            Event::Prepare { plan, .. } if plan.epoch <= self.seen => Vec::new(),
            Event::Prepare { plan, model_path } => vec![Action::Prepare { plan, model_path }],
            Event::Release { epoch } | Event::StepsClosed { epoch } => self.stop(epoch),
            Event::RanksLoaded { epoch, identity, proof } => self.loaded(epoch, identity, proof),
            Event::RankFailed { epoch, fault } => {
                if self.epoch() != Some(epoch) {
                    return Vec::new();
                }
                let mut actions = vec![Action::SayFailed { epoch, fault }];
                actions.extend(self.stop(epoch));
                actions
            }
            Event::Disconnected => self.epoch().map(|epoch| self.stop(epoch)).unwrap_or_default(),
        }
    }

    fn load(&mut self, plan: Arc<Plan>, model_path: String, expected: Vec<u8>) -> Vec<Action> {
        let epoch = plan.epoch;
        if epoch <= self.seen {
            let text = format!("epoch {} is not above {}", epoch.0, self.seen.0);
            return vec![Action::SayFailed { epoch, fault: Fault::new(FaultKind::StaleEpoch, text) }];
        }
        let mut actions = self.epoch().map(|old| self.stop(old)).unwrap_or_default();
        self.seen = epoch;
        self.phase = Phase::Loading { epoch, expected };
        actions.push(Action::StartRanks { plan, model_path });
        actions
    }

    fn loaded(&mut self, epoch: Epoch, identity: Vec<u8>, proof: Vec<u8>) -> Vec<Action> {
        let Phase::Loading { epoch: loading, expected } = &self.phase else { return Vec::new() };
        if *loading != epoch {
            return Vec::new();
        }
        if *expected != identity {
            let text = "this worker's model files differ from the coordinator's".to_string();
            return self.handle(Event::RankFailed { epoch, fault: Fault::new(FaultKind::Incompatible, text) });
        }
        self.phase = Phase::Ready { epoch };
        vec![Action::SayLoaded { epoch, identity, proof }, Action::OpenSteps { epoch }]
    }

    fn stop(&mut self, epoch: Epoch) -> Vec<Action> {
        if self.epoch() != Some(epoch) {
            return Vec::new();
        }
        self.phase = Phase::Idle;
        vec![Action::StopRanks { epoch }]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::mesh::Mesh;
    use model::plan::{Guesser, KernelFamily, Limits};
    use model::quant::Dtype;

    fn load(epoch: u64) -> Event {
        let plan = Plan {
            epoch: Epoch(epoch),
            mesh: Mesh::ONE,
            dtype: Dtype::F32,
            family: KernelFamily::Vector,
            stages: Vec::new(),
            members: Vec::new(),
            limits: Limits { model_len_max: 1, step_tokens_max: 1, step_sequences_max: 1, blocks: 1 },
            guesser: Guesser::Nobody,
        };
        Event::Load { plan: Arc::new(plan), model_path: "m".into(), identity: vec![1] }
    }

    #[test]
    fn a_loaded_worker_says_so_and_opens_its_steps() {
        let mut agent = Agent::default();
        assert!(matches!(agent.handle(load(1))[..], [Action::StartRanks { .. }]));
        let actions = agent.handle(Event::RanksLoaded { epoch: Epoch(1), identity: vec![1], proof: Vec::new() });
        assert!(matches!(actions[..], [Action::SayLoaded { .. }, Action::OpenSteps { epoch: Epoch(1) }]));
    }

    #[test]
    fn a_stale_epoch_is_refused_and_a_newer_one_replaces_the_old() {
        let mut agent = Agent::default();
        agent.handle(load(5));
        assert!(
            matches!(&agent.handle(load(5))[..], [Action::SayFailed { fault, .. }] if fault.kind == FaultKind::StaleEpoch)
        );
        assert!(matches!(
            agent.handle(load(6))[..],
            [Action::StopRanks { epoch: Epoch(5) }, Action::StartRanks { .. }]
        ));
        assert!(agent.handle(Event::RanksLoaded { epoch: Epoch(5), identity: vec![1], proof: Vec::new() }).is_empty());
    }

    #[test]
    fn another_model_is_refused() {
        let mut agent = Agent::default();
        agent.handle(load(1));
        let actions = agent.handle(Event::RanksLoaded { epoch: Epoch(1), identity: vec![2], proof: Vec::new() });
        assert!(matches!(&actions[..], [Action::SayFailed { fault, .. }, Action::StopRanks { .. }]
            if fault.kind == FaultKind::Incompatible));
    }

    #[test]
    fn what_was_left_under_one_leader_is_not_loaded_under_the_next() {
        let mut agent = Agent::default();
        agent.handle(load(5));
        assert!(matches!(agent.handle(Event::Disconnected)[..], [Action::StopRanks { epoch: Epoch(5) }]));
        assert_eq!(agent.seen(), Epoch(5));
        assert!(matches!(agent.handle(load(5))[..], [Action::SayFailed { .. }]));
        assert!(matches!(agent.handle(load(6))[..], [Action::StartRanks { .. }]));
    }

    #[test]
    fn a_release_of_another_epoch_changes_nothing() {
        let mut agent = Agent::default();
        agent.handle(load(2));
        assert!(agent.handle(Event::Release { epoch: Epoch(1) }).is_empty());
        assert!(matches!(agent.handle(Event::Release { epoch: Epoch(2) })[..], [Action::StopRanks { .. }]));
        assert_eq!(agent.phase(), &Phase::Idle);
    }
}
