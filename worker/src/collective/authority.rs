//! Certificates for tests: an authority of their own, and whatever it would sign, right or wrong.

use proto::tls::{Tls, WORKER_NAME};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

/// An authority with a folder, gone with it.
pub struct Authority {
    folder: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

/// What a certificate says.
pub struct Says {
    pub name: &'static str,
    pub uses: Vec<ExtendedKeyUsagePurpose>,
    /// From now on, or since when it has been over.
    pub valid: Result<Duration, Duration>,
}

impl Default for Says {
    /// What a worker's certificate must say.
    fn default() -> Says {
        let uses = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        Says { name: WORKER_NAME, uses, valid: Ok(Duration::from_secs(3600)) }
    }
}

impl Authority {
    pub fn new() -> Authority {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("conclave-authority-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let folder = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().unwrap();
        std::fs::write(folder.join("ca.crt"), params.self_signed(&key).unwrap().pem()).unwrap();
        Authority { folder, issuer: Issuer::new(params, key) }
    }

    pub fn worker(&self) -> Tls {
        self.sign("worker", &Says::default())
    }

    /// A certificate and its key, in files of this name; those of before are replaced.
    pub fn sign(&self, file: &str, says: &Says) -> Tls {
        let mut params = CertificateParams::new([says.name.to_string()]).unwrap();
        params.extended_key_usages = says.uses.clone();
        let (now, day) = (SystemTime::now(), Duration::from_secs(24 * 3600));
        (params.not_before, params.not_after) = match says.valid {
            Ok(left) => ((now - day).into(), (now + left).into()),
            Err(over) => ((now - over - day).into(), (now - over).into()),
        };
        let key = KeyPair::generate().unwrap();
        let path = |end: &str| self.folder.join(format!("{file}.{end}"));
        std::fs::write(path("crt"), params.signed_by(&key, &self.issuer).unwrap().pem()).unwrap();
        std::fs::write(path("key"), key.serialize_pem()).unwrap();
        Tls { ca: self.folder.join("ca.crt"), certificate: path("crt"), key: path("key") }
    }
}

impl Drop for Authority {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
