//! A simulated coordinator process: the production cores of election and relay, and, while it leads, a [`Lead`]. What is
//! here is what the shells `lead/campaign.rs`, `lead/follow.rs`, `lead/relay.rs` and `run.rs` do around them.

use std::collections::BTreeMap;

use coordinator::cluster::store::{Revision, StoreError};
use coordinator::lead::candidate::{Ask, Candidate, Standing, Told};
use coordinator::lead::carried::{Carried, Entered};
use coordinator::lead::peer::Lost;
use coordinator::lead::{campaign, relay};
use coordinator::schedule::job::{Job, Output, Refusal};
use coordinator::schedule::scheduler::JobId;

use model::plan::WorkerId;

use super::lead::Lead;
use super::message::{Question, Reply, Task, Word};
use super::net::{MS, Node, SECOND, Side, StreamId};
use super::outside::Outside;

/// How long a leader may take to take a request (`lead/peer.rs`).
const ANSWER: u64 = 5 * SECOND;

/// Of every process.
pub const BUILD: &str = "1.0 (b)";

pub struct Coordinator {
    pub number: usize,
    candidate: Candidate,
    /// The question of the election that is open.
    asked: Option<(u64, Ask)>,
    deposed: Option<(String, Revision)>,
    pub resigns: bool,
    pub lead: Option<Box<Lead>>,
    follows: Option<usize>,
    /// Whom it followed before it led.
    followed: Option<usize>,
    /// Requests of clients here.
    relays: BTreeMap<usize, Relay>,
    view_made: u64,
    model_len_max: usize,
}

/// A client's request on its way.
struct Relay {
    carried: Carried,
    at: At,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum At {
    /// It is entered again soon.
    Nowhere,
    Here(JobId),
    /// With the leader; whether it was taken.
    There(StreamId, bool),
}

impl Coordinator {
    /// A process that has just started.
    pub fn start(number: usize, out: &mut Outside) -> Coordinator {
        let node = Node::Coordinator(number);
        let id = format!("{number}-{}", out.net.life(node));
        let look = out.net.random.within(0..=300) as u64 * MS;
        out.net.later(look, node, Task::Look);
        Coordinator {
            number,
            candidate: Candidate::new(number.to_string(), id, BUILD.into()),
            asked: None,
            deposed: None,
            resigns: false,
            lead: None,
            follows: None,
            followed: None,
            relays: BTreeMap::new(),
            view_made: 0,
            model_len_max: 0,
        }
    }

    fn node(&self) -> Node {
        Node::Coordinator(self.number)
    }

    pub fn standing(&self) -> &Standing {
        self.candidate.standing()
    }

    pub fn requests(&self) -> usize {
        self.relays.len()
    }

    pub fn requests_open(&self) -> impl Iterator<Item = usize> {
        self.relays.keys().copied()
    }

    pub fn task(&mut self, out: &mut Outside, task: Task) {
        match task {
            Task::Look => self.look(out),
            Task::Replied { call, reply: Reply::Lead(told) } => self.told(out, call, told),
            Task::Replied { call, reply: Reply::Plan(answer) } => {
                self.led(out, |lead, out| lead.told(out, call, answer))
            }
            Task::Tick { reign } => self.led(out, |lead, out| lead.tick(out, reign)),
            Task::Ledger { reign } => self.led(out, |lead, out| lead.look_up(out, reign)),
            Task::Again { request } => self.enter(out, request),
            Task::EntryLate { request, stream } => {
                if self.relays.get(&request).is_some_and(|relay| relay.at == At::There(stream, false)) {
                    out.net.close(stream, Side::Client);
                    self.entered(out, request, Err(Lost));
                }
            }
            // One that is told twice has heard it.
            Task::Deposed { address, term } => drop(self.deposed.get_or_insert((address, term))),
            Task::View { made, model_len_max } if made > self.view_made => {
                (self.view_made, self.model_len_max) = (made, model_len_max);
            }
            Task::View { .. } => {}
            other => unreachable!("{other:?} is no coordinator's"),
        }
    }

    /// An operator asks it, since it leads, to do without a worker.
    pub fn drain(&mut self, out: &mut Outside, worker: WorkerId) {
        self.led(out, |lead, out| lead.drain(out, worker));
    }

    /// A word on a stream of which an end is here.
    pub fn word(&mut self, out: &mut Outside, stream: StreamId, side: Side, word: Word) {
        out.net.say(|| format!("c{} hears on {}: {word:.50?}", self.number, stream.number()));
        if side == Side::Client {
            return self.carried(out, stream, word);
        }
        match (&mut self.lead, word) {
            (Some(_), word) => self.led(out, |lead, out| lead.word(out, stream, word)),
            (None, Word::Join { .. }) => {
                out.net.send(stream, Side::Server, Word::NotHere);
                out.net.close(stream, Side::Server);
            }
            (None, _) => out.net.close(stream, Side::Server),
        }
    }

