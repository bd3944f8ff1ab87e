//! What the tests share: real processes ([`process`], [`cluster`], [`etcd`]), ranks as threads ([`ring`]) and requests for them
//! ([`requests`]), models that a peer lends ([`lent`]), the reference's numbers ([`golden`]), the simulator ([`sim`]), and
//! certificates ([`authority`]).

pub mod authority;
pub mod cancels;
pub mod client;
pub mod cluster;
pub mod etcd;
pub mod golden;
pub mod lent;
pub mod overload;
pub mod planned;
pub mod process;
pub mod requests;
pub mod ring;
pub mod sim;
pub mod stream;
