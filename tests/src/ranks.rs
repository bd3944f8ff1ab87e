//! Ranks on devices as processes of this host: the test runs itself once a rank, on the fake CUDA stack ([`crate::gpp`]), and hears
//! what each says. What stands still or never ends is killed at a deadline, and fails the test.

use crate::gpp::Stack;
use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};
use worker::collective::memfd::{self, Offer, Origin};
use worker::collective::shared::Shared;

const SEAT: &str = "FAKE_RANK";

/// Generous, for machines whose cores are shared: passing it means a hang.
pub const HANG: Duration = Duration::from_secs(120);

/// In a rank's process: its place, and a collective of the host with the others.
pub struct Seat {
    pub rank: usize,
    pub size: usize,
    pub host: Shared,
}

impl Seat {
    /// The one that this process was started for.
    pub fn take() -> Result<Seat> {
        let text = std::env::var(SEAT)?;
        let numbers: Vec<u64> = text.split(' ').map(str::parse).collect::<Result<_, _>>()?;
        let [rank, size, process, descriptor, mark] = numbers[..] else { anyhow::bail!("{SEAT} = {text}") };
        let offer = Offer { process: process as u32, descriptor: descriptor as u32, mark };
        let (rank, size) = (rank as usize, size as usize);
        let seats = memfd::open(&offer, size)?;
        Ok(Seat { rank, size, host: Shared::new(seats, rank, 0) })
    }
}

/// What a rank's process came to.
#[derive(Debug)]
pub struct Ended {
    /// `None`: a signal, or the deadline.
    pub code: Option<i32>,
    pub said: String,
}

impl Ended {
    /// What stands behind `word` on a line of its own.
    pub fn after(&self, word: &str) -> Option<&str> {
        self.said.lines().find_map(|line| line.split_once(word)).map(|(_, rest)| rest)
    }
}

/// Runs `case` of `test` as `size` ranks. `settings` of each; `forgiven`: ranks that may be killed at the deadline or once all
/// others have ended.
pub fn run(
    stack: &Stack,
    (test, case): (&str, &str),
    size: usize,
    settings: &dyn Fn(usize) -> Vec<(&'static str, String)>,
    forgiven: &[usize],
) -> Result<Vec<Ended>> {
    let mark = u64::from(std::process::id()) << 32 | case.bytes().fold(7, |m, b| (m * 31 + u64::from(b)) & 0xffff_ffff);
    let origin = Origin::new(size, mark)?;
    let Offer { process, descriptor, mark } = origin.offer();
    let folder = stack.folder().join(format!("ranks-{process}-{descriptor}"));
    std::fs::create_dir_all(&folder)?;
    let file = |rank: usize| folder.join(rank.to_string());
    let mut children = Vec::new();
    for rank in 0..size {
        let out = File::create(file(rank))?;
        let mut command = stack.command(test, case)?;
        command.env(SEAT, format!("{rank} {size} {process} {descriptor} {mark}"));
        command.envs(settings(rank)).stdout(Stdio::from(out.try_clone()?)).stderr(Stdio::from(out));
        children.push(Running { rank, child: command.spawn()?, code: None, file: file(rank) });
    }
    let end = Instant::now() + HANG;
    loop {
        let mut waited = Vec::new();
        for child in &mut children {
            if !child.has_ended()? && !forgiven.contains(&child.rank) {
                waited.push(child.rank);
            }
        }
        if waited.is_empty() {
            break;
        }
        if Instant::now() > end {
            let said: String = children.iter().map(Running::said).collect();
            ensure!(false, "{case}: ranks {waited:?} hang:\n{said}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let ended = children.iter_mut().map(Running::end).collect();
    drop(children);
    std::fs::remove_dir_all(&folder).context("what the ranks said")?;
    ended
}

struct Running {
    rank: usize,
    child: Child,
    code: Option<Option<i32>>,
    file: PathBuf,
}

impl Running {
    fn has_ended(&mut self) -> Result<bool> {
        if self.code.is_none() {
            self.code = self.child.try_wait()?.map(|status| status.code());
        }
        Ok(self.code.is_some())
    }

    fn said(&self) -> String {
        let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
        format!("--- rank {}\n{}", self.rank, read(&self.file))
    }

    fn end(&mut self) -> Result<Ended> {
        if !self.has_ended()? {
            self.child.kill()?;
            self.code = Some(self.child.wait()?.code());
        }
        Ok(Ended { code: self.code.flatten(), said: self.said() })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.code.is_none() {
            // It is a test that failed already.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
