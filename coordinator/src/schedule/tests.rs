//! The scheduler through its door, step by step. What only many seeds show is in the simulation.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use model::fault::FaultKind;
use model::plan::{BLOCK_TOKENS, Limits};
use model::step::{
    Guesses, LaneBatch, LaneResult, PromptScores, Sample, Sampling, Score, StepBatch, StepId, StepResult,
};

use super::Settings;
use super::job::{Begun, DoneReason, Job, Output, Refusal};
use super::queue::Turn;
use super::scheduler::{Delivery, JobId, Scheduler};
use super::suspect::GivenUp;

mod ahead;
mod drafts;
mod fairness;

const LIMITS: Limits = Limits { model_len_max: 256, step_tokens_max: 64, step_sequences_max: 4, blocks: 16 };

struct Bench {
    scheduler: Scheduler,
    now: Instant,
}

impl Bench {
    fn new(settings: Settings) -> Bench {
        Bench { scheduler: Scheduler::new(settings), now: Instant::now() }
    }

    fn add(&mut self, job: Job) -> JobId {
        self.scheduler.add(self.now, job).unwrap()
    }

    fn next(&mut self) -> Option<(StepId, StepBatch)> {
        let next = self.scheduler.next(self.now);
        self.scheduler.check_integrity().unwrap();
        next
    }

    /// Answers a step, every sample being `token`.
    fn answer(&mut self, step: StepId, batch: &StepBatch, token: u32) -> Vec<Delivery> {
        self.now += Duration::from_millis(1);
        let deliveries = self.scheduler.complete(self.now, step, sampled(batch, token)).unwrap();
        self.scheduler.check_integrity().unwrap();
        deliveries
    }

    /// One step and its answer.
    fn step(&mut self, token: u32) -> (StepBatch, Vec<Output>) {
        let (step, batch) = self.next().expect("there is something to compute");
        let deliveries = self.answer(step, &batch, token);
        (batch, deliveries.into_iter().map(|delivery| delivery.output).collect())
    }
}

fn settings() -> Settings {
    Settings::new(LIMITS, 1)
}

fn job(first: u32, prompt_len: u32, tokens_max: u32) -> Job {
    Job {
        id: "test".into(),
        prompt: (0..prompt_len).map(|position| first * 1000 + position).collect(),
        sampling: Sampling::GREEDY,
        choices: 1,
        tokens_max,
        end_tokens: vec![99],
        salt: 0,
        resumed: None,
        turn: Turn::default(),
        deaths: 0,
    }
}

fn sampled(batch: &StepBatch, token: u32) -> StepResult {
    let lanes = batch.lanes.iter().map(|lane| LaneResult {
        samples: lane
            .chunks
            .iter()
            .filter(|chunk| chunk.sample)
            .map(|chunk| Sample { seq: chunk.seq, token, score: None })
            .collect(),
        ..LaneResult::default()
    });
    StepResult { lanes: lanes.collect() }
}

/// (start, tokens, sample) of each chunk.
fn shape(lane: &LaneBatch) -> Vec<(u32, usize, bool)> {
    lane.chunks.iter().map(|chunk| (chunk.start, chunk.tokens.len(), chunk.sample)).collect()
}

fn token(token: u32) -> Output {
    Output::Token { choice: 0, token, score: None }
}

fn done(choice: u32, reason: DoneReason) -> Output {
    Output::Done { choice, reason }
}

#[test]
fn a_long_prompt_is_cut_into_chunks_beside_the_decodes_of_others() {
    let mut bench = Bench::new(settings());
    bench.add(job(1, 10, 9));
    assert_eq!(shape(&bench.step(5).0.lanes[0]), [(0, 10, true)]);
    bench.add(job(2, 150, 9));
    bench.add(job(3, 10, 9));
    assert_eq!(shape(&bench.step(5).0.lanes[0]), [(10, 1, true), (0, 63, false)]);
    assert_eq!(shape(&bench.step(5).0.lanes[0]), [(11, 1, true), (63, 63, false)]);
    let (batch, outputs) = bench.step(5);
    assert_eq!(shape(&batch.lanes[0]), [(12, 1, true), (126, 24, true), (0, 10, true)]);
    let started = outputs.iter().filter(|output| matches!(output, Output::Started { cached_tokens: 0 })).count();
    assert_eq!(started, 2);
}

