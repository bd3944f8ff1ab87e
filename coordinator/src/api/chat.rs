//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{self, Extension, Request};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::State;
use super::answer::{Choice, Piece, Prompt};
use super::auth::Tenant;
use super::error::ApiError;
use super::fields::{Fields, wrong};
use super::limits;
use super::logprobs;
use super::read_work;
use super::request::Ask;
use super::running::Running;
use super::shape::{Shape, reason, stop_reason, usage};
use super::sse::EventStream;
use super::tokens::{check_text, encode};
use super::trace::RequestId;
use super::unix_seconds;
use crate::text::{Conversation, RenderError, Text};

/// A conversation to render and tokenise.
#[derive(Debug, Clone)]
pub struct Chat {
    conversation: Conversation,
    /// Put the model's special tokens around it; templates usually write them themselves.
    add_special: bool,
    /// About as long as what the template will see.
    bytes: usize,
}

pub async fn create(
    extract::State(state): extract::State<Arc<State>>,
    Extension(RequestId(id)): Extension<RequestId>,
    Extension(tenant): Extension<Tenant>,
    request: Request,
) -> Result<Response, ApiError> {
    let mut fields = read_work(&state, request).await?;
    let mut ask = Ask::read(&mut fields, &state.model)?;
    if ask.tokens_max == Some(0) {
        return Err(ApiError::invalid("max_tokens", "`max_tokens` must be at least 1, got 0"));
    }
    scores(&mut fields, &mut ask)?;
    if fields.flag("echo", false)? {
        return Err(ApiError::unsupported("echo", "`echo` is not supported for chats, only for completions"));
    }
    let chat = Chat::read(&mut fields)?;
    drop(fields);
    state.check_serving()?;
    let tokens = chat.tokens(&state).await?;
    let room = ask.room(tokens.len(), usize::MAX, state.model_len_max())?;
    let mut shape = Shape::new(&state, format!("chatcmpl-{id}"), ask.report, "chat.completion.chunk");
    shape.prompts = if ask.report.token_ids { vec![tokens.clone()] } else { Vec::new() };
    (shape.first, shape.choice) = (first_chunk, chunk_choice);
    let reader = state.text.harmony.map(|harmony| harmony.reader(&state.text.tokenizer, &tokens));
    let prompt = Prompt { tokens, echo: None, scored: false, reader };
    let running = Running::start(&state, &shape.id, &tenant, &ask, vec![prompt], vec![room]).await?;
    if ask.report.stream {
        return Ok(EventStream::new(running, shape).respond());
    }
    whole(running, &shape).await
}

/// Reads `logprobs` and `top_logprobs`.
fn scores(fields: &mut Fields, ask: &mut Ask) -> Result<(), ApiError> {
    let wanted = fields.flag("logprobs", false)?;
    let best = fields.integer("top_logprobs", 0..=limits::LOGPROBS_MAX)?;
    if best.is_some_and(|best| best > 0) && !wanted {
        return Err(ApiError::invalid("top_logprobs", "`top_logprobs` is only allowed when `logprobs` is true"));
    }
    ask.report.logprobs = wanted.then_some(best.unwrap_or(0) as u8);
    ask.sampling.logprobs = ask.report.logprobs;
    Ok(())
}

async fn whole(running: Running, shape: &Shape) -> Result<Response, ApiError> {
    let answers = running.collect().await?;
    let choices = answers.choices.iter().enumerate().map(|(index, choice)| {
        let mut value = json!({
            "index": index,
            "message": message(&shape.id, index, choice),
            "logprobs": shape.report.logprobs.map(|_| logprobs::chat(&shape.tokenizer, &choice.tokens)),
            "finish_reason": reason(&choice.finish),
            "stop_reason": stop_reason(&choice.finish),
        });
        if shape.report.token_ids {
            value["token_ids"] = json!(choice.token_ids());
        }
        value
    });
    let mut body = shape.around("chat.completion", choices.collect());
    body["usage"] = usage(answers.usage);
    if shape.report.token_ids {
        body["prompt_token_ids"] = json!(answers.prompts[0].tokens);
    }
    Ok(Json(body).into_response())
}

/// A whole answer; reasoning and calls are fields of their own where there are any.
fn message(id: &str, index: usize, choice: &Choice) -> Value {
    let mut message = json!({"role": "assistant", "content": choice.text, "refusal": null});
    if !choice.reasoning.is_empty() {
        message["reasoning_content"] = json!(choice.reasoning);
    }
    if !choice.calls.is_empty() {
        let calls = choice.calls.iter().enumerate().map(|(number, (name, arguments))| {
            json!({"id": call_id(id, index, number), "type": "function",
                   "function": {"name": name, "arguments": arguments}})
        });
        message["tool_calls"] = calls.collect();
        if choice.text.is_empty() {
            message["content"] = Value::Null;
        }
    }
    message
}

