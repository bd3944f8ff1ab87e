//! The worker: holds cut weights and runs the kernels. See ARCHITECTURE.md for the map.

pub mod agent;
pub mod backend;
pub mod collective;
pub mod config;
pub mod cuda;
pub mod engine;
pub mod hardware;
pub mod health;
pub mod load;
mod metrics;
pub mod preflight;
pub mod roofs;
