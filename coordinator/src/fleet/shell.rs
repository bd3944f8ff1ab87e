//! The groups of the coordinator that leads: workers and requests to each group's own core and scheduler, and what they show
//! as one view.

use super::muster::Muster;
use super::router::{Router, Standing};
use super::{steps, views};
use crate::api::view::{ClusterView, Phase};
use crate::cluster::driver::{Ask, Parts, Shell};
use crate::cluster::ledger::Ledger;
use crate::cluster::proof::Reference;
use crate::cluster::service::Notice;
use crate::cluster::state::{Cluster, Planner, Rules};
use crate::cluster::store::{Revision, Store};
use crate::draft::Draft;
use crate::plan::explain;
use crate::schedule::Settings;
use crate::schedule::blocks::chained_hash;
use crate::schedule::driver::Driver;
use crate::schedule::job::{Refusal, Submission};
use crate::schedule::load::Load;
use crate::source::Source;
use model::plan::Epoch;
use model::proof::{Digest, SegmentId};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

/// Notices and submissions on their way to a group.
const NOTICES_MAX: usize = 1024;
const SUBMISSIONS_MAX: usize = 1024;
const ASKS_MAX: usize = 16;

/// How often views are joined anew for their ages alone, and spare workers looked for.
const TICK: Duration = Duration::from_millis(100);

/// What all groups have in common.
pub struct Common<S, P> {
    pub groups: usize,
    /// For each group.
    pub rules: Rules,
    pub planner: P,
    pub store: Arc<S>,
    /// The revision of the leader's key, where several coordinators share the store.
    pub fences: watch::Receiver<Option<Revision>>,
    /// Whether the cluster served under the leader before.
    pub served: bool,
    /// Requests that may wait, in each group.
    pub waiting_max: usize,
    /// See [`Settings`].
    pub drafts_max: usize,
    pub steps_ahead: usize,
    pub source: Arc<Source>,
    pub draft: Option<Draft>,
    /// The model's own digests, if there is a list of them.
    pub list: Option<BTreeMap<SegmentId, Digest>>,
}

/// What comes in.
pub struct Inbound {
    pub notices: mpsc::Receiver<Notice>,
    pub submissions: mpsc::Receiver<Submission>,
    pub asks: mpsc::Receiver<Ask>,
}

/// One group, from outside.
struct Group {
    notices: mpsc::Sender<Notice>,
    submissions: mpsc::Sender<Submission>,
    asks: mpsc::Sender<Ask>,
    view: watch::Receiver<ClusterView>,
    load: watch::Receiver<Load>,
    /// Whether another group serves.
    elsewhere: watch::Sender<bool>,
}

impl Group {
    /// Starts its tasks, which `lives` owns.
    fn start<S, P>(number: usize, common: &Common<S, P>, changed: mpsc::Sender<()>, lives: &mut JoinSet<()>) -> Group
    where
        S: Store + Send + Sync + 'static,
        P: Planner + Clone + Send + 'static,
    {
        let (notices, notice_queue) = mpsc::channel(NOTICES_MAX);
        let (submissions, queue) = mpsc::channel(SUBMISSIONS_MAX);
        let (asks, ask_queue) = mpsc::channel(ASKS_MAX);
        let (view_writer, view) = watch::channel(ClusterView::default());
        let (turns, turn_queue) = mpsc::channel(8);
        let (ended, ended_queue) = mpsc::channel(8);
        let (elsewhere, elsewhere_watch) = watch::channel(false);
        let (drafts_max, steps_ahead) = (common.drafts_max, common.steps_ahead);
        let settings = Settings { drafts_max, steps_ahead, ..Settings::without_plan(common.waiting_max) };
        let (driver, load) = Driver::new(settings, queue, Instant::now);
        let (source, draft) = (common.source.clone(), common.draft.clone());
        let shell = Shell::new(Parts {
            group: number,
            ledger: Ledger::new(common.store.clone(), common.fences.clone(), common.served).of_group(number),
            cluster: Cluster::new(common.rules.clone(), common.planner.clone(), Epoch(0)),
            notices: notice_queue,
            turns,
            ended: ended_queue,
            asks: ask_queue,
            view: view_writer,
            load: load.clone(),
            model_path: source.path.to_string_lossy().into_owned(),
            identity: source.identity.clone(),
            draft: draft.as_ref().map(|draft| (draft.path.to_string_lossy().into_owned(), draft.identity.clone())),
            reference: Some(Reference::new(Arc::new(source.spec.clone()), common.list.clone())),
            explain: Box::new(move |plan| {
                let draft = draft.as_ref().map(|draft| &*draft.model);
                explain::table(&source.spec, &source.storage, draft, plan)
            }),
        });
        lives.spawn(shell.run());
        lives.spawn(steps::run(driver, turn_queue, ended, elsewhere_watch, settings));
        let mut shown = view.clone();
        lives.spawn(async move {
            while shown.changed().await.is_ok() {
                // One that is full already says so.
                let _ = changed.try_send(());
            }
        });
        Group { notices, submissions, asks, view, load, elsewhere }
    }

