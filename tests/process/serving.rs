//! A real cluster of processes, from outside: answers equal the goldens, whatever the mesh; deaths change nothing;
//! nothing is left behind.

use anyhow::{Context, Result, ensure};
use conclave_tests::answers;
use conclave_tests::process::{Served, alive, answer, demo, golden, kill, until};
use conclave_tests::ring::fixtures;
use serde_json::{Value, json};
use std::io::Read;
use std::path::Path;

const PROGRAM: &str = env!("CARGO_BIN_EXE_conclave");

fn answers_equal_the_golden(name: &str, flags: &[&str]) -> Result<()> {
    let served = Served::start(PROGRAM, &golden(name), &[&["--dtype", "f32"], flags].concat())?;
    answers::equal_the_golden(&served, &golden(name))
}

#[test]
fn every_family_answers_as_its_reference_through_http() -> Result<()> {
    let meshes: [(&str, &[&str]); 6] = [
        ("llama2_70b", &["--tp", "4"]),
        ("mistral_7b", &["--tp", "2", "--pp", "2"]),
        ("qwen25_yarn", &["--tp", "2", "--workers", "1"]),
        ("qwen3_moe", &["--tp", "2", "--dp", "2", "--ep", "4"]),
        ("mixtral_8x22b", &["--tp", "2", "--ep", "1"]),
        ("deepseek_v3", &["--tp", "2", "--pp", "2", "--ep", "2"]),
    ];
    // The others take turns.
    let turns: [&[&str]; 4] = [&["--workers", "2"], &["--pp", "2"], &["--tp", "2"], &["--dp", "2"]];
    for (index, name) in fixtures().iter().enumerate() {
        let own = meshes.iter().find(|(of, _)| of == name).map(|(_, flags)| *flags);
        let flags = own.unwrap_or(turns[index % turns.len()]);
        answers_equal_the_golden(name, flags).with_context(|| format!("{name} {flags:?}"))?;
    }
    Ok(())
}

#[test]
fn a_model_that_guesses_ahead_answers_as_without() -> Result<()> {
    let meshes: [&[&str]; 3] =
        [&[], &["--tp", "2", "--pp", "2", "--ep", "2"], &["--tp", "2", "--dp", "2", "--ep", "4"]];
    for mesh in meshes {
        let flags = [&["--num-speculative-tokens", "3"], mesh].concat();
        answers_equal_the_golden("deepseek_v3", &flags).with_context(|| format!("{flags:?}"))?;
    }
    let served = Served::start(PROGRAM, &golden("deepseek_v3"), &["--num-speculative-tokens", "3"])?;
    // Nothing in it was there before: only predictors can guess.
    let body = json!({"model": "deepseek_v3", "prompt": [9, 8, 7, 6, 5], "max_tokens": 20, "ignore_eos": true});
    served.ask("/v1/completions", &body)?;
    // Metrics are counted now and then.
    until("drafts are counted", || served.metric("conclave_draft_tokens_total", "").is_ok_and(|drafts| drafts > 10.0))
}

fn story(stream: bool) -> Value {
    json!({
        "model": "model", "messages": [{"role": "user", "content": "Tell me a story about a fox."}],
        "temperature": 0.7, "seed": 11, "max_tokens": 160, "stream": stream, "return_token_ids": true,
    })
}

