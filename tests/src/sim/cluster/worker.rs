//! A simulated worker process: the production `Agent`, with what the shell `agent/driver.rs` does around it. Its ranks are
//! in [`super::fabric`].

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use coordinator::cluster::event::Beat;
use coordinator::cluster::service::Said;
use model::fault::{Fault, FaultKind};
use model::plan::{Epoch, Plan, WorkerId};
use model::step::StepId;
use worker::agent::state::{Action, Agent, Event, Phase};

use super::message::{Command, Order, Report, Task, Word};
use super::net::{MS, Node, SECOND, Side, StreamId};
use super::outside::Outside;

/// Between two beats (`run.rs`), and between two rounds through all coordinators (`agent/door.rs`).
const BEAT: u64 = 300 * MS;
const RECONNECT: u64 = 300 * MS;

/// A worker that shall end and is still needed ends anyway.
const PATIENCE: u64 = 20 * SECOND;

pub struct Worker {
    pub number: usize,
    agent: Agent,
    session: Option<Session>,
    sessions: u64,
    /// Coordinators that are left of this round, and the one that was tried last.
    left: Vec<usize>,
    last: Option<usize>,
    leaving: bool,
    pub ended: bool,
    progress: u64,
    /// Of which epoch the ranks wait for others, and since when.
    waiting: Option<(Epoch, Duration)>,
    /// The highest epoch whose ranks this process started.
    started: Epoch,
}

/// One connection to a coordinator.
struct Session {
    number: u64,
    control: StreamId,
    coordinator: usize,
    /// A step stream that is asked for: nothing else is done before the answer.
    asking: Option<(StreamId, Epoch)>,
    /// Ranks are being ended: nothing else is done.
    stopping: bool,
    waiting: VecDeque<Input>,
    steps: Option<StreamId>,
    ranks: Option<Epoch>,
}

/// What a session takes in, one at a time.
#[derive(Debug)]
enum Input {
    Command(Command),
    Report(Report),
    Order(StreamId, Order),
    StepsClosed(StreamId),
    Gone,
    Leave,
}

impl Worker {
    /// A process that has just started.
    pub fn start(number: usize, out: &mut Outside) -> Worker {
        let node = Node::Worker(number);
        let wait = out.net.random.within(0..=200) as u64 * MS;
        out.net.later(wait, node, Task::Connect);
        Worker {
            number,
            agent: Agent::default(),
            session: None,
            sessions: 0,
            left: Vec::new(),
            last: None,
            leaving: false,
            ended: false,
            progress: 0,
            waiting: None,
            started: Epoch(0),
        }
    }

    fn node(&self) -> Node {
        Node::Worker(self.number)
    }

    fn id(&self) -> WorkerId {
        WorkerId(format!("w{}", self.number))
    }

    /// An old word comes again: on the control stream, or on the step stream.
    pub fn replay(&self, out: &mut Outside, plan: Arc<Plan>, order: Option<Order>) {
        let Some(session) = &self.session else { return };
        if plan.epoch > self.started {
            return;
        }
        let order = order.filter(|order| Some(order.epoch) != session.ranks);
        match (session.steps, order) {
            (Some(stream), Some(order)) => out.net.send(stream, Side::Server, Word::Order(order)),
            _ => out.net.send(session.control, Side::Server, Word::Command(Command::Load(plan))),
        }
        // And a word of an epoch that this worker has left.
        let Some(old) = self.started.0.checked_sub(1).map(Epoch) else { return };
        if let Some(stream) = session.steps {
            out.net.send(stream, Side::Client, Word::Answer { epoch: old, told: Ok((StepId(0), Vec::new())) });
        }
        self.say(out, Said::Failed { epoch: old, fault: Fault::new(FaultKind::Internal, "an old fault") });
        self.say(out, Said::Prepared { epoch: old });
        self.say(out, Said::Loaded { epoch: old, identity: out.setting.identity(), digests: Vec::new() });
        let stream = out.net.open(self.node(), Node::Coordinator(session.coordinator));
        out.net.send(stream, Side::Client, Word::Steps { worker: self.id(), epoch: old });
    }

