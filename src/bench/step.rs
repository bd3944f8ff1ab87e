//! `conclave bench step`: how long one rank's forward passes take, without scheduler, network or text, and how far from the roofs
//! of what it computes on.

use anyhow::{Context, Result, ensure};
use coordinator::config::parse_dtype;
use coordinator::hub::Need;
use coordinator::plan::{Device, Offer, Policy, explain, format_bytes, parse_bytes, plan};
use coordinator::source::Source;
use model::mesh::RankId;
use model::parameters;
use model::plan::{BLOCK_TOKENS, KernelFamily, Plan, WorkerId};
use model::quant::Dtype;
use model::step::{Begin, BlockId, Chunk, LaneBatch, Sampling, SeqId, StepBatch};
use serde::Serialize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;
use worker::backend::cpu::simd::{Level, pool::Pool};
use worker::backend::cuda;
use worker::collective::local;
use worker::config::{Backend, memory_to_offer};
use worker::engine::comm::Communicators;
use worker::engine::shard::{Shard, ShardConfig, Shelves, load_shard};
use worker::hardware::{Hardware, families};
use worker::load::checkpoint::Checkpoint;
use worker::roofs::Roofs;

use super::random::Random;

/// Passes of each row that count; the ones before warm caches up.
const PASSES: usize = 15;
const WARM_UP: usize = 3;

/// Rounds that idle threads wait awake, as in a server.
const SPIN: u32 = 20_000;

/// Measures one rank's forward passes.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// A local directory, a .gguf file, or a hub id
    model: PathBuf,
    /// auto, cpu or cuda
    #[arg(long, default_value = "auto")]
    backend: Backend,
    /// Which GPU
    #[arg(long, default_value_t = 0)]
    gpu: usize,
    /// Memory that weights and cache may take, e.g. 20GiB; 90% of what is free without
    #[arg(long, value_parser = parse_bytes)]
    memory: Option<u64>,
    /// Threads of the CPU; one a core without
    #[arg(long)]
    threads: Option<usize>,
    /// auto, f32 or bf16
    #[arg(long, default_value = "auto", value_parser = parse_dtype)]
    dtype: Setting<Dtype>,
    /// Sequences of each decode step that is measured
    #[arg(long, value_delimiter = ',', default_value = "1,8,32")]
    sequences: Vec<usize>,
    /// Tokens of one sequence in each prefill step that is measured
    #[arg(long, value_delimiter = ',', default_value = "128,512")]
    prefill: Vec<usize>,
    /// Tokens before those of the step
    #[arg(long, default_value_t = 512)]
    context: usize,
    /// Also write the rows as JSON to this file
    #[arg(long)]
    json: Option<PathBuf>,
}

/// `auto`, or a value.
type Setting<T> = Option<T>;

/// One kind of step.
#[derive(Debug, Clone, Copy)]
struct Shape {
    sequences: usize,
    /// Tokens of each.
    tokens: usize,
    context: usize,
}

impl Shape {
    fn rows(&self) -> usize {
        self.sequences * self.tokens
    }

    fn blocks_each(&self) -> usize {
        (self.context + self.tokens).div_ceil(BLOCK_TOKENS)
    }
}

/// One row of the report.
#[derive(Debug, Clone, Serialize)]
struct Row {
    what: &'static str,
    sequences: usize,
    /// Of all sequences.
    tokens: usize,
    /// Before them, of each.
    context: usize,
    p50_ms: f64,
    tokens_per_s: f64,
    /// Weights that the step is expected to meet and the cache that it reads, each once.
    gb_per_s: f64,
    of_memory_roof: f64,
    /// Two for each weight that a token meets; attention is left out.
    gflop_per_s: f64,
    of_compute_roof: Option<f64>,
}

impl Row {
    fn line(&self) -> String {
        let Row { what, sequences, tokens, context, p50_ms, tokens_per_s, gb_per_s, gflop_per_s, .. } = self;
        let percent = |part: f64| format!("{:.0}%", 100.0 * part);
        let (memory, compute) = (percent(self.of_memory_roof), self.of_compute_roof.map(percent).unwrap_or_default());
        format!(
            "{what:<8} {sequences:>9} {tokens:>7} {context:>8} {p50_ms:>10.2} {tokens_per_s:>10.1} {gb_per_s:>8.1} {memory:>5} \
             {gflop_per_s:>9.1} {compute:>5}"
        )
    }
}

