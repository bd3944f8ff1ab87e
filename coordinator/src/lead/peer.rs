//! Another coordinator, over gRPC; and jobs on the wire.

use crate::api::view::ClusterView;
use crate::cluster::store::Revision;
use crate::schedule::Turn;
use crate::schedule::job::{Begun, DoneReason, Job, OUTPUTS_BUFFERED, Output, Outputs, Refusal};
use model::step::Sampling;
use proto::cluster::v1 as wire;
use proto::cluster::v1::peer_client::PeerClient;
use proto::step::{sampling_from_wire, sampling_to_wire, score_from_wire, score_to_wire};
use proto::tls::{Tls, TlsError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

/// How long a peer may take to take a request, or to answer a call.
const ANSWER: Duration = Duration::from_secs(5);

/// A peer that does not answer pings for so long is gone.
const SILENCE: Duration = Duration::from_secs(2);

/// The peer is not there, or leads no more: try again, perhaps elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lost;

/// What a coordinator shows of itself.
#[derive(Debug, Clone)]
pub struct Introduction {
    pub token: String,
    pub build: String,
    pub identity: Vec<u8>,
}

impl Introduction {
    fn hello(&self) -> wire::PeerHello {
        wire::PeerHello {
            token: self.token.clone(),
            wire_version: proto::WIRE_VERSION,
            build: self.build.clone(),
            model_identity: self.identity.clone(),
        }
    }
}

/// A coordinator that leads; cheap to clone.
#[derive(Clone)]
pub struct Peer {
    client: PeerClient<Channel>,
    hello: wire::PeerHello,
}

impl Peer {
    /// Connects when first needed. To be called on the runtime that will use it.
    pub fn new(address: &str, introduction: &Introduction, tls: Option<&Tls>) -> Result<Peer, TlsError> {
        let scheme = if tls.is_some() { "https" } else { "http" };
        let unusable = |why: String| TlsError::Address { address: address.into(), why };
        let mut endpoint = Endpoint::from_shared(format!("{scheme}://{address}"))
            .map_err(|e| unusable(e.to_string()))?
            .tcp_nodelay(true)
            .connect_timeout(SILENCE)
            .keep_alive_while_idle(true)
            .http2_keep_alive_interval(Duration::from_secs(1))
            .keep_alive_timeout(SILENCE);
        if let Some(tls) = tls {
            endpoint = endpoint.tls_config(tls.client()?).map_err(|e| unusable(e.to_string()))?;
        }
        let client = PeerClient::new(endpoint.connect_lazy())
            .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(proto::MESSAGE_BYTES_MAX);
        Ok(Peer { client, hello: introduction.hello() })
    }

    /// Enters a request with the leader; its outputs end early when the leader is lost.
    pub async fn carry(&self, job: Job) -> Result<Result<Outputs, Refusal>, Lost> {
        let choices = job.choices.max(1) as usize;
        let (up, messages) = mpsc::channel(choices + 1);
        let first = wire::JobMessage { body: Some(wire::job_message::Body::Job(job_to_wire(job, self.hello.clone()))) };
        up.try_send(first).map_err(|_| Lost)?;
        let mut client = self.client.clone();
        let response = tokio::time::timeout(ANSWER, client.carry(ReceiverStream::new(messages))).await;
        let mut answers = response.map_err(|_| Lost)?.map_err(|status| refused(&status))?.into_inner();
        let first = tokio::time::timeout(ANSWER, answers.next()).await.map_err(|_| Lost)?;
        match first.ok_or(Lost)?.map_err(|status| refused(&status))?.body.ok_or(Lost)? {
            wire::job_answer::Body::Accepted(_) => {}
            wire::job_answer::Body::Refused(refusal) => return Ok(Err(refusal_from_wire(refusal))),
            _ => return Err(Lost),
        }
        let (outputs, receiver) = mpsc::channel(OUTPUTS_BUFFERED * choices);
        let (enough, mut ended) = mpsc::channel(choices);
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    answer = answers.next() => {
                        let Some(Ok(answer)) = answer else { return };
                        let Some(output) = answer.body.and_then(output_from_wire) else { continue };
                        if outputs.try_send(output).is_err() {
                            return;
                        }
                    }
                    Some(choice) = ended.recv() => {
                        let body = Some(wire::job_message::Body::Enough(choice));
                        // There is room for each choice.
                        let _ = up.try_send(wire::JobMessage { body });
                    }
                    () = outputs.closed() => return,
                }
            }
        });
        Ok(Ok(Outputs::new(receiver, enough)))
    }

    /// Shows the leader's view until the leader is lost, with what was in the way.
    pub async fn mirror(&self, view: &watch::Sender<ClusterView>) -> String {
        let mut client = self.client.clone();
        let mut views = match client.watch(self.hello.clone()).await {
            Ok(response) => response.into_inner(),
            Err(status) => return status.message().to_string(),
        };
        loop {
            let seen = match tokio::time::timeout(SILENCE, views.next()).await {
                Err(_) => return format!("it said nothing for {} s", SILENCE.as_secs()),
                Ok(None) => return "it ended".into(),
                Ok(Some(Err(status))) => return status.message().to_string(),
                Ok(Some(Ok(seen))) => seen,
            };
            let Ok(mut now) = serde_json::from_slice::<ClusterView>(&seen.json) else {
                return "it shows the cluster in words of another version".into();
            };
            let age = seen.progress_age_ms.map(Duration::from_millis);
            now.progress = age.and_then(|age| Instant::now().checked_sub(age));
            now.stands_by = true;
            view.send_replace(now);
        }
    }

    /// Asks the leader to drain a worker.
    pub async fn drain(&self, worker: String) -> Result<Result<(), String>, Lost> {
        let request = wire::DrainRequest { hello: Some(self.hello.clone()), worker };
        let mut client = self.client.clone();
        let answer = tokio::time::timeout(ANSWER, client.drain(request)).await.map_err(|_| Lost)?;
        let refused = answer.map_err(|_| Lost)?.into_inner().refused;
        Ok(if refused.is_empty() { Ok(()) } else { Err(refused) })
    }

    /// Tells the one that led before that this coordinator leads.
    pub async fn lead(&self, address: String, term: Revision) -> Result<(), Lost> {
        let leading = wire::Leading { hello: Some(self.hello.clone()), address, term: term.0 };
        let mut client = self.client.clone();
        let told = tokio::time::timeout(ANSWER, client.lead(leading)).await.map_err(|_| Lost)?;
        told.map(|_| ()).map_err(|_| Lost)
    }
}

