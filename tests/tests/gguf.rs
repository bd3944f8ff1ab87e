//! A model kept as GGUF gives the bits that its safetensors give: the files are written here, from fixtures, with the
//! names and keys of llama.cpp's converter.

#![allow(clippy::unwrap_used)] // all of this file is a test

use conclave_tests::lent::Lent;
use conclave_tests::planned;
use conclave_tests::ring::{Ring, Setting, fixture};
use model::catalog::{self, Role, TensorDecl, TensorId};
use model::mesh::Mesh;
use model::quant::{Code, Dtype, Format};
use model::rope::Scaling;
use model::spec::{Branch, Layer, Mixer, ModelSpec, Naming, Score, Span};
use model::step::{Begin, BlockId, Chunk, LaneBatch, Sampling, SeqId, StepBatch};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use worker::backend::MatrixView;
use worker::load::checkpoint::Checkpoint;
use worker::load::codes::{self, Group};
use worker::load::loader::whole;
use worker::load::widen::widen;

/// A folder of its own for each test, removed when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("conclave-gguf-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// Metadata under an architecture's keys.
#[derive(Default, Clone)]
struct Keys {
    architecture: String,
    number: u64,
    bytes: Vec<u8>,
}

impl Keys {
    fn whole(&mut self, name: &str, kind: u32, value: &[u8]) {
        text(&mut self.bytes, name);
        self.bytes.extend_from_slice(&kind.to_le_bytes());
        self.bytes.extend_from_slice(value);
        self.number += 1;
    }

    fn own(&mut self, name: &str, kind: u32, value: &[u8]) {
        self.whole(&format!("{}.{name}", self.architecture), kind, value);
    }

    fn size(&mut self, name: &str, n: usize) {
        self.own(name, 4, &(n as u32).to_le_bytes());
    }

    fn float(&mut self, name: &str, v: f32) {
        self.own(name, 6, &v.to_le_bytes());
    }

    fn word(&mut self, name: &str, word: &str) {
        let mut value = Vec::new();
        text(&mut value, word);
        self.own(name, 8, &value);
    }
}

/// `llama.cpp`'s keys for a spec.
fn metadata(spec: &ModelSpec) -> Keys {
    let mut keys = Keys { architecture: spec.architecture.clone(), ..Keys::default() };
    let mut name = Vec::new();
    text(&mut name, &spec.architecture);
    keys.whole("general.architecture", 8, &name);
    keys.size("embedding_length", spec.hidden);
    keys.size("block_count", spec.layers.len());
    keys.size("context_length", spec.positions_max);
    keys.size("vocab_size", spec.vocab);
    keys.float("attention.layer_norm_rms_epsilon", spec.final_norm.eps);
    match &spec.layers[0].mixer {
        Mixer::Grouped(g) => {
            keys.size("attention.head_count", g.heads);
            keys.size("attention.head_count_kv", g.kv_heads);
            keys.size("attention.key_length", g.head_dim);
            keys.size("attention.value_length", g.head_dim);
            if let Span::Window(n) = g.span {
                keys.size("attention.sliding_window", n);
            }
        }
        Mixer::Latent(l) => {
            keys.size("attention.head_count", l.heads);
            keys.size("attention.kv_lora_rank", l.kv_rank);
            keys.size("rope.dimension_count", l.rope_dim);
            if let Some(rank) = l.query_rank {
                keys.size("attention.q_lora_rank", rank);
            }
            let (key, value) = (l.nope_dim + l.rope_dim, l.value_dim);
            if l.halves {
                keys.size("attention.head_count_kv", 1);
                keys.size("attention.key_length", l.kv_rank + l.rope_dim);
                keys.size("attention.value_length", l.kv_rank);
                keys.size("attention.key_length_mla", key);
                keys.size("attention.value_length_mla", value);
            } else {
                keys.size("attention.head_count_kv", l.heads);
                keys.size("attention.key_length", key);
                keys.size("attention.value_length", value);
            }
        }
    }
    let rope = spec.layers[0].mixer.rope().unwrap();
    keys.float("rope.freq_base", rope.theta as f32);
    if let Scaling::Yarn { factor, original, beta_fast, .. } = rope.scaling {
        keys.word("rope.scaling.type", "yarn");
        keys.float("rope.scaling.factor", factor as f32);
        keys.size("rope.scaling.original_context_length", original);
        keys.float("rope.scaling.yarn_beta_fast", beta_fast as f32);
        if matches!(spec.layers[0].mixer, Mixer::Latent(_)) {
            // A tenth of the fixture's `mscale_all_dim`, which is 1.
            keys.float("rope.scaling.yarn_log_multiplier", 0.1);
        }
    }
    branches(spec, &mut keys);
    keys
}

