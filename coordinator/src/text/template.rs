//! Chat templates: a conversation to the prompt a model was trained on. Jinja, with the surroundings that Hugging Face's
//! libraries give it, because the templates are written against those.
//!
//! A template is data from a model's author and the conversation comes from anyone, so rendering is bounded: steps and
//! bytes cost fuel, and the recursion is limited. Rendering still takes its time; call it off the reactor.

use std::collections::BTreeMap;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value as JinjaValue};
use minijinja::{Environment, Error, ErrorKind, State};
use serde_json::{Map, Value, json};

use super::clock::strftime;
use super::error::TextError;
use super::json::{Style, dumps};
use super::tokenizer::Named;

/// Fuel of one render: a step costs one, 64 bytes written or read cost one. A conversation of a megabyte takes some
/// 100,000; a template that loops without end is stopped within a second.
const FUEL: u64 = 4_000_000;
/// Calls within calls. Real templates nest three or four macros; the stack of a server thread bears this many.
const RECURSION_MAX: usize = 64;
/// Where a request's own source text ends.
const SOURCE_BYTES_MAX: usize = 1 << 20;

/// Why a conversation was not rendered. All but `Limit` are the words of the template or the engine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RenderError {
    /// The template's own objection to the conversation (`raise_exception`): the client's mistake.
    #[error("{0}")]
    Refused(String),
    /// A message that no template could take: the client's mistake.
    #[error("{0}")]
    Message(String),
    /// The template does not bear this conversation.
    #[error("the chat template failed: {0}")]
    Failed(String),
    #[error("rendering the chat template took more than {FUEL} steps")]
    Limit,
}

/// A conversation to render.
#[derive(Debug, Clone, Default)]
pub struct Conversation {
    /// In the form of the chat API: `role`, `content` (text or a list of text parts), `tool_calls`...
    pub messages: Vec<Value>,
    /// Tools in the form of the chat API.
    pub tools: Option<Vec<Value>>,
    pub documents: Option<Vec<Value>>,
    /// Ends the prompt with the beginning of the assistant's answer.
    pub add_generation_prompt: bool,
    /// Ends the prompt inside the last message, which the answer continues.
    pub continue_final_message: bool,
    /// Further variables (`chat_template_kwargs`). They overrule nothing that is named above.
    pub extra: Map<String, Value>,
    /// Seconds since 1970, for templates that write the date.
    pub now: i64,
}

/// The chat templates of a model.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Texts of `bos_token` and the like.
    tokens: BTreeMap<String, String>,
    /// Whether the default template reads lists of content parts; otherwise they are joined to one text.
    pub(super) reads_parts: bool,
}

const DEFAULT: &str = "default";
/// The template that is used when a request brings tools, where a model has one.
const TOOL_USE: &str = "tool_use";
/// Marks the cut of a message to continue. A private-use character: no template takes it for white space.
const CUT: &str = "\u{f8ff}conclave-cut\u{f8ff}";

impl ChatTemplate {
    /// From templates by name, one of them `default` (or `""`). `names` are the tokenizer's tokens with a role.
    pub fn new(sources: &BTreeMap<String, String>, names: &BTreeMap<String, Named>) -> Result<ChatTemplate, TextError> {
        let mut environment = environment();
        for (name, source) in sources {
            if source.len() > SOURCE_BYTES_MAX {
                let length = source.len();
                return Err(TextError::Template(format!("{length} bytes, at most {SOURCE_BYTES_MAX} are read")));
            }
            let name = if name.is_empty() { DEFAULT } else { name };
            environment
                .add_template_owned(name.to_string(), without_generation_marks(source))
                .map_err(|why| TextError::Template(format!("{name}: {}", chain(&why))))?;
        }
        if environment.get_template(DEFAULT).is_err() {
            return Err(TextError::Template(format!("none of {:?} is the default one", sources.keys())));
        }
        let tokens = names.iter().map(|(role, named)| (role.clone(), named.text.clone())).collect();
        let mut template = ChatTemplate { environment, tokens, reads_parts: true };
        template.reads_parts = template.probe_parts();
        Ok(template)
    }

