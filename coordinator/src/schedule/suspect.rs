//! Requests that kill. What a step computes follows from its requests alone, so a request that once ended its group ends
//! the next one too, at the same place. Whoever was in flight when a group died is remembered with the tokens it had; who
//! was there again without a token more is next run alone, while all others pause, until it has passed that place; and who was
//! alone when it was there for the second time, or more often, is given up. Whoever passes the place is cleared: a request
//! that was only near a death costs nothing.

use std::collections::{BTreeMap, BTreeSet};

use sha2::{Digest, Sha256};

use super::job::Refusal;
use super::scheduler::{Delivery, JobId, Scheduler};
use super::sequence::{Age, Slot};

/// Deaths at one place of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Deaths {
    pub count: u32,
    /// Tokens of all its choices, prompts included.
    tokens: usize,
}

/// A request that is not tried again.
#[derive(Debug, Clone, PartialEq)]
pub struct GivenUp {
    pub delivery: Delivery,
    pub deaths: u32,
    /// SHA-256 of the prompt's ids, each as four little-endian bytes: tells operators the same request again without
    /// telling them what it says.
    pub prompt_sha256: String,
}

impl Scheduler {
    /// To be called when a group died, before [`Self::requeue_all`]: looks at what was in flight.
    pub fn died(&mut self) -> Vec<GivenUp> {
        let flown = self.flights.iter().flat_map(|flight| flight.lanes.iter().flatten());
        let jobs: BTreeSet<JobId> = flown.map(|flown| self.roster.get(flown.slot).age.job).collect();
        let alone = jobs.len() == 1;
        let mut given_up = Vec::new();
        for job in jobs {
            let tokens = self.tokens_of(job);
            // A job that was cancelled meanwhile comes to its end anyway.
            let Some(request) = self.requests.get_mut(&job) else { continue };
            let count = if request.deaths.tokens == tokens { request.deaths.count + 1 } else { 1 };
            request.deaths = Deaths { count, tokens };
            if count < 2 {
                continue;
            }
            self.suspects.insert(job);
            if alone {
                let prompt_sha256 = self.prompt_sha256(job);
                let text =
                    format!("the workers died {count} times while they computed this request, at last nothing else");
                let delivery = self.fail(job, Refusal::Failed(text));
                given_up.push(GivenUp { delivery, deaths: count, prompt_sha256 });
            }
        }
        given_up
    }

    /// A job that comes from another scheduler brings what is known of it.
    pub(super) fn remember_deaths(&mut self, job: JobId, count: u32) {
        let tokens = self.tokens_of(job);
        if let Some(request) = self.requests.get_mut(&job).filter(|_| count > 0) {
            request.deaths = Deaths { count, tokens };
            if count > 1 {
                self.suspects.insert(job);
            }
        }
    }

    /// How often workers died over a job at the place where it is.
    pub fn deaths(&self, job: JobId) -> u32 {
        let tokens = self.tokens_of(job);
        self.requests.get(&job).filter(|r| r.deaths.tokens == tokens).map_or(0, |r| r.deaths.count)
    }

    /// The job has drawn a token: if it was a suspect it is none any more.
    pub(super) fn clear(&mut self, job: JobId) {
        if let Some(request) = self.requests.get_mut(&job) {
            request.deaths = Deaths::default();
        }
        self.suspects.remove(&job);
    }

    /// The suspect whose turn it is to run alone.
    pub(super) fn alone(&self) -> Option<JobId> {
        self.suspects.first().copied()
    }

    /// Whether a step in flight computes anything but this job.
    pub(super) fn flies_beside(&self, job: JobId) -> bool {
        let mut flown = self.flights.iter().flat_map(|flight| flight.lanes.iter().flatten());
        flown.any(|flown| self.roster.get(flown.slot).age.job != job)
    }

    /// The oldest entry of a queue, of this job where one is given.
    pub(super) fn oldest(queue: &BTreeMap<Age, Slot>, only: Option<JobId>) -> Option<Slot> {
        match only {
            None => queue.first_key_value().map(|(_, &slot)| slot),
            Some(job) => {
                let (age, &slot) = queue.range(Age { job, choice: 0 }..).next()?;
                (age.job == job).then_some(slot)
            }
        }
    }

    fn tokens_of(&self, job: JobId) -> usize {
        let slots = self.requests.get(&job).map_or(&[][..], |request| &request.slots);
        slots.iter().map(|slot| self.roster.get(*slot).tokens.len()).sum()
    }

    fn prompt_sha256(&self, job: JobId) -> String {
        let sequence =
            self.requests.get(&job).and_then(|request| request.slots.first()).map(|slot| self.roster.get(*slot));
        let mut hash = Sha256::new();
        for id in sequence.iter().flat_map(|sequence| &sequence.tokens[..sequence.prompt_len]) {
            hash.update(id.to_le_bytes());
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