fn branches(spec: &ModelSpec, keys: &mut Keys) {
    let dense = |layer: &Layer| matches!(layer.branches[0], Branch::Dense(_));
    let all = || spec.layers.iter().flat_map(|l| &l.branches);
    if let Some(Branch::Dense(d)) = all().find(|b| matches!(b, Branch::Dense(_))) {
        keys.size("feed_forward_length", d.intermediate);
    }
    let Some(m) = spec.mixtures().next() else { return };
    keys.size("expert_count", m.experts);
    keys.size("expert_used_count", m.active);
    keys.size("expert_feed_forward_length", m.intermediate);
    if spec.architecture == "deepseek2" {
        keys.size("leading_dense_block_count", spec.layers.iter().filter(|l| dense(l)).count());
        keys.size("expert_shared_count", m.shared.as_ref().map_or(0, |s| s.intermediate / m.intermediate));
        keys.size("expert_gating_func", if m.router.score == Score::Sigmoid { 2 } else { 1 });
        keys.float("expert_weights_scale", m.router.scale);
        keys.own("expert_weights_norm", 7, &[u8::from(m.router.renormalise)]);
        if let Some(groups) = m.router.groups {
            keys.size("expert_group_count", groups.count);
            keys.size("expert_group_used_count", groups.kept);
        }
    }
}

/// A tensor of a GGUF file.
struct Tensor {
    name: String,
    /// Slowest first.
    shape: Vec<usize>,
    kind: u32,
    data: Vec<u8>,
}

/// A fixture, and how its tensors are found by what they do.
struct Fixture {
    checkpoint: Checkpoint,
    spec: ModelSpec,
    declared: BTreeMap<TensorId, TensorDecl>,
}

impl Fixture {
    fn open(name: &str) -> Fixture {
        let checkpoint = Checkpoint::open(&fixture(name)).unwrap();
        let spec = checkpoint.spec().unwrap();
        let declared = catalog::tensors(&spec).into_iter().map(|d| (d.id, d)).collect();
        Fixture { checkpoint, spec, declared }
    }

    /// The GGUF type of a matrix, and its bytes: MXFP4 stays that, the rest plain numbers as they are.
    fn encoded(&self, id: TensorId) -> (u32, Vec<u8>) {
        let view = whole(&self.checkpoint, &self.spec, &self.declared[&id]).unwrap();
        match (codes::scheme(&view), view.format) {
            (Some(scheme), _) if scheme.code == Code::E2m1 => (39, mxfp4(&view)),
            (None, Format::Bf16) => {
                (30, rows(&view).iter().flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes()).collect())
            }
            (None, Format::F32) => (0, rows(&view).iter().flat_map(|v| v.to_le_bytes()).collect()),
            (_, other) => panic!("{other:?} in a fixture"),
        }
    }

    /// One half of the latent's expansion, each head's as llama.cpp keeps it.
    fn half(&self, id: TensorId) -> Vec<u8> {
        let Mixer::Latent(l) = &self.spec.layers[id.layer.unwrap()].mixer else { panic!("latent attention") };
        let up = TensorId { role: Role::KvUp, ..id };
        let values = rows(&whole(&self.checkpoint, &self.spec, &self.declared[&up]).unwrap());
        let mut out = Vec::new();
        for head in values.chunks_exact((l.nope_dim + l.value_dim) * l.kv_rank) {
            let (key, value) = head.split_at(l.nope_dim * l.kv_rank);
            if id.role == Role::Expand {
                out.extend_from_slice(value);
            } else {
                out.extend((0..l.kv_rank).flat_map(|k| (0..l.nope_dim).map(move |n| key[n * l.kv_rank + k])));
            }
        }
        out.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    /// Its tensors under the names of `renamed`, which has the same layers.
    fn convert(&self, renamed: &ModelSpec) -> Vec<Tensor> {
        let mut out: Vec<Tensor> = Vec::new();
        for decl in catalog::tensors(renamed) {
            let (kind, data) = match decl.id.role {
                Role::Absorb | Role::Expand => (0, self.half(decl.id)),
                _ => self.encoded(decl.id),
            };
            if decl.source.part.stack.is_some_and(|entry| entry.index > 0) {
                // Experts of a stack follow each other.
                let stack = out.iter_mut().find(|t| t.name == decl.source.name).unwrap();
                stack.data.extend(data);
                continue;
            }
            let matrix = match (decl.rows, decl.cols, &renamed.layers[decl.id.layer.unwrap_or(0)].mixer) {
                (1, n, _) | (n, 1, _) => vec![n],
                (rows, cols, Mixer::Latent(l)) if matches!(decl.id.role, Role::Absorb | Role::Expand) => {
                    vec![l.heads, rows / l.heads, cols]
                }
                (rows, cols, _) => vec![rows, cols],
            };
            let shape = decl.source.part.stack.iter().map(|entry| entry.of).chain(matrix).collect();
            out.push(Tensor { name: decl.source.name, shape, kind, data });
        }
        out
    }
}

