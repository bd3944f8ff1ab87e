//! What the tests share: real processes ([`process`]) and the simulator ([`sim`]).

pub mod process;
pub mod sim;
