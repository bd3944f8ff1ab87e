//! Predictors: the reference's logits, the same bits however they are cut and chunked, nothing of them where none were
//! asked for.

#![allow(clippy::unwrap_used)] // all of this file is a test

use conclave_tests::golden::Golden;
use conclave_tests::planned;
use conclave_tests::requests::{self, ANSWER, Outcome, Request, same};
use conclave_tests::ring::{Ring, Setting, fixture};
use coordinator::source::Source;
use model::mesh::{Mesh, RankId};
use model::plan::{BLOCK_TOKENS, Guesser, KernelFamily, Limits};
use model::quant::Dtype;
use model::size::{self, Keeping};
use model::step::Sampling;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// A checkpoint made from a fixture, removed when dropped.
struct Made(PathBuf);

impl Drop for Made {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A tensor as safetensors has it: name, dtype, shape, bytes.
type Tensor = (String, String, Vec<usize>, Vec<u8>);

/// The fixture with other tensors, and a config that tells of `predictors`.
fn made(name: &str, of: &str, predictors: usize, edit: impl FnOnce(&mut Vec<Tensor>)) -> Made {
    let path = std::env::temp_dir().join(format!("conclave-predictors-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&path).unwrap();
    let made = Made(path);
    let mut config: Value =
        serde_json::from_str(&std::fs::read_to_string(fixture(of).join("config.json")).unwrap()).unwrap();
    config["num_nextn_predict_layers"] = json!(predictors);
    std::fs::write(made.0.join("config.json"), config.to_string()).unwrap();
    let file = std::fs::read(fixture(of).join("model.safetensors")).unwrap();
    let start = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: Map<String, Value> = serde_json::from_slice(&file[8..start]).unwrap();
    let mut tensors: Vec<Tensor> = Vec::new();
    for (name, entry) in header.iter().filter(|(name, _)| *name != "__metadata__") {
        let number = |v: &Value| v.as_u64().unwrap() as usize;
        let shape = entry["shape"].as_array().unwrap().iter().map(number).collect();
        let at = |i: usize| start + number(&entry["data_offsets"][i]);
        tensors.push((name.clone(), entry["dtype"].as_str().unwrap().into(), shape, file[at(0)..at(1)].to_vec()));
    }
    edit(&mut tensors);
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let end = data.len() + bytes.len();
        header.insert(name, json!({"dtype": dtype, "shape": shape, "data_offsets": [data.len(), end]}));
        data.extend(bytes);
    }
    let header = Value::Object(header).to_string();
    let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
    std::fs::write(made.0.join("model.safetensors"), file).unwrap();
    made
}

/// The tensors of layer `from` once more as those of layer `to`, their rows turned round so that the layers differ.
fn again(tensors: &[Tensor], from: usize, to: usize) -> Vec<Tensor> {
    let (from, to) = (format!("model.layers.{from}."), format!("model.layers.{to}."));
    let copies = tensors.iter().filter_map(|(name, dtype, shape, bytes)| {
        let rest = name.strip_prefix(&from)?;
        let mut bytes = bytes.clone();
        if shape.len() == 2 && !rest.starts_with("embed_tokens") && !rest.starts_with("shared_head") {
            let row = bytes.len() / shape[0];
            bytes.rotate_left(row);
        }
        Some((format!("{to}{rest}"), dtype.clone(), shape.clone(), bytes))
    });
    copies.collect()
}

fn setting(mesh: (usize, usize, usize, usize), dtype: Dtype, predictors: usize) -> Setting {
    let (pipeline, data, tensor, expert) = mesh;
    Setting {
        guesser: Guesser::of_predictors(predictors),
        ..Setting::new(Mesh::new(pipeline, data, tensor, expert).unwrap(), dtype)
    }
}

const ONE: (usize, usize, usize, usize) = (1, 1, 1, 1);

fn reference(path: &Path, dtype: Dtype, predictors: usize) -> Outcome {
    requests::reference(path, setting(ONE, dtype, predictors), &Request::new(1, 45)).unwrap()
}

#[test]
fn predictions_equal_the_reference() {
    let golden = Golden::read(&fixture("deepseek_v3")).unwrap();
    for prompt in &golden.prompts {
        let length = prompt.input_ids.len();
        let expected = golden.floats(&format!("{}.mtp_logits", prompt.name));
        let vocab = expected.len() / 16;
        for chunk in [usize::MAX, 1, 7, 32] {
            let mut ring = Ring::load(&fixture("deepseek_v3"), setting(ONE, Dtype::F32, 1)).unwrap();
            let request = Request { prompt: prompt.input_ids.clone(), answer: 1, ..Request::new(1, 0) };
            let found = requests::run(&mut ring, 1, &[request], chunk).unwrap().remove(0).predicted;
            // Behind the last position the token that was drawn is known.
            assert_eq!(found.keys().copied().collect::<Vec<_>>(), (0..length).map(|p| (0, p)).collect::<Vec<_>>());
            let mut worst = 0.0f64;
            for (position, wanted) in (length - 1 - 16..length - 1).zip(expected.chunks_exact(vocab)) {
                for (found, wanted) in found[&(0, position)].iter().zip(wanted) {
                    worst = worst.max(f64::from((f32::from_bits(*found) - wanted).abs()));
                }
            }
            println!("{} in chunks of {chunk}: {worst:.2e}, {:.2e} is allowed", prompt.name, prompt.tolerance);
            assert!(worst <= prompt.tolerance, "{}: {worst} > {}", prompt.name, prompt.tolerance);
        }
    }
}

#[test]
fn cuts_and_chunks_do_not_change_predictions() {
    let meshes = [(1, 1, 2, 1), (1, 1, 2, 2), (1, 2, 1, 1), (1, 2, 1, 2), (2, 1, 1, 1), (1, 2, 2, 4), (2, 2, 2, 4)];
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let expected = reference(&fixture("deepseek_v3"), dtype, 1);
        // What was drawn is predicted from too.
        assert_eq!(expected.predicted.len(), 45 + ANSWER - 1);
        let without = reference(&fixture("deepseek_v3"), dtype, 0);
        assert!(without.predicted.is_empty() && without.logits == expected.logits, "predictors only look on");
        for mesh in meshes {
            let path = fixture("deepseek_v3");
            requests::check_mesh(&path, setting(mesh, dtype, 1), &[usize::MAX, 7, 1], &expected).unwrap();
        }
    }
}

#[test]
fn a_second_predictor_goes_on_from_the_first() {
    let made = made("chain", "deepseek_v3", 2, |tensors| tensors.extend(again(tensors, 4, 5)));
    let expected = reference(&made.0, Dtype::Bf16, 2);
    assert_eq!(expected.predicted.len(), 45 + ANSWER - 1 + 45 + ANSWER - 2);
    let first = reference(&made.0, Dtype::Bf16, 1);
    same("the first alone", &first, &expected).unwrap();
    assert!(expected.predicted[&(0, 9)] != expected.predicted[&(1, 9)]);
    for mesh in [ONE, (1, 1, 2, 2), (2, 2, 1, 2)] {
        requests::check_mesh(&made.0, setting(mesh, Dtype::Bf16, 2), &[usize::MAX, 3, 2, 1], &expected).unwrap();
    }
}

/// Answers of `sampling` on a mesh with so many guesses a step are those without, rows and predictions to the last bit.
fn check_guesses(path: &Path, mesh: (usize, usize, usize, usize), predictors: usize, sampling: Sampling) {
    const LONG: usize = 14;
    let request = |seq| Request { sampling: sampling.clone(), answer: LONG, ..Request::new(seq, 45) };
    let one = setting(ONE, Dtype::Bf16, predictors);
    let expected = requests::reference(path, one, &request(1)).unwrap();
    let mut ring = Ring::load(path, setting(mesh, Dtype::Bf16, predictors)).unwrap();
    let mut first: Vec<(usize, Vec<u32>)> = vec![];
    for guesses in [1, 2, 3, 5] {
        let what = format!("{mesh:?}, {predictors} predictors, {guesses} guesses");
        let known = expected.tokens.clone();
        let asked = Request { guesses, known, lane: mesh.1 - 1, ..request(1) };
        let found = requests::run(&mut ring, mesh.1, &[Request { answer: 3, ..request(2) }, asked], 20).unwrap();
        same(&what, &found[1], &expected).unwrap();
        assert!(found[1].checked >= 3 && found[1].guesses.iter().all(|(_, own)| own.len() == guesses), "{what}");
        // The first guess is the predictor's, drawn where the token will be: greedily its likeliest.
        if sampling == Sampling::GREEDY {
            for (drawn, own) in &found[1].guesses {
                let row = &expected.predicted[&(0, 45 + drawn - 2)];
                let likeliest =
                    (0..row.len()).rev().max_by(|a, b| f32::from_bits(row[*a]).total_cmp(&f32::from_bits(row[*b])));
                assert_eq!(Some(own[0] as usize), likeliest, "{what}: behind {drawn} tokens");
            }
        }
        // Whoever asks for more gets the same first.
        let own: Vec<_> = found[1].guesses.iter().filter(|(drawn, _)| *drawn == 1).cloned().collect();
        if let (Some((_, before)), Some((_, own))) = (first.first(), own.first()) {
            assert_eq!(before[..], own[..before.len()], "{what}");
        }
        first = own;
    }
}

#[test]
fn guesses_change_no_token_no_row_and_no_prediction() {
    let path = fixture("deepseek_v3");
    let penalised = Sampling { presence_penalty: 0.7, ..requests::warm(6) };
    for sampling in [Sampling::GREEDY, requests::warm(6), penalised] {
        for mesh in [ONE, (1, 1, 2, 2), (2, 1, 2, 1), (1, 2, 1, 2)] {
            check_guesses(&path, mesh, 1, sampling.clone());
        }
    }
    let made = made("guesses", "deepseek_v3", 2, |tensors| tensors.extend(again(tensors, 4, 5)));
    for mesh in [ONE, (2, 2, 2, 4)] {
        check_guesses(&made.0, mesh, 2, requests::warm(6));
        check_guesses(&made.0, mesh, 2, Sampling::GREEDY);
    }
}

#[test]
fn guesses_without_predictors_are_refused() {
    let mut ring = Ring::load(&fixture("deepseek_v3"), setting(ONE, Dtype::Bf16, 0)).unwrap();
    let asked = Request { guesses: 2, ..Request::new(1, 5) };
    let refused = requests::run(&mut ring, 1, &[asked], 20).unwrap_err();
    assert!(format!("{refused:#}").contains("asks for 2 guesses"), "{refused:#}");
}

#[test]
fn predictions_go_on_behind_a_cached_prefix() {
    let expected =
        requests::reference(&fixture("deepseek_v3"), setting(ONE, Dtype::Bf16, 1), &Request::new(1, 75)).unwrap();
    let mut ring = Ring::load(&fixture("deepseek_v3"), setting((1, 1, 2, 1), Dtype::Bf16, 1)).unwrap();
    requests::run(&mut ring, 1, &[Request::new(1, 75)], 20).unwrap();
    let resumed = Request { seq: 9, start: 2 * BLOCK_TOKENS, ..Request::new(1, 75) };
    let found = requests::run(&mut ring, 1, &[resumed, Request::new(2, 30)], 5).unwrap();
    same("from a cached prefix", &found[0], &expected).unwrap();
    assert_eq!(found[0].predicted.keys().next(), Some(&(0, 2 * BLOCK_TOKENS)));
}

/// Appends a predictor's own tensors for rows of `hidden` channels: norms, and `projection`.
fn own(tensors: &mut Vec<Tensor>, layer: usize, hidden: usize, projection: Vec<Tensor>) {
    let ones: Vec<u8> =
        (0..hidden).flat_map(|i| half::bf16::from_f32(1.0 + (i % 7) as f32 / 16.0).to_le_bytes()).collect();
    for name in ["enorm", "hnorm", "shared_head.norm"] {
        tensors.push((format!("model.layers.{layer}.{name}.weight"), "BF16".into(), vec![hidden], ones.clone()));
    }
    tensors.extend(projection);
}

#[test]
fn a_quantised_predictor_has_the_values_of_its_codes() {
    const HIDDEN: usize = 160;
    // Codes 0x30 to 0x37 are 0.5 to 0.9375, their top bit the sign.
    let code = |i: usize| 0x30 | (((i * 7919) >> 3) as u8 & 7) | ((((i * 104_729) >> 4) as u8 & 1) << 7);
    let value = |code: u8| (0.5 + f32::from(code & 7) / 16.0) * if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let scale = |row: usize, col: usize| 0.0625 * f32::from((1 + row / 128 + 2 * (col / 128)) as u8);
    let name = "model.layers.4.eh_proj.weight";
    let shape = vec![HIDDEN, 2 * HIDDEN];
    let codes: Vec<u8> = (0..2 * HIDDEN * HIDDEN).map(code).collect();
    let scales: Vec<u8> = (0..6).flat_map(|i| scale(i / 3 * 128, i % 3 * 128).to_le_bytes()).collect();
    let values: Vec<u8> = codes
        .iter()
        .enumerate()
        .flat_map(|(i, &c)| (value(c) * scale(i / (2 * HIDDEN), i % (2 * HIDDEN))).to_le_bytes())
        .collect();
    let coded = vec![
        (name.to_string(), "F8_E4M3".to_string(), shape.clone(), codes),
        (format!("{name}_scale_inv"), "F32".into(), vec![2, 3], scales),
    ];
    let plain = vec![(name.to_string(), "F32".to_string(), shape, values)];
    let [coded, plain] = [("coded", coded), ("plain", plain)].map(|(kind, projection)| {
        made(&format!("fp8-{kind}"), "deepseek_v3_fp8", 1, |tensors| {
            tensors.extend(again(tensors, 3, 4));
            own(tensors, 4, HIDDEN, projection);
        })
    });
    let expected = reference(&plain.0, Dtype::F32, 1);
    assert!(!expected.predicted.is_empty());
    // Runs of codes are scaled once, values each: the sums differ in their last bits.
    let found = reference(&coded.0, Dtype::F32, 1);
    assert_eq!(found.tokens, expected.tokens);
    assert!(found.predicted.keys().eq(expected.predicted.keys()));
    for (place, bits) in &found.predicted {
        for (a, b) in bits.iter().zip(&expected.predicted[place]) {
            let (a, b) = (f32::from_bits(*a), f32::from_bits(*b));
            assert!((a - b).abs() <= 1e-4 * (1.0 + b.abs()), "{place:?}: {a} in codes, {b} widened");
        }
    }
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let expected = reference(&coded.0, dtype, 1);
        for mesh in [(1, 1, 2, 2), (2, 1, 2, 1)] {
            requests::check_mesh(&coded.0, setting(mesh, dtype, 1), &[7], &expected).unwrap();
        }
    }
}

