//! What operators read: the cluster as JSON, metrics, the version.

use std::sync::Arc;

use axum::Json;
use axum::extract;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use serde_json::{Value, json};

use super::State;
use super::error::ApiError;
use crate::cluster::driver::Ask;
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

/// Asks for a worker to be drained; accepted is not done: it is when the worker is no member any more.
pub async fn drain(
    extract::State(state): extract::State<Arc<State>>,
    extract::Path(worker): extract::Path<String>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let (answer, answered) = tokio::sync::oneshot::channel();
    let asked = match &state.asks {
        Some(asks) => asks.send(Ask::Drain { worker: worker.clone(), answer }).await.is_ok(),
        None => false,
    };
    let known = if asked { answered.await.ok() } else { None };
    match known {
        Some(Ok(())) => Ok((StatusCode::ACCEPTED, Json(json!({"worker": worker, "draining": true})))),
        Some(Err(message)) => Err(ApiError::Invalid { param: Some("worker".into()), message }),
        None => Err(ApiError::NotServing("the cluster's task has ended".into())),
    }
}

/// In Prometheus' text format.
pub async fn metrics(extract::State(state): extract::State<Arc<State>>) -> impl IntoResponse {
    let serving = state.obstacles().is_empty();
    metrics::observe_cluster(&state.view.borrow(), serving);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], metrics::render())
}
