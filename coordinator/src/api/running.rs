//! A request under way: its jobs' outputs, merged and turned into pieces. Dropping it drops the receivers, which
//! cancels the jobs; so a client that goes away costs nothing more.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use super::State;
use super::answer::{Answers, Choice, Piece, Prompt, Usage};
use super::auth::Tenant;
use super::error::ApiError;
use super::limits;
use super::request::Ask;
use crate::metrics;
use crate::schedule::job::{Job, Outputs, Refusal};

/// All of a request's answers.
pub struct Whole {
    pub choices: Vec<Choice>,
    pub usage: Usage,
    pub prompts: Vec<Prompt>,
}

pub struct Running {
    /// One a prompt; none when all its choices are finished.
    jobs: Vec<Option<Outputs>>,
    answers: Answers,
    /// Choices not finished.
    open: usize,
    meter: Meter,
    /// Whose it is: it runs until this is gone, and what it generates is counted.
    tenant: Tenant,
}

impl Running {
    /// Submits one job a prompt. When one is refused those before it are cancelled. `rooms` are the most tokens
    /// to answer each prompt with.
    pub async fn start(
        state: &State,
        id: &str,
        tenant: &Tenant,
        ask: &Ask,
        prompts: Vec<Prompt>,
        rooms: Vec<u32>,
    ) -> Result<Running, ApiError> {
        assert_eq!(prompts.len(), rooms.len());
        state.check_serving()?;
        let tokens = prompts.iter().map(|prompt| prompt.tokens.len()).sum();
        tenant.prompt(tokens)?;
        let salt = tenant.salt(&ask.cache_salt);
        let turn = tenant.turn(ask.priority);
        let mut jobs = Vec::with_capacity(prompts.len());
        for (number, (prompt, tokens_max)) in prompts.iter().zip(rooms).enumerate() {
            let id = if prompts.len() == 1 { id.to_string() } else { format!("{id}-{number}") };
            let job = Job {
                id,
                prompt: prompt.tokens.clone(),
                sampling: ask.sampling.clone(),
                choices: ask.choices,
                tokens_max,
                end_tokens: ask.end_tokens.clone(),
                salt,
                turn,
                resumed: None,
                deaths: 0,
            };
            let submitted = submit(state, job).await;
            jobs.push(Some(submitted.inspect_err(|_| tenant.refund(tokens))?));
        }
        let tokenizer = Arc::clone(&state.text.tokenizer);
        let answers =
            Answers::new(tokenizer, ask.wording.clone(), ask.end_tokens.clone(), prompts, ask.choices as usize);
        let (open, meter) = (answers.count(), Meter::start(&answers));
        Ok(Running { jobs, answers, open, meter, tenant: tenant.clone() })
    }

    pub fn usage(&self) -> Usage {
        self.answers.usage
    }

    pub fn prompts(&self) -> &[Prompt] {
        self.answers.prompts()
    }

    /// The number of choices over all prompts.
    pub fn count(&self) -> usize {
        self.answers.count()
    }

    /// The next piece; none after the last choice's last. An error is the end, too.
    pub fn poll_piece(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Piece, Refusal>>> {
        loop {
            if let Some(piece) = self.answers.take() {
                self.meter.piece(&piece);
                if !piece.echo {
                    self.tenant.generated(piece.tokens.len());
                }
                if piece.finish.is_some() {
                    self.open -= 1;
                    self.enough(piece.index);
                }
                if self.open == 0 {
                    self.meter.end();
                }
                return Poll::Ready(Some(Ok(piece)));
            }
            if self.open == 0 {
                return Poll::Ready(None);
            }
            match self.poll_output(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(refusal)) => {
                    self.jobs.clear();
                    self.meter.failed();
                    return Poll::Ready(Some(Err(refusal)));
                }
            }
        }
    }

    /// A choice has ended, perhaps before its sequence: nobody wants more of that.
    fn enough(&self, index: usize) {
        let each = self.answers.count() / self.jobs.len().max(1);
        if let Some(Some(job)) = self.jobs.get(index / each.max(1)) {
            job.enough((index % each.max(1)) as u32);
        }
    }

    pub async fn piece(&mut self) -> Option<Result<Piece, Refusal>> {
        std::future::poll_fn(|context| self.poll_piece(context)).await
    }

    /// Waits for all answers, in order of their index.
    pub async fn collect(mut self) -> Result<Whole, ApiError> {
        let mut choices = vec![Choice::default(); self.count()];
        while let Some(piece) = self.piece().await {
            let piece = piece?;
            choices[piece.index].add(piece);
        }
        Ok(Whole { choices, usage: self.usage(), prompts: self.prompts().to_vec() })
    }

    /// Pushes one output of every job that has one.
    fn poll_output(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Refusal>> {
        let mut pushed = false;
        for prompt in 0..self.jobs.len() {
            let Some(job) = &mut self.jobs[prompt] else { continue };
            match job.poll_recv(context) {
                Poll::Pending => continue,
                Poll::Ready(Some(output)) => self.answers.push(prompt, output)?,
                Poll::Ready(None) => {
                    let text = "the answer was cut off: the client read too slowly or the server stopped";
                    return Poll::Ready(Err(Refusal::Failed(text.into())));
                }
            }
            pushed = true;
            if self.answers.finished(prompt) {
                self.jobs[prompt] = None;
            }
        }
        if pushed { Poll::Ready(Ok(())) } else { Poll::Pending }
    }
}

async fn submit(state: &State, job: Job) -> Result<Outputs, ApiError> {
    match tokio::time::timeout(limits::SUBMIT_TIME_MAX, state.door.submit(job)).await {
        Ok(Err(refusal)) => {
            if matches!(refusal, Refusal::QueueFull { .. }) {
                state.crowd.refused(state.began.elapsed());
            }
            Err(refusal.into())
        }
        Ok(Ok(outputs)) => Ok(outputs),
        Err(_) => Err(ApiError::NotServing("not serving: the scheduler does not answer".into())),
    }
}

/// Times a request for the metrics. One that is dropped before its end counts as aborted.
struct Meter {
    began: Instant,
    /// When each choice's last token came.
    last: Vec<Option<Instant>>,
    first: bool,
    prompt_tokens: usize,
    ended: bool,
}

impl Meter {
    fn start(answers: &Answers) -> Meter {
        let last = vec![None; answers.count()];
        Meter { began: Instant::now(), last, first: true, prompt_tokens: answers.usage.prompt_tokens, ended: false }
    }

    fn piece(&mut self, piece: &Piece) {
        if !piece.echo && !piece.tokens.is_empty() {
            let now = Instant::now();
            if std::mem::take(&mut self.first) {
                metrics::first_token(now - self.began, self.prompt_tokens);
            }
            metrics::tokens_generated(piece.tokens.len());
            if let Some(before) = self.last[piece.index].replace(now) {
                metrics::between_tokens(now - before);
            }
        }
        if let Some(finish) = &piece.finish {
            metrics::choice_finished(finish.reason());
        }
    }

    fn end(&mut self) {
        if !std::mem::replace(&mut self.ended, true) {
            metrics::request_ended(self.began.elapsed());
        }
    }

    fn failed(&mut self) {
        self.ended = true;
        metrics::choice_finished("error");
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if !self.ended {
            metrics::choice_finished("abort");
        }
    }
}
