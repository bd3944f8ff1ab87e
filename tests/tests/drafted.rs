//! Draft models: no bit of an answer changes, whatever they guess and however the model is cut; one that is the model itself is always
//! right, so its cache is right over chunks, preemption and cached prefixes.

#![allow(clippy::unwrap_used)] // all of this file is a test

use conclave_tests::requests::{self, Outcome, Request, same};
use conclave_tests::ring::{Ring, Setting, fixture, loaded_bytes};
use coordinator::draft::Draft;
use coordinator::source::Source;
use coordinator::text::Text;
use model::mesh::Mesh;
use model::plan::{BLOCK_TOKENS, Guesser, KernelFamily};
use model::quant::Dtype;
use model::size::{self, Keeping};
use model::step::Sampling;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

const ONE: (usize, usize, usize, usize) = (1, 1, 1, 1);
const MESHES: [(usize, usize, usize, usize); 4] = [ONE, (1, 1, 2, 2), (2, 1, 2, 1), (1, 2, 1, 2)];
/// Tokens of each answer.
const LONG: usize = 14;

fn setting((pipeline, data, tensor, expert): (usize, usize, usize, usize), guesser: Guesser) -> Setting {
    Setting { guesser, ..Setting::new(Mesh::new(pipeline, data, tensor, expert).unwrap(), Dtype::Bf16) }
}

fn request(seq: u64, length: usize, sampling: &Sampling) -> Request {
    Request { sampling: sampling.clone(), answer: LONG, ..Request::new(seq, length) }
}

/// Without a draft model.
fn reference(path: &Path, request: &Request) -> Outcome {
    requests::reference(path, setting(ONE, Guesser::Nobody), request).unwrap()
}

/// Tokens and rows are those of `expected`, which nobody guessed for.
fn check(what: &str, found: &Outcome, expected: &Outcome) {
    let answer = Outcome { predicted: expected.predicted.clone(), ..found.clone() };
    same(what, &answer, expected).unwrap_or_else(|e| panic!("{e:#}"));
}

/// Guesses that a sequence made, and how many of them were the tokens drawn in their places.
fn right(found: &Outcome) -> (usize, usize) {
    let pairs = found.guesses.iter().flat_map(|(drawn, own)| found.tokens[*drawn..].iter().zip(own));
    (pairs.clone().count(), pairs.filter(|(token, guess)| token == guess).count())
}

/// A checkpoint made from a fixture, removed when dropped.
struct Made(PathBuf);

