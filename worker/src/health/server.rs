//! The probes' little HTTP server: a thread of its own, four paths, few connections.

use super::{Facts, Pulse};
use crate::metrics;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::json;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// Connections at once; others wait in the system's backlog.
const CONNECTIONS_MAX: usize = 32;

/// Slowest head of a request, and longest silence between two.
const HEAD_MAX: Duration = Duration::from_secs(5);

/// How often is looked whether anything moved.
const LOOK: Duration = Duration::from_millis(100);

/// Before the next accept after one that failed, as it does without file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Answers at `address` (`ip:port`) as long as the process lives; where it listens.
pub fn start(address: &str, pulse: Arc<Pulse>) -> std::io::Result<SocketAddr> {
    let listener = std::net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let local = listener.local_addr()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let run = move || runtime.block_on(serve(listener, pulse));
    std::thread::Builder::new().name("health".into()).spawn(run)?;
    Ok(local)
}

async fn serve(listener: std::net::TcpListener, pulse: Arc<Pulse>) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!("health can't be asked: {error}"),
    };
    let mut looks = tokio::time::interval(LOOK);
    let mut open = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if open.len() < CONNECTIONS_MAX => match accepted {
                Ok((socket, _)) => {
                    open.spawn(converse(socket, pulse.clone()));
                }
                Err(error) => {
                    tracing::debug!("a probe could not be accepted: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = open.join_next() => {}
            _ = looks.tick() => {
                pulse.look(Instant::now());
            }
        }
    }
}

async fn converse(socket: TcpStream, pulse: Arc<Pulse>) {
    let answers = service_fn(move |request: Request<Incoming>| {
        let response = answer(request.method(), request.uri().path(), &pulse);
        async move { Ok::<_, Infallible>(response) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_MAX)
        .serve_connection(TokioIo::new(socket), answers);
    if let Err(error) = connection.await {
        tracing::debug!("a probe's connection ended: {error}");
    }
}

fn answer(method: &Method, path: &str, pulse: &Pulse) -> Response<Full<Bytes>> {
    let facts = pulse.look(Instant::now());
    let (code, kind, text) = match path {
        _ if method != Method::GET && method != Method::HEAD => plain(StatusCode::METHOD_NOT_ALLOWED, "only GET"),
        "/livez" => verdict("live", facts.deadly(), Vec::new(), &facts),
        "/readyz" => verdict("ready", facts.obstacles(), facts.remarks(), &facts),
        "/startupz" => verdict("started", facts.beginnings(), Vec::new(), &facts),
        "/metrics" => (StatusCode::OK, "text/plain; version=0.0.4", metrics::render(&facts, pulse.refused())),
        _ => plain(StatusCode::NOT_FOUND, "there are /livez /readyz /startupz /metrics"),
    };
    let response = Response::builder().status(code).header(CONTENT_TYPE, kind);
    response.body(Full::new(Bytes::from(text))).expect("a code and a constant header")
}

fn plain(code: StatusCode, text: &str) -> (StatusCode, &'static str, String) {
    (code, "text/plain", text.into())
}

/// The coordinator's shape. Without reasons against it, `remarks` stand there.
fn verdict(
    word: &str,
    against: Vec<String>,
    remarks: Vec<String>,
    facts: &Facts,
) -> (StatusCode, &'static str, String) {
    let holds = against.is_empty();
    let code = if holds { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let status = if holds { word.to_string() } else { format!("not {word}") };
    let reasons = if holds { remarks } else { against };
    let body = json!({"status": status, "phase": facts.stage.word(), "epoch": facts.epoch, "reasons": reasons});
    (code, "application/json", body.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::rank::Counters;
    use std::io::{Read, Write};

    fn asked(address: SocketAddr, method: &str, path: &str) -> String {
        let mut socket = std::net::TcpStream::connect(address).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        write!(socket, "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
        let mut said = String::new();
        socket.read_to_string(&mut said).unwrap();
        said
    }

    #[test]
    fn probes_hear_a_code_and_its_reasons_and_scrapers_every_name() {
        let pulse = Pulse::new(Counters::default(), Arc::default(), Instant::now());
        let address = start("127.0.0.1:0", Arc::new(pulse)).unwrap();
        let live = asked(address, "GET", "/livez");
        assert!(live.starts_with("HTTP/1.1 200") && live.contains("\"status\":\"live\""), "{live}");
        let ready = asked(address, "GET", "/readyz?verbose");
        assert!(ready.starts_with("HTTP/1.1 503") && ready.contains("no plan needs this worker now"), "{ready}");
        assert!(asked(address, "GET", "/startupz").starts_with("HTTP/1.1 503"));
        let text = asked(address, "GET", "/metrics");
        for name in metrics::NAMES {
            assert!(text.contains(&format!("# HELP {name} ")) && text.contains(&format!("\n{name}")), "{name}: {text}");
        }
        assert!(asked(address, "GET", "/x").starts_with("HTTP/1.1 404"));
        assert!(asked(address, "POST", "/livez").starts_with("HTTP/1.1 405"));
    }
}
