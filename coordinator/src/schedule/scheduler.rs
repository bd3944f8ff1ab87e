//! Decides what every step computes. Pure: no clock, no channel, no device; a driver or a simulation calls it.
//!
//! ```text
//!            add                 next                     complete
//!   job ------------> waiting ----------> in a lane ----------------------> tokens, then done
//!                        ^   in turn         |  prefill in chunks, then a token a step
//!                        +-------------------+
//!                          preempted (youngest first) or requeued after a fault: its tokens
//!                          so far are its new prompt, drawn tokens are never drawn again
//! ```
//! Packing is in `pack.rs`, answers in `answer.rs`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use model::fault::{Fault, FaultKind};
use model::step::{Sampling, Score, StepId};

use super::admit::Settings;
use super::job::{Begun, Job, Output, Refusal};
use super::lane::{Flown, Lane};
use super::load::Load;
use super::queue::{Queue, Turn};
pub use super::sequence::JobId;
use super::sequence::{Age, Fate, Roster, Sequence, Slot};
use super::suspect::Deaths;

/// Something to tell a job's client.
#[derive(Debug, Clone, PartialEq)]
pub struct Delivery {
    pub job: JobId,
    pub output: Output,
    /// The job has ended; nothing follows.
    pub last: bool,
}

/// The decision core of one group.
#[derive(Debug)]
pub struct Scheduler {
    pub(super) settings: Settings,
    pub(super) roster: Roster,
    pub(super) requests: BTreeMap<JobId, Request>,
    /// Sequences that may be admitted.
    pub(super) queue: Queue,
    pub(super) lanes: Vec<Lane>,
    /// Jobs that may have killed a group, see [`super::suspect`].
    pub(super) suspects: BTreeSet<JobId>,
    /// Unanswered steps, the oldest first.
    pub(super) flights: VecDeque<Flight>,
    /// When the last step was answered.
    pub(super) answered: Option<Instant>,
    pub(super) jobs_next: u64,
    pub(super) seqs_next: u64,
    pub(super) steps_next: u64,
    /// Counters, and `jobs_waiting`; the rest is filled in when asked.
    pub(super) load: Load,
}

/// A job in work.
#[derive(Debug)]
pub(super) struct Request {
    pub sampling: Sampling,
    pub turn: Turn,
    pub choices: u32,
    pub added: Instant,
    /// A choice of it was admitted once.
    pub admitted: bool,
    /// Its first choice's prompt was computed: [`Output::Started`] is out.
    pub started: bool,
    pub cached_tokens: u32,
    /// Prompt scores so far, of positions 1.. without a gap.
    pub scores: Vec<Score>,
    /// Choices that live, and those among them that wait for the prompt's blocks.
    pub slots: Vec<Slot>,
    pub held: Vec<Slot>,
    pub deaths: Deaths,
}

impl Request {
    /// The choice whose prompt has to be computed whole, because the scores of it all are still owed.
    pub fn scored_choice(&self) -> Option<u32> {
        (self.sampling.prompt_logprobs.is_some() && !self.started).then_some(0)
    }
}

/// A step in flight.
#[derive(Debug)]
pub(super) struct Flight {
    pub step: StepId,
    pub since: Instant,
    /// Tokens to guess behind each that it draws.
    pub guesses: usize,
    /// A lane's chunks, in order.
    pub lanes: Vec<Vec<Flown>>,
}

impl Scheduler {
    /// Panics on settings without room for one token or step.
    pub fn new(settings: Settings) -> Scheduler {
        settings.check();
        Scheduler {
            settings,
            roster: Roster::default(),
            requests: BTreeMap::new(),
            queue: Queue::default(),
            lanes: (0..settings.lanes).map(|_| Lane::new(settings.limits.blocks)).collect(),
            suspects: BTreeSet::new(),
            flights: VecDeque::new(),
            answered: None,
            jobs_next: 0,
            seqs_next: 0,
            steps_next: 0,
            load: Load::default(),
        }
    }