impl Drop for Made {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The fixture's files but for one, which `edit` changes.
fn made(name: &str, of: &str, file: &str, edit: impl FnOnce(&mut Value)) -> Made {
    let path = std::env::temp_dir().join(format!("conclave-drafted-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&path).unwrap();
    let made = Made(path);
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture(of).join(name), made.0.join(name)).unwrap();
    }
    let mut json: Value = serde_json::from_slice(&std::fs::read(made.0.join(file)).unwrap()).unwrap();
    edit(&mut json);
    std::fs::write(made.0.join(file), json.to_string()).unwrap();
    made
}

fn samplings() -> [Sampling; 3] {
    let penalised = Sampling { presence_penalty: 0.7, repetition_penalty: 1.2, ..requests::warm(6) };
    [Sampling::GREEDY, requests::warm(6), penalised]
}

#[test]
fn a_draft_that_is_the_model_is_always_right() {
    let path = fixture("qwen3_moe");
    for sampling in samplings() {
        let expected = reference(&path, &request(1, 45, &sampling));
        for mesh in MESHES {
            let mut ring = Ring::drafted(&path, &path, setting(mesh, Guesser::Draft)).unwrap();
            for (guesses, chunk) in [(1, usize::MAX), (3, 20), (5, 7)] {
                let what = format!("{mesh:?}, {guesses} guesses, chunks of {chunk}");
                let asked = Request { guesses, lane: mesh.1 - 1, ..request(1, 45, &sampling) };
                let crowd = [Request { answer: 3, ..request(2, 33, &sampling) }, asked];
                let found = requests::run(&mut ring, mesh.1, &crowd, chunk).unwrap();
                check(&what, &found[1], &expected);
                let (made, correct) = right(&found[1]);
                assert!(made >= LONG / 2 && correct == made, "{what}: {correct} of {made}");
                // A step that checks all of them draws one more than they are.
                assert!(found[1].guesses.len() <= (LONG - 1).div_ceil(guesses + 1) + 1, "{what}");
                // Each of its rows has the model's bits.
                let of_draft = found[1].predicted.iter().map(|((_, position), row)| (*position, row));
                for (position, row) in of_draft.filter(|(position, _)| *position < 45 + LONG - 1) {
                    assert_eq!(row, &expected.logits[&position], "{what}: position {position}");
                }
            }
        }
    }
}

#[test]
fn whatever_a_draft_guesses_changes_no_token_and_no_row() {
    for (model, small) in [("qwen3_moe", "llama32_1b"), ("mixtral_8x22b", "deepseek_v3"), ("deepseek_v3", "bloom")] {
        for sampling in samplings() {
            let expected = reference(&fixture(model), &request(1, 45, &sampling));
            let mut first: Option<Outcome> = None;
            for mesh in MESHES {
                let ring = Ring::drafted(&fixture(model), &fixture(small), setting(mesh, Guesser::Draft));
                let mut ring = ring.unwrap();
                for (guesses, chunk) in [(2, 20), (4, 3)] {
                    let what = format!("{small} for {model}, {mesh:?}, {guesses} guesses");
                    // Every second draft is right.
                    let known = expected.tokens.clone();
                    let asked = Request { guesses, known, lane: mesh.1 - 1, ..request(1, 45, &sampling) };
                    let crowd = [Request { answer: 3, ..request(2, 33, &sampling) }, asked];
                    let found = requests::run(&mut ring, mesh.1, &crowd, chunk).unwrap().remove(1);
                    check(&what, &found, &expected);
                    assert!(found.checked > 0, "{what}: nothing was right");
                    // A draft model runs whole wherever it runs.
                    let first = first.get_or_insert_with(|| found.clone());
                    let rows = found.predicted.iter().filter(|((_, position), _)| *position < 45 + LONG - 1);
                    for (place, row) in rows {
                        assert_eq!(Some(row), first.predicted.get(place), "{what}: position {}", place.1);
                    }
                }
            }
        }
    }
}

#[test]
fn a_draft_goes_on_behind_a_cached_prefix_and_what_was_drawn_before() {
    let (path, sampling) = (fixture("llama2_70b"), requests::warm(1));
    let expected = reference(&path, &request(1, 75, &sampling));
    let mut ring = Ring::drafted(&path, &path, setting((1, 1, 2, 1), Guesser::Draft)).unwrap();
    // Nobody asked for a guess when the prefix was computed.
    requests::run(&mut ring, 1, &[request(1, 75, &sampling)], 20).unwrap();
    let guesses = 3;
    let resumed = Request { seq: 9, start: 2 * BLOCK_TOKENS, guesses, ..request(1, 75, &sampling) };
    let preempted = Request { drawn: expected.tokens[..5].to_vec(), seq: 8, block: 40, ..request(1, 75, &sampling) };
    let found = requests::run(&mut ring, 1, &[resumed, preempted], 6).unwrap();
    for (what, found) in [("from a cached prefix", &found[0]), ("preempted", &found[1])] {
        check(what, found, &expected);
        let (made, correct) = right(found);
        assert!(made > 5 && correct == made, "{what}: {correct} of {made}");
    }
    assert_eq!(found[0].predicted.keys().next(), Some(&(0, 2 * BLOCK_TOKENS)));
}

#[test]
fn guesses_end_where_the_drafts_positions_do() {
    let path = fixture("llama2_70b");
    let short = made("short", "llama2_70b", "config.json", |config| config["max_position_embeddings"] = json!(50));
    let expected = reference(&path, &request(1, 45, &Sampling::GREEDY));
    let mut ring = Ring::drafted(&path, &short.0, setting(ONE, Guesser::Draft)).unwrap();
    let asked = Request { guesses: 2, ..request(1, 45, &Sampling::GREEDY) };
    let found = requests::run(&mut ring, 1, &[asked], 20).unwrap().remove(0);
    check("a short draft", &found, &expected);
    // Position 49 is the last that it takes in, and foretells the one after it.
    let ends: Vec<usize> = found.guesses.iter().map(|(drawn, own)| 45 + drawn + own.len()).collect();
    assert_eq!(ends.iter().max(), Some(&51), "{:?}", found.guesses);
    assert_eq!(found.predicted.keys().next_back(), Some(&(0, 49)));
}

#[test]
fn a_draft_of_another_vocabulary_is_refused_with_both_sizes() {
    let odd = made("odd", "llama2_70b", "config.json", |config| config["vocab_size"] = json!(500));
    let source = Source::open(&fixture("llama2_70b")).unwrap();
    let said = Draft::open(&odd.0, &source).unwrap_err().to_string();
    let sizes = "the draft model foretells 500 tokens, the model 512";
    assert!(said.ends_with(sizes) && said.contains(&odd.0.display().to_string()), "{said}");
    let refused = Ring::drafted(&fixture("llama2_70b"), &odd.0, setting(ONE, Guesser::Draft)).err().unwrap();
    assert!(format!("{refused:#}").contains(sizes), "{refused:#}");
    let refused = Ring::load(&fixture("llama2_70b"), setting(ONE, Guesser::Draft)).err().unwrap();
    assert!(format!("{refused:#}").contains("none was opened"), "{refused:#}");
}

#[test]
fn a_draft_whose_tokens_are_others_is_refused_with_the_first() {
    let path = fixture("llama2_70b");
    let (source, text) = (Source::open(&path).unwrap(), Text::load(&path, None).unwrap());
    Draft::open(&path, &source).unwrap().check_tokens(&text.tokenizer).unwrap();
    let (one, two) = (text.tokenizer.token_text(300), text.tokenizer.token_text(301));
    let swapped = made("swapped", "llama2_70b", "tokenizer.json", |tokenizer| {
        for (_, id) in tokenizer["model"]["vocab"].as_object_mut().unwrap() {
            *id = match id.as_u64() {
                Some(300) => json!(301),
                Some(301) => json!(300),
                _ => continue,
            };
        }
    });
    let said = Draft::open(&swapped.0, &source).unwrap().check_tokens(&text.tokenizer).unwrap_err().to_string();
    assert!(said.contains(&format!("token 300 is {two:?}, the model's is {one:?}")), "{said}");
}

#[test]
fn a_draft_whose_files_are_missing_is_refused_by_name() {
    let source = Source::open(&fixture("llama2_70b")).unwrap();
    let text = Text::load(&fixture("llama2_70b"), None).unwrap();
    for missing in ["config.json", "model.safetensors", "tokenizer.json"] {
        let short = made(&format!("no-{missing}"), "llama2_70b", "config.json", |_| {});
        std::fs::remove_file(short.0.join(missing)).unwrap();
        let opened = Draft::open(&short.0, &source).and_then(|draft| draft.check_tokens(&text.tokenizer));
        let said = opened.unwrap_err().to_string();
        assert!(said.starts_with("draft model ") && said.contains(&short.0.display().to_string()), "{said}");
    }
    let said = Draft::open(Path::new("/nowhere"), &source).unwrap_err().to_string();
    assert!(said.contains("/nowhere: no such model"), "{said}");
}

#[test]
fn planned_bytes_are_the_loaded_ones() {
    let (path, small) = (fixture("qwen3_moe"), fixture("deepseek_v3"));
    let draft = Source::open(&small).unwrap();
    let (storage, spec) = (&draft.storage, draft.spec.predicting(0).unwrap());
    for mesh in [ONE, (2, 1, 2, 1), (1, 2, 1, 2)] {
        for family in [KernelFamily::Vector, KernelFamily::Amx] {
            let with = Setting { family, ..setting(mesh, Guesser::Draft) };
            let bytes = size::draft(&spec, Keeping { storage, dtype: Dtype::Bf16, family }, &with.limits).weights;
            let found = loaded_bytes(&path, Some(&small), with).unwrap();
            let without = Setting { guesser: Guesser::Nobody, ..with };
            let own = loaded_bytes(&path, None, without).unwrap();
            for ((rank, (_, all)), (_, own)) in with.mesh.all().zip(found).zip(own) {
                let last = with.mesh.place(rank).stage + 1 == with.mesh.pipeline;
                assert_eq!(all - own, if last { bytes } else { 0 }, "{} {family:?} rank {}", with.mesh, rank.0);
            }
        }
    }
}
