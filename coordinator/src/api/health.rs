//! Health that tells the truth, each answer with its reasons. `/livez` is about this process, `/readyz` about the whole
//! cluster: a coordinator whose workers are gone is alive, and must not be restarted for it.

use std::sync::Arc;

use axum::Json;
use axum::extract;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::State;

type Shared = extract::State<Arc<State>>;

/// The tasks of this process run.
pub async fn live(extract::State(state): Shared) -> Response {
    let reasons = match state.view.has_changed() {
        Ok(_) => Vec::new(),
        Err(_) => vec!["the cluster's task has ended".to_string()],
    };
    answer(&state, "live", reasons)
}

/// A request sent now would be answered.
pub async fn ready(extract::State(state): Shared) -> Response {
    let reasons = state.obstacles();
    answer(&state, "ready", reasons)
}

/// The cluster has served at least once.
pub async fn startup(extract::State(state): Shared) -> Response {
    let reasons = if state.has_started() { Vec::new() } else { state.obstacles() };
    answer(&state, "started", reasons)
}

fn answer(state: &State, word: &str, reasons: Vec<String>) -> Response {
    let code = if reasons.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let status = if reasons.is_empty() { word.to_string() } else { format!("not {word}") };
    let view = state.view.borrow();
    let body = json!({"status": status, "phase": view.phase, "epoch": view.epoch, "reasons": reasons});
    (code, Json(body)).into_response()
}
