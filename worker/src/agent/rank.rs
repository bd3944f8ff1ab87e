//! The device threads of one epoch: each rank is one OS thread that connects, loads its shard and runs steps in order.

use super::devices;
use super::model::{Model, Models};
use crate::collective::connect::{Communicators, DataPlane, Options};
use crate::collective::timed::{Stopwatch, Timed};
use crate::engine::shard::{DraftOf, Shard, ShardConfig, Shelves, load_shard};
use crate::load::checkpoint::Checkpoint;
use model::fault::{Fault, FaultKind};
use model::mesh::RankId;
use model::plan::{Epoch, Guesser, Plan, WorkerId};
use model::spec::ModelSpec;
use model::step::{LaneBatch, LaneResult, SeqId, StepBatch, StepId};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc as channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Steps waiting for a rank; the coordinator keeps far fewer in flight.
const ORDERS_MAX: usize = 64;

/// Rounds that a rank's idle threads wait awake: a few dozen microseconds, longer than the gaps inside a step.
const SPIN: u32 = 20_000;

/// What the threads tell the agent.
#[derive(Debug)]
pub enum Report {
    /// All ranks have loaded.
    Loaded {
        epoch: Epoch,
        identity: Vec<u8>,
        /// Of their weights, see [`model::proof`].
        proof: Vec<u8>,
    },
    /// What a plan to come needs is at hand, as far as there was room.
    Prepared {
        epoch: Epoch,
    },
    Answer {
        epoch: Epoch,
        step: StepId,
        lane: usize,
        result: LaneResult,
    },
    Failed {
        epoch: Epoch,
        fault: Fault,
    },
}

/// What loading and stepping count, read by beats.
#[derive(Debug, Clone, Default)]
pub struct Counters {
    /// Moves at every layer of every rank.
    pub progress: Arc<AtomicU64>,
    pub bytes_done: Arc<AtomicU64>,
    pub bytes_total: Arc<AtomicU64>,
    pub gaps: Arc<Gaps>,
}

/// How long ranks waited between two steps of which the second went on with what the first had drawn for: time in which somebody
/// waited for a token and nobody computed it.
#[derive(Debug, Default)]
pub struct Gaps {
    count: AtomicU64,
    nanoseconds: AtomicU64,
}

impl Gaps {
    fn add(&self, gap: Duration) {
        self.count.fetch_add(1, Ordering::Relaxed);
        self.nanoseconds.fetch_add(gap.as_nanos() as u64, Ordering::Relaxed);
    }

    pub fn read(&self) -> (u64, Duration) {
        (self.count.load(Ordering::Relaxed), Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed)))
    }
}

/// A step as a worker receives it: the lanes its ranks serve.
#[derive(Debug, Clone)]
pub struct Order {
    pub step: StepId,
    pub lanes: Arc<Vec<(usize, LaneBatch)>>,
}

/// The threads of one epoch. Dropping it aborts their collectives and waits for them.
pub struct Ranks {
    epoch: Epoch,
    watches: BTreeMap<RankId, Arc<Stopwatch>>,
    orders: Vec<channel::SyncSender<Order>>,
    pending: Arc<AtomicU32>,
    threads: Vec<JoinHandle<()>>,
    plane: Arc<DataPlane>,
}

/// What every rank of an epoch needs.
#[derive(Clone)]
struct Setting {
    plan: Arc<Plan>,
    me: WorkerId,
    models: Models,
    shelves: Arc<Shelves>,
    plane: Arc<DataPlane>,
    watches: BTreeMap<RankId, Arc<Stopwatch>>,
    progress: Arc<AtomicU64>,
    /// Steps that ranks have been given and have not finished, each rank's counted.
    pending: Arc<AtomicU32>,
    bytes_done: Arc<AtomicU64>,
    bytes_total: Arc<AtomicU64>,
    gaps: Arc<Gaps>,
    reports: mpsc::Sender<Report>,
}

