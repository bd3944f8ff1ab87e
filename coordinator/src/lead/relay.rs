//! Requests to whoever leads. A request that was taken is not lost with its leader: what its client has is kept here, and
//! the next leader goes on from it. Greedy or drawn, the tokens are the same: a draw depends on seed, choice and position.

use super::carried::{Carried, Entered};
use super::peer::{Lost, Peer};
use crate::api::view::ClusterView;
use crate::cluster::role::Lead;
use crate::schedule::job::{Job, Output, Outputs, Refusal, Submission};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc, watch};

/// Between two tries to enter a request.
pub const RETRY: Duration = Duration::from_millis(50);

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
                let (answer, stream) = match taken {
                    Ok(Ok(stream)) => (Ok(Ok(())), Some(stream)),
                    Ok(Err(refusal)) => (Ok(Err(refusal)), None),
                    Err(Lost) => (Err(Lost), None),
                };
                match (carried.entered(answer), stream) {
                    (Entered::Taken, Some(stream)) => {
                        if accepted.take().is_some_and(|(accepted, _)| accepted.send(Ok(())).is_err()) {
                            return;
                        }
                        match pass(&mut carried, stream, &outputs, &mut enough).await {
                            Passed::Ended => return,
                            Passed::Lost => {}
                        }
                    }
                    (Entered::Refused(refusal), _) => {
                        // Nobody is left to tell if this fails.
                        return drop(accepted.take().map(|(accepted, _)| accepted.send(Err(refusal))));
                    }
                    (Entered::Failed(refusal), _) => return drop(outputs.try_send(Output::Failed(refusal))),
                    (Entered::Taken | Entered::Again, _) => {}
                }
                if accepted.as_ref().is_some_and(|(accepted, _)| accepted.is_closed()) {
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

/// Passes a leader's answers on and remembers them.
async fn pass(
    carried: &mut Carried,
    mut stream: Outputs,
    outputs: &mpsc::Sender<Output>,
    enough: &mut mpsc::Receiver<u32>,
) -> Passed {
    loop {
        let output = tokio::select! {
            output = stream.recv() => output,
            Some(choice) = enough.recv() => {
                stream.enough(choice);
                carried.enough(choice);
                continue;
            }
            () = outputs.closed() => return Passed::Ended,
        };
        let Some(output) = output else {
            return if carried.is_over() { Passed::Ended } else { Passed::Lost };
        };
        let (told, last) = carried.take(output);
        for output in told {
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
