//! One model, one answer: however a request is cut over ranks, chunked, batched or cached, the logits of every row are
//! the same bits, and so are the tokens.

#![allow(clippy::unwrap_used)] // all of this file is a test

use conclave_tests::requests::{self, ANSWER, Outcome, Request, prompt, same, warm};
use conclave_tests::ring::{Ring, Setting, fixture, fixtures};
use model::mesh::Mesh;
use model::plan::{BLOCK_TOKENS, KernelFamily};
use model::quant::Dtype;
use model::step::{Begin, BlockId, Chunk, LaneBatch, Sampling, Score, SeqId, StepBatch, guessed};
use worker::load::checkpoint::Checkpoint;

fn reference(name: &str, dtype: Dtype, family: KernelFamily, request: &Request) -> Outcome {
    let setting = Setting { family, ..Setting::new(Mesh::ONE, dtype) };
    conclave_tests::requests::reference(&fixture(name), setting, request).unwrap()
}

fn assert_same(what: &str, found: &Outcome, expected: &Outcome) {
    same(what, found, expected).unwrap();
}

fn run(ring: &mut Ring, requests: &[Request], chunk: usize) -> Vec<Outcome> {
    requests::run(ring, 1, requests, chunk).unwrap()
}

/// Alone and at once on one rank, against a full batch in chunks on each mesh, an idle lane among the lanes.
fn check_meshes(name: &str, dtype: Dtype, meshes: &[(usize, usize, usize, usize)]) {
    let expected = reference(name, dtype, KernelFamily::Vector, &Request::new(1, 45));
    assert_eq!(expected.logits.len(), 45 + ANSWER - 1);
    for &(pipeline, data, tensor, expert) in meshes {
        let mesh = Mesh::new(pipeline, data, tensor, expert).unwrap();
        let setting = Setting::new(mesh, dtype);
        if let Err(e) = requests::check_mesh(&fixture(name), setting, &[usize::MAX, 7], &expected) {
            panic!("{name}: {e:#}");
        }
    }
}

/// A few meshes in which every pair of (tp, pp), (tp, dp), (pp, dp), (ep, each of them) is cut together, for a model of
/// at least two key/value heads and, where `spread`, eight experts.
fn pairwise(spread: bool) -> Vec<(usize, usize, usize, usize)> {
    match spread {
        false => vec![(2, 1, 2, 1), (1, 2, 2, 1), (2, 2, 1, 1)],
        true => vec![(2, 1, 2, 2), (1, 2, 2, 4), (2, 2, 1, 2), (2, 2, 2, 1)],
    }
}

#[test]
fn every_family_is_cut_along_every_pair_of_axes() {
    for name in fixtures() {
        let spec = Checkpoint::open(&fixture(&name)).unwrap().spec().unwrap();
        let spread = spec.mixtures().next().is_some();
        for dtype in [Dtype::F32, Dtype::Bf16] {
            check_meshes(&name, dtype, &pairwise(spread));
        }
    }
}

#[test]
fn a_preempted_sequence_goes_on_with_the_same_bits() {
    for (name, dtype) in [("qwen3_moe", Dtype::F32), ("deepseek_v3", Dtype::Bf16), ("mistral_7b", Dtype::Bf16)] {
        let expected = reference(name, dtype, KernelFamily::Vector, &Request::new(1, 75));
        let mesh = Mesh::new(1, 1, 2, 1).unwrap();
        let mut ring = Ring::load(&fixture(name), Setting::new(mesh, dtype)).unwrap();
        let before = run(&mut ring, &[Request { answer: 3, ..Request::new(1, 75) }], 20).remove(0);
        assert_eq!(before.tokens, expected.tokens[..3]);
        // Its blocks go to another sequence; it comes back as a prefill of prompt and answer, in new blocks.
        let thief = Request { block: Request::new(1, 75).block, ..Request::new(2, 80) };
        run(&mut ring, &[thief], 31);
        let again = Request { seq: 9, drawn: before.tokens, block: 40, ..Request::new(1, 75) };
        let found = run(&mut ring, &[again, Request::new(3, 20)], 11);
        assert_same(&format!("{name} recomputed"), &found[0], &expected);
        assert_eq!(found[0].logits.len(), expected.logits.len(), "all of it was computed again");
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
            let expected = reference(name, Dtype::Bf16, family, &Request::new(1, 75));
            let setting = Setting { family, threads: 2, ..Setting::new(Mesh::ONE, Dtype::Bf16) };
            let mut ring = Ring::load(&fixture(name), setting).unwrap();
            for chunk in [1, 3, 31, 64] {
                let found = run(&mut ring, &[Request::new(1, 75)], chunk);
                assert_same(&format!("{name} chunks of {chunk}"), &found[0], &expected);
            }
        }
    }
}