/// Unique over requests and choices: clients send it back with the call's result.
fn call_id(id: &str, index: usize, number: usize) -> String {
    format!("call-{}-{index}-{number}", id.trim_start_matches("chatcmpl-"))
}

fn delta(id: &str, piece: &Piece) -> Value {
    let mut delta = json!({});
    let silent = piece.reasoning.is_empty() && piece.call.is_none();
    if !piece.text.is_empty() || silent && piece.finish.is_none() {
        delta["content"] = json!(piece.text);
    }
    if !piece.reasoning.is_empty() {
        delta["reasoning_content"] = json!(piece.reasoning);
    }
    if let Some(part) = &piece.call {
        let mut call = json!({"index": part.index, "function": {"arguments": part.arguments}});
        if let Some(name) = &part.name {
            call["id"] = json!(call_id(id, piece.index, part.index as usize));
            call["type"] = json!("function");
            call["function"]["name"] = json!(name);
        }
        delta["tool_calls"] = json!([call]);
    }
    delta
}

/// Every choice begins with its role.
fn first_chunk(shape: &Shape, index: usize) -> Option<Value> {
    let delta = json!({"role": "assistant", "content": ""});
    let choice = json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null});
    let mut chunk = shape.chunk(json!([choice]), Default::default());
    if let Some(prompt) = shape.prompts.first() {
        chunk["prompt_token_ids"] = json!(prompt);
    }
    Some(chunk)
}

fn chunk_choice(shape: &Shape, piece: &Piece) -> Value {
    let scores = shape.report.logprobs.filter(|_| !piece.tokens.is_empty());
    let mut choice = json!({
        "index": piece.index,
        "delta": delta(&shape.id, piece),
        "logprobs": scores.map(|_| logprobs::chat(&shape.tokenizer, &piece.tokens)),
        "finish_reason": reason(&piece.finish),
    });
    if piece.finish.is_some() {
        choice["stop_reason"] = stop_reason(&piece.finish);
    }
    if shape.report.token_ids {
        choice["token_ids"] = piece.tokens.iter().map(|told| told.token).collect();
    }
    choice
}

impl Chat {
    /// Reads the fields that the template sees.
    pub fn read(fields: &mut Fields) -> Result<Chat, ApiError> {
        let Some(messages) = fields.array("messages", limits::MESSAGES_MAX)? else {
            return Err(ApiError::invalid("messages", "`messages` is needed: an array of messages"));
        };
        if messages.is_empty() {
            return Err(ApiError::invalid("messages", "`messages` must hold at least one message"));
        }
        messages.iter().enumerate().try_for_each(|(number, message)| check_message(number, message))?;
        let tools = tools(fields)?;
        let mut extra = fields.object("chat_template_kwargs")?.unwrap_or_default();
        if let Some(effort) = fields.text("reasoning_effort")? {
            extra.insert("reasoning_effort".into(), Value::from(effort));
        }
        let conversation = Conversation {
            messages,
            tools,
            documents: fields.array("documents", limits::TOOLS_MAX)?,
            add_generation_prompt: fields.flag("add_generation_prompt", true)?,
            continue_final_message: fields.flag("continue_final_message", false)?,
            extra,
            now: unix_seconds() as i64,
        };
        Ok(Chat { conversation, add_special: fields.flag("add_special_tokens", false)?, bytes: fields.bytes })
    }

    /// The prompt's tokens.
    pub async fn tokens(self, state: &State) -> Result<Vec<u32>, ApiError> {
        let (text, tokens_max) = (Arc::clone(&state.text), state.model_len_max());
        let tokens = state.text_work(self.bytes, move || self.encode(&text, tokens_max)).await?;
        if tokens.is_empty() {
            return Err(ApiError::invalid("messages", "the prompt has no tokens"));
        }
        Ok(tokens)
    }

    fn encode(&self, text: &Text, tokens_max: usize) -> Result<Vec<u32>, ApiError> {
        let Some(template) = &text.template else {
            let message = "this model has no chat template; use /v1/completions";
            return Err(ApiError::invalid("messages", message));
        };
        let refused = |error: RenderError| ApiError::invalid("messages", format!("the chat template: {error}"));
        let rendered = template.render(&self.conversation).map_err(refused)?;
        check_text(&text.tokenizer, &rendered, tokens_max)?;
        if self.add_special {
            return encode(&text.tokenizer, &rendered, true);
        }
        let failed = |error| ApiError::Failed(format!("the prompt could not be tokenised: {error}"));
        text.tokenizer.encode_rendered(&rendered).map_err(failed)
    }
}