/// Every failure means to try again; one that will not pass by itself is worth a line.
fn refused(status: &tonic::Status) -> Lost {
    if !matches!(status.code(), tonic::Code::Unavailable | tonic::Code::Unknown | tonic::Code::Cancelled) {
        tracing::warn!("the leader does not take requests from here: {}", status.message());
    }
    Lost
}

fn job_to_wire(job: Job, hello: wire::PeerHello) -> wire::Job {
    let begun = |b: Begun| wire::Begun { tokens: b.tokens, done: b.done };
    wire::Job {
        hello: Some(hello),
        id: job.id,
        prompt: job.prompt,
        sampling: Some(sampling_to_wire(&job.sampling)),
        choices: job.choices,
        tokens_max: job.tokens_max,
        end_tokens: job.end_tokens,
        salt: job.salt,
        tenant: job.turn.tenant,
        priority: job.turn.priority,
        weight: job.turn.weight,
        begun: job.resumed.into_iter().flatten().map(begun).collect(),
        deaths: job.deaths,
    }
}

pub(super) fn job_from_wire(job: wire::Job) -> Job {
    let begun = |b: wire::Begun| Begun { tokens: b.tokens, done: b.done };
    let resumed = (!job.begun.is_empty()).then(|| job.begun.into_iter().map(begun).collect());
    Job {
        id: job.id,
        prompt: job.prompt,
        sampling: job.sampling.map_or(Sampling::GREEDY, sampling_from_wire),
        choices: job.choices,
        tokens_max: job.tokens_max,
        end_tokens: job.end_tokens,
        salt: job.salt,
        turn: Turn { tenant: job.tenant, priority: job.priority, weight: job.weight },
        resumed,
        deaths: job.deaths,
    }
}

pub(super) fn output_to_wire(output: Output) -> wire::JobAnswer {
    use wire::job_answer::Body;
    let body = match output {
        Output::Started { cached_tokens } => Body::Started(cached_tokens),
        Output::PromptScores(scores) => {
            Body::PromptScores(wire::Scores { scores: scores.into_iter().map(score_to_wire).collect() })
        }
        Output::Token { choice, token, score } => {
            Body::Token(wire::Token { choice, token, score: score.map(score_to_wire) })
        }
        Output::Done { choice, reason } => Body::Done(wire::Done { choice, by_token: reason == DoneReason::End }),
        Output::Failed(refusal) => Body::Refused(refusal_to_wire(refusal)),
        Output::Moved { deaths } => Body::Moved(deaths),
    };
    wire::JobAnswer { body: Some(body) }
}

