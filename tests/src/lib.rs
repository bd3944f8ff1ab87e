//! Shared by the test binaries.

pub mod sim;
