//! `conclave serve`: a whole cluster on this host.

use crate::workers::{Share, Workers};
use crate::{checksums, progress, signals};
use anyhow::{Context, Result};
use coordinator::api::connections;
use coordinator::config::{Config, parse_dtype};
use coordinator::hub::Need;
use coordinator::plan::{Device, Offer, explain, parse_bytes};
use model::plan::WorkerId;
use model::quant::Dtype;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use tokio::net::TcpListener;
use worker::config::Backend;

#[derive(clap::Args)]
pub struct Args {
    /// A directory in Hugging Face's layout, a .gguf file, or a model of the hub: org/name, org/name@revision,
    /// org/name:FILE.gguf
    model: PathBuf,
    /// Compare the model's files with their checksums first: those of SHA256SUMS beside them, or the hub cache's
    #[arg(long)]
    verify_checksums: bool,
    #[command(flatten)]
    pub options: Options,
}

#[derive(clap::Args, Clone)]
pub struct Options {
    /// Worker processes; by default one, or one a rank where the mesh is given
    #[arg(long)]
    pub workers: Option<usize>,
    #[arg(long, visible_alias = "tp")]
    pub tensor_parallel_size: Option<usize>,
    #[arg(long, visible_alias = "dp")]
    pub data_parallel_size: Option<usize>,
    #[arg(long, visible_alias = "pp")]
    pub pipeline_parallel_size: Option<usize>,
    #[arg(long, visible_alias = "ep")]
    pub expert_parallel_size: Option<usize>,
    /// auto, f32 or bf16
    #[arg(long, default_value = "auto", value_parser = parse_dtype)]
    pub dtype: Setting<Dtype>,
    /// auto, cpu or cuda: a GPU for each rank, each with a worker of its own
    #[arg(long, default_value = "auto")]
    pub backend: Backend,
    /// Where the API listens
    #[arg(long, default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// Longest sequence in tokens, prompt and answer together
    #[arg(long)]
    pub max_model_len: Option<usize>,
    /// Tokens of a sequence that a step may guess and check: by a draft model, else by the model's prediction heads where it has any,
    /// else by what followed its last tokens before (prompt lookup)
    #[arg(long, default_value_t = 0)]
    pub num_speculative_tokens: usize,
    /// A smaller model of the same tokens that guesses, named as MODEL is; with --num-speculative-tokens
    #[arg(long, value_name = "MODEL")]
    pub draft_model: Option<PathBuf>,
    /// Wait for each step's answer before the next is issued
    #[arg(long)]
    pub no_async_scheduling: bool,
    /// Cache of each rank, e.g. 2GiB; by default 4GiB for all together, or one longest sequence
    #[arg(long, value_parser = parse_bytes)]
    pub kv_cache_memory: Option<u64>,
    /// The name that clients ask for
    #[arg(long)]
    pub served_model_name: Option<String>,
    /// A Jinja file that renders chats in place of the model's own template
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,
    /// Key that clients must send; better in the environment variable CONCLAVE_API_KEY
    #[arg(long)]
    pub api_key: Option<String>,
    /// File of keys that clients may send, one a line as `conclave keys add` prints it; read anew when it changes
    #[arg(long, value_name = "FILE")]
    pub api_keys_file: Option<PathBuf>,
    /// Tokens in a step
    #[arg(long)]
    pub max_num_batched_tokens: Option<usize>,
    /// Sequences in a step
    #[arg(long)]
    pub max_num_seqs: Option<usize>,
    /// Threads of all workers together
    #[arg(long)]
    pub threads: Option<usize>,
}

/// `auto`, or a value.
type Setting<T> = Option<T>;

/// Cache that a host's workers take together unless told otherwise: the host is shared with everything else on it.
const CACHE_MODEST: u64 = 4 << 30;

/// How a cluster is laid over this host's cores and memory.
struct Layout {
    workers: usize,
    share: Share,
}

impl Layout {
    /// What the workers are going to offer.
    fn offers(&self) -> Vec<Offer> {
        let Share { backend, devices, threads, memory_bytes } = self.share;
        // What a GPU has is for its worker to say.
        let memory_bytes = if memory_bytes == 0 { u64::MAX >> 8 } else { memory_bytes };
        let device = Device { memory_bytes: memory_bytes / devices as u64, threads: (threads / devices).max(1) };
        (0..self.workers)
            .map(|index| Offer {
                worker: WorkerId(format!("worker-{index}")),
                host: worker::config::host_name(),
                data_address: String::new(),
                devices: vec![device; devices],
                families: worker::hardware::families(backend),
            })
            .collect()
    }
}

