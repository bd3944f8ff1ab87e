//! The agent's shell: the control stream, the step stream, beats and the rank threads.

use super::door::{Door, SILENCE};
use super::error::AgentError;
use super::model::{Model, Models};
use super::rank::{Counters, Order, Preparation, Ranks, Report};
use super::state::{Action, Agent, Event, Phase};
use crate::collective::connect::DataPlane;
use crate::config::{Config, resident_bytes};
use crate::engine::shard::Shelves;
use crate::hardware::Hardware;
use crate::health::{self, Pulse, Stage, TURN, Turn};
use model::fault::{Fault, FaultKind};
use model::mesh::RankId;
use model::plan::{Epoch, Guesser, WorkerId};
use model::step::StepId;
use proto::cluster::v1 as wire;
use proto::cluster::v1::cluster_client::ClusterClient;
use proto::tls::guard;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio::time::Interval;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

/// Messages waiting to go up; a coordinator that reads so slowly is dead.
const OUTBOX_MAX: usize = 256;

/// How long what was said has to go out before this process ends of itself.
const LAST_WORDS: Duration = Duration::from_millis(50);

/// What this process is, told at every join.
pub struct Identity {
    pub name: WorkerId,
    pub build: String,
    pub host: String,
    pub families: Vec<model::plan::KernelFamily>,
    pub devices: Vec<wire::Device>,
    pub hardware: Hardware,
}

/// When a worker ends.
pub struct Stop<L, N> {
    /// It asks the coordinator to do without it, and serves until that is so, at most [`Config::drain_seconds`].
    pub leave: L,
    /// At once.
    pub now: N,
}

/// How a connection to the coordinator ended.
enum Ended {
    Gone,
    /// It takes no workers now, with its reason: another one may lead.
    NotHere(String),
    /// Nothing needs this worker any more.
    Drained,
}

/// Runs until it is stopped or drained, joining again whenever the coordinator's stream ends.
pub async fn run(
    config: Config,
    identity: Identity,
    stop: Stop<impl Future<Output = ()>, impl Future<Output = ()>>,
) -> Result<(), AgentError> {
    for address in config.coordinator.split(',') {
        let guarded = (config.tls.is_some(), "give this worker certificates under [tls]");
        guard("the coordinator", address.trim(), guarded, config.insecure)?;
    }
    let guarded = (config.tls.is_some(), "give this worker certificates under [tls]");
    guard("the ranks' data", &config.data_listen, guarded, config.insecure)?;
    let plane = Arc::new(DataPlane::bind(&config.data_listen, config.tls.clone())?);
    let data_address = config.data_address(plane.address())?;
    let shelves = Arc::new(Shelves::on(identity.hardware.clone()));
    let counters = Counters::default();
    let pulse = Arc::new(Pulse::new(counters.clone(), plane.refused().clone(), Instant::now()));
    if !config.health_listen.is_empty() {
        let failed = |why| AgentError::Health { address: config.health_listen.clone(), why };
        let address = health::server::start(&config.health_listen, pulse.clone()).map_err(failed)?;
        tracing::info!("health at http://{address}/readyz");
    }
    let (leave, leaving) = watch::channel(false);
    let (asked, seconds) = (stop.leave, config.drain_seconds);
    let overdue = async move {
        asked.await;
        tracing::info!("leaving: this worker serves until others can do without it, at most {seconds} s");
        let _ = leave.send(true);
        tokio::time::sleep(Duration::from_secs(seconds)).await;
    };
    let shutdown = stop.now;
    tokio::pin!(shutdown, overdue);
    let mut agent = Agent::default();
    let mut door = Door::new(&config);
    loop {
        let session = async {
            let Some(channel) = alone(&pulse, door.next()).await? else { return Ok::<Ended, AgentError>(Ended::Gone) };
            let shared = Shared {
                plane: plane.clone(),
                data_address: data_address.clone(),
                shelves: shelves.clone(),
                counters: counters.clone(),
            };
            let session = Session::new(&config, &identity, (shared, pulse.clone()), channel);
            let ended = session.run(&mut agent, leaving.clone()).await?;
            match &ended {
                Ended::NotHere(why) => door.closed(why),
                Ended::Gone | Ended::Drained => door.opened(),
            }
            Ok(ended)
        };
        let ended = tokio::select! {
            () = &mut shutdown => return Ok(()),
            () = &mut overdue => {
                tracing::warn!("this worker is still needed after {seconds} s, and ends");
                return Ok(());
            }
            ended = session => ended?,
        };
        if matches!(ended, Ended::Drained) || *leaving.borrow() {
            return Ok(());
        }
        agent.handle(Event::Disconnected);
        pulse.alone(Instant::now());
        tokio::select! {
            () = &mut shutdown => return Ok(()),
            () = &mut overdue => return Ok(()),
            () = tokio::time::sleep(door.pause()) => {}
        }
    }
}

