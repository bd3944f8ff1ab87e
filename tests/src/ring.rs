//! A model run in this process: every rank a thread, joined by local communicators, fed one step at a time.

use anyhow::{Context, Result, anyhow, ensure};
use model::mesh::{Mesh, RankId};
use model::plan::{BLOCK_TOKENS, Epoch, Guesser, KernelFamily, Limits, Plan};
use model::quant::Dtype;
use model::spec::ModelSpec;
use model::step::{LaneResult, StepBatch};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use worker::collective::device::Devices;
use worker::collective::{Collective, local};
use worker::engine::comm::Communicators;
use worker::engine::shard::{DraftOf, ShardConfig, Shelves, load_cpu};
use worker::engine::trace::Trace;
use worker::load::checkpoint::Checkpoint;

/// A fixture folder beside the tests, or under `CONCLAVE_GOLDENS` for others made in the same way.
pub fn fixture(name: &str) -> PathBuf {
    goldens().join(name)
}

fn goldens() -> PathBuf {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    std::env::var_os("CONCLAVE_GOLDENS").map_or_else(beside, PathBuf::from)
}

/// The names of all fixture folders.
pub fn fixtures() -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(goldens())
        .expect("the golden folder is part of the repository")
        .flatten()
        .filter(|entry| entry.path().join("golden.json").is_file())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// How to cut and bound a run.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    pub mesh: Mesh,
    pub dtype: Dtype,
    pub family: KernelFamily,
    /// Threads of each rank.
    pub threads: usize,
    pub limits: Limits,
    /// Loaded, and run in every step.
    pub guesser: Guesser,
}

impl Setting {
    pub fn new(mesh: Mesh, dtype: Dtype) -> Setting {
        let limits = Limits { model_len_max: 512, step_tokens_max: 512, step_sequences_max: 16, blocks: 64 };
        assert!(limits.blocks * BLOCK_TOKENS >= limits.model_len_max);
        Setting { mesh, dtype, family: KernelFamily::Vector, threads: 1, limits, guesser: Guesser::Nobody }
    }
}

fn opened(draft: &Path) -> Result<(ModelSpec, Checkpoint)> {
    let checkpoint = Checkpoint::open(draft)?;
    Ok((checkpoint.spec()?.predicting(0)?, checkpoint))
}

/// What a rank's thread is told.
enum Order {
    Step(StepBatch),
    Trace(bool),
}

/// What it answers.
enum Reply {
    Step(Result<Option<LaneResult>, String>),
    Trace(Option<Trace>),
}

/// All ranks of one model. Dropping it ends the threads.
pub struct Ring {
    mesh: Mesh,
    orders: Vec<Sender<Order>>,
    replies: Vec<Receiver<Reply>>,
    threads: Vec<JoinHandle<()>>,
    bytes_read: Arc<AtomicU64>,
}

impl Ring {
    /// Loads the checkpoint at `path` on every rank of the mesh.
    pub fn load(path: &Path, setting: Setting) -> Result<Ring> {
        Ring::load_from(path, setting, None)
    }

    /// The same, all ranks with what they need of `shelves`, which keep nothing else.
    pub fn load_from(path: &Path, setting: Setting, shelves: Option<Arc<Shelves>>) -> Result<Ring> {
        Ring::load_of(Arc::new(Checkpoint::open(path)?), setting, shelves)
    }

    /// The same with a draft model, which `setting` must ask for.
    pub fn drafted(path: &Path, draft: &Path, setting: Setting) -> Result<Ring> {
        Ring::load_with(Arc::new(Checkpoint::open(path)?), Some(Arc::new(opened(draft)?)), setting, None)
    }

    /// The same of a checkpoint that is open.
    pub fn load_of(checkpoint: Arc<Checkpoint>, setting: Setting, shelves: Option<Arc<Shelves>>) -> Result<Ring> {
        Ring::load_with(checkpoint, None, setting, shelves)
    }

