//! What operators read: the cluster as JSON, metrics, the version.

use std::sync::Arc;

use axum::Json;
use axum::extract;
use axum::http::header;
use axum::response::IntoResponse;
use serde_json::{Value, json};

use super::State;
use crate::metrics;

pub async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// The cluster now: what `conclave status` and the page show.
pub async fn status(extract::State(state): extract::State<Arc<State>>) -> Json<Value> {
    let reasons = state.obstacles();
    let view = state.view.borrow().clone();
    let progress_age_ms = view.progress.map(|at| at.elapsed().as_millis() as u64);
    let ready = reasons.is_empty();
    let mut body = serde_json::to_value(view).expect("a view is plain data");
    let fields = body.as_object_mut().expect("a struct becomes an object");
    fields.insert("ready".into(), json!(ready));
    fields.insert("reasons".into(), json!(reasons));
    fields.insert("progress_age_ms".into(), json!(progress_age_ms));
    fields.insert("model".into(), json!(state.name()));
    fields.insert("model_len_max".into(), json!(state.model_len_max()));
    fields.insert("uptime_seconds".into(), json!(state.began.elapsed().as_secs()));
    fields.insert("version".into(), json!(env!("CARGO_PKG_VERSION")));
    Json(body)
}

/// In Prometheus' text format.
pub async fn metrics(extract::State(state): extract::State<Arc<State>>) -> impl IntoResponse {
    let serving = state.obstacles().is_empty();
    metrics::observe_cluster(&state.view.borrow(), serving);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], metrics::render())
}
