//! One seed: jobs come and are cancelled, steps take their time, groups die, and every finished job is compared with
//! the oracle.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::time::{Duration, Instant};

use coordinator::schedule::job::{DoneReason, Job, Output, Refusal};
use coordinator::schedule::scheduler::{Delivery, JobId, Scheduler};
use coordinator::schedule::{Settings, Turn};
use model::plan::BLOCK_TOKENS;
use model::step::{BlockId, Score, SeqId, StepBatch, StepId, StepResult};

use super::oracle;
use super::profile::{KILLER, Profile, STEP_MAX_US};
use super::random::Random;
use super::rank::Rank;
use super::tally::Tally;

/// What happens at a time; equal times in the order of their making.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrive {
        number: usize,
    },
    Cancel {
        job: JobId,
    },
    /// The first plan is there; until then jobs only wait.
    Plan,
    /// The oldest step of this group is answered.
    Answer {
        group: u64,
    },
}

/// What a client has received.
#[derive(Debug)]
struct Client {
    job: Job,
    started: bool,
    scores: Option<Vec<Score>>,
    choices: Vec<(oracle::Drawn, Option<DoneReason>)>,
}

/// A step that the ranks have computed but not answered, and the blocks that each sequence of it may touch.
#[derive(Debug)]
struct Computed {
    /// The group dies of it.
    kills: bool,
    step: StepId,
    result: StepResult,
    touched: Vec<(usize, SeqId, Vec<BlockId>)>,
}

#[derive(Debug)]
pub struct World {
    random: Random,
    profile: Profile,
    scheduler: Scheduler,
    begin: Instant,
    now_us: u64,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    events_made: u64,
    ranks: Vec<Rank>,
    in_flight: VecDeque<Computed>,
    group: u64,
    planned: bool,
    answer_last_us: u64,
    clients: BTreeMap<JobId, Client>,
    tally: Tally,
}

/// Runs one seed to its end.
pub fn run(seed: u64) -> Tally {
    let mut random = Random::new(seed);
    let profile = Profile::new(&mut random);
    let mut world = World {
        scheduler: Scheduler::new(Settings::without_plan(profile.settings.jobs_waiting_max)),
        ranks: (0..profile.settings.lanes).map(|_| Rank::new(profile.settings.limits)).collect(),
        random,
        profile,
        begin: Instant::now(),
        now_us: 0,
        events: BinaryHeap::new(),
        events_made: 0,
        in_flight: VecDeque::new(),
        group: 0,
        planned: false,
        answer_last_us: 0,
        clients: BTreeMap::new(),
        tally: Tally::default(),
    };
    let planned_us = if world.random.once_in(4) { STEP_MAX_US as u64 * 20 } else { 0 };
    world.at(planned_us, Event::Plan);
    world.at(0, Event::Arrive { number: 0 });
    world.live();
    world.check_end();
    world.tally
}

impl World {
    fn live(&mut self) {
        while let Some(Reverse((time, _, event))) = self.events.pop() {
            assert!(time >= self.now_us, "time goes on");
            self.now_us = time;
            match event {
                Event::Arrive { number } => self.arrive(number),
                Event::Cancel { job } => self.cancel(job),
                Event::Plan => self.plan(),
                Event::Answer { group } if group == self.group => self.answer(),
                Event::Answer { .. } => {}
            }
            self.submit();
            self.scheduler.check_integrity().expect("the books are right");
        }
    }

    fn arrive(&mut self, number: usize) {
        if number + 1 < self.profile.jobs {
            let pause = self.profile.pause(&mut self.random);
            self.at(pause, Event::Arrive { number: number + 1 });
        }
        let job = self.profile.job(&mut self.random, number);
        match self.scheduler.add(self.now(), job.clone()) {
            Ok(id) => {
                if self.profile.cancel_in > 0 && self.random.once_in(self.profile.cancel_in) {
                    let patience = self.random.within(0..=STEP_MAX_US * 10) as u64;
                    self.at(patience, Event::Cancel { job: id });
                }
                let choices = vec![(Vec::new(), None); job.choices as usize];
                self.clients.insert(id, Client { job, started: false, scores: None, choices });
            }
            Err(Refusal::QueueFull { waiting, waiting_max }) => {
                assert!(waiting >= waiting_max);
                self.tally.refused_queue_full += 1;
            }
            Err(Refusal::TooLong { .. }) => {
                assert!(job.prompt.len() + 1 > self.profile.settings.limits.model_len_max);
                self.tally.refused_too_long += 1;
            }
            Err(Refusal::NeverFits { .. }) => {
                assert!(!self.fits(&job));
                self.tally.refused_never_fits += 1;
            }
            Err(other) => panic!("refused: {other}"),
        }
    }

    fn cancel(&mut self, job: JobId) {
        if let Some(client) = self.clients.remove(&job) {
            match client.started {
                true => self.tally.cancels_in_flight += u64::from(!self.in_flight.is_empty()),
                false => self.tally.cancels_waiting += 1,
            }
            self.scheduler.cancel(job);
        }
    }

