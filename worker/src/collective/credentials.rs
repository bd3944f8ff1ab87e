//! What this worker shows to others and whom it lets in: files that may be renewed in place, looked at for each connection.

use model::fault::{Fault, FaultKind};
use proto::tls::ranks::Ranks;
use proto::tls::{Renewed, Tls};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// The files, and what they held when they last fitted each other.
pub struct Credentials(Mutex<Renewed<Ranks>>);

impl Credentials {
    /// Reads the files for the first time; they must be whole.
    pub fn read(files: Tls) -> Result<Credentials, Fault> {
        let renewed = Renewed::ranks(&files);
        let renewed = renewed.map_err(|error| Fault::new(FaultKind::Incompatible, format!("[tls]: {error}")))?;
        Ok(Credentials(Mutex::new(renewed)))
    }

    /// As the files are now. While they are half written, what they held before goes on.
    pub fn current(&self) -> Ranks {
        let mut renewed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match renewed.look(Instant::now()) {
            Some(Ok(())) => tracing::info!("[tls]: the certificates were renewed"),
            Some(Err(error)) => tracing::warn!("[tls]: {error}: the certificates read before are kept"),
            None => {}
        }
        renewed.current().clone()
    }
}
