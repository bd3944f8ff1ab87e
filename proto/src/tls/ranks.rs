//! TLS between workers, for numbers that ranks exchange: version 1.3 alone, certificates on both sides, one authority.
//! The sockets are the worker's (`worker::collective`); here is only who is let in.

use super::renewed::{Credentials, unusable};
use super::{TlsError, WORKER_NAME};
use rustls::client::{Resumption, WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    ServerConfig, SignatureScheme,
};
use std::sync::Arc;

/// What a worker shows to other workers, when it dials and when it listens.
#[derive(Clone)]
pub struct Ranks {
    pub dials: Arc<ClientConfig>,
    pub listens: Arc<ServerConfig>,
}

/// The name that every worker's certificate carries.
pub fn worker_name() -> ServerName<'static> {
    ServerName::try_from(WORKER_NAME).expect("a constant that is a host's name")
}

impl Ranks {
    pub(super) fn new(Credentials { files, roots, shown, key }: Credentials<'_>) -> Result<Ranks, TlsError> {
        let provider = Arc::new(ring::default_provider());
        // A key of another certificate is found here.
        let mismatch = |error: Error| unusable(&files.key, error);
        let server = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone()).build();
        let mut dials = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .expect("the provider has suites of version 1.3")
            .with_webpki_verifier(server.map_err(|error| unusable(&files.ca, error))?)
            .with_client_auth_cert(shown.clone(), key.clone_key())
            .map_err(mismatch)?;
        // Connections last as long as an epoch: there is nothing to resume, and nothing is said after the handshake.
        dials.resumption = Resumption::disabled();
        let mut listens = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .expect("the provider has suites of version 1.3")
            .with_client_cert_verifier(Workers::new(roots, provider).map_err(|why| unusable(&files.ca, why))?)
            .with_single_cert(shown, key)
            .map_err(mismatch)?;
        listens.send_tls13_tickets = 0;
        Ok(Ranks { dials: Arc::new(dials), listens: Arc::new(listens) })
    }
}

/// Lets in whom the authority vouches for, by the name of a worker: a coordinator's certificate joins no ranks.
#[derive(Debug)]
struct Workers {
    inner: Arc<dyn ClientCertVerifier>,
    name: ServerName<'static>,
}

impl Workers {
    fn new(roots: Arc<RootCertStore>, provider: Arc<CryptoProvider>) -> Result<Arc<Workers>, String> {
        let inner = WebPkiClientVerifier::builder_with_provider(roots, provider).build();
        Ok(Arc::new(Workers { inner: inner.map_err(|error| error.to_string())?, name: worker_name() }))
    }
}

impl ClientCertVerifier for Workers {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.inner.verify_client_cert(end_entity, intermediates, now)?;
        verify_server_name(&ParsedCertificate::try_from(end_entity)?, &self.name)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// Whether a certificate is what is wrong: trying again helps nobody then. Anything else may be the network's doing, as a bit that
/// was flipped on the way; what is said of certificates crosses it encrypted.
pub fn is_about_certificates(error: &Error) -> bool {
    use AlertDescription as Alert;
    match error {
        Error::InvalidCertificate(_) | Error::NoCertificatesPresented => true,
        Error::AlertReceived(alert) => matches!(
            alert,
            Alert::UnknownCA
                | Alert::DecryptError
                | Alert::CertificateExpired
                | Alert::BadCertificate
                | Alert::UnsupportedCertificate
                | Alert::CertificateRequired
        ),
        _ => false,
    }
}

/// Why a handshake failed, in words for whoever has to mend it; the subject is the peer.
pub fn reason(error: &Error) -> String {
    use AlertDescription as Alert;
    match error {
        Error::InvalidCertificate(error) => certificate(error),
        Error::NoCertificatesPresented => "shows no certificate".into(),
        Error::InvalidMessage(_) => "does not speak TLS".into(),
        Error::PeerIncompatible(_) | Error::AlertReceived(Alert::ProtocolVersion | Alert::HandshakeFailure) => {
            format!("does not agree on TLS 1.3 with certificates: {error}")
        }
        Error::AlertReceived(alert) => {
            let why = match alert {
                Alert::UnknownCA | Alert::DecryptError => "it is of another authority",
                Alert::CertificateExpired => "it has expired, or is not valid yet",
                Alert::BadCertificate => "it is not for worker.conclave",
                Alert::UnsupportedCertificate => "it may not be used by clients and servers both",
                Alert::CertificateRequired => "it was not shown",
                other => return format!("breaks TLS off: {other:?}"),
            };
            format!("refuses this worker's certificate: {why}")
        }
        other => format!("breaks TLS: {other}"),
    }
}

fn certificate(error: &CertificateError) -> String {
    use CertificateError as Wrong;
    match error {
        // Two authorities of one name differ only in their keys.
        Wrong::UnknownIssuer | Wrong::BadSignature => "shows a certificate of another authority".into(),
        Wrong::Expired => "shows a certificate that has expired".into(),
        Wrong::ExpiredContext { time, not_after } => {
            let seconds = time.as_secs().saturating_sub(not_after.as_secs());
            format!("shows a certificate that has expired {seconds} s ago")
        }
        Wrong::NotValidYet | Wrong::NotValidYetContext { .. } => "shows a certificate that is not valid yet".into(),
        Wrong::NotValidForNameContext { presented, .. } => {
            // `DnsName("coordinator.conclave")`, and so on.
            let names: Vec<&str> = presented.iter().map(|name| name.split('"').nth(1).unwrap_or(name)).collect();
            format!("shows a certificate for {} instead of {WORKER_NAME}", names.join(", "))
        }
        Wrong::NotValidForName => format!("shows a certificate that is not for {WORKER_NAME}"),
        Wrong::InvalidPurpose | Wrong::InvalidPurposeContext { .. } => {
            "shows a certificate that may not be used by clients and servers both".into()
        }
        other => format!("shows a certificate that can't be used: {other}"),
    }
}