    fn load_with(
        checkpoint: Arc<Checkpoint>,
        draft: Option<Arc<(ModelSpec, Checkpoint)>>,
        setting: Setting,
        shelves: Option<Arc<Shelves>>,
    ) -> Result<Ring> {
        let spec = Arc::new(checkpoint.spec()?);
        let plan = Arc::new(plan(&spec, setting));
        let ranks: Vec<RankId> = setting.mesh.all().collect();
        if let Some(shelves) = &shelves {
            shelves.keep(&checkpoint.identity(), &spec.predicting(setting.guesser.predictors())?, &plan, &ranks);
        }
        let seats = Arc::new(Mutex::new(communicators(&setting.mesh)?));
        let (mesh, bytes_read) = (setting.mesh, Arc::new(AtomicU64::new(0)));
        let mut ring = Ring { mesh, orders: vec![], replies: vec![], threads: vec![], bytes_read };
        for rank in setting.mesh.all() {
            let (order, orders) = channel();
            let (reply, replies) = channel();
            let (checkpoint, spec, plan, seats) = (checkpoint.clone(), spec.clone(), plan.clone(), seats.clone());
            let (draft, shelves, read) = (draft.clone(), shelves.clone().unwrap_or_default(), ring.bytes_read.clone());
            let run = move || {
                let members = seats.lock().expect("no rank panics holding it").remove(&rank).expect("one a rank");
                rank_thread(
                    (&checkpoint, draft.as_deref()),
                    &shelves,
                    spec,
                    &plan,
                    rank,
                    (setting.threads, members),
                    &orders,
                    &reply,
                    &read,
                );
            };
            ring.threads.push(std::thread::Builder::new().name(format!("rank {}", rank.0)).spawn(run)?);
            ring.orders.push(order);
            ring.replies.push(replies);
        }
        // The first reply of each rank says whether it loaded.
        ring.collect().context("loading")?;
        Ok(ring)
    }

    /// Bytes of the files that its ranks read.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// One step; an answer a lane.
    pub fn step(&mut self, batch: &StepBatch) -> Result<Vec<LaneResult>> {
        for order in &self.orders {
            order.send(Order::Step(batch.clone())).map_err(|_| anyhow!("a rank is gone"))?;
        }
        self.collect()
    }

    fn collect(&mut self) -> Result<Vec<LaneResult>> {
        let mut lanes = vec![None; self.mesh.data];
        let mut faults = Vec::new();
        for (rank, replies) in self.mesh.all().zip(&self.replies) {
            match replies.recv() {
                Ok(Reply::Step(Ok(answer))) => {
                    let lane = self.mesh.place(rank).lane;
                    if let Some(answer) = answer {
                        ensure!(rank == self.mesh.leader(lane), "rank {} answered for lane {lane}", rank.0);
                        lanes[lane] = Some(answer);
                    }
                }
                Ok(Reply::Step(Err(fault))) => faults.push(format!("rank {}: {fault}", rank.0)),
                Ok(Reply::Trace(_)) => faults.push(format!("rank {} answered out of turn", rank.0)),
                Err(_) => faults.push(format!("rank {} is gone", rank.0)),
            }
        }
        ensure!(faults.is_empty(), "{}", faults.join("; "));
        Ok(lanes.into_iter().map(Option::unwrap_or_default).collect())
    }

    /// Turns tracing on or off on every rank; what was recorded until now, by rank.
    pub fn trace(&mut self, on: bool) -> Result<Vec<Trace>> {
        for order in &self.orders {
            order.send(Order::Trace(on)).map_err(|_| anyhow!("a rank is gone"))?;
        }
        let mut traces = Vec::new();
        for replies in &self.replies {
            match replies.recv() {
                Ok(Reply::Trace(trace)) => traces.push(trace.unwrap_or_default()),
                _ => return Err(anyhow!("a rank answered out of turn")),
            }
        }
        Ok(traces)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.orders.clear();
        for thread in self.threads.drain(..) {
            // A rank that panicked was seen already, as one that is gone.
            let _ = thread.join();
        }
    }
}

