//! Draft models, from outside: answers equal the goldens on every mesh, one that is the model itself is right nearly always, also
//! after a death, and what can't be a draft model is refused before anything is started.

use anyhow::{Context, Result, ensure};
use conclave_tests::answers;
use conclave_tests::process::{Served, answer, demo, golden, kill, until};
use serde_json::{Value, json};
use std::io::Read;
use std::path::Path;
use std::process::Command;

const PROGRAM: &str = env!("CARGO_BIN_EXE_conclave");

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path of plain letters")
}

#[test]
fn a_draft_model_changes_no_answer_whatever_the_mesh() -> Result<()> {
    let meshes: [&[&str]; 3] =
        [&[], &["--tp", "2", "--pp", "2", "--ep", "2"], &["--tp", "2", "--dp", "2", "--ep", "4"]];
    let small = golden("qwen3");
    for mesh in meshes {
        let guessing = ["--dtype", "f32", "--num-speculative-tokens", "3", "--draft-model", text(&small)?];
        let served = Served::start(PROGRAM, &golden("qwen3_moe"), &[&guessing, mesh].concat())?;
        answers::equal_the_golden(&served, &golden("qwen3_moe")).with_context(|| format!("{mesh:?}"))?;
    }
    Ok(())
}

fn story(stream: bool, tokens: usize) -> Value {
    json!({
        "model": "model", "messages": [{"role": "user", "content": "Tell me a story about a fox."}],
        "temperature": 0.7, "seed": 11, "max_tokens": tokens, "stream": stream, "return_token_ids": true,
        "ignore_eos": true,
    })
}

/// Token ids of a finished stream.
fn streamed(body: &[u8]) -> Result<Vec<Value>> {
    let events: Vec<&str> = std::str::from_utf8(body)?.lines().filter_map(|l| l.strip_prefix("data: ")).collect();
    ensure!(events.last() == Some(&"[DONE]"), "the stream ended without [DONE]: {events:?}");
    let mut ids = Vec::new();
    for event in &events[..events.len() - 1] {
        let event: Value = serde_json::from_str(event)?;
        ensure!(event.get("error").is_none(), "{event}");
        ids.extend(event["choices"][0]["token_ids"].as_array().into_iter().flatten().cloned());
    }
    Ok(ids)
}

#[test]
fn a_model_that_drafts_for_itself_is_right_nearly_always_also_after_a_death() -> Result<()> {
    const TOKENS: usize = 600;
    let plain = Served::start(PROGRAM, &demo(), &["--workers", "1"])?;
    let expected = plain.ask("/v1/chat/completions", &story(false, TOKENS))?["choices"][0]["token_ids"].clone();
    drop(plain);
    let small = demo();
    let flags = ["--tp", "2", "--num-speculative-tokens", "5", "--draft-model", text(&small)?];
    let served = Served::start(PROGRAM, &demo(), &flags)?;
    let counts = || -> Result<[f64; 3]> {
        let metric = |name| served.metric(name, "");
        Ok([
            metric("conclave_steps_total")?,
            metric("conclave_draft_tokens_total")?,
            metric("conclave_draft_tokens_accepted_total")?,
        ])
    };
    let found = served.ask("/v1/chat/completions", &story(false, TOKENS))?["choices"][0]["token_ids"].clone();
    ensure!(found == expected, "drafts changed the answer: {found} is not {expected}");
    // What is counted is shown soon after.
    until("every token has had its step or was a draft", || {
        counts().is_ok_and(|[steps, _, right]| steps + right == TOKENS as f64)
    })?;
    let [steps, drafted, right] = counts()?;
    println!("{TOKENS} tokens in {steps} steps, {right} of {drafted} drafts right");
    ensure!(right >= 0.95 * drafted && right > 0.7 * TOKENS as f64, "{right} of {drafted} drafts, {steps} steps");

    let mut stream = served.open("POST", "/v1/chat/completions", story(true, TOKENS).to_string().as_bytes())?;
    // The death must fall into the stream: wait for its first bytes.
    let mut bytes = vec![0; 1];
    stream.read_exact(&mut bytes)?;
    let victim = *served.workers()?.first().context("a worker")?;
    kill(victim, "KILL")?;
    stream.read_to_end(&mut bytes)?;
    let found = streamed(&answer(&bytes)?.body)?;
    ensure!(expected == Value::from(found.clone()), "the answer changed: {found:?} is not {expected}");
    until("it is counted", || counts().is_ok_and(|[_, all, _]| all > drafted))?;
    let [_, all, correct] = counts()?;
    println!("over a death: {} of {} drafts right", correct - right, all - drafted);
    ensure!(correct - right >= 0.9 * (all - drafted), "{correct} of {all} drafts after a death");
    Ok(())
}

#[test]
fn what_cannot_draft_is_refused_before_anything_is_started() -> Result<()> {
    let (other, small, nowhere) = (demo(), golden("mistral_7b"), Path::new("/nowhere/at/all"));
    let cases: [(&Path, &[&str], &str); 4] = [
        (&small, &[], "guesses nothing without --num-speculative-tokens"),
        (&other, &["--num-speculative-tokens", "2"], "tokens, the model 512"),
        (nowhere, &["--num-speculative-tokens", "2"], "/nowhere/at/all"),
        // As many tokens, but others.
        (&small, &["--num-speculative-tokens", "2"], "the model's is"),
    ];
    for (draft, flags, said) in cases {
        let mut command = Command::new(PROGRAM);
        command.arg("serve").arg(golden("qwen3")).args(["--listen", "127.0.0.1:0", "--draft-model"]).arg(draft);
        let ended = command.args(flags).output()?;
        let error = String::from_utf8_lossy(&ended.stderr);
        ensure!(ended.status.code() == Some(1) && error.contains(said), "{:?}: {error}", ended.status);
    }
    Ok(())
}
