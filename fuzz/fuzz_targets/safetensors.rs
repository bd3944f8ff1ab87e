//! The header of a safetensors file. The input is a whole file, or (first byte odd) a header's JSON before data.

#![no_main]

use libfuzzer_sys::fuzz_target;
use worker::load::safetensors::entries;

fuzz_target!(|input: &[u8]| {
    let Some((&kind, rest)) = input.split_first() else { return };
    let file = if kind % 2 == 0 {
        rest.to_vec()
    } else {
        let mut file = (rest.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(rest);
        file.resize(file.len() + 2 * usize::from(kind / 2), 0);
        file
    };
    if let Ok(entries) = entries(&file) {
        // The tensors tile the data.
        let ends = entries.windows(2).all(|pair| pair[0].range.end == pair[1].range.start);
        assert!(ends && entries.last().is_none_or(|last| last.range.end == file.len()));
    }
});
