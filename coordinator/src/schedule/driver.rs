//! The shell around the scheduler: jobs in from the API, steps to a group, outputs back. It owns no clock and no task;
//! with nothing to do it waits for a job and wakes for nothing else.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use model::fault::Fault;
use tokio::sync::{mpsc, watch};

use super::Settings;
use super::job::{Output, Refusal, Submission};
use super::load::Load;
use super::scheduler::{Delivery, JobId, Scheduler};
use crate::group::ShardGroup;

/// Recounting all blocks takes time that a job arriving just then would wait for.
const INTEGRITY_INTERVAL: Duration = Duration::from_secs(10);

/// Why [`Driver::run`] came back.
#[derive(Debug, Clone, PartialEq)]
pub enum Ended {
    /// Every [`super::job::Door`] is gone and every job has ended.
    Closed,
    /// The group failed. All jobs are kept: [`Driver::requeue`], then run again with a new group.
    Faulted(Fault),
}

/// One group's scheduler with its jobs' channels. It outlives the groups that it runs.
pub struct Driver {
    scheduler: Scheduler,
    submissions: mpsc::Receiver<Submission>,
    outputs: BTreeMap<JobId, mpsc::Sender<Output>>,
    load: watch::Sender<Load>,
    clock: fn() -> Instant,
    checked: Instant,
    closed: bool,
}

impl Driver {
    /// `clock` is `Instant::now` but in tests.
    pub fn new(
        settings: Settings,
        submissions: mpsc::Receiver<Submission>,
        clock: fn() -> Instant,
    ) -> (Driver, watch::Receiver<Load>) {
        let scheduler = Scheduler::new(settings);
        let (load, watched) = watch::channel(scheduler.load());
        let outputs = BTreeMap::new();
        (Driver { scheduler, submissions, outputs, load, clock, checked: clock(), closed: false }, watched)
    }

    /// Serves with a group that was just loaded, until it fails or nobody can send jobs any more. May be dropped at any
    /// await: then too, [`Self::requeue`] before the next run.
    pub async fn run(&mut self, group: &mut impl ShardGroup) -> Ended {
        loop {
            self.take_waiting();
            self.cancel_closed();
            while let Some((step, batch)) = self.scheduler.next((self.clock)()) {
                if let Err(fault) = group.submit(step, batch) {
                    return self.end(fault);
                }
            }
            self.publish();
            if self.scheduler.steps_in_flight() == 0 {
                if let Err(fault) = self.check_when_idle() {
                    return self.end(fault);
                }
                match self.submissions.recv().await {
                    Some(submission) => self.take(submission),
                    None => return Ended::Closed,
                }
                continue;
            }
            let answer = tokio::select! {
                biased;
                submission = self.submissions.recv(), if !self.closed => {
                    match submission {
                        Some(submission) => self.take(submission),
                        None => self.closed = true,
                    }
                    continue;
                }
                answer = group.next() => answer,
            };
            let completed = answer.and_then(|(step, result)| self.scheduler.complete((self.clock)(), step, result));
            match completed {
                Ok(deliveries) => self.deliver(deliveries),
                Err(fault) => return self.end(fault),
            }
        }
    }

    /// Takes jobs into the queue while there is no group; to be dropped when there is one again. Returns only when nobody
    /// can send jobs any more.
    pub async fn hold(&mut self) {
        while let Some(submission) = self.submissions.recv().await {
            self.take(submission);
            self.cancel_closed();
            self.publish();
        }
        self.closed = true;
    }

    /// Puts everything that ran back into the queue, for a new group with these settings. Jobs that it can't hold fail.
    pub fn requeue(&mut self, settings: Settings) {
        let deliveries = self.scheduler.requeue_all(settings);
        self.deliver(deliveries);
        self.publish();
    }

    /// Ends all jobs: there will be no group that serves them.
    pub fn fail_all(&mut self, refusal: &Refusal) {
        let deliveries = self.scheduler.fail_all(refusal);
        self.deliver(deliveries);
        self.publish();
    }

    fn take_waiting(&mut self) {
        while let Ok(submission) = self.submissions.try_recv() {
            self.take(submission);
        }
    }

    fn take(&mut self, submission: Submission) {
        let Submission { job, accepted, outputs } = submission;
        match self.scheduler.add((self.clock)(), job) {
            Ok(id) => {
                // A client that left before the answer needs no job.
                if accepted.send(Ok(())).is_ok() {
                    self.outputs.insert(id, outputs);
                } else {
                    self.scheduler.cancel(id);
                }
            }
            Err(refusal) => {
                // Nobody is left to tell if this fails.
                let _ = accepted.send(Err(refusal));
            }
        }
    }

    /// Cancels the jobs whose client hung up. Jobs in work mean steps, so this runs often enough without a wake-up of its own.
    fn cancel_closed(&mut self) {
        let scheduler = &mut self.scheduler;
        self.outputs.retain(|job, outputs| {
            let closed = outputs.is_closed();
            if closed {
                scheduler.cancel(*job);
            }
            !closed
        });
    }

    /// Sends without waiting: a client that does not read must not slow the others.
    fn deliver(&mut self, deliveries: Vec<Delivery>) {
        for Delivery { job, output, last } in deliveries {
            let Some(outputs) = self.outputs.get(&job) else { continue };
            let sent = outputs.try_send(output).is_ok();
            if !sent {
                self.scheduler.cancel(job);
            }
            if !sent || last {
                self.outputs.remove(&job);
            }
        }
    }

    fn check_when_idle(&mut self) -> Result<(), Fault> {
        let now = (self.clock)();
        if now.saturating_duration_since(self.checked) < INTEGRITY_INTERVAL {
            return Ok(());
        }
        self.checked = now;
        self.scheduler.check_integrity()
    }

    fn publish(&self) {
        let load = self.scheduler.load();
        self.load.send_if_modified(|published| {
            let modified = *published != load;
            *published = load;
            modified
        });
    }

    fn end(&self, fault: Fault) -> Ended {
        self.publish();
        Ended::Faulted(fault)
    }
}
