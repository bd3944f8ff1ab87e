//! What this worker shows to others and whom it lets in: files that are renewed in place, read anew as epochs come.

use model::fault::{Fault, FaultKind};
use proto::tls::Tls;
use proto::tls::ranks::Ranks;
use rustls::{ClientConfig, ServerConfig};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

/// Length and last change of each file.
type Stamp = [Option<(u64, SystemTime)>; 3];

/// The files, and what they held when they were last read.
pub struct Credentials {
    files: Tls,
    held: Mutex<Held>,
}

struct Held {
    ranks: Ranks,
    stamp: Stamp,
}

impl Credentials {
    /// Reads the files for the first time; they must be whole.
    pub fn read(files: Tls) -> Result<Credentials, Fault> {
        let stamp = stamp(&files);
        let ranks = files.ranks().map_err(|error| Fault::new(FaultKind::Incompatible, format!("[tls]: {error}")))?;
        Ok(Credentials { files, held: Mutex::new(Held { ranks, stamp }) })
    }

    /// Reads the files again. While they are half written, what they held before goes on.
    pub fn renew(&self) {
        Credentials::reread(&self.files, &mut self.lock());
    }

    pub fn dials(&self) -> Arc<ClientConfig> {
        self.lock().ranks.dials.clone()
    }

    /// For peers that come before this worker's own turn to connect: they may have read renewed files already.
    pub fn listens(&self) -> Arc<ServerConfig> {
        let mut held = self.lock();
        if stamp(&self.files) != held.stamp {
            Credentials::reread(&self.files, &mut held);
        }
        held.ranks.listens.clone()
    }

    fn reread(files: &Tls, held: &mut Held) {
        held.stamp = stamp(files);
        match files.ranks() {
            Ok(ranks) => held.ranks = ranks,
            Err(error) => tracing::warn!("[tls]: {error}: the certificates read before are kept"),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn stamp(files: &Tls) -> Stamp {
    [&files.ca, &files.certificate, &files.key].map(|path| {
        let about = std::fs::metadata(path).ok()?;
        Some((about.len(), about.modified().ok()?))
    })
}
