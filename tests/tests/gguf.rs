//! A model kept as one GGUF file gives the bits that its safetensors give: the file is written here, from a fixture.

#![allow(clippy::unwrap_used)] // all of this file is a test

use conclave_tests::ring::{Ring, Setting, fixture};
use model::catalog::{self, Part};
use model::mesh::Mesh;
use model::quant::{Dtype, Format};
use model::spec::{Branch, Mixer, ModelSpec, Naming};
use model::step::{Begin, BlockId, Chunk, LaneBatch, Sampling, SeqId, StepBatch};
use std::path::{Path, PathBuf};
use worker::load::checkpoint::Checkpoint;

/// A file of its own for each test, removed when dropped.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// `llama.cpp`'s keys for a spec of grouped attention.
fn metadata(spec: &ModelSpec, architecture: &str) -> (u64, Vec<u8>) {
    let (mut out, mut keys) = (Vec::new(), 0);
    let Mixer::Grouped(attention) = &spec.layers[0].mixer else { panic!("grouped attention") };
    let mut key = |name: &str, kind: u32, value: &[u8]| {
        text(&mut out, name);
        out.extend_from_slice(&kind.to_le_bytes());
        out.extend_from_slice(value);
        keys += 1;
    };
    let mut name = Vec::new();
    text(&mut name, architecture);
    key("general.architecture", 8, &name);
    let mut size = |name: &str, n: usize| key(&format!("{architecture}.{name}"), 4, &(n as u32).to_le_bytes());
    size("embedding_length", spec.hidden);
    size("block_count", spec.layers.len());
    size("context_length", spec.positions_max);
    size("attention.head_count", attention.heads);
    size("attention.head_count_kv", attention.kv_heads);
    size("attention.key_length", attention.head_dim);
    size("attention.value_length", attention.head_dim);
    size("vocab_size", spec.vocab);
    match &spec.layers[0].branches[0] {
        Branch::Dense(d) => size("feed_forward_length", d.intermediate),
        Branch::Moe(m) => {
            size("expert_count", m.experts);
            size("expert_used_count", m.active);
            size("expert_feed_forward_length", m.intermediate);
        }
    }
    let mut float = |name: &str, v: f32| key(&format!("{architecture}.{name}"), 6, &v.to_le_bytes());
    float("attention.layer_norm_rms_epsilon", spec.final_norm.eps);
    float("rope.freq_base", attention.rope.as_ref().unwrap().theta as f32);
    (keys, out)
}

/// Writes the checkpoint at `from` as one GGUF file.
fn convert(from: &Path, architecture: &str, to: &Path) {
    let checkpoint = Checkpoint::open(from).unwrap();
    let spec = checkpoint.spec().unwrap();
    let renamed = ModelSpec { naming: Naming::Gguf, ..spec.clone() };
    // Both lists are in one order; experts of a stack follow each other.
    let (mut table, mut data, mut tensors) = (Vec::new(), Vec::<u8>::new(), 0u64);
    for (old, new) in catalog::tensors(&spec).iter().zip(catalog::tensors(&renamed)) {
        let stored = checkpoint.tensor(&old.source.name).unwrap();
        let stack = match new.source.part {
            Part { stack: None, .. } => None,
            Part { stack: Some(entry), .. } => Some(entry.of),
        };
        if new.source.part.stack.is_none_or(|entry| entry.index == 0) {
            data.resize(data.len().next_multiple_of(32), 0);
            text(&mut table, &new.source.name);
            let mut dims: Vec<u64> = stored.shape.iter().rev().map(|&d| d as u64).collect();
            dims.extend(stack.map(|of| of as u64));
            table.extend_from_slice(&(dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|d| table.extend_from_slice(&d.to_le_bytes()));
            let kind = match stored.format {
                Format::F32 => 0u32,
                Format::Bf16 => 30,
                other => panic!("{other:?} in a fixture"),
            };
            table.extend_from_slice(&kind.to_le_bytes());
            table.extend_from_slice(&(data.len() as u64).to_le_bytes());
            tensors += 1;
        }
        data.extend_from_slice(stored.bytes);
    }
    let (keys, metadata) = metadata(&spec, architecture);
    let mut file = b"GGUF\x03\0\0\0".to_vec();
    file.extend_from_slice(&tensors.to_le_bytes());
    file.extend_from_slice(&keys.to_le_bytes());
    file.extend(metadata);
    file.extend(table);
    file.resize(file.len().next_multiple_of(32), 0);
    file.extend(data);
    std::fs::write(to, file).unwrap();
}

/// The logits of some tokens.
fn logits(path: &Path, mesh: Mesh) -> Vec<Vec<f32>> {
    let mut ring = Ring::load(path, Setting::new(mesh, Dtype::F32)).unwrap();
    ring.trace(true).unwrap();
    let begun = vec![Begin { seq: SeqId(1), sampling: Sampling::GREEDY, prompt_len: 20, history: vec![] }];
    let tokens = (0..20).map(|i| i * 17 % 400).collect();
    let chunks = vec![Chunk { seq: SeqId(1), start: 0, tokens, blocks: vec![BlockId(0)], sample: true }];
    ring.step(&StepBatch { lanes: vec![LaneBatch { begun, chunks, ended: vec![] }] }).unwrap();
    ring.trace(false).unwrap().remove(0).logits.into_iter().map(|(_, _, row)| row).collect()
}

#[test]
fn a_gguf_file_gives_the_bits_of_its_safetensors() {
    for (name, architecture) in [("qwen3_moe", "qwen3moe"), ("qwen3", "qwen3"), ("qwen2", "qwen2")] {
        let file = format!("conclave-gguf-{}-{name}.gguf", std::process::id());
        let scratch = Scratch(std::env::temp_dir().join(file));
        convert(&fixture(name), architecture, &scratch.0);
        let expected = logits(&fixture(name), Mesh::ONE);
        assert_eq!(expected.len(), 20);
        let found = logits(&scratch.0, Mesh::new(1, 1, 2, 1).unwrap());
        assert!(found == expected, "{name}: logits differ");
    }
}
