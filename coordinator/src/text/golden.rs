//! Every fixture's own texts: the ids and the decoded text that the reference implementation gives for them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::assemble::Added;
use super::tokenizer::{Tokenizer, TokenizerConfig};
use super::{Text, tiktoken};

/// Folders with a `golden.json` and a tokenizer, in the repository and where `CONCLAVE_GOLDENS` points to.
fn folders() -> Vec<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    let other = std::env::var_os("CONCLAVE_GOLDENS").map(PathBuf::from);
    let mut folders = Vec::new();
    for root in std::iter::once(own).chain(other) {
        folders.extend(std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()));
    }
    folders.retain(|folder| folder.join("golden.json").exists());
    folders.sort();
    folders
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// The same vocabulary from the form in which its family publishes it; the special tokens stand in `tokenizer.json` only.
fn of_ranks(folder: &Path) -> Option<Arc<Tokenizer>> {
    let ranks = std::fs::read(folder.join("tiktoken.model")).ok()?;
    let config: Value = json_of(folder, "tokenizer_config.json");
    let added = json_of(folder, "tokenizer.json")["added_tokens"].as_array().unwrap().clone();
    let added: Vec<Added> = added
        .iter()
        .map(|token| Added {
            id: token["id"].as_u64().unwrap() as u32,
            text: token["content"].as_str().unwrap().into(),
            special: token["special"] == true,
        })
        .collect();
    let family = tiktoken::Family::of("tiktoken.model", &config, &json_of(folder, "config.json")).unwrap();
    let json = tiktoken::json(&ranks, &family, &added).unwrap();
    let config = TokenizerConfig::from_json(&config);
    Some(Arc::new(Tokenizer::from_json(&serde_json::to_vec(&json).unwrap(), &config).unwrap()))
}

fn json_of(folder: &Path, file: &str) -> Value {
    serde_json::from_slice(&std::fs::read(folder.join(file)).unwrap()).unwrap()
}

fn check(folder: &Path) -> usize {
    let text = Text::load(folder, None).unwrap();
    let others = of_ranks(folder);
    std::iter::once(text.tokenizer).chain(others).map(|tokenizer| check_with(folder, &tokenizer)).sum()
}

fn check_with(folder: &Path, tokenizer: &Arc<Tokenizer>) -> usize {
    let golden = json_of(folder, "golden.json");
    let name = folder.display();
    let cases = golden["tokenizer_cases"].as_array().map_or(&[][..], Vec::as_slice);
    for case in cases {
        let input = case["text"].as_str().unwrap();
        assert_eq!(tokenizer.encode(input, true).unwrap(), ids(&case["ids"]), "{name}: {input:?}");
        let plain = ids(&case["ids_no_special"]);
        assert_eq!(tokenizer.encode(input, false).unwrap(), plain, "{name}: {input:?}");
        assert_eq!(tokenizer.decode(&plain, true), case["decoded"].as_str().unwrap(), "{name}: {input:?}");
    }
    for prompt in golden["prompts"].as_array().unwrap() {
        if let Some(input) = prompt["text"].as_str() {
            assert_eq!(tokenizer.encode(input, true).unwrap(), ids(&prompt["input_ids"]), "{name}: {input:?}");
        }
    }
    cases.len()
}

#[test]
fn every_fixtures_texts_become_its_ids_and_back() {
    let folders = folders();
    assert!(folders.len() >= 9, "{folders:?}");
    let cases: usize = folders.iter().map(|folder| check(folder)).sum();
    assert!(cases > 0, "no fixture has tokenizer cases");
}
