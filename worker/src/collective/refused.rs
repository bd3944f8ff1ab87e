//! Who was turned away at the door of the data plane: counted by reason, and said without letting a scanner fill the log.

use super::hello::Answer;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The same words are said again only after this long.
const QUIET: Duration = Duration::from_secs(5);

/// Why a connection was closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// It said no hello, or another's.
    Stranger,
    /// It showed no certificate that this worker's authority vouches for.
    Certificate,
    /// Its epoch is over.
    Stale,
    OtherPlan,
    OtherWire,
    Full,
    /// It asked for weights without the cluster's token.
    Token,
}

impl Reason {
    pub const ALL: [Reason; 7] = [
        Reason::Stranger,
        Reason::Certificate,
        Reason::Stale,
        Reason::OtherPlan,
        Reason::OtherWire,
        Reason::Full,
        Reason::Token,
    ];

    /// For a metric's label.
    pub fn word(self) -> &'static str {
        match self {
            Reason::Stranger => "stranger",
            Reason::Certificate => "certificate",
            Reason::Stale => "stale_epoch",
            Reason::OtherPlan => "other_plan",
            Reason::OtherWire => "other_wire",
            Reason::Full => "full",
            Reason::Token => "token",
        }
    }

    /// What a peer that said hello is told; `None`: it belongs here, whatever it gets.
    pub fn of(answer: Answer) -> Option<Reason> {
        match answer {
            Answer::Welcome | Answer::Lacks | Answer::Busy => None,
            Answer::Stale => Some(Reason::Stale),
            Answer::OtherPlan => Some(Reason::OtherPlan),
            Answer::OtherWire => Some(Reason::OtherWire),
            Answer::Full => Some(Reason::Full),
        }
    }
}

/// The counts since the start.
#[derive(Default)]
pub struct Refused {
    counts: [AtomicU64; Reason::ALL.len()],
    said: Mutex<Option<(String, Instant)>>,
}

impl Refused {
    pub fn count(&self, reason: Reason) -> u64 {
        self.counts[reason as usize].load(Ordering::Relaxed)
    }

    pub fn add(&self, reason: Reason) {
        self.counts[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// What was last said.
    #[cfg(test)]
    pub fn last(&self) -> String {
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        said.as_ref().map(|(text, _)| text.clone()).unwrap_or_default()
    }

    /// Counts a peer, and says what was wrong with it.
    pub fn say(&self, reason: Reason, peer: Option<SocketAddr>, what: &str) {
        self.add(reason);
        let peer = peer.map_or("somewhere".into(), |peer| peer.ip().to_string());
        let text = format!("a peer at {peer} was refused: it {what}");
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.as_ref().is_none_or(|(before, since)| *before != text || since.elapsed() > QUIET) {
            tracing::warn!("{text}");
            *said = Some((text, Instant::now()));
        }
    }
}