    /// It is to be a member.
    pub fn stays(&self) -> bool {
        !self.leaving && !self.ended
    }

    pub fn epoch(&self) -> Option<Epoch> {
        self.session.as_ref().and_then(|session| session.ranks)
    }

    /// It is asked to end.
    pub fn leave(&mut self, out: &mut Outside) {
        if !std::mem::replace(&mut self.leaving, true) {
            out.net.later(PATIENCE, self.node(), Task::Overdue);
            self.input(out, Input::Leave);
        }
    }

    pub fn task(&mut self, out: &mut Outside, task: Task) {
        match task {
            Task::Connect => self.connect(out),
            Task::Beat { session } if self.is(session) => {
                out.net.later(BEAT, self.node(), Task::Beat { session });
                self.beat(out);
            }
            Task::Report { session, report } if self.is(session) => self.input(out, Input::Report(report)),
            Task::Unblock { session } if self.is(session) => {
                if let Some(session) = &mut self.session {
                    session.stopping = false;
                }
                self.go_on(out);
            }
            Task::Beat { .. } | Task::Report { .. } | Task::Unblock { .. } => {}
            Task::Overdue => self.ended = true,
            other => unreachable!("{other:?} is no worker's"),
        }
    }

    fn is(&self, number: u64) -> bool {
        self.session.as_ref().is_some_and(|session| session.number == number)
    }

    fn connect(&mut self, out: &mut Outside) {
        assert!(self.session.is_none(), "one session at a time");
        let coordinator = self.next_door(out.setting.coordinators);
        self.sessions += 1;
        let number = self.sessions;
        out.net.say(|| format!("w{}: connects to c{coordinator}", self.number));
        let control = out.net.open(self.node(), Node::Coordinator(coordinator));
        out.net.send(
            control,
            Side::Client,
            Word::Join { offer: out.setting.offer(self.number), seen: self.agent.seen() },
        );
        self.session = Some(Session {
            number,
            control,
            coordinator,
            asking: None,
            stopping: false,
            waiting: VecDeque::new(),
            steps: None,
            ranks: None,
        });
        if self.leaving {
            self.input(out, Input::Leave);
        }
        out.net.later(BEAT, self.node(), Task::Beat { session: number });
    }

    /// As `agent/door.rs`: in rounds, whoever was tried last at the end of the next one.
    fn next_door(&mut self, coordinators: usize) -> usize {
        if self.left.is_empty() {
            self.left = (0..coordinators).rev().collect();
            if let Some(at) = self.left.iter().position(|door| Some(*door) == self.last) {
                let last = self.left.remove(at);
                self.left.insert(0, last);
            }
        }
        let next = self.left.pop().expect("there are coordinators");
        self.last = Some(next);
        next
    }

    pub fn word(&mut self, out: &mut Outside, stream: StreamId, word: Word) {
        out.net.say(|| format!("w{} hears on {}: {word:.50?}", self.number, stream.number()));
        let Some(session) = &mut self.session else { return };
        if stream == session.control {
            match word {
                Word::NotHere => self.end_session(out, false),
                Word::Command(command) => self.input(out, Input::Command(command)),
                Word::Closed(why) => {
                    // A refused connection is noticed at once, whatever else is to be done.
                    if why == "refused" { self.end_session(out, false) } else { self.input(out, Input::Gone) }
                }
                other => unreachable!("{other:?} is no word for a worker"),
            }
            return;
        }
        match (session.asking, word) {
            (Some((asked, _)), Word::StepsAccepted) if asked == stream => {
                (session.steps, session.asking) = (Some(stream), None);
                self.go_on(out);
            }
            (Some((asked, _)), Word::Closed(_)) if asked == stream => {
                let fault = Fault::new(FaultKind::RankLost, "the step stream was refused");
                let epoch = session.asking.take().map_or(Epoch(0), |(_, epoch)| epoch);
                session.waiting.push_back(Input::Report(Report::Failed { epoch, fault }));
                self.go_on(out);
            }
            (_, Word::Order(order)) => self.input(out, Input::Order(stream, order)),
            (_, Word::Closed(_)) => self.input(out, Input::StepsClosed(stream)),
            // What was opened by the replay of an old word.
            (_, Word::StepsAccepted) => panic!("a step stream of an old epoch was accepted"),
            (_, other) => unreachable!("{other:?} is no word on a step stream"),
        }
    }

