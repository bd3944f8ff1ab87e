//! Why a worker ends.

use crate::config::Undialable;
use model::fault::Fault;
use proto::tls::TlsError;

#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("the coordinator refused this worker: {0}")]
    Refused(String),
    #[error(transparent)]
    Fault(#[from] Fault),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("{address} is not an address: {why}")]
    Address { address: String, why: String },
    #[error(transparent)]
    Undialable(#[from] Undialable),
    #[error("health can't be asked at {address}: {why}")]
    Health { address: String, why: std::io::Error },
}
