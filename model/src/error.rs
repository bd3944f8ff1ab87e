//! Why a model description was refused.

/// A checkpoint's description that cannot become a [`crate::ModelSpec`], or a spec that cannot be cut as asked.
#[derive(Debug, Clone, thiserror::Error, PartialEq)]
pub enum SpecError {
    #[error("config.json is not valid JSON: {0}")]
    Json(String),
    #[error("unknown architecture {name:?}; known: {known}")]
    UnknownArchitecture { name: String, known: String },
    #[error("{key} is missing from the model's config")]
    Missing { key: String },
    #[error("{key} = {value} in the model's config: {why}")]
    Bad { key: String, value: String, why: String },
    #[error("the model's config has keys that nothing reads: {0}; refusing to guess what they change")]
    Unread(String),
    /// More of the file is needed; where only a prefix was given, come back with more.
    #[error("the file's header needs {wanted} bytes or more, {bytes} are there")]
    Truncated { bytes: u64, wanted: u64 },
    #[error("the draft model {what} {draft} tokens, the model {model}")]
    Vocabulary { what: &'static str, draft: usize, model: usize },
    #[error("{what} cannot be cut: {why}")]
    Cut { what: String, why: String },
}

impl SpecError {
    pub(crate) fn bad(key: impl ToString, value: impl ToString, why: impl ToString) -> SpecError {
        SpecError::Bad { key: key.to_string(), value: value.to_string(), why: why.to_string() }
    }
}