fn output_from_wire(body: wire::job_answer::Body) -> Option<Output> {
    use wire::job_answer::Body;
    Some(match body {
        Body::Accepted(_) => return None,
        Body::Refused(refusal) => Output::Failed(refusal_from_wire(refusal)),
        Body::Started(cached_tokens) => Output::Started { cached_tokens },
        Body::Moved(deaths) => Output::Moved { deaths },
        Body::PromptScores(scores) => Output::PromptScores(scores.scores.into_iter().map(score_from_wire).collect()),
        Body::Token(t) => Output::Token { choice: t.choice, token: t.token, score: t.score.map(score_from_wire) },
        Body::Done(d) => {
            Output::Done { choice: d.choice, reason: if d.by_token { DoneReason::End } else { DoneReason::Length } }
        }
    })
}

pub(super) fn refusal_to_wire(refusal: Refusal) -> wire::Refusal {
    use wire::RefusalKind as Kind;
    let (kind, text, count, count_max) = match refusal {
        Refusal::QueueFull { waiting, waiting_max } => (Kind::QueueFull, String::new(), waiting, waiting_max),
        Refusal::TooLong { tokens, tokens_max } => (Kind::TooLong, String::new(), tokens, tokens_max),
        Refusal::NeverFits { blocks, blocks_max } => (Kind::NeverFits, String::new(), blocks, blocks_max),
        Refusal::NotServing(text) => (Kind::NotServing, text, 0, 0),
        Refusal::Failed(text) => (Kind::Failed, text, 0, 0),
    };
    wire::Refusal { kind: kind.into(), text, count: count as u64, count_max: count_max as u64 }
}

fn refusal_from_wire(refusal: wire::Refusal) -> Refusal {
    use wire::RefusalKind as Kind;
    let (count, most) = (refusal.count as usize, refusal.count_max as usize);
    match refusal.kind() {
        Kind::QueueFull => Refusal::QueueFull { waiting: count, waiting_max: most },
        Kind::TooLong => Refusal::TooLong { tokens: count, tokens_max: most },
        Kind::NeverFits => Refusal::NeverFits { blocks: count, blocks_max: most },
        Kind::NotServing => Refusal::NotServing(refusal.text),
        Kind::Failed | Kind::Unspecified => Refusal::Failed(refusal.text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::step::Score;

    #[test]
    fn a_job_survives_the_wire() {
        let job = Job {
            id: "x".into(),
            prompt: vec![1, 2],
            sampling: Sampling { temperature: 0.5, seed: 9, logprobs: Some(3), ..Sampling::GREEDY },
            choices: 2,
            tokens_max: 7,
            end_tokens: vec![4],
            salt: u64::MAX,
            turn: Turn { tenant: u64::MAX - 1, priority: -7, weight: 3 },
            resumed: Some(vec![Begun { tokens: vec![5], done: false }, Begun { tokens: vec![], done: true }]),
            deaths: 1,
        };
        for job in [job.clone(), Job { resumed: None, ..job }] {
            let hello = wire::PeerHello::default();
            let came = job_from_wire(job_to_wire(job.clone(), hello));
            assert_eq!(format!("{came:?}"), format!("{job:?}"));
        }
    }

    #[test]
    fn every_output_survives_the_wire() {
        let score = Score { logprob: -0.5, rank: 2, best: vec![(7, -0.1)] };
        let refusals = [
            Refusal::QueueFull { waiting: 1, waiting_max: 2 },
            Refusal::TooLong { tokens: 3, tokens_max: 4 },
            Refusal::NeverFits { blocks: 5, blocks_max: 6 },
            Refusal::NotServing("a".into()),
            Refusal::Failed("b".into()),
        ];
        let outputs = [
            Output::Started { cached_tokens: 5 },
            Output::PromptScores(vec![score.clone()]),
            Output::Token { choice: 1, token: 2, score: Some(score) },
            Output::Done { choice: 1, reason: DoneReason::End },
            Output::Done { choice: 0, reason: DoneReason::Length },
            Output::Moved { deaths: 3 },
        ];
        for output in outputs.into_iter().chain(refusals.map(Output::Failed)) {
            let came = output_to_wire(output.clone()).body.and_then(output_from_wire);
            assert_eq!(came, Some(output));
        }
    }
}