/// The text of a finished stream.
fn streamed(body: &[u8]) -> Result<String> {
    let text = std::str::from_utf8(body)?;
    let events: Vec<&str> = text.lines().filter_map(|l| l.strip_prefix("data: ")).collect();
    ensure!(events.last() == Some(&"[DONE]"), "the stream ended without [DONE]: {text}");
    let mut out = String::new();
    for event in &events[..events.len() - 1] {
        let event: Value = serde_json::from_str(event)?;
        ensure!(event.get("error").is_none(), "{event}");
        out += event["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
    }
    Ok(out)
}

#[test]
fn a_killed_worker_changes_no_token_of_a_running_stream() -> Result<()> {
    let served = Served::start(PROGRAM, &demo(), &["--tp", "2"])?;
    let whole = served.ask("/v1/chat/completions", &story(false))?;
    let whole = whole["choices"][0]["message"]["content"].as_str().context("an answer")?.to_string();
    let body = story(true).to_string();
    let mut stream = served.open("POST", "/v1/chat/completions", body.as_bytes())?;
    // The death must fall into the stream: wait for its first bytes.
    let mut bytes = vec![0; 1];
    stream.read_exact(&mut bytes)?;
    let victim = *served.workers()?.first().context("a worker")?;
    kill(victim, "KILL")?;
    stream.read_to_end(&mut bytes)?;
    ensure!(streamed(&answer(&bytes)?.body)? == whole, "the answer changed");
    until("a new worker takes the dead one's place", || {
        served.workers().is_ok_and(|w| w.len() == 2 && !w.contains(&victim))
    })?;
    let status = served.get("/status")?.json()?;
    ensure!(status["epoch"].as_u64() > Some(1), "no new epoch: {status}");
    Ok(())
}

#[test]
fn drafts_change_no_token_and_save_steps() -> Result<()> {
    let mut body = story(false);
    body["max_tokens"] = json!(600);
    body["ignore_eos"] = json!(true);
    let answered = |flags: &[&str]| -> Result<(Value, f64)> {
        let served = Served::start(PROGRAM, &demo(), flags)?;
        let reply = served.ask("/v1/chat/completions", &body)?;
        let accepted = || served.metric("conclave_draft_tokens_accepted_total", "");
        // What is counted is shown soon after.
        until("every token has had its step or was a draft", || {
            served.metric("conclave_steps_total", "").is_ok_and(|steps| accepted().is_ok_and(|n| steps + n == 600.0))
        })?;
        Ok((reply["choices"][0]["token_ids"].clone(), accepted()?))
    };
    let (expected, none) = answered(&["--workers", "1"])?;
    let (found, accepted) = answered(&["--tp", "2", "--num-speculative-tokens", "5"])?;
    ensure!(expected.as_array().is_some_and(|ids| ids.len() == 600) && none == 0.0, "{expected}, {none} accepted");
    ensure!(found == expected, "drafts changed the answer: {found} is not {expected}");
    ensure!(accepted > 0.0, "no draft was right");
    Ok(())
}

#[test]
fn every_process_ends_with_the_server_and_nothing_stays_in_shared_memory() -> Result<()> {
    for signal in ["INT", "TERM", "KILL"] {
        let before = shared_memory()?;
        let mut served = Served::start(PROGRAM, &demo(), &["--tp", "2"])?;
        let workers = served.workers()?;
        ensure!(workers.len() == 2, "{workers:?}");
        served.signal(signal)?;
        let code = served.wait()?;
        if signal != "KILL" {
            ensure!(code == Some(0), "SIG{signal}: exit code {code:?}");
        }
        until("the workers end", || workers.iter().all(|&w| !alive(w)))?;
        ensure!(shared_memory()? == before, "SIG{signal} left something in shared memory");
    }
    Ok(())
}

fn shared_memory() -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir("/dev/shm")? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

#[test]
fn a_client_that_leaves_frees_its_blocks() -> Result<()> {
    let served = Served::start(PROGRAM, &demo(), &[])?;
    let mut body = story(true);
    body["max_tokens"] = json!(900);
    body["ignore_eos"] = json!(true);
    let mut stream = served.open("POST", "/v1/chat/completions", body.to_string().as_bytes())?;
    stream.read_exact(&mut [0; 64])?;
    until("the sequence runs", || running(&served) == Some(1))?;
    drop(stream);
    until("the sequence ends", || running(&served) == Some(0))?;
    let status = served.get("/status")?.json()?;
    ensure!(status["load"]["cache_used"] == 0.0, "{status}");
    Ok(())
}

/// Members that lead no lane finish their steps as those do that answer.
#[test]
fn after_a_request_every_member_is_seen_to_rest() -> Result<()> {
    let served = Served::start(PROGRAM, &demo(), &["--tp", "2", "--workers", "2"])?;
    let all = |key: &str, of: fn(u64) -> bool| -> bool {
        let Ok(status) = served.get("/status").and_then(|answer| answer.json()) else { return false };
        let holds = |member: &Value| member[key].as_u64().is_some_and(of);
        status["members"].as_array().is_some_and(|members| members.iter().all(holds))
    };
    served.ask("/v1/completions", &json!({"prompt": "An owl", "max_tokens": 8}))?;
    // Told by beats that were sent since the request.
    until("every member has stepped", || all("progress", |layers| layers > 0))?;
    until("every member rests", || all("steps_pending", |steps| steps == 0))
}

fn running(served: &Served) -> Option<u64> {
    served.get("/status").ok()?.json().ok()?["load"]["running"].as_u64()
}

#[test]
fn health_says_why_it_is_not_ready_and_then_that_it_is() -> Result<()> {
    let served = Served::start(PROGRAM, &demo(), &[])?;
    for path in ["/livez", "/readyz", "/startupz"] {
        ensure!(served.get(path)?.status == 200, "{path}");
    }
    let metrics = String::from_utf8(served.get("/metrics")?.body)?;
    ensure!(metrics.contains("conclave_num_requests_running"), "{metrics}");
    let stopped = served.workers()?;
    for worker in &stopped {
        kill(*worker, "STOP")?;
    }
    // A stopped worker is silent: not ready, with the reason.
    let mut said = Value::Null;
    until("readiness ends", || {
        served.get("/readyz").is_ok_and(|a| {
            said = a.json().unwrap_or_default();
            a.status == 503
        })
    })?;
    ensure!(said.to_string().contains("silent"), "{said}");
    // Who stays away though its process lives is replaced.
    until("another worker serves", || served.get("/readyz").is_ok_and(|a| a.status == 200))?;
    let now = served.workers()?;
    ensure!(
        now.len() == stopped.len() && now.iter().all(|worker| !stopped.contains(worker)),
        "{stopped:?}, then {now:?}"
    );
    Ok(())
}

/// What `serve` prints on stderr when it can't start, and its exit code.
fn refusal(model: &Path, flags: &[&str]) -> Result<(Option<i32>, String)> {
    let mut command = std::process::Command::new(PROGRAM);
    command.arg("serve").arg(model).args(flags);
    if !flags.contains(&"--listen") {
        command.args(["--listen", "127.0.0.1:0"]);
    }
    let mut child = command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped()).spawn()?;
    let mut stderr = child.stderr.take().context("piped")?;
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        let _ = stderr.read_to_string(&mut text);
        text
    });
    until("the server refuses", || matches!(child.try_wait(), Ok(Some(_))))?;
    let text = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))?;
    Ok((child.wait()?.code(), text))
}

