//! The tokenizer inside a GGUF file, rewritten as the `tokenizer.json` that it was made from.
//!
//! Two kinds exist among the models served here. `gpt2` is byte-level BPE: tokens, merges, and the *name* of the
//! regular expressions that cut a text into words ([`super::words`]). `llama` is a sentence-piece vocabulary: the file has
//! scores instead of merges, the pair with the best-scored union is joined first, so the merges are listed by that score.

use std::collections::BTreeMap;

use model::gguf::Value as Metadata;
use serde_json::Value;

use super::assemble::{self, Added, ByteLevel, Sentence, SpaceBefore};
use super::error::TextError;
use super::pieces::byte_level_bytes;
use super::tokenizer::{Tokenizer, TokenizerConfig};
use super::words;

/// Token types of `tokenizer.ggml.token_type`.
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// Control tokens that end an answer whatever the file's `eos_token_id`: families use one to end a turn and another to
/// end a text, and name only one of them.
const END_TEXTS: [&str; 12] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
];

/// The tokenizer keys of a file's metadata, checked.
struct Vocabulary<'a> {
    metadata: &'a BTreeMap<String, Metadata>,
    tokens: Vec<String>,
    types: Vec<i64>,
}

/// Builds the tokenizer and its configuration.
pub fn tokenizer(metadata: &BTreeMap<String, Metadata>) -> Result<(Tokenizer, TokenizerConfig), TextError> {
    let vocabulary = Vocabulary::new(metadata)?;
    let (json, config) = match vocabulary.text("model")? {
        "gpt2" => vocabulary.byte_level()?,
        "llama" => vocabulary.sentence_piece()?,
        other => return Err(bad("model", other, "the kinds gpt2 and llama are read")),
    };
    let bytes = serde_json::to_vec(&json).map_err(|why| TextError::Tokenizer(why.to_string()))?;
    Ok((Tokenizer::from_json(&bytes, &config)?, config))
}

/// The ids that end an answer, ascending.
pub fn end_tokens(metadata: &BTreeMap<String, Metadata>) -> Result<Vec<u32>, TextError> {
    let vocabulary = Vocabulary::new(metadata)?;
    let mut ends: Vec<u32> =
        ["eos", "eot", "eom"].iter().filter_map(|role| vocabulary.id(&format!("{role}_token_id"))).collect();
    let control: BTreeMap<&str, u32> = (0u32..)
        .zip(&vocabulary.tokens)
        .filter(|(id, _)| vocabulary.types[*id as usize] == CONTROL)
        .map(|(id, text)| (text.as_str(), id))
        .collect();
    // In the harmony format `<|end|>` ends a message, not the answer.
    let harmony = control.contains_key("<|return|>") && control.contains_key("<|call|>");
    ends.extend(END_TEXTS.iter().filter(|text| !(harmony && **text == "<|end|>")).filter_map(|text| control.get(text)));
    ends.sort_unstable();
    ends.dedup();
    Ok(ends)
}

/// The chat templates: the default one under `""`, others by name.
pub fn templates(metadata: &BTreeMap<String, Metadata>) -> BTreeMap<String, String> {
    let prefix = "tokenizer.chat_template";
    metadata
        .range(prefix.to_string()..)
        .take_while(|(key, _)| key.starts_with(prefix))
        .filter_map(|(key, value)| {
            let name = &key[prefix.len()..];
            let name = if name.is_empty() { name } else { name.strip_prefix('.')? };
            Some((name.to_string(), value.as_text()?.to_string()))
        })
        .collect()
}

fn bad(key: &str, value: impl ToString, why: &str) -> TextError {
    let key = format!("tokenizer.ggml.{key}");
    model::SpecError::Bad { key, value: value.to_string(), why: why.to_string() }.into()
}

fn missing(key: &str) -> TextError {
    model::SpecError::Missing { key: format!("tokenizer.ggml.{key}") }.into()
}

