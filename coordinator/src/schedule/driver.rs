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
use super::suspect::GivenUp;
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
    outputs: BTreeMap<JobId, Client>,
    load: watch::Sender<Load>,
    clock: fn() -> Instant,
    checked: Instant,
    closed: bool,
}

/// Whoever waits for a job.
struct Client {
    outputs: mpsc::Sender<Output>,
    enough: mpsc::Receiver<u32>,
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

    /// Takes a job into the queue while there is no group; may be dropped. False when nobody can send jobs any more.
    pub async fn hold(&mut self) -> bool {
        let Some(submission) = self.submissions.recv().await else {
            self.closed = true;
            return false;
        };
        self.take(submission);
        self.cancel_closed();
        self.publish();
        true
    }

    /// To be called when a group died, before [`Self::requeue`]: requests that kill workers again and again are given up.
    pub fn died(&mut self) {
        for GivenUp { delivery, deaths, prompt_sha256 } in self.scheduler.died() {
            tracing::error!(
                "a request is given up: workers died {deaths} times over it; its prompt's sha256 {prompt_sha256}"
            );
            self.deliver(vec![delivery]);
        }
    }

    /// Puts everything that ran back into the queue, for a new group with these settings. Jobs that it can't hold fail.
    pub fn requeue(&mut self, settings: Settings) {
        let deliveries = self.scheduler.requeue_all(settings);
        self.deliver(deliveries);
        self.publish();
    }

