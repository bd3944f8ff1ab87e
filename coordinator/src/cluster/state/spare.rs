//! Who stands by: joined, fit, in no plan, while the group serves. A worker's own health can't see that.

use super::{Cluster, Phase, Planner};
use crate::cluster::event::Action;
use model::plan::{Plan, WorkerId};

impl<P: Planner> Cluster<P> {
    /// Tells workers for whom it has changed whether the group serves without them. A newcomer is no spare before it was thought
    /// of planning with it.
    pub(super) fn tell_spares(&mut self, actions: &mut Vec<Action>) {
        let serving = match &self.phase {
            Phase::Serving(plan) => Some(plan.clone()),
            _ => None,
        };
        let thought_of = |id: &WorkerId| {
            self.avoided.contains_key(id) || self.considered.as_ref().is_some_and(|considered| considered.contains(id))
        };
        let has = |plan: &Plan, id: &WorkerId| plan.members.iter().any(|m| m.worker == *id);
        let next = self.reshape.as_ref().map(|reshape| &reshape.plan);
        for (id, worker) in &mut self.workers {
            let fit = worker.unfit.is_none() && worker.drain.is_none();
            let spare = fit
                && serving.as_ref().is_some_and(|plan| !has(plan, id))
                && !next.is_some_and(|plan| has(plan, id))
                && thought_of(id);
            if spare != worker.spare {
                worker.spare = spare;
                actions.push(Action::StandBy { worker: id.clone(), serves: spare });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{OneEach, id, join, ms, serve};
    use super::super::{Event, Rules};
    use super::*;
    use crate::cluster::event::Beat;
    use crate::plan::Offer;
    use model::fault::{Fault, FaultKind};
    use model::plan::Epoch;

    /// On the first worker alone, however many there are.
    struct First;

    impl Planner for First {
        fn plan(&self, epoch: Epoch, members: &[Offer], previous: Option<&Plan>) -> Result<Plan, String> {
            OneEach { refuse: false }.plan(epoch, &members[..1], previous)
        }
    }

    fn told(actions: &[Action]) -> Vec<(WorkerId, bool)> {
        let told = |action: &Action| match action {
            Action::StandBy { worker, serves } => Some((worker.clone(), *serves)),
            _ => None,
        };
        actions.iter().filter_map(told).collect()
    }

    fn alive(c: &mut Cluster<First>, now: u64) -> Vec<Action> {
        let epoch = c.plan().map_or(Epoch(0), |plan| plan.epoch);
        let ids: Vec<WorkerId> = c.workers().keys().cloned().collect();
        let mut actions = Vec::new();
        for worker in ids {
            let of = c.plan().is_some_and(|plan| plan.members.iter().any(|m| m.worker == worker));
            let beat = Beat { epoch: if of { epoch } else { Epoch(0) }, ..Beat::default() };
            actions.extend(c.handle(ms(now), Event::Beat { worker, beat }));
        }
        actions.extend(c.handle(ms(now), Event::Tick));
        actions
    }

    #[test]
    fn a_spare_hears_that_the_group_serves_once_it_was_thought_of_and_no_longer_than_it_does() {
        let rules = Rules { workers: 1, settle: None, silence: ms(1000), retry: ms(100), grow: ms(500) };
        let mut c = Cluster::new(rules, First, Epoch(0));
        join(&mut c, 0, 0);
        serve(&mut c, 1);
        assert_eq!(told(&join(&mut c, 10, 1)), [], "it may be grown onto");
        assert_eq!(told(&alive(&mut c, 400)), []);
        assert_eq!(told(&alive(&mut c, 600)), [(id(1), true)]);
        assert_eq!(told(&alive(&mut c, 700)), [], "once");
        // What serves dies: it is no spare any more, but planned with.
        let actions = c.handle(ms(710), Event::Lost { worker: id(0), why: "killed".into() });
        assert_eq!(told(&actions), [(id(1), false)]);
        serve(&mut c, 720);
        // Another comes, and is set aside: never ready.
        join(&mut c, 730, 2);
        alive(&mut c, 1400);
        assert!(c.workers()[&id(2)].spare);
        let fault = Fault::new(FaultKind::Incompatible, "its weights are not those of w1");
        c.set_aside(ms(1410), &id(2), &fault);
        assert_eq!(told(&alive(&mut c, 1420)), [(id(2), false)]);
    }

    #[test]
    fn a_spare_that_drains_is_none() {
        let rules = Rules { workers: 1, settle: None, silence: ms(1000), retry: ms(100), grow: ms(500) };
        let mut c = Cluster::new(rules, First, Epoch(0));
        join(&mut c, 0, 0);
        serve(&mut c, 1);
        join(&mut c, 10, 1);
        assert_eq!(told(&alive(&mut c, 600)), [(id(1), true)]);
        let actions = c.handle(ms(610), Event::Drain { worker: id(1) });
        assert!(matches!(&actions[..], [Action::Dismiss { worker }] if *worker == id(1)), "{actions:?}");
    }
}
