//! A streamed chat answer, read to its end.

use crate::process::answer;
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::io::Read;
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// Each choice's text, log-probabilities and reason to end, and the usage behind them.
pub type Said = Vec<String>;

/// Choices that may be asked for.
const CHOICES: usize = 3;

/// Reads the whole stream; also its longest pause.
pub fn read(mut stream: TcpStream) -> Result<(Said, Duration)> {
    let (mut bytes, mut part) = (Vec::new(), [0; 4096]);
    let (mut last, mut pause) = (Instant::now(), Duration::ZERO);
    loop {
        let count = stream.read(&mut part)?;
        (pause, last) = (pause.max(last.elapsed()), Instant::now());
        if count == 0 {
            break;
        }
        bytes.extend_from_slice(&part[..count]);
    }
    let answer = answer(&bytes)?;
    ensure!(answer.status == 200, "{}: {}", answer.status, String::from_utf8_lossy(&answer.body));
    let mut said = vec![String::new(); CHOICES + 1];
    for line in std::str::from_utf8(&answer.body)?.lines().filter_map(|line| line.strip_prefix("data: ")) {
        if line == "[DONE]" {
            return Ok((said, pause));
        }
        let event: Value = serde_json::from_str(line)?;
        ensure!(event.get("error").is_none(), "{event}");
        if let Some(usage) = event["usage"].as_object() {
            said[CHOICES] = format!("{} {}", usage["prompt_tokens"], usage["completion_tokens"]);
        }
        for choice in event["choices"].as_array().context("choices")? {
            let text = &mut said[choice["index"].as_u64().context("an index")? as usize];
            *text += choice["delta"]["content"].as_str().unwrap_or_default();
            for scored in choice["logprobs"]["content"].as_array().into_iter().flatten() {
                *text += &format!("[{}]", scored["logprob"]);
            }
            *text += choice["finish_reason"].as_str().unwrap_or_default();
        }
    }
    bail!("the stream ended without [DONE]")
}
