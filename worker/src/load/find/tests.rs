//! Layouts of the quantisers, packed here by the letter of their formats, read back as values.

use super::*;
use crate::backend::MatrixView;
use crate::load::widen::widen;
use half::f16;
use model::catalog::{Role, TensorId, tensors};
use std::fs;
use std::path::PathBuf;

const ROWS: usize = 16;
const COLS: usize = 64;
const GROUP: usize = 32;

/// A checkpoint of some tensors of one module, `model.layers.0.self_attn.q_proj`, and nothing else.
struct Made {
    folder: PathBuf,
    tensors: Vec<(String, &'static str, Vec<usize>, Vec<u8>)>,
}

impl Made {
    fn new(name: &str, quantisation: &str) -> Made {
        let folder = std::env::temp_dir().join(format!("conclave-find-{}-{name}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let config = format!(
            r#"{{"model_type":"llama","hidden_size":{COLS},"intermediate_size":32,"num_hidden_layers":1,
            "num_attention_heads":4,"num_key_value_heads":4,"head_dim":4,"hidden_act":"silu","vocab_size":32,
            "max_position_embeddings":64,"rms_norm_eps":1e-5,"quantization_config":{quantisation}}}"#
        );
        fs::write(folder.join("config.json"), config).unwrap();
        Made { folder, tensors: Vec::new() }
    }

    fn with(mut self, last: &str, dtype: &'static str, shape: &[usize], bytes: Vec<u8>) -> Made {
        self.tensors.push((format!("model.layers.0.self_attn.q_proj.{last}"), dtype, shape.to_vec(), bytes));
        self
    }

