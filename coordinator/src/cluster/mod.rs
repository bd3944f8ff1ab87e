//! Who is in the cluster and what the group is doing: a pure core ([`state`]), its words ([`event`]), the shell that
//! performs what it decides ([`driver`]) and its record of connections ([`links`]), the node plane ([`service`]), its
//! sockets under TLS ([`incoming`]) and those whom they refuse ([`stranger`]), the store that keeps epochs ([`store`]) and the dealings with it ([`ledger`], its core [`book`]).

pub mod book;
pub mod driver;
pub mod event;
pub mod incoming;
pub mod ledger;
pub mod links;
pub mod pace;
pub mod proof;
pub mod role;
pub mod service;
pub mod state;
pub mod store;
pub mod stranger;
