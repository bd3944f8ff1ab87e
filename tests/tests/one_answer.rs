//! One model, one answer: however a request is cut over ranks, chunked, batched or cached, the logits of every row are
//! the same bits, and so are the tokens.

#![allow(clippy::unwrap_used)] // all of this file is a test

use conclave_tests::ring::{Ring, Setting, fixture};
use model::mesh::Mesh;
use model::plan::{BLOCK_TOKENS, KernelFamily};
use model::quant::Dtype;
use model::step::{Begin, BlockId, Chunk, LaneBatch, LaneResult, Sampling, SeqId, StepBatch};
use std::collections::BTreeMap;

/// Tokens drawn after each prompt.
const ANSWER: usize = 6;

/// One request's rows and tokens.
#[derive(Debug, Clone, Default, PartialEq)]
struct Outcome {
    /// Bits of the logits of each computed position.
    logits: BTreeMap<usize, Vec<u32>>,
    tokens: Vec<u32>,
}

/// A request on its way.
struct Request {
    seq: u64,
    lane: usize,
    sampling: Sampling,
    prompt: Vec<u32>,
    /// First cache block; each request has a run of its own.
    block: u32,
    /// Where it begins: behind a prefix that is cached already, where not 0.
    start: usize,
}

fn prompt(length: usize, salt: u32) -> Vec<u32> {
    (0..length as u32).map(|i| (i * 7919 + salt * 104_729 + 13) % 400).collect()
}

fn warm(seed: u64) -> Sampling {
    Sampling { temperature: 0.9, top_p: 0.95, seed, ..Sampling::GREEDY }
}

fn request(seq: u64, length: usize) -> Request {
    let (prompt, block) = (prompt(length, seq as u32), 8 * seq as u32);
    Request { seq, lane: 0, sampling: warm(seq), prompt, block, start: 0 }
}

/// Runs requests to their ends together, prompts in chunks of `chunk` tokens, and tells what each one saw.
fn run(ring: &mut Ring, lanes: usize, requests: &[Request], chunk: usize) -> Vec<Outcome> {
    ring.trace(true).unwrap();
    let mut outcomes = vec![Outcome::default(); requests.len()];
    let mut positions: Vec<usize> = requests.iter().map(|r| r.start).collect();
    let mut begun = vec![false; requests.len()];
    loop {
        let mut batch = StepBatch { lanes: vec![LaneBatch::default(); lanes] };
        for (i, r) in requests.iter().enumerate() {
            let all: Vec<u32> = r.prompt.iter().chain(&outcomes[i].tokens).copied().collect();
            if outcomes[i].tokens.len() == ANSWER {
                continue;
            }
            let (start, end) = (positions[i], all.len().min(positions[i].saturating_add(chunk)));
            let lane = &mut batch.lanes[r.lane];
            if !begun[i] {
                let prompt_len = r.prompt.len() as u32;
                let history = r.prompt[..start].to_vec();
                lane.begun.push(Begin { seq: SeqId(r.seq), sampling: r.sampling.clone(), prompt_len, history });
            }
            let had = if begun[i] { start.div_ceil(BLOCK_TOKENS) } else { 0 };
            lane.chunks.push(Chunk {
                seq: SeqId(r.seq),
                start: start as u32,
                tokens: all[start..end].to_vec(),
                blocks: (had..end.div_ceil(BLOCK_TOKENS)).map(|b| BlockId(r.block + b as u32)).collect(),
                sample: end == all.len(),
            });
            begun[i] = true;
            positions[i] = end;
        }
        if batch.lanes.iter().all(|l| l.chunks.is_empty()) {
            break;
        }
        let answers: Vec<LaneResult> = ring.step(&batch).unwrap();
        for sample in answers.iter().flat_map(|a| &a.samples) {
            let i = requests.iter().position(|r| r.seq == sample.seq.0).unwrap();
            outcomes[i].tokens.push(sample.token);
        }
    }
    for trace in ring.trace(false).unwrap() {
        for (seq, position, row) in trace.logits {
            let i = requests.iter().position(|r| r.seq == seq.0).unwrap();
            let bits: Vec<u32> = row.iter().map(|v| v.to_bits()).collect();
            // Every tensor rank gathered the same rows.
            let first = outcomes[i].logits.entry(position).or_insert_with(|| bits.clone());
            assert!(*first == bits, "ranks disagree about position {position}");
        }
    }
    let ended = requests.iter().map(|r| (r.lane, SeqId(r.seq)));
    let mut batch = StepBatch { lanes: vec![LaneBatch::default(); lanes] };
    ended.for_each(|(lane, seq)| batch.lanes[lane].ended.push(seq));
    ring.step(&batch).unwrap();
    outcomes
}

