//! Requests run through a [`Ring`] by hand, in chunks and together, and what each one saw to the last bit.

use crate::ring::{Ring, Setting};
use anyhow::{Context, Result, ensure};
use model::plan::BLOCK_TOKENS;
use model::step::{Begin, BlockId, Chunk, LaneBatch, Sampling, SeqId, StepBatch};
use std::collections::BTreeMap;
use std::path::Path;

/// Tokens drawn after each prompt.
pub const ANSWER: usize = 6;

/// One request's rows and tokens.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Outcome {
    /// Bits of the logits of each computed position.
    pub logits: BTreeMap<usize, Vec<u32>>,
    pub tokens: Vec<u32>,
    /// Bits of each predictor's logits, by predictor and position.
    pub predicted: BTreeMap<(usize, usize), Vec<u32>>,
    /// What was guessed behind so many tokens of the answer.
    pub guesses: Vec<(usize, Vec<u32>)>,
    /// Drafts that were drawn again.
    pub checked: usize,
}

/// A request on its way.
#[derive(Debug, Clone)]
pub struct Request {
    pub seq: u64,
    pub lane: usize,
    pub sampling: Sampling,
    pub prompt: Vec<u32>,
    /// Tokens drawn before it was preempted.
    pub drawn: Vec<u32>,
    /// Drawn tokens at which it ends.
    pub answer: usize,
    /// First cache block; each request has a run of its own.
    pub block: u32,
    /// Where it begins: behind a prefix that is cached already, where not 0.
    pub start: usize,
    /// Guesses that each step asks for; the next one has them for drafts, every second replaced by what `known` has there.
    pub guesses: usize,
    pub known: Vec<u32>,
}

impl Request {
    /// A prompt of `length` tokens that follow from `seq`, sampled warm, in a cache run of its own.
    pub fn new(seq: u64, length: usize) -> Request {
        Request {
            seq,
            lane: 0,
            sampling: warm(seq),
            prompt: prompt(length, seq as u32),
            drawn: vec![],
            answer: ANSWER,
            block: 8 * seq as u32,
            start: 0,
            guesses: 0,
            known: vec![],
        }
    }
}

/// Tokens that every fixture's vocabulary has.
pub fn prompt(length: usize, salt: u32) -> Vec<u32> {
    (0..length as u32).map(|i| (i * 7919 + salt * 104_729 + 13) % 400).collect()
}

pub fn warm(seed: u64) -> Sampling {
    Sampling { temperature: 0.9, top_p: 0.95, seed, ..Sampling::GREEDY }
}

/// Runs requests to their ends together, prompts in chunks of `chunk` tokens, and tells what each one saw.
pub fn run(ring: &mut Ring, lanes: usize, requests: &[Request], chunk: usize) -> Result<Vec<Outcome>> {
    ring.trace(true)?;
    let mut outcomes: Vec<Outcome> =
        requests.iter().map(|r| Outcome { tokens: r.drawn.clone(), ..Outcome::default() }).collect();
    let mut positions: Vec<usize> = requests.iter().map(|r| r.start).collect();
    let mut guesses: Vec<Vec<u32>> = vec![vec![]; requests.len()];
    let (mut begun, mut blocks) = (vec![false; requests.len()], vec![0; requests.len()]);
    let of = |seq: SeqId| requests.iter().position(|r| r.seq == seq.0).context("an answer for nobody");
    loop {
        let most = requests.iter().map(|r| r.guesses).max().unwrap_or(0);
        let mut batch = StepBatch { lanes: vec![LaneBatch { guesses: most as u32, ..LaneBatch::default() }; lanes] };
        for (i, r) in requests.iter().enumerate() {
            let all: Vec<u32> = r.prompt.iter().chain(&outcomes[i].tokens).copied().collect();
            if outcomes[i].tokens.len() == r.answer {
                continue;
            }
            let (start, tokens_end) = (positions[i], all.len().min(positions[i].saturating_add(chunk)));
            let drafts = if tokens_end == all.len() { std::mem::take(&mut guesses[i]) } else { vec![] };
            let end = tokens_end + drafts.len();
            let lane = &mut batch.lanes[r.lane];
            if !begun[i] {
                let (prompt_len, history) = (r.prompt.len() as u32, all[..start].to_vec());
                lane.begun.push(Begin { seq: SeqId(r.seq), sampling: r.sampling.clone(), prompt_len, history });
            }
            let had = if begun[i] { blocks[i] } else { 0 };
            blocks[i] = end.div_ceil(BLOCK_TOKENS).max(had);
            lane.chunks.push(Chunk {
                seq: SeqId(r.seq),
                start: start as u32,
                tokens: [&all[start..tokens_end], &drafts].concat(),
                blocks: (had..blocks[i]).map(|b| BlockId(r.block + b as u32)).collect(),
                sample: tokens_end == all.len(),
                drafts: drafts.len() as u32,
            });
            begun[i] = true;
            positions[i] = tokens_end;
        }
        if batch.lanes.iter().all(|l| l.chunks.is_empty()) {
            break;
        }
        let answers = ring.step(&batch)?;
        for own in answers.iter().flat_map(|a| a.samples.chunk_by(|a, b| a.seq == b.seq)) {
            let i = of(own[0].seq)?;
            outcomes[i].tokens.extend(own.iter().map(|sample| sample.token));
            outcomes[i].checked += own.len() - 1;
            // Behind the drafts that were drawn again.
            positions[i] += own.len() - 1;
        }
        for own in answers.into_iter().flat_map(|a| a.guesses) {
            let (i, r) = (of(own.seq)?, &requests[of(own.seq)?]);
            ensure!(own.tokens.len() <= most, "{} guesses of {most}", own.tokens.len());
            let drawn = outcomes[i].tokens.len();
            outcomes[i].guesses.push((drawn, own.tokens.clone()));
            let known = |at: usize| r.known.get(at).filter(|_| at.is_multiple_of(2));
            let drafts = (drawn..).zip(own.tokens).map(|(at, guess)| *known(at).unwrap_or(&guess));
            guesses[i] = drafts.take((r.answer - drawn).saturating_sub(1)).collect();
        }
    }
    for trace in ring.trace(false)? {
        // Every tensor rank gathered the same rows.
        for ((seq, position), row) in latest(trace.logits) {
            let i = of(seq)?;
            // Behind the answer are drafts that were not drawn again.
            if position + 1 < requests[i].prompt.len() + outcomes[i].tokens.len() {
                let first = outcomes[i].logits.entry(position).or_insert_with(|| row.clone());
                ensure!(*first == row, "ranks disagree about position {position}");
            }
        }
        for (predictor, rows) in trace.predicted.into_iter().enumerate() {
            for ((seq, position), row) in latest(rows) {
                let first = outcomes[of(seq)?].predicted.entry((predictor, position)).or_insert_with(|| row.clone());
                ensure!(*first == row, "ranks disagree about predictor {predictor} at position {position}");
            }
        }
    }
    let mut batch = StepBatch { lanes: vec![LaneBatch::default(); lanes] };
    requests.iter().for_each(|r| batch.lanes[r.lane].ended.push(SeqId(r.seq)));
    ring.step(&batch)?;
    Ok(outcomes)
}

