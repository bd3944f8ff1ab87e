//! The ranks of all epochs: they connect, load, and compute a step together as soon as each worker has its order. What they
//! tell goes to their worker's session.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use model::fault::{Fault, FaultKind};
use model::mesh::Place;
use model::plan::{Epoch, Plan, WorkerId};
use model::step::{LaneResult, StepId};

use super::message::{Order, Report, Rpc, Task};
use super::net::{MS, Net, Node, SECOND};
use crate::sim::profile::KILLER;
use crate::sim::rank::Rank;

/// How long ranks wait for their peers (`collective/connect.rs`).
const DEADLINE: u64 = 10 * SECOND;

#[derive(Default)]
pub struct Fabric {
    groups: BTreeMap<Epoch, Group>,
    /// Workers that compute slowly, how much, and until when.
    pub slow: BTreeMap<usize, (u64, u64)>,
    step_max: u64,
}

/// The ranks of an epoch.
struct Group {
    plan: Arc<Plan>,
    seats: BTreeMap<WorkerId, Seat>,
    connected: bool,
    aborted: bool,
    /// A host is gone, or its words are lost on the way, and no connection says so.
    frozen: bool,
    /// What is computed now.
    computing: Option<(StepId, Vec<(WorkerId, Order)>)>,
    /// Of each worker and lane: all its ranks there do the same.
    ranks: BTreeMap<(WorkerId, usize), Rank>,
}

/// A worker's ranks.
struct Seat {
    number: usize,
    session: u64,
    orders: VecDeque<Order>,
}

impl Fabric {
    /// Ranks that compute a step in at most so long.
    pub fn new(step_max: u64) -> Fabric {
        Fabric { step_max, ..Fabric::default() }
    }

    pub fn start(&mut self, net: &mut Net, plan: Arc<Plan>, me: WorkerId, (number, session): (usize, u64), load: u64) {
        let epoch = plan.epoch;
        let group = self.groups.entry(epoch).or_insert_with(|| Group {
            plan: plan.clone(),
            seats: BTreeMap::new(),
            connected: false,
            aborted: false,
            frozen: false,
            computing: None,
            ranks: BTreeMap::new(),
        });
        assert_eq!(*group.plan, *plan, "one plan an epoch");
        group.seats.insert(me.clone(), Seat { number, session, orders: VecDeque::new() });
        if group.aborted {
            return group.fail(net, &me, FaultKind::Aborted, "a peer is gone");
        }
        for lane in lanes_of(&plan, &me) {
            group.ranks.insert((me.clone(), lane), Rank::new(plan.limits));
        }
        net.world(net.now() + DEADLINE, Rpc::ConnectLate { epoch });
        if group.seats.len() == plan.members.len() && !group.frozen {
            group.connected = true;
            let seats: Vec<WorkerId> = group.seats.keys().cloned().collect();
            for seat in seats {
                let time = net.random.within(0..=load as usize) as u64;
                group.report(net, &seat, time, Report::Loaded { epoch });
            }
        }
    }

    /// A worker's ranks are gone; the others learn of it at once, or when they next need them.
    pub fn stop(&mut self, net: &mut Net, epoch: Epoch, me: &WorkerId) {
        let Some(group) = self.groups.get_mut(&epoch) else { return };
        group.seats.remove(me);
        group.abort(net, FaultKind::Aborted, "a peer is gone");
        if group.seats.is_empty() {
            self.groups.remove(&epoch);
        }
    }

    /// A host with ranks of the epoch is gone: its peers wait for it.
    pub fn vanish(&mut self, epoch: Epoch) {
        if let Some(group) = self.groups.get_mut(&epoch) {
            group.frozen = true;
        }
    }

    /// Queues a step for a worker's ranks.
    pub fn order(&mut self, net: &mut Net, epoch: Epoch, me: &WorkerId, order: Order) -> Result<(), Fault> {
        let gone = |text: &str| Err(Fault::new(FaultKind::Aborted, text));
        let Some(group) = self.groups.get_mut(&epoch) else { return gone("no ranks are there") };
        assert_eq!(order.epoch, epoch, "ranks are given another epoch's step");
        if group.aborted {
            return gone("a peer is gone");
        }
        group.seats.get_mut(me).expect("whoever has ranks has a seat").orders.push_back(order);
        self.compute(net, epoch);
        Ok(())
    }

    pub fn steps_pending(&self, epoch: Epoch) -> u32 {
        let Some(group) = self.groups.get(&epoch) else { return 0 };
        u32::from(group.computing.is_some()) + group.seats.values().map(|s| s.orders.len() as u32).max().unwrap_or(0)
    }

    /// Connections between the ranks of the epoch stand still, if there are any yet; whether there are.
    pub fn stall(&mut self, epoch: Epoch) -> bool {
        let group = self.groups.get_mut(&epoch).filter(|group| group.connected && group.seats.len() > 1);
        group.map(|group| group.frozen = true).is_some()
    }

    /// Whether ranks have a step and wait for others that are not heard.
    pub fn waits(&self, epoch: Epoch) -> bool {
        self.groups.get(&epoch).is_some_and(|group| group.frozen) && self.steps_pending(epoch) > 0
    }

