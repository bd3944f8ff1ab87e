//! What one step costs the scheduler: `cargo run --release -p coordinator --example scheduler`.
//!
//! Prints medians and 99th percentiles of `next` + `complete` while all sequences decode.

use std::time::{Duration, Instant};

use coordinator::schedule::job::Job;
use coordinator::schedule::scheduler::Scheduler;
use coordinator::schedule::{Settings, Turn};
use model::plan::Limits;
use model::step::{LaneResult, Sample, Sampling, StepBatch, StepResult};

const STEPS: usize = 2_000;
const PROMPT: usize = 500;

fn main() {
    println!("sequences lanes in_flight  next_us p50/p99   complete_us p50/p99");
    for (sequences, lanes, steps_in_flight) in [(100, 1, 1), (1_000, 1, 1), (1_000, 4, 1), (1_000, 1, 4), (8_000, 8, 1)]
    {
        measure(sequences, lanes, steps_in_flight);
    }
}

fn measure(sequences: usize, lanes: usize, steps_in_flight: usize) {
    let limits = Limits {
        model_len_max: 32_768,
        step_tokens_max: 8_192,
        step_sequences_max: sequences,
        blocks: sequences / lanes * 128 + 4_096,
    };
    let mut settings = Settings::new(limits, lanes);
    settings.steps_in_flight_max = steps_in_flight;
    settings.jobs_waiting_max = sequences;
    let mut scheduler = Scheduler::new(settings);
    let begin = Instant::now();
    for number in 0..sequences {
        scheduler.add(begin, job(number)).expect("there is room");
    }
    let (mut packing, mut landing) = (Vec::new(), Vec::new());
    let mut in_flight = std::collections::VecDeque::new();
    while packing.len() < STEPS {
        let started = Instant::now();
        let next = scheduler.next(started);
        let packed = started.elapsed();
        if let Some((step, batch)) = next {
            if scheduler.load().waiting == 0 && batch.lanes.iter().flat_map(|lane| &lane.chunks).all(|c| c.sample) {
                packing.push(packed);
            }
            in_flight.push_back((step, answer(&batch)));
            if in_flight.len() < steps_in_flight {
                continue;
            }
        }
        let (step, result) = in_flight.pop_front().expect("a step is in flight");
        let started = Instant::now();
        std::hint::black_box(scheduler.complete(started, step, result).expect("the answer fits"));
        if !packing.is_empty() {
            landing.push(started.elapsed());
        }
    }
    assert_eq!(scheduler.load().running, sequences, "all sequences decode to the end of the measurement");
    let [next, next_99] = percentiles(packing);
    let [complete, complete_99] = percentiles(landing);
    println!(
        "{sequences:9} {lanes:5} {steps_in_flight:9}  {next:9.1} / {next_99:.1}  {complete:9.1} / {complete_99:.1}"
    );
}

fn job(number: usize) -> Job {
    Job {
        id: String::new(),
        prompt: (0..PROMPT).map(|position| (number * PROMPT + position) as u32).collect(),
        sampling: Sampling::GREEDY,
        choices: 1,
        tokens_max: 20_000,
        end_tokens: vec![0],
        salt: 0,
        resumed: None,
        turn: Turn::default(),
        deaths: 0,
    }
}

fn answer(batch: &StepBatch) -> StepResult {
    let lanes = batch.lanes.iter().map(|lane| {
        let sampled = lane.chunks.iter().filter(|chunk| chunk.sample);
        let samples = sampled.map(|chunk| Sample { seq: chunk.seq, token: chunk.start + 1, score: None });
        LaneResult { samples: samples.collect(), ..LaneResult::default() }
    });
    StepResult { lanes: lanes.collect() }
}

/// Median and 99th percentile, in microseconds.
fn percentiles(mut times: Vec<Duration>) -> [f64; 2] {
    times.sort();
    [times.len() / 2, times.len() * 99 / 100].map(|place| times[place].as_secs_f64() * 1e6)
}
