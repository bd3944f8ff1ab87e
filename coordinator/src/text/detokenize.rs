//! Tokens to text, one at a time. Emits whole characters only, and in sum exactly what decoding everything at once gives.
//!
//! Bytes that are not UTF-8 become U+FFFD by the rule of the Unicode standard (one for each maximal broken part), as
//! `String::from_utf8_lossy` does it. At most three bytes, the beginning of a character, are ever held back.

use std::sync::Arc;

use super::tokenizer::Tokenizer;

/// The text that one token completed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Emitted {
    /// Whole characters; may be empty.
    pub text: String,
    /// Where this token's text begins in the whole, in characters: those completed before it. A token that only
    /// continues a character has the offset of that character.
    pub offset: usize,
}

/// The state of one text being decoded. Cheap to clone: a failed-over request carries it on.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special: bool,
    /// One space is still to be dropped from the beginning.
    strip: bool,
    /// The beginning of a character, at most three bytes.
    pending: Vec<u8>,
    /// Characters emitted so far.
    characters: usize,
}

impl Detokenizer {
    /// For ids that are a whole text of their own: what encoding put before it is taken away again.
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special: bool) -> Detokenizer {
        let strip = tokenizer.pieces().strips_space;
        Detokenizer { tokenizer, skip_special, strip, pending: Vec::new(), characters: 0 }
    }

    /// For ids that continue a text, as an answer continues its prompt: a leading space belongs to the answer.
    pub fn continuing(tokenizer: Arc<Tokenizer>, skip_special: bool) -> Detokenizer {
        Detokenizer { strip: false, ..Detokenizer::new(tokenizer, skip_special) }
    }

    /// Takes the next token.
    pub fn push(&mut self, id: u32) -> Emitted {
        let offset = self.characters;
        let pieces = self.tokenizer.pieces();
        if self.skip_special && pieces.is_special(id) {
            return Emitted { text: String::new(), offset };
        }
        let mut bytes = pieces.bytes(id);
        if self.strip && !bytes.is_empty() {
            self.strip = false;
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        let text = decode(&mut self.pending, bytes);
        self.characters += text.chars().count();
        Emitted { text, offset }
    }

    /// Ends the text: a character that never became whole is emitted as U+FFFD.
    pub fn flush(&mut self) -> String {
        if self.pending.is_empty() {
            return String::new();
        }
        self.pending.clear();
        self.characters += 1;
        char::REPLACEMENT_CHARACTER.to_string()
    }

    /// Characters emitted so far.
    pub fn characters(&self) -> usize {
        self.characters
    }
}

