//! All that is not a process: network, store, ranks, clients, and the truth.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use coordinator::cluster::book;
use coordinator::cluster::ledger::LEADER_KEY;
use coordinator::cluster::store::memory::MemoryStore;
use coordinator::cluster::store::{Lease, Store, StoreError};
use coordinator::lead::candidate;
use coordinator::schedule::job::{Output, Refusal};
use model::fault::Fault;
use model::plan::{Epoch, Plan, WorkerId};

use super::clients::{Client, State};
use super::coordinator::BUILD;
use super::fabric::Fabric;
use super::message::{Order, Question, Reply, Rpc, Task};
use super::net::{MS, Net, Node, SECOND};
use super::setting::Setting;
use super::truth::Truth;

/// When a question to the store is given up (`cluster/store/etcd/link.rs`).
const CALL: u64 = 3 * SECOND;

pub struct Outside {
    pub net: Net,
    pub setting: Setting,
    pub truth: Truth,
    pub fabric: Fabric,
    pub clients: BTreeMap<usize, Client>,
    store: MemoryStore,
    clock: Arc<AtomicU64>,
    /// Until when the store is gone.
    pub store_gone: u64,
    /// Until when what is sent may be sent twice.
    pub duplicates_until: u64,
    pub leases: BTreeMap<usize, Lease>,
    calls: u64,
}

impl Outside {
    pub fn new(net: Net, setting: Setting) -> Outside {
        let clock = Arc::new(AtomicU64::new(0));
        let (begin, ticks) = (Instant::now(), clock.clone());
        let store = MemoryStore::new(move || begin + Duration::from_micros(ticks.load(Ordering::Relaxed)));
        let fabric = Fabric::new(setting.step_max);
        Outside {
            net,
            setting,
            truth: Truth::default(),
            fabric,
            clients: BTreeMap::new(),
            store,
            clock,
            store_gone: 0,
            duplicates_until: 0,
            leases: BTreeMap::new(),
            calls: 0,
        }
    }

    /// Whether something that is sent now arrives twice.
    pub fn duplicates(&mut self) -> bool {
        let twice = self.net.now() < self.duplicates_until && self.net.random.once_in(2);
        self.net.tally.duplicates += u64::from(twice);
        twice
    }

    // The store.

    /// Asks the store; one answer comes, if only that there is none.
    pub fn call(&mut self, from: usize, question: Question) -> u64 {
        self.calls += 1;
        let (call, node) = (self.calls, Node::Coordinator(from));
        let life = self.net.life(node);
        for _ in 0..1 + u64::from(self.duplicates()) {
            let at = self.net.arrival(node, Node::Store);
            self.net.world(at, Rpc::Asked { from, life, call, question: question.clone() });
        }
        let error = StoreError::Unreachable(format!("no answer within {} s", CALL / SECOND));
        let reply = match question {
            Question::Lead(_) => Reply::Lead(Err(error)),
            Question::Plan { .. } => Reply::Plan(book::Answer::Failed(error)),
        };
        self.net.later(CALL, node, Task::Replied { call, reply });
        call
    }

    /// The question has arrived at the store.
    pub fn asked(&mut self, from: usize, life: u64, call: u64, question: Question) {
        self.clock.store(self.net.now(), Ordering::Relaxed);
        let node = Node::Coordinator(from);
        let gone = self.net.now() < self.store_gone;
        let refused = || StoreError::Unreachable("connection refused".into());
        let reply = match question {
            Question::Lead(_) if gone => Reply::Lead(Err(refused())),
            Question::Plan { .. } if gone => Reply::Plan(book::Answer::Failed(refused())),
            Question::Lead(ask) => Reply::Lead(self.lead(from, ask)),
            Question::Plan { ask, term } => {
                self.learn_leader();
                let answer = at_once(book::perform(&self.store, 0, ask, term));
                if let book::Answer::Committed(epoch, _) = &answer {
                    self.net.tally.epochs_committed += 1;
                    self.truth.committed(*epoch, from, &format!("{from} {from}-{life} {BUILD}"));
                }
                let fenced = matches!(&answer, book::Answer::Failed(StoreError::Fenced { .. }));
                self.net.tally.commits_fenced += u64::from(fenced);
                Reply::Plan(answer)
            }
        };
        let lost = self.net.cut_until(Node::Store, node).is_some();
        self.net.tally.answers_lost += u64::from(lost);
        self.net.tally.store_unanswered += u64::from(gone);
        let at = self.net.arrival(Node::Store, node);
        if self.net.life(node) == life {
            self.net.task_at(at, node, Task::Replied { call, reply });
        }
    }

