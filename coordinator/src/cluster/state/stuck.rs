//! An epoch in which nothing moves though everyone lives: its ranks wait for each other, and what they wait for is lost on the
//! way. Sockets whose other end answers, as those through a middlebox that stands still, tell nobody.

use super::{Cluster, Phase, Planner, Worker};
use crate::cluster::event::Action;
use std::time::Duration;

impl<P: Planner> Cluster<P> {
    /// Ends the epoch that serves where every member's ranks wait within collectives, or have no step, and no byte has moved
    /// for most of a silence. A rank that computes, however long, is waited for.
    pub(super) fn stuck(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let Phase::Serving(plan) = &self.phase else { return };
        let members: Option<Vec<&Worker>> = plan.members.iter().map(|m| self.workers.get(&m.worker)).collect();
        let Some(members) = members else { return };
        let of_now = |worker: &&Worker| worker.beat.epoch == plan.epoch;
        if !members.iter().all(of_now) {
            return;
        }
        let (waiting, others): (Vec<&Worker>, _) = members.iter().partition(|worker| !worker.beat.waiting.is_zero());
        let Some(least) = waiting.iter().map(|worker| worker.beat.waiting).min() else { return };
        // Beats are some time apart: with what they take this is noticed within about a silence.
        if least < self.rules.silence * 4 / 5 || others.iter().any(|worker| worker.beat.steps_pending > 0) {
            return;
        }
        let (epoch, ms) = (plan.epoch.0, least.as_millis());
        let why = format!(
            "nothing moves in epoch {epoch}: {} of {} workers have waited for others for {ms} ms",
            waiting.len(),
            members.len()
        );
        self.stand_down(now, why, actions);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{OneEach, id, ms, served_by};
    use super::super::{Beat, Event};
    use super::*;

    /// Beats of two members: how long each has waited, and its steps.
    fn beats(c: &mut Cluster<OneEach>, now: u64, said: [(u64, u32); 2]) -> Vec<Action> {
        let epoch = c.epoch();
        for (n, (waiting, steps_pending)) in said.into_iter().enumerate() {
            let beat = Beat { epoch, waiting: ms(waiting), steps_pending, ..Beat::default() };
            assert!(c.handle(ms(now), Event::Beat { worker: id(n), beat }).is_empty());
        }
        c.handle(ms(now), Event::Tick)
    }

    #[test]
    fn an_epoch_whose_ranks_all_wait_for_each_other_ends() {
        let mut c = served_by(2);
        assert!(beats(&mut c, 300, [(0, 1), (0, 1)]).is_empty());
        assert!(beats(&mut c, 600, [(799, 1), (900, 1)]).is_empty());
        let actions = beats(&mut c, 900, [(800, 1), (1100, 1)]);
        assert!(matches!(&actions[..], [Action::Halt { .. }, Action::Release { .. }, Action::Release { .. }, ..]));
        assert!(c.reason().contains("2 of 2 workers have waited for others for 800 ms"), "{}", c.reason());
    }

    #[test]
    fn a_worker_whose_step_never_came_is_not_waited_for() {
        let mut c = served_by(2);
        assert!(!beats(&mut c, 900, [(900, 1), (0, 0)]).is_empty());
        assert!(c.reason().contains("1 of 2 workers"), "{}", c.reason());
    }

    #[test]
    fn whoever_computes_is_waited_for_however_long_and_idle_workers_for_ever() {
        let mut c = served_by(2);
        for now in (300..60_000).step_by(300) {
            assert!(beats(&mut c, now, [(now, 1), (0, 1)]).is_empty(), "{now}");
        }
        for now in (60_000..120_000).step_by(300) {
            assert!(beats(&mut c, now, [(0, 0), (0, 0)]).is_empty(), "{now}");
        }
    }
}
