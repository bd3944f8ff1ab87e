//! `POST /v1/completions`: a prompt as text or as token ids, or several of either.

use std::sync::Arc;

use axum::Json;
use axum::extract::{self, Extension, Request};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::State;
use super::answer::{Piece, Prompt};
use super::auth::Tenant;
use super::error::ApiError;
use super::fields::{self, Fields, wrong};
use super::limits;
use super::logprobs;
use super::read_work;
use super::request::Ask;
use super::running::Running;
use super::shape::{Shape, reason, stop_reason, usage};
use super::sse::EventStream;
use super::tokens::{check_text, encode};
use super::trace::RequestId;

/// OpenAI's own default.
const TOKENS_DEFAULT: usize = 16;

/// A prompt as it was sent.
#[derive(Debug, Clone, PartialEq)]
enum Given {
    Text(String),
    Tokens(Vec<u32>),
}

pub async fn create(
    extract::State(state): extract::State<Arc<State>>,
    Extension(RequestId(id)): Extension<RequestId>,
    Extension(tenant): Extension<Tenant>,
    request: Request,
) -> Result<Response, ApiError> {
    let mut fields = read_work(&state, request).await?;
    let mut ask = Ask::read(&mut fields, &state.model)?;
    scores(&mut fields, &mut ask)?;
    check_best_of(&mut fields, &ask)?;
    let add_special = fields.flag("add_special_tokens", true)?;
    let given = given(&mut fields, state.model.vocabulary)?;
    if given.len() * ask.choices as usize > limits::CHOICES_MAX {
        let (prompts, most) = (given.len(), limits::CHOICES_MAX);
        let message = format!("{prompts} prompts with `n` = {} make more than {most} answers", ask.choices);
        return Err(ApiError::invalid("n", message));
    }
    drop(fields);
    state.check_serving()?;
    let prompts = prompts(&state, given, add_special, &ask).await?;
    let room = |prompt: &Prompt| ask.room(prompt.tokens.len(), TOKENS_DEFAULT, state.model_len_max());
    let rooms = prompts.iter().map(room).collect::<Result<_, _>>()?;
    let mut shape = Shape::new(&state, format!("cmpl-{id}"), ask.report, "text_completion");
    shape.choice = chunk_choice;
    if ask.report.token_ids {
        let each = |prompt: &Prompt| std::iter::repeat_n(prompt.tokens.clone(), ask.choices as usize);
        shape.prompts = prompts.iter().flat_map(each).collect();
        shape.first = first_chunk;
    }
    let running = Running::start(&state, &shape.id, &tenant, &ask, prompts, rooms).await?;
    if ask.report.stream {
        return Ok(EventStream::new(running, shape).respond());
    }
    whole(running, &shape).await
}

/// Reads `logprobs` and `echo`: with both, the prompt is scored too.
fn scores(fields: &mut Fields, ask: &mut Ask) -> Result<(), ApiError> {
    let best = fields.integer("logprobs", 0..=limits::LOGPROBS_MAX)?.map(|best| best as u8);
    ask.report.echo = fields.flag("echo", false)?;
    ask.report.logprobs = best;
    ask.sampling.logprobs = best;
    ask.sampling.prompt_logprobs = best.filter(|_| ask.report.echo);
    if ask.tokens_max == Some(0) && !ask.report.echo {
        return Err(ApiError::invalid("max_tokens", "`max_tokens` may be 0 only with `echo`"));
    }
    Ok(())
}

fn check_best_of(fields: &mut Fields, ask: &Ask) -> Result<(), ApiError> {
    match fields.integer("best_of", 0..=limits::CHOICES_MAX as i64)? {
        Some(best_of) if best_of != i64::from(ask.choices) => {
            let message = format!("`best_of` is supported only when it equals `n`, {}, got {best_of}", ask.choices);
            Err(ApiError::unsupported("best_of", message))
        }
        _ => Ok(()),
    }
}

