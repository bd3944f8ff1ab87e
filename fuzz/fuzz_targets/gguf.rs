//! A GGUF file: its header, the tensors' places, the spec, the tokenizer and the templates of its metadata.

#![no_main]

use libfuzzer_sys::fuzz_target;
use model::catalog::ROPE_FACTORS;
use model::gguf::split::Split;
use std::collections::BTreeSet;

fuzz_target!(|input: &[u8]| {
    let Ok(parsed) = model::gguf::file::parse(input) else { return };
    if let Ok(header) = worker::load::gguf::header(input) {
        assert!(header.entries.iter().all(|entry| entry.range.end <= input.len()));
    }
    let names: BTreeSet<&str> = parsed.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    let factors = names.contains(ROPE_FACTORS).then(|| vec![1.0; 32]);
    if let Ok(spec) = model::gguf::spec(&parsed.metadata, &|name| names.contains(name), factors.as_deref()) {
        model::parameters::count(&spec);
    }
    if let Ok(Some(split)) = Split::of("model-00001-of-00002.gguf", &parsed.metadata) {
        let _ = split.check(1, &parsed.metadata);
        let _ = split.check_tensors(&parsed.metadata, parsed.tensors.len());
    }
    coordinator::text::gguf::templates(&parsed.metadata);
    let _ = coordinator::text::gguf::end_tokens(&parsed.metadata);
    if let Ok((tokenizer, _)) = coordinator::text::gguf::tokenizer(&parsed.metadata) {
        conclave_fuzz::exercise(tokenizer, "Hello, wörld! \u{2581} 123");
    }
});
