//! What a seed stands for: how many processes, which rules, which requests and which faults.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use coordinator::cluster::state::{Planner, Rules};
use coordinator::plan::{self, Device, Offer, Policy};
use coordinator::run::{BEAT, GROW};
use coordinator::schedule::Turn;
use coordinator::schedule::job::Job;
use coordinator::source::Source;
use model::plan::{BLOCK_TOKENS, Epoch, KernelFamily, Plan, WorkerId};
use model::step::Sampling;

use super::net::MS;
use crate::ring::fixture;
use crate::sim::oracle::VOCABULARY;
use crate::sim::profile::KILLER;
use crate::sim::random::Random;

/// Cache of a token of the small model.
const TOKEN_BYTES: usize = 768;

/// The production planner over a small model of experts.
#[derive(Clone)]
pub struct Maker {
    policy: Arc<Policy>,
}

impl Planner for Maker {
    fn plan(&self, epoch: Epoch, members: &[Offer], previous: Option<&Plan>) -> Result<Plan, String> {
        let source = source();
        let planned = plan::plan(&source.spec, &source.storage, members, &self.policy, previous);
        planned.map(|planned| Plan { epoch, ..planned.plan }).map_err(|e| e.to_string())
    }
}

fn source() -> &'static Source {
    static SOURCE: OnceLock<Source> = OnceLock::new();
    SOURCE.get_or_init(|| Source::open(&fixture("mixtral_8x22b")).expect("the fixture is part of the repository"))
}

/// One seed's world.
pub struct Setting {
    pub coordinators: usize,
    pub workers: usize,
    pub devices: usize,
    pub rules: Rules,
    pub maker: Maker,
    pub model_len_max: usize,
    pub waiting_max: usize,
    pub requests: usize,
    /// Most time between two requests, and between two faults on average.
    pub request_every: u64,
    pub fault_every: u64,
    /// Longest load, and longest step.
    pub load_max: u64,
    pub step_max: u64,
    /// Whatever waits when faults stop is answered in time.
    pub light: bool,
    killer: Option<usize>,
    families: Vec<Vec<u32>>,
}

impl Setting {
    pub fn new(random: &mut Random) -> Setting {
        let workers = random.within(1..=5);
        let devices = random.within(1..=2);
        let model_len_max = random.within(40..=320);
        // Few requests for which there is much room: how long they take is no question of load.
        let light = random.once_in(2);
        let step_tokens_max = if light { 160 } else { random.within(8..=160) };
        let mut policy = Policy {
            model_len_max: Some(model_len_max),
            step_tokens_max,
            step_sequences_max: if light { 16 } else { random.within(1..=step_tokens_max.min(12)) },
            ..Policy::default()
        };
        if !light && random.once_in(2) {
            // As little as one of the longest sequences takes, or some more.
            let blocks = model_len_max.div_ceil(BLOCK_TOKENS) + random.within(0..=6);
            policy.cache_bytes = Some((blocks * BLOCK_TOKENS * TOKEN_BYTES) as u64);
        }
        match random.within(0..=5) {
            0 if workers * devices >= 2 => policy.data = Some(2),
            1 if workers * devices >= 2 => policy.pipeline = Some(2),
            2 if workers * devices >= 2 => policy.tensor = Some(2),
            _ => {}
        }
        let rules = Rules {
            workers: random.within(1..=workers),
            settle: Some(Duration::from_millis(random.within(500..=3000) as u64)),
            silence: BEAT * 5,
            retry: Duration::from_millis(500),
            grow: GROW,
        };
        let tokens = |random: &mut Random| {
            (0..model_len_max).map(|_| (random.word() % u64::from(VOCABULARY)) as u32).collect::<Vec<u32>>()
        };
        Setting {
            coordinators: random.within(1..=3),
            workers,
            devices,
            rules,
            maker: Maker { policy: Arc::new(policy) },
            model_len_max,
            waiting_max: random.within(3..=40),
            requests: if light { random.within(3..=12) } else { random.within(6..=30) },
            request_every: random.within(50..=1500) as u64 * MS,
            fault_every: random.within(150..=2500) as u64 * MS,
            load_max: random.within(5..=1200) as u64 * MS,
            step_max: if light { 8 * MS } else { random.within(1..=60) as u64 * MS },
            light,
            killer: random.once_in(10).then(|| random.within(0..=4)),
            families: (0..2).map(|_| tokens(random)).collect(),
        }
    }

    /// What proves that a worker reads the same model.
    pub fn identity(&self) -> Vec<u8> {
        vec![7]
    }

    pub fn offer(&self, number: usize) -> Offer {
        let device = Device { memory_bytes: 64 << 20, threads: 1 };
        Offer {
            worker: WorkerId(format!("w{number}")),
            host: format!("h{}", number / 2),
            data_address: format!("10.0.0.{number}:1"),
            devices: vec![device; self.devices],
            families: vec![KernelFamily::Vector],
        }
    }

    pub fn job(&self, random: &mut Random, number: usize) -> Job {
        let shared = random.within(0..=self.model_len_max / 2);
        let tail = random.within(1..=self.model_len_max / 4 + 1);
        let mut prompt = self.families[random.within(0..=1)][..shared].to_vec();
        prompt.extend((0..tail).map(|_| (random.word() % u64::from(VOCABULARY)) as u32));
        if random.once_in(30) {
            prompt.resize(self.model_len_max, 1);
        }
        if self.killer == Some(number) {
            prompt.pop();
            prompt.push(KILLER);
        }
        let salt = random.word() % 2;
        let sampling = Sampling {
            temperature: if random.once_in(2) { 0.0 } else { 0.8 },
            seed: random.word() << 1 | salt,
            presence_penalty: if random.once_in(4) { 0.5 } else { 0.0 },
            logprobs: random.once_in(4).then_some(0),
            prompt_logprobs: random.once_in(6).then_some(0),
            ..Sampling::GREEDY
        };
        Job {
            id: format!("request {number}"),
            prompt,
            sampling,
            choices: if random.once_in(3) { random.within(2..=4) as u32 } else { 1 },
            tokens_max: if random.once_in(15) { 0 } else { random.within(1..=120) as u32 },
            end_tokens: if random.once_in(3) { vec![7] } else { Vec::new() },
            salt,
            resumed: None,
            turn: Turn { tenant: number as u64 % 3, priority: number as i32 % 5 - 2, weight: 1 + number as u32 % 2 },
            deaths: 0,
        }
    }
}
