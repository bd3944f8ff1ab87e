//! Several coordinators of one cluster: one leads, the others stand by, ready, and forward. Who holds a client's socket
//! keeps the request, its tokens so far and its text; when the leader goes, it enters them again with the next one.
//!
//! * [`campaign`]: who leads, by a leased key of the store; [`candidate`]: its core.
//! * [`relay`]: requests to whoever leads, over leaders' deaths; [`carried`]: its core, one request;
//!   [`follow`]: what else a standby does.
//! * [`peer`]: another coordinator, over gRPC; [`service`]: the other side of it.

pub mod campaign;
pub mod candidate;
pub mod carried;
pub mod follow;
pub mod peer;
pub mod relay;
pub mod service;
