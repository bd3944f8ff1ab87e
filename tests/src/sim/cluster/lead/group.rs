//! A leader and its group: steps go out, answers come back, and what of them is another epoch's changes nothing.

use std::sync::Arc;

use coordinator::cluster::event::Event;
use coordinator::group::Pending;
use coordinator::schedule::Settings;
use model::fault::{Fault, FaultKind};
use model::plan::{Plan, WorkerId};

use super::{Held, Lead, Serving};
use crate::sim::cluster::fabric::lanes_of;
use crate::sim::cluster::message::{Order, Word};
use crate::sim::cluster::net::Side;
use crate::sim::cluster::outside::Outside;

impl Lead {
    pub(super) fn serve(&mut self, out: &mut Outside, plan: Arc<Plan>) {
        let streams = self.links.streams();
        out.truth.serves(self.number, &plan);
        assert_eq!(streams.len(), plan.members.len(), "every member has a step stream");
        out.net.tally.served += 1;
        let pending = Pending::new(plan.epoch, plan.mesh.data);
        let mut settings = Settings::new(plan.limits, plan.mesh.data);
        settings.steps_in_flight_max = plan.mesh.pipeline;
        settings.steps_ahead = usize::from(plan.mesh.pipeline == 1);
        settings.jobs_waiting_max = out.setting.waiting_max;
        self.serving = Some(Serving { plan, streams, pending });
        let deliveries = self.scheduler.requeue_all(settings);
        self.deliver(out, deliveries);
        self.submit(out);
    }

    /// The group died: what it had in flight is looked at.
    pub(super) fn died(&mut self, out: &mut Outside) {
        out.net.tally.outlived_a_death += self.clients.len() as u64;
        for given_up in self.scheduler.died() {
            assert!(given_up.deaths > 1 && given_up.delivery.last, "one death proves nothing");
            out.net.tally.given_up += 1;
            self.deliver(out, vec![given_up.delivery]);
        }
    }

    fn faulted(&mut self, out: &mut Outside, fault: Fault) {
        let Some(epoch) = self.serving.take().map(|serving| serving.plan.epoch) else { return };
        self.died(out);
        self.feed(out, Event::GroupFault { epoch, fault });
    }

    /// Gives the group all steps that it may have.
    pub fn submit(&mut self, out: &mut Outside) {
        while let Some(serving) = &mut self.serving {
            let Some((step, batch)) = self.scheduler.next(out.net.instant()) else { return };
            serving.pending.submit(step);
            let Serving { plan, streams, .. } = serving;
            let mut broken = None;
            for (worker, Held { stream, .. }) in streams.iter() {
                let lanes = lanes_of(plan, worker);
                let lanes = Arc::new(lanes.into_iter().map(|lane| (lane, batch.lanes[lane].clone())).collect());
                if !out.net.is_open(*stream, Side::Server) {
                    broken.get_or_insert(format!("{} takes no more orders", worker.0));
                }
                out.net.send(*stream, Side::Server, Word::Order(Order { epoch: plan.epoch, step, lanes }));
            }
            if let Some(why) = broken {
                return self.faulted(out, Fault::new(FaultKind::RankLost, why));
            }
        }
    }

    /// Takes what came up the step streams, as far as somebody waits for it.
    pub(super) fn take_answers(&mut self, out: &mut Outside) {
        while let Some(serving) = self.serving.as_mut().filter(|_| self.scheduler.steps_in_flight() > 0) {
            let taken = if let Some((step, result)) = serving.pending.done() {
                let completed = self.scheduler.complete(out.net.instant(), step, result);
                completed.map(|deliveries| {
                    self.deliver(out, deliveries);
                    self.submit(out);
                })
            } else {
                let Some((worker, answer)) = self.answers.pop_front() else { return };
                answer.map_err(|why| lost(&worker, &why)).and_then(|(epoch, told)| {
                    let stale = (epoch != serving.plan.epoch).then(|| format!("{:?}", serving.pending));
                    let taken = serving.pending.take(&worker, epoch, told);
                    if let Some(before) = stale {
                        out.net.tally.stale_answers += 1;
                        assert!(taken.is_ok() && before == format!("{:?}", serving.pending), "a stale answer counted");
                    }
                    taken
                })
            };
            if let Err(fault) = taken {
                assert!(fault.kind != FaultKind::Diverged, "{fault}");
                return self.faulted(out, fault);
            }
        }
    }
}

fn lost(worker: &WorkerId, why: &str) -> Fault {
    Fault::new(FaultKind::RankLost, format!("the step stream of {} closed: {why}", worker.0))
}