    fn answer(&mut self) {
        let every = self.profile.fault_every;
        let kills = self.in_flight.front().is_some_and(|computed| computed.kills);
        if kills || every > 0 && self.random.once_in(every) {
            return self.fault();
        }
        let Computed { step, result, .. } = self.in_flight.pop_front().expect("an answer has a step");
        let deliveries = self.scheduler.complete(self.now(), step, result).expect("the answer fits");
        deliveries.into_iter().for_each(|delivery| self.receive(delivery));
    }

    fn plan(&mut self) {
        self.planned = true;
        self.tally.jobs_before_plan += self.clients.len() as u64;
        let deliveries = self.scheduler.requeue_all(self.profile.settings);
        deliveries.into_iter().for_each(|delivery| self.receive(delivery));
    }

    /// The group dies with what it had in flight and all its cache; another takes over.
    fn fault(&mut self) {
        self.tally.faults += 1;
        self.tally.faults_in_flight += u64::from(self.in_flight.len() > 1);
        self.group += 1;
        for given_up in self.scheduler.died() {
            assert!(given_up.deaths > 1 && given_up.delivery.last, "one death proves nothing");
            let client = self.clients.remove(&given_up.delivery.job).expect("a job that is not cancelled has a client");
            self.tally.killers_given_up += u64::from(client.job.prompt.ends_with(&[KILLER]));
        }
        self.in_flight.clear();
        self.profile.replan(&mut self.random);
        let settings = self.profile.settings;
        self.ranks = (0..settings.lanes).map(|_| Rank::new(settings.limits)).collect();
        let deliveries = self.scheduler.requeue_all(settings);
        deliveries.into_iter().for_each(|delivery| self.receive(delivery));
    }

    /// Gives the group all steps it may have. The ranks compute at once; the answer takes its time.
    fn submit(&mut self) {
        while let Some((step, batch)) = self.scheduler.next(self.now()) {
            self.observe(&batch);
            self.check_reuse(&batch);
            let lanes = batch.lanes.iter().zip(&self.ranks).enumerate();
            let touched = lanes.flat_map(|(lane, (part, rank))| {
                part.chunks.iter().map(move |chunk| (lane, chunk.seq, rank.table(chunk)))
            });
            let touched = touched.collect();
            let lanes = self.ranks.iter_mut().zip(&batch.lanes).map(|(rank, part)| rank.step(part)).collect();
            let kills = batch.lanes.iter().flat_map(|part| &part.chunks).any(|chunk| chunk.tokens.contains(&KILLER));
            self.in_flight.push_back(Computed { kills, step, result: StepResult { lanes }, touched });
            let delay = self.random.within(0..=STEP_MAX_US) as u64;
            self.answer_last_us = self.answer_last_us.max(self.now_us + delay);
            self.at(self.answer_last_us - self.now_us, Event::Answer { group: self.group });
        }
        let stuck = self.planned && self.in_flight.is_empty() && !self.scheduler.is_idle();
        assert!(!stuck, "jobs wait and nothing is computed");
    }

    /// A block that a step writes belongs to no other sequence of a step in flight: stages run at their own pace.
    fn check_reuse(&self, batch: &StepBatch) {
        for (lane, part) in batch.lanes.iter().enumerate() {
            for chunk in &part.chunks {
                let table = self.ranks[lane].table(chunk);
                for written in &table[chunk.start as usize / BLOCK_TOKENS..] {
                    let elsewhere = self.in_flight.iter().flat_map(|computed| &computed.touched).any(
                        |(other_lane, other, blocks)| {
                            *other_lane == lane && *other != chunk.seq && blocks.contains(written)
                        },
                    );
                    assert!(!elsewhere, "{written:?} is written while a step in flight uses it");
                }
            }
        }
    }

    fn observe(&mut self, batch: &StepBatch) {
        let tally = &mut self.tally;
        assert_eq!(batch.lanes.len(), self.profile.settings.lanes, "every lane is in every step");
        tally.steps += 1;
        tally.overlapping_steps += u64::from(!self.in_flight.is_empty());
        for part in &batch.lanes {
            tally.idle_lanes += u64::from(part.chunks.is_empty());
            tally.fed += part.chunks.iter().filter(|chunk| chunk.is_fed()).count() as u64;
            tally.histories += part.begun.iter().filter(|begin| !begin.history.is_empty()).count() as u64;
            let prefills = part.chunks.iter().filter(|chunk| chunk.tokens.len() > 1);
            tally.chunked_prefills += prefills.clone().filter(|chunk| !chunk.sample).count() as u64;
            tally.mixed_steps += u64::from(prefills.count() > 0 && part.chunks[0].tokens.len() == 1);
        }
    }