/// What outlives a connection to a coordinator.
struct Shared {
    plane: Arc<DataPlane>,
    /// What peers dial.
    data_address: String,
    shelves: Arc<Shelves>,
    counters: Counters,
}

/// Waits for something outside of a session, turning meanwhile.
async fn alone<T>(pulse: &Pulse, what: impl Future<Output = T>) -> T {
    let mut turns = tokio::time::interval(TURN);
    tokio::pin!(what);
    loop {
        tokio::select! {
            done = &mut what => return done,
            _ = turns.tick() => pulse.alone(Instant::now()),
        }
    }
}

/// One connection to a coordinator.
struct Session<'a> {
    config: &'a Config,
    identity: &'a Identity,
    plane: Arc<DataPlane>,
    data_address: String,
    shelves: Arc<Shelves>,
    pulse: Arc<Pulse>,
    /// The coordinator has taken this worker.
    joined: bool,
    /// The last epoch whose members have all loaded.
    serving: Option<Epoch>,
    client: ClusterClient<Channel>,
    counters: Counters,
    outbox: mpsc::Sender<wire::WorkerMessage>,
    messages: Option<mpsc::Receiver<wire::WorkerMessage>>,
    reports: mpsc::Sender<Report>,
    report_queue: Option<mpsc::Receiver<Report>>,
    ranks: Option<Ranks>,
    /// Who may lend what the last order to load is of, which has this identity.
    lent: (Vec<u8>, Vec<String>),
    /// The draft model of the last order to load.
    draft: Option<Model>,
    /// Where answers of the open step stream go.
    answers: Option<mpsc::Sender<wire::StepAnswer>>,
    /// The group serves without this worker, which stands by.
    spare: bool,
    /// What [`Ranks::waiting`] last said, and since when.
    waiting: Option<(u64, Instant)>,
}

