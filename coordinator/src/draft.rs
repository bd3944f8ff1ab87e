//! The draft model as the coordinator sees it: whether it speaks of the same tokens as the model that it drafts for.

use crate::plan::DraftModel;
use crate::source::{Source, SourceError};
use crate::text::{Text, TextError, Tokenizer};
use model::SpecError;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A draft model that goes with a model.
#[derive(Debug, Clone)]
pub struct Draft {
    /// Absolute, so that worker processes of this host find it.
    pub path: PathBuf,
    /// What workers must read too (see [`model::identity`]).
    pub identity: Vec<u8>,
    pub model: Arc<DraftModel>,
}

#[derive(Debug, thiserror::Error)]
pub enum DraftError {
    #[error("a draft model guesses nothing without a number of tokens to guess (num_speculative_tokens, now 0)")]
    NoTokens,
    #[error("draft model {0}")]
    Source(SourceError),
    #[error("draft model {}: {why}", path.display())]
    Spec { path: PathBuf, why: SpecError },
    #[error("draft model {}: {why}", path.display())]
    Text { path: PathBuf, why: TextError },
    #[error("draft model {}: token {id} is {draft:?}, the model's is {model:?}", path.display())]
    Token { path: PathBuf, id: u32, draft: String, model: String },
}

impl Draft {
    /// What planning needs. Fails where it has another number of tokens than `model`.
    pub fn open(path: &Path, model: &Source) -> Result<Draft, DraftError> {
        let source = Source::open(path).map_err(DraftError::Source)?;
        Draft::of(source, model)
    }

    /// The same of what can be described without weights.
    pub fn describe(path: &Path, model: &Source) -> Result<Draft, DraftError> {
        let source = Source::describe(path).map_err(DraftError::Source)?;
        Draft::of(source, model)
    }

    fn of(source: Source, model: &Source) -> Result<Draft, DraftError> {
        let Source { path, spec, storage, identity, .. } = source;
        let wrong = |why| DraftError::Spec { path: path.clone(), why };
        model.spec.drafted_by(&spec).map_err(wrong)?;
        let spec = spec.predicting(0).map_err(wrong)?;
        Ok(Draft { path, identity, model: Arc::new(DraftModel { spec, storage }) })
    }

    /// Fails where a token of its own stands for another text than the model's. Only the model's tokenizer is ever used, so nothing
    /// else of its own matters; nor do ids that only one of them uses. Blocks: reads its tokenizer.
    pub fn check_tokens(&self, model: &Tokenizer) -> Result<(), DraftError> {
        let own = Text::load(&self.path, None).map_err(|why| DraftError::Text { path: self.path.clone(), why })?;
        match first_difference(&own.tokenizer, model) {
            None => Ok(()),
            Some(id) => Err(DraftError::Token {
                path: self.path.clone(),
                id,
                draft: own.tokenizer.token_text(id),
                model: model.token_text(id),
            }),
        }
    }
}

/// The first id that both use and that stands for different texts.
fn first_difference(one: &Tokenizer, other: &Tokenizer) -> Option<u32> {
    let ids = 0..one.vocabulary().min(other.vocabulary()) as u32;
    let mut both = ids.filter(|id| one.is_token(*id) && other.is_token(*id));
    both.find(|id| one.token_bytes(*id) != other.token_bytes(*id))
}
