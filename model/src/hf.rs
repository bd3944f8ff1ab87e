//! `config.json` to [`crate::ModelSpec`].