    /// Renders a conversation to the prompt's text.
    pub fn render(&self, conversation: &Conversation) -> Result<String, RenderError> {
        let mut messages =
            conversation.messages.iter().map(|message| self.message(message)).collect::<Result<Vec<_>, _>>()?;
        if conversation.continue_final_message {
            mark_cut(&mut messages)?;
        }
        let mut context = conversation.extra.clone();
        for (role, text) in &self.tokens {
            context.insert(role.clone(), json!(text));
        }
        context.insert("messages".into(), Value::Array(messages));
        context.insert("tools".into(), json!(conversation.tools));
        context.insert("documents".into(), json!(conversation.documents));
        let prompts = conversation.add_generation_prompt && !conversation.continue_final_message;
        context.insert("add_generation_prompt".into(), json!(prompts));

        let name = match conversation.tools {
            Some(_) if self.environment.get_template(TOOL_USE).is_ok() => TOOL_USE,
            _ => DEFAULT,
        };
        let text = match self.evaluate(name, &context, conversation.now) {
            // Clients send a silent message's content as null, which some templates do not bear.
            Err(RenderError::Failed(_)) if fill_silent(&mut context) => self.evaluate(name, &context, conversation.now),
            outcome => outcome,
        }?;
        if !conversation.continue_final_message {
            return Ok(text);
        }
        let cut = text.rfind(CUT);
        let cut =
            cut.ok_or_else(|| RenderError::Message("the template does not show the message to continue".into()))?;
        Ok(text[..cut].to_string())
    }

    fn evaluate(&self, name: &str, context: &Map<String, Value>, now: i64) -> Result<String, RenderError> {
        let template = self.environment.get_template(name).map_err(failed)?;
        let mut values: Vec<(String, JinjaValue)> =
            context.iter().map(|(key, value)| (key.clone(), JinjaValue::from(Serde(value)))).collect();
        let clock = move |format: &str| strftime(format, now);
        values.push(("strftime_now".into(), JinjaValue::from_function(clock)));
        template.render(JinjaValue::from_pairs(values)).map_err(failed)
    }

    /// A message as the template gets it: parts joined where it wants text, tool arguments as data.
    fn message(&self, message: &Value) -> Result<Value, RenderError> {
        let Some(fields) = message.as_object() else {
            return Err(RenderError::Message(format!("a message must be an object, not {message}")));
        };
        let mut fields = fields.clone();
        if let Some(Value::Array(parts)) = fields.get("content") {
            let texts = parts.iter().map(part_text).collect::<Result<Vec<_>, _>>()?;
            let content = if self.reads_parts {
                texts.iter().map(|text| json!({"type": "text", "text": text})).collect()
            } else {
                Value::String(texts.join("\n"))
            };
            fields.insert("content".into(), content);
        }
        if let Some(Value::Array(calls)) = fields.get_mut("tool_calls") {
            calls.iter_mut().for_each(parse_arguments);
        }
        // Templates read an answer's reasoning under one of three names.
        let aliases =
            [("reasoning", "reasoning_content"), ("reasoning_content", "reasoning"), ("reasoning", "thinking")];
        for (from, to) in aliases {
            if let (Some(reasoning), None) = (fields.get(from).cloned(), fields.get(to)) {
                fields.insert(to.into(), reasoning);
            }
        }
        Ok(Value::Object(fields))
    }

    /// Whether a list of parts comes out as its text. A template made for texts either fails or prints the list.
    fn probe_parts(&self) -> bool {
        let probe = "conclave-probe";
        let conversation = Conversation {
            messages: vec![json!({"role": "user", "content": [{"type": "text", "text": probe}]})],
            ..Conversation::default()
        };
        match self.render(&conversation) {
            Ok(text) => text.contains(probe) && !text.contains("'text'") && !text.contains("\"text\""),
            Err(_) => false,
        }
    }
}

/// The text of a content part; other kinds are refused.
fn part_text(part: &Value) -> Result<String, RenderError> {
    let kind = part["type"].as_str().unwrap_or("without a type");
    match (&part["text"], part) {
        (Value::String(text), _) if matches!(kind, "text" | "input_text" | "output_text") => Ok(text.clone()),
        (_, Value::String(text)) => Ok(text.clone()),
        _ => Err(RenderError::Message(format!("a content part {kind:?} is not text, and this model reads text only"))),
    }
}

