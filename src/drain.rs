//! `conclave drain`: let a worker end without anybody noticing.

use crate::client;
use anyhow::{Result, bail};
use std::time::{Duration, Instant};

#[derive(clap::Args)]
pub struct Args {
    /// The worker's name, as `conclave status` shows it
    worker: String,
    /// The coordinator's API
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    url: String,
    /// API key; better in the environment variable CONCLAVE_API_KEY
    #[arg(long)]
    api_key: Option<String>,
    /// Seconds to wait until the worker is out
    #[arg(long, default_value_t = 600)]
    timeout: u64,
}

pub fn run(args: Args) -> Result<()> {
    let key = args.api_key.or_else(|| std::env::var("CONCLAVE_API_KEY").ok());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(drain(&args.worker, args.url.trim_end_matches('/'), key.as_deref(), args.timeout))
}

async fn drain(worker: &str, url: &str, key: Option<&str>, seconds: u64) -> Result<()> {
    client::post(&format!("{url}/drain/{worker}"), key).await?;
    let (deadline, mut said) = (Instant::now() + Duration::from_secs(seconds), String::new());
    loop {
        let status = client::get(&format!("{url}/status"), key).await?;
        let mut members = status["members"].as_array().into_iter().flatten();
        let Some(member) = members.find(|member| member["id"] == worker) else {
            println!("{worker} is drained");
            return Ok(());
        };
        let phase = member["phase"].as_str().unwrap_or_default();
        if phase != said {
            println!("{worker}: {phase}");
            said = phase.to_string();
        }
        if Instant::now() > deadline {
            bail!("{worker} is still needed after {seconds} s; it stays in service until it is not");
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
