//! What the fuzz targets share: small tokenizers of bytes, and ways to cut an input into its parts.

use coordinator::text::{Text, Tokenizer, TokenizerConfig};
use serde_json::{Map, Value, json};
use std::path::Path;
use std::sync::Arc;

/// The control tokens of harmony; their ids follow the 256 bytes.
pub const CONTROLS: [&str; 7] =
    ["<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"];

/// A tokenizer whose ids are bytes, and then the tokens of harmony.
pub fn bytes_tokenizer() -> Arc<Tokenizer> {
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let hidden = |byte: u32| 256 + (0..byte).filter(|&byte| !printable(byte)).count() as u32;
    let letter = |byte: u32| char::from_u32(if printable(byte) { byte } else { hidden(byte) }).expect("a letter");
    let vocabulary: Map<String, Value> = (0..256).map(|byte| (letter(byte).to_string(), json!(byte))).collect();
    let control = |(number, text): (usize, &&str)| {
        json!({"id": 256 + number, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": CONTROLS.iter().enumerate().map(control).collect::<Vec<_>>(),
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocabulary, "merges": []},
    });
    let config = TokenizerConfig::from_json(&Value::Null);
    Arc::new(Tokenizer::from_json(file.to_string().as_bytes(), &config).expect("a tokenizer of bytes"))
}

/// The demo model's text.
pub fn demo_text() -> Text {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo/model");
    Text::load(&demo, None).expect("the demo model's tokenizer and template")
}

/// The text before and behind the first NUL byte; none where the input is no text.
pub fn two_texts(input: &[u8]) -> Option<(&str, Option<&str>)> {
    let text = std::str::from_utf8(input).ok()?;
    Some(text.split_once('\0').map_or((text, None), |(first, second)| (first, Some(second))))
}

/// Ids below `bound` from pairs of bytes.
pub fn ids(input: &[u8], bound: u32) -> Vec<u32> {
    input
        .chunks(2)
        .map(|pair| u32::from(pair[0]) | u32::from(*pair.get(1).unwrap_or(&0)) << 8)
        .map(|id| id % bound)
        .collect()
}

/// Encodes and decodes a little: a tokenizer that was taken must not fail later in another way than by an error.
pub fn exercise(tokenizer: Tokenizer, text: &str) {
    let tokenizer = Arc::new(tokenizer);
    for special in [false, true] {
        if let Ok(tokens) = tokenizer.encode(text, special) {
            let whole = tokenizer.decode(&tokens, false);
            assert!(whole.len() <= 4096 * (tokens.len() + 1) || whole.len() <= 1 << 24);
        }
    }
    let _ = tokenizer.encode_rendered(text);
    let beyond = [0, 1, tokenizer.vocabulary() as u32, u32::MAX];
    tokenizer.decode(&beyond, true);
    assert!(beyond[2..].iter().all(|id| !tokenizer.is_token(*id)));
}
