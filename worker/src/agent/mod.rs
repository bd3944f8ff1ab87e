//! The agent: a worker process's life under a coordinator. [`state`] decides (pure), [`driver`] does I/O, [`rank`]
//! owns the device threads.

mod devices;
pub mod door;
pub mod driver;
pub mod error;
mod model;
pub mod rank;
pub mod state;
