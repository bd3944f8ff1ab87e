//! Every architecture against the reference implementation: logits, routing, tokens and log-probabilities of the
//! fixtures under `golden/`, on one rank in f32.

#![allow(clippy::unwrap_used)] // all of this file is a test

use conclave_tests::golden::{Golden, Prompt};
use conclave_tests::ring::{Ring, Setting, fixture, fixtures};
use model::mesh::Mesh;
use model::plan::BLOCK_TOKENS;
use model::quant::Dtype;
use model::step::{Begin, BlockId, Chunk, LaneBatch, Sampling, SeqId, StepBatch};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::LazyLock;

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
        drafts: 0,
    };
    StepBatch {
        lanes: vec![LaneBatch { begun: first.into_iter().collect(), chunks: vec![chunk], ..LaneBatch::default() }],
    }
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

/// Whether each fixture equals its reference: the whole folder, so that one that is added is tested.
static EQUAL: LazyLock<BTreeMap<String, bool>> = LazyLock::new(|| {
    let checked = |name: String| {
        let equal = std::panic::catch_unwind(|| check(&name)).is_ok();
        (name, equal)
    };
    fixtures().into_iter().map(checked).collect()
});

/// All failures are told, not the first alone.
#[test]
fn every_fixture_equals_its_reference() {
    assert!(EQUAL.len() > 1, "fixtures: {EQUAL:?}");
    let failed: Vec<&String> = EQUAL.iter().filter(|(_, equal)| !**equal).map(|(name, _)| name).collect();
    assert!(failed.is_empty(), "{} of {} fixtures differ: {failed:?}", failed.len(), EQUAL.len());
}

/// A row of the README's table of models.
struct Row {
    ticked: bool,
    goldens: Vec<String>,
    configs: Vec<String>,
}

fn rows(readme: &str) -> Vec<Row> {
    let section = readme.split("\n## ").find(|section| section.starts_with("Models\n")).unwrap();
    let table = section.lines().filter(|line| line.starts_with('|')).skip(2);
    let names = |cell: &str| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect();
    let row = |line: &str| {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        assert_eq!(cells.len(), 5, "{line}");
        Row { ticked: cells[0] == "✓", goldens: names(cells[3]), configs: names(cells[4]) }
    };
    table.map(row).collect()
}

#[test]
fn every_row_of_the_readme_is_ticked_and_true() {
    if std::env::var_os("CONCLAVE_GOLDENS").is_some() {
        println!("skipped: other fixtures than the README's");
        return;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let rows = rows(&std::fs::read_to_string(root.join("../README.md")).unwrap());
    for Row { ticked, goldens, .. } in &rows {
        let equal = |name: &String| *EQUAL.get(name).unwrap_or_else(|| panic!("no fixture {name}"));
        assert!(!goldens.is_empty() && goldens.iter().all(equal) && *ticked, "{goldens:?} ticked: {ticked}");
    }
    let told = |of: fn(&Row) -> &Vec<String>| -> BTreeSet<String> { rows.iter().flat_map(of).cloned().collect() };
    assert_eq!(told(|row| &row.goldens), EQUAL.keys().cloned().collect(), "every golden stands in a row");
    let configs = std::fs::read_dir(root.join("configs")).unwrap().map(|entry| entry.unwrap().path());
    let configs = configs.map(|path| path.file_stem().unwrap().to_string_lossy().into_owned()).collect();
    assert_eq!(told(|row| &row.configs), configs, "every config stands in a row");
}
