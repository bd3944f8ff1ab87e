//! Tiny checkpoints of every layout, packed here by other code than that which unpacks them.

use super::find;
use crate::load::checkpoint::Checkpoint;
use crate::load::loader::whole;
use crate::load::widen::widen;
use half::{bf16, f16};
use model::catalog::{Entry, Fused, Part, Role, Source, TensorDecl, TensorId};
use model::cut::Cut;
use model::quantisation::{Extent, Method, Quantisation};
use model::spec::ModelSpec;
use std::path::PathBuf;

/// A checkpoint of some tensors, removed when dropped.
struct Files {
    path: PathBuf,
    tensors: Vec<(String, &'static str, Vec<usize>, Vec<u8>)>,
}

impl Files {
    fn new(name: &str) -> Files {
        let path = std::env::temp_dir().join(format!("conclave-stored-{}-{name}", std::process::id()));
        Files { path, tensors: Vec::new() }
    }

    fn with(mut self, name: &str, dtype: &'static str, shape: &[usize], bytes: Vec<u8>) -> Files {
        self.tensors.push((name.into(), dtype, shape.to_vec(), bytes));
        self
    }

    fn words(self, name: &str, shape: &[usize], words: &[u32]) -> Files {
        self.with(name, "I32", shape, words.iter().flat_map(|w| w.to_le_bytes()).collect())
    }

    fn open(&self) -> Checkpoint {
        std::fs::create_dir_all(&self.path).unwrap();
        std::fs::write(self.path.join("config.json"), "{}").unwrap();
        let (mut header, mut data) = (Vec::new(), Vec::new());
        for (name, dtype, shape, bytes) in &self.tensors {
            let (from, to) = (data.len(), data.len() + bytes.len());
            header.push(format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{from},{to}]}}"#));
            data.extend_from_slice(bytes);
        }
        let header = format!("{{{}}}", header.join(","));
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.into_bytes());
        file.extend(data);
        std::fs::write(self.path.join("model.safetensors"), file).unwrap();
        Checkpoint::open(&self.path).unwrap()
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

fn spec(method: Option<Method>) -> ModelSpec {
    let config = r#"{"model_type":"llama","vocab_size":64,"hidden_size":32,"intermediate_size":32,
        "num_hidden_layers":1,"num_attention_heads":2,"max_position_embeddings":64,"rms_norm_eps":1e-5}"#;
    let spec = model::hf::spec(config, None).unwrap();
    ModelSpec { quantisation: method.map(|method| Quantisation { method, kept: Vec::new() }), ..spec }
}

fn decl(name: &str, rows: usize, cols: usize, part: Part) -> TensorDecl {
    let id = TensorId { layer: Some(0), role: Role::Up, expert: None };
    TensorDecl { id, source: Source { name: name.into(), part }, rows, cols, cut: Cut::Replicate }
}

/// All values, and those of every window of columns, which must be the same.
fn values(files: &Files, method: Method, decl: &TensorDecl) -> Vec<f32> {
    let (checkpoint, spec) = (files.open(), spec(Some(method)));
    let view = whole(&checkpoint, &spec, decl).unwrap();
    let mut out = vec![0.0; decl.rows * decl.cols];
    for (row, out) in out.chunks_exact_mut(decl.cols).enumerate() {
        widen(&view, row, out);
        for (col, cols) in [(0, 1), (3, 7), (decl.cols / 2, decl.cols / 2)] {
            let mut part = vec![0.0; cols];
            widen(&crate::backend::MatrixView { col, cols, ..view }, row, &mut part);
            assert_eq!(part, out[col..col + cols], "row {row}, columns from {col}");
        }
    }
    out
}

/// A number from 0 to `below` that looks like any other.
fn noise(seed: usize, below: usize) -> usize {
    (seed.wrapping_mul(2654435761) >> 7) % below
}

fn f16s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect()
}

fn bf16s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect()
}

const WHOLE: Part = Part::WHOLE;

