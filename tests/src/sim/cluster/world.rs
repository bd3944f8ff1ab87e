//! One seed of the whole cluster: processes, clients and faults, to the end of every request; or, where faults stop, to the
//! proof that the cluster recovered by itself.

use model::plan::WorkerId;

use super::clients::Client;
use super::coordinator::Coordinator;
use super::message::{Report, Rpc, Task, Word};
use super::net::{Event, MS, Net, Node, SECOND, Side, StreamId};
use super::outside::Outside;
use super::setting::Setting;
use super::tally::Tally;
use super::worker::Worker;
use crate::sim::random::Random;
use coordinator::lead::candidate::Standing;

/// What is to be shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Faults until every request has come to its end.
    Safety,
    /// Faults stop, and the cluster serves whole again within [`RECOVERY`].
    Liveness,
}

/// What a cluster is given to recover once faults stop.
const RECOVERY: u64 = 10 * SECOND;

/// Faults of the safety mode end at last, or some request might never come through.
const FAULTS_LAST: u64 = 60 * SECOND;
const END: u64 = 200 * SECOND;

pub struct World {
    pub out: Outside,
    pub mode: Mode,
    pub coordinators: Vec<Option<Coordinator>>,
    pub workers: Vec<Option<Worker>>,
    pub faults: bool,
    pub faults_end: u64,
    arrived: usize,
    /// Requests that waited when faults stopped.
    waited: Vec<usize>,
    /// When a request last killed a worker.
    killed_at: u64,
    checked: bool,
    /// A worker whose host never comes back.
    pub gone: Option<usize>,
}

/// Runs one seed to its end.
pub fn run(seed: u64, mode: Mode) -> Tally {
    let mut random = Random::new(seed ^ 0xc1u64 << 56);
    let setting = Setting::new(&mut random);
    let (coordinators, workers) = (setting.coordinators, setting.workers);
    let mut world = World {
        out: Outside::new(Net::new(random), setting),
        mode,
        coordinators: (0..coordinators).map(|_| None).collect(),
        workers: (0..workers).map(|_| None).collect(),
        faults: true,
        faults_end: 0,
        arrived: 0,
        waited: Vec::new(),
        killed_at: 0,
        checked: false,
        gone: None,
    };
    world.begin();
    world.live();
    world.check_end();
    world.out.net.tally.two_leaders_believed += world.out.truth.two_believed;
    world.out.net.tally
}

impl World {
    fn begin(&mut self) {
        (0..self.coordinators.len()).for_each(|number| self.start_coordinator(number));
        (0..self.workers.len()).for_each(|number| self.start_worker(number));
        let net = &mut self.out.net;
        net.world(0, Rpc::Arrive { number: 0 });
        let first = net.random.within(0..=2000) as u64 * MS;
        net.world(first, Rpc::Fault);
        let heal = match self.mode {
            Mode::Safety => FAULTS_LAST,
            Mode::Liveness => net.random.within(2000..=15000) as u64 * MS,
        };
        net.world(heal, Rpc::Heal);
        self.faults_end = heal;
    }

    pub fn start_coordinator(&mut self, number: usize) {
        self.out.net.spawn(Node::Coordinator(number));
        self.coordinators[number] = Some(Coordinator::start(number, &mut self.out));
    }

    pub fn start_worker(&mut self, number: usize) {
        self.out.net.spawn(Node::Worker(number));
        self.workers[number] = Some(Worker::start(number, &mut self.out));
    }

    fn live(&mut self) {
        while !self.is_over() {
            let event = self.out.net.next().expect("processes always have something to do");
            assert!(self.out.net.now() < END, "after {} s there still wait:\n{}", END / SECOND, self.describe());
            match event {
                Event::Task { node, task, .. } => self.task(node, task),
                Event::Deliver { stream, to, word } => self.deliver(stream, to, word),
                Event::Ping { .. } | Event::Wake { .. } => {}
                Event::World(rpc) => self.happen(rpc),
            }
        }
    }

    fn task(&mut self, node: Node, task: Task) {
        match node {
            Node::Coordinator(number) => {
                if let Some(coordinator) = &mut self.coordinators[number] {
                    coordinator.task(&mut self.out, task);
                }
            }
            Node::Worker(number) => {
                if let Task::Report { report: Report::Loaded { epoch }, .. } = &task {
                    self.out.truth.loaded(*epoch, WorkerId(format!("w{number}")));
                }
                if let Some(worker) = &mut self.workers[number] {
                    worker.task(&mut self.out, task);
                }
                self.reap(number);
            }
            Node::Store => {}
        }
    }

