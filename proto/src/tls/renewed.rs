//! What a process shows and whom it trusts, as its files have it: they may be renewed in place, one after another.

use super::ranks::Ranks;
use super::{Tls, TlsError, read};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between two looks of a node plane, so that strangers who knock keep neither its disk busy nor its thread.
const LOOK: Duration = Duration::from_secs(1);

/// Of a process' files, as they were read.
#[derive(PartialEq, Eq)]
struct Contents {
    ca: Vec<u8>,
    certificate: Vec<u8>,
    key: Vec<u8>,
}

/// The files' contents, understood.
pub(super) struct Credentials<'a> {
    pub files: &'a Tls,
    pub roots: Arc<RootCertStore>,
    pub shown: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
}

/// What TLS needs of the files, in the form `T` that its sockets take. A new authority or certificate gets a form of its own:
/// nobody resumes a session of before.
pub struct Renewed<T> {
    files: Tls,
    contents: Contents,
    form: fn(Credentials<'_>) -> Result<T, TlsError>,
    current: T,
    every: Duration,
    looked: Instant,
    /// Why what the files hold now is not in force.
    why: String,
}

impl Renewed<Arc<ServerConfig>> {
    /// For a coordinator's node plane. An error names the file that is missing or wrong.
    pub fn node_plane(files: &Tls, now: Instant) -> Result<Renewed<Arc<ServerConfig>>, TlsError> {
        Renewed::open(files, node_plane, (LOOK, now))
    }
}

impl Renewed<Ranks> {
    /// For the sockets between workers, looked at for each: who was renewed a moment before must not be refused. An error names the file that is missing or wrong.
    pub fn ranks(files: &Tls) -> Result<Renewed<Ranks>, TlsError> {
        Renewed::open(files, Ranks::new, (Duration::ZERO, Instant::now()))
    }
}

impl<T> Renewed<T> {
    fn open(
        files: &Tls,
        form: fn(Credentials<'_>) -> Result<T, TlsError>,
        (every, looked): (Duration, Instant),
    ) -> Result<Renewed<T>, TlsError> {
        let contents = files.contents()?;
        let current = form(files.credentials(&contents)?)?;
        Ok(Renewed { files: files.clone(), contents, form, current, every, looked, why: String::new() })
    }

    /// What is in force.
    pub fn current(&self) -> &T {
        &self.current
    }

    /// Looks at the files, unless it just did. What is wrong, as between the renewals of certificate and key, leaves in force
    /// what was there before. None where nothing is new.
    pub fn look(&mut self, now: Instant) -> Option<Result<(), TlsError>> {
        if now.saturating_duration_since(self.looked) < self.every {
            return None;
        }
        self.looked = now;
        match self.changed() {
            Ok(None) => self.why.clear(),
            Ok(Some((current, contents))) => {
                (self.current, self.contents) = (current, contents);
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

    fn changed(&self) -> Result<Option<(T, Contents)>, TlsError> {
        let contents = self.files.contents()?;
        if contents == self.contents {
            return Ok(None);
        }
        Ok(Some(((self.form)(self.files.credentials(&contents)?)?, contents)))
    }
}

impl Tls {
    fn contents(&self) -> Result<Contents, TlsError> {
        Ok(Contents { ca: read(&self.ca)?, certificate: read(&self.certificate)?, key: read(&self.key)? })
    }

    fn credentials(&self, contents: &Contents) -> Result<Credentials<'_>, TlsError> {
        let mut roots = RootCertStore::empty();
        for root in certificates(&self.ca, &contents.ca)? {
            roots.add(root).map_err(|error| unusable(&self.ca, error))?;
        }
        let shown = certificates(&self.certificate, &contents.certificate)?;
        let key = PrivateKeyDer::from_pem_slice(&contents.key).map_err(|error| unusable(&self.key, error))?;
        Ok(Credentials { files: self, roots: roots.into(), shown, key })
    }
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let all = all.map_err(|error| unusable(path, error))?;
    if all.is_empty() { Err(unusable(path, "it holds no certificate")) } else { Ok(all) }
}

pub(super) fn unusable(path: &Path, why: impl ToString) -> TlsError {
    TlsError::Unusable { path: path.into(), why: why.to_string() }
}

/// Only those whom the authority vouches for come in; what they may do follows from the names they show.
fn node_plane(Credentials { files, roots, shown, key }: Credentials<'_>) -> Result<Arc<ServerConfig>, TlsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone()).build();
    let mut config = ServerConfig::builder_with_provider(provider)
        // Both ends are this program.
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider has suites of version 1.3")
        .with_client_cert_verifier(verifier.map_err(|error| unusable(&files.ca, error))?)
        .with_single_cert(shown, key)
        // A key of another certificate is found here.
        .map_err(|error| unusable(&files.key, error))?;
    // What gRPC speaks.
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config.into())
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
        let mut renewed = Renewed::node_plane(&tls, start).expect("files that fit");
        let before = renewed.current().clone();
        assert!(renewed.look(start + LOOK).is_none(), "nothing is new");
        let (certificate, key) = make();
        write(&tls.certificate, &certificate);
        assert!(renewed.look(start + LOOK * 3 / 2).is_none(), "it just looked");
        assert!(matches!(renewed.look(start + LOOK * 2), Some(Err(TlsError::Unusable { .. }))), "another's key");
        assert!(renewed.look(start + LOOK * 3).is_none(), "said once");
        assert!(Arc::ptr_eq(&before, renewed.current()));
        write(&tls.key, &key);
        assert!(matches!(renewed.look(start + LOOK * 4), Some(Ok(()))));
        assert!(!Arc::ptr_eq(&before, renewed.current()));
        std::fs::remove_dir_all(&folder).expect("it was just written");
    }
}