/// The bits of each row, as it was computed last: a draft that was not drawn again is computed over.
fn latest(rows: Vec<(SeqId, usize, Vec<f32>)>) -> BTreeMap<(SeqId, usize), Vec<u32>> {
    rows.into_iter().map(|(seq, at, row)| ((seq, at), row.iter().map(|v| v.to_bits()).collect())).collect()
}

/// What a request sees alone, its prompt at once.
pub fn reference(path: &Path, setting: Setting, request: &Request) -> Result<Outcome> {
    let mut ring = Ring::load(path, setting)?;
    Ok(run(&mut ring, 1, std::slice::from_ref(request), usize::MAX)?.remove(0))
}

/// Fails where `found` has another token, or a row of other bits, than `expected`.
pub fn same(what: &str, found: &Outcome, expected: &Outcome) -> Result<()> {
    ensure!(found.tokens == expected.tokens, "{what}: tokens {:?}, expected {:?}", found.tokens, expected.tokens);
    ensure!(!found.logits.is_empty(), "{what}: no logits were compared");
    for (position, bits) in &found.logits {
        let wanted = expected.logits.get(position).with_context(|| format!("{what}: no position {position}"))?;
        let differing = bits.iter().zip(wanted).filter(|(a, b)| a != b).count();
        ensure!(
            differing == 0 && bits.len() == wanted.len(),
            "{what}: {differing} of {} logits differ at position {position}",
            bits.len()
        );
    }
    ensure!(found.predicted.is_empty() == expected.predicted.is_empty(), "{what}: only one of both was predicted");
    for (place, bits) in &found.predicted {
        let same = expected.predicted.get(place) == Some(bits);
        ensure!(same, "{what}: predictor {} has other logits at position {}", place.0, place.1);
    }
    Ok(())
}

/// Alone and in a crowd, prompts in chunks of each of `chunks`, on a mesh, against `expected` of `Request::new(1, 45)`:
/// with several lanes one of them stays idle while it runs alone. How many runs were compared.
pub fn check_mesh(path: &Path, setting: Setting, chunks: &[usize], expected: &Outcome) -> Result<usize> {
    let (mesh, dtype, data) = (setting.mesh, setting.dtype, setting.mesh.data);
    let mut ring = Ring::load(path, setting).with_context(|| format!("{mesh} {dtype}"))?;
    let (mut compared, lane) = (0, data - 1);
    for &chunk in chunks {
        let what = format!("{dtype} {mesh} chunks of {chunk}");
        let found = run(&mut ring, data, &[Request { lane, ..Request::new(1, 45) }], chunk)?;
        same(&format!("{what}, alone"), &found[0], expected)?;
        let crowd = [Request::new(2, 33), Request { lane, ..Request::new(1, 45) }, Request::new(3, 5)];
        let found = run(&mut ring, data, &crowd, chunk)?;
        same(&format!("{what}, in a batch"), &found[1], expected)?;
        compared += 2;
    }
    Ok(compared)
}