fn assert_same(what: &str, found: &Outcome, expected: &Outcome) {
    assert_eq!(found.tokens, expected.tokens, "{what}: tokens");
    for (position, bits) in &found.logits {
        let wanted = &expected.logits[position];
        let differing = bits.iter().zip(wanted).filter(|(a, b)| a != b).count();
        assert!(differing == 0, "{what}: {differing} of {} logits differ at position {position}", bits.len());
    }
}

fn reference(name: &str, dtype: Dtype, family: KernelFamily, request: &Request) -> Outcome {
    let mut ring = Ring::load(&fixture(name), Setting { family, ..Setting::new(Mesh::ONE, dtype) }).unwrap();
    run(&mut ring, 1, std::slice::from_ref(request), usize::MAX).remove(0)
}

/// Alone and at once on one rank, against a full batch in chunks on each mesh, an idle lane among the lanes.
fn check_meshes(name: &str, dtype: Dtype, meshes: &[(usize, usize, usize, usize)]) {
    let family = KernelFamily::Vector;
    let expected = reference(name, dtype, family, &request(1, 45));
    assert_eq!(expected.logits.len(), 45 + ANSWER - 1);
    for &(pipeline, data, tensor, expert) in meshes {
        let mesh = Mesh::new(pipeline, data, tensor, expert).unwrap();
        let mut ring = Ring::load(&fixture(name), Setting::new(mesh, dtype)).unwrap();
        for chunk in [usize::MAX, 7] {
            let what = format!("{name} {dtype} {mesh} chunks of {chunk}");
            let alone = Request { lane: data - 1, ..request(1, 45) };
            let found = run(&mut ring, data, &[alone], chunk);
            assert_same(&format!("{what}, alone"), &found[0], &expected);
            let crowd = [request(2, 33), Request { lane: data - 1, ..request(1, 45) }, request(3, 5)];
            let found = run(&mut ring, data, &crowd, chunk);
            assert_same(&format!("{what}, in a batch"), &found[1], &expected);
        }
    }
}

#[test]
fn tensor_ranks_do_not_change_the_answer() {
    let meshes = [(1, 1, 2, 1), (1, 1, 4, 1), (1, 1, 8, 1)];
    for dtype in [Dtype::F32, Dtype::Bf16] {
        check_meshes("llama31_405b", dtype, &meshes);
        check_meshes("qwen3", dtype, &meshes[..2]);
        check_meshes("qwen2", dtype, &meshes[..1]);
    }
}

#[test]
fn pipeline_stages_do_not_change_the_answer() {
    for name in ["llama31_405b", "qwen2", "deepseek_v3"] {
        check_meshes(name, Dtype::Bf16, &[(2, 1, 1, 1), (2, 1, 2, 1), (3, 2, 1, 1)]);
    }
}

#[test]
fn the_spread_of_experts_does_not_change_the_answer() {
    let meshes = [
        (1, 1, 4, 1),
        (1, 1, 4, 4),
        (1, 1, 4, 2),
        (1, 2, 1, 2),
        (1, 2, 2, 1),
        (1, 2, 2, 4),
        (1, 2, 2, 2),
        (1, 2, 4, 4),
        (2, 2, 2, 4),
        (1, 4, 2, 8),
    ];
    for dtype in [Dtype::F32, Dtype::Bf16] {
        for name in ["qwen3_moe", "mixtral_8x22b", "deepseek_v3"] {
            check_meshes(name, dtype, &meshes);
        }
    }
}

#[test]
fn chunks_do_not_change_the_answer() {
    for name in ["qwen3_moe", "deepseek_v3", "mistral_7b"] {
        for family in [KernelFamily::Vector, KernelFamily::Amx] {
            let expected = reference(name, Dtype::Bf16, family, &request(1, 75));
            let setting = Setting { family, threads: 2, ..Setting::new(Mesh::ONE, Dtype::Bf16) };
            let mut ring = Ring::load(&fixture(name), setting).unwrap();
            for chunk in [1, 3, 31, 64] {
                let found = run(&mut ring, 1, &[request(1, 75)], chunk);
                assert_same(&format!("{name} chunks of {chunk}"), &found[0], &expected);
            }
        }
    }
}