/// Measures all, printing each row as it comes.
pub fn step(args: &Args) -> Result<()> {
    let shapes = shapes(args)?;
    let path = crate::hub::model(&args.model, Need::Serve)?.path;
    let source = Source::open(&path)?;
    let threads = match args.threads {
        Some(0) => anyhow::bail!("--threads 0: at least one"),
        Some(threads) => threads,
        None => std::thread::available_parallelism().map_or(1, |n| n.get()),
    };
    let (hardware, memory) = open(args)?;
    let planned = planned(args, &source, &shapes, (memory, threads))?;
    let (roofs, said) = roofs(&hardware, threads, planned.0.family)?;
    print!("{}", explain::model(&source.spec));
    println!("{} computed on {}", planned.0.dtype, said);
    let mut rank = load(&source, &planned.0, hardware, threads)?;
    println!(
        "{:<8} {:>9} {:>7} {:>8} {:>10} {:>10} {:>8} {:>5} {:>9} {:>5}",
        "step", "sequences", "tokens", "context", "p50 ms", "tokens/s", "GB/s", "roof", "GFLOP/s", "roof"
    );
    let (mut rows, mut first) = (Vec::new(), 0);
    for shape in shapes {
        let seconds = measure(rank.as_mut(), &source, shape, &mut first)?;
        let row = row(&source, planned.1, shape, seconds, &roofs);
        println!("{}", row.line());
        rows.push(row);
    }
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&rows)?;
        std::fs::write(path, text).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

fn shapes(args: &Args) -> Result<Vec<Shape>> {
    let context = args.context;
    let decode = args.sequences.iter().map(|&sequences| Shape { sequences, tokens: 1, context });
    // A prompt begins without anything before it.
    let prefill = args.prefill.iter().map(|&tokens| Shape { sequences: 1, tokens, context: 0 });
    let shapes: Vec<Shape> = decode.chain(prefill).collect();
    ensure!(shapes.iter().all(|shape| shape.rows() > 0), "--sequences and --prefill: at least one of each");
    Ok(shapes)
}

/// The device, and bytes of it that may be taken.
fn open(args: &Args) -> Result<(Hardware, u64)> {
    Ok(match args.backend {
        Backend::Cpu => (Hardware::Cpu, args.memory.unwrap_or_else(memory_to_offer)),
        Backend::Cuda => {
            let device = cuda::Device::open(args.gpu, args.memory.map(|bytes| bytes as usize))?;
            let bytes = device.memory_bytes() as u64;
            (Hardware::Gpu(device), bytes)
        }
    })
}

/// A plan of one rank with room for every shape, and the bytes of its weights and of a block of its cache.
fn planned(
    args: &Args,
    source: &Source,
    shapes: &[Shape],
    (memory_bytes, threads): (u64, usize),
) -> Result<(Plan, Bytes)> {
    let most = |of: &dyn Fn(&Shape) -> usize| shapes.iter().map(of).max().unwrap_or(1);
    let length = most(&|shape| shape.context + shape.tokens);
    let blocks = most(&|shape| shape.sequences * shape.blocks_each());
    let offer = Offer {
        worker: WorkerId("bench".into()),
        host: worker::config::host_name(),
        data_address: String::new(),
        devices: vec![Device { memory_bytes, threads }],
        families: families(args.backend),
    };
    let policy = Policy {
        dtype: args.dtype,
        model_len_max: Some(length),
        step_tokens_max: most(&|shape| shape.rows()),
        step_sequences_max: most(&|shape| shape.sequences),
        ..Policy::default()
    };
    let planned = plan(&source.spec, &source.storage, &[offer], &policy, None)?;
    let (mut plan, bytes) = (planned.plan, planned.bytes[0]);
    ensure!(
        bytes.total(blocks as u64) <= memory_bytes,
        "{blocks} blocks of cache and the weights are {}, {} are there",
        format_bytes(bytes.total(blocks as u64)),
        format_bytes(memory_bytes)
    );
    plan.limits.blocks = blocks;
    Ok((plan, Bytes { weights: bytes.weights, block: bytes.cache_per_block }))
}

#[derive(Debug, Clone, Copy)]
struct Bytes {
    weights: u64,
    block: u64,
}

