//! Clients that leave: at any moment of a request, in good order or not. Nothing of theirs may stay behind.

use crate::client::Client;
use crate::process::{Served, until};
use crate::sim::random::Random;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const PATH: &str = "/v1/completions";

/// At a time.
const CLIENTS: usize = 24;

/// What was left, by the moment.
#[derive(Debug, Default, Clone, Copy)]
pub struct Left {
    /// Before the request was whole.
    pub asking: usize,
    /// Before a byte of the answer.
    pub waiting: usize,
    /// Within the answer.
    pub reading: usize,
    /// The answer was over before.
    pub late: usize,
}

/// Answers that must be the same before and after.
pub fn plain(served: &Served) -> Result<Value> {
    let body = json!({"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0, "logprobs": 2});
    Ok(served.ask(PATH, &body)?["choices"].clone())
}

/// Leaves `count` requests.
pub fn run(served: &Served, count: usize, seed: u64) -> Result<Left> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let client = Arc::new(Client::new(&served.address));
        let mut clients = tokio::task::JoinSet::new();
        for first in 0..CLIENTS.min(count) {
            let client = client.clone();
            clients.spawn(async move {
                let mut left = Left::default();
                for number in (first..count).step_by(CLIENTS) {
                    leave(&client, &mut Random::new(seed ^ (number as u64) << 8), &mut left)
                        .await
                        .with_context(|| format!("request {number}"))?;
                }
                anyhow::Ok(left)
            });
        }
        let mut all = Left::default();
        while let Some(left) = clients.join_next().await {
            let left = left??;
            all.asking += left.asking;
            all.waiting += left.waiting;
            all.reading += left.reading;
            all.late += left.late;
        }
        Ok(all)
    })
}

/// Asks and leaves.
async fn leave(client: &Client, random: &mut Random, left: &mut Left) -> Result<()> {
    // Some prompts are the same, so that cached blocks are shared, some are long.
    let topic = random.within(0..=39);
    let prompt = format!("Story {topic}. ").repeat(random.within(1..=30));
    let body = json!({
        "prompt": prompt, "max_tokens": random.within(1..=200), "ignore_eos": true, "n": random.within(1..=3),
        "stream": !random.once_in(4), "seed": topic, "temperature": 0.8,
    });
    let request = Client::request(PATH, &body.to_string());
    let mut socket = client.connect().await?;
    // Half end with a reset, as a process that dies does; it also spares the system the ports of ended connections.
    if random.once_in(2) {
        socket.set_zero_linger()?;
    }
    let moment = random.within(0..=7);
    if moment == 0 {
        let part = random.within(0..=request.len() - 1);
        socket.write_all(&request[..part]).await?;
        left.asking += 1;
        return Ok(());
    }
    socket.write_all(&request).await?;
    if moment <= 3 {
        if moment > 1 {
            tokio::time::sleep(Duration::from_millis(random.within(0..=60) as u64)).await;
        }
        left.waiting += 1;
        return Ok(());
    }
    let (mut wanted, mut part) = (random.within(1..=4000), [0; 1024]);
    while wanted > 0 {
        let room = wanted.min(part.len());
        // An answer that is not streamed is over with its length; its connection is not.
        match tokio::time::timeout(Duration::from_millis(300), socket.read(&mut part[..room])).await {
            Ok(Ok(0)) | Ok(Err(_)) | Err(_) => {
                left.late += 1;
                return Ok(());
            }
            Ok(Ok(count)) => wanted -= count,
        }
    }
    left.reading += 1;
    Ok(())
}

/// Waits until nothing runs, waits or holds a block.
pub fn until_nothing_is_held(served: &Served) -> Result<()> {
    until("nothing runs, waits or holds a block", || {
        ["conclave_num_requests_running", "conclave_num_requests_waiting", "conclave_kv_cache_usage_perc"]
            .iter()
            .all(|name| served.metric(name, "").is_ok_and(|value| value == 0.0))
    })
}