impl Ranks {
    /// Starts loading; `reports` gets one `Loaded`, or `Failed`, then answers.
    pub fn start(
        plan: Arc<Plan>,
        me: WorkerId,
        models: Models,
        (plane, shelves): (Arc<DataPlane>, Arc<Shelves>),
        counters: &Counters,
        reports: mpsc::Sender<Report>,
    ) -> Ranks {
        let epoch = plan.epoch;
        let mine: Vec<RankId> =
            plan.members.iter().filter(|m| m.worker == me).flat_map(|m| m.ranks.iter().copied()).collect();
        counters.bytes_done.store(0, Ordering::Relaxed);
        counters.bytes_total.store(0, Ordering::Relaxed);
        let pending = Arc::new(AtomicU32::new(0));
        let watches: BTreeMap<RankId, Arc<Stopwatch>> = mine.iter().map(|rank| (*rank, Arc::default())).collect();
        let setting = Setting {
            plan,
            me,
            models,
            shelves,
            plane: plane.clone(),
            watches: watches.clone(),
            progress: counters.progress.clone(),
            pending: pending.clone(),
            bytes_done: counters.bytes_done.clone(),
            bytes_total: counters.bytes_total.clone(),
            gaps: counters.gaps.clone(),
            reports,
        };
        let (senders, receivers): (Vec<_>, Vec<_>) =
            mine.iter().map(|_| channel::sync_channel::<Order>(ORDERS_MAX)).unzip();
        let seats = mine.into_iter().zip(receivers).collect();
        // One thread connects for all, since communicators are formed by whole processes; then each rank goes its way.
        let starter = std::thread::Builder::new().name("ranks".into()).spawn(move || start(setting, seats));
        Ranks { epoch, watches, orders: senders, pending, threads: starter.into_iter().collect(), plane }
    }

    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Steps that some rank has not finished, each rank's counted.
    pub fn steps_pending(&self) -> u32 {
        self.pending.load(Ordering::Relaxed)
    }

    /// The same, to be read by others while the ranks live.
    pub fn pending(&self) -> &Arc<AtomicU32> {
        &self.pending
    }

    /// For each rank, how many collectives of its tensor group it entered and how many nanoseconds it computed before them.
    pub fn tolls(&self) -> impl Iterator<Item = (RankId, u64, u64)> {
        self.watches.iter().map(|(rank, watch)| {
            let (entered, computing_ns) = watch.read();
            (*rank, entered, computing_ns)
        })
    }

    /// While every rank that has a step is within a collective: a number that moves when any of them does, or any byte between
    /// ranks. None while one computes, or all rest.
    pub fn waiting(&self) -> Option<u64> {
        if self.watches.values().any(|watch| watch.computes()) {
            return None;
        }
        let waits = self.watches.values().filter_map(|watch| watch.waits()).reduce(|sum, more| sum + more)?;
        Some(waits + self.plane.flow())
    }

    /// Queues a step for every rank.
    pub fn order(&self, order: Order) -> Result<(), Fault> {
        for sender in &self.orders {
            self.pending.fetch_add(1, Ordering::Relaxed);
            sender.try_send(order.clone()).map_err(|e| {
                let why = match e {
                    channel::TrySendError::Full(_) => format!("{ORDERS_MAX} steps already wait"),
                    channel::TrySendError::Disconnected(_) => "a rank's thread has ended".to_string(),
                };
                Fault::new(FaultKind::RankLost, why)
            })?;
        }
        Ok(())
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        self.orders.clear();
        self.plane.abort_all(self.epoch);
        for thread in self.threads.drain(..) {
            // A rank's panic was caught and reported; nothing is left to learn from the join.
            let _ = thread.join();
        }
    }
}

/// What a worker does before a plan is its own.
pub struct Preparation {
    pub plan: Arc<Plan>,
    pub me: WorkerId,
    pub model: Model,
    pub plane: Arc<DataPlane>,
    pub shelves: Arc<Shelves>,
    /// Bytes that it may take beside what is in use.
    pub room: u64,
}

impl Preparation {
    /// Loads on a thread of its own; `reports` gets one `Prepared`, whatever comes of it: the plan is what must load.
    pub fn start(self, reports: mpsc::Sender<Report>) {
        let epoch = self.plan.epoch;
        let run = move || {
            if let Err(fault) = self.run() {
                tracing::warn!("epoch {} could not be prepared: {fault}", epoch.0);
            }
            // The agent may be gone already.
            let _ = reports.blocking_send(Report::Prepared { epoch });
        };
        if let Err(e) = std::thread::Builder::new().name("prepare".into()).spawn(run) {
            tracing::error!("no thread to prepare epoch {}: {e}", epoch.0);
        }
    }

    fn run(&self) -> Result<(), Fault> {
        let checkpoint = self.model.open(&self.plane, self.plan.epoch)?;
        let spec = checkpoint.spec()?.predicting(self.plan.guesser.predictors());
        let spec = spec.map_err(|e| Fault::new(FaultKind::Incompatible, e.to_string()))?;
        let Some(member) = self.plan.members.iter().find(|m| m.worker == self.me) else { return Ok(()) };
        let lacking = self.shelves.lacking(&checkpoint.identity(), &spec, &self.plan, &member.ranks);
        if lacking > self.room {
            let (mib, room) = (lacking >> 20, self.room >> 20);
            tracing::info!("epoch {} is not prepared: up to {mib} MiB to load, {room} MiB left", self.plan.epoch.0);
            return Ok(());
        }
        for rank in &member.ranks {
            self.shelves.prepare((&spec, &checkpoint), &self.plan, *rank, member.threads.max(1))?;
        }
        Ok(())
    }
}