impl<'a> Session<'a> {
    fn new(
        config: &'a Config,
        identity: &'a Identity,
        (shared, pulse): (Shared, Arc<Pulse>),
        channel: Channel,
    ) -> Session<'a> {
        let Shared { plane, data_address, shelves, counters } = shared;
        let (outbox, messages) = mpsc::channel(OUTBOX_MAX);
        let (reports, report_queue) = mpsc::channel(OUTBOX_MAX);
        let client = ClusterClient::new(channel)
            .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(proto::MESSAGE_BYTES_MAX);
        Session {
            config,
            identity,
            plane,
            data_address,
            shelves,
            pulse,
            joined: false,
            serving: None,
            client,
            counters,
            outbox,
            messages: Some(messages),
            reports,
            report_queue: Some(report_queue),
            ranks: None,
            lent: (Vec::new(), Vec::new()),
            draft: None,
            answers: None,
            spare: false,
            waiting: None,
        }
    }

    fn offer(&self, agent: &Agent) -> wire::WorkerMessage {
        let families = self.identity.families.iter().map(|&f| proto::convert::family_to_wire(f).into()).collect();
        let offer = wire::Offer {
            wire_version: proto::WIRE_VERSION,
            build: self.identity.build.clone(),
            worker: self.identity.name.0.clone(),
            host: self.identity.host.clone(),
            data_address: self.data_address.clone(),
            devices: self.identity.devices.clone(),
            families,
            token: self.config.token.clone(),
            process_id: std::process::id(),
            epoch_seen: agent.seen().0,
        };
        message(wire::worker_message::Body::Offer(offer))
    }

    async fn run(mut self, agent: &mut Agent, mut leaving: watch::Receiver<bool>) -> Result<Ended, AgentError> {
        let messages = self.messages.take().expect("taken once");
        let mut reports = self.report_queue.take().expect("taken once");
        let offer = self.offer(agent);
        self.say(offer);
        let joined = tokio::time::timeout(SILENCE, self.client.join(ReceiverStream::new(messages)));
        let Ok(joined) = joined.await else {
            return Ok(Ended::NotHere(format!("it takes no worker within {} s", SILENCE.as_secs())));
        };
        let mut commands = match joined {
            Ok(response) => response.into_inner(),
            Err(status) if status.code() == tonic::Code::Unavailable => {
                return Ok(Ended::NotHere(status.message().into()));
            }
            Err(status) => return refused_or_gone(&status),
        };
        if *leaving.borrow_and_update() {
            self.say(message(wire::worker_message::Body::Leaving(wire::Leaving {})));
        }
        let mut beat = tokio::time::interval(Duration::from_millis(500));
        let mut turns = tokio::time::interval(TURN);
        let mut orders: Option<tonic::Streaming<wire::StepOrder>> = None;
        loop {
            let event = tokio::select! {
                // Steps first: they are what the cluster exists for.
                biased;
                order = next_order(&mut orders), if orders.is_some() => match self.order(agent, order) {
                    Ok(()) => continue,
                    Err(event) => { orders = None; event }
                },
                Some(report) = reports.recv() => match self.report(report) {
                    Some(event) => event,
                    None => continue,
                },
                command = commands.next() => match command {
                    Some(Ok(wire::Command { body: Some(wire::command::Body::Drained(_)) })) => {
                        tracing::info!("drained: nothing needs this worker any more");
                        return Ok(Ended::Drained);
                    }
                    Some(Ok(command)) => match self.command(command, &mut beat)? {
                        Some(event) => event,
                        None => continue,
                    },
                    Some(Err(status)) => return refused_or_gone(&status),
                    None => return Ok(Ended::Gone),
                },
                Ok(()) = leaving.changed() => {
                    self.say(message(wire::worker_message::Body::Leaving(wire::Leaving {})));
                    continue;
                }
                _ = beat.tick() => { self.beat(agent); continue }
                _ = turns.tick() => { self.turn(agent); continue }
            };
            let lost = match &event {
                Event::RankFailed { fault, .. } if fault.kind == FaultKind::DeviceLost => Some(fault.clone()),
                _ => None,
            };
            for action in agent.handle(event) {
                if let Some(stream) = self.perform(action, agent, &mut beat).await {
                    orders = Some(stream);
                }
            }
            if self.answers.is_none() {
                orders = None;
            }
            self.turn(agent);
            if let Some(fault) = lost {
                // What was said of it goes out first.
                tokio::time::sleep(LAST_WORDS).await;
                return Err(fault.into());
            }
        }
    }

    fn command(&mut self, command: wire::Command, beat: &mut Interval) -> Result<Option<Event>, AgentError> {
        use wire::command::Body;
        Ok(match command.body {
            Some(Body::Welcome(welcome)) => {
                self.joined = true;
                if let Err(fault) = self.model(&welcome.model_path, welcome.model_identity).lend(&self.plane) {
                    tracing::warn!("no weights are lent: {fault}");
                }
                *beat = tokio::time::interval(Duration::from_millis(welcome.beat_interval_ms.clamp(50, 10_000).into()));
                None
            }
            Some(Body::Load(load)) => match load.plan.map(proto::convert::plan_from_wire) {
                Some(Ok(plan)) => {
                    self.lent = (load.model_identity.clone(), load.lenders);
                    let drafted = plan.guesser == Guesser::Draft;
                    self.draft = drafted.then(|| self.model(&load.draft_path, load.draft_identity));
                    let (model_path, identity) = (load.model_path, load.model_identity);
                    Some(Event::Load { plan: Arc::new(plan), model_path, identity })
                }
                Some(Err(e)) => return Err(Fault::new(FaultKind::Incompatible, e.to_string()).into()),
                None => None,
            },
            Some(Body::Prepare(load)) => match load.plan.map(proto::convert::plan_from_wire) {
                Some(Ok(plan)) => {
                    self.lent = (load.model_identity, load.lenders);
                    Some(Event::Prepare { plan: Arc::new(plan), model_path: load.model_path })
                }
                Some(Err(e)) => return Err(Fault::new(FaultKind::Incompatible, e.to_string()).into()),
                None => None,
            },
            Some(Body::Release(release)) => Some(Event::Release { epoch: Epoch(release.epoch) }),
            Some(Body::Serving(serving)) => {
                self.serving = Some(Epoch(serving.epoch));
                None
            }
            Some(Body::StandBy(told)) => {
                self.spare = told.serves;
                None
            }
            Some(Body::Refused(fault)) => return Err(AgentError::Refused(fault.text)),
            // Ends the session before it comes here.
            Some(Body::Drained(_)) | None => None,
        })
    }

    /// The model that the coordinator keeps at `path`.
    fn model(&self, path: &str, identity: Vec<u8>) -> Model {
        Model { path: self.config.model(path), identity, token: self.config.token.clone(), lenders: Vec::new() }
    }

    /// The same of the last order to load, with who may lend it.
    fn lent_model(&self, path: &str) -> Model {
        let (identity, lenders) = self.lent.clone();
        Model { lenders, ..self.model(path, identity) }
    }

    fn report(&mut self, report: Report) -> Option<Event> {
        match report {
            Report::Loaded { epoch, identity, proof } => {
                return Some(Event::RanksLoaded { epoch, identity, proof });
            }
            Report::Prepared { epoch } => {
                self.say(message(wire::worker_message::Body::Prepared(wire::Prepared { epoch: epoch.0 })));
            }
            Report::Answer { epoch, step, lane, result } => {
                let lanes = vec![proto::step::result_to_wire(lane, result)];
                self.answer(wire::StepAnswer { epoch: epoch.0, step: step.0, lanes, ..Default::default() });
            }
            Report::Failed { epoch, fault } => {
                // Ranks that were stopped say that they were aborted.
                if self.ranks.as_ref().is_some_and(|ranks| ranks.epoch() == epoch) {
                    tracing::error!("epoch {}: {fault}", epoch.0);
                }
                let wire_fault = Some(proto::fault::to_wire(&fault, epoch));
                self.answer(wire::StepAnswer { epoch: epoch.0, fault: wire_fault, ..Default::default() });
                return Some(Event::RankFailed { epoch, fault });
            }
        }
        None
    }

    fn order(&mut self, agent: &Agent, order: Option<Result<wire::StepOrder, tonic::Status>>) -> Result<(), Event> {
        let Some(ranks) = &self.ranks else { return Ok(()) };
        let epoch = ranks.epoch();
        let Some(Ok(order)) = order else { return Err(Event::StepsClosed { epoch }) };
        if !agent.runs(Epoch(order.epoch)) {
            return Ok(()); // of another epoch: dropped
        }
        let lanes = Arc::new(order.lanes.into_iter().map(proto::step::lane_from_wire).collect());
        ranks.order(Order { step: StepId(order.step), lanes }).map_err(|fault| Event::RankFailed { epoch, fault })
    }

    /// Does what the core decided; a newly opened step stream is returned.
    async fn perform(
        &mut self,
        action: Action,
        agent: &Agent,
        beat: &mut Interval,
    ) -> Option<tonic::Streaming<wire::StepOrder>> {
        use wire::worker_message::Body;
        match action {
            Action::StartRanks { plan, model_path } => {
                let models = Models { model: self.lent_model(&model_path), draft: self.draft.clone() };
                let (model, me) = (&models.model, self.identity.name.clone());
                tracing::info!("loading epoch {} of {}: {}", plan.epoch.0, model.path.display(), plan.mesh);
                let (plane, reports) = (self.plane.clone(), self.reports.clone());
                self.ranks =
                    Some(Ranks::start(plan, me, models, (plane, self.shelves.clone()), &self.counters, reports));
            }
            Action::Prepare { plan, model_path } => {
                let model = self.lent_model(&model_path);
                tracing::info!("preparing epoch {} of {}: {}", plan.epoch.0, model.path.display(), plan.mesh);
                let offered: u64 = self.identity.devices.iter().map(|device| device.memory_bytes).sum();
                let room = offered.saturating_sub(resident_bytes());
                let (me, shelves, plane) = (self.identity.name.clone(), self.shelves.clone(), self.plane.clone());
                Preparation { plan, me, model, plane, shelves, room }.start(self.reports.clone());
            }
            Action::StopRanks { epoch } => {
                self.answers = None;
                if let Some(ranks) = self.ranks.take_if(|r| r.epoch() == epoch) {
                    // A rank that reads weights ends when it has read them, and a worker that is silent meanwhile is
                    // taken for dead.
                    let joined = tokio::task::spawn_blocking(move || drop(ranks));
                    self.beating(agent, beat, joined).await.expect("dropping ranks does not panic");
                }
            }
            Action::SayLoaded { epoch, identity, proof } => {
                let resident_bytes = resident_bytes();
                self.say(message(Body::Loaded(wire::Loaded {
                    epoch: epoch.0,
                    model_identity: identity,
                    resident_bytes,
                    digests: proof,
                })));
            }
            Action::SayFailed { epoch, fault } => self.say(message(Body::Failed(proto::fault::to_wire(&fault, epoch)))),
            Action::OpenSteps { epoch } => return self.open_steps(epoch, agent, beat).await,
        }
        None
    }

    async fn open_steps(
        &mut self,
        epoch: Epoch,
        agent: &Agent,
        beat: &mut Interval,
    ) -> Option<tonic::Streaming<wire::StepOrder>> {
        let (answers, queue) = mpsc::channel(OUTBOX_MAX);
        let hello = wire::StepAnswer {
            epoch: epoch.0,
            worker: self.identity.name.0.clone(),
            token: self.config.token.clone(),
            ..Default::default()
        };
        answers.try_send(hello).expect("the channel is empty");
        let mut client = self.client.clone();
        let opened = client.steps(ReceiverStream::new(queue));
        match self.beating(agent, beat, opened).await {
            Ok(response) => {
                self.answers = Some(answers);
                Some(response.into_inner())
            }
            Err(status) => {
                let text = format!("the step stream of epoch {} was refused: {}", epoch.0, status.message());
                tracing::warn!("{text}");
                // Whoever waits for it must not wait for ever.
                let _ = self.reports.try_send(Report::Failed { epoch, fault: Fault::new(FaultKind::RankLost, text) });
                None
            }
        }
    }

    /// Tells the pulse how things stand.
    fn turn(&mut self, agent: &Agent) {
        self.watch_waiting();
        let stage = match agent.phase() {
            Phase::Idle => Stage::Idle,
            Phase::Loading { .. } => Stage::Loading,
            Phase::Ready { .. } => Stage::Ready,
        };
        let turn = Turn {
            joined: self.joined,
            stage,
            epoch: agent.epoch().map_or(0, |epoch| epoch.0),
            serving: self.answers.is_some() && agent.epoch() == self.serving,
            spare: self.spare && stage == Stage::Idle,
            pending: self.ranks.as_ref().map(|ranks| ranks.pending().clone()),
        };
        self.pulse.turn(turn, Instant::now());
    }

    /// Notes since when nothing moves between ranks that wait for each other.
    fn watch_waiting(&mut self) {
        let now = self.ranks.as_ref().and_then(Ranks::waiting);
        let before = self.waiting.take();
        self.waiting = now.map(|mark| before.filter(|(seen, _)| *seen == mark).unwrap_or((mark, Instant::now())));
    }

    /// Waits for something; beats go on meanwhile, nothing else does.
    async fn beating<T>(&mut self, agent: &Agent, beat: &mut Interval, done: impl Future<Output = T>) -> T {
        tokio::pin!(done);
        loop {
            tokio::select! {
                done = &mut done => return done,
                _ = beat.tick() => {
                    self.beat(agent);
                    self.turn(agent);
                }
            }
        }
    }

    fn beat(&mut self, agent: &Agent) {
        use wire::worker_message::Body;
        self.watch_waiting();
        let (phase, epoch) = match agent.phase() {
            Phase::Idle => (wire::Phase::Idle, Epoch(0)),
            Phase::Loading { epoch, .. } => (wire::Phase::Loading, *epoch),
            Phase::Ready { epoch } => (wire::Phase::Ready, *epoch),
        };
        let beat = wire::Beat {
            epoch: epoch.0,
            phase: phase.into(),
            progress: self.counters.progress.load(Ordering::Relaxed),
            steps_pending: self.ranks.as_ref().map_or(0, Ranks::steps_pending),
            resident_bytes: resident_bytes(),
            tolls: self.ranks.iter().flat_map(Ranks::tolls).map(toll).collect(),
            waiting_ms: self.waiting.map_or(0, |(_, since)| since.elapsed().as_millis() as u64),
        };
        self.say(message(Body::Beat(beat)));
        if phase == wire::Phase::Loading {
            let loading = wire::Loading {
                epoch: epoch.0,
                bytes_done: self.counters.bytes_done.load(Ordering::Relaxed),
                bytes_total: self.counters.bytes_total.load(Ordering::Relaxed),
            };
            self.say(message(Body::Loading(loading)));
        }
    }

    fn say(&self, message: wire::WorkerMessage) {
        // A full outbox means a coordinator that does not read; its stream ends by keep-alive.
        let _ = self.outbox.try_send(message);
    }

    fn answer(&self, answer: wire::StepAnswer) {
        if let Some(answers) = &self.answers {
            let _ = answers.try_send(answer);
        }
    }
}

fn message(body: wire::worker_message::Body) -> wire::WorkerMessage {
    wire::WorkerMessage { body: Some(body) }
}

async fn next_order(
    orders: &mut Option<tonic::Streaming<wire::StepOrder>>,
) -> Option<Result<wire::StepOrder, tonic::Status>> {
    match orders {
        Some(stream) => stream.next().await,
        None => None,
    }
}

fn toll((rank, entered, computing_ns): (RankId, u64, u64)) -> wire::Toll {
    wire::Toll { rank: rank.0, entered, computing_ns }
}

/// A coordinator that says no ends the worker; one that is gone is waited for.
fn refused_or_gone(status: &tonic::Status) -> Result<Ended, AgentError> {
    use tonic::Code::{FailedPrecondition, InvalidArgument, Unauthenticated};
    match status.code() {
        FailedPrecondition | InvalidArgument | Unauthenticated => Err(AgentError::Refused(status.message().into())),
        _ => {
            tracing::warn!("the coordinator's stream ended: {}", status.message());
            Ok(Ended::Gone)
        }
    }
}
