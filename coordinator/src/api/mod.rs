//! The API: OpenAI's endpoints, health, metrics and a page, over HTTP/1.1. Only here is OpenAI's JSON known; a request
//! becomes a [`Job`](crate::schedule::job::Job), its outputs become the response. Text is [`crate::text`]'s
//! business, scheduling is behind [`Door`].

pub mod admin;
pub mod answer;
pub mod auth;
pub mod chat;
pub mod completions;
#[cfg(test)]
mod conformance;
pub mod connections;
pub mod crowd;
pub mod error;
pub mod fields;
#[cfg(test)]
mod harness;
pub mod health;
pub mod keyfile;
pub mod keys;
pub mod limits;
pub mod logprobs;
pub mod models;
pub mod page;
pub mod patient;
pub mod rates;
pub mod refused;
pub mod request;
pub mod running;
pub mod shape;
pub mod sse;
pub mod tokens;
pub mod trace;
pub mod view;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::{Method, StatusCode, Uri, header};
use axum::middleware;
use axum::routing::{get, post};
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};

use self::crowd::Crowd;
use self::error::ApiError;
use self::fields::Fields;
use self::keys::Keys;
use self::request::ModelFacts;
use self::view::{ClusterView, Phase};
use crate::cluster::driver::Ask;
use crate::metrics;
use crate::schedule::job::Door;
use crate::text::Text;

/// How often recorded samples are folded into histograms.
const UPKEEP: Duration = Duration::from_secs(5);

/// What all requests share.
pub struct State {
    pub door: Door,
    pub text: Arc<Text>,
    pub model: ModelFacts,
    pub keys: Keys,
    pub view: watch::Receiver<ClusterView>,
    pub body_bytes_max: usize,
    /// Where operators' wishes go, where there is a cluster to fulfil them.
    asks: Option<mpsc::Sender<Ask>>,
    /// Bounds how many long prompts are tokenised at once, so that the scheduler keeps its core.
    tokenising: Semaphore,
    /// Bounds how many long bodies arrive at once.
    arriving: Arc<Semaphore>,
    /// Bounds how many long bodies are held parsed, which takes many times their length.
    parsed: Arc<Semaphore>,
    crowd: Crowd,
    started: AtomicBool,
    began: Instant,
    began_unix_seconds: u64,
}

impl State {
    pub fn new(
        door: Door,
        text: Text,
        model: ModelFacts,
        keys: Keys,
        view: watch::Receiver<ClusterView>,
        body_bytes_max: usize,
    ) -> State {
        assert!(!model.names.is_empty(), "a model needs a name");
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        State {
            door,
            text: Arc::new(text),
            model,
            keys,
            view,
            body_bytes_max,
            asks: None,
            tokenising: Semaphore::new(cores.div_ceil(2)),
            arriving: Arc::new(Semaphore::new(limits::LONG_BODIES_MAX)),
            parsed: Arc::new(Semaphore::new(cores.clamp(2, limits::LONG_BODIES_MAX))),
            crowd: Crowd::default(),
            started: AtomicBool::new(false),
            began: Instant::now(),
            began_unix_seconds: unix_seconds(),
        }
    }

    /// Takes operators' wishes too.
    pub fn asking(self, asks: mpsc::Sender<Ask>) -> State {
        State { asks: Some(asks), ..self }
    }

    /// Longest sequence that the current plan holds.
    pub fn model_len_max(&self) -> usize {
        match self.view.borrow().model_len_max {
            0 => self.model.model_len_max,
            planned => planned.min(self.model.model_len_max),
        }
    }

    /// The name that answers carry.
    pub fn name(&self) -> &str {
        &self.model.names[0]
    }

    /// Why the cluster is not ready to answer; empty when it is.
    pub fn obstacles(&self) -> Vec<String> {
        let view = self.view.borrow();
        if self.view.has_changed().is_err() {
            return vec!["the cluster's task has ended".into()];
        }
        if view.phase != Phase::Serving {
            let mut reasons = view.reasons.clone();
            if reasons.is_empty() {
                reasons.push(format!("the cluster is {}", view.phase.name()));
            }
            return reasons;
        }
        self.started.store(true, Ordering::Relaxed);
        match view.progress.map(|at| at.elapsed()) {
            Some(age) if age > limits::PROGRESS_AGE_MAX => {
                vec![format!("no step and no heartbeat completed for {:.1} s", age.as_secs_f64())]
            }
            _ => Vec::new(),
        }
    }

    /// Whether the cluster has served at any time.
    pub fn has_started(&self) -> bool {
        let phase = self.view.borrow().phase;
        if matches!(phase, Phase::Serving | Phase::Recovering | Phase::Draining) {
            self.started.store(true, Ordering::Relaxed);
        }
        self.started.load(Ordering::Relaxed)
    }

    /// Refuses requests that nobody would work on. While a served cluster recovers they may wait in the queue.
    fn check_serving(&self) -> Result<(), ApiError> {
        let waits = self.has_started();
        let view = self.view.borrow();
        let takes = match view.phase {
            Phase::Serving | Phase::Recovering => true,
            Phase::Planning | Phase::Loading => waits,
            Phase::Gathering | Phase::Draining => false,
        };
        if takes && self.view.has_changed().is_ok() {
            return Ok(());
        }
        let reasons = view.reasons.join("; ");
        let colon = if reasons.is_empty() { "" } else { ": " };
        Err(ApiError::NotServing(format!("not serving, the cluster is {}{colon}{reasons}", view.phase.name())))
    }

