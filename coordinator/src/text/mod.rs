//! Text work, off the path between steps: tokens, chat templates, stop strings. [`Text::load`] reads what a model's directory
//! or GGUF file says about all of it.
//!
//! ```text
//! conversation -- template --> prompt text -- tokenizer --> ids ... ids -- detokenize --> text -- stop --> answer
//! ```

pub mod assemble;
pub mod clock;
pub mod detokenize;
pub mod error;
pub mod gguf;
#[cfg(test)]
mod golden;
pub mod harmony;
pub mod json;
pub mod pieces;
pub mod sentencepiece;
pub mod stop;
pub mod tekken;
pub mod template;
#[cfg(test)]
mod template_cases;
pub mod tiktoken;
pub mod tokenizer;
pub mod varint;
pub mod vocabulary;
pub mod words;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use model::SpecError;
use serde_json::Value;

pub use detokenize::Detokenizer;
pub use error::TextError;
pub use harmony::Harmony;
pub use stop::StopStrings;
pub use template::{ChatTemplate, Conversation, RenderError};
pub use tokenizer::{Tokenizer, TokenizerConfig};

/// What a model's author recommends for sampling; a server's defaults where a request is silent.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SamplingDefaults {
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
}

/// Everything about a model's text.
#[derive(Debug)]
pub struct Text {
    pub tokenizer: Arc<Tokenizer>,
    /// Base models have none; chats are then refused.
    pub template: Option<ChatTemplate>,
    /// Ids that end an answer, ascending; may be empty.
    pub end_tokens: Vec<u32>,
    pub defaults: SamplingDefaults,
    /// Set where answers are written in channels.
    pub harmony: Option<Harmony>,
}

impl Text {
    /// From a directory in the layout of Hugging Face, or a `.gguf` file. `template` is a Jinja file that is used in place of
    /// the model's own. Blocks: reads files, builds tables (seconds for the largest vocabularies).
    pub fn load(model: &Path, template: Option<&Path>) -> Result<Text, TextError> {
        let own = template.map(own_template).transpose()?;
        if model.is_dir() { Text::from_directory(model, own) } else { Text::from_gguf(model, own) }
    }

    fn from_directory(directory: &Path, own: Option<Sources>) -> Result<Text, TextError> {
        let config = json_file(&directory.join("tokenizer_config.json"))?.unwrap_or(Value::Null);
        let spec = json_file(&directory.join("config.json"))?.unwrap_or(Value::Null);
        let tokenizer = vocabulary::tokenizer(directory, &config, &spec)?;
        let sources = own.map_or_else(|| templates(directory, &config), Ok)?;
        let generation = json_file(&directory.join("generation_config.json"))?.unwrap_or(Value::Null);
        let end_tokens = end_tokens(&generation, &spec, &tokenizer);
        Text::new(tokenizer, sources, end_tokens, defaults(&generation))
    }

    fn from_gguf(path: &Path, own: Option<Sources>) -> Result<Text, TextError> {
        let metadata = gguf_metadata(path)?;
        let (tokenizer, _) = gguf::tokenizer(&metadata)?;
        let mut sources = own.unwrap_or_else(|| gguf::templates(&metadata));
        if !sources.contains_key("") && !sources.contains_key("default") {
            sources.clear();
        }
        let end_tokens = gguf::end_tokens(&metadata)?;
        Text::new(tokenizer, sources, end_tokens, SamplingDefaults::default())
    }

    fn new(
        tokenizer: Tokenizer,
        mut sources: Sources,
        mut end_tokens: Vec<u32>,
        defaults: SamplingDefaults,
    ) -> Result<Text, TextError> {
        let harmony = Harmony::of(&tokenizer);
        if let Some(harmony) = &harmony {
            end_tokens.extend(harmony.end_tokens());
            end_tokens.sort_unstable();
            end_tokens.dedup();
            if sources.is_empty() {
                sources.insert("default".into(), harmony::TEMPLATE.into());
            }
        }
        let template = if sources.is_empty() { None } else { Some(ChatTemplate::new(&sources, tokenizer.names())?) };
        Ok(Text { tokenizer: Arc::new(tokenizer), template, end_tokens, defaults, harmony })
    }
}

