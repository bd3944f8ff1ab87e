//! What ranks load of a peer's files is what they load of their own: every segment's digest, and the answer.

#![allow(clippy::unwrap_used)] // all of this file is a test

use conclave_tests::lent::Lent;
use conclave_tests::ring::{Ring, Setting, fixture, fixtures, plan};
use model::mesh::{Mesh, RankId};
use model::plan::Guesser;
use model::quant::Dtype;
use model::step::{Begin, BlockId, Chunk, LaneBatch, Sampling, SeqId, StepBatch};
use std::sync::Arc;
use worker::engine::shard::Shelves;
use worker::load::checkpoint::Checkpoint;

const MESHES: [(usize, usize, usize, usize); 6] =
    [(1, 1, 1, 1), (1, 1, 2, 2), (1, 1, 2, 1), (1, 1, 4, 1), (2, 1, 2, 1), (1, 2, 1, 2)];

/// A prompt in each lane, answered with log-probabilities.
fn step(lanes: usize) -> StepBatch {
    let sampling = Sampling { logprobs: Some(5), ..Sampling::GREEDY };
    let lane = LaneBatch {
        begun: vec![Begin { seq: SeqId(1), sampling, prompt_len: 6, history: Vec::new() }],
        chunks: vec![Chunk {
            seq: SeqId(1),
            start: 0,
            tokens: vec![3, 1, 4, 1, 5, 9],
            blocks: vec![BlockId(0)],
            sample: true,
            drafts: 0,
        }],
        ..LaneBatch::default()
    };
    StepBatch { lanes: vec![lane; lanes] }
}

/// Loads one mesh after the other of both, over shelves that keep what stays; compares what each proves and answers.
fn check(name: &str) -> usize {
    let path = fixture(name);
    let own = Arc::new(Checkpoint::open(&path).unwrap());
    let borrowed = Lent::open(&path).unwrap();
    let lent = borrowed.checkpoint.clone();
    assert_eq!(own.identity(), lent.identity(), "{name}");
    assert!(lent.is_lent() && own.names().eq(lent.names()), "{name}");
    let whole = own.spec().unwrap();
    assert_eq!(format!("{whole:?}"), format!("{:?}", lent.spec().unwrap()), "{name}");
    let mut meshes = 0;
    let shelves = [Arc::new(Shelves::default()), Arc::new(Shelves::default())];
    for (pipeline, data, tensor, expert) in MESHES {
        let mesh = Mesh::new(pipeline, data, tensor, expert).unwrap();
        let guesser = Guesser::of_predictors(whole.predictors.len());
        let setting = Setting { guesser, ..Setting::new(mesh, Dtype::Bf16) };
        let spec = whole.predicting(guesser.predictors()).unwrap();
        if model::cut::check(&spec, &mesh).is_err() {
            continue;
        }
        let (plan, ranks): (_, Vec<RankId>) = (plan(&spec, setting), mesh.all().collect());
        let loaded = |checkpoint: &Arc<Checkpoint>, shelves: &Arc<Shelves>| {
            let mut ring = Ring::load_of(checkpoint.clone(), setting, Some(shelves.clone())).unwrap();
            let answer = format!("{:?}", ring.step(&step(data)).unwrap());
            (shelves.proof(&spec, &plan, &ranks).unwrap(), answer)
        };
        let (here, there) = (loaded(&own, &shelves[0]), loaded(&lent, &shelves[1]));
        assert!(here.0 == there.0, "{name} {mesh}: other digests");
        assert!(here.1 == there.1 && here.1.contains("logprob"), "{name} {mesh}: {} and {}", here.1, there.1);
        meshes += 1;
    }
    meshes
}

#[test]
fn what_a_peer_lends_is_what_its_files_hold() {
    let names = fixtures();
    let meshes: usize = names.iter().map(|name| check(name)).sum();
    assert!(meshes > 3 * names.len(), "{meshes} meshes of {} models", names.len());
}

/// What a lender's files hold wrong is in what the borrower proves: the list of digests, or who loaded before, finds it.
#[test]
fn a_flipped_bit_of_a_lender_is_in_what_is_proven() {
    let folder = std::env::temp_dir().join(format!("conclave-lent-wrong-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    for entry in std::fs::read_dir(fixture("qwen3_moe")).unwrap().flatten() {
        std::fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
    }
    let proven = || {
        let borrowed = Lent::open(&folder).unwrap();
        let lent = borrowed.checkpoint.clone();
        let spec = lent.spec().unwrap().predicting(0).unwrap();
        let (setting, shelves) = (Setting::new(Mesh::ONE, Dtype::Bf16), Arc::new(Shelves::default()));
        let _ring = Ring::load_of(lent, setting, Some(shelves.clone())).unwrap();
        shelves.proof(&spec, &plan(&spec, setting), &[RankId(0)]).unwrap()
    };
    let before = proven();
    let file = folder.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x40;
    std::fs::write(&file, bytes).unwrap();
    let after = proven();
    let differ = before.chunks(16).zip(after.chunks(16)).filter(|(a, b)| a != b).count();
    assert!(before.len() == after.len() && (1..=2).contains(&differ), "{differ} segments differ");
    std::fs::remove_dir_all(&folder).unwrap();
}
