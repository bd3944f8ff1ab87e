//! Weights from checkpoint files to a backend.

pub mod widen;