#[test]
fn a_cached_prefix_does_not_change_the_answer() {
    for (name, dtype) in [("qwen3_moe", Dtype::Bf16), ("deepseek_v3", Dtype::F32), ("mistral_7b", Dtype::Bf16)] {
        let expected = reference(name, dtype, KernelFamily::Vector, &Request::new(1, 75));
        let mesh = Mesh::new(1, 1, 2, 1).unwrap();
        let mut ring = Ring::load(&fixture(name), Setting::new(mesh, dtype)).unwrap();
        run(&mut ring, &[Request::new(1, 75)], 20);
        // Two whole blocks are in the cache; the sequence is new.
        let resumed = Request { seq: 9, start: 2 * BLOCK_TOKENS, ..Request::new(1, 75) };
        let found = run(&mut ring, &[resumed, Request::new(2, 30)], 5);
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
                drafts: 0,
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
                drafts: 0,
            }];
            let lane = LaneBatch { begun, chunks, ..LaneBatch::default() };
            ring.step(&StepBatch { lanes: vec![lane] }).unwrap()[0].samples[0].token
        };
        let plain = step(&mut ring, 1, Sampling::GREEDY);
        assert_eq!(plain, step(&mut ring, 2, Sampling { logprobs: Some(0), ..Sampling::GREEDY }));
        let forbidden = Sampling { suppress: vec![plain], suppress_until: 1, ..Sampling::GREEDY };
        assert_ne!(plain, step(&mut ring, 3, forbidden));
    }
}

/// A request's tokens and scores, with `drafts(tokens so far)` behind each step's last one, and the steps that it took.
fn drafted(
    mesh: Mesh,
    sampling: Sampling,
    answer: usize,
    drafts: impl Fn(usize) -> Vec<u32>,
) -> (Vec<(u32, Option<Score>)>, usize) {
    let mut ring = Ring::load(&fixture("qwen3_moe"), Setting::new(mesh, Dtype::Bf16)).unwrap();
    let begin = Begin { seq: SeqId(1), sampling, prompt_len: 20, history: vec![] };
    let mut lane = LaneBatch { begun: vec![begin], ..LaneBatch::default() };
    let (mut tokens, mut drawn, mut start, mut blocks, mut steps) = (prompt(20, 5), Vec::new(), 0, 0, 0);
    while drawn.len() < answer {
        let mut guesses = if drawn.is_empty() { vec![] } else { drafts(drawn.len()) };
        guesses.truncate(answer - drawn.len() - 1);
        let end = tokens.len() + guesses.len();
        let needed = end.div_ceil(BLOCK_TOKENS).max(blocks);
        lane.chunks = vec![Chunk {
            seq: SeqId(1),
            start: start as u32,
            tokens: [&tokens[start..], &guesses].concat(),
            blocks: (blocks..needed).map(|b| BlockId(b as u32)).collect(),
            sample: true,
            drafts: guesses.len() as u32,
        }];
        blocks = needed;
        let samples = ring.step(&StepBatch { lanes: vec![std::mem::take(&mut lane)] }).unwrap().remove(0).samples;
        let right = guessed(&guesses, &samples);
        assert_eq!(samples.len(), right + 1, "a draw behind each draft that was right");
        start = tokens.len() + right;
        tokens.extend(samples.iter().map(|sample| sample.token));
        drawn.extend(samples.into_iter().map(|sample| (sample.token, sample.score)));
        steps += 1;
    }
    (drawn, steps)
}