/// Chat templates by name.
type Sources = BTreeMap<String, String>;

/// The template of a file that was named.
fn own_template(path: &Path) -> Result<Sources, TextError> {
    let missing = || TextError::read(path, std::io::ErrorKind::NotFound.into());
    Ok([("default".to_string(), text_file(path)?.ok_or_else(missing)?)].into())
}

/// The metadata of a GGUF file, read from its head: the tensors behind it may be a hundred times larger than memory.
fn gguf_metadata(path: &Path) -> Result<BTreeMap<String, model::gguf::Value>, TextError> {
    let mut file = std::fs::File::open(path).map_err(|source| TextError::read(path, source))?;
    let mut head = Vec::new();
    let mut wanted = 16 << 20;
    loop {
        let before = head.len() as u64;
        file.by_ref().take(wanted - before).read_to_end(&mut head).map_err(|source| TextError::read(path, source))?;
        match model::gguf::file::parse(&head) {
            Ok(gguf) => return Ok(gguf.metadata),
            Err(SpecError::Truncated { wanted: least, .. }) if head.len() as u64 == wanted => {
                wanted = least.max(wanted * 2);
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// A file's bytes; none where there is no such file.
fn bytes_file(path: &Path) -> Result<Option<Vec<u8>>, TextError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(TextError::read(path, error)),
    }
}

fn json_file(path: &Path) -> Result<Option<Value>, TextError> {
    let Some(bytes) = bytes_file(path)? else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(|why| TextError::json(path, why))
}

fn text_file(path: &Path) -> Result<Option<String>, TextError> {
    let Some(bytes) = bytes_file(path)? else { return Ok(None) };
    String::from_utf8(bytes).map(Some).map_err(|why| TextError::Template(format!("{}: {why}", path.display())))
}

/// The chat templates of a directory. A file of its own wins over one inside a configuration.
fn templates(directory: &Path, config: &Value) -> Result<Sources, TextError> {
    let mut sources = BTreeMap::new();
    named_templates(&config["chat_template"], &mut sources);
    if let Some(value) = json_file(&directory.join("chat_template.json"))? {
        named_templates(&value["chat_template"], &mut sources);
    }
    if let Some(source) = text_file(&directory.join("chat_template.jinja"))? {
        sources.insert("default".into(), source);
    }
    if let Some(source) = text_file(&directory.join("additional_chat_templates").join("tool_use.jinja"))? {
        sources.insert("tool_use".into(), source);
    }
    // Named templates without a default one: the request's kind cannot choose, so the first is the default.
    if let (Some(first), false) = (sources.values().next().cloned(), sources.contains_key("default")) {
        sources.insert("default".into(), first);
    }
    Ok(sources)
}

/// One template, or a list of named ones.
fn named_templates(value: &Value, sources: &mut Sources) {
    if let Some(source) = value.as_str() {
        sources.insert("default".into(), source.into());
    }
    for entry in value.as_array().into_iter().flatten() {
        if let (Some(name), Some(source)) = (entry["name"].as_str(), entry["template"].as_str()) {
            sources.insert(name.into(), source.into());
        }
    }
}

/// The ids that end an answer: those of `generation_config.json`, else of `config.json`, and the tokenizer's own.
fn end_tokens(generation: &Value, spec: &Value, tokenizer: &Tokenizer) -> Vec<u32> {
    let ids = |value: &Value| -> Vec<u32> {
        let list = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        list.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()).collect()
    };
    let given = [&generation["eos_token_id"], &spec["eos_token_id"], &spec["text_config"]["eos_token_id"]];
    let mut ends = given.into_iter().map(ids).find(|ids| !ids.is_empty()).unwrap_or_default();
    ends.extend(tokenizer.named("eos_token").map(|eos| eos.id));
    ends.sort_unstable();
    ends.dedup();
    ends
}

fn defaults(generation: &Value) -> SamplingDefaults {
    let float = |key: &str| generation[key].as_f64().map(|number| number as f32);
    SamplingDefaults {
        temperature: float("temperature"),
        top_p: float("top_p"),
        top_k: generation["top_k"].as_u64().and_then(|number| u32::try_from(number).ok()),
        min_p: float("min_p"),
        repetition_penalty: float("repetition_penalty"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A directory of its own for one test, removed at its end.
    struct Directory(std::path::PathBuf);

    impl Directory {
        fn new(name: &str, files: &[(&str, String)]) -> Directory {
            let path = std::env::temp_dir().join(format!("conclave-text-{}-{name}", std::process::id()));
            for (file, content) in files {
                let file = path.join(file);
                std::fs::create_dir_all(file.parent().unwrap()).unwrap();
                std::fs::write(file, content).unwrap();
            }
            Directory(path)
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn tokenizer_json() -> (&'static str, String) {
        ("tokenizer.json", tokenizer::tests::byte_level_json().to_string())
    }

    #[test]
    fn a_directory_tells_tokens_template_ends_and_defaults() {
        let directory = Directory::new(
            "whole",
            &[
                tokenizer_json(),
                (
                    "tokenizer_config.json",
                    json!({"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ bos_token }}{{ messages[0].content }}"})
                        .to_string(),
                ),
                (
                    "generation_config.json",
                    json!({"eos_token_id": [302, 301], "temperature": 0.5, "top_k": 20, "do_sample": true}).to_string(),
                ),
                ("config.json", json!({"eos_token_id": 7}).to_string()),
            ],
        );
        let text = Text::load(&directory.0, None).unwrap();
        assert_eq!(text.end_tokens, [301, 302]);
        let expected = SamplingDefaults { temperature: Some(0.5), top_k: Some(20), ..SamplingDefaults::default() };
        assert_eq!(text.defaults, expected);
        let messages = vec![json!({"role": "user", "content": "hell"})];
        let conversation = Conversation { messages, ..Conversation::default() };
        let prompt = text.template.as_ref().unwrap().render(&conversation).unwrap();
        assert_eq!(text.tokenizer.encode_rendered(&prompt).unwrap(), [300, 258]);
    }

    #[test]
    fn all_requests_share_one_text() {
        fn check<T: Send + Sync + 'static>() {}
        check::<Text>();
        check::<Detokenizer>();
        check::<StopStrings>();
    }

    #[test]
    fn a_template_file_wins_and_a_bare_directory_has_none() {
        let config = json!({"chat_template": [{"name": "default", "template": "listed"}, {"name": "tool_use", "template": "t"}]});
        let render = |directory: &Directory, tools: Option<Vec<Value>>| {
            let text = Text::load(&directory.0, None).unwrap();
            text.template.unwrap().render(&Conversation { tools, ..Conversation::default() }).unwrap()
        };
        let listed = Directory::new("listed", &[tokenizer_json(), ("tokenizer_config.json", config.to_string())]);
        assert_eq!((render(&listed, None), render(&listed, Some(vec![]))), ("listed".into(), "t".into()));
        let files = [
            tokenizer_json(),
            ("tokenizer_config.json", config.to_string()),
            ("chat_template.jinja", "of a file".to_string()),
        ];
        assert_eq!(render(&Directory::new("file", &files), None), "of a file");
        let other = listed.0.join("own.jinja");
        std::fs::write(&other, "of a flag").unwrap();
        let text = Text::load(&listed.0, Some(&other)).unwrap();
        assert_eq!(text.template.unwrap().render(&Conversation::default()).unwrap(), "of a flag");
        let error = Text::load(&listed.0, Some(&listed.0.join("missing"))).unwrap_err().to_string();
        assert!(error.contains("missing"), "{error}");
        let bare = Directory::new("bare", &[tokenizer_json(), ("config.json", json!({"eos_token_id": 7}).to_string())]);
        let text = Text::load(&bare.0, None).unwrap();
        assert!(text.template.is_none());
        assert_eq!(text.end_tokens, [7]);
    }

    #[test]
    fn a_directory_without_a_tokenizer_says_so() {
        let directory = Directory::new("empty", &[("config.json", "{}".into())]);
        let error = Text::load(&directory.0, None).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
        let broken = Directory::new("broken", &[tokenizer_json(), ("generation_config.json", "{".into())]);
        assert!(matches!(Text::load(&broken.0, None), Err(TextError::Json { .. })));
    }
}
