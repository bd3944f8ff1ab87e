//! The workers' connections, and the step streams of the epoch that is being loaded: which of what comes from the wire
//! counts, and what it means to the cluster's core. Pure; `C` is where a worker's commands go, `S` its step stream.

use super::event::Event;
use super::proof::Reference;
use super::service::Said;
use model::fault::{Fault, FaultKind};
use model::plan::{Epoch, Plan, WorkerId};
use std::collections::BTreeMap;
use std::sync::Arc;

#[derive(Debug)]
pub struct Links<C, S> {
    links: BTreeMap<WorkerId, Link<C>>,
    opening: Option<Opening<S>>,
    /// What proves that a worker reads the same model.
    identity: Vec<u8>,
    reference: Option<Reference>,
}

#[derive(Debug)]
struct Link<C> {
    number: u64,
    commands: C,
    /// The epoch for which it proved what it loaded.
    proven: Option<Epoch>,
}

/// The epoch that is being loaded.
#[derive(Debug)]
struct Opening<S> {
    plan: Arc<Plan>,
    streams: BTreeMap<WorkerId, S>,
}

impl<C, S> Links<C, S> {
    pub fn new(identity: Vec<u8>) -> Links<C, S> {
        Links { links: BTreeMap::new(), opening: None, identity, reference: None }
    }

    /// Compares what workers prove of their weights, too.
    pub fn comparing(self, reference: Option<Reference>) -> Links<C, S> {
        Links { reference, ..self }
    }

    /// One digest over all weights, once all are proven.
    pub fn weights(&self) -> Option<String> {
        self.reference.as_ref()?.root()
    }

    /// A worker that the core has let in; an older connection under its name is closed.
    pub fn add(&mut self, worker: WorkerId, number: u64, commands: C) {
        self.links.insert(worker, Link { number, commands, proven: None });
    }

    /// Closes a worker's connection.
    pub fn remove(&mut self, worker: &WorkerId) -> Option<C> {
        self.links.remove(worker).map(|link| link.commands)
    }

    /// Whether this connection is the worker's: words of older ones do not count.
    pub fn is_current(&self, worker: &WorkerId, number: u64) -> bool {
        self.links.get(worker).is_some_and(|link| link.number == number)
    }

    pub fn commands(&self, worker: &WorkerId) -> Option<&C> {
        self.links.get(worker).map(|link| &link.commands)
    }

    /// What a worker's word means; `serving`: the epoch that is served.
    pub fn said(&mut self, worker: WorkerId, said: Said, serving: Option<Epoch>) -> Option<Event> {
        Some(match said {
            Said::Beat(beat) => Event::Beat { worker, beat },
            Said::Loading { epoch, bytes_done, bytes_total } => {
                Event::Loading { worker, epoch, bytes_done, bytes_total }
            }
            Said::Failed { epoch, fault } if serving == Some(epoch) => Event::GroupFault { epoch, fault },
            Said::Failed { epoch, fault } => Event::LoadFailed { worker, epoch, fault },
            Said::Leaving => Event::Drain { worker },
            Said::Prepared { epoch } => Event::Prepared { worker, epoch },
            Said::Loaded { epoch, identity, digests } => match self.proves(&worker, epoch, &identity, &digests) {
                Ok(()) => {
                    if let Some(link) = self.links.get_mut(&worker) {
                        link.proven = Some(epoch);
                    }
                    return None;
                }
                Err(text) => Event::LoadFailed { worker, epoch, fault: Fault::new(FaultKind::Incompatible, text) },
            },
        })
    }

    /// Whether a worker holds what everyone else does: the model with this identity, and its weights.
    fn proves(&mut self, worker: &WorkerId, epoch: Epoch, identity: &[u8], digests: &[u8]) -> Result<(), String> {
        if identity != self.identity {
            return Err("its model files differ from the coordinator's".into());
        }
        // What is late is refused when its step stream is opened.
        match (&mut self.reference, &self.opening) {
            (Some(reference), Some(opening)) if opening.plan.epoch == epoch => {
                reference.take(&opening.plan, worker, digests)
            }
            _ => Ok(()),
        }
    }

    /// Workers are asked to load this plan; true where it is not the one that they were asked for before.
    pub fn open(&mut self, plan: &Arc<Plan>) -> bool {
        let new = self.opening.as_ref().is_none_or(|o| o.plan.epoch != plan.epoch);
        if new {
            self.opening = Some(Opening { plan: plan.clone(), streams: BTreeMap::new() });
        }
        new
    }

    /// Whether a step stream of this worker and epoch may be opened: only after it proved what it loaded.
    pub fn may_open(&self, worker: &WorkerId, epoch: Epoch) -> bool {
        let proven = self.links.get(worker).is_some_and(|link| link.proven == Some(epoch));
        proven && self.opening.as_ref().is_some_and(|o| o.plan.epoch == epoch)
    }

    /// Keeps a step stream that may be opened until all are there.
    pub fn opened(&mut self, worker: WorkerId, stream: S) {
        if let Some(opening) = &mut self.opening {
            opening.streams.insert(worker, stream);
        }
    }

    /// The step streams of the epoch that is to be served.
    pub fn streams(&mut self) -> BTreeMap<WorkerId, S> {
        self.opening.as_mut().map(|opening| std::mem::take(&mut opening.streams)).unwrap_or_default()
    }

    /// The epoch is over: its step streams are closed.
    pub fn close(&mut self) {
        self.opening = None;
    }
}