    /// Refuses a request that would find the queue full, before anything is computed for it.
    fn check_room(&self) -> Result<(), ApiError> {
        match self.crowd.is_there(self.began.elapsed()) {
            true => Err(ApiError::Busy("the queue is full; please try again".into())),
            false => Ok(()),
        }
    }

    /// Runs text work of about `bytes` bytes: short work here, long work on another thread, a few at a time.
    async fn text_work<T, W>(&self, bytes: usize, work: W) -> Result<T, ApiError>
    where
        T: Send + 'static,
        W: FnOnce() -> Result<T, ApiError> + Send + 'static,
    {
        if bytes <= limits::INLINE_TEXT_BYTES {
            return work();
        }
        let _permit = self.tokenising.acquire().await.expect("the semaphore is never closed");
        match tokio::task::spawn_blocking(work).await {
            Ok(result) => result,
            Err(_) => Err(ApiError::Failed("the prompt could not be tokenised".into())),
        }
    }
}

/// Seconds since 1970, as OpenAI's `created`.
pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// A long body's turn among the few.
async fn turn(places: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, ApiError> {
    let turn = Arc::clone(places).acquire_owned();
    match tokio::time::timeout(limits::BODY_TURN_TIME_MAX, turn).await {
        Ok(turn) => Ok(turn.expect("the semaphore is never closed")),
        Err(_) => Err(ApiError::Busy("too many long requests at once; please try again".into())),
    }
}

/// Reads a request's body as a JSON object, whatever content type it claims.
async fn read_fields(state: &State, request: Request) -> Result<Fields, ApiError> {
    let body = read_body(state, request).await?;
    parse_fields(state, &body).await
}

/// The same of a request for the scheduler, if there is room for it.
async fn read_work(state: &State, request: Request) -> Result<Fields, ApiError> {
    // Read though it may be refused: a connection with nothing left on it can be used again.
    let body = read_body(state, request).await?;
    state.check_room()?;
    parse_fields(state, &body).await
}

async fn read_body(state: &State, request: Request) -> Result<Bytes, ApiError> {
    let too_large = ApiError::TooLarge { bytes_max: state.body_bytes_max };
    let length = request.headers().get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length > state.body_bytes_max as u64) {
        return Err(too_large);
    }
    // A body without a length may be long.
    let arriving = match length {
        Some(length) if length <= limits::SMALL_BODY_BYTES as u64 => None,
        _ => Some(turn(&state.arriving).await?),
    };
    let body = match tokio::time::timeout(limits::BODY_TIME_MAX, Bytes::from_request(request, &())).await {
        Ok(Ok(body)) => Ok(body),
        Ok(Err(rejection)) if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE => Err(too_large),
        Ok(Err(rejection)) => {
            let message = format!("the body could not be read: {}", rejection.body_text());
            Err(ApiError::Invalid { param: None, message })
        }
        Err(_) => Err(ApiError::TooSlow { seconds: limits::BODY_TIME_MAX.as_secs() }),
    };
    drop(arriving);
    body
}

async fn parse_fields(state: &State, body: &[u8]) -> Result<Fields, ApiError> {
    let turn = if body.len() > limits::SMALL_BODY_BYTES { Some(turn(&state.parsed).await?) } else { None };
    let values_max = limits::VALUES_MAX.max(2 * state.model.model_len_max);
    let mut fields = Fields::parse(body, values_max)?;
    fields.turn = turn;
    Ok(fields)
}

/// All routes.
pub fn router(state: Arc<State>) -> Router {
    let guarded = Router::new()
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::show))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route("/status", get(admin::status))
        .route("/drain/{worker}", post(admin::drain))
        .route_layer(middleware::from_fn_with_state(Arc::clone(&state), auth::guard));
    // Probes and scrapers hold no key; neither says anything of prompts or of members.
    let open = Router::new()
        .route("/livez", get(health::live))
        .route("/readyz", get(health::ready))
        .route("/health", get(health::ready))
        .route("/startupz", get(health::startup))
        .route("/metrics", get(admin::metrics))
        .route("/version", get(admin::version))
        .route("/", get(page::show));
    let body_bytes_max = state.body_bytes_max;
    guarded
        .merge(open)
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(axum::extract::DefaultBodyLimit::max(body_bytes_max))
        .layer(middleware::from_fn(trace::follow))
        .with_state(state)
}

/// Answers until `shutdown` resolves, then takes no new connections and finishes what is under way.
pub async fn serve(listener: TcpListener, state: Arc<State>, shutdown: impl Future<Output = ()>) {
    let keys = Arc::clone(&state);
    let server = connections::serve(listener, router(state), shutdown);
    let upkeep = async {
        let mut ticks = tokio::time::interval(UPKEEP);
        loop {
            ticks.tick().await;
            metrics::upkeep();
        }
    };
    tokio::select! {
        () = server => {}
        () = upkeep => {}
        () = keys.keys.follow() => {}
    }
}

async fn unknown_path(uri: Uri) -> ApiError {
    ApiError::UnknownPath(uri.path().chars().take(200).collect())
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    ApiError::WrongMethod { method: method.to_string(), path: uri.path().chars().take(200).collect() }
}
