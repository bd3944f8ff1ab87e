//! The kinds of failure that recovery matches on. A kind survives the wire; its text is for people.

/// What went wrong, by what can be done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FaultKind {
    /// The peer acts on an older epoch; its message is dropped.
    StaleEpoch,
    /// A rank's process or thread is gone, or its socket closed.
    RankLost,
    /// A collective was aborted because a peer failed.
    Aborted,
    /// A deadline passed without progress.
    Timeout,
    /// Weights or cache do not fit.
    OutOfMemory,
    /// A device broke, or what ran on it broke its context: nothing of the process can use it any more, a new process may.
    DeviceLost,
    /// A checkpoint file is missing, truncated or inconsistent.
    BadCheckpoint,
    /// The worker's build, protocol or kernels differ from the plan's.
    Incompatible,
    /// Two ranks disagreed about the next collective: a bug.
    Diverged,
    /// An invariant broke: a bug.
    Internal,
}

/// A failure with its text; numbers belong in the text.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{text}")]
pub struct Fault {
    pub kind: FaultKind,
    pub text: String,
}

impl Fault {
    pub fn new(kind: FaultKind, text: impl Into<String>) -> Fault {
        Fault { kind, text: text.into() }
    }
}