#[test]
fn a_checkpoint_without_the_layer_serves_and_says_so_where_it_is_asked_for() {
    let without = made("without", "deepseek_v3", 1, |tensors| tensors.retain(|t| !t.0.starts_with("model.layers.4.")));
    let whole = reference(&fixture("deepseek_v3"), Dtype::Bf16, 0);
    same("without", &reference(&without.0, Dtype::Bf16, 0), &whole).unwrap();
    let refused = Ring::load(&without.0, setting(ONE, Dtype::Bf16, 1)).err().unwrap();
    assert!(format!("{refused:#}").contains("number of predictors = 1"), "{refused:#}");
    // A part of the layer is worse than none.
    let part = made("part", "deepseek_v3", 1, |tensors| tensors.retain(|t| t.0 != "model.layers.4.eh_proj.weight"));
    same("part", &reference(&part.0, Dtype::Bf16, 0), &whole).unwrap();
    let refused = Ring::load(&part.0, setting(ONE, Dtype::Bf16, 1)).err().unwrap();
    assert!(format!("{refused:#}").contains("model.layers.4.eh_proj.weight"), "{refused:#}");
}

#[test]
fn an_embedding_of_its_own_is_refused_by_name() {
    for name in ["model.layers.4.embed_tokens.weight", "model.layers.4.shared_head.head.weight"] {
        let made = made("copies", "deepseek_v3", 1, |tensors| {
            let tensor = tensors.iter_mut().find(|t| t.0 == name).unwrap();
            let last = tensor.3.len() - 1;
            tensor.3[last] ^= 1;
        });
        Ring::load(&made.0, setting(ONE, Dtype::Bf16, 0)).unwrap();
        let refused = Ring::load(&made.0, setting((1, 1, 2, 1), Dtype::Bf16, 1)).err().unwrap();
        assert!(format!("{refused:#}").contains(name), "{refused:#}");
    }
}

#[test]
fn planned_bytes_are_the_loaded_ones_with_and_without_predictors() {
    for predictors in [0, 1] {
        planned::check(&fixture("deepseek_v3"), predictors, &[ONE, (1, 1, 2, 2), (2, 2, 1, 2)]).unwrap();
    }
    let source = Source::open(&fixture("deepseek_v3")).unwrap();
    let bytes = [0, 1].map(|predictors| {
        let spec = source.spec.predicting(predictors).unwrap();
        let keeping = Keeping { storage: &source.storage, dtype: Dtype::Bf16, family: KernelFamily::Vector };
        let limits = Limits { model_len_max: 64, step_tokens_max: 8, step_sequences_max: 1, blocks: 2 };
        size::rank(&spec, &Mesh::ONE, Mesh::ONE.place(RankId(0)), 0..spec.layers.len(), keeping, &limits)
    });
    let layer = bytes[0].cache_per_block / source.spec.layers.len() as u64;
    assert_eq!(bytes[1].cache_per_block, bytes[0].cache_per_block + layer, "a layer more is cached");
    assert!(bytes[1].weights > bytes[0].weights);
}
