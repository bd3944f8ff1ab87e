//! `conclave verify`: a running cluster compared with a one-rank reference on this host. First the weights: one digest over
//! what all ranks have proven, and over what the files here hold. Then answers: the same requests, all at once to the cluster
//! and one by one to the reference, must give the same token ids and the same log-probabilities, bit for bit.

use crate::client;
use crate::serve::{After, Options, serve};
use crate::whole;
use anyhow::{Context, Result, bail, ensure};
use coordinator::config::parse_dtype;
use coordinator::hub::Need;
use coordinator::source::Source;
use indicatif::{ProgressBar, ProgressStyle};
use model::proof::{self, Digest, SegmentId};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use worker::load::checkpoint::Checkpoint;

#[derive(clap::Args)]
pub struct Args {
    /// The model's own files: a directory, a .gguf file, or a model of the hub
    model: PathBuf,
    /// The cluster's API
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    url: String,
    /// API key; better in the environment variable CONCLAVE_API_KEY
    #[arg(long)]
    api_key: Option<String>,
    /// Compare the weights alone: for models that one rank of this host can't hold
    #[arg(long)]
    weights_only: bool,
    /// Ask no cluster, but write the list of this model's digests beside it: coordinators then compare every worker with it
    #[arg(long)]
    write_list: bool,
}

/// Texts of several lengths and scripts.
const TEXTS: [&str; 4] = [
    "Once upon a time there was a fox",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Die Würde des Menschen ist",
    "1, 1, 2, 3, 5, 8, 13,",
];

/// Tokens drawn for each.
const TOKENS: usize = 24;

pub fn run(args: Args) -> Result<()> {
    let key = args.api_key.clone().or_else(|| std::env::var("CONCLAVE_API_KEY").ok());
    let url = args.url.trim_end_matches('/').to_string();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let path = crate::hub::model(&args.model, Need::Serve)?.path;
    if args.write_list {
        return write_list(&path);
    }
    let status = runtime.block_on(client::get(&format!("{url}/status"), key.as_deref()))?;
    ensure!(status["ready"] == true, "the cluster is not ready: {}", status["reasons"]);
    let (count, root) = weights(&path)?;
    let proven = status["weights"].as_str().unwrap_or_default();
    ensure!(!proven.is_empty(), "the cluster has not told of its weights");
    ensure!(proven == root, "the weights differ: the cluster has proven {proven}, the files here are {root}");
    println!("weights: the same in all {count} segments ({root})");
    if args.weights_only {
        return Ok(());
    }
    let answers = runtime.block_on(together(&url, key.as_deref(), &status))?;
    let own_key = coordinator::run::random_token();
    let options = reference(&status, own_key.clone())?;
    runtime.block_on(serve(path, options, |serving| async move {
        let own = format!("http://{}", serving.address);
        let here = client::get(&format!("{own}/status"), Some(&own_key)).await?;
        let (theirs, ours) = (&status["kernel_family"], &here["kernel_family"]);
        ensure!(
            theirs == ours,
            "the cluster computes with {theirs} kernels and this host with {ours}: only the same can be compared (or --weights-only)"
        );
        for (request, answer) in answers {
            let expected = said(client::ask(&format!("{own}/v1/completions"), Some(&own_key), &request).await?)?;
            if answer != expected {
                bail!("the answers differ to {request}:\n  the cluster: {answer}\n  one rank:    {expected}");
            }
        }
        let mesh = status["mesh"].as_str().unwrap_or_default();
        println!("answers: the same tokens and log-probabilities, bit for bit, on {mesh} as on one rank");
        Ok(After::End)
    }))
}

/// The digests of all segments of the files at `path`.
fn digests(path: &Path) -> Result<BTreeMap<SegmentId, Digest>> {
    let style =
        ProgressStyle::with_template("  weights {bar:30} {percent}%  {eta} left").expect("the template is valid");
    let bar = std::io::stderr().is_terminal().then(|| ProgressBar::new(0).with_style(style));
    let progress = |done: u64, total: u64| {
        if let Some(bar) = &bar {
            bar.set_length(total);
            bar.set_position(done);
        }
    };
    let checkpoint = Checkpoint::open(path)?;
    let spec = checkpoint.spec()?.predicting(0)?;
    let known = worker::load::proof::of_model(&checkpoint, &spec, &progress)?;
    if let Some(bar) = &bar {
        bar.finish_and_clear();
    }
    Ok(known)
}

