//! What peers say of files that one lends another: greetings, asks, heads and lists. What is understood comes back.

#![no_main]

use libfuzzer_sys::fuzz_target;
use worker::collective::weights::words::{ASK, Ask, GREETING, Greeting, HEAD, Head, decode_list, encode_list};
use worker::load::remote::PART;

fuzz_target!(|input: &[u8]| {
    if let Some(bytes) = input.first_chunk::<GREETING>()
        && let Some(Ok(greeting)) = Greeting::decode(bytes)
    {
        assert_eq!(greeting.encode(), *bytes);
    }
    if let Some(bytes) = input.first_chunk::<ASK>()
        && let Some(Ask::Read { strip, .. }) = Ask::decode(bytes)
    {
        let (count, extent) = (strip.bytes().expect("counted"), strip.extent().expect("checked"));
        assert!((1..=PART).contains(&count) && extent.end - extent.start >= count);
        assert_eq!(strip.place(count - 1).start + 1, extent.end);
    }
    if let Some(Some(head)) = input.first_chunk::<HEAD>().map(Head::decode) {
        assert!(head.bytes <= PART);
    }
    if let Some(files) = decode_list(input) {
        assert_eq!(encode_list(&files), input);
    }
});
