//! A sentence-piece `tokenizer.model`: pieces with scores, and how texts are normalised.
//!
//! Two algorithms are in use. BPE joins the pair whose union scores best; unigram takes the cutting of the whole text whose
//! scores add up highest. Either spells unknown characters in bytes where the vocabulary has pieces for them.

use std::collections::BTreeMap;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use super::assemble::{self, Added, Sentence, SpaceBefore};
use super::error::TextError;
use super::tokenizer::Margin;
use super::varint::{Field, fields};

/// Kinds of pieces.
const NORMAL: u64 = 1;
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// Algorithms.
const UNIGRAM: u64 = 1;
const BPE: u64 = 2;

struct Piece {
    text: String,
    score: f64,
    kind: u64,
}

/// A model as its file describes it, with the format's defaults.
struct Model {
    pieces: Vec<Piece>,
    algorithm: u64,
    byte_fallback: bool,
    unknown: i64,
    begin: i64,
    end: i64,
    pad: i64,
    charsmap: Vec<u8>,
    dummy_prefix: bool,
    trims: bool,
    escapes: bool,
    suffix: bool,
}

/// What is read: a `tokenizer.json`, and the tokens with a role.
pub struct Read {
    pub json: Value,
    pub names: BTreeMap<String, String>,
    pub margin: Margin,
}

/// Reads a model. `given` are tokens of the configuration beside the file's own.
pub fn read(bytes: &[u8], given: &[Added]) -> Result<Read, TextError> {
    let model = Model::parse(bytes)?;
    let mut ids = BTreeMap::new();
    for (id, piece) in (0u32..).zip(&model.pieces) {
        if let Some(other) = ids.insert(piece.text.as_str(), id) {
            let text = &piece.text;
            return Err(TextError::Tokenizer(format!("piece {text:?} stands at {other} and at {id}")));
        }
    }
    let given_new: Vec<&Added> = given.iter().filter(|token| !ids.contains_key(token.text.as_str())).collect();
    let section = match model.algorithm {
        BPE => model.bpe(&ids, &given_new),
        UNIGRAM => model.unigram(&given_new)?,
        other => return Err(refused(format!("the algorithm {other} is neither unigram (1) nor BPE (2)"))),
    };
    if model.suffix {
        return Err(refused("it writes spaces behind words, which no known model does".into()));
    }
    if !model.escapes {
        return Err(refused("it keeps spaces as they are, which no known model does".into()));
    }
    let roles =
        [("unk_token", model.unknown), ("bos_token", model.begin), ("eos_token", model.end), ("pad_token", model.pad)];
    let names = roles
        .into_iter()
        .filter_map(|(role, id)| {
            let piece = model.pieces.get(usize::try_from(id).ok()?)?;
            Some((role.to_string(), piece.text.clone()))
        })
        .collect();
    let added = model.added(given);
    let space_before = if model.dummy_prefix { SpaceBefore::Text } else { SpaceBefore::Nothing };
    let json = Sentence { model: section, normalizers: model.normalizers(), space_before, added };
    let margin = Margin { trims: model.trims, maps: !model.charsmap.is_empty(), space_before: model.dummy_prefix };
    Ok(Read { json: json.json(), names, margin })
}

fn refused(why: String) -> TextError {
    TextError::Tokenizer(format!("the sentence-piece model: {why}"))
}

impl Model {
    fn parse(bytes: &[u8]) -> Result<Model, TextError> {
        let mut model = Model {
            pieces: Vec::new(),
            algorithm: UNIGRAM,
            byte_fallback: false,
            unknown: 0,
            begin: 1,
            end: 2,
            pad: -1,
            charsmap: Vec::new(),
            dummy_prefix: true,
            trims: true,
            escapes: true,
            suffix: false,
        };
        for (number, field) in fields(bytes)? {
            let Some(message) = field.bytes() else { continue };
            match number {
                1 => model.pieces.push(piece(message)?),
                2 => model.trainer(message)?,
                3 => model.normalizer(message)?,
                _ => {}
            }
        }
        if model.pieces.is_empty() {
            return Err(refused("it has no pieces".into()));
        }
        Ok(model)
    }

    /// The settings it was trained with.
    fn trainer(&mut self, message: &[u8]) -> Result<(), TextError> {
        for (number, field) in fields(message)? {
            let Some(value) = field.number() else { continue };
            // Negative numbers are written as 64 bits in two's complement.
            let id = value as i64;
            match number {
                3 => self.algorithm = value,
                24 => self.suffix = value != 0,
                35 => self.byte_fallback = value != 0,
                40 => self.unknown = id,
                41 => self.begin = id,
                42 => self.end = id,
                43 => self.pad = id,
                _ => {}
            }
        }
        Ok(())
    }

    fn normalizer(&mut self, message: &[u8]) -> Result<(), TextError> {
        for (number, field) in fields(message)? {
            match (number, field) {
                (2, Field::Bytes(map)) => self.charsmap = map.to_vec(),
                (3, _) => self.dummy_prefix = field.flag().unwrap_or(true),
                (4, _) => self.trims = field.flag().unwrap_or(true),
                (5, _) => self.escapes = field.flag().unwrap_or(true),
                _ => {}
            }
        }
        Ok(())
    }

