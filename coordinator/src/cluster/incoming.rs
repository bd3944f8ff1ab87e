//! The node plane's sockets under TLS. Each connection is judged by the certificates that are in the files when it is made;
//! those that are open stay.

use super::stranger::Stranger;
use proto::tls::Renewed;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::{CertificateError, Error, ServerConfig};
use tokio_rustls::server::TlsStream;

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// Handshakes at a time; more wait in the system's backlog.
const HANDSHAKES_MAX: usize = 1024;

/// Connections whose handshake is done and that nobody serves yet.
pub const GUESTS_MAX: usize = 64;

/// Between an accept that failed, as it does without file descriptors, and the next.
const PAUSE: Duration = Duration::from_millis(100);

pub type Guest = std::io::Result<TlsStream<TcpStream>>;

/// Hands over those who belong, until nobody takes them.
pub async fn accept(listener: TcpListener, mut tls: Renewed<Arc<ServerConfig>>, guests: mpsc::Sender<Guest>) {
    let mut hands: JoinSet<(SocketAddr, Result<TlsStream<TcpStream>, Refused>)> = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if hands.len() < HANDSHAKES_MAX => match accepted {
                Ok((socket, address)) => {
                    match tls.look(Instant::now()) {
                        Some(Ok(())) => tracing::info!("the node plane's certificates were renewed"),
                        Some(Err(why)) => tracing::warn!("the node plane's certificates before it stay: {why}"),
                        None => {}
                    }
                    let acceptor = TlsAcceptor::from(tls.current().clone());
                    hands.spawn(async move { (address, shake(socket, acceptor).await) });
                }
                Err(error) => {
                    tracing::warn!("the node plane can't accept a connection: {error}");
                    tokio::time::sleep(PAUSE).await;
                }
            },
            Some(shaken) = hands.join_next() => match shaken {
                Ok((_, Ok(guest))) => if guests.send(Ok(guest)).await.is_err() {
                    return;
                },
                Ok((address, Err(refused))) => refused.stranger.refused(address, refused.why),
                Err(error) => tracing::error!("a handshake: {error}"),
            },
        }
    }
}

struct Refused {
    stranger: Stranger,
    why: String,
}

async fn shake(socket: TcpStream, acceptor: TlsAcceptor) -> Result<TlsStream<TcpStream>, Refused> {
    // A step's order is a small packet that must not wait for the next one.
    let _ = socket.set_nodelay(true);
    match tokio::time::timeout(HANDSHAKE, acceptor.accept(socket)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(Refused { stranger: stranger(&error), why: error.to_string() }),
        Err(_) => {
            Err(Refused { stranger: Stranger::Silent, why: format!("no handshake within {} s", HANDSHAKE.as_secs()) })
        }
    }
}

fn stranger(error: &std::io::Error) -> Stranger {
    let Some(error) = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) else {
        return Stranger::Silent;
    };
    match error {
        Error::NoCertificatesPresented => Stranger::NoCertificate,
        Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            Stranger::Authority
        }
        Error::InvalidCertificate(
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. },
        ) => Stranger::Expired,
        Error::InvalidCertificate(_) => Stranger::Certificate,
        Error::AlertReceived(_) => Stranger::Distrust,
        _ => Stranger::NoTls,
    }
}