#[test]
fn fp8_blocks_end_where_the_matrix_does() {
    let (rows, cols) = (10, 21);
    let codes: Vec<u8> = (0..rows * cols).map(|i| [0x38, 0xb8, 0x40, 0x01, 0x7e, 0x00][noise(i, 6)]).collect();
    let scales: Vec<f32> = (0..3 * 3).map(|i| 0.5 + i as f32).collect();
    let method = Method::Fp8(Extent { rows: Some(4), cols: Some(8) });
    let files = Files::new("fp8").with("a.weight", "F8_E4M3", &[rows, cols], codes.clone()).with(
        "a.weight_scale_inv",
        "F32",
        &[3, 3],
        scales.iter().flat_map(|s| s.to_le_bytes()).collect(),
    );
    let found = values(&files, method, &decl("a.weight", rows, cols, WHOLE));
    for r in 0..rows {
        for c in 0..cols {
            let code = match codes[r * cols + c] {
                0x38 => 1.0,
                0xb8 => -1.0,
                0x40 => 2.0,
                0x01 => 2f32.powi(-9),
                0x7e => 448.0,
                _ => 0.0,
            };
            assert_eq!(found[r * cols + c], code * scales[r / 4 * 3 + c / 8], "{r} {c}");
        }
    }
    let one = Files::new("fp8-tensor").with("a.weight", "F8_E4M3", &[1, 8], vec![0x38; 8]).with(
        "a.weight_scale",
        "BF16",
        &[1],
        bf16s(&[3.0]),
    );
    let method = Method::Fp8(Extent { rows: None, cols: None });
    assert_eq!(values(&one, method, &decl("a.weight", 1, 8, WHOLE)), [3.0; 8]);
}

#[test]
fn mxfp4_stacks_give_each_expert_its_alternate_rows() {
    let (experts, inter, cols) = (3, 4, 64);
    let rows = 2 * inter;
    let codes: Vec<u8> = (0..experts * rows * cols).map(|i| noise(i, 16) as u8).collect();
    let blocks = codes.chunks_exact(2).map(|two| two[0] | two[1] << 4).collect();
    let scales: Vec<u8> = (0..experts * rows * 2).map(|i| 120 + noise(i + 5, 12) as u8).collect();
    let files = Files::new("mxfp4")
        .with("gate_up_blocks", "U8", &[experts, rows, 2, 16], blocks)
        .with("gate_up_scales", "U8", &[experts, rows, 2], scales.clone());
    let levels = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    for (expert, index) in [(0, 0), (2, 1)] {
        let part = Part {
            stack: Some(Entry { index: expert, of: experts }),
            fused: Some(Fused { index, of: 2, run: 1 }),
            transposed: false,
        };
        let found = values(&files, Method::Mxfp4, &decl("gate_up", inter, cols, part));
        for r in 0..inter {
            for c in 0..cols {
                let stored = expert * rows + 2 * r + index;
                let code = codes[stored * cols + c];
                let level = levels[(code & 7) as usize] * if code > 7 { -1.0 } else { 1.0 };
                let scale = 2f32.powi(scales[stored * 2 + c / 32] as i32 - 127);
                assert_eq!(found[r * cols + c], level * scale);
            }
        }
    }
}

#[test]
fn compressed_words_run_along_the_inputs() {
    let (rows, cols) = (16, 48);
    for (bits, symmetric, group) in [(4, true, Some(16)), (4, false, Some(16)), (8, true, None), (8, false, Some(24))] {
        let (each, groups) = (32 / bits, group.map_or(1, |g| cols / g));
        let code = |r: usize, c: usize| noise(r * cols + c, 1 << bits) as u32;
        let zero = |r: usize, g: usize| noise(1000 + r * groups + g, 1 << bits) as u32;
        let mut words = vec![0u32; rows * cols / each];
        let mut zeros = vec![0u32; rows / each * groups];
        for r in 0..rows {
            for c in 0..cols {
                words[(r * cols + c) / each] |= code(r, c) << (bits * (c % each));
            }
            for g in 0..groups {
                zeros[r / each * groups + g] |= zero(r, g) << (bits * (r % each));
            }
        }
        let scales: Vec<f32> = (0..rows * groups).map(|i| 0.25 * (1 + i) as f32).collect();
        let mut files = Files::new(&format!("packed-{bits}-{symmetric}"))
            .words("a.weight_packed", &[rows, cols / each], &words)
            .with("a.weight_scale", "BF16", &[rows, groups], bf16s(&scales))
            .words("a.weight_shape", &[2], &[rows as u32, cols as u32]);
        if !symmetric {
            files = files.words("a.weight_zero_point", &[rows / each, groups], &zeros);
        }
        let method = Method::Packed { bits: bits as u32, group, symmetric };
        let found = values(&files, method, &decl("a.weight", rows, cols, WHOLE));
        for r in 0..rows {
            for c in 0..cols {
                let g = c / group.unwrap_or(cols);
                let zero = if symmetric { 1 << (bits - 1) } else { zero(r, g) };
                let scale = bf16::from_f32(scales[r * groups + g]).to_f32();
                let expected = (code(r, c) as f32 - zero as f32) * scale;
                assert_eq!(found[r * cols + c], expected, "{bits} {symmetric} {r} {c}");
            }
        }
    }
    let codes: Vec<u8> = (0..4 * 8).map(|i| noise(i, 256) as u8).collect();
    let files = Files::new("int8").with("a.weight", "I8", &[4, 8], codes.clone()).with(
        "a.weight_scale",
        "F16",
        &[4, 1],
        f16s(&[1.0, 0.5, 2.0, 0.25]),
    );
    let found = values(&files, Method::Int8 { group: None }, &decl("a.weight", 4, 8, WHOLE));
    for (i, found) in found.iter().enumerate() {
        assert_eq!(*found, f32::from(codes[i] as i8) * [1.0, 0.5, 2.0, 0.25][i / 8]);
    }
}

