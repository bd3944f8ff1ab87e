//! What the tests share: real processes ([`process`], [`cluster`], [`etcd`]), what goes wrong between them ([`proxy`], [`hosts`]) while
//! they are asked ([`load`]) and what they answer ([`answers`]), a hub of models ([`hub`]), models that a peer lends ([`lent`]), ranks as
//! threads ([`ring`]) and requests for them ([`requests`]), kernels on the CPU ([`gpp`]), ranks on devices as processes ([`ranks`]), the
//! reference's numbers ([`golden`]), the simulator ([`sim`]), and
//! certificates ([`authority`]).

pub mod answers;
pub mod authority;
pub mod cancels;
pub mod client;
pub mod cluster;
pub mod etcd;
pub mod golden;
pub mod gpp;
pub mod hosts;
pub mod hub;
pub mod lent;
pub mod load;
pub mod overload;
pub mod planned;
pub mod process;
pub mod proxy;
pub mod ranks;
pub mod requests;
pub mod ring;
pub mod sim;
pub mod stream;