/// `prompt`: a string, an array of strings, an array of token ids, or an array of such arrays.
fn given(fields: &mut Fields, vocabulary: usize) -> Result<Vec<Given>, ApiError> {
    const FORMS: &str = "a string, an array of strings, token ids, or arrays of token ids";
    let value = fields.take("prompt").ok_or_else(|| ApiError::invalid("prompt", "`prompt` is needed"))?;
    let ids = |items: &[Value]| -> Result<Given, ApiError> {
        items.iter().map(|id| fields::token("prompt", id, vocabulary)).collect::<Result<_, _>>().map(Given::Tokens)
    };
    let items = match value {
        Value::String(text) => return Ok(vec![Given::Text(text)]),
        Value::Array(items) => items,
        other => return Err(wrong("prompt", FORMS, &other)),
    };
    if matches!(items.first(), Some(Value::Number(_))) {
        return Ok(vec![ids(&items)?]);
    }
    if items.is_empty() {
        return Err(ApiError::invalid("prompt", "`prompt` must not be empty"));
    }
    fields::check_length("prompt", items.len(), limits::PROMPTS_MAX)?;
    items
        .into_iter()
        .map(|item| match item {
            Value::String(text) => Ok(Given::Text(text)),
            Value::Array(items) => ids(&items),
            other => Err(wrong("prompt", FORMS, &other)),
        })
        .collect()
}

/// Tokenises what is text, and finds the text to echo of what is tokens.
async fn prompts(state: &State, given: Vec<Given>, add_special: bool, ask: &Ask) -> Result<Vec<Prompt>, ApiError> {
    let size = |given: &Given| match given {
        Given::Text(text) => text.len(),
        Given::Tokens(tokens) => tokens.len(),
    };
    let bytes = given.iter().map(size).sum();
    let tokens_max = state.model_len_max();
    let (echo, scored) = (ask.report.echo, ask.sampling.prompt_logprobs.is_some());
    let (tokenizer, skip_special) = (Arc::clone(&state.text.tokenizer), ask.wording.skip_special);
    let one = move |given: Given| -> Result<Prompt, ApiError> {
        let (tokens, text) = match given {
            Given::Text(text) => {
                check_text(&tokenizer, &text, tokens_max)?;
                (encode(&tokenizer, &text, add_special)?, Some(text))
            }
            Given::Tokens(tokens) => (tokens, None),
        };
        if tokens.is_empty() {
            return Err(ApiError::invalid("prompt", "`prompt` has no tokens"));
        }
        let echo = match (echo, text) {
            (false, _) => None,
            (true, Some(text)) => Some(text),
            (true, None) => Some(tokenizer.decode(&tokens, skip_special)),
        };
        Ok(Prompt { tokens, echo, scored, reader: None })
    };
    state.text_work(bytes, move || given.into_iter().map(one).collect()).await
}

async fn whole(running: Running, shape: &Shape) -> Result<Response, ApiError> {
    let answers = running.collect().await?;
    let choices = answers.choices.iter().enumerate().map(|(index, choice)| {
        let mut value = json!({
            "index": index,
            "text": choice.text,
            "logprobs": shape.report.logprobs.map(|_| logprobs::completion(&shape.tokenizer, &choice.tokens)),
            "finish_reason": reason(&choice.finish),
            "stop_reason": stop_reason(&choice.finish),
        });
        if shape.report.token_ids {
            value["token_ids"] = json!(choice.token_ids());
            value["prompt_token_ids"] = json!(answers.prompts[choice.prompt].tokens);
        }
        value
    });
    let mut body = shape.around("text_completion", choices.collect());
    body["usage"] = usage(answers.usage);
    Ok(Json(body).into_response())
}

/// Tells the prompt's tokens; only sent where they are asked for.
fn first_chunk(shape: &Shape, index: usize) -> Option<Value> {
    let choice = json!({
        "index": index, "text": "", "logprobs": null, "finish_reason": null,
        "prompt_token_ids": shape.prompts[index], "token_ids": [],
    });
    Some(shape.chunk(json!([choice]), Default::default()))
}

fn chunk_choice(shape: &Shape, piece: &Piece) -> Value {
    let scores = shape.report.logprobs.filter(|_| !piece.tokens.is_empty());
    let mut choice = json!({
        "index": piece.index,
        "text": piece.text,
        "logprobs": scores.map(|_| logprobs::completion(&shape.tokenizer, &piece.tokens)),
        "finish_reason": reason(&piece.finish),
    });
    if piece.finish.is_some() {
        choice["stop_reason"] = stop_reason(&piece.finish);
    }
    if shape.report.token_ids {
        let answer = piece.tokens.iter().filter(|_| !piece.echo);
        choice["token_ids"] = answer.map(|told| told.token).collect();
    }
    choice
}

#[cfg(test)]
mod tests {
    use super::super::harness::{Script, Server};
    use super::*;

    const PATH: &str = "/v1/completions";

