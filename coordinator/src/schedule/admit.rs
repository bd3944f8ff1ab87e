//! Bounds: what the scheduler is given, and which jobs can't be served within it.

use model::plan::{BLOCK_TOKENS, Limits};

use super::blocks::{BlockHash, chained_hash};
use super::job::{Begun, Job, Refusal};

/// What a scheduler works within. All but the hash may change with a new plan.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    pub limits: Limits,
    /// Data ranks of the group; 0 while there is none.
    pub lanes: usize,
    /// 1 waits for each answer; pipeline stages want one a stage and running sequences are spread over them.
    pub steps_in_flight_max: usize,
    /// Steps beyond those that are issued before it is known here what the last one draws: a decode in them goes on from the token that
    /// the group drew itself.
    pub steps_ahead: usize,
    /// Jobs that may wait before new ones are refused.
    pub jobs_waiting_max: usize,
    pub prefix_cache: bool,
    /// Tokens of a sequence that a step may guess and check at once; see [`super::draft`].
    pub drafts_max: usize,
    /// The plan has predictors, or a draft model: the group guesses too.
    pub predicts: bool,
    pub block_hash: BlockHash,
}

impl Settings {
    /// One step at a time, each answered before the next, 1,024 jobs may wait, prefixes are cached.
    pub fn new(limits: Limits, lanes: usize) -> Settings {
        Settings {
            limits,
            lanes,
            steps_in_flight_max: 1,
            steps_ahead: 0,
            jobs_waiting_max: 1024,
            prefix_cache: true,
            drafts_max: 0,
            predicts: false,
            block_hash: chained_hash,
        }
    }

    /// No group yet: jobs are bounded in number only and wait. Which of them fit is decided when they are requeued for the
    /// first plan.
    pub fn without_plan(jobs_waiting_max: usize) -> Settings {
        let unbounded = u32::MAX as usize;
        let limits = Limits { model_len_max: unbounded, step_tokens_max: 1, step_sequences_max: 1, blocks: unbounded };
        Settings { jobs_waiting_max, ..Settings::new(limits, 0) }
    }

    /// Sequences that a lane admits: a full step for each one in flight, so that each admitted sequence, prefilling ones
    /// too, has a row in every round.
    pub fn lane_sequences_max(&self) -> usize {
        self.limits.step_sequences_max.min(self.limits.step_tokens_max) * self.steps_in_flight_max
    }

    /// Panics on values that no plan may have.
    pub(super) fn check(&self) {
        let limits = &self.limits;
        assert!(self.steps_in_flight_max > 0 && self.jobs_waiting_max > 0, "steps and jobs need room");
        assert!(limits.step_tokens_max > 0 && limits.step_sequences_max > 0, "a step has room for a token");
        assert!(limits.blocks > 0 && limits.model_len_max > 0, "a lane has room for a token");
    }

    /// Tokens at which an answer ends at the latest, prompt included.
    pub(super) fn len_max(&self, prompt: usize, tokens_max: u32) -> usize {
        (prompt + tokens_max as usize).min(self.limits.model_len_max)
    }

    /// Refuses a job that could not be finished even alone.
    pub(super) fn check_job(&self, job: &Job) -> Result<(), Refusal> {
        if job.prompt.is_empty() {
            return Err(Refusal::Failed("the prompt is empty".into()));
        }
        if job.choices == 0 {
            return Err(Refusal::Failed("no choice is wanted".into()));
        }
        let prompt = job.prompt.len();
        let len_max = self.len_max(prompt, job.tokens_max);
        self.check_length(prompt, prompt + job.tokens_max.min(1) as usize, len_max)?;
        let Some(resumed) = &job.resumed else { return Ok(()) };
        let room = |begun: &Begun| begun.done || prompt + begun.tokens.len() < len_max;
        let whole = resumed.len() == job.choices as usize && resumed.iter().all(room);
        if !whole || resumed.iter().all(|begun| begun.done) {
            return Err(Refusal::Failed("nothing is left to draw of what was begun elsewhere".into()));
        }
        Ok(())
    }

    /// `least` tokens there will be whatever is drawn, up to `most` may be. The last token drawn is not cached.
    pub(super) fn check_length(&self, prompt: usize, least: usize, most: usize) -> Result<(), Refusal> {
        let tokens_max = self.limits.model_len_max;
        if least > tokens_max {
            return Err(Refusal::TooLong { tokens: least, tokens_max });
        }
        let blocks = prompt.max(most - 1).div_ceil(BLOCK_TOKENS);
        let blocks_max = self.limits.blocks;
        if blocks > blocks_max {
            return Err(Refusal::NeverFits { blocks, blocks_max });
        }
        Ok(())
    }
}