    /// Begins a step that every worker has.
    fn compute(&mut self, net: &mut Net, epoch: Epoch) {
        let Some(group) = self.groups.get_mut(&epoch) else { return };
        let all = group.seats.values().all(|seat| !seat.orders.is_empty());
        if group.aborted
            || group.frozen
            || group.computing.is_some()
            || !all
            || group.seats.len() < group.plan.members.len()
        {
            return;
        }
        let orders: Vec<(WorkerId, Order)> = group
            .seats
            .iter_mut()
            .map(|(id, seat)| (id.clone(), seat.orders.pop_front().expect("each has one")))
            .collect();
        let step = orders[0].1.step;
        assert!(orders.iter().all(|(_, order)| order.step == step), "all ranks compute one step");
        let now = net.now();
        let mut time = net.random.within(100..=self.step_max as usize) as u64;
        let nodes: Vec<usize> = group.seats.values().map(|seat| seat.number).collect();
        for (i, &a) in nodes.iter().enumerate() {
            if let Some((factor, until)) = self.slow.get(&a)
                && *until > now
            {
                time *= factor;
                net.tally.slow_ranks += 1;
            }
            for &b in &nodes[i + 1..] {
                let (a, b) = (Node::Worker(a), Node::Worker(b));
                let cut = net.cut_until(a, b).max(net.cut_until(b, a));
                net.tally.data_cuts += u64::from(cut.is_some());
                time = time.max(cut.map_or(0, |until| until - now));
            }
        }
        group.computing = Some((step, orders));
        net.world(now + time.min(DEADLINE), Rpc::Computed { epoch, step });
        if time >= DEADLINE {
            group.abort(net, FaultKind::Timeout, "a peer did not come to a collective");
        }
    }

    /// A step is computed; the worker that dies of it, if one does.
    pub fn computed(&mut self, net: &mut Net, epoch: Epoch, step: StepId) -> Option<usize> {
        let group = self.groups.get_mut(&epoch).filter(|group| !group.aborted && !group.frozen)?;
        let (computed, orders) = group.computing.take()?;
        assert_eq!(computed, step, "one step at a time");
        if let Some((id, _)) = orders.iter().find(|(_, order)| kills(order)) {
            return Some(group.seats[id].number);
        }
        let mut results: BTreeMap<usize, LaneResult> = BTreeMap::new();
        for (id, order) in &orders {
            for (lane, batch) in order.lanes.iter() {
                let rank = group.ranks.get_mut(&(id.clone(), *lane)).expect("the order names the worker's lanes");
                let result = rank.step(batch);
                let known = results.entry(*lane).or_insert_with(|| result.clone());
                assert_eq!(*known, result, "the ranks of a lane agree");
            }
        }
        for (lane, result) in results {
            let leader = group.leader(lane);
            let delay = net.random.within(10..=200) as u64;
            group.report(net, &leader, delay, Report::Answer { epoch, step, lane, result });
        }
        self.compute(net, epoch);
        None
    }

    pub fn connect_late(&mut self, net: &mut Net, epoch: Epoch) {
        if let Some(group) = self.groups.get_mut(&epoch).filter(|group| !group.connected) {
            group.abort(net, FaultKind::Timeout, "a peer did not connect within 10 s");
        }
    }
}

impl Group {
    /// Whose rank answers for a lane.
    fn leader(&self, lane: usize) -> WorkerId {
        let mesh = self.plan.mesh;
        let rank = mesh.rank(Place { stage: mesh.pipeline - 1, lane, slice: 0 });
        self.plan.members.iter().find(|m| m.ranks.contains(&rank)).expect("every rank has a member").worker.clone()
    }

    fn abort(&mut self, net: &mut Net, kind: FaultKind, text: &str) {
        if std::mem::replace(&mut self.aborted, true) {
            return;
        }
        let all: Vec<WorkerId> = self.seats.keys().cloned().collect();
        for seat in all {
            let busy = self.computing.is_some() || !self.seats[&seat].orders.is_empty() || !self.connected;
            // An idle rank learns of it with its next order.
            if busy || net.random.once_in(2) {
                self.fail(net, &seat, kind, text);
            }
        }
    }

    fn fail(&self, net: &mut Net, seat: &WorkerId, kind: FaultKind, text: &str) {
        let delay = net.random.within(0..=60) as u64 * MS;
        let fault = Fault::new(kind, text);
        self.report(net, seat, delay, Report::Failed { epoch: self.plan.epoch, fault });
    }

    fn report(&self, net: &mut Net, seat: &WorkerId, delay: u64, report: Report) {
        let Some(Seat { number, session, .. }) = self.seats.get(seat) else { return };
        net.later(delay, Node::Worker(*number), Task::Report { session: *session, report });
    }
}

/// The lanes that a worker's ranks serve.
pub fn lanes_of(plan: &Plan, worker: &WorkerId) -> Vec<usize> {
    let ranks = plan.members.iter().filter(|m| m.worker == *worker).flat_map(|m| &m.ranks);
    let mut lanes: Vec<usize> = ranks.map(|&rank| plan.mesh.place(rank).lane).collect();
    lanes.sort_unstable();
    lanes.dedup();
    lanes
}

/// Whether a step makes the process of its ranks die.
fn kills(order: &Order) -> bool {
    order.lanes.iter().flat_map(|(_, lane)| &lane.chunks).any(|chunk| chunk.tokens.contains(&KILLER))
}