/// What the ranks of one worker share once the checkpoint is open.
struct Opened<'a> {
    setting: &'a Setting,
    spec: Arc<ModelSpec>,
    checkpoint: &'a Checkpoint,
    draft: Option<&'a (ModelSpec, Checkpoint)>,
    threads: usize,
    spin: u32,
}

/// Opens the checkpoint, connects, runs each rank on a thread of its own, and waits for all.
fn start(setting: Setting, seats: Vec<(RankId, channel::Receiver<Order>)>) {
    let epoch = setting.plan.epoch;
    if let Err(fault) = run_ranks(&setting, seats) {
        // Peers of this worker and of others must not wait for its ranks. The agent may be gone already, as when the
        // process ends.
        setting.plane.abort_all(epoch);
        let _ = setting.reports.blocking_send(Report::Failed { epoch, fault });
    }
}

fn run_ranks(setting: &Setting, seats: Vec<(RankId, channel::Receiver<Order>)>) -> Result<(), Fault> {
    // A checkpoint that can't be read is the better message than peers that wait for us.
    let checkpoint = setting.models.model.open(&setting.plane, setting.plan.epoch)?;
    let spec = Arc::new(checkpoint.spec()?);
    let ranks: Vec<RankId> = seats.iter().map(|(rank, _)| *rank).collect();
    let predicting = spec.predicting(setting.plan.guesser.predictors());
    let predicting = predicting.map_err(|e| Fault::new(FaultKind::Incompatible, e.to_string()))?;
    setting.shelves.keep(&checkpoint.identity(), &predicting, &setting.plan, &ranks);
    let draft = draft(setting, &ranks)?;
    setting.shelves.keep_draft(&setting.plan, draft.as_ref().map(of_draft));
    let connected = setting.plane.connect(&setting.plan, &setting.me, &Options::default())?;
    let (threads, spin) = threads_and_spin(&setting.plan, &setting.me);
    let opened = &Opened { setting, spec, checkpoint: &checkpoint, draft: draft.as_ref(), threads, spin };
    let (loaded, all_loaded) = channel::channel::<()>();
    let count = seats.len();
    std::thread::scope(|scope| {
        for ((rank, communicators), (seat, orders)) in connected.into_iter().zip(seats) {
            assert_eq!(rank, seat, "both follow the plan's order");
            let loaded = loaded.clone();
            let run = move || guard(opened, rank, communicators, orders, loaded);
            std::thread::Builder::new()
                .name(format!("rank-{}", rank.0))
                .spawn_scoped(scope, run)
                .map_err(|e| Fault::new(FaultKind::Internal, format!("no thread for rank {}: {e}", rank.0)))?;
        }
        drop(loaded);
        if (0..count).all(|_| all_loaded.recv().is_ok()) {
            let proof = setting.shelves.proof(&predicting, &setting.plan, &ranks)?;
            let loaded = Report::Loaded { epoch: setting.plan.epoch, identity: checkpoint.identity(), proof };
            // The agent may be gone already.
            let _ = setting.reports.blocking_send(loaded);
        }
        Ok(())
    })
}

/// The draft model, where one of `ranks` runs it. It changes no answer, so nothing of it is proven but that it is the one that was
/// planned with.
fn draft(setting: &Setting, ranks: &[RankId]) -> Result<Option<(ModelSpec, Checkpoint)>, Fault> {
    let mesh = &setting.plan.mesh;
    let runs = ranks.iter().any(|rank| mesh.place(*rank).stage + 1 == mesh.pipeline);
    let Some(model) = setting.models.draft.as_ref().filter(|_| runs && setting.plan.guesser == Guesser::Draft) else {
        return Ok(None);
    };
    let checkpoint = model.open(&setting.plane, setting.plan.epoch)?;
    if checkpoint.identity() != model.identity {
        let text = "this worker's files of the draft model differ from the coordinator's";
        return Err(Fault::new(FaultKind::Incompatible, text));
    }
    let spec = checkpoint.spec()?.predicting(0).expect("every model does without predictors");
    Ok(Some((spec, checkpoint)))
}

fn of_draft((spec, checkpoint): &(ModelSpec, Checkpoint)) -> DraftOf<'_> {
    DraftOf { spec, checkpoint }
}

