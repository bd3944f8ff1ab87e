//! Several groups behind one coordinator: replicas of one model, each with a plan, an epoch and a scheduler of its own, so
//! that one's death is no other's.
//!
//! * [`muster`]: which group a worker joins.
//! * [`router`]: which group a request goes to.
//! * [`views`]: all groups as one cluster.
//! * [`steps`]: a group's scheduler over its epochs; [`shell`]: all of it together.

pub mod muster;
pub mod router;
pub mod shell;
pub mod steps;
pub mod views;
