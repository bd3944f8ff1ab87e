//! Vocabularies of other forms than `tokenizer.json`: the first byte says which.

#![no_main]

use coordinator::text::assemble::Added;
use coordinator::text::vocabulary;
use libfuzzer_sys::fuzz_target;
use serde_json::json;

fuzz_target!(|input: &[u8]| {
    let Some((&kind, file)) = input.split_first() else { return };
    let (name, spec) = match kind % 6 {
        0 => ("tekken.json", json!({})),
        1 => ("tokenizer.model", json!({})),
        2 => ("tokenizer.model", json!({"model_type": "llama"})),
        3 => ("qwen.tiktoken", json!({})),
        4 => ("tiktoken.model", json!({})),
        _ => ("tokenizer.model", json!({"model_type": "gpt_oss"})),
    };
    let given = Added { id: u32::from(kind), text: "<given>".into(), special: kind >= 128 };
    if let Ok(tokenizer) = vocabulary::read(name, file, &[given], &json!({}), &spec) {
        conclave_fuzz::exercise(tokenizer, " Hello, wörld!  <given> 123\n");
    }
});
