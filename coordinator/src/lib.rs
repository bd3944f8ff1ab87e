//! The coordinator: plans the cut, schedules every step, speaks the OpenAI API. See ARCHITECTURE.md for the map.

#![forbid(unsafe_code)]

pub mod api;
pub mod group;
pub mod metrics;
pub mod plan;
pub mod schedule;
pub mod text;
