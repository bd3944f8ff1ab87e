//! Every architecture against the reference implementation: logits, routing, tokens and log-probabilities of the
//! fixtures under `golden/`, on one rank in f32.

#![allow(clippy::unwrap_used)] // all of this file is a test

use conclave_tests::golden::{Golden, Prompt};
use conclave_tests::ring::{Ring, Setting, fixture, fixtures};
use model::mesh::Mesh;
use model::plan::BLOCK_TOKENS;
use model::quant::Dtype;
use model::step::{Begin, BlockId, Chunk, LaneBatch, Sampling, SeqId, StepBatch};

fn ring(name: &str) -> Ring {
    Ring::load(&fixture(name), Setting::new(Mesh::ONE, Dtype::F32)).unwrap()
}

/// A step of one chunk of the sequence 1 + `index`.
fn chunk(index: usize, start: usize, tokens: &[u32], first: Option<Begin>) -> StepBatch {
    let blocks = (tokens.len() + start).div_ceil(BLOCK_TOKENS) as u32;
    let had = start.div_ceil(BLOCK_TOKENS) as u32;
    let chunk = Chunk {
        seq: SeqId(1 + index as u64),
        start: start as u32,
        tokens: tokens.to_vec(),
        // Each prompt has its own run of blocks.
        blocks: (had..blocks).map(|b| BlockId(b + 16 * index as u32)).collect(),
        sample: true,
    };
    StepBatch { lanes: vec![LaneBatch { begun: first.into_iter().collect(), chunks: vec![chunk], ended: vec![] }] }
}

fn begin(index: usize, prompt: &Prompt, sampling: Sampling) -> Option<Begin> {
    let prompt_len = prompt.input_ids.len() as u32;
    Some(Begin { seq: SeqId(1 + index as u64), sampling, prompt_len, history: vec![] })
}

fn check_prefill(name: &str, golden: &Golden, ring: &mut Ring, index: usize) {
    let prompt = &golden.prompts[index];
    ring.trace(true).unwrap();
    ring.step(&chunk(index, 0, &prompt.input_ids, begin(index, prompt, Sampling::GREEDY))).unwrap();
    let trace = ring.trace(false).unwrap().remove(0);
    assert_eq!(trace.logits.len(), prompt.input_ids.len(), "{name}: a row a token");
    for (position, (_, at, row)) in trace.logits.iter().enumerate() {
        assert_eq!(*at, position);
        let best = worker::engine::score::best(row, 0).unwrap().0;
        assert_eq!(best, prompt.prefill_argmax[position], "{name} {}: likeliest at {position}", prompt.name);
        let sum = worker::engine::score::log_sum_exp(row);
        let expected = prompt.prefill_logsumexp[position];
        assert!((sum - expected).abs() < prompt.tolerance, "{name}: log-sum-exp at {position}: {sum}, {expected}");
    }
    let [from, to] = prompt.prefill_logits_positions;
    let expected = golden.floats(&format!("{}.prefill_logits", prompt.name));
    let mut worst = 0.0f64;
    for (row, wanted) in trace.logits[from..to].iter().zip(expected.chunks_exact(trace.logits[0].2.len())) {
        for (found, wanted) in row.2.iter().zip(wanted) {
            worst = worst.max(f64::from((found - wanted).abs()));
        }
    }
    println!("{name} {}: logits differ by at most {worst:.2e}, {:.2e} is allowed", prompt.name, prompt.tolerance);
    assert!(worst <= prompt.tolerance, "{name} {}: {worst} > {}", prompt.name, prompt.tolerance);
    for module in &prompt.moe_layers {
        let layer = module.split('.').find_map(|part| part.parse::<usize>().ok()).unwrap();
        let routing = &trace.routings.iter().find(|(l, _)| *l == layer).unwrap().1;
        let ids = golden.ints(&format!("{}.experts.{module}.ids", prompt.name));
        let weights = golden.floats(&format!("{}.experts.{module}.weights", prompt.name));
        for row in 0..prompt.input_ids.len() {
            let span = row * routing.active..(row + 1) * routing.active;
            let mut chosen: Vec<(u32, f32)> = span.clone().map(|i| (routing.ids[i], routing.weights[i])).collect();
            chosen.sort_by_key(|c| c.0);
            let found: Vec<u32> = chosen.iter().map(|c| c.0).collect();
            assert_eq!(found, ids[span.clone()], "{name}: experts of row {row} in layer {layer}");
            for ((_, found), wanted) in chosen.iter().zip(&weights[span]) {
                assert!((found - wanted).abs() < 1e-4, "{name}: weight in layer {layer}: {found}, {wanted}");
            }
        }
    }
}

fn check_answer(name: &str, golden: &Golden, ring: &mut Ring, index: usize) {
    let prompt = &golden.prompts[index];
    let mut begun = begin(index, prompt, Sampling { logprobs: Some(5), ..Sampling::GREEDY });
    let (mut start, mut tokens) = (0, prompt.input_ids.clone());
    for (i, &wanted) in prompt.greedy_ids.iter().enumerate() {
        let answer = ring.step(&chunk(index, start, &tokens, begun.take())).unwrap();
        let sample = &answer[0].samples[0];
        assert_eq!(sample.token, wanted, "{name} {}: token {i}", prompt.name);
        let score = sample.score.as_ref().unwrap();
        assert_eq!(score.rank, 0);
        for (&(id, logprob), (wanted_id, logit)) in score.best.iter().zip(&prompt.greedy_top5[i]) {
            let wanted = logit - prompt.greedy_logsumexp[i];
            assert!((f64::from(logprob) - wanted).abs() < prompt.tolerance, "{name}: {logprob}, {wanted}");
            // Neighbours closer than the tolerance may change places.
            let close = prompt.greedy_top5[i].iter().any(|(o, l)| o != wanted_id && (l - logit).abs() < 1e-3);
            assert!(id == *wanted_id || close, "{name}: candidate {id}, {wanted_id}");
        }
        start += tokens.len();
        tokens = vec![sample.token];
    }
}

fn check(name: &str) {
    let golden = Golden::read(&fixture(name)).unwrap();
    assert!(!golden.prompts.is_empty());
    for index in 0..golden.prompts.len() {
        check_prefill(name, &golden, &mut ring(name), index);
        check_answer(name, &golden, &mut ring(name), index);
    }
}

/// The whole folder, so that a fixture that is added is tested; all failures are told, not the first alone.
#[test]
fn every_fixture_equals_its_reference() {
    let names = fixtures();
    assert!(names.len() > 1, "fixtures: {names:?}");
    let failed: Vec<&String> = names.iter().filter(|name| std::panic::catch_unwind(|| check(name)).is_err()).collect();
    assert!(failed.is_empty(), "{} of {} fixtures differ: {failed:?}", failed.len(), names.len());
}