/// A matrix of AWQ or GPTQ: codes `[rows][cols]`, zero points and scales `[rows][groups]`.
struct Words {
    rows: usize,
    cols: usize,
    group: usize,
    bits: usize,
}

impl Words {
    fn code(&self, r: usize, c: usize) -> u32 {
        noise(r * self.cols + c, 1 << self.bits) as u32
    }

    fn zero(&self, r: usize, g: usize) -> u32 {
        1 + noise(77 + r * 5 + g, (1 << self.bits) - 1) as u32
    }

    fn scale(&self, r: usize, g: usize) -> f32 {
        0.125 * (1 + noise(r * 3 + g, 9)) as f32
    }

    fn check(&self, files: Files, method: Method, group_of: impl Fn(usize) -> usize) {
        let found = values(&files, method, &decl("a.weight", self.rows, self.cols, WHOLE));
        for r in 0..self.rows {
            for c in 0..self.cols {
                let g = group_of(c);
                let expected = (self.code(r, c) as f32 - self.zero(r, g) as f32) * self.scale(r, g);
                assert_eq!(found[r * self.cols + c], expected, "{method:?} {r} {c}");
            }
        }
    }

    fn groups(&self) -> usize {
        self.cols / self.group
    }

    fn scales(&self) -> Vec<f32> {
        (0..self.groups()).flat_map(|g| (0..self.rows).map(move |r| self.scale(r, g))).collect()
    }
}

#[test]
fn awq_words_hold_eight_outputs_out_of_order() {
    let w = Words { rows: 24, cols: 32, group: 16, bits: 4 };
    // Nibble `n` of a word is output `order[n]` of its eight.
    let order = [0, 2, 4, 6, 1, 3, 5, 7];
    let pack = |code: &dyn Fn(usize) -> u32| (0..8).fold(0, |word, n| word | code(order[n]) << (4 * n));
    let (mut codes, mut zeros) = (Vec::new(), Vec::new());
    for c in 0..w.cols {
        codes.extend((0..w.rows / 8).map(|o| pack(&|n| w.code(o * 8 + n, c))));
    }
    for g in 0..w.groups() {
        zeros.extend((0..w.rows / 8).map(|o| pack(&|n| w.zero(o * 8 + n, g))));
    }
    let files = Files::new("awq")
        .words("a.qweight", &[w.cols, w.rows / 8], &codes)
        .words("a.qzeros", &[w.groups(), w.rows / 8], &zeros)
        .with("a.scales", "F16", &[w.groups(), w.rows], f16s(&w.scales()));
    w.check(files, Method::Awq { group: Some(16) }, |c| c / 16);
}

