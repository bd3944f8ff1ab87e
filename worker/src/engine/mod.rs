//! The engine: one decoder loop over [`crate::backend::Backend`] for every model.

pub mod batch;