impl<'a> Vocabulary<'a> {
    fn new(metadata: &'a BTreeMap<String, Metadata>) -> Result<Vocabulary<'a>, TextError> {
        let mut vocabulary = Vocabulary { metadata, tokens: Vec::new(), types: Vec::new() };
        let listed = vocabulary.list("tokens")?.ok_or_else(|| missing("tokens"))?;
        for (id, token) in listed.iter().enumerate() {
            let token = token.as_text().ok_or_else(|| bad("tokens", format!("{token:?}"), "tokens are strings"))?;
            // An empty token keeps its id under a name that no text contains by accident.
            let token = if token.is_empty() { format!("[EMPTY_{id}]") } else { token.to_string() };
            vocabulary.tokens.push(token);
        }
        let count = vocabulary.tokens.len();
        vocabulary.types = match vocabulary.list("token_type")? {
            None => vec![1; count],
            Some(types) => types.iter().map(|kind| kind.as_i64().unwrap_or(1)).collect(),
        };
        if vocabulary.types.len() < count {
            return Err(bad("token_type", vocabulary.types.len(), &format!("fewer than the {count} tokens")));
        }
        Ok(vocabulary)
    }

    fn get(&self, key: &str) -> Option<&'a Metadata> {
        self.metadata.get(&format!("tokenizer.ggml.{key}"))
    }

    fn text(&self, key: &str) -> Result<&'a str, TextError> {
        let value = self.get(key).ok_or_else(|| missing(key))?;
        value.as_text().ok_or_else(|| bad(key, format!("{value:?}"), "not a string"))
    }

    fn list(&self, key: &str) -> Result<Option<&'a [Metadata]>, TextError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_list().map(Some).ok_or_else(|| bad(key, "no list", "a list is expected"))
    }

    fn flag(&self, key: &str) -> Option<bool> {
        self.get(key).and_then(Metadata::as_bool)
    }

    /// A token id of the metadata, where it is given and is a token.
    fn id(&self, key: &str) -> Option<u32> {
        let id = u32::try_from(self.get(key)?.as_u64()?).ok()?;
        ((id as usize) < self.tokens.len()).then_some(id)
    }

    /// Texts to ids. Two tokens with one text could not be told apart, so they are refused.
    fn ids(&self) -> Result<BTreeMap<&str, u32>, TextError> {
        let mut ids = BTreeMap::new();
        for (id, token) in (0u32..).zip(&self.tokens) {
            if let Some(other) = ids.insert(token.as_str(), id) {
                return Err(bad("tokens", format!("{token:?}"), &format!("stands at {other} and at {id}")));
            }
        }
        Ok(ids)
    }

    fn config(&self, add_bos: bool, defaults: [(&str, Option<u32>); 3]) -> TokenizerConfig {
        let mut names = BTreeMap::new();
        let keys = [
            ("bos_token", "bos_token_id"),
            ("eos_token", "eos_token_id"),
            ("unk_token", "unknown_token_id"),
            ("pad_token", "padding_token_id"),
            ("sep_token", "seperator_token_id"),
        ];
        for (role, key) in keys {
            let default = defaults.iter().find(|(name, _)| *name == role).and_then(|(_, id)| *id);
            let id = self.id(key).or(default.filter(|id| (*id as usize) < self.tokens.len()));
            if let Some(id) = id {
                names.insert(role.to_string(), self.tokens[id as usize].clone());
            }
        }
        TokenizerConfig {
            add_bos: Some(self.flag("add_bos_token").unwrap_or(add_bos)),
            add_eos: Some(self.flag("add_eos_token").unwrap_or(false)),
            names,
            begin_rendered: true,
            margin: None,
        }
    }

    /// Tokens that are found in a text before anything else.
    fn added(&self) -> Vec<Added> {
        let added = (0u32..).zip(&self.tokens).zip(&self.types);
        added
            .filter(|(_, kind)| matches!(**kind, UNKNOWN | CONTROL | USER_DEFINED))
            .map(|((id, text), kind)| Added { id, text: text.clone(), special: *kind != USER_DEFINED })
            .collect()
    }

    fn byte_level(&self) -> Result<(Value, TokenizerConfig), TextError> {
        let ids = self.ids()?;
        let pre = self.get("pre").and_then(Metadata::as_text).unwrap_or("default");
        let words = words::named(pre).ok_or_else(|| bad("pre", pre, "no such way to cut words is known"))?;
        let merges = match self.list("merges")? {
            Some(merges) => listed_merges(merges, &ids)?,
            // Families made with ranks are sometimes written without merges: an id is its token's rank.
            None if words.ranked => self.merges_by_rank()?,
            None => return Err(missing("merges")),
        };
        let json = ByteLevel {
            vocabulary: ids.iter().map(|(text, id)| (text.to_string(), *id)).collect(),
            merges,
            patterns: words.patterns,
            whole_words: words.whole_words,
            space_before: self.flag("add_space_prefix").unwrap_or(false),
            added: self.added(),
        };
        let names = [("bos_token", None), ("eos_token", None), ("unk_token", None)];
        Ok((json.json(), self.config(words.adds_begin, names)))
    }

    fn merges_by_rank(&self) -> Result<Vec<[String; 2]>, TextError> {
        let letters = byte_level_bytes();
        let plain = (0u32..).zip(&self.tokens).zip(&self.types);
        let plain = plain.filter(|(_, kind)| !matches!(**kind, UNKNOWN | CONTROL | USER_DEFINED));
        let tokens: Vec<(Vec<u8>, u32)> = plain
            .filter_map(|((id, text), _)| {
                Some((text.chars().map(|letter| letters.get(&letter).copied()).collect::<Option<_>>()?, id))
            })
            .collect();
        assemble::merges_by_rank(&tokens)
    }

    fn sentence_piece(&self) -> Result<(Value, TokenizerConfig), TextError> {
        let ids = self.ids()?;
        let scores = self.list("scores")?.ok_or_else(|| missing("scores"))?;
        if scores.len() < self.tokens.len() {
            return Err(bad("scores", scores.len(), &format!("fewer than the {} tokens", self.tokens.len())));
        }
        let made: Vec<(f64, &str)> = (self.tokens.iter().zip(&self.types).zip(scores))
            .filter(|((_, kind), _)| !matches!(**kind, UNKNOWN | CONTROL))
            .map(|((token, _), score)| (score.as_f64().unwrap_or(f64::NEG_INFINITY), token.as_str()))
            .collect();
        let merges = assemble::merges_by_score(&made, &ids);
        let config = self.config(true, [("bos_token", Some(1)), ("eos_token", Some(2)), ("unk_token", Some(0))]);
        let json = Sentence {
            model: assemble::sentence_bpe(&ids, &merges, config.names.get("unk_token").map(String::as_str)),
            normalizers: Vec::new(),
            space_before: match self.flag("add_space_prefix") {
                Some(false) => SpaceBefore::Nothing,
                _ => SpaceBefore::Parts,
            },
            added: self.added(),
        };
        Ok((json.json(), config))
    }
}

