//! Detokenising and stop strings, token by token: what comes out in pieces is what the whole gives.

#![no_main]

use conclave_fuzz::{bytes_tokenizer, ids};
use coordinator::text::{Detokenizer, StopStrings, Tokenizer};
use libfuzzer_sys::fuzz_target;
use std::sync::{Arc, OnceLock};

fn tokenizer() -> &'static Arc<Tokenizer> {
    static TOKENIZER: OnceLock<Arc<Tokenizer>> = OnceLock::new();
    TOKENIZER.get_or_init(bytes_tokenizer)
}

/// The stop string that ends first, the longest of those, and where it ends.
fn first_stop(text: &str, stops: &[&str]) -> Option<(usize, usize)> {
    let ends = stops.iter().enumerate().filter_map(|(which, stop)| Some((text.find(stop)? + stop.len(), which)));
    ends.min_by_key(|&(end, which)| (end, std::cmp::Reverse(stops[which].len()), which))
        .map(|(end, which)| (which, end))
}

fuzz_target!(|input: &[u8]| {
    // Flags, how many bytes are stop strings, those (cut at NULs), and the answer.
    let [flags, length, rest @ ..] = input else { return };
    let (stops, answer) = rest.split_at(usize::from(*length).min(rest.len()));
    let stops = String::from_utf8_lossy(stops);
    let stops: Vec<&str> = stops.split('\0').filter(|stop| !stop.is_empty()).take(8).collect();
    let (skip, include) = (flags & 1 != 0, flags & 2 != 0);
    let tokens = if flags & 4 != 0 { ids(answer, 270) } else { answer.iter().map(|&byte| byte.into()).collect() };

    let tokenizer = tokenizer();
    let whole = tokenizer.decode(&tokens, skip);
    let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), skip);
    let mut pieces: Vec<String> = tokens.iter().map(|&id| detokenizer.push(id).text).collect();
    pieces.push(detokenizer.flush());
    assert_eq!(pieces.concat(), whole);

    let Ok(mut watch) = StopStrings::new(&stops, include) else { return };
    let mut out = String::new();
    let mut found = None;
    for piece in &pieces {
        let released = watch.push(piece);
        out.push_str(&released.text);
        if released.stop.is_some() {
            found = released.stop;
            break;
        }
    }
    match first_stop(&whole, &stops) {
        None => {
            assert_eq!(found, None);
            out.push_str(&watch.flush());
            assert_eq!(out, whole);
        }
        Some((which, end)) => {
            assert_eq!(found.map(|found| stops[found]), Some(stops[which]));
            assert_eq!(out, whole[..if include { end } else { end - stops[which].len() }]);
        }
    }
});
