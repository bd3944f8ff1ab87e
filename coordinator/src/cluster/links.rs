//! The workers' connections, and the step streams of the epoch that is being loaded: which of what comes from the wire
//! counts, and what it means to the cluster's core. Pure; `C` is where a worker's commands go, `S` its step stream.

use super::event::{Action, Event};
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
    /// Step streams of workers that have not proved yet what they loaded: that word comes on another stream.
    early: BTreeMap<WorkerId, S>,
    /// What proves that a worker reads the same model.
    identity: Vec<u8>,
    reference: Option<Reference>,
}

/// What becomes of a step stream that a worker opens.
#[derive(Debug, PartialEq)]
pub enum Knock<S> {
    Open(S),
    Kept,
    Refused(S),
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
        Links { links: BTreeMap::new(), opening: None, early: BTreeMap::new(), identity, reference: None }
    }

    /// Compares what workers prove of their weights, too.
    pub fn comparing(self, reference: Option<Reference>) -> Links<C, S> {
        Links { reference, ..self }
    }

    /// One digest over all weights, once all are proven.
    pub fn weights(&self) -> Option<String> {
        self.reference.as_ref()?.root()
    }

    /// A worker that the core has let in, with what the core wants done for it. Expelled under its name is its older
    /// connection, which ends here and is given back; the new one stays.
    pub fn add(&mut self, worker: WorkerId, number: u64, commands: C, actions: &mut Vec<Action>) -> Option<C> {
        actions.retain(|action| !matches!(action, Action::Expel { worker: expelled, .. } if *expelled == worker));
        self.early.remove(&worker);
        self.links.insert(worker, Link { number, commands, proven: None }).map(|older| older.commands)
    }

    /// Closes a worker's connection.
    pub fn remove(&mut self, worker: &WorkerId) -> Option<C> {
        self.early.remove(worker);
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
                        // An old word that comes late takes nothing back.
                        link.proven = link.proven.max(Some(epoch));
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
            self.early.clear();
            self.opening = Some(Opening { plan: plan.clone(), streams: BTreeMap::new() });
        }
        new
    }

    /// A worker opens its step stream: given back where that may be at once, kept where the worker has yet to prove what it
    /// loaded ([`Self::proven`]), refused where it is of another epoch than the one that is loaded.
    pub fn knocks(&mut self, worker: &WorkerId, epoch: Epoch, stream: S) -> Knock<S> {
        let Some(link) = self.links.get(worker) else { return Knock::Refused(stream) };
        if self.opening.as_ref().is_none_or(|o| o.plan.epoch != epoch) {
            return Knock::Refused(stream);
        }
        if link.proven == Some(epoch) {
            return Knock::Open(stream);
        }
        self.early.insert(worker.clone(), stream);
        Knock::Kept
    }

    /// The step stream of a worker that has just proved what it loaded, if it was there before.
    pub fn proven(&mut self, worker: &WorkerId) -> Option<(Epoch, S)> {
        let epoch = self.opening.as_ref()?.plan.epoch;
        let proven = self.links.get(worker)?.proven == Some(epoch);
        if proven { Some((epoch, self.early.remove(worker)?)) } else { None }
    }

    /// Keeps an open step stream until all are there.
    pub fn opened(&mut self, worker: WorkerId, stream: S) {
        if let Some(opening) = &mut self.opening {
            opening.streams.insert(worker, stream);
        }
    }

    /// The step streams of the epoch that is to be served.
    pub fn streams(&mut self) -> BTreeMap<WorkerId, S> {
        self.opening.as_mut().map(|opening| std::mem::take(&mut opening.streams)).unwrap_or_default()
    }

    /// What is planned, loaded or served now: step streams of anything else are closed.
    pub fn only(&mut self, epoch: Option<Epoch>) {
        if self.opening.as_ref().is_some_and(|o| Some(o.plan.epoch) != epoch) {
            self.close();
        }
    }

    /// The epoch is over: its step streams are closed.
    pub fn close(&mut self) {
        self.early.clear();
        self.opening = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::mesh::Mesh;
    use model::plan::{Guesser, KernelFamily, Limits};
    use model::quant::Dtype;

    fn plan(epoch: u64) -> Arc<Plan> {
        Arc::new(Plan {
            epoch: Epoch(epoch),
            mesh: Mesh::ONE,
            dtype: Dtype::F32,
            family: KernelFamily::Vector,
            stages: Vec::new(),
            members: Vec::new(),
            limits: Limits { model_len_max: 1, step_tokens_max: 1, step_sequences_max: 1, blocks: 1 },
            guesser: Guesser::Nobody,
        })
    }

    fn links() -> (Links<(), u32>, WorkerId) {
        let mut links = Links::new(vec![7]);
        let id = WorkerId("w".into());
        assert!(links.add(id.clone(), 1, (), &mut Vec::new()).is_none());
        assert!(links.open(&plan(4)) && !links.open(&plan(4)));
        (links, id)
    }

    fn loaded(links: &mut Links<(), u32>, id: &WorkerId, epoch: u64) {
        let said = Said::Loaded { epoch: Epoch(epoch), identity: vec![7], digests: Vec::new() };
        assert!(links.said(id.clone(), said, None).is_none());
    }

    #[test]
    fn a_step_stream_that_overtakes_the_proof_is_kept_for_it() {
        let (mut links, id) = links();
        assert_eq!(links.knocks(&id, Epoch(4), 1), Knock::Kept);
        assert_eq!(links.proven(&id), None, "other words may come before the proof");
        loaded(&mut links, &id, 4);
        assert_eq!(links.proven(&id), Some((Epoch(4), 1)));
        assert_eq!(links.proven(&id), None);
        assert_eq!(links.knocks(&id, Epoch(4), 2), Knock::Open(2));
    }

    #[test]
    fn who_joins_again_keeps_the_newer_connection() {
        let (mut links, id) = links();
        let expel = |id: &WorkerId| Action::Expel { worker: id.clone(), why: "joined again".into() };
        let other = WorkerId("x".into());
        let mut actions = vec![expel(&id), expel(&other)];
        assert_eq!(links.add(id.clone(), 2, (), &mut actions), Some(()));
        assert_eq!(actions, [expel(&other)]);
        assert!(links.is_current(&id, 2) && !links.is_current(&id, 1));
    }

    #[test]
    fn a_proof_of_an_older_epoch_takes_none_back() {
        let (mut links, id) = links();
        loaded(&mut links, &id, 4);
        loaded(&mut links, &id, 3);
        assert_eq!(links.knocks(&id, Epoch(4), 1), Knock::Open(1));
    }

    #[test]
    fn a_step_stream_of_another_epoch_or_connection_is_refused() {
        let (mut links, id) = links();
        loaded(&mut links, &id, 3);
        assert_eq!(links.knocks(&id, Epoch(3), 1), Knock::Refused(1));
        assert_eq!(links.knocks(&id, Epoch(4), 1), Knock::Kept);
        links.add(id.clone(), 2, (), &mut Vec::new());
        loaded(&mut links, &id, 4);
        assert_eq!(links.proven(&id), None, "it was of the connection before");
        links.only(Some(Epoch(4)));
        assert_eq!(links.knocks(&id, Epoch(4), 1), Knock::Open(1));
        links.only(Some(Epoch(5)));
        assert_eq!(links.knocks(&id, Epoch(4), 1), Knock::Refused(1), "it did not come to be served");
        assert_eq!(links.knocks(&WorkerId("x".into()), Epoch(4), 1), Knock::Refused(1));
    }
}