#[test]
fn a_cached_prefix_does_not_change_the_answer() {
    for name in ["qwen3_moe", "deepseek_v3", "mistral_7b"] {
        let expected = reference(name, Dtype::Bf16, KernelFamily::Vector, &request(1, 75));
        let mesh = Mesh::new(1, 1, 2, 1).unwrap();
        let mut ring = Ring::load(&fixture(name), Setting::new(mesh, Dtype::Bf16)).unwrap();
        run(&mut ring, 1, &[request(1, 75)], 20);
        // Two whole blocks are in the cache; the sequence is new.
        let resumed = Request { seq: 9, start: 2 * BLOCK_TOKENS, ..request(1, 75) };
        let found = run(&mut ring, 1, &[resumed, request(2, 30)], 5);
        assert_same(&format!("{name} from a cached prefix"), &found[0], &expected);
        assert_eq!(found[0].logits.keys().next(), Some(&(2 * BLOCK_TOKENS)));
    }
}

#[test]
fn scores_do_not_depend_on_the_mesh_or_the_chunks() {
    let scored = || {
        let sampling = Sampling { logprobs: Some(3), prompt_logprobs: Some(2), presence_penalty: 0.5, ..warm(4) };
        let mut lane = LaneBatch::default();
        lane.begun.push(Begin { seq: SeqId(1), sampling, prompt_len: 20, history: vec![] });
        lane
    };
    let all = |mesh: Mesh, cuts: &[usize]| {
        let mut ring = Ring::load(&fixture("qwen3_moe"), Setting::new(mesh, Dtype::Bf16)).unwrap();
        let (tokens, mut lane, mut scores) = (prompt(20, 5), scored(), vec![]);
        let (mut start, mut samples) = (0, vec![]);
        for &end in cuts {
            lane.chunks = vec![Chunk {
                seq: SeqId(1),
                start: start as u32,
                tokens: tokens[start..end].to_vec(),
                blocks: if start == 0 { vec![BlockId(3)] } else { vec![] },
                sample: end == 20,
            }];
            let answer = ring.step(&StepBatch { lanes: vec![std::mem::take(&mut lane)] }).unwrap().remove(0);
            for list in answer.prompt_scores {
                assert_eq!(list.start as usize, scores.len() + 1, "no position is left out");
                scores.extend(list.scores);
            }
            samples.extend(answer.samples);
            start = end;
        }
        (scores, samples)
    };
    let expected = all(Mesh::ONE, &[20]);
    assert_eq!((expected.0.len(), expected.1.len()), (19, 1));
    assert!(expected.0.iter().all(|s| s.best.len() == 2 && s.logprob < 0.0));
    assert_eq!(expected.1[0].score.as_ref().unwrap().best.len(), 3);
    for (tensor, cuts) in [(1, vec![1, 2, 19, 20]), (2, vec![20]), (4, vec![7, 20])] {
        assert_eq!(all(Mesh::new(1, 1, tensor, 1).unwrap(), &cuts), expected, "tp{tensor}, {cuts:?}");
    }
}

#[test]
fn greedy_tokens_are_the_same_with_and_without_whole_rows() {
    for tensor in [1, 4] {
        let mesh = Mesh::new(1, 1, tensor, 1).unwrap();
        let mut ring = Ring::load(&fixture("qwen3"), Setting::new(mesh, Dtype::Bf16)).unwrap();
        let step = |ring: &mut Ring, seq: u64, sampling: Sampling| {
            let begun = vec![Begin { seq: SeqId(seq), sampling, prompt_len: 9, history: vec![] }];
            let chunks = vec![Chunk {
                seq: SeqId(seq),
                start: 0,
                tokens: prompt(9, 3),
                blocks: vec![BlockId(seq as u32)],
                sample: true,
            }];
            let lane = LaneBatch { begun, chunks, ended: vec![] };
            ring.step(&StepBatch { lanes: vec![lane] }).unwrap()[0].samples[0].token
        };
        let plain = step(&mut ring, 1, Sampling::GREEDY);
        assert_eq!(plain, step(&mut ring, 2, Sampling { logprobs: Some(0), ..Sampling::GREEDY }));
        let forbidden = Sampling { suppress: vec![plain], suppress_until: 1, ..Sampling::GREEDY };
        assert_ne!(plain, step(&mut ring, 3, forbidden));
    }
}

#[test]
fn a_mesh_that_a_model_cannot_take_is_refused_in_words() {
    let mesh = Mesh::new(1, 1, 16, 1).unwrap();
    let refused = Ring::load(&fixture("qwen3"), Setting::new(mesh, Dtype::F32)).err().unwrap();
    assert!(format!("{refused:#}").contains("tp 16"), "{refused:#}");
}

#[test]
fn lanes_spread_experts_beyond_eight_ways() {
    check_meshes("qwen3_moe", Dtype::Bf16, &[(1, 4, 4, 16), (1, 8, 2, 16)]);
}
