//! Tests of what all endpoints share: bad input, wrong routes, keys, limits, health. Each case is one clear error, and
//! the server goes on.

use serde_json::{Value, json};

use super::harness::{Reply, Script, Server, serving};
use super::view::{ClusterView, Phase};
use crate::schedule::Turn;
use crate::schedule::job::Refusal;

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// Checks that an answer is an error in OpenAI's shape, and returns its message.
fn error(reply: &Reply, status: u16, param: Option<&str>, what: &str) -> String {
    assert_eq!(reply.status, status, "{what}: {}", reply.text);
    assert_eq!(reply.header("content-type"), Some("application/json"), "{what}");
    assert!(reply.header("x-request-id").is_some(), "{what}");
    let body = reply.json();
    let fields: Vec<&String> = body["error"].as_object().unwrap().keys().collect();
    assert_eq!(fields, ["message", "type", "param", "code"], "{what}");
    assert_eq!(body["error"]["param"], param.map_or(Value::Null, Value::from), "{what}: {}", reply.text);
    body["error"]["message"].as_str().unwrap().to_string()
}

#[tokio::test]
async fn every_bad_field_is_one_clear_error_and_the_server_goes_on() {
    let server = Server::start(Script::Say("ok")).await;
    // The field to blame, its value, and what the message says.
    let both: &[(&str, &str, &str)] = &[
        ("model", "\"gpt-9\"", "`gpt-9` does not exist"),
        ("model", "3", "must be a string, got 3"),
        ("n", "0", "between 1 and 256, got 0"),
        ("n", "1000000", "got 1000000"),
        ("n", "1.5", "got 1.5"),
        ("temperature", "-0.1", "between 0 and 2, got -0.1"),
        ("temperature", "\"NaN\"", "got the string \"NaN\""),
        ("temperature", "1e308", "got 1"),
        ("temperature", "[1]", "got an array"),
        ("top_p", "0", "more than 0"),
        ("top_p", "1.01", "got 1.01"),
        ("top_k", "-2", "got -2"),
        ("min_p", "2", "got 2"),
        ("presence_penalty", "2.5", "between -2 and 2"),
        ("frequency_penalty", "-3", "between -2 and 2"),
        ("repetition_penalty", "0", "more than 0"),
        ("repetition_penalty", "-1", "got -1"),
        ("seed", "1e40", "whole number"),
        ("seed", "9223372036854775808", "got 9223372036854775808"),
        ("max_tokens", "-1", "got -1"),
        ("max_tokens", "65", "maximum context length is 64 tokens"),
        ("max_tokens", "4294967296", "got 4294967296"),
        ("min_tokens", "65", "between 0 and 64"),
        ("logit_bias", "{\"5\": 101}", "between -100 and 100, got 101"),
        ("logit_bias", "{\"300\": 1}", "token id 300 is not in the vocabulary of 300 tokens"),
        ("logit_bias", "{\"x\": 1}", "\"x\" is not a token id"),
        ("logit_bias", "[1]", "an object"),
        ("stop", "\"\"", "an empty stop string"),
        ("stop", "[\"a\", 3]", "array of strings, got 3"),
        ("stop_token_ids", "[300]", "token id 300"),
        ("stop_token_ids", "[-1]", "token ids from 0 to 299, got -1"),
        ("stream", "\"yes\"", "true or false"),
        ("stream_options", "{\"include_usage\": true}", "only allowed when `stream`"),
        ("response_format", "{\"type\": \"json_schema\"}", "\"json_schema\" is not supported"),
        ("guided_regex", "\"a*\"", "not supported"),
        ("use_beam_search", "true", "not supported"),
    ];
    for &(name, value, message) in both {
        let tail = format!(r#""{name}": {value}}}"#);
        for (path, head) in [(CHAT, r#"{"messages":[{"role":"user","content":"x"}],"#), (TEXT, r#"{"prompt":"x","#)] {
            let what = format!("{path} {tail}");
            let reply = server.post(path, &format!("{head}{tail}")).await;
            let status = if message.contains("does not exist") { 404 } else { 400 };
            let got = error(&reply, status, Some(name), &what);
            assert!(got.contains(message), "{what}: {got}");
        }
    }
    assert!(server.jobs.lock().unwrap().is_empty(), "nothing bad reached the scheduler");
    assert_eq!(server.post(TEXT, r#"{"prompt":"x"}"#).await.status, 200);
}

#[tokio::test]
async fn each_endpoint_refuses_its_own_bad_fields() {
    let server = Server::start(Script::Say("ok")).await;
    let cases: &[(&str, &str, Option<&str>, &str)] = &[
        (CHAT, "{}", Some("messages"), "needed"),
        (CHAT, r#"{"messages":[]}"#, Some("messages"), "at least one"),
        (CHAT, r#"{"messages":[3]}"#, Some("messages[0]"), "an object"),
        (CHAT, r#"{"messages":[{"content":"x"}]}"#, Some("messages[0].role"), "no `role`"),
        (CHAT, r#"{"messages":[{"role":"user"}]}"#, Some("messages[0].content"), "no `content`"),
        (
            CHAT,
            r#"{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#,
            Some("messages"),
            "\"image_url\" is not text",
        ),
        (CHAT, r#"{"messages":[{"role":"bad","content":"x"}]}"#, Some("messages"), "unknown role"),
        (
            CHAT,
            r#"{"messages":[{"role":"u","content":"x"}],"tool_choice":"required"}"#,
            Some("tool_choice"),
            "enforced",
        ),
        (
            CHAT,
            r#"{"messages":[{"role":"u","content":"x"}],"top_logprobs":2}"#,
            Some("top_logprobs"),
            "`logprobs` is true",
        ),
        (
            CHAT,
            r#"{"messages":[{"role":"u","content":"x"}],"logprobs":true,"top_logprobs":21}"#,
            Some("top_logprobs"),
            "got 21",
        ),
        (CHAT, r#"{"messages":[{"role":"u","content":"x"}],"max_tokens":0}"#, Some("max_tokens"), "at least 1"),
        (TEXT, "{}", Some("prompt"), "needed"),
        (TEXT, r#"{"prompt":[]}"#, Some("prompt"), "empty"),
        (TEXT, r#"{"prompt":""}"#, Some("prompt"), "no tokens"),
        (TEXT, r#"{"prompt":[[]]}"#, Some("prompt"), "no tokens"),
        (TEXT, r#"{"prompt":[1,300]}"#, Some("prompt"), "token id 300 is not in the vocabulary of 300 tokens"),
        (TEXT, r#"{"prompt":[1,-1]}"#, Some("prompt"), "got -1"),
        (TEXT, r#"{"prompt":[1,"a"]}"#, Some("prompt"), "got the string"),
        (TEXT, r#"{"prompt":[{"a":1}]}"#, Some("prompt"), "got an object"),
        (TEXT, r#"{"prompt":"x","best_of":2}"#, Some("best_of"), "equals `n`"),
        (TEXT, r#"{"prompt":"x","suffix":"y"}"#, Some("suffix"), "not supported"),
        (TEXT, r#"{"prompt":"x","logprobs":21}"#, Some("logprobs"), "got 21"),
        (TEXT, r#"{"prompt":"x","max_tokens":0}"#, Some("max_tokens"), "only with `echo`"),
        (TEXT, r#"{"prompt":["x","x"],"n":200}"#, Some("n"), "more than 256"),
        (TEXT, r#"{"prompt":"x","max_tokens":3,"min_tokens":4}"#, Some("min_tokens"), "more than `max_tokens`, 3"),
        (TEXT, "", None, "not valid JSON"),
        (TEXT, "[]", None, "got an array"),
        (TEXT, r#"{"prompt":"x","temperature":NaN}"#, None, "not valid JSON"),
        (TEXT, r#"{"prompt":"x","temperature":1e999}"#, None, "number out of range"),
        (TEXT, r#"{"prompt":"\ud800"}"#, None, "not valid JSON"),
        ("/tokenize", "{}", Some("prompt"), "needed"),
        ("/detokenize", "{}", Some("tokens"), "needed"),
        ("/detokenize", r#"{"tokens":[999]}"#, Some("tokens"), "token id 999"),
    ];
    for &(path, body, param, message) in cases {
        let got = error(&server.post(path, body).await, 400, param, body);
        assert!(got.contains(message), "{body}: {got}");
    }
    let deep = format!(r#"{{"prompt":{}"#, "[".repeat(10_000));
    assert!(error(&server.post(TEXT, &deep).await, 400, None, "deep").contains("recursion limit"));
    let broken = server.send("POST", TEXT, "", b"{\"prompt\":\"\xff\"}").await;
    assert!(error(&broken, 400, None, "UTF-8").contains("not UTF-8"));
    let long = format!(r#"{{"prompt":"{}"}}"#, "x".repeat(64));
    let message = error(&server.post(TEXT, &long).await, 400, Some("prompt"), "long");
    assert!(message.starts_with("This model's maximum context length is 64 tokens"), "{message}");
    assert_eq!(server.post(TEXT, r#"{"prompt":"x"}"#).await.status, 200);
}

#[tokio::test]
async fn harmless_unknown_fields_and_content_types_are_tolerated() {
    let server = Server::start(Script::Say("ok")).await;
    let body = br#"{"prompt":"x","user":"u","metadata":{"a":"b"},"store":true,"service_tier":"auto","logprobs":null}"#;
    assert_eq!(server.send("POST", TEXT, "Content-Type: text/plain\r\n", body).await.status, 200);
    assert_eq!(server.send("POST", TEXT, "", body).await.status, 200);
}

#[tokio::test]
async fn wrong_paths_and_methods_are_json() {
    let server = Server::start(Script::Say("ok")).await;
    for path in ["/v1/nothing", "/v2", "/favicon.ico", "/v1/chat"] {
        assert!(error(&server.get(path).await, 404, None, path).contains(path));
    }
    for (method, path, allow) in
        [("GET", TEXT, "post"), ("POST", "/readyz", "get"), ("DELETE", "/v1/models/tiny", "get")]
    {
        let reply = server.send(method, path, "", b"").await;
        error(&reply, 405, None, path);
        assert!(reply.header("allow").is_some_and(|allowed| allowed.contains(allow)), "{path}: {}", reply.head);
    }
    error(&server.get("/v1/models/absent").await, 404, Some("model"), "model");
}

#[tokio::test]
async fn models_are_listed_under_all_names() {
    let server = Server::start(Script::Say("ok")).await;
    let list = server.get("/v1/models").await.json();
    assert_eq!((&list["data"][0]["id"], &list["data"][1]["id"]), (&json!("tiny"), &json!("org/alias")));
    assert_eq!(server.get("/v1/models/org/alias").await.json()["max_model_len"], 64);
}

#[tokio::test]
async fn tokens_go_there_and_back() {
    let server = Server::start(Script::Say("ok")).await;
    let body = server.post("/tokenize", r#"{"prompt":"hé","return_token_strs":true}"#).await.json();
    assert_eq!((&body["count"], &body["max_model_len"]), (&json!(3), &json!(64)));
    assert_eq!(body["tokens"], json!([104, 0xC3, 0xA9]));
    let request = format!(r#"{{"tokens":{}}}"#, body["tokens"]);
    assert_eq!(server.post("/detokenize", &request).await.json(), json!({"prompt": "hé"}));
    let chat = r#"{"messages":[{"role":"user","content":"hi"}],"add_generation_prompt":false}"#;
    assert_eq!(server.post("/tokenize", chat).await.json()["count"], "user:hi\n".len());
}

#[tokio::test]
async fn a_long_body_is_refused_whether_or_not_it_says_so() {
    let server = Server::with(Script::Say("ok"), &[], 1000).await;
    let long = format!(r#"{{"prompt":"{}"}}"#, "x".repeat(2000));
    error(&server.post(TEXT, &long).await, 413, None, "declared");
    let chunk = format!("{:x}\r\n{long}\r\n0\r\n\r\n", long.len());
    let mut socket = tokio::net::TcpStream::connect(server.address).await.unwrap();
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n";
    socket.write_all(head.as_bytes()).await.unwrap();
    socket.write_all(chunk.as_bytes()).await.unwrap();
    let mut status = [0; 12];
    socket.read_exact(&mut status).await.unwrap();
    assert_eq!(&status, b"HTTP/1.1 413");
}

#[tokio::test]
async fn only_a_key_opens_the_api_but_probes_need_none() {
    let server = Server::with(Script::Say("ok"), &["secret"], 1 << 16).await;
    for path in ["/v1/models", "/status"] {
        error(&server.get(path).await, 401, None, path);
        let wrong = server.send("GET", path, "Authorization: Bearer wrong\r\n", b"").await;
        error(&wrong, 401, None, path);
        assert_eq!(wrong.header("www-authenticate"), Some("bearer"));
        assert_eq!(server.send("GET", path, "Authorization: Bearer secret\r\n", b"").await.status, 200);
    }
    error(&server.post(TEXT, "nonsense").await, 401, None, "the key comes before the body");
    for path in ["/livez", "/readyz", "/startupz", "/metrics", "/version", "/"] {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
    let key = "Authorization: Bearer secret\r\n";
    let body = br#"{"prompt":"x","priority":-3,"cache_salt":"mine"}"#;
    assert_eq!(server.send("POST", TEXT, key, body).await.status, 200);
    let beyond = server.send("POST", TEXT, key, br#"{"prompt":"x","priority":1000001}"#).await;
    error(&beyond, 400, Some("priority"), "no client is more urgent than that");
    let jobs = server.jobs.lock().unwrap();
    assert!(jobs[0].salt != 0, "a key has its own cache");
    let Turn { tenant, priority, weight } = jobs[0].turn;
    assert_eq!(
        (tenant != 0 && tenant != jobs[0].salt, priority, weight),
        (true, -3, 1),
        "a salt makes nobody another tenant"
    );
}

#[tokio::test]
async fn a_full_queue_says_when_to_come_back() {
    let full = Refusal::QueueFull { waiting: 8, waiting_max: 8 };
    for body in [r#"{"prompt":"x"}"#, r#"{"prompt":"x","stream":true}"#] {
        // A server of its own: the next request would come in the moment in which a crowd is refused unread.
        let server = Server::start(Script::Refuse(full.clone())).await;
        let reply = server.post(TEXT, body).await;
        assert!(error(&reply, 429, None, body).contains("8 requests wait, 8 may"));
        assert_eq!(reply.header("retry-after"), Some("1"));
    }
}

#[tokio::test]
async fn a_loading_cluster_says_why_and_when_to_come_back() {
    let server = Server::start(Script::Say("ok")).await;
    let reasons = vec!["2 of 4 ranks have loaded".to_string()];
    server.view.send_replace(ClusterView { phase: Phase::Gathering, reasons, ..ClusterView::default() });
    let reply = server.post(TEXT, r#"{"prompt":"x"}"#).await;
    assert!(error(&reply, 503, None, "loading").contains("2 of 4 ranks have loaded"));
    assert_eq!(reply.header("retry-after"), Some("3"));
    assert!(server.jobs.lock().unwrap().is_empty(), "no job is sent to a cluster that does not serve");
}

#[tokio::test]
async fn health_tells_each_phase_and_why() {
    let server = Server::start(Script::Say("ok")).await;
    let codes = async || {
        let mut codes = Vec::new();
        for path in ["/livez", "/readyz", "/startupz"] {
            codes.push(server.get(path).await.status);
        }
        codes
    };
    server.view.send_replace(ClusterView { phase: Phase::Loading, ..ClusterView::default() });
    assert_eq!(codes().await, [200, 503, 503]);
    assert_eq!(server.get("/readyz").await.json()["reasons"], json!(["the cluster is loading"]));
    server.view.send_replace(serving());
    assert_eq!(codes().await, [200, 200, 200]);
    let old = super::limits::PROGRESS_AGE_MAX + std::time::Duration::from_secs(1);
    let progress = std::time::Instant::now().checked_sub(old);
    server.view.send_replace(ClusterView { progress, ..serving() });
    assert_eq!(codes().await, [200, 503, 200], "a cluster that does not step is not ready");
    server.view.send_replace(ClusterView {
        phase: Phase::Recovering,
        reasons: vec!["rank 1 died".into()],
        ..serving()
    });
    assert_eq!(codes().await, [200, 503, 200]);
    let status = server.get("/status").await.json();
    assert_eq!(
        (&status["phase"], &status["epoch"], &status["ready"]),
        (&json!("recovering"), &json!(3), &json!(false))
    );
    assert_eq!(status["reasons"], json!(["rank 1 died"]));
    assert_eq!(server.post(TEXT, r#"{"prompt":"x"}"#).await.status, 200, "a recovering cluster still queues");
}

#[tokio::test]
async fn metrics_count_what_happened() {
    crate::metrics::install("tiny").unwrap();
    let server = Server::start(Script::Say("ok")).await;
    server.post(TEXT, r#"{"prompt":"x"}"#).await;
    server.get("/no/such/path").await;
    let text = server.get("/metrics").await.text;
    for line in [
        "conclave_http_requests_total{model_name=\"tiny\",path=\"/v1/completions\",code=\"200\"}",
        "conclave_http_requests_total{model_name=\"tiny\",path=\"other\",code=\"404\"}",
        "conclave_request_success_total{model_name=\"tiny\",finished_reason=\"stop\"}",
        "conclave_time_to_first_token_seconds_bucket{model_name=\"tiny\",le=\"0.001\"}",
        "conclave_num_requests_running{model_name=\"tiny\",group=\"0\"}",
        "conclave_generation_tokens_total{model_name=\"tiny\"}",
        "# TYPE conclave_inter_token_latency_seconds histogram",
    ] {
        assert!(text.contains(line), "{line} is not in:\n{text}");
    }
}

#[tokio::test]
async fn the_page_names_a_nonce_of_its_own() {
    let server = Server::start(Script::Say("ok")).await;
    let (one, two) = (server.get("/").await, server.get("/").await);
    let policy = one.header("content-security-policy").unwrap();
    let nonce = policy.split("'nonce-").nth(1).unwrap().split('\'').next().unwrap();
    assert!(policy.starts_with("default-src 'none'") && one.text.contains(nonce));
    assert!(!two.text.contains(nonce), "a nonce is used once");
}
