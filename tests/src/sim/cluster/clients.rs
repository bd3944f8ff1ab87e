//! The clients: what each one asked and was told, held against the oracle.

use std::collections::BTreeSet;

use coordinator::schedule::job::{DoneReason, Job, Output, Refusal};
use model::plan::BLOCK_TOKENS;
use model::step::Score;

use super::tally::Tally;
use crate::sim::oracle;
use crate::sim::profile::KILLER;

/// One request as its client sees it.
pub struct Client {
    job: Job,
    pub coordinator: usize,
    pub state: State,
    started: bool,
    scores: Option<Vec<Score>>,
    choices: Vec<(oracle::Drawn, Option<DoneReason>)>,
    /// Of this choice no more than so many tokens are wanted.
    pub stops: Option<(u32, usize)>,
    enough: BTreeSet<u32>,
    /// After so many tokens it hangs up.
    pub patience: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Sent,
    Accepted,
    /// Every choice ended, or is wanted no more.
    Finished,
    HungUp,
    Refused,
    GivenUp,
    /// Its coordinator died: nobody promised anything.
    CutOff,
}

impl Client {
    pub fn new(job: Job, coordinator: usize) -> Client {
        let choices = vec![(Vec::new(), None); job.choices as usize];
        Client {
            job,
            coordinator,
            state: State::Sent,
            started: false,
            scores: None,
            choices,
            stops: None,
            enough: BTreeSet::new(),
            patience: None,
        }
    }

    pub fn waits(&self) -> bool {
        matches!(self.state, State::Sent | State::Accepted)
    }

    pub fn accepted(&mut self) {
        assert!(matches!(self.state, State::Sent | State::Accepted));
        self.state = State::Accepted;
    }

    pub fn refused(&mut self, refusal: &Refusal, model_len_max: usize, tally: &mut Tally) {
        assert_eq!(self.state, State::Sent, "whoever was accepted is not refused");
        let rightly = match refusal {
            Refusal::QueueFull { waiting, waiting_max } => waiting >= waiting_max,
            Refusal::TooLong { .. } => self.job.prompt.len() + self.job.tokens_max.min(1) as usize > model_len_max,
            _ => false,
        };
        assert!(rightly, "{} was refused: {refusal}", self.job.id);
        self.state = State::Refused;
        tally.refused += 1;
    }

    /// Takes an output; false once the client hangs up.
    pub fn told(&mut self, output: Output, model_len_max: usize, tally: &mut Tally) -> bool {
        assert_eq!(self.state, State::Accepted, "{} is told {output:?}", self.job.id);
        match output {
            Output::Started { cached_tokens } => {
                assert!(!self.started && cached_tokens as usize <= self.job.prompt.len(), "one start");
                self.started = true;
            }
            Output::PromptScores(scores) => {
                assert!(self.started && self.scores.is_none(), "scores once");
                assert!(self.choices.iter().all(|(tokens, _)| tokens.is_empty()), "scores come before tokens");
                self.scores = Some(scores);
            }
            Output::Token { choice, token, score } => {
                let (tokens, done) = &mut self.choices[choice as usize];
                assert!(self.started && done.is_none(), "{}: a token comes between start and end", self.job.id);
                tokens.push((token, score));
            }
            Output::Done { choice, reason } => {
                let before = self.choices[choice as usize].1.replace(reason);
                assert!(before.is_none(), "{}: one end a choice", self.job.id);
            }
            Output::Moved { .. } => panic!("there is nowhere to move to"),
            Output::Failed(refusal) => self.failed(&refusal, model_len_max, tally),
        }
        if self.patience.is_some_and(|most| self.choices.iter().map(|(tokens, _)| tokens.len()).sum::<usize>() >= most)
            && self.state == State::Accepted
            && !self.all_ended()
        {
            self.hang_up(tally);
            return false;
        }
        true
    }

    fn failed(&mut self, refusal: &Refusal, model_len_max: usize, tally: &mut Tally) {
        match refusal {
            Refusal::TooLong { tokens, tokens_max } => {
                assert!(tokens > tokens_max && *tokens_max == model_len_max, "{refusal}");
                self.state = State::Refused;
                tally.refused += 1;
            }
            Refusal::Failed(why) if why.contains("the workers died") => {
                self.state = State::GivenUp;
                tally.killers_given_up += u64::from(self.job.prompt.ends_with(&[KILLER]));
            }
            other => panic!("{} failed: {other}", self.job.id),
        }
    }

    pub fn hang_up(&mut self, tally: &mut Tally) {
        self.compare(tally);
        self.state = State::HungUp;
        tally.cancelled += 1;
    }

    /// A choice of which there is enough now.
    pub fn had_enough(&mut self, tally: &mut Tally) -> Option<u32> {
        let (choice, most) = self.stops?;
        let (tokens, done) = &self.choices[choice as usize];
        if tokens.len() < most || done.is_some() {
            return None;
        }
        self.stops = None;
        self.enough.insert(choice);
        tally.enough += 1;
        Some(choice)
    }

    fn all_ended(&self) -> bool {
        (0..).zip(&self.choices).all(|(choice, (_, done))| done.is_some() || self.enough.contains(&choice))
    }

    /// Nothing more is told.
    pub fn over(&mut self, model_len_max: usize, tally: &mut Tally) {
        if self.state != State::Accepted {
            return;
        }
        assert!(self.all_ended(), "{} ends before its answers do", self.job.id);
        assert!(!self.job.prompt.contains(&KILLER), "a killer is answered");
        self.compare(tally);
        for (choice, (tokens, done)) in (0..).zip(&self.choices).filter(|(c, _)| !self.enough.contains(c)) {
            let expected = oracle::answer(&self.job, choice, model_len_max);
            let told = (tokens, done.expect("it has ended"));
            assert_eq!(told, (&expected.0, expected.1), "choice {choice} of {}", self.job.id);
        }
        let expected = self.job.sampling.prompt_logprobs.map(|_| oracle::prompt_scores(&self.job));
        assert_eq!(self.scores, expected, "prompt scores of {}", self.job.id);
        self.state = State::Finished;
        tally.requests_finished += 1;
        tally.scores_checked += u64::from(self.scores.is_some());
        tally.choices_shared += u64::from(self.job.choices > 1 && self.job.prompt.len() > BLOCK_TOKENS);
    }

    /// What came is the beginning of what must come.
    fn compare(&self, tally: &mut Tally) {
        for (choice, (tokens, _)) in (0..).zip(&self.choices) {
            let expected = oracle::answer(&self.job, choice, usize::MAX).0;
            let wrong = (0..).zip(tokens).find(|(at, token)| expected.get(*at) != Some(token));
            assert!(
                wrong.is_none(),
                "choice {choice} of {}: {wrong:?}, not {:?}",
                self.job.id,
                wrong.and_then(|(at, _)| expected.get(at))
            );
            tally.tokens_checked += tokens.len() as u64;
        }
    }

    pub fn cut_off(&mut self, tally: &mut Tally) {
        self.compare(tally);
        self.state = State::CutOff;
        tally.lost_with_coordinator += 1;
    }

    /// For people.
    pub fn describe(&self) -> String {
        let tokens: Vec<usize> = self.choices.iter().map(|(tokens, _)| tokens.len()).collect();
        format!(
            "{} at coordinator {}: {:?}, {tokens:?} of {} tokens",
            self.job.id, self.coordinator, self.state, self.job.tokens_max
        )
    }
}