    #[tokio::test]
    async fn every_form_of_a_prompt_is_taken() {
        let server = Server::start(Script::Say("ok")).await;
        for (prompt, count) in
            [(r#""ab""#, 1), (r#"["ab","c"]"#, 2), ("[97,98]", 1), ("[[97,98],[99]]", 2), (r#"["ab",[99]]"#, 2)]
        {
            server.jobs.lock().unwrap().clear();
            let body = server.post(PATH, &format!(r#"{{"prompt":{prompt},"n":2}}"#)).await.json();
            let choices = body["choices"].as_array().unwrap();
            assert_eq!(choices.len(), count * 2, "{prompt}");
            for (index, choice) in choices.iter().enumerate() {
                assert_eq!((&choice["index"], &choice["text"]), (&json!(index), &json!("ok")));
            }
            let prompts: Vec<Vec<u32>> = server.jobs.lock().unwrap().iter().map(|job| job.prompt.clone()).collect();
            assert_eq!(prompts, [vec![97, 98], vec![99]][..count]);
            assert_eq!(body["usage"]["prompt_tokens"], if count == 2 { 3 } else { 2 });
            assert_eq!(body["usage"]["completion_tokens"], count * 2 * 3);
        }
    }

    #[tokio::test]
    async fn echo_repeats_the_prompt_with_its_scores() {
        let server = Server::start(Script::Say("ok")).await;
        let ask = r#""prompt":"abc","echo":true,"logprobs":1,"return_token_ids":true"#;
        for (tokens_max, text, finish) in [(0, "abc", "length"), (1, "abco", "length"), (9, "abcok", "stop")] {
            let body = server.post(PATH, &format!(r#"{{{ask},"max_tokens":{tokens_max}}}"#)).await.json();
            let choice = &body["choices"][0];
            assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!(text), &json!(finish)));
            assert_eq!(choice["prompt_token_ids"], json!([97, 98, 99]));
            let logprobs = &choice["logprobs"];
            let told = 3 + choice["token_ids"].as_array().unwrap().len();
            for field in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
                assert_eq!(logprobs[field].as_array().unwrap().len(), told, "{field}");
            }
            assert_eq!(logprobs["token_logprobs"][0], Value::Null, "nothing comes before the first token");
            assert_eq!(logprobs["token_logprobs"][1], -0.25);
            assert_eq!(logprobs["top_logprobs"][1], json!({"a": -0.5, "b": -0.25}));
            assert_eq!(logprobs["text_offset"][2], 2);

            let request = format!(r#"{{{ask},"max_tokens":{tokens_max},"stream":true}}"#);
            let chunks = server.post(PATH, &request).await.chunks();
            let join =
                |field: &str| -> String { chunks.iter().filter_map(|c| c["choices"][0][field].as_str()).collect() };
            assert_eq!((join("text").as_str(), join("finish_reason").as_str()), (text, finish));
        }
        let body = server.post(PATH, r#"{"prompt":[97,98],"echo":true,"max_tokens":0}"#).await.json();
        assert_eq!((&body["choices"][0]["text"], &body["choices"][0]["logprobs"]), (&json!("ab"), &Value::Null));
    }

    #[tokio::test]
    async fn choices_of_a_stream_are_told_apart_by_their_index() {
        let server = Server::start(Script::Say("abc")).await;
        let body = r#"{"prompt":["x","y"],"n":2,"stream":true,"stream_options":{"include_usage":true,
                       "continuous_usage_stats":true}}"#;
        let chunks = server.post(PATH, body).await.chunks();
        let mut texts = vec![String::new(); 4];
        for choice in chunks.iter().filter_map(|chunk| chunk["choices"].get(0)) {
            texts[choice["index"].as_u64().unwrap() as usize] += choice["text"].as_str().unwrap();
        }
        assert_eq!(texts, ["abc"; 4]);
        assert!(chunks.iter().all(|chunk| chunk["usage"]["prompt_tokens"] == 2));
        assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens"], 16);
    }

    #[tokio::test]
    async fn an_ignored_end_and_a_cut_off_answer_end_by_length() {
        let server = Server::start(Script::Say("abc")).await;
        let body = server.post(PATH, r#"{"prompt":"x","ignore_eos":true,"max_tokens":4}"#).await.json();
        assert_eq!(
            (&body["choices"][0]["text"], &body["choices"][0]["finish_reason"]),
            (&json!("abc"), &json!("length"))
        );
        assert_eq!(server.jobs.lock().unwrap()[0].end_tokens.len(), 0);
        let shown = r#"{"prompt":"x","skip_special_tokens":false,"include_stop_str_in_output":true}"#;
        assert_eq!(server.post(PATH, shown).await.json()["choices"][0]["text"], "abc<end>");
    }
}
