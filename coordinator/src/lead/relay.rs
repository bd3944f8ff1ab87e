//! Requests to whoever leads. A request that was taken is not lost with its leader: what its client has is kept here, and
//! the next leader goes on from it. Greedy or drawn, the tokens are the same: a draw depends on seed, choice and position.

use super::peer::{Lost, Peer};
use crate::api::view::ClusterView;
use crate::cluster::role::Lead;
use crate::schedule::job::{Begun, DoneReason, Job, Output, Outputs, Refusal, Submission};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc, watch};

/// Between two tries to enter a request.
const RETRY: Duration = Duration::from_millis(50);

/// Where requests go now.
#[derive(Clone)]
pub enum Route {
    Nowhere,
    Here(Lead),
    There(Box<Peer>),
}

impl Route {
    async fn submit(&self, job: Job) -> Result<Result<Outputs, Refusal>, Lost> {
        match self {
            Route::Nowhere => Err(Lost),
            Route::Here(lead) => match lead.door.submit(job).await {
                Err(Refusal::NotServing(_)) => Err(Lost),
                answer => Ok(answer),
            },
            Route::There(peer) => peer.carry(job).await,
        }
    }
}

/// Carries every request of the queue, each in a task of its own, until nobody can send any more. At most `waiting_max`
/// wait for being taken.
pub async fn carry_all(
    mut queue: mpsc::Receiver<Submission>,
    routes: watch::Receiver<Route>,
    view: watch::Receiver<ClusterView>,
    waiting_max: usize,
) {
    let places = Arc::new(Semaphore::new(waiting_max));
    while let Some(submission) = queue.recv().await {
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            // Nobody is left to tell if this fails.
            let _ = submission.accepted.send(Err(Refusal::QueueFull { waiting: waiting_max, waiting_max }));
            continue;
        };
        let (routes, view) = (routes.clone(), view.clone());
        tokio::spawn(async move {
            let Submission { job, accepted, outputs, mut enough } = submission;
            let mut accepted = Some((accepted, place));
            let mut carried = Carried::new(job);
            loop {
                let model_len_max = view.borrow().model_len_max;
                for output in carried.ends(model_len_max) {
                    if outputs.try_send(output).is_err() {
                        return;
                    }
                }
                if carried.is_over() {
                    return;
                }
                let route = routes.borrow().clone();
                let taken = tokio::select! {
                    taken = route.submit(carried.job()) => taken,
                    () = outputs.closed() => return,
                };
                let lost = match (taken, &accepted) {
                    (Ok(Ok(stream)), _) => {
                        if accepted.take().is_some_and(|(accepted, _)| accepted.send(Ok(())).is_err()) {
                            return;
                        }
                        match carried.pass(stream, &outputs, &mut enough).await {
                            Passed::Ended => return,
                            Passed::Lost => true,
                        }
                    }
                    // Whoever was taken once is not sent away for the next leader's full queue.
                    (Err(Lost) | Ok(Err(Refusal::QueueFull { .. })), None) | (Err(Lost), Some(_)) => true,
                    (Ok(Err(refusal)), _) => {
                        match accepted.take() {
                            Some((accepted, _)) => drop(accepted.send(Err(refusal))),
                            None => drop(outputs.try_send(Output::Failed(refusal))),
                        }
                        false
                    }
                };
                if !lost || accepted.as_ref().is_some_and(|(accepted, _)| accepted.is_closed()) {
                    return;
                }
                tokio::time::sleep(RETRY).await;
            }
        });
    }
}

/// How a leader's answers ended.
enum Passed {
    /// There is nothing more to tell, or nobody to tell it to.
    Ended,
    Lost,
}

/// A request and what its client has of it.
struct Carried {
    job: Job,
    /// The prompt's part was told whole.
    started: bool,
    begun: Vec<Begun>,
}

impl Carried {
    fn new(job: Job) -> Carried {
        let begun = vec![Begun::default(); job.choices as usize];
        Carried { job, started: false, begun }
    }

    /// The job as the next leader must get it.
    fn job(&self) -> Job {
        Job { resumed: self.started.then(|| self.begun.clone()), ..self.job.clone() }
    }

    fn is_over(&self) -> bool {
        self.begun.iter().all(|begun| begun.done)
    }

    /// Ends of answers whose last token came and whose end did not.
    fn ends(&mut self, model_len_max: usize) -> Vec<Output> {
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

    /// Passes a leader's answers on and remembers them.
    async fn pass(
        &mut self,
        mut stream: Outputs,
        outputs: &mpsc::Sender<Output>,
        enough: &mut mpsc::Receiver<u32>,
    ) -> Passed {
        // Told together with the scores that follow it, so that a cut between them loses neither.
        let mut start = None;
        loop {
            let output = tokio::select! {
                output = stream.recv() => output,
                Some(choice) = enough.recv() => {
                    stream.enough(choice);
                    if let Some(begun) = self.begun.get_mut(choice as usize) {
                        begun.done = true;
                    }
                    continue;
                }
                () = outputs.closed() => return Passed::Ended,
            };
            let Some(output) = output else {
                return if self.is_over() { Passed::Ended } else { Passed::Lost };
            };
            let mut last = false;
            match &output {
                Output::Started { .. } if self.job.sampling.prompt_logprobs.is_some() => {
                    start = Some(output);
                    continue;
                }
                Output::Started { .. } | Output::PromptScores(_) => self.started = true,
                Output::Token { choice, token, .. } => {
                    if let Some(begun) = self.begun.get_mut(*choice as usize) {
                        begun.tokens.push(*token);
                    }
                }
                Output::Done { choice, .. } => {
                    if let Some(begun) = self.begun.get_mut(*choice as usize) {
                        begun.done = true;
                    }
                    last = self.is_over();
                }
                Output::Failed(_) => last = true,
            }
            for output in start.take().into_iter().chain([output]) {
                // A client that does not read is cancelled rather than waited for.
                if outputs.try_send(output).is_err() {
                    return Passed::Ended;
                }
            }
            if last {
                return Passed::Ended;
            }
        }
    }
}