#[test]
fn gptq_words_hold_neighbouring_inputs_whatever_their_groups() {
    for (bits, less_one, ordered) in [(4, true, false), (4, false, true), (8, true, true)] {
        let w = Words { rows: 16, cols: 32, group: 8, bits };
        let each = 32 / bits;
        let pack = |code: &dyn Fn(usize) -> u32| (0..each).fold(0, |word, n| word | code(n) << (bits * n));
        let (mut codes, mut zeros) = (Vec::new(), Vec::new());
        for c in 0..w.cols / each {
            codes.extend((0..w.rows).map(|r| pack(&|n| w.code(r, c * each + n))));
        }
        for g in 0..w.groups() {
            zeros.extend((0..w.rows / each).map(|o| pack(&|n| w.zero(o * each + n, g) - u32::from(less_one))));
        }
        let group_of = |c: usize| if ordered { (c * 5 + 3) % w.groups() } else { c / w.group };
        let index: Vec<u32> = (0..w.cols).map(|c| group_of(c) as u32).collect();
        let files = Files::new(&format!("gptq-{bits}-{less_one}"))
            .words("a.qweight", &[w.cols / each, w.rows], &codes)
            .words("a.qzeros", &[w.groups(), w.rows / each], &zeros)
            .with("a.scales", "F16", &[w.groups(), w.rows], f16s(&w.scales()))
            .words("a.g_idx", &[w.cols], &index);
        let method = Method::Gptq { bits: bits as u32, group: Some(8), less_one };
        w.check(files, method, group_of);
    }
}

#[test]
fn what_does_not_agree_is_one_line_with_tensor_file_and_reason() {
    let fp8 = Method::Fp8(Extent { rows: Some(4), cols: Some(4) });
    let weight = || Files::new("wrong").with("a.weight", "F8_E4M3", &[8, 8], vec![0; 64]);
    let scale = |shape: &[usize]| {
        let count: usize = shape.iter().product();
        weight().with("a.weight_scale_inv", "F32", shape, vec![0; 4 * count])
    };
    let packed = Method::Packed { bits: 4, group: Some(8), symmetric: true };
    let words = |shape: [u32; 2]| {
        Files::new("wrong")
            .words("a.weight_packed", &[8, 1], &[0; 8])
            .with("a.weight_scale", "BF16", &[8, 1], vec![0; 16])
            .words("a.weight_shape", &[2], &shape)
    };
    let order = Files::new("wrong")
        .words("a.qweight", &[1, 8], &[0; 8])
        .words("a.qzeros", &[1, 1], &[0])
        .with("a.scales", "F16", &[1, 8], vec![0; 16])
        .words("a.g_idx", &[8], &[0, 0, 0, 9, 0, 0, 0, 0]);
    let gptq = Method::Gptq { bits: 4, group: Some(8), less_one: true };
    for (files, method, said) in [
        (weight(), Some(fp8), "a.weight in model.safetensors: a.weight_scale_inv, which it needs, is missing"),
        (weight(), None, "a.weight in model.safetensors: is stored as fp8, the config's quantisation is none"),
        (weight(), Some(packed), "is stored as fp8, the config's quantisation is pack-quantized"),
        (scale(&[2, 3]), Some(fp8), "a.weight_scale_inv in model.safetensors: has shape [2, 3], the model's config implies [2, 2]"),
        (words([8, 9]), Some(packed), "a.weight_shape in model.safetensors: says [8, 9]"),
        (order, Some(gptq), "a.g_idx in model.safetensors: puts input 3 into group 9, there are 1"),
        (Files::new("wrong").with("a.weight", "I32", &[8, 8], vec![0; 256]), None, "no weight's format"),
        (Files::new("wrong").with("a.weight", "F64", &[8, 8], vec![0; 512]), None, "model.safetensors is stored as F64"),
        (Files::new("wrong").with("b", "F32", &[1], vec![0; 4]), None, "the model needs tensor a.weight"),
        (Files::new("wrong").with("a.weight", "F32", &[8, 4], vec![0; 128]), None, "has shape [8, 4]"),
    ] {
        let checkpoint = files.open();
        let fault = find(&checkpoint, &spec(method), &decl("a.weight", 8, 8, WHOLE)).unwrap_err();
        assert!(fault.text.contains(said) && !fault.text.contains('\n'), "{said}: {}", fault.text);
    }
    let good = words([8, 8]);
    let names = find(&good.open(), &spec(Some(packed)), &decl("a.weight", 8, 8, WHOLE)).unwrap().names;
    assert_eq!(names, ["a.weight_packed", "a.weight_scale", "a.weight_shape"]);
}
