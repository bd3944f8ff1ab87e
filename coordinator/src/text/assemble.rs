//! Vocabularies of other formats, written as the `tokenizer.json` that the tokenizer library reads.
//!
//! Two shapes cover the models served here: byte-level BPE (a text is cut into words by expressions, words are merged from
//! single bytes) and sentence pieces (a text is one word, its spaces are `▁`).

use std::collections::{BTreeMap, HashMap};

use serde_json::{Value, json};

use super::error::TextError;
use super::pieces::byte_letters;

/// A token that is found in a text before anything else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Added {
    pub id: u32,
    pub text: String,
    /// Left out of answers.
    pub special: bool,
}

impl Added {
    fn json(&self) -> Value {
        json!({"id": self.id, "content": self.text, "special": self.special,
               "single_word": false, "lstrip": false, "rstrip": false, "normalized": false})
    }
}

/// Tokens beside the vocabulary: `added_tokens_decoder` of a `tokenizer_config.json`.
pub fn added_of_config(config: &Value) -> Vec<Added> {
    let entries = config["added_tokens_decoder"].as_object().into_iter().flatten();
    let mut added: Vec<Added> = entries
        .filter_map(|(id, token)| {
            let text = token["content"].as_str()?.to_string();
            Some(Added { id: id.parse().ok()?, text, special: token["special"].as_bool().unwrap_or(false) })
        })
        .collect();
    added.sort_by_key(|token| token.id);
    added
}

/// A byte-level BPE vocabulary; tokens and merges are spelled in GPT-2's alphabet.
pub struct ByteLevel<'a> {
    pub vocabulary: BTreeMap<String, u32>,
    /// Best first.
    pub merges: Vec<[String; 2]>,
    /// How words are cut, in order.
    pub patterns: &'a [&'a str],
    /// A whole word that is a token is taken as it is.
    pub whole_words: bool,
    pub space_before: bool,
    pub added: Vec<Added>,
}

impl ByteLevel<'_> {
    pub fn json(mut self) -> Value {
        // The library numbers added tokens by itself unless they stand in the vocabulary.
        for token in &self.added {
            self.vocabulary.entry(token.text.clone()).or_insert(token.id);
        }
        let cut = |pattern: &&str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        let mut cuts: Vec<Value> = self.patterns.iter().map(cut).collect();
        cuts.push(json!({"type": "ByteLevel", "add_prefix_space": self.space_before, "trim_offsets": true,
            "use_regex": false}));
        json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": self.added.iter().map(Added::json).collect::<Vec<_>>(),
            "normalizer": null,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
            "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "ignore_merges": self.whole_words, "vocab": self.vocabulary, "merges": self.merges}
        })
    }
}

/// The merges of a vocabulary that has only ranks: every way to make a token of two tokens, lowest rank of the made token
/// first. `tokens` are bytes with their ranks; two of one spelling are refused.
pub fn merges_by_rank(tokens: &[(Vec<u8>, u32)]) -> Result<Vec<[String; 2]>, TextError> {
    let mut ranks: HashMap<&[u8], u32> = HashMap::with_capacity(tokens.len());
    for (bytes, rank) in tokens {
        if let Some(other) = ranks.insert(bytes, *rank) {
            let text = String::from_utf8_lossy(bytes);
            return Err(TextError::Tokenizer(format!("token {text:?} has the ranks {other} and {rank}")));
        }
    }
    let mut ordered: Vec<&(Vec<u8>, u32)> = tokens.iter().collect();
    ordered.sort_by_key(|(_, rank)| *rank);
    let letters = byte_letters();
    let spell = |bytes: &[u8]| -> String { bytes.iter().map(|byte| letters[usize::from(*byte)]).collect() };
    let mut merges = Vec::new();
    for (bytes, _) in ordered {
        let mut splits: Vec<(u32, u32, usize)> = (1..bytes.len())
            .filter_map(|at| Some((*ranks.get(&bytes[..at])?, *ranks.get(&bytes[at..])?, at)))
            .collect();
        splits.sort_unstable();
        merges.extend(splits.into_iter().map(|(_, _, at)| [spell(&bytes[..at]), spell(&bytes[at..])]));
    }
    Ok(merges)
}

/// The merges of a vocabulary that has only scores: every way to make a token of two tokens, best score of the made token
/// first. Equal scores keep the order given, and of one token the splits with the shorter left part come first.
pub fn merges_by_score<'a>(made: &[(f64, &'a str)], ids: &BTreeMap<&str, u32>) -> Vec<[&'a str; 2]> {
    let mut made = made.to_vec();
    made.sort_by(|one, other| other.0.total_cmp(&one.0));
    let mut merges = Vec::new();
    for (_, token) in made {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if ids.contains_key(left) && ids.contains_key(right) {
                merges.push([left, right]);
            }
        }
    }
    merges
}

/// A vocabulary of sentence pieces: what `model` holds, how texts are normalised, and whether they begin with a space.
pub struct Sentence {
    /// The `model` of a `tokenizer.json`.
    pub model: Value,
    /// What comes before spaces are rewritten.
    pub normalizers: Vec<Value>,
    /// Where a space is put before a text, which decoding takes away.
    pub space_before: SpaceBefore,
    pub added: Vec<Added>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpaceBefore {
    Nothing,
    /// Every part between added tokens, as GGUF's runtime does.
    Parts,
    /// The whole text; encoding does it, see [`super::tokenizer::Margin`].
    Text,
}

impl Sentence {
    pub fn json(self) -> Value {
        let mut normalizers = self.normalizers;
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if self.space_before == SpaceBefore::Parts {
            normalizers.push(json!({"type": "Prepend", "prepend": "▁"}));
        }
        if self.space_before != SpaceBefore::Nothing {
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        normalizers.push(json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}));
        json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": self.added.iter().map(Added::json).collect::<Vec<_>>(),
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": null, "post_processor": null,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": self.model
        })
    }
}

/// The model section of BPE over sentence pieces.
pub fn sentence_bpe(ids: &BTreeMap<&str, u32>, merges: &[[&str; 2]], unknown: Option<&str>) -> Value {
    json!({"type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": ids.contains_key("<0x00>"),
        "ignore_merges": false, "vocab": ids, "merges": merges})
}

/// Spells bytes in GPT-2's alphabet.
pub fn spelled(bytes: &[u8]) -> String {
    let letters = byte_letters();
    bytes.iter().map(|byte| letters[usize::from(*byte)]).collect()
}
