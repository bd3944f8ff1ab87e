//! A hostile client before a real server: every wrong request gets one clear error in OpenAI's shape, and the server
//! goes on answering as before, in the same memory.

use anyhow::{Context, Result, ensure};
use conclave_tests::process::{Answer, DEADLINE, Served, answer, demo, memory_peak, until};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};

const PROGRAM: &str = env!("CARGO_BIN_EXE_conclave");
const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// What the demo model answers to a plain question: the same before and after every attack.
fn plain(served: &Served) -> Result<Value> {
    let body = json!({"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0, "logprobs": 2});
    Ok(served.ask(COMPLETIONS, &body)?["choices"].clone())
}

fn running(served: &Served) -> Result<(u64, f64)> {
    let status = served.get("/status")?.json()?;
    let load = &status["load"];
    Ok((load["running"].as_u64().context("running")?, load["cache_used"].as_f64().context("cache_used")?))
}

/// An error in OpenAI's shape whose message has `part` in it.
fn check(answer: &Answer, status: u16, part: &str) -> Result<()> {
    let text = String::from_utf8_lossy(&answer.body);
    ensure!(answer.status == status, "{}: {text}", answer.status);
    let error = &answer.json()?["error"];
    let message = error["message"].as_str().context("a message")?;
    ensure!(message.contains(part), "{part:?} is not in {message:?}");
    ensure!(error["type"].is_string() && error.get("param").is_some() && error.get("code").is_some(), "{text}");
    Ok(())
}

#[test]
fn every_bad_field_is_refused_by_name_and_numbers() -> Result<()> {
    let served = Served::start(PROGRAM, &demo(), &[])?;
    let before = plain(&served)?;
    let stops: Vec<String> = (0..10_000).map(|n| format!("s{n}")).collect();
    let many = json!({"prompt": "a", "stop": stops}).to_string();
    let deep = format!("{{\"prompt\":{}{}}}", "[".repeat(200), "]".repeat(200));
    let long = json!({"prompt": "word ".repeat(5000)}).to_string();
    let cases: &[(&str, &str, u16, &str)] = &[
        (COMPLETIONS, "", 400, "not valid JSON"),
        (COMPLETIONS, "{\"prompt\": ", 400, "column 11"),
        (COMPLETIONS, "[]", 400, "must be a JSON object, got an array"),
        (COMPLETIONS, r#"{"prompt":"a","temperature":NaN}"#, 400, "column 29"),
        (COMPLETIONS, r#"{"prompt":"a","temperature":1e999}"#, 400, "number out of range"),
        (COMPLETIONS, r#"{"prompt":"a","temperature":true}"#, 400, "between 0 and 2, got a boolean"),
        (COMPLETIONS, r#"{"prompt":"a","temperature":-0.5}"#, 400, "between 0 and 2, got -0.5"),
        (COMPLETIONS, r#"{"prompt":"a","max_tokens":99999999999999999999999}"#, 400, "got 1e+23"),
        (COMPLETIONS, r#"{"prompt":"a","max_tokens":-1}"#, 400, "got -1"),
        (COMPLETIONS, r#"{"prompt":"a","max_tokens":1.5}"#, 400, "a whole number"),
        (COMPLETIONS, r#"{"prompt":"a","max_tokens":5000}"#, 400, "5001 tokens (1 in the prompt, 5000 for the answer)"),
        (COMPLETIONS, r#"{"prompt":"a","max_tokens":0}"#, 400, "only with `echo`"),
        (COMPLETIONS, r#"{"prompt":"a","min_tokens":5,"max_tokens":2}"#, 400, "`min_tokens` is 5"),
        (COMPLETIONS, r#"{"prompt":"a","n":1000000}"#, 400, "between 1 and 256, got 1000000"),
        (COMPLETIONS, r#"{"prompt":"a","logprobs":21}"#, 400, "between 0 and 20, got 21"),
        (COMPLETIONS, r#"{"prompt":"a","logit_bias":{"99999":1}}"#, 400, "99999"),
        (COMPLETIONS, r#"{"prompt":"a","logit_bias":{"1":1000}}"#, 400, "between -100 and 100, got 1000"),
        (COMPLETIONS, r#"{"prompt":"a","seed":18446744073709551616}"#, 400, "`seed`"),
        (COMPLETIONS, r#"{"prompt":"a","stop":""}"#, 400, "empty stop string"),
        (COMPLETIONS, &many, 400, "10000 stop strings, at most 16"),
        (COMPLETIONS, &deep, 400, "recursion limit"),
        (COMPLETIONS, &long, 400, "maximum context length is 1024 tokens"),
        (COMPLETIONS, "{}", 400, "`prompt` is needed"),
        (COMPLETIONS, r#"{"prompt":""}"#, 400, "no tokens"),
        (COMPLETIONS, r#"{"prompt":[]}"#, 400, "must not be empty"),
        (COMPLETIONS, r#"{"prompt":[3072]}"#, 400, "token id 3072 is not in the vocabulary of 3072 tokens"),
        (COMPLETIONS, r#"{"prompt":[-1]}"#, 400, "token ids from 0 to 3071, got -1"),
        (COMPLETIONS, r#"{"prompt":["a",1]}"#, 400, "got 1"),
        (COMPLETIONS, r#"{"model":"gpt-9","prompt":"a"}"#, 404, "gpt-9"),
        (CHAT, "{}", 400, "`messages` is needed"),
        (CHAT, r#"{"messages":[]}"#, 400, "at least one message"),
        (CHAT, r#"{"messages":[{"content":"x"}]}"#, 400, "`messages[0]` has no `role`"),
        (CHAT, r#"{"messages":[{"role":"user","content":5}]}"#, 400, "`messages[0].content`"),
        (CHAT, r#"{"messages":[{"role":"user","content":"x"}],"top_logprobs":3}"#, 400, "`logprobs` is true"),
        ("/detokenize", r#"{"tokens":[99999]}"#, 400, "99999"),
        ("/tokenize", "{}", 400, "`prompt` or `messages`"),
        ("/v1/nowhere", "{}", 404, "/v1/nowhere"),
        ("/v1/models", "{}", 405, "POST"),
    ];
    for (path, body, status, part) in cases {
        let answer = served.send("POST", path, body.as_bytes())?;
        let shown: String = body.chars().take(80).collect();
        check(&answer, *status, part).with_context(|| format!("{path} {shown}"))?;
    }
    check(&served.send("POST", COMPLETIONS, b"{\"prompt\":\"\xff\"}")?, 400, "not UTF-8: a bad byte at 11")?;
    check(&served.get(COMPLETIONS)?, 405, "GET")?;
    ensure!(plain(&served)? == before, "the answer changed");
    Ok(())
}

#[test]
fn sixteen_megabytes_of_anything_cost_little_memory() -> Result<()> {
    let served = Served::start(PROGRAM, &demo(), &[])?;
    let before = plain(&served)?;
    let text =
        |path: &'static str, unit: &str| (path, format!("{{\"prompt\":\"{}\"}}", unit.repeat((15 << 20) / unit.len())));
    let values = |unit: &str| (COMPLETIONS, format!("{{\"prompt\":[{}1]}}", unit.repeat((15 << 20) / unit.len())));
    let chat = json!({"messages": [{"role": "user", "content": "a ".repeat(7 << 20)}]}).to_string();
    let cases = [
        (text(COMPLETIONS, "a "), 400, "maximum context length is 1024 tokens"),
        (text(COMPLETIONS, "a"), 400, "maximum context length is 1024 tokens"),
        (text("/tokenize", "a "), 400, "may be 1048576 bytes long, got 15728640"),
        (values("1,"), 400, "at most 1048576 are allowed"),
        (values("[],"), 400, "at most 1048576 are allowed"),
        (values("{\"a\":1},"), 400, "at most 1048576 are allowed"),
        ((CHAT, chat), 400, "maximum context length is 1024 tokens"),
        ((COMPLETIONS, "a".repeat(20 << 20)), 413, "longer than 16777216 bytes"),
    ];
    for ((path, body), status, part) in cases {
        let shown: String = body.chars().take(40).collect();
        let answer = served.send("POST", path, body.as_bytes())?;
        check(&answer, status, part).with_context(|| format!("{path} {shown}"))?;
    }
    let peak = memory_peak(served.id())?;
    ensure!(peak < 600 << 20, "the server took {} MiB", peak >> 20);
    ensure!(plain(&served)? == before, "the answer changed");
    Ok(())
}

/// Sends bytes as they are, ends the sending side where asked, and reads until the server closes.
fn raw(served: &Served, bytes: &[u8], end: bool) -> Result<Vec<u8>> {
    let mut stream = TcpStream::connect(&served.address)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    // A server may refuse early and close; what it said is still to be read.
    let _ = stream.write_all(bytes);
    if end {
        stream.shutdown(Shutdown::Write)?;
    }
    let mut said = Vec::new();
    let _ = stream.read_to_end(&mut said);
    Ok(said)
}

/// A head that `Served::send` would not write; errors below HTTP's own rules come from the HTTP library, without a body.
#[test]
fn broken_http_ends_its_own_connection_and_no_other() -> Result<()> {
    let served = Served::start(PROGRAM, &demo(), &[])?;
    let before = plain(&served)?;
    let body = r#"{"prompt":"a","max_tokens":1}"#;
    let post = |head: &str, body: &str| format!("POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\n{head}\r\n\r\n{body}");
    let flood: String = (0..200).map(|n| format!("h{n}: x\r\n")).collect();
    let cases: [(&str, String, u16); 12] = [
        ("no HTTP", "\u{16}\u{3}\u{1}hello".into(), 400),
        ("a length below zero", post("content-length: -5", body), 400),
        ("two lengths", post("content-length: 5\r\ncontent-length: 29", body), 400),
        ("a length too short", post("connection: close\r\ncontent-length: 5", body), 400),
        ("a length too long, then the end", post("content-length: 500", body), 400),
        ("a length beyond the bound", post("content-length: 999999999999999999", body), 413),
        ("a chunk that is none", post("transfer-encoding: chunked", "zz\r\n"), 400),
        ("chunks that never end", post("transfer-encoding: chunked", &"5\r\naaaaa\r\n".repeat(1000)), 400),
        ("200 headers", format!("GET /livez HTTP/1.1\r\n{flood}\r\n"), 431),
        ("a megabyte's header", format!("GET /livez HTTP/1.1\r\nh: {}\r\n\r\n", "a".repeat(1 << 20)), 431),
        ("a path of 100,000 bytes", format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(100_000)), 414),
        ("HTTP/1.0", format!("POST {COMPLETIONS} HTTP/1.0\r\ncontent-length: {}\r\n\r\n{body}", body.len()), 200),
    ];
    // What would be waited for; a client that ends a whole request's connection has left, and gets no answer.
    let endless = ["no HTTP", "a length too long, then the end", "chunks that never end"];
    for (what, bytes, status) in cases {
        let said = raw(&served, bytes.as_bytes(), endless.contains(&what))?;
        // A reset may overtake the answer to a request that was still being sent.
        ensure!(!said.is_empty() || bytes.len() > 50_000, "{what}: no answer");
        if !said.is_empty() {
            let got = answer(&said).with_context(|| what.to_string())?;
            ensure!(got.status == status, "{what}: {} {}", got.status, String::from_utf8_lossy(&got.body));
        }
    }
    ensure!(raw(&served, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", false)?.first() != Some(&0), "HTTP/2 was spoken");
    let row = "GET /livez HTTP/1.1\r\nhost: x\r\n\r\n".repeat(4) + "GET /livez HTTP/1.0\r\n\r\n";
    let pipelined = raw(&served, row.as_bytes(), false)?;
    ensure!(String::from_utf8_lossy(&pipelined).matches("200 OK").count() == 5, "pipelining");
    ensure!(plain(&served)? == before, "the answer changed");
    Ok(())
}

#[test]
fn two_hundred_clients_that_leave_take_nothing_with_them() -> Result<()> {
    let served = Served::start(PROGRAM, &demo(), &["--tp", "2"])?;
    let before = plain(&served)?;
    for number in 0..200 {
        let stream = number % 2 == 0;
        let body = json!({
            "prompt": format!("Number {number} of a long row of stories: "), "max_tokens": 900, "ignore_eos": true,
            "stream": stream, "n": 1 + number % 3,
        });
        let mut socket = served.open("POST", COMPLETIONS, body.to_string().as_bytes())?;
        if stream && number % 4 == 0 {
            socket.read_exact(&mut [0; 64])?;
        }
    }
    until("nothing runs and no block is held", || running(&served).is_ok_and(|load| load == (0, 0.0)))?;
    ensure!(served.get("/status")?.json()?["epoch"] == 1, "a client that left ended the epoch");
    ensure!(plain(&served)? == before, "the answer changed");
    Ok(())
}