    fn checkpoint(&self) -> Checkpoint {
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for (name, dtype, shape, bytes) in &self.tensors {
            let offsets = [data.len(), data.len() + bytes.len()];
            let described = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
            header.insert(name.clone(), described);
            data.extend_from_slice(bytes);
        }
        let header = serde_json::to_vec(&header).unwrap();
        let file = [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat();
        fs::write(self.folder.join("model.safetensors"), file).unwrap();
        Checkpoint::open(&self.folder).unwrap()
    }

    /// All values of the query projection, and what was claimed for it.
    fn read(&self) -> Result<(Vec<f32>, usize), String> {
        let checkpoint = self.checkpoint();
        let spec = checkpoint.spec().map_err(|f| f.text)?;
        let id = TensorId { layer: Some(0), role: Role::Query, expert: None };
        let decl = tensors(&spec).into_iter().find(|d| d.id == id).unwrap();
        let found = find(&checkpoint, &spec, &decl).map_err(|f| f.text)?;
        let whole = MatrixView::whole(found.format, found.bytes, ROWS, COLS);
        let view = MatrixView { beside: found.beside, ..whole };
        let mut values = vec![0.0; ROWS * COLS];
        values.chunks_exact_mut(COLS).enumerate().for_each(|(row, out)| widen(&view, row, out));
        Ok((values, found.claimed.len()))
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn code(row: usize, col: usize) -> u32 {
    ((row * 7 + col * 13 + row * col) % 16) as u32
}

fn point(row: usize, group: usize) -> u32 {
    ((row * 5 + group * 3) % 14 + 1) as u32
}

/// A number that f16 and bf16 hold exactly.
fn scale(row: usize, group: usize) -> f32 {
    (1 + (row * 3 + group) % 8) as f32 / 64.0
}

fn expected(group_of: impl Fn(usize) -> usize, point: impl Fn(usize, usize) -> f32) -> Vec<f32> {
    let one = |row: usize, col: usize| {
        let group = group_of(col);
        (code(row, col) as f32 - point(row, group)) * scale(row, group)
    };
    (0..ROWS * COLS).map(|i| one(i / COLS, i % COLS)).collect()
}

/// Words of `columns` values each packed eight to a word, where `nibble(i)` is the place of the i-th.
fn words(rows: usize, columns: usize, value: impl Fn(usize, usize) -> u32, nibble: impl Fn(usize) -> u32) -> Vec<u8> {
    let mut out = vec![0u32; rows * columns / 8];
    for row in 0..rows {
        for column in 0..columns {
            out[(row * columns + column) / 8] |= value(row, column) << (4 * nibble(column % 8));
        }
    }
    out.into_iter().flat_map(u32::to_le_bytes).collect()
}

fn halves(values: impl Iterator<Item = f32>) -> Vec<u8> {
    values.flat_map(|v| f16::from_f32(v).to_le_bytes()).collect()
}

const GROUPS: usize = COLS / GROUP;

fn scales_by_group() -> Vec<u8> {
    halves((0..GROUPS * ROWS).map(|i| scale(i % ROWS, i / ROWS)))
}

#[test]
fn awq_has_its_outputs_in_an_order_of_its_own() {
    let config = r#"{"quant_method":"awq","bits":4,"group_size":32,"zero_point":true,"version":"gemm"}"#;
    // The published order of the eight outputs of a word, lowest nibble first.
    let order = [0usize, 2, 4, 6, 1, 3, 5, 7];
    let nibble = |output: usize| order.iter().position(|o| *o == output).unwrap() as u32;
    let made = Made::new("awq", config)
        .with("qweight", "I32", &[COLS, ROWS / 8], words(COLS, ROWS, |k, row| code(row, k), nibble))
        .with("qzeros", "I32", &[GROUPS, ROWS / 8], words(GROUPS, ROWS, |g, row| point(row, g), nibble))
        .with("scales", "F16", &[GROUPS, ROWS], scales_by_group());
    let (values, claimed) = made.read().unwrap();
    assert_eq!(values, expected(|k| k / GROUP, |row, group| point(row, group) as f32));
    assert_eq!(claimed, 3);
}

#[test]
fn gptq_packs_inputs_and_may_put_them_into_groups_at_will() {
    for (act_order, format, less) in [(false, "gptq", 1), (true, "gptq", 1), (false, "gptq_v2", 0)] {
        let config = format!(
            r#"{{"quant_method":"gptq","bits":4,"group_size":32,"desc_act":{act_order},"sym":false,
            "checkpoint_format":"{format}"}}"#
        );
        let group_of = |k: usize| if act_order { (k * 5 + 3) % 7 % GROUPS } else { k / GROUP };
        // Words hold eight neighbouring inputs of an output.
        let mut packed = vec![0u32; COLS / 8 * ROWS];
        for (row, k) in (0..ROWS).flat_map(|row| (0..COLS).map(move |k| (row, k))) {
            packed[k / 8 * ROWS + row] |= code(row, k) << (4 * (k % 8));
        }
        let zeros = words(GROUPS, ROWS, |g, row| point(row, g) - less, |i| i as u32);
        let index = (0..COLS).flat_map(|k| (group_of(k) as i32).to_le_bytes()).collect();
        let made = Made::new(&format!("gptq-{act_order}-{format}"), &config)
            .with("qweight", "I32", &[COLS / 8, ROWS], packed.into_iter().flat_map(u32::to_le_bytes).collect())
            .with("qzeros", "I32", &[GROUPS, ROWS / 8], zeros)
            .with("scales", "F16", &[GROUPS, ROWS], scales_by_group())
            .with("g_idx", "I32", &[COLS], index);
        let (values, claimed) = made.read().unwrap();
        assert_eq!(values, expected(group_of, |row, group| point(row, group) as f32), "{act_order} {format}");
        assert_eq!(claimed, 4);
    }
}

fn compressed(format: &str, weights: &str) -> String {
    format!(
        r#"{{"quant_method":"compressed-tensors","format":"{format}","ignore":["lm_head"],
        "config_groups":{{"group_0":{{"targets":["Linear"],"weights":{weights}}}}}}}"#
    )
}

const INT4: &str = r#"{"num_bits":4,"type":"int","symmetric":true,"strategy":"group","group_size":32}"#;

fn int4(name: &str, scales: &[usize]) -> Made {
    let bytes = halves((0..ROWS * GROUPS).map(|i| scale(i / GROUPS, i % GROUPS)));
    let shape = [ROWS as u64, COLS as u64].into_iter().flat_map(u64::to_le_bytes).collect();
    Made::new(name, &compressed("pack-quantized", INT4))
        .with("weight_packed", "I32", &[ROWS, COLS / 8], words(ROWS, COLS, code, |i| i as u32))
        .with("weight_scale", "F16", scales, bytes)
        .with("weight_shape", "I64", &[2], shape)
}