#[test]
fn an_answer_ends_on_an_end_token_its_length_or_the_models_length() {
    let cases = [
        (job(1, 5, 9), vec![4, 99], vec![4, 99], DoneReason::End),
        (job(1, 5, 2), vec![4, 4], vec![4, 4], DoneReason::Length),
        (job(1, 5, 1), vec![99], vec![99], DoneReason::End),
        (job(1, 254, 9), vec![4, 4, 4, 4, 4], vec![4, 4], DoneReason::Length),
        (job(1, 256, 0), vec![4, 4, 4, 4], vec![], DoneReason::Length),
    ];
    for (job, drawn, expected, reason) in cases {
        let mut bench = Bench::new(settings());
        bench.add(job);
        let mut outputs = Vec::new();
        for drawn in drawn {
            outputs.extend(bench.step(drawn).1);
        }
        let mut all = vec![Output::Started { cached_tokens: 0 }];
        all.extend(expected.into_iter().map(token));
        all.push(done(0, reason));
        // The 254-token prompt takes four steps before its first token.
        outputs.truncate(all.len());
        if !bench.scheduler.is_idle() {
            outputs.extend(bench.step(4).1);
        }
        assert_eq!(outputs, all);
        assert!(bench.scheduler.is_idle());
        assert_eq!(bench.scheduler.load().blocks_used, 0);
    }
}

#[test]
fn jobs_that_can_never_be_served_are_refused() {
    let cases = [
        (job(1, 256, 1), Refusal::TooLong { tokens: 257, tokens_max: 256 }),
        (job(1, 257, 0), Refusal::TooLong { tokens: 257, tokens_max: 256 }),
        (job(1, 200, 99), Refusal::NeverFits { blocks: 8, blocks_max: 7 }),
        (job(1, 0, 9), Refusal::Failed("the prompt is empty".into())),
    ];
    let small = Settings::new(Limits { blocks: 7, ..LIMITS }, 2);
    for (job, refusal) in cases {
        let mut scheduler = Scheduler::new(small);
        assert_eq!(scheduler.add(Instant::now(), job), Err(refusal));
        assert!(scheduler.is_idle());
    }
    // The last token drawn needs no place in the cache.
    assert!(Scheduler::new(small).add(Instant::now(), job(1, 200, 25)).is_ok());
}

#[test]
fn a_full_queue_refuses_at_once() {
    let mut bench = Bench::new(Settings { jobs_waiting_max: 2, ..settings() });
    bench.add(job(1, 10, 5));
    bench.add(job(2, 10, 5));
    let full = Refusal::QueueFull { waiting: 2, waiting_max: 2 };
    assert_eq!(bench.scheduler.add(bench.now, job(3, 10, 5)), Err(full));
    bench.step(1);
    bench.add(job(3, 10, 5));
    assert_eq!(bench.scheduler.load().jobs_refused, 1);
}

