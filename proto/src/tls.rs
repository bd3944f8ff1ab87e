//! Mutual TLS of the node plane: what a process shows and whom it trusts. `renewed` reads the files as they change,
//! `ranks` is about the workers' own sockets.

pub mod ranks;
mod renewed;

pub use renewed::Renewed;

use crate::address::bracketed;
use serde::Deserialize;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

/// The name that a coordinator's certificate must carry, whatever its address: a worker's certificate, stolen, opens no
/// coordinator.
pub const COORDINATOR_NAME: &str = "coordinator.conclave";

/// The name that a worker's certificate must carry, for both ends of a connection between workers. Such a certificate serves and
/// dials, so it needs both purposes.
pub const WORKER_NAME: &str = "worker.conclave";

/// PEM files, read anew for connections as they are made.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// The authority that vouches for every process of the cluster, and for nothing else.
    pub ca: PathBuf,
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// Why a process can't speak safely, or would speak unsafely.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{} can't be read: {why}", path.display())]
    Read { path: PathBuf, why: std::io::Error },
    #[error("{} holds no PEM block", path.display())]
    Empty { path: PathBuf },
    #[error("{} can't be used: {why}", path.display())]
    Unusable { path: PathBuf, why: String },
    #[error("{address} is no address that can be spoken to: {why}")]
    Address { address: String, why: String },
    #[error("{what} on {address} would be open to other hosts: {remedy}, keep to loopback, or say `insecure`")]
    Exposed { what: &'static str, address: String, remedy: &'static str },
}

impl Tls {
    /// Speaks to none but a coordinator.
    pub fn client(&self) -> Result<ClientTlsConfig, TlsError> {
        let config = ClientTlsConfig::new().identity(self.identity()?).domain_name(COORDINATOR_NAME);
        Ok(config.ca_certificate(Certificate::from_pem(read(&self.ca)?)))
    }

    fn identity(&self) -> Result<Identity, TlsError> {
        Ok(Identity::from_pem(read(&self.certificate)?, read(&self.key)?))
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    let bytes = std::fs::read(path).map_err(|why| TlsError::Read { path: path.into(), why })?;
    match bytes.windows(11).any(|window| window == b"-----BEGIN ") {
        true => Ok(bytes),
        false => Err(TlsError::Empty { path: path.into() }),
    }
}

/// Whether `address`, `host:port`, certainly stays on this host.
pub fn is_loopback(address: &str) -> bool {
    match bracketed(address).parse::<SocketAddr>() {
        Ok(address) => address.ip().is_loopback(),
        Err(_) => address.rsplit_once(':').map_or(address, |(host, _)| host) == "localhost",
    }
}

/// Refuses an address that other hosts can reach, or that is another host's, where nothing guards it.
pub fn guard(
    what: &'static str,
    address: &str,
    (guarded, remedy): (bool, &'static str),
    insecure: bool,
) -> Result<(), TlsError> {
    match guarded || insecure || is_loopback(address) {
        true => Ok(()),
        false => Err(TlsError::Exposed { what, address: address.into(), remedy }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_hosts_addresses_need_no_guard() {
        for address in ["127.0.0.1:1", "127.9.9.9:0", "[::1]:7", "::1:7", "localhost:7070"] {
            assert!(is_loopback(address), "{address}");
        }
        for address in [
            "0.0.0.0:1",
            "10.0.0.1:1",
            "[::]:1",
            ":::1",
            "fd00::1:1",
            "conclave:7070",
            "localhost.example:1",
            "127.0.0.1.example:1",
        ] {
            assert!(!is_loopback(address), "{address}");
            assert!(guard("x", address, (false, "use TLS"), false).is_err());
            assert!(
                guard("x", address, (true, "use TLS"), false).is_ok() && guard("x", address, (false, ""), true).is_ok()
            );
        }
    }

    #[test]
    fn a_file_that_is_missing_or_no_pem_is_named() {
        let file = std::env::temp_dir().join(format!("conclave-tls-{}", std::process::id()));
        let tls = Tls { ca: file.clone(), certificate: file.clone(), key: file.clone() };
        let said = |error: Option<TlsError>| error.map(|e| e.to_string()).unwrap_or_default();
        assert!(said(Renewed::node_plane(&tls, std::time::Instant::now()).err()).contains("can't be read"));
        std::fs::write(&file, "x").expect("a temporary file");
        assert!(said(tls.client().err()).contains("holds no PEM block"));
        std::fs::write(&file, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
            .expect("a temporary file");
        assert!(said(Renewed::node_plane(&tls, std::time::Instant::now()).err()).contains("can't be used"));
        std::fs::remove_file(&file).expect("it was just written");
    }
}
