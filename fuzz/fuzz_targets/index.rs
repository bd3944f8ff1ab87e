//! The index of a sharded checkpoint, as the worker and as the hub's client read it.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &str| {
    if let Ok((files, places)) = worker::load::checkpoint::indexed(input) {
        assert!(files.iter().all(|name| !name.contains('/') && name != ".." && !name.is_empty()));
        assert!(places.values().all(|file| files.contains(file)));
    }
    if let Ok(files) = coordinator::hub::select::indexed(input.as_bytes()) {
        assert!(files.iter().all(|name| !name.contains('/') && name.ends_with(".safetensors")));
    }
});