#[test]
fn choices_wait_for_the_prompt_and_share_its_blocks() {
    let mut bench = Bench::new(settings());
    bench.add(Job { choices: 3, ..job(1, 70, 1) });
    assert_eq!(shape(&bench.step(1).0.lanes[0]), [(0, 64, false)]);
    assert_eq!(shape(&bench.step(1).0.lanes[0]), [(64, 6, true)]);
    let (batch, outputs) = bench.step(2);
    let lane = &batch.lanes[0];
    assert_eq!(shape(lane), [(64, 6, true), (64, 6, true)]);
    assert_eq!(lane.chunks[0].blocks[..2], lane.chunks[1].blocks[..2]);
    assert_ne!(lane.chunks[0].blocks[2], lane.chunks[1].blocks[2]);
    assert_eq!(lane.begun.iter().map(|begin| begin.sampling.choice).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(outputs.last(), Some(&done(2, DoneReason::Length)));
    assert!(bench.scheduler.is_idle());
}

#[test]
fn a_prompt_finds_its_prefix_but_computes_its_last_token() {
    let mut bench = Bench::new(settings());
    bench.add(job(1, 64, 1));
    bench.step(1);
    bench.add(job(1, 64, 1));
    let (batch, outputs) = bench.step(1);
    assert_eq!(shape(&batch.lanes[0]), [(32, 32, true)]);
    assert_eq!(outputs[0], Output::Started { cached_tokens: 32 });
    // Its history for penalties is told, since the rank never saw those tokens in this sequence.
    let mut penalised = job(1, 65, 1);
    penalised.sampling.presence_penalty = 1.0;
    bench.add(penalised);
    let (batch, _) = bench.step(1);
    assert_eq!(batch.lanes[0].begun[0].history, job(1, 64, 1).prompt);
}

#[test]
fn a_new_sequence_goes_where_its_prefix_is_or_else_to_the_emptier_lane() {
    let mut bench = Bench::new(Settings::new(LIMITS, 2));
    bench.add(job(1, 64, 9));
    bench.step(1);
    bench.add(job(2, 60, 9));
    let (batch, _) = bench.step(1);
    assert_eq!((batch.lanes[0].begun.len(), batch.lanes[1].begun.len()), (0, 1));
    bench.add(job(2, 60, 9));
    let (batch, _) = bench.step(1);
    assert_eq!((shape(&batch.lanes[0]), batch.lanes[1].begun.len()), (vec![(65, 1, true)], 1));
    assert_eq!(batch.lanes[1].chunks[1].start, 32);
}

#[test]
fn the_youngest_is_preempted_and_goes_on_from_the_tokens_it_has() {
    let limits = Limits { blocks: 4, model_len_max: 128, ..LIMITS };
    let mut bench = Bench::new(Settings { prefix_cache: false, ..Settings::new(limits, 1) });
    bench.add(job(1, 31, 50));
    bench.add(job(2, 31, 50));
    bench.step(1);
    // Each takes its second block at position 32, then one has to go at position 64.
    for _ in 0..33 {
        let (batch, _) = bench.step(1);
        assert_eq!(batch.lanes[0].chunks.len(), 2);
    }
    let (batch, _) = bench.step(1);
    assert_eq!(shape(&batch.lanes[0]), [(64, 1, true)]);
    assert_eq!(batch.lanes[0].ended.len(), 1);
    assert_eq!((bench.scheduler.load().preemptions, bench.scheduler.load().waiting), (1, 1));
    let mut begun = None;
    while begun.is_none() {
        let (batch, _) = bench.step(1);
        begun = batch.lanes[0].begun.first().cloned().map(|begin| (begin, batch.clone()));
    }
    let (begin, batch) = begun.unwrap();
    assert_eq!(begin.prompt_len, 31);
    let expected: Vec<u32> = job(2, 31, 50).prompt.into_iter().chain([1; 34]).take(64).collect();
    assert_eq!(batch.lanes[0].chunks[0].tokens, expected, "prompt and 34 drawn tokens, cut at the budget");
}

#[test]
fn nobody_starves_while_new_jobs_keep_coming() {
    let limits = Limits { step_tokens_max: 4, ..LIMITS };
    for steps_in_flight_max in [1, 3] {
        let mut bench = Bench::new(Settings { steps_in_flight_max, ..Settings::new(limits, 1) });
        let oldest = bench.add(job(0, 100, 20));
        let mut in_flight = std::collections::VecDeque::new();
        let ended = (1..2_000).any(|number| {
            let _ = bench.scheduler.add(bench.now, job(number % 50, 3, 30));
            while let Some(step) = bench.next() {
                in_flight.push_back(step);
            }
            let (step, batch) = in_flight.pop_front().unwrap();
            let deliveries = bench.answer(step, &batch, 1);
            deliveries.iter().any(|delivery| delivery.job == oldest && delivery.last)
        });
        assert!(ended);
    }
}

#[test]
fn prompts_that_arrive_together_are_shared_by_the_steps_in_flight() {
    let limits = Limits { step_tokens_max: 512, step_sequences_max: 16, blocks: 64, ..LIMITS };
    for (stages, prompts, expected) in [
        (1, [100; 4].as_slice(), &[400usize][..]),
        (2, &[100; 4], &[200, 200]),
        (4, &[100; 4], &[100, 100, 100, 100]),
        (4, &[30, 30, 30], &[64, 26]),
        // Too much for all of them: full steps.
        (2, &[250; 5], &[512, 512]),
    ] {
        let mut bench = Bench::new(Settings { steps_in_flight_max: stages, ..Settings::new(limits, 1) });
        for (number, &tokens) in prompts.iter().enumerate() {
            bench.add(job(number as u32 + 1, tokens, 9));
        }
        let flown: Vec<usize> = std::iter::from_fn(|| bench.next())
            .map(|(_, batch)| batch.lanes[0].chunks.iter().map(|chunk| chunk.tokens.len()).sum())
            .collect();
        assert_eq!(flown, expected, "{stages} stages, {prompts:?}");
    }
}

#[test]
fn steps_in_flight_share_the_running_sequences() {
    let mut bench = Bench::new(Settings { steps_in_flight_max: 2, ..settings() });
    for number in 0..4 {
        bench.add(job(number, 3, 9));
    }
    let (step, batch) = bench.next().unwrap();
    assert!(bench.next().is_none(), "nothing is drawn before the token before it is known");
    bench.answer(step, &batch, 1);
    let (first, second) = (bench.next().unwrap(), bench.next().unwrap());
    assert_eq!((first.1.lanes[0].chunks.len(), second.1.lanes[0].chunks.len()), (2, 2));
    assert!(bench.next().is_none());
    bench.answer(first.0, &first.1, 1);
    assert_eq!(bench.next().unwrap().1.lanes[0].chunks.len(), 2);
}

#[test]
fn a_prompts_chunks_follow_each_other_without_waiting() {
    let mut bench = Bench::new(Settings { steps_in_flight_max: 2, ..settings() });
    bench.add(job(1, 100, 9));
    let (first, second) = (bench.next().unwrap(), bench.next().unwrap());
    assert_eq!(shape(&first.1.lanes[0]), [(0, 64, false)]);
    assert_eq!(shape(&second.1.lanes[0]), [(64, 36, true)]);
}

#[test]
fn a_cancelled_jobs_blocks_are_free_when_its_steps_in_flight_are_answered() {
    let mut bench = Bench::new(Settings { steps_in_flight_max: 2, ..settings() });
    let job_id = bench.add(Job { choices: 2, ..job(1, 100, 9) });
    let (first, second) = (bench.next().unwrap(), bench.next().unwrap());
    bench.scheduler.cancel(job_id);
    bench.scheduler.cancel(job_id);
    assert_eq!(bench.scheduler.load().blocks_used, 100usize.div_ceil(BLOCK_TOKENS));
    assert_eq!(bench.answer(first.0, &first.1, 1), []);
    assert_eq!(bench.answer(second.0, &second.1, 1), []);
    let load = bench.scheduler.load();
    assert_eq!((load.blocks_used, load.running, load.waiting, load.jobs_cancelled), (0, 0, 0, 1));
    bench.add(job(2, 5, 9));
    assert_eq!(bench.next().unwrap().1.lanes[0].ended.len(), 1, "the ranks are told with the next step");
}

#[test]
fn a_choice_of_which_there_is_enough_leaves_the_others_alone() {
    let mut bench = Bench::new(settings());
    let job_id = bench.add(Job { choices: 3, ..job(1, 20, 9) });
    bench.scheduler.cancel_choice(job_id, 1);
    bench.step(1);
    bench.step(1);
    let all = bench.scheduler.load().running;
    assert_eq!(all, 3, "nothing is cancelled before the prompt was computed");
    for choice in [1, 1, 7] {
        bench.scheduler.cancel_choice(job_id, choice);
    }
    let (batch, outputs) = bench.step(1);
    assert_eq!((batch.lanes[0].chunks.len(), batch.lanes[0].ended.len()), (2, 1));
    let told = |output: &Output| !matches!(output, Output::Token { choice: 1, .. } | Output::Done { choice: 1, .. });
    assert!(!outputs.is_empty() && outputs.iter().all(told), "{outputs:?}");
    bench.scheduler.cancel_choice(job_id, 0);
    bench.scheduler.cancel_choice(job_id, 2);
    assert_eq!(bench.scheduler.load().running, 1, "the last one is the job's");
    bench.scheduler.cancel(job_id);
    assert_eq!(bench.scheduler.load().blocks_used, 0);
    bench.scheduler.check_integrity().unwrap();
}

/// Steps until the group dies with some step in flight, which `kills` says of a batch; the deaths, and who was given up.
fn run_until_given_up(bench: &mut Bench, kills: impl Fn(&StepBatch) -> bool) -> (u32, Vec<GivenUp>) {
    for deaths in 1..20 {
        loop {
            let (step, batch) = bench.next().expect("there is something to compute");
            if kills(&batch) {
                break;
            }
            bench.answer(step, &batch, 1);
        }
        let given_up = bench.scheduler.died();
        assert_eq!(bench.scheduler.requeue_all(settings()), []);
        if !given_up.is_empty() {
            return (deaths, given_up);
        }
    }
    panic!("nobody was given up");
}

#[test]
fn a_request_that_kills_twice_is_not_tried_a_third_time() {
    let kills = |batch: &StepBatch| batch.lanes[0].chunks.iter().any(|chunk| chunk.tokens.contains(&7003));
    let mut bench = Bench::new(settings());
    let killer = bench.add(job(7, 10, 9));
    let (deaths, given_up) = run_until_given_up(&mut bench, kills);
    assert_eq!((deaths, given_up.len(), given_up[0].delivery.job), (2, 1, killer));
    assert_eq!(given_up[0].prompt_sha256.len(), 64);
    assert!(matches!(&given_up[0].delivery.output, Output::Failed(Refusal::Failed(text)) if text.contains("2 times")));
}

#[test]
fn among_others_a_killer_is_found_alone_and_the_others_go_on() {
    let kills = |batch: &StepBatch| batch.lanes[0].chunks.iter().any(|chunk| chunk.tokens.contains(&7003));
    let mut bench = Bench::new(settings());
    let before = bench.add(job(1, 10, 30));
    bench.step(1);
    let (killer, after) = (bench.add(job(7, 10, 9)), bench.add(job(2, 10, 30)));
    let (deaths, given_up) = run_until_given_up(&mut bench, kills);
    assert_eq!((deaths, given_up.len(), given_up[0].delivery.job), (3, 1, killer));
    let mut done = BTreeSet::new();
    while let Some((step, batch)) = bench.next() {
        let ends = bench.answer(step, &batch, 1).into_iter().filter(|delivery| delivery.last);
        done.extend(ends.map(|delivery| delivery.job));
    }
    assert_eq!(done, [before, after].into());
}

#[test]
fn deaths_at_different_places_prove_nothing() {
    let mut bench = Bench::new(settings());
    bench.add(job(1, 10, 40));
    for _ in 0..10 {
        bench.step(1);
        bench.step(1);
        let _ = bench.next();
        assert_eq!(bench.scheduler.died(), []);
        bench.scheduler.requeue_all(settings());
    }
}

#[test]
fn an_idle_lane_is_part_of_every_step() {
    let mut bench = Bench::new(Settings::new(LIMITS, 3));
    bench.add(job(1, 10, 9));
    let (batch, _) = bench.step(1);
    assert_eq!(batch.lanes[1..], [LaneBatch::default(), LaneBatch::default()]);
}

#[test]
fn prompt_scores_are_collected_and_told_once_even_if_the_prompt_is_cached() {
    let mut bench = Bench::new(settings());
    bench.add(job(1, 100, 1));
    bench.step(1);
    bench.step(1);
    let mut scored = job(1, 100, 1);
    scored.sampling.prompt_logprobs = Some(0);
    bench.add(Job { choices: 2, ..scored });
    let score = |position: u32| Score { logprob: -(position as f32), rank: 0, best: Vec::new() };
    let mut outputs = Vec::new();
    for range in [1..64, 64..100] {
        let (step, batch) = bench.next().unwrap();
        let seq = batch.lanes[0].chunks[0].seq;
        let mut result = sampled(&batch, 5);
        let scores = PromptScores { seq, start: range.start, scores: range.map(score).collect() };
        result.lanes[0].prompt_scores.push(scores);
        outputs.extend(bench.scheduler.complete(bench.now, step, result).unwrap());
    }
    assert_eq!(outputs[0].output, Output::Started { cached_tokens: 0 });
    assert_eq!(outputs[1].output, Output::PromptScores((1..100).map(score).collect()));
    let (batch, _) = bench.step(1);
    assert_eq!((shape(&batch.lanes[0]), batch.lanes[0].begun[0].sampling.prompt_logprobs), (vec![(96, 4, true)], None));
}

#[test]
fn an_answer_that_was_not_asked_for_is_a_fault_and_changes_nothing() {
    let mut bench = Bench::new(settings());
    let mut scored = job(1, 10, 3);
    scored.sampling.prompt_logprobs = Some(0);
    bench.add(scored);
    bench.add(job(2, 10, 3));
    let (step, batch) = bench.next().unwrap();
    let seq = batch.lanes[0].chunks[0].seq;
    let score = Score { logprob: 0.0, rank: 0, best: Vec::new() };
    let scores = |start, count| PromptScores { seq, start, scores: vec![score.clone(); count] };
    let mut right = sampled(&batch, 1);
    right.lanes[0].prompt_scores.push(scores(1, 9));
    let spoil = |change: fn(&mut StepResult)| {
        let mut wrong = right.clone();
        change(&mut wrong);
        wrong
    };
    let mut gap = right.clone();
    gap.lanes[0].prompt_scores[0] = scores(2, 8);
    let mut few = right.clone();
    few.lanes[0].prompt_scores[0] = scores(1, 8);
    let wrong = [
        spoil(|result| result.lanes.clear()),
        spoil(|result| result.lanes[0].samples.truncate(1)),
        spoil(|result| result.lanes[0].samples.reverse()),
        spoil(|result| result.lanes[0].samples[0].seq.0 += 100),
        spoil(|result| result.lanes[0].prompt_scores[0].seq.0 += 100),
        spoil(|result| result.lanes[0].prompt_scores.clear()),
        gap,
        few,
    ];
    for wrong in wrong {
        let fault = bench.scheduler.complete(bench.now, step, wrong).unwrap_err();
        assert_eq!(fault.kind, FaultKind::Diverged);
    }
    assert!(bench.scheduler.complete(bench.now, StepId(step.0 + 1), right.clone()).is_err());
    assert_eq!(bench.scheduler.complete(bench.now, step, right).unwrap().len(), 5);
}

#[test]
fn after_a_fault_everything_runs_again_from_the_tokens_so_far() {
    let mut bench = Bench::new(settings());
    bench.add(job(1, 40, 9));
    bench.add(job(2, 40, 9));
    bench.step(5);
    bench.step(6);
    let (_, lost) = bench.next().unwrap();
    assert!(!lost.lanes[0].chunks.is_empty());
    assert_eq!(bench.scheduler.requeue_all(Settings::new(LIMITS, 2)), []);
    bench.scheduler.check_integrity().unwrap();
    assert_eq!((bench.scheduler.load().blocks_used, bench.scheduler.load().waiting), (0, 2));
    let (step, batch) = bench.next().unwrap();
    assert_eq!((step, batch.lanes.len()), (StepId(0), 2));
    assert_eq!(batch.lanes[0].chunks[0].tokens, [job(1, 40, 9).prompt, vec![5, 6]].concat());
    let outputs = bench.answer(step, &batch, 6);
    assert!(outputs.iter().all(|delivery| delivery.output == token(6)), "nothing is told twice");
}

#[test]
fn a_job_that_the_new_group_cannot_hold_fails() {
    let mut bench = Bench::new(settings());
    let big = bench.add(job(1, 100, 100));
    bench.add(job(2, 10, 9));
    bench.step(5);
    let failed = bench.scheduler.requeue_all(Settings::new(Limits { blocks: 3, ..LIMITS }, 1));
    let refusal = Refusal::NeverFits { blocks: 7, blocks_max: 3 };
    assert_eq!(failed, [Delivery { job: big, output: Output::Failed(refusal), last: true }]);
    assert_eq!(bench.next().unwrap().1.lanes[0].chunks.len(), 1);
}

#[test]
fn jobs_wait_for_the_first_plan_and_then_those_that_fit_run() {
    let mut bench = Bench::new(Settings::without_plan(3));
    let too_long = bench.add(job(1, 256, 1));
    bench.add(job(2, 250, u32::MAX));
    bench.add(job(3, 256, 0));
    assert!(matches!(bench.scheduler.add(bench.now, job(4, 1, 1)), Err(Refusal::QueueFull { .. })));
    assert_eq!(bench.next(), None);
    let refusal = Refusal::TooLong { tokens: 257, tokens_max: 256 };
    let failed = Delivery { job: too_long, output: Output::Failed(refusal), last: true };
    assert_eq!(bench.scheduler.requeue_all(settings()), [failed]);
    let mut drawn = 0;
    while !bench.scheduler.is_idle() {
        drawn += bench.step(1).1.iter().filter(|output| **output == token(1)).count();
    }
    assert_eq!(drawn, 6, "the model's length ends the second job");
}

#[test]
fn a_job_that_was_begun_elsewhere_goes_on_where_it_was() {
    let begun = |tokens: &[u32], done| Begun { tokens: tokens.to_vec(), done };
    let resumed = Some(vec![begun(&[5, 6], false), begun(&[7], true), begun(&[], false)]);
    let mut bench = Bench::new(settings());
    bench.add(Job { choices: 3, resumed, ..job(1, 40, 4) });
    let (step, batch) = bench.next().unwrap();
    let lengths: Vec<usize> = batch.lanes[0].chunks.iter().map(|chunk| chunk.tokens.len()).collect();
    assert_eq!(lengths, [42, 22], "both choices that are left, without waiting for each other");
    assert_eq!(batch.lanes[0].chunks[0].tokens, [job(1, 40, 4).prompt, vec![5, 6]].concat());
    let mut outputs: Vec<Output> = bench.answer(step, &batch, 8).into_iter().map(|d| d.output).collect();
    while !bench.scheduler.is_idle() {
        outputs.extend(bench.step(8).1);
    }
    let of = |choice| outputs.iter().filter(|o| matches!(o, Output::Token { choice: c, .. } if *c == choice)).count();
    assert_eq!([of(0), of(1), of(2)], [2, 0, 4]);
    assert!(!outputs.iter().any(|o| matches!(o, Output::Started { .. })), "that was told before");
    assert_eq!(outputs.iter().filter(|o| matches!(o, Output::Done { reason: DoneReason::Length, .. })).count(), 2);
}

#[test]
fn what_was_begun_elsewhere_must_fit_the_job() {
    let mut bench = Bench::new(settings());
    let begun = |tokens, done| Begun { tokens: vec![1; tokens], done };
    for resumed in [vec![], vec![begun(1, false); 2], vec![begun(1, true)], vec![begun(9, false)]] {
        let refused = bench.scheduler.add(bench.now, Job { resumed: Some(resumed), ..job(1, 40, 9) });
        assert!(matches!(refused, Err(Refusal::Failed(_))));
    }
    assert!(bench.scheduler.is_idle());
}

#[test]
fn deaths_that_a_job_saw_elsewhere_count_until_it_draws_a_token() {
    let mut bench = Bench::new(settings());
    let id = bench.add(Job { deaths: 1, ..job(1, 20, 4) });
    assert_eq!(bench.scheduler.deaths(id), 1);
    bench.next().unwrap();
    let given_up: Vec<GivenUp> = bench.scheduler.died();
    assert_eq!(given_up.iter().map(|g| g.deaths).collect::<Vec<_>>(), [2], "alone at the second death");

    let mut bench = Bench::new(settings());
    let id = bench.add(Job { deaths: 1, ..job(1, 20, 4) });
    bench.step(8);
    assert_eq!(bench.scheduler.deaths(id), 0, "it has passed that place");
    bench.next().unwrap();
    assert!(bench.scheduler.died().is_empty());
}
