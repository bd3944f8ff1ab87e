//! What a coordinator's node plane shows and whom it lets in, as its files have it: they may be renewed in place.

use super::{Tls, TlsError, read};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between two looks at the files, so that strangers who knock can't keep the disk busy.
const LOOK: Duration = Duration::from_secs(1);

/// Of a process' files, as they were read.
#[derive(PartialEq, Eq)]
struct Contents {
    ca: Vec<u8>,
    certificate: Vec<u8>,
    key: Vec<u8>,
}

/// What a server shows and whom it trusts, as its files have it: they may be renewed in place, one after another.
pub struct Renewed {
    tls: Tls,
    contents: Contents,
    config: Arc<ServerConfig>,
    looked: Instant,
    /// Why what the files hold now is not in force.
    why: String,
}

impl Renewed {
    pub fn open(tls: &Tls, now: Instant) -> Result<Renewed, TlsError> {
        let contents = tls.contents()?;
        let config = Arc::new(tls.server(&contents)?);
        Ok(Renewed { tls: tls.clone(), contents, config, looked: now, why: String::new() })
    }

    /// What is in force. A new authority or certificate has sessions of its own: nobody resumes one of before.
    pub fn config(&self) -> Arc<ServerConfig> {
        self.config.clone()
    }

    /// Looks at the files, unless it just did. What is wrong, as between the renewals of certificate and key, leaves in force
    /// what was there before. None where nothing is new.
    pub fn look(&mut self, now: Instant) -> Option<Result<(), TlsError>> {
        if now.saturating_duration_since(self.looked) < LOOK {
            return None;
        }
        self.looked = now;
        let taken = self.tls.contents().and_then(|contents| match contents == self.contents {
            true => Ok(None),
            false => Ok(Some((self.tls.server(&contents)?, contents))),
        });
        match taken {
            Ok(None) => self.why.clear(),
            Ok(Some((config, contents))) => {
                (self.config, self.contents) = (Arc::new(config), contents);
                self.why.clear();
                return Some(Ok(()));
            }
            Err(error) if error.to_string() != self.why => {
                self.why = error.to_string();
                return Some(Err(error));
            }
            Err(_) => {}
        }
        None
    }
}

impl Tls {
    fn contents(&self) -> Result<Contents, TlsError> {
        Ok(Contents { ca: read(&self.ca)?, certificate: read(&self.certificate)?, key: read(&self.key)? })
    }

    /// Only those whom the authority vouches for come in.
    fn server(&self, contents: &Contents) -> Result<ServerConfig, TlsError> {
        let unusable = |path: &PathBuf, why: String| TlsError::Unusable { path: path.clone(), why };
        let certificates = |path, pem: &[u8]| -> Result<Vec<CertificateDer<'static>>, TlsError> {
            let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
            all.map_err(|e| unusable(path, e.to_string()))
        };
        let mut roots = RootCertStore::empty();
        for root in certificates(&self.ca, &contents.ca)? {
            roots.add(root).map_err(|e| unusable(&self.ca, e.to_string()))?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone()).build();
        let verifier = verifier.map_err(|e| unusable(&self.ca, e.to_string()))?;
        let chain = certificates(&self.certificate, &contents.certificate)?;
        let key = PrivateKeyDer::from_pem_slice(&contents.key).map_err(|e| unusable(&self.key, e.to_string()))?;
        let config = ServerConfig::builder_with_provider(provider)
            // Both ends are this program.
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| unusable(&self.certificate, e.to_string()))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key);
        let mut config = config.map_err(|e| unusable(&self.certificate, e.to_string()))?;
        // What gRPC speaks.
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::super::COORDINATOR_NAME;
    use super::*;
    use std::path::Path;

    #[test]
    fn renewed_files_count_once_all_of_them_fit() {
        let folder = std::env::temp_dir().join(format!("conclave-renewed-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a temporary folder");
        let make = || {
            let key = rcgen::KeyPair::generate().expect("a key");
            let names = vec![COORDINATOR_NAME.to_string()];
            let certificate = rcgen::CertificateParams::new(names).and_then(|params| params.self_signed(&key));
            (certificate.expect("a certificate").pem(), key.serialize_pem())
        };
        let tls = Tls { ca: folder.join("ca"), certificate: folder.join("crt"), key: folder.join("key") };
        let write = |path: &Path, text: &str| std::fs::write(path, text).expect("a temporary file");
        let (certificate, key) = make();
        write(&tls.ca, &certificate);
        write(&tls.certificate, &certificate);
        write(&tls.key, &key);
        let start = Instant::now();
        let mut renewed = Renewed::open(&tls, start).expect("files that fit");
        let before = renewed.config();
        assert!(renewed.look(start + LOOK).is_none(), "nothing is new");
        let (certificate, key) = make();
        write(&tls.certificate, &certificate);
        assert!(renewed.look(start + LOOK * 3 / 2).is_none(), "it just looked");
        assert!(matches!(renewed.look(start + LOOK * 2), Some(Err(TlsError::Unusable { .. }))), "another's key");
        assert!(renewed.look(start + LOOK * 3).is_none(), "said once");
        assert!(Arc::ptr_eq(&before, &renewed.config()));
        write(&tls.key, &key);
        assert!(matches!(renewed.look(start + LOOK * 4), Some(Ok(()))));
        assert!(!Arc::ptr_eq(&before, &renewed.config()));
        std::fs::remove_dir_all(&folder).expect("it was just written");
    }
}