    /// Sends all jobs elsewhere, where they are to be entered again. To be called between [`Self::requeue`] and the next run.
    pub fn move_all(&mut self) {
        for (job, client) in std::mem::take(&mut self.outputs) {
            // One that does not read is cancelled, as ever.
            let _ = client.outputs.try_send(Output::Moved { deaths: self.scheduler.deaths(job) });
            self.scheduler.cancel(job);
        }
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
        let Submission { job, accepted, outputs, enough } = submission;
        match self.scheduler.add((self.clock)(), job) {
            Ok(id) => {
                // A client that left before the answer needs no job.
                if accepted.send(Ok(())).is_ok() {
                    self.outputs.insert(id, Client { outputs, enough });
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

    /// Cancels the jobs whose client hung up, and the choices of which it has enough. Jobs in work mean steps, so this runs often enough without a wake-up of its own.
    fn cancel_closed(&mut self) {
        let scheduler = &mut self.scheduler;
        self.outputs.retain(|job, client| {
            while let Ok(choice) = client.enough.try_recv() {
                scheduler.cancel_choice(*job, choice);
            }
            let closed = client.outputs.is_closed();
            if closed {
                scheduler.cancel(*job);
            }
            !closed
        });
    }

    /// Sends without waiting: a client that does not read must not slow the others.
    fn deliver(&mut self, deliveries: Vec<Delivery>) {
        for Delivery { job, output, last } in deliveries {
            let Some(client) = self.outputs.get(&job) else { continue };
            let sent = client.outputs.try_send(output).is_ok();
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

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use model::fault::FaultKind;
    use model::plan::Limits;
    use model::step::{LaneResult, Sample, Sampling, StepBatch, StepId, StepResult};

    use super::*;
    use crate::schedule::Turn;
    use crate::schedule::job::{DoneReason, Door, Job, Outputs};

    const LIMITS: Limits = Limits { model_len_max: 4096, step_tokens_max: 64, step_sequences_max: 4, blocks: 128 };

    /// Draws a sequence's position as its token; dies when its steps are used up.
    struct Group {
        answers: VecDeque<(StepId, StepResult)>,
        steps_left: usize,
        /// How many steps were in flight whenever an answer was waited for.
        waited_with: Vec<usize>,
    }

    impl ShardGroup for Group {
        fn submit(&mut self, step: StepId, batch: StepBatch) -> Result<(), Fault> {
            let lanes = batch.lanes.iter().map(|lane| {
                let sampled = lane.chunks.iter().filter(|chunk| chunk.sample);
                let token = |start: u32, tokens: usize| start + tokens as u32;
                let samples = sampled.map(|chunk| Sample {
                    seq: chunk.seq,
                    token: token(chunk.start, chunk.tokens.len()),
                    score: None,
                });
                LaneResult { samples: samples.collect(), ..LaneResult::default() }
            });
            self.answers.push_back((step, StepResult { lanes: lanes.collect() }));
            Ok(())
        }

        async fn next(&mut self) -> Result<(StepId, StepResult), Fault> {
            tokio::task::yield_now().await;
            self.waited_with.push(self.answers.len());
            if self.steps_left == 0 {
                return Err(Fault::new(FaultKind::RankLost, "rank 0 is gone"));
            }
            self.steps_left -= 1;
            Ok(self.answers.pop_front().expect("a step was submitted"))
        }
    }

    fn group(steps_left: usize) -> Group {
        Group { answers: VecDeque::new(), steps_left, waited_with: Vec::new() }
    }

    fn job(tokens_max: u32) -> Job {
        Job {
            id: "test".into(),
            prompt: vec![1, 2, 3],
            sampling: Sampling::GREEDY,
            choices: 1,
            tokens_max,
            end_tokens: Vec::new(),
            salt: 0,
            resumed: None,
            turn: Turn::default(),
            deaths: 0,
        }
    }

    fn driver() -> (Driver, Door, watch::Receiver<Load>) {
        let (sender, receiver) = mpsc::channel(8);
        let (driver, load) = Driver::new(Settings::new(LIMITS, 1), receiver, Instant::now);
        (driver, Door::new(sender), load)
    }

    async fn collect(mut outputs: Outputs) -> Vec<Output> {
        let mut all = Vec::new();
        while let Some(output) = outputs.recv().await {
            all.push(output);
        }
        all
    }

    fn expected(tokens: u32) -> Vec<Output> {
        let mut all = vec![Output::Started { cached_tokens: 0 }];
        all.extend((0..tokens).map(|number| Output::Token { choice: 0, token: 3 + number, score: None }));
        all.push(Output::Done { choice: 0, reason: DoneReason::Length });
        all
    }

    #[tokio::test]
    async fn a_job_runs_over_a_groups_death_without_a_gap() {
        let (mut driver, door, load) = driver();
        let client = async {
            let outputs = door.submit(job(20)).await.unwrap();
            drop(door);
            collect(outputs).await
        };
        let server = async {
            let fault = Fault::new(FaultKind::RankLost, "rank 0 is gone");
            assert_eq!(driver.run(&mut group(7)).await, Ended::Faulted(fault));
            driver.requeue(Settings::new(LIMITS, 1));
            driver.run(&mut group(100)).await
        };
        let (outputs, ended) = tokio::join!(client, server);
        assert_eq!((outputs, ended), (expected(20), Ended::Closed));
        assert_eq!((load.borrow().requeues, load.borrow().tokens_generated), (1, 20));
    }

    #[tokio::test]
    async fn as_many_steps_as_stages_are_submitted_before_an_answer_is_waited_for() {
        for stages in [1, 2, 4] {
            let (sender, receiver) = mpsc::channel(8);
            let limits = Limits { step_sequences_max: 8, ..LIMITS };
            let settings = Settings { steps_in_flight_max: stages, ..Settings::new(limits, 1) };
            let (mut driver, _load) = Driver::new(settings, receiver, Instant::now);
            let door = Door::new(sender);
            let client = async {
                let mut outputs = Vec::new();
                for _ in 0..8 {
                    outputs.push(door.submit(job(20)).await.unwrap());
                }
                drop(door);
                for outputs in outputs {
                    assert_eq!(collect(outputs).await, expected(20));
                }
            };
            let mut group = group(1000);
            let ((), ended) = tokio::join!(client, async { driver.run(&mut group).await });
            assert_eq!(ended, Ended::Closed);
            // All but the first steps, of jobs that came one by one, and the last, of jobs that end.
            let busy = group.waited_with.iter().filter(|flying| **flying == stages).count();
            assert!(busy * 10 > group.waited_with.len() * 9, "{stages} stages: {:?}", group.waited_with);
            assert!(group.waited_with.iter().all(|flying| *flying <= stages));
        }
    }

    #[tokio::test]
    async fn a_job_is_taken_while_there_is_no_group() {
        let (mut driver, door, _load) = driver();
        let outputs = tokio::select! {
            outputs = door.submit(job(2)) => outputs.unwrap(),
            () = async { while driver.hold().await {} } => panic!("the door is open"),
        };
        drop(door);
        let (outputs, _) = tokio::join!(collect(outputs), async { driver.run(&mut group(100)).await });
        assert_eq!(outputs, expected(2));
    }

    #[tokio::test]
    async fn a_client_that_hangs_up_frees_its_blocks_within_two_steps() {
        let (mut driver, door, load) = driver();
        let client = async {
            drop(door.submit(job(4000)).await.unwrap());
            drop(door);
        };
        let ((), ended) = tokio::join!(client, async { driver.run(&mut group(3)).await });
        assert_eq!(ended, Ended::Closed, "the group would have died at its fourth step");
        assert_eq!((load.borrow().blocks_used, load.borrow().jobs_cancelled), (0, 1));
    }

    #[tokio::test]
    async fn a_choice_of_which_there_is_enough_is_computed_no_further() {
        let (mut driver, door, load) = driver();
        let client = async {
            let mut outputs = door.submit(Job { choices: 2, ..job(40) }).await.unwrap();
            drop(door);
            let mut tokens = [0, 0];
            while let Some(output) = outputs.recv().await {
                let Output::Token { choice, .. } = output else { continue };
                tokens[choice as usize] += 1;
                if tokens[1] == 5 {
                    outputs.enough(1);
                }
            }
            tokens
        };
        let (tokens, _) = tokio::join!(client, async { driver.run(&mut group(200)).await });
        assert!(tokens[0] == 40 && tokens[1] <= 7, "{tokens:?}");
        assert_eq!((load.borrow().blocks_used, load.borrow().jobs_finished), (0, 1));
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_is_cancelled() {
        let (mut driver, door, load) = driver();
        let (sender, mut outputs) = mpsc::channel(3);
        let (accepted, _answer) = tokio::sync::oneshot::channel();
        let (_enough, enough) = mpsc::channel(1);
        driver.take(Submission { job: job(4000), accepted, outputs: sender, enough });
        drop(door);
        assert_eq!(driver.run(&mut group(10)).await, Ended::Closed);
        let mut count = 0;
        while outputs.recv().await.is_some() {
            count += 1;
        }
        assert_eq!(count, 3);
        assert_eq!(load.borrow().jobs_cancelled, 1);
    }

    #[tokio::test]
    async fn refusals_are_told_and_an_end_of_service_ends_all_jobs() {
        let (mut driver, door, _load) = driver();
        let submitted = tokio::select! {
            submitted = async { (door.submit(job(5000)).await, door.submit(job(5)).await) } => submitted,
            () = async { while driver.hold().await {} } => panic!("the door is open"),
        };
        // 5,000 tokens are cut at the model's length, which the pool holds.
        let refusal = Refusal::NotServing("no worker is left".into());
        driver.fail_all(&refusal);
        for outputs in [submitted.0.unwrap(), submitted.1.unwrap()] {
            assert_eq!(collect(outputs).await, [Output::Failed(refusal.clone())]);
        }
        let mut too_long = job(1);
        too_long.prompt = vec![1; 4096];
        let refused = tokio::select! {
            refused = door.submit(too_long) => refused,
            () = async { while driver.hold().await {} } => panic!("the door is open"),
        };
        assert_eq!(refused.unwrap_err(), Refusal::TooLong { tokens: 4097, tokens_max: 4096 });
    }
}
