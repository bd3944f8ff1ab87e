//! From requests to steps. [`job`] is the door for the API; [`scheduler`] decides and is pure, time is its argument;
//! [`driver`] is the shell that feeds it jobs and a group's answers.

mod admit;
mod answer;
pub mod blocks;
mod draft;
pub mod driver;
pub mod job;
mod lane;
pub mod load;
mod pack;
mod queue;
pub mod scheduler;
mod sequence;
pub mod suspect;
#[cfg(test)]
mod tests;

pub use admit::Settings;
pub use queue::{Turn, WEIGHT_MAX};
