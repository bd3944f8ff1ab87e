//! Which tokenizer a directory holds, of the forms in which models are published.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::assemble::{Added, added_of_config};
use super::error::TextError;
use super::tokenizer::{Tokenizer, TokenizerConfig};
use super::{bytes_file, json_file, sentencepiece, tekken, tiktoken};

/// The files that are looked for, in this order.
const FILES: [&str; 5] = ["tokenizer.json", "tekken.json", "tiktoken.model", "tokenizer.model", "qwen.tiktoken"];

/// Reads a directory's tokenizer. `config` is its `tokenizer_config.json`, `spec` its `config.json`.
pub fn tokenizer(directory: &Path, config: &Value, spec: &Value) -> Result<Tokenizer, TextError> {
    for file in FILES {
        if let Some(bytes) = bytes_file(&directory.join(file))? {
            let named = |error| match error {
                TextError::Tokenizer(why) => TextError::Tokenizer(format!("{file}: {why}")),
                other => other,
            };
            let given = given(directory, config)?;
            return read(file, &bytes, &given, config, spec).map_err(named);
        }
    }
    Err(TextError::NoTokenizer { path: directory.to_path_buf(), why: format!("there is none of {}", FILES.join(", ")) })
}

/// Reads the tokenizer file of this name. `given` are tokens beside the file's own, ascending by id.
pub fn read(file: &str, bytes: &[u8], given: &[Added], config: &Value, spec: &Value) -> Result<Tokenizer, TextError> {
    let settings = TokenizerConfig::from_json(config);
    if file == "tokenizer.json" {
        return Tokenizer::from_json(bytes, &settings);
    }
    if file == "tekken.json" {
        return assembled(&tekken::json(bytes)?, with_defaults(settings, true, &tekken::NAMES));
    }
    if file == "tokenizer.model" && !tiktoken::is_ranks(bytes) {
        let read = sentencepiece::read(bytes, given)?;
        let names: Vec<(&str, &str)> = read.names.iter().map(|(role, text)| (role.as_str(), text.as_str())).collect();
        let settings = TokenizerConfig { margin: Some(read.margin), ..with_defaults(settings, true, &names) };
        return assembled(&read.json, settings);
    }
    let family = tiktoken::Family::of(file, config, spec)?;
    let json = tiktoken::json(bytes, &family, given)?;
    assembled(&json, with_defaults(settings, family.adds_begin, family.names))
}

/// Where the configuration is silent: whether texts begin with the begin token, and the tokens with a role.
fn with_defaults(mut config: TokenizerConfig, adds_begin: bool, names: &[(&str, &str)]) -> TokenizerConfig {
    config.add_bos = config.add_bos.or(Some(adds_begin));
    for (role, text) in names {
        config.names.entry(role.to_string()).or_insert_with(|| text.to_string());
    }
    config
}

fn assembled(json: &Value, config: TokenizerConfig) -> Result<Tokenizer, TextError> {
    let bytes = serde_json::to_vec(json).map_err(|why| TextError::Tokenizer(why.to_string()))?;
    Tokenizer::from_json(&bytes, &config)
}

/// The tokens that configurations add to a vocabulary, ascending by id: those of `tokenizer_config.json`, and of
/// `added_tokens.json` where that alone names them.
fn given(directory: &Path, config: &Value) -> Result<Vec<Added>, TextError> {
    let mut given: BTreeMap<u32, Added> = added_of_config(config).into_iter().map(|token| (token.id, token)).collect();
    let listed = json_file(&directory.join("added_tokens.json"))?.unwrap_or(Value::Null);
    for (text, id) in listed.as_object().into_iter().flatten() {
        if let Some(id) = id.as_u64().and_then(|id| u32::try_from(id).ok()) {
            given.entry(id).or_insert_with(|| Added { id, text: text.clone(), special: true });
        }
    }
    Ok(given.into_values().collect())
}
