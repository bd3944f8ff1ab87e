//! Why text could not be loaded, encoded or rendered.

use std::path::{Path, PathBuf};

use model::SpecError;

/// A failure of loading; a model with one does not serve.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} is not valid JSON: {why}")]
    Json { path: PathBuf, why: String },
    #[error("{path} has no tokenizer: {why}")]
    NoTokenizer { path: PathBuf, why: String },
    #[error("the tokenizer cannot be used: {0}")]
    Tokenizer(String),
    #[error(transparent)]
    Gguf(#[from] SpecError),
    #[error("the chat template cannot be used: {0}")]
    Template(String),
}

impl TextError {
    pub(super) fn read(path: &Path, source: std::io::Error) -> TextError {
        TextError::Read { path: path.to_path_buf(), source }
    }

    pub(super) fn json(path: &Path, why: impl ToString) -> TextError {
        TextError::Json { path: path.to_path_buf(), why: why.to_string() }
    }
}
