//! What every response and every chunk of a request begins with, and how usage is told.

use std::sync::Arc;

use serde_json::{Value, json};

use super::State;
use super::answer::{Finish, Piece, Usage};
use super::request::Report;
use super::unix_seconds;
use crate::text::Tokenizer;

/// A request's fixed words. The endpoint gives its own ways to write a piece.
pub struct Shape {
    pub id: String,
    pub created: u64,
    pub model: String,
    pub fingerprint: String,
    pub report: Report,
    pub tokenizer: Arc<Tokenizer>,
    /// Prompt token ids, to be told in a choice's first chunk.
    pub prompts: Vec<Vec<u32>>,
    /// The `object` of a chunk.
    pub object: &'static str,
    /// A choice's first chunk, where the endpoint has one.
    pub first: fn(&Shape, usize) -> Option<Value>,
    /// A piece as an entry of `choices`.
    pub choice: fn(&Shape, &Piece) -> Value,
}

impl Shape {
    pub fn new(state: &State, id: String, report: Report, object: &'static str) -> Shape {
        Shape {
            id,
            created: unix_seconds(),
            model: state.name().to_string(),
            fingerprint: state.model.fingerprint.clone(),
            report,
            tokenizer: Arc::clone(&state.text.tokenizer),
            prompts: Vec::new(),
            object,
            first: |_, _| None,
            choice: |_, _| Value::Null,
        }
    }

    /// A response or chunk around `choices`.
    pub fn around(&self, object: &str, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        })
    }

    /// A chunk of a stream, with the usage so far where the client wants it.
    pub fn chunk(&self, choices: Value, so_far: Usage) -> Value {
        let mut chunk = self.around(self.object, choices);
        if self.report.usage {
            chunk["usage"] = if self.report.usage_always { usage(so_far) } else { Value::Null };
        }
        chunk
    }

    /// Whether a piece says anything that the client asked for.
    pub fn tells(&self, piece: &Piece) -> bool {
        let reports = self.report.token_ids || self.report.logprobs.is_some();
        let says = !piece.text.is_empty() || !piece.reasoning.is_empty() || piece.call.is_some();
        says || piece.finish.is_some() || (reports && !piece.tokens.is_empty())
    }
}

pub fn usage(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    })
}

/// `finish_reason`.
pub fn reason(finish: &Option<Finish>) -> Value {
    finish.as_ref().map_or(Value::Null, |finish| Value::from(finish.reason()))
}

/// `stop_reason`, vLLM's: the stop string or the request's own stop token; null for the model's end.
pub fn stop_reason(finish: &Option<Finish>) -> Value {
    match finish {
        Some(Finish::Stop(text)) => Value::from(text.as_str()),
        Some(Finish::StopToken(token)) => Value::from(*token),
        _ => Value::Null,
    }
}
