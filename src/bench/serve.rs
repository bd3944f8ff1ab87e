//! `conclave bench serve`: a closed loop of so many clients, or an open loop of Poisson arrivals.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::client::Target;
use super::load::{Planned, Shape, plan};
use super::record::{Failure, Record};
use super::report::Report;

/// Clients of a closed loop, where nothing else is said.
const CONCURRENCY: u32 = 8;

/// Sends completions to a running server and measures what its clients see.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The server
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    pub url: String,
    /// The model's name; by default the first that the server lists
    #[arg(long)]
    pub model: Option<String>,
    /// The API key
    #[arg(long)]
    pub api_key: Option<String>,
    #[command(flatten)]
    pub load: Load,
}

/// What is sent, and when.
#[derive(Debug, Clone, clap::Args)]
pub struct Load {
    /// Requests to send
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub requests: u32,
    /// Requests under way at once: each client sends its next when its last is answered; 8, and all of an offline run
    #[arg(long, conflicts_with = "rate", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub concurrency: Option<u32>,
    /// Requests a second at random (Poisson) times, however slow the answers; "inf" sends all at once
    #[arg(long, value_parser = positive)]
    pub rate: Option<f64>,
    /// Tokens of a prompt
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    input_len: u32,
    /// Tokens of an answer
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    output_len: u32,
    /// Tokens at the beginning that all prompts have in common
    #[arg(long, default_value_t = 0)]
    shared_prefix: u32,
    /// Prompts as words instead of token ids
    #[arg(long)]
    text: bool,
    /// The lowest token id of prompts; lower ones are often special
    #[arg(long, default_value_t = 100)]
    token_min: u32,
    /// The first token id beyond those of prompts; must be in the model's vocabulary
    #[arg(long, default_value_t = 1000)]
    token_max: u32,
    /// Sampling temperature; 0 is greedy
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Let answers end where the model ends them, instead of at their length
    #[arg(long)]
    stop_at_end: bool,
    /// Requests before the measured ones, one after another
    #[arg(long, default_value_t = 1)]
    warmup: u32,
    /// Seed of prompts and arrivals
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Longest wait for one answer, in seconds
    #[arg(long, default_value_t = 600)]
    timeout_s: u64,
    /// Also write the report as JSON to this file
    #[arg(long)]
    json: Option<PathBuf>,
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate >= 0.001 => Ok(rate),
        _ => Err(format!("{text:?} is not a number of requests a second from 0.001 up")),
    }
}

/// Runs the load to its end and prints the report. Fails when no request succeeded.
pub async fn serve(args: Args) -> Result<()> {
    let report = measure(&args).await?;
    if let Some(path) = &args.load.json {
        crate::whole::write_json(path, &report)?;
    }
    print!("{}", report.table());
    if report.succeeded == 0 {
        bail!("none of {} requests succeeded", report.requests);
    }
    Ok(())
}

async fn measure(args: &Args) -> Result<Report> {
    let load = &args.load;
    if load.token_min >= load.token_max {
        bail!("--token-min {} must be below --token-max {}", load.token_min, load.token_max);
    }
    let mut target = Target::new(&args.url, args.model.clone(), args.api_key.clone()).await?;
    target.output = load.output_len as usize;
    target.temperature = load.temperature;
    target.ignore_eos = !load.stop_at_end;
    target.timeout = Duration::from_secs(load.timeout_s);
    let target = Arc::new(target);
    let shape = Shape {
        input: load.input_len as usize,
        shared: load.shared_prefix as usize,
        ids: [load.token_min, load.token_max],
        text: load.text,
    };

    // Prompts of another seed, so that the measured ones are not in the prefix cache.
    for planned in plan(&shape, load.warmup as usize, None, !load.seed) {
        let prompt = planned.prompt();
        let now = Instant::now();
        let outcome = target.complete(&prompt, now, now).await;
        outcome.map_err(|failure| anyhow::anyhow!("a warm-up request failed: {failure}"))?;
    }

    let finite = load.rate.filter(|rate| rate.is_finite());
    let planned = plan(&shape, load.requests as usize, finite, load.seed);
    let bar = progress(planned.len() as u64);
    let outcomes = match load.rate {
        Some(_) => open_loop(target.clone(), planned, &bar).await?,
        None => closed_loop(target.clone(), planned, load.concurrency.unwrap_or(CONCURRENCY) as usize, &bar).await?,
    };
    bar.finish_and_clear();
    Ok(Report::new(settings(load, &target.model), &outcomes))
}