/// Ways of drawing that need whole rows, those before them, or neither.
fn samplings() -> [Sampling; 5] {
    let penalised = Sampling { presence_penalty: 0.7, frequency_penalty: 0.3, repetition_penalty: 1.2, ..warm(6) };
    let scored = Sampling { logprobs: Some(3), ..penalised.clone() };
    // Its first tokens need whole rows, the others none.
    let suppressed = Sampling { suppress: vec![3, 5], suppress_until: 9, ..Sampling::GREEDY };
    [Sampling::GREEDY, warm(6), penalised, scored, suppressed]
}

#[test]
fn drafts_change_no_token_and_no_score() {
    const LONG: usize = 24;
    for sampling in samplings() {
        let (expected, steps) = drafted(Mesh::ONE, sampling.clone(), LONG, |_| vec![]);
        assert_eq!(steps, LONG);
        // Guesses are right but for every fifth token of the answer.
        let guess = |at: usize| if at.is_multiple_of(5) { expected[at].0 ^ 1 } else { expected[at].0 };
        for (pipeline, tensor) in [(1, 1), (1, 2), (2, 1), (2, 2)] {
            let mesh = Mesh::new(pipeline, 1, tensor, 1).unwrap();
            for most in [1, 3, 7] {
                let guesses = |from: usize| (from..LONG.min(from + most)).map(guess).collect();
                let (found, steps) = drafted(mesh, sampling.clone(), LONG, guesses);
                assert_eq!(found, expected, "{mesh}, {most} drafts a step");
                assert!(steps < LONG - 5, "{steps} steps");
            }
        }
    }
}

/// A request's tokens and scores, where all but every third step feeds itself the token of the one before.
fn fed(mesh: Mesh, sampling: Sampling, answer: usize) -> Vec<(u32, Option<Score>)> {
    let mut ring = Ring::load(&fixture("qwen3_moe"), Setting::new(mesh, Dtype::Bf16)).unwrap();
    let begin = Begin { seq: SeqId(1), sampling, prompt_len: 20, history: vec![] };
    let mut lane = LaneBatch { begun: vec![begin], ..LaneBatch::default() };
    let mut drawn: Vec<(u32, Option<Score>)> = Vec::new();
    for number in 0..answer {
        let (start, tokens) = match drawn.last() {
            None => (0, prompt(20, 5)),
            Some((last, _)) => (19 + number, if number % 3 == 0 { vec![*last] } else { vec![] }),
        };
        let blocks = if start % BLOCK_TOKENS == 0 { vec![BlockId((start / BLOCK_TOKENS) as u32)] } else { vec![] };
        lane.chunks = vec![Chunk { seq: SeqId(1), start: start as u32, tokens, blocks, sample: true, drafts: 0 }];
        let samples = ring.step(&StepBatch { lanes: vec![std::mem::take(&mut lane)] }).unwrap().remove(0).samples;
        drawn.extend(samples.into_iter().map(|sample| (sample.token, sample.score)));
    }
    drawn
}

#[test]
fn a_step_that_feeds_itself_changes_no_token_and_no_score() {
    for sampling in samplings() {
        let (expected, _) = drafted(Mesh::ONE, sampling.clone(), 24, |_| vec![]);
        for tensor in [1, 2, 4] {
            assert_eq!(fed(Mesh::new(1, 1, tensor, 1).unwrap(), sampling.clone(), 24), expected, "tp{tensor}");
        }
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
