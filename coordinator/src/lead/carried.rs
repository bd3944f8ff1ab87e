//! A request that outlives leaders: what its client has of it, and how the next leader must be told. Pure; the relay does
//! what it says.

use super::peer::Lost;
use crate::schedule::job::{Begun, DoneReason, Job, Output, Refusal};

/// A request and what its client has of it.
#[derive(Debug)]
pub struct Carried {
    job: Job,
    /// A leader took it once.
    accepted: bool,
    /// The prompt's part was told whole.
    started: bool,
    /// [`Output::Started`], held back until the prompt's scores are there, so that a cut between them loses neither.
    start: Option<Output>,
    begun: Vec<Begun>,
}

/// What follows from a try to enter a request with a leader.
#[derive(Debug, PartialEq)]
pub enum Entered {
    /// Its outputs come: [`Carried::take`].
    Taken,
    /// Try again in a moment, perhaps elsewhere.
    Again,
    /// Nobody had taken it before: it is refused.
    Refused(Refusal),
    /// It had been taken, and can't be finished.
    Failed(Refusal),
}

impl Carried {
    pub fn new(job: Job) -> Carried {
        let begun = vec![Begun::default(); job.choices as usize];
        Carried { job, accepted: false, started: false, start: None, begun }
    }

    /// The job as the next leader must get it.
    pub fn job(&self) -> Job {
        Job { resumed: self.started.then(|| self.begun.clone()), ..self.job.clone() }
    }

    pub fn is_over(&self) -> bool {
        self.begun.iter().all(|begun| begun.done)
    }

    /// Ends of answers whose last token came and whose end did not. To be told before the job is entered again.
    pub fn ends(&mut self, model_len_max: usize) -> Vec<Output> {
        let (job, started) = (&self.job, self.started);
        let planned = if model_len_max == 0 { usize::MAX } else { model_len_max };
        let mut ends = Vec::new();
        for (choice, begun) in (0..).zip(&mut self.begun).filter(|(_, begun)| started && !begun.done) {
            let by_token = begun.tokens.last().is_some_and(|token| job.end_tokens.contains(token));
            let tokens = begun.tokens.len();
            let reason = match by_token {
                true => DoneReason::End,
                false if tokens >= job.tokens_max as usize || job.prompt.len() + tokens >= planned => {
                    DoneReason::Length
                }
                false => continue,
            };
            begun.done = true;
            ends.push(Output::Done { choice, reason });
        }
        ends
    }

    /// A leader answered to [`Self::job`], or nobody did.
    pub fn entered(&mut self, answer: Result<Result<(), Refusal>, Lost>) -> Entered {
        match answer {
            Ok(Ok(())) => {
                (self.accepted, self.start) = (true, None);
                Entered::Taken
            }
            Err(Lost) => Entered::Again,
            // Whoever was taken once is not sent away for the next leader's full queue.
            Ok(Err(Refusal::QueueFull { .. })) if self.accepted => Entered::Again,
            Ok(Err(refusal)) if self.accepted => Entered::Failed(refusal),
            Ok(Err(refusal)) => Entered::Refused(refusal),
        }
    }

    /// Nobody wants more of this choice.
    pub fn enough(&mut self, choice: u32) {
        if let Some(begun) = self.begun.get_mut(choice as usize) {
            begun.done = true;
        }
    }

    /// Remembers a leader's output: what the client is told now, and whether that is all it is ever told.
    pub fn take(&mut self, output: Output) -> (Vec<Output>, bool) {
        let mut last = false;
        match &output {
            Output::Started { .. } if self.job.sampling.prompt_logprobs.is_some() => {
                self.start = Some(output);
                return (Vec::new(), false);
            }
            Output::Started { .. } | Output::PromptScores(_) => self.started = true,
            Output::Token { choice, token, .. } => {
                if let Some(begun) = self.begun.get_mut(*choice as usize) {
                    begun.tokens.push(*token);
                }
            }
            Output::Done { choice, .. } => {
                self.enough(*choice);
                last = self.is_over();
            }
            Output::Failed(_) => last = true,
            Output::Moved { deaths } => {
                self.job.deaths = *deaths;
                return (Vec::new(), false);
            }
        }
        (self.start.take().into_iter().chain([output]).collect(), last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::Turn;
    use model::step::{Sampling, Score};

    fn job() -> Job {
        Job {
            id: "x".into(),
            prompt: vec![1, 2],
            sampling: Sampling::GREEDY,
            choices: 2,
            tokens_max: 2,
            end_tokens: vec![9],
            salt: 0,
            resumed: None,
            turn: Turn::default(),
            deaths: 0,
        }
    }

    fn token(choice: u32, token: u32) -> Output {
        Output::Token { choice, token, score: None }
    }

    #[test]
    fn the_next_leader_goes_on_from_what_the_client_has() {
        let mut carried = Carried::new(job());
        assert_eq!(carried.entered(Err(Lost)), Entered::Again);
        assert_eq!(carried.entered(Ok(Ok(()))), Entered::Taken);
        assert!(carried.job().resumed.is_none(), "nothing was told");
        for output in [Output::Started { cached_tokens: 0 }, token(0, 5), token(1, 9)] {
            assert_eq!(carried.take(output.clone()), (vec![output], false));
        }
        assert_eq!(carried.ends(0), [Output::Done { choice: 1, reason: DoneReason::End }]);
        let begun = carried.job().resumed.expect("it has begun");
        assert_eq!(begun, [Begun { tokens: vec![5], done: false }, Begun { tokens: vec![9], done: true }]);
        assert_eq!(carried.entered(Ok(Err(Refusal::QueueFull { waiting: 1, waiting_max: 1 }))), Entered::Again);
        assert_eq!(carried.entered(Ok(Ok(()))), Entered::Taken);
        carried.take(token(0, 6));
        assert_eq!(carried.ends(0), [Output::Done { choice: 0, reason: DoneReason::Length }]);
        assert!(carried.is_over());
    }

    #[test]
    fn a_job_that_is_moved_takes_its_deaths_along() {
        let mut carried = Carried::new(job());
        assert_eq!(carried.entered(Ok(Ok(()))), Entered::Taken);
        assert_eq!(carried.take(Output::Moved { deaths: 2 }), (Vec::new(), false), "its client hears nothing of it");
        assert_eq!((carried.job().deaths, carried.is_over()), (2, false));
    }

    #[test]
    fn a_start_without_its_scores_is_told_again_by_the_next_leader() {
        let sampling = Sampling { prompt_logprobs: Some(0), ..Sampling::GREEDY };
        let mut carried = Carried::new(Job { sampling, ..job() });
        let (start, again) = (Output::Started { cached_tokens: 1 }, Output::Started { cached_tokens: 0 });
        assert_eq!(carried.take(start), (Vec::new(), false));
        assert!(carried.job().resumed.is_none());
        assert_eq!(carried.entered(Ok(Ok(()))), Entered::Taken);
        assert_eq!(carried.take(again.clone()), (Vec::new(), false));
        let scores = Output::PromptScores(vec![Score { logprob: 0.0, rank: 0, best: Vec::new() }]);
        assert_eq!(carried.take(scores.clone()), (vec![again, scores], false));
        assert!(carried.job().resumed.is_some());
    }
}