#[test]
fn what_cannot_be_served_is_refused_with_one_clear_error() -> Result<()> {
    let scratch = std::env::temp_dir().join(format!("conclave-refusals-{}", std::process::id()));
    let copy = |name: &str, of: &str| -> Result<std::path::PathBuf> {
        let to = scratch.join(name);
        std::fs::create_dir_all(&to)?;
        for entry in std::fs::read_dir(golden(of))?.flatten() {
            std::fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
        Ok(to)
    };
    let truncated = copy("truncated", "qwen3")?;
    let weights = truncated.join("model.safetensors");
    let length = std::fs::metadata(&weights)?.len();
    std::fs::OpenOptions::new().write(true).open(&weights)?.set_len(length - 1000)?;
    let missing = copy("missing", "mixtral_8x22b")?;
    std::fs::remove_file(missing.join("model-00002-of-00004.safetensors"))?;
    let lying = copy("lying", "qwen3")?;
    let config = std::fs::read_to_string(lying.join("config.json"))?;
    std::fs::write(lying.join("config.json"), config.replace("\"vocab_size\": 512", "\"vocab_size\": 500"))?;
    let unread = copy("unread", "qwen3")?;
    std::fs::write(unread.join("config.json"), config.replacen('{', "{\"attention_wobble\": 3,", 1))?;
    let port = std::net::TcpListener::bind("127.0.0.1:0")?;
    let taken = port.local_addr()?.to_string();
    let cases: [(&Path, &[&str], &str); 7] = [
        (&truncated, &[], "model.safetensors"),
        (&missing, &[], "model-00002-of-00004.safetensors"),
        (&lying, &[], "500"),
        (&unread, &[], "attention_wobble"),
        (Path::new("/no/such/model"), &[], "/no/such/model"),
        (&golden("qwen3"), &["--tp", "3"], "3"),
        (&golden("qwen3"), &["--listen", &taken], &taken),
    ];
    for (model, flags, part) in cases {
        let (code, text) = refusal(model, flags).with_context(|| format!("{} {flags:?}", model.display()))?;
        ensure!(matches!(code, Some(1 | 2)), "{} {flags:?}: exit code {code:?}: {text}", model.display());
        ensure!(text.contains(part), "{} {flags:?}: {part} is not in {text}", model.display());
        ensure!(!text.contains("panicked"), "{text}");
    }
    std::fs::remove_dir_all(&scratch)?;
    Ok(())
}

#[test]
fn a_load_without_a_server_brings_its_own_and_leaves_none() -> Result<()> {
    let report = std::env::temp_dir().join(format!("conclave-offline-{}.json", std::process::id()));
    let run = std::process::Command::new(PROGRAM)
        .args(["bench", "offline"])
        .arg(demo())
        .args(["--tp", "2", "--requests", "12", "--input-len", "40", "--output-len", "9", "--json"])
        .arg(&report)
        .env("CONCLAVE_API_KEY", "secret")
        .output()?;
    ensure!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let told: Value = serde_json::from_slice(&std::fs::read(&report)?)?;
    std::fs::remove_file(&report)?;
    ensure!(told["succeeded"] == 12 && told["output_tokens"] == 12 * 9, "{told}");
    ensure!(told["settings"]["concurrency"] == 12, "all at once: {told}");
    Ok(())
}