    fn lead(&mut self, from: usize, ask: candidate::Ask) -> Result<candidate::Told, StoreError> {
        let told = at_once(candidate::perform(&self.store, &ask));
        match &ask {
            candidate::Ask::Renew(lease) | candidate::Ask::Attend { lease, .. } if told.is_ok() => {
                self.leases.insert(from, *lease);
            }
            _ => {}
        }
        told
    }

    fn learn_leader(&mut self) {
        let entry = at_once(self.store.get(LEADER_KEY)).expect("a store in memory answers");
        self.truth.leader = entry.map(|e| (String::from_utf8_lossy(&e.value).into_owned(), e.revision));
    }

    /// Who has the leader's key now.
    pub fn leader(&mut self) -> Option<usize> {
        self.clock.store(self.net.now(), Ordering::Relaxed);
        self.learn_leader();
        self.truth.leader.as_ref().and_then(|(value, _)| value.split(' ').next()?.parse().ok())
    }

    /// A coordinator's lease is lost, as after a stop of the store.
    pub fn lose_lease(&mut self, coordinator: usize) {
        if let Some(lease) = self.leases.remove(&coordinator) {
            self.net.tally.leases_lost += 1;
            at_once(self.store.revoke(&lease)).expect("a store in memory answers");
        }
    }

    // Ranks.

    pub fn start_ranks(&mut self, plan: Arc<Plan>, me: WorkerId, number: usize, session: u64) {
        let load = self.setting.load_max;
        self.fabric.start(&mut self.net, plan, me, (number, session), load);
    }

    pub fn stop_ranks(&mut self, epoch: Epoch, me: &WorkerId) {
        self.fabric.stop(&mut self.net, epoch, me);
    }

    pub fn order(&mut self, epoch: Epoch, me: &WorkerId, order: Order) -> Result<(), Fault> {
        self.fabric.order(&mut self.net, epoch, me, order)
    }

    pub fn steps_pending(&self, epoch: Epoch) -> u32 {
        self.fabric.steps_pending(epoch)
    }

    /// How long a worker loads for a plan to come.
    pub fn load_time(&mut self) -> u64 {
        self.net.random.within(0..=self.setting.load_max as usize) as u64 + MS
    }

    // Clients.

    pub fn accepted(&mut self, request: usize) {
        self.clients.get_mut(&request).expect("requests have clients").accepted();
    }

    pub fn refused(&mut self, request: usize, refusal: &Refusal) {
        let client = self.clients.get_mut(&request).expect("requests have clients");
        client.refused(refusal, self.setting.model_len_max, &mut self.net.tally);
    }

    /// Tells a client; false once it hangs up.
    pub fn told(&mut self, request: usize, output: Output) -> bool {
        self.net.say(|| format!("request {request}: {output:?}"));
        self.net.tally.served_without_store += u64::from(self.net.now() < self.store_gone);
        let client = self.clients.get_mut(&request).expect("requests have clients");
        client.told(output, self.setting.model_len_max, &mut self.net.tally)
    }

    pub fn over(&mut self, request: usize) {
        let client = self.clients.get_mut(&request).expect("requests have clients");
        client.over(self.setting.model_len_max, &mut self.net.tally);
    }

    pub fn had_enough(&mut self, request: usize) -> Option<u32> {
        self.clients.get_mut(&request).expect("requests have clients").had_enough(&mut self.net.tally)
    }

    /// Requests that are neither answered nor given up.
    pub fn waiting(&self) -> Vec<usize> {
        self.clients.iter().filter(|(_, client)| client.waits()).map(|(request, _)| *request).collect()
    }

    /// A coordinator died with its clients' sockets.
    pub fn cut_off(&mut self, coordinator: usize) {
        for client in self.clients.values_mut().filter(|client| client.waits() && client.coordinator == coordinator) {
            client.cut_off(&mut self.net.tally);
        }
    }

    pub fn finished(&self) -> usize {
        self.clients.values().filter(|client| client.state == State::Finished).count()
    }
}

/// A store in memory has its answer at once.
fn at_once<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(answer) => answer,
        Poll::Pending => panic!("a store in memory waits"),
    }
}