    /// Takes something in, now or when the session is free for it.
    fn input(&mut self, out: &mut Outside, input: Input) {
        if let Some(session) = &mut self.session {
            session.waiting.push_back(input);
            self.go_on(out);
        }
    }

    fn go_on(&mut self, out: &mut Outside) {
        while let Some(session) = self.session.as_mut().filter(|s| s.asking.is_none() && !s.stopping) {
            let Some(input) = session.waiting.pop_front() else { return };
            if let Some(event) = self.understand(out, input) {
                for action in self.agent.handle(event) {
                    out.net.say(|| format!("w{}: {:.60}", self.number, format!("{action:?}")));
                    self.perform(out, action);
                }
            }
        }
    }

    fn understand(&mut self, out: &mut Outside, input: Input) -> Option<Event> {
        let session = self.session.as_mut()?;
        match input {
            Input::Command(Command::Load(plan)) => {
                let (identity, model_path) = (out.setting.identity(), "m".to_string());
                if plan.epoch <= self.started {
                    out.net.tally.stale_loads_refused += 1;
                }
                Some(Event::Load { plan, model_path, identity })
            }
            Input::Command(Command::Prepare(plan)) => Some(Event::Prepare { plan, model_path: "m".into() }),
            Input::Command(Command::Release(epoch)) => Some(Event::Release { epoch }),
            Input::Command(Command::Drained) => {
                self.ended = true;
                None
            }
            Input::Report(report) => self.report(out, report),
            Input::Order(stream, order) => self.order(out, stream, order),
            Input::StepsClosed(stream) => {
                if session.steps == Some(stream) {
                    session.steps = None;
                    return session.ranks.map(|epoch| Event::StepsClosed { epoch });
                }
                None
            }
            Input::Gone => {
                self.end_session(out, true);
                None
            }
            Input::Leave => {
                out.net.send(session.control, Side::Client, Word::Said(Said::Leaving));
                None
            }
        }
    }

    fn order(&mut self, out: &mut Outside, stream: StreamId, order: Order) -> Option<Event> {
        let session = self.session.as_mut()?;
        if session.steps != Some(stream) {
            return None;
        }
        let epoch = session.ranks?;
        if !self.agent.runs(order.epoch) {
            out.net.tally.stale_orders += 1;
            return None;
        }
        self.progress += 1;
        let me = self.id();
        out.order(epoch, &me, order).err().map(|fault| Event::RankFailed { epoch, fault })
    }

    fn report(&mut self, out: &mut Outside, report: Report) -> Option<Event> {
        match report {
            Report::Loaded { epoch } => {
                let identity = out.setting.identity();
                return Some(Event::RanksLoaded { epoch, identity, proof: Vec::new() });
            }
            Report::Prepared { epoch } => self.say(out, Said::Prepared { epoch }),
            Report::Answer { epoch, step, lane, result } => self.answer(out, epoch, Ok((step, vec![(lane, result)]))),
            Report::Failed { epoch, fault } => {
                self.answer(out, epoch, Err(fault.clone()));
                return Some(Event::RankFailed { epoch, fault });
            }
        }
        None
    }

    fn answer(&self, out: &mut Outside, epoch: Epoch, told: coordinator::group::Told) {
        if let Some(stream) = self.session.as_ref().and_then(|session| session.steps) {
            out.net.send(stream, Side::Client, Word::Answer { epoch, told });
        }
    }

    fn say(&self, out: &mut Outside, said: Said) {
        if let Some(session) = &self.session {
            out.net.send(session.control, Side::Client, Word::Said(said));
        }
    }

