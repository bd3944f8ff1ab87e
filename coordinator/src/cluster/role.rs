//! What a coordinator does for the cluster now: the doors behind which a request or a worker finds it.

use super::driver::Ask;
use super::service::Notice;
use crate::schedule::job::Door;
use tokio::sync::mpsc;

#[derive(Clone)]
pub enum Role {
    /// Nobody leads, or nobody knows who, with the reason.
    Unknown(String),
    Leads(Lead),
    /// The coordinator whose node plane is at this address leads.
    Follows {
        address: String,
    },
}

/// The doors of a leader.
#[derive(Clone)]
pub struct Lead {
    /// For workers.
    pub notices: mpsc::Sender<Notice>,
    /// For requests.
    pub door: Door,
    /// For operators.
    pub asks: mpsc::Sender<Ask>,
}