/// The chat API carries a call's arguments as JSON text; templates print them, so they must be data.
fn parse_arguments(call: &mut Value) {
    let Some(arguments) = call.pointer_mut("/function/arguments") else { return };
    let Some(text) = arguments.as_str() else { return };
    if text.trim().is_empty() {
        *arguments = json!({});
    } else if let Ok(parsed @ Value::Object(_)) = serde_json::from_str(text) {
        *arguments = parsed;
    }
}

/// Gives messages without content an empty one; false where there is none.
fn fill_silent(context: &mut Map<String, Value>) -> bool {
    let mut filled = false;
    for message in context.get_mut("messages").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(content @ Value::Null) = message.get_mut("content") {
            *content = Value::String(String::new());
            filled = true;
        }
    }
    filled
}

/// Puts the mark at the end of the last message's text.
fn mark_cut(messages: &mut [Value]) -> Result<(), RenderError> {
    let last = messages.last_mut();
    let content = last.ok_or_else(|| RenderError::Message("there is no message to continue".into()))?;
    let text = match &mut content["content"] {
        Value::Array(parts) => parts.last_mut().map(|part| &mut part["text"]),
        content => Some(content),
    };
    match text {
        Some(Value::String(text)) => text.push_str(CUT),
        _ => return Err(RenderError::Message("the message to continue has no text".into())),
    }
    Ok(())
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("the default delimiters are valid"));
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(RECURSION_MAX);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    // The engine counts `none` among what can be iterated, Jinja does not; templates ask before they take a length.
    environment.add_test("iterable", |value: &JinjaValue| !value.is_none() && value.try_iter().is_ok());
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", raise_exception);
    environment
}

/// A template's own refusal, told apart from failures of the engine.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(text: String) -> Result<JinjaValue, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Raised(text)))
}

/// `tojson` as chat templates know it: `json.dumps` with its keyword arguments, nothing escaped for HTML.
fn tojson(state: &State<'_, '_>, value: &JinjaValue, args: Kwargs) -> Result<JinjaValue, Error> {
    let indent: Option<JinjaValue> = args.get("indent")?;
    let indent = match indent.filter(|indent| !indent.is_none()) {
        None => None,
        Some(indent) => match indent.as_str() {
            Some(text) => Some(text.to_string()),
            None => Some(" ".repeat(indent.as_usize().unwrap_or(0).min(64))),
        },
    };
    let mut style = Style::new(indent);
    style.ensure_ascii = args.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    style.sort_keys = args.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let separators: Option<Vec<String>> = args.get("separators")?;
    if let Some(separators) = separators {
        let [item, key] = separators.try_into().map_err(|given: Vec<String>| {
            Error::new(ErrorKind::InvalidOperation, format!("{} separators, two are needed", given.len()))
        })?;
        (style.item_separator, style.key_separator) = (item, key);
    }
    args.assert_all_used()?;
    let text = dumps(value, &style)?;
    state.consume_fuel(text.len() as u64 / 16)?;
    Ok(JinjaValue::from(text))
}

/// Training frameworks mark the assistant's part with `{% generation %}`, which renders as its content. The marks become a
/// condition that always holds, so that their white-space control keeps working.
fn without_generation_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(begin) = rest.find("{%") {
        // From behind the opening: `{%}` is no tag.
        let Some(length) = rest[begin + 2..].find("%}") else { break };
        let (tag, end) = (&rest[begin + 2..][..length], begin + 2 + length);
        let control = |letter: char| letter == '-' || letter == '+';
        let word = tag.trim_start_matches(control).trim_end_matches(control).trim();
        let replacement = match word {
            "generation" => "if true",
            "endgeneration" => "endif",
            // Move on by the opening only: the found end may belong to a string inside a longer tag.
            _ => {
                out.push_str(&rest[..begin + 2]);
                rest = &rest[begin + 2..];
                continue;
            }
        };
        out.push_str(&rest[..begin + 2]);
        out.push_str(&tag.replacen(word, replacement, 1));
        rest = &rest[end..];
    }
    out + rest
}