impl Options {
    fn layout(&self) -> Result<Layout> {
        let ranks = [self.tensor_parallel_size, self.data_parallel_size, self.pipeline_parallel_size];
        let ranks = ranks.into_iter().flatten().try_fold(1usize, usize::checked_mul).context("the mesh is absurd")?;
        let workers = self.workers.unwrap_or(ranks);
        anyhow::ensure!((1..=256).contains(&workers), "--workers {workers}: 1 to 256 on one host");
        anyhow::ensure!(ranks > 0 && ranks <= 1024, "a mesh of {ranks} ranks: 1 to 1024 on one host");
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let threads = self.threads.unwrap_or(cores);
        if self.backend == Backend::Cuda {
            let gpus = worker::cuda::gpus()?;
            anyhow::ensure!(workers == ranks, "--workers {workers}: with GPUs, one for each of {ranks} ranks");
            anyhow::ensure!(ranks <= gpus, "{ranks} ranks ask for as many GPUs, the host has {gpus}");
        }
        let share = Share {
            backend: self.backend,
            devices: ranks.div_ceil(workers),
            threads: (threads / workers).max(1),
            memory_bytes: match self.backend {
                Backend::Cpu => worker::config::memory_to_offer() / workers as u64,
                Backend::Cuda => 0,
            },
        };
        Ok(Layout { workers, share })
    }

    /// The key that opens the API, if it asks for one that is not in a file.
    pub fn key(&self) -> Option<String> {
        self.api_key.clone().or_else(|| std::env::var("CONCLAVE_API_KEY").ok())
    }

    pub fn config(&self, model: PathBuf, workers: usize, token: String) -> Config {
        let defaults: Config = toml::from_str("model = \"\"").expect("every other key has a default");
        Config {
            model,
            served_model_name: self.served_model_name.clone(),
            chat_template: self.chat_template.clone(),
            listen: self.listen.to_string(),
            token,
            api_keys: self.key().into_iter().collect(),
            api_keys_file: self.api_keys_file.clone(),
            workers,
            // A worker that dies is started again at once; should that fail, serve on with those that are left.
            settle_ms: 5_000,
            tensor_parallel_size: self.tensor_parallel_size,
            data_parallel_size: self.data_parallel_size,
            pipeline_parallel_size: self.pipeline_parallel_size,
            expert_parallel_size: self.expert_parallel_size,
            dtype: self.dtype,
            max_model_len: self.max_model_len,
            num_speculative_tokens: self.num_speculative_tokens,
            draft_model: self.draft_model.clone(),
            async_scheduling: !self.no_async_scheduling,
            kv_cache_memory_bytes: self.kv_cache_memory,
            kv_cache_modest_bytes: Some(CACHE_MODEST / workers as u64),
            max_num_batched_tokens: self.max_num_batched_tokens.unwrap_or(defaults.max_num_batched_tokens),
            max_num_seqs: self.max_num_seqs.unwrap_or(defaults.max_num_seqs),
            ..defaults
        }
    }
}

pub fn run(args: Args) -> Result<()> {
    let mut options = args.options;
    let model = crate::hub::model(&args.model, Need::Serve)?;
    options.served_model_name = options.served_model_name.or(model.name);
    if args.verify_checksums {
        checksums::verify(&model.path)?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(serve(model.path, options, |serving| async move {
        serving.announce();
        Ok(After::GoOn)
    }))
}

/// A cluster that answers.
pub struct Serving {
    pub address: SocketAddr,
    plan: String,
}

impl Serving {
    pub fn announce(&self) {
        println!("{}", self.plan);
        println!("serving on http://{} (API under /v1, chat page at /); Ctrl-C ends it", self.address);
    }
}

/// What is wanted of a cluster whose first work is done.
pub enum After {
    GoOn,
    End,
}

/// Serves until told to stop; `ready` runs once when the API answers.
pub async fn serve<F: Future<Output = Result<After>>>(
    model: PathBuf,
    mut options: Options,
    ready: impl FnOnce(Serving) -> F,
) -> Result<()> {
    if let Some(draft) = &options.draft_model {
        anyhow::ensure!(
            options.num_speculative_tokens > 0,
            "--draft-model {} guesses nothing without --num-speculative-tokens N, 1 or more",
            draft.display()
        );
        options.draft_model = Some(crate::hub::model(draft, Need::Serve)?.path);
    }
    let layout = options.layout()?;
    let token = coordinator::run::random_token();
    let config = options.config(model, layout.workers, token.clone());
    let source = coordinator::run::rehearse(&config, &layout.offers())?;
    if let Some(part) = explain::part(&source.spec) {
        println!("only {part}");
    }
    let api = connections::listen(options.listen).await;
    let api = api.with_context(|| format!("the API can't listen on {}", options.listen))?;
    let node = TcpListener::bind("127.0.0.1:0").await.context("no free port on loopback")?;
    let (api_address, node_address) = (api.local_addr()?, node.local_addr()?);
    let coordinator = coordinator::run::start(config, api, node, crate::build())?;
    let view = coordinator.view();
    let workers = Workers::start(layout.workers, &layout.share, (node_address, &view), &token)?;
    let life = async {
        progress::until_serving(view.clone()).await?;
        let plan = view.borrow().plan.clone();
        match ready(Serving { address: api_address, plan }).await? {
            After::GoOn => std::future::pending().await,
            After::End => Ok(()),
        }
    };
    let outcome = tokio::select! {
        outcome = life => outcome,
        stopped = signals::asked_to_stop() => stopped.map_err(Into::into),
        ended = coordinator.ended() => ended.map_err(Into::into),
    };
    coordinator.stop(Duration::ZERO).await;
    workers.stop().await;
    outcome
}