    /// What happens to a text before its spaces are rewritten.
    fn normalizers(&self) -> Vec<Value> {
        let mut normalizers = Vec::new();
        if !self.charsmap.is_empty() {
            let map = BASE64_STANDARD.encode(&self.charsmap);
            normalizers.push(json!({"type": "Precompiled", "precompiled_charsmap": map}));
        }
        if self.trims {
            normalizers.push(json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}));
        }
        normalizers
    }

    /// Tokens found before anything else: the file's control and user-defined pieces, and what the configuration adds.
    /// A user-defined piece with a space in it cannot be found in a text that is not yet normalised; it is reached by
    /// its score.
    fn added(&self, given: &[Added]) -> Vec<Added> {
        let mut added: BTreeMap<u32, Added> = BTreeMap::new();
        for (id, piece) in (0u32..).zip(&self.pieces) {
            let found = match piece.kind {
                UNKNOWN | CONTROL => true,
                USER_DEFINED => !piece.text.contains('▁'),
                _ => false,
            };
            if found {
                added.insert(id, Added { id, text: piece.text.clone(), special: piece.kind != USER_DEFINED });
            }
        }
        for token in given {
            added.insert(token.id, token.clone());
        }
        added.into_values().collect()
    }

    fn bpe(&self, ids: &BTreeMap<&str, u32>, given: &[&Added]) -> Value {
        let made: Vec<(f64, &str)> = (self.pieces.iter())
            .filter(|piece| matches!(piece.kind, NORMAL | USER_DEFINED))
            .map(|piece| (piece.score, piece.text.as_str()))
            .collect();
        let merges = assemble::merges_by_score(&made, ids);
        let mut all = ids.clone();
        all.extend(given.iter().map(|token| (token.text.as_str(), token.id)));
        let unknown = usize::try_from(self.unknown).ok().and_then(|id| self.pieces.get(id));
        assemble::sentence_bpe(&all, &merges, unknown.map(|piece| piece.text.as_str()))
    }

    fn unigram(&self, given: &[&Added]) -> Result<Value, TextError> {
        let least = self.pieces.iter().map(|piece| piece.score).fold(f64::INFINITY, f64::min);
        let mut vocabulary: Vec<Value> = (self.pieces.iter())
            .map(|piece| {
                // Pieces of the other kinds stand for something else than their text. They cannot be worse than the worst:
                // the library derives the price of an unknown character from it.
                let usable = matches!(piece.kind, NORMAL | USER_DEFINED);
                json!([piece.text, if usable { piece.score } else { least }])
            })
            .collect();
        for token in given {
            // Here an id is a place in the list.
            if token.id as usize != vocabulary.len() {
                return Err(refused(format!(
                    "token {:?} has the id {}, {} is the next",
                    token.text,
                    token.id,
                    vocabulary.len()
                )));
            }
            vocabulary.push(json!([token.text, least]));
        }
        let bytes = self.byte_fallback && self.pieces.iter().any(|piece| piece.text == "<0x00>");
        Ok(json!({"type": "Unigram", "unk_id": self.unknown, "vocab": vocabulary, "byte_fallback": bytes}))
    }
}

fn piece(message: &[u8]) -> Result<Piece, TextError> {
    let mut piece = Piece { text: String::new(), score: 0.0, kind: NORMAL };
    for (number, field) in fields(message)? {
        match (number, field) {
            (1, Field::Bytes(text)) => {
                let text = std::str::from_utf8(text).map_err(|why| refused(format!("a piece is not text: {why}")))?;
                piece.text = text.to_string();
            }
            (2, Field::Float(score)) => piece.score = f64::from(score),
            (3, Field::Number(kind)) => piece.kind = kind,
            _ => {}
        }
    }
    Ok(piece)
}

#[cfg(test)]
pub(in crate::text) mod tests {
    use super::*;
    use crate::text::tokenizer::{Tokenizer, TokenizerConfig};
    use std::sync::Arc;

    const BPE_MODEL: &[u8] = include_bytes!("fixtures/bpe.model");
    const UNIGRAM_MODEL: &[u8] = include_bytes!("fixtures/unigram.model");
    const PLAIN_MODEL: &[u8] = include_bytes!("fixtures/plain.model");

    pub fn tokenizers() -> [(&'static str, Arc<Tokenizer>); 3] {
        [("bpe", BPE_MODEL), ("unigram", UNIGRAM_MODEL), ("plain", PLAIN_MODEL)].map(|(name, bytes)| {
            let read = read(bytes, &[]).unwrap();
            let config = TokenizerConfig {
                names: read.names,
                margin: Some(read.margin),
                add_bos: Some(true),
                ..TokenizerConfig::default()
            };
            (name, Arc::new(Tokenizer::from_json(&serde_json::to_vec(&read.json).unwrap(), &config).unwrap()))
        })
    }

    /// What the reference library gives for these models; see the fixtures' README.
    #[test]
    fn texts_become_the_reference_librarys_pieces() {
        let expected: Value = serde_json::from_str(include_str!("fixtures/sentencepiece.json")).unwrap();
        for (name, tokenizer) in tokenizers() {
            let cases = expected[name].as_array().unwrap();
            assert!(cases.len() > 30);
            for case in cases {
                let text = case["text"].as_str().unwrap();
                let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
                assert_eq!(tokenizer.encode(text, false).unwrap(), ids, "{name}: {text:?}");
                // The library writes unknown pieces as a sign of its own.
                if !ids.contains(&0) {
                    assert_eq!(tokenizer.decode(&ids, true), case["decoded"].as_str().unwrap(), "{name}: {text:?}");
                }
            }
        }
    }
}
