//! What the API hands to the scheduler and what comes back. One request is one [`Job`]; each of its `n` answers is a
//! sequence of its own, told apart by `choice`.

use super::queue::Turn;
use model::step::{Sampling, Score};
use std::task::{Context, Poll};
use tokio::sync::{mpsc, oneshot};

/// A parsed, bounded, tokenised request.
#[derive(Debug, Clone)]
pub struct Job {
    /// The request's id, for logs.
    pub id: String,
    pub prompt: Vec<u32>,
    /// Shared by all choices but for [`Sampling::choice`], which the scheduler sets.
    pub sampling: Sampling,
    /// Answers wanted (`n`), at least 1.
    pub choices: u32,
    /// Most tokens to generate a choice; may be 0 (`echo` only).
    pub tokens_max: u32,
    /// Ids that end an answer (empty with `ignore_eos`). The ending token is reported, as [`Output::Token`].
    pub end_tokens: Vec<u32>,
    /// Keeps prefix-cache blocks of different tenants apart; set by the server, never by the client.
    pub salt: u64,
    /// Whose turn it takes.
    pub turn: Turn,
    /// What the client has already, a choice, where another scheduler began the job: [`Output::Started`] and these tokens
    /// are not told again.
    pub resumed: Option<Vec<Begun>>,
    /// How often workers died over it elsewhere, with what it has now.
    pub deaths: u32,
}

/// An answer as far as its client has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Begun {
    pub tokens: Vec<u32>,
    /// It has ended, or nobody wants more of it.
    pub done: bool,
}

/// What happens to a job, in order. For every choice the last event is `Done`; after the last choice's `Done`, or a
/// `Failed`, the channel closes. Exactly one terminal event a choice.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// The prompt was computed, `cached_tokens` of it taken from the prefix cache. Once a job, before any token.
    Started {
        cached_tokens: u32,
    },
    /// Scores of prompt tokens 1.., where asked, once a job, before any token.
    PromptScores(Vec<Score>),
    Token {
        choice: u32,
        token: u32,
        score: Option<Score>,
    },
    Done {
        choice: u32,
        reason: DoneReason,
    },
    /// The whole job ended without an answer.
    Failed(Refusal),
    /// Its group died and another serves: the job is over here, and is to be entered again. Workers died over it so often.
    Moved {
        deaths: u32,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DoneReason {
    /// An end token was drawn.
    End,
    /// `tokens_max` or the model's length was reached.
    Length,
}

/// Why a job was not taken, or not finished.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Refusal {
    #[error("the queue is full: {waiting} requests wait, {waiting_max} may")]
    QueueFull { waiting: usize, waiting_max: usize },
    #[error("{tokens} tokens are needed, the model's length is {tokens_max}")]
    TooLong { tokens: usize, tokens_max: usize },
    #[error("{blocks} cache blocks are needed, a lane has {blocks_max}")]
    NeverFits { blocks: usize, blocks_max: usize },
    #[error("not serving: {0}")]
    NotServing(String),
    #[error("{0}")]
    Failed(String),
}

/// A job on its way to the scheduler.
pub struct Submission {
    pub job: Job,
    /// Told at once whether the job was taken.
    pub accepted: oneshot::Sender<Result<(), Refusal>>,
    /// Outputs. Dropping the receiver cancels the job: its blocks are free within two steps.
    pub outputs: mpsc::Sender<Output>,
    /// Choices of which no more is wanted.
    pub enough: mpsc::Receiver<u32>,
}

/// A job's outputs as they come. Dropping it cancels the job.
#[derive(Debug)]
pub struct Outputs {
    receiver: mpsc::Receiver<Output>,
    enough: mpsc::Sender<u32>,
}

impl Outputs {
    /// Of a job that runs elsewhere.
    pub fn new(receiver: mpsc::Receiver<Output>, enough: mpsc::Sender<u32>) -> Outputs {
        Outputs { receiver, enough }
    }

    pub async fn recv(&mut self) -> Option<Output> {
        self.receiver.recv().await
    }

    pub fn poll_recv(&mut self, context: &mut Context<'_>) -> Poll<Option<Output>> {
        self.receiver.poll_recv(context)
    }

    /// No more of this choice is wanted, as after a stop string: its blocks are free within two steps. To be said once a
    /// choice; what was under way may still come.
    pub fn enough(&self, choice: u32) {
        // There is room for each choice; a scheduler that is gone computes nothing.
        let _ = self.enough.try_send(choice);
    }
}

/// The API's handle on the scheduler; cheap to clone.
#[derive(Clone)]
pub struct Door {
    submissions: mpsc::Sender<Submission>,
}

/// Outputs buffered for a client that reads slowly, a choice; beyond it the job is cancelled rather than the group slowed.
pub const OUTPUTS_BUFFERED: usize = 4096;

impl Door {
    pub fn new(submissions: mpsc::Sender<Submission>) -> Door {
        Door { submissions }
    }

    /// Hands over a job; the receiver yields its outputs. Refused at once when the queue is full.
    pub async fn submit(&self, job: Job) -> Result<Outputs, Refusal> {
        let (outputs, receiver) = mpsc::channel(OUTPUTS_BUFFERED * job.choices as usize);
        let (enough, ended) = mpsc::channel(job.choices.max(1) as usize);
        let (accepted, answer) = oneshot::channel();
        let stopped = || Refusal::NotServing("the scheduler has stopped".into());
        self.submissions.send(Submission { job, accepted, outputs, enough: ended }).await.map_err(|_| stopped())?;
        answer.await.map_err(|_| stopped())??;
        Ok(Outputs { receiver, enough })
    }
}
