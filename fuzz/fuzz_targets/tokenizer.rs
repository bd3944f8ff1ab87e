//! A `tokenizer.json`, and (behind a NUL) a `tokenizer_config.json`.

#![no_main]

use coordinator::text::{Tokenizer, TokenizerConfig};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

fuzz_target!(|input: &[u8]| {
    let Some((file, config)) = conclave_fuzz::two_texts(input) else { return };
    let config = config.and_then(|text| serde_json::from_str(text).ok()).unwrap_or(Value::Null);
    if let Ok(tokenizer) = Tokenizer::from_json(file.as_bytes(), &TokenizerConfig::from_json(&config)) {
        conclave_fuzz::exercise(tokenizer, "Hello, wörld!  <s> 123\n");
    }
});