    fn standing(&self) -> Standing {
        Standing { serves: self.view.borrow().phase == Phase::Serving, load: *self.load.borrow() }
    }
}

/// Runs all groups until one of their tasks ends. `view` keeps what it says of the leader.
pub async fn run<S, P>(common: Common<S, P>, inbound: Inbound, view: watch::Sender<ClusterView>)
where
    S: Store + Send + Sync + 'static,
    P: Planner + Clone + Send + 'static,
{
    let Inbound { mut notices, mut submissions, mut asks } = inbound;
    let mut lives = JoinSet::new();
    let (change, mut changed) = mpsc::channel(1);
    let groups = (0..common.groups).map(|n| Group::start(n, &common, change.clone(), &mut lives)).collect();
    let muster = Muster::new(common.groups, common.rules.workers);
    let router = Router::new(common.groups, chained_hash);
    let mut fleet = Fleet { groups, muster, router, view, waiting_max: common.waiting_max };
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = lives.join_next() => return,
            Some(submission) = submissions.recv() => fleet.submit(submission),
            Some(notice) = notices.recv() => fleet.notice(notice).await,
            Some(ask) = asks.recv() => fleet.ask(ask).await,
            Some(()) = changed.recv() => fleet.show(),
            _ = tick.tick() => {
                fleet.show();
                fleet.spare().await;
            }
            else => return,
        }
    }
}

struct Fleet {
    groups: Vec<Group>,
    muster: Muster,
    router: Router,
    view: watch::Sender<ClusterView>,
    waiting_max: usize,
}

impl Fleet {
    fn submit(&mut self, submission: Submission) {
        let standings: Vec<Standing> = self.groups.iter().map(Group::standing).collect();
        let group = self.router.pick(&submission.job.prompt, submission.job.salt, &standings);
        if let Err(full) = self.groups[group].submissions.try_send(submission) {
            let waiting_max = self.waiting_max;
            let refusal = Refusal::QueueFull { waiting: waiting_max, waiting_max };
            // Nobody is left to tell if this fails.
            let _ = full.into_inner().accepted.send(Err(refusal));
        }
    }

    /// A group's shell that is gone ends all; until then nobody misses the notice.
    async fn notice(&mut self, notice: Notice) {
        let group = match &notice {
            Notice::Joined { connection, offer, .. } => {
                let before = self.muster.group(&offer.worker);
                let group = self.muster.joined(&offer.worker, *connection);
                if let Some(before) = before.filter(|before| *before != group) {
                    self.leave(before, &offer.worker).await;
                }
                Some(group)
            }
            Notice::Said { connection, worker, .. } => self.muster.of(worker, *connection),
            Notice::Gone { connection, worker, .. } => {
                let group = self.muster.of(worker, *connection);
                self.muster.gone(worker, *connection);
                group
            }
            Notice::StepsOpened { worker, .. } | Notice::Moved { worker, .. } => self.muster.group(worker),
        };
        if let Some(group) = group {
            let _ = self.groups[group].notices.send(notice).await;
        }
    }

    /// The worker joined another group by a new connection, before the old one's end was heard of.
    async fn leave(&mut self, group: usize, worker: &model::plan::WorkerId) {
        let notice = Notice::Moved { worker: worker.clone(), why: "it joined another group".into() };
        let _ = self.groups[group].notices.send(notice).await;
    }

    /// A wish about a worker goes to its group; one that nobody knows, to the first, which says so.
    async fn ask(&mut self, ask: Ask) {
        let Ask::Drain { worker, .. } = &ask;
        let group = self.muster.group(&model::plan::WorkerId(worker.clone())).unwrap_or(0);
        let _ = self.groups[group].asks.send(ask).await;
    }

    fn views(&self) -> Vec<ClusterView> {
        self.groups.iter().map(|group| group.view.borrow().clone()).collect()
    }

    fn show(&mut self) {
        let views = self.views();
        let serving = views.iter().filter(|view| view.phase == Phase::Serving).count();
        for (number, (group, view)) in self.groups.iter().zip(&views).enumerate() {
            let here = usize::from(view.phase == Phase::Serving);
            group
                .elsewhere
                .send_if_modified(|elsewhere| std::mem::replace(elsewhere, serving > here) != (serving > here));
            if here == 0 {
                self.router.forget(number, &group.load.borrow());
            }
        }
        let joined = views::join(&views);
        self.view.send_if_modified(|view| {
            let leader = std::mem::take(&mut view.leader);
            let joined = ClusterView { leader, stands_by: view.stands_by, ..joined };
            // Ages alone are no news.
            let same = ClusterView { progress: joined.progress, leader: joined.leader.clone(), ..std::mem::take(view) }
                == joined;
            *view = joined;
            !same
        });
    }

    /// Takes a worker that one group can spare from it; it will come back and join the group that lacks one.
    async fn spare(&mut self) {
        if self.groups.len() == 1 {
            return;
        }
        if let Some((worker, _, group)) = self.muster.spare(&self.views()) {
            tracing::info!("group {group} can spare {}", worker.0);
            let notice = Notice::Moved { worker, why: "another group needs it".into() };
            let _ = self.groups[group].notices.send(notice).await;
        }
    }
}