    /// Takes a job in, or refuses it at once.
    pub fn add(&mut self, now: Instant, job: Job) -> Result<JobId, Refusal> {
        self.check(&job).inspect_err(|_| self.load.jobs_refused += 1)?;
        let id = JobId(self.jobs_next);
        self.jobs_next += 1;
        self.load.jobs_accepted += 1;
        self.load.jobs_waiting += 1;
        self.queue.enter(job.turn);

        let prompt_len = job.prompt.len();
        let len_max = self.settings.len_max(prompt_len, job.tokens_max);
        let end_tokens: Arc<[u32]> = job.end_tokens.into();
        let mut first = Sequence {
            age: Age { job: id, choice: 0 },
            turn: job.turn,
            salt: job.salt,
            tokens: job.prompt,
            prompt_len,
            tokens_max: job.tokens_max,
            len_max,
            end_tokens: end_tokens.clone(),
            hashes: Vec::new(),
            charged: 0,
            place: None,
        };
        if self.settings.prefix_cache {
            first.extend_hashes(self.settings.block_hash);
        }
        // The other choices find the prompt in the cache once the first has computed it. With nothing to share they need not
        // wait, but for the prompt's scores, which come before any token; with nothing to draw they need not run.
        let shares = self.settings.prefix_cache && first.blocks_reusable() > 0;
        let resumes = job.resumed.is_some();
        let hold = !resumes && (shares || job.sampling.prompt_logprobs.is_some());
        let runs = if job.tokens_max == 0 { 1 } else { job.choices };
        let begun = job.resumed.unwrap_or_else(|| vec![Begun::default(); runs as usize]);
        let mut request = Request {
            sampling: job.sampling,
            turn: job.turn,
            choices: job.choices,
            added: now,
            admitted: false,
            started: resumes,
            cached_tokens: 0,
            scores: Vec::new(),
            slots: Vec::new(),
            held: Vec::new(),
            deaths: Deaths::default(),
        };
        for (choice, begun) in (0..).zip(begun).filter(|(_, begun)| !begun.done) {
            let age = Age { job: id, choice };
            let mut sequence = Sequence {
                age,
                tokens: [first.tokens.as_slice(), &begun.tokens].concat(),
                end_tokens: end_tokens.clone(),
                hashes: first.hashes.clone(),
                place: None,
                ..first
            };
            if self.settings.prefix_cache {
                sequence.extend_hashes(self.settings.block_hash);
            }
            let slot = self.roster.insert(sequence);
            request.slots.push(slot);
            if hold && choice > 0 {
                request.held.push(slot);
            } else {
                self.queue.insert((age, job.turn), resumes, slot);
            }
        }
        self.requests.insert(id, request);
        self.remember_deaths(id, job.deaths);
        Ok(id)
    }

    /// Forgets a job. Its blocks are free at once, or as soon as the steps in flight that use them are answered.
    pub fn cancel(&mut self, job: JobId) {
        if self.forget(job) {
            self.load.jobs_cancelled += 1;
        }
    }

    /// Forgets one choice of a job that has others left; nothing more is told of it.
    pub fn cancel_choice(&mut self, job: JobId, choice: u32) {
        let Some(request) = self.requests.get_mut(&job) else { return };
        let of = |slot: &Slot| self.roster.get(*slot).age.choice == choice;
        // Others wait for what the first one computes of the prompt.
        let free = request.started && request.slots.len() > 1;
        let Some(index) = request.slots.iter().position(of).filter(|_| free) else { return };
        let slot = request.slots.swap_remove(index);
        self.drop_slot(slot);
    }

    /// Ends every job with this refusal: nothing can serve them any more.
    pub fn fail_all(&mut self, refusal: &Refusal) -> Vec<Delivery> {
        let jobs: Vec<JobId> = self.requests.keys().copied().collect();
        jobs.into_iter().map(|job| self.fail(job, refusal.clone())).collect()
    }

