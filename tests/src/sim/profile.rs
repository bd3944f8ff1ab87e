//! What a seed stands for: the size of the group and the kind of jobs.

use coordinator::schedule::job::Job;
use coordinator::schedule::{Settings, Turn};
use model::plan::{BLOCK_TOKENS, Limits};
use model::step::Sampling;

use super::oracle::VOCABULARY;
use super::random::Random;

/// Longest step, and longest pause between jobs, in simulated microseconds.
pub const STEP_MAX_US: usize = 4_000;
pub const PAUSE_MAX_US: usize = 20_000;

/// A group that computes this token dies of it.
pub const KILLER: u32 = 1 << 20;

/// One seed's world.
#[derive(Debug)]
pub struct Profile {
    pub settings: Settings,
    pub jobs: usize,
    /// One job in so many is cancelled; steps between faults (on average); 0 is never.
    pub cancel_in: u64,
    pub fault_every: u64,
    /// Prompts start with a part of one of these.
    families: Vec<Vec<u32>>,
    pause_max: usize,
    /// Which job ends with the killing token, if any.
    killer: Option<usize>,
}

impl Profile {
    pub fn new(random: &mut Random) -> Profile {
        let blocks = if random.once_in(2) { random.within(3..=14) } else { random.within(15..=80) };
        let model_len_max = random.within(BLOCK_TOKENS..=blocks.min(12) * BLOCK_TOKENS + 20);
        let limits = Limits {
            model_len_max,
            step_tokens_max: random.within(1..=200),
            step_sequences_max: random.within(1..=16),
            blocks,
        };
        let mut settings = Settings::new(limits, random.within(1..=4));
        settings.steps_in_flight_max = random.within(1..=4);
        settings.steps_ahead = random.within(0..=2);
        settings.jobs_waiting_max = random.within(2..=40);
        settings.prefix_cache = !random.once_in(8);
        settings.drafts_max = if random.once_in(2) { random.within(1..=8) } else { 0 };
        settings.predicts = settings.drafts_max > 0 && random.once_in(2);
        if random.once_in(4) {
            settings.block_hash = |_, _| 0;
        }
        let mut families: Vec<Vec<u32>> = (0..2).map(|_| tokens(random, model_len_max)).collect();
        // Equal blocks after another beginning: what they hold differs.
        families.push([&[VOCABULARY - 1 - families[0][0]], &families[0][1..]].concat());
        Profile {
            settings,
            jobs: random.within(5..=60),
            cancel_in: random.word() % 5,
            fault_every: if random.once_in(3) { 60 } else { 0 },
            families,
            killer: random.once_in(6).then(|| random.within(0..=10)),
            pause_max: if random.once_in(2) { PAUSE_MAX_US } else { PAUSE_MAX_US / 10 },
        }
    }

    pub fn pause(&self, random: &mut Random) -> u64 {
        random.within(0..=self.pause_max) as u64
    }

    pub fn job(&self, random: &mut Random, number: usize) -> Job {
        let model_len_max = self.settings.limits.model_len_max;
        let family = random.within(0..=self.families.len() - 1);
        let shared = random.within(0..=model_len_max * 3 / 4);
        let tail = random.within(1..=model_len_max / 4 + 1);
        let mut prompt = self.families[family][..shared].to_vec();
        prompt.extend(tokens(random, tail));
        if random.once_in(40) {
            prompt.resize(model_len_max, 1);
        }
        if self.killer == Some(number) {
            prompt.pop();
            prompt.push(KILLER);
        }
        let salt = random.word() % 2;
        let sampling = Sampling {
            seed: random.word() << 1 | salt,
            presence_penalty: if random.once_in(4) { 0.5 } else { 0.0 },
            logprobs: random.once_in(4).then_some(0),
            prompt_logprobs: random.once_in(6).then_some(0),
            ..Sampling::GREEDY
        };
        Job {
            id: format!("job {number}"),
            prompt,
            sampling,
            choices: if random.once_in(4) { random.within(2..=4) as u32 } else { 1 },
            tokens_max: if random.once_in(12) { 0 } else { random.within(1..=90) as u32 },
            end_tokens: if random.once_in(2) { vec![7] } else { Vec::new() },
            salt,
            turn: Turn {
                tenant: random.within(0..=3) as u64,
                priority: random.within(0..=4) as i32 - 2,
                weight: random.within(1..=3) as u32,
            },
            resumed: None,
            deaths: 0,
        }
    }

    /// The group after a fault: other lanes and depths; rarely smaller pools.
    pub fn replan(&mut self, random: &mut Random) {
        self.settings.lanes = random.within(1..=4);
        self.settings.steps_in_flight_max = random.within(1..=4);
        self.settings.steps_ahead = random.within(0..=2);
        self.settings.limits.blocks += random.within(0..=3);
        if random.once_in(3) {
            self.settings.limits.blocks = self.settings.limits.blocks.div_ceil(2);
        }
    }
}

fn tokens(random: &mut Random, count: usize) -> Vec<u32> {
    (0..count).map(|_| (random.word() % u64::from(VOCABULARY)) as u32).collect()
}
