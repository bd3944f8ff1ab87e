//! One coordinator: the API on the caller's runtime; scheduler, cluster and node plane on a thread of their own, whose
//! single-threaded runtime keeps a step's path free of hops between threads.

use crate::api::keyfile::KeyFileError;
use crate::api::keys::Keys;
use crate::api::request::ModelFacts;
use crate::api::view::{ClusterView, Phase};
use crate::api::{self, State};
use crate::cluster::driver::Ask;
use crate::cluster::incoming;
use crate::cluster::role::{Lead, Role};
use crate::cluster::service::{Door as NodeDoor, Service};
use crate::cluster::state::{Planner, Rules};
use crate::cluster::store::Revision;
use crate::cluster::store::any::AnyStore;
use crate::config::Config;
use crate::draft::{Draft, DraftError};
use crate::fleet::shell::{Common, Inbound};
use crate::lead::campaign::{Campaign, Standing, Wish};
use crate::lead::follow::{Follower, pass_asks};
use crate::lead::peer::Introduction;
use crate::lead::relay::{Route, carry_all};
use crate::lead::service::PeerService;
use crate::metrics;
use crate::plan::{self, Offer, Policy};
use crate::schedule::job::{Door, Submission};
use crate::source::{Source, SourceError};
use crate::text::{Text, TextError};
use model::plan::{Epoch, Plan};
use model::proof::{Digest, SegmentId};
use model::spec::ModelSpec;
use proto::address::bracketed;
use proto::cluster::v1::cluster_server::ClusterServer;
use proto::cluster::v1::peer_server::PeerServer;
use proto::tls::Renewed;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_rustls::rustls::ServerConfig;
use tokio_stream::wrappers::ReceiverStream;

/// How often workers say that they live; five silent intervals are a death.
pub const BEAT: Duration = Duration::from_millis(250);

