//! GGUF metadata to [`crate::ModelSpec`].