    fn perform(&mut self, out: &mut Outside, action: Action) {
        match action {
            Action::StartRanks { plan, .. } => self.start_ranks(out, plan),
            Action::Prepare { plan, .. } => {
                let time = out.load_time();
                let Some(session) = &self.session else { return };
                let (session, report) = (session.number, Report::Prepared { epoch: plan.epoch });
                out.net.later(time, self.node(), Task::Report { session, report });
            }
            Action::StopRanks { epoch } => self.stop_ranks(out, epoch),
            Action::SayLoaded { epoch, identity, proof } => {
                self.say(out, Said::Loaded { epoch, identity, digests: proof });
            }
            Action::SayFailed { epoch, fault } => self.say(out, Said::Failed { epoch, fault }),
            Action::OpenSteps { epoch } => {
                let (me, node) = (self.id(), self.node());
                let Some(session) = &mut self.session else { return };
                let stream = out.net.open(node, Node::Coordinator(session.coordinator));
                session.asking = Some((stream, epoch));
                out.net.send(stream, Side::Client, Word::Steps { worker: me, epoch });
            }
        }
    }

    fn start_ranks(&mut self, out: &mut Outside, plan: Arc<Plan>) {
        let (me, number) = (self.id(), self.number);
        assert!(plan.epoch > self.started, "w{number} starts epoch {}, it had {}", plan.epoch.0, self.started.0);
        self.started = plan.epoch;
        let Some(session) = &mut self.session else { return };
        session.ranks = Some(plan.epoch);
        out.start_ranks(plan, me, number, session.number);
    }

    fn stop_ranks(&mut self, out: &mut Outside, epoch: Epoch) {
        let me = self.id();
        let Some(session) = &mut self.session else { return };
        if let Some(stream) = session.steps.take() {
            out.net.close(stream, Side::Client);
        }
        if session.ranks.take_if(|ranks| *ranks == epoch).is_some() {
            session.stopping = true;
            let number = session.number;
            out.stop_ranks(epoch, &me);
            // Threads end when they notice; one that reads weights is at it for a while.
            let most = if out.net.random.once_in(20) { 2500 } else { 20 };
            let time = out.net.random.within(0..=most) as u64 * MS;
            out.net.later(time, Node::Worker(self.number), Task::Unblock { session: number });
        }
    }

    fn beat(&mut self, out: &mut Outside) {
        let Some(session) = &self.session else { return };
        let epoch = self.agent.epoch().unwrap_or_default();
        let (ranks, now) = (session.ranks, out.net.elapsed());
        let steps_pending = ranks.map_or(0, |epoch| out.steps_pending(epoch));
        let waits = ranks.filter(|epoch| out.fabric.waits(*epoch));
        self.waiting = waits.map(|epoch| self.waiting.filter(|(of, _)| *of == epoch).unwrap_or((epoch, now)));
        let waiting = self.waiting.map_or(Duration::ZERO, |(_, since)| now - since);
        let beat = Beat { epoch, progress: self.progress, steps_pending, waiting, ..Beat::default() };
        self.say(out, Said::Beat(beat));
        if let Phase::Loading { epoch, .. } = *self.agent.phase() {
            self.say(out, Said::Loading { epoch, bytes_done: 1, bytes_total: 2 });
        }
    }

    /// The coordinator is gone: ranks are dropped, and the next coordinator is tried.
    fn end_session(&mut self, out: &mut Outside, was_of_use: bool) {
        let Some(session) = self.session.take() else { return };
        out.net.say(|| format!("w{}: session with c{} ends", self.number, session.coordinator));
        out.net.close(session.control, Side::Client);
        for stream in session.steps.into_iter().chain(session.asking.map(|(stream, _)| stream)) {
            out.net.close(stream, Side::Client);
        }
        if let Some(epoch) = session.ranks {
            out.stop_ranks(epoch, &self.id());
        }
        if was_of_use {
            self.left.clear();
        }
        if self.leaving {
            self.ended = true;
            return;
        }
        // What is to be stopped was dropped with the session.
        self.agent.handle(Event::Disconnected);
        out.net.later(RECONNECT / out.setting.coordinators as u64, self.node(), Task::Connect);
    }
}