/// Newcomers come in crowds: the cluster grows when none came for so long.
pub const GROW: Duration = Duration::from_secs(1);

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
    Draft(#[from] DraftError),
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
    #[error("api_keys_file: {0}")]
    Keys(#[from] KeyFileError),
    #[error("metrics can't be recorded: {0}")]
    Metrics(String),
    #[error("the engine's thread ended: {0}")]
    Engine(String),
}

/// A running coordinator.
pub struct Coordinator {
    view: watch::Receiver<ClusterView>,
    /// Ends everything.
    stop: watch::Sender<bool>,
    /// Lets the API finish what is under way.
    close: watch::Sender<bool>,
    /// Lets another coordinator lead, and the election's task where there is one.
    wish: watch::Sender<Wish>,
    campaign: Option<tokio::task::JoinHandle<()>>,
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

    /// Ends API and engine. Nothing new is taken; what is open may end within `patience`, under another coordinator that
    /// leads, if there is one. What is open still gets an error.
    pub async fn stop(mut self, patience: Duration) {
        let _ = self.wish.send(Wish::Resign);
        let _ = self.close.send(true);
        let ended = tokio::time::timeout(patience, &mut self.api).await.is_ok();
        let _ = self.stop.send(true);
        let _ = tokio::time::timeout(Duration::from_secs(2), self.engine_ended).await;
        if !ended {
            let _ = tokio::time::timeout(Duration::from_secs(2), self.api).await;
        }
        let _ = self.wish.send(Wish::End);
        if let Some(campaign) = self.campaign {
            let _ = tokio::time::timeout(Duration::from_secs(1), campaign).await;
        }
    }
}

/// 256 random bits as text.
pub fn random_token() -> String {
    let bytes: [u8; 32] = random_bytes();
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// From the operating system: nobody can guess them.
pub fn random_bytes<const N: usize>() -> [u8; N] {
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
    let draft = draft(config, &source)?;
    plan::plan(&source.spec, &source.storage, members, &policy(config, &source.spec, draft.as_ref()), None)?;
    Ok(source)
}

/// The draft model that is asked for.
fn draft(config: &Config, source: &Source) -> Result<Option<Draft>, DraftError> {
    let Some(path) = &config.draft_model else { return Ok(None) };
    if config.num_speculative_tokens == 0 {
        return Err(DraftError::NoTokens);
    }
    Draft::open(path, source).map(Some)
}

/// Starts a coordinator on two bound listeners. Fails at once on a model that can't be read or cut as asked.
pub fn start(config: Config, api: TcpListener, node: TcpListener, build: String) -> Result<Coordinator, StartError> {
    let source = Arc::new(Source::open(&config.model)?);
    let text = Text::load(&source.path, config.chat_template.as_deref())?;
    let draft = draft(&config, &source)?;
    if let Some(draft) = &draft {
        draft.check_tokens(&text.tokenizer)?;
        let heads = source.spec.predictors.len();
        if heads > 0 {
            tracing::info!("{} drafts: the model's {heads} prediction heads are left out", draft.path.display());
        }
    }
    let configured = config.api_keys.iter().map(String::as_str);
    let keys = match &config.api_keys_file {
        Some(file) => Keys::with_file(configured, file)?,
        None => Keys::new(configured),
    };
    let list = source.list_of_digests()?;
    let maker = PlanMaker { source: source.clone(), policy: policy(&config, &source.spec, draft.as_ref()) };
    let store = Arc::new(AnyStore::open(&config.store).map_err(StartError::Store)?);
    let no_node_plane = |source| StartError::Io { what: "the node plane", source };
    let address = match &config.node_advertise {
        Some(address) => bracketed(address.trim()).into_owned(),
        None => node.local_addr().map_err(no_node_plane)?.to_string(),
    };
    let (view_writer, view) = watch::channel(ClusterView::default());
    let (ask, asks) = mpsc::channel(ASKS_MAX);
    let (submissions, queue) = mpsc::channel(SUBMISSIONS_MAX);
    let (stop, stopping) = watch::channel(false);
    let (close, closing) = watch::channel(false);
    let (wish, wished) = watch::channel(Wish::Lead);
    let mut elects = None;
    let node = node.into_std().map_err(no_node_plane)?;
    let introduction =
        Introduction { token: config.token.clone(), build: build.clone(), identity: source.identity.clone() };
    let rules = Rules {
        workers: config.workers,
        settle: (config.settle_ms > 0).then(|| Duration::from_millis(config.settle_ms)),
        silence: BEAT * 5,
        retry: Duration::from_millis(500),
        grow: GROW,
    };
    let (role, roles) = watch::channel(Role::Unknown("starting".into()));
    let (deposed, told) = mpsc::channel(1);
    let door = Door::new(submissions);
    let carried = store.is_shared() || config.groups > 1;
    let (routes, route) = watch::channel(Route::Nowhere);
    let queues = match carried {
        true => {
            tokio::spawn(carry_all(queue, route.clone(), view.clone(), config.max_waiting));
            tokio::spawn(pass_asks(asks, route));
            None
        }
        // Of one group that nobody else can lead, requests go straight to it.
        false => Some((queue, asks)),
    };
    let (standing, routes) = match store.is_shared() {
        // Who is alone leads.
        false => (watch::channel(Standing::Leads(None)).1, Some(routes)),
        true => {
            let (campaign, standing) = Campaign::new(store.clone(), address.clone(), random_token(), build.clone());
            elects = Some(tokio::spawn(campaign.run(told, wished)));
            let follower = Follower {
                introduction: introduction.clone(),
                tls: config.tls.clone(),
                address: address.clone(),
                role: roles.clone(),
                standing: standing.clone(),
                routes,
                view: view_writer.clone(),
            };
            tokio::spawn(follower.run());
            (standing, None)
        }
    };
    let engine = Engine {
        source: source.clone(),
        draft,
        maker,
        rules,
        node_door: Some(NodeDoor {
            token: config.token.clone(),
            build,
            beat_interval: BEAT,
            model_path: source.path.to_string_lossy().into_owned(),
            identity: source.identity.clone(),
        }),
        peers: Some(PeerService { introduction, role: roles, view: view.clone(), deposed }),
        node: Some(node),
        address,
        store,
        standing,
        role,
        routes,
        list,
        door: door.clone(),
        ask: ask.clone(),
        queues,
        tls: config.tls.as_ref().map(|tls| Renewed::node_plane(tls, Instant::now())).transpose()?,
        view: view_writer,
        config: config.clone(),
    };
    let (ended, engine_ended) = oneshot::channel();
    let (stop_of_engine, stopped, closed) = (stopping, stop.clone(), close.clone());
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
            let _ = closed.send(true);
            let _ = ended.send(why);
        })
        .map_err(|source| StartError::Io { what: "the engine's thread", source })?;
    let facts = ModelFacts::new(&config, &source, &text);
    metrics::install(&facts.names[0]).map_err(|e| StartError::Metrics(e.to_string()))?;
    let state = State::new(door, text, facts, keys, view.clone(), config.body_bytes_max).asking(ask);
    let mut closing = closing;
    let api = tokio::spawn(async move {
        let shutdown = async move {
            let _ = closing.wait_for(|&close| close).await;
        };
        api::serve(api, Arc::new(state), shutdown).await;
    });
    Ok(Coordinator { view, stop, close, wish, campaign: elects, engine_ended, api })
}

fn policy(config: &Config, spec: &ModelSpec, draft: Option<&Draft>) -> Policy {
    Policy {
        // Without guesses to make they would only take memory.
        predictors: if config.num_speculative_tokens > 0 { spec.predictors.len() } else { 0 },
        draft: draft.map(|draft| draft.model.clone()),
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
    }
}

/// The planner with what it is always given.
#[derive(Clone)]
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
    draft: Option<Draft>,
    maker: PlanMaker,
    rules: Rules,
    node_door: Option<NodeDoor>,
    peers: Option<PeerService>,
    node: Option<std::net::TcpListener>,
    /// Where others reach the node plane.
    address: String,
    store: Arc<AnyStore>,
    standing: watch::Receiver<Standing>,
    role: watch::Sender<Role>,
    /// Of one that nobody else can lead in place of: where its requests go.
    routes: Option<watch::Sender<Route>>,
    /// The model's own digests, if there is a list of them.
    list: Option<BTreeMap<SegmentId, Digest>>,
    /// Of one that is alone: where requests and operators' wishes come in, and where they come out.
    door: Door,
    ask: mpsc::Sender<Ask>,
    queues: Option<(mpsc::Receiver<Submission>, mpsc::Receiver<Ask>)>,
    tls: Option<Renewed<Arc<ServerConfig>>>,
    view: watch::Sender<ClusterView>,
    config: Config,
}