#[test]
fn compressed_tensors_pack_along_rows() {
    let (values, claimed) = int4("int4", &[ROWS, GROUPS]).read().unwrap();
    assert_eq!(values, expected(|k| k / GROUP, |_, _| 8.0));
    assert_eq!(claimed, 3);

    let weights = INT4.replace("true", "false");
    let zeros: Vec<u8> = (0..ROWS / 8 * GROUPS)
        .map(|i| (0..8).fold(0u32, |word, n| word | point(i / GROUPS * 8 + n, i % GROUPS) << (4 * n)))
        .flat_map(u32::to_le_bytes)
        .collect();
    let mut made = int4("int4-points", &[ROWS, GROUPS]).with("weight_zero_point", "I32", &[ROWS / 8, GROUPS], zeros);
    let config = fs::read_to_string(made.folder.join("config.json")).unwrap();
    fs::write(made.folder.join("config.json"), config.replace(INT4, &weights)).unwrap();
    assert_eq!(made.read().unwrap().0, expected(|k| k / GROUP, |row, group| point(row, group) as f32));

    // What nothing claims must not be there, and what is needed must.
    made.tensors.retain(|t| !t.0.ends_with("zero_point"));
    assert!(made.read().unwrap_err().contains("q_proj.weight_zero_point beside it, which is missing"));
}

#[test]
fn eight_bit_integers_have_a_scale_an_output() {
    let weights = r#"{"num_bits":8,"type":"int","symmetric":true,"strategy":"channel"}"#;
    let bytes: Vec<u8> = (0..ROWS * COLS).map(|i| (i * 31 % 256) as u8).collect();
    let made = Made::new("int8", &compressed("int-quantized", weights))
        .with("weight", "I8", &[ROWS, COLS], bytes.clone())
        .with("weight_scale", "BF16", &[ROWS, 1], {
            (0..ROWS).flat_map(|row| half::bf16::from_f32(scale(row, 0)).to_le_bytes()).collect()
        });
    let expected: Vec<f32> =
        bytes.iter().enumerate().map(|(i, byte)| f32::from(*byte as i8) * scale(i / COLS, 0)).collect();
    assert_eq!(made.read().unwrap().0, expected);
}

#[test]
fn what_does_not_fit_is_named_with_its_shapes() {
    let fault = |made: Made| made.read().unwrap_err();
    let said = fault(int4("scales", &[GROUPS, ROWS]));
    assert!(
        said.contains("q_proj.weight_scale in model.safetensors: it has shape [2, 16]") && said.contains("[16, 2]"),
        "{said}"
    );

    let mut made = int4("stated", &[ROWS, GROUPS]);
    made.tensors[2].3 = [COLS as u64, ROWS as u64].into_iter().flat_map(u64::to_le_bytes).collect();
    let said = fault(made);
    assert!(said.contains("weight_shape in model.safetensors: it says [64, 16]"), "{said}");

    let mut made = int4("missing", &[ROWS, GROUPS]);
    made.tensors.remove(1);
    let said = fault(made);
    assert!(
        said.contains("weight_packed in model.safetensors: pack-quantized needs")
            && said.contains("weight_scale beside it"),
        "{said}"
    );

    let mut made = int4("type", &[ROWS, GROUPS]);
    made.tensors[1].1 = "I32";
    made.tensors[1].3.extend(vec![0; ROWS * GROUPS * 2]);
    let said = fault(made);
    assert!(said.contains("weight_scale in model.safetensors: it is stored as I32"), "{said}");

    let fp8 = r#"{"quant_method":"fp8","weight_block_size":[128,128]}"#;
    let one = Made::new("fp8", fp8).with("weight", "F8_E4M3", &[ROWS, COLS], vec![0x38; ROWS * COLS]);
    let said = fault(one);
    assert!(said.contains("weight_scale_inv beside it, which is missing"), "{said}");

    let unsaid = Made::new("unsaid", "null").with("weight", "F8_E4M3", &[ROWS, COLS], vec![0; ROWS * COLS]);
    assert!(fault(unsaid).contains("does not say what they stand for"));

    let unknown = Made::new("unknown", r#"{"quant_method":"bitsandbytes"}"#);
    assert!(fault(unknown).contains("bitsandbytes"));
}
