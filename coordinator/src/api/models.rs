//! `GET /v1/models`: the one model, under each of its names.

use std::sync::Arc;

use axum::Json;
use axum::extract::{self, Path};
use serde_json::{Value, json};

use super::State;
use super::error::ApiError;
use super::request::unknown_model;

type Shared = extract::State<Arc<State>>;

pub async fn list(extract::State(state): Shared) -> Json<Value> {
    let models: Vec<Value> = state.model.names.iter().map(|name| model(&state, name)).collect();
    Json(json!({"object": "list", "data": models}))
}

pub async fn show(extract::State(state): Shared, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    match state.model.names.iter().find(|name| **name == id) {
        Some(name) => Ok(Json(model(&state, name))),
        None => Err(unknown_model(id.chars().take(200).collect(), &state.model)),
    }
}

fn model(state: &State, name: &str) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": state.began_unix_seconds,
        "owned_by": "conclave",
        "root": state.name(),
        "parent": null,
        "max_model_len": state.model_len_max(),
    })
}
