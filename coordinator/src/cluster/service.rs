//! The node plane's gRPC service: lets workers in, turns their messages into [`Notice`]s for the driver.

use super::event::Beat;
use super::pace::Toll;
use super::role::Role;
use super::stranger::Stranger;
use crate::group::{Answer, ORDERS_MAX, StepStream};
use crate::plan::{Device, Offer};
use model::fault::Fault;
use model::mesh::RankId;
use model::plan::{Epoch, WorkerId};
use proto::cluster::v1 as wire;
use proto::cluster::v1::worker_message::Body;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

/// A stranger must introduce itself within this time.
const INTRODUCTION: Duration = Duration::from_secs(5);

/// Commands waiting for a worker that does not read: far above what an epoch needs.
const COMMANDS_MAX: usize = 64;

/// Far above what a cluster ever plans: nobody may push it to where epochs end.
const EPOCH_MAX: Epoch = Epoch(1 << 48);

/// What the driver learns from the wire.
pub enum Notice {
    Joined {
        connection: u64,
        offer: Offer,
        /// The highest epoch that it was asked to load, under whichever leader.
        seen: Epoch,
        commands: mpsc::Sender<Result<wire::Command, Status>>,
    },
    Said {
        connection: u64,
        worker: WorkerId,
        message: Said,
    },
    /// The worker is no member of this group any more.
    Moved {
        worker: WorkerId,
        why: String,
    },
    Gone {
        connection: u64,
        worker: WorkerId,
        why: String,
    },
    /// A loaded worker opened its step stream; the driver answers with where to send what comes up.
    StepsOpened {
        worker: WorkerId,
        epoch: Epoch,
        stream: StepStream,
        accept: tokio::sync::oneshot::Sender<mpsc::Sender<Answer>>,
    },
}

/// A worker's message, understood.
#[derive(Debug)]
pub enum Said {
    Beat(Beat),
    Loading { epoch: Epoch, bytes_done: u64, bytes_total: u64 },
    Loaded { epoch: Epoch, identity: Vec<u8>, digests: Vec<u8> },
    Failed { epoch: Epoch, fault: Fault },
    Leaving,
    Prepared { epoch: Epoch },
}

/// The door's rules.
pub struct Door {
    pub token: String,
    pub build: String,
    pub beat_interval: Duration,
    /// Where workers find the model, and what proves that they read the same.
    pub model_path: String,
    pub identity: Vec<u8>,
}

pub struct Service {
    door: Arc<Door>,
    role: watch::Receiver<Role>,
    connections: AtomicU64,
}

impl Service {
    pub fn new(door: Door, role: watch::Receiver<Role>) -> Service {
        Service { door: Arc::new(door), role, connections: AtomicU64::new(0) }
    }

    /// Where workers' words go, if this coordinator leads.
    fn notices(&self) -> Result<mpsc::Sender<Notice>, Status> {
        match &*self.role.borrow() {
            Role::Leads(lead) => Ok(lead.notices.clone()),
            Role::Follows { address } => Err(Status::unavailable(format!("the coordinator at {address} leads"))),
            Role::Unknown(why) => Err(Status::unavailable(format!("no coordinator leads: {why}"))),
        }
    }

    fn admit(&self, offer: wire::Offer, from: Option<SocketAddr>) -> Result<Offer, Status> {
        if !same_secret(&offer.token, &self.door.token) {
            return Err(refuse(Stranger::Token, from, WRONG_TOKEN.into()));
        }
        if offer.wire_version != proto::WIRE_VERSION {
            let (theirs, ours) = (offer.wire_version, proto::WIRE_VERSION);
            let why = format!("wire version {theirs}, the coordinator speaks {ours}");
            return Err(refuse(Stranger::Wire, from, why));
        }
        if offer.build != self.door.build {
            let (theirs, ours) = (&offer.build, &self.door.build);
            return Err(refuse(Stranger::Build, from, format!("build {theirs}, the coordinator's is {ours}")));
        }
        let bad = |e: proto::WireError| Status::invalid_argument(e.to_string());
        let families: Result<Vec<_>, _> = offer.families().map(proto::convert::family_from_wire).collect();
        if offer.worker.is_empty() || offer.worker.len() > 256 || offer.devices.is_empty() {
            return Err(Status::invalid_argument("an offer needs a name and a device"));
        }
        Ok(Offer {
            families: families.map_err(bad)?,
            worker: WorkerId(offer.worker),
            host: offer.host,
            data_address: offer.data_address,
            devices: offer
                .devices
                .iter()
                .map(|d| Device { memory_bytes: d.memory_bytes, threads: d.threads as usize })
                .collect(),
        })
    }
}

pub const WRONG_TOKEN: &str = "the cluster's token does not match";

/// Counts a stranger and says so, here and to itself.
pub fn refuse(stranger: Stranger, from: Option<SocketAddr>, why: String) -> Status {
    stranger.refused(from.map_or("somebody".into(), |from| from.to_string()), &why);
    match stranger {
        Stranger::Token => Status::unauthenticated(why),
        _ => Status::failed_precondition(why),
    }
}

/// Compares without telling by its time where the difference is.
pub fn same_secret(a: &str, b: &str) -> bool {
    a.len() == b.len() && a.bytes().zip(b.bytes()).fold(0, |acc, (x, y)| acc | (x ^ y)) == 0
}