/// Each request is sent when it is due, whether or not others were answered. Latency counts from when it was due.
async fn open_loop(target: Arc<Target>, planned: Vec<Planned>, bar: &ProgressBar) -> Result<Vec<Outcome>> {
    let epoch = Instant::now();
    let mut tasks = JoinSet::new();
    for planned in planned {
        let due = epoch + planned.due;
        let prompt = planned.prompt();
        tokio::time::sleep_until(due).await;
        let (target, bar) = (target.clone(), bar.clone());
        tasks.spawn(async move {
            let outcome = target.complete(&prompt, due, epoch).await;
            bar.inc(1);
            outcome
        });
    }
    let mut outcomes = Vec::new();
    while let Some(outcome) = tasks.join_next().await {
        outcomes.push(outcome.context("a client of the load failed")?);
    }
    Ok(outcomes)
}

/// `concurrency` clients, each with one request under way at any time until none is left.
async fn closed_loop(
    target: Arc<Target>,
    planned: Vec<Planned>,
    concurrency: usize,
    bar: &ProgressBar,
) -> Result<Vec<Outcome>> {
    let epoch = Instant::now();
    let clients = concurrency.min(planned.len());
    let planned = Arc::new(planned);
    let next = Arc::new(AtomicUsize::new(0));
    let mut tasks = JoinSet::new();
    for _ in 0..clients {
        let (target, planned, next, bar) = (target.clone(), planned.clone(), next.clone(), bar.clone());
        tasks.spawn(async move {
            let mut outcomes = Vec::new();
            while let Some(planned) = planned.get(next.fetch_add(1, Ordering::Relaxed)) {
                let prompt = planned.prompt();
                outcomes.push(target.complete(&prompt, Instant::now(), epoch).await);
                bar.inc(1);
            }
            outcomes
        });
    }
    let mut outcomes = Vec::new();
    while let Some(done) = tasks.join_next().await {
        outcomes.extend(done.context("a client of the load failed")?);
    }
    Ok(outcomes)
}

type Outcome = Result<Record, Failure>;

/// A bar on a terminal, nothing elsewhere.
fn progress(requests: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:40} {pos} of {len} requests, {per_sec}, {eta} left");
    ProgressBar::new(requests).with_style(style.expect("the template is valid"))
}

