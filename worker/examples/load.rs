//! Times a rank's load: `cargo run --release -p worker --example load -- MODEL [threads] [bf16 | f32] [own | peer | DIR]`.
//!
//! `peer`: lent by another data plane of this process, over loopback in the clear; a folder of certificates
//! (`conclave certs init DIR`): the same under TLS. `proof` in its place: how fast the digests alone are taken of own files.
//!
//! Prints bytes a second, and the memory that the process had at its peak beyond the packed weights. The page cache
//! decides what is measured: read the file once before for the processor's share, drop it for the disk's
//! (`dd of=FILE oflag=nocache conv=notrunc,fdatasync count=0`).

use model::mesh::{Mesh, RankId};
use model::plan::{Epoch, Guesser, KernelFamily, Limits, Plan};
use model::quant::Dtype;
use proto::tls::Tls;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;
use worker::collective::connect::DataPlane;
use worker::collective::local;
use worker::engine::comm::Communicators;
use worker::engine::shard::{ShardConfig, Shelves, load_cpu};
use worker::load::checkpoint::Checkpoint;
use worker::load::proof::of_model;

/// A line of `/proc/self/status`, in MiB.
fn status(key: &str) -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<f64>().ok()).unwrap_or(0.0) / 1024.0
}

/// Two data planes; the first lends the model at `path` to the second.
fn planes(path: &str, certificates: Option<&Path>) -> (DataPlane, DataPlane, Vec<u8>) {
    let tls = || {
        let file = |folder: &Path, name: &str| folder.join(name);
        certificates.map(|folder| Tls {
            ca: file(folder, "ca.crt"),
            certificate: file(folder, "worker.crt"),
            key: file(folder, "worker.key"),
        })
    };
    let plane = || DataPlane::bind("127.0.0.1:0", tls()).expect("a data plane");
    let (giver, taker) = (plane(), plane());
    let own = Checkpoint::open(Path::new(path)).expect("a checkpoint");
    let (identity, paths) = (own.identity(), own.paths());
    giver.lend(&identity, "", Box::new(move || Ok(paths.clone()))).expect("an identity");
    (giver, taker, identity)
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().expect("the path of a model");
    let threads = arguments.next().map_or(1, |n| n.parse().expect("a number of threads"));
    let dtype: Dtype = arguments.next().map_or(Dtype::Bf16, |d| d.parse().expect("bf16 or f32"));
    let from = arguments.next().unwrap_or("own".into());
    let lent = (from != "own" && from != "proof").then(|| planes(&path, (from != "peer").then_some(Path::new(&from))));
    let start = Instant::now();
    let checkpoint = match &lent {
        None => Checkpoint::open(Path::new(&path)),
        Some((giver, taker, identity)) => taker
            .borrow(&[giver.address().to_string()], (identity, ""), Epoch(1))
            .and_then(|lender| Checkpoint::borrow(&lender)),
    };
    let checkpoint = checkpoint.expect("a checkpoint");
    let spec = Arc::new(checkpoint.spec().expect("a spec"));
    let opened = start.elapsed().as_secs_f64();
    let bytes = checkpoint.bytes() as f64;
    if from == "proof" {
        let start = Instant::now();
        let segments = of_model(&checkpoint, &spec, &|_, _| {}).expect("digests").len();
        let seconds = start.elapsed().as_secs_f64();
        return println!("{segments} digests in {seconds:.3} s: {:.2} GB/s", bytes / 1e9 / seconds);
    }
    let plan = Plan {
        epoch: Epoch(1),
        mesh: Mesh::ONE,
        dtype,
        family: KernelFamily::Vector,
        stages: std::iter::once(0..spec.layers.len()).collect(),
        members: vec![],
        limits: Limits { model_len_max: 64, step_tokens_max: 8, step_sequences_max: 1, blocks: 2 },
        guesser: Guesser::Nobody,
    };
    let one = || local::members(1).expect("a group of one").remove(0);
    let communicators = Communicators {
        tensor: Box::new(one()),
        lane: Box::new(one()),
        pipe: Box::new(one()),
        devices: Default::default(),
    };
    let (before, start) = (status("RssAnon"), Instant::now());
    let config = ShardConfig {
        spec,
        plan: &plan,
        rank: RankId(0),
        checkpoint: &checkpoint,
        draft: None,
        shelves: &Shelves::default(),
        communicators,
        threads,
        spin: 0,
        progress: Arc::new(AtomicU64::new(0)),
        loading: &|_, _| {},
    };
    let engine = load_cpu(config).expect("a rank");
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "opened in {opened:.3} s; {:.2} GB loaded in {seconds:.3} s: {:.2} GB/s",
        bytes / 1e9,
        bytes / 1e9 / seconds
    );
    let (anonymous, peak) = (status("RssAnon") - before, status("VmHWM"));
    println!(
        "weights {anonymous:.0} MiB of anonymous memory, of the file mapped {:.0} MiB, peak {peak:.0} MiB",
        status("RssFile")
    );
    drop(engine);
}
