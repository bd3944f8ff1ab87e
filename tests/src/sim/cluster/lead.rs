//! What a coordinator is while it leads: the production `Cluster`, `Book`, `Links`, `Pending` and `Scheduler`, joined as the
//! shells `cluster/driver.rs`, `cluster/ledger.rs`, `group.rs` and `run.rs` join them.

mod group;

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use coordinator::cluster::book::{self, Answer, Book};
use coordinator::cluster::driver::TICK;
use coordinator::cluster::event::{Action, Event};
use coordinator::cluster::links::{Knock, Links};
use coordinator::cluster::service::Said;
use coordinator::cluster::state::{Cluster, Phase};
use coordinator::cluster::store::Revision;
use coordinator::group::{Pending, Told};
use coordinator::schedule::Settings;
use coordinator::schedule::job::{Job, Output, Refusal};
use coordinator::schedule::scheduler::{Delivery, JobId, Scheduler};
use model::plan::{Epoch, Plan, WorkerId};

use super::message::{Command, Question, Task, Word};
use super::net::{Node, Side, StreamId};
use super::outside::Outside;
use super::setting::Maker;

pub struct Lead {
    number: usize,
    /// Tells this reign's timers from another's.
    reign: u64,
    pub term: Option<Revision>,
    began: Duration,
    book: Book,
    asked: Option<(u64, book::Ask)>,
    pub cluster: Cluster<Maker>,
    links: Links<StreamId, Held>,
    dropped: Dropped,
    /// Control streams by who is at their other end.
    joined: BTreeMap<StreamId, WorkerId>,
    /// Step streams of the epoch that is loaded or served, and what came up them.
    steps: BTreeMap<StreamId, WorkerId>,
    answers: VecDeque<Answered>,
    serving: Option<Serving>,
    scheduler: Scheduler,
    clients: BTreeMap<JobId, Client>,
    /// Outputs for clients of this coordinator.
    local: Vec<(usize, Output, bool)>,
    shown: usize,
}

struct Serving {
    plan: Arc<Plan>,
    streams: BTreeMap<WorkerId, Held>,
    pending: Pending,
}

/// What a worker's step stream brought, or why it ended.
type Answered = (WorkerId, Result<(Epoch, Told), String>);

/// A step stream on the coordinator's side: who drops it closes it.
#[derive(Debug)]
struct Held {
    stream: StreamId,
    dropped: Dropped,
}

type Dropped = Rc<RefCell<Vec<StreamId>>>;

impl Drop for Held {
    fn drop(&mut self) {
        self.dropped.borrow_mut().push(self.stream);
    }
}

/// Where a job's outputs go.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Client {
    Here(usize),
    There(StreamId),
}

impl Lead {
    pub fn new(number: usize, term: Option<Revision>, out: &mut Outside) -> Lead {
        let reign = out.net.now();
        let mut cluster = Cluster::new(out.setting.rules.clone(), out.setting.maker.clone(), Epoch(0));
        let unread = Event::StoreLost { why: "the store was not read yet".into() };
        assert!(cluster.handle(Duration::ZERO, unread).is_empty(), "nobody joined yet");
        out.net.tally.terms += 1;
        out.net.later(TICK.as_micros() as u64, Node::Coordinator(number), Task::Tick { reign });
        out.net.later(0, Node::Coordinator(number), Task::Ledger { reign });
        Lead {
            number,
            reign,
            term,
            began: out.net.elapsed(),
            book: Book::new(Duration::ZERO, false),
            asked: None,
            cluster,
            links: Links::new(out.setting.identity()),
            dropped: Dropped::default(),
            joined: BTreeMap::new(),
            steps: BTreeMap::new(),
            answers: VecDeque::new(),
            serving: None,
            scheduler: Scheduler::new(Settings::without_plan(out.setting.waiting_max)),
            clients: BTreeMap::new(),
            local: Vec::new(),
            shown: 0,
        }
    }

    fn node(&self) -> Node {
        Node::Coordinator(self.number)
    }