/// What has to be known to repeat the run.
fn settings(load: &Load, model: &str) -> BTreeMap<String, Value> {
    // JSON has no infinity.
    let rate = load.rate.map(|rate| if rate.is_finite() { json!(rate) } else { json!("inf") });
    let pairs = [
        ("model", json!(model)),
        ("concurrency", if rate.is_some() { Value::Null } else { json!(load.concurrency.unwrap_or(CONCURRENCY)) }),
        ("rate_per_s", json!(rate)),
        ("input_len", json!(load.input_len)),
        ("output_len", json!(load.output_len)),
        ("shared_prefix", json!(load.shared_prefix)),
        ("text", json!(load.text)),
        ("temperature", json!(load.temperature)),
        ("ignore_eos", json!(!load.stop_at_end)),
        ("warmup", json!(load.warmup)),
        ("seed", json!(load.seed)),
    ];
    pairs.into_iter().map(|(key, value)| (key.to_string(), value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn args(flags: &[&str]) -> Result<Args, clap::Error> {
        Cli::try_parse_from([&["bench"], flags].concat()).map(|cli| cli.args)
    }

    /// Reads one request of a connection; none at its end.
    async fn read(stream: &mut TcpStream) -> Option<(String, Value)> {
        let mut bytes = Vec::new();
        loop {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                let length = head.lines().find_map(|line| {
                    let (name, value) = line.split_once(':')?;
                    name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().unwrap())
                });
                if body.len() >= length.unwrap_or(0) {
                    return Some((head.to_string(), serde_json::from_str(body).unwrap_or(Value::Null)));
                }
            }
            if stream.read_buf(&mut bytes).await.ok()? == 0 {
                return None;
            }
        }
    }

    /// A server that answers `output` tokens in two events; every `refuse`-th completion is answered 429.
    async fn server(refuse: usize) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let count = Arc::new(AtomicUsize::new(0));
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let count = count.clone();
                tokio::spawn(async move {
                    while let Some((head, body)) = read(&mut stream).await {
                        let answer = answer(&head, &body, &count, refuse);
                        stream.write_all(answer.as_bytes()).await.unwrap();
                    }
                });
            }
        });
        url
    }

    fn answer(head: &str, body: &Value, count: &AtomicUsize, refuse: usize) -> String {
        let sized =
            |status: &str, text: String| format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{text}", text.len());
        if head.starts_with("GET /v1/models") {
            return sized("200 OK", json!({"data": [{"id": "demo"}]}).to_string());
        }
        if (count.fetch_add(1, Ordering::Relaxed) + 1).is_multiple_of(refuse) {
            return sized("429 Too Many Requests", String::new());
        }
        assert_eq!((&body["model"], &body["ignore_eos"]), (&json!("demo"), &json!(true)));
        let input = body["prompt"].as_array().unwrap().len();
        let output = body["max_tokens"].as_u64().unwrap() as usize;
        let chunk = |tokens: usize| json!({"choices": [{"text": "", "token_ids": vec![1; tokens]}]});
        let usage = json!({"choices": [], "usage": {"prompt_tokens": input, "completion_tokens": output}});
        let events = format!("data: {}\n\ndata: {}\n\ndata: {usage}\n\ndata: [DONE]\n\n", chunk(1), chunk(output - 1));
        sized("200 OK", events)
    }

    async fn run(flags: &[&str], refuse: usize) -> Report {
        let url = server(refuse).await;
        let flags = [&["--url", &url, "--requests", "20", "--input-len", "6", "--output-len", "4"], flags].concat();
        measure(&args(&flags).unwrap()).await.unwrap()
    }

    #[tokio::test]
    async fn a_closed_loop_sends_every_request_once_and_counts_refusals() {
        let report = run(&["--concurrency", "3", "--warmup", "0"], 5).await;
        assert_eq!((report.requests, report.succeeded), (20, 16));
        assert_eq!(report.failures, [("HTTP 429".to_string(), 4)].into());
        assert_eq!((report.input_tokens, report.output_tokens), (16 * 6, 16 * 4));
        assert!((1..=3).contains(&report.concurrency_peak), "{}", report.concurrency_peak);
        assert_eq!(report.settings["model"], "demo");
    }

    #[tokio::test]
    async fn an_open_loop_sends_every_request_too() {
        for rate in ["2000", "inf"] {
            let report = run(&["--rate", rate], usize::MAX).await;
            assert_eq!((report.requests, report.succeeded), (20, 20));
            assert_eq!(report.itl.unwrap().samples, 20);
        }
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_is_named() {
        let address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let url = format!("http://{address}");
        let error = measure(&args(&["--url", &url]).unwrap()).await.unwrap_err();
        assert!(format!("{error:#}").contains(&url), "{error:#}");
        assert!(measure(&args(&["--url", "https://x"]).unwrap()).await.is_err());
    }

    #[test]
    fn contradicting_flags_are_refused() {
        assert!(args(&["--rate", "2", "--concurrency", "3"]).is_err());
        assert!(args(&["--rate", "0"]).is_err());
        assert!(args(&["--requests", "0"]).is_err());
        assert_eq!(args(&["--rate", "inf"]).unwrap().load.rate, Some(f64::INFINITY));
    }
}