    fn deliver(&mut self, stream: StreamId, to: Side, word: Word) {
        match self.out.net.node(stream, to) {
            Node::Coordinator(number) => {
                if let Some(coordinator) = &mut self.coordinators[number] {
                    coordinator.word(&mut self.out, stream, to, word);
                }
            }
            Node::Worker(number) => {
                if let Some(worker) = &mut self.workers[number] {
                    worker.word(&mut self.out, stream, word);
                }
                self.reap(number);
            }
            Node::Store => {}
        }
    }

    fn happen(&mut self, rpc: Rpc) {
        if !matches!(rpc, Rpc::Asked { .. } | Rpc::Computed { .. }) {
            self.out.net.say(|| format!("{rpc:?}"));
        }
        match rpc {
            Rpc::Asked { from, life, call, question } => self.out.asked(from, life, call, question),
            Rpc::Computed { epoch, step } => {
                let Outside { fabric, net, .. } = &mut self.out;
                if let Some(victim) = fabric.computed(net, epoch, step) {
                    self.killed_at = self.out.net.now();
                    self.kill_worker(victim, false);
                    self.restart_later(Node::Worker(victim));
                }
            }
            Rpc::ConnectLate { epoch } => {
                let Outside { fabric, net, .. } = &mut self.out;
                fabric.connect_late(net, epoch);
            }
            Rpc::Fault => self.fault(),
            Rpc::Heal => self.heal(),
            Rpc::Arrive { number } => self.arrive(number),
            Rpc::HangUp { request } => self.hang_up(request),
            Rpc::Restart { coordinator: true, number } if self.coordinators[number].is_none() => {
                self.out.net.tally.restarts += 1;
                self.start_coordinator(number);
            }
            Rpc::Restart { coordinator: false, number }
                if self.workers[number].is_none() && self.gone != Some(number) =>
            {
                self.out.net.tally.restarts += 1;
                self.start_worker(number);
            }
            Rpc::Restart { .. } => {}
            Rpc::End { number } => {
                if self.coordinators[number].as_ref().is_some_and(|coordinator| coordinator.resigns) {
                    self.out.lose_lease(number);
                    self.kill_coordinator(number, false);
                    self.restart_later(Node::Coordinator(number));
                }
            }
            Rpc::Check => self.check(),
        }
    }

    /// A worker that has ended is no more.
    fn reap(&mut self, number: usize) {
        if self.workers[number].as_ref().is_some_and(|worker| worker.ended) {
            self.kill_worker(number, false);
            self.restart_later(Node::Worker(number));
        }
    }

    fn arrive(&mut self, number: usize) {
        self.arrived += 1;
        let more = number + 1 < self.out.setting.requests;
        let pause = self.out.net.random.within(0..=self.out.setting.request_every as usize) as u64;
        if more {
            self.out.net.world(self.out.net.now() + pause, Rpc::Arrive { number: number + 1 });
        }
        let coordinator = self.out.net.random.within(0..=self.coordinators.len() - 1);
        self.ask(number, coordinator);
    }

    /// A client comes to a coordinator, if that is there.
    fn ask(&mut self, number: usize, at: usize) {
        let Some(coordinator) = &mut self.coordinators[at] else { return };
        let out = &mut self.out;
        let job = out.setting.job(&mut out.net.random, number);
        let mut client = Client::new(job.clone(), at);
        if out.net.random.once_in(8) {
            client.patience = Some(out.net.random.within(1..=40));
        }
        if job.choices > 1 && out.net.random.once_in(4) {
            let choice = out.net.random.within(0..=job.choices as usize - 1) as u32;
            client.stops = Some((choice, out.net.random.within(1..=30)));
        }
        if out.net.random.once_in(12) {
            let patience = out.net.random.within(0..=3000) as u64 * MS;
            out.net.world(out.net.now() + patience, Rpc::HangUp { request: number });
        }
        out.clients.insert(number, client);
        coordinator.take(out, number, job);
    }

    fn hang_up(&mut self, request: usize) {
        let Some(client) = self.out.clients.get_mut(&request).filter(|client| client.waits()) else { return };
        client.hang_up(&mut self.out.net.tally);
        let at = client.coordinator;
        if let Some(coordinator) = &mut self.coordinators[at] {
            coordinator.cancel(&mut self.out, request);
        }
    }