/// And what they are, in words.
fn roofs(hardware: &Hardware, threads: usize, family: KernelFamily) -> Result<(Roofs, String)> {
    match hardware {
        Hardware::Cpu => {
            let pool = Pool::new(threads, SPIN).with_context(|| format!("{threads} threads"))?;
            let roofs = Roofs::of_cpu(&pool, Level::best(), family)?;
            let (bytes, flops) = (roofs.bytes / 1e9, roofs.flops.unwrap_or_default() / 1e9);
            let read = format!("{threads} threads ({family:?}), which read {bytes:.1} GB/s");
            Ok((roofs, format!("{read} and multiply {flops:.0} GFLOP/s of bf16")))
        }
        Hardware::Gpu(device) => {
            let roofs = Roofs::of_gpu(device)?;
            Ok((roofs, format!("{}, which copies {:.0} GB/s, read and written", device.name(), roofs.bytes / 1e9)))
        }
    }
}

fn load(source: &Source, plan: &Plan, hardware: Hardware, threads: usize) -> Result<Box<dyn Shard>> {
    let checkpoint = Checkpoint::open(&source.path)?;
    let one = || -> Result<_> { Ok(Box::new(local::members(1)?.remove(0))) };
    let communicators = Communicators { tensor: one()?, lane: one()?, pipe: one()?, devices: Default::default() };
    let start = Instant::now();
    let rank = load_shard(ShardConfig {
        spec: Arc::new(source.spec.clone()),
        plan,
        rank: RankId(0),
        checkpoint: &checkpoint,
        draft: None,
        shelves: &Shelves::on(hardware),
        communicators,
        threads,
        spin: SPIN,
        progress: Arc::default(),
        loading: &|_, _| {},
    })?;
    let (seconds, bytes) = (start.elapsed().as_secs_f64(), source.bytes);
    println!("{} loaded in {seconds:.2} s: {:.2} GB/s", format_bytes(bytes), bytes as f64 / 1e9 / seconds);
    Ok(rank)
}

/// Median seconds of a step of this shape. Sequences are new in each, as if what is before their tokens had come from the prefix
/// cache; tokens are random, so that a mixture's experts are met as in a load of many texts.
fn measure(rank: &mut dyn Shard, source: &Source, shape: Shape, first: &mut u64) -> Result<f64> {
    let (vocab, mut random) = (source.spec.vocab as u64, Random::new(1));
    let mut times = Vec::with_capacity(PASSES);
    for pass in 0..WARM_UP + PASSES {
        let ids = *first..*first + shape.sequences as u64;
        let mut lane = LaneBatch::default();
        for (index, id) in ids.clone().enumerate() {
            let (seq, len, blocks) = (SeqId(id), shape.context + shape.tokens, shape.blocks_each());
            let begin = Begin { seq, sampling: Sampling::GREEDY.clone(), prompt_len: len as u32, history: Vec::new() };
            lane.begun.push(begin);
            lane.chunks.push(Chunk {
                seq,
                start: shape.context as u32,
                tokens: (0..shape.tokens).map(|_| random.below(vocab) as u32).collect(),
                blocks: (index * blocks..(index + 1) * blocks).map(|block| BlockId(block as u32)).collect(),
                sample: true,
                drafts: 0,
            });
        }
        let start = Instant::now();
        rank.step(&StepBatch { lanes: vec![lane] })?;
        if pass >= WARM_UP {
            times.push(start.elapsed().as_secs_f64());
        }
        let ended = LaneBatch { ended: ids.map(SeqId).collect(), ..LaneBatch::default() };
        rank.step(&StepBatch { lanes: vec![ended] })?;
        *first += shape.sequences as u64;
    }
    times.sort_by(f64::total_cmp);
    Ok(times[PASSES / 2])
}

fn row(source: &Source, bytes: Bytes, shape: Shape, seconds: f64, roofs: &Roofs) -> Row {
    let (rows, all) = (shape.rows(), parameters::count(&source.spec));
    let met = parameters::met(&source.spec, rows as u64) as f64 / all.total as f64;
    let cache = (shape.sequences * shape.context.div_ceil(BLOCK_TOKENS)) as f64 * bytes.block as f64;
    let rate = (bytes.weights as f64 * met + cache) / seconds;
    let flops = 2.0 * all.active as f64 * rows as f64 / seconds;
    Row {
        what: if shape.tokens == 1 { "decode" } else { "prefill" },
        sequences: shape.sequences,
        tokens: rows,
        context: shape.context,
        p50_ms: seconds * 1e3,
        tokens_per_s: rows as f64 / seconds,
        gb_per_s: rate / 1e9,
        of_memory_roof: rate / roofs.bytes,
        gflop_per_s: flops / 1e9,
        of_compute_roof: roofs.flops.map(|roof| flops / roof),
    }
}
