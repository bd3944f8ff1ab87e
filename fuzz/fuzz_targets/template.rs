//! A chat template, and (behind a NUL) the messages that it renders.

#![no_main]

use coordinator::text::{ChatTemplate, Conversation};
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};
use std::collections::BTreeMap;

fuzz_target!(|input: &[u8]| {
    let Some((template, messages)) = conclave_fuzz::two_texts(input) else { return };
    let sources = BTreeMap::from([("default".to_string(), template.to_string())]);
    let Ok(template) = ChatTemplate::new(&sources, &BTreeMap::new()) else { return };
    let given = messages.and_then(|text| serde_json::from_str(text).ok());
    let messages = match given {
        Some(Value::Array(messages)) => messages,
        _ => vec![
            json!({"role": "system", "content": "be brief"}),
            json!({"role": "user", "content": [{"type": "text", "text": "hello"}]}),
            json!({"role": "assistant", "content": null, "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]}),
            json!({"role": "tool", "content": "2", "tool_call_id": "c"}),
        ],
    };
    let tool = json!({"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}});
    for (tools, last) in [(None, false), (Some(vec![tool]), true)] {
        let conversation = Conversation {
            messages: messages.clone(),
            tools,
            add_generation_prompt: !last,
            continue_final_message: last,
            now: 1_700_000_000,
            ..Conversation::default()
        };
        let _ = template.render(&conversation);
    }
});
