//! The device threads of one epoch: each rank is one OS thread that connects, loads its shard and runs steps in order.

use crate::collective::connect::DataPlane;
use crate::engine::shard::{LoadShard, Shard, load_shard};
use model::fault::{Fault, FaultKind};
use model::mesh::RankId;
use model::plan::{Epoch, Plan, WorkerId};
use model::step::{LaneBatch, LaneResult, StepBatch, StepId};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc as channel;
use std::thread::JoinHandle;
use tokio::sync::mpsc;

/// Steps waiting for a rank; the coordinator keeps far fewer in flight.
const ORDERS_MAX: usize = 64;

/// What the threads tell the agent.
#[derive(Debug)]
pub enum Report {
    /// All ranks have loaded.
    Loaded { epoch: Epoch },
    Answer { epoch: Epoch, step: StepId, lane: usize, result: LaneResult },
    Failed { epoch: Epoch, fault: Fault },
}

/// What loading and stepping count, read by beats.
#[derive(Debug, Default)]
pub struct Counters {
    /// Moves at every layer of every rank.
    pub progress: Arc<AtomicU64>,
    pub bytes_done: Arc<AtomicU64>,
    pub bytes_total: Arc<AtomicU64>,
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
    orders: Vec<channel::SyncSender<Order>>,
    threads: Vec<JoinHandle<()>>,
    plane: Arc<DataPlane>,
}

/// What every rank of an epoch needs.
#[derive(Clone)]
struct Setting {
    plan: Arc<Plan>,
    me: WorkerId,
    model: PathBuf,
    plane: Arc<DataPlane>,
    progress: Arc<AtomicU64>,
    bytes_done: Arc<AtomicU64>,
    bytes_total: Arc<AtomicU64>,
    reports: mpsc::Sender<Report>,
}

impl Ranks {
    /// Starts loading; `reports` gets one `Loaded`, or `Failed`, then answers.
    pub fn start(
        plan: Arc<Plan>, me: WorkerId, model: PathBuf, plane: Arc<DataPlane>, counters: &Counters,
        reports: mpsc::Sender<Report>,
    ) -> Ranks {
        let epoch = plan.epoch;
        let mine: Vec<RankId> =
            plan.members.iter().filter(|m| m.worker == me).flat_map(|m| m.ranks.iter().copied()).collect();
        counters.bytes_done.store(0, Ordering::Relaxed);
        counters.bytes_total.store(0, Ordering::Relaxed);
        let setting = Setting {
            plan,
            me,
            model,
            plane: plane.clone(),
            progress: counters.progress.clone(),
            bytes_done: counters.bytes_done.clone(),
            bytes_total: counters.bytes_total.clone(),
            reports,
        };
        let (senders, receivers): (Vec<_>, Vec<_>) =
            mine.iter().map(|_| channel::sync_channel::<Order>(ORDERS_MAX)).unzip();
        let seats = mine.into_iter().zip(receivers).collect();
        // One thread connects for all, since communicators are formed by whole processes; then each rank goes its way.
        let starter = std::thread::Builder::new().name("ranks".into()).spawn(move || start(setting, seats));
        Ranks { epoch, orders: senders, threads: starter.into_iter().collect(), plane }
    }

    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Queues a step for every rank.
    pub fn order(&self, order: Order) -> Result<(), Fault> {
        for sender in &self.orders {
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
        self.plane.abort(self.epoch);
        for thread in self.threads.drain(..) {
            // A rank's panic was caught and reported; nothing is left to learn from the join.
            let _ = thread.join();
        }
    }
}

/// Connects, then runs each rank on a thread of its own, and waits for all.
fn start(setting: Setting, seats: Vec<(RankId, channel::Receiver<Order>)>) {
    let epoch = setting.plan.epoch;
    let fail = |fault: Fault| {
        // The agent may be gone already, as when the process ends.
        let _ = setting.reports.blocking_send(Report::Failed { epoch, fault });
    };
    let mut communicators = match setting.plane.connect(&setting.plan, &setting.me) {
        Ok(all) => all,
        Err(fault) => return fail(fault),
    };
    let (loaded, all_loaded) = channel::channel::<()>();
    let count = seats.len();
    std::thread::scope(|scope| {
        for (rank, orders) in seats {
            let Some(mine) = communicators.remove(&rank) else {
                return fail(Fault::new(FaultKind::Internal, format!("rank {} has no communicators", rank.0)));
            };
            let (setting, loaded) = (setting.clone(), loaded.clone());
            let run = move || {
                let outcome = catch_unwind(AssertUnwindSafe(|| run_rank(&setting, rank, mine, orders, loaded)));
                let fault = match outcome {
                    Ok(Ok(())) => return,
                    Ok(Err(fault)) => fault,
                    Err(panic) => Fault::new(FaultKind::Internal, format!("rank {} panicked: {}", rank.0, text_of(&panic))),
                };
                // Peers of this worker and of others must not wait for this rank.
                setting.plane.abort(epoch);
                let _ = setting.reports.blocking_send(Report::Failed { epoch, fault });
            };
            if let Err(e) = std::thread::Builder::new().name(format!("rank-{}", rank.0)).spawn_scoped(scope, run) {
                return fail(Fault::new(FaultKind::Internal, format!("no thread for rank {}: {e}", rank.0)));
            }
        }
        drop(loaded);
        if (0..count).all(|_| all_loaded.recv().is_ok()) {
            let _ = setting.reports.blocking_send(Report::Loaded { epoch });
        }
    });
}

fn run_rank(
    setting: &Setting, rank: RankId, communicators: crate::collective::connect::Communicators,
    orders: channel::Receiver<Order>, loaded: channel::Sender<()>,
) -> Result<(), Fault> {
    let mut shard = load_shard(LoadShard {
        model: &setting.model,
        plan: &setting.plan,
        rank,
        communicators,
        progress: setting.progress.clone(),
        bytes_done: setting.bytes_done.clone(),
        bytes_total: setting.bytes_total.clone(),
    })?;
    let _ = loaded.send(());
    drop(loaded);
    let lane = setting.plan.mesh.place(rank).lane;
    while let Ok(order) = orders.recv() {
        let mut batch = StepBatch { lanes: vec![LaneBatch::default(); setting.plan.mesh.data] };
        for (index, part) in order.lanes.iter() {
            if let Some(slot) = batch.lanes.get_mut(*index) {
                slot.clone_from(part);
            }
        }
        if let Some(result) = step(shard.as_mut(), &batch)? {
            let answer = Report::Answer { epoch: setting.plan.epoch, step: order.step, lane, result };
            if setting.reports.blocking_send(answer).is_err() {
                break;
            }
        }
    }
    Ok(())
}

fn step(shard: &mut dyn Shard, batch: &StepBatch) -> Result<Option<LaneResult>, Fault> {
    shard.step(batch)
}

fn text_of(panic: &Box<dyn std::any::Any + Send>) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string())).unwrap_or_else(|| "no message".into())
}

/// The ranks that each worker of a plan holds, for logs.
pub fn held(plan: &Plan) -> BTreeMap<&WorkerId, &[RankId]> {
    plan.members.iter().map(|m| (&m.worker, m.ranks.as_slice())).collect()
}