/// Threads of each rank, and how long they wait awake: only where the host has a core for every one.
fn threads_and_spin(plan: &Plan, me: &WorkerId) -> (usize, u32) {
    let Some(member) = plan.members.iter().find(|m| m.worker == *me) else { return (1, 0) };
    let on_host: usize =
        plan.members.iter().filter(|m| m.host == member.host).map(|m| m.ranks.len() * m.threads.max(1)).sum();
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    (member.threads.max(1), if on_host <= cores { SPIN } else { 0 })
}

/// Runs a rank; its fault or panic is reported, and its peers are woken.
fn guard(
    opened: &Opened<'_>,
    rank: RankId,
    communicators: Communicators,
    orders: channel::Receiver<Order>,
    loaded: channel::Sender<()>,
) {
    let outcome = catch_unwind(AssertUnwindSafe(|| run_rank(opened, rank, communicators, orders, loaded)));
    let fault = match outcome {
        Ok(Ok(())) => return,
        Ok(Err(fault)) => fault,
        Err(panic) => Fault::new(FaultKind::Internal, format!("rank {} panicked: {}", rank.0, text_of(&panic))),
    };
    let epoch = opened.setting.plan.epoch;
    opened.setting.plane.abort_all(epoch);
    let _ = opened.setting.reports.blocking_send(Report::Failed { epoch, fault });
}

fn run_rank(
    opened: &Opened<'_>,
    rank: RankId,
    mut communicators: Communicators,
    orders: channel::Receiver<Order>,
    loaded: channel::Sender<()>,
) -> Result<(), Fault> {
    let setting = opened.setting;
    // Ranks count into common totals: each adds what it has not added yet.
    let counted = Cell::new((0, 0));
    let loading = |done: u64, total: u64| {
        let (done_before, total_before) = counted.replace((done, total));
        setting.bytes_done.fetch_add(done - done_before, Ordering::Relaxed);
        setting.bytes_total.fetch_add(total - total_before, Ordering::Relaxed);
    };
    let watch = setting.watches[&rank].clone();
    if let Some(device) = setting.shelves.device() {
        let remember = |handle: &_| setting.plane.remember(setting.plan.epoch, handle);
        devices::connect(device, &mut communicators, &watch, &remember)?;
    }
    let Communicators { tensor, lane, pipe, devices } = communicators;
    let communicators = Communicators {
        // Where devices sum by themselves, their queue tells the time before it.
        tensor: match devices.tensor.is_some() {
            true => Box::new(Timed::passing(tensor, watch.clone())),
            false => Box::new(Timed::counting(tensor, watch.clone())),
        },
        lane: Box::new(Timed::passing(lane, watch.clone())),
        pipe: Box::new(Timed::passing(pipe, watch.clone())),
        devices,
    };
    let mut shard = load_shard(ShardConfig {
        spec: opened.spec.clone(),
        plan: &setting.plan,
        rank,
        checkpoint: opened.checkpoint,
        draft: opened.draft.map(of_draft),
        shelves: &setting.shelves,
        communicators,
        threads: opened.threads,
        spin: opened.spin,
        progress: setting.progress.clone(),
        loading: &loading,
    })?;
    let _ = loaded.send(());
    drop(loaded);
    serve_orders(setting, (rank, &watch), shard.as_mut(), &orders)
}

/// Steps until the agent lets go of the orders' other end.
fn serve_orders(
    setting: &Setting,
    (rank, watch): (RankId, &Stopwatch),
    shard: &mut dyn Shard,
    orders: &channel::Receiver<Order>,
) -> Result<(), Fault> {
    let lane = setting.plan.mesh.place(rank).lane;
    let mut last: Option<(Instant, SeqId)> = None;
    while let Ok(order) = orders.recv() {
        let mut batch = StepBatch { lanes: vec![LaneBatch::default(); setting.plan.mesh.data] };
        for (index, part) in order.lanes.iter() {
            if let Some(slot) = batch.lanes.get_mut(*index) {
                slot.clone_from(part);
            }
        }
        let chunks = &batch.lanes[lane].chunks;
        if let Some((ended, seq)) = last
            && chunks.iter().any(|chunk| chunk.seq == seq)
        {
            setting.gaps.add(ended.elapsed());
        }
        watch.begin();
        let result = shard.step(&batch)?;
        watch.rest();
        last = chunks.iter().find(|chunk| chunk.sample).map(|chunk| (Instant::now(), chunk.seq));
        setting.pending.fetch_sub(1, Ordering::Relaxed);
        if let Some(result) = result {
            let answer = Report::Answer { epoch: setting.plan.epoch, step: order.step, lane, result };
            if setting.reports.blocking_send(answer).is_err() {
                break;
            }
        }
    }
    Ok(())
}

fn text_of(panic: &Box<dyn std::any::Any + Send>) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string())).unwrap_or_else(|| "no message".into())
}
