//! Why a model could not be fetched; each is one line that says what to do.

use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error("{id} is not in the cache and HF_HUB_OFFLINE is set: {missing}")]
    Offline { id: String, missing: String },
    #[error("{url} can't be reached: {why}")]
    Unreachable { url: String, why: String },
    #[error("{id}: the hub can't be reached ({why}), and the cache can't help: {missing}")]
    UnreachableAndMissing { id: String, why: String, missing: String },
    #[error(
        "{url} wants a token (401): set HF_TOKEN, or check the name: the hub says the same of models that don't exist"
    )]
    Unauthorised { url: String },
    #[error("{url} refuses access (403): ask for it on the model's page, with the account of HF_TOKEN")]
    Forbidden { url: String },
    #[error("{url} does not exist (404)")]
    Missing { url: String },
    #[error("{url} is busy (429) and asks to wait {seconds} s more")]
    Busy { url: String, seconds: u64 },
    #[error("{url}: {why}")]
    Answer { url: String, why: String },
    #[error("{id} has no weights that can be served: {why}")]
    NoWeights { id: String, why: String },
    #[error("{id} has no {file}; of that kind it has {others}")]
    NoFile { id: String, file: String, others: String },
    #[error(
        "{name} is damaged: {size} bytes with the sha256 {found}, {wanted} was announced; it was deleted, try again"
    )]
    Hash { name: String, size: u64, found: String, wanted: String },
    #[error("{name} was cut off at {length} of {size} bytes again and again: {why}")]
    Cut { name: String, length: u64, size: u64, why: String },
    #[error("{name} has {found} bytes, {wanted} were announced")]
    Size { name: String, found: u64, wanted: u64 },
    #[error("{}: {why}", path.display())]
    File { path: PathBuf, why: String },
    #[error("the certificates can't be used: {0}")]
    Certificates(String),
}

impl HubError {
    pub(super) fn file(path: &Path) -> impl FnOnce(std::io::Error) -> HubError {
        move |why| HubError::File { path: path.to_path_buf(), why: why.to_string() }
    }

    /// Whether the same request may succeed in a moment.
    pub(super) fn is_passing(&self) -> bool {
        matches!(self, HubError::Unreachable { .. } | HubError::Busy { .. } | HubError::Cut { .. })
    }
}
