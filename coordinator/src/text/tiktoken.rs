//! Vocabularies as lines of `<base64 of the token's bytes> <rank>`: `tiktoken.model` (Kimi), the `tokenizer.model` of Llama 3's
//! original release, `qwen.tiktoken`.
//!
//! Such a file holds neither the expressions that cut words nor the special tokens; both are the family's, which the
//! configuration beside it names.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::Value;

use super::assemble::{Added, ByteLevel, merges_by_rank, spelled};
use super::error::TextError;
use super::words;

/// What a family adds to its ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Family {
    pattern: &'static str,
    /// Special tokens follow the ranks: those that have a name of their own, in order.
    named: &'static [&'static str],
    /// So many ids follow the ranks; those without a name are called so, with a number in place of `#`.
    reserved: u32,
    reserved_name: &'static str,
    /// What stands for `#`: the id, or the count of names missing so far.
    numbered_by_id: bool,
    pub adds_begin: bool,
    /// Roles where no configuration names them.
    pub names: &'static [(&'static str, &'static str)],
}

const KIMI: Family = Family {
    pattern: words::KIMI,
    named: &[],
    reserved: 256,
    reserved_name: "<|reserved_token_#|>",
    numbered_by_id: true,
    adds_begin: false,
    names: &[("bos_token", "[BOS]"), ("eos_token", "[EOS]")],
};

const LLAMA3: Family = Family {
    pattern: words::LLAMA3,
    // An empty name is a reserved one.
    named: &[
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "",
        "",
        "<|finetune_right_pad_id|>",
        "",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
    ],
    reserved: 256,
    reserved_name: "<|reserved_special_token_#|>",
    numbered_by_id: false,
    adds_begin: true,
    names: &[("bos_token", "<|begin_of_text|>"), ("eos_token", "<|eot_id|>")],
};

const QWEN: Family = Family {
    pattern: words::QWEN2,
    named: &["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    reserved: 208,
    reserved_name: "<|extra_#|>",
    numbered_by_id: false,
    adds_begin: false,
    names: &[("eos_token", "<|endoftext|>")],
};

/// Families whose specials only a configuration tells.
const O200K: Family = Family {
    pattern: words::GPT4O,
    named: &[],
    reserved: 0,
    reserved_name: "",
    numbered_by_id: true,
    adds_begin: false,
    names: &[],
};

impl Family {
    /// The family of a directory: by its tokenizer's class, else by the model's kind. `file` is the vocabulary's name.
    pub fn of(file: &str, config: &Value, spec: &Value) -> Result<Family, TextError> {
        let class = config["tokenizer_class"].as_str().unwrap_or("");
        let text = &spec["text_config"]["model_type"];
        let kind = text.as_str().or(spec["model_type"].as_str()).unwrap_or("");
        let outer = spec["model_type"].as_str().unwrap_or("");
        if class == "TikTokenTokenizer" || outer.starts_with("kimi") || kind.starts_with("kimi") {
            return Ok(KIMI);
        }
        match (class, kind) {
            ("QWenTokenizer", _) | (_, "qwen") => Ok(QWEN),
            (_, "llama" | "mllama" | "mllama_text_model") => Ok(LLAMA3),
            (_, "gpt_oss") => Ok(O200K),
            (_, "llama4" | "llama4_text") => Ok(Family { adds_begin: true, ..O200K }),
            _ if file == "qwen.tiktoken" => Ok(QWEN),
            // No other published family calls its file so.
            _ if file == "tiktoken.model" => Ok(KIMI),
            _ => Err(TextError::Tokenizer(format!(
                "{file} holds tokens without the way to cut words, and none is known for the tokenizer class {class:?} of the \
                 model type {kind:?}"
            ))),
        }
    }

    /// The special tokens: those given, and the family's for the ids after `ranks` that are still free.
    fn specials(&self, ranks: u32, given: &[Added]) -> Vec<Added> {
        let mut specials = given.to_vec();
        let mut unnamed = 0;
        for index in 0..self.reserved {
            let id = ranks + index;
            let name = self.named.get(index as usize).filter(|name| !name.is_empty());
            let number = if self.numbered_by_id { id } else { unnamed };
            unnamed += u32::from(name.is_none());
            if specials.iter().any(|token| token.id == id) {
                continue;
            }
            let text = match name {
                Some(name) => name.to_string(),
                None => self.reserved_name.replace('#', &number.to_string()),
            };
            specials.push(Added { id, text, special: true });
        }
        specials.sort_by_key(|token| token.id);
        specials
    }
}

/// Whether bytes are a rank file: lines of base64 and a number. A sentence-piece model may have the same name.
pub fn is_ranks(bytes: &[u8]) -> bool {
    let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or(&[]);
    std::str::from_utf8(line).is_ok_and(|line| entry(line).is_some())
}

fn entry(line: &str) -> Option<(Vec<u8>, u32)> {
    let (token, rank) = line.trim_end().split_once(' ')?;
    Some((BASE64_STANDARD.decode(token).ok()?, rank.parse().ok()?))
}

/// The file as a `tokenizer.json`. `given` are the special tokens of the configuration.
pub fn json(bytes: &[u8], family: &Family, given: &[Added]) -> Result<Value, TextError> {
    let text =
        std::str::from_utf8(bytes).map_err(|why| TextError::Tokenizer(format!("the ranks are not text: {why}")))?;
    let mut tokens = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let entry = entry(line).ok_or_else(|| {
            TextError::Tokenizer(format!("line {} is no base64 token and rank: {line:?}", number + 1))
        })?;
        tokens.push(entry);
    }
    let ranks = tokens.iter().map(|(_, rank)| rank + 1).max().unwrap_or(0);
    let added = family.specials(ranks, given);
    let merges = merges_by_rank(&tokens)?;
    let vocabulary = tokens.iter().map(|(bytes, rank)| (spelled(bytes), *rank)).collect();
    Ok(ByteLevel { vocabulary, merges, patterns: &[family.pattern], whole_words: true, space_before: false, added }
        .json())
}