    fn now(&self, out: &Outside) -> Duration {
        out.net.elapsed() - self.began
    }

    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle() && self.scheduler.load().blocks_used == 0
    }

    pub fn serving(&self) -> Option<&Plan> {
        self.serving.as_ref().map(|serving| &*serving.plan)
    }

    pub fn local(&mut self) -> Vec<(usize, Output, bool)> {
        std::mem::take(&mut self.local)
    }

    /// After each event: closes what was dropped, checks the books, and shows the plan's longest sequence to the others;
    /// returned when it has changed.
    pub fn settle(&mut self, out: &mut Outside) -> Option<usize> {
        self.sweep(out);
        self.scheduler.check_integrity().expect("the books are right");
        let now = self.cluster.plan().map_or(0, |plan| plan.limits.model_len_max);
        if std::mem::replace(&mut self.shown, now) == now {
            return None;
        }
        let made = out.net.now();
        for other in (0..out.setting.coordinators).filter(|other| *other != self.number) {
            out.net.tell(self.node(), Node::Coordinator(other), Task::View { made, model_len_max: now });
        }
        Some(now)
    }

    /// Ends the reign: every stream closes.
    pub fn close(&mut self, out: &mut Outside) {
        self.serving = None;
        self.links.close();
        self.sweep(out);
        for stream in std::mem::take(&mut self.joined).into_keys() {
            out.net.close(stream, Side::Server);
        }
        for client in std::mem::take(&mut self.clients).into_values() {
            if let Client::There(stream) = client {
                out.net.close(stream, Side::Server);
            }
        }
    }

    // The ledger.

    pub fn look_up(&mut self, out: &mut Outside, reign: u64) {
        if reign == self.reign {
            self.ledger(out);
        }
    }

    fn ledger(&mut self, out: &mut Outside) {
        if self.asked.is_some() {
            return;
        }
        let (now, due) = (self.now(out), self.book.due());
        if due > now {
            let wait = (due - now).as_micros() as u64;
            return out.net.later(wait, self.node(), Task::Ledger { reign: self.reign });
        }
        let ask = self.book.ask();
        let call = out.call(self.number, Question::Plan { ask, term: self.term });
        self.asked = Some((call, ask));
    }

    pub fn told(&mut self, out: &mut Outside, call: u64, answer: Answer) {
        let Some((_, ask)) = self.asked.take_if(|(asked, _)| *asked == call) else { return };
        out.net.tally.commits_refused += u64::from(matches!(answer, Answer::Lost(..)));
        if let Some(event) = self.book.answered(self.now(out), ask, answer) {
            self.feed(out, event);
        }
        self.ledger(out);
    }

    // The cluster.

    pub fn tick(&mut self, out: &mut Outside, reign: u64) {
        if reign == self.reign {
            out.net.later(TICK.as_micros() as u64, self.node(), Task::Tick { reign });
            self.feed(out, Event::Tick);
        }
    }

    pub fn drain(&mut self, out: &mut Outside, worker: WorkerId) {
        self.feed(out, Event::Drain { worker });
    }

    fn feed(&mut self, out: &mut Outside, event: Event) {
        let said = if out.net.traces() { format!("{event:?}") } else { String::new() };
        let actions = self.cluster.handle(self.now(out), event);
        self.say(out, &said, &actions);
        self.perform_all(out, actions);
    }

    fn perform_all(&mut self, out: &mut Outside, actions: Vec<Action>) {
        for action in actions {
            self.perform(out, action);
        }
        self.links.only(self.cluster.plan().map(|plan| plan.epoch));
    }

    fn say(&self, out: &Outside, event: &str, actions: &[Action]) {
        if !event.starts_with("Beat") && event != "Tick" || !actions.is_empty() {
            out.net.say(|| format!("c{}: {event:.90} -> {}", self.number, brief(actions)));
        }
    }

    fn perform(&mut self, out: &mut Outside, action: Action) {
        match action {
            Action::Commit { plan } => {
                self.book.commit(plan.epoch);
                self.asked.take_if(|(_, ask)| *ask == book::Ask::Read);
                self.ledger(out);
            }
            Action::Load { worker, plan } => {
                out.truth.asks_to_load(&plan);
                if self.links.open(&plan) {
                    self.steps.clear();
                    self.answers.clear();
                }
                self.command(out, &worker, Command::Load(plan));
            }
            Action::Prepare { worker, plan } => self.command(out, &worker, Command::Prepare(plan)),
            Action::Dismiss { worker } => {
                out.net.tally.drained += 1;
                self.command(out, &worker, Command::Drained);
                self.expel(out, &worker);
            }
            Action::Release { worker, epoch } => self.command(out, &worker, Command::Release(epoch)),
            Action::Expel { worker, .. } => self.expel(out, &worker),
            Action::Serve { plan } => self.serve(out, plan),
            // For a worker's health alone.
            Action::StandBy { .. } => {}
            Action::Halt { why, .. } => {
                out.net.tally.halted_while_stuck += u64::from(why.starts_with("nothing moves"));
                let died = !matches!(self.cluster.phase(), Phase::Loading(_));
                out.net.tally.halted_by_death += u64::from(died);
                out.net.tally.reshaped += u64::from(!died);
                self.links.close();
                if self.serving.take().is_some() && died {
                    self.died(out);
                }
            }
        }
    }

    fn command(&self, out: &mut Outside, worker: &WorkerId, command: Command) {
        if let Some(stream) = self.links.commands(worker) {
            out.net.send(*stream, Side::Server, Word::Command(command));
        }
    }

    fn expel(&mut self, out: &mut Outside, worker: &WorkerId) {
        if let Some(stream) = self.links.remove(worker) {
            out.net.finish(stream, Side::Server);
        }
    }

    /// Closes the step streams that were dropped.
    fn sweep(&mut self, out: &mut Outside) {
        for stream in self.dropped.take() {
            out.net.close(stream, Side::Server);
        }
    }

    /// A word on a stream that somebody opened.
    pub fn word(&mut self, out: &mut Outside, stream: StreamId, word: Word) {
        match word {
            Word::Join { offer, seen } => {
                self.feed(out, Event::Seen { epoch: seen });
                let worker = offer.worker.clone();
                out.net.tally.joined_again += u64::from(self.cluster.workers().contains_key(&worker));
                let serves = matches!(self.cluster.phase(), Phase::Serving(_));
                out.net.tally.newcomers += u64::from(serves && !self.cluster.workers().contains_key(&worker));
                let mut actions = self.cluster.handle(self.now(out), Event::Joined { offer });
                self.say(out, &format!("{} joined", worker.0), &actions);
                self.joined.insert(stream, worker.clone());
                if let Some(older) = self.links.add(worker, stream.number(), stream, &mut actions) {
                    out.net.finish(older, Side::Server);
                }
                self.perform_all(out, actions);
            }
            Word::Said(said) => self.said(out, stream, said),
            Word::Steps { worker, epoch } => {
                let held = Held { stream, dropped: self.dropped.clone() };
                match self.links.knocks(&worker, epoch, held) {
                    Knock::Open(held) => self.open(out, worker, epoch, held),
                    Knock::Kept => out.net.tally.steps_overtook_loaded += 1,
                    Knock::Refused(_) => out.net.tally.step_streams_refused += 1,
                }
            }
            Word::Answer { epoch, told } => {
                if let Some(worker) = self.steps.get(&stream).cloned() {
                    self.answers.push_back((worker, Ok((epoch, told))));
                    self.take_answers(out);
                }
            }
            Word::Carry(job) => self.carry(out, stream, *job),
            Word::Enough(choice) => {
                if let Some(job) = self.job_of(stream) {
                    self.enough(job, choice);
                }
            }
            Word::Closed(why) => self.closed(out, stream, why),
            other => unreachable!("{other:?} is no word for a leader"),
        }
    }

    fn said(&mut self, out: &mut Outside, stream: StreamId, said: Said) {
        let Some(worker) = self.joined.get(&stream).cloned() else { return };
        if !self.links.is_current(&worker, stream.number()) {
            out.net.tally.words_of_older_connections += 1;
            return;
        }
        let serving = match self.cluster.phase() {
            Phase::Serving(plan) => Some(plan.epoch),
            _ => None,
        };
        if matches!(said, Said::Failed { .. }) {
            out.net.tally.worker_faults += 1;
        }
        let event = self.links.said(worker.clone(), said, serving);
        if let Some(event) = event {
            out.net.tally.load_failures += u64::from(matches!(event, Event::LoadFailed { .. }));
            self.feed(out, event);
        }
        if let Some((epoch, held)) = self.links.proven(&worker) {
            self.open(out, worker, epoch, held);
        }
    }

    fn open(&mut self, out: &mut Outside, worker: WorkerId, epoch: Epoch, held: Held) {
        out.net.send(held.stream, Side::Server, Word::StepsAccepted);
        self.steps.insert(held.stream, worker.clone());
        self.links.opened(worker.clone(), held);
        self.feed(out, Event::Ready { worker, epoch });
    }

    fn closed(&mut self, out: &mut Outside, stream: StreamId, why: String) {
        if let Some(worker) = self.joined.remove(&stream) {
            if self.links.is_current(&worker, stream.number()) {
                self.feed(out, Event::Lost { worker, why });
            }
        } else if let Some(worker) = self.steps.get(&stream).cloned() {
            self.answers.push_back((worker, Err(why)));
            self.take_answers(out);
        } else if let Some(job) = self.job_of(stream) {
            self.cancel(job);
        }
    }

    // Requests.

    pub fn add(&mut self, out: &mut Outside, request: usize, job: Job) -> Result<JobId, Refusal> {
        let id = self.scheduler.add(out.net.instant(), job)?;
        self.clients.insert(id, Client::Here(request));
        Ok(id)
    }

    fn carry(&mut self, out: &mut Outside, stream: StreamId, job: Job) {
        match self.scheduler.add(out.net.instant(), job) {
            Ok(id) => {
                self.clients.insert(id, Client::There(stream));
                out.net.send(stream, Side::Server, Word::Entered(Ok(())));
                self.submit(out);
            }
            Err(refusal) => {
                out.net.send(stream, Side::Server, Word::Entered(Err(refusal)));
                out.net.close(stream, Side::Server);
            }
        }
    }

    fn job_of(&self, stream: StreamId) -> Option<JobId> {
        self.clients.iter().find(|(_, client)| **client == Client::There(stream)).map(|(job, _)| *job)
    }

    pub fn cancel(&mut self, job: JobId) {
        if self.clients.remove(&job).is_some() {
            self.scheduler.cancel(job);
        }
    }

    pub fn enough(&mut self, job: JobId, choice: u32) {
        self.scheduler.cancel_choice(job, choice);
    }

    fn deliver(&mut self, out: &mut Outside, deliveries: Vec<Delivery>) {
        for Delivery { job, output, last } in deliveries {
            let Some(client) = self.clients.get(&job).copied() else { continue };
            if last {
                self.clients.remove(&job);
            }
            match client {
                Client::Here(request) => self.local.push((request, output, last)),
                Client::There(stream) => {
                    out.net.send(stream, Side::Server, Word::Output(output));
                    if last {
                        out.net.close(stream, Side::Server);
                    }
                }
            }
        }
    }
}

/// Actions for people.
fn brief(actions: &[Action]) -> String {
    let one = |action: &Action| match action {
        Action::Commit { plan } => format!("commit {} {}", plan.epoch.0, plan.mesh),
        Action::Load { worker, plan } => format!("load {} {}", worker.0, plan.epoch.0),
        Action::Prepare { worker, plan } => format!("prepare {} {}", worker.0, plan.epoch.0),
        Action::Serve { plan } => format!("serve {}", plan.epoch.0),
        other => format!("{other:?}"),
    };
    actions.iter().map(one).collect::<Vec<_>>().join(", ")
}
