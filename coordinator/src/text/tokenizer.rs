//! Text to token ids and back, over a model's `tokenizer.json` (or what [`super::gguf`] makes of a GGUF file).

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

use super::detokenize::Detokenizer;
use super::error::TextError;
use super::pieces::Pieces;

/// A token with a role, such as `bos_token`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    pub id: u32,
    pub text: String,
}

/// What a checkpoint says about its tokenizer beside the vocabulary.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenizerConfig {
    /// Overrules the tokenizer's own post-processor where given.
    pub add_bos: Option<bool>,
    pub add_eos: Option<bool>,
    /// Texts of the tokens with a role: `bos_token`, `eos_token`, `pad_token`...
    pub names: BTreeMap<String, String>,
    /// Whether a rendered chat gets the begin token when its template wrote none. Hugging Face trusts the template
    /// alone, GGUF files are written for a runtime that adds it.
    pub begin_rendered: bool,
    /// What is done to the ends of a text before all else.
    pub margin: Option<Margin>,
}

/// What sentence-piece models do to the ends of a whole text. The library sees only the parts between added tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Margin {
    /// Spaces at both ends are dropped.
    pub trims: bool,
    /// Characters are mapped first, so that all white space counts as spaces.
    pub maps: bool,
    /// A text that does not begin with a special token gets a space before it.
    pub space_before: bool,
}

impl Margin {
    fn apply(&self, text: &str, special: bool) -> String {
        let space = |letter: char| letter == ' ' || self.maps && letter.is_whitespace();
        let text = if self.trims { text.trim_matches(space) } else { text };
        let before = self.space_before && !special && !text.is_empty();
        format!("{}{text}", if before { " " } else { "" })
    }
}

impl TokenizerConfig {
    /// From the content of `tokenizer_config.json`.
    pub fn from_json(config: &Value) -> TokenizerConfig {
        const ROLES: [&str; 7] =
            ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
        // A token is written as its text, or as an object with the text in `content`.
        let text = |role: &str| config[role].as_str().or_else(|| config[role]["content"].as_str()).map(str::to_string);
        TokenizerConfig {
            add_bos: config["add_bos_token"].as_bool(),
            add_eos: config["add_eos_token"].as_bool(),
            names: ROLES.iter().filter_map(|role| Some((role.to_string(), text(role)?))).collect(),
            begin_rendered: false,
            margin: None,
        }
    }
}

/// What has to be done to the library's encoding at one end so that the checkpoint's wish holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Edge {
    Keep,
    Add(u32),
    Remove,
}

impl Edge {
    fn new(wish: Option<bool>, does: bool, token: Option<&Named>) -> Edge {
        match (wish, does, token) {
            (Some(true), false, Some(token)) => Edge::Add(token.id),
            (Some(false), true, _) => Edge::Remove,
            _ => Edge::Keep,
        }
    }
}

/// Reads the file so that every added token has the id that the file gives it. The library numbers added tokens onwards
/// from the model's vocabulary, which differs where ids were left out; those tokens are then put into the vocabulary.
fn library(bytes: &[u8]) -> Result<tokenizers::Tokenizer, TextError> {
    #[derive(serde::Deserialize)]
    struct Added {
        id: u32,
        content: String,
    }
    #[derive(serde::Deserialize)]
    struct File {
        #[serde(default)]
        added_tokens: Vec<Added>,
        #[serde(default)]
        post_processor: Value,
    }
    let refused = |why: String| TextError::Tokenizer(why);
    let read = |bytes: &[u8]| tokenizers::Tokenizer::from_bytes(bytes).map_err(|why| refused(why.to_string()));
    let file: File = serde_json::from_slice(bytes).map_err(|why| refused(why.to_string()))?;
    check_processor(&file.post_processor)?;
    let library = read(bytes)?;
    if file.added_tokens.iter().all(|token| library.token_to_id(&token.content) == Some(token.id)) {
        return Ok(library);
    }
    let mut json: Value = serde_json::from_slice(bytes).map_err(|why| refused(why.to_string()))?;
    let vocabulary = json["model"]["vocab"].as_object_mut();
    let vocabulary = vocabulary.ok_or_else(|| refused("added tokens whose ids do not follow the vocabulary".into()))?;
    for token in &file.added_tokens {
        vocabulary.entry(token.content.clone()).or_insert(Value::from(token.id));
    }
    let library = read(&serde_json::to_vec(&json).map_err(|why| refused(why.to_string()))?)?;
    match file.added_tokens.iter().find(|token| library.token_to_id(&token.content) != Some(token.id)) {
        None => Ok(library),
        Some(token) => Err(refused(format!("token {:?} has the id {} in the vocabulary too", token.content, token.id))),
    }
}

