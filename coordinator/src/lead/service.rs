//! What a coordinator answers to the others.

use super::campaign::Deposed;
use super::peer::{Introduction, job_from_wire, output_to_wire, refusal_to_wire};
use crate::api::view::ClusterView;
use crate::cluster::driver::Ask;
use crate::cluster::role::{Lead, Role};
use crate::cluster::service::{Answers, WRONG_TOKEN, first, refuse, same_secret};
use crate::cluster::store::Revision;
use crate::cluster::stranger::Stranger;
use crate::schedule::job::{OUTPUTS_BUFFERED, Outputs};
use proto::cluster::v1 as wire;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// How often the view is shown though nothing changed: it carries the age of the last progress.
const SHOW: Duration = Duration::from_millis(300);

/// The most choices that a request may have, far above what the API takes.
const CHOICES_MAX: u32 = 1024;

pub struct PeerService {
    pub introduction: Introduction,
    pub role: watch::Receiver<Role>,
    pub view: watch::Receiver<ClusterView>,
    pub deposed: mpsc::Sender<Deposed>,
}

impl PeerService {
    fn admit(&self, hello: Option<wire::PeerHello>, from: Option<SocketAddr>) -> Result<(), Status> {
        let hello = hello.ok_or_else(|| Status::invalid_argument("no introduction"))?;
        let own = &self.introduction;
        if !same_secret(&hello.token, &own.token) {
            return Err(refuse(Stranger::Token, from, WRONG_TOKEN.into()));
        }
        if hello.wire_version != proto::WIRE_VERSION || hello.build != own.build {
            let text = format!("build {} of wire version {}", hello.build, hello.wire_version);
            return Err(refuse(Stranger::Build, from, format!("{text}, the leader's is {}", own.build)));
        }
        if hello.model_identity != own.identity {
            return Err(refuse(Stranger::Model, from, "its model files differ from the leader's".into()));
        }
        Ok(())
    }

    fn lead(&self) -> Result<Lead, Status> {
        match &*self.role.borrow() {
            Role::Leads(lead) => Ok(lead.clone()),
            Role::Follows { .. } | Role::Unknown(_) => Err(Status::unavailable("this coordinator does not lead")),
        }
    }
}

#[tonic::async_trait]
impl wire::peer_server::Peer for PeerService {
    type CarryStream = Answers<wire::JobAnswer>;
    type WatchStream = Answers<wire::View>;

    async fn carry(
        &self,
        request: Request<Streaming<wire::JobMessage>>,
    ) -> Result<Response<Self::CarryStream>, Status> {
        let from = request.remote_addr();
        let mut messages = request.into_inner();
        let Some(wire::job_message::Body::Job(mut job)) = first(&mut messages).await?.body else {
            return Err(Status::invalid_argument("the first message must be a job"));
        };
        self.admit(job.hello.take(), from)?;
        if job.choices > CHOICES_MAX {
            return Err(Status::invalid_argument(format!("{} choices, {CHOICES_MAX} are allowed", job.choices)));
        }
        let lead = self.lead()?;
        let job = job_from_wire(job);
        let (answers, receiver) = mpsc::channel(OUTPUTS_BUFFERED * job.choices.max(1) as usize);
        match lead.door.submit(job).await {
            Ok(outputs) => {
                let accepted = wire::job_answer::Body::Accepted(wire::Accepted {});
                let accepted = wire::JobAnswer { body: Some(accepted) };
                answers.try_send(Ok(accepted)).expect("the channel is empty");
                tokio::spawn(pass(outputs, messages, answers));
            }
            Err(refusal) => {
                let refused = wire::job_answer::Body::Refused(refusal_to_wire(refusal));
                answers.try_send(Ok(wire::JobAnswer { body: Some(refused) })).expect("the channel is empty");
            }
        }
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn watch(&self, request: Request<wire::PeerHello>) -> Result<Response<Self::WatchStream>, Status> {
        let from = request.remote_addr();
        self.admit(Some(request.into_inner()), from)?;
        let (mut view, mut role) = (self.view.clone(), self.role.clone());
        // What the role was when this receiver was made is no change.
        role.mark_unchanged();
        self.lead()?;
        let (views, receiver) = mpsc::channel(4);
        tokio::spawn(async move {
            loop {
                let now = view.borrow_and_update().clone();
                let progress_age_ms = now.progress.map(|at| at.elapsed().as_millis() as u64);
                let json = serde_json::to_vec(&now).expect("a view is plain data");
                if views.send(Ok(wire::View { json, progress_age_ms })).await.is_err() {
                    return;
                }
                tokio::select! {
                    changed = view.changed() => if changed.is_err() { return },
                    _ = role.changed() => return,
                    () = tokio::time::sleep(SHOW) => {}
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn drain(&self, request: Request<wire::DrainRequest>) -> Result<Response<wire::DrainAnswer>, Status> {
        let from = request.remote_addr();
        let wire::DrainRequest { hello, worker } = request.into_inner();
        self.admit(hello, from)?;
        let (answer, answered) = oneshot::channel();
        let stopping = || Status::unavailable("this coordinator does not lead any more");
        self.lead()?.asks.send(Ask::Drain { worker, answer }).await.map_err(|_| stopping())?;
        let refused = answered.await.map_err(|_| stopping())?.err().unwrap_or_default();
        Ok(Response::new(wire::DrainAnswer { refused }))
    }

    async fn lead(&self, request: Request<wire::Leading>) -> Result<Response<wire::Yielded>, Status> {
        let from = request.remote_addr();
        let wire::Leading { hello, address, term } = request.into_inner();
        self.admit(hello, from)?;
        // One that is told twice has heard it.
        let _ = self.deposed.try_send((address, Revision(term)));
        Ok(Response::new(wire::Yielded {}))
    }
}

/// A job's outputs to the coordinator that holds its client; its end, or a peer that does not read, cancels the job.
async fn pass(
    mut outputs: Outputs,
    mut messages: Streaming<wire::JobMessage>,
    answers: mpsc::Sender<Result<wire::JobAnswer, Status>>,
) {
    loop {
        tokio::select! {
            output = outputs.recv() => {
                let Some(output) = output else { return };
                if answers.try_send(Ok(output_to_wire(output))).is_err() {
                    return;
                }
            }
            message = messages.next() => match message {
                Some(Ok(wire::JobMessage { body: Some(wire::job_message::Body::Enough(choice)) })) => {
                    outputs.enough(choice);
                }
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return,
            },
            () = answers.closed() => return,
        }
    }
}
