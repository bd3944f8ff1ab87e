//! What the tests share: real processes ([`process`]), ranks as threads ([`ring`]), the reference's numbers ([`golden`]), the
//! simulator ([`sim`]).

pub mod golden;
pub mod process;
pub mod ring;
pub mod sim;