/// Refuses a template with a special token that it does not define: the library would find out at the first text.
fn check_processor(processor: &Value) -> Result<(), TextError> {
    for inner in processor["processors"].as_array().into_iter().flatten() {
        check_processor(inner)?;
    }
    if processor["type"] != "TemplateProcessing" {
        return Ok(());
    }
    let pieces = ["single", "pair"].into_iter().filter_map(|form| processor[form].as_array()).flatten();
    let ids = pieces.filter_map(|piece| piece["SpecialToken"]["id"].as_str());
    match ids.into_iter().find(|id| processor["special_tokens"].get(id).is_none()) {
        None => Ok(()),
        Some(id) => {
            Err(TextError::Tokenizer(format!("the post-processor's template uses {id:?}, which it does not define")))
        }
    }
}

/// A tokenizer; immutable, shared by all requests.
#[derive(Debug)]
pub struct Tokenizer {
    library: tokenizers::Tokenizer,
    pieces: Pieces,
    names: BTreeMap<String, Named>,
    begin: Edge,
    end: Edge,
    begin_rendered: bool,
    margin: Option<Margin>,
}

impl Tokenizer {
    /// From the bytes of a `tokenizer.json`.
    pub fn from_json(bytes: &[u8], config: &TokenizerConfig) -> Result<Tokenizer, TextError> {
        let mut library = library(bytes)?;
        // Files carry the settings of the training script; a server must neither cut nor pad a prompt.
        library.with_truncation(None).map_err(|why| TextError::Tokenizer(why.to_string()))?;
        library.with_padding(None);

        let pieces = Pieces::new(&library)?;
        let names: BTreeMap<String, Named> = config
            .names
            .iter()
            .filter_map(|(role, text)| {
                let id = library.token_to_id(text)?;
                Some((role.clone(), Named { id, text: text.clone() }))
            })
            .collect();
        let (bos, eos) = (names.get("bos_token"), names.get("eos_token"));

        // What the post-processor puts around a text shows on the empty text.
        let around = library.encode_fast("", true).map_err(|why| TextError::Tokenizer(why.to_string()))?;
        let around = around.get_ids();
        let begins = bos.is_some_and(|bos| around.first() == Some(&bos.id));
        let ends = eos.is_some_and(|eos| around.last() == Some(&eos.id)) && around.len() > usize::from(begins);
        let begin = Edge::new(config.add_bos, begins, bos);
        let end = Edge::new(config.add_eos, ends, eos);
        let adds_begin = matches!(begin, Edge::Add(_)) || begins && begin == Edge::Keep;
        let begin_rendered = config.begin_rendered && adds_begin;
        Ok(Tokenizer { library, pieces, names, begin, end, begin_rendered, margin: config.margin })
    }

