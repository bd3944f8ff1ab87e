//! The whole cluster, simulated: coordinators and workers with their production cores, a network that delays, loses and
//! cuts, processes that die, pause and come back, a store that goes away, clients that hold every token against the oracle.
//!
//! ```text
//! world ── faults
//!   ├── coordinator ── lead        Candidate, Carried │ Cluster, Book, Links, Pending, Scheduler, plan
//!   ├── worker                     Agent
//!   └── outside: net, store (MemoryStore), fabric (ranks), clients, truth
//! ```

mod clients;
mod coordinator;
mod fabric;
mod faults;
mod lead;
mod message;
mod net;
mod outside;
mod setting;
pub mod tally;
mod truth;
mod worker;
pub mod world;
