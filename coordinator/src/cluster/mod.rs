//! Who is in the cluster and what the group is doing: a pure core ([`state`]), its words ([`event`]), the shell that
//! performs what it decides ([`driver`]), the node plane ([`service`]) and the store that keeps epochs ([`store`]).

pub mod driver;
pub mod event;
pub mod memory;
pub mod service;
pub mod state;
pub mod store;
