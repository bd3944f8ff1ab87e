//! GGUF metadata to [`crate::ModelSpec`].

pub mod file;

pub use file::{Gguf, TensorInfo, Value};
