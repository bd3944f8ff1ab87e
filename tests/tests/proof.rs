//! What ranks prove of their weights, on any mesh, is what one reader of the whole checkpoint finds.

#![allow(clippy::unwrap_used)] // all of this file is a test

use conclave_tests::ring::{Ring, Setting, fixture, fixtures, plan};
use model::mesh::{Mesh, RankId};
use model::proof::{self, Digest};
use model::quant::Dtype;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use worker::engine::shard::Shelves;
use worker::load::checkpoint::Checkpoint;
use worker::load::proof::of_model;

const MESHES: [(usize, usize, usize, usize); 6] =
    [(1, 1, 1, 1), (1, 1, 2, 2), (1, 1, 2, 1), (2, 1, 2, 1), (1, 2, 1, 2), (1, 1, 1, 1)];

/// Loads one mesh after the other over the same shelves and compares each segment that a rank proves.
fn check(name: &str) {
    let path = fixture(name);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let spec = checkpoint.spec().unwrap().predicting(0).unwrap();
    let whole = of_model(&checkpoint, &spec, &|_, _| {}).unwrap();
    let shelves = Arc::new(Shelves::default());
    for (pipeline, data, tensor, expert) in MESHES {
        let mesh = Mesh::new(pipeline, data, tensor, expert).unwrap();
        if model::cut::check(&spec, &mesh).is_err() {
            continue;
        }
        let setting = Setting::new(mesh, Dtype::Bf16);
        let _ring = Ring::load_from(&path, setting, Some(shelves.clone())).unwrap();
        let (plan, ranks): (_, Vec<RankId>) = (plan(&spec, setting), mesh.all().collect());
        let proven = shelves.proof(&spec, &plan, &ranks).unwrap();
        let owed: Vec<_> = proof::owed(&spec, &mesh, &plan.stages, &ranks).map(|(id, _)| id).collect();
        assert_eq!(proven.len(), owed.len() * size_of::<Digest>(), "{name} {mesh}");
        for (id, digest) in owed.iter().zip(proven.chunks(size_of::<Digest>())) {
            assert_eq!(digest, whole[id], "{name} {mesh}: segment {} of {}", id.1, proof::label(&id.0));
        }
        assert!(whole.keys().all(|id| owed.contains(id)), "{name} {mesh}: together they hold everything");
    }
}

#[test]
fn ranks_of_every_mesh_prove_what_one_reader_finds() {
    fixtures().iter().for_each(|name| check(name));
}

/// One bit of a weight, anywhere, is a segment that differs and no other.
#[test]
fn a_flipped_bit_is_found_in_its_segment() {
    let folder = std::env::temp_dir().join(format!("conclave-flipped-{}", std::process::id()));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    let read = |path: &Path| {
        let checkpoint = Checkpoint::open(path).unwrap();
        let spec = checkpoint.spec().unwrap().predicting(0).unwrap();
        of_model(&checkpoint, &spec, &|_, _| {}).unwrap()
    };
    for name in ["qwen3_moe", "deepseek_v3_fp8", "kimi_k2_int4", "gpt_oss"] {
        for entry in fs::read_dir(fixture(name)).unwrap().flatten() {
            fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
        }
        let before = read(&folder);
        let file = folder.join("model.safetensors");
        let mut bytes = fs::read(&file).unwrap();
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let (mut found, mut tried) = (0, 0);
        for at in (header + 1..bytes.len()).step_by((bytes.len() - header) / 23) {
            bytes[at] ^= 0x40;
            fs::write(&file, &bytes).unwrap();
            let after = read(&folder);
            let differ = before.iter().filter(|(id, digest)| after[*id] != **digest).count();
            // A stored tensor may stand for several declared ones, and predictors' are not read here.
            assert!(differ <= 8, "{name}: byte {at} changed {differ} segments");
            (found, tried) = (found + usize::from(differ > 0), tried + 1);
            bytes[at] ^= 0x40;
        }
        assert!(found * 10 >= tried * 7, "{name}: {found} of {tried}");
        fs::remove_file(&file).unwrap();
    }
    fs::remove_dir_all(&folder).unwrap();
}