fn failed(error: Error) -> RenderError {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(cause) = source {
        if let Some(Raised(text)) = cause.downcast_ref() {
            return RenderError::Refused(text.clone());
        }
        if cause.downcast_ref::<Error>().is_some_and(|error| error.kind() == ErrorKind::OutOfFuel) {
            return RenderError::Limit;
        }
        source = cause.source();
    }
    RenderError::Failed(chain(&error))
}

/// An error with its causes, in one line.
fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> ChatTemplate {
        let names = [("bos_token".to_string(), Named { id: 1, text: "<s>".into() })];
        ChatTemplate::new(&[(String::new(), source.to_string())].into(), &names.into()).unwrap()
    }

    fn say(content: Value) -> Conversation {
        Conversation { messages: vec![json!({"role": "user", "content": content})], ..Conversation::default() }
    }

    fn render(source: &str, conversation: &Conversation) -> Result<String, RenderError> {
        template(source).render(conversation)
    }

    const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + \
        '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    #[test]
    fn a_conversation_becomes_the_prompt() {
        let mut conversation = say(json!("Hi <b>"));
        assert_eq!(render(CHATML, &conversation).unwrap(), "<|im_start|>user\nHi <b><|im_end|>\n");
        conversation.add_generation_prompt = true;
        let prompt = render(CHATML, &conversation).unwrap();
        assert_eq!(prompt, "<|im_start|>user\nHi <b><|im_end|>\n<|im_start|>assistant\n");
    }

    #[test]
    fn parts_are_joined_for_templates_that_read_text() {
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let joined = render(CHATML, &say(parts.clone())).unwrap();
        assert_eq!(joined, "<|im_start|>user\na\nb<|im_end|>\n");
        let lists = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}\
            {% for part in m.content %}[{{ part.text }}]{% endfor %}{% endif %}{% endfor %}";
        assert_eq!(render(lists, &say(parts)).unwrap(), "[a][b]");
        let image = say(json!([{"type": "image_url", "image_url": {"url": "x"}}]));
        let error = render(CHATML, &image).unwrap_err();
        assert!(matches!(&error, RenderError::Message(text) if text.contains("image_url")), "{error}");
    }

    #[test]
    fn a_templates_objection_reaches_the_client_as_it_is() {
        let source = "{% macro no(what) %}{{ raise_exception('no ' ~ what) }}{% endmacro %}{{ no('systems') }}";
        assert_eq!(render(source, &say(json!(""))).unwrap_err(), RenderError::Refused("no systems".into()));
        let error = render("{{ messages[0].content.nothing.more }}", &say(json!(""))).unwrap_err();
        assert!(matches!(error, RenderError::Failed(_)), "{error}");
    }

    #[test]
    fn blocks_are_trimmed_and_tokens_tools_and_extras_are_variables() {
        let source = "{{ bos_token }}\n  {% if tools %}\nT{{ tools | tojson }}\n  {% endif %}\n{{ enable_thinking }}";
        let mut conversation = say(json!(""));
        conversation.tools = Some(vec![json!({"name": "<f>", "n": 1.0})]);
        conversation.extra.insert("enable_thinking".into(), json!("yes"));
        conversation.extra.insert("bos_token".into(), json!("forged"));
        let expected = "<s>\nT[{\"name\": \"<f>\", \"n\": 1.0}]\nyes";
        assert_eq!(render(source, &conversation).unwrap(), expected);
        conversation.tools = None;
        assert_eq!(render(source, &conversation).unwrap(), "<s>\nyes");
    }

    #[test]
    fn json_takes_pythons_keywords() {
        let check = |arguments: &str, expected: &str| {
            let source = format!("{{{{ {{'b': 'é', 'a': [1]}} | tojson({arguments}) }}}}");
            assert_eq!(render(&source, &say(json!(""))).unwrap(), expected);
        };
        check("", "{\"b\": \"é\", \"a\": [1]}");
        check("ensure_ascii=true, sort_keys=true", "{\"a\": [1], \"b\": \"\\u00e9\"}");
        check("indent=1", "{\n \"b\": \"é\",\n \"a\": [\n  1\n ]\n}");
        check("separators=(',', ':')", "{\"b\":\"é\",\"a\":[1]}");
    }

    #[test]
    fn tool_arguments_arrive_as_data_and_reasoning_under_both_names() {
        let source = "{% for m in messages %}{{ m.reasoning_content }}{% for c in m.tool_calls %}\
            {% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}{% endfor %}{% endfor %}";
        let call = json!({"function": {"name": "f", "arguments": "{\"x\": 1, \"y\": \"z\"}"}});
        let message = json!({"role": "assistant", "content": null, "reasoning": "hm ", "tool_calls": [call]});
        let conversation = Conversation { messages: vec![message], ..Conversation::default() };
        assert_eq!(render(source, &conversation).unwrap(), "hm x=1;y=z;");
    }

    #[test]
    fn a_silent_message_is_null_where_the_template_bears_it() {
        let silent = json!({"role": "assistant", "content": null, "tool_calls": []});
        let conversation = Conversation { messages: vec![silent], ..Conversation::default() };
        assert_eq!(render("{{ messages[0].content is none }}", &conversation).unwrap(), "True");
        assert_eq!(render("[{{ messages[0].content.strip() }}]", &conversation).unwrap(), "[]");
    }

    #[test]
    fn generation_marks_render_as_their_content() {
        let source = "a\n{%- generation -%}\n b {{ '{% generation %}' }}\n{%- endgeneration %}\nc";
        assert_eq!(without_generation_marks("{% if x %}{%generation%}"), "{% if x %}{%if true%}");
        assert_eq!(without_generation_marks("{%}{%-generation-%}"), "{%}{%-if true-%}");
        assert_eq!(without_generation_marks("{%%}{%generation%}"), "{%%}{%if true%}");
        let text = render(source, &say(json!(""))).unwrap();
        assert!(text.starts_with("ab ") && text.ends_with("c"), "{text:?}");
    }

    #[test]
    fn the_last_message_can_be_continued() {
        let mut conversation = say(json!("Hi"));
        conversation.messages.push(json!({"role": "assistant", "content": "Sure, "}));
        conversation.continue_final_message = true;
        conversation.add_generation_prompt = true;
        let prompt = render(CHATML, &conversation).unwrap();
        assert_eq!(prompt, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nSure, ");
        conversation.messages.clear();
        assert!(matches!(render(CHATML, &conversation), Err(RenderError::Message(_))));
    }

    #[test]
    fn the_tool_template_is_used_when_there_are_tools() {
        let sources = [("default", "plain"), ("tool_use", "tools")];
        let sources = sources.map(|(name, source)| (name.to_string(), source.to_string()));
        let template = ChatTemplate::new(&sources.into(), &BTreeMap::new()).unwrap();
        let mut conversation = say(json!(""));
        assert_eq!(template.render(&conversation).unwrap(), "plain");
        conversation.tools = Some(vec![]);
        assert_eq!(template.render(&conversation).unwrap(), "tools");
    }

    #[test]
    fn the_date_is_the_requests() {
        let conversation = Conversation { now: 1_709_210_096, ..say(json!("")) };
        assert_eq!(render("{{ strftime_now('%d %b %Y') }}", &conversation).unwrap(), "29 Feb 2024");
    }

    #[test]
    fn a_hostile_template_is_stopped() {
        let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
        let doubling =
            "{% set ns = namespace(x='aaaaaaaa') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}";
        let writing = "{% for a in range(99999) %}{{ messages[0].content * 1000 }}{% endfor %}";
        for source in [endless, doubling, writing] {
            assert_eq!(render(source, &say(json!("x".repeat(100)))).unwrap_err(), RenderError::Limit, "{source}");
        }
        let recursing = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}";
        assert!(matches!(render(recursing, &say(json!(""))), Err(RenderError::Failed(_))));
    }

    #[test]
    fn a_template_that_does_not_parse_is_refused_at_load() {
        let sources = [(String::new(), "{% if %}".to_string())].into();
        let error = ChatTemplate::new(&sources, &BTreeMap::new()).unwrap_err().to_string();
        assert!(error.contains("default"), "{error}");
    }
}
