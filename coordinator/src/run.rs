//! One coordinator: the API on the caller's runtime; scheduler, cluster and node plane on a thread of their own, whose
//! single-threaded runtime keeps a step's path free of hops between threads.

use crate::api::auth::Keys;
use crate::api::request::ModelFacts;
use crate::api::view::ClusterView;
use crate::api::{self, State};
use crate::cluster::driver::{Ask, GroupEnded, Parts, Shell, Turn};
use crate::cluster::ledger::Ledger;
use crate::cluster::service::{Door as NodeDoor, Service};
use crate::cluster::state::{Cluster, Planner, Rules};
use crate::cluster::store::any::AnyStore;
use crate::config::Config;
use crate::metrics;
use crate::plan::{self, Offer, Policy};
use crate::schedule::Settings;
use crate::schedule::driver::{Driver, Ended};
use crate::schedule::job::{Door, Submission};
use crate::source::{Source, SourceError};
use crate::text::{Text, TextError};
use model::plan::{Epoch, Plan};
use proto::cluster::v1::cluster_server::ClusterServer;
use proto::tls::Tls;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tonic::transport::ServerTlsConfig;

/// How often workers say that they live; five silent intervals are a death.
const BEAT: Duration = Duration::from_millis(300);

/// Newcomers come in crowds: the cluster grows when none came for so long.
const GROW: Duration = Duration::from_secs(1);

/// What operators ask for, on its way to the cluster.
const ASKS_MAX: usize = 16;

/// Jobs on their way from the API to the scheduler.
const SUBMISSIONS_MAX: usize = 256;