/// Checks what every message must have; the rest is the template's to judge.
fn check_message(number: usize, message: &Value) -> Result<(), ApiError> {
    let name = format!("messages[{number}]");
    if !message.is_object() {
        return Err(wrong(&name, "an object", message));
    }
    match &message["role"] {
        Value::String(role) if !role.is_empty() => {}
        Value::Null => return Err(ApiError::invalid(format!("{name}.role"), format!("`{name}` has no `role`"))),
        other => return Err(wrong(&format!("{name}.role"), "a role's name", other)),
    }
    match &message["content"] {
        Value::String(_) | Value::Array(_) => Ok(()),
        // Only a message that calls tools may be silent.
        Value::Null if message["tool_calls"].is_array() => Ok(()),
        Value::Null => Err(ApiError::invalid(format!("{name}.content"), format!("`{name}` has no `content`"))),
        other => Err(wrong(&format!("{name}.content"), "a string or an array of parts", other)),
    }
}

/// Tools are shown to the template; their calls come back as the model writes them, in the text.
fn tools(fields: &mut Fields) -> Result<Option<Vec<Value>>, ApiError> {
    let tools = fields.array("tools", limits::TOOLS_MAX)?;
    if let Some(bad) = tools.iter().flatten().find(|tool| !tool.is_object()) {
        return Err(wrong("tools", "an array of objects", bad));
    }
    match fields.take("tool_choice") {
        None => Ok(tools),
        Some(Value::String(choice)) if choice == "auto" => Ok(tools),
        Some(Value::String(choice)) if choice == "none" => Ok(None),
        Some(other) => {
            let shown: String = other.to_string().chars().take(60).collect();
            let message = format!("`tool_choice` may be \"auto\" or \"none\"; {shown} cannot be enforced");
            Err(ApiError::unsupported("tool_choice", message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::harness::{Script, Server};
    use super::*;

    fn ask(more: &str) -> String {
        format!(r#"{{"model":"tiny","messages":[{{"role":"user","content":"hi"}}]{more}}}"#)
    }

    const PATH: &str = "/v1/chat/completions";

    #[tokio::test]
    async fn a_chat_is_answered_whole() {
        let server = Server::start(Script::Say("héy")).await;
        let reply = server.send("POST", PATH, "x-request-id: mine\r\n", ask("").as_bytes()).await;
        assert_eq!((reply.status, reply.header("x-request-id")), (200, Some("mine")));
        let body = reply.json();
        assert_eq!(body["id"], "chatcmpl-mine");
        assert_eq!((&body["object"], &body["system_fingerprint"]), (&json!("chat.completion"), &json!("fp_test")));
        let choice = &body["choices"][0];
        assert_eq!(choice["message"], json!({"role": "assistant", "content": "héy", "refusal": null}));
        assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &Value::Null));
        let prompt = "user:hi\n>".len();
        let expected = json!({"prompt_tokens": prompt, "completion_tokens": 5, "total_tokens": prompt + 5,
                              "prompt_tokens_details": {"cached_tokens": 2}});
        assert_eq!(body["usage"], expected);
        let job = server.jobs.lock().unwrap()[0].clone();
        assert_eq!((job.tokens_max, job.sampling.temperature), (64 - prompt as u32, 0.7), "all the room, the default");
    }

    #[tokio::test]
    async fn a_stream_is_the_same_answer_in_pieces() {
        let server = Server::start(Script::Say("héy")).await;
        let options = r#","stream":true,"n":2,"stream_options":{"include_usage":true}"#;
        let mut chunks = server.post(PATH, &ask(options)).await.chunks();
        let usage = chunks.pop().unwrap();
        assert_eq!((&usage["choices"], &usage["usage"]["completion_tokens"]), (&json!([]), &json!(10)));
        for index in 0..2 {
            let mine: Vec<&Value> = chunks.iter().map(|c| &c["choices"][0]).filter(|c| c["index"] == index).collect();
            assert_eq!(mine[0]["delta"], json!({"role": "assistant", "content": ""}));
            let text: String = mine.iter().filter_map(|c| c["delta"]["content"].as_str()).collect();
            assert_eq!(text, "héy");
            let reasons: Vec<&Value> = mine.iter().map(|c| &c["finish_reason"]).filter(|r| !r.is_null()).collect();
            assert_eq!(reasons, [&json!("stop")], "one terminal chunk a choice");
        }
        assert!(chunks.iter().all(|chunk| chunk["usage"].is_null() && chunk["object"] == "chat.completion.chunk"));
    }

    #[tokio::test]
    async fn scores_and_token_ids_are_told_on_demand() {
        let server = Server::start(Script::Say("hé")).await;
        let options = r#","logprobs":true,"top_logprobs":2,"return_token_ids":true,"max_tokens":2"#;
        let body = server.post(PATH, &ask(options)).await.json();
        let choice = &body["choices"][0];
        assert_eq!((&choice["token_ids"], &choice["finish_reason"]), (&json!([104, 0xC3]), &json!("length")));
        assert_eq!(choice["message"]["content"], "h\u{fffd}", "half a character is not lost silently");
        assert_eq!(body["prompt_token_ids"].as_array().unwrap().len(), "user:hi\n>".len());
        let content = &choice["logprobs"]["content"];
        assert_eq!(content[0]["bytes"], json!([104]));
        assert_eq!(content[0]["top_logprobs"].as_array().unwrap().len(), 2);
        assert_eq!(content[0]["top_logprobs"][1], json!({"token": "b", "logprob": -1.5, "bytes": [98]}));

        let chunks = server.post(PATH, &ask(&format!(r#"{options},"stream":true"#))).await.chunks();
        assert_eq!(chunks[0]["prompt_token_ids"], body["prompt_token_ids"]);
        let ids: Vec<Value> =
            chunks.iter().filter_map(|chunk| chunk["choices"][0]["token_ids"].as_array().cloned()).flatten().collect();
        assert_eq!(json!(ids), choice["token_ids"]);
    }

    #[tokio::test]
    async fn a_stop_string_ends_the_answer_and_the_job() {
        let server = Server::start(Script::Say("one two three")).await;
        for (options, text) in [
            (r#","stop":" tw""#, "one"),
            (r#","stop":["x","o t"],"include_stop_str_in_output":true"#, "one two t"),
            (r#","stop":"n","min_tokens":5"#, "one two three"),
            (r#","stop":"four""#, "one two three"),
        ] {
            let body = server.post(PATH, &ask(options)).await.json();
            assert_eq!(body["choices"][0]["message"]["content"], text, "{options}");
            assert_eq!(body["choices"][0]["finish_reason"], "stop");
            let chunks = server.post(PATH, &ask(&format!(r#"{options},"stream":true"#))).await.chunks();
            let streamed: String = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
            assert_eq!(streamed, text, "{options}");
        }
        let body = server.post(PATH, &ask(r#","stop_token_ids":[101]"#)).await.json();
        assert_eq!(
            (&body["choices"][0]["message"]["content"], &body["choices"][0]["stop_reason"]),
            (&json!("on"), &json!(101))
        );
    }

    #[tokio::test]
    async fn a_failure_midway_is_the_last_event_of_a_stream() {
        let server = Server::start(Script::Break(Refusal::Failed("rank 3 is lost".into()))).await;
        let events = server.post(PATH, &ask(r#","stream":true"#)).await.events();
        let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
        assert_eq!(last["error"]["message"], "rank 3 is lost");
        assert!(!events.contains(&"[DONE]".to_string()));
        assert_eq!(server.post(PATH, &ask("")).await.status, 500);
    }

    use crate::schedule::job::Refusal;

    #[tokio::test]
    async fn a_client_that_leaves_cancels_its_job() {
        let mut server = Server::start(Script::Hang).await;
        for stream in ["true", "false"] {
            let body = ask(&format!(r#","stream":{stream}"#));
            let socket = server.open("POST", PATH, "x-request-id: gone\r\n", body.as_bytes()).await;
            // The job runs before the client leaves.
            while server.jobs.lock().unwrap().is_empty() {
                tokio::task::yield_now().await;
            }
            drop(socket);
            assert_eq!(server.cancelled.recv().await.as_deref(), Some("chatcmpl-gone"), "stream {stream}");
            server.jobs.lock().unwrap().clear();
        }
    }

    #[tokio::test]
    async fn messages_reach_the_template_as_it_expects_them() {
        let server = Server::start(Script::Say("")).await;
        let parts = r#"{"messages":[{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}],
                        "tools":[{"type":"function"}],"tool_choice":"none"}"#;
        assert_eq!(server.post(PATH, parts).await.status, 200);
        let prompt: Vec<u8> = server.jobs.lock().unwrap()[0].prompt.iter().map(|&t| t as u8).collect();
        assert_eq!(prompt, b"user:a\nb\n>");
    }
}
