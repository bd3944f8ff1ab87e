//! The faults of the simulated cluster: one every now and then, of every kind.

use std::sync::Arc;

use model::plan::WorkerId;
use model::step::StepId;

use super::message::{Order, Rpc};
use super::net::{MS, Node, StreamId};
use super::outside::Outside;
use super::world::World;

impl World {
    /// One fault, and the time of the next.
    pub fn fault(&mut self) {
        if !self.faults {
            return;
        }
        let every = self.out.setting.fault_every as usize;
        let next = self.out.net.random.within(every / 4..=every * 7 / 4) as u64;
        self.out.net.world(self.out.net.now() + next, Rpc::Fault);
        let (coordinators, workers) = (self.coordinators.len(), self.workers.len());
        let worker = self.out.net.random.within(0..=workers - 1);
        let coordinator = self.out.net.random.within(0..=coordinators - 1);
        match self.out.net.random.within(0..=19) {
            0 | 1 => {
                let silent = self.out.net.random.once_in(4);
                self.kill_worker(worker, silent);
                self.restart_later(Node::Worker(worker));
            }
            2 => {
                let silent = self.out.net.random.once_in(4);
                self.kill_coordinator(coordinator, silent);
                self.restart_later(Node::Coordinator(coordinator));
            }
            3 => {
                let leader = self.out.leader().unwrap_or(coordinator);
                self.kill_coordinator(leader, false);
                self.restart_later(Node::Coordinator(leader));
            }
            4 => self.pause(Node::Worker(worker)),
            5 => {
                let leader = self.out.leader().unwrap_or(coordinator);
                let node = if self.out.net.random.once_in(2) { leader } else { coordinator };
                self.pause(Node::Coordinator(node));
            }
            6 | 7 => self.slow_link(),
            8 => self.reset(),
            9 | 10 => self.cut(),
            11 => {
                let (factor, time) = (self.out.net.random.within(5..=60) as u64, self.time(8000));
                self.out.fabric.slow.insert(worker, (factor, self.out.net.now() + time));
            }
            12 => {
                let leader = self.out.leader().unwrap_or(coordinator);
                self.out.lose_lease(leader);
            }
            13 => {
                let time = self.time(9000);
                self.out.store_gone = self.out.net.now() + time;
                self.out.net.tally.store_outages += 1;
            }
            14 => self.out.duplicates_until = self.out.net.now() + self.time(5000),
            15 => self.drain(worker),
            16 => {
                if let Some(worker) = &mut self.workers[worker] {
                    self.out.net.tally.leavings += 1;
                    worker.leave(&mut self.out);
                }
            }
            17 => self.resign(coordinator),
            18 => self.stall(worker),
            _ => self.replay(worker),
        }
    }

    /// What ranks say to each other stands still on the way, and nobody's connection ends.
    fn stall(&mut self, number: usize) {
        if let Some(epoch) = self.workers[number].as_ref().and_then(|worker| worker.epoch()) {
            self.out.net.tally.data_stalls += u64::from(self.out.fabric.stall(epoch));
        }
    }

    /// Words of an epoch that is over come again, as from a leader or worker that does not know.
    fn replay(&mut self, number: usize) {
        let Outside { truth, net, .. } = &mut self.out;
        if truth.plans.is_empty() {
            return;
        }
        let plan = truth.plans[net.random.within(0..=truth.plans.len() - 1)].clone();
        let order = Order { epoch: plan.epoch, step: StepId(0), lanes: Arc::new(Vec::new()) };
        let order = net.random.once_in(2).then_some(order);
        let Some(worker) = &self.workers[number] else { return };
        net.tally.replays += 1;
        worker.replay(&mut self.out, plan, order);
    }

    /// How long something lasts; no longer than faults do.
    fn time(&mut self, most_ms: usize) -> u64 {
        let time = self.out.net.random.within(50..=most_ms) as u64 * MS;
        time.min((self.faults_end + MS).saturating_sub(self.out.net.now()))
    }

    pub fn kill_worker(&mut self, number: usize, silent: bool) {
        let Some(worker) = self.workers[number].take() else { return };
        let tally = &mut self.out.net.tally;
        if !worker.ended {
            tally.workers_killed += 1;
            tally.hosts_lost += u64::from(silent);
        }
        match worker.epoch() {
            Some(epoch) if silent => self.out.fabric.vanish(epoch),
            Some(epoch) => self.out.stop_ranks(epoch, &WorkerId(format!("w{number}"))),
            None => {}
        }
        self.out.net.end(Node::Worker(number), silent);
    }

    pub fn kill_coordinator(&mut self, number: usize, silent: bool) {
        let Some(coordinator) = self.coordinators[number].take() else { return };
        let tally = &mut self.out.net.tally;
        tally.coordinators_killed += 1;
        tally.leaders_killed += u64::from(coordinator.lead.is_some());
        tally.hosts_lost += u64::from(silent);
        self.out.truth.leads_no_more(number);
        self.out.leases.remove(&number);
        self.out.cut_off(number);
        self.out.net.end(Node::Coordinator(number), silent);
    }