pub type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl wire::cluster_server::Cluster for Service {
    type JoinStream = Answers<wire::Command>;
    type StepsStream = Answers<wire::StepOrder>;

    async fn join(
        &self,
        request: Request<Streaming<wire::WorkerMessage>>,
    ) -> Result<Response<Self::JoinStream>, Status> {
        let from = request.remote_addr();
        let mut messages = request.into_inner();
        let Some(Body::Offer(offer)) = first(&mut messages).await?.body else {
            return Err(Status::invalid_argument("the first message must be an offer"));
        };
        let seen = Epoch(offer.epoch_seen);
        if seen > EPOCH_MAX {
            let text = format!("epoch {} was never planned: {} are the most", seen.0, EPOCH_MAX.0);
            return Err(Status::invalid_argument(text));
        }
        let offer = self.admit(offer, from)?;
        let notices = self.notices()?;
        let (worker, connection) = (offer.worker.clone(), self.connections.fetch_add(1, Ordering::Relaxed));
        let (commands, receiver) = mpsc::channel(COMMANDS_MAX);
        let welcome = wire::Welcome {
            beat_interval_ms: self.door.beat_interval.as_millis() as u32,
            model_path: self.door.model_path.clone(),
            model_identity: self.door.identity.clone(),
        };
        let welcome = wire::Command { body: Some(wire::command::Body::Welcome(welcome)) };
        commands.try_send(Ok(welcome)).expect("the channel is empty");
        let stopped = |_| Status::unavailable("the coordinator is stopping");
        notices.send(Notice::Joined { connection, offer, seen, commands }).await.map_err(stopped)?;
        tokio::spawn(async move {
            let why = loop {
                let message = match messages.next().await {
                    None => break "the worker closed its stream".to_string(),
                    Some(Err(status)) => break status.message().to_string(),
                    Some(Ok(message)) => message,
                };
                let Some(message) = understand(message) else { continue };
                if notices.send(Notice::Said { connection, worker: worker.clone(), message }).await.is_err() {
                    return;
                }
            };
            // The driver is gone only when the coordinator stops.
            let _ = notices.send(Notice::Gone { connection, worker, why }).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn steps(
        &self,
        request: Request<Streaming<wire::StepAnswer>>,
    ) -> Result<Response<Self::StepsStream>, Status> {
        let from = request.remote_addr();
        let mut messages = request.into_inner();
        let hello = first(&mut messages).await?;
        if !same_secret(&hello.token, &self.door.token) {
            return Err(refuse(Stranger::Token, from, WRONG_TOKEN.into()));
        }
        let (worker, epoch) = (WorkerId(hello.worker), Epoch(hello.epoch));
        let (orders, receiver) = mpsc::channel(ORDERS_MAX);
        let (accept, accepted) = tokio::sync::oneshot::channel();
        let notice = Notice::StepsOpened { worker: worker.clone(), epoch, stream: StepStream { orders }, accept };
        let stopped = Status::unavailable("the coordinator is stopping");
        self.notices()?.send(notice).await.map_err(|_| stopped)?;
        let stale = Status::failed_precondition(format!("epoch {} is not being loaded by {}", epoch.0, worker.0));
        let answers = accepted.await.map_err(|_| stale)?;
        tokio::spawn(async move {
            let why = loop {
                let answer = match messages.next().await {
                    None => break "end of stream".to_string(),
                    Some(Err(status)) => break status.message().to_string(),
                    Some(Ok(answer)) => answer,
                };
                if answers.send(Answer::Step { worker: worker.clone(), answer }).await.is_err() {
                    return;
                }
            };
            let _ = answers.send(Answer::Closed { worker, why }).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// A stream's first message, which must come soon.
pub async fn first<T>(messages: &mut Streaming<T>) -> Result<T, Status> {
    let message = tokio::time::timeout(INTRODUCTION, messages.next()).await;
    let message = message.map_err(|_| Status::deadline_exceeded("no introduction within 5 s"))?;
    message.ok_or_else(|| Status::invalid_argument("the stream ended before its first message"))?
}

fn toll(toll: wire::Toll) -> (RankId, Toll) {
    let computing = Duration::from_nanos(toll.computing_ns);
    (RankId(toll.rank), Toll { entered: toll.entered, computing })
}

fn understand(message: wire::WorkerMessage) -> Option<Said> {
    Some(match message.body? {
        Body::Offer(_) => return None,
        Body::Beat(b) => Said::Beat(Beat {
            epoch: Epoch(b.epoch),
            progress: b.progress,
            steps_pending: b.steps_pending,
            resident_bytes: b.resident_bytes,
            tolls: b.tolls.into_iter().map(toll).collect(),
            waiting: Duration::from_millis(b.waiting_ms),
        }),
        Body::Loading(l) => {
            Said::Loading { epoch: Epoch(l.epoch), bytes_done: l.bytes_done, bytes_total: l.bytes_total }
        }
        Body::Loaded(l) => Said::Loaded { epoch: Epoch(l.epoch), identity: l.model_identity, digests: l.digests },
        Body::Failed(f) => Said::Failed { epoch: Epoch(f.epoch), fault: proto::fault::from_wire(f) },
        Body::Leaving(_) => Said::Leaving,
        Body::Prepared(p) => Said::Prepared { epoch: Epoch(p.epoch) },
    })
}