fn rows(view: &MatrixView<'_>) -> Vec<f32> {
    let mut out = vec![0.0; view.rows * view.cols];
    out.chunks_exact_mut(view.cols).enumerate().for_each(|(row, out)| widen(view, row, out));
    out
}

/// ggml's blocks of 32: an exponent, and nibbles of which the first sixteen are the lower ones.
fn mxfp4(view: &MatrixView<'_>) -> Vec<u8> {
    let (mut out, mut row_codes) = (Vec::new(), vec![0; view.cols]);
    let mut groups = vec![Group::scaled(0.0); view.cols / 32];
    for row in 0..view.rows {
        codes::codes(view, row, &mut row_codes);
        codes::groups(view, row, &mut groups);
        for (group, codes) in groups.iter().zip(row_codes.chunks_exact(32)) {
            out.push((group.scale.to_bits() >> 23) as u8);
            out.extend((0..16).map(|i| codes[i] | codes[i + 16] << 4));
        }
    }
    out
}

fn write(to: &Path, keys: &Keys, tensors: &[Tensor]) {
    let (mut table, mut data) = (Vec::new(), Vec::<u8>::new());
    for tensor in tensors {
        data.resize(data.len().next_multiple_of(32), 0);
        text(&mut table, &tensor.name);
        table.extend_from_slice(&(tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|&d| table.extend_from_slice(&(d as u64).to_le_bytes()));
        table.extend_from_slice(&tensor.kind.to_le_bytes());
        table.extend_from_slice(&(data.len() as u64).to_le_bytes());
        data.extend_from_slice(&tensor.data);
    }
    let mut file = b"GGUF\x03\0\0\0".to_vec();
    file.extend_from_slice(&(tensors.len() as u64).to_le_bytes());
    file.extend_from_slice(&keys.number.to_le_bytes());
    file.extend_from_slice(&keys.bytes);
    file.extend(table);
    file.resize(file.len().next_multiple_of(32), 0);
    file.extend(data);
    std::fs::write(to, file).unwrap();
}

/// A matrix of blocks of zeros, of a type that its name decides: what is stacked differs, as in files of mixed types.
fn mixed(tensor: Tensor) -> Tensor {
    let cols = *tensor.shape.last().unwrap();
    if tensor.shape.len() < 2
        || !cols.is_multiple_of(32)
        || tensor.name.contains("gate_inp")
        || tensor.name.ends_with("bias")
    {
        return tensor;
    }
    let (kind, format) = match tensor.name.as_str() {
        name if name.contains("attn_v") => (6, Format::Q5_0),
        name if name.contains("down") => (8, Format::Q8_0),
        name if name.contains("embd") => (3, Format::Q4_1),
        name if name.contains("output") => (7, Format::Q5_1),
        _ => (2, Format::Q4_0),
    };
    let data = vec![0; format.bytes(tensor.shape.iter().product())];
    Tensor { kind, data, ..tensor }
}

/// The spec as GGUF names it; `halves` splits the latent's expansion.
fn renamed(spec: &ModelSpec, architecture: &str, halves: bool) -> ModelSpec {
    let mut spec = ModelSpec { architecture: architecture.into(), naming: Naming::Gguf, ..spec.clone() };
    spec.predictors.clear();
    for layer in &mut spec.layers {
        if let Mixer::Latent(l) = &mut layer.mixer {
            l.halves = halves;
        }
    }
    spec
}

/// The logits of some tokens.
fn logits(path: &Path, mesh: Mesh) -> Vec<Vec<f32>> {
    logits_of(Ring::load(path, Setting::new(mesh, Dtype::F32)).unwrap())
}

/// The same of a file that a peer lends.
fn logits_lent(path: &Path, mesh: Mesh) -> Vec<Vec<f32>> {
    let lent = Lent::open(path).unwrap();
    logits_of(Ring::load_of(lent.checkpoint.clone(), Setting::new(mesh, Dtype::F32), None).unwrap())
}

fn logits_of(mut ring: Ring) -> Vec<Vec<f32>> {
    ring.trace(true).unwrap();
    let begun = vec![Begin { seq: SeqId(1), sampling: Sampling::GREEDY, prompt_len: 20, history: vec![] }];
    let tokens = (0..20).map(|i| i * 17 % 400).collect();
    let chunks = vec![Chunk { seq: SeqId(1), start: 0, tokens, blocks: vec![BlockId(0)], sample: true, drafts: 0 }];
    ring.step(&StepBatch { lanes: vec![LaneBatch { begun, chunks, ..LaneBatch::default() }] }).unwrap();
    ring.trace(false).unwrap().remove(0).logits.into_iter().map(|(_, _, row)| row).collect()
}

#[test]
fn a_gguf_file_gives_the_bits_of_its_safetensors() {
    for (name, architecture, halves) in [
        ("qwen3_moe", "qwen3moe", false),
        ("qwen3", "qwen3", false),
        ("qwen2", "qwen2", false),
        ("deepseek_v3", "deepseek2", false),
        ("deepseek_v3", "deepseek2", true),
        ("gpt_oss", "gpt-oss", false),
    ] {
        let scratch = Scratch::new(&format!("{name}-{halves}"));
        let made = Fixture::open(name);
        let spec = renamed(&made.spec, architecture, halves);
        let file = scratch.0.join("model.gguf");
        write(&file, &metadata(&spec), &made.convert(&spec));
        let read = Checkpoint::open(&file).unwrap().spec().unwrap();
        let (begin_token, end_tokens) = (read.begin_token, read.end_tokens.clone());
        let expected = ModelSpec { begin_token, end_tokens, quantisation: None, ..spec };
        assert_eq!(read, expected, "{name}: the spec that the file describes");
        let expected = logits(&fixture(name), Mesh::ONE);
        assert_eq!(expected.len(), 20);
        let found = logits(&file, Mesh::new(1, 1, 2, 1).unwrap());
        assert!(found == expected, "{name}, halves {halves}: logits differ");
        let found = logits_lent(&file, Mesh::new(1, 1, 2, 1).unwrap());
        assert!(found == expected, "{name}, halves {halves}: logits of the lent file differ");
        planned::check(&file, 0, &[(1, 1, 1, 1), (2, 1, 2, 1)]).unwrap();
        let mixed: Vec<Tensor> =
            made.convert(&renamed(&made.spec, architecture, halves)).into_iter().map(mixed).collect();
        write(&file, &metadata(&renamed(&made.spec, architecture, halves)), &mixed);
        for (pipeline, tensor) in [(1, 1), (1, 2), (2, 2), (1, 4)] {
            let mesh = Mesh::new(pipeline, 1, tensor, tensor).unwrap();
            if model::cut::check(&made.spec, &mesh).is_ok() {
                let same = logits(&file, mesh) == logits_lent(&file, mesh);
                assert!(same, "{name}, halves {halves}, mixed formats, {mesh}: logits of the lent file differ");
            }
        }
        planned::check(&file, 0, &[(1, 1, 1, 1), (2, 1, 2, 1), (1, 1, 4, 2)]).unwrap();
    }
}

#[test]
fn a_split_model_is_found_from_any_of_its_parts() {
    let scratch = Scratch::new("split");
    let made = Fixture::open("qwen3");
    let spec = renamed(&made.spec, "qwen3", false);
    let (keys, tensors) = (metadata(&spec), made.convert(&spec));
    let part = |index: usize| scratch.0.join(format!("tiny-{:05}-of-00003.gguf", index + 1));
    let counted = |first: &Keys, index: u16, total: usize| {
        let mut keys = first.clone();
        keys.whole("split.no", 2, &index.to_le_bytes());
        keys.whole("split.count", 2, &3u16.to_le_bytes());
        keys.whole("split.tensors.count", 5, &(total as i32).to_le_bytes());
        keys
    };
    let third = tensors.len().div_ceil(3);
    for (index, tensors) in tensors.chunks(third).enumerate() {
        let own = if index == 0 { keys.clone() } else { Keys::default() };
        write(&part(index), &counted(&own, index as u16, third * 2 + tensors.len()), tensors);
    }
    let total = tensors.len();
    write(&part(0), &counted(&keys, 0, total), &tensors[..third]);
    let expected = logits(&fixture("qwen3"), Mesh::ONE);
    assert!(logits(&part(0), Mesh::ONE) == expected && logits(&part(2), Mesh::ONE) == expected);
    assert!(logits_lent(&part(1), Mesh::ONE) == expected);
    let identity = |path: &Path| Checkpoint::open(path).unwrap().identity();
    assert_eq!(identity(&part(0)), identity(&part(1)));
    assert_eq!(identity(&part(0)), coordinator::source::Source::open(&part(1)).unwrap().identity);

    let fault = || Checkpoint::open(&part(0)).unwrap_err().text;
    write(&part(0), &counted(&keys, 0, total + 1), &tensors[..third]);
    assert!(fault().contains(&format!("the 3 parts hold {total}")), "{}", fault());
    write(&part(0), &counted(&keys, 0, total), &tensors[..third]);
    std::fs::copy(part(2), part(1)).unwrap();
    assert!(fault().contains("split.no = 2") && fault().contains("tiny-00002-of-00003.gguf"), "{}", fault());
    std::fs::remove_file(part(1)).unwrap();
    assert!(fault().contains("tiny-00002-of-00003.gguf: part 2 of 3 is missing"), "{}", fault());
}