    fn receive(&mut self, Delivery { job, output, last }: Delivery) {
        let client = self.clients.get_mut(&job).expect("a cancelled or finished job is silent");
        match output {
            Output::Started { cached_tokens } => {
                assert!(!client.started && cached_tokens as usize <= client.job.prompt.len());
                client.started = true;
            }
            Output::PromptScores(scores) => {
                assert!(client.started && client.scores.is_none());
                assert!(client.choices.iter().all(|(tokens, _)| tokens.is_empty()), "scores come before tokens");
                client.scores = Some(scores);
            }
            Output::Token { choice, token, score } => {
                let (tokens, done) = &mut client.choices[choice as usize];
                assert!(client.started && done.is_none(), "a token comes between start and end");
                tokens.push((token, score));
            }
            Output::Done { choice, reason } => {
                let before = client.choices[choice as usize].1.replace(reason);
                assert!(before.is_none(), "one end a choice");
            }
            Output::Moved { .. } => panic!("there is nowhere to move to"),
            Output::Failed(refusal) => {
                let client = self.clients.remove(&job).expect("it was just found");
                let rightly = match refusal {
                    Refusal::NeverFits { .. } => !self.fits(&client.job),
                    Refusal::TooLong { tokens, tokens_max } => tokens > tokens_max,
                    _ => false,
                };
                assert!(rightly && last, "failed: {refusal}");
                self.tally.failed_after_replan += 1;
                return;
            }
        }
        let ended = client.choices.iter().all(|(_, done)| done.is_some());
        assert_eq!(last, ended, "the last output is marked");
        if ended {
            let client = self.clients.remove(&job).expect("it was just found");
            self.compare(client);
        }
    }

    fn compare(&mut self, client: Client) {
        let Client { job, choices, scores, .. } = client;
        let tally = &mut self.tally;
        let model_len_max = self.profile.settings.limits.model_len_max;
        tally.jobs_finished += 1;
        tally.nothing_drawn += u64::from(job.tokens_max == 0);
        tally.choices_that_share += u64::from(job.choices > 1 && job.prompt.len() > BLOCK_TOKENS);
        for (choice, (tokens, done)) in choices.into_iter().enumerate() {
            let reason = done.expect("the choice has ended");
            let expected = oracle::answer(&job, choice as u32, model_len_max);
            assert_eq!((&tokens, reason), (&expected.0, expected.1), "choice {choice} of {}", job.id);
            tally.tokens_checked += tokens.len() as u64;
            tally.ended_by_token += u64::from(reason == DoneReason::End);
            tally.ended_by_length += u64::from(reason == DoneReason::Length);
            let reached = job.prompt.len() + tokens.len() == model_len_max;
            tally.model_length_reached += u64::from(reached && tokens.len() < job.tokens_max as usize);
        }
        let expected = job.sampling.prompt_logprobs.map(|_| oracle::prompt_scores(&job));
        assert_eq!(scores, expected, "prompt scores of {}", job.id);
        tally.prompt_scores_checked += scores.map_or(0, |scores| scores.len() as u64);
    }

    /// Nothing is left: no client, no block, no sequence on a rank but those whose end goes out with the next step.
    fn check_end(&mut self) {
        assert!(self.clients.is_empty() && self.scheduler.is_idle(), "every job came to an end");
        let job = Job {
            id: "the last".into(),
            prompt: vec![3],
            sampling: model::step::Sampling::GREEDY,
            choices: 1,
            tokens_max: 0,
            end_tokens: Vec::new(),
            salt: 0,
            resumed: None,
            turn: Turn::default(),
            deaths: 0,
        };
        self.profile.jobs = 0;
        self.profile.fault_every = 0;
        let id = self.scheduler.add(self.now(), job.clone()).expect("an idle scheduler takes a job");
        self.clients.insert(id, Client { job, started: false, scores: None, choices: vec![(Vec::new(), None)] });
        self.submit();
        self.live();
        let load = self.scheduler.load();
        assert_eq!((load.running, load.waiting, load.jobs_waiting, load.blocks_used), (0, 0, 0, 0));
        assert!(self.ranks.iter().map(Rank::sequences).sum::<usize>() <= 1, "ranks forget ended sequences");
        self.tally.prefix_hits_tokens = load.prefix_hits_tokens;
        self.tally.preemptions = load.preemptions;
        self.tally.requeues = load.requeues;
        self.tally.drafts_accepted = load.drafts_accepted;
        self.tally.drafts_refused = load.tokens_drafted - load.drafts_accepted;
        let collides = (self.profile.settings.block_hash)(1, &[2]) == 0;
        self.tally.hits_with_colliding_hashes = if collides { load.prefix_hits_tokens } else { 0 };
    }

    fn fits(&self, job: &Job) -> bool {
        let limits = self.profile.settings.limits;
        let len_max = (job.prompt.len() + job.tokens_max as usize).min(limits.model_len_max);
        (len_max - 1).max(job.prompt.len()).div_ceil(BLOCK_TOKENS) <= limits.blocks
    }

    fn at(&mut self, delay_us: u64, event: Event) {
        self.events_made += 1;
        self.events.push(Reverse((self.now_us + delay_us, self.events_made, event)));
    }

    fn now(&self) -> Instant {
        self.begin + Duration::from_micros(self.now_us)
    }
}