    /// Lets the leader's part act, and passes on what it has for clients here.
    fn led(&mut self, out: &mut Outside, act: impl FnOnce(&mut Lead, &mut Outside)) {
        let Some(lead) = &mut self.lead else { return };
        act(lead, out);
        if let Some(model_len_max) = lead.settle(out) {
            self.model_len_max = model_len_max;
        }
        for (request, output, last) in self.lead.as_mut().map(|lead| lead.local()).unwrap_or_default() {
            self.output(out, request, output, last);
        }
    }

    // The election.

    fn look(&mut self, out: &mut Outside) {
        if self.asked.is_some() {
            return out.net.later(50 * MS, self.node(), Task::Look);
        }
        out.net.later(campaign::LOOK.as_micros() as u64, self.node(), Task::Look);
        let ask = self.candidate.look(self.resigns);
        self.ask(out, ask);
    }

    fn ask(&mut self, out: &mut Outside, ask: Ask) {
        let call = out.call(self.number, Question::Lead(ask.clone()));
        self.asked = Some((call, ask));
    }

    fn told(&mut self, out: &mut Outside, call: u64, told: Result<Told, StoreError>) {
        let Some((_, ask)) = self.asked.take_if(|(asked, _)| *asked == call) else { return };
        let before = self.candidate.standing().clone();
        let next = self.candidate.told(ask, told);
        if before != *self.candidate.standing() {
            out.net.say(|| format!("c{}: {:?}", self.number, self.candidate.standing()));
        }
        self.stand(out);
        if let Ok(Some(ask)) = next {
            return self.ask(out, ask);
        }
        if let Some((address, term)) = self.deposed.take() {
            let led = self.lead.is_some();
            self.candidate.depose(address, term);
            self.stand(out);
            out.net.tally.deposed_by_word += u64::from(led && self.lead.is_none());
        }
    }

    /// Does what the standing says, as `run.rs` and `lead/follow.rs` do.
    fn stand(&mut self, out: &mut Outside) {
        match self.candidate.standing().clone() {
            Standing::Leads(term) => {
                self.follows = None;
                if let Some(lead) = &mut self.lead {
                    lead.term = term;
                    return;
                }
                self.lead = Some(Box::new(Lead::new(self.number, term, out)));
                out.truth.begins_to_lead(self.number);
                if let (Some(before), Some(term)) = (self.followed.take(), term) {
                    let word = || Task::Deposed { address: self.number.to_string(), term };
                    out.net.tell(self.node(), Node::Coordinator(before), word());
                    if out.duplicates() {
                        out.net.tell(self.node(), Node::Coordinator(before), word());
                    }
                }
            }
            Standing::Follows { address, .. } => {
                self.leads_no_more(out);
                self.follows = address.parse().ok();
                self.followed = self.follows.filter(|other| *other != self.number);
            }
            Standing::Unknown(_) => {
                self.leads_no_more(out);
                self.follows = None;
            }
        }
    }

    fn leads_no_more(&mut self, out: &mut Outside) {
        let Some(mut lead) = self.lead.take() else { return };
        out.truth.leads_no_more(self.number);
        lead.close(out);
        let here: Vec<usize> =
            self.relays.iter().filter(|(_, r)| matches!(r.at, At::Here(_))).map(|(request, _)| *request).collect();
        for request in here {
            self.lost(out, request);
        }
    }

    // Requests.

    /// A client has come with a request.
    pub fn take(&mut self, out: &mut Outside, request: usize, job: Job) {
        self.relays.insert(request, Relay { carried: Carried::new(job), at: At::Nowhere });
        self.enter(out, request);
    }

    /// A client has hung up.
    pub fn cancel(&mut self, out: &mut Outside, request: usize) {
        match self.relays.remove(&request).map(|relay| relay.at) {
            Some(At::Here(job)) => self.led(out, |lead, _| lead.cancel(job)),
            Some(At::There(stream, _)) => out.net.close(stream, Side::Client),
            Some(At::Nowhere) | None => {}
        }
    }

    fn enough(&mut self, out: &mut Outside, request: usize, choice: u32) {
        let Some(relay) = self.relays.get_mut(&request) else { return };
        relay.carried.enough(choice);
        match relay.at {
            At::Here(job) => self.led(out, |lead, _| lead.enough(job, choice)),
            At::There(stream, _) => out.net.send(stream, Side::Client, Word::Enough(choice)),
            At::Nowhere => {}
        }
    }

