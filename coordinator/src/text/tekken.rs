//! Mistral's `tekken.json`: an expression, tokens as base64 with ranks, and special tokens whose ids come first.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use serde_json::Value;

use super::assemble::{Added, ByteLevel, merges_by_rank, spelled};
use super::error::TextError;

#[derive(Deserialize)]
struct File {
    config: Config,
    vocab: Vec<Token>,
    /// Files of the first versions leave them out.
    #[serde(default)]
    special_tokens: Option<Vec<Special>>,
}

#[derive(Deserialize)]
struct Config {
    pattern: String,
    default_vocab_size: usize,
    default_num_special_tokens: usize,
}

#[derive(Deserialize)]
struct Token {
    rank: u32,
    token_bytes: String,
}

#[derive(Deserialize)]
struct Special {
    rank: u32,
    token_str: String,
}

/// The special tokens of files that do not list them.
const SPECIALS: [&str; 20] = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
];

/// Tokens with a role; texts begin with the begin token.
pub const NAMES: [(&str, &str); 4] =
    [("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"), ("pad_token", "<pad>")];

/// The file as a `tokenizer.json`. It lists more tokens than the model has: ranks beyond the vocabulary are left out.
pub fn json(bytes: &[u8]) -> Result<Value, TextError> {
    let refused = |why: String| TextError::Tokenizer(format!("tekken.json: {why}"));
    let file: File = serde_json::from_slice(bytes).map_err(|why| refused(why.to_string()))?;
    let count = file.config.default_num_special_tokens;
    let room = file.config.default_vocab_size.checked_sub(count).ok_or_else(|| {
        refused(format!("{count} special tokens in a vocabulary of {}", file.config.default_vocab_size))
    })?;
    let mut tokens = Vec::with_capacity(room);
    for token in file.vocab.iter().filter(|token| (token.rank as usize) < room) {
        let bytes = BASE64_STANDARD.decode(&token.token_bytes);
        let bytes = bytes.map_err(|why| refused(format!("the token of rank {}: {why}", token.rank)))?;
        tokens.push((bytes, token.rank));
    }
    let mut texts: Vec<String> = (0..count)
        .map(|id| match SPECIALS.get(id) {
            Some(text) if file.special_tokens.is_none() => text.to_string(),
            _ => format!("<SPECIAL_{id}>"),
        })
        .collect();
    for special in file.special_tokens.into_iter().flatten() {
        let text = texts.get_mut(special.rank as usize);
        *text.ok_or_else(|| refused(format!("the special token {} of {count}", special.rank)))? = special.token_str;
    }
    let added = (0u32..).zip(texts).map(|(id, text)| Added { id, text, special: true }).collect();
    let first = count as u32;
    let json = ByteLevel {
        vocabulary: tokens.iter().map(|(bytes, rank)| (spelled(bytes), rank + first)).collect(),
        merges: merges_by_rank(&tokens)?,
        patterns: &[&file.config.pattern],
        whole_words: true,
        space_before: false,
        added,
    };
    Ok(json.json())
}

#[cfg(test)]
pub(in crate::text) mod tests {
    use super::*;
    use crate::text::tokenizer::{Tokenizer, TokenizerConfig};
    use serde_json::json;
    use std::sync::Arc;

    fn file(specials: Value) -> Value {
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        tokens.extend([b"he".to_vec(), b"ll".to_vec(), b"hell".to_vec(), b"beyond the vocabulary".to_vec()]);
        let token = |(rank, bytes): (usize, &Vec<u8>)| json!({"rank": rank, "token_bytes": BASE64_STANDARD.encode(bytes), "token_str": null});
        json!({
            "config": {"pattern": crate::text::words::TEKKEN, "num_vocab_tokens": 1000, "default_vocab_size": 259 + 22,
                "default_num_special_tokens": 22, "version": "v3"},
            "vocab": tokens.iter().enumerate().map(token).collect::<Vec<_>>(),
            "special_tokens": specials,
        })
    }

    pub fn tokenizer(specials: Value) -> Arc<Tokenizer> {
        let json = super::json(&serde_json::to_vec(&file(specials)).unwrap()).unwrap();
        let names = NAMES.map(|(role, text)| (role.to_string(), text.to_string()));
        let config = TokenizerConfig { add_bos: Some(true), names: names.into(), ..TokenizerConfig::default() };
        Arc::new(Tokenizer::from_json(&serde_json::to_vec(&json).unwrap(), &config).unwrap())
    }

    #[test]
    fn special_tokens_come_first_and_ranks_after_them() {
        let tokenizer = tokenizer(Value::Null);
        assert_eq!(tokenizer.encode("[INST]hell", true).unwrap(), [1, 3, 258 + 22]);
        assert_eq!(tokenizer.vocabulary(), 259 + 22);
        assert_eq!(tokenizer.token_id("<SPECIAL_21>"), Some(21));
        assert_eq!(tokenizer.decode(&[1, 3, 280, 2], true), "hell");
    }

    #[test]
    fn listed_special_tokens_overrule_the_old_ones() {
        let listed = json!([{"rank": 1, "token_str": "<s>", "is_control": true},
                            {"rank": 5, "token_str": "[THINK]", "is_control": true}]);
        let tokenizer = tokenizer(listed);
        assert_eq!(tokenizer.token_id("[THINK]"), Some(5));
        assert_eq!((tokenizer.token_id("<SPECIAL_3>"), tokenizer.token_id("[INST]")), (Some(3), None));
    }

    #[test]
    fn a_broken_file_is_refused_with_the_reason() {
        let mut broken = file(json!([{"rank": 99, "token_str": "x"}]));
        let error = |file: &Value| json(&serde_json::to_vec(file).unwrap()).unwrap_err().to_string();
        assert!(error(&broken).contains("special token 99 of 22"), "{}", error(&broken));
        broken["special_tokens"] = Value::Null;
        broken["vocab"][3]["token_bytes"] = json!("%");
        assert!(error(&broken).contains("rank 3"), "{}", error(&broken));
        broken["config"]["default_vocab_size"] = json!(3);
        assert!(error(&broken).contains("vocabulary of 3"), "{}", error(&broken));
    }
}