    /// After a group's end (a fault, or a new plan): no step is in flight any more and no cache is left. Whatever ran goes
    /// back to its place in the queue with the tokens it has; steps count from 0 again. Jobs that the new settings can't hold fail.
    pub fn requeue_all(&mut self, settings: Settings) -> Vec<Delivery> {
        settings.check();
        self.flights.clear();
        self.steps_next = 0;
        self.settings = settings;
        let slots: Vec<Slot> = self.roster.iter().map(|(slot, _)| slot).collect();
        for slot in slots {
            let sequence = self.roster.get_mut(slot);
            if settings.prefix_cache {
                sequence.extend_hashes(settings.block_hash);
            }
            // What was promised to a job that has begun stays; the others were perhaps taken before there was a plan.
            if self.requests.get(&sequence.age.job).is_some_and(|request| !request.admitted) {
                sequence.len_max = settings.len_max(sequence.prompt_len, sequence.tokens_max);
            }
            match sequence.place.take() {
                None => {}
                Some(place) if place.fate == Fate::Dropped => self.roster.remove(slot),
                Some(_) => {
                    self.load.requeues += 1;
                    self.queue.insert(sequence.waits(), true, slot);
                }
            }
        }
        self.lanes = (0..settings.lanes).map(|_| Lane::new(settings.limits.blocks)).collect();
        let mut refused = BTreeMap::new();
        for (_, sequence) in self.roster.iter() {
            let Some(request) = self.requests.get(&sequence.age.job) else { continue };
            let first = sequence.prompt_len + sequence.tokens_max.min(1) as usize;
            let least = if request.admitted { sequence.len_max } else { first };
            if let Err(refusal) = settings.check_length(sequence.tokens.len(), least, sequence.len_max) {
                refused.insert(sequence.age.job, refusal);
            }
        }
        refused.into_iter().map(|(job, refusal)| self.fail(job, refusal)).collect()
    }

    pub fn steps_in_flight(&self) -> usize {
        self.flights.len()
    }

    /// No job is in work and no step in flight.
    pub fn is_idle(&self) -> bool {
        self.flights.is_empty() && self.requests.is_empty()
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    pub fn load(&self) -> Load {
        let running = self.lanes.iter().map(|lane| lane.running.len()).sum();
        Load {
            running,
            waiting: self.roster.len() - running,
            steps_in_flight: self.flights.len(),
            tenants: self.queue.tenants(),
            tenants_waiting: self.queue.tenants_waiting(),
            blocks_used: self.lanes.iter().map(|lane| lane.pool.used()).sum(),
            blocks_total: self.lanes.iter().map(|lane| lane.pool.total()).sum(),
            ..self.load
        }
    }

    /// Recounts every block. Its cost is that of all pools, so it is called when idle, and by tests.
    pub fn check_integrity(&self) -> Result<(), Fault> {
        for lane in &self.lanes {
            lane.pool.check_integrity(lane.tables(&self.roster).into_iter())?;
        }
        let lost = self.roster.iter().find(|(slot, sequence)| {
            let held = self.requests.get(&sequence.age.job).is_some_and(|request| request.held.contains(slot));
            sequence.place.is_none() && !held && !self.queue.contains(sequence.waits())
        });
        if let Some((_, sequence)) = lost {
            let text = format!("choice {} of job {} is nowhere", sequence.age.choice, sequence.age.job.0);
            return Err(Fault::new(FaultKind::Internal, text));
        }
        Ok(())
    }

    fn check(&self, job: &Job) -> Result<(), Refusal> {
        self.settings.check_job(job)?;
        let places = (self.load.jobs_waiting, self.settings.jobs_waiting_max);
        let full = |(waiting, waiting_max)| Refusal::QueueFull { waiting, waiting_max };
        self.queue.room(job.turn.tenant, places).map_err(full)
    }

    pub(super) fn fail(&mut self, job: JobId, refusal: Refusal) -> Delivery {
        self.forget(job);
        Delivery { job, output: Output::Failed(refusal), last: true }
    }

    /// Removes a job and its sequences; those in flight leave when answered.
    fn forget(&mut self, job: JobId) -> bool {
        let Some(request) = self.requests.remove(&job) else { return false };
        self.suspects.remove(&job);
        if !request.admitted {
            self.load.jobs_waiting -= 1;
        }
        for slot in request.slots {
            self.drop_slot(slot);
        }
        self.queue.leave(request.turn.tenant, request.admitted);
        true
    }

    /// Removes a sequence; one in flight leaves when answered.
    fn drop_slot(&mut self, slot: Slot) {
        let sequence = self.roster.get_mut(slot);
        self.queue.remove(sequence.waits());
        if let Some(place) = &sequence.place {
            let lane = &mut self.lanes[place.lane];
            let in_flight = place.chunks_in_flight > 0;
            lane.dismiss(sequence, Fate::Dropped);
            if in_flight {
                return;
            }
            lane.vacate(sequence);
        }
        self.roster.remove(slot);
    }
}
