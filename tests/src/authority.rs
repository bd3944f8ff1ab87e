//! Certificates for tests: of several authorities, expired ones, and ones for other names.

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};
use time::{Duration, OffsetDateTime};

/// Vouches for others.
pub struct Authority {
    pub pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key, in PEM.
pub struct Pair {
    pub certificate: String,
    pub key: String,
}

/// Valid from so many days from now to so many.
fn params(name: &str, names: &[&str], days: (i64, i64)) -> Result<CertificateParams> {
    let mut params = CertificateParams::new(names.iter().map(ToString::to_string).collect::<Vec<_>>())?;
    params.distinguished_name.push(DnType::CommonName, name);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?;
    let now = OffsetDateTime::from_unix_timestamp(now.as_secs() as i64)?;
    (params.not_before, params.not_after) = (now + Duration::days(days.0), now + Duration::days(days.1));
    Ok(params)
}

impl Authority {
    pub fn new(name: &str) -> Result<Authority> {
        let mut params = params(name, &[], (-9, 9))?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate()?;
        Ok(Authority { pem: params.self_signed(&key)?.pem(), issuer: Issuer::new(params, key) })
    }

    /// For servers and clients of this name.
    pub fn issue(&self, name: &str) -> Result<Pair> {
        self.issue_valid(name, (-1, 1))
    }

    /// The same, valid from so many days from now to so many.
    pub fn issue_valid(&self, name: &str, days: (i64, i64)) -> Result<Pair> {
        let (mut params, key) = (params(name, &[name], days)?, KeyPair::generate()?);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        Ok(Pair { certificate: params.signed_by(&key, &self.issuer)?.pem(), key: key.serialize_pem() })
    }
}

/// A folder with what a process shows and whom it trusts.
pub struct Files(PathBuf);

impl Files {
    pub fn new(folder: &Path, ca: &str, pair: &Pair) -> Result<Files> {
        std::fs::create_dir_all(folder)?;
        let files = Files(folder.into());
        files.trust(ca)?;
        files.show(pair)?;
        Ok(files)
    }

    pub fn trust(&self, ca: &str) -> Result<()> {
        self.replace("ca.crt", ca)
    }

    pub fn show(&self, pair: &Pair) -> Result<()> {
        self.replace("tls.crt", &pair.certificate)?;
        self.replace("tls.key", &pair.key)
    }

    /// Their line in a process' settings.
    pub fn settings(&self) -> String {
        let file = |name: &str| self.0.join(name);
        let (ca, certificate, key) = (file("ca.crt"), file("tls.crt"), file("tls.key"));
        format!("tls = {{ ca = {ca:?}, certificate = {certificate:?}, key = {key:?} }}\n")
    }

    fn replace(&self, name: &str, text: &str) -> Result<()> {
        let beside = self.0.join("beside");
        std::fs::write(&beside, text)?;
        Ok(std::fs::rename(beside, self.0.join(name))?)
    }
}
