//! What the API answers when it does not do what was asked: one enum, one status each, always in OpenAI's shape
//! `{"error": {"message", "type", "param", "code"}}`.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::rates::Excess;
use crate::schedule::job::Refusal;

/// Seconds after which a refused client may try again: the queue moves every step.
const RETRY_QUEUE_SECONDS: u32 = 1;
/// Loading and recovering take longer than a step.
const RETRY_SERVING_SECONDS: u32 = 3;

/// A refused or failed request. Variants say what the client can do about it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ApiError {
    /// Correct the request; `param` names the field where one is to blame.
    #[error("{message}")]
    Invalid { param: Option<String>, message: String },
    /// Leave the field out: it would change the answer and is not implemented.
    #[error("{message}")]
    Unsupported { param: String, message: String },
    /// Shorten the prompt or ask for fewer tokens.
    #[error("{message}")]
    TooLong { param: String, message: String },
    #[error("the request's body is longer than {bytes_max} bytes")]
    TooLarge { bytes_max: usize },
    #[error("the model `{model}` does not exist; this server has {served}")]
    UnknownModel { model: String, served: String },
    #[error("unknown path: {0}")]
    UnknownPath(String),
    #[error("the method {method} is not allowed for {path}")]
    WrongMethod { method: String, path: String },
    #[error("{0}")]
    Unauthorized(&'static str),
    /// The body did not arrive in time.
    #[error("the request's body did not arrive within {seconds} seconds")]
    TooSlow { seconds: u64 },
    /// Try again soon.
    #[error("{0}")]
    Busy(String),
    /// Try again when the key's limit allows it.
    #[error("{0}")]
    Limited(Excess),
    /// Try again when `/readyz` says so.
    #[error("{0}")]
    NotServing(String),
    /// Nothing the client can do.
    #[error("{0}")]
    Failed(String),
}

impl ApiError {
    /// `param` is to blame, for the reason in `message`.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> ApiError {
        ApiError::Invalid { param: Some(param.into()), message: message.into() }
    }

    pub fn unsupported(param: impl Into<String>, message: impl Into<String>) -> ApiError {
        ApiError::Unsupported { param: param.into(), message: message.into() }
    }

    pub fn status(&self) -> StatusCode {
        match self {
            ApiError::Invalid { .. } | ApiError::Unsupported { .. } | ApiError::TooLong { .. } => {
                StatusCode::BAD_REQUEST
            }
            ApiError::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            ApiError::UnknownModel { .. } | ApiError::UnknownPath(_) => StatusCode::NOT_FOUND,
            ApiError::WrongMethod { .. } => StatusCode::METHOD_NOT_ALLOWED,
            ApiError::Unauthorized(_) => StatusCode::UNAUTHORIZED,
            ApiError::TooSlow { .. } => StatusCode::REQUEST_TIMEOUT,
            ApiError::Busy(_) | ApiError::Limited(_) => StatusCode::TOO_MANY_REQUESTS,
            ApiError::NotServing(_) => StatusCode::SERVICE_UNAVAILABLE,
            ApiError::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The body, which is also what a stream carries as its last event when it fails midway.
    pub fn body(&self) -> Value {
        let (kind, code) = match self {
            ApiError::Invalid { .. } => ("invalid_request_error", None),
            ApiError::Unsupported { .. } => ("invalid_request_error", Some("unsupported_parameter")),
            ApiError::TooLong { .. } => ("invalid_request_error", Some("context_length_exceeded")),
            ApiError::TooLarge { .. } => ("invalid_request_error", Some("request_too_large")),
            ApiError::UnknownModel { .. } => ("invalid_request_error", Some("model_not_found")),
            ApiError::UnknownPath(_) => ("invalid_request_error", Some("unknown_url")),
            ApiError::WrongMethod { .. } => ("invalid_request_error", Some("method_not_allowed")),
            ApiError::Unauthorized(_) => ("authentication_error", Some("invalid_api_key")),
            ApiError::TooSlow { .. } => ("invalid_request_error", Some("request_timeout")),
            ApiError::Busy(_) => ("rate_limit_error", Some("queue_full")),
            ApiError::Limited(_) => ("rate_limit_error", Some("rate_limit_exceeded")),
            ApiError::NotServing(_) => ("server_error", Some("not_serving")),
            ApiError::Failed(_) => ("server_error", Some("internal_error")),
        };
        let param = match self {
            ApiError::Invalid { param, .. } => param.as_deref(),
            ApiError::Unsupported { param, .. } | ApiError::TooLong { param, .. } => Some(param.as_str()),
            ApiError::UnknownModel { .. } => Some("model"),
            _ => None,
        };
        json!({"error": {"message": self.to_string(), "type": kind, "param": param, "code": code}})
    }

    fn retry_after_seconds(&self) -> Option<u32> {
        match self {
            ApiError::Busy(_) => Some(RETRY_QUEUE_SECONDS),
            ApiError::Limited(excess) => Some(excess.seconds()),
            ApiError::NotServing(_) => Some(RETRY_SERVING_SECONDS),
            _ => None,
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status(), axum::Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after_seconds() {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        match self {
            ApiError::Unauthorized(_) => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            // The rest of the body is not going to be read, so the connection cannot be used again.
            ApiError::TooLarge { .. } | ApiError::TooSlow { .. } => {
                headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            _ => {}
        }
        response
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> ApiError {
        let message = refusal.to_string();
        match refusal {
            Refusal::QueueFull { .. } => ApiError::Busy(message),
            Refusal::TooLong { tokens, tokens_max } => ApiError::TooLong {
                param: "prompt".into(),
                message: format!(
                    "This model's maximum context length is {tokens_max} tokens, and your request needs {tokens}"
                ),
            },
            Refusal::NeverFits { .. } => ApiError::TooLong { param: "prompt".into(), message },
            Refusal::NotServing(_) => ApiError::NotServing(message),
            Refusal::Failed(_) => ApiError::Failed(message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_has_its_status_and_says_when_to_try_again() {
        let cases = [
            (Refusal::QueueFull { waiting: 9, waiting_max: 8 }, 429, Some("1")),
            (Refusal::TooLong { tokens: 9, tokens_max: 8 }, 400, None),
            (Refusal::NeverFits { blocks: 9, blocks_max: 8 }, 400, None),
            (Refusal::NotServing("loading".into()), 503, Some("3")),
            (Refusal::Failed("boom".into()), 500, None),
        ];
        for (refusal, status, retry) in cases {
            let response = ApiError::from(refusal.clone()).into_response();
            assert_eq!(response.status().as_u16(), status, "{refusal}");
            let header = response.headers().get(header::RETRY_AFTER).map(|v| v.to_str().unwrap());
            assert_eq!(header, retry, "{refusal}");
        }
    }

    #[test]
    fn the_body_has_openai_s_four_fields() {
        let body = ApiError::invalid("top_p", "top_p must be more").body();
        let expected =
            r#"{"error":{"message":"top_p must be more","type":"invalid_request_error","param":"top_p","code":null}}"#;
        assert_eq!(body.to_string(), expected);
    }
}