    /// The ids of a text. Special tokens written out in it are recognised. With `add_special` the begin and end tokens
    /// are put around it as the checkpoint asks.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        let text = match &self.margin {
            Some(margin) => Cow::Owned(margin.apply(text, self.begins_special(text))),
            None => Cow::Borrowed(text),
        };
        let encoding = self
            .library
            .encode_fast(text.as_ref(), add_special)
            .map_err(|why| TextError::Tokenizer(why.to_string()))?;
        let mut ids = encoding.get_ids().to_vec();
        if !add_special {
            return Ok(ids);
        }
        match self.begin {
            Edge::Keep => {}
            Edge::Add(id) => ids.insert(0, id),
            Edge::Remove => drop(ids.remove(0)),
        }
        match self.end {
            Edge::Keep => {}
            Edge::Add(id) => ids.push(id),
            Edge::Remove => drop(ids.pop()),
        }
        Ok(ids)
    }

    fn begins_special(&self, text: &str) -> bool {
        let added = self.library.get_added_tokens_decoder();
        added.values().any(|token| token.special && text.starts_with(&token.content))
    }

    /// The ids of a chat rendered by its template, which writes its special tokens itself: nothing is put around it,
    /// and a begin token never stands twice.
    pub fn encode_rendered(&self, text: &str) -> Result<Vec<u32>, TextError> {
        let mut ids = self.encode(text, false)?;
        if self.begin_rendered {
            let bos = self.named("bos_token").expect("a tokenizer that adds a begin token has one").id;
            if ids.first() != Some(&bos) {
                ids.insert(0, bos);
            }
        }
        Ok(ids)
    }

    /// The text of ids that stand for themselves; see [`Detokenizer`] for a text that grows.
    pub fn decode(self: &Arc<Tokenizer>, ids: &[u32], skip_special: bool) -> String {
        let mut detokenizer = Detokenizer::new(self.clone(), skip_special);
        let mut text = String::new();
        for id in ids {
            text.push_str(&detokenizer.push(*id).text);
        }
        text.push_str(&detokenizer.flush());
        text
    }

    /// The bytes of one token, possibly a part of a character; empty for an id without a token.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.pieces.bytes(id)
    }

    /// One token as text, broken characters as U+FFFD; what log-probabilities show beside the bytes.
    pub fn token_text(&self, id: u32) -> String {
        String::from_utf8_lossy(self.pieces.bytes(id)).into_owned()
    }

    /// The id of a token spelled as in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.library.token_to_id(token)
    }

    /// The token with a role: `bos_token`, `eos_token`, `pad_token`...
    pub fn named(&self, role: &str) -> Option<&Named> {
        self.names.get(role)
    }

    /// All tokens with a role; chat templates see their texts as variables.
    pub fn names(&self) -> &BTreeMap<String, Named> {
        &self.names
    }

    /// Whether decoding can leave the id out.
    pub fn is_special(&self, id: u32) -> bool {
        self.pieces.is_special(id)
    }

    /// Whether a token has this id. The model's embedding may be larger than the vocabulary.
    pub fn is_token(&self, id: u32) -> bool {
        self.pieces.is_token(id)
    }

    /// One more than the highest id that has a token.
    pub fn vocabulary(&self) -> usize {
        self.pieces.len()
    }

    pub(super) fn pieces(&self) -> &Pieces {
        &self.pieces
    }

    #[cfg(test)]
    pub(super) fn library(&self) -> &tokenizers::Tokenizer {
        &self.library
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_template_that_uses_an_undefined_token_is_refused_by_its_name() {
        for nested in [false, true] {
            let mut file = byte_level_json();
            file["post_processor"]["special_tokens"] = json!({});
            if nested {
                file["post_processor"] = json!({"type": "Sequence", "processors": [file["post_processor"]]});
            }
            let refused = library(file.to_string().as_bytes()).err().map(|why| why.to_string()).unwrap_or_default();
            assert!(refused.contains("\"<s>\""), "{refused}");
        }
    }

    fn special(id: u32, content: &str) -> Value {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    }

    fn config(add_bos: Option<bool>, add_eos: Option<bool>) -> TokenizerConfig {
        let names = [("bos_token", "<s>"), ("eos_token", "</s>")];
        let names = names.map(|(role, text)| (role.to_string(), text.to_string())).into();
        TokenizerConfig { add_bos, add_eos, names, begin_rendered: false, margin: None }
    }

    /// Bytes 0..256, a few merges, `<s>` 300, `</s>` 301, `<|end|>` 302; ids 260..300 are holes. Adds `<s>`.
    pub(in crate::text) fn byte_level_json() -> Value {
        let mut letters: Vec<char> =
            tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
        letters.sort_unstable();
        let mut vocab: serde_json::Map<String, Value> =
            letters.iter().enumerate().map(|(id, letter)| (letter.to_string(), json!(id))).collect();
        for (id, token) in [(256, "he"), (257, "ll"), (258, "hell"), (259, "Ġw")] {
            vocab.insert(token.into(), json!(id));
        }
        json!({
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
            "padding": null,
            "added_tokens": [special(300, "<s>"), special(301, "</s>"), special(302, "<|end|>")],
            "normalizer": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [300], "tokens": ["<s>"]}}},
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": vocab, "merges": [["h", "e"], ["l", "l"], ["he", "ll"], ["Ġ", "w"]]}
        })
    }

    pub(in crate::text) fn byte_level() -> Arc<Tokenizer> {
        let bytes = serde_json::to_vec(&byte_level_json()).unwrap();
        Arc::new(Tokenizer::from_json(&bytes, &config(None, None)).unwrap())
    }

    /// `<unk>` 0, `<s>` 1, `</s>` 2, bytes 3..259, then `▁`, letters and merges of "▁Paris".
    pub(in crate::text) fn sentence_piece() -> Arc<Tokenizer> {
        let mut vocab = serde_json::Map::new();
        for token in ["<unk>", "<s>", "</s>"] {
            vocab.insert(token.into(), json!(vocab.len()));
        }
        for byte in 0..=255u8 {
            vocab.insert(format!("<0x{byte:02X}>"), json!(vocab.len()));
        }
        for token in ["▁", "P", "a", "r", "i", "s", "p", "l", "n", "▁P", "ar", "▁Par", "is", "▁Paris"] {
            vocab.insert(token.into(), json!(vocab.len()));
        }
        let json = json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "pre_tokenizer": null, "post_processor": null,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                "vocab": vocab,
                "merges": [["▁", "P"], ["a", "r"], ["▁P", "ar"], ["i", "s"], ["▁Par", "is"]]}
        });
        Arc::new(Tokenizer::from_json(&serde_json::to_vec(&json).unwrap(), &config(Some(true), None)).unwrap())
    }

    #[test]
    fn the_begin_and_end_tokens_follow_the_checkpoint() {
        let bytes = serde_json::to_vec(&byte_level_json()).unwrap();
        let check = |add_bos, add_eos, expected: &[u32]| {
            let tokenizer = Tokenizer::from_json(&bytes, &config(add_bos, add_eos)).unwrap();
            assert_eq!(tokenizer.encode("hell", true).unwrap(), expected);
            assert_eq!(tokenizer.encode("hell", false).unwrap(), [258]);
            assert_eq!(tokenizer.encode_rendered("<s>hell").unwrap(), [300, 258], "never doubled");
        };
        check(None, None, &[300, 258]);
        check(Some(true), None, &[300, 258]);
        check(Some(false), None, &[258]);
        check(None, Some(true), &[300, 258, 301]);
        check(Some(false), Some(true), &[258, 301]);
        assert_eq!(sentence_piece().encode("Paris", true).unwrap()[0], 1, "added where the file has no post-processor");
    }

    #[test]
    fn a_rendered_chat_without_a_begin_token_gets_one_only_where_the_file_wants_it() {
        let bytes = serde_json::to_vec(&byte_level_json()).unwrap();
        for (begin_rendered, expected) in [(false, &[258][..]), (true, &[300, 258])] {
            let config = TokenizerConfig { begin_rendered, ..config(None, None) };
            let tokenizer = Tokenizer::from_json(&bytes, &config).unwrap();
            assert_eq!(tokenizer.encode_rendered("hell").unwrap(), expected);
        }
        let config = TokenizerConfig { begin_rendered: true, ..config(Some(false), None) };
        assert_eq!(Tokenizer::from_json(&bytes, &config).unwrap().encode_rendered("hell").unwrap(), [258]);
    }

    #[test]
    fn a_files_truncation_does_not_cut_prompts() {
        assert_eq!(byte_level().encode("hello world, a prompt", false).unwrap().len(), 17);
    }

    #[test]
    fn ids_are_bounded_and_holes_have_no_text() {
        let tokenizer = byte_level();
        assert_eq!(tokenizer.vocabulary(), 303);
        assert!(tokenizer.is_token(302) && !tokenizer.is_token(280) && !tokenizer.is_token(303));
        assert!(tokenizer.is_special(301) && !tokenizer.is_special(258) && !tokenizer.is_special(u32::MAX));
        assert_eq!(tokenizer.decode(&[280, 258, 5000, u32::MAX, 300], true), "hell");
        assert_eq!(tokenizer.token_bytes(259), b" w");
        assert_eq!(tokenizer.token_text(tokenizer.encode("é", false).unwrap()[0]), "\u{fffd}");
    }

    #[test]
    fn the_config_reads_tokens_as_text_or_object() {
        let config = TokenizerConfig::from_json(&json!({
            "bos_token": {"content": "<s>", "special": true}, "eos_token": "</s>", "pad_token": null,
            "add_bos_token": true, "add_eos_token": null}));
        assert_eq!((config.add_bos, config.add_eos), (Some(true), None));
        let names: Vec<_> = config.names.iter().map(|(role, text)| (role.as_str(), text.as_str())).collect();
        assert_eq!(names, [("bos_token", "<s>"), ("eos_token", "</s>")]);
    }
}
