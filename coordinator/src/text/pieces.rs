//! What each token id stands for, in bytes. Decoding is then concatenation: no call into the tokenizer, no re-decoding.
//!
//! The two decoders of today's language models are concatenative. Byte-level BPE writes each byte as one printable
//! character; sentence-piece vocabularies write spaces as `▁` and stray bytes as `<0xE2>`. Any other decoder (such as
//! WordPiece, which looks at its neighbours) is refused by name at load rather than decoded approximately.

use std::collections::BTreeMap;

use serde_json::Value;

use super::error::TextError;

/// How a vocabulary spells bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spelling {
    ByteLevel,
    /// `▁` is a space; with `bytes` set, `<0xE2>` is a byte.
    Sentence {
        bytes: bool,
    },
}

/// The bytes of every id, flat.
#[derive(Debug, Clone)]
pub struct Pieces {
    bytes: Vec<u8>,
    /// End of id `i` in `bytes`; it begins where `i - 1` ends.
    ends: Vec<u32>,
    kinds: Vec<Kind>,
    /// Whether one leading space of a whole text is dropped, because encoding has put it there.
    pub strips_space: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// No token has this id: models pad their vocabulary.
    Hole,
    Plain,
    Special,
}

impl Pieces {
    /// Reads a tokenizer's vocabulary and the decoder of its `tokenizer.json`.
    pub fn new(tokenizer: &tokenizers::Tokenizer) -> Result<Pieces, TextError> {
        let decoder =
            serde_json::to_value(tokenizer.get_decoder()).map_err(|why| TextError::Tokenizer(why.to_string()))?;
        let (spelling, strips_space) = spelling(&decoder)?;
        let added = tokenizer.get_added_tokens_decoder();
        let ordered: BTreeMap<u32, String> =
            tokenizer.get_vocab(true).into_iter().map(|(text, id)| (id, text)).collect();
        let byte_of = byte_level_bytes();

        let mut pieces = Pieces { bytes: Vec::new(), ends: Vec::new(), kinds: Vec::new(), strips_space };
        for (id, text) in ordered {
            // An id far beyond the others would make this table absurd; no vocabulary comes near 2^24 ids.
            if id >= 1 << 24 {
                return Err(TextError::Tokenizer(format!(
                    "token {text:?} has the id {id}, at most {} are read",
                    1 << 24
                )));
            }
            while pieces.ends.len() < id as usize {
                pieces.push(&[], Kind::Hole)?;
            }
            let added = added.get(&id);
            let bytes = match spelling {
                Spelling::ByteLevel if added.is_some() => text.into_bytes(),
                Spelling::ByteLevel => match text.chars().map(|c| byte_of.get(&c).copied()).collect() {
                    Some(bytes) => bytes,
                    None => text.into_bytes(),
                },
                Spelling::Sentence { bytes } => match byte_token(&text).filter(|_| bytes) {
                    Some(byte) => vec![byte],
                    None => text.replace('▁', " ").into_bytes(),
                },
            };
            let special = added.is_some_and(|token| token.special);
            pieces.push(&bytes, if special { Kind::Special } else { Kind::Plain })?;
        }
        Ok(pieces)
    }

    fn push(&mut self, bytes: &[u8], kind: Kind) -> Result<(), TextError> {
        self.bytes.extend_from_slice(bytes);
        let end = u32::try_from(self.bytes.len())
            .map_err(|_| TextError::Tokenizer("the vocabulary's text is larger than 4 GiB".into()))?;
        self.ends.push(end);
        self.kinds.push(kind);
        Ok(())
    }

    /// One more than the highest id that has a token.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The bytes of an id: possibly a part of a character. Empty for an id without a token.
    pub fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        if id >= self.ends.len() {
            return &[];
        }
        let begin = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[begin as usize..self.ends[id] as usize]
    }

    /// Whether decoding leaves this id out when special tokens are skipped.
    pub fn is_special(&self, id: u32) -> bool {
        self.kinds.get(id as usize) == Some(&Kind::Special)
    }

    /// Whether a token has this id.
    pub fn is_token(&self, id: u32) -> bool {
        self.kinds.get(id as usize).is_some_and(|kind| *kind != Kind::Hole)
    }
}