impl Engine {
    fn run(mut self, mut stopping: watch::Receiver<bool>) -> std::io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let listener = TcpListener::from_std(self.node.take().expect("run once"))?;
            let door = self.node_door.take().expect("run once");
            let service = ClusterServer::new(Service::new(door, self.role.subscribe()))
                .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
                .max_encoding_message_size(proto::MESSAGE_BYTES_MAX);
            let peers = self.peers.take().filter(|_| self.store.is_shared()).map(|peers| {
                PeerServer::new(peers)
                    .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
                    .max_encoding_message_size(proto::MESSAGE_BYTES_MAX)
            });
            let mut builder =
                tonic::transport::Server::builder().http2_keepalive_interval(Some(Duration::from_secs(5)));
            let (router, tls) = (builder.add_service(service).add_optional_service(peers), self.tls.take());
            let server = async {
                let Some(tls) = tls else {
                    let incoming = tonic::transport::server::TcpIncoming::from(listener);
                    return router.serve_with_incoming(incoming.with_nodelay(Some(true))).await;
                };
                let (guest, guests) = mpsc::channel(incoming::GUESTS_MAX);
                tokio::select! {
                    served = router.serve_with_incoming(ReceiverStream::new(guests)) => served,
                    () = incoming::accept(listener, tls, guest) => Ok(()),
                }
            };
            tokio::select! {
                served = server => served.map_err(std::io::Error::other)?,
                () = self.live() => {}
                _ = stopping.wait_for(|&stop| stop) => {}
            }
            Ok(())
        })
    }

    /// Leads whenever it is this coordinator's turn.
    async fn live(mut self) {
        loop {
            let standing = self.standing.borrow_and_update().clone();
            let changed = match standing {
                Standing::Leads(term) => self.lead(term).await,
                Standing::Follows { address, .. } => {
                    self.role.send_replace(Role::Follows { address });
                    self.standing.changed().await.is_ok()
                }
                Standing::Unknown(why) => {
                    self.role.send_replace(Role::Unknown(why));
                    self.standing.changed().await.is_ok()
                }
            };
            if !changed {
                return;
            }
        }
    }

    /// Leads until another does; false when there is nothing left to lead.
    async fn lead(&mut self, term: Option<Revision>) -> bool {
        let (notices, notice_queue) = mpsc::channel(NOTICES_MAX);
        let (door, ask, (queue, asks)) = match self.queues.take() {
            Some(queues) => (self.door.clone(), self.ask.clone(), queues),
            None => {
                let (submissions, queue) = mpsc::channel(SUBMISSIONS_MAX);
                let (ask, asks) = mpsc::channel(ASKS_MAX);
                (Door::new(submissions), ask, (queue, asks))
            }
        };
        let (fence, fences) = watch::channel(term);
        let common = Common {
            groups: self.config.groups,
            rules: self.rules.clone(),
            planner: self.maker.clone(),
            store: self.store.clone(),
            fences,
            // What the one before served goes on: requests wait for it.
            served: matches!(self.view.borrow().phase, Phase::Serving | Phase::Recovering),
            waiting_max: self.config.max_waiting,
            drafts_max: self.config.num_speculative_tokens,
            // Guesses are checked against what was drawn, so a step of them waits for the one before.
            steps_ahead: usize::from(self.config.async_scheduling && self.config.num_speculative_tokens == 0),
            source: self.source.clone(),
            draft: self.draft.clone(),
            list: self.list.clone(),
        };
        let inbound = Inbound { notices: notice_queue, submissions: queue, asks };
        if term.is_some() {
            let leader = self.address.clone();
            self.view.send_modify(|view| (view.leader, view.stands_by) = (leader, false));
        }
        let lead = Lead { notices, door, asks: ask };
        if let Some(routes) = &self.routes {
            routes.send_replace(Route::Here(lead.clone()));
        }
        self.role.send_replace(Role::Leads(lead));
        tokio::select! {
            () = crate::fleet::shell::run(common, inbound, self.view.clone()) => false,
            changed = deposed(&mut self.standing, &fence) => changed,
        }
    }
}

/// Waits until this coordinator leads no more. A lead that was lost and taken again unseen goes on.
async fn deposed(standing: &mut watch::Receiver<Standing>, fence: &watch::Sender<Option<Revision>>) -> bool {
    loop {
        if standing.changed().await.is_err() {
            // Nobody else can lead.
            return std::future::pending().await;
        }
        match &*standing.borrow_and_update() {
            Standing::Leads(term) => drop(fence.send_replace(*term)),
            Standing::Follows { .. } | Standing::Unknown(_) => return true,
        }
    }
}