    /// The last fault of all, after which nobody comes to help: a host that is lost for good where others can do without it,
    /// or a worker's connection that breaks, perhaps while nobody asks for anything.
    pub fn last_fault(&mut self) {
        let workers: Vec<usize> = self.workers.iter().flatten().map(|worker| worker.number).collect();
        let number = workers[self.out.net.random.within(0..=workers.len() - 1)];
        let spare = workers.len() > 1 && (workers.len() - 1) * self.out.setting.devices > 1;
        match self.out.net.random.within(0..=3) {
            0 if spare => {
                self.out.net.tally.lost_for_good += 1;
                self.gone = Some(number);
                self.kill_worker(number, true);
            }
            1 => {
                let of = |(_, client, _): &(StreamId, Node, Node)| *client == Node::Worker(number);
                let streams: Vec<StreamId> = self.out.net.streams().into_iter().filter(of).map(|s| s.0).collect();
                // The youngest is a step stream, if there is one.
                if let Some(stream) = streams.last() {
                    self.out.net.reset(*stream);
                }
            }
            _ => {}
        }
    }

    /// A supervisor starts it again, soon or later.
    pub fn restart_later(&mut self, node: Node) {
        let time = if self.out.net.random.once_in(2) { self.time(400) } else { self.time(6000) };
        let at = self.out.net.now() + time;
        let rpc = match node {
            Node::Coordinator(number) => Rpc::Restart { coordinator: true, number },
            Node::Worker(number) => Rpc::Restart { coordinator: false, number },
            Node::Store => return,
        };
        self.out.net.world(at, rpc);
    }

    /// As SIGSTOP and SIGCONT do.
    fn pause(&mut self, node: Node) {
        if self.out.net.is_alive(node) {
            let time = self.time(7000);
            self.out.net.pause(node, time);
            self.out.net.tally.pauses += 1;
        }
    }

    /// Two processes that talk to each other.
    fn pair(&mut self) -> (Node, Node) {
        let (coordinators, workers) = (self.coordinators.len(), self.workers.len());
        let random = &mut self.out.net.random;
        let a = random.within(0..=coordinators - 1);
        let b = match random.within(0..=3) {
            0 => Node::Store,
            1 if coordinators > 1 => Node::Coordinator((a + random.within(1..=coordinators - 1)) % coordinators),
            2 if workers > 1 => {
                let a = random.within(0..=workers - 1);
                return (Node::Worker(a), Node::Worker((a + random.within(1..=workers - 1)) % workers));
            }
            _ => Node::Worker(random.within(0..=workers - 1)),
        };
        (Node::Coordinator(a), b)
    }

    fn slow_link(&mut self) {
        let (a, b) = self.pair();
        let (time, extra) = (self.time(6000), self.time(1500));
        self.out.net.slow(a, b, time, extra);
    }

    fn cut(&mut self) {
        let (a, b) = self.pair();
        let time = self.time(9000);
        let both = self.out.net.random.once_in(3);
        let (a, b) = if self.out.net.random.once_in(2) { (a, b) } else { (b, a) };
        self.out.net.cut(a, b, time);
        if both {
            self.out.net.cut(b, a, time);
            self.out.net.tally.cuts_both_ways += 1;
        } else {
            self.out.net.tally.cuts_one_way += 1;
        }
    }

    /// A connection breaks, with what is under way; of a worker's streams one or all.
    fn reset(&mut self) {
        let streams = self.out.net.streams();
        if streams.is_empty() {
            return;
        }
        let (one, a, b) = streams[self.out.net.random.within(0..=streams.len() - 1)];
        self.out.net.tally.resets += 1;
        match self.out.net.random.within(0..=3) {
            0 => return self.out.net.reset(one),
            // Exactly between two words.
            1 | 2 => {
                let words = self.out.net.random.within(0..=40);
                return self.out.net.break_in(one, words);
            }
            _ => {}
        }
        for (stream, _, _) in streams.into_iter().filter(|(_, x, y)| (*x, *y) == (a, b)) {
            self.out.net.reset(stream);
        }
    }

    /// An operator asks the leader to do without a worker.
    fn drain(&mut self, number: usize) {
        let leading = self.coordinators.iter_mut().flatten().find(|c| c.lead.is_some());
        let Some(coordinator) = leading else { return };
        self.out.net.tally.drains_asked += 1;
        coordinator.drain(&mut self.out, WorkerId(format!("w{number}")));
    }

    /// SIGTERM of a coordinator: it gives the lead up, and ends some time later.
    fn resign(&mut self, number: usize) {
        let Some(coordinator) = &mut self.coordinators[number] else { return };
        coordinator.resigns = true;
        self.out.net.tally.resignations += 1;
        let at = self.out.net.now() + self.time(8000);
        self.out.net.world(at, Rpc::End { number });
    }
}
