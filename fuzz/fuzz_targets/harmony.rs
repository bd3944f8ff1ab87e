//! Harmony's channels over any tokens: calls are numbered in order, each is named once, and text has one place.

#![no_main]

use conclave_fuzz::{bytes_tokenizer, ids};
use coordinator::text::Tokenizer;
use coordinator::text::harmony::{Harmony, Part};
use libfuzzer_sys::fuzz_target;
use std::sync::{Arc, OnceLock};

fn tokenizer() -> &'static Arc<Tokenizer> {
    static TOKENIZER: OnceLock<Arc<Tokenizer>> = OnceLock::new();
    TOKENIZER.get_or_init(bytes_tokenizer)
}

fuzz_target!(|input: &[u8]| {
    let Some((&split, rest)) = input.split_first() else { return };
    let tokenizer = tokenizer();
    // Control tokens are written as the bytes above 0xf8, so that texts can be inputs.
    let ids = if split >= 128 {
        ids(rest, 300)
    } else {
        rest.iter().map(|&byte| if byte > 0xf8 { 256 + u32::from(byte - 0xf9) } else { u32::from(byte) }).collect()
    };
    let (prompt, answer) = ids.split_at(usize::from(split % 128).min(ids.len()));
    let mut reader = Harmony::of(tokenizer).expect("all of its tokens").reader(tokenizer, prompt);
    let mut named = match reader.here() {
        Part::Call { index, .. } => index + 1,
        _ => 0,
    };
    let first = named;
    for &id in answer {
        match reader.push(id, &tokenizer.token_text(id)) {
            Part::Call { index, name: Some(name) } => {
                assert!(index >= named && !name.is_empty() && (index == named || named == first));
                named = index + 1;
            }
            Part::Call { index, name: None } => assert_eq!(index + 1, named),
            Part::Nothing | Part::Content | Part::Reasoning => {}
        }
        assert!(!matches!(reader.here(), Part::Call { name: Some(_), .. }));
    }
});