/// Notices from the wire that wait for the cluster's shell.
const NOTICES_MAX: usize = 1024;

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Text(#[from] TextError),
    #[error("{what} can't be started: {source}")]
    Io { what: &'static str, source: std::io::Error },
    #[error(transparent)]
    Plan(#[from] plan::PlanError),
    #[error("[store]: {0}")]
    Store(String),
    #[error(transparent)]
    Tls(#[from] proto::tls::TlsError),
    #[error("metrics can't be recorded: {0}")]
    Metrics(String),
    #[error("the engine's thread ended: {0}")]
    Engine(String),
}

/// A running coordinator.
pub struct Coordinator {
    view: watch::Receiver<ClusterView>,
    stop: watch::Sender<bool>,
    engine_ended: oneshot::Receiver<String>,
    api: tokio::task::JoinHandle<()>,
}

impl Coordinator {
    pub fn view(&self) -> watch::Receiver<ClusterView> {
        self.view.clone()
    }

    /// Completes only when the engine's thread ended unasked: a bug, or no memory for a thread.
    pub async fn ended(&self) -> Result<(), StartError> {
        let mut stop = self.stop.subscribe();
        let _ = stop.wait_for(|&stop| stop).await;
        Err(StartError::Engine("unasked".into()))
    }

    /// Ends API and engine; open requests get an error.
    pub async fn stop(self) {
        let _ = self.stop.send(true);
        let _ = tokio::time::timeout(Duration::from_secs(2), self.engine_ended).await;
        let _ = tokio::time::timeout(Duration::from_secs(2), self.api).await;
    }
}

/// 256 random bits as text.
pub fn random_token() -> String {
    let bytes: [u8; 32] = random_bytes();
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn random_bytes<const N: usize>() -> [u8; N] {
    use std::io::Read;
    let mut bytes = [0; N];
    let mut source = std::fs::File::open("/dev/urandom").expect("every Linux has /dev/urandom");
    source.read_exact(&mut bytes).expect("/dev/urandom never ends");
    bytes
}

/// Plans on devices that are not there yet, so that a mesh that can't be had is refused before anything is started. The
/// model that was read for it.
pub fn rehearse(config: &Config, members: &[Offer]) -> Result<Source, StartError> {
    let source = Source::open(&config.model)?;
    plan::plan(&source.spec, &source.storage, members, &policy(config), None)?;
    Ok(source)
}

/// Starts a coordinator on two bound listeners. Fails at once on a model that can't be read or cut as asked.
pub fn start(config: Config, api: TcpListener, node: TcpListener, build: String) -> Result<Coordinator, StartError> {
    let source = Arc::new(Source::open(&config.model)?);
    let text = Text::load(&source.path, config.chat_template.as_deref())?;
    let maker = PlanMaker { source: source.clone(), policy: policy(&config) };
    let store = AnyStore::open(&config.store).map_err(StartError::Store)?;
    let (view_writer, view) = watch::channel(ClusterView::default());
    let (ask, asks) = mpsc::channel(ASKS_MAX);
    let (submissions, queue) = mpsc::channel(SUBMISSIONS_MAX);
    let (stop, stopping) = watch::channel(false);
    let node = node.into_std().map_err(|source| StartError::Io { what: "the node plane", source })?;
    let node_door = NodeDoor { token: config.token.clone(), build, beat_interval: BEAT };
    let rules = Rules {
        workers: config.workers,
        settle: (config.settle_ms > 0).then(|| Duration::from_millis(config.settle_ms)),
        silence: BEAT * 5,
        retry: Duration::from_millis(500),
        grow: GROW,
    };
    let engine = Engine {
        source: source.clone(),
        maker,
        rules,
        node_door,
        node,
        store,
        queue,
        asks,
        tls: config.tls.as_ref().map(Tls::server).transpose()?,
        view: view_writer,
        config: config.clone(),
    };
    let (ended, engine_ended) = oneshot::channel();
    let (stop_of_engine, stopped) = (stopping.clone(), stop.clone());
    std::thread::Builder::new()
        .name("engine".into())
        .spawn(move || {
            let why = match engine.run(stop_of_engine) {
                Ok(()) => String::new(),
                Err(e) => e.to_string(),
            };
            if !why.is_empty() {
                tracing::error!("the engine's thread ended: {why}");
            }
            let _ = stopped.send(true);
            let _ = ended.send(why);
        })
        .map_err(|source| StartError::Io { what: "the engine's thread", source })?;
    let facts = ModelFacts::new(&config, &source, &text);
    metrics::install(&facts.names[0]).map_err(|e| StartError::Metrics(e.to_string()))?;
    let keys = Keys::new(config.api_keys.iter().map(String::as_str));
    let state = State::new(Door::new(submissions), text, facts, keys, view.clone(), config.body_bytes_max).asking(ask);
    let mut stop_of_api = stopping;
    let api = tokio::spawn(async move {
        let shutdown = async move {
            let _ = stop_of_api.wait_for(|&stop| stop).await;
        };
        api::serve(api, Arc::new(state), shutdown).await;
    });
    Ok(Coordinator { view, stop, engine_ended, api })
}

fn policy(config: &Config) -> Policy {
    Policy {
        tensor: config.tensor_parallel_size,
        data: config.data_parallel_size,
        pipeline: config.pipeline_parallel_size,
        expert: config.expert_parallel_size,
        dtype: config.dtype,
        model_len_max: config.max_model_len,
        cache_bytes: config.kv_cache_memory_bytes,
        cache_bytes_modest: config.kv_cache_modest_bytes,
        step_tokens_max: config.max_num_batched_tokens,
        step_sequences_max: config.max_num_seqs,
        ..Policy::default()
    }
}

/// The planner with what it is always given.
pub struct PlanMaker {
    source: Arc<Source>,
    policy: Policy,
}

impl Planner for PlanMaker {
    fn plan(&self, epoch: Epoch, members: &[Offer], previous: Option<&Plan>) -> Result<Plan, String> {
        let planned = plan::plan(&self.source.spec, &self.source.storage, members, &self.policy, previous);
        planned.map(|planned| Plan { epoch, ..planned.plan }).map_err(|e| e.to_string())
    }
}

/// Everything that lives on the engine's thread.
struct Engine {
    source: Arc<Source>,
    maker: PlanMaker,
    rules: Rules,
    node_door: NodeDoor,
    node: std::net::TcpListener,
    store: AnyStore,
    queue: mpsc::Receiver<Submission>,
    asks: mpsc::Receiver<Ask>,
    tls: Option<ServerTlsConfig>,
    view: watch::Sender<ClusterView>,
    config: Config,
}

impl Engine {
    fn run(self, mut stopping: watch::Receiver<bool>) -> std::io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let listener = TcpListener::from_std(self.node)?;
            let (notices, notice_queue) = mpsc::channel(NOTICES_MAX);
            let service = ClusterServer::new(Service::new(self.node_door, notices))
                .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
                .max_encoding_message_size(proto::MESSAGE_BYTES_MAX);
            let incoming = tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
            let mut builder =
                tonic::transport::Server::builder().http2_keepalive_interval(Some(Duration::from_secs(5)));
            if let Some(tls) = self.tls {
                builder = builder.tls_config(tls).map_err(std::io::Error::other)?;
            }
            let server = builder.add_service(service).serve_with_incoming(incoming);
            let (turns, turn_queue) = mpsc::channel(8);
            let (ended, ended_queue) = mpsc::channel(8);
            let before = Settings::without_plan(self.config.max_waiting);
            let (driver, load) = Driver::new(before, self.queue, Instant::now);
            let source = self.source.clone();
            let shell = Shell::new(Parts {
                ledger: Ledger::new(self.store),
                cluster: Cluster::new(self.rules, self.maker, Epoch(0)),
                notices: notice_queue,
                turns,
                ended: ended_queue,
                asks: self.asks,
                view: self.view,
                load,
                model_path: source.path.to_string_lossy().into_owned(),
                identity: source.identity.clone(),
                explain: Box::new(move |plan| plan::explain::table(&source.spec, &source.storage, plan)),
            });
            tokio::select! {
                served = server => served.map_err(std::io::Error::other)?,
                () = shell.run() => {}
                () = steps(driver, turn_queue, ended, self.config.max_waiting) => {}
                _ = stopping.wait_for(|&stop| stop) => {}
            }
            Ok(())
        })
    }
}

/// Runs the scheduler over one group after another; between groups jobs wait in its queue.
async fn steps(
    mut driver: Driver,
    mut turns: mpsc::Receiver<Turn>,
    ended: mpsc::Sender<GroupEnded>,
    waiting_max: usize,
) {
    loop {
        let turn = tokio::select! {
            turn = turns.recv() => turn,
            () = driver.hold() => return,
        };
        let (plan, mut group) = match turn {
            None => return,
            Some(Turn::Halt { .. }) => continue,
            Some(Turn::Serve { plan, group }) => (plan, group),
        };
        let mut settings = Settings::new(plan.limits, plan.mesh.data);
        settings.steps_in_flight_max = plan.mesh.pipeline;
        settings.jobs_waiting_max = waiting_max;
        driver.requeue(settings);
        let outcome = tokio::select! {
            outcome = driver.run(&mut group) => outcome,
            turn = turns.recv() => match turn {
                // Only a halt follows a serve.
                Some(Turn::Halt { died: true }) => {
                    driver.died();
                    continue;
                }
                Some(_) => continue,
                None => return,
            },
        };
        match outcome {
            Ended::Closed => return,
            Ended::Faulted(fault) => {
                driver.died();
                let _ = ended.send(GroupEnded { epoch: plan.epoch, fault }).await;
            }
        }
    }
}