    /// Faults stop: what is dead comes back, as a supervisor would have it.
    fn heal(&mut self) {
        self.faults = false;
        let out = &mut self.out;
        out.net.heal();
        out.store_gone = out.store_gone.min(out.net.now());
        out.duplicates_until = 0;
        out.fabric.slow.clear();
        self.waited = self.out.waiting();
        // Whoever was asked to end ends.
        for number in 0..self.coordinators.len() {
            if self.coordinators[number].as_ref().is_some_and(|c| c.resigns) {
                self.kill_coordinator(number, false);
            }
        }
        for number in 0..self.workers.len() {
            if self.workers[number].as_ref().is_some_and(|w| !w.stays()) {
                self.kill_worker(number, false);
            }
        }
        for number in 0..self.coordinators.len() {
            self.happen(Rpc::Restart { coordinator: true, number });
        }
        for number in 0..self.workers.len() {
            self.happen(Rpc::Restart { coordinator: false, number });
        }
        if self.mode == Mode::Liveness {
            self.last_fault();
            self.out.net.world(self.out.net.now() + RECOVERY, Rpc::Check);
        }
    }

    /// What must be true some time after the last fault.
    fn check(&mut self) {
        // Killed since by a request of that kind, which is a fault too; each is given up after a few deaths.
        if self.killed_at + RECOVERY > self.out.net.now() {
            return self.out.net.world(self.killed_at + RECOVERY, Rpc::Check);
        }
        let leading: Vec<usize> = self.all_coordinators().filter(|c| c.lead.is_some()).map(|c| c.number).collect();
        let key = self.out.leader();
        assert!(leading.len() == 1 && leading.first().copied() == key, "{leading:?} lead, the key says {key:?}");
        let leader = leading[0];
        for coordinator in self.all_coordinators().filter(|c| c.number != leader) {
            let follows =
                matches!(coordinator.standing(), Standing::Follows { address, .. } if *address == leader.to_string());
            assert!(follows, "coordinator {}: {:?}", coordinator.number, coordinator.standing());
        }
        let lead = self.coordinators[leader].as_ref().and_then(|c| c.lead.as_ref()).expect("it leads");
        let plan = lead.serving().cloned();
        let plan =
            plan.unwrap_or_else(|| panic!("nothing is served: {}; {:?}", lead.cluster.reason(), lead.cluster.phase()));
        for worker in self.workers.iter().flatten().filter(|worker| worker.stays() && !self.is_young(worker.number)) {
            let known = lead.cluster.workers().keys().any(|id| id.0 == format!("w{}", worker.number));
            assert!(known, "w{} is no member", worker.number);
        }
        for member in &plan.members {
            let number: usize = member.worker.0[1..].parse().expect("names are numbered");
            let epoch = self.workers[number].as_ref().and_then(Worker::epoch);
            assert_eq!(epoch, Some(plan.epoch), "{} runs what is served", member.worker.0);
        }
        let waits = |request: &usize| self.waited.contains(request) && self.out.setting.light;
        let late: Vec<String> = self.out.waiting().iter().filter(|r| waits(r)).map(|r| self.describe_one(*r)).collect();
        assert!(late.is_empty(), "after {} s there still wait:\n{}", RECOVERY / SECOND, late.join("\n"));
        self.checked = true;
        self.out.net.tally.checks_of_recovery += 1;
        for at in 0..self.coordinators.len() {
            self.arrived += 1;
            self.ask(self.out.setting.requests + at, at);
        }
    }

    fn is_young(&self, worker: usize) -> bool {
        self.out.net.age(Node::Worker(worker)) < 3 * SECOND
    }

    fn describe_one(&self, request: usize) -> String {
        self.out.clients[&request].describe()
    }

    fn all_coordinators(&self) -> impl Iterator<Item = &Coordinator> {
        self.coordinators.iter().flatten()
    }

    fn is_over(&self) -> bool {
        let all = self.arrived >= self.out.setting.requests;
        let proven = self.mode == Mode::Safety || self.checked;
        all && proven && self.out.waiting().is_empty()
    }

    /// Nothing is left of the requests.
    fn check_end(&self) {
        for coordinator in self.all_coordinators() {
            assert_eq!(coordinator.requests(), 0, "no request is left at coordinator {}", coordinator.number);
        }
    }

    fn describe(&self) -> String {
        let leads = self.all_coordinators().filter_map(|c| Some((c.number, c.lead.as_ref()?)));
        let leads: Vec<String> = leads
            .map(|(n, lead)| format!("{n} leads: {}; {:?}", lead.cluster.reason(), lead.cluster.phase()))
            .collect();
        let waiting: Vec<String> = self.out.waiting().into_iter().map(|r| self.describe_one(r)).collect();
        format!("{}\n{}", waiting.join("\n"), leads.join("\n"))
    }
}