/// Reads the decoder section of a `tokenizer.json`: the spelling, and whether a text loses one leading space.
fn spelling(decoder: &Value) -> Result<(Spelling, bool), TextError> {
    let mut parts = Vec::new();
    flatten(decoder, &mut parts);
    let (mut byte_level, mut sentence, mut bytes, mut strips) = (false, false, false, false);
    for part in &parts {
        match part["type"].as_str().unwrap_or("none") {
            "ByteLevel" => byte_level = true,
            "ByteFallback" => bytes = true,
            "Fuse" => {}
            "Replace" if part["pattern"]["String"] == "▁" && part["content"] == " " => sentence = true,
            "Strip" if part["content"] == " " && part["start"] == 1 && part["stop"] == 0 => strips = true,
            "Metaspace" if part["replacement"] == "▁" => {
                sentence = true;
                strips |= part["prepend_scheme"] != "never";
            }
            _ => return Err(unknown(part)),
        }
    }
    match (byte_level, sentence) {
        (true, false) if !bytes && !strips => Ok((Spelling::ByteLevel, false)),
        (false, true) => Ok((Spelling::Sentence { bytes }, strips)),
        _ => Err(unknown(decoder)),
    }
}

fn flatten<'a>(decoder: &'a Value, parts: &mut Vec<&'a Value>) {
    match decoder["decoders"].as_array() {
        Some(decoders) => decoders.iter().for_each(|decoder| flatten(decoder, parts)),
        None => parts.push(decoder),
    }
}

fn unknown(decoder: &Value) -> TextError {
    TextError::Tokenizer(format!("decoder {decoder} is neither byte-level nor of the sentence-piece kind"))
}

/// `<0xE2>` is the byte 0xE2.
fn byte_token(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// GPT-2's alphabet: printable Latin-1 characters stand for themselves, the other bytes for U+0100 and on, in order.
pub(super) fn byte_level_bytes() -> BTreeMap<char, u8> {
    byte_letters().into_iter().zip(0..=255).collect()
}

/// The letter of each byte.
pub(super) fn byte_letters() -> [char; 256] {
    let mut next = 0x100u32;
    std::array::from_fn(|byte| {
        let byte = byte as u8;
        if matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff) {
            return char::from(byte);
        }
        next += 1;
        char::from_u32(next - 1).expect("U+0100 to U+0143 are characters")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_byte_alphabet_is_the_one_of_byte_level_tokenizers() {
        let ours: std::collections::BTreeSet<char> = byte_level_bytes().into_keys().collect();
        let theirs: std::collections::BTreeSet<char> =
            tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
        assert_eq!(ours, theirs);
        assert_eq!(byte_level_bytes()[&'Ġ'], b' ');
        assert_eq!(byte_level_bytes()[&'Ċ'], b'\n');
    }

    #[test]
    fn known_decoders_are_told_apart_and_others_are_refused_by_name() {
        let llama = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
        assert_eq!(spelling(&llama).unwrap(), (Spelling::Sentence { bytes: true }, true));
        assert_eq!(spelling(&json!({"type": "ByteLevel"})).unwrap(), (Spelling::ByteLevel, false));
        let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"});
        assert_eq!(spelling(&metaspace).unwrap(), (Spelling::Sentence { bytes: false }, false));
        for refused in [json!({"type": "WordPiece", "prefix": "##"}), json!(null), json!({"type": "CTC"})] {
            let error = spelling(&refused).unwrap_err().to_string();
            assert!(error.contains(refused["type"].as_str().unwrap_or("null")), "{error}");
        }
    }
}
