//! The coordinator: plans the cut, schedules every step, speaks the OpenAI API. See ARCHITECTURE.md for the map.
//!
//! * [`run`]: one coordinator, from its settings; [`config`] are those.
//! * [`source`]: the model's description, [`draft`]: that of the one that drafts for it; [`hub`]: models fetched by name.
//! * [`api`]: OpenAI over HTTP; [`text`]: templates, tokens, stop strings.
//! * [`schedule`]: from requests to steps; [`group`]: the door to the ranks.
//! * [`plan`]: how the model is cut; [`cluster`]: who is there, and under which epoch.
//! * [`fleet`]: several groups behind one coordinator.
//! * [`lead`]: several coordinators, of which one leads.
//! * [`metrics`]: every metric's name and meaning.

#![forbid(unsafe_code)]

pub mod api;
pub mod cluster;
pub mod config;
pub mod draft;
pub mod fleet;
pub mod group;
pub mod hub;
pub mod lead;
pub mod metrics;
pub mod plan;
pub mod run;
pub mod schedule;
pub mod source;
pub mod text;
