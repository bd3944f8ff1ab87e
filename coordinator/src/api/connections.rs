//! The sockets: HTTP/1.1 alone, a bounded number of connections, and none that may wait for its next request for ever.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpSocket, TcpStream, ToSocketAddrs};
use tokio::sync::{Semaphore, watch};

use super::limits;
use super::patient::Patient;

/// Between an accept that failed, as it does without file descriptors, and the next.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Listens. A crowd's connections wait with the system: one that finds no room there comes again a second later.
pub async fn listen(address: impl ToSocketAddrs) -> std::io::Result<TcpListener> {
    let mut failed = std::io::Error::from(std::io::ErrorKind::AddrNotAvailable);
    for address in tokio::net::lookup_host(address).await? {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        // A server that is started again need not wait for connections that ended.
        socket.set_reuseaddr(true)?;
        match socket.bind(address).and_then(|()| socket.listen(limits::BACKLOG)) {
            Ok(listener) => return Ok(listener),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

/// Answers on every connection until `shutdown` resolves, then takes no new ones and finishes what is under way.
pub async fn serve(listener: TcpListener, router: Router, shutdown: impl Future<Output = ()>) {
    let places = Arc::new(Semaphore::new(connections_max()));
    let (stop, stopping) = watch::channel(false);
    let accepting = async {
        loop {
            // Without a free place clients wait in the system's backlog until an idle connection's time is up.
            let place = Arc::clone(&places).acquire_owned().await.expect("the semaphore is never closed");
            let socket = match listener.accept().await {
                Ok((socket, _)) => socket,
                Err(error) => {
                    tracing::debug!("a connection could not be accepted: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let (router, stopping) = (router.clone(), stopping.clone());
            tokio::spawn(async move {
                answer(socket, router, stopping).await;
                drop(place);
            });
        }
    };
    tokio::select! {
        () = accepting => {}
        () = shutdown => {}
    }
    drop(listener);
    let _ = stop.send(true);
    // Each connection holds a receiver.
    drop(stopping);
    stop.closed().await;
}

async fn answer(socket: TcpStream, router: Router, mut stopping: watch::Receiver<bool>) {
    // A token is a small packet that must not wait for the next one.
    let _ = socket.set_nodelay(true);
    let socket = Patient::new(socket, limits::WRITE_TIME_MAX, |socket| {
        // Else the system would keep what was not read, and go on asking whether it may come.
        let _ = socket.set_zero_linger();
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits::HEAD_TIME_MAX)
        .serve_connection(TokioIo::new(socket), TowerToHyperService::new(router));
    tokio::pin!(connection);
    let asked = async {
        // An error means that the server is gone, which is a stop too.
        let _ = stopping.wait_for(|&stop| stop).await;
    };
    // What a client's connection dies of is the client's business.
    let outcome = tokio::select! {
        outcome = connection.as_mut() => outcome,
        () = asked => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = outcome {
        tracing::debug!("a connection ended: {error}");
    }
}

/// As many as file descriptors allow, with some left for everything else.
fn connections_max() -> usize {
    let text = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let files =
        text.lines().find_map(|line| line.strip_prefix("Max open files")?.split_whitespace().next()?.parse().ok());
    files.map_or(limits::CONNECTIONS_MAX, |files: usize| {
        files.saturating_sub(limits::FILES_KEPT).clamp(limits::CONNECTIONS_LEAST, limits::CONNECTIONS_MAX)
    })
}

#[cfg(test)]
mod tests {
    use super::super::harness::{Script, Server};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    #[tokio::test(start_paused = true)]
    async fn a_head_that_never_ends_and_a_silent_connection_are_closed() {
        let server = Server::start(Script::Say("ok")).await;
        for sent in ["", "GET /livez HTTP/1.1\r\nhost: x\r\nslow", "GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"] {
            let mut socket = TcpStream::connect(server.address).await.unwrap();
            socket.write_all(sent.as_bytes()).await.unwrap();
            let mut said = String::new();
            socket.read_to_string(&mut said).await.unwrap();
            assert_eq!(said.contains("200 OK"), sent.ends_with("\r\n\r\n"), "{sent:?}: {said}");
        }
    }
}
