//! From requests to steps. [`job`] is the door for the API; the scheduler itself is pure and takes time as an argument.

pub mod job;