#[cfg(test)]
pub(in crate::text) mod tests {
    use super::*;
    use crate::text::tokenizer::{Tokenizer, TokenizerConfig};
    use serde_json::json;
    use std::sync::Arc;

    /// Single bytes 0..256 and then `words`.
    pub fn ranks(words: &[&[u8]]) -> Vec<u8> {
        let bytes: Vec<[u8; 1]> = (0..=255).map(|byte| [byte]).collect();
        let tokens = bytes.iter().map(|byte| byte.as_slice()).chain(words.iter().copied());
        let line = |(rank, token): (usize, &[u8])| format!("{} {rank}\n", BASE64_STANDARD.encode(token));
        tokens.enumerate().map(line).collect::<String>().into_bytes()
    }

    pub fn tokenizer() -> Arc<Tokenizer> {
        let file = ranks(&[b"he", b"ll", b"hell", b" w", "世".as_bytes(), b"abcdef"]);
        let given = [Added { id: 263, text: "[EOS]".into(), special: true }];
        let json = super::json(&file, &KIMI, &given).unwrap();
        let config = TokenizerConfig::default();
        Arc::new(Tokenizer::from_json(&serde_json::to_vec(&json).unwrap(), &config).unwrap())
    }

    #[test]
    fn ranks_order_the_merges_and_whole_words_need_none() {
        let tokenizer = tokenizer();
        assert_eq!(tokenizer.encode("hello w", false).unwrap(), [258, u32::from(b'o'), 259]);
        assert_eq!(tokenizer.encode("世", false).unwrap(), [260]);
        assert_eq!(tokenizer.encode("abcdef", false).unwrap(), [261], "no chain of merges makes it");
    }

    #[test]
    fn reserved_ids_have_names_and_given_ones_stay() {
        let tokenizer = tokenizer();
        assert_eq!(tokenizer.token_id("[EOS]"), Some(263));
        assert_eq!(tokenizer.token_id("<|reserved_token_262|>"), Some(262));
        assert_eq!(tokenizer.vocabulary(), 262 + 256);
        assert_eq!(tokenizer.encode("a[EOS]", false).unwrap(), [u32::from(b'a'), 263]);
        let llama = LLAMA3.specials(128_000, &[]);
        let name = |id: usize| llama[id - 128_000].text.as_str();
        assert_eq!((name(128_002), name(128_005)), ("<|reserved_special_token_0|>", "<|reserved_special_token_2|>"));
        assert_eq!((name(128_009), name(128_011)), ("<|eot_id|>", "<|reserved_special_token_3|>"));
        assert_eq!((llama.len(), name(128_255)), (256, "<|reserved_special_token_247|>"));
        let qwen = QWEN.specials(151_643, &[]);
        assert_eq!((qwen[2].text.as_str(), qwen[207].text.as_str()), ("<|im_end|>", "<|extra_204|>"));
    }

    #[test]
    fn the_family_is_named_by_the_configuration_or_an_error() {
        let of = |file: &str, class: &str, kind: &str| {
            Family::of(file, &json!({"tokenizer_class": class}), &json!({"model_type": kind}))
        };
        assert_eq!(of("tiktoken.model", "TikTokenTokenizer", "deepseek_v3").unwrap(), KIMI);
        assert_eq!(of("tokenizer.model", "", "llama").unwrap(), LLAMA3);
        assert_eq!(of("qwen.tiktoken", "", "").unwrap(), QWEN);
        let error = of("x.tiktoken", "MartianTokenizer", "martian").unwrap_err().to_string();
        assert!(error.contains("MartianTokenizer") && error.contains("martian"), "{error}");
    }

    #[test]
    fn a_broken_line_is_named() {
        assert!(is_ranks(&ranks(&[])) && !is_ranks(b"\x0a\x05<unk>") && !is_ranks(b""));
        let error = json(b"IQ== 0\nnonsense\n", &KIMI, &[]).unwrap_err().to_string();
        assert!(error.contains("line 2"), "{error}");
        let error = json(b"IQ== 0\nIQ== 1\n", &KIMI, &[]).unwrap_err().to_string();
        assert!(error.contains("ranks 0 and 1"), "{error}");
    }
}
