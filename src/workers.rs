//! The worker processes that `serve` starts on this host. They end with this process, however it ends: each holds the
//! read end of a pipe whose other end only we hold.

use anyhow::{Context, Result};
use coordinator::api::view::ClusterView;
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use worker::config::Backend;

/// What each worker is given.
#[derive(Debug, Clone)]
pub struct Share {
    /// Each worker has a GPU of its own, where it computes on one.
    pub backend: Backend,
    pub devices: usize,
    pub threads: usize,
    /// 0 leaves it to the worker.
    pub memory_bytes: u64,
}

/// A worker that ends sooner than this after its start has not really run.
const SHORT_LIFE: Duration = Duration::from_secs(5);

/// Short lives in a row after which a worker is given up.
const SHORT_LIVES_MAX: u32 = 5;

/// Time for a worker to end by itself when asked.
const GRACE: Duration = Duration::from_secs(3);

/// A process that lives, and whose worker is a member no more and joins no more within this time, hangs: stopped, or in a driver that
/// does not answer.
const ABSENT_MAX: Duration = Duration::from_secs(8);

/// Keeps `count` workers running until dropped; a worker that dies or hangs is started again.
pub struct Workers {
    tasks: Vec<tokio::task::JoinHandle<()>>,
    stop: watch::Sender<bool>,
}

impl Workers {
    /// `view` tells who is a member of the coordinator at `coordinator`.
    pub fn start(
        count: usize,
        share: &Share,
        (coordinator, view): (SocketAddr, &watch::Receiver<ClusterView>),
        token: &str,
    ) -> Result<Workers> {
        let (stop, _) = watch::channel(false);
        let program = std::env::current_exe().context("this program's own path is unknown")?;
        let tasks = (0..count)
            .map(|index| {
                let keeper = Keeper {
                    program: program.clone(),
                    index,
                    name: format!("worker-{index}"),
                    share: share.clone(),
                    coordinator,
                    view: view.clone(),
                    token: token.into(),
                };
                tokio::spawn(keeper.keep(stop.subscribe()))
            })
            .collect();
        Ok(Workers { tasks, stop })
    }

    /// Ends all workers and waits for them.
    pub async fn stop(self) {
        let _ = self.stop.send(true);
        for task in self.tasks {
            let _ = task.await;
        }
    }
}

struct Keeper {
    program: std::path::PathBuf,
    index: usize,
    name: String,
    share: Share,
    coordinator: SocketAddr,
    view: watch::Receiver<ClusterView>,
    token: String,
}

impl Keeper {
    async fn keep(self, mut stop: watch::Receiver<bool>) {
        let mut short_lives = 0;
        loop {
            let began = Instant::now();
            let mut child = match self.spawn() {
                Ok(child) => child,
                Err(e) => {
                    tracing::error!("{} could not be started: {e}", self.name);
                    return;
                }
            };
            // Held here, as waiting for the child would close it.
            let lifeline = child.stdin.take();
            let status = tokio::select! {
                _ = stop.changed() => None,
                status = child.wait() => Some(status),
                () = self.hangs() => {
                    tracing::warn!("{} hangs: no member for {ABSENT_MAX:?}, and its process lives", self.name);
                    // What fails is that it has just ended.
                    let _ = child.start_kill();
                    Some(child.wait().await)
                }
            };
            drop(lifeline);
            let Some(status) = status else { return end(child).await };
            // A worker that ends well was asked to, and not by us.
            let drained = status.as_ref().is_ok_and(std::process::ExitStatus::success);
            let how = status.map_or_else(|e| e.to_string(), |s| s.to_string());
            if drained {
                tracing::info!("{} was drained", self.name);
                return;
            }
            tracing::warn!("{} ended ({how})", self.name);
            short_lives = if began.elapsed() < SHORT_LIFE { short_lives + 1 } else { 0 };
            if short_lives >= SHORT_LIVES_MAX {
                tracing::error!("{} ended {short_lives} times within {SHORT_LIFE:?} of its start: given up", self.name);
                return;
            }
            tokio::time::sleep(Duration::from_millis(50 << short_lives)).await;
        }
    }

    /// Completes once the worker was a member, is no more, and stays away.
    async fn hangs(&self) {
        let mut view = self.view.clone();
        let is_member = |view: &ClusterView| view.members.iter().any(|member| member.id == self.name);
        loop {
            let joined = view.wait_for(is_member).await.is_ok();
            if !joined || view.wait_for(|view| !is_member(view)).await.is_err() {
                // The coordinator ends, and its workers with it.
                return std::future::pending().await;
            }
            if tokio::time::timeout(ABSENT_MAX, view.wait_for(is_member)).await.is_err() {
                return;
            }
        }
    }

    fn spawn(&self) -> std::io::Result<Child> {
        Command::new(&self.program)
            .args(["worker", "--until-stdin-closes", "--name", &self.name])
            .args(["--coordinator", &self.coordinator.to_string()])
            .args(["--backend", self.share.backend.name(), "--gpu", &self.index.to_string()])
            .args(["--devices", &self.share.devices.to_string()])
            .args(["--threads", &self.share.threads.to_string()])
            .args(["--memory-bytes", &self.share.memory_bytes.to_string()])
            // Not an argument: those are for everyone on this host to read.
            .env("CONCLAVE_TOKEN", &self.token)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            // Ctrl-C in a terminal is for us; we end the workers.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
    }
}

/// Waits for a worker whose standard input was just closed.
async fn end(mut child: Child) {
    if tokio::time::timeout(GRACE, child.wait()).await.is_err() {
        let _ = child.kill().await;
    }
}
