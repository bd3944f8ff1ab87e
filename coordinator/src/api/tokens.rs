//! `POST /tokenize` and `/detokenize`, in vLLM's shapes.

use std::sync::Arc;

use axum::Json;
use axum::extract::{self, Request};
use serde_json::{Value, json};

use super::State;
use super::chat::Chat;
use super::error::ApiError;
use super::read_fields;
use super::request::check_model;
use crate::text::Tokenizer;

type Shared = extract::State<Arc<State>>;

/// Takes a `prompt`, or the `messages` of a chat.
pub async fn tokenize(extract::State(state): Shared, request: Request) -> Result<Json<Value>, ApiError> {
    let mut fields = read_fields(&state, request).await?;
    check_model(&mut fields, &state.model)?;
    let strings = fields.flag("return_token_strs", false)?;
    let tokens = if fields.has("messages") {
        Chat::read(&mut fields)?.tokens(&state).await?
    } else {
        let text = fields.text("prompt")?;
        let text = text.ok_or_else(|| ApiError::invalid("prompt", "`prompt` or `messages` is needed"))?;
        let add_special = fields.flag("add_special_tokens", true)?;
        let tokenizer = Arc::clone(&state.text.tokenizer);
        let work = move || encode(&tokenizer, &text, add_special);
        state.text_work(state.body_bytes_max, work).await?
    };
    let text = |&token: &u32| state.text.tokenizer.token_text(token);
    Ok(Json(json!({
        "count": tokens.len(),
        "max_model_len": state.model_len_max(),
        "tokens": tokens,
        "token_strs": strings.then(|| tokens.iter().map(text).collect::<Vec<_>>()),
    })))
}

pub async fn detokenize(extract::State(state): Shared, request: Request) -> Result<Json<Value>, ApiError> {
    let mut fields = read_fields(&state, request).await?;
    check_model(&mut fields, &state.model)?;
    let tokens = fields.tokens("tokens", state.body_bytes_max, state.model.vocabulary)?;
    let tokens = tokens.ok_or_else(|| ApiError::invalid("tokens", "`tokens` is needed: an array of token ids"))?;
    let tokenizer = Arc::clone(&state.text.tokenizer);
    let work = move || Ok(tokenizer.decode(&tokens, false));
    let prompt = state.text_work(state.body_bytes_max, work).await?;
    Ok(Json(json!({"prompt": prompt})))
}

/// A text's tokens, begin and end tokens around it as the model wants them.
pub fn encode(tokenizer: &Tokenizer, text: &str, add_special: bool) -> Result<Vec<u32>, ApiError> {
    let failed = |error| ApiError::Failed(format!("the prompt could not be tokenised: {error}"));
    tokenizer.encode(text, add_special).map_err(failed)
}
