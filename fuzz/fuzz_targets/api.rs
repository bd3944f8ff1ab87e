//! A request's body, through the whole router to the scheduler's door, where every job is refused. The first byte says
//! which endpoint it goes to. Nothing that a client sends is the server's own fault.

#![no_main]

use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use conclave_fuzz::demo_text;
use coordinator::api::keys::Keys;
use coordinator::api::request::{Defaults, ModelFacts};
use coordinator::api::view::{ClusterView, Phase};
use coordinator::api::{State, router};
use coordinator::schedule::job::{Door, Refusal, Submission};
use http_body_util::BodyExt;
use libfuzzer_sys::fuzz_target;
use std::sync::{Arc, OnceLock};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{mpsc, watch};
use tower::ServiceExt;

const PATHS: [&str; 4] = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"];

struct Server {
    runtime: Runtime,
    state: Arc<State>,
    _view: watch::Sender<ClusterView>,
}

fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| {
        let (submissions, received) = mpsc::channel(8);
        std::thread::spawn(move || refuse(received));
        let view = ClusterView { phase: Phase::Serving, ..ClusterView::default() };
        let (keeper, view) = watch::channel(view);
        let text = demo_text();
        let facts = ModelFacts {
            names: vec!["demo".into()],
            vocabulary: text.tokenizer.vocabulary(),
            model_len_max: 256,
            end_tokens: text.end_tokens.clone(),
            defaults: Defaults::default(),
            fingerprint: "fp".into(),
        };
        let state = State::new(Door::new(submissions), text, facts, Keys::new([]), view, 1 << 20);
        let runtime = Builder::new_current_thread().enable_time().build().expect("a runtime");
        Server { runtime, state: Arc::new(state), _view: keeper }
    })
}

/// Refuses every job, after a look at what the scheduler relies on.
fn refuse(mut received: mpsc::Receiver<Submission>) {
    while let Some(submission) = received.blocking_recv() {
        let job = &submission.job;
        assert!(job.choices >= 1 && job.prompt.len() + job.tokens_max as usize <= 256 && !job.prompt.is_empty());
        let sampling = &job.sampling;
        assert!(sampling.temperature >= 0.0 && sampling.top_p > 0.0 && sampling.repetition_penalty > 0.0);
        let refusal = Refusal::QueueFull { waiting: 1, waiting_max: 1 };
        let _ = submission.accepted.send(Err(refusal));
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((&kind, body)) = input.split_first() else { return };
    let server = server();
    server.runtime.block_on(async {
        let request = Request::post(PATHS[usize::from(kind) % 4])
            .header(header::CONTENT_LENGTH, body.len())
            .body(Body::from(body.to_vec()))
            .expect("a request");
        let answer = router(Arc::clone(&server.state)).oneshot(request).await.expect("an answer");
        let status = answer.status();
        let body = answer.into_body().collect().await.expect("a body").to_bytes();
        let told: serde_json::Value = serde_json::from_slice(&body).expect("every answer is JSON");
        if status != StatusCode::OK {
            assert!(told["error"]["message"].is_string(), "{status} {told}");
        }
        assert_ne!(status, StatusCode::INTERNAL_SERVER_ERROR, "{told}");
    });
});
