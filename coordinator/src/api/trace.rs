//! Follows each request through the server: its id, its log line, its count.

use axum::extract::Request;
use axum::http::HeaderValue;
use axum::middleware::Next;
use axum::response::Response;

use super::limits;
use super::request::random;
use crate::metrics;

const HEADER: &str = "x-request-id";

/// The client's id for a request, where it sent a sane one, else our own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestId(pub String);

pub async fn follow(mut request: Request, next: Next) -> Response {
    let given = request.headers().get(HEADER).and_then(|value| value.to_str().ok());
    let id = match given {
        Some(id) if is_sane(id) => id.to_string(),
        _ => format!("{:016x}{:016x}", random(), random()),
    };
    let (method, route) = (request.method().clone(), route(request.uri().path()));
    request.extensions_mut().insert(RequestId(id.clone()));
    let mut response = next.run(request).await;
    let code = response.status().as_u16();
    tracing::debug!(%method, route, code, id, "request");
    metrics::http_request(route, code);
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(HEADER, value);
    }
    response
}

fn is_sane(id: &str) -> bool {
    !id.is_empty() && id.len() <= limits::REQUEST_ID_BYTES_MAX && id.bytes().all(|byte| byte.is_ascii_graphic())
}

/// The route of a path, for labels: the client's own text never becomes one.
fn route(path: &str) -> &'static str {
    const ROUTES: [&str; 14] = [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/tokenize",
        "/detokenize",
        "/status",
        "/livez",
        "/readyz",
        "/health",
        "/startupz",
        "/metrics",
        "/version",
        "/",
        "/v1/models/{id}",
    ];
    match ROUTES.iter().find(|&&route| route == path) {
        Some(route) => route,
        None if path.starts_with("/v1/models/") => "/v1/models/{id}",
        None => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_never_hold_the_client_s_text() {
        assert_eq!(route("/v1/models/org/name"), "/v1/models/{id}");
        assert_eq!(route("/etc/passwd"), "other");
        assert_eq!(route("/v1/completions"), "/v1/completions");
    }

    #[test]
    fn an_id_that_could_break_a_log_is_replaced() {
        for (id, sane) in [("abc-1", true), ("", false), ("a b", false), ("a\u{7f}", false), (&"x".repeat(129), false)]
        {
            assert_eq!(is_sane(id), sane, "{id:?}");
        }
    }
}