/// Appends `bytes` to what is pending and takes out what is complete.
fn decode(pending: &mut Vec<u8>, bytes: &[u8]) -> String {
    pending.extend_from_slice(bytes);
    let mut text = String::with_capacity(pending.len());
    let mut rest = pending.as_slice();
    loop {
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                rest = &[];
                break;
            }
            Err(error) => {
                let (valid, broken) = rest.split_at(error.valid_up_to());
                text.push_str(std::str::from_utf8(valid).expect("valid up to here"));
                rest = broken;
                let Some(length) = error.error_len() else { break };
                text.push(char::REPLACEMENT_CHARACTER);
                rest = &rest[length..];
            }
        }
    }
    let kept = rest.len();
    pending.drain(..pending.len() - kept);
    debug_assert!(pending.len() <= 3);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::tests::{byte_level, sentence_piece};
    use proptest::prelude::*;

    /// Decodes id by id and checks what holds at every step.
    fn in_pieces(detokenizer: &mut Detokenizer, ids: &[u32]) -> String {
        let mut text = String::new();
        for id in ids {
            let emitted = detokenizer.push(*id);
            assert_eq!(emitted.offset, text.chars().count());
            text.push_str(&emitted.text);
            assert_eq!(detokenizer.characters(), text.chars().count());
            assert!(detokenizer.pending.len() <= 3);
        }
        text + &detokenizer.flush()
    }

    #[test]
    fn text_that_was_encoded_comes_back_whole() {
        let texts = ["", "plain", " two  spaces", "Grüße, 世界", "👩‍👩‍👧‍👦 family", "देवनागरी", "𝔘𐍈\u{10ffff}", "\r\n\t"];
        for tokenizer in [byte_level(), sentence_piece()] {
            for text in texts {
                let ids = tokenizer.encode(text, false).unwrap();
                assert_eq!(in_pieces(&mut Detokenizer::new(tokenizer.clone(), true), &ids), text);
            }
        }
    }

    #[test]
    fn half_a_character_is_held_back_and_flushed_as_broken() {
        let tokenizer = byte_level();
        let ids = tokenizer.encode("世", false).unwrap();
        assert_eq!(ids.len(), 3, "the test's vocabulary has single bytes only");
        let mut detokenizer = Detokenizer::new(tokenizer, true);
        for id in &ids[..2] {
            assert_eq!(detokenizer.push(*id), Emitted { text: String::new(), offset: 0 });
        }
        let mut whole = detokenizer.clone();
        assert_eq!(whole.push(ids[2]), Emitted { text: "世".into(), offset: 0 });
        assert_eq!(detokenizer.flush(), "\u{fffd}");
        assert_eq!(detokenizer.flush(), "", "a flush happens once");
    }

    #[test]
    fn an_answer_keeps_the_space_that_a_text_of_its_own_loses() {
        let tokenizer = sentence_piece();
        let ids = tokenizer.encode("Paris", false).unwrap();
        assert_eq!(in_pieces(&mut Detokenizer::new(tokenizer.clone(), true), &ids), "Paris");
        assert_eq!(in_pieces(&mut Detokenizer::continuing(tokenizer, true), &ids), " Paris");
    }

    #[test]
    fn special_tokens_are_left_out_only_when_asked() {
        let tokenizer = byte_level();
        let end = tokenizer.token_id("<|end|>").unwrap();
        let mut ids = tokenizer.encode("a", false).unwrap();
        ids.push(end);
        assert_eq!(in_pieces(&mut Detokenizer::new(tokenizer.clone(), true), &ids), "a");
        assert_eq!(in_pieces(&mut Detokenizer::new(tokenizer, false), &ids), "a<|end|>");
    }

    /// One tokenizer of every kind.
    fn every_kind() -> Vec<Arc<Tokenizer>> {
        let pieces = crate::text::sentencepiece::tests::tokenizers().map(|(_, tokenizer)| tokenizer);
        let tekken = crate::text::tekken::tests::tokenizer(serde_json::Value::Null);
        [byte_level(), sentence_piece(), crate::text::tiktoken::tests::tokenizer(), tekken]
            .into_iter()
            .chain(pieces)
            .collect()
    }

    #[test]
    fn emoji_in_bytes_come_out_whole_whatever_the_kind() {
        let text = "a👩‍👩‍👧‍👦b🙂 世界 é\u{301}";
        for tokenizer in every_kind() {
            let ids = tokenizer.encode(text, false).unwrap();
            if ids.iter().any(|id| tokenizer.is_special(*id)) {
                continue; // the one without bytes knows no such characters
            }
            assert_eq!(in_pieces(&mut Detokenizer::new(tokenizer.clone(), true), &ids), text);
        }
    }

    static KINDS: std::sync::LazyLock<Vec<Arc<Tokenizer>>> = std::sync::LazyLock::new(every_kind);

    proptest! {
        #[test]
        fn pieces_add_up_to_the_whole_whatever_the_ids(ids in prop::collection::vec(0u32..700, 0..64)) {
            for tokenizer in KINDS.iter() {
                let bytes: Vec<u8> = ids.iter().flat_map(|id| tokenizer.token_bytes(*id).to_vec()).collect();
                let whole = String::from_utf8_lossy(&bytes);
                prop_assert_eq!(in_pieces(&mut Detokenizer::continuing(tokenizer.clone(), false), &ids), whole);
                let whole = tokenizer.decode(&ids, true);
                prop_assert_eq!(in_pieces(&mut Detokenizer::new(tokenizer.clone(), true), &ids), whole);
            }
        }

        #[test]
        fn a_byte_level_text_is_what_the_library_decodes(ids in prop::collection::vec(0u32..300, 0..64)) {
            let tokenizer = byte_level();
            let whole = tokenizer.library().decode(&ids, true).unwrap();
            prop_assert_eq!(in_pieces(&mut Detokenizer::new(tokenizer, true), &ids), whole);
        }
    }
}
