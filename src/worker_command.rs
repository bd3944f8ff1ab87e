//! `conclave worker`: one worker of a cluster.

use crate::{settings, signals};
use anyhow::{Context, Result};
use model::plan::WorkerId;
use std::path::PathBuf;
use worker::agent::driver::{Identity, Stop};
use worker::config::{Backend, Config, host_name};
use worker::hardware::{Hardware, families};

#[derive(clap::Args)]
pub struct Args {
    /// Settings as TOML; flags go before it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The coordinator's node plane, host:port
    #[arg(long, required_unless_present = "config")]
    coordinator: Option<String>,
    /// This worker's name, unique in the cluster
    #[arg(long)]
    name: Option<String>,
    /// Where its ranks' data arrives, ip:port
    #[arg(long)]
    data_listen: Option<String>,
    /// What peers dial instead, host:port
    #[arg(long)]
    data_advertise: Option<String>,
    /// Where probes and scrapers ask how it is, ip:port
    #[arg(long)]
    health_listen: Option<String>,
    /// What its ranks compute on: auto, cpu or cuda
    #[arg(long)]
    backend: Option<Backend>,
    /// Which of the host's GPUs it has, from 0
    #[arg(long)]
    gpu: Option<usize>,
    /// CPU devices to offer
    #[arg(long)]
    devices: Option<usize>,
    /// Threads of all CPU devices together
    #[arg(long)]
    threads: Option<usize>,
    /// Memory to offer in bytes, all devices together
    #[arg(long)]
    memory_bytes: Option<u64>,
    /// Speak to other hosts in the clear
    #[arg(long)]
    insecure: bool,
    /// Seconds to go on serving after SIGTERM while others take over
    #[arg(long)]
    drain_seconds: Option<u64>,
    /// End when standard input ends (set by `serve` for its children)
    #[arg(long, hide = true)]
    pub until_stdin_closes: bool,
}

fn config(args: &Args) -> Result<Config> {
    let (what, text) = match &args.config {
        Some(file) => {
            let what = file.display().to_string();
            let text = std::fs::read_to_string(file).with_context(|| format!("{what} can't be read"))?;
            (what, text)
        }
        None => {
            let text = format!("coordinator = {:?}", args.coordinator.as_deref().unwrap_or_default());
            ("what the worker is told".to_string(), text)
        }
    };
    let mut config: Config = settings::parse(&what, &text)?;
    let set = |slot: &mut String, value: &Option<String>| {
        if let Some(value) = value {
            slot.clone_from(value);
        }
    };
    // A flag goes before the environment, which goes before the file.
    let flag_or = |flag: &Option<String>, variable: &str| flag.clone().or_else(|| std::env::var(variable).ok());
    set(&mut config.coordinator, &args.coordinator);
    set(&mut config.name, &flag_or(&args.name, "CONCLAVE_WORKER_NAME"));
    set(&mut config.data_listen, &args.data_listen);
    set(&mut config.data_advertise, &flag_or(&args.data_advertise, "CONCLAVE_DATA_ADVERTISE"));
    set(&mut config.health_listen, &flag_or(&args.health_listen, "CONCLAVE_HEALTH_LISTEN"));
    config.backend = args.backend.unwrap_or(config.backend);
    config.gpu = args.gpu.unwrap_or(config.gpu);
    config.devices = args.devices.unwrap_or(config.devices);
    config.threads = args.threads.unwrap_or(config.threads);
    config.insecure |= args.insecure;
    config.drain_seconds = args.drain_seconds.unwrap_or(config.drain_seconds);
    config.memory_bytes = args.memory_bytes.unwrap_or(config.memory_bytes);
    if let Ok(token) = std::env::var("CONCLAVE_TOKEN") {
        config.token = token;
    }
    if config.name.is_empty() {
        config.name = format!("{}-{}", host_name(), std::process::id());
    }
    anyhow::ensure!(config.devices > 0 && config.devices <= 1024, "devices = {}: 1 to 1024", config.devices);
    let one = config.backend == Backend::Cpu || config.devices == 1;
    anyhow::ensure!(one, "devices = {}: a worker has one GPU; start one worker for each", config.devices);
    Ok(config)
}

fn identity(config: &Config) -> Result<Identity> {
    let hardware = Hardware::open(config)?;
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = if config.threads == 0 { cores } else { config.threads };
    let memory = hardware.memory_bytes(config);
    let device = proto::cluster::v1::Device {
        memory_bytes: memory / config.devices as u64,
        threads: (threads / config.devices).max(1) as u32,
    };
    Ok(Identity {
        name: WorkerId(config.name.clone()),
        build: crate::build(),
        host: host_name(),
        families: families(config.backend),
        devices: vec![device; config.devices],
        hardware,
    })
}

pub fn run(args: Args) -> Result<()> {
    let config = config(&args)?;
    let identity = identity(&config)?;
    // One thread for control and steps: they are small, and hopping between threads costs more than they do.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(async {
        let (first, second) = tokio::sync::oneshot::channel();
        let leave = async move {
            signals::asked_or_never().await;
            let _ = first.send(());
        };
        let now = async move {
            let again = async {
                // A sender that is gone has not been asked.
                match second.await {
                    Ok(()) => signals::asked_or_never().await,
                    Err(_) => std::future::pending().await,
                }
            };
            tokio::select! {
                () = again => {}
                () = signals::stdin_closed(), if args.until_stdin_closes => {}
            }
        };
        worker::agent::driver::run(config, identity, Stop { leave, now }).await
    });
    if outcome.is_ok() {
        // Rank threads may be deep in a step that nobody wants any more.
        std::process::exit(0);
    }
    Ok(outcome?)
}