    fn enter(&mut self, out: &mut Outside, request: usize) {
        let (model_len_max, here, node) = (self.model_len_max, self.lead.is_some(), self.node());
        let Some(relay) = self.relays.get_mut(&request).filter(|relay| relay.at == At::Nowhere) else { return };
        let ends = relay.carried.ends(model_len_max);
        let (over, job) = (relay.carried.is_over(), relay.carried.job());
        out.net.say(|| {
            let begun: Vec<_> = job.resumed.iter().flatten().map(|b| (b.tokens.len(), b.done)).collect();
            format!("c{}: enters request {request}, begun {begun:?}", self.number)
        });
        for output in ends {
            if !out.told(request, output) {
                return self.cancel(out, request);
            }
        }
        if over {
            self.relays.remove(&request);
            return out.over(request);
        }
        match self.follows {
            _ if here => {
                let mut added = None;
                self.led(out, |lead, out| added = Some(lead.add(out, request, job)));
                let added = added.expect("this coordinator leads");
                let answer = added.map(|id| {
                    if let Some(relay) = self.relays.get_mut(&request) {
                        relay.at = At::Here(id);
                    }
                });
                self.entered(out, request, Ok(answer));
                self.led(out, |lead, out| lead.submit(out));
            }
            Some(leader) => {
                let stream = out.net.open(node, Node::Coordinator(leader));
                out.net.send(stream, Side::Client, Word::Carry(Box::new(job)));
                out.net.later(ANSWER, node, Task::EntryLate { request, stream });
                if let Some(relay) = self.relays.get_mut(&request) {
                    relay.at = At::There(stream, false);
                }
            }
            None => self.entered(out, request, Err(Lost)),
        }
    }

    fn entered(&mut self, out: &mut Outside, request: usize, answer: Result<Result<(), Refusal>, Lost>) {
        let Some(relay) = self.relays.get_mut(&request) else { return };
        match relay.carried.entered(answer) {
            Entered::Taken => {
                out.net.tally.resumed_by_next_leader += u64::from(relay.carried.job().resumed.is_some());
                if let At::There(_, taken) = &mut relay.at {
                    *taken = true;
                }
                out.accepted(request);
            }
            Entered::Again => {
                relay.at = At::Nowhere;
                let retry = relay::RETRY.as_micros() as u64;
                out.net.later(retry, self.node(), Task::Again { request });
            }
            Entered::Refused(refusal) => {
                self.relays.remove(&request);
                out.refused(request, &refusal);
            }
            Entered::Failed(refusal) => {
                self.relays.remove(&request);
                out.told(request, Output::Failed(refusal));
            }
        }
    }

    /// A word of the leader that has a request.
    fn carried(&mut self, out: &mut Outside, stream: StreamId, word: Word) {
        let of = |relay: &Relay| matches!(relay.at, At::There(at, _) if at == stream);
        let Some((request, relay)) = self.relays.iter().find(|(_, relay)| of(relay)) else { return };
        let (request, taken) = (*request, matches!(relay.at, At::There(_, true)));
        match word {
            Word::Entered(answer) if !taken => self.entered(out, request, Ok(answer)),
            Word::Output(output) => self.output(out, request, output, false),
            Word::Closed(_) if taken => self.lost(out, request),
            Word::Closed(_) => self.entered(out, request, Err(Lost)),
            other => unreachable!("{other:?} is no leader's answer"),
        }
    }

    /// Whoever had the request is lost.
    fn lost(&mut self, out: &mut Outside, request: usize) {
        let Some(relay) = self.relays.get_mut(&request) else { return };
        if relay.carried.is_over() {
            self.relays.remove(&request);
            return out.over(request);
        }
        relay.at = At::Nowhere;
        out.net.later(relay::RETRY.as_micros() as u64, self.node(), Task::Again { request });
    }

    fn output(&mut self, out: &mut Outside, request: usize, output: Output, last: bool) {
        let Some(relay) = self.relays.get_mut(&request) else { return };
        let (told, over) = relay.carried.take(output);
        for output in told {
            if !out.told(request, output) {
                return self.cancel(out, request);
            }
        }
        if last && !over {
            return self.lost(out, request);
        }
        if over {
            if let Some(Relay { at: At::There(stream, _), .. }) = self.relays.remove(&request) {
                out.net.close(stream, Side::Client);
            }
            return out.over(request);
        }
        if let Some(choice) = out.had_enough(request) {
            self.enough(out, request, choice);
        }
    }
}
