//! `POST /tokenize` and `/detokenize`, in vLLM's shapes.

use std::sync::Arc;

use axum::Json;
use axum::extract::{self, Request};
use serde_json::{Value, json};

use super::State;
use super::chat::Conversation;
use super::error::ApiError;
use super::read_fields;
use super::request::check_model;

type Shared = extract::State<Arc<State>>;

/// Takes a `prompt`, or the `messages` of a chat.
pub async fn tokenize(extract::State(state): Shared, request: Request) -> Result<Json<Value>, ApiError> {
    let mut fields = read_fields(&state, request).await?;
    check_model(&mut fields, &state.model)?;
    let strings = fields.flag("return_token_strs", false)?;
    let tokens = if fields.has("messages") {
        Conversation::read(&mut fields)?.tokens(&state).await?
    } else {
        let text = fields.text("prompt")?;
        let text = text.ok_or_else(|| ApiError::invalid("prompt", "`prompt` or `messages` is needed"))?;
        let add_special = fields.flag("add_special_tokens", true)?;
        let words = Arc::clone(&state.words);
        let work = move || words.encode(&text, add_special).map_err(ApiError::Failed);
        state.text_work(state.body_bytes_max, work).await?
    };
    let text = |&token: &u32| String::from_utf8_lossy(&state.words.token_bytes(token)).into_owned();
    Ok(Json(json!({
        "count": tokens.len(),
        "max_model_len": state.model.model_len_max,
        "tokens": tokens,
        "token_strs": strings.then(|| tokens.iter().map(text).collect::<Vec<_>>()),
    })))
}

pub async fn detokenize(extract::State(state): Shared, request: Request) -> Result<Json<Value>, ApiError> {
    let mut fields = read_fields(&state, request).await?;
    check_model(&mut fields, &state.model)?;
    let tokens = fields.tokens("tokens", state.body_bytes_max, state.model.vocabulary)?;
    let tokens = tokens.ok_or_else(|| ApiError::invalid("tokens", "`tokens` is needed: an array of token ids"))?;
    let words = Arc::clone(&state.words);
    let work = move || words.decode(&tokens, false).map_err(ApiError::Failed);
    let prompt = state.text_work(state.body_bytes_max, work).await?;
    Ok(Json(json!({"prompt": prompt})))
}
