//! `POST /tokenize` and `/detokenize`, in vLLM's shapes.

use std::sync::Arc;

use axum::Json;
use axum::extract::{self, Request};
use serde_json::{Value, json};

use super::State;
use super::chat::Chat;
use super::error::ApiError;
use super::limits;
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
        let most = limits::TOKENIZE_BYTES_MAX.max(limits::TOKEN_BYTES * state.model_len_max());
        if text.len() > most {
            let message = format!("`prompt` may be {most} bytes long, got {}", text.len());
            return Err(ApiError::invalid("prompt", message));
        }
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

/// Refuses a prompt that can't fit into `tokens_max` tokens by its beginning alone: tokenising a text takes some hundred
/// times its memory. What passes may still be too long.
pub fn check_text(tokenizer: &Tokenizer, text: &str, tokens_max: usize) -> Result<(), ApiError> {
    // At the cut one token may have become a few.
    const SLACK: usize = 64;
    let bytes = limits::TOKEN_BYTES * tokens_max + limits::INLINE_TEXT_BYTES;
    if text.len() <= bytes {
        return Ok(());
    }
    let head = &text[..text.floor_char_boundary(bytes)];
    let tokens = encode(tokenizer, head, false)?.len();
    if tokens <= tokens_max + SLACK {
        return Ok(());
    }
    let message = format!(
        "This model's maximum context length is {tokens_max} tokens. However, the first {} of your prompt's {} bytes are \
         {tokens} tokens already; please shorten it",
        head.len(),
        text.len()
    );
    Err(ApiError::TooLong { param: "prompt".into(), message })
}

/// A text's tokens, begin and end tokens around it as the model wants them.
pub fn encode(tokenizer: &Tokenizer, text: &str, add_special: bool) -> Result<Vec<u32>, ApiError> {
    let failed = |error| ApiError::Failed(format!("the prompt could not be tokenised: {error}"));
    tokenizer.encode(text, add_special).map_err(failed)
}