/// How many segments there are, and the digest over all.
fn weights(path: &Path) -> Result<(usize, String)> {
    let (spec, known) = (Source::open(path)?.spec, digests(path)?);
    let root = proof::root(&spec, &known).context("some segments have no digest")?;
    Ok((known.len(), proof::hex(&root)))
}

fn write_list(path: &Path) -> Result<()> {
    let (source, known) = (Source::open(path)?, digests(path)?);
    let list = source.list_path();
    let text = proof::write(&source.spec.predicting(0)?, &source.identity, &known);
    whole::write(&list, text.as_bytes())?;
    println!("{}: {} digests", list.display(), known.len());
    Ok(())
}

/// What is asked: greedy and drawn, prompts scored or not, alone and as several choices.
fn requests(status: &Value) -> Vec<Value> {
    let len_max = status["model_len_max"].as_u64().unwrap_or(1024) as usize;
    let mut requests = Vec::new();
    for (number, text) in TEXTS.iter().enumerate() {
        // No more than a byte a token, half of the longest sequence at most.
        let long = text.repeat((len_max / 2 / text.len()).clamp(1, 12));
        let common = json!({"model": status["model"], "max_tokens": TOKENS, "logprobs": 5, "return_token_ids": true});
        for variant in [
            json!({"prompt": text, "temperature": 0}),
            json!({"prompt": text, "temperature": 0.9, "seed": number, "n": 2}),
            json!({"prompt": long, "temperature": 0, "echo": true}),
        ] {
            let mut request = common.clone();
            let fields = request.as_object_mut().expect("it is an object");
            fields.extend(variant.as_object().cloned().unwrap_or_default());
            requests.push(request);
        }
    }
    requests
}

/// All requests at once to the cluster, with what it said to each.
async fn together(url: &str, key: Option<&str>, status: &Value) -> Result<Vec<(Value, Value)>> {
    let mut asked = tokio::task::JoinSet::new();
    for (place, request) in requests(status).into_iter().enumerate() {
        let (url, key) = (format!("{url}/v1/completions"), key.map(str::to_string));
        asked.spawn(async move {
            let answer = said(client::ask(&url, key.as_deref(), &request).await?)?;
            anyhow::Ok((place, (request, answer)))
        });
    }
    let mut answers = BTreeMap::new();
    while let Some(answer) = asked.join_next().await {
        let (place, answer) = answer.context("asking broke off")??;
        answers.insert(place, answer);
    }
    Ok(answers.into_values().collect())
}

/// What of an answer must be the same.
fn said(mut answer: Value) -> Result<Value> {
    let choices = answer["choices"].take();
    ensure!(choices.as_array().is_some_and(|c| !c.is_empty()), "an answer without choices: {answer}");
    Ok(choices)
}

/// One rank on a free port, computing as the cluster does.
fn reference(status: &Value, key: String) -> Result<Options> {
    let dtype = status["dtype"].as_str().unwrap_or("auto");
    Ok(Options {
        workers: Some(1),
        tensor_parallel_size: Some(1),
        data_parallel_size: Some(1),
        pipeline_parallel_size: Some(1),
        expert_parallel_size: Some(1),
        dtype: parse_dtype(dtype).map_err(|e| anyhow::anyhow!("the cluster computes in {dtype}: {e}"))?,
        backend: worker::config::Backend::default(),
        listen: "127.0.0.1:0".parse().context("an address")?,
        max_model_len: status["model_len_max"].as_u64().map(|n| n as usize),
        kv_cache_memory: None,
        served_model_name: status["model"].as_str().map(str::to_string),
        chat_template: None,
        api_key: Some(key),
        api_keys_file: None,
        max_num_batched_tokens: None,
        max_num_seqs: None,
        num_speculative_tokens: 0,
        draft_model: None,
        no_async_scheduling: false,
        threads: None,
    })
}