#[allow(clippy::too_many_arguments)] // the body of a thread
fn rank_thread(
    (checkpoint, draft): (&Checkpoint, Option<&(ModelSpec, Checkpoint)>),
    shelves: &Shelves,
    spec: Arc<ModelSpec>,
    plan: &Plan,
    rank: RankId,
    (threads, communicators): (usize, Communicators),
    orders: &Receiver<Order>,
    reply: &Sender<Reply>,
    read: &AtomicU64,
) {
    let done = Cell::new(0);
    let config = ShardConfig {
        spec,
        plan,
        rank,
        checkpoint,
        draft: draft.map(|(spec, checkpoint)| DraftOf { spec, checkpoint }),
        shelves,
        communicators,
        threads,
        spin: 0,
        progress: Arc::new(AtomicU64::new(0)),
        loading: &|now, _| {
            read.fetch_add(now - done.replace(now), Ordering::Relaxed);
        },
    };
    let mut engine = match load_cpu(config) {
        Ok(engine) => engine,
        Err(fault) => {
            let _ = reply.send(Reply::Step(Err(fault.text)));
            return;
        }
    };
    let _ = reply.send(Reply::Step(Ok(None)));
    while let Ok(order) = orders.recv() {
        let answer = match order {
            Order::Step(batch) => Reply::Step(engine.step(&batch).map_err(|f| f.text)),
            Order::Trace(on) => Reply::Trace(engine.trace(on)),
        };
        let failed = matches!(answer, Reply::Step(Err(_)));
        if reply.send(answer).is_err() || failed {
            return;
        }
    }
}

/// What each rank of the mesh loads: the layers of its stage, and the bytes of its weights, a draft model's too.
pub fn loaded_bytes(path: &Path, draft: Option<&Path>, setting: Setting) -> Result<Vec<(Range<usize>, u64)>> {
    let checkpoint = Checkpoint::open(path)?;
    let draft = draft.map(opened).transpose()?;
    let spec = Arc::new(checkpoint.spec()?);
    let plan = plan(&spec, setting);
    let mut seats = communicators(&setting.mesh)?;
    let mut loaded = Vec::with_capacity(setting.mesh.ranks());
    for rank in setting.mesh.all() {
        let engine = load_cpu(ShardConfig {
            spec: spec.clone(),
            plan: &plan,
            rank,
            checkpoint: &checkpoint,
            draft: draft.as_ref().map(|(spec, checkpoint)| DraftOf { spec, checkpoint }),
            shelves: &Shelves::default(),
            communicators: seats.remove(&rank).context("a seat a rank")?,
            threads: setting.threads,
            spin: 0,
            progress: Arc::new(AtomicU64::new(0)),
            loading: &|_, _| {},
        })?;
        loaded.push((plan.stages[setting.mesh.place(rank).stage].clone(), engine.backend().weights_bytes()));
    }
    Ok(loaded)
}

/// Every rank's communicators.
fn communicators(mesh: &Mesh) -> Result<BTreeMap<RankId, Communicators>> {
    let mut seats: BTreeMap<RankId, Vec<Box<dyn Collective>>> = BTreeMap::new();
    let axes: [fn(&Mesh, RankId) -> Vec<RankId>; 3] = [Mesh::tensor_group, Mesh::lane_group, Mesh::pipe_group];
    for group in axes {
        for rank in mesh.all() {
            let ranks = group(mesh, rank);
            if ranks[0] == rank {
                for (rank, member) in ranks.iter().zip(local::members(ranks.len())?) {
                    seats.entry(*rank).or_default().push(Box::new(member));
                }
            }
        }
    }
    seats
        .into_iter()
        .map(|(rank, members)| {
            let [tensor, lane, pipe] =
                <[_; 3]>::try_from(members).map_err(|m| anyhow!("rank {} has {} seats", rank.0, m.len()))?;
            Ok((rank, Communicators { tensor, lane, pipe, devices: Devices::default() }))
        })
        .collect()
}

/// A plan for a setting; stages as equal as they come.
pub fn plan(spec: &ModelSpec, setting: Setting) -> Plan {
    let (layers, stages) = (spec.layers.len(), setting.mesh.pipeline);
    let at = |stage: usize| stage * layers / stages;
    Plan {
        epoch: Epoch(1),
        mesh: setting.mesh,
        dtype: setting.dtype,
        family: setting.family,
        stages: (0..stages).map(|s| at(s)..at(s + 1)).collect(),
        members: vec![],
        limits: setting.limits,
        guesser: setting.guesser,
    }
}
