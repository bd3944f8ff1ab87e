//! Fields that clients of other servers send and that would change the answer, but that are not implemented: refused
//! by name rather than ignored. All other unknown fields are ignored, as OpenAI's clients send many harmless ones.

use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::Fields;

/// Refused whenever it is given.
const ALWAYS: &[&str] = &[
    "allowed_token_ids",
    "audio",
    "bad_words",
    "chat_template",
    "dry_multiplier",
    "function_call",
    "functions",
    "grammar",
    "guided_choice",
    "guided_decoding_backend",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "json_schema",
    "kv_transfer_params",
    "logits_processors",
    "lora",
    "media_io_kwargs",
    "min_completion_tokens",
    "mirostat",
    "mm_processor_kwargs",
    "n_predict",
    "prompt_embeds",
    "prompt_logprobs",
    "repetition_detection",
    "structured_outputs",
    "tfs_z",
    "thinking",
    "thinking_token_budget",
    "top_a",
    "truncate_prompt_tokens",
    "typical_p",
    "verbosity",
    "web_search_options",
    "xtc_probability",
];

/// Accepted only with the value that changes nothing.
fn neutral() -> [(&'static str, Value); 7] {
    [
        ("early_stopping", json!(false)),
        ("length_penalty", json!(1)),
        ("modalities", json!(["text"])),
        ("return_tokens_as_token_ids", json!(false)),
        ("spaces_between_special_tokens", json!(true)),
        ("suffix", json!("")),
        ("use_beam_search", json!(false)),
    ]
}

/// Refuses what would change the answer. `response_format` is refused unless it asks for text.
pub fn check(fields: &mut Fields) -> Result<(), ApiError> {
    if let Some(name) = ALWAYS.iter().find(|name| fields.has(name)) {
        return Err(ApiError::unsupported(*name, format!("`{name}` is not supported")));
    }
    for (name, expected) in neutral() {
        if let Some(given) = fields.take(name) {
            let same = given == expected || given.as_f64().is_some_and(|number| Some(number) == expected.as_f64());
            if !same {
                return Err(ApiError::unsupported(name, format!("`{name}` is not supported but as {expected}")));
            }
        }
    }
    if let Some(format) = fields.object("response_format")? {
        let kind = format.get("type").and_then(Value::as_str).unwrap_or("");
        if kind != "text" {
            let message = format!("`response_format` of type {kind:?} is not supported, only \"text\"");
            return Err(ApiError::unsupported("response_format", message));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neutral_values_pass_and_others_are_named() {
        for (body, param) in [
            (r#"{"length_penalty": 1.0, "use_beam_search": false, "suffix": null, "metadata": {}}"#, None),
            (r#"{"response_format": {"type": "text"}, "guided_json": null}"#, None),
            (r#"{"length_penalty": 1.5}"#, Some("length_penalty")),
            (r#"{"suffix": "x"}"#, Some("suffix")),
            (r#"{"guided_json": {}}"#, Some("guided_json")),
            (r#"{"response_format": {"type": "json_object"}}"#, Some("response_format")),
        ] {
            let result = check(&mut Fields::parse(body.as_bytes(), 100).unwrap());
            match (result, param) {
                (Ok(()), None) => {}
                (Err(ApiError::Unsupported { param: got, .. }), Some(param)) => assert_eq!(got, param),
                (result, _) => panic!("{body}: {result:?}"),
            }
        }
    }
}
