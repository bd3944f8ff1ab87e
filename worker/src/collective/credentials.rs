//! What this worker shows to others and whom it lets in: files that are renewed in place, read anew as epochs come.

use model::fault::{Fault, FaultKind};
use proto::tls::Tls;
use proto::tls::ranks::Ranks;
use rustls::{ClientConfig, ServerConfig};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Peers that come before this worker's own turn to connect find certificates no older than this.
const AGE_MAX: Duration = Duration::from_secs(10);

/// The files, and what they held when they were last read.
pub struct Credentials {
    files: Tls,
    held: Mutex<Held>,
}

struct Held {
    ranks: Ranks,
    since: Instant,
}

impl Credentials {
    /// Reads the files for the first time; they must be whole.
    pub fn read(files: Tls) -> Result<Credentials, Fault> {
        let ranks = files.ranks().map_err(|error| Fault::new(FaultKind::Incompatible, format!("[tls]: {error}")))?;
        Ok(Credentials { files, held: Mutex::new(Held { ranks, since: Instant::now() }) })
    }

    /// Reads the files again. While they are half written, what they held before goes on.
    pub fn renew(&self) {
        Credentials::reread(&self.files, &mut self.lock());
    }

    pub fn dials(&self) -> Arc<ClientConfig> {
        self.lock().ranks.dials.clone()
    }

    pub fn listens(&self) -> Arc<ServerConfig> {
        let mut held = self.lock();
        if held.since.elapsed() > AGE_MAX {
            Credentials::reread(&self.files, &mut held);
        }
        held.ranks.listens.clone()
    }

    fn reread(files: &Tls, held: &mut Held) {
        held.since = Instant::now();
        match files.ranks() {
            Ok(ranks) => held.ranks = ranks,
            Err(error) => tracing::warn!("[tls]: {error}: the certificates read before are kept"),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