/// The merges of a file, in order; those of or into something that is no token could never happen and are left out.
fn listed_merges(listed: &[Metadata], ids: &BTreeMap<&str, u32>) -> Result<Vec<[String; 2]>, TextError> {
    let mut merges = Vec::with_capacity(listed.len());
    for merge in listed {
        let merge = merge.as_text().ok_or_else(|| bad("merges", format!("{merge:?}"), "merges are strings"))?;
        // The space between the parts is not the first character: a part may begin with one.
        let first = merge.chars().next().map_or(0, char::len_utf8);
        let Some(space) = merge[first..].find(' ').map(|at| at + first) else { continue };
        let (left, right) = (&merge[..space], &merge[space + 1..]);
        let union = format!("{left}{right}");
        if [left, right, &union].iter().all(|token| ids.contains_key(*token)) {
            merges.push([left.to_string(), right.to_string()]);
        }
    }
    Ok(merges)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn texts(items: &[&str]) -> Metadata {
        Metadata::List(items.iter().map(|text| Metadata::Text(text.to_string())).collect())
    }

    fn file(pairs: Vec<(&str, Metadata)>) -> BTreeMap<String, Metadata> {
        pairs.into_iter().map(|(key, value)| (format!("tokenizer.{key}"), value)).collect()
    }

    fn byte_level(pre: &str) -> BTreeMap<String, Metadata> {
        file(vec![
            ("ggml.model", Metadata::Text("gpt2".into())),
            ("ggml.pre", Metadata::Text(pre.into())),
            ("ggml.tokens", texts(&["<|im_start|>", "<|im_end|>", "<|eot|>", "1", "2", "12", "a", "Ġ", "Ġa", "<u>"])),
            ("ggml.token_type", Metadata::List([3, 3, 3, 1, 1, 1, 1, 1, 1, 4].map(Metadata::I64).to_vec())),
            ("ggml.merges", texts(&["1 2", "Ġ a", "no token"])),
            ("ggml.bos_token_id", Metadata::U64(0)),
            ("ggml.eos_token_id", Metadata::U64(1)),
            ("ggml.eot_token_id", Metadata::U64(2)),
            ("chat_template", Metadata::Text("plain".into())),
            ("chat_template.tool_use", Metadata::Text("tools".into())),
        ])
    }

    fn sentence_piece() -> BTreeMap<String, Metadata> {
        let mut tokens = vec!["<unk>".to_string(), "<s>".into(), "</s>".into()];
        tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
        let pieces = [("▁", -9.0), ("a", -9.0), ("b", -9.0), ("ab", -2.0), ("▁a", -1.0), ("bb", -3.0)];
        tokens.extend(pieces.map(|(piece, _)| piece.to_string()));
        let mut types = vec![2, 3, 3];
        types.extend([6; 256]);
        types.extend([1; 6]);
        let mut scores = vec![0.0; 259];
        scores.extend(pieces.map(|(_, score)| score));
        let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
        file(vec![
            ("ggml.model", Metadata::Text("llama".into())),
            ("ggml.tokens", texts(&tokens)),
            ("ggml.token_type", Metadata::List(types.into_iter().map(Metadata::I64).collect())),
            ("ggml.scores", Metadata::List(scores.into_iter().map(Metadata::F64).collect())),
        ])
    }

    #[test]
    fn the_named_pre_tokenizer_decides_how_words_are_cut() {
        let encode = |pre: &str| tokenizer(&byte_level(pre)).unwrap().0.encode("12 a<u>", true).unwrap();
        assert_eq!(encode("smollm"), [3, 4, 8, 9], "digits stand alone");
        assert_eq!(encode("gpt-2"), [5, 8, 9]);
        assert_eq!(encode("llama-bpe"), [0, 5, 8, 9], "this family begins with the begin token");
        let error = tokenizer(&byte_level("martian")).unwrap_err().to_string();
        assert!(error.contains("martian"), "{error}");
    }

    #[test]
    fn control_tokens_are_special_and_user_defined_ones_are_text() {
        let (tokenizer, config) = tokenizer(&byte_level("gpt-2")).unwrap();
        let tokenizer = Arc::new(tokenizer);
        assert_eq!(tokenizer.decode(&[0, 6, 9, 1], true), "a<u>");
        assert_eq!(config.names["eos_token"], "<|im_end|>");
        assert_eq!(end_tokens(&byte_level("gpt-2")).unwrap(), [1, 2]);
        let templates = templates(&byte_level("gpt-2"));
        assert_eq!((templates[""].as_str(), templates["tool_use"].as_str()), ("plain", "tools"));
    }

    #[test]
    fn scores_decide_which_pair_is_joined_first() {
        let tokenizer = Arc::new(tokenizer(&sentence_piece()).unwrap().0);
        let names = |text: &str, special| -> Vec<String> {
            let ids = tokenizer.encode(text, special).unwrap();
            ids.iter().map(|id| tokenizer.token_text(*id)).collect()
        };
        // "▁a" scores better than "ab".
        assert_eq!(names("ab", true), ["<s>", " a", "b"]);
        assert_eq!(names("bab", false), [" ", "b", "ab"]);
        assert_eq!(names("abbb", false), [" a", "bb", "b"]);
        let ids = tokenizer.encode("é", false).unwrap();
        assert_eq!(ids[1..], [3 + 0xc3, 3 + 0xa9], "unknown characters are spelled in bytes");
        assert_eq!(tokenizer.decode(&tokenizer.encode(" a é", false).unwrap(), true), " a é");
        assert_eq!(end_tokens(&sentence_piece()).unwrap(), [] as [u32; 0]);
    }

    #[test]
    fn a_broken_vocabulary_is_refused_by_its_key() {
        let check = |key: &str, value: Option<Metadata>, expected: &str| {
            let mut metadata = byte_level("gpt-2");
            match value {
                Some(value) => metadata.insert(format!("tokenizer.ggml.{key}"), value),
                None => metadata.remove(&format!("tokenizer.ggml.{key}")),
            };
            let error = tokenizer(&metadata).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check("tokens", None, "tokens");
        check("tokens", Some(texts(&["a", "a"])), "stands at 0 and at 1");
        check("token_type", Some(Metadata::List(vec![])), "token_type");
        check("merges", None, "merges");
        check("model", Some(Metadata::Text("bert".into())), "bert");
        check("model", None, "model");
    }
}
